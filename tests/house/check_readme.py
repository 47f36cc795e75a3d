#!/usr/bin/env python3
"""Compiles and runs README's first C++ block as it stands, and counts its lines.

usage: check_readme.py SOURCE_DIR EIGEN_INCLUDE_DIR COMPILER
"""
import os
import re
import subprocess
import sys
import tempfile

source, eigen, compiler = sys.argv[1:4]
with open(os.path.join(source, "README.md"), encoding="utf-8") as f:
    text = f.read()
blocks = re.findall(r"```cpp\n(.*?)```", text, flags=re.S)
if not blocks:
    sys.exit("README.md has no C++ block")
lines = blocks[0].count("\n")
if lines > 12:
    sys.exit(f"the first program of README.md has {lines} lines, it promises 12")
with tempfile.TemporaryDirectory() as work:
    program = os.path.join(work, "readme")
    with open(program + ".cpp", "w", encoding="utf-8") as f:
        f.write(blocks[0])
    subprocess.run([compiler, "-std=c++17", "-O2", "-Wall", "-Wextra", "-Werror", "-I", os.path.join(source, "include"),
                    "-isystem", eigen, "-pthread", program + ".cpp", "-o", program], check=True)
    output = subprocess.run([program], check=True, capture_output=True, text=True).stdout
    print(output, end="")
    if not output.strip():
        sys.exit("README's program prints nothing")
# Every file that README and CONTRIBUTING name in a link exists.
for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md"):
    with open(os.path.join(source, name), encoding="utf-8") as f:
        for target in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", f.read()):
            if not os.path.exists(os.path.join(source, target)):
                sys.exit(f"{name} links to {target}, which does not exist")
