#!/usr/bin/env bash
# Compiles the probe program at plain -O2 and hands the object to check_objdump.py.
#
# usage: check_objdump.sh SOURCE_DIR EIGEN_INCLUDE_DIR COMPILER PYTHON
set -eu
source=$1 eigen=$2 compiler=$3 python=$4
command -v "$compiler" >/dev/null || { echo "SKIPPED: $compiler is not installed"; exit 77; }
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
for level in -O2 -O0; do
  nice "$compiler" -std=c++17 $level -I "$source/include" -isystem "$eigen" -c "$source/tests/house/isa/program.cpp" \
    -o "$work/program$level.o"
  "$python" "$source/tests/house/check_objdump.py" "$work/program$level.o" "$compiler"
done
