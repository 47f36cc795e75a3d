#!/usr/bin/env python3
"""Checks that includes go only downwards through the layers of include/nibble, and what the umbrella needs.

usage: check_layers.py INCLUDE_DIR [--self-test]

  1. A header of a layer includes headers of its own or of a lower layer only.
  2. There is no include cycle.
  3. The folders under nibble/ are exactly the layers named here.
  4. kernels/<isa> includes nothing of another ISA but the shared parts and the table it starts from (dispatch.hpp
     alone names all ISAs).
  5. The umbrellas reach Eigen and the standard library alone, and every header that needs no more is in one. The layers
     with an umbrella of their own (nibble/<layer>.hpp) are not in nibble/nibble.hpp.
  6. Nothing is included inside a target region.
"""
import os
import re
import sys
import tempfile

LAYERS = ["core", "formats", "kernels", "quantize", "gemm", "nn", "ptq", "train", "io"]
INCLUDE = re.compile(r'^\s*#\s*include\s*([<"])([^>"]+)[>"]', re.M)
# Headers of the system that are neither Eigen's nor the C++ library's, and need nothing to be installed.
SYSTEM = re.compile(r"^(Eigen/|unsupported/Eigen/|[a-z_]+$|(cpuid|immintrin|xmmintrin|emmintrin|fcntl|unistd|pthread)\.h$"
                    r"|sys/[a-z]+\.h$|arm_neon\.h$)")
# An ISA's table starts as that of the tier below.
TIER_BELOW = {isa: f"nibble/kernels/{below}/table.hpp" for isa, below in {
    "avxvnni": "avx2", "avx512bf16": "avx512vnni", "amx": "avx512bf16", "neon_dotprod": "neon",
    "neon_i8mm": "neon_dotprod"}.items()}
# AArch64's tiers share the loops of the lowest.
SHARED = {"neon_dotprod": "nibble/kernels/neon/", "neon_i8mm": "nibble/kernels/neon/"}
OPTIONAL = re.compile(r"^(nlohmann|CLI|gtest|benchmark)/")
REGION_BEGIN = re.compile(r"^NIBBLE_TARGET_BEGIN\(", re.M)


def strip_comments(text):
    text = re.sub(r"/\*.*?\*/", lambda m: "\n" * m.group(0).count("\n"), text, flags=re.S)
    return re.sub(r"(?m)//.*$", "", text)


def load(root):
    files = {}
    for folder, _, names in os.walk(os.path.join(root, "nibble")):
        for name in names:
            if name.endswith((".hpp", ".inl", ".h")):
                path = os.path.join(folder, name)
                with open(path, encoding="utf-8") as f:
                    files[os.path.relpath(path, root)] = strip_comments(f.read())
    return files


def layer_of(path):
    parts = path.split("/")
    return parts[1] if len(parts) > 2 else None


def check(root):
    files = load(root)
    faults = []
    top = os.path.join(root, "nibble")
    folders = sorted(d for d in os.listdir(top) if os.path.isdir(os.path.join(top, d)))
    for folder in folders:
        if folder not in LAYERS:
            faults.append(f"nibble/{folder}: not a layer; put it into the list of this check and into CONTRIBUTING.md")
    own, foreign = {}, {}
    for path, text in files.items():
        own[path], foreign[path] = [], []
        for kind, target in INCLUDE.findall(text):
            if target in files:
                own[path].append(target)
            elif target.startswith("nibble/"):
                faults.append(f"{path}: includes {target}, which does not exist")
            elif kind == '"':
                faults.append(f'{path}: includes "{target}"; our own headers are written "nibble/..."')
            else:
                foreign[path].append(target)
                if not SYSTEM.match(target) and not OPTIONAL.match(target):
                    faults.append(f"{path}: includes <{target}>, which is neither Eigen nor the standard library")

    for path in files:
        layer = layer_of(path)
        for target in own[path]:
            above = layer_of(target)
            if layer is None:
                continue
            if above is None:
                faults.append(f"{path}: includes an umbrella")
            elif layer in LAYERS and above in LAYERS and LAYERS.index(above) > LAYERS.index(layer):
                faults.append(f"{path}: includes {target}, upwards from {layer} to {above}")
        # kernels/<isa>/x includes kernels/<isa>/, kernels/vector/, scalar's helpers or kernels/*.hpp only.
        parts = path.split("/")
        if len(parts) == 4 and parts[1] == "kernels":
            for target in own[path]:
                other = target.split("/")
                if target.endswith(".inl") and target.startswith(SHARED.get(parts[2], "-")):
                    continue
                if len(other) == 4 and other[1] == "kernels" and other[2] not in (parts[2], "vector", "scalar") and target != TIER_BELOW.get(parts[2]):
                    faults.append(f"{path}: includes {target}, another ISA's kernels")

    # Cycles, by depth-first search.
    state = {}

    def visit(path, trail):
        state[path] = 1
        for target in own[path]:
            if state.get(target) == 1:
                faults.append("cycle: " + " -> ".join(trail + [path, target]))
            elif target not in state:
                visit(target, trail + [path])
        state[path] = 2

    for path in files:
        if path not in state:
            visit(path, [])

    reach = {}

    def closure(path):
        if path not in reach:
            reach[path] = set()
            seen = {path}
            for target in own[path]:
                seen |= closure(target)
            reach[path] = seen
        return reach[path]

    umbrella = "nibble/nibble.hpp"
    if umbrella not in files:
        faults.append(f"{umbrella} is missing")
    else:
        others = sorted(p for p in files if p.count("/") == 1 and p != umbrella)
        for path in sorted(closure(umbrella)):
            if f"nibble/{layer_of(path)}.hpp" in others:
                faults.append(f"{path}: {umbrella} reaches it, whose layer has an umbrella of its own")
        inside = set().union(*(closure(p) for p in [umbrella] + others))
        for path in sorted(inside):
            for target in foreign[path]:
                if OPTIONAL.match(target):
                    faults.append(f"{path}: an umbrella reaches it, and it includes <{target}>")
        for path in sorted(files):
            if not path.endswith(".hpp") or path in inside:
                continue
            needs = {t for p in closure(path) for t in foreign[p] if OPTIONAL.match(t)}
            if not needs:
                faults.append(f"{path}: needs Eigen and the standard library alone, yet every umbrella leaves it out")

    for path, text in files.items():
        depth = 0
        for number, line in enumerate(text.split("\n"), 1):
            if line.startswith("NIBBLE_TARGET_BEGIN("):
                depth += 1
            elif line.startswith("NIBBLE_TARGET_END"):
                depth -= 1
            elif depth and INCLUDE.match(line):
                target = INCLUDE.match(line).group(2)
                # Kernels that are written once over an ISA's operations come in as .inl, which include nothing.
                if not target.endswith(".inl"):
                    faults.append(f"{path}:{number}: includes {target} inside a target region")
                elif target in files and (own[target] or foreign[target]):
                    faults.append(f"{target}: is included inside a target region ({path}) and includes something itself")
        if depth:
            faults.append(f"{path}: NIBBLE_TARGET_BEGIN and NIBBLE_TARGET_END do not match")
    return files, faults


