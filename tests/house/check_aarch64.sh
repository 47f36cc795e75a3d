#!/usr/bin/env bash
# One program, cross-compiled at plain -O2, on three of qemu's AArch64 CPUs: each runs the ISAs that it has and no
# others, and every number equals this machine's. In its code, the instructions that kernels are written for are in their
# own namespaces alone.
#
# usage: check_aarch64.sh SOURCE_DIR EIGEN_INCLUDE_DIR COMPILER PYTHON      (exit status 77: skipped)
set -eu
source=$1 eigen=$2 compiler=$3 python=$4
for tool in "$compiler" aarch64-linux-gnu-g++ aarch64-linux-gnu-objdump qemu-aarch64-static c++; do
  command -v "$tool" >/dev/null || { echo "SKIPPED: $tool is not installed"; exit 77; }
done
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
unset NIBBLE_MAX_ISA
fail() { echo "FAILED: $*"; exit 1; }

build() { nice "$@" -std=c++17 -O2 -I "$source/include" -isystem "$eigen" "$source/tests/house/aarch64/bits.cpp"; }
target=()
case $compiler in *clang*) target=(--target=aarch64-linux-gnu) ;; *) target=(-Wno-psabi) ;; esac  # a note of GCC 10
build "$compiler" "${target[@]}" -static -Wall -Wextra -Wconversion -Wshadow -Werror -o "$work/cross"
build c++ -o "$work/native"

"$work/native" >"$work/native.txt"
[ "$(wc -l <"$work/native.txt")" -gt 25 ] || fail "the program printed too little"
echo "this machine $(tail -n 1 "$work/native.txt")"
while read -r cpu expected; do
  timeout 600 qemu-aarch64-static -cpu "$cpu" "$work/cross" >"$work/$cpu.txt" || fail "$cpu: exit status $?"
  ran=$(tail -n 1 "$work/$cpu.txt")
  echo "$cpu $ran"
  [ "$ran" = "ran: $expected" ] || fail "$cpu should run $expected"
  diff <(sed '$d' "$work/native.txt") <(sed '$d' "$work/$cpu.txt") || fail "$cpu computes other bits"
done <<EOF
cortex-a72 scalar neon
neoverse-n1 scalar neon neon_dotprod
max scalar neon neon_dotprod neon_i8mm
EOF

"$python" "$source/tests/house/aarch64/check_objdump.py" "$work/cross"
