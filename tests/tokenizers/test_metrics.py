import math
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.multiprocessing as multiprocessing
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from plait.errors import PlaitError
from plait.tokenizers.metrics import (
    CodebookUse,
    FeatureMoments,
    frechet_distance,
    ms_ssim,
    per_frame,
    psnr,
    ssim,
    temporal_psnr,
)


def pictures(*shape: int, seed: int = 0) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def blurred(pixels: Tensor) -> Tensor:
    """Like a reconstruction: the same picture, but for noise and contrast."""
    return (pixels * 0.8 + pictures(*pixels.shape, seed=9) * 0.2).clamp(-1, 1)


def test_psnr_is_the_plain_formula_per_image() -> None:
    generator = np.random.default_rng(0)
    a, b = generator.integers(0, 256, (2, 3, 3, 7, 5)).astype(np.float64)
    expected = [10 * math.log10(255**2 / ((x - y) ** 2).mean()) for x, y in zip(a, b, strict=True)]
    found = psnr(torch.from_numpy(a / 127.5 - 1).float(), torch.from_numpy(b / 127.5 - 1).float())
    assert found.tolist() == pytest.approx(expected, abs=1e-4)


def test_psnr_ignores_what_a_picture_cannot_show() -> None:
    white = torch.ones(1, 3, 2, 2)
    assert psnr(white * 9, white).item() == psnr(white, white).item() > 100
    assert psnr(white, -white).item() == pytest.approx(0, abs=1e-5)


def test_psnr_of_a_clip_is_over_all_its_frames() -> None:
    a = torch.zeros(1, 3, 2, 4, 4)
    b = a.clone()
    b[:, :, 1] = 0.2  # mean squared error 0.02, whatever the frames alone have
    assert psnr(a, b).item() == pytest.approx(10 * math.log10(4 / 0.02), abs=1e-4)


def test_temporal_psnr_is_that_of_neighbouring_frames_differences() -> None:
    a, b = pictures(2, 3, 4, 5, 6), pictures(2, 3, 4, 5, 6, seed=1)
    x, y = a.numpy().astype(np.float64), b.numpy().astype(np.float64)
    expected = []
    for i in range(2):
        errors = [((x[i, :, t + 1] - x[i, :, t]) - (y[i, :, t + 1] - y[i, :, t])) ** 2 for t in range(3)]
        expected.append(10 * math.log10(4 / np.mean(errors)))
    assert temporal_psnr(a, b).tolist() == pytest.approx(expected, abs=1e-4)


def test_temporal_psnr_forgives_what_stands_still_and_not_flicker() -> None:
    clip = pictures(1, 3, 6, 8, 8) * 0.5
    still = clip + 0.1
    flicker = clip + torch.tensor([0.1, -0.1] * 3)[:, None, None]
    assert psnr(clip, still).item() == pytest.approx(psnr(clip, flicker).item(), abs=1e-3)
    assert temporal_psnr(clip, still).item() > 100
    assert temporal_psnr(clip, flicker).item() == pytest.approx(
        psnr(clip, flicker).item() - 20 * math.log10(2), abs=0.01
    )
    with pytest.raises(PlaitError, match="two frames"):
        temporal_psnr(clip[:, :, :1], clip[:, :, :1])


def wang_ssim(a: np.ndarray, b: np.ndarray) -> tuple[float, float]:
    """SSIM and its contrast-structure part of one channel in [0, 1], position by position, as in the papers."""
    offsets = np.arange(11) - 5
    window = np.exp(-(offsets[:, None] ** 2 + offsets[None, :] ** 2) / (2 * 1.5**2))
    window /= window.sum()
    c1, c2 = 0.01**2, 0.03**2
    whole, contrast = [], []
    for i in range(a.shape[0] - 10):
        for j in range(a.shape[1] - 10):
            x, y = a[i : i + 11, j : j + 11], b[i : i + 11, j : j + 11]
            mean_x, mean_y = (window * x).sum(), (window * y).sum()
            variance_x, variance_y = (window * (x - mean_x) ** 2).sum(), (window * (y - mean_y) ** 2).sum()
            covariance = (window * (x - mean_x) * (y - mean_y)).sum()
            cs = (2 * covariance + c2) / (variance_x + variance_y + c2)
            contrast.append(cs)
            whole.append(cs * (2 * mean_x * mean_y + c1) / (mean_x**2 + mean_y**2 + c1))
    return float(np.mean(whole)), float(np.mean(contrast))


