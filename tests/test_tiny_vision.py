"""The shipped visual tokenizer does what its card says, on pictures and on clips of concepts it never saw."""

from collections.abc import Callable
from pathlib import Path
from subprocess import CompletedProcess
from typing import Any

import pytest
import torch
from PIL import Image

import plait as package
from plait.tokenizers.evaluate import evaluate
from plait.tokenizers.loading import find_weights
from plait.tokenizers.visual import VisualTokenizer

CLIPS = Path(__file__).parent / "data" / "clips"


@pytest.fixture(scope="module")
def tokenizer() -> VisualTokenizer:
    return package.load_tokenizer("tiny-vision")


def test_figures(tokenizer: VisualTokenizer, emoji: Path) -> None:
    pictures, _ = evaluate(tokenizer, emoji)
    assert pictures["images"]["psnr"] >= 24
    assert pictures["images"]["ssim"] >= 0.83
    clips, _ = evaluate(tokenizer, CLIPS)
    assert clips["clips"]["psnr"] >= 24


def test_a_picture_is_64_codes_and_shares_its_codebook_with_clips(tokenizer: VisualTokenizer) -> None:
    pixels = torch.rand(1, 3, 5, 64, 64, generator=torch.Generator().manual_seed(0)) * 2 - 1
    still, clip = tokenizer.encode(pixels[:, :, 0]), tokenizer.encode(pixels)
    assert still.codes.shape == (1, 8, 8)
    assert clip.codes.shape == (1, 3, 8, 8)
    assert torch.equal(still.codes, clip.codes[:, 0])
    assert len(tokenizer.codebook_sizes) == 1


def test_it_stays_small_and_holds_no_pickle() -> None:
    files = [path for path in find_weights("tiny-vision").rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) < 9e6
    assert {path.suffix for path in files} <= {".json", ".safetensors", ".md"}


@pytest.mark.slow
def test_files_there_and_back(plait: Callable[..., CompletedProcess[str]], tmp_path: Path, emoji: Path) -> None:
    # Run away from the checkout, so that nothing but the package is found.
    clip, picture = next(CLIPS.glob("*.webp")), next((emoji / "noto").glob("*.png"))
    for command in (
        ["encode", clip, picture, "-o", "codes"],
        ["decode", f"codes/{clip.stem}.codes.safetensors", f"codes/{picture.stem}.codes.safetensors", "-o", "back"],
    ):
        done: Any = plait("tokenizer", *command, cwd=tmp_path)
        assert done.returncode == 0, done.stderr
    with Image.open(tmp_path / "back" / f"{picture.stem}.png") as image:
        assert image.size == (64, 64)
    assert (tmp_path / "back" / f"{clip.stem}.mp4").stat().st_size > 500
