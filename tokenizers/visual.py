"""The visual tokenizer: pixels → codes → pixels, for images and (frame by frame) video.

Pixel-unshuffle stem, residual convolutions with one normalisation per frame, finite scalar quantization, the mirrored
decoder. A linear shortcut runs past the convolutions on both sides (average colour in, bicubic latents out, after
DC-AE, arXiv 2410.10733), so codes start as quantized local colour and the convolutions learn the rest.

Any size goes in: it is padded to a multiple of `VisualConfig.factor` by repeating the edge, remembered, and cropped
when decoded.
"""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, Self

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from plait.errors import PlaitError
from plait.tokenizers.base import (
    FORMAT_VERSION,
    Codes,
    Tokenizer,
    check_codes,
    check_format_version,
    config_from_json,
    load_weights,
    make_folder,
    read_json,
    tensors_fingerprint,
    write_json,
    write_tensors,
)
from plait.tokenizers.quantizer import FiniteScalarQuantizer


@dataclass(frozen=True)
class VisualConfig:
    """Architecture of a `VisualTokenizer`.

    Attributes:
        patch: pixel-unshuffle factor of the stem.
        widths: channels of each level; every level after the first halves the resolution.
        encoder_blocks: residual blocks per encoder level.
        decoder_blocks: residual blocks per decoder level.
        levels: values per latent channel of the quantizer.
        temporal_factor: frames per latent frame. Only 1 exists: every frame is coded by itself.
    """

    patch: int = 4
    widths: tuple[int, ...] = (64, 112)
    encoder_blocks: int = 2
    decoder_blocks: int = 3
    levels: tuple[int, ...] = (8, 5, 5, 5)
    temporal_factor: int = 1

    def __post_init__(self) -> None:
        for name, least in (("patch", 1), ("encoder_blocks", 0), ("decoder_blocks", 0)):
            if type(number := getattr(self, name)) is not int or number < least:
                raise PlaitError(f"visual tokenizer: {name} is {number!r}, must be a whole number of at least {least}")
        for name, least in (("widths", 1), ("levels", 3)):
            numbers = getattr(self, name)
            if not isinstance(numbers, Sequence) or any(type(n) is not int or n < least for n in numbers or [None]):
                raise PlaitError(
                    f"visual tokenizer: {name} is {numbers!r}, must list whole numbers of at least {least}"
                )
        if self.temporal_factor != 1:
            raise PlaitError(f"visual tokenizer: temporal_factor is {self.temporal_factor}, only 1 is supported")

    @property
    def factor(self) -> int:
        """Pixels per code along each side."""
        return int(self.patch * 2 ** (len(self.widths) - 1))


class FrameNorm(nn.GroupNorm):
    """Normalise each frame over all channels and positions (``[B, C, H, W]``): no frame sees another."""

    def __init__(self, channels: int) -> None:
        super().__init__(1, channels)


class ResidualBlock(nn.Module):
    """norm → SiLU → 3×3 → norm → SiLU → 3×3, added to the input; ``[B, C, H, W]`` → the same."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = FrameNorm(channels), FrameNorm(channels)
        self.conv1, self.conv2 = (nn.Conv2d(channels, channels, 3, padding=1) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        """``[B, C, H, W]`` → the same shape."""
        h = self.conv1(F.silu(self.norm1(x)))
        return x + self.conv2(F.silu(self.norm2(h)))


class Encoder(nn.Module):
    """Pixels ``[B, 3, H, W]`` (multiples of the factor) → latents ``[B, d, H/factor, W/factor]``."""

    def __init__(self, config: VisualConfig) -> None:
        super().__init__()
        self.factor = config.factor
        latent = len(config.levels)
        layers: list[nn.Module] = [
            nn.PixelUnshuffle(config.patch),
            nn.Conv2d(3 * config.patch**2, config.widths[0], 3, padding=1),
        ]
        for i, width in enumerate(config.widths):
            if i > 0:
                layers.append(nn.Conv2d(config.widths[i - 1], width, 3, stride=2, padding=1))
            layers += [ResidualBlock(width) for _ in range(config.encoder_blocks)]
        self.body = nn.Sequential(*layers)
        self.norm = FrameNorm(config.widths[-1])
        self.head = nn.Conv2d(config.widths[-1], latent, 1)
        self.shortcut = nn.Conv2d(3, latent, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Pixels → latents."""
        colour = F.avg_pool2d(x, self.factor)
        return self.head(F.silu(self.norm(self.body(x)))) + self.shortcut(colour)


