"""What every audio tokenizer shares, whatever its network: checks, padding, codes, long sound.

A network supplies two passes, `to_latents` and `from_latents`, and a quantizer; everything here is built on them. Both
passes take a `Stream`, which holds what layers need of the chunks before: sound goes through in chunks and gives what
one pass over all of it gives, in memory that does not grow with its length.
"""

import math
from abc import abstractmethod
from collections.abc import Iterable, Iterator
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from plait.errors import PlaitError
from plait.tokenizers.base import Codes, check_codes
from plait.tokenizers.network import NetworkTokenizer
from plait.tokenizers.streaming import Stream

# Long sound goes through the network in chunks of about this many seconds.
CHUNK = 8.0


class WaveTokenizer(NetworkTokenizer):
    """Sound ``[B, C, N]``, float32 in ``[-1, 1]``, to codes and back: ``[B, t]``, with q > 1 codebooks ``[B, q, t]``.

    A subclass sets `config` (a frozen dataclass) and `quantizer` (with ``codes``, ``latents`` and ``codebook_sizes``)
    and writes the two passes. Samples beyond ±1 are encoded as they are; see `plait.tokenizers.sound` for what is done
    with files.
    """

    kind: ClassVar[str] = "audio"
    modalities: ClassVar[tuple[str, ...]] = ("audio",)

    @property
    @abstractmethod
    def sample_rate(self) -> int:
        """Hz."""

    @property
    @abstractmethod
    def channels(self) -> int:
        """Channels of the samples, C."""

    @property
    @abstractmethod
    def factor(self) -> int:
        """Samples per step of the codes."""

    @abstractmethod
    def to_latents(self, samples: Tensor, stream: Stream) -> Tensor:
        """Samples → latents before quantization, as many as can be given now.

        Args:
            samples: ``[B, C, n]``, whole multiples of `factor` over the whole signal.
            stream: of the chunks before.

        Returns:
            ``[B, d, t]``, where t may be 0.
        """

    @abstractmethod
    def from_latents(self, z: Tensor, stream: Stream) -> Tensor:
        """Quantized latents → samples, as many as can be given now.

        Args:
            z: ``[B, d, t]``.
            stream: of the chunks before.

        Returns:
            ``[B, C, n]``, not clamped; over the whole signal at least ``t · factor`` samples.
        """

    @property
    def has_segments(self) -> bool:
        """Whether sound is cut into segments, each with a level of its own."""
        return False

    @property
    def frame_rate(self) -> float:
        """Steps of the codes per second."""
        return self.sample_rate / self.factor

    @property
    def bitrate(self) -> float:
        """Bits per second of all codebooks."""
        return self.frame_rate * sum(math.log2(size) for size in self.codebook_sizes)

    def codebooks_of(self, bandwidth: float) -> int:
        """How many codebooks a bandwidth pays for, at least one.

        Args:
            bandwidth: kilobits per second.

        Raises:
            PlaitError: it is no positive number.
        """
        if isinstance(bandwidth, bool) or not isinstance(bandwidth, int | float) or not 0 < bandwidth < math.inf:
            raise PlaitError(f"bandwidth: is {bandwidth!r}, must be kilobits per second, above 0")
        count, left = 0, bandwidth * 1000 * (1 + 1e-9)
        for size in self.codebook_sizes:
            left -= self.frame_rate * math.log2(size)
            count += left >= 0
        return max(1, count)

    def steps_of(self, samples: int) -> int:
        """How many steps of codes so many samples become."""
        return -(-samples // self.factor)

    def samples_of(self, steps: int) -> int:
        """How many samples at most became so many steps of codes."""
        return steps * self.factor

    # Codes

    @torch.no_grad()
    def encode(
        self,
        samples: Tensor,
        lengths: Tensor | None = None,
        n_codebooks: int | None = None,
        bandwidth: float | None = None,
        loudness: float | None = None,
    ) -> Codes:
        """Samples → codes.

        Any length goes in: it is filled up with zeros to whole steps, and remembered. Long sound takes no more memory
        than short.

        Args:
            samples: ``[B, C, N]``, floating point, at `sample_rate`.
            lengths: valid samples of each item, int ``[B]``; what comes after them is taken as silence.
            n_codebooks: the first so many codebooks; all by default.
            bandwidth: as many codebooks as fit into this many kilobits per second.
            loudness: bring each item to this level first, in dB of full scale, root mean square over all its samples;
                the gain is taken back by `decode`.

        Returns:
            codes ``[B, t]``, with the codebook axis at dim 1 if there are several.

        Raises:
            PlaitError: no tensor, another shape, an integer dtype, or values that are not finite.
        """
        self._check_samples(samples)
        count = self._checked_count(n_codebooks, bandwidth)
        valid = _checked_lengths(lengths, samples)
        if valid is not None:
            there = torch.arange(samples.shape[-1], device=samples.device) < valid.to(samples.device)[:, None, None]
            samples = samples.where(there, 0)
        gain = None if loudness is None else _gain(samples, valid, loudness)
        codes, scales = zip(*self.encode_scaled([samples], count, gain), strict=True)
        scale = scales[0]
        return Codes(
            torch.cat(codes, -1),
            "audio",
            size=(samples.shape[-1],),
            lengths=None if valid is None else valid.new_tensor([self.steps_of(n) for n in valid.tolist()]),
            sample_rate=self.sample_rate,
            scale=scale if scale is None or scale.ndim == 1 else torch.cat(scales, 1),
            fingerprint=self.fingerprint,
        )

    @torch.no_grad()
    def encode_stream(
        self, chunks: Iterable[Tensor], n_codebooks: int | None = None, scale: Tensor | None = None
    ) -> Iterator[Tensor]:
        """Sound in chunks of any length → its codes in chunks, which together are those of `encode`.

        Args:
            chunks: ``[B, C, n]`` each, n ≥ 1.
            n_codebooks: as in `encode`.
            scale: what to divide the samples by, float ``[B]``.

        Yields:
            codes ``[B, t]``, with the codebook axis at dim 1 if there are several.

        Raises:
            PlaitError: as `encode`, or chunks of different shapes.
        """
        for codes, _ in self.encode_scaled(chunks, n_codebooks, scale):
            yield codes

    @torch.no_grad()
    def encode_scaled(
        self, chunks: Iterable[Tensor], n_codebooks: int | None = None, scale: Tensor | None = None
    ) -> Iterator[tuple[Tensor, Tensor | None]]:
        """As `encode_stream`, with what the samples were divided by; for tokenizers that level parts by themselves.

        Args:
            chunks: ``[B, C, n]`` each, n ≥ 1.
            n_codebooks: as in `encode`.
            scale: what to divide the samples by, float ``[B]``.

        Yields:
            codes, and what to give `decode_stream` as ``scale``: float ``[B]`` of the whole sound, or ``[B, s]`` of
            these codes' s segments, to be joined along dim 1; or None.

        Raises:
            PlaitError: as `encode_stream`.
        """
        self._check_codebooks(n_codebooks)
        stream = Stream()
        for chunk, last in _with_last(self._regrouped(chunks)):
            stream.last = last
            with torch.autocast(self.device.type, enabled=False):
                samples = chunk.to(self.device, torch.float32)
                if scale is not None:
                    samples = samples / scale.to(samples)[:, None, None]
                codes = self._encode_chunk(samples, stream, n_codebooks)
            if codes.shape[-1]:
                yield codes, scale  # outside, or the consumer's own autocast would be off

    @torch.no_grad()
    def decode(self, codes: Codes | Tensor, size: tuple[int, ...] | None = None) -> Tensor:
        """Codes → samples, float32.

        Args:
            codes: a `Codes`, or a bare int tensor ``[B, t]``, with the codebook axis at dim 1 if there are several;
                the first so many codebooks are enough.
            size: (N,) samples to crop to; by default a `Codes`'s own size, else whole steps.

        Returns:
            ``[B, C, N]``; silence beyond an item's own `Codes.lengths`.

        Raises:
            PlaitError: wrong shape, codes out of range, made by another tokenizer, or a size that does not fit.
        """
        scale = lengths = None
        if isinstance(codes, Codes):
            if codes.fingerprint not in (None, self.fingerprint):
                raise PlaitError(
                    "codes: made by another tokenizer (fingerprints differ); decode with the one that encoded"
                )
            self._check_steps(codes.codes)
            self.check_facts(codes)
            size, scale, lengths, codes = size or codes.size, codes.scale, codes.lengths, codes.codes
        self._check_steps(codes)
        samples = torch.cat(list(self.decode_stream([codes], size, scale)), -1)
        if lengths is not None:
            there = torch.arange(samples.shape[-1], device=samples.device)
            ends = torch.tensor([self.samples_of(n) for n in lengths.tolist()], device=there.device)
            samples = samples.where(there < ends[:, None, None], 0)
        return samples

    @torch.no_grad()
    def decode_stream(
        self, chunks: Iterable[Tensor], size: tuple[int, ...] | None = None, scale: Tensor | None = None
    ) -> Iterator[Tensor]:
        """Codes in chunks of any number of steps → samples in chunks, which together are those of `decode`.

        Args:
            chunks: ``[B, t]`` each, with the codebook axis at dim 1 if there are several.
            size: (N,) samples to crop to.
            scale: what to multiply the samples by, float ``[B]``; or as `encode_scaled` gave it.

        Yields:
            ``[B, C, n]``.

        Raises:
            PlaitError: as `decode`, or chunks of different shapes.
        """
        left, given = _checked_size(size), 0

        def counted() -> Iterator[Tensor]:
            nonlocal given
            for chunk in self._checked_steps(chunks):
                given += chunk.shape[-1]
                yield chunk

        for samples in self._decoded(counted(), left, scale):
            if left is not None:
                samples = samples[..., :left]
                left -= samples.shape[-1]
            if samples.shape[-1]:
                yield samples
        if size is not None and self.steps_of(size[0]) != given:
            raise PlaitError(
                f"size: {size[0]} samples do not fit {given} steps of codes; give the size that was encoded"
            )

    def _decoded(self, chunks: Iterable[Tensor], size: int | None, scale: Tensor | None) -> Iterator[Tensor]:
        """Codes in chunks → samples in chunks, scaled, not yet cropped to the size."""
        stream = Stream()
        steps = max(1, round(CHUNK * self.frame_rate))
        for part, last in _with_last(part for chunk in chunks for part in chunk.split(steps, -1)):
            stream.last = last
            with torch.autocast(self.device.type, enabled=False):
                samples = self._decode_chunk(part.to(self.device, torch.int64), stream)
            yield samples if scale is None else samples * scale.to(samples)[:, None, None]

    # The two chunk passes

    def _encode_chunk(self, samples: Tensor, stream: Stream, n_codebooks: int | None) -> Tensor:
        """Samples ``[B, C, n]`` → codes ``[B, t]`` or ``[B, q, t]``."""
        z = rearrange(self.to_latents(samples, stream), "b d t -> b t d")
        if len(self.codebook_sizes) == 1:
            return self.quantizer.codes(z)
        return rearrange(self.quantizer.codes(z, n_codebooks), "b t q -> b q t")

    def _decode_chunk(self, codes: Tensor, stream: Stream) -> Tensor:
        """Codes ``[B, t]`` or ``[B, q, t]`` → samples ``[B, C, n]``."""
        z = self.quantizer.latents(codes if codes.ndim == 2 else rearrange(codes, "b q t -> b t q"))
        return self.from_latents(rearrange(z, "b t d -> b d t"), stream)

    # Checks

    def _regrouped(self, chunks: Iterable[Tensor]) -> Iterator[Tensor]:
        """Chunks of any length → chunks of whole steps and at most about `CHUNK` seconds; the last one is filled up."""
        most = max(1, round(CHUNK * self.frame_rate)) * self.factor
        held: Tensor | None = None
        shape = None
        for chunk in chunks:
            self._check_samples(chunk)
            if shape not in (None, tuple(chunk.shape[:2])):
                raise PlaitError(f"samples: a chunk is {tuple(chunk.shape)}, the chunks before differ in more than n")
            shape = tuple(chunk.shape[:2])
            held = chunk if held is None else torch.cat([held, chunk], -1)
            whole = held.shape[-1] // self.factor * self.factor
            yield from held[..., :whole].split(most, -1) if whole else ()
            held = held[..., whole:].clone()
        if held is not None and held.shape[-1]:
            yield self._pad(held)

    def _pad(self, samples: Tensor) -> Tensor:
        """Fill up ``[..., N]`` with zeros to whole steps."""
        return F.pad(samples, (0, -samples.shape[-1] % self.factor))

    def _check_samples(self, samples: Tensor) -> None:
        expected = f"[B, {self.channels}, N]"
        if not isinstance(samples, Tensor):
            raise PlaitError(f"samples: is a {type(samples).__name__}, expected a tensor {expected}")
        if samples.ndim != 3 or samples.shape[1] != self.channels or 0 in samples.shape:
            raise PlaitError(f"samples: shape is {tuple(samples.shape)}, expected {expected}")
        if not samples.is_floating_point():
            raise PlaitError(f"samples: dtype is {samples.dtype}, expected floating point in [-1, 1]")
        if not samples.float().isfinite().all():
            raise PlaitError("samples: values are not finite; replace NaN and infinity, say with torch.nan_to_num")

    def check_facts(self, codes: Codes) -> None:
        """Refuse what goes with codes but does not fit them.

        Raises:
            PlaitError: another modality or sample rate, or a ``scale`` or ``lengths`` of another shape, dtype or range.
        """
        if codes.modality != "audio":
            raise PlaitError(f"codes: modality is {codes.modality!r}, this tokenizer has audio")
        if codes.sample_rate not in (None, self.sample_rate):
            raise PlaitError(f"codes: sample_rate is {codes.sample_rate}, this tokenizer's is {self.sample_rate}")
        batch, steps = len(codes.codes), codes.codes.shape[-1]
        scale, lengths = codes.scale, codes.lengths
        if scale is not None and not (
            isinstance(scale, Tensor)
            and scale.dtype in (torch.float64, torch.float32, torch.float16, torch.bfloat16)
            and 1 <= scale.ndim <= 1 + self.has_segments
            and len(scale) == batch
            and bool(((scale > 0) & (scale < math.inf)).all())
        ):
            segments = " or [B, segments]" if self.has_segments else ""
            raise PlaitError(f"scale: must hold numbers above 0, floats [B]{segments} for a batch of {batch}")
        if lengths is not None and not (
            isinstance(lengths, Tensor)
            and lengths.dtype in (torch.int64, torch.int32)
            and lengths.shape == (batch,)
            and bool(((lengths > 0) & (lengths <= steps)).all())
        ):
            raise PlaitError(
                f"lengths: must be ints [B] for a batch of {batch}, each from 1 to the codes' {steps} steps"
            )

    def _checked_count(self, n_codebooks: int | None, bandwidth: float | None) -> int | None:
        if bandwidth is None:
            return n_codebooks
        if n_codebooks is not None:
            raise PlaitError("bandwidth: n_codebooks is given too; give one of them")
        return self.codebooks_of(bandwidth)

    def _checked_steps(self, chunks: Iterable[Tensor]) -> Iterator[Tensor]:
        shape = None
        for chunk in chunks:
            self._check_steps(chunk)
            if shape not in (None, tuple(chunk.shape[:-1])):
                raise PlaitError(f"codes: a chunk is {tuple(chunk.shape)}, the chunks before differ in more than t")
            shape = tuple(chunk.shape[:-1])
            yield chunk

    def _check_steps(self, codes: Tensor) -> None:
        if not isinstance(codes, Tensor):
            raise PlaitError(f"codes: is a {type(codes).__name__}, expected Codes or a tensor of integers")
        there = len(self.codebook_sizes)
        if codes.ndim != (3 if there > 1 else 2) or 0 in codes.shape:
            raise PlaitError(f"codes: shape is {tuple(codes.shape)}, expected [B, {'q, ' if there > 1 else ''}t]")
        if there > 1 and codes.shape[1] > there:
            raise PlaitError(f"codes: has {codes.shape[1]} codebooks, this tokenizer has {there}")
        for i, size in enumerate(self.codebook_sizes if there > 1 else ()):
            check_codes(codes[:, i : i + 1], size, f"codes of codebook {i}")
        if there == 1:
            check_codes(codes, self.codebook_sizes[0])


def _with_last(chunks: Iterable[Any]) -> Iterator[tuple[Any, bool]]:
    """Each chunk, and whether it is the last."""
    held: list[Any] = []
    for chunk in chunks:
        yield from ((before, False) for before in held)
        held = [chunk]
    yield from ((before, True) for before in held)


def _checked_lengths(lengths: Tensor | None, samples: Tensor) -> Tensor | None:
    if lengths is None:
        return None
    if not isinstance(lengths, Tensor) or lengths.shape != (len(samples),) or lengths.is_floating_point():
        raise PlaitError(f"lengths: must be an int tensor [{len(samples)}], the valid samples of each item")
    if int(lengths.min()) < 1 or int(lengths.max()) > samples.shape[-1]:
        raise PlaitError(f"lengths: {lengths.tolist()} must be from 1 to the {samples.shape[-1]} samples there are")
    return lengths.long()


def _checked_size(size: tuple[int, ...] | None) -> int | None:
    if size is None:
        return None
    if not isinstance(size, list | tuple) or len(size) != 1 or type(size[0]) is not int or size[0] < 1:
        raise PlaitError(f"size: {size!r} must be (N,), a number of samples")
    return size[0]


def _gain(samples: Tensor, valid: Tensor | None, loudness: float) -> Tensor:
    """What to divide each item by, float32 ``[B]``, to bring it to a level; 1 for silence.

    Raises:
        PlaitError: the level is not from -100 to 0 dB.
    """
    if isinstance(loudness, bool) or not isinstance(loudness, int | float) or not -100 <= loudness <= 0:
        raise PlaitError(f"loudness: is {loudness!r}, must be -100 to 0 dB of full scale")
    counts = samples.shape[-1] if valid is None else valid.to(samples.device)
    energy = samples.float().square().mean(1).sum(-1) / counts
    gain = energy.sqrt() / 10 ** (loudness / 20)
    if not gain.isfinite().all():
        raise PlaitError("loudness: the samples are too loud to be measured; scale them to [-1, 1]")
    return gain.where(gain > 1e-8, 1.0)
