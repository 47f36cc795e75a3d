#!/usr/bin/env bash
# Five novels by Jane Austen to train on and a sixth, Persuasion, to test with, one paragraph a line, out of Debian's package
# r-cran-janeaustenr (public domain texts; needs apt-get, dpkg-deb, python3).
# usage: austen.sh FOLDER        writes FOLDER/austen.train.txt and FOLDER/austen.test.txt
# PACKAGE=r-cran-janeaustenr_....deb takes a package that is there already.
set -euo pipefail
[ $# -eq 1 ] || { echo "usage: $0 FOLDER" >&2; exit 2; }
here=$(cd "$(dirname "$0")" && pwd)
mkdir -p "$1"
out=$(cd "$1" && pwd)
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
package=${PACKAGE:-}
if [ -z "$package" ]; then
  (cd "$work" && apt-get -q download r-cran-janeaustenr >&2)
  package=$(echo "$work"/r-cran-janeaustenr_*.deb)
fi
dpkg-deb -x "$package" "$work/package"
data=$work/package/usr/lib/R/site-library/janeaustenr/data
for novel in emma mansfieldpark northangerabbey prideprejudice sensesensibility persuasion; do
  python3 "$here/../novel.py" "$data" "$novel" "$work/$novel.txt"
done
(cd "$work" && cat emma.txt mansfieldpark.txt northangerabbey.txt prideprejudice.txt sensesensibility.txt >all.txt)
mv "$work/all.txt" "$out/austen.train.txt"
mv "$work/persuasion.txt" "$out/austen.test.txt"
wc -c "$out/austen.train.txt" "$out/austen.test.txt"
