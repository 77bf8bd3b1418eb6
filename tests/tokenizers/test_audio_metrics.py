import math
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers.audio_utils import mel_filter_bank

from plait.errors import PlaitError
from plait.tokenizers import audio_metrics as module
from plait.tokenizers.audio_metrics import (
    MEASURES,
    mel_distance,
    pesq,
    si_sdr,
    stft_distance,
    stoi,
    visqol,
    visqol_mapper,
    visqol_mode,
)
from plait.tokenizers.sound import read_sound

SPEECH = Path(__file__).parents[1] / "data" / "speech"


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * 0.1


@pytest.fixture(scope="module")
def speech() -> Tensor:
    """Two seconds and a half ``[1, n]`` at 16 kHz."""
    paths = sorted(SPEECH.rglob("*.flac"))
    samples = torch.cat([read_sound(path, sample_rate=16000, channels=1).samples for path in paths[:3]], 1)
    return samples[:, :40000]


# SI-SDR


def test_si_sdr_is_the_papers_formula() -> None:
    s, e = noise(4, 1, 500), noise(4, 1, 500) + noise(4, 1, 500, seed=1) * 0.3 + 0.2
    found = si_sdr(s, e)
    for i in range(4):
        a, b = (np.asarray(x[i, 0]) - np.asarray(x[i, 0]).mean() for x in (s, e))
        target = (a @ b) / (a @ a) * a
        expected = 10 * np.log10((target @ target) / ((b - target) @ (b - target)))
        assert float(found[i]) == pytest.approx(expected, abs=1e-4)


@given(st.floats(-30, 60), st.floats(0.01, 20), st.floats(-0.5, 0.5), st.booleans())
@settings(max_examples=40, deadline=None)
def test_si_sdr_tells_the_noise_and_no_gain(decibels: float, gain: float, offset: float, flipped: bool) -> None:
    s = noise(1, 2, 400)
    s = s - s.mean(-1, keepdim=True)
    rest = noise(1, 2, 400, seed=1)
    rest = rest - rest.mean(-1, keepdim=True)
    rest = rest - (rest * s).sum() / s.square().sum() * s  # what no multiple of s explains
    rest = rest * (s.square().sum() / rest.square().sum() / 10 ** (decibels / 10)).sqrt()
    heard = gain * (-1 if flipped else 1) * (s + rest) + offset
    assert float(si_sdr(s, heard)) == pytest.approx(decibels, abs=1e-3)


def test_si_sdr_of_extremes() -> None:
    s = noise(1, 1, 300).float()
    silent, constant = torch.zeros_like(s), torch.full_like(s, 0.3)
    assert si_sdr(s, s).item() == si_sdr(s, 0.25 * s).item() == 100
    assert si_sdr(s, silent).item() == si_sdr(s, constant).item() == -100
    for nothing in (silent, constant):
        assert math.isnan(si_sdr(nothing, s).item())
    turned = torch.tensor([[[1.0, -1.0, 1.0, -1.0]]]), torch.tensor([[[1.0, 1.0, -1.0, -1.0]]])
    assert si_sdr(*turned).item() == -100  # orthogonal
    together = si_sdr(torch.cat([s, silent]), torch.cat([s, s]))
    assert together[0] == 100
    assert together[1].isnan()
    assert MEASURES["si_sdr"](silent[0], s[0], 16000) is None


# Spectral distances


