#!/usr/bin/env bash
# Installs what it needs, builds Nibble with its examples and benchmarks, and runs every test with CTest.
#
# usage: tests/run.sh [--build DIR] [--data DIR] [--jobs N] [--strict] [--no-install] [-- CTEST ARGUMENT ...]
#
#   --build DIR    build folder (build); what is fetched is kept in DIR/cache
#   --data DIR     texts and small models for the longer tests; also NIBBLE_DATA
#   --jobs N       compilers and tests at a time (the number of cores)
#   --strict       warnings are errors
#   --no-install   leave the system's packages as they are
#
# NIBBLE_MODEL=FILE.gguf takes a model from there instead of fetching it, NIBBLE_PYTHON=PATH a Python that has the
# packages gguf and numpy. Without a network the tests that need what is not there say so and are reported as skipped.
set -euo pipefail
cd "$(dirname "$0")/.."

build=build
jobs=$(nproc)
install=1
strict=OFF
while [ $# -gt 0 ]; do
  case $1 in
    --build) build=$2; shift 2 ;;
    --data) NIBBLE_DATA=$2; shift 2 ;;
    --jobs) jobs=$2; shift 2 ;;
    --strict) strict=ON; shift ;;
    --no-install) install=0; shift ;;
    --) shift; break ;;
    -h | --help) sed -n '2,/^set/{/^set/d;s/^# \{0,1\}//;p}' "$0"; exit 0 ;;
    *) echo "tests/run.sh: unknown argument '$1' (--help)" >&2; exit 2 ;;
  esac
done

source cmake/packages.sh
if [ $install = 1 ]; then
  nibble_install cmake ninja-build g++ libeigen3-dev libgtest-dev nlohmann-json3-dev libcli11-dev libbenchmark-dev \
    python3 python3-venv ca-certificates git || true
  # More compilers for the header and ABI checks, and CPUs that this machine is not. Skipped where not to be had.
  nibble_install g++-11 g++-12 clang-14 binutils qemu-user || true
fi

mkdir -p "$build/cache"
cache=$(cd "$build/cache" && pwd)
nibble_python "$cache"
nibble_model "$cache"
export NIBBLE_PYTHON="${NIBBLE_PYTHON:-}" NIBBLE_MODEL="${NIBBLE_MODEL:-}" NIBBLE_DATA="${NIBBLE_DATA:-}"
[ -n "$NIBBLE_PYTHON" ] || unset NIBBLE_PYTHON
[ -n "$NIBBLE_MODEL" ] || unset NIBBLE_MODEL
if [ -n "$NIBBLE_DATA" ]; then NIBBLE_DATA=$(cd "$NIBBLE_DATA" && pwd); else unset NIBBLE_DATA; fi

generator=()
if command -v ninja >/dev/null && [ ! -f "$build/CMakeCache.txt" ]; then generator=(-G Ninja); fi
cmake -S . -B "$build" "${generator[@]}" -DNIBBLE_WERROR=$strict
nice cmake --build "$build" --parallel "$jobs"
ctest --test-dir "$build" --output-on-failure --parallel "$jobs" --no-tests=error "$@"
