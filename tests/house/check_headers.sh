#!/usr/bin/env bash
# Every public header compiles alone, without a warning.
#
# usage: check_headers.sh INCLUDE_DIR EIGEN_INCLUDE_DIR COMPILER STANDARD [FLAG ...]
#        check_headers.sh --together INCLUDE_DIR EIGEN_INCLUDE_DIR COMPILER STANDARD [FLAG ...]
#        check_headers.sh --self-test EIGEN_INCLUDE_DIR COMPILER
#
# --together: all of them in one unit, for a further standard or set of flags: much faster, and as strict about the code.
# Exit status 77 means skipped: the compiler is not installed. HOUSE_JOBS compilers run at a time (1).
set -u

check() {
  local include=$1 eigen=$2 compiler=$3 standard=$4
  shift 4
  local work header extra count=0 failed=0
  work=$(mktemp -d)
  export include eigen compiler standard work
  export flags="$*"
  compile_one() {
    local log="$work/${1//\//_}.log"
    # With -fsyntax-only GCC leaves out what only the optimizer sees; the other tests compile that with -Wall too.
    # shellcheck disable=SC2086
    if ! printf '#include <%s>\n' "$@" "$@" |
        nice "$compiler" -std="$standard" -fsyntax-only -Wall -Wextra -Wconversion -Wshadow -Werror $flags \
          -I "$include" -isystem "$eigen" -x c++ - >"$log" 2>&1; then
      echo "FAILED: $* ($compiler $standard $flags)"
      head -n 30 "$log"
      return 1
    fi
  }
  export -f compile_one
  local list=()
  while IFS= read -r header; do
    extra=$(grep -lE '^#\s*include\s*<nlohmann/' "$include/$header")
    if [ -n "$extra" ] && ! echo '#include <nlohmann/json.hpp>' | "$compiler" -E -x c++ - >/dev/null 2>&1; then
      echo "left out, nlohmann/json is not installed: $header"
      continue
    fi
    list+=("$header")
    count=$((count + 1))
  done < <(cd "$include" && find nibble -name '*.hpp' | sort)
  [ "$together" = no ] || list=("${list[*]}")
  printf '%s\n' "${list[@]}" | xargs -P "${HOUSE_JOBS:-1}" -I{} bash -c 'compile_one {}' || failed=1
  rm -rf "$work"
  echo "$count headers with $compiler -std=$standard $flags"
  [ "$failed" -eq 0 ] && [ "$count" -gt 0 ]
}

together=no
if [ "$1" = --together ]; then
  together=yes
  shift
fi
if [ "$1" = --self-test ]; then
  # A header that lacks an include, and one with a narrowing conversion, must be found.
  command -v "$3" >/dev/null || exit 77
  root=$(mktemp -d)
  trap 'rm -rf "$root"' EXIT
  mkdir -p "$root/nibble"
  printf '#pragma once\ninline int twice(int x) { return 2 * x; }\n' >"$root/nibble/good.hpp"
  check "$root" "$2" "$3" c++17 || exit 1
  printf '#pragma once\ninline std::string name() { return ""; }\n' >"$root/nibble/lacking.hpp"
  check "$root" "$2" "$3" c++17 && { echo "a header that lacks an include passed"; exit 1; }
  printf '#pragma once\ninline int half(double x) { return x / 2; }\n' >"$root/nibble/lacking.hpp"
  check "$root" "$2" "$3" c++17 && { echo "a narrowing conversion passed"; exit 1; }
  together=yes
  check "$root" "$2" "$3" c++17 && { echo "a narrowing conversion among others passed"; exit 1; }
  echo "self-test passed"
  exit 0
fi

if ! command -v "$3" >/dev/null; then
  echo "SKIPPED: $3 is not installed"
  exit 77
fi
check "$@"
