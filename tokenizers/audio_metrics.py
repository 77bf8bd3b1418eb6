"""Figures of how near reconstructed sound is to its original.

Sound is ``[B, C, N]`` (items of one length) or ``[C, N]`` (one item), floating point in ``[-1, 1]``. The original comes
first. No figure aligns in time: sample n of one belongs to sample n of the other, and both have one length; what is
delayed is to be shifted before.

The figures of PyTorch need nothing else. Those of listening models come from other packages, which are imported when
they are asked for: pystoi and pesq (``pip install 'plait[audio]'``) and visqol-python.
"""

import math
import warnings
from collections.abc import Callable
from functools import lru_cache
from importlib import import_module
from importlib.util import find_spec
from types import ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor

from plait.errors import PlaitError
from plait.tokenizers.media import Audio
from plait.tokenizers.mel import FLOOR, magnitudes, mel_spectrum
from plait.tokenizers.sound import to_samples

# Samples per window of the spectral distances, and mel bands; hops are a quarter of a window.
WINDOWS = (2048, 512)
MEL_BANDS = (150, 80)

# PESQ's reference code writes past its arrays with more than 50 utterances, each of at least 0.2 s with 0.2 s between.
PESQ_SECONDS = 20

# SI-SDR is from minus to plus this.
SI_SDR_LIMIT = 100.0


def si_sdr(original: Tensor, reconstruction: Tensor) -> Tensor:
    """Scale-invariant signal-to-distortion ratio (Le Roux et al., "SDR – half-baked or well done?", arXiv 1811.02508).

    What of the reconstruction is a multiple of the original, against the rest of it: ``10 log10(|α s|² / |ŝ − α s|²)``
    with ``α = ⟨ŝ, s⟩ / |s|²``, after each channel's mean is taken out. All channels have one α.

    Args:
        original: s, ``[B, C, N]``.
        reconstruction: ŝ, the same shape.

    Returns:
        ``[B]`` in dB, within ±`SI_SDR_LIMIT`: equal sound has the upper, a silent or unrelated reconstruction the
        lower bound. NaN where the original is silent, of which no multiple differs.
    """
    _check_pair(original, reconstruction)
    s, e = _centred(original), _centred(reconstruction)
    power = s.square().sum(1)
    target = ((e * s).sum(1) / power)[:, None] * s
    ratio = 10 * torch.log10(target.square().sum(1) / (e - target).square().sum(1))
    ratio = ratio.where(e.any(1), -SI_SDR_LIMIT).clamp(-SI_SDR_LIMIT, SI_SDR_LIMIT)
    return ratio.masked_fill(power == 0, math.nan).float()


