#!/usr/bin/env bash
# Installs what it needs, builds the benchmarks and runs them: this machine's limits first, then Nibble beside Eigen,
# OpenBLAS and oneDNN in one process, in interleaved rounds.
#
# usage: benchmarks/run.sh [--json FILE] [--quick] [--svg DIR] [--build DIR] [--no-install] [OPTION ...]
#
#   --json FILE    write all rows there
#   --quick        about a minute instead of about ten
#   --svg DIR      draw roofline.svg, sweep_tokens.svg and sweep_shapes.svg there
#   --build DIR    build folder (build-benchmarks)
#   --no-install   leave the system's packages as they are
#
# Other options go to the program; build-benchmarks/benchmarks/nibble_benchmarks --help lists them.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
root=$(dirname "$here")

build=$root/build-benchmarks
install=1
options=()
while [ $# -gt 0 ]; do
  case $1 in
    --build) build=${2:?--build needs a folder}; shift 2 ;;
    --no-install) install=0; shift ;;
    -h | --help) sed -n '2,/^set/{/^set/d;s/^# \{0,1\}//;p}' "$0"; exit 0 ;;
    *) options+=("$1"); shift ;;
  esac
done

source "$root/cmake/packages.sh"
if [ $install = 1 ]; then
  nibble_install cmake g++ make libeigen3-dev libbenchmark-dev
  # The peers: each is left out where it is not to be had.
  nibble_install libopenblas-dev || true
  nibble_install libdnnl-dev || true
fi

# Quiet unless it fails; examples and tests are not needed here.
mkdir -p "$build"
if ! { cmake -S "$root" -B "$build" -DCMAKE_BUILD_TYPE=Release -DNIBBLE_BUILD_TESTS=OFF -DNIBBLE_BUILD_EXAMPLES=OFF \
  -DNIBBLE_BUILD_BENCHMARKS=ON && cmake --build "$build" --target nibble_benchmarks --parallel "$(nproc)"; } \
  >"$build/benchmarks.log" 2>&1; then
  tail -n 40 "$build/benchmarks.log" >&2
  echo "benchmarks/run.sh: the build failed; all of it is in $build/benchmarks.log" >&2
  exit 1
fi
exec "$build/benchmarks/nibble_benchmarks" ${options[@]+"${options[@]}"}
