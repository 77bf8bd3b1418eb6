"""DAC, the Descript Audio Codec: speech, sounds and music at 16, 24 or 44.1 kHz, its released weights included.

Convolutions with snake activations go down to 50 to 86 steps a second and up again; between them are residual codebooks
of few channels. Nothing is causal: a code depends on the sound around it, so streams run behind by a fraction of a
second.

Paper: Kumar et al., "High-Fidelity Audio Compression with Improved RVQGAN", 2023 (arXiv 2306.06546).
"""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch.nn.functional as F
from torch import Tensor, nn

from plait.errors import PlaitError
from plait.tokenizers.foreign import Layout, Tensors, fold_weight_norm
from plait.tokenizers.quantizer import QuantizerConfig, build_quantizer
from plait.tokenizers.streaming import Chain, Conv1d, ConvTranspose1d, Stream
from plait.tokenizers.waveblocks import Snake, dilated_unit
from plait.tokenizers.waves import WaveTokenizer

# Beyond any network there is; so that a damaged file asks for no terabytes.
MOST_CHANNELS = 2**14
_DILATIONS = (1, 3, 9)


@dataclass(frozen=True)
class DACConfig:
    """Architecture of a `DACTokenizer`; the defaults are those of the 44.1 kHz release.

    Attributes:
        sample_rate: Hz.
        width: the encoder's channels at the sample rate; every stride doubles them.
        strides: of the encoder's levels, the finest first; the decoder's are the same in reverse.
        latent_dim: channels of the latents.
        decoder_width: the decoder's channels at the codes' rate; every stride halves them.
        codebooks: how many.
        codebook_size: codes of each.
        code_dim: channels of a codebook's vectors.

    Raises:
        PlaitError: a value that cannot be.
    """

    sample_rate: int = 44100
    width: int = 64
    strides: tuple[int, ...] = (2, 4, 8, 8)
    latent_dim: int = 1024
    decoder_width: int = 1536
    codebooks: int = 9
    codebook_size: int = 1024
    code_dim: int = 8

    def __post_init__(self) -> None:
        check_sizes("dac", self)

    @property
    def quantizer(self) -> QuantizerConfig:
        """How latents become codes; the dropout is that of the paper."""
        return QuantizerConfig(
            "rvq_l2",
            codebook_size=self.codebook_size,
            dim=self.latent_dim,
            code_dim=self.code_dim,
            codebooks=self.codebooks,
            dropout=0.5,
        )


