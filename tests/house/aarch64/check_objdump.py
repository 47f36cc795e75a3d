#!/usr/bin/env python3
"""In an AArch64 program compiled at plain -O2, sdot is in detail::neon_dotprod and usdot and usmmla are in
detail::neon_i8mm alone, and they are really there.

usage: check_objdump.py PROGRAM | check_objdump.py --self-test COMPILER      (exit status 77: skipped)
"""
import os
import re
import shutil
import subprocess
import sys
import tempfile

# x86's check of the same name, in the folder above, knows how an ISA's functions are called.
sys.path.insert(0, os.path.join(os.path.dirname(os.path.abspath(__file__)), os.pardir))
from check_objdump import home_of  # noqa: E402

OBJDUMP = "aarch64-linux-gnu-objdump"
OWN = {"sdot": "neon_dotprod", "udot": "neon_dotprod", "usdot": "neon_i8mm", "sudot": "neon_i8mm",
       "smmla": "neon_i8mm", "ummla": "neon_i8mm", "usmmla": "neon_i8mm"}
# Of extensions that no kernel uses.
FOREIGN = {"bfdot", "bfmmla", "bfmlalb", "bfmlalt", "fmlal", "fmlal2", "fmlsl", "whilelo", "ptrue", "ld1w", "ld1b"}
NEEDED = {"sdot": "neon_dotprod", "usmmla": "neon_i8mm", "usdot": "neon_i8mm"}


def scan(path):
    listing = subprocess.run([OBJDUMP, "-d", "--no-show-raw-insn", "-w", path], check=True, capture_output=True,
                             text=True).stdout
    symbol, faults, seen, instructions = "", [], set(), 0
    for line in listing.splitlines():
        label = re.match(r"^[0-9a-f]+ <(.+)>:$", line)
        if label:
            symbol = label.group(1)
            continue
        code = re.match(r"^\s+[0-9a-f]+:\s+(\S+)", line)
        if not code:
            continue
        instructions += 1
        mnemonic = code.group(1)
        home = home_of(symbol)
        # The C library chooses its own routines for longer vectors.
        if mnemonic in OWN or (mnemonic in FOREIGN and "nibble" in symbol):
            seen.add((mnemonic, home))
            if OWN.get(mnemonic) != home:
                faults.append(f"{mnemonic} in {symbol}")
    return instructions, faults, seen


def self_test(compiler):
    begin = '_Pragma("GCC push_options") _Pragma("GCC target(\\"arch=armv8.2-a+dotprod+i8mm\\")")'
    body = 'inline __attribute__((noinline)) void f(int32x4_t& a, int8x16_t b) { asm("%s %%0.4s, %%1.16b, %%1.16b" : "+w"(a) : "w"(b)); }'
    cases = {"clean": ("neon_dotprod", "sdot", 0), "leak": ("gemm", "sdot", 1), "below": ("neon_dotprod", "usmmla", 1)}
    with tempfile.TemporaryDirectory() as work:
        for name, (home, mnemonic, expected) in cases.items():
            source = os.path.join(work, name + ".cpp")
            with open(source, "w", encoding="utf-8") as f:
                f.write(f"#include <arm_neon.h>\n{begin}\nnamespace nibble {{ inline namespace v0 {{ namespace detail::{home} {{\n"
                        f"{body % mnemonic}\n}}}}}}\n_Pragma(\"GCC pop_options\")\n"
                        f"void g(int32x4_t& a, int8x16_t b) {{ nibble::detail::{home}::f(a, b); }}\n")
            subprocess.run([compiler, "-std=c++17", "-O2", "-c", source, "-o", source + ".o"], check=True)
            if len(scan(source + ".o")[1]) != expected:
                print(f"planted '{name}': {scan(source + '.o')[1]}, expected {expected} faults")
                return 1
    print(f"{len(cases)} planted programs judged rightly")
    return 0


def main():
    if shutil.which(OBJDUMP) is None or (sys.argv[1] == "--self-test" and shutil.which(sys.argv[2]) is None):
        print(f"SKIPPED: needs {OBJDUMP} and the compiler")
        return 77
    if sys.argv[1] == "--self-test":
        return self_test(sys.argv[2])
    instructions, faults, seen = scan(sys.argv[1])
    for fault in sorted(set(faults)):
        print(fault)
    missing = [m for m, home in NEEDED.items() if (m, home) not in seen]
    for mnemonic in missing:
        print(f"no {mnemonic} in detail::{NEEDED[mnemonic]}")
    print(f"{instructions} instructions; " + ", ".join(sorted(f"{m} in {h}" for m, h in seen)))
    return 1 if faults or missing or instructions < 10000 else 0


sys.exit(main())
