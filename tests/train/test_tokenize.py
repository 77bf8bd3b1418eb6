import io
import json
import os
import sqlite3
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from plait.errors import PlaitError
from plait.tokenizers.loading import load_tokenizers
from plait.tokenizers.media import read_image, to_pixels
from plait.tokenizers.text import TextTokenizer
from plait.train.documents import unpack_document
from plait.train.pack import pack
from plait.train.shards import MANIFEST, read_manifest, read_samples
from plait.train.tokenize import tokenize


def files(folder: Path) -> dict[str, bytes]:
    """Everything but the loader's index, which names itself at random."""
    return {p.name: p.read_bytes() for p in sorted(folder.iterdir()) if p.is_file()}


def indexed(folder: Path) -> int:
    """Samples that the loader's index knows."""
    with sqlite3.connect(folder / ".nv-meta" / "index.sqlite") as index:
        return int(index.execute("SELECT COUNT(*) FROM samples").fetchone()[0])


@pytest.fixture
def mixed(tmp_path: Path) -> Path:
    """Raw shards of six samples, of which two cannot be read and one is of a modality without a tokenizer."""
    source = tmp_path / "source"
    source.mkdir()
    buffer = io.BytesIO()
    Image.effect_noise((24, 24), 50).convert("RGB").save(buffer, "PNG")
    data = buffer.getvalue()
    for name in ("good1", "good2", "good3", "cut"):
        (source / f"{name}.png").write_bytes(data[: len(data) // 2] if name == "cut" else data)
        (source / f"{name}.txt").write_text("a red apple")
    (source / "latin.txt").write_bytes("caf\xe9".encode("latin-1"))
    (source / "sound.wav").write_bytes(b"RIFF")
    pack(source, tmp_path / "raw", 2)
    return tmp_path / "raw"


def test_manifest(tokens: Path, tokenizers: Path) -> None:
    manifest = read_manifest(tokens, "tokens")
    loaded = load_tokenizers(tokenizers)
    assert manifest["tokenizers"] == {name: tokenizer.fingerprint for name, tokenizer in loaded.items()}
    assert [row["samples"] for row in manifest["shards"]] == [20, 20, 20]
    documents = [unpack_document(sample) for sample in read_samples(tokens)]
    for modality in ("text", "image"):
        stored = sum(span.codes.numel() for d in documents for span in d.spans if span.modality == modality)
        assert sum(row["codes"][modality] for row in manifest["shards"]) == stored > 0


def test_codes_are_those_of_direct_encoding(raw: Path, tokens: Path, tokenizers: Path) -> None:
    loaded = load_tokenizers(tokenizers)
    for source, sample in zip(read_samples(raw), read_samples(tokens), strict=True):
        assert sample["__key__"] == source["__key__"]
        document = unpack_document(sample)
        assert [span.modality for span in document.spans] == ["text", "image"]
        assert not document.ordered
        text, image = (span.codes for span in document.spans)
        assert loaded["text"].decode(text) == source["txt"].decode()
        pixels = to_pixels(read_image(source["png"], "x"))[None]
        assert torch.equal(image, loaded["visual"].encode(pixels).codes[0])
        assert document.facts["license"] == json.loads(source["json"])["license"]


def test_unreadable_samples_are_skipped_counted_and_named(mixed: Path, tokenizers: Path, tmp_path: Path) -> None:
    report = tokenize(mixed, tmp_path / "out", str(tokenizers), workers=1)
    assert (report.samples, report.shards, report.reused) == (3, 3, 0)
    assert {sample["__key__"] for sample in read_samples(tmp_path / "out")} == {"good1", "good2", "good3"}
    assert len(report.skipped) == 3
    for key, reason in (("cut", "image"), ("latin", "not UTF-8"), ("sound", "no tokenizer for audio")):
        (line,) = [line for line in report.skipped if key in line]
        assert line.startswith("shard-0")
        assert reason in line
    assert indexed(tmp_path / "out") == 3
    skipped = [line for row in read_manifest(tmp_path / "out")["shards"] for line in row["skipped"]]
    assert skipped == report.skipped


def test_nothing_readable(tokenizers: Path, tmp_path: Path) -> None:
    (tmp_path / "source").mkdir()
    (tmp_path / "source" / "latin.txt").write_bytes(b"caf\xe9")
    pack(tmp_path / "source", tmp_path / "raw")
    with pytest.raises(PlaitError, match=r"no sample could be tokenized; the first: .*latin"):
        tokenize(tmp_path / "raw", tmp_path / "out", str(tokenizers), workers=1)
    assert not (tmp_path / "out" / MANIFEST).exists()


def test_restart_reuses_finished_shards(raw: Path, tokens: Path, tokenizers: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    calls: list[tuple[int, int]] = []
    tokenize(raw, out, str(tokenizers), workers=1)
    whole = files(out)
    # As an interrupted run leaves it: one shard without its row, one absent, no manifest.
    (out / MANIFEST).unlink()
    (out / "shard-000001.tar.json").unlink()
    (out / "shard-000001.tar").write_bytes(b"half")
    (out / "shard-000002.tar").unlink()
    kept = (out / "shard-000000.tar").stat().st_mtime_ns
    report = tokenize(raw, out, str(tokenizers), workers=1, progress=lambda *done: calls.append(done))
    assert (report.reused, report.samples, report.shards) == (1, 60, 3)
    assert calls == [(2, 3), (3, 3)]
    assert (out / "shard-000000.tar").stat().st_mtime_ns == kept
    assert files(out) == whole
    assert indexed(out) == 60


def test_restart_redoes_a_damaged_shard(raw: Path, tokenizers: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    tokenize(raw, out, str(tokenizers), workers=1)
    whole = files(out)
    os.truncate(out / "shard-000001.tar", 1000)
    assert tokenize(raw, out, str(tokenizers), workers=1).reused == 2
    assert files(out) == whole


def test_restart_of_a_finished_folder_changes_nothing(raw: Path, tokenizers: Path, tmp_path: Path) -> None:
    tokenize(raw, tmp_path / "out", str(tokenizers), workers=1)
    whole = files(tmp_path / "out")
    assert tokenize(raw, tmp_path / "out", str(tokenizers), workers=1).reused == 3
    assert files(tmp_path / "out") == whole


def test_other_tokenizers_are_refused(raw: Path, tokenizers: Path, tmp_path: Path, visual_tokenizer: Any) -> None:
    tokenize(raw, tmp_path / "out", str(tokenizers), workers=1)
    whole = files(tmp_path / "out")
    TextTokenizer.train(["some other text"] * 50, 280).save_pretrained(tmp_path / "other" / "text")
    visual_tokenizer.save_pretrained(tmp_path / "other" / "visual")
    with pytest.raises(PlaitError, match="was made with other tokenizers"):
        tokenize(raw, tmp_path / "out", str(tmp_path / "other"), workers=1)
    assert files(tmp_path / "out") == whole


def test_other_data_is_refused(raw: Path, mixed: Path, tokenizers: Path, tmp_path: Path) -> None:
    tokenize(raw, tmp_path / "out", str(tokenizers), workers=1)
    with pytest.raises(PlaitError, match="was made from other data"):
        tokenize(mixed, tmp_path / "out", str(tokenizers), workers=1)


@pytest.mark.parametrize("hashed", [True, False])
def test_other_data_of_the_same_size_is_refused(tokenizers: Path, tmp_path: Path, hashed: bool) -> None:
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "a.txt").write_text(name)
        raw = tmp_path / f"raw-{name}"
        pack(tmp_path / name, raw)
        if not hashed:
            manifest = json.loads((raw / MANIFEST).read_text())
            del manifest["shards"][0]["sha256"]
            (raw / MANIFEST).write_text(json.dumps(manifest))
    tokenize(tmp_path / "raw-one", tmp_path / "out", str(tokenizers), workers=1)
    assert tokenize(tmp_path / "raw-one", tmp_path / "out", str(tokenizers), workers=1).reused == 1
    with pytest.raises(PlaitError, match="was made from other data"):
        tokenize(tmp_path / "raw-two", tmp_path / "out", str(tokenizers), workers=1)


def test_raw_shards_are_never_overwritten(mixed: Path, raw: Path, tokenizers: Path) -> None:
    whole = files(mixed)
    for source in (mixed, raw):
        with pytest.raises(PlaitError, match="holds raw shards"):
            tokenize(source, mixed, str(tokenizers), workers=1)
    assert files(mixed) == whole


@pytest.mark.slow
def test_workers_do_not_change_a_byte(raw: Path, tokens: Path, tokenizers: Path, tmp_path: Path) -> None:
    tokenize(raw, tmp_path / "out", str(tokenizers), workers=2)
    assert files(tmp_path / "out") == files(tokens)


@pytest.mark.slow
def test_command_names_what_it_skips(mixed: Path, tokenizers: Path, tmp_path: Path, plait: Callable[..., Any]) -> None:
    arguments = ("data", "tokenize", mixed, "-o", tmp_path / "out", "--tokenizers", tokenizers, "--json")
    done = plait(*arguments, "--workers", 1)
    assert done.returncode == 0, done.stderr
    facts = json.loads(done.stdout.splitlines()[-1])
    assert (facts["samples"], len(facts["skipped"])) == (3, 3)
    assert sorted(line.split()[0] for line in done.stderr.splitlines()) == ["skipped"] * 3
    (mixed / "shard-000001.tar").unlink()
    done = plait(*arguments)
    assert done.returncode == 2
    assert done.stderr.startswith("plait: ")
    assert "shard-000001.tar: shard is missing" in done.stderr
    assert len(done.stderr.splitlines()) == 1