def check_sizes(name: str, config: Any) -> None:
    """Refuse what can be no network of this family.

    Args:
        name: of the family, for errors.
        config: with ``sample_rate``, ``width``, ``strides``, ``decoder_width`` and other whole numbers.

    Raises:
        PlaitError: a number that is none or out of its range.
    """
    strides = config.strides
    if not isinstance(strides, list | tuple) or not 1 <= len(strides) <= 8:
        raise PlaitError(f"{name}: strides is {strides!r}, must list 1 to 8 whole numbers")
    object.__setattr__(config, "strides", tuple(strides))
    if any(type(stride) is not int or not 2 <= stride <= 64 for stride in strides):
        raise PlaitError(f"{name}: strides is {strides!r}, must list whole numbers of 2 to 64")
    halvings = 2 ** len(strides)
    for field, least, most in (
        ("sample_rate", 1000, 384_000), ("width", 1, MOST_CHANNELS // halvings), ("decoder_width", 1, MOST_CHANNELS),
        ("latent_dim", 1, MOST_CHANNELS), ("codebook_size", 2, 2**20), ("code_dim", 1, MOST_CHANNELS),
        ("codebooks", 1, 256),
    ):  # fmt: skip
        number = getattr(config, field, least)
        if type(number) is not int or not least <= number <= most:
            raise PlaitError(f"{name}: {field} is {number!r}, must be a whole number of {least} to {most}")
    if config.decoder_width % halvings:
        raise PlaitError(f"{name}: decoder_width is {config.decoder_width}, must be a multiple of {halvings}")


def encoder_level(channels: int, stride: int, groups: int = 1) -> Chain:
    """``[B, C, T · stride]`` → ``[B, 2C, T]``."""
    half = math.ceil(stride / 2)
    units = (dilated_unit(channels, dilation, causal=False, groups=groups) for dilation in _DILATIONS)
    down = Conv1d(channels, 2 * channels, 2 * stride, stride, padding=(half, half))
    return Chain(*units, Snake(channels), down)


def decoder_level(up: ConvTranspose1d, *after: nn.Module, groups: int = 1) -> Chain:
    """``[B, 2C, T]`` → ``[B, C, T']``, T' being what ``up`` makes of T."""
    units = (dilated_unit(up.out_channels, dilation, causal=False, groups=groups) for dilation in _DILATIONS)
    return Chain(Snake(up.in_channels), up, *after, *units)


class DACTokenizer(WaveTokenizer):
    """DAC. With an odd stride, as at 16 and 24 kHz, its decoder gives some samples less than went in: there the last
    sample is held.
    """

    architecture: ClassVar[str] = "dac"
    config_class: ClassVar[type] = DACConfig
    decoder_settings: ClassVar[tuple[str, ...]] = ("decoder_width",)
    config: DACConfig

    def __init__(self, config: DACConfig | None = None) -> None:
        super().__init__()
        self.config = config = config or DACConfig()
        width, strides = config.width, config.strides
        levels = [encoder_level(width * 2**i, stride) for i, stride in enumerate(strides)]
        widest = width * 2 ** len(strides)
        self.encoder = Chain(
            Conv1d(1, width, 7, causal=False),
            *levels,
            Snake(widest),
            Conv1d(widest, config.latent_dim, 3, causal=False),
        )
        self.quantizer = build_quantizer(config.quantizer)
        width = config.decoder_width
        layers: list[nn.Module] = [Conv1d(config.latent_dim, width, 7, causal=False)]
        self.missing = 0
        for stride in reversed(strides):
            half = math.ceil(stride / 2)
            layers.append(decoder_level(ConvTranspose1d(width, width // 2, 2 * stride, stride, trim=(half, half))))
            width //= 2
            self.missing = self.missing * stride + stride % 2
        self.decoder = Chain(*layers, Snake(width), Conv1d(width, 1, 7, causal=False), nn.Tanh())

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
        """Samples per step of the codes."""
        return math.prod(self.config.strides)

    def to_latents(self, samples: Tensor, stream: Stream) -> Tensor:
        """Samples ``[B, 1, n]``, whole multiples of `factor` over the whole signal → latents ``[B, d, t]``."""
        latents: Tensor = self.encoder(samples, stream)
        return latents

    def from_latents(self, z: Tensor, stream: Stream) -> Tensor:
        """Quantized latents ``[B, d, t]`` → samples ``[B, 1, n]`` in ``[-1, 1]``."""
        samples: Tensor = self.decoder(z, stream)
        return F.pad(samples, (0, self.missing), mode="replicate") if stream.last and self.missing else samples


# Released weights. The names within the encoder and the decoder are paths of numbers, once "block", "model" and what
# takes their place in transformers is taken out.

_QUANTIZER = (
    (r"^quantizer\.quantizers\.", "quantizer.stages."),
    (r"\.codebook\.weight$", ".codebook"),
)
_ORIGINAL = (
    *_QUANTIZER,
    (r"^decoder\.model\.", "decoder."),
    (r"^encoder\.block\.", "encoder."),
    (r"\.block\.(\d+)\.block\.", r".\1.branch."),
    (r"\.block\.", "."),
)
# What a level's parts are called in transformers, and their numbers here.
_UNIT = {"snake1": 0, "conv1": 1, "snake2": 2, "conv2": 3}
_LEVEL = {
    "encoder": {"snake1": 3, "conv1": 4, "res_unit1": 0, "res_unit2": 1, "res_unit3": 2},
    "decoder": {"snake1": 0, "conv_t1": 1, "res_unit1": 2, "res_unit2": 3, "res_unit3": 4},
}


def renamed(tensors: Mapping[str, Tensor]) -> Tensors:
    """Our names and shapes for the tensors of an original release, weight norm taken in."""
    return {_by_rules(name, _ORIGINAL): _as_matrix(name, tensor) for name, tensor in fold_weight_norm(tensors).items()}


def _renamed_transformers(tensors: Mapping[str, Tensor]) -> Tensors:
    levels = len({found[0] for name in tensors if (found := re.match(r"encoder\.block\.\d+\.", name))})

    def new_name(name: str) -> str:
        if found := re.fullmatch(r"(encoder|decoder)\.block\.(\d+)\.(\w+)\.(?:(\w+)\.)?(\w+)", name):
            half, level, part, inner, tensor = found.groups()
            unit = f".branch.{_UNIT.get(inner, inner)}" if inner else ""
            return f"{half}.{int(level) + 1}.{_LEVEL[half].get(part, part)}{unit}.{tensor}"
        if found := re.fullmatch(r"(encoder|decoder)\.(conv1|snake1|conv2)\.(\w+)", name):
            place = {"conv1": 0, "snake1": levels + 1, "conv2": levels + 2}[found[2]]
            return f"{found[1]}.{place}.{found[3]}"
        return _by_rules(name, _QUANTIZER)

    return {new_name(name): _as_matrix(name, tensor) for name, tensor in fold_weight_norm(tensors).items()}


def _by_rules(name: str, rules: tuple[tuple[str, str], ...]) -> str:
    for pattern, replacement in rules:
        name = re.sub(pattern, replacement, name)
    return name


def _as_matrix(name: str, tensor: Tensor) -> Tensor:
    """The quantizer's projections are convolutions of one tap there."""
    return tensor[..., 0] if name.startswith("quantizer.") and tensor.ndim == 3 else tensor


def strides_of(tensors: Mapping[str, Tensor]) -> tuple[int, ...]:
    """The encoder's strides, from tensors under our names: a level ends with a convolution of two strides' taps."""
    widths = {
        int(found[1]): tensor.shape[-1]
        for name, tensor in tensors.items()
        if (found := re.fullmatch(r"encoder\.(\d+)\.4\.weight", name))
    }
    return tuple(widths[level] // 2 for level in sorted(widths))


def _config_of(tensors: Mapping[str, Tensor], config: Mapping[str, Any]) -> DACConfig:
    """The configuration of tensors under our names.

    Raises:
        KeyError: one that tells a size is missing.
        PlaitError: nothing tells the sample rate, or the decoder's strides are others than the encoder's.
    """
    sample_rate = config.get("sampling_rate", config.get("sample_rate"))
    if sample_rate is None:
        raise PlaitError('has no sample rate; put a config.json beside it, such as {"sample_rate": 44100}')
    strides = strides_of(tensors)
    decoder = tuple(tensors[f"decoder.{i + 1}.1.weight"].shape[-1] // 2 for i in range(len(strides)))
    if decoder != strides[::-1]:
        raise PlaitError(f"the encoder's strides are {strides}, the decoder's {decoder}, must be those in reverse")
    codebook_size, code_dim = tensors["quantizer.stages.0.codebook"].shape
    return DACConfig(
        sample_rate=sample_rate,
        width=tensors["encoder.0.weight"].shape[0],
        strides=strides,
        latent_dim=tensors["quantizer.stages.0.in_proj.weight"].shape[-1],
        decoder_width=tensors["decoder.0.weight"].shape[0],
        codebooks=sum(name.endswith(".codebook") for name in tensors),
        codebook_size=codebook_size,
        code_dim=code_dim,
    )


def is_original(tensors: Mapping[str, Tensor], last_taps: int) -> bool:
    """Whether these are an original release's names of DAC or SNAC, which differ in the encoder's last convolution."""
    found = [re.match(r"encoder\.block\.(\d+)\.(?:weight|parametrizations\.weight)", name) for name in tensors]
    last = max((int(match[1]) for match in found if match), default=0)
    ends = ("weight", "weight_v", "parametrizations.weight.original1")
    taps = {tensors[name].shape[-1:] for end in ends if (name := f"encoder.block.{last}.{end}") in tensors}
    return last > 0 and taps == {(last_taps,)} and "quantizer.quantizers.0.codebook.weight" in tensors


LAYOUTS: tuple[Layout, ...] = (
    Layout(
        "DAC",
        "plait.tokenizers.dac:DACTokenizer",
        recognise=lambda tensors, config: is_original(tensors, 3),
        configure=lambda tensors, config: _config_of(renamed(tensors), config),
        rename=lambda tensors, settings: renamed(tensors),
    ),
    Layout(
        "DAC of transformers",
        "plait.tokenizers.dac:DACTokenizer",
        recognise=lambda tensors, config: "encoder.block.0.res_unit1.snake1.alpha" in tensors,
        configure=lambda tensors, config: _config_of(_renamed_transformers(tensors), config),
        rename=lambda tensors, settings: _renamed_transformers(tensors),
    ),
)