class Decoder(nn.Module):
    """Latents ``[B, d, h, w]`` → pixels ``[B, 3, h·factor, w·factor]``, not clamped."""

    def __init__(self, config: VisualConfig) -> None:
        super().__init__()
        self.factor = config.factor
        widths = config.widths[::-1]
        layers: list[nn.Module] = [nn.Conv2d(len(config.levels), widths[0], 3, padding=1)]
        for i, width in enumerate(widths):
            if i > 0:
                # Nearest + convolution: a transposed convolution leaves a checkerboard.
                layers += [nn.Upsample(scale_factor=2), nn.Conv2d(widths[i - 1], width, 3, padding=1)]
            layers += [ResidualBlock(width) for _ in range(config.decoder_blocks)]
        self.body = nn.Sequential(*layers)
        self.norm = FrameNorm(widths[-1])
        self.head = nn.Sequential(
            nn.Conv2d(widths[-1], 3 * config.patch**2, 3, padding=1), nn.PixelShuffle(config.patch)
        )
        self.shortcut = nn.Conv2d(len(config.levels), 3, 1)

    def forward(self, z: Tensor) -> Tensor:
        """Latents → pixels."""
        colour = F.interpolate(self.shortcut(z), scale_factor=self.factor, mode="bicubic")
        return self.head(F.silu(self.norm(self.body(z)))) + colour


