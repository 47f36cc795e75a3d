#!/usr/bin/env python3
"""The map in CONTRIBUTING.md names every folder of the tree, and no folder that is not there.

usage: check_map.py SOURCE_DIR
"""
import os
import re
import sys

source = sys.argv[1]
with open(os.path.join(source, "CONTRIBUTING.md"), encoding="utf-8") as f:
    text = f.read()
named = set(re.findall(r"`((?:include|tests|examples|benchmarks|cmake)/[\w/]*/?)`", text))
named = {n.rstrip("/") for n in named if n.endswith("/")}
missing = [n for n in sorted(named) if not os.path.isdir(os.path.join(source, n))]
unnamed = []
for top in ("include/nibble", "include/nibble/kernels"):
    for name in sorted(os.listdir(os.path.join(source, top))):
        if os.path.isdir(os.path.join(source, top, name)) and f"{top}/{name}" not in named:
            unnamed.append(f"{top}/{name}")
for name in missing:
    print(f"CONTRIBUTING.md names {name}/, which does not exist")
for name in unnamed:
    print(f"CONTRIBUTING.md does not name {name}/")
# The top level holds what the map says and nothing else.
allowed = {"include", "tests", "benchmarks", "examples", "cmake", "CMakeLists.txt", "CMakePresets.json", "LICENSE",
           "README.md", "CONTRIBUTING.md", "CHANGELOG.md"}
listed = os.popen(f"git -C '{source}' ls-files 2>/dev/null").read().split("\n")
extra = sorted({p.split("/")[0] for p in listed if p} - allowed)
extra = [e for e in extra if not e.startswith(".")]
for name in extra:
    print(f"{name} does not belong at the top level")
print(f"{len(named)} folders named")
sys.exit(1 if missing or unnamed or extra or not named else 0)
