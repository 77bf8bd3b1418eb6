#!/usr/bin/env bash
# A tokenizer like weights/tiny-audio, from the data on, in about an hour and a half on 2 CPU cores. Run it from the
# repository root. It ends with the tokenizer in runs/tiny/audio/tokenizer and its report; every step that was done is
# skipped or resumed when it is run again.
set -euo pipefail

[ -f data/audio/english/manifest.jsonl ] || bash launch/data/fetch_audio.sh data/audio
for part in train heldout; do
  [ -f data/audio/shards/$part/manifest.json ] || plait data pack data/audio/$part -o data/audio/shards/$part
done
[ -d runs/tiny/audio/tokenizer ] || plait tokenizer train tiny/audio
bash launch/tiny_audio_report.sh runs/tiny/audio/tokenizer runs/tiny/audio/report
