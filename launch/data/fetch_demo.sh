#!/usr/bin/env bash
# Fetch the demo data: captioned emoji in three drawing styles, from npm packages (6 MB), drawn at 64x64 with resvg.
#
#   fetch_demo.sh DIR
#
# writes DIR/train, DIR/heldout, DIR/tiny and DIR/examples, each a folder of PNG files with a manifest.jsonl (path,
# caption, style, concept, category, source, license) that `plait data pack` reads, and DIR/LICENSES.md.
#   train     90 % of the concepts                            for the tokenizers
#   heldout   the other 10 %, never trained on                for evaluation
#   tiny      350 concepts of train x 3 styles                for the tiny decoder
#   examples  24 pictures of tiny                             for `plait demo`
# Needs npm and Python with resvg-py (`pip install plait[data]`). PYTHON=... names the interpreter. Running it again
# fetches and draws only what is missing.
set -euo pipefail
OUT=${1:?usage: fetch_demo.sh DIR}
PYTHON=${PYTHON:-python3}
HERE=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
mkdir -p "$OUT/raw" && OUT=$(cd "$OUT" && pwd)

command -v npm >/dev/null || { echo "fetch_demo.sh: npm is missing; install Node.js" >&2; exit 2; }
"$PYTHON" -c 'import resvg_py' 2>/dev/null || {
  echo "fetch_demo.sh: $PYTHON has no resvg_py; run: pip install 'plait[data]' (or set PYTHON=...)" >&2; exit 2; }

fetch() { # package version sha256 style
  local dir="$OUT/raw/$4"
  [ -f "$dir/icons.json" ] && return
  local tmp; tmp=$(mktemp -d "$OUT/raw/.fetch.XXXXXX")
  echo "fetching $1@$2" >&2
  (cd "$tmp" && npm pack --silent "$1@$2" >/dev/null)
  local archive; archive=$(ls "$tmp"/*.tgz)
  echo "$3  $archive" | sha256sum -c --quiet - || { echo "fetch_demo.sh: checksum of $1@$2 differs" >&2; exit 1; }
  mkdir "$tmp/out" && tar xzf "$archive" -C "$tmp/out" --strip-components=1
  mv "$tmp/out" "$dir" && rm -r "$tmp"
}
fetch @iconify-json/noto 1.2.9 3e918d88fc945c0bb3d468dbace6f88caef67f01c9f0e7bcae0915a042e8f1ad noto
fetch @iconify-json/twemoji 1.2.5 19046dff7d8707ce96212ec86468b36ac5f8e60409629dd13f809265c6d0ebb7 twemoji
fetch @iconify-json/fluent-emoji-flat 1.2.6 7d064769dee690815f823bc5bcc511d957198caf9f5edd8dd9c1aa48a6aeb175 fluent

"$PYTHON" "$HERE/draw_emoji.py" "$OUT"
