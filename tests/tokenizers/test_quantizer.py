import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from vector_quantize_pytorch import FSQ

from plait.errors import PlaitError
from plait.tokenizers.quantizer import FiniteScalarQuantizer

LEVELS = [(3,), (4,), (3, 3, 3), (4, 6, 8), (5, 4, 3), (7, 6, 5), (8, 5, 5, 5), (16, 16), (8, 8, 8, 5, 5, 5)]


def latents(levels: tuple[int, ...], count: int = 4000, seed: int = 0) -> torch.Tensor:
    """Latents ``[count, d]`` from tiny to saturated: rounding boundaries and the squashing's ends both occur."""
    generator = torch.Generator().manual_seed(seed)
    z = torch.randn(count, len(levels), generator=generator) * 10 ** (
        4 * torch.rand(count, 1, generator=generator) - 2.5
    )
    z[0], z[1], z[2] = 0, 1e30, -1e30
    return z


def library(levels: tuple[int, ...], z: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    with torch.no_grad():
        quantized, indices = FSQ(levels=list(levels))(z[None])
    return quantized[0], indices[0].long()


@pytest.mark.parametrize("levels", LEVELS)
def test_codes_and_latents_are_the_librarys(levels: tuple[int, ...]) -> None:
    quantizer, z = FiniteScalarQuantizer(levels), latents(levels)
    quantized, indices = library(levels, z)
    codes = quantizer.codes(z)
    assert torch.equal(codes, indices)
    assert torch.equal(quantizer.latents(codes), quantized)
    assert codes.dtype == torch.int64
    assert quantizer.latents(codes).dtype == torch.float32


@pytest.mark.parametrize("levels", LEVELS[:-1])
def test_every_code_is_its_latents(levels: tuple[int, ...]) -> None:
    quantizer = FiniteScalarQuantizer(levels)
    codes = torch.arange(quantizer.codebook_size)
    values = quantizer.latents(codes)
    assert torch.equal(values, FSQ(levels=list(levels)).indices_to_codes(codes[None])[0])
    assert len(values.unique(dim=0)) == quantizer.codebook_size
    assert values.abs().max() <= 1


@settings(deadline=None, max_examples=30)
@given(levels=st.lists(st.integers(3, 20), min_size=1, max_size=5).map(tuple), seed=st.integers(0, 1 << 30))
def test_any_levels_are_the_librarys(levels: tuple[int, ...], seed: int) -> None:
    quantizer, z = FiniteScalarQuantizer(levels), latents(levels, 300, seed)
    quantized, indices = library(levels, z)
    assert torch.equal(quantizer.codes(z), indices)
    assert torch.equal(quantizer.latents(indices), quantized)


@pytest.mark.parametrize("levels", LEVELS)
def test_training_pass_gives_the_same_codes(levels: tuple[int, ...]) -> None:
    quantizer, z = FiniteScalarQuantizer(levels), latents(levels, 600).reshape(2, 20, 15, -1)
    quantized, codes = quantizer(z)
    assert quantized.shape == z.shape
    assert codes.shape == z.shape[:-1]
    assert torch.equal(codes, quantizer.codes(z))
    assert torch.equal(quantized, quantizer.latents(codes))


@pytest.mark.parametrize("levels", LEVELS)
def test_codes_are_computed_in_float32(levels: tuple[int, ...]) -> None:
    z = latents(levels)
    expected = FiniteScalarQuantizer(levels).codes(z)
    quantizer = FiniteScalarQuantizer(levels)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(quantizer.codes(z), expected)
        assert torch.equal(quantizer(z)[1], expected)
    quantizer.bfloat16()
    assert torch.equal(quantizer.codes(z), expected)
    assert torch.equal(quantizer.latents(expected), FiniteScalarQuantizer(levels).latents(expected))


def test_bfloat16_latents_have_the_codes_of_their_float32_copy() -> None:
    quantizer, z = FiniteScalarQuantizer((8, 5, 5, 5)), latents((8, 5, 5, 5)).bfloat16()
    assert torch.equal(quantizer.codes(z), library((8, 5, 5, 5), z.float())[1])
    assert torch.equal(quantizer(z)[1], quantizer.codes(z))


def test_gradients_go_straight_through_the_rounding() -> None:
    levels = (8, 5, 3)
    z = (latents(levels, 200).clamp(-1, 1)).requires_grad_()
    FiniteScalarQuantizer(levels)(z)[0].sum().backward()
    # Straight through means the derivative of the squashing alone: ½(L−1)(1+ε)·(1−tanh²), over ⌊L/2⌋.
    count = torch.tensor(levels, dtype=torch.float32)
    half = (count - 1) * 1.001 / 2
    shift = torch.atanh((count % 2 == 0) * 0.5 / half)
    expected = half * (1 - torch.tanh(z.detach() + shift) ** 2) / (count // 2)
    assert z.grad is not None
    torch.testing.assert_close(z.grad, expected)


def test_nothing_of_it_is_stored() -> None:
    quantizer = FiniteScalarQuantizer((8, 5))
    quantizer(torch.zeros(1, 2))
    assert not quantizer.state_dict()
    assert not list(quantizer.parameters())


@pytest.mark.parametrize("levels", [(), (2,), (8, 0), (8, -5), (1000, 1000, 1000, 1000)])
def test_impossible_levels_are_refused(levels: tuple[int, ...]) -> None:
    with pytest.raises(PlaitError, match="quantizer levels"):
        FiniteScalarQuantizer(levels)
