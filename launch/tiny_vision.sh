#!/usr/bin/env bash
# weights/tiny-vision again, from the data on, in about an hour and a half on 2 CPU cores: pictures first, then the
# inflated network on pictures and clips. Run it from the repository root. It ends with the tokenizer in
# runs/tiny/vision/tokenizer and its report; every step that was done is skipped or resumed when it is run again.
set -euo pipefail

bash launch/data/fetch_demo.sh data/demo more
for part in train more heldout clips/train clips/heldout; do
  [ -f data/demo/shards/$part/manifest.json ] || plait data pack data/demo/$part -o data/demo/shards/$part
done
[ -d runs/tiny/vision-image/tokenizer ] || plait tokenizer train tiny/vision-image
[ -d runs/tiny/vision/tokenizer ] || plait tokenizer train tiny/vision
bash launch/tiny_vision_report.sh runs/tiny/vision/tokenizer runs/tiny/vision/report
