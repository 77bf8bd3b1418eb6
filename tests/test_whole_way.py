"""The whole way through the command line, small: files → shards → tokenizers → tokens → decoder → media."""

import json
from collections.abc import Callable
from pathlib import Path
from subprocess import CompletedProcess

import pytest
from PIL import Image

TINY_VISUAL = [
    "model.widths=[16,24]",
    "model.encoder_blocks=1",
    "model.decoder_blocks=1",
    "model.quantizer.levels=[5,4,3]",
]


@pytest.mark.slow
def test_files_to_media(plait: Callable[..., CompletedProcess[str]], emoji: Path, tmp_path: Path) -> None:
    def run(*arguments: object) -> dict[str, object]:
        done = plait(*arguments, "--json", cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        facts: dict[str, object] = json.loads(done.stdout.splitlines()[-1])
        return facts

    assert run("data", "pack", emoji, "-o", "raw", "--per-shard", 20)["samples"] == 60
    assert run("data", "inspect", "raw", "-o", "sheet.png")["media"] == {"text": 60, "image": 60}
    run("tokenizer", "train", "tiny/text", "shards=[raw]", "out=toks/text", "vocabulary_size=340")
    image = ["shards=[raw]", "heldout=raw", "out=image", "steps=60", "eval_every=60", "batch_size=8"]
    run("tokenizer", "train", "tiny/image", *image, *TINY_VISUAL)
    (tmp_path / "image" / "tokenizer").rename(tmp_path / "toks" / "visual")
    made = run("data", "tokenize", "raw", "-o", "tokens", "--tokenizers", "toks")
    assert (made["samples"], made["skipped"]) == (60, [])

    decoder = [
        "model.width=64",
        "model.layers=2",
        "steps=40",
        "save_every=40",
        "log_every=1",
        "optimizer.warmup_steps=5",
    ]
    run("train", "tiny/decoder", "shards=[tokens]", "tokenizers=toks", "out=run", "streams=1", *decoder)
    losses = [json.loads(line)["loss"] for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert len(losses) == 40
    assert losses[-1] < losses[0] - 1

    caption = json.loads((emoji / "manifest.jsonl").read_text().splitlines()[0])["caption"]
    run("generate", caption, "--to", "image", "--model", "run/bundle", "-o", "out.png", "--seed", 0, "--max-tokens", 80)
    with Image.open(tmp_path / "out.png") as picture:
        assert picture.width % 8 == picture.height % 8 == 0
    assert isinstance(run("generate", "out.png", "--to", "text", "--model", "run/bundle")["text"], list)
    assert run("eval", "run/bundle", emoji, "--items", 2)["images"] == 60
