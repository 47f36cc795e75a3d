#!/usr/bin/env bash
# What README promises about -fno-exceptions: it works, and an error prints its message and aborts.
#
# usage: check_no_exceptions.sh SOURCE_DIR EIGEN_INCLUDE_DIR COMPILER
set -eu
source=$1 eigen=$2 compiler=$3
command -v "$compiler" >/dev/null || { echo "SKIPPED: $compiler is not installed"; exit 77; }
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
nice "$compiler" -std=c++17 -O2 -DNDEBUG -fno-exceptions -fno-rtti -Wall -Wextra -Wconversion -Werror -I "$source/include" \
  -isystem "$eigen" -pthread "$source/tests/house/no_exceptions.cpp" -o "$work/program"
"$work/program"
status=0
(ulimit -c 0 && "$work/program" error) >/dev/null 2>"$work/message" || status=$?
cat "$work/message"
# 134 = 128 + SIGABRT.
[ "$status" -eq 134 ] || { echo "FAILED: exit status $status, expected 134 (abort)"; exit 1; }
grep -q '^nibble: .*63' "$work/message" || { echo "FAILED: the message names neither Nibble nor the shape"; exit 1; }
