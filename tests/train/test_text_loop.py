from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from plait.errors import PlaitError
from plait.tokenizers.loading import load_tokenizer
from plait.train.pack import pack
from plait.train.recipe import TextTokenizerRecipe
from plait.train.shards import read_samples
from plait.train.text_loop import shard_texts, train_text


def test_tokenizer_of_the_captions(raw: Path, tmp_path: Path) -> None:
    trained = train_text(TextTokenizerRecipe([str(raw)], str(tmp_path / "text"), 400))
    stored = load_tokenizer(tmp_path / "text")
    assert stored.fingerprint == trained.fingerprint
    assert stored.codebook_sizes == [400]
    for sample in read_samples(raw):
        caption = sample["txt"].decode()
        codes = stored.encode(caption)
        assert stored.decode(codes) == caption
        # It learned words: fewer pieces than bytes.
        assert len(codes) < len(caption.encode())


def test_same_shards_same_tokenizer(raw: Path, tmp_path: Path) -> None:
    recipes = [TextTokenizerRecipe([str(raw)], str(tmp_path / name), 400) for name in ("a", "b")]
    assert train_text(recipes[0]).fingerprint == train_text(recipes[1]).fingerprint


def test_what_is_not_text_is_left_out_and_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = tmp_path / "in"
    source.mkdir()
    (source / "good.txt").write_text("fine")
    (source / "latin.txt").write_bytes(b"caf\xe9")
    (source / "parts.json").write_text('{"parts": [{"text": "one"}, {"text": "two"}]}')
    (source / "broken.json").write_text("{")
    (source / "picture.png").write_bytes(b"P")
    pack(source, tmp_path / "raw")
    assert sorted(shard_texts([str(tmp_path / "raw")])) == ["fine", "one", "two"]
    output = capsys.readouterr().out
    assert "skipped latin: " in output
    assert "skipped broken: " in output
    assert len(output.splitlines()) == 2


def test_all_folders_are_read(raw: Path) -> None:
    assert len(list(shard_texts([str(raw), str(raw)]))) == 120


@pytest.mark.parametrize("size", [0, 100, 100_000])
def test_vocabulary_that_cannot_be_learned(raw: Path, tmp_path: Path, size: int) -> None:
    with pytest.raises(PlaitError, match="vocabulary_size"):
        train_text(TextTokenizerRecipe([str(raw)], str(tmp_path / "text"), size))
    assert not (tmp_path / "text").exists()


def test_shards_without_text(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "picture.png").write_bytes(b"P")
    pack(tmp_path / "in", tmp_path / "raw")
    with pytest.raises(PlaitError, match="vocabulary_size"):
        train_text(TextTokenizerRecipe([str(tmp_path / "raw")], str(tmp_path / "text"), 300))


def test_folder_that_cannot_be_made(raw: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(PlaitError, match="file"):
        train_text(TextTokenizerRecipe([str(raw)], str(tmp_path / "file" / "text"), 300))


@pytest.mark.slow
def test_command(raw: Path, tmp_path: Path, plait: Callable[..., Any]) -> None:
    done = plait(
        "tokenizer", "train", "tiny/text", f"shards=[{raw}]", f"out={tmp_path / 'text'}", "vocabulary_size=350"
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == f"wrote {tmp_path / 'text'}"
    assert load_tokenizer(tmp_path / "text").codebook_sizes == [350]
    done = plait("tokenizer", "train", "tiny/decoder")
    assert done.returncode == 2
    assert "kind is 'decoder'" in done.stderr
