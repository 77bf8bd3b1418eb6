import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from plait.errors import PlaitError
from plait.train.reconstruction import PIXEL_LOSSES, log_mse, ssim_loss, temporal_difference_loss


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed)) * 2 - 1


@pytest.mark.parametrize("shape", [(2, 3, 12, 13), (2, 3, 4, 12, 13)])
def test_each_loss_is_zero_or_least_at_the_original(shape: tuple[int, ...]) -> None:
    pixels, decoded = noise(*shape), noise(*shape, seed=1).requires_grad_()
    for name, loss in PIXEL_LOSSES.items():
        floor = math.log(1e-5) if name == "log_l2" else 0
        assert loss(pixels, pixels).item() == pytest.approx(floor, abs=1e-6)
        value = loss(decoded, pixels)
        assert value.shape == ()
        if name != "temporal" or len(shape) == 5:
            assert value.item() > floor
            (gradient,) = torch.autograd.grad(value, decoded)
            assert gradient.isfinite().all()
            assert gradient.any()


def test_pixel_losses_are_their_formulas() -> None:
    pixels, decoded = noise(2, 3, 4, 5), noise(2, 3, 4, 5, seed=1)
    differences = [(d - p) for d, p in zip(decoded.flatten().tolist(), pixels.flatten().tolist(), strict=True)]
    first, second = differences[:60], differences[60:]
    assert PIXEL_LOSSES["l1"](decoded, pixels).item() == pytest.approx(sum(map(abs, differences)) / 120)
    assert PIXEL_LOSSES["l2"](decoded, pixels).item() == pytest.approx(sum(x * x for x in differences) / 120)
    logs = [math.log(sum(x * x for x in item) / 60) for item in (first, second)]
    assert log_mse(decoded, pixels).item() == pytest.approx(sum(logs) / 2)


def test_log_mse_counts_halved_errors_the_same() -> None:
    pixels = noise(2, 3, 8, 8)
    errors = noise(2, 3, 8, 8, seed=1) * torch.tensor([1.0, 0.1]).view(2, 1, 1, 1)
    scales = torch.ones(2, 1, 1, 1).requires_grad_()
    log_mse(pixels + scales * errors, pixels).backward()
    assert scales.grad is not None
    torch.testing.assert_close(scales.grad.flatten(), torch.ones(2))


def window(values: list[list[float]], top: int, left: int, weights: list[list[float]]) -> float:
    return sum(weights[i][j] * values[top + i][left + j] for i in range(11) for j in range(11))


def test_ssim_is_its_formula() -> None:
    # Wang et al. 2004, with an 11×11 Gaussian of deviation 1.5, on values in [0, 1].
    gauss = [math.exp(-((i - 5) ** 2) / 4.5) for i in range(11)]
    weights = [[a * b / sum(gauss) ** 2 for a in gauss] for b in gauss]
    decoded, pixels = noise(1, 3, 12, 13), noise(1, 3, 12, 13, seed=1) * 0.5
    decoded = 0.6 * pixels + 0.4 * decoded
    values = []
    for x, y in zip(((decoded + 1) / 2)[0].tolist(), ((pixels + 1) / 2)[0].tolist(), strict=True):
        for top in range(2):
            for left in range(3):

                def mean(z: list[list[float]], at: tuple[int, int] = (top, left)) -> float:
                    return window(z, *at, weights)

                def product(a: list[list[float]], b: list[list[float]]) -> list[list[float]]:
                    return [[p * q for p, q in zip(r, s, strict=True)] for r, s in zip(a, b, strict=True)]

                mx, my = mean(x), mean(y)
                vx, vy = mean(product(x, x)) - mx * mx, mean(product(y, y)) - my * my
                cov = mean(product(x, y)) - mx * my
                luminance = (2 * mx * my + 1e-4) / (mx * mx + my * my + 1e-4)
                values.append(luminance * (2 * cov + 9e-4) / (vx + vy + 9e-4))
    assert ssim_loss(decoded, pixels).item() == pytest.approx(1 - sum(values) / len(values), abs=1e-5)


def test_ssim_of_a_clip_is_that_of_its_frames() -> None:
    decoded, pixels = noise(2, 3, 4, 12, 12), noise(2, 3, 4, 12, 12, seed=1)
    frames = torch.stack([ssim_loss(decoded[:, :, t], pixels[:, :, t]) for t in range(4)])
    torch.testing.assert_close(ssim_loss(decoded, pixels), frames.mean())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        torch.testing.assert_close(ssim_loss(decoded, pixels), frames.mean())


def test_ssim_names_pictures_that_are_too_small() -> None:
    with pytest.raises(PlaitError, match=r"ssim: pictures of 10×16 are smaller than its window"):
        ssim_loss(noise(1, 3, 10, 16), noise(1, 3, 10, 16))


@settings(deadline=None, max_examples=25)
@given(frames=st.integers(1, 6), seed=st.integers(0, 1000))
def test_temporal_difference_is_its_formula(frames: int, seed: int) -> None:
    decoded, pixels = noise(2, 3, frames, 2, 3, seed=seed), noise(2, 3, frames, 2, 3, seed=seed + 1)
    steps = [
        ((decoded[:, :, t + 1] - decoded[:, :, t]) - (pixels[:, :, t + 1] - pixels[:, :, t])).abs().mean().item()
        for t in range(frames - 1)
    ]
    expected = sum(steps) / len(steps) if steps else 0.0
    assert temporal_difference_loss(decoded, pixels).item() == pytest.approx(expected, rel=1e-4)
    assert temporal_difference_loss(decoded[:, :, 0], pixels[:, :, 0]).item() == 0


def test_temporal_difference_sees_flicker_and_no_constant_error() -> None:
    pixels = noise(1, 3, 5, 8, 8)
    flicker = torch.tensor([1.0, -1, 1, -1, 1]).view(1, 1, 5, 1, 1)
    assert temporal_difference_loss(pixels + 0.1, pixels).item() == pytest.approx(0, abs=1e-6)
    assert temporal_difference_loss(pixels + 0.1 * flicker, pixels).item() == pytest.approx(0.2, rel=1e-4)
