"""Magnitude spectra on the mel scale: one definition for figures, losses and pictures of sound.

The scale is Slaney's ("Auditory Toolbox", 1998), linear up to 1 kHz and logarithmic above, with triangles of equal
area. It is the default of librosa, and what DAC's and BigVGAN's figures are taken with. HTK's scale differs.
"""

import math
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor

# Slaney's scale: 200/3 Hz per mel below the corner, above it 27 mels for every factor of 6.4.
_CORNER = 1000.0
_LINEAR = 200.0 / 3
_STEP = math.log(6.4) / 27

# Magnitudes below this count as silence in logarithms.
FLOOR = 1e-5


@lru_cache(maxsize=64)
def mel_filters(sample_rate: int, n_fft: int, n_mels: int, low: float = 0.0, high: float | None = None) -> Tensor:
    """Triangles, evenly spaced on the mel scale, that turn magnitudes of an STFT into mel bands.

    Each triangle has an area of 1 (over frequency in Hz), so wide bands are not louder than narrow ones. With many
    bands and few bins some of the lowest triangles lie between two bins and are all zero.

    Args:
        sample_rate: Hz.
        n_fft: samples per spectrum.
        n_mels: bands.
        low: Hz, where the lowest triangle begins.
        high: Hz, where the highest ends; half the sample rate by default.

    Returns:
        float32 ``[n_fft // 2 + 1, n_mels]``, on the CPU; shared between calls, so not to be written to.
    """
    edges = torch.linspace(
        _mels(low), _mels(sample_rate / 2 if high is None else high), n_mels + 2, dtype=torch.float64
    )
    above = _CORNER * torch.exp(_STEP * (edges - _CORNER / _LINEAR))
    hertz = (edges * _LINEAR).where(edges < _CORNER / _LINEAR, above)
    bins = torch.linspace(0, sample_rate / 2, n_fft // 2 + 1, dtype=torch.float64)[:, None]
    left, middle, right = hertz[:-2], hertz[1:-1], hertz[2:]
    rising, falling = (bins - left) / (middle - left), (right - bins) / (right - middle)
    return (torch.minimum(rising, falling).clamp_min(0) * 2 / (right - left)).float()


def magnitudes(samples: Tensor, n_fft: int, hop: int) -> Tensor:
    """Absolute values of a short-time Fourier transform with a periodic Hann window, frame k centred on sample k · hop.

    Args:
        samples: ``[..., N]``, floating point; the ends are reflected, sound shorter than a window is filled up with
            zeros first.
        n_fft: samples per window.
        hop: samples from one window to the next.

    Returns:
        ``[..., n_fft // 2 + 1, frames]``, in the dtype of the samples.
    """
    flat = samples.reshape(-1, samples.shape[-1])
    flat = F.pad(flat, (0, max(0, n_fft - flat.shape[-1])))
    window = torch.hann_window(n_fft, dtype=samples.dtype, device=samples.device)
    spectrum = torch.stft(flat, n_fft, hop, window=window, center=True, pad_mode="reflect", return_complex=True).abs()
    return spectrum.reshape(*samples.shape[:-1], *spectrum.shape[-2:])


def mel_spectrum(samples: Tensor, sample_rate: int, n_fft: int, hop: int, n_mels: int) -> Tensor:
    """Magnitudes in mel bands.

    Args:
        samples: ``[..., N]`` as in `magnitudes`.
        sample_rate: Hz.
        n_fft: samples per window.
        hop: samples from one window to the next.
        n_mels: bands.

    Returns:
        ``[..., n_mels, frames]``, at least 0.
    """
    filters = mel_filters(sample_rate, n_fft, n_mels).to(samples)
    return filters.T @ magnitudes(samples, n_fft, hop)


def log_mel(samples: Tensor, sample_rate: int, n_fft: int, hop: int, n_mels: int) -> Tensor:
    """Logarithm to base 10 of `mel_spectrum`, not below that of `FLOOR`.

    Returns:
        ``[..., n_mels, frames]``, from -5 up.
    """
    return mel_spectrum(samples, sample_rate, n_fft, hop, n_mels).clamp_min(FLOOR).log10()


def _mels(hertz: float) -> float:
    """Hz → mel."""
    return hertz / _LINEAR if hertz < _CORNER else _CORNER / _LINEAR + math.log(hertz / _CORNER) / _STEP
