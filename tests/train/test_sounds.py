import io
import math
import random
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from plait.errors import PlaitError
from plait.tokenizers.audio import AudioConfig
from plait.tokenizers.media import Audio
from plait.tokenizers.sound import write_sound, write_sound_bytes
from plait.train.loader import batches, open_loader
from plait.train.pack import pack
from plait.train.recipe import AudioTokenizerRecipe, DistillConfig
from plait.train.sounds import Place, SoundEncoder, amplified, cut, load_heldout, read_teacher, teacher_at

RATE = 16000


def recipe(**values: Any) -> AudioTokenizerRecipe:
    return AudioTokenizerRecipe(**{"shards": ["a"], "heldout": "h", "out": "o", "seconds": 0.1, **values})


def numbered(n: int, channels: int = 1) -> Tensor:
    """Each sample says where it is."""
    return torch.arange(1, n + 1, dtype=torch.int16).expand(channels, n)


def places(crop: Tensor) -> list[int]:
    """The samples of `numbered` in a crop, 0 for silence."""
    return (crop[0] * 2**15).round().int().tolist()


@settings(deadline=None, max_examples=60)
@given(n=st.integers(1, 40), samples=st.integers(1, 40), where=st.floats(0, 1, exclude_max=True))
def test_crops_are_consecutive(n: int, samples: int, where: float) -> None:
    crop, place = cut(numbered(n, 2), samples, RATE, 1.0, where)
    assert crop.shape == (2, samples)
    assert crop.dtype == torch.float32
    expected = [place.first + i + 1 if 0 <= place.first + i < n else 0 for i in range(samples)]
    assert places(crop) == expected
    # All of a short sound, and nothing but a long one.
    assert sum(x > 0 for x in expected) == min(n, samples)


def test_crops_lie_everywhere() -> None:
    firsts = [cut(numbered(10), 4, RATE, 1.0, i / 70)[1].first for i in range(70)]
    assert sorted(set(firsts)) == list(range(7))
    assert all(firsts.count(first) == 10 for first in range(7))
    firsts = [cut(numbered(4), 10, RATE, 1.0, i / 70)[1].first for i in range(70)]
    assert sorted(set(firsts)) == list(range(-6, 1))


@pytest.mark.parametrize("speed", [0.8, 1.0, 1.25])
def test_speed_changes_the_pitch(speed: float) -> None:
    time = torch.arange(2 * RATE) / RATE
    tone = (torch.sin(2 * torch.pi * 1000 * time) * 16384).round().to(torch.int16)[None]
    crop, place = cut(tone, RATE, RATE, speed, 0.3)
    assert crop.shape == (1, RATE)
    assert place.speed == speed
    assert place.first == int(0.3 * (2 * RATE - math.ceil(RATE * speed) + 1))
    spectrum = torch.fft.rfft(crop[0] * torch.hann_window(RATE)).abs()
    assert int(spectrum.argmax()) == 1000 * speed
    assert float(crop.abs().max()) == pytest.approx(0.5, abs=0.02)


@pytest.mark.parametrize(("gain", "peak"), [(0, 0.5), (-20, 0.05), (3, 0.5 * 10**0.15), (20, 1.0)])
def test_gain_stops_at_full_scale(gain: float, peak: float) -> None:
    samples = torch.tensor([[0.1, -0.5, 0.2]])
    louder = amplified(samples, gain)
    assert torch.allclose(louder, samples * peak / 0.5, rtol=1e-5)
    assert torch.equal(amplified(torch.zeros(1, 3), gain), torch.zeros(1, 3))


def test_teacher_s_steps_lie_where_the_sound_does() -> None:
    # 10 steps of 100 samples each, the k-th in the middle of its samples.
    teacher = torch.arange(10.0)[:, None] + 1
    whole = teacher_at(teacher, Place(0, 1.0), 1000, 10, 100)
    assert torch.allclose(whole, teacher)
    finer = teacher_at(teacher, Place(200, 1.0), 1000, 4, 50)
    assert torch.allclose(finer[:, 0], torch.tensor([2.75, 3.25, 3.75, 4.25]))
    faster = teacher_at(teacher, Place(0, 2.0), 1000, 3, 100)
    assert torch.allclose(faster[:, 0], torch.tensor([1.5, 3.5, 5.5]))
    around = teacher_at(teacher, Place(-150, 1.0), 1000, 13, 100)
    assert (around[:, 0] == 0).tolist() == [True] + [False] * 10 + [True] * 2
    assert float(around[1, 0]) == 1  # beyond the first step's middle it stays


def crops(encoder: SoundEncoder, folder: Path, scratch: Path, n: int) -> Any:
    loader = open_loader([folder], encoder, kind="raw", scratch=scratch, batch_size=4, seed=0, shuffle_buffer=8)
    found = list(islice(batches(loader), n))
    loader._iterator._shutdown_workers()  # type: ignore[attr-defined]
    return found


