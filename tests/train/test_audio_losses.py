import math

import numpy as np
import pytest
import torch
from torch import Tensor

from plait.tokenizers.mel import mel_filters
from plait.train.audio_losses import WaveLosses, spectral_convergence
from plait.train.recipe import AudioLossConfig

RATE = 8000


def noise(*shape: int, seed: int = 0) -> Tensor:
    return (torch.rand(shape, generator=torch.Generator().manual_seed(seed)) * 2 - 1) / 4


def spectra(signal: np.ndarray, window: int) -> np.ndarray:
    """Magnitudes ``[T, F]``, one frame and one sum after the other."""
    hop, half = window // 4, window // 2
    padded = np.pad(signal, half, mode="reflect")
    hann = 0.5 - 0.5 * np.cos(2 * np.pi * np.arange(window) / window)
    hann /= np.sqrt((hann**2).sum())
    frames = [padded[i : i + window] * hann for i in range(0, len(padded) - window + 1, hop)]
    turns = np.exp(-2j * np.pi * np.outer(np.arange(half + 1), np.arange(window)) / window)
    return np.array([np.abs(turns @ frame) for frame in frames])


def plain(decoded: Tensor, samples: Tensor, config: AudioLossConfig) -> dict[str, float]:
    signals = [x.double().flatten(0, 1).numpy() for x in (decoded, samples)]
    terms = {"wave": float(np.mean([np.abs(a - b).mean() for a, b in zip(*signals, strict=True)]))}
    mel = 0.0
    for window, count in zip(config.windows, config.mels, strict=True):
        filters = mel_filters(RATE, window, count).double().numpy()
        filters = filters / np.maximum(filters.sum(0), 1e-8)
        bands = [[np.log10(spectra(x, window) @ filters + config.floor) for x in signal] for signal in signals]
        mel += np.mean([np.abs(a - b).mean() for a, b in zip(*bands, strict=True)])
    stft = 0.0
    for window in config.stft_windows:
        magnitudes = [np.array([spectra(x, window) for x in signal]) for signal in signals]
        ours, theirs = (m.reshape(len(decoded), -1) for m in magnitudes)
        stft += np.mean(np.linalg.norm(ours - theirs, axis=1) / np.linalg.norm(theirs, axis=1))
        stft += np.abs(np.log(ours + config.floor) - np.log(theirs + config.floor)).mean()
    return terms | {"mel": float(mel), "stft": float(stft) / len(config.stft_windows)}


@pytest.mark.parametrize("channels", [1, 2])
def test_terms_are_their_formulas(channels: int) -> None:
    config = AudioLossConfig(0.5, 2.0, 3.0, (32, 64, 256), (5, 10, 40), (64, 128), 1e-4)
    decoded, samples = noise(3, channels, 700), noise(3, channels, 700, seed=1)
    samples[1] *= 0.01
    found = WaveLosses(config, RATE)(decoded, samples)
    for name, value in plain(decoded, samples, config).items():
        assert float(found[name]) == pytest.approx(value, rel=1e-4), name


def test_default_scales_are_those_of_dac() -> None:
    config = AudioLossConfig()
    assert config.windows == tuple(2**i for i in range(5, 12))
    assert config.mels == tuple(5 * 2**i for i in range(7))
    assert WaveLosses(config, 44100)(noise(1, 1, 16758), noise(1, 1, 16758, seed=1)).keys() == {"mel"}


def test_a_term_without_a_weight_is_left_out() -> None:
    losses = WaveLosses(AudioLossConfig(wave=1, mel=0, stft=0), RATE)
    assert losses.windows == []
    assert losses(noise(1, 1, 8), noise(1, 1, 8)).keys() == {"wave"}


def test_equal_sound_has_no_loss_and_a_number_as_its_gradient() -> None:
    for samples in (noise(2, 1, 600), torch.zeros(2, 1, 600)):
        decoded = samples.clone().requires_grad_()
        terms = WaveLosses(AudioLossConfig(1, 1, 1, (64,), (10,), (64,)), RATE)(decoded, samples)
        assert all(float(term.detach()) < 1e-4 for term in terms.values())
        sum(terms.values()).backward()
        assert decoded.grad is not None
        assert decoded.grad.isfinite().all()


def test_silence_is_compared_with_the_floor() -> None:
    decoded = noise(1, 1, 600).requires_grad_()
    terms = WaveLosses(AudioLossConfig(0, 1, 1, (64,), (10,), (64,), 1e-3), RATE)(decoded, torch.zeros(1, 1, 600))
    assert 1 < terms["mel"].item() < 4
    # Relative to noise at the floor.
    assert 10 < terms["stft"].item() < 1e3
    (gradient,) = torch.autograd.grad(terms["mel"], decoded)
    # What is too loud is made softer.
    assert (gradient * decoded).sum().item() > 0


def test_white_noise_has_its_own_level_in_every_band_and_window() -> None:
    samples = torch.randn(1, 1, 40000, generator=torch.Generator().manual_seed(0)) * 0.1
    for window in (64, 512, 2048):
        losses = WaveLosses(AudioLossConfig(windows=(window,), mels=(8,)), RATE)
        # Against silence, a term is how far the level is above the floor.
        level = 1e-5 * 10 ** float(losses(samples, torch.zeros_like(samples))["mel"])
        assert level == pytest.approx(0.1 * math.sqrt(math.pi) / 2, rel=0.08)  # the mean of a Rayleigh variable


def test_the_mean_over_items_is_that_of_parts() -> None:
    # So that passes and processes can be averaged; one item is much louder.
    losses = WaveLosses(AudioLossConfig(1, 1, 1, (64,), (10,), (64, 128)), RATE)
    decoded, samples = noise(4, 1, 600), noise(4, 1, 600, seed=1) * torch.tensor([1, 0.01, 1, 3])[:, None, None]
    whole = losses(decoded, samples)
    parts = [losses(a, b) for a, b in zip(decoded.split(2), samples.split(2), strict=True)]
    for name, term in whole.items():
        assert float(term) == pytest.approx(sum(float(part[name]) for part in parts) / 2, rel=1e-5), name


def test_spectral_convergence_of_halved_sound_is_a_half() -> None:
    magnitudes = noise(3, 5, 7).abs()
    assert float(spectral_convergence(magnitudes / 2, magnitudes, 1e-5)) == pytest.approx(0.5, rel=1e-4)
