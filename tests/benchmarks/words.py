"""Word error rates: what a speech recognizer reads in originals and in a tokenizer's reconstructions of them.

    python tests/benchmarks/words.py TOKENIZER FOLDER [--limit N] [--seed S]

FOLDER has a manifest.jsonl with ``path`` and ``text``, as `launch/data/fetch_audio.sh` makes; rows whose ``language``
is not English are left out, and with a limit N clips are drawn by the seed. ``-`` as TOKENIZER reads originals only.

The recognizer is pocketsphinx with its own acoustic model, dictionary and language model of US English, all in its
package; each clip on its own (cepstral means over the clip), at 16 kHz, between 0.3 s of silence. It is older than
neural recognizers and errs often, so look at the ratio, and compare only figures of one set of clips.

Texts are compared in lower case, with digits read one by one, # and * as pound and star, apostrophes kept and all else
that is no letter taken as a space. The rate is the number of words to insert, delete and replace over all clips, by the
number of words in all texts.
"""

import argparse
import json
import random
import re
import time
from pathlib import Path

import numpy as np
import torch
from pocketsphinx import Decoder

from plait.tokenizers.evaluate import load_measured
from plait.tokenizers.media import Audio
from plait.tokenizers.sound import read_sound, to_samples

RATE = 16000
DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
SPOKEN = {str(i): word for i, word in enumerate(DIGITS)} | {"#": "pound", "*": "star"}


def words(text: str) -> list[str]:
    """A text as it is compared."""
    spelt = re.sub(r"[0-9#*]", lambda found: f" {SPOKEN[found[0]]} ", text.lower().replace("’", "'"))
    return [word for word in (part.strip("'") for part in re.sub(r"[^a-z']", " ", spelt).split()) if word]


def errors(said: list[str], heard: list[str]) -> int:
    """The least number of words to insert, delete or replace."""
    row = list(range(len(heard) + 1))
    for i, word in enumerate(said, 1):
        above, row = row, [i]
        for j, other in enumerate(heard, 1):
            row.append(min(above[j] + 1, row[-1] + 1, above[j - 1] + (word != other)))
    return row[-1]


def hear(decoder: Decoder, samples: torch.Tensor) -> list[str]:
    """What the recognizer reads in samples ``[n]`` at 16 kHz."""
    quiet = torch.zeros(round(0.3 * RATE))
    whole = torch.cat([quiet, samples, quiet]).clamp(-1, 1)
    decoder.start_utt()
    decoder.process_raw((whole * 32767).round().numpy().astype(np.int16).tobytes(), full_utt=True)
    decoder.end_utt()
    hypothesis = decoder.hyp()
    # A pronunciation's number, "to(2)", is no part of the word.
    return words(re.sub(r"\(\d+\)", "", hypothesis.hypstr)) if hypothesis else []


def main() -> None:
    """Print the rates."""
    parser = argparse.ArgumentParser(description="Word error rates of originals and reconstructions.")
    parser.add_argument("tokenizer", metavar="TOKENIZER", help="a tokenizer's folder or name; - for originals only")
    parser.add_argument("folder", metavar="FOLDER", type=Path, help="with a manifest.jsonl (path, text)")
    parser.add_argument("--limit", type=int, help="so many clips, drawn at random")
    parser.add_argument("--seed", type=int, default=0, help="of the draw")
    asked = parser.parse_args()
    tokenizer = None if asked.tokenizer == "-" else load_measured(asked.tokenizer, "audio")
    rows = [json.loads(line) for line in (asked.folder / "manifest.jsonl").read_text("utf-8").splitlines() if line]
    rows = [row for row in rows if str(row.get("language", "en")).startswith("en") and words(row.get("text", ""))]
    if asked.limit is not None and asked.limit < len(rows):
        rows = random.Random(asked.seed).sample(rows, asked.limit)

    decoder = Decoder(samprate=RATE, cmn="batch", loglevel="FATAL")
    count, seconds, wrong, start = 0, 0.0, {"originals": 0, "reconstructions": 0}, time.perf_counter()
    for row in rows:
        audio = read_sound(asked.folder / row["path"])
        sounds = {"originals": to_samples(audio, RATE, 1)[0, 0]}
        if tokenizer is not None:
            there = to_samples(audio, tokenizer.sample_rate, tokenizer.channels)
            back = tokenizer.decode(tokenizer.encode(there))[0].cpu().clamp(-1, 1)
            sounds["reconstructions"] = to_samples(Audio(back, tokenizer.sample_rate), RATE, 1)[0, 0]
        said = words(row["text"])
        count += len(said)
        seconds += audio.samples.shape[-1] / audio.sample_rate
        for kind, samples in sounds.items():
            wrong[kind] += errors(said, hear(decoder, samples))
    taken = time.perf_counter() - start
    print(f"{len(rows)} clips, {count} words, {seconds:.0f} s of speech, read in {taken:.0f} s")
    print(f"word error rate of the originals        {wrong['originals'] / count:.3f}")
    if tokenizer is not None:
        print(f"word error rate of the reconstructions  {wrong['reconstructions'] / count:.3f}")
        print(f"ratio                                   {wrong['reconstructions'] / max(1, wrong['originals']):.2f}")


if __name__ == "__main__":
    main()
