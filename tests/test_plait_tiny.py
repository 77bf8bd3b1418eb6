"""The shipped bundle does what the README says of it, on 60 of the pictures it was trained on."""

import os
from collections.abc import Callable
from pathlib import Path
from subprocess import CompletedProcess

import pytest
import torch
from PIL import Image

import plait as package
from plait.infer.evaluate import captioned_images, evaluate
from plait.infer.pipeline import Model
from plait.tokenizers.loading import find_weights
from plait.tokenizers.media import to_pixels


@pytest.fixture(scope="module")
def model() -> Model:
    return package.load("plait-tiny")


def test_figures(model: Model, emoji: Path) -> None:
    figures = evaluate(model, captioned_images(emoji), items=30)
    assert figures["psnr"] >= 22
    assert figures["caption_to_image"] >= 0.9
    assert figures["image_to_caption"] >= 0.9


def test_it_stays_small_and_holds_no_pickle() -> None:
    files = [path for path in find_weights("plait-tiny").rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) < 12e6
    assert {path.suffix for path in files} <= {".json", ".jsonl", ".safetensors", ".model", ".png", ".md"}


def test_its_tokenizer_loads_alone(emoji: Path) -> None:
    tokenizer = package.load_tokenizer("plait-tiny", "image")
    pixels = torch.stack([to_pixels(image) for _, image in captioned_images(emoji)[:4]])[:, :, :61, :50]
    codes = tokenizer.encode(pixels)
    assert codes.codes.shape == (4, 8, 7)
    assert tokenizer.decode(codes).shape == pixels.shape


def test_a_right_caption_is_more_probable_than_a_wrong_one(model: Model, emoji: Path) -> None:
    rows = captioned_images(emoji)[::7]
    for (caption, image), (other, _) in zip(rows, [*rows[1:], rows[0]], strict=True):
        assert model.score(image, target=caption).total > model.score(image, target=other).total


def test_demo(plait: Callable[..., CompletedProcess[str]], tmp_path: Path) -> None:
    # Run away from the checkout, so that nothing but the package is found.
    done = plait("demo", "--out", tmp_path / "out", cwd=tmp_path, HF_HUB_OFFLINE="1", PATH=os.environ["PATH"])
    assert done.returncode == 0, done.stderr
    assert str(tmp_path / "out" / "gallery.png") in done.stdout
    with Image.open(tmp_path / "out" / "gallery.png") as page:
        assert min(page.size) > 500
