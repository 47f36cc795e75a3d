#!/usr/bin/env python3
"""In a program compiled at plain -O2, AVX-512 instructions are in detail::avx512vnni, avx512bf16 and amx alone, AVX ones
in them and in detail::avx2 and avxvnni alone; what an ISA adds to the one below is in that ISA's namespace alone, in that
ISA's encoding; and the instructions that the kernels are written for are really there.

usage: check_objdump.py OBJECT COMPILER | check_objdump.py --self-test COMPILER      (exit status 77: skipped)

Function names are read mangled: a demangled name may mention a namespace in a template argument only.
"""
import os
import re
import shutil
import subprocess
import sys
import tempfile

# kernels/<isa> puts its code into nibble::<abi>::detail::<isa>.
HOME = re.compile(r"^_Z(?:Z|GV|TW|L)*N[KVrRO]*6nibble(\d+)")
EVEX_REGISTER = re.compile(r"%zmm|%[xy]mm(1[6-9]|2\d|3[01])\b|%k[0-7]\b|\{1to\d+\}|\{z\}")
# Memory offsets are written in hexadecimal, so an x87 or SSE mnemonic never begins with v; verr, verw and the
# virtualization instructions do.
NOT_VEX = re.compile(r"^(verr|verw|vm(call|launch|resume|xoff|xon|read|write|clear|ptr|func)\w*)$")

EVEX_HOMES = ("avx512vnni", "avx512bf16", "amx")
VEX_HOMES = ("avx2", "avxvnni")
# Who may use what only some CPUs have beyond registers of their size. {vex} is how objdump shows an encoding of AVX-VNNI.
OWN = [
    (re.compile(r"^\{vex\} vpdp"), ("avxvnni",)),
    (re.compile(r"^vpdp"), EVEX_HOMES),
    (re.compile(r"^(tdp|tile|(ld|st)tilecfg)"), ("amx",)),
    (re.compile(r"^(vdpbf16|vcvtne2?ps2?bf16|vcvtneps2bf16)"), ("avx512bf16",)),
]
NEEDED = {
    "avx2": ["vpmaddwd", "vpmaddubsw", "vfmadd", "vcvtph2ps"],
    "avxvnni": ["{vex} vpdpbusd"],
    "avx512vnni": ["vpdpbusd", "vfmadd"],
    "avx512bf16": ["vdpbf16ps"],
    "amx": ["ldtilecfg", "tileloadd", "tdpbsud", "tilestored", "tilerelease"],
}


def home_of(symbol):
    """'avx2', 'avx512vnni', another namespace of detail, or None."""
    match = HOME.match(symbol)
    if not match:
        return None
    rest = symbol[match.end() + int(match.group(1)):]
    match = re.match(r"6detail(\d+)", rest)
    if not match:
        return None
    return rest[match.end():match.end() + int(match.group(1))]


def scan(path):
    listing = subprocess.run(["objdump", "-d", "--no-show-raw-insn", "-w", path], check=True, capture_output=True,
                             text=True).stdout
    symbol, faults, seen = None, {}, {}
    instructions = 0
    for line in listing.splitlines():
        label = re.match(r"^[0-9a-f]+ <(.+)>:$", line)
        if label:
            symbol = label.group(1)
            continue
        code = re.match(r"^\s+[0-9a-f]+:\s+(.+)$", line)
        if not code:
            continue
        instructions += 1
        text = code.group(1).split("<")[0]
        shown = " ".join(text.split()[:2]) if text.startswith("{") else text.split()[0]
        mnemonic = shown.split()[-1]
        own = [homes for pattern, homes in OWN if pattern.match(shown)]
        if EVEX_REGISTER.search(text):
            kind = "EVEX"
        elif mnemonic.startswith("v") and not NOT_VEX.match(mnemonic):
            kind = "VEX"
        elif own:
            kind = "own"
        else:
            continue
        home = home_of(symbol)
        seen.setdefault(home, set()).add(shown)
        if any(home not in homes for homes in own):
            faults.setdefault(symbol, []).append(f"another ISA's: {text.strip()}")
        if home not in EVEX_HOMES and not (home in VEX_HOMES and kind == "VEX"):
            faults.setdefault(symbol, []).append(f"{kind}: {text.strip()}")
    return instructions, faults, seen


