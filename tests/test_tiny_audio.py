"""The shipped audio tokenizer does what its card says, on sentences that it never heard."""

from collections.abc import Callable
from pathlib import Path
from subprocess import CompletedProcess
from typing import Any

import pytest
import torch

import plait as package
from plait.tokenizers.audio import AudioTokenizer
from plait.tokenizers.audio_metrics import mel_distance, stoi
from plait.tokenizers.loading import find_weights
from plait.tokenizers.sound import read_sound, to_samples

SPEECH = Path(__file__).parent / "data" / "speech"


@pytest.fixture(scope="module")
def tokenizer() -> AudioTokenizer:
    return package.load_tokenizer("tiny-audio")


def test_figures(tokenizer: AudioTokenizer) -> None:
    pytest.importorskip("pystoi")
    scores, distances = [], []
    for path in sorted(SPEECH.glob("*/*.flac")):
        if path.parent.name != "sounds":
            samples = to_samples(read_sound(path), 16000, 1)
            decoded = tokenizer.decode(tokenizer.encode(samples))
            scores.append(stoi(samples[0], decoded[0], 16000) or 0.0)
            distances.append(float(mel_distance(samples, decoded, 16000)))
    assert len(scores) == 10
    assert sum(scores) / 10 >= 0.87
    assert sum(distances) / 10 < 0.95


def test_a_second_is_a_hundred_codes(tokenizer: AudioTokenizer) -> None:
    assert (tokenizer.sample_rate, tokenizer.channels) == (16000, 1)
    codes = tokenizer.encode(torch.zeros(1, 1, 16000)).codes
    assert codes.shape == (1, 2, 50)


@pytest.mark.parametrize("length", [1, 319, 320, 321, 16000, 50001])
def test_chunks_are_one_pass(tokenizer: AudioTokenizer, length: int) -> None:
    samples = torch.randn(1, 1, length, generator=torch.Generator().manual_seed(0)) * 0.1
    codes = tokenizer.encode(samples).codes
    chunked = torch.cat(list(tokenizer.encode_stream(samples.split(1111, -1))), -1)
    assert (chunked != codes).float().mean() <= 0.01  # but for ties
    decoded = tokenizer.decode(codes, (length,))
    assert decoded.shape == samples.shape
    parts = torch.cat(list(tokenizer.decode_stream(codes.split(7, -1), (length,))), -1)
    torch.testing.assert_close(parts, decoded, atol=1e-5, rtol=0)


def test_it_stays_small_and_holds_no_pickle() -> None:
    files = [path for path in find_weights("tiny-audio").rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) < 10e6
    assert {path.suffix for path in files} <= {".json", ".safetensors", ".md"}


@pytest.mark.slow
def test_files_there_and_back(plait: Callable[..., CompletedProcess[str]], tmp_path: Path) -> None:
    # Run away from the checkout, so that nothing but the package is found.
    path = next((SPEECH / "asterisk-it").glob("*.flac"))
    for command in (["encode", path, "-o", "codes"], ["decode", f"codes/{path.stem}.codes.safetensors", "-o", "back"]):
        done: Any = plait("tokenizer", *command, cwd=tmp_path)
        assert done.returncode == 0, done.stderr
    assert read_sound(tmp_path / "back" / f"{path.stem}.wav").samples.shape == read_sound(path).samples.shape
