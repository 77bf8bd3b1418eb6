"""One sound to codes, and back to a file; only a few seconds of it are in memory at a time."""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from plait.errors import PlaitError
from plait.tokenizers.base import Codes, check_codes
from plait.tokenizers.counter import Counter
from plait.tokenizers.sound import SoundWriter, measure, sound_facts, stream_sound
from plait.tokenizers.waves import CHUNK

SOUND_FORMATS = ("wav", "flac", "mp3", "ogg")
# Below this a sound is silence, which has no level to change.
_SILENCE = 1e-8


@dataclass(frozen=True)
class SoundOptions:
    """How sound is encoded.

    Attributes:
        n_codebooks: the first so many codebooks; all by default.
        bandwidth: as many codebooks as fit into this many kilobits per second.
        loudness: the level to bring a sound to, in dB of full scale, root mean square over all of it.
    """

    n_codebooks: int | None = None
    bandwidth: float | None = None
    loudness: float | None = None

    def __post_init__(self) -> None:
        if self.n_codebooks is not None and self.n_codebooks < 1:
            raise PlaitError(f"n_codebooks: is {self.n_codebooks!r}, must be at least 1")
        if self.bandwidth is not None and not 0 < self.bandwidth < math.inf:
            raise PlaitError(f"bandwidth: is {self.bandwidth!r}, must be kilobits per second, above 0")
        if self.bandwidth is not None and self.n_codebooks is not None:
            raise PlaitError("bandwidth: n_codebooks is given too; give one of them")
        if self.loudness is not None and not -100 <= self.loudness <= 0:
            raise PlaitError(f"loudness: is {self.loudness!r}, must be -100 to 0 dB of full scale")


def encode_sound(model: Any, path: Path, options: SoundOptions, count: Counter) -> Codes:
    """A sound's codes, at the tokenizer's rate and channels.

    What would be beyond ±1 is divided by its peak, and with ``loudness`` the sound is brought to that level, or as near
    to it as leaves its peak at 1. What it was divided by is in `Codes.scale`, and `decode` gives the level back. This
    takes a pass over the file of its own, but for whole-number samples at the tokenizer's own rate.

    Raises:
        PlaitError: the file cannot be read.
    """
    chunk = max(1, round(CHUNK * model.frame_rate)) * model.factor
    facts = sound_facts(path)
    total = math.ceil((facts.samples or 0) * model.sample_rate / facts.sample_rate)
    scale = None
    if options.loudness is not None or not facts.bounded or facts.sample_rate != model.sample_rate:
        level = measure(stream_sound(path, model.sample_rate, model.channels, chunk))
        total, scale = level.samples, _scale(level.peak, level.rms, options.loudness)
    count.expect(model.steps_of(total))
    samples = 0

    def chunks() -> Iterator[Tensor]:
        nonlocal samples
        for part in stream_sound(path, model.sample_rate, model.channels, chunk):
            samples += part.shape[-1]
            yield part[None]

    codebooks = options.n_codebooks if options.bandwidth is None else model.codebooks_of(options.bandwidth)
    # On the CPU, and as int32 until all are there: on long sounds the codes are what memory holds.
    parts, scales = [], []
    for codes, scale_of_part in model.encode_scaled(chunks(), codebooks, scale):
        parts.append(codes.to("cpu", torch.int32))
        if len(parts) == 64:  # many small tensors keep the chunks' memory from being used again
            parts = [torch.cat(parts, -1)]
        scales.append(scale_of_part)
        count.add(codes.shape[-1])
    # A tokenizer that levels segments by itself has a scale for each.
    scale = scales[0] if scales[0] is None or scales[0].ndim == 1 else torch.cat(scales, 1)
    return Codes(
        torch.cat(parts, -1).long(),
        "audio",
        size=(samples,),
        sample_rate=model.sample_rate,
        scale=None if scale is None else scale.cpu(),
        fingerprint=model.fingerprint,
    )


def decode_sound(model: Any, codes: Codes, target: Path, count: Counter) -> int:
    """A sound of checked codes, written to ``target``.

    Returns:
        the number of samples that were beyond ±1 and are clipped.

    Raises:
        PlaitError: it cannot be written.
    """
    count.expect(codes.codes.shape[-1])
    steps = max(1, round(CHUNK * model.frame_rate))
    with SoundWriter(target, model.sample_rate, model.channels) as writer:
        for samples in model.decode_stream(codes.codes.split(steps, -1), codes.size, codes.scale):
            writer.write(samples[0])
            count.add(model.steps_of(samples.shape[-1]))
    return writer.clipped


def check_sound(codes: Codes, model: Any) -> None:
    """Refuse codes that are no sound of this tokenizer, before anything is written.

    Raises:
        PlaitError: what is wrong with them.
    """
    several = len(model.codebook_sizes) > 1
    if codes.codes.ndim != 2 + several or 0 in codes.codes.shape:
        raise PlaitError(f"codes of shape {list(codes.codes.shape)} are no audio of this tokenizer")
    if len(codes.codes) != 1:
        raise PlaitError(f"holds a batch of {len(codes.codes)}; save one sound per file")
    sizes = model.codebook_sizes
    if several and codes.codes.shape[1] > len(sizes):
        raise PlaitError(f"codes: has {codes.codes.shape[1]} codebooks, this tokenizer has {len(sizes)}")
    for i, part in enumerate(codes.codes.unbind(1) if several else [codes.codes]):
        check_codes(part, sizes[i], f"codes of codebook {i}" if several else "codes")
    if codes.sample_rate not in (None, model.sample_rate):
        raise PlaitError(f"is at {codes.sample_rate} Hz, this tokenizer at {model.sample_rate} Hz; name the one used")
    codes.sample_rate = model.sample_rate
    model.check_facts(codes)
    steps = codes.codes.shape[-1]
    if codes.lengths is not None:
        # What was filled up to make a batch is no part of the sound.
        codes.codes = codes.codes[..., : int(codes.lengths)]
    codes.size = codes.size or (model.samples_of(steps),)
    number = codes.size[0]
    if len(codes.size) != 1 or type(number) is not int or number < 1 or model.steps_of(number) != steps:
        raise PlaitError(f"size {codes.size} does not fit {steps} steps of codes; encode it again")
    codes.size = (min(number, model.samples_of(codes.codes.shape[-1])),)


def _scale(peak: float, rms: float, loudness: float | None) -> Tensor | None:
    """What to divide a sound by, float ``[1]``, or None for nothing."""
    if loudness is None:
        return torch.tensor([peak]) if peak > 1 else None
    gain = rms / 10 ** (loudness / 20)
    return torch.tensor([max(gain, peak)]) if gain > _SILENCE else None
