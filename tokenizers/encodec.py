"""EnCodec: speech, sounds and music at 24 kHz (mono, causal) and 48 kHz (stereo), the released weights included.

SEANet's convolutions with an LSTM go down to 75 steps a second (150 at 48 kHz) and up again, residual codebooks are
between them. The 24 kHz network is causal and takes sound of any length in one pass, whole or as a stream. The 48 kHz
network sees segments of one second, each brought to the same loudness; neighbours overlap by a hundredth and are faded
into each other.

Signals are ``[B, T, C]`` in here, so that a convolution is one product of matrices per tap, the rows of which lie in
the signal itself: nothing is unfolded or turned around. On a CPU that takes half of the time of PyTorch's convolutions.

Paper: Défossez et al., "High Fidelity Neural Audio Compression", 2022 (arXiv 2210.13438).
"""

import math
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from plait.errors import PlaitError
from plait.tokenizers.foreign import Layout, Tensors, fold_weight_norm
from plait.tokenizers.quantizer import QuantizerConfig, build_quantizer
from plait.tokenizers.streaming import Chain, Stream, Streamed, whole
from plait.tokenizers.waveblocks import ELU
from plait.tokenizers.waves import CHUNK, WaveTokenizer

# Beyond any network there is, so that a damaged file asks for no terabytes.
MOST_CHANNELS = 2**13

# On a CPU the finest levels see so many numbers at a time that what is computed of them stays in its cache.
NUMBERS_AT_ONCE = 2**17
_FINE_LEVELS = 2

# Below this many channels a product of matrices per tap would have too little to do.
_FEW = 4


@dataclass(frozen=True)
class EnCodecConfig:
    """Architecture of an `EnCodecTokenizer`; the defaults are those of the 24 kHz release.

    Attributes:
        sample_rate: Hz.
        channels: 1, or 2 for stereo.
        dim: channels of the latents and of the codebooks' vectors.
        codebooks: how many, at least 2.
        codebook_size: codes of each.
        width: channels at the sample rate; every stride doubles them.
        strides: of the encoder's levels, the finest first; the decoder's are the same in reverse.
        blocks: residual units per level.
        kernel: taps of each half's first convolution.
        last_kernel: taps of each half's last convolution.
        unit_kernel: taps of a residual unit's first convolution.
        dilation_growth: dilation of a level's j-th unit is this to the power of j.
        compress: by how much a residual unit narrows its channels.
        shortcut: whether a residual unit's shortcut is a convolution.
        lstm_layers: of each half, at the codes' rate.
        causal: nothing looks ahead beyond its own stride.
        reflect: the signal's ends are mirrored; else zeros go on.
        trim_right: which part of what transposed convolutions give too much is cut from the end; 1 unless causal.
        group_norm: convolutions are followed by a norm over channels and time, which needs segments.
        normalize: each segment is divided by its root mean square.
        segment: samples that the network sees at a time; 0 for all of them.
        segment_stride: samples from one segment to the next.

    Raises:
        PlaitError: a value that cannot be.
    """

    sample_rate: int = 24000
    channels: int = 1
    dim: int = 128
    codebooks: int = 32
    codebook_size: int = 1024
    width: int = 32
    strides: tuple[int, ...] = (2, 4, 5, 8)
    blocks: int = 1
    kernel: int = 7
    last_kernel: int = 7
    unit_kernel: int = 3
    dilation_growth: int = 2
    compress: int = 2
    shortcut: bool = True
    lstm_layers: int = 2
    causal: bool = True
    reflect: bool = True
    trim_right: float = 1.0
    group_norm: bool = False
    normalize: bool = False
    segment: int = 0
    segment_stride: int = 0

    def __post_init__(self) -> None:
        strides = self.strides
        if not isinstance(strides, list | tuple) or not 1 <= len(strides) <= 8:
            raise PlaitError(f"encodec: strides is {strides!r}, must list 1 to 8 whole numbers")
        object.__setattr__(self, "strides", tuple(strides))
        if any(type(stride) is not int or not 1 <= stride <= 64 for stride in strides):
            raise PlaitError(f"encodec: strides is {strides!r}, must list whole numbers of 1 to 64")
        for name, least, most in (
            ("sample_rate", 1000, 384_000), ("channels", 1, 2), ("dim", 1, MOST_CHANNELS), ("codebooks", 2, 256),
            ("codebook_size", 2, 2**16), ("width", 1, MOST_CHANNELS >> len(strides)), ("blocks", 0, 16),
            ("kernel", 1, 64), ("last_kernel", 1, 64), ("unit_kernel", 1, 64), ("dilation_growth", 1, 16),
            ("compress", 1, self.width if type(self.width) is int else 1), ("lstm_layers", 1, 16),
            ("segment", 0, 2**26), ("segment_stride", 0, 2**26),
        ):  # fmt: skip
            if type(number := getattr(self, name)) is not int or not least <= number <= most:
                raise PlaitError(f"encodec: {name} is {number!r}, must be a whole number of {least} to {most}")
        for name in ("shortcut", "causal", "reflect", "group_norm", "normalize"):
            if type(flag := getattr(self, name)) is not bool:
                raise PlaitError(f"encodec: {name} is {flag!r}, must be true or false")
        if type(self.trim_right) not in (int, float) or not 0 <= self.trim_right <= 1:
            raise PlaitError(f"encodec: trim_right is {self.trim_right!r}, must be 0 to 1")
        if not self.causal and self.trim_right != 1:
            raise PlaitError(f"encodec: trim_right is {self.trim_right}, must be 1 unless causal")
        if self.dilation_growth ** max(0, self.blocks - 1) > 2**12:
            raise PlaitError(f"encodec: dilation_growth is {self.dilation_growth}, too much for {self.blocks} blocks")
        if bool(self.segment) != bool(self.segment_stride) or self.segment_stride > self.segment:
            raise PlaitError(
                f"encodec: segment_stride is {self.segment_stride}, must be 1 to the segment's {self.segment} samples, "
                "or both 0"
            )
        for name in ("group_norm", "normalize"):
            if getattr(self, name) and not self.segment:
                raise PlaitError(f"encodec: {name} is true but segment is 0; it needs the length of a segment")

    @property
    def quantizer(self) -> QuantizerConfig:
        """How latents become codes."""
        return QuantizerConfig(
            "rvq", codebook_size=self.codebook_size, dim=self.dim, codebooks=self.codebooks, dropout=0.5
        )


