"""Patch discriminators: networks that say of every patch of a picture or clip how real it looks.

A stack of strided convolutions (PatchGAN, pix2pix, arXiv 1611.07004) whose output has one logit per overlapping patch.
Neither of the two norms mixes the pictures of a batch, as BatchNorm would: a batch of real and decoded pictures
together gives the logits that each would have alone.
"""

import math
from dataclasses import dataclass
from itertools import pairwise

from torch import Tensor, nn
from torch.nn.utils.parametrizations import spectral_norm

from plait.errors import PlaitError


@dataclass(frozen=True)
class DiscriminatorConfig:
    """Architecture of a discriminator.

    Attributes:
        kind: "patch2d" looks at frames one by one, "patch3d" also along time.
        width: channels of the first convolution, doubled by each further one up to eightfold; a multiple of 8.
        layers: convolutions that halve the resolution. 3 gives a logit for each patch of 70×70 pixels, 2 of 34×34.
        norm: "group" (arXiv 1803.08494), or "spectral" for the spectral norm of every convolution (arXiv 1802.05957).
    """

    kind: str = "patch2d"
    width: int = 64
    layers: int = 3
    norm: str = "group"

    def __post_init__(self) -> None:
        if self.kind not in _KINDS:
            raise PlaitError(f"discriminator: kind is {self.kind!r}, must be {' or '.join(map(repr, _KINDS))}")
        if self.norm not in ("group", "spectral"):
            raise PlaitError(f"discriminator: norm is {self.norm!r}, must be 'group' or 'spectral'")
        if type(self.width) is not int or self.width < 8 or self.width % 8:
            raise PlaitError(f"discriminator: width is {self.width!r}, must be a multiple of 8")
        if type(self.layers) is not int or not 1 <= self.layers <= 6:
            raise PlaitError(f"discriminator: layers is {self.layers!r}, must be a whole number from 1 to 6")

    @property
    def least_side(self) -> int:
        """Pixels that the short side must have at least."""
        return int(3 * 2**self.layers)


class PatchDiscriminator(nn.Module):
    """Pictures → one logit per patch, positive for "real". A clip is the batch of its frames."""

    def __init__(self, config: DiscriminatorConfig) -> None:
        super().__init__()
        self.config = config
        widths = [config.width * min(2**i, 8) for i in range(config.layers + 1)]
        # All but the last of these halve the resolution.
        layers: list[nn.Module] = [self._convolution(3, widths[0], halve=True), nn.LeakyReLU(0.2)]
        for i, (before, after) in enumerate(pairwise(widths), start=2):
            layers.append(self._convolution(before, after, halve=i <= config.layers))
            if config.norm == "group":
                layers.append(nn.GroupNorm(math.gcd(32, after // 8), after))
            layers.append(nn.LeakyReLU(0.2))
        layers.append(self._convolution(widths[-1], 1, halve=False))
        self.layers = nn.Sequential(*layers)

    def forward(self, pixels: Tensor) -> Tensor:
        """Judge pictures or the frames of clips.

        Args:
            pixels: float ``[B, 3, H, W]`` or ``[B, 3, T, H, W]`` in ``[-1, 1]``.

        Returns:
            logits ``[B, 1, h, w]`` or ``[B·T, 1, h, w]``.

        Raises:
            PlaitError: the pictures are too small for this many layers.
        """
        self._check(pixels)
        return self.layers(pixels.movedim(2, 1).flatten(0, 1) if pixels.ndim == 5 else pixels)

    def _convolution(self, before: int, after: int, halve: bool) -> nn.Module:
        return self._normed(nn.Conv2d(before, after, 4, stride=2 if halve else 1, padding=1))

    def _normed(self, convolution: nn.Module) -> nn.Module:
        return spectral_norm(convolution) if self.config.norm == "spectral" else convolution

    def _check(self, pixels: Tensor) -> None:
        least = self.config.least_side
        if pixels.ndim not in (4, 5) or pixels.shape[1] != 3 or min(pixels.shape[-2:]) < least:
            raise PlaitError(
                f"pixels: shape is {tuple(pixels.shape)}, a discriminator of {self.config.layers} layers takes "
                f"[B, 3, H, W] or [B, 3, T, H, W] with sides ≥ {least}; give it fewer layers or larger pictures"
            )


class PatchDiscriminator3d(PatchDiscriminator):
    """Clips of any number of frames → one logit per patch in space and time. A picture is a clip of one frame.

    Kernels reach one frame back and one ahead; every halving after the first also halves the frames, rounding up.
    """

    def forward(self, pixels: Tensor) -> Tensor:
        """Judge clips.

        Args:
            pixels: float ``[B, 3, T, H, W]`` or ``[B, 3, H, W]`` in ``[-1, 1]``.

        Returns:
            logits ``[B, 1, t, h, w]``.

        Raises:
            PlaitError: the frames are too small for this many layers.
        """
        self._check(pixels)
        return self.layers(pixels.unsqueeze(2) if pixels.ndim == 4 else pixels)

    def _convolution(self, before: int, after: int, halve: bool) -> nn.Module:
        # The first one sees raw frames: halving those would hide flicker between neighbours.
        stride = (2 if before > 3 else 1, 2, 2) if halve else 1
        return self._normed(nn.Conv3d(before, after, (3, 4, 4), stride=stride, padding=1))


_KINDS: dict[str, type[PatchDiscriminator]] = {"patch2d": PatchDiscriminator, "patch3d": PatchDiscriminator3d}


def build_discriminator(config: DiscriminatorConfig) -> PatchDiscriminator:
    """The network of a configuration, randomly initialised."""
    return _KINDS[config.kind](config)
