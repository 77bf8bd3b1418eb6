import pytest
import torch
from transformers.audio_utils import mel_filter_bank

from plait.tokenizers.mel import log_mel, magnitudes, mel_filters, mel_spectrum


@pytest.mark.parametrize(
    ("rate", "n_fft", "n_mels", "low", "high"),
    [
        (16000, 2048, 150, 0.0, None),
        (16000, 512, 80, 0.0, None),
        (24000, 1024, 100, 0.0, None),
        (44100, 2048, 320, 0.0, None),
        (22050, 1024, 80, 40.0, 7600.0),
        (48000, 32, 5, 0.0, None),
        (8000, 256, 20, 1200.0, 3000.0),
    ],
)
def test_filters_are_those_of_librosas_formula(rate: int, n_fft: int, n_mels: int, low: float, high: float) -> None:
    found = mel_filters(rate, n_fft, n_mels, low, high)
    expected = mel_filter_bank(
        n_fft // 2 + 1, n_mels, low, rate / 2 if high is None else high, rate, norm="slaney", mel_scale="slaney"
    )
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, torch.from_numpy(expected).float(), rtol=1e-5, atol=1e-9)


def test_magnitudes_are_those_of_a_plain_fourier_transform() -> None:
    n_fft, hop = 64, 16
    samples = torch.randn(2, 3, 200, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    found = magnitudes(samples, n_fft, hop)
    assert found.shape == (2, 3, 33, 200 // hop + 1)
    window = 0.5 - 0.5 * torch.cos(2 * torch.pi * torch.arange(n_fft, dtype=torch.float64) / n_fft)
    for frame in (2, 5, 9):  # whose windows lie inside
        part = samples[..., frame * hop - n_fft // 2 : frame * hop + n_fft // 2] * window
        torch.testing.assert_close(found[..., frame], torch.fft.rfft(part).abs())
    mirrored = torch.cat([samples[..., 1 : n_fft // 2 + 1].flip(-1), samples[..., : n_fft // 2]], -1)
    torch.testing.assert_close(found[..., 0], torch.fft.rfft(mirrored * window).abs())


def test_a_tone_is_loudest_in_its_own_band() -> None:
    rate, n_fft, n_mels = 16000, 1024, 40
    time = torch.arange(rate) / rate
    centres = mel_filters(rate, n_fft, n_mels).argmax(0) * rate / n_fft
    for band in (10, 20, 35):
        tone = torch.sin(2 * torch.pi * centres[band] * time)
        assert int(log_mel(tone, rate, n_fft, 256, n_mels).mean(-1).argmax()) == band


def test_silence_is_at_the_floor_and_short_sound_has_a_spectrum() -> None:
    assert (log_mel(torch.zeros(1, 1, 5000), 16000, 512, 128, 80) == -5).all()
    assert mel_spectrum(torch.ones(1, 7), 16000, 512, 128, 80).shape == (1, 80, 5)
    assert mel_spectrum(torch.ones(1, 7), 16000, 512, 128, 80).sum() > 0