def self_test():
    """Plants one violation of each kind and expects it to be found."""
    plants = {
        "upwards": {"nibble/core/a.hpp": '#include "nibble/gemm/b.hpp"\n', "nibble/gemm/b.hpp": "\n"},
        "cycle": {"nibble/core/a.hpp": '#include "nibble/core/b.hpp"\n', "nibble/core/b.hpp": '#include "nibble/core/a.hpp"\n'},
        "not a layer": {"nibble/misc/a.hpp": "\n"},
        "does not exist": {"nibble/core/a.hpp": '#include "nibble/core/none.hpp"\n'},
        "an umbrella reaches": {"nibble/io/a.hpp": "#include <nlohmann/json.hpp>\n", "nibble/nibble.hpp": '#include "nibble/io/a.hpp"\n'},
        "leaves it out": {"nibble/io/a.hpp": "\n"},
        "neither Eigen": {"nibble/core/a.hpp": "#include <boost/any.hpp>\n"},
        "another ISA": {"nibble/kernels/avx2/a.hpp": '#include "nibble/kernels/avx512vnni/b.hpp"\n',
                        "nibble/kernels/avx512vnni/b.hpp": "\n"},
        "inside a target region": {"nibble/kernels/avx2/a.hpp": 'NIBBLE_TARGET_BEGIN("avx2")\n#include <vector>\nNIBBLE_TARGET_END\n'},
        "do not match": {"nibble/kernels/avx2/a.hpp": 'NIBBLE_TARGET_BEGIN("avx2")\n'},
        "umbrella of its own": {"nibble/ptq/a.hpp": "\n", "nibble/ptq.hpp": '#include "nibble/ptq/a.hpp"\n',
                                "nibble/nibble.hpp": '#include "nibble/ptq/a.hpp"\n'},
        "includes an umbrella": {"nibble/core/a.hpp": '#include "nibble/nibble.hpp"\n'},
    }
    for expected, tree in plants.items():
        with tempfile.TemporaryDirectory() as root:
            headers = [p for p in tree if p != "nibble/nibble.hpp"]
            if "nibble/nibble.hpp" not in tree and expected != "leaves it out":
                tree["nibble/nibble.hpp"] = "".join(f'#include "{p}"\n' for p in headers)
            tree.setdefault("nibble/nibble.hpp", "\n")
            for path, text in tree.items():
                os.makedirs(os.path.dirname(os.path.join(root, path)), exist_ok=True)
                with open(os.path.join(root, path), "w", encoding="utf-8") as f:
                    f.write(text)
            faults = check(root)[1]
            if not any(expected in fault for fault in faults):
                print(f"planted '{expected}', found only {faults}")
                return 1
    print(f"{len(plants)} planted violations found")
    return 0


def main():
    if "--self-test" in sys.argv:
        return self_test()
    files, faults = check(sys.argv[1])
    for fault in faults:
        print(fault)
    print(f"{len(files)} headers, {len(faults)} faults")
    return 1 if faults or len(files) < 5 else 0


sys.exit(main())
