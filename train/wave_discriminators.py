"""Discriminators of sound: networks that say how real it sounds, each looking at it in another way.

- ``period`` (HiFi-GAN: Kong et al., 2020, arXiv 2010.05646): samples folded into rows of a prime number of them.
- ``stft`` (EnCodec: Défossez et al., 2022, arXiv 2210.13438): real and imaginary parts of short-time spectra.
- ``bands`` (DAC: Kumar et al., 2023, arXiv 2306.06546): the same, cut into five bands with convolutions of their own.

With ``width`` 32 their channels are the published ones. Channels of the sound are judged one by one. All weights are
normalised (Salimans & Kingma, 2016, arXiv 1602.07868), and nothing mixes the items of a batch.
"""

from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm

from plait.errors import PlaitError

# Where DAC cuts the spectrum, as shares of the Nyquist frequency.
_BANDS = (0.0, 0.1, 0.25, 0.5, 0.75, 1.0)


@dataclass(frozen=True)
class WaveDiscriminatorConfig:
    """Which discriminators judge together.

    Attributes:
        kinds: of "period", "stft" and "bands".
        periods: period: samples per row, one network for each.
        stft_windows: stft: samples per spectrum, one network for each.
        band_windows: bands: the same.
        width: channels of each first convolution.
    """

    kinds: tuple[str, ...] = ("period", "bands")
    periods: tuple[int, ...] = (2, 3, 5, 7, 11)
    stft_windows: tuple[int, ...] = (2048, 1024, 512, 256, 128)
    band_windows: tuple[int, ...] = (2048, 1024, 512)
    width: int = 32

    def __post_init__(self) -> None:
        for name, least, quarters in (("periods", 2, False), ("stft_windows", 64, True), ("band_windows", 64, True)):
            numbers = getattr(self, name)
            if not isinstance(numbers, list | tuple) or any(
                type(n) is not int or n < least or (quarters and n % 4) for n in numbers
            ):
                kind = "multiples of 4" if quarters else "whole numbers"
                raise PlaitError(f"discriminator: {name} is {numbers!r}, must list {kind} from {least} up")
            object.__setattr__(self, name, tuple(numbers))
        object.__setattr__(self, "kinds", tuple(self.kinds))
        if not self.kinds or not set(self.kinds) <= set(_KINDS):
            raise PlaitError(f"discriminator: kinds is {list(self.kinds)}, must name some of {', '.join(_KINDS)}")
        for kind, (_, name) in _KINDS.items():
            if kind in self.kinds and not getattr(self, name):
                raise PlaitError(f"discriminator: {name} is empty, but kinds has {kind!r}; name one or more")
        if type(self.width) is not int or self.width < 1:
            raise PlaitError(f"discriminator: width is {self.width!r}, must be a whole number of at least 1")

    @property
    def least_samples(self) -> int:
        """Samples that a sound must have at least."""
        return max(max(getattr(self, setting)) for kind, (_, setting) in _KINDS.items() if kind in self.kinds)


class Judgement(NamedTuple):
    """What one network says.

    Attributes:
        logits: positive for "real", of any shape ``[B·C, ...]``.
        features: the activations that led there, from the first layer on.
    """

    logits: Tensor
    features: list[Tensor]


class PeriodDiscriminator(nn.Module):
    """Samples ``[B, 1, N]``, filled up by reflection, as pictures of ``period`` columns that are never mixed."""

    def __init__(self, period: int, width: int) -> None:
        super().__init__()
        self.period = period
        widths = [1, *(width * n for n in (1, 4, 16, 32, 32))]
        self.layers = nn.ModuleList(
            _convolution(before, after, (5, 1), stride=(3 if i < 4 else 1, 1))
            for i, (before, after) in enumerate(pairwise(widths))
        )
        self.last = _convolution(widths[-1], 1, (3, 1))

    def forward(self, samples: Tensor) -> Judgement:
        """Judge ``[B, 1, N]``."""
        x = F.pad(samples, (0, -samples.shape[-1] % self.period), mode="reflect").unflatten(-1, (-1, self.period))
        features = _features(self.layers, x, 0.1)
        return Judgement(self.last(features[-1]), features)


