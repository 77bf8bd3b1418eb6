import json
import statistics
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from plait.errors import PlaitError
from plait.tokenizers.modalities import MODALITIES
from plait.tokenizers.text import TextTokenizer
from plait.train.inspect import SHOWN, inspect
from plait.train.pack import pack


def test_raw_shards(raw: Path, emoji: Path, tmp_path: Path) -> None:
    rows = [json.loads(line) for line in (emoji / "manifest.jsonl").read_text().splitlines()]
    facts, text = inspect(raw, tmp_path / "deep" / "sheet.png", None)
    assert (facts["kind"], facts["shards"], facts["samples"]) == ("raw", 3, 60)
    assert facts["bytes"] == sum(path.stat().st_size for path in raw.glob("*.tar"))
    assert facts["media"] == {"text": 60, "image": 60}
    assert facts["broken"] == []
    sizes: dict[str, int] = {}
    for row in rows:
        with Image.open(emoji / row["path"]) as image:
            name = f"{image.width}×{image.height}"
        sizes[name] = sizes.get(name, 0) + 1
    assert facts["sizes"] == sizes
    assert facts["text_length_median"] == statistics.median(len(row["caption"]) for row in rows)
    assert sum(facts["licenses"].values()) == 60
    assert set(facts["licenses"]) == {row["license"] for row in rows}
    assert set(facts["captions"]) <= {row["caption"] for row in rows}
    assert len(facts["captions"]) == 8
    with Image.open(facts["sheet"]) as sheet:
        assert sheet.format == "PNG"
        assert len(sheet.convert("RGB").getcolors(1 << 24)) > 100  # type: ignore[arg-type]
    for shown in ("60 samples, 3 raw shards", "60 text, 60 image", facts["captions"][0], facts["sheet"]):
        assert shown in text


def test_token_shards(tokens: Path, tokenizers: Path, raw: Path, tmp_path: Path) -> None:
    facts, _ = inspect(tokens, tmp_path / "sheet.png", str(tokenizers))
    before, _ = inspect(raw, tmp_path / "raw.png", None)
    assert (facts["kind"], facts["samples"], facts["media"]) == ("tokens", 60, {"text": 60, "image": 60})
    assert facts["captions"] == before["captions"]
    assert facts["licenses"] == before["licenses"]
    assert facts["text_length_median"] == before["text_length_median"]
    assert sum(facts["sizes"].values()) == 60
    assert all(name.endswith(" codes") for name in facts["sizes"])
    assert (tmp_path / "sheet.png").is_file()


def test_token_shards_without_tokenizers(tokens: Path, tmp_path: Path) -> None:
    facts, text = inspect(tokens, tmp_path / "sheet.png", None)
    assert facts["media"] == {"text": 60, "image": 60}
    assert facts["captions"] == []
    assert "sheet" not in facts
    assert not (tmp_path / "sheet.png").exists()
    assert "60 samples" in text


def test_other_tokenizers_are_refused(tokens: Path, tmp_path: Path) -> None:
    TextTokenizer.train(["other words"] * 60, 275).save_pretrained(tmp_path / "other" / "text")
    with pytest.raises(PlaitError, match="the text tokenizer is not the one"):
        inspect(tokens, tmp_path / "sheet.png", str(tmp_path / "other"))


def test_broken_samples_are_named(emoji: Path, tmp_path: Path) -> None:
    source = tmp_path / "in"
    source.mkdir()
    data = next((emoji / "noto").glob("*.png")).read_bytes()
    (source / "whole.png").write_bytes(data)
    (source / "cut.png").write_bytes(data[:60])
    (source / "latin.txt").write_bytes(b"caf\xe9")
    (source / "facts.json").write_text("{")
    (source / "sound.wav").write_bytes(b"RIFF")
    pack(source, tmp_path / "raw")
    facts, text = inspect(tmp_path / "raw", tmp_path / "sheet.png", None)
    assert facts["samples"] == 5
    assert sorted(line.split(":")[0].split()[0] for line in facts["broken"]) == ["cut", "facts.json", "latin", "sound"]
    assert facts["media"] == {"image": 1}
    assert sum(line.startswith("broken  ") for line in text.splitlines()) == 4


def test_sheet_that_cannot_be_written(raw: Path, tmp_path: Path) -> None:
    with pytest.raises(PlaitError, match=r"sheet\.jpg: .* ends in \.png"):
        inspect(raw, tmp_path / "sheet.jpg", None)
    (tmp_path / "file").write_text("")
    with pytest.raises(PlaitError, match="file"):
        inspect(raw, tmp_path / "file" / "sheet.png", None)


def test_only_the_images_of_the_sheet_are_decoded(
    tokens: Path, tokenizers: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    decoded: list[Any] = []
    decode = MODALITIES["image"].decode
    counting = replace(MODALITIES["image"], decode=lambda *args: [decoded.append(args), decode(*args)][1])
    monkeypatch.setitem(MODALITIES, "image", counting)
    facts, _ = inspect(tokens, tmp_path / "sheet.png", str(tokenizers))
    assert len(decoded) == SHOWN
    assert facts["media"] == {"text": 60, "image": 60}
    assert sum(facts["sizes"].values()) == 60
    assert facts["text_length_median"] > 0


def test_missing_shard(raw: Path, tmp_path: Path) -> None:
    with pytest.raises(PlaitError, match="no such folder"):
        inspect(tmp_path / "nowhere", tmp_path / "sheet.png", None)


@pytest.mark.slow
def test_command(raw: Path, tmp_path: Path, plait: Callable[..., Any]) -> None:
    done = plait("data", "inspect", raw, "-o", tmp_path / "sheet.png", "--json")
    assert done.returncode == 0, done.stderr
    facts = json.loads(done.stdout)
    assert facts["samples"] == 60
    assert Path(facts["sheet"]).is_file()
    done = plait("data", "inspect", tmp_path, "-o", tmp_path / "sheet.png")
    assert done.returncode == 2
    assert len(done.stderr.splitlines()) == 1
    assert "has no manifest.json" in done.stderr
