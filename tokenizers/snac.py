"""SNAC: residual codes at several rates, coarse ones seldom and fine ones often, its released weights included.

The network is DAC's with convolutions per channel, attention within windows where the configuration has it, and noise
in the decoder. A code of the first level stands for several steps of the encoder, one of the next for fewer; so the
levels differ in length, and the codes are one stream: each code is followed by those of its time, level by level (see
`plait.tokenizers.layouts`).

Paper: Siuzdak et al., "SNAC: Multi-Scale Neural Audio Codec", 2024 (arXiv 2410.14411).
"""

import math
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from plait.errors import PlaitError
from plait.tokenizers.base import Codes, check_codes
from plait.tokenizers.dac import check_sizes, decoder_level, encoder_level, is_original, renamed
from plait.tokenizers.foreign import Layout, Tensors
from plait.tokenizers.layouts import deinterleave, interleave
from plait.tokenizers.quantizer_base import Quantized, Quantizer, exact_float32
from plait.tokenizers.residual import FactorizedCodebook
from plait.tokenizers.streaming import Chain, Conv1d, ConvTranspose1d, Stream, Streamed, join
from plait.tokenizers.waveblocks import Snake
from plait.tokenizers.waves import WaveTokenizer

# Channels of an attention head.
HEAD = 64
# Noise is drawn for so many samples at once, wherever chunks begin.
NOISE_BLOCK = 4096


@dataclass(frozen=True)
class SNACConfig:
    """Architecture of a `SNACTokenizer`; the defaults are those of the 24 kHz release.

    Attributes:
        sample_rate: Hz.
        width: the encoder's channels at the sample rate; every stride doubles them.
        strides: of the encoder's levels, the finest first; the decoder's are the same in reverse.
        decoder_width: the decoder's channels at the encoder's rate; every stride halves them.
        code_strides: steps of the encoder per code of each level, each a multiple of the next.
        codebook_size: codes of each level.
        code_dim: channels of a codebook's vectors.
        window: steps that attend to each other; 0 is no attention.
        noise: whether the decoder has layers that add noise.
        depthwise: whether its wide convolutions are per channel.

    Raises:
        PlaitError: a value that cannot be.
    """

    sample_rate: int = 24000
    width: int = 48
    strides: tuple[int, ...] = (2, 4, 8, 8)
    decoder_width: int = 1024
    code_strides: tuple[int, ...] = (4, 2, 1)
    codebook_size: int = 4096
    code_dim: int = 8
    window: int = 0
    noise: bool = True
    depthwise: bool = True

    def __post_init__(self) -> None:
        check_sizes("snac", self)
        steps = self.code_strides
        whole = isinstance(steps, list | tuple) and all(type(n) is int and 1 <= n <= 1024 for n in steps)
        if not whole or not 1 <= len(steps) <= 16 or any(a % b for a, b in pairwise(steps)):
            raise PlaitError(
                f"snac: code_strides is {steps!r}, each must be a whole multiple of the next, as in 4, 2, 1"
            )
        object.__setattr__(self, "code_strides", tuple(steps))
        if type(self.window) is not int or not 0 <= self.window <= 2**16:
            raise PlaitError(f"snac: window is {self.window!r}, must be a whole number of 0 (no attention) to 65536")
        for name in ("noise", "depthwise"):
            if type(flag := getattr(self, name)) is not bool:
                raise PlaitError(f"snac: {name} is {flag!r}, must be true or false")
        if self.window and (self.latent_dim % HEAD or self.decoder_width % HEAD):
            raise PlaitError(
                f"snac: attention has heads of {HEAD} channels, but there are {self.latent_dim} in the encoder and "
                f"{self.decoder_width} in the decoder; both must be multiples"
            )

    @property
    def latent_dim(self) -> int:
        """Channels of the latents."""
        return self.width * int(2 ** len(self.strides))