def mel_distance(original: Tensor, reconstruction: Tensor, sample_rate: int) -> Tensor:
    """Mean absolute differences of mel spectra, as in DAC's evaluation (Kumar et al., arXiv 2306.06546).

    The sum over two scales (windows of 2048 samples with 150 bands and of 512 with 80; hop a quarter of a window,
    periodic Hann, Slaney's mel scale) of the difference of ``log10(max(M, 1e-5)²)`` and the difference of M itself, M
    being magnitudes. It depends on the sample rate: compare at one.

    Args:
        original: ``[B, C, N]``.
        reconstruction: the same shape.
        sample_rate: Hz.

    Returns:
        ``[B]``, 0 for equal sound.
    """
    _check_pair(original, reconstruction)
    distances = [
        _distance(*(mel_spectrum(x, sample_rate, window, window // 4, bands) for x in (original, reconstruction)))
        for window, bands in zip(WINDOWS, MEL_BANDS, strict=True)
    ]
    return torch.stack(distances).sum(0)


def stft_distance(original: Tensor, reconstruction: Tensor) -> Tensor:
    """As `mel_distance`, of the magnitudes of all frequencies (DAC's STFT distance).

    Args:
        original: ``[B, C, N]``.
        reconstruction: the same shape.

    Returns:
        ``[B]``, 0 for equal sound.
    """
    _check_pair(original, reconstruction)
    distances = [_distance(*(magnitudes(x, w, w // 4) for x in (original, reconstruction))) for w in WINDOWS]
    return torch.stack(distances).sum(0)


def stoi(original: Tensor, reconstruction: Tensor, sample_rate: int, extended: bool = False) -> float | None:
    """Short-time objective intelligibility, of speech (Taal et al., IEEE TASLP 2011), by pystoi, at 10 kHz.

    Args:
        original: ``[C, N]``; channels are mixed into one.
        reconstruction: the same shape.
        sample_rate: Hz.
        extended: ESTOI (Jensen and Taal, IEEE TASLP 2016), which is stricter.

    Returns:
        at most 1; None if less than about 0.4 s of the original is louder than 40 dB below its loudest part.

    Raises:
        PlaitError: pystoi is not installed.
    """
    package = _imported("pystoi", "STOI", "'plait[audio]'")
    a, b = _mono(original, reconstruction, sample_rate, sample_rate)
    if not a.any() or len(a) < sample_rate * 0.05:  # less than a window
        return None
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        score = float(package.stoi(a, b, sample_rate, extended=extended))
    too_short = any("Not enough STFT frames" in str(warning.message) for warning in caught)
    return None if too_short or math.isnan(score) else score


def pesq(original: Tensor, reconstruction: Tensor, sample_rate: int, wide: bool = True) -> float | None:
    """Perceptual evaluation of speech quality (ITU-T P.862), by the package pesq, of the first `PESQ_SECONDS`.

    Args:
        original: ``[C, N]``; channels are mixed into one.
        reconstruction: the same shape.
        sample_rate: Hz.
        wide: wide band (P.862.2), at 16 kHz; else narrow band (P.862.1), at 16 kHz, or 8 kHz for sound of less.

    Returns:
        MOS-LQO, from about 1 to 4.64 (wide) or 4.55 (narrow); None if PESQ finds no speech in the original, or less
        than a quarter of a second.

    Raises:
        PlaitError: pesq is not installed, or wide band of sound that has none: below 16 kHz.
    """
    if wide and sample_rate < 16000:
        raise PlaitError(f"wide-band PESQ needs 16 kHz, and the sound has {sample_rate} Hz")
    package = _imported("pesq", "PESQ", "'plait[audio]'")
    rate = 16000 if sample_rate >= 16000 else 8000
    a, b = (x[: PESQ_SECONDS * rate] for x in _mono(original, reconstruction, sample_rate, rate))
    if not a.any() or not b.any():
        return None
    try:
        return float(package.pesq(rate, a, b, "wb" if wide else "nb"))
    except (package.NoUtterancesError, package.BufferTooShortError):
        return None


def visqol(original: Tensor, reconstruction: Tensor, sample_rate: int) -> float | None:
    """Virtual speech quality objective listener 3 (Chinen et al., arXiv 2004.09584), by visqol-python.

    Speech mode at 16 kHz for sound of up to 24 kHz, audio mode at 48 kHz above; see `visqol_mode`. Takes about half a
    second per second of sound.

    Args:
        original: ``[C, N]``; channels are mixed into one.
        reconstruction: the same shape.
        sample_rate: Hz.

    Returns:
        MOS-LQO, from 1 to 5; None for sound that is too short or has nothing to compare.

    Raises:
        PlaitError: visqol-python is not installed.
    """
    mode = visqol_mode(sample_rate)
    listener = _visqol(mode)
    rate = 48000 if mode == "audio" else 16000
    a, b = _mono(original, reconstruction, sample_rate, rate)
    if not a.any() or not b.any():
        return None
    try:
        score = float(listener.measure_from_arrays(a, b, rate).moslqo)
    except (ValueError, IndexError, RuntimeError):  # its ways to say that there are not enough patches
        return None
    return None if math.isnan(score) else score


def visqol_mode(sample_rate: int) -> str:
    """ViSQOL's mode for sound of this rate: "speech" or "audio"."""
    return "audio" if sample_rate > 24000 else "speech"


def visqol_mapper(sample_rate: int) -> str:
    """What turns ViSQOL's similarity into a score here; scores of different ones do not compare."""
    if visqol_mode(sample_rate) == "audio":
        return "support vectors"
    return "lattice" if _has_lattice() else "polynomial, which may be too high by 1 to 2"


def _has_lattice() -> bool:
    """Whether visqol-python's optional mapper of speech can run."""
    return find_spec("ai_edge_litert") is not None


@lru_cache
def _visqol(mode: str) -> Any:
    listener = _imported("visqol", "ViSQOL", "visqol-python").VisqolApi()
    listener.create(mode=mode, use_lattice_model=_has_lattice())
    return listener


def _imported(module: str, name: str, package: str) -> ModuleType:
    """Import what brings a figure.

    Raises:
        PlaitError: it is not installed.
    """
    try:
        return import_module(module)
    except ImportError:
        raise PlaitError(f"{name} needs {module}; pip install {package}") from None


def _check_pair(original: Tensor, reconstruction: Tensor) -> None:
    if original.shape != reconstruction.shape:
        shapes = f"{tuple(original.shape)} and {tuple(reconstruction.shape)}"
        raise PlaitError(f"samples: {shapes} differ; figures compare sound of one length, sample by sample")


def _centred(samples: Tensor) -> Tensor:
    """``[B, C, N]`` → float64 ``[B, C·N]`` without each channel's mean; exactly 0 where only rounding is left."""
    samples = samples.double()
    centred = samples - samples.mean(-1, keepdim=True)
    there = centred.square().sum((1, 2), keepdim=True) > 1e-20 * samples.square().sum((1, 2), keepdim=True)
    return centred.where(there, 0).flatten(1)


def _distance(a: Tensor, b: Tensor) -> Tensor:
    """Mean absolute difference of magnitudes and of their log10 squares, ``[B, ...]`` → ``[B]``."""
    logarithms = 2 * (a.clamp_min(FLOOR).log10() - b.clamp_min(FLOOR).log10())
    return logarithms.abs().flatten(1).mean(1) + (a - b).abs().flatten(1).mean(1)


def _mono(original: Tensor, reconstruction: Tensor, sample_rate: int, rate: int) -> tuple[Any, Any]:
    """Both ``[C, N]`` as float64 arrays ``[n]`` at another rate."""
    _check_pair(original, reconstruction)
    a, b = (to_samples(Audio(x.cpu().float(), sample_rate), rate, 1) for x in (original, reconstruction))
    return np.asarray(a[0, 0], np.float64), np.asarray(b[0, 0], np.float64)


# By name, what is measured of each item: ``[C, N]`` twice and Hz → a number, or None where it has no value.
Measure = Callable[[Tensor, Tensor, int], float | None]
MEASURES: dict[str, Measure] = {
    "si_sdr": lambda a, b, rate: _number(si_sdr(a[None], b[None])),
    "mel_distance": lambda a, b, rate: _number(mel_distance(a[None], b[None], rate)),
    "stft_distance": lambda a, b, rate: _number(stft_distance(a[None], b[None])),
    "stoi": stoi,
    "estoi": lambda a, b, rate: stoi(a, b, rate, extended=True),
    "pesq_wb": pesq,
    "pesq_nb": lambda a, b, rate: pesq(a, b, rate, wide=False),
    "visqol": visqol,
}


def _number(score: Tensor) -> float | None:
    return None if score.isnan().any() else float(score)