# Layers, for signals [B, T, C]


def _joined(past: Tensor | None, x: Tensor) -> Tensor:
    """What was kept and what came, along time."""
    return x if past is None or not past.shape[1] else torch.cat([past, x], 1)


class TimeNorm(nn.Module):
    """Group norm with one group: over all channels and steps of each signal."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.ones(channels)), nn.Parameter(torch.zeros(channels))

    def forward(self, x: Tensor) -> Tensor:
        """``[B, T, C]``, a whole signal → the same shape."""
        return torch.addcmul(self.bias, F.layer_norm(x, x.shape[1:]), self.weight)


class Conv(nn.Module, Streamed):
    """Convolution over a stream; it gives every output as soon as its inputs are there.

    T steps become ``ceil(T / stride)``: the signal is padded by ``reach − stride`` steps, all of them before it or
    shared out to both its sides, and behind it to whole strides. The weight is ``[taps, inputs, outputs]``.

    Args:
        config: of the network.
        inputs: channels.
        outputs: channels.
        kernel: taps, a multiple of the stride.
        stride: inputs from one output to the next; 1 with a dilation.
        dilation: inputs from one tap to the next.
    """

    def __init__(
        self, config: EnCodecConfig, inputs: int, outputs: int, kernel: int, stride: int = 1, dilation: int = 1
    ) -> None:
        super().__init__()
        self.stride, self.dilation, self.reflect = stride, dilation, config.reflect
        self.reach = (kernel - 1) * dilation + 1
        total = self.reach - stride
        right = 0 if config.causal else total // 2
        self.pads = total - right, right
        bound = (inputs * kernel) ** -0.5
        self.weight = nn.Parameter(torch.empty(kernel, inputs, outputs).uniform_(-bound, bound))
        self.bias = nn.Parameter(torch.empty(outputs).uniform_(-bound, bound))
        self.norm = TimeNorm(outputs) if config.group_norm else None
        # A signal is mirrored at its beginning when it is longer than any padding, or has ended: a shorter one is
        # mirrored otherwise.
        most = right + stride - 1
        self.wait = max(*self.pads, most) if config.reflect else 0
        # To mirror the end, more steps must be remembered than the next output needs.
        self.spare = max(0, most + 1 - total) if config.reflect and most else 0

    def forward(self, x: Tensor, stream: Stream, start: Tensor | None = None) -> Tensor:
        """``[B, T, C]`` → ``[B, T', C']``, where T' may be 0.

        Args:
            x: the next inputs.
            stream: of the signal.
            start: what to add the products to instead of the bias, ``[C']`` or ``[B, T', C']``; the latter is
                overwritten where no gradients are wanted.
        """
        held, seen, used = stream.take(self, (None, 0, -1))
        starts, seen = used < 0, seen + x.shape[1]
        x = _joined(held, x)
        if starts and not stream.last and seen <= self.wait:
            stream.put(self, (x.clone(), seen, -1))
            return x.new_zeros(len(x), 0, self.weight.shape[2])
        left = self.pads[0] if starts else 0
        right = self.pads[1] + -seen % self.stride if stream.last else 0
        if left or right:
            x = _mirrored(x, left, right) if self.reflect else F.pad(x, (0, 0, left, right))
        used = max(0, used)
        count = max(0, (x.shape[1] - used - self.reach) // self.stride + 1)
        if not stream.last:
            end = used + count * self.stride
            kept = max(0, end - self.spare)
            stream.put(self, (x[:, kept:].clone(), seen, end - kept))
        y = self._products(x[:, used:], count, self.bias if start is None else start)
        return y if self.norm is None else self.norm(y)

    def _products(self, x: Tensor, count: int, start: Tensor) -> Tensor:
        """The first ``count`` steps of convolving ``[B, T, C]``, added to ``start``."""
        kernel, inputs, outputs = self.weight.shape
        taps, batch = kernel // self.stride, len(x)
        if not count:
            return x.new_zeros(batch, 0, outputs)
        if outputs <= _FEW and self.stride == 1:
            parts = (x @ self.weight.transpose(0, 1).flatten(1)).unflatten(-1, (kernel, outputs))
            return sum((parts[:, j * self.dilation :][:, :count, j] for j in range(kernel)), start)
        if inputs * self.stride <= _FEW:
            windows = x.unfold(1, self.reach, self.stride)[:, :count, :, :: self.dilation]
            weight = self.weight.flatten(0, 1).expand(batch, -1, -1)
            return torch.baddbmm(start, windows.transpose(2, 3).flatten(2), weight)
        rows = count + (taps - 1) * self.dilation
        x = x[:, : rows * self.stride].unflatten(1, (rows, self.stride)).flatten(2)
        first, *others = self.weight.view(taps, 1, -1, outputs).expand(-1, batch, -1, -1)
        overwritten = start.ndim == 3 and not torch.is_grad_enabled()
        y = (start.baddbmm_ if overwritten else partial(torch.baddbmm, start))(x[:, :count], first)
        for j, weight in enumerate(others, 1):
            y.baddbmm_(x[:, j * self.dilation :][:, :count], weight)
        return y


def _mirrored(x: Tensor, left: int, right: int) -> Tensor:
    """``[B, T, C]`` with its ends reflected; a signal too short for that is taken to go on with zeros first."""
    length = x.shape[1]
    missing = max(0, max(left, right) + 1 - length)
    x = F.pad(x, (0, 0, 0, missing)) if missing else x
    after = x[:, -1 - right : -1].flip(1) if right else x[:, :0]
    return torch.cat([x[:, 1 : left + 1].flip(1), x, after], 1)[:, : left + length + right]


class ConvTranspose(nn.Module, Streamed):
    """Transposed convolution over a stream, of twice as many taps as its stride; T steps become ``T · stride``.

    Every input gives its own stride of outputs and the next one; the weight is ``[2, inputs, stride · outputs]``.

    Args:
        config: of the network.
        inputs: channels.
        outputs: channels.
        stride: outputs per input.
    """

    def __init__(self, config: EnCodecConfig, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.stride = stride
        right = math.ceil(stride * config.trim_right) if config.causal else stride // 2
        self.trim = stride - right, right
        bound = inputs**-0.5
        self.weight = nn.Parameter(torch.empty(2, inputs, stride * outputs).uniform_(-bound, bound))
        self.bias = nn.Parameter(torch.empty(outputs).uniform_(-bound, bound))
        self.norm = TimeNorm(outputs) if config.group_norm else None

    def forward(self, x: Tensor, stream: Stream) -> Tensor:
        """``[B, T, C]`` → ``[B, T', C']``; ``T · stride`` over the whole signal."""
        past, skip = stream.take(self, (x[:, :0], self.trim[0]))
        batch, count = x.shape[:2]
        # The outputs after the last input's own are not needed where they are cut off, but for the norm.
        ends = stream.last and (self.trim[1] < self.stride or self.norm is not None)
        own, after = self.weight.unsqueeze(1).expand(-1, batch, -1, -1)
        y = self.bias.repeat(self.stride).repeat(batch, count + ends, 1)
        y[:, :count].baddbmm_(x, own)
        y[:, 1:].baddbmm_(x[:, : count - 1 + ends], after)
        if past.shape[1] and y.shape[1]:
            y[:, :1].baddbmm_(past, after)
        y = y.unflatten(2, (self.stride, -1)).flatten(1, 2)
        y = y if self.norm is None else self.norm(y)
        if ends:
            y = y[:, : y.shape[1] - self.trim[1]]
        if not stream.last:
            stream.put(self, (x[:, -1:].clone() if count else past, max(0, skip - y.shape[1])))
        return y[:, skip:]


class Unit(nn.Module, Streamed):
    """SEANet's residual unit: a dilated convolution to fewer channels and one back, beside a shortcut."""

    def __init__(self, config: EnCodecConfig, channels: int, dilation: int) -> None:
        super().__init__()
        hidden = channels // config.compress
        self.elu = ELU()
        self.dilated = Conv(config, channels, hidden, config.unit_kernel, dilation=dilation)
        self.pointwise = Conv(config, hidden, channels, 1)
        self.shortcut = Conv(config, channels, channels, 1) if config.shortcut else None

    def forward(self, x: Tensor, stream: Stream) -> Tensor:
        """``[B, T, C]`` → ``[B, T', C]``."""
        hidden = self.elu(self.dilated(self.elu(x), stream))
        # One sum takes in both biases and both products, unless norms come between.
        summed, bias = self.pointwise.norm is None, self.pointwise.bias
        if self.shortcut is None:
            shortcut = x + bias if summed else x
        else:
            shortcut = self.shortcut(x, stream, self.shortcut.bias + bias if summed else None)
        shortcut, count = _joined(stream.take(self, None), shortcut), hidden.shape[1]
        if not stream.last:
            stream.put(self, shortcut[:, count:].clone())
        shortcut = shortcut[:, :count]
        y: Tensor = self.pointwise(hidden, stream, shortcut if summed else None)
        return y if summed else shortcut + y


class LSTM(nn.LSTM, Streamed):
    """Recurrent layers beside a shortcut; they look back over the whole signal."""

    def __init__(self, channels: int, layers: int) -> None:
        super().__init__(channels, channels, layers, batch_first=True)

    def forward(self, x: Tensor, stream: Stream) -> Tensor:  # type: ignore[override]
        """``[B, T, C]`` → the same shape."""
        if not x.shape[1]:
            return x
        y, state = super().forward(x, stream.take(self, None))
        if not stream.last:
            stream.put(self, state)
        return x + y


def _encoder(config: EnCodecConfig) -> Chain:
    """Samples ``[B, N, C]`` → latents ``[B, T, d]``."""
    width = config.width
    layers: list[nn.Module] = [Conv(config, config.channels, width, config.kernel)]
    for stride in config.strides:
        layers += [Unit(config, width, config.dilation_growth**j) for j in range(config.blocks)]
        layers += [ELU(), Conv(config, width, 2 * width, 2 * stride, stride)]
        width *= 2
    return Chain(*layers, LSTM(width, config.lstm_layers), ELU(), Conv(config, width, config.dim, config.last_kernel))


def _decoder(config: EnCodecConfig) -> Chain:
    """Latents ``[B, T, d]`` → samples ``[B, N, C]``."""
    width = config.width << len(config.strides)
    layers: list[nn.Module] = [Conv(config, config.dim, width, config.kernel), LSTM(width, config.lstm_layers)]
    for stride in reversed(config.strides):
        width //= 2
        layers += [ELU(), ConvTranspose(config, 2 * width, width, stride)]
        layers += [Unit(config, width, config.dilation_growth**j) for j in range(config.blocks)]
    return Chain(*layers, ELU(), Conv(config, width, config.channels, config.last_kernel))


def _in_pieces(layers: nn.Module, x: Tensor, stream: Stream, length: int) -> Tensor:
    """What layers give for ``[B, T, C]``, so many steps at a time; 0 for whole signals, one at a time."""
    if not length:
        return torch.cat([layers(signal, whole()) for signal in x.split(1)])
    last, pieces = stream.last, x.split(length, 1)
    given = []
    for i, piece in enumerate(pieces, 1):
        stream.last = last and i == len(pieces)
        given.append(layers(piece, stream))
    return torch.cat(given, 1)


class EnCodecTokenizer(WaveTokenizer):
    """EnCodec.

    A network without segments (24 kHz) is as any other audio tokenizer. With segments (48 kHz), segment i begins at
    sample ``i · segment_stride`` and its codes follow those of segment i − 1, ``ceil(segment / factor)`` of them or
    fewer for the last ones, which the sound's end cuts off. So a second of sound has more steps than `frame_rate`, by
    the overlap; `steps_of` and `samples_of` count. `Codes.scale` is each segment's root mean square ``[B, segments]``
    (times the gain of ``loudness``, if one was asked for), and `encode_scaled` streams both codes and scales:
    `encode_stream` gives the codes alone, and codes without a scale decode at a loudness of 1. Streams are passed on by
    whole segments.
    """

    architecture: ClassVar[str] = "encodec"
    config_class: ClassVar[type] = EnCodecConfig
    decoder_settings: ClassVar[tuple[str, ...]] = ("trim_right",)
    config: EnCodecConfig

    def __init__(self, config: EnCodecConfig | None = None) -> None:
        super().__init__()
        self.config = config or EnCodecConfig()
        self.encoder = _encoder(self.config)
        self.quantizer = build_quantizer(self.config.quantizer)
        self.decoder = _decoder(self.config)

    @property
    def sample_rate(self) -> int:
        """Hz."""
        return self.config.sample_rate

    @property
    def channels(self) -> int:
        """1, or 2 for stereo."""
        return self.config.channels

    @property
    def factor(self) -> int:
        """Samples per step of the codes."""
        return math.prod(self.config.strides)

    @property
    def has_segments(self) -> bool:
        """Whether sound is cut into segments."""
        return bool(self.config.segment)

    def steps_of(self, samples: int) -> int:
        """How many steps of codes so many samples become, over all segments."""
        if not self.config.segment:
            return super().steps_of(samples)
        whole_ones = self._whole_segments(samples)
        rest = range(whole_ones, -(-samples // self.config.segment_stride))
        return whole_ones * self._segment_steps + sum(self._steps_of_segment(i, samples) for i in rest)

    def samples_of(self, steps: int) -> int:
        """How many samples at most became so many steps of codes."""
        if not self.config.segment:
            return super().samples_of(steps)
        before = (steps - 1) // self._segment_steps
        last = before * self.config.segment_stride + (steps - before * self._segment_steps) * self.factor
        return max(last, (before - 1) * self.config.segment_stride + self._segment_steps * self.factor if before else 0)

    def to_latents(self, samples: Tensor, stream: Stream) -> Tensor:
        """Samples ``[B, C, n]`` → latents ``[B, d, t]`` before quantization."""
        fine = 1 + min(_FINE_LEVELS, len(self.config.strides)) * (self.config.blocks + 2)
        x = _in_pieces(self.encoder[:fine], samples.transpose(1, 2), stream, self._piece(samples))
        latents: Tensor = self.encoder[fine:](x, stream)
        return latents.transpose(1, 2)

    def from_latents(self, z: Tensor, stream: Stream) -> Tensor:
        """Quantized latents ``[B, d, t]`` → samples ``[B, C, n]``, not clamped."""
        coarse = max(0, len(self.config.strides) - _FINE_LEVELS)
        fine = 2 + coarse * (self.config.blocks + 2)
        x = self.decoder[:fine](z.transpose(1, 2), stream)
        factor = math.prod(self.config.strides[:_FINE_LEVELS])
        samples = _in_pieces(self.decoder[fine:], x, stream, -(-self._piece(x) // factor))
        return samples.transpose(1, 2)

    def _piece(self, x: Tensor) -> int:
        """Samples that pass the finest levels at a time; 0 where these see a whole segment."""
        if x.device.type != "cpu":
            return 2**62
        return 0 if self.config.group_norm else -(-NUMBERS_AT_ONCE // (len(x) * self.config.width))

    def _pad(self, samples: Tensor) -> Tensor:
        """As it is: each convolution pads by itself."""
        return samples

    # Segments

    @property
    def _segment_steps(self) -> int:
        return -(-self.config.segment // self.factor)

    def _whole_segments(self, samples: int) -> int:
        """How many segments of so many samples have as many steps as a segment can have."""
        beyond = samples - (self._segment_steps - 1) * self.factor
        return max(0, -(-beyond // self.config.segment_stride))

    def _steps_of_segment(self, i: int, samples: int) -> int:
        return super().steps_of(min(self.config.segment, samples - i * self.config.segment_stride))

    @property
    def _at_once(self) -> int:
        """Segments that pass the network at a time."""
        return max(1, round(CHUNK * self.sample_rate / self.config.segment_stride))

    @torch.no_grad()
    def encode_scaled(
        self, chunks: Iterable[Tensor], n_codebooks: int | None = None, scale: Tensor | None = None
    ) -> Iterator[tuple[Tensor, Tensor | None]]:
        """As `WaveTokenizer.encode_scaled`; with segments, whole ones at a time."""
        if not self.config.segment:
            yield from super().encode_scaled(chunks, n_codebooks, scale)
            return
        self._check_codebooks(n_codebooks)
        for segments in self._segments(chunks):
            count, levels = len(segments), scale
            with torch.autocast(self.device.type, enabled=False):
                samples = segments.to(self.device, torch.float32)
                if scale is not None:
                    samples = samples / scale.to(samples)[:, None, None]
                if self.config.normalize:
                    level = samples.mean(2).square().mean(-1).sqrt() + 1e-8
                    samples = samples / level[:, :, None, None]
                    levels = level.T if scale is None else level.T * scale.to(level)[:, None]
                codes = self._encode_chunk(samples.flatten(0, 1), whole(), n_codebooks)
            yield rearrange(codes, "(s b) q t -> b q (s t)", s=count), levels

    def _segments(self, chunks: Iterable[Tensor]) -> Iterator[Tensor]:
        """Sound in chunks → segments ``[s, B, C, n]`` of equal length, several at a time."""
        length, hop = self.config.segment, self.config.segment_stride
        held: Tensor | None = None
        for chunk in self._regrouped(chunks):
            held = chunk if held is None else torch.cat([held, chunk], -1)
            if count := max(0, (held.shape[-1] - length) // hop + 1):
                yield from held.unfold(-1, length, hop).permute(2, 0, 1, 3).split(self._at_once)
                held = held[..., count * hop :].clone()
        while held is not None and held.shape[-1]:
            yield held[None, ..., :length]
            held = held[..., hop:]

    def _decoded(self, chunks: Iterable[Tensor], size: int | None, scale: Tensor | None) -> Iterator[Tensor]:
        """As `WaveTokenizer._decoded`; segments are faded into each other."""
        if not self.config.segment:
            yield from super()._decoded(chunks, size, scale)
            return
        fade = total = faded = None
        hop, done = self.config.segment_stride, 0
        for codes in self._code_segments(chunks, size):
            with torch.autocast(self.device.type, enabled=False):
                decoded = self._decode_chunk(codes.flatten(0, 1).to(self.device, torch.int64), whole())
                segments = self._scaled(decoded.unflatten(0, codes.shape[:2]), scale, done)
            done += len(codes)
            length = segments.shape[-1]
            if fade is None or faded is None or total is None:
                # A triangle; the sum of what covers a sample is divided by the sum of its weights.
                places = torch.linspace(0, 1, length + 2, device=segments.device)[1:-1]
                fade = 0.5 - (places - 0.5).abs()
                faded, total = segments[0, ..., :0], fade[:0]
            for segment in segments:
                missing = max(0, length - len(total))
                faded, total = F.pad(faded, (0, missing)), F.pad(total, (0, missing))
                faded[..., :length] += fade[:length] * segment
                total[:length] += fade[:length]
                yield faded[..., :hop] / total[:hop]
                faded, total = faded[..., hop:], total[hop:]
        if scale is not None and scale.ndim == 2 and scale.shape[1] != done:
            raise PlaitError(f"scale: is of {scale.shape[1]} segments, the codes are of {done}")
        if faded is not None and total is not None and len(total):
            yield faded / total

    def _scaled(self, segments: Tensor, scale: Tensor | None, first: int) -> Tensor:
        """Segments ``[s, B, C, n]`` from number ``first`` on, at their loudness."""
        if scale is None:
            return segments
        if scale.ndim == 1:
            return segments * scale.to(segments)[:, None, None]
        there = scale[:, first : first + len(segments)].to(segments)
        if there.shape != segments.shape[1::-1]:
            raise PlaitError(
                f"scale: shape is {tuple(scale.shape)}, expected one for each of the {segments.shape[1]} items and for "
                f"each segment, of which there are {first + len(segments)} or more"
            )
        return segments * there.T[:, :, None, None]

    def _code_segments(self, chunks: Iterable[Tensor], size: int | None) -> Iterator[Tensor]:
        """Codes in chunks → those of segments ``[s, B, q, t]`` of equal length, several at a time."""
        steps, done = self._segment_steps, 0
        held: Tensor | None = None
        for chunk in chunks:
            held = chunk if held is None else torch.cat([held, chunk], -1)
            count = held.shape[-1] // steps
            count = count if size is None else min(count, self._whole_segments(size) - done)
            if count > 0:
                segments = held[..., : count * steps].unflatten(-1, (count, steps))
                yield from segments.movedim(-2, 0).split(self._at_once)
                held = held[..., count * steps :].clone()
                done += count
        while held is not None and held.shape[-1]:
            if size is not None and done * self.config.segment_stride >= size:
                return  # more codes than the size has, which `decode_stream` says
            last = held.shape[-1] if size is None else self._steps_of_segment(done, size)
            yield held[None, ..., :last]
            held = held[..., last:]
            done += 1


# Released weights

_RELEASES = {
    False: EnCodecConfig(),
    True: EnCodecConfig(
        sample_rate=48000,
        channels=2,
        codebooks=16,
        causal=False,
        group_norm=True,
        normalize=True,
        segment=48000,
        segment_stride=47520,
    ),
}

# Our fields and those of transformers' config.json.
_FIELDS = {
    "sample_rate": "sampling_rate",
    "channels": "audio_channels",
    "dim": "hidden_size",
    "codebook_size": "codebook_size",
    "width": "num_filters",
    "blocks": "num_residual_layers",
    "kernel": "kernel_size",
    "last_kernel": "last_kernel_size",
    "unit_kernel": "residual_kernel_size",
    "dilation_growth": "dilation_growth_rate",
    "compress": "compress",
    "shortcut": "use_conv_shortcut",
    "lstm_layers": "num_lstm_layers",
    "causal": "use_causal_conv",
    "trim_right": "trim_right_ratio",
    "normalize": "normalize",
}


def _config_of(config: dict[str, Any]) -> EnCodecConfig:
    """The configuration that a config.json of transformers' gives; what it leaves out is as in the 24 kHz release.

    Raises:
        PlaitError: a value that cannot be, or that no part of this network has.
    """
    fields = {ours: config[theirs] for ours, theirs in _FIELDS.items() if theirs in config}
    ratios = config.get("upsampling_ratios", [8, 5, 4, 2])
    fields["strides"] = tuple(reversed(ratios)) if isinstance(ratios, list) else ratios
    for ours, theirs, values in (
        ("reflect", "pad_mode", {"reflect": True, "constant": False}),
        ("group_norm", "norm_type", {"weight_norm": False, "time_group_norm": True}),
    ):
        if (value := config.get(theirs, next(iter(values)))) not in values:
            raise PlaitError(f"config.json: {theirs} is {value!r}, must be {' or '.join(values)}")
        fields[ours] = values[value]
    dim = config.get("hidden_size", 128)
    if config.get("codebook_dim") not in (None, dim):
        raise PlaitError(f"config.json: codebook_dim is {config['codebook_dim']!r}, must be the hidden_size, {dim!r}")
    if (seconds := config.get("chunk_length_s")) is not None:
        overlap = config.get("overlap")
        if isinstance(seconds, bool) or not isinstance(seconds, int | float) or not 0 < seconds <= 3600:
            raise PlaitError(f"config.json: chunk_length_s is {seconds!r}, must be seconds, above 0 and at most 3600")
        if isinstance(overlap, bool) or not isinstance(overlap, int | float) or not 0 <= overlap < 1:
            raise PlaitError(f"config.json: overlap is {overlap!r}, must be at least 0 and below 1")
        # A rate that is none is refused below.
        rate = rate if type(rate := config.get("sampling_rate", 24000)) is int else 0
        length = int(seconds * rate)
        fields |= {"segment": length, "segment_stride": max(1, int((1.0 - overlap) * length))}
    # The network's sizes are checked before they tell how many codebooks the largest bandwidth pays for.
    found = EnCodecConfig(**fields)
    bandwidths = config.get("target_bandwidths", [24.0])
    if not isinstance(bandwidths, list) or not bandwidths or type(bandwidths[-1]) not in (int, float):
        raise PlaitError(f"config.json: target_bandwidths is {bandwidths!r}, must list kilobits per second")
    bits = math.ceil(found.sample_rate / math.prod(found.strides)) * math.ceil(math.log2(found.codebook_size))
    if not 2 * bits <= 1000 * bandwidths[-1] <= 256 * bits:
        raise PlaitError(
            f"config.json: target_bandwidths ends with {bandwidths[-1]}, which is not of 2 to 256 codebooks"
        )
    return EnCodecConfig(**fields, codebooks=int(1000 * bandwidths[-1] // bits))


def _layout(name: str, codebook: str) -> Layout:
    """A layout whose files keep codebook i under ``codebook``."""
    anchor = codebook.format(0) + "embed"

    def prefix(tensors: Mapping[str, Tensor]) -> str | None:
        found = (name.removesuffix(anchor) for name in tensors if name.endswith(anchor))
        # MusicGen's is one of several networks in its file.
        return next((start for start in found if not start or start.endswith(".")), None)

    def configure(tensors: Mapping[str, Tensor], config: dict[str, Any]) -> EnCodecConfig:
        config = inner if isinstance(inner := config.get("audio_encoder"), dict) else config
        if config.get("model_type") == "encodec":
            return _config_of(config)
        start = prefix(tensors) or ""
        return _RELEASES[any(re.match(r"encoder\.\w+\.0\..*norm\.", name.removeprefix(start)) for name in tensors)]

    def rename(tensors: Tensors, config: EnCodecConfig) -> Tensors:
        start = prefix(tensors) or ""
        theirs = {name.removeprefix(start): tensor for name, tensor in tensors.items() if name.startswith(start)}
        renamed: Tensors = {}
        for old, tensor in fold_weight_norm(theirs).items():
            # What the averages need that the codebooks were trained by.
            if re.search(r"codebook\.(inited|cluster_size|embed_avg)$", old):
                continue
            new = re.sub(r"^(encoder|decoder)\.(?:layers|model)\.", r"\1.", old)
            new = re.sub(r"(?:\.(?:conv|convtr)){1,2}(?=\.(?:weight|bias|norm\.))", "", new)
            new = new.replace(".block.1.", ".dilated.").replace(".block.3.", ".pointwise.").replace(".lstm.", ".")
            renamed[new] = tensor
        transposed = {f"decoder.{3 + i * (2 + config.blocks)}.weight" for i in range(len(config.strides))}
        for name, tensor in renamed.items():
            if name in transposed:
                # Taps of the own stride of outputs, and of the next one.
                taps = tensor.permute(2, 0, 1).unflatten(0, (2, -1))
                renamed[name] = taps.transpose(1, 2).flatten(2).contiguous()
            elif tensor.ndim == 3:
                renamed[name] = tensor.permute(2, 1, 0).contiguous()
        tables = [renamed.pop(codebook.format(i) + "embed") for i in range(config.codebooks)]
        return renamed | {"quantizer.codebooks": torch.stack(tables)}

    def recognise(tensors: Mapping[str, Tensor], config: dict[str, Any]) -> bool:
        return prefix(tensors) is not None

    return Layout(name, "plait.tokenizers.encodec:EnCodecTokenizer", recognise, configure, rename)


LAYOUTS: tuple[Layout, ...] = (
    _layout("EnCodec", "quantizer.vq.layers.{}._codebook."),
    _layout("EnCodec of transformers", "quantizer.layers.{}.codebook."),
)
