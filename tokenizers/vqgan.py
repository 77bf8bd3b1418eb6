"""The VQGAN family as one network: taming VQGAN, Chameleon's image tokenizer, LlamaGen's VQ-8 and VQ-16, SBER-MoVQGAN.

Convolutional encoder and decoder around one codebook; they differ in sizes, in where attention sits, in whether look-up
is by angle, and in whether the decoder's norms are conditioned on the codes. A video goes frame by frame.

Papers: Esser et al., 2021 (arXiv 2012.09841); Gafni et al., "Make-A-Scene", 2022 (arXiv 2203.13131), whose tokenizer
Chameleon took over; Sun et al., "LlamaGen", 2024 (arXiv 2406.06525); Zheng et al., "MoVQ", 2022 (arXiv 2209.09002).
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from plait.errors import PlaitError
from plait.tokenizers.blocks import GROUPS, Level, Middle, build_norm, by_frame, lay_channels_last, swish
from plait.tokenizers.foreign import Layout, Tensors
from plait.tokenizers.pixels import Cache, PixelTokenizer
from plait.tokenizers.quantizer import QuantizerConfig, build_quantizer

# Pictures are independent of each other and pass in groups of up to this many pixels, which bounds the memory.
PIXELS_AT_ONCE = 2**18


@dataclass(frozen=True)
class VQGANConfig:
    """Architecture of a `VQGANTokenizer`; the defaults are LlamaGen's VQ-16.

    Attributes:
        width: channels at full size.
        multipliers: channels of each level in widths; every level after the first halves the resolution.
        blocks: residual blocks per level of the encoder; the decoder has one more.
        attention_levels: the levels (0 is full size) with attention after every block. The middle always has it.
        z_channels: channels between encoder and the codebook's own projection.
        codebook_size: codes.
        codebook_dim: length of a code vector.
        normalized: look up by angle and decode from unit vectors.
        spatial_norm: condition the decoder's norms on the quantized latents.
        decoder: whether there is one; some releases hold only what is needed to encode.
        post_quant: whether an encoder alone comes with the convolution before the decoder, as transformers' Chameleon.

    Raises:
        PlaitError: a value that cannot be.
    """

    width: int = 128
    multipliers: tuple[int, ...] = (1, 1, 2, 2, 4)
    blocks: int = 2
    attention_levels: tuple[int, ...] = (4,)
    z_channels: int = 256
    codebook_size: int = 16384
    codebook_dim: int = 8
    normalized: bool = True
    spatial_norm: bool = False
    decoder: bool = True
    post_quant: bool = False

    def __post_init__(self) -> None:
        for name in ("width", "blocks", "z_channels"):
            if type(number := getattr(self, name)) is not int or number < 1:
                raise PlaitError(f"vqgan: {name} is {number!r}, must be a whole number of at least 1")
        if self.width % GROUPS:
            raise PlaitError(f"vqgan: width is {self.width}, must be a multiple of {GROUPS}, the groups of its norms")
        for name, least in (("multipliers", 1), ("attention_levels", 0)):
            numbers = getattr(self, name)
            if not isinstance(numbers, Sequence) or any(type(n) is not int or n < least for n in numbers):
                raise PlaitError(f"vqgan: {name} is {numbers!r}, must list whole numbers of at least {least}")
        if not self.multipliers:
            raise PlaitError("vqgan: multipliers is empty, must have one number per level")
        if any(level >= len(self.multipliers) for level in self.attention_levels):
            raise PlaitError(
                f"vqgan: attention_levels is {self.attention_levels!r}, the levels are 0..{len(self.multipliers) - 1}"
            )
        for name in ("normalized", "spatial_norm", "decoder", "post_quant"):
            if type(flag := getattr(self, name)) is not bool:
                raise PlaitError(f"vqgan: {name} is {flag!r}, must be true or false")
        _ = self.quantizer  # its own checks are of the codebook

    @property
    def quantizer(self) -> QuantizerConfig:
        """How latents become codes."""
        kind = "vq_grad" if self.normalized else "vq_ema"
        return QuantizerConfig(kind=kind, codebook_size=self.codebook_size, dim=self.codebook_dim)

    @property
    def widths(self) -> list[int]:
        """Channels of each level."""
        return [self.width * multiplier for multiplier in self.multipliers]

    @property
    def factor(self) -> int:
        """Pixels per code along each side."""
        return int(2 ** (len(self.multipliers) - 1))


class Encoder(nn.Module):
    """Pixels ``[N, 3, H, W]`` (multiples of the factor) → ``[N, z_channels, H/factor, W/factor]``."""

    def __init__(self, config: VQGANConfig) -> None:
        super().__init__()
        lowest = len(config.widths) - 1
        self.conv_in = nn.Conv2d(3, config.width, 3, padding=1)
        self.down = nn.ModuleList(
            Level(channels, out, config.blocks, i in config.attention_levels, downsample=i < lowest)
            for i, (channels, out) in enumerate(pairwise([config.width, *config.widths]))
        )
        self.mid = Middle(config.widths[-1])
        self.norm_out = build_norm(config.widths[-1], None)
        self.conv_out = nn.Conv2d(config.widths[-1], config.z_channels, 3, padding=1)
        lay_channels_last(self)
        self.register_load_state_dict_post_hook(lay_channels_last)

    def forward(self, x: Tensor) -> Tensor:
        """Pixels → features."""
        x = self.conv_in(x.contiguous(memory_format=torch.channels_last))
        for level in self.down:
            x = level(x)
        return self.conv_out(swish(self.norm_out(self.mid(x))))


class Decoder(nn.Module):
    """``[N, z_channels, h, w]`` → pixels ``[N, 3, h·factor, w·factor]``, not clamped."""

    def __init__(self, config: VQGANConfig) -> None:
        super().__init__()
        latent = config.codebook_dim if config.spatial_norm else None
        self.conv_in = nn.Conv2d(config.z_channels, config.widths[-1], 3, padding=1)
        self.mid = Middle(config.widths[-1], latent)
        # Numbered as in the encoder, from full size down, and run from the last to the first.
        self.up = nn.ModuleList(
            Level(channels, out, config.blocks + 1, i in config.attention_levels, latent, upsample=i > 0)
            for i, (out, channels) in enumerate(pairwise([*config.widths, config.widths[-1]]))
        )
        self.norm_out = build_norm(config.widths[0], latent)
        self.conv_out = nn.Conv2d(config.widths[0], 3, 3, padding=1)
        lay_channels_last(self)
        self.register_load_state_dict_post_hook(lay_channels_last)

    def forward(self, x: Tensor, z: Tensor) -> Tensor:
        """Features, and the quantized latents ``[N, codebook_dim, h, w]`` they came from → pixels."""
        x, z = (tensor.contiguous(memory_format=torch.channels_last) for tensor in (x, z))
        x = self.mid(self.conv_in(x), z)
        for level in reversed(self.up):
            x = level(x, z)
        return self.conv_out(swish(self.norm_out(x, z)))


class VQGANTokenizer(PixelTokenizer):
    """A VQGAN; see `PixelTokenizer` for what it does with images and videos."""

    architecture: ClassVar[str] = "vqgan"
    config_class: ClassVar[type] = VQGANConfig
    decoder_settings: ClassVar[tuple[str, ...]] = ("spatial_norm", "decoder", "post_quant")

    def __init__(self, config: VQGANConfig | None = None) -> None:
        super().__init__()
        self.config = config = config or VQGANConfig()
        self.encoder = Encoder(config)
        self.quant_conv = nn.Conv2d(config.z_channels, config.codebook_dim, 1)
        self.quantizer = build_quantizer(config.quantizer)
        if config.decoder or config.post_quant:
            self.post_quant_conv = nn.Conv2d(config.codebook_dim, config.z_channels, 1)
        if config.decoder:
            self.decoder = Decoder(config)

    @property
    def factor(self) -> int:
        """Pixels per code along each side."""
        return int(self.config.factor)

    def to_latents(self, pixels: Tensor, cache: Cache | None = None) -> Tensor:
        """Pixels ``[B, 3, T, H, W]`` → latents ``[B, d, T, h, w]`` before quantization, each frame by itself."""
        area = pixels.shape[-2] * pixels.shape[-1]
        return by_frame(lambda x: self.quant_conv(self.encoder(x)), pixels, at_once=PIXELS_AT_ONCE // area)

    def from_latents(self, z: Tensor, cache: Cache | None = None, frames: int | None = None) -> Tensor:
        """Quantized latents ``[B, d, T, h, w]`` → pixels ``[B, 3, T, H, W]``, not clamped; T at most ``frames``.

        Raises:
            PlaitError: this tokenizer has no decoder.
        """
        if not self.config.decoder:
            raise PlaitError(
                "decode: this checkpoint holds only an encoder (transformers' Chameleon leaves the decoder out); load "
                "the original release's vqgan.ckpt, which gives the same codes and decodes them"
            )
        area = z.shape[-2] * z.shape[-1] * self.factor**2
        z = z[:, :, :frames]
        return by_frame(lambda z: self.decoder(self.post_quant_conv(z), z), z, at_once=PIXELS_AT_ONCE // area)


# Released checkpoints

# What training leaves beside the weights: losses, averaged copies, counters.
_SURPLUS = re.compile(r"loss\.|model_ema\.|ema_\w+\.|quantize\.codebook_used$")

_Rules = tuple[tuple[str, str], ...]
_TAMING: _Rules = ((r"^quantize\.embedding\.weight", "quantizer.codebook"),)
_LLAMAGEN: _Rules = (
    *_TAMING,
    (r"^encoder\.conv_blocks", "encoder.down"),
    (r"^decoder\.conv_blocks", "decoder.up"),
    (r"\.(down|up)\.(\d+)\.res\.", r".\1.\2.block."),
    (r"\.mid\.0\.", ".mid.block_1."),
    (r"\.mid\.1\.", ".mid.attn_1."),
    (r"\.mid\.2\.", ".mid.block_2."),
)
_DIFFUSERS: _Rules = (
    *_TAMING,
    (r"\.mid_block\.resnets\.0", ".mid.block_1"),
    (r"\.mid_block\.resnets\.1", ".mid.block_2"),
    (r"\.mid_block\.attentions\.0", ".mid.attn_1"),
    (r"\.(down|up)_blocks\.", r".\1."),
    (r"\.(down|up)samplers\.0", r".\1sample"),
    (r"\.resnets\.", ".block."),
    (r"\.attentions\.", ".attn."),
    (r"\.(group|spatial)_norm\.", ".norm."),
    (r"\.to_(q|k|v)\.", r".\1."),
    (r"\.to_out\.0\.", ".proj_out."),
    (r"\.conv_norm_out\.", ".norm_out."),
    (r"\.conv_shortcut\.", ".nin_shortcut."),
)


def _prefix(tensors: Mapping[str, Tensor], anchor: str) -> str | None:
    """What comes before the names of the network's tensors, in a larger model's checkpoint for instance."""
    return min((name.removesuffix(anchor) for name in tensors if name.endswith(anchor)), key=len, default=None)


def _rename(tensors: Mapping[str, Tensor], anchor: str, rules: _Rules, lowest_first: bool) -> Tensors:
    """Our names and shapes for a file's tensors.

    Args:
        tensors: the file's.
        anchor: the name of a tensor that every file of this layout has.
        rules: pattern and replacement, in this order.
        lowest_first: whether the decoder's levels are numbered from the lowest resolution up.
    """
    prefix = _prefix(tensors, anchor) or ""
    renamed: Tensors = {}
    for full_name, tensor in tensors.items():
        name = full_name.removeprefix(prefix)
        if not full_name.startswith(prefix) or _SURPLUS.match(name):
            continue
        for pattern, replacement in rules:
            name = re.sub(pattern, replacement, name)
        is_linear = tensor.ndim == 2 and name.endswith((".q.weight", ".k.weight", ".v.weight", ".proj_out.weight"))
        renamed[name] = tensor[:, :, None, None] if is_linear else tensor
    if lowest_first:
        last = _count(renamed, r"decoder\.up\.(\d+)\.") - 1
        renamed = {
            re.sub(r"^decoder\.up\.(\d+)", lambda m: f"decoder.up.{last - int(m[1])}", name): tensor
            for name, tensor in renamed.items()
        }
    return renamed


def _numbers(tensors: Mapping[str, Tensor], pattern: str) -> set[int]:
    """What the group of a pattern finds at the beginning of names."""
    return {int(match[1]) for name in tensors if (match := re.match(pattern, name))}


def _count(tensors: Mapping[str, Tensor], pattern: str) -> int:
    return max(_numbers(tensors, pattern), default=-1) + 1


def _configure(tensors: Mapping[str, Tensor], normalized: bool) -> VQGANConfig:
    """The configuration, from tensors under our names.

    Raises:
        KeyError: a tensor is missing that tells a size.
        PlaitError: the sizes are of no such network, or its quantizer is another.
    """
    if "quantize.proj.weight" in tensors:
        raise PlaitError("a VQGAN with a Gumbel quantizer is not supported; load one with a vector quantizer")
    width = tensors["encoder.conv_in.weight"].shape[0]
    firsts = [f"encoder.down.{i}.block.0.conv1.weight" for i in range(_count(tensors, r"encoder\.down\.(\d+)\."))]
    codebook_size, codebook_dim = tensors["quantizer.codebook"].shape
    decoder = any(name.startswith("decoder.") for name in tensors)
    return VQGANConfig(
        width=width,
        multipliers=tuple(tensors[name].shape[0] // max(1, width) for name in firsts),
        blocks=_count(tensors, r"encoder\.down\.\d+\.block\.(\d+)\."),
        attention_levels=tuple(sorted(_numbers(tensors, r"encoder\.down\.(\d+)\.attn\."))),
        z_channels=tensors["encoder.conv_out.weight"].shape[0],
        codebook_size=codebook_size,
        codebook_dim=codebook_dim,
        normalized=normalized,
        spatial_norm=any(".norm_layer." in name for name in tensors),
        decoder=decoder,
        post_quant=not decoder and "post_quant_conv.weight" in tensors,
    )


def _layout(
    name: str, anchor: str, rules: _Rules, lowest_first: bool = False, normalized: bool = False, also: str = ""
) -> Layout:
    """A layout by its anchor (and another tensor that tells it from a similar one); see `_rename`."""

    def recognise(tensors: Mapping[str, Tensor], config: dict[str, Any]) -> bool:
        prefix = _prefix(tensors, anchor)
        return prefix is not None and prefix + "quant_conv.weight" in tensors and (not also or prefix + also in tensors)

    rename = partial(_rename, anchor=anchor, rules=rules, lowest_first=lowest_first)
    return Layout(
        name,
        "plait.tokenizers.vqgan:VQGANTokenizer",
        recognise,
        configure=lambda tensors, config: _configure(rename(tensors), normalized),
        rename=lambda tensors, settings: rename(tensors),
    )


_BLOCK = "encoder.down.0.block.0.norm1.weight"

LAYOUTS: tuple[Layout, ...] = (
    _layout("LlamaGen", "encoder.conv_blocks.0.res.0.norm1.weight", _LLAMAGEN, lowest_first=True, normalized=True),
    # Only where levels are numbered from the lowest up does the first one of the decoder enlarge.
    _layout("Janus", _BLOCK, _TAMING, lowest_first=True, normalized=True, also="decoder.up.0.upsample.conv.weight"),
    _layout("taming VQGAN", _BLOCK, _TAMING),
    _layout("diffusers VQModel", "encoder.down_blocks.0.resnets.0.norm1.weight", _DIFFUSERS, lowest_first=True),
)


def to_transformers(
    tensors: Mapping[str, Tensor], config: VQGANConfig, resolution: int
) -> tuple[Tensors, dict[str, Any]]:
    """The network as the ``vqmodel`` of transformers' Chameleon, which has no decoder.

    Args:
        tensors: the network's.
        config: its own.
        resolution: pixels along a side of the images.

    Returns:
        its tensors, and its ``vq_config``.

    Raises:
        PlaitError: it looks codes up in another way.
    """
    if config.normalized:
        raise PlaitError("export: transformers' Chameleon has no VQGAN that looks codes up by angle; use another --to")
    renamed = {
        name.replace("quantizer.codebook", "quantize.embedding.weight"): tensor
        for name, tensor in tensors.items()
        if not name.startswith("decoder.")
    }
    return renamed, {
        "model_type": "chameleon_vqgan",
        "embed_dim": config.codebook_dim,
        "num_embeddings": config.codebook_size,
        "latent_channels": config.z_channels,
        "base_channels": config.width,
        "channel_multiplier": list(config.multipliers),
        "num_res_blocks": config.blocks,
        "attn_resolutions": [resolution // 2**level for level in config.attention_levels] or None,
        "resolution": resolution,
    }
