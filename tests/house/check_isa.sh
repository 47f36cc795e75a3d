#!/usr/bin/env bash
# The same program, compiled once at plain -O2, on every ISA that this machine and qemu can offer: it never dies of an
# unknown instruction, NIBBLE_MAX_ISA is obeyed, and every ISA computes the same bits.
#
# usage: check_isa.sh PROGRAM     (exit status 77: not x86-64)
set -eu
program=$1
[ "$(uname -m)" = x86_64 ] || { echo "SKIPPED: needs x86-64"; exit 77; }
unset NIBBLE_MAX_ISA

fail() { echo "FAILED: $*"; exit 1; }
isa_of() { sed -n 's/^isa=\([^ ]*\) .*/\1/p' <<<"$1"; }
hash_of() { sed -n 's/.* hash=\(.*\)$/\1/p' <<<"$1"; }

best=$("$program")
echo "this machine: $best"
has() { grep -m 1 '^flags' /proc/cpuinfo | grep -qw "$1"; }
# Those that this machine runs, in ascending order of preference.
runs=(scalar)
if has avx2 && has fma && has f16c; then
  runs+=(avx2)
  if has avx_vnni; then runs+=(avxvnni); fi
  if has avx512f && has avx512bw && has avx512vl && has avx512dq && has avx512_vnni; then
    runs+=(avx512vnni)
    if has avx512_bf16; then
      runs+=(avx512bf16)
      if has amx_tile && has amx_int8; then runs+=(amx); fi
    fi
  fi
fi
expected=${runs[-1]}
# A dispatcher that always took the slow path would pass every other check.
[ "$(isa_of "$best")" = $expected ] || fail "this CPU has $expected"

want=scalar
for limit in scalar avx2 avxvnni avx512vnni avx512bf16 amx; do
  line=$(NIBBLE_MAX_ISA=$limit "$program")
  echo "NIBBLE_MAX_ISA=$limit: $line"
  # The best one up to the limit, which the machine may lack itself.
  case " ${runs[*]} " in *" $limit "*) want=$limit ;; esac
  [ "$(isa_of "$line")" = $want ] || fail "NIBBLE_MAX_ISA=$limit ran something else than $want"
  [ "$(hash_of "$line")" = "$(hash_of "$best")" ] || fail "the bits differ"
done
line=$(NIBBLE_MAX_ISA='' "$program")
[ "$line" = "$best" ] || fail "an empty NIBBLE_MAX_ISA changes something"
for bad in avx1024 neon; do
  if NIBBLE_MAX_ISA=$bad "$program" >/dev/null 2>&1; then fail "NIBBLE_MAX_ISA=$bad was taken"; fi
done

if ! command -v qemu-x86_64 >/dev/null; then
  echo "qemu-x86_64 is not installed: the CPUs below AVX2 are left out"
  exit 0
fi
for cpu in "qemu64 scalar" "Nehalem scalar" "SandyBridge scalar" "Haswell avx2"; do
  # shellcheck disable=SC2086
  set -- $cpu
  # A warning about features that the emulator lacks goes to stderr.
  line=$(timeout 300 qemu-x86_64 -cpu "$1" "$program" 2>/dev/null) || fail "$1: exit status $?"
  echo "qemu -cpu $1: $line"
  [ "$(isa_of "$line")" = "$2" ] || fail "qemu -cpu $1 should run $2"
  [ "$(hash_of "$line")" = "$(hash_of "$best")" ] || fail "the bits differ"
done
