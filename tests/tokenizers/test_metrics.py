import math

import numpy as np
import pytest
import torch

from plait.tokenizers.metrics import CodebookUse, psnr


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


def test_codebook_use_counts_over_batches() -> None:
    use = CodebookUse(5)
    use.update(torch.tensor([[[0, 0], [3, 3]]]))
    use.update(torch.tensor([3, 3], dtype=torch.int32))
    assert use.counts.tolist() == [2, 0, 0, 4, 0]
    assert use.used == pytest.approx(2 / 5)
    entropy = -(1 / 3 * math.log(1 / 3) + 2 / 3 * math.log(2 / 3))
    assert use.perplexity == pytest.approx(math.exp(entropy))


@pytest.mark.parametrize("size", [1, 60, 4096])
def test_perplexity_of_uniform_codes_is_the_codebooks_size(size: int) -> None:
    use = CodebookUse(size)
    use.update(torch.arange(size).repeat(3))
    assert use.used == 1
    assert use.perplexity == pytest.approx(size)


def test_one_code_has_perplexity_one() -> None:
    use = CodebookUse(100)
    use.update(torch.full((4, 4), 99))
    assert use.used == pytest.approx(0.01)
    assert use.perplexity == pytest.approx(1)
