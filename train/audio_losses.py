"""Reconstruction losses between decoded and original sound: samples, log-mel spectra, short-time spectra.

Spectra of one window serve both spectral losses. Magnitudes are divided by the norm of the window, and a mel band is
the weighted mean of its bins; so white noise has about the magnitude of its samples in every window and band, and
`AudioLossConfig.floor` means the same for all of them.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from plait.tokenizers.mel import magnitudes, mel_filters
from plait.train.recipe import AudioLossConfig


class WaveLosses(nn.Module):
    """The terms of a configuration whose weights are not 0; the weights are left to the caller.

    - ``wave``: mean absolute error of the samples.
    - ``mel``: mean absolute error of log10 mel spectra, summed over the windows. With the default windows it is that of
      DAC (Kumar et al., 2023, arXiv 2306.06546) but for the floor.
    - ``stft``: spectral convergence ``‖|X| − |X̂|‖ / ‖|X|‖`` of each item, and the mean absolute error of log
      magnitudes; the mean over the windows (Yamamoto et al., "Parallel WaveGAN", 2020, arXiv 1910.11480).

    The hop is a quarter of each window.

    Args:
        config: which terms, and their windows.
        sample_rate: Hz.
    """

    def __init__(self, config: AudioLossConfig, sample_rate: int) -> None:
        super().__init__()
        self.config = config
        bands = zip(config.windows, config.mels, strict=True) if config.mel else ()
        self.filters = nn.ParameterDict()
        for window, count in bands:
            filters = mel_filters(sample_rate, window, count)
            mean = filters / filters.sum(0).clamp_min(1e-8)
            self.filters[str(window)] = nn.Parameter(mean.T.contiguous(), requires_grad=False)
        self.windows = sorted({*map(int, self.filters), *(config.stft_windows if config.stft else ())})

    def forward(self, decoded: Tensor, samples: Tensor) -> dict[str, Tensor]:
        """Compare.

        Args:
            decoded: ``[B, C, N]``, more samples than half the largest window.
            samples: the same shape.

        Returns:
            scalars by name, means over the batch, without their weights.
        """
        config = self.config
        terms = {"wave": F.l1_loss(decoded, samples)} if config.wave else {}
        mel, stft = [], []
        with torch.autocast(decoded.device.type, enabled=False):
            for window in self.windows:
                ours = _spectra(decoded, window)
                with torch.no_grad():
                    theirs = _spectra(samples, window)
                if str(window) in self.filters:
                    filters = self.filters[str(window)]
                    a, b = ((filters @ x + config.floor).log10() for x in (ours, theirs))
                    mel.append(F.l1_loss(a, b))
                if config.stft and window in config.stft_windows:
                    stft.append(spectral_convergence(ours, theirs, config.floor))
                    stft.append(F.l1_loss((ours + config.floor).log(), (theirs + config.floor).log()))
        if mel:
            terms["mel"] = torch.stack(mel).sum()
        if stft:
            terms["stft"] = torch.stack(stft).sum() / len(config.stft_windows)
        return terms


def _spectra(samples: Tensor, window: int) -> Tensor:
    """`magnitudes` under a window of unit norm, a quarter of it apart: ``[B, C, window // 2 + 1, T]``."""
    return magnitudes(samples.float(), window, window // 4) / math.sqrt(3 / 8 * window)


def spectral_convergence(decoded: Tensor, original: Tensor, floor: float) -> Tensor:
    """The norm of the difference over the norm of the original, the mean over items; scalar in ``[0, ∞)``.

    Args:
        decoded: magnitudes ``[B, ...]``.
        original: the same shape.
        floor: silence counts as noise of this magnitude, so that nothing is divided by 0.
    """
    difference, norm = (x.flatten(1).square().mean(1) for x in (decoded - original, original))
    # The square root of 0 has no gradient.
    return ((difference + 1e-20).sqrt() / norm.sqrt().clamp_min(floor)).mean()