class WindowAttention(nn.Module, Streamed):
    """Attention among the steps of a window, windows one after the other from the signal's beginning; with a shortcut.

    Positions within a window are told by rotation (Su et al., "RoFormer", 2021, arXiv 2104.09864). A window that the
    signal's end cuts off is a shorter one.

    Args:
        channels: a multiple of `HEAD`.
        window: steps.
    """

    def __init__(self, channels: int, window: int) -> None:
        super().__init__()
        self.window = window
        self.norm = nn.LayerNorm(channels)
        self.to_qkv = nn.Linear(channels, 3 * channels, bias=False)
        self.to_out = nn.Linear(channels, channels, bias=False)

    def forward(self, x: Tensor, stream: Stream) -> Tensor:
        """``[B, C, T]`` → ``[B, C, T']``, whole windows but at the end."""
        x = join(stream.take(self, None), x)
        whole = x.shape[-1] // self.window * self.window
        if not stream.last:
            stream.put(self, x[..., whole:].clone())
            return self._attend(x[..., :whole], self.window) if whole else x[..., :0]
        parts = [(x[..., :whole], self.window), (x[..., whole:], x.shape[-1] - whole)]
        return torch.cat([self._attend(part, size) for part, size in parts if part.shape[-1]], -1)

    def _attend(self, x: Tensor, size: int) -> Tensor:
        q, k, v = self.to_qkv(self.norm(x.transpose(1, 2))).chunk(3, -1)
        q, k, v = (rearrange(t, "b (w n) (h d) -> b w h n d", n=size, d=HEAD) for t in (q, k, v))
        out = F.scaled_dot_product_attention(_rotated(q), _rotated(k), v)
        return x + self.to_out(rearrange(out, "b w h n d -> b (w n) (h d)")).transpose(1, 2)


def _rotated(x: Tensor) -> Tensor:
    """``[..., n, d]``, the pairs (i, i + d/2) of step n turned by ``n / 10000^(2i / d)``."""
    n, d = x.shape[-2:]
    rates = 10000 ** (-torch.arange(0, d, 2, device=x.device) / d)
    angles = (torch.arange(n, device=x.device)[:, None] * rates).repeat(1, 2)
    first, second = x.chunk(2, -1)
    return x * angles.cos() + torch.cat([-second, first], -1) * angles.sin()