def channels(pixels: Tensor) -> np.ndarray:
    return pixels.numpy().astype(np.float64) / 2 + 0.5


def test_ssim_is_the_papers_definition() -> None:
    a = pictures(2, 3, 13, 17)
    b = blurred(a)
    expected = [
        np.mean([wang_ssim(x, y)[0] for x, y in zip(channels(a[i]), channels(b[i]), strict=True)]) for i in range(2)
    ]
    assert ssim(a, b).tolist() == pytest.approx(expected, abs=1e-4)
    assert 0.1 < expected[0] < 0.99


def test_ms_ssim_is_the_papers_definition() -> None:
    # Smooth, so that something is left of it on the coarse scales.
    a = torch.nn.functional.interpolate(pictures(1, 3, 12, 12), (161, 164), mode="bicubic").clamp(-1, 1)
    b = blurred(a)
    product = np.ones(3)
    x, y = a, b
    for scale, weight in enumerate((0.0448, 0.2856, 0.3001, 0.2363, 0.1333)):
        pairs = zip(channels(x[0]), channels(y[0]), strict=True)
        parts = [wang_ssim(p, q)[0 if scale == 4 else 1] for p, q in pairs]
        product *= np.maximum(parts, 0) ** weight
        padding = x.shape[2] % 2, x.shape[3] % 2  # the library keeps the odd pixel
        x, y = (torch.nn.functional.avg_pool2d(z / 2 + 0.5, 2, padding=padding) * 2 - 1 for z in (x, y))
    assert ms_ssim(a, b).item() == pytest.approx(product.mean(), abs=1e-4)


@pytest.mark.parametrize("measure", [ssim, ms_ssim])
def test_similarity_of_a_clip_is_the_mean_of_its_frames(measure: Callable[[Tensor, Tensor], Tensor]) -> None:
    side = 11 if measure is ssim else 161
    a = pictures(2, 3, 2, side, side)
    b = blurred(a)
    alone = torch.stack([measure(a[:, :, t], b[:, :, t]) for t in range(2)]).mean(0)
    torch.testing.assert_close(measure(a, b), alone)
    torch.testing.assert_close(measure(a, a), torch.ones(2))
    with pytest.raises(PlaitError, match=f"at least {side} pixels, and there are pictures of {side}×{side - 1}"):
        measure(a[..., :-1, :], b[..., :-1, :])


def test_per_frame_keeps_items_apart() -> None:
    a = torch.tensor([1.0, 3.0, 10.0, 30.0]).reshape(2, 1, 2, 1, 1).expand(2, 3, 2, 4, 4)
    found = per_frame(lambda x, y: (x - y).mean((1, 2, 3)), a, torch.zeros_like(a))
    assert found.tolist() == [2, 20]