def check(path):
    instructions, faults, seen = scan(path)
    for symbol, lines in faults.items():
        name = subprocess.run(["c++filt", symbol], capture_output=True, text=True).stdout.strip()
        print(f"{name[:200]}: {len(lines)} instructions, e.g. {lines[0]}")
    good = not faults
    for home, needed in NEEDED.items():
        for mnemonic in needed:
            if not any(m.startswith(mnemonic) for m in seen.get(home, ())):
                print(f"no {mnemonic} in detail::{home}")
                good = False
    print(f"{os.path.basename(path)}: {instructions} instructions, "
          + ", ".join(f"{len(seen.get(h, ()))} mnemonics in {h}" for h in VEX_HOMES + EVEX_HOMES))
    return good


PLANT = r"""
#include <immintrin.h>
namespace nibble { inline namespace v0_1_test { namespace detail {
%(begin)s
namespace avx2 { inline void good(float* p) { _mm256_storeu_ps(p, _mm256_add_ps(_mm256_loadu_ps(p), _mm256_loadu_ps(p))); } }
%(leak)s
%(end)s
}}}
int main(int argc, char**) { float p[16] = {}; nibble::detail::avx2::good(p); %(call)s return int(p[argc]); }
"""


def self_test(compiler):
    clang = "clang" in compiler

    def begin(target):
        if clang:
            return f'_Pragma("clang attribute push(__attribute__((target(\\"{target}\\"))), apply_to = function)")'
        return f'_Pragma("GCC push_options") _Pragma("GCC target(\\"{target}\\")")'
    end = '_Pragma("clang attribute pop")' if clang else '_Pragma("GCC pop_options")'
    cases = {
        "clean": ("avx2", "", "", 0),
        # AVX code in a function of another namespace.
        "leak": ("avx2", "template <class T> struct Leak { static __attribute__((noinline)) void go(float* p) { avx2::good(p); } };",
                 "nibble::detail::Leak<int>::go(p);", 1),
        # AVX-512 code in the AVX2 namespace.
        "evex": ("avx512f", "namespace avx2 { inline __attribute__((noinline)) void wide(float* p) "
                 "{ _mm512_storeu_ps(p, _mm512_add_ps(_mm512_loadu_ps(p), _mm512_loadu_ps(p))); } }",
                 "nibble::detail::avx2::wide(p);", 1),
    }
    # An instruction of one ISA in another's namespace, in an encoding whose registers are no evidence.
    for name, home, code, expected in [
        ("avxvnni", "avxvnni", "%{vex%} vpdpbusd %%ymm0, %%ymm1, %%ymm2", 0),
        ("avxvnni in avx2", "avx2", "%{vex%} vpdpbusd %%ymm0, %%ymm1, %%ymm2", 1),
        ("avxvnni in avx512vnni", "avx512vnni", "%{vex%} vpdpbusd %%ymm0, %%ymm1, %%ymm2", 1),
        ("avx512vnni", "avx512vnni", "%{evex%} vpdpbusd %%ymm0, %%ymm1, %%ymm2", 0),
        ("avx512vnni in avxvnni", "avxvnni", "%{evex%} vpdpbusd %%ymm0, %%ymm1, %%ymm2", 1),
        ("avx512bf16", "avx512bf16", "vdpbf16ps %%ymm0, %%ymm1, %%ymm2", 0),
        ("amx", "amx", "tdpbsud %%tmm0, %%tmm1, %%tmm2", 0),
        ("amx in avx512bf16", "avx512bf16", "tilerelease", 1),
        ("avx512bf16 in avx512vnni", "avx512vnni", "vdpbf16ps %%ymm0, %%ymm1, %%ymm2", 1),
    ]:
        cases[name] = ("avx2", f'namespace {home} {{ inline __attribute__((noinline)) void planted() '
                       f'{{ asm volatile("{code}" : : : "xmm2"); }} }}', f"nibble::detail::{home}::planted();", expected)
    with tempfile.TemporaryDirectory() as work:
        for name, (target, leak, call, expected) in cases.items():
            source = os.path.join(work, name + ".cpp")
            with open(source, "w", encoding="utf-8") as f:
                f.write(PLANT % {"begin": begin(target), "end": end, "leak": leak, "call": call})
            subprocess.run([compiler, "-std=c++17", "-O2", "-c", source, "-o", source + ".o"], check=True)
            found = len(scan(source + ".o")[1])
            if found != expected:
                print(f"planted '{name}': {found} functions found, expected {expected}")
                return 1
    print(f"{len(cases)} planted programs judged rightly")
    return 0


def main():
    if shutil.which("objdump") is None or shutil.which(sys.argv[2]) is None or os.uname().machine != "x86_64":
        print("SKIPPED: needs objdump, the compiler and x86-64")
        return 77
    if sys.argv[1] == "--self-test":
        return self_test(sys.argv[2])
    return 0 if check(sys.argv[1]) else 1


if __name__ == "__main__":
    sys.exit(main())
