"""Mimi, the codec of Moshi: causal, 24 kHz, 12.5 steps per second of up to 32 codebooks; its released weights included.

A SEANet encoder brings samples to 25 steps per second, a transformer that looks back ten seconds joins them, and one
more stride halves their rate. One codebook (distilled from a speech model, hence "semantic") and a chain of residual
ones ("acoustic") quantize two projections of the same latents. The decoder is the mirror image.

Inside, signals are ``[B, T, C]``: a convolution is then a sum of matrix products of the signal as it lies in memory, a
strided and a transposed one too, and the transformer needs no other order.

Paper: Défossez et al., "Moshi: a speech-text foundation model for real-time dialogue", 2024 (arXiv 2410.00037).
"""

import math
import re
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from plait.errors import PlaitError
from plait.tokenizers.averages import straight_through
from plait.tokenizers.foreign import Layout, Tensors
from plait.tokenizers.quantizer import Quantized, Quantizer, QuantizerConfig, build_quantizer
from plait.tokenizers.streaming import Chain, Stream, Streamed
from plait.tokenizers.waveblocks import ELU
from plait.tokenizers.waves import WaveTokenizer

# Taps of the first and last convolution of a half and of its residual units, which have half the channels inside.
KERNEL, LAST_KERNEL, UNIT_KERNEL, COMPRESS = 7, 3, 3, 2

# On a CPU a level of the network works on so many of its steps at a time: few enough to stay in the cache between
# layers, and enough that the weights need not be fetched too often.
AT_ONCE = 2048


@dataclass(frozen=True)
class MimiConfig:
    """Architecture of a `MimiTokenizer`; the defaults are those of the released weights.

    Attributes:
        sample_rate: Hz.
        channels: of the samples.
        width: channels at full rate; every level has twice those of the one before.
        strides: steps of a level per step of the next, the finest first.
        dim: channels of the transformers.
        layers: of each transformer.
        heads: of its attention; a head has an even number of channels.
        hidden: channels between the two maps of a layer's feed-forward part.
        window: steps that attention sees, its own included.
        rope_base: longest wavelength of the rotary positions, in steps over 2π.
        downsampling: steps of the transformers per step of the codes.
        codebooks: one semantic codebook and at least two acoustic ones.
        codebook_size: codes of each.
        codebook_dim: channels of their vectors.

    Raises:
        PlaitError: a value that cannot be.
    """

    sample_rate: int = 24000
    channels: int = 1
    width: int = 64
    strides: tuple[int, ...] = (4, 5, 6, 8)
    dim: int = 512
    layers: int = 8
    heads: int = 8
    hidden: int = 2048
    window: int = 250
    rope_base: float = 10000.0
    downsampling: int = 2
    codebooks: int = 32
    codebook_size: int = 2048
    codebook_dim: int = 256

    def __post_init__(self) -> None:
        # The upper limits are far above any release, and keep a broken file from asking for all memory.
        for name, least, most in (
            ("sample_rate", 1, 2**20), ("channels", 1, 64), ("width", 2, 512), ("dim", 2, 4096), ("layers", 1, 64),
            ("heads", 1, 128), ("hidden", 1, 2**14), ("window", 1, 2**16), ("downsampling", 1, 64),
            ("codebooks", 3, 128), ("codebook_size", 2, 2**17), ("codebook_dim", 1, 2048),
        ):  # fmt: skip
            if type(number := getattr(self, name)) is not int or not least <= number <= most:
                raise PlaitError(f"mimi: {name} is {number!r}, must be a whole number from {least} to {most}")
        strides = self.strides
        if not isinstance(strides, list | tuple) or not 1 <= len(strides) <= 6:
            raise PlaitError(f"mimi: strides is {strides!r}, must list one to six whole numbers")
        if any(type(stride) is not int or not 1 <= stride <= 32 for stride in strides):
            raise PlaitError(f"mimi: strides is {strides!r}, must list whole numbers from 1 to 32")
        object.__setattr__(self, "strides", tuple(strides))
        if self.width % COMPRESS or self.dim % (2 * self.heads):
            raise PlaitError(
                f"mimi: width is {self.width} and dim {self.dim}, must be multiples of {COMPRESS} and of twice the "
                f"{self.heads} heads"
            )
        if type(self.rope_base) not in (int, float) or not 0 < self.rope_base < math.inf:
            raise PlaitError(f"mimi: rope_base is {self.rope_base!r}, must be a number above 0")

    @property
    def widths(self) -> list[int]:
        """Channels of each level, and of what follows the last."""
        return [self.width * 2**i for i in range(len(self.strides) + 1)]