class Noise(nn.Module, Streamed):
    """Adds noise as loud as a learned map of the signal says.

    It passes the signal as it is unless ``seed`` is set. Every item of a batch gets the same noise, so that what it
    sounds like does not depend on the others.

    Args:
        channels: of the signal.
        place: its number among the network's, which all have noise of their own.
    """

    def __init__(self, channels: int, place: int) -> None:
        super().__init__()
        self.linear = Conv1d(channels, channels, 1, bias=False)
        self.place = place
        self.seed: int | None = None

    def forward(self, x: Tensor, stream: Stream) -> Tensor:
        """``[B, C, T]`` → the same shape."""
        if self.seed is None or not x.shape[-1]:
            return x
        start = stream.take(self, 0)
        stream.put(self, start + x.shape[-1])
        return x + self.drawn(start, start + x.shape[-1]).to(x) * self.linear(x, stream)

    def drawn(self, start: int, end: int) -> Tensor:
        """The noise of these samples, normally distributed, float32 ``[end − start]``."""
        assert self.seed is not None
        first = start // NOISE_BLOCK
        blocks = []
        for block in range(first, -(-end // NOISE_BLOCK)):
            generator = torch.Generator().manual_seed(zlib.crc32(f"{self.seed} {self.place} {block}".encode()))
            blocks.append(torch.randn(NOISE_BLOCK, generator=generator))
        return torch.cat(blocks)[start - first * NOISE_BLOCK : end - first * NOISE_BLOCK]


class LevelQuantizer(Quantizer):
    """Residual `FactorizedCodebook`s, each for the mean of some steps; the codes are one stream, depth-first.

    Args:
        config: of the tokenizer.
    """

    stages: Any  # a list of FactorizedCodebook

    def __init__(self, config: SNACConfig) -> None:
        super().__init__()
        self.dim = config.latent_dim
        self.strides = config.code_strides
        self.codebook_sizes = [config.codebook_size] * len(self.strides)
        self.stages = nn.ModuleList(
            FactorizedCodebook(config.codebook_size, self.dim, config.code_dim) for _ in self.strides
        )

    def forward(self, z: Tensor) -> Quantized:
        """Quantize; there are no losses, as it is not trained here."""
        codes = self.codes(z)
        return Quantized(self.latents(codes), codes, {})

    def _levels(self, z: Tensor) -> Iterator[tuple[FactorizedCodebook, Tensor, Tensor]]:
        """Each level's codebook, what it sees ``[B, t, code_dim]``, and its codes ``[B, t]``."""
        residual = z.float()
        for stage, stride in zip(self.stages, self.strides, strict=True):
            projected = stage.project(residual.unflatten(1, (-1, stride)).mean(2))
            codes = stage.nearest(projected)
            yield stage, projected, codes
            residual = residual - stage.latents(codes).repeat_interleave(stride, 1)

    @torch.no_grad()
    def codes(self, z: Tensor) -> Tensor:
        """Latents ``[B, T, dim]``, T a multiple of the first stride → codes int64 ``[B, n]``."""
        with exact_float32(z.device):
            return interleave([codes for *_, codes in self._levels(z)])

    def latents(self, codes: Tensor) -> Tensor:
        """Codes int ``[B, n]`` → latents float32 ``[B, T, dim]``."""
        with exact_float32(codes.device):
            levels = zip(self.stages, deinterleave(codes, self.strides), self.strides, strict=True)
            parts = [stage.latents(level).repeat_interleave(stride, 1) for stage, level, stride in levels]
            return torch.stack(parts).sum(0)

    @torch.no_grad()
    def margin(self, z: Tensor) -> Tensor:
        """The smallest margin of the levels at each step, on the unit sphere: ``[B, T, dim]`` → ``[B, T]``."""
        with exact_float32(z.device):
            margins = [stage.margin(x) for stage, x, _ in self._levels(z)]
        each = [m.repeat_interleave(stride, 1) for m, stride in zip(margins, self.strides, strict=True)]
        return torch.stack(each).amin(0)


class SNACTokenizer(WaveTokenizer):
    """SNAC. Codes are ``[B, n]``: one of the coarsest level with all that belong to it, then the next.

    `levels` and `interleaved` lead to a tensor per level and back. Chunks of a stream may end at any code; `factor` and
    `frame_rate` are those of the coarsest level. There are always all levels, so ``n_codebooks`` and ``bandwidth`` do
    not apply.
    """

    architecture: ClassVar[str] = "snac"
    config_class: ClassVar[type] = SNACConfig
    decoder_settings: ClassVar[tuple[str, ...]] = ("decoder_width", "noise")
    config: SNACConfig

    def __init__(self, config: SNACConfig | None = None) -> None:
        super().__init__()
        self.config = config = config or SNACConfig()
        self.encoder = _encoder(config)
        self.quantizer = LevelQuantizer(config)
        self.decoder = _decoder(config)

    @property
    def sample_rate(self) -> int:
        """Hz."""
        return self.config.sample_rate

    @property
    def channels(self) -> int:
        """One."""
        return 1

    @property
    def factor(self) -> int:
        """Samples per code of the coarsest level."""
        return math.prod(self.config.strides) * self.config.code_strides[0]

    @property
    def layout(self) -> str:
        """How the stream is ordered, for `plait.tokenizers.layouts`."""
        return "interleave:" + ",".join(map(str, self.config.code_strides))

    @property
    def codes_per_step(self) -> int:
        """Codes of all levels per code of the coarsest."""
        return sum(self.config.code_strides[0] // stride for stride in self.config.code_strides)

    @property
    def bitrate(self) -> float:
        """Bits per second of all levels."""
        return self.frame_rate * self.codes_per_step * math.log2(self.config.codebook_size)

    @property
    def noise_seed(self) -> int | None:
        """Of the noise in the decoder; None, as it is at first, leaves the noise out.

        The noise is part of how SNAC was trained to sound; without it, decoding the same codes always gives the same
        sound, and with a seed too.
        """
        return next((layer.seed for layer in self._noises()), None)

    @noise_seed.setter
    def noise_seed(self, seed: int | None) -> None:
        if seed is not None and (type(seed) is not int or seed < 0):
            raise PlaitError(f"noise_seed: is {seed!r}, must be a whole number of at least 0, or None for no noise")
        for layer in self._noises():
            layer.seed = seed

    def _noises(self) -> Iterator[Noise]:
        return (layer for layer in self.modules() if isinstance(layer, Noise))

    def levels(self, codes: Codes | Tensor) -> list[Tensor]:
        """Codes ``[B, n]`` → those of each level ``[B, n_l]``, coarsest first.

        Raises:
            PlaitError: they are no whole steps.
        """
        return deinterleave(codes.codes if isinstance(codes, Codes) else codes, self.config.code_strides)

    def interleaved(self, levels: Sequence[Tensor]) -> Tensor:
        """The codes of each level ``[B, n_l]``, coarsest first → codes ``[B, n]``.

        Raises:
            PlaitError: the levels' lengths are not those of this tokenizer.
        """
        stream = interleave(levels)
        strides, lengths = self.config.code_strides, [level.shape[-1] for level in levels]
        if [lengths[0] * (strides[0] // stride) for stride in strides] != lengths:
            raise PlaitError(f"levels: have {lengths} codes, a code stands for {list(strides)} steps here")
        return stream

    def to_latents(self, samples: Tensor, stream: Stream) -> Tensor:
        """Samples ``[B, 1, n]``, whole windows over the whole signal → latents ``[B, d, t]``, whole coarsest steps."""
        z = join(stream.take("latents", None), self.encoder(samples, stream))
        whole = z.shape[-1] // self.config.code_strides[0] * self.config.code_strides[0]
        stream.put("latents", z[..., whole:].clone())
        return z[..., :whole]

    def from_latents(self, z: Tensor, stream: Stream) -> Tensor:
        """Quantized latents ``[B, d, t]`` → samples ``[B, 1, n]`` in ``[-1, 1]``."""
        samples: Tensor = self.decoder(z, stream)
        return samples

    def steps_of(self, samples: int) -> int:
        """How many codes so many samples become; they are filled up to whole windows."""
        return -(-samples // self._window) * self._window // self.factor * self.codes_per_step

    def samples_of(self, steps: int) -> int:
        """How many samples at most became so many codes."""
        return steps // self.codes_per_step * self.factor

    def codebooks_of(self, bandwidth: float) -> int:
        """There is no choice.

        Raises:
            PlaitError: always.
        """
        raise PlaitError("bandwidth: SNAC decodes all of its levels or none; leave it out")

    def _check_codebooks(self, n_codebooks: int | None) -> None:
        if n_codebooks not in (None, there := len(self.codebook_sizes)):
            raise PlaitError(f"n_codebooks: is {n_codebooks!r}, SNAC decodes all of its {there} levels or none")

    def _encode_chunk(self, samples: Tensor, stream: Stream, n_codebooks: int | None) -> Tensor:
        z = rearrange(self.to_latents(samples, stream), "b d t -> b t d")
        return self.quantizer.codes(z) if z.shape[1] else z.new_zeros(len(z), 0, dtype=torch.int64)

    def _decode_chunk(self, codes: Tensor, stream: Stream) -> Tensor:
        codes = join(stream.take("codes", None), codes)
        left = codes.shape[-1] % self.codes_per_step
        if stream.last and left:
            raise PlaitError(
                f"codes: {left} are left over at the end, {self.codes_per_step} make a step; they are cut off or not "
                "SNAC's stream, see `interleaved`"
            )
        whole = codes.shape[-1] - left
        stream.put("codes", codes[:, whole:].clone())
        if not whole:
            return codes.new_zeros(len(codes), 1, 0, dtype=torch.float32)
        z = self.quantizer.latents(codes[:, :whole])
        return self.from_latents(rearrange(z, "b t d -> b d t"), stream)

    # Filling up and checks

    @property
    def _window(self) -> int:
        """Samples that are filled up to: coarsest steps and windows of attention."""
        config = self.config
        return math.prod(config.strides) * math.lcm(config.code_strides[0], config.window or 1)

    def _regrouped(self, chunks: Iterable[Tensor]) -> Iterator[Tensor]:
        return super()._regrouped(self._filled(chunks))

    def _filled(self, chunks: Iterable[Tensor]) -> Iterator[Tensor]:
        """The chunks, and zeros after the last."""
        count, last = 0, None
        for last in chunks:
            yield last
            count += last.shape[-1]
        if last is not None and count % self._window:
            yield last.new_zeros(*last.shape[:2], -count % self._window)

    def _check_steps(self, codes: Tensor) -> None:
        if not isinstance(codes, Tensor):
            raise PlaitError(f"codes: is a {type(codes).__name__}, expected Codes or a tensor of integers")
        if codes.ndim != 2 or 0 in codes.shape:
            raise PlaitError(f"codes: shape is {tuple(codes.shape)}, expected [B, n], the levels in one stream")
        check_codes(codes, self.config.codebook_size)


def _encoder(config: SNACConfig) -> Chain:
    """Samples ``[B, 1, N]`` → latents ``[B, latent_dim, T]``."""
    width = config.width
    layers: list[nn.Module] = [Conv1d(1, width, 7, causal=False)]
    for stride in config.strides:
        layers.append(encoder_level(width, stride, width if config.depthwise else 1))
        width *= 2
    if config.window:
        layers.append(WindowAttention(width, config.window))
    return Chain(*layers, Conv1d(width, width, 7, groups=width if config.depthwise else 1, causal=False))


def _decoder(config: SNACConfig) -> Chain:
    """Latents ``[B, latent_dim, T]`` → samples ``[B, 1, T · hop]``."""
    width, latent = config.decoder_width, config.latent_dim
    layers: list[nn.Module] = [Conv1d(latent, width, 7, causal=False)]
    if config.depthwise:
        layers = [Conv1d(latent, latent, 7, groups=latent, causal=False), Conv1d(latent, width, 1)]
    if config.window:
        layers.append(WindowAttention(width, config.window))
    for place, stride in enumerate(reversed(config.strides)):
        half = math.ceil(stride / 2)
        up = ConvTranspose1d(width, width // 2, 2 * stride, stride, trim=(half, stride - half))
        width //= 2
        noise = [Noise(width, place)] if config.noise else []
        layers.append(decoder_level(up, *noise, groups=width if config.depthwise else 1))
    return Chain(*layers, Snake(width), Conv1d(width, 1, 7, causal=False), nn.Tanh())


# Released weights: DAC's names in a folder with a config.json, which tells what the tensors do not.

_FIELDS = {
    "sampling_rate": "sample_rate", "encoder_dim": "width", "encoder_rates": "strides", "decoder_dim": "decoder_width",
    "vq_strides": "code_strides", "codebook_size": "codebook_size", "codebook_dim": "code_dim",
    "attn_window_size": "window", "noise": "noise", "depthwise": "depthwise",
}  # fmt: skip


def _configure(tensors: Mapping[str, Tensor], config: dict[str, Any]) -> SNACConfig:
    """The configuration of a release's config.json.

    Raises:
        PlaitError: a field is missing, unknown, or of a network that SNAC is not.
    """
    given = {name: value for name, value in config.items() if not name.startswith("_")}
    latent_dim, decoder_rates = given.pop("latent_dim", None), given.pop("decoder_rates", None)
    for problem, names in (("has no", set(_FIELDS) - set(given)), ("has an unknown field", set(given) - set(_FIELDS))):
        if names:
            raise PlaitError(f"config.json {problem} {min(names)!r}; put SNAC's own beside the weights")
    given["attn_window_size"] = given["attn_window_size"] or 0  # null is none
    settings = SNACConfig(**{_FIELDS[name]: value for name, value in given.items()})
    if decoder_rates != list(settings.strides[::-1]):
        raise PlaitError(f"config.json: decoder_rates is {decoder_rates!r}, must be encoder_rates in reverse")
    if latent_dim not in (None, settings.latent_dim):
        raise PlaitError(f"config.json: latent_dim is {latent_dim!r}, the encoder makes it {settings.latent_dim}")
    return settings


def _rename(tensors: Tensors, settings: SNACConfig) -> Tensors:
    # The rates of rotation are the same in every network.
    return renamed({name: tensor for name, tensor in tensors.items() if not name.endswith(".rel_pos.inv_freq")})


LAYOUTS: tuple[Layout, ...] = (
    Layout(
        "SNAC",
        "plait.tokenizers.snac:SNACTokenizer",
        recognise=lambda tensors, config: is_original(tensors, 7),
        configure=_configure,
        rename=_rename,
    ),
)
