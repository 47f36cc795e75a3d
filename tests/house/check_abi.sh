#!/usr/bin/env bash
# Translation units of one program, compiled with different -march, keep Nibble's symbols apart; passing Nibble's
# types between them fails at link time, while floats, Eigen's and std's types cross.
#
# usage: check_abi.sh SOURCE_DIR EIGEN_INCLUDE_DIR COMPILER      (exit status 77: skipped)
set -eu
source=$1 eigen=$2 compiler=$3
command -v "$compiler" >/dev/null || { echo "SKIPPED: $compiler is not installed"; exit 77; }
[ "$(uname -m)" = x86_64 ] || { echo "SKIPPED: needs x86-64"; exit 77; }
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
# Eigen's own weak templates are merged by the linker whatever we do, so its alignment must be set alike.
build() { nice "$compiler" -std=c++17 -O2 -w -DEIGEN_MAX_ALIGN_BYTES=64 -I "$source/include" -isystem "$eigen" -pthread "$@"; }
declare -A march=([plain]="" [avx2]="-mavx2 -mfma -mf16c" [v4]="-march=x86-64-v4")

echo "== one program, three settings"
here=$source/tests/house/abi
for unit in plain avx2 v4; do
  # shellcheck disable=SC2086
  build ${march[$unit]} -DPROBE_NAME=probe_$unit -DPROBE_RAW=raw_$unit -c "$here/probe_unit.cpp" -o "$work/$unit.o"
done
build -c "$here/main.cpp" -o "$work/main.o"
# The plain unit comes first: of the weak symbols that all units share (Eigen's, std's) the linker keeps the first.
build "$work/main.o" "$work/plain.o" "$work/avx2.o" "$work/v4.o" -o "$work/program"
"$work/program"

echo "== symbols"
for unit in plain avx2 v4; do
  nm --defined-only "$work/$unit.o" | awk '{print $NF}' | grep -E '^_Z.*6nibble' | sort -u >"$work/$unit.symbols"
  # A name may mention Nibble as an argument of Eigen's or std's template; the ABI namespace is in that as well.
  count=$(wc -l <"$work/$unit.symbols")
  echo "$unit: $count symbols, e.g. $(head -n 1 "$work/$unit.symbols" | c++filt | cut -c1-100)"
  [ "$count" -gt 20 ]
done
for pair in "plain avx2" "plain v4" "avx2 v4"; do
  # shellcheck disable=SC2086
  set -- $pair
  if [ -n "$(comm -12 "$work/$1.symbols" "$work/$2.symbols")" ]; then
    echo "FAILED: $1 and $2 share symbols:"
    comm -12 "$work/$1.symbols" "$work/$2.symbols" | head | c++filt
    exit 1
  fi
done

echo "== crossing"
# What links with what does not depend on optimization, and the kernels compile in a third of the time without: once a
# setting, for what crosses is not theirs.
kernels() { build -O0 -DNIBBLE_EXTERN_KERNELS -DNIBBLE_DEFINE_KERNELS -c "$source/cmake/kernels.cpp" "$@"; }
kernels -o "$work/kernels.o"
kernels -mavx2 -mfma -mf16c -o "$work/kernels_avx2.o"
cross() { build -O0 -DNIBBLE_EXTERN_KERNELS -c "$here/crossing.cpp" "$@"; }
for crossing in 1 2 3 4 5; do
  cross -DCROSSING=$crossing -DSIDE=0 -o "$work/caller.o"
  cross -DCROSSING=$crossing -DSIDE=1 -o "$work/same.o"
  cross -mavx2 -mfma -mf16c -DCROSSING=$crossing -DSIDE=1 -o "$work/other.o"
  # The same setting links and runs, so that a failure below has the one cause that is meant.
  build "$work/caller.o" "$work/same.o" "$work/kernels.o" -o "$work/same"
  "$work/same"
  if build "$work/caller.o" "$work/other.o" "$work/kernels.o" "$work/kernels_avx2.o" -o "$work/crossed" 2>"$work/log"; then linked=yes; else linked=no; fi
  case $crossing in
    1 | 2 | 3)
      echo "crossing $crossing (a Nibble type): linked=$linked"
      # A result type is in a function's name only where the namespace carries an ABI tag.
      if [ $crossing = 3 ] && ! grep -q abi_tag "$source/include/nibble/core/abi.hpp"; then continue; fi
      if [ $linked = yes ] || ! grep -q "undefined reference to .cross" "$work/log"; then
        cat "$work/log"
        exit 1
      fi
      ;;
    *)
      echo "crossing $crossing (Eigen's or std's type): linked=$linked"
      [ $linked = yes ] || { cat "$work/log"; exit 1; }
      if grep -qw avx2 /proc/cpuinfo; then "$work/crossed"; fi
      ;;
  esac
done
echo "ABI checks passed with $compiler"
