#!/usr/bin/env bash
# Builds and runs one consumer project, from nothing.
#
# usage: check_consumer.sh find_package|fetch_content|add_subdirectory|copied SOURCE_DIR EIGEN_INCLUDE_DIR COMPILER
set -eu
kind=$1 source=$2 eigen=$3 compiler=$4
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
here=$source/tests/house/consumers
export CXX=$compiler
unset CXXFLAGS
if ! command -v make >/dev/null; then export CMAKE_GENERATOR=Ninja; fi

configure() { nice cmake -S "$here/$kind" -B "$work/build" -DNIBBLE_TREE="$source" "$@" >"$work/log" 2>&1 || { cat "$work/log"; exit 1; }; }
compile() { nice cmake --build "$work/build" >"$work/log" 2>&1 || { cat "$work/log"; exit 1; }; }

case $kind in
  find_package)
    cmake -S "$source" -B "$work/nibble" -DNIBBLE_BUILD_TESTS=OFF -DNIBBLE_BUILD_EXAMPLES=OFF \
      -DNIBBLE_BUILD_BENCHMARKS=OFF >"$work/log" 2>&1 || { cat "$work/log"; exit 1; }
    cmake --install "$work/nibble" --prefix "$work/prefix" >"$work/log" 2>&1 || { cat "$work/log"; exit 1; }
    # Every header has arrived, and nothing else has.
    diff <(cd "$source/include" && find nibble -type f | sort) <(cd "$work/prefix/include" && find . -type f | sed 's|^\./||' | sort)
    # The installed tree stands on its own: it may not point back to the sources.
    if grep -rl "$source" "$work/prefix"; then echo "FAILED: installed files name the source tree"; exit 1; fi
    configure -DCMAKE_PREFIX_PATH="$work/prefix"
    compile
    # A version that is not compatible is refused.
    sed 's/nibble 0.1 REQUIRED/nibble 99 REQUIRED/' "$here/$kind/CMakeLists.txt" >"$work/CMakeLists.txt"
    if cmake -S "$work" -B "$work/refused" -DCMAKE_PREFIX_PATH="$work/prefix" >"$work/log" 2>&1; then
      echo "FAILED: version 99 was found"
      exit 1
    fi
    grep -q "99" "$work/log"
    "$work/build/consumer"
    ;;
  fetch_content | add_subdirectory)
    configure
    compile
    "$work/build/consumer"
    ;;
  copied)
    cp -r "$source/include" "$work/include"
    nice "$compiler" -std=c++17 -O2 -I "$work/include" -isystem "$eigen" -pthread "$here/main.cpp" -o "$work/consumer"
    "$work/consumer"
    ;;
  *)
    echo "unknown kind $kind"
    exit 2
    ;;
esac
