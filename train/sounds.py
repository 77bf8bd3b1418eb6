"""Raw samples → what an audio tokenizer trains on: crops of sounds, at random places, speeds and loudness."""

import io
import math
import random
import zlib
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from plait.errors import PlaitError
from plait.tokenizers.media import Audio
from plait.tokenizers.sound import read_sound, to_samples
from plait.train.documents import member
from plait.train.medium import MediumEncoder
from plait.train.recipe import AudioTokenizerRecipe
from plait.train.shards import read_samples

# Bytes of decoded sounds that the streams keep together: of less data, each file is decoded once.
_KEPT = 2**30
# Of a held-out sound, the first so many seconds are evaluated.
_HELD_OUT_SECONDS = 10


class Place(NamedTuple):
    """Where a crop lies in its sound.

    Attributes:
        first: sample of the sound that is the crop's first; below 0 where the crop begins with silence.
        speed: samples of the sound per sample of the crop.
    """

    first: int
    speed: float


def cut(sound: Tensor, samples: int, sample_rate: int, speed: float, where: float) -> tuple[Tensor, Place]:
    """A crop of a sound.

    Args:
        sound: int16 ``[C, n]``.
        samples: length of the crop.
        sample_rate: Hz.
        speed: how much faster it is played, which changes its pitch too.
        where: in ``[0, 1)``, the place of the crop in the sound; of a shorter sound, its place in the silence.

    Returns:
        float32 ``[C, samples]`` and where that lies.
    """
    # Rates of whole hundredths need few of the resampler's filters.
    rate = max(1, round(100 * speed)) * sample_rate // 100
    wanted = math.ceil(samples * rate / sample_rate)
    spare = sound.shape[-1] - wanted
    first = int(where * (spare + 1)) if spare >= 0 else -int(where * (1 - spare))
    piece = sound[:, max(0, first) : max(0, first + wanted)].float() / 2**15
    piece = F.pad(piece, (max(0, -first), wanted - piece.shape[-1] - max(0, -first)))
    if rate != sample_rate:
        piece = to_samples(Audio(piece, rate), sample_rate, len(sound))[0]
    return piece[:, :samples], Place(first, rate / sample_rate)


def amplified(samples: Tensor, decibels: float) -> Tensor:
    """Samples with a gain, but none that takes them beyond full scale."""
    gain, peak = 10 ** (decibels / 20), float(samples.abs().max())
    return samples * min(gain, max(1.0, 1 / peak) if peak else gain)


def teacher_at(teacher: Tensor, place: Place, length: int, steps: int, hop: int) -> Tensor:
    """A teacher's latents at the steps of a crop's codes.

    Args:
        teacher: ``[T, D]``, evenly over the whole sound.
        place: of the crop.
        length: samples of the sound.
        steps: codes of the crop.
        hop: samples of the crop per code.

    Returns:
        ``[steps, D]``, between neighbours linearly interpolated; zeros where there is no sound.
    """
    share = (place.first + (torch.arange(steps) + 0.5) * hop * place.speed) / length
    at = (share * len(teacher) - 0.5).clamp(0, len(teacher) - 1)
    before = at.long()
    after = (before + 1).clamp_max(len(teacher) - 1)
    there = (share >= 0) & (share < 1)
    return teacher[before].lerp(teacher[after], (at - before)[:, None]) * there[:, None]


class SoundEncoder(MediumEncoder):
    """Sounds, float32 ``[B, C, N]``; when the recipe distills, with the teacher's latents ``[B, t, D]``.

    Files are decoded as a whole, by the loader's workers, which keep what they have decoded as far as there is room.
    """

    medium = "sound"

    def __init__(self, recipe: AudioTokenizerRecipe) -> None:
        super().__init__(recipe.seed)
        self.recipe = recipe
        self.samples = round(recipe.seconds * recipe.model.sample_rate)
        self.room = _KEPT // recipe.streams
        self.kept: dict[tuple[str, int], Tensor] = {}

    def read(self, sample: dict[str, Any], draw: random.Random) -> tuple[Tensor, ...] | None:
        """Decode, crop, change speed and loudness."""
        recipe, model = self.recipe, self.recipe.model
        sound = self.sound(sample)
        if sound is None:
            return None
        speed = math.exp(draw.uniform(*map(math.log, recipe.speed)))
        crop, place = cut(sound, self.samples, model.sample_rate, speed, draw.random())
        crop = amplified(crop, draw.uniform(*recipe.gain_db))
        if not recipe.distill.weight:
            return (crop,)
        hop = model.encoder.samples_per_code
        teacher = read_teacher(sample, recipe.distill.dim)
        return crop, teacher_at(teacher, place, sound.shape[-1], math.ceil(self.samples / hop), hop)

    def sound(self, sample: dict[str, Any]) -> Tensor | None:
        """A sample's whole sound, int16 ``[C, n]`` at the model's rate; None when it has none.

        Raises:
            PlaitError: it is broken.
        """
        data = member(sample, "audio")
        if data is None:
            return None
        key = str(sample["__key__"]), zlib.crc32(data)
        if key in self.kept:
            return self.kept[key]
        decoded = _decode(data, sample["__key__"], self.recipe)
        sound = (decoded * 2**15).round().clamp(-(2**15), 2**15 - 1).to(torch.int16)
        if sound.nbytes <= self.room:
            self.room -= sound.nbytes
            self.kept[key] = sound
        return sound


def read_teacher(sample: dict[str, Any], dim: int) -> Tensor:
    """The latents that lie beside a sound as ``key.npy``, float32 ``[T, dim]``.

    Raises:
        PlaitError: there are none, or they are of another shape.
    """
    key = sample["__key__"]
    if "npy" not in sample:
        raise PlaitError(f"{key}: has no {key}.npy with the teacher's latents; add it or set distill.weight=0")
    try:
        latents = np.load(io.BytesIO(sample["npy"]), allow_pickle=False)
    except (ValueError, EOFError, OSError) as error:
        raise PlaitError(f"{key}.npy: not a NumPy array ({error}); save it with numpy.save") from None
    if latents.ndim != 2 or latents.shape[1] != dim or not len(latents) or latents.dtype.kind != "f":
        raise PlaitError(
            f"{key}.npy: is {latents.dtype} {list(latents.shape)}, expected floats [T, {dim}]; set distill.dim"
        )
    return torch.from_numpy(latents.astype(np.float32))


def load_heldout(recipe: AudioTokenizerRecipe) -> list[Tensor]:
    """The held-out sounds, float32 ``[C, n]`` each. What cannot be read is named and left out.

    Raises:
        PlaitError: nothing can be read.
    """
    sounds: list[Tensor] = []
    most = _HELD_OUT_SECONDS * recipe.model.sample_rate
    for sample in read_samples(Path(recipe.heldout)):
        if len(sounds) == recipe.eval_items:
            break
        try:
            if (data := member(sample, "audio")) is not None:
                sounds.append(_decode(data, sample["__key__"], recipe)[:, :most].clone())
        except PlaitError as error:
            print(f"skipped {error}", flush=True)
    if not sounds:
        raise PlaitError(f"{recipe.heldout}: holds no sound that can be read; there must be something to evaluate on")
    return sounds


def _decode(data: bytes, name: str, recipe: AudioTokenizerRecipe) -> Tensor:
    return read_sound(data, name, recipe.model.sample_rate, recipe.model.channels).samples
