"""plait's own visual tokenizer: one causal network for images and video, any spatial and temporal factor.

A pixel-unshuffle or Haar stem, residual convolutions frame by frame, causal mixing along time, a quantizer, and the
mirrored decoder. A linear shortcut runs past the convolutions on both sides (average colour in, bicubic latents out,
after DC-AE, arXiv 2410.10733), so codes start as quantized local colour and the convolutions learn the rest.

T = 1 + f·k frames become 1 + k latent frames: the first frame is coded by itself, so an image is a video of one frame.
"""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from plait.errors import PlaitError
from plait.tokenizers.base import config_from_json, tensors_fingerprint
from plait.tokenizers.causal import (
    HEAD,
    Attention,
    Clip,
    FrameNorm,
    HaarShuffle,
    HaarUnshuffle,
    ResidualBlock,
    TemporalBlock,
    TimeDown,
    TimeUp,
    average_frames,
    frame_norm,
    repeat_frames,
    run,
)
from plait.tokenizers.pixels import Cache, PixelTokenizer
from plait.tokenizers.quantizer import Quantized, QuantizerConfig, build_quantizer


@dataclass(frozen=True)
class VisualConfig:
    """Architecture of a `VisualTokenizer`. Levels are counted from the finest, 0.

    Attributes:
        patch: side of the pixel patches that the stem folds into channels.
        stem: "unshuffle" leaves the patch as it is, "haar" takes its wavelet transform.
        widths: channels of each level; every level after the first halves the resolution.
        encoder_blocks: residual blocks per encoder level.
        decoder_blocks: residual blocks per decoder level.
        attention: levels whose blocks are each followed by self-attention within the frame; their widths are
            multiples of 32.
        temporal_factor: frames per latent frame, 1, 2, 4 or 8. The coarsest levels end with one halving each. With 1
            there are no layers along time: every frame is coded by itself.
        decoder_norm: "frame", or "spatial" for norms that are steered by the latents, as in MoVQ.
        quantizer: between encoder and decoder.
    """

    patch: int = 4
    stem: str = "unshuffle"
    widths: tuple[int, ...] = (64, 112)
    encoder_blocks: int = 2
    decoder_blocks: int = 3
    attention: tuple[int, ...] = ()
    temporal_factor: int = 1
    decoder_norm: str = "frame"
    quantizer: QuantizerConfig = field(default_factory=QuantizerConfig)

    def __post_init__(self) -> None:
        for name, least in (("patch", 1), ("encoder_blocks", 0), ("decoder_blocks", 0), ("temporal_factor", 1)):
            if type(number := getattr(self, name)) is not int or number < least:
                raise PlaitError(f"visual tokenizer: {name} is {number!r}, must be a whole number of at least {least}")
        _check_list("widths", self.widths, 1)
        if self.attention != ():
            _check_list("attention", self.attention, 0)
        for name, known in (("stem", ("unshuffle", "haar")), ("decoder_norm", ("frame", "spatial"))):
            if getattr(self, name) not in known:
                raise PlaitError(
                    f"visual tokenizer: {name} is {getattr(self, name)!r}, must be {' or '.join(map(repr, known))}"
                )
        if self.temporal_factor not in (1, 2, 4, 8):
            raise PlaitError(f"visual tokenizer: temporal_factor is {self.temporal_factor!r}, must be 1, 2, 4 or 8")
        if self.stem == "haar" and self.patch & (self.patch - 1):
            raise PlaitError(f"visual tokenizer: patch is {self.patch}, the haar stem needs a power of two")
        for level in self.attention:
            if level >= len(self.widths) or self.widths[level] % HEAD:
                raise PlaitError(
                    f"visual tokenizer: attention at level {level} needs a level of that number (there are "
                    f"{len(self.widths)}) whose width is a multiple of {HEAD}"
                )
        for name in ("widths", "attention"):
            object.__setattr__(self, name, tuple(getattr(self, name)))
        if not isinstance(self.quantizer, QuantizerConfig):
            raise PlaitError(f"visual tokenizer: quantizer is {self.quantizer!r}, must be a QuantizerConfig")

    @property
    def factor(self) -> int:
        """Pixels per code along each side."""
        return int(self.patch * 2 ** (len(self.widths) - 1))

    def halvings(self, level: int) -> int:
        """How many halvings of the frame rate end this level's blocks."""
        first = len(self.widths) - int(math.log2(self.temporal_factor))
        return sum(max(0, k) == level for k in range(first, len(self.widths)))


def _check_list(name: str, numbers: Any, least: int) -> None:
    if not isinstance(numbers, Sequence) or any(type(n) is not int or n < least for n in numbers or [None]):
        raise PlaitError(f"visual tokenizer: {name} is {numbers!r}, must list whole numbers of at least {least}")


