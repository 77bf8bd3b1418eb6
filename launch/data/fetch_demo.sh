#!/usr/bin/env bash
# Fetch the demo data: captioned emoji in three drawing styles, from npm packages (6 MB), drawn at 64x64 with resvg.
#
#   fetch_demo.sh DIR          the pictures of plait-tiny
#   fetch_demo.sh DIR more     also what tiny-vision trains on: six more sets (21 MB), animated emoji (165 MB)
#
# writes DIR/train, DIR/heldout, DIR/tiny and DIR/examples, each a folder of PNG files with a manifest.jsonl (path,
# caption, style, concept, category, source, license) that `plait data pack` reads, and DIR/LICENSES.md.
#   train     90 % of the concepts                            for the tokenizers
#   heldout   the other 10 %, never trained on                for evaluation
#   tiny      350 concepts of train x 3 styles                for the tiny decoder
#   examples  24 pictures of tiny                             for `plait demo`
# and with "more"
#   more            4,303 pictures of other sets, of concepts in train or of none
#   clips/train, clips/heldout   animated emoji, 64x64, 12 frames a second, lossless WebP; split like the pictures
# Needs npm and Python with resvg-py (`pip install plait[data]`). PYTHON=... names the interpreter. Running it again
# fetches and draws only what is missing.
set -euo pipefail
OUT=${1:?usage: fetch_demo.sh DIR [more]}
PYTHON=${PYTHON:-python3}
HERE=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
mkdir -p "$OUT/raw" && OUT=$(cd "$OUT" && pwd)

command -v npm >/dev/null || { echo "fetch_demo.sh: npm is missing; install Node.js" >&2; exit 2; }
"$PYTHON" -c 'import resvg_py' 2>/dev/null || {
  echo "fetch_demo.sh: $PYTHON has no resvg_py; run: pip install 'plait[data]' (or set PYTHON=...)" >&2; exit 2; }

fetch() { # package version sha256 style
  local dir="$OUT/raw/$4"
  [ -f "$dir/package.json" ] && return
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

if [ "${2:-}" = more ]; then
  "$PYTHON" -c 'import PIL' 2>/dev/null || {
    echo "fetch_demo.sh: $PYTHON has no Pillow; run: pip install 'plait[data]' (or set PYTHON=...)" >&2; exit 2; }
  fetch @iconify-json/noto-v1 1.2.5 2bf62c26c2c2884aa99e90aec942cdaee17a5921f05690694f4978ad4b017c37 noto-v1
  fetch @iconify-json/emojione 1.2.3 26a14f44284407e8bcde91799388dca2bfd91dbcd55a97f425524a1c5b73610e emojione
  fetch @iconify-json/fxemoji 1.2.2 f3e72b3c59d05e1db03b7e308d55c0d05bd7ba3f625a90da1b79313c12858eef fxemoji
  fetch @iconify-json/fluent-emoji 1.2.7 8044210dbf11e016d4de85f15d01a243423bd832457e7e2491df1b751c0e272b fluent-emoji
  fetch @iconify-json/flat-color-icons 1.2.3 d8878a9b0f02d749bc8671eb7d47882eb711185cbcefbb365cbfb488773c4786 flat-color-icons
  fetch @iconify-json/fluent-color 1.2.21 fa2ddaaac7a2a7b902659cea1b5b8c03017ce2ae56295138876b86a36177dfbe fluent-color
  fetch @lobehub/fluent-emoji-anim-1 1.0.0 4c03ac178c1eabf2e2a16dd498f3cc2b92dc30ec3466ae38fdc497d4774c99ea animated
  "$PYTHON" "$HERE/draw_more.py" "$OUT"
fi