# Layers


def preceded(key: object, x: Tensor, before: int, stride: int, edge: str, stream: Stream) -> Tensor:
    """The next steps behind those that a causal layer still needs of the past.

    The signal begins with so many steps more, and ends with its last stride filled up.

    Args:
        key: of what is remembered, a layer mostly.
        x: ``[B, T, C]``.
        before: steps of the past.
        stride: steps that go together.
        edge: "zeros" beyond the signal's ends, or "repeat" its first and last step.
        stream: of the signal.

    Returns:
        ``[B, before + n · stride, C]``; over the whole signal n is ``ceil(T / stride)``.
    """
    if before == 0 and stride == 1:
        return x
    past = stream.take(key, None)
    if past is None:
        start = x.new_zeros(len(x), before, x.shape[2])
        if not x.shape[1]:
            return start
        past = x[:, :1].expand_as(start) if edge == "repeat" else start
    x = torch.cat([past, x], 1)
    if stream.last and (missing := -(x.shape[1] - before) % stride):
        x = torch.cat([x, x[:, -1:].expand(-1, missing, -1) * (edge == "repeat")], 1)
    end = (x.shape[1] - before) // stride * stride
    if not stream.last:
        stream.put(key, x[:, end:].clone())
    return x[:, : before + end]


class Conv(nn.Module, Streamed):
    """Causal convolution as matrix products, one for each stride of its kernel; the weight is ``[kernel, in, out]``.

    Args:
        in_channels: of the signal.
        out_channels: of the result.
        kernel: steps per step of the result, a multiple of the stride.
        stride: steps from one step of the result to the next.
        bias: whether there is one.
        edge: as in `preceded`.
    """

    def __init__(
        self, in_channels: int, out_channels: int, kernel: int, stride: int = 1, bias: bool = True, edge: str = "zeros"
    ) -> None:
        super().__init__()
        self.stride, self.edge = stride, edge
        bound = (kernel * in_channels) ** -0.5
        self.weight = nn.Parameter(torch.empty(kernel, in_channels, out_channels).uniform_(-bound, bound))
        self.bias = nn.Parameter(torch.zeros(out_channels)) if bias else None

    def forward(self, x: Tensor, stream: Stream, shortcut: Tensor | None = None) -> Tensor:
        """``[B, T, C]`` → ``[B, T', C']``, plus a shortcut of that shape."""
        kernel, inputs, outputs = self.weight.shape
        x = preceded(self, x, kernel - self.stride, self.stride, self.edge, stream)
        count = x.shape[1] // self.stride - kernel // self.stride + 1
        if not count:
            return x.new_zeros(len(x), 0, outputs)
        if kernel * inputs <= 64:  # products of so few channels take longer than to lay their inputs side by side
            parts = [x.unfold(1, kernel, self.stride).transpose(2, 3).flatten(2)]
        else:
            x = x.reshape(len(x), -1, self.stride * inputs)
            parts = [x[:, i : i + count] for i in range(kernel // self.stride)]
        weights = self.weight.view(len(parts), 1, -1, outputs).expand(-1, len(x), -1, -1)
        if self.bias is None:
            y = parts[0] @ weights[0]
        elif shortcut is None:
            y = torch.baddbmm(self.bias, parts[0], weights[0])
        else:
            y = (shortcut + self.bias).baddbmm_(parts[0], weights[0])
        for part, weight in zip(parts[1:], weights[1:], strict=True):
            y.baddbmm_(part, weight)
        return y


class ConvTranspose(Conv):
    """Causal transposed convolution: a step gives ``stride`` steps together with the one before.

    The weight is ``[2, in, stride · out]``, the earlier step's part first.

    Args:
        in_channels: of the signal.
        out_channels: of the result.
        stride: steps per step of the input.
    """

    def __init__(self, in_channels: int, out_channels: int, stride: int) -> None:
        super().__init__(in_channels, stride * out_channels, 2, bias=False)
        self.offset = nn.Parameter(torch.zeros(out_channels))

    def forward(self, x: Tensor, stream: Stream, shortcut: Tensor | None = None) -> Tensor:
        """``[B, T, C]`` → ``[B, T · stride, C']``."""
        return super().forward(x, stream).view(len(x), -1, len(self.offset)).add_(self.offset)


class Upsample(nn.Module, Streamed):
    """Causal transposed convolution within each channel by itself, without a bias; the weight is ``[stride, 2, C]``."""

    def __init__(self, channels: int, stride: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.full((stride, 2, channels), 0.5))

    def forward(self, x: Tensor, stream: Stream) -> Tensor:
        """``[B, T, C]`` → ``[B, T · stride, C]``."""
        x = preceded(self, x, 1, 1, "zeros", stream).unsqueeze(2)
        return (x[:, :-1] * self.weight[:, 0] + x[:, 1:] * self.weight[:, 1]).flatten(1, 2)


class Unit(nn.Module, Streamed):
    """SEANet's residual unit: a convolution to half the channels and a map back, each after an ELU."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.elu = ELU()
        self.conv1 = Conv(channels, channels // COMPRESS, UNIT_KERNEL)
        self.conv2 = Conv(channels // COMPRESS, channels, 1)

    def forward(self, x: Tensor, stream: Stream) -> Tensor:
        """``[B, T, C]`` → the same shape."""
        return self.conv2(self.elu(self.conv1(self.elu(x), stream)), stream, x)


class InPieces(Chain):
    """Layers that take a long signal piece by piece on a CPU, as their results would not fit into its cache.

    Args:
        layers: by name.
        stride: steps of the result per step of the signal.
    """

    def __init__(self, layers: dict[str, nn.Module], stride: int = 1) -> None:
        super().__init__(OrderedDict(layers))
        self.steps = max(1, AT_ONCE // stride)

    def forward(self, x: Tensor, stream: Stream) -> Tensor:  # type: ignore[override]
        """``[B, T, C]`` → ``[B, T', C']``."""
        if x.shape[1] <= self.steps or x.device.type != "cpu":
            return super().forward(x, stream)
        last, results, pieces = stream.last, [], x.split(self.steps, 1)
        for i, piece in enumerate(pieces, 1):
            stream.last = last and i == len(pieces)
            results.append(super().forward(piece, stream))
        return torch.cat(results, 1)


# Transformer


class TransformerLayer(nn.Module):
    """Attention and two maps, each after a norm, scaled per channel and added; no biases.

    Args:
        dim: channels.
        heads: of the attention.
        hidden: channels between the maps.
        window: steps that are seen.
    """

    def __init__(self, dim: int, heads: int, hidden: int, window: int) -> None:
        super().__init__()
        self.heads, self.window = heads, window
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.qkv, self.out = nn.Linear(dim, 3 * dim, bias=False), nn.Linear(dim, dim, bias=False)
        self.expand, self.contract = nn.Linear(dim, hidden, bias=False), nn.Linear(hidden, dim, bias=False)
        self.scale1, self.scale2 = (nn.Parameter(torch.full((dim,), 0.01)) for _ in range(2))

    def forward(self, x: Tensor, stream: Stream, rotation: tuple[Tensor, Tensor], bands: list["Band"]) -> Tensor:
        """``[B, T, C]`` → the same shape."""
        q, k, v = self.qkv(self.norm1(x)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        q, k = rotate(q, *rotation), rotate(k, *rotation)
        if (past := stream.take(self, None)) is not None:
            k, v = torch.cat([past[0], k], 2), torch.cat([past[1], v], 2)
        if not stream.last:
            start = max(0, k.shape[2] - (self.window - 1))
            stream.put(self, (k[:, :, start:].clone(), v[:, :, start:].clone()))
        y = [
            F.scaled_dot_product_attention(
                q[:, :, band.queries], k[:, :, band.keys], v[:, :, band.keys], band.mask, is_causal=band.mask is None
            )
            for band in bands
        ]
        attended = (y[0] if len(y) == 1 else torch.cat(y, 2)).transpose(1, 2).flatten(2)
        x = torch.addcmul(x, self.scale1, self.out(attended))
        return torch.addcmul(x, self.scale2, self.contract(F.gelu(self.expand(self.norm2(x)))))


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn the pairs (i, i + D/2) of ``[..., T, D]`` by angles whose cosines and sines are ``[T, D/2]``."""
    a, b = x.chunk(2, -1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], -1)


@dataclass
class Band:
    """Queries in a row, the keys that any of them sees, and which sees which; no mask is a triangle."""

    queries: slice
    keys: slice
    mask: Tensor | None


def banded(past: int, new: int, window: int, device: torch.device) -> Iterator[Band]:
    """Attention of new steps to themselves and to those before, in parts: memory is no square of their number."""
    for start in range(0, new, window):
        end = min(start + window, new)
        first = max(0, past + start - window + 1)
        mask = None
        if past + start:
            queries = torch.arange(past + start, past + end, device=device)[:, None]
            keys = torch.arange(first, past + end, device=device)
            mask = (keys <= queries) & (keys > queries - window)
        yield Band(slice(start, end), slice(first, past + end), mask)


class Transformer(nn.Module, Streamed):
    """Causal layers that see a window of steps, at rotary positions (Su et al., 2021, arXiv 2104.09864)."""

    def __init__(self, config: MimiConfig) -> None:
        super().__init__()
        self.window, self.base, self.pairs = config.window, config.rope_base, config.dim // config.heads // 2
        self.layers = nn.ModuleList(
            TransformerLayer(config.dim, config.heads, config.hidden, config.window) for _ in range(config.layers)
        )

    def forward(self, x: Tensor, stream: Stream) -> Tensor:
        """``[B, T, C]`` → the same shape."""
        start, new = stream.take(self, 0), x.shape[1]
        stream.put(self, start + new)
        if not new:
            return x
        # In float64, as a stream may be long.
        places = torch.arange(start, start + new, dtype=torch.float64, device=x.device)
        angles = places[:, None] * self.base ** (torch.arange(self.pairs).to(places) / -self.pairs)
        rotation = angles.cos().to(x.dtype), angles.sin().to(x.dtype)
        bands = list(banded(min(start, self.window - 1), new, self.window, x.device))
        for layer in self.layers:
            x = layer(x, stream, rotation, bands)
        return x


# Encoder, quantizer, decoder


class Encoder(Chain):
    """Samples ``[B, N, C]`` → what both quantizers see, ``[B, t, 2 · codebook_dim]``."""

    def __init__(self, config: MimiConfig) -> None:
        widths, levels = config.widths, []
        for i, stride in enumerate(config.strides):
            layers: dict[str, nn.Module] = {"conv_in": Conv(config.channels, config.width, KERNEL)} if i == 0 else {}
            layers |= {"unit": Unit(widths[i]), "elu": ELU()}
            layers |= {"down": Conv(widths[i], widths[i + 1], 2 * stride, stride)}
            levels.append(InPieces(layers))
        stride = config.downsampling
        parts = {
            "levels": Chain(*levels),
            "elu": ELU(),
            "conv_out": Conv(widths[-1], config.dim, LAST_KERNEL),
            "transformer": Transformer(config),
            "downsample": Conv(config.dim, config.dim, 2 * stride, stride, bias=False, edge="repeat"),
            "project": nn.Linear(config.dim, 2 * config.codebook_dim, bias=False),
        }
        super().__init__(OrderedDict(parts))


class Decoder(Chain):
    """The two quantizers' vectors ``[B, t, 2 · codebook_dim]`` → samples ``[B, N, C]``."""

    def __init__(self, config: MimiConfig) -> None:
        widths, levels = config.widths[::-1], []
        for i, stride in enumerate(reversed(config.strides)):
            layers: dict[str, nn.Module] = {"up": ConvTranspose(widths[i], widths[i + 1], stride)}
            layers |= {"unit": Unit(widths[i + 1]), "elu": ELU()}
            if i == len(config.strides) - 1:
                layers["conv_out"] = Conv(config.width, config.channels, LAST_KERNEL)
            levels.append(InPieces(layers, stride))
        parts = {
            "project": nn.Linear(2 * config.codebook_dim, config.dim, bias=False),
            "upsample": Upsample(config.dim, config.downsampling),
            "transformer": Transformer(config),
            "conv_in": Conv(config.dim, widths[0], KERNEL),
            "elu": ELU(),
            "levels": Chain(*levels),
        }
        super().__init__(OrderedDict(parts))


class SplitQuantizer(Quantizer):
    """One codebook for the first half of the channels, residual codebooks for the second; they stay as they are.

    Args:
        config: of the network.
    """

    def __init__(self, config: MimiConfig) -> None:
        super().__init__()
        size, dim = config.codebook_size, config.codebook_dim
        self.dim = 2 * dim
        self.codebook_sizes = [size] * config.codebooks
        self.semantic = build_quantizer(QuantizerConfig("vq_ema", codebook_size=size, dim=dim))
        acoustic = QuantizerConfig("rvq", codebook_size=size, dim=dim, codebooks=config.codebooks - 1)
        self.acoustic: Any = build_quantizer(acoustic)

    def forward(self, z: Tensor) -> Quantized:
        """Quantize with straight-through gradients and no losses."""
        codes = self.codes(z)
        return Quantized(straight_through(z.float(), self.latents(codes)), codes, {})

    def codes(self, z: Tensor, n_codebooks: int | None = None) -> Tensor:
        """Latents ``[..., dim]`` → codes int64 ``[..., q]`` of the first ``n_codebooks``, by default of all."""
        semantic, acoustic = z.chunk(2, -1)
        codes = self.semantic.codes(semantic).unsqueeze(-1)
        if n_codebooks == 1:
            return codes
        return torch.cat([codes, self.acoustic.codes(acoustic, n_codebooks and n_codebooks - 1)], -1)

    def latents(self, codes: Tensor) -> Tensor:
        """Codes int ``[..., q']`` of the first q' ≤ q codebooks → latents float32 ``[..., dim]``."""
        semantic = self.semantic.latents(codes[..., 0])
        acoustic = self.acoustic.latents(codes[..., 1:]) if codes.shape[-1] > 1 else torch.zeros_like(semantic)
        return torch.cat([semantic, acoustic], -1)

    def margin(self, z: Tensor) -> Tensor:
        """The smallest of the codebooks' margins."""
        semantic, acoustic = z.chunk(2, -1)
        return torch.minimum(self.semantic.margin(semantic), self.acoustic.margin(acoustic))


class MimiTokenizer(WaveTokenizer):
    """Moshi's codec. Any number of its codebooks may be used, the first being the semantic one; by default all."""

    architecture: ClassVar[str] = "mimi"
    config_class: ClassVar[type] = MimiConfig

    def __init__(self, config: MimiConfig | None = None) -> None:
        super().__init__()
        self.config = config = config or MimiConfig()
        self.encoder = Encoder(config)
        self.quantizer = SplitQuantizer(config)
        self.decoder = Decoder(config)

    @property
    def sample_rate(self) -> int:
        """Hz."""
        return int(self.config.sample_rate)

    @property
    def channels(self) -> int:
        """Channels of the samples, C."""
        return int(self.config.channels)

    @property
    def factor(self) -> int:
        """Samples per step of the codes."""
        return math.prod(self.config.strides) * int(self.config.downsampling)

    def to_latents(self, samples: Tensor, stream: Stream) -> Tensor:
        """``[B, C, n]`` → ``[B, d, t]``; the last chunk may have any length."""
        return self.encoder(samples.transpose(1, 2), stream).transpose(1, 2)

    def from_latents(self, z: Tensor, stream: Stream) -> Tensor:
        """``[B, d, t]`` → ``[B, C, t · factor]``."""
        return self.decoder(z.transpose(1, 2), stream).transpose(1, 2)

    def _pad(self, samples: Tensor) -> Tensor:
        """Every layer fills up its own end."""
        return samples


# Released weights

# Settings of transformers' that change what is computed, and the value that this network has.
_GIVEN = {
    "use_causal_conv": True, "pad_mode": "constant", "trim_right_ratio": 1.0, "use_conv_shortcut": False,
    "num_residual_layers": 1, "num_semantic_quantizers": 1, "hidden_act": "gelu", "norm_eps": 1e-5,
    "attention_bias": False,
}  # fmt: skip

# Names → those of transformers' files.
_NESTED = (
    (r"^(?:en|de)coder\.((?:en|de)coder_transformer|downsample|upsample)\.", r"\1."),
    (r"^(?:en|de)coder\.((?:en|de)coder)_seanet\.", r"\1."),
)
_ORIGINAL = (
    (r"(?:\.conv|\.convtr)+\.(weight|bias)$", r".conv.\1"),
    (r"^((?:en|de)coder)\.model\.", r"\1.layers."),
    (r"_transformer\.transformer\.", "_transformer."),
    (r"\.in_projs\.0\.weight$", ".in_proj_weight"),
    (r"\.out_proj(?:s\.0)?\.", ".o_proj."),
    (r"\.norm1\.", ".input_layernorm."),
    (r"\.norm2\.", ".post_attention_layernorm."),
    (r"\.linear([12])\.", r".mlp.fc\1."),
    (r"\.layer_scale_1\.", ".self_attn_layer_scale."),
    (r"\.layer_scale_2\.", ".mlp_layer_scale."),
    (r"^quantizer\.rvq_first\.(?:vq\.)?", "quantizer.semantic_residual_vector_quantizer."),
    (r"^quantizer\.rvq_rest\.(?:vq\.)?", "quantizer.acoustic_residual_vector_quantizer."),
    (r"\._codebook\._?", ".codebook."),
    (r"\.embedding_sum$", ".embed_sum"),
)
_SEMANTIC, _ACOUSTIC = (f"quantizer.{kind}_residual_vector_quantizer" for kind in ("semantic", "acoustic"))


def _layout(name: str, first: str, rules: tuple[tuple[str, str], ...]) -> Layout:
    """A layout whose files hold a tensor ``first``, alone or under a prefix in a whole model, renamed by ``rules``."""

    def recognise(tensors: Mapping[str, Tensor], _: dict[str, Any]) -> bool:
        return any(old.endswith(first) for old in tensors)

    def renamed(tensors: Mapping[str, Tensor]) -> Tensors:
        start = min((old for old in tensors if old.endswith(first)), key=len).removesuffix(first)
        result = {}
        for old, tensor in tensors.items():
            new = old.removeprefix(start)
            for pattern, replacement in rules:
                new = re.sub(pattern, replacement, new)
            # Whether a codebook's training has begun says nothing here.
            if old.startswith(start) and not new.endswith(".codebook.initialized"):
                result[new] = tensor
        return result

    def configure(tensors: Mapping[str, Tensor], config: dict[str, Any]) -> MimiConfig:
        return _config_of(renamed(tensors), config.get("codec_config", config))

    return Layout(
        name,
        "plait.tokenizers.mimi:MimiTokenizer",
        recognise,
        configure,
        lambda tensors, config: _weights_of(renamed(tensors), config),
    )


def _config_of(tensors: Tensors, config: dict[str, Any]) -> MimiConfig:
    """The configuration, from the shapes of a file's tensors and what they cannot tell.

    Raises:
        PlaitError: a setting that this network does not have.
        KeyError: a tensor that tells a size is missing.
    """
    for name, value in _GIVEN.items():
        if config.get(name, value) != value:
            raise PlaitError(f"config.json: {name} is {config[name]!r}, Mimi tokenizers have {value!r}")
    rope = config.get("rope_parameters") or {}
    if rope.get("rope_type", "default") != "default":
        raise PlaitError(f"config.json: rope_type is {rope['rope_type']!r}, Mimi tokenizers have 'default'")

    def number(pattern: str) -> int:
        return len({found[0] for name in tensors if (found := re.match(pattern, name))})

    levels = number(r"decoder\.layers\.\d+\.block\.1\.")
    width, channels, _ = tensors["encoder.layers.0.conv.weight"].shape
    codebook_size, codebook_dim = tensors[f"{_SEMANTIC}.layers.0.codebook.embed_sum"].shape
    hidden, dim = tensors["encoder_transformer.layers.0.mlp.fc1.weight"].shape
    return MimiConfig(
        sample_rate=config.get("sampling_rate", 24000),
        channels=channels,
        width=width,
        strides=tuple(tensors[f"encoder.layers.{3 * i + 3}.conv.weight"].shape[2] // 2 for i in range(levels)),
        dim=dim,
        layers=number(r"encoder_transformer\.layers\.\d+\."),
        heads=config.get("num_attention_heads", 8),
        hidden=hidden,
        window=config.get("sliding_window", 250),
        rope_base=rope.get("rope_theta", config.get("rope_theta", 10000.0)),
        downsampling=tensors["downsample.conv.weight"].shape[2] // 2,
        codebooks=1 + number(rf"{_ACOUSTIC}\.layers\.\d+\."),
        codebook_size=codebook_size,
        codebook_dim=codebook_dim,
    )


def _weights_of(theirs: Tensors, config: MimiConfig) -> Tensors:
    """Tensors that bear the names of transformers' files → the network's; what is left over keeps its name.

    Raises:
        KeyError: one is missing.
    """
    ours: Tensors = {}
    take = theirs.pop

    def conv(new: str, old: str) -> None:
        ours[f"{new}.weight"] = take(f"{old}.conv.weight").permute(2, 1, 0).contiguous()
        if f"{old}.conv.bias" in theirs:
            ours[f"{new}.bias"] = take(f"{old}.conv.bias")

    def transposed(old: str, stride: int) -> Tensor:
        """[in, out, 2 · stride], the later input's taps first → [2, in, stride, out], the earlier one's first."""
        return take(f"{old}.conv.weight").unflatten(2, (2, stride)).flip(2).permute(2, 0, 3, 1)

    def unit(new: str, old: str) -> None:
        conv(f"{new}.conv1", f"{old}.block.1")
        conv(f"{new}.conv2", f"{old}.block.3")

    levels = len(config.strides)
    conv("encoder.levels.0.conv_in", "encoder.layers.0")
    conv("decoder.conv_in", "decoder.layers.0")
    for i, stride in enumerate(reversed(config.strides)):
        unit(f"encoder.levels.{i}.unit", f"encoder.layers.{3 * i + 1}")
        conv(f"encoder.levels.{i}.down", f"encoder.layers.{3 * i + 3}")
        up = f"decoder.layers.{3 * i + 2}"
        ours[f"decoder.levels.{i}.up.weight"] = transposed(up, stride).flatten(2)
        ours[f"decoder.levels.{i}.up.offset"] = take(f"{up}.conv.bias")
        unit(f"decoder.levels.{i}.unit", f"decoder.layers.{3 * i + 3}")
    conv("encoder.conv_out", f"encoder.layers.{3 * levels + 2}")
    conv(f"decoder.levels.{levels - 1}.conv_out", f"decoder.layers.{3 * levels + 2}")
    conv("encoder.downsample", "downsample")
    ours["decoder.upsample.weight"] = transposed("upsample", config.downsampling).squeeze(3).permute(2, 0, 1)
    for half in ("encoder", "decoder"):
        for i in range(config.layers):
            _layer(ours, f"{half}.transformer.layers.{i}", theirs, f"{half}_transformer.layers.{i}", config.heads)
    for half, which, axis in (("encoder", "input", 0), ("decoder", "output", 1)):
        parts = [take(f"{chain}.{which}_proj.weight").squeeze(-1) for chain in (_SEMANTIC, _ACOUSTIC)]
        ours[f"{half}.project.weight"] = torch.cat(parts, axis)

    def codebook(old: str) -> Tensor:
        """The means of the vectors that training gave to each code."""
        usage = take(f"{old}.codebook.cluster_usage").clamp(min=1e-5)
        return take(f"{old}.codebook.embed_sum") / usage[:, None]

    ours["quantizer.semantic.codebook"] = codebook(f"{_SEMANTIC}.layers.0")
    acoustic = [codebook(f"{_ACOUSTIC}.layers.{i}") for i in range(config.codebooks - 1)]
    ours["quantizer.acoustic.codebooks"] = torch.stack(acoustic)
    return ours | theirs


def _layer(ours: Tensors, new: str, theirs: Tensors, old: str, heads: int) -> None:
    """A transformer's layer: transformers has three maps for queries, keys and values, the original release one."""
    fused = theirs.pop(f"{old}.self_attn.in_proj_weight", None)
    if fused is not None:
        # There neighbouring channels turn together; here the first half of a head's channels with the second.
        q, k, v = fused.chunk(3)
        q, k = (rows.unflatten(0, (heads, -1, 2)).transpose(1, 2).flatten(0, 2) for rows in (q, k))
    else:
        q, k, v = (theirs.pop(f"{old}.self_attn.{name}_proj.weight") for name in "qkv")
    ours[f"{new}.qkv.weight"] = torch.cat([q, k, v])
    for name, other in (
        ("norm1.weight", "input_layernorm.weight"), ("norm1.bias", "input_layernorm.bias"),
        ("norm2.weight", "post_attention_layernorm.weight"), ("norm2.bias", "post_attention_layernorm.bias"),
        ("out.weight", "self_attn.o_proj.weight"), ("scale1", "self_attn_layer_scale.scale"),
        ("expand.weight", "mlp.fc1.weight"), ("contract.weight", "mlp.fc2.weight"), ("scale2", "mlp_layer_scale.scale"),
    ):  # fmt: skip
        ours[f"{new}.{name}"] = theirs.pop(f"{old}.{other}")


LAYOUTS: tuple[Layout, ...] = (
    _layout("Mimi", "quantizer.rvq_first.input_proj.weight", _ORIGINAL),
    _layout("Mimi of transformers", f"{_SEMANTIC}.input_proj.weight", _NESTED),
)