def spectra(samples: Tensor, window: int) -> np.ndarray:
    """Magnitudes, frame by frame by NumPy."""
    padded = np.pad(np.asarray(samples), window // 2, mode="reflect")
    hann = 0.5 - 0.5 * np.cos(2 * np.pi * np.arange(window) / window)
    starts = range(0, len(samples) + 1, window // 4)
    return np.stack([np.abs(np.fft.rfft(hann * padded[i : i + window])) for i in starts], 1)


@pytest.mark.parametrize("rate", [16000, 44100])
def test_distances_are_dacs_formulas(rate: int) -> None:
    a, b = noise(2, 1, 5000), noise(2, 1, 5000, seed=1) * 0.3
    a[:, :, 2000:3000] = 0  # below the floor
    found = {"mel": mel_distance(a, b, rate), "stft": stft_distance(a, b)}
    for i in range(2):
        expected = {"mel": 0.0, "stft": 0.0}
        for window, bands in ((2048, 150), (512, 80)):
            filters = mel_filter_bank(
                window // 2 + 1, bands, 0.0, rate / 2, rate, norm="slaney", mel_scale="slaney"
            )  # fmt: skip
            for kind, matrix in (("mel", filters.T), ("stft", np.eye(window // 2 + 1))):
                x, y = (matrix @ spectra(signal[i, 0], window) for signal in (a, b))
                logarithms = np.log10(np.maximum(x, 1e-5) ** 2) - np.log10(np.maximum(y, 1e-5) ** 2)
                expected[kind] += np.abs(logarithms).mean() + np.abs(x - y).mean()
        for kind in expected:
            assert float(found[kind][i]) == pytest.approx(expected[kind], rel=1e-4)


def test_distances_are_zero_of_equals_and_the_mean_over_channels() -> None:
    a, b = noise(1, 2, 4000), noise(1, 2, 4000, seed=1)
    for distance in (lambda x, y: mel_distance(x, y, 16000), stft_distance):
        assert float(distance(a, a)) == 0
        assert float(distance(a, b)) == pytest.approx(
            float(distance(a[:, :1], b[:, :1]) + distance(a[:, 1:], b[:, 1:])) / 2
        )
    assert float(mel_distance(torch.zeros(1, 1, 100), torch.zeros(1, 1, 100), 16000)) == 0  # shorter than a window


def test_sound_of_other_length_is_refused(speech: Tensor) -> None:
    for name, measure in MEASURES.items():
        with pytest.raises(PlaitError, match=r"\(.*\) and \(.*\) differ"):
            measure(speech, speech[:, :-1], 16000)
        assert name


# Listening models


@pytest.mark.parametrize(
    ("name", "best"), [("stoi", 1.0), ("estoi", 1.0), ("pesq_wb", 4.644), ("pesq_nb", 4.549), ("visqol", 5.0)]
)
def test_listeners_put_noise_in_order(speech: Tensor, name: str, best: float) -> None:
    pytest.importorskip({"estoi": "pystoi", "stoi": "pystoi", "visqol": "visqol"}.get(name, "pesq"))
    measure, speech = MEASURES[name], speech[:, :24000]
    assert measure(speech, speech, 16000) == pytest.approx(best, abs=2e-3)
    rest = noise(*speech.shape).float()
    scores = [measure(speech, speech + level * rest, 16000) for level in (0.003, 0.1, 3)]
    assert best > scores[0] > scores[1] > scores[2] - 1e-6  # type: ignore[operator]


def test_listeners_are_those_of_their_packages(speech: Tensor) -> None:
    pystoi, package = pytest.importorskip("pystoi"), pytest.importorskip("pesq")
    heard = (speech + noise(*speech.shape) * 0.2).float()
    a, b = speech[0].numpy(), heard[0].numpy()
    assert stoi(speech, heard, 16000) == pytest.approx(pystoi.stoi(a, b, 16000), abs=1e-6)
    assert pesq(speech, heard, 16000) == pytest.approx(package.pesq(16000, a, b, "wb"), abs=1e-3)
    assert pesq(speech, heard, 16000, wide=False) == pytest.approx(package.pesq(16000, a, b, "nb"), abs=1e-3)
    # Channels are mixed into one: noise that is opposite on both sides is not there.
    rest = noise(*speech.shape).float()
    both, apart = torch.cat([speech, speech]), torch.cat([speech + rest, speech - rest])
    assert pesq(both, apart, 16000) == pytest.approx(4.644, abs=1e-2)


def test_sound_at_other_rates_is_brought_to_the_listeners(speech: Tensor) -> None:
    pytest.importorskip("pesq")
    low = read_sound(sorted(SPEECH.rglob("*.flac"))[0], sample_rate=8000, channels=1).samples
    assert pesq(low, low, 8000, wide=False) == pytest.approx(4.549, abs=1e-3)
    with pytest.raises(PlaitError, match="needs 16 kHz, and the sound has 8000 Hz"):
        pesq(low, low, 8000)
    high = read_sound(sorted(SPEECH.rglob("*.flac"))[0], sample_rate=48000, channels=1).samples
    assert pesq(high, high * 0.5, 48000) == pytest.approx(4.644, abs=1e-3)
    assert [visqol_mode(rate) for rate in (8000, 16000, 24000, 44100, 48000)] == ["speech"] * 3 + ["audio"] * 2
    assert visqol_mapper(48000) == "support vectors"


@pytest.mark.parametrize("measure", [stoi, pesq, visqol])
def test_where_there_is_nothing_to_hear_there_is_no_value(speech: Tensor, measure: module.Measure) -> None:
    pytest.importorskip({"stoi": "pystoi"}.get(measure.__name__, measure.__name__))
    silent = torch.zeros_like(speech)
    assert measure(silent, speech, 16000) is None
    assert measure(silent, silent, 16000) is None
    assert measure(speech[:, 20000:20400], speech[:, 20000:20400], 16000) is None  # 25 ms
    assert measure(speech[:, 20000:20010], speech[:, 20000:20010], 16000) is None


def test_long_sound_of_many_words_does_not_break_pesq() -> None:
    pytest.importorskip("pesq")
    n = 16000 * 60
    bursts = (noise(1, n) * ((torch.arange(n) % 6400) < 3200)).float()  # 0.2 s of noise, 0.2 s of silence
    score = pesq(bursts, bursts, 16000)
    assert score == pytest.approx(4.644, abs=1e-2)
    changed = bursts.clone()
    changed[:, module.PESQ_SECONDS * 16000 :] = 0
    assert pesq(bursts, changed, 16000) == score


@pytest.mark.parametrize("name", ["stoi", "pesq_wb", "visqol"])
def test_a_missing_package_is_named(speech: Tensor, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(module: str) -> None:
        raise ImportError(module)

    monkeypatch.setattr(module, "import_module", missing)
    module._visqol.cache_clear()
    with pytest.raises(PlaitError, match="pip install ('plait\\[audio\\]'|visqol-python)$"):
        MEASURES[name](speech, speech, 16000)