def _blocks(config: VisualConfig, level: int, count: int, latent: int = 0) -> list[nn.Module]:
    """A level's blocks: each a residual block, then mixing along time and attention, where configured."""
    width = config.widths[level]
    layers: list[nn.Module] = []
    for _ in range(count):
        layers.append(ResidualBlock(width, latent))
        if config.temporal_factor > 1:
            layers.append(TemporalBlock(width))
        if level in config.attention:
            layers.append(Attention(width))
    return layers


class Encoder(nn.Module):
    """Frames ``[B·T, 3, H, W]`` (whole groups, multiples of the factor) → latents ``[B·t, d, H/factor, W/factor]``."""

    def __init__(self, config: VisualConfig, latent: int) -> None:
        super().__init__()
        self.config = config
        stem = HaarUnshuffle if config.stem == "haar" else nn.PixelUnshuffle
        layers: list[nn.Module] = [
            stem(config.patch),
            nn.Conv2d(3 * config.patch**2, config.widths[0], 3, padding=1),
        ]
        for i, width in enumerate(config.widths):
            if i > 0:
                layers.append(nn.Conv2d(config.widths[i - 1], width, 3, stride=2, padding=1))
            layers += _blocks(config, i, config.encoder_blocks)
            layers += [TimeDown(width) for _ in range(config.halvings(i))]
        self.body = nn.Sequential(*layers)
        self.norm = FrameNorm(config.widths[-1])
        self.head = nn.Conv2d(config.widths[-1], latent, 1)
        self.shortcut = nn.Conv2d(3, latent, 1)

    def forward(self, x: Tensor, clip: Clip) -> Tensor:
        """Pixels → latents."""
        colour = average_frames(F.avg_pool2d(x, self.config.factor), self.config.temporal_factor, clip)
        return self.head(F.silu(self.norm(run(self.body, x, clip)))) + self.shortcut(colour)


class Decoder(nn.Module):
    """Latents ``[B·t, d, h, w]`` → frames ``[B·T, 3, h·factor, w·factor]``, not clamped."""

    def __init__(self, config: VisualConfig, latent: int) -> None:
        super().__init__()
        self.config = config
        widths = config.widths
        steer = latent if config.decoder_norm == "spatial" else 0
        layers: list[nn.Module] = [nn.Conv2d(latent, widths[-1], 3, padding=1)]
        for i in reversed(range(len(widths))):
            if i < len(widths) - 1:
                # Nearest + convolution: a transposed convolution leaves a checkerboard.
                layers += [nn.Upsample(scale_factor=2), nn.Conv2d(widths[i + 1], widths[i], 3, padding=1)]
            layers += [TimeUp(widths[i]) for _ in range(config.halvings(i))]
            layers += _blocks(config, i, config.decoder_blocks, steer)
        self.body = nn.Sequential(*layers)
        self.norm = frame_norm(widths[0], steer)
        shuffle = HaarShuffle if config.stem == "haar" else nn.PixelShuffle
        self.head = nn.Sequential(nn.Conv2d(widths[0], 3 * config.patch**2, 3, padding=1), shuffle(config.patch))
        self.shortcut = nn.Conv2d(latent, 3, 1)

    def forward(self, z: Tensor, clip: Clip) -> Tensor:
        """Latents → pixels."""
        colour = F.interpolate(self.shortcut(z), scale_factor=self.config.factor, mode="bicubic")
        colour = repeat_frames(colour, self.config.temporal_factor, clip)
        clip.z = z
        h = run(self.body, z, clip)
        return self.head(F.silu(run([self.norm], h, clip))) + colour