def moments(count: int, dimensions: int, seed: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(count, dimensions, generator=generator, dtype=torch.float64)
    return torch.randn(dimensions, generator=generator, dtype=torch.float64), mix.T @ mix / count


def test_frechet_distance_of_normal_distributions_on_a_line() -> None:
    # N(1, 2²) and N(4, 5²): (1 − 4)² + (2 − 5)².
    found = frechet_distance(torch.tensor([1.0]), torch.tensor([[4.0]]), torch.tensor([4.0]), torch.tensor([[25.0]]))
    assert found == pytest.approx(18)


@pytest.mark.parametrize("seed", range(3))
def test_frechet_distance_of_covariances_that_do_not_commute(seed: int) -> None:
    (mean_a, a), (mean_b, b) = moments(5, 2, seed), moments(5, 2, seed + 10)
    # For 2 × 2, tr (AB)^½ is in closed form by Cayley and Hamilton.
    root = math.sqrt((a @ b).trace() + 2 * math.sqrt(torch.det(a @ b)))
    expected = float((mean_a - mean_b).square().sum() + a.trace() + b.trace() - 2 * root)
    assert frechet_distance(mean_a, a, mean_b, b) == pytest.approx(expected)
    assert (a @ b - b @ a).abs().max() > 0.01


def test_frechet_distance_is_symmetric_zero_to_itself_and_survives_too_few_vectors() -> None:
    (mean_a, a), (mean_b, b) = moments(5, 40, 0), moments(7, 40, 1)  # of rank 5 and 7
    assert frechet_distance(mean_a, a, mean_b, b) == pytest.approx(frechet_distance(mean_b, b, mean_a, a), rel=1e-6)
    assert frechet_distance(mean_a, a, mean_a, a) == pytest.approx(0, abs=1e-5)
    assert frechet_distance(mean_a, a, mean_a + 2, a) == pytest.approx(4 * 40, rel=1e-6)


def test_feature_moments_are_those_of_all_batches() -> None:
    vectors = pictures(50, 6) + 100  # far from the origin, where float32 sums would lose the covariance
    gathered = FeatureMoments()
    for batch in vectors.split(7):
        gathered.update(batch)
    assert gathered.count == 50
    np.testing.assert_allclose(gathered.mean.numpy(), vectors.double().numpy().mean(0))
    np.testing.assert_allclose(gathered.covariance.numpy(), np.cov(vectors.double().numpy().T), rtol=1e-6, atol=1e-9)


def test_codebook_use_counts_over_batches() -> None:
    use = CodebookUse(5)
    use.update(torch.tensor([[[0, 0], [3, 3]]]))
    use.update(torch.tensor([3, 3], dtype=torch.int32))
    assert use.counts.tolist() == [2, 0, 0, 4, 0]
    assert use.used == pytest.approx(2 / 5)
    assert use.dead.tolist() == [1, 2, 4]
    entropy = -(1 / 3 * math.log(1 / 3) + 2 / 3 * math.log(2 / 3))
    assert use.perplexity == pytest.approx(math.exp(entropy))


@settings(deadline=None, max_examples=30)
@given(batches=st.lists(st.lists(st.integers(0, 6), min_size=1, max_size=5), max_size=8), window=st.integers(1, 4))
def test_a_window_counts_the_last_batches_only(batches: list[list[int]], window: int) -> None:
    rolling, last = CodebookUse(7, window), CodebookUse(7)
    for batch in batches:
        rolling.update(torch.tensor(batch))
    for batch in batches[-window:]:
        last.update(torch.tensor(batch))
    assert rolling.counts.tolist() == last.counts.tolist()


def test_a_window_keeps_its_own_codes() -> None:
    use, codes = CodebookUse(3, 1), torch.tensor([0, 1])
    use.update(codes)
    codes.fill_(2)  # a loader's buffer, used again
    use.update(codes)
    assert use.counts.tolist() == [0, 0, 2]


def test_codes_out_of_range_are_not_counted_silently() -> None:
    for code in (-1, 5):
        with pytest.raises((IndexError, RuntimeError)):
            CodebookUse(5).update(torch.tensor([code]))


@pytest.mark.parametrize("size", [1, 60, 4096])
def test_perplexity_of_uniform_codes_is_the_codebooks_size(size: int) -> None:
    use = CodebookUse(size)
    use.update(torch.arange(size).repeat(3))
    assert use.used == 1
    assert len(use.dead) == 0
    assert use.perplexity == pytest.approx(size)


def test_one_code_has_perplexity_one() -> None:
    use = CodebookUse(100)
    use.update(torch.full((4, 4), 99))
    assert use.used == pytest.approx(0.01)
    assert use.perplexity == pytest.approx(1)


def test_alone_the_counts_of_all_processes_are_ones_own() -> None:
    use = CodebookUse(3)
    use.update(torch.tensor([0, 2, 2]))
    together = use.all_reduced()
    assert together.counts.tolist() == [1, 0, 2]
    together.update(torch.tensor([1]))
    assert use.counts.tolist() == [1, 0, 2]


def _count(rank: int, folder: Path) -> None:
    torch.distributed.init_process_group("gloo", f"file://{folder}/store", rank=rank, world_size=2)
    use = CodebookUse(4)
    use.update(torch.tensor([rank, rank, 3]))
    use.all_reduced()
    torch.save((use.all_reduced().counts, use.counts), folder / f"{rank}.pt")
    torch.distributed.destroy_process_group()


@pytest.mark.slow
def test_two_processes_count_together(tmp_path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    workers = [context.Process(target=partial(_count, rank, tmp_path)) for rank in range(2)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(120)
        assert worker.exitcode == 0
    for rank in range(2):
        together, own = torch.load(tmp_path / f"{rank}.pt", weights_only=True)
        assert together.tolist() == [2, 2, 0, 2]
        assert own.sum() == 3
