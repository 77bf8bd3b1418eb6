import importlib.resources
import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from plait.errors import PlaitError
from plait.tokenizers.loading import (
    describe_tokenizers,
    find_weights,
    load_tokenizer,
    load_tokenizers,
    shipped_names,
)
from plait.tokenizers.text import TextTokenizer
from plait.tokenizers.visual import VisualTokenizer


@pytest.fixture
def shipped(tokenizers: Path, bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A package of weights with a bundle and a tokenizer, and a working folder that has neither."""
    weights = tmp_path / "weights"
    shutil.copytree(tokenizers / "visual", weights / "small-visual")
    shutil.copytree(bundle, weights / "small-bundle")
    (weights / "notes").mkdir()
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    monkeypatch.setattr(importlib.resources, "files", lambda package: {"plait.weights": weights}[package])
    return weights


def test_a_tokenizers_folder_is_loaded(tokenizers: Path, text_tokenizer: Any, visual_tokenizer: Any) -> None:
    visual, text = load_tokenizer(tokenizers / "visual"), load_tokenizer(str(tokenizers / "text"))
    assert isinstance(visual, VisualTokenizer)
    assert isinstance(text, TextTokenizer)
    assert visual.fingerprint == visual_tokenizer.fingerprint
    assert text.fingerprint == text_tokenizer.fingerprint
    for modality in ("image", "video"):
        assert load_tokenizer(tokenizers / "visual", modality).fingerprint == visual.fingerprint


def test_a_bundles_tokenizer_is_loaded_by_modality(bundle: Path, text_tokenizer: Any, visual_tokenizer: Any) -> None:
    assert load_tokenizer(bundle, "image").fingerprint == visual_tokenizer.fingerprint
    assert load_tokenizer(bundle, "text").fingerprint == text_tokenizer.fingerprint


@pytest.mark.parametrize("modality", [None, "audio", "visual", ""])
def test_a_bundle_names_its_modalities(bundle: Path, modality: str | None) -> None:
    with pytest.raises(PlaitError, match="is a bundle; name one of its modalities: text, image"):
        load_tokenizer(bundle, modality)


def test_a_tokenizer_without_the_modality_is_refused(tokenizers: Path) -> None:
    with pytest.raises(PlaitError, match="is of kind text, it has no image"):
        load_tokenizer(tokenizers / "text", "image")
    with pytest.raises(PlaitError, match="is of kind visual, it has no text"):
        load_tokenizer(tokenizers / "visual", "text")


def test_shipped_names_are_found(shipped: Path, visual_tokenizer: Any) -> None:
    assert shipped_names() == ["small-bundle", "small-visual"]
    assert find_weights("small-visual") == shipped / "small-visual"
    assert load_tokenizer("small-visual").fingerprint == visual_tokenizer.fingerprint
    assert load_tokenizer("small-bundle", "image").fingerprint == visual_tokenizer.fingerprint
    assert list(load_tokenizers("small-bundle")) == ["text", "visual"]


def test_a_path_goes_before_a_shipped_name(shipped: Path, tokenizers: Path) -> None:
    shutil.copytree(tokenizers / "text", "small-visual")
    assert isinstance(load_tokenizer("small-visual"), TextTokenizer)


@pytest.mark.parametrize("name", ["small", "notes", "../weights", "small-visual/config.json"])
def test_an_unknown_name_lists_the_shipped_ones(shipped: Path, name: str) -> None:
    if name == "../weights":
        with pytest.raises(PlaitError, match=r"config\.json: no such file"):
            load_tokenizer(name)
        return
    for use in (load_tokenizer, load_tokenizers, describe_tokenizers, find_weights):
        with pytest.raises(PlaitError, match=f"^{name}: no such path, .* names are small-bundle, small-visual$"):
            use(name)


def test_the_packages_own_names_are_listed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(PlaitError, match="no such path") as raised:
        find_weights("no-such-name")
    assert str(raised.value).endswith(", ".join(shipped_names()) or "(none)")


def test_a_folder_that_is_no_tokenizer_is_refused(tmp_path: Path) -> None:
    with pytest.raises(PlaitError, match=r"config\.json: no such file"):
        load_tokenizer(tmp_path)
    with pytest.raises(PlaitError, match=r"holds no tokenizers; expected subfolders such as text/ and visual/"):
        load_tokenizers(tmp_path)
    with pytest.raises(PlaitError, match="holds no tokenizers"):
        describe_tokenizers(tmp_path)
    (tmp_path / "file").touch()
    with pytest.raises(PlaitError, match="file"):
        load_tokenizer(tmp_path / "file")


@pytest.mark.parametrize("kind", [None, "sound", ["visual"], {"a": 1}, 3])
def test_an_unknown_kind_is_refused(tmp_path: Path, kind: object) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"format_version": 1, "tokenizer": kind}))
    with pytest.raises(PlaitError, match=r"config\.json: tokenizer is .*, this plait knows text, visual"):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize(
    "content", ["{", "[]", '{"modalities": {"image": 3}}', '{"format_version": 1, "modalities": 7}']
)
def test_a_bundle_with_a_broken_vocabulary_is_refused(bundle: Path, content: str) -> None:
    (bundle / "vocabulary.json").write_text(content)
    with pytest.raises(PlaitError, match=r"vocabulary\.json"):
        load_tokenizer(bundle, "image")


def test_a_bundle_without_its_tokenizer_is_refused(bundle: Path) -> None:
    shutil.rmtree(bundle / "tokenizers" / "visual")
    with pytest.raises(PlaitError, match=r"visual/config\.json: no such file"):
        load_tokenizer(bundle, "image")


def test_all_tokenizers_of_a_folder_or_bundle_are_loaded(tokenizers: Path, bundle: Path) -> None:
    for folder in (tokenizers, bundle):
        loaded = load_tokenizers(folder)
        assert list(loaded) == ["text", "visual"]
        assert (type(loaded["text"]), type(loaded["visual"])) == (TextTokenizer, VisualTokenizer)


def test_one_damaged_tokenizer_is_named(bundle: Path) -> None:
    (bundle / "tokenizers" / "visual" / "model.safetensors").write_bytes(b"")
    with pytest.raises(PlaitError, match=r"visual/model\.safetensors"):
        load_tokenizers(bundle)


def test_tokenizers_are_described(tokenizers: Path, bundle: Path, visual_tokenizer: Any, text_tokenizer: Any) -> None:
    text = {"name": "text", "kind": "text", "modalities": "text", "codes": "300"}
    visual = {
        "name": "visual", "kind": "visual", "modalities": "image video", "codes": "60", "architecture": "plait",
        "pixels per code": "8×8", "parameters": sum(p.numel() for p in visual_tokenizer.parameters()),
    }  # fmt: skip
    both = [
        text | {"fingerprint": text_tokenizer.fingerprint[:16]},
        visual | {"fingerprint": visual_tokenizer.fingerprint[:16]},
    ]
    assert describe_tokenizers(tokenizers) == describe_tokenizers(bundle) == both
    assert describe_tokenizers(tokenizers / "visual") == both[1:]


def test_a_name_that_is_too_long_is_refused() -> None:
    with pytest.raises(PlaitError, match=r"^x+: cannot be read \(File name too long\)"):
        find_weights("x" * 5000)
