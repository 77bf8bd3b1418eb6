#!/usr/bin/env bash
# The whole way on one CPU machine, in about an hour on 2 cores: data, tokenizers, tokens, decoder, figures.
# Run it from the repository root. It ends with the bundle in runs/tiny/decoder/bundle; every step that was done is
# skipped or resumed when it is run again.
set -euo pipefail

bash launch/data/fetch_demo.sh data/demo
for split in train heldout tiny; do
  [ -f data/demo/shards/$split/manifest.json ] || plait data pack data/demo/$split -o data/demo/shards/$split --per-shard 500
done
plait data inspect data/demo/shards/tiny -o runs/tiny/inspect.png

[ -d runs/tiny/tokenizers/text ] || plait tokenizer train tiny/text
if [ ! -d runs/tiny/tokenizers/visual ]; then
  plait tokenizer train tiny/image
  cp -r runs/tiny/image/tokenizer runs/tiny/tokenizers/visual
fi
plait data tokenize data/demo/shards/tiny -o data/demo/tokens/tiny --tokenizers runs/tiny/tokenizers

plait train tiny/decoder
cp -r data/demo/examples runs/tiny/decoder/bundle/
plait eval runs/tiny/decoder/bundle data/demo/tiny --json | tee runs/tiny/figures.json