class VisualTokenizer(nn.Module, Tokenizer):
    """Images ``[B, 3, H, W]`` and videos ``[B, 3, T, H, W]``, float32 in ``[-1, 1]``, to codes and back."""

    kind: ClassVar[str] = "visual"
    modalities: ClassVar[tuple[str, ...]] = ("image", "video")

    def __init__(self, config: VisualConfig | None = None) -> None:
        super().__init__()
        self.config = config or VisualConfig()
        self.encoder = Encoder(self.config)
        self.quantizer = FiniteScalarQuantizer(self.config.levels)
        self.decoder = Decoder(self.config)

    @property
    def factor(self) -> int:
        """Pixels per code along each side."""
        return self.config.factor

    @property
    def codebook_sizes(self) -> list[int]:
        """One codebook: the product of the quantizer's levels."""
        return [self.quantizer.codebook_size]

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return next(self.parameters()).device

    @cached_property
    def fingerprint(self) -> str:
        """Hash of the encoder's weights and of every setting that moves codes; for a finished tokenizer."""
        settings = asdict(replace(self.config, decoder_blocks=0)) | {
            "input": "rgb on white, [-1, 1], edge-padded", "quantizer": f"fsq/{self.quantizer.SPEC_VERSION}",
        }  # fmt: skip
        return tensors_fingerprint(settings, self.encoder.state_dict())

    def forward(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """The training pass: pixels ``[B, 3, H, W]`` → reconstruction ``[B, 3, H, W]``, codes ``[B, h, w]``."""
        z = rearrange(self.encoder(self._pad(pixels)), "b d h w -> b h w d")
        quantized, codes = self.quantizer(z)
        decoded = self.decoder(rearrange(quantized, "b h w d -> b d h w"))
        return decoded[..., : pixels.shape[-2], : pixels.shape[-1]], codes

    @torch.no_grad()
    def encode(self, pixels: Tensor) -> Codes:
        """Pixels → codes.

        Args:
            pixels: ``[B, 3, H, W]`` or ``[B, 3, T, H, W]``, floating point in ``[-1, 1]``.

        Returns:
            codes ``[B, h, w]`` or ``[B, t, h, w]``, h = ceil(H / factor), w = ceil(W / factor).

        Raises:
            PlaitError: no tensor, another shape, an integer dtype, or values that are not finite or out of range.
        """
        if not isinstance(pixels, Tensor):
            raise PlaitError(f"pixels: is a {type(pixels).__name__}, expected a tensor [B, 3, H, W] or [B, 3, T, H, W]")
        if pixels.ndim not in (4, 5) or pixels.shape[1] != 3 or 0 in pixels.shape:
            raise PlaitError(f"pixels: shape is {tuple(pixels.shape)}, expected [B, 3, H, W] or [B, 3, T, H, W]")
        if not pixels.is_floating_point():
            raise PlaitError(f"pixels: dtype is {pixels.dtype}, expected floating point in [-1, 1]")
        # One comparison for NaN, infinity and range; a little room for resizing filters that overshoot.
        if not bool((pixels.abs() <= 1.5).all()):
            raise PlaitError("pixels: values are not finite or lie outside [-1, 1]; scale bytes with x / 127.5 - 1")
        frames = rearrange(pixels, "b c t h w -> (b t) c h w") if pixels.ndim == 5 else pixels
        # Codes and their fingerprint are those of float32, whatever the caller's autocast.
        with torch.autocast(self.device.type, enabled=False):
            z = self.encoder(self._pad(frames.to(self.device, torch.float32)))
            codes = self.quantizer.codes(rearrange(z, "b d h w -> b h w d"))
        if pixels.ndim == 5:
            codes = rearrange(codes, "(b t) h w -> b t h w", b=len(pixels))
        modality = "video" if pixels.ndim == 5 else "image"
        return Codes(codes, modality, size=tuple(pixels.shape[2:]), fingerprint=self.fingerprint)

    @torch.no_grad()
    def decode(self, codes: Codes | Tensor, size: tuple[int, ...] | None = None) -> Tensor:
        """Codes → pixels in ``[-1, 1]``, float32.

        Args:
            codes: a `Codes`, or a bare int tensor ``[B, h, w]`` or ``[B, t, h, w]``.
            size: (H, W) or (T, H, W) to crop to; by default a `Codes`'s own size, else the whole grid.

        Raises:
            PlaitError: wrong shape, codes out of range, made by another tokenizer, or a size that the grid cannot hold.
        """
        if isinstance(codes, Codes):
            if codes.fingerprint not in (None, self.fingerprint):
                raise PlaitError(
                    "codes: made by another tokenizer (fingerprints differ); decode with the one that encoded"
                )
            size = size or codes.size
            codes = codes.codes
        if not isinstance(codes, Tensor):
            raise PlaitError(f"codes: is a {type(codes).__name__}, expected Codes or a tensor of integers")
        if codes.ndim not in (3, 4) or 0 in codes.shape:
            raise PlaitError(f"codes: shape is {tuple(codes.shape)}, expected [B, h, w] or [B, t, h, w]")
        check_codes(codes, self.quantizer.codebook_size)
        grid = tuple(codes.shape[1:])
        if size is not None and not (isinstance(size, Sequence) and all(type(side) is int for side in size)):
            raise PlaitError(f"size: {size!r} must be whole numbers, (H, W) or (T, H, W)")
        size = tuple(size or (side * self.factor for side in grid[-2:]))
        needed = (*size[:-2], *(math.ceil(side / self.factor) for side in size[-2:]))
        if len(size) < 2 or needed not in (grid, grid[-2:]):
            raise PlaitError(
                f"size: {'×'.join(map(str, size))} does not fit a grid of {'×'.join(map(str, grid))} codes; "
                "give the size that was encoded"
            )
        height, width = size[-2:]
        frames = rearrange(codes, "b t h w -> (b t) h w") if codes.ndim == 4 else codes
        with torch.autocast(self.device.type, enabled=False):
            z = self.quantizer.latents(frames.to(self.device))
            pixels = self.decoder(rearrange(z, "b h w d -> b d h w")).clamp(-1, 1)[..., :height, :width]
        return rearrange(pixels, "(b t) c h w -> b c t h w", b=len(codes)) if codes.ndim == 4 else pixels

    def save_pretrained(self, folder: str | Path, dtype: torch.dtype = torch.float32) -> None:
        """Write ``config.json`` and ``model.safetensors``; ``dtype`` is that of the stored weights.

        Rounding to bfloat16 moves codes: the fingerprint is that of the weights as stored.

        Raises:
            PlaitError: ``dtype`` is neither float32 nor bfloat16, or the folder cannot be made or written to.
        """
        if dtype not in (torch.float32, torch.bfloat16):
            raise PlaitError(f"dtype: {dtype} must be torch.float32 or torch.bfloat16")
        folder = Path(folder)
        make_folder(folder)
        stored = {name: tensor.to(dtype).contiguous() for name, tensor in self.state_dict().items()}
        as_stored = type(self)(self.config)
        as_stored.load_state_dict(stored)
        write_tensors(folder / "model.safetensors", stored)
        header: dict[str, Any] = {"format_version": FORMAT_VERSION, "tokenizer": self.kind}
        write_json(folder / "config.json", header | {"fingerprint": as_stored.fingerprint} | asdict(self.config))

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> Self:
        """Load what `save_pretrained` wrote, in float32 and ready for inference.

        Raises:
            PlaitError: a missing, broken or mismatched file, or weights that no longer give the stored fingerprint.
        """
        folder = Path(folder)
        content = read_json(folder / "config.json")
        check_format_version(content.pop("format_version", None), folder / "config.json")
        if content.pop("tokenizer", None) != cls.kind:
            raise PlaitError(f"{folder}/config.json: not a visual tokenizer")
        fingerprint = content.pop("fingerprint", None)
        tokenizer = cls(config_from_json(VisualConfig, content, folder / "config.json"))
        load_weights(tokenizer, folder / "model.safetensors")
        tokenizer.eval().requires_grad_(False)
        if fingerprint != tokenizer.fingerprint:
            raise PlaitError(
                f"{folder}: the weights do not give the stored fingerprint; the folder is damaged, copy it again"
            )
        return tokenizer

    def _pad(self, pixels: Tensor) -> Tensor:
        """Repeat the last row and column up to multiples of the factor."""
        down, right = (-side % self.factor for side in pixels.shape[-2:])
        return F.pad(pixels, (0, right, 0, down), mode="replicate") if down or right else pixels