def test_batches_are_drawn_again_the_same(speech: Path, tmp_path: Path) -> None:
    moved = {"speed": (0.85, 1.2), "gain_db": (-12.0, 6.0)}
    one, again, other = (
        torch.cat(crops(SoundEncoder(recipe(seed=seed, **moved)), speech, tmp_path, 6)) for seed in (0, 0, 1)
    )
    assert one.shape == (24, 1, 1600)
    assert one.dtype == torch.float32
    assert torch.equal(one, again)
    assert not torch.equal(one, other)
    assert float(one.abs().max()) <= 1.01  # the resampler may ring
    assert len({crop.numpy().tobytes() for crop in one}) == 24


def test_what_is_kept_is_what_would_be_decoded(speech: Path) -> None:
    from plait.train.shards import read_samples

    samples = list(read_samples(speech))
    keeping, poor = SoundEncoder(recipe()), SoundEncoder(recipe())
    poor.room = 100_000
    for _ in range(2):
        for sample in samples:
            assert torch.equal(keeping.sound(sample), poor.sound(sample))  # type: ignore[arg-type]
    assert len(keeping.kept) == 12
    assert 0 < len(poor.kept) < 12
    assert sum(sound.nbytes for sound in poor.kept.values()) <= 100_000
    assert keeping.sound({"__key__": "k", "txt": b"words"}) is None


def test_any_rate_and_channels(tmp_path: Path) -> None:
    time = torch.arange(4410) / 44100
    both = torch.stack([torch.sin(2 * torch.pi * 500 * time), torch.zeros(4410)]) * 0.5
    sample = {"__key__": "k", "wav": write_sound_bytes(Audio(both, 44100))}
    mono = SoundEncoder(recipe()).sound(sample)
    assert mono is not None
    assert mono.shape == (1, 1600)
    expected = torch.sin(2 * torch.pi * 500 * torch.arange(1600) / RATE) * 0.25
    assert torch.allclose(mono[0, 100:-100] / 2**15, expected[100:-100], atol=5e-3)
    stereo = SoundEncoder(recipe(model=AudioConfig(channels=2))).sound(sample)
    assert stereo is not None
    assert stereo.shape == (2, 1600)


def test_broken_sounds_are_skipped_and_named_once(
    speech: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    source = tmp_path / "in"
    source.mkdir()
    write_sound(Audio(torch.rand(1, 3000) / 2, RATE), source / "good.wav")
    (source / "cut.flac").write_bytes(b"fLaC" + bytes(60))
    (source / "words.txt").write_text("text")
    pack(source, tmp_path / "raw")
    assert len(crops(SoundEncoder(recipe()), tmp_path / "raw", tmp_path, 3)) == 3
    assert capfd.readouterr().out.count("skipped cut") == 1
    (heldout,) = load_heldout(recipe(heldout=str(tmp_path / "raw")))
    assert heldout.shape == (1, 3000)
    assert capfd.readouterr().out.count("skipped cut") == 1
    assert len(load_heldout(recipe(heldout=str(speech)))) == 12
    assert len(load_heldout(recipe(heldout=str(speech), eval_items=5))) == 5


def test_nothing_to_hear(emoji: Path, raw: Path) -> None:
    with pytest.raises(PlaitError, match="holds no sound that can be read"):
        load_heldout(recipe(heldout=str(raw)))


def saved(array: Any) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, array, allow_pickle=True)
    return buffer.getvalue()


def test_a_teacher_comes_with_its_sound(tmp_path: Path) -> None:
    data = write_sound_bytes(Audio(torch.rand(1, 3200) / 2, RATE))
    sample = {"__key__": "k", "wav": data, "npy": saved(np.arange(12, dtype=np.float16).reshape(4, 3))}
    encoder = SoundEncoder(recipe(seconds=0.2, distill=DistillConfig(1.0, 3)))
    found = encoder.read(sample, random.Random(0))
    assert found is not None
    crop, teacher = found
    assert crop.shape == (1, 3200)
    assert teacher.shape == (10, 3)
    assert torch.allclose(teacher[5], torch.tensor([0.0, 1, 2]) + 3 * (5.5 / 10 * 4 - 0.5))


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (None, r"k: has no k\.npy with the teacher's latents"),
        (b"abc", r"k\.npy: not a NumPy array"),
        (
            saved(np.zeros((4, 2), np.float32)),
            r"k\.npy: is float32 \[4, 2\], expected floats \[T, 3\]; set distill\.dim",
        ),
        (saved(np.zeros((0, 3), np.float32)), r"k\.npy: is float32 \[0, 3\]"),
        (saved(np.zeros((4, 3), np.int64)), r"k\.npy: is int64"),
        (saved(np.array([{}], dtype=object)), r"k\.npy: not a NumPy array"),
    ],
)
def test_a_teacher_that_cannot_be(data: bytes | None, reason: str) -> None:
    with pytest.raises(PlaitError, match=f"^{reason}") as caught:
        read_teacher({"__key__": "k"} | ({"npy": data} if data is not None else {}), 3)
    assert "\n" not in str(caught.value)
