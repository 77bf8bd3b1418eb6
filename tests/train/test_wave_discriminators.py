from itertools import pairwise
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from plait.errors import PlaitError
from plait.train.wave_discriminators import (
    BandDiscriminator,
    PeriodDiscriminator,
    SpectrumDiscriminator,
    WaveDiscriminatorConfig,
    WaveDiscriminators,
    complex_spectra,
)

SMALL = {"periods": (2, 3), "stft_windows": (128, 64), "band_windows": (128,), "width": 4}
ALL = ("period", "stft", "bands")


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def parameters(network: torch.nn.Module) -> int:
    """Of the convolutions themselves: a normalised weight has one more for each output."""
    return sum(p.numel() for name, p in network.named_parameters() if "original0" not in name)


def test_published_sizes() -> None:
    torch.manual_seed(0)
    # HiFi-GAN: 1 → 32 → 128 → 512 → 1024 → 1024 → 1 with kernels of 5 and 3.
    widths = (1, 32, 128, 512, 1024, 1024)
    hifi = sum(5 * a * b + b for a, b in pairwise(widths)) + 3 * 1024 + 1
    assert parameters(PeriodDiscriminator(2, 32)) == hifi
    # EnCodec: five convolutions of 32 channels over real and imaginary part, and one to logits.
    spectrum = (2 * 27 * 32 + 32) + 3 * (32 * 27 * 32 + 32) + (32 * 9 * 32 + 32) + (32 * 9 + 1)
    assert parameters(SpectrumDiscriminator(1024, 32)) == spectrum
    bands = 5 * ((2 * 27 * 32 + 32) + 3 * (32 * 27 * 32 + 32) + (32 * 9 * 32 + 32)) + (32 * 9 + 1)
    assert parameters(BandDiscriminator(512, 32)) == bands


def test_period_discriminator_is_its_formula() -> None:
    torch.manual_seed(0)
    network = PeriodDiscriminator(3, 2)
    samples = noise(2, 1, 100)
    found = network(samples)
    # Each column is a signal of its own, every third sample; two reflected samples fill up the last row.
    filled = torch.cat([samples, samples[..., [98, 97]]], -1)
    for column in range(3):
        x = filled[..., column::3]
        for i, layer in enumerate(network.layers):
            v, g = layer.parametrizations.weight.original1, layer.parametrizations.weight.original0
            weight = g * v / v.flatten(1).norm(dim=1)[:, None, None, None]
            x = F.leaky_relu(F.conv1d(x, weight[..., 0], layer.bias, stride=3 if i < 4 else 1, padding=2), 0.1)
            assert torch.allclose(found.features[i][..., column], x, atol=1e-6)
        logits = F.conv1d(x, network.last.weight[..., 0], network.last.bias, padding=1)
        assert torch.allclose(found.logits[..., column], logits, atol=1e-6)


def test_spectra_are_those_of_whole_windows() -> None:
    samples = noise(2, 1, 200)
    found = complex_spectra(samples, 64)
    assert found.shape == (2, 2, 1 + (200 - 64) // 16, 33)
    hann = torch.hann_window(64)
    frame = torch.fft.rfft(samples[1, 0, 48:112] * hann / hann.norm())
    assert torch.allclose(found[1, 0, 3], frame.real, atol=1e-5)
    assert torch.allclose(found[1, 1, 3], frame.imag, atol=1e-5)


def test_bands_see_their_own_frequencies_only() -> None:
    torch.manual_seed(0)
    network = BandDiscriminator(128, 4)
    assert network.bands == [(0, 6), (6, 16), (16, 32), (32, 48), (48, 65)]
    time = torch.arange(1000) / 1000
    # Bin 24 of 64 lies in the middle of the third band.
    tone = torch.sin(2 * torch.pi * 24 / 128 * 1000 * time)[None, None]
    before, after = (network(x).features for x in (tone, 0.5 * tone))
    moved = [float((a - b).abs().max()) for a, b in zip(before[::5], after[::5], strict=True)]
    assert moved[2] > 100 * max(moved[:2] + moved[3:])


@pytest.mark.parametrize("kind", ALL)
def test_what_is_judged(kind: str) -> None:
    torch.manual_seed(0)
    networks = WaveDiscriminators(WaveDiscriminatorConfig(kinds=(kind,), **SMALL))
    samples = noise(3, 2, 500).requires_grad_()
    judged = networks(samples)
    assert len(judged) == {"period": 2, "stft": 2, "bands": 1}[kind]
    for judgement in judged:
        assert len(judgement.logits) == 6  # channels one by one
        assert judgement.logits.shape[1] == 1
        assert len(judgement.features) == (25 if kind == "bands" else 5)
    # Items do not mix, nor does their level or mean matter.
    alone = networks(samples[1:2] * 0.3 + 0.1)
    for all_, one in zip(judged, alone, strict=True):
        assert torch.allclose(all_.logits[2:4], one.logits, atol=1e-3)
    torch.stack([judgement.logits.mean() for judgement in judged]).sum().backward()
    assert samples.grad is not None
    assert samples.grad.abs().flatten(1).sum(1).min() > 0
    assert all(p.grad is not None for p in networks.parameters())


def test_silence_is_judged() -> None:
    networks = WaveDiscriminators(WaveDiscriminatorConfig(kinds=ALL, **SMALL))
    samples = torch.zeros(1, 1, 300, requires_grad=True)
    torch.stack([j.logits.mean() for j in networks(samples)]).sum().backward()
    assert samples.grad is not None
    assert samples.grad.isfinite().all()


def test_sound_that_is_too_short() -> None:
    config = WaveDiscriminatorConfig(kinds=ALL, **SMALL)
    assert config.least_samples == 128
    assert len(WaveDiscriminators(config)(torch.zeros(1, 1, 128))) == 5
    with pytest.raises(PlaitError, match=r"samples: 127 of them are fewer than the 128 of the longest window"):
        WaveDiscriminators(config)(torch.zeros(1, 1, 127))
    assert WaveDiscriminatorConfig(kinds=("period",)).least_samples == 11


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"kinds": ("scale",)}, r"kinds is \['scale'\], must name some of period, stft, bands"),
        ({"kinds": ()}, r"kinds is \[\]"),
        ({"periods": (1,)}, r"periods is \(1,\), must list whole numbers from 2 up"),
        ({"periods": ()}, r"periods is empty, but kinds has 'period'"),
        ({"stft_windows": (66,)}, r"stft_windows is \(66,\), must list multiples of 4 from 64 up"),
        ({"band_windows": (32,)}, r"band_windows is \(32,\)"),
        ({"width": 0}, r"width is 0"),
    ],
)
def test_bad_configuration(settings: dict[str, Any], reason: str) -> None:
    with pytest.raises(PlaitError, match=f"^discriminator: {reason}"):
        WaveDiscriminatorConfig(**settings)
