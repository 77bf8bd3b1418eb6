#!/usr/bin/env bash
# tiny-audio's figures: on sentences it never heard, of voices it knows; on a voice it never heard; and the words that a
# recognizer reads of that voice.
#
#   tiny_audio_report.sh [TOKENIZER] [OUT]
#
# Fetches and speaks the data if it is not there (290 MB from Debian and npm). Run it from the repository root with plait
# on the PATH and its test extra installed; it writes OUT/heldout, OUT/english and OUT/words.txt.
set -euo pipefail
TOKENIZER=${1:-tiny-audio}
OUT=${2:-out/tiny-audio}
PYTHON=${PYTHON:-python3}

[ -f data/audio/english/manifest.jsonl ] || bash launch/data/fetch_audio.sh data/audio
sentences=$(mktemp -d) && trap 'rm -rf "$sentences"' EXIT
cp -rL data/audio/heldout "$sentences/heldout" && rm -rf "$sentences/heldout/sounds" "$sentences/heldout/manifest.jsonl"

echo "Held-out sentences of known voices:"
plait tokenizer eval "$TOKENIZER" "$sentences/heldout" -o "$OUT/heldout" --visqol 0
echo "Held-out sounds:"
plait tokenizer eval "$TOKENIZER" data/audio/heldout/sounds -o "$OUT/sounds" --visqol 0
echo "A voice it never heard:"
plait tokenizer eval "$TOKENIZER" data/audio/english -o "$OUT/english" --visqol 0
"$PYTHON" tests/benchmarks/words.py "$TOKENIZER" data/audio/english | tee "$OUT/words.txt"