class SpectrumDiscriminator(nn.Module):
    """Complex spectra, time before frequency; kernels reach further and further along time."""

    def __init__(self, window: int, width: int) -> None:
        super().__init__()
        self.window = window
        self.layers = nn.ModuleList(
            [
                _convolution(2, width, (3, 9)),
                *(_convolution(width, width, (3, 9), stride=(1, 2), dilation=(d, 1)) for d in (1, 2, 4)),
                _convolution(width, width, (3, 3)),
            ]
        )
        self.last = _convolution(width, 1, (3, 3))

    def forward(self, samples: Tensor) -> Judgement:
        """Judge ``[B, 1, N]``."""
        features = _features(self.layers, complex_spectra(samples, self.window), 0.2)
        return Judgement(self.last(features[-1]), features)


class BandDiscriminator(nn.Module):
    """Complex spectra, each of five bands through convolutions of its own."""

    def __init__(self, window: int, width: int) -> None:
        super().__init__()
        self.window = window
        bins = window // 2 + 1
        self.bands = [(int(low * bins), int(high * bins)) for low, high in pairwise(_BANDS)]
        self.layers = nn.ModuleList(
            nn.ModuleList(
                [
                    _convolution(2, width, (3, 9)),
                    *(_convolution(width, width, (3, 9), stride=(1, 2)) for _ in range(3)),
                    _convolution(width, width, (3, 3)),
                ]
            )
            for _ in self.bands
        )
        self.last = _convolution(width, 1, (3, 3))

    def forward(self, samples: Tensor) -> Judgement:
        """Judge ``[B, 1, N]``."""
        spectra = complex_spectra(samples, self.window)
        features = [
            _features(layers, spectra[..., low:high], 0.1)
            for layers, (low, high) in zip(self.layers, self.bands, strict=True)
        ]
        logits = self.last(torch.cat([of_band[-1] for of_band in features], -1))
        return Judgement(logits, [feature for of_band in features for feature in of_band])


# Each kind's network, and the setting that has one number per network.
_KINDS: dict[str, tuple[type[nn.Module], str]] = {
    "period": (PeriodDiscriminator, "periods"),
    "stft": (SpectrumDiscriminator, "stft_windows"),
    "bands": (BandDiscriminator, "band_windows"),
}


class WaveDiscriminators(nn.Module):
    """All networks of a configuration on the same sound."""

    def __init__(self, config: WaveDiscriminatorConfig) -> None:
        super().__init__()
        self.config = config
        self.networks = nn.ModuleList(
            network(number, config.width)
            for kind, (network, setting) in _KINDS.items()
            if kind in config.kinds
            for number in getattr(config, setting)
        )

    def forward(self, samples: Tensor) -> list[Judgement]:
        """Judge sound.

        Args:
            samples: ``[B, C, N]``, float.

        Returns:
            one judgement per network.

        Raises:
            PlaitError: the sound is too short.
        """
        if samples.shape[-1] < self.config.least_samples:
            raise PlaitError(
                f"samples: {samples.shape[-1]} of them are fewer than the {self.config.least_samples} of the longest "
                "window; give the discriminator shorter windows or longer sound"
            )
        x = samples.flatten(0, 1).unsqueeze(1)
        # As DAC: what a listener does not judge by.
        x = x - x.mean(-1, keepdim=True)
        x = 0.8 * x / (x.abs().amax(-1, keepdim=True) + 1e-5)
        return [network(x) for network in self.networks]


def complex_spectra(samples: Tensor, window: int) -> Tensor:
    """Short-time spectra under a Hann window of unit norm, a quarter of it apart, of whole windows only.

    Args:
        samples: ``[B, 1, N]``.
        window: samples per spectrum.

    Returns:
        real and imaginary part ``[B, 2, T, window // 2 + 1]``, float32.
    """
    with torch.autocast(samples.device.type, enabled=False):
        hann = torch.hann_window(window, device=samples.device)
        spectra = torch.stft(
            samples.float().squeeze(1),
            window,
            window // 4,
            window=hann / hann.norm(),
            center=False,
            return_complex=True,
        )
    return torch.view_as_real(spectra).permute(0, 3, 2, 1)


def _convolution(
    before: int,
    after: int,
    kernel: tuple[int, int],
    stride: tuple[int, int] = (1, 1),
    dilation: tuple[int, int] = (1, 1),
) -> nn.Module:
    """A convolution that keeps the size where it does not stride."""
    padding = dilation[0] * (kernel[0] // 2), dilation[1] * (kernel[1] // 2)
    return weight_norm(nn.Conv2d(before, after, kernel, stride, padding, dilation))


def _features(layers: nn.Module, x: Tensor, slope: float) -> list[Tensor]:
    """What each layer gives, after its leaky rectifier."""
    features = []
    for layer in layers.children():
        x = F.leaky_relu(layer(x), slope)
        features.append(x)
    return features