class VisualTokenizer(PixelTokenizer):
    """Images ``[B, 3, H, W]`` and videos ``[B, 3, T, H, W]``, float32 in ``[-1, 1]``, to codes and back."""

    architecture: ClassVar[str] = "plait"
    config_class: ClassVar[type] = VisualConfig
    config: VisualConfig

    def __init__(self, config: VisualConfig | None = None) -> None:
        super().__init__()
        self.config = config or VisualConfig()
        self.quantizer = build_quantizer(self.config.quantizer)
        self.encoder = Encoder(self.config, self.quantizer.dim)
        self.decoder = Decoder(self.config, self.quantizer.dim)

    @property
    def factor(self) -> int:
        """Pixels per code along each side."""
        return self.config.factor

    @property
    def temporal_factor(self) -> int:
        """Frames per code."""
        return self.config.temporal_factor

    @property
    def last_layer(self) -> Tensor:
        """The weight that turns the decoder's last channels into pixels, where losses are compared."""
        weight = self.decoder.head[0].weight
        assert isinstance(weight, Tensor)
        return weight

    @cached_property
    def fingerprint(self) -> str:
        """Hash of the weights and settings that move codes; for a finished tokenizer."""
        config, quantizer = self.config, self.config.quantizer
        settings: dict[str, Any] = {
            "patch": config.patch, "widths": config.widths, "encoder_blocks": config.encoder_blocks,
            "decoder_blocks": 0, "temporal_factor": config.temporal_factor,
            "input": "rgb on white, [-1, 1], edge-padded",
            "quantizer": f"{quantizer.kind}/{self.quantizer.SPEC_VERSION}",
        }  # fmt: skip
        if quantizer.kind == "fsq":
            settings["levels"] = quantizer.levels
        # Settings that came later count only where they are used: tokenizers made before keep their fingerprints.
        if config.stem != "unshuffle":
            settings["stem"] = config.stem
        if config.attention:
            settings["attention"] = config.attention
        tensors = self.encoder.state_dict() | self.quantizer.state_dict(prefix="quantizer.")
        return tensors_fingerprint(settings, tensors)

    def to_latents(self, pixels: Tensor, cache: Cache | None = None) -> Tensor:
        """Pixels ``[B, 3, T, H, W]`` → latents ``[B, d, t, h, w]`` before quantization."""
        frames = rearrange(pixels, "b c t h w -> (b t) c h w").contiguous(memory_format=torch.channels_last)
        clip = Clip(pixels.shape[0], starts=not cache, cache=cache)
        z = self.encoder(frames, clip)
        _remember(cache, self.encoder)
        return rearrange(z, "(b t) d h w -> b d t h w", b=clip.batch)

    def from_latents(self, z: Tensor, cache: Cache | None = None, frames: int | None = None) -> Tensor:
        """Quantized latents ``[B, d, t, h, w]`` → pixels ``[B, 3, T, H, W]``, not clamped."""
        folded = rearrange(z, "b d t h w -> (b t) d h w").contiguous(memory_format=torch.channels_last)
        clip = Clip(z.shape[0], starts=not cache, cache=cache)
        pixels = self.decoder(folded, clip)
        _remember(cache, self.decoder)
        return rearrange(pixels, "(b t) c h w -> b c t h w", b=clip.batch)

    def forward(self, pixels: Tensor) -> tuple[Tensor, Quantized]:
        """The training pass.

        Args:
            pixels: ``[B, 3, H, W]`` or ``[B, 3, T, H, W]`` with T = 1 + f·k.

        Returns:
            the reconstruction in the same shape, not clamped, and what the quantizer says.
        """
        video = pixels if pixels.ndim == 5 else pixels.unsqueeze(2)
        z = rearrange(self.to_latents(self._pad(video)), "b d t h w -> b t h w d")
        quantized = self.quantizer(z)
        decoded = self.from_latents(rearrange(quantized.latents, "b t h w d -> b d t h w"))
        decoded = decoded[..., : pixels.shape[-2], : pixels.shape[-1]]
        return decoded if pixels.ndim == 5 else decoded.squeeze(2), quantized

    @torch.no_grad()
    def inflate(self, image: "VisualTokenizer") -> None:
        """Take over an image tokenizer's weights; the layers along time stay as they are, at first the identity.

        A still, and every frame of a resting clip, then has the image tokenizer's codes (MAGVIT-v2's image-then-video
        training, arXiv 2310.05737).

        Raises:
            PlaitError: the image tokenizer has another architecture.
        """
        mine, its = architecture_of(self.config), architecture_of(image.config)
        for name in (name for name in mine if mine[name] != its[name]):
            raise PlaitError(
                f"init: the tokenizer has another architecture, {name} {its[name]!r} instead of {mine[name]!r}; "
                "only temporal_factor may differ"
            )
        for part, source in ((self.encoder, image.encoder), (self.decoder, image.decoder)):
            for layer, like in zip(_spatial(part), _spatial(source), strict=True):
                layer.load_state_dict(like.state_dict())
        self.quantizer.load_state_dict(image.quantizer.state_dict())
        self.__dict__.pop("fingerprint", None)  # of the weights before

    @classmethod
    def config_from(cls, content: dict[str, Any], where: Path) -> VisualConfig:
        """The configuration from config.json; the first files had the quantizer's levels at the top."""
        quantizer = content.pop("quantizer", None) or {"kind": "fsq", "levels": content.pop("levels", None)}
        if not isinstance(quantizer, dict):
            raise PlaitError(f"{where}: quantizer is {quantizer!r}, expected an object")
        content["quantizer"] = config_from_json(QuantizerConfig, quantizer, where)
        return config_from_json(VisualConfig, content, where)


def architecture_of(config: VisualConfig) -> dict[str, Any]:
    """The settings that two tokenizers must share to have the same layers in space and the same codes."""
    settings = asdict(config) | {"temporal_factor": None}
    quantizer = settings.pop("quantizer")
    return settings | {name: quantizer[name] for name in ("kind", "levels", "codebook_size", "dim", "codebooks")}


def _remember(cache: Cache | None, part: nn.Module) -> None:
    """Mark that a video has begun, also for a network without layers along time."""
    if cache is not None:
        cache[part] = torch.empty(0)


def _spatial(part: Encoder | Decoder) -> list[nn.Module]:
    """The layers that an image tokenizer has too, in order."""
    body = [layer for layer in part.body if not isinstance(layer, (TemporalBlock, TimeDown, TimeUp))]
    return [*body, part.norm, part.head, part.shortcut]
