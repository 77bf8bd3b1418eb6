import copy
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import DacConfig
from transformers.models.dac.modeling_dac import DacResidualVectorQuantizer
from vector_quantize_pytorch import VectorQuantize

from plait.errors import PlaitError
from plait.tokenizers.audio import AudioConfig, AudioTokenizer, HalfConfig
from plait.tokenizers.loading import load_tokenizer
from plait.tokenizers.quantizer import QuantizerConfig, build_quantizer
from plait.tokenizers.residual import FactorizedCodebook, FactorizedResidualQuantizer, kept_codebooks

CONFIG = QuantizerConfig("rvq_l2", codebook_size=32, dim=12, code_dim=4, codebooks=3)


def made(seed: int = 0, **changes: Any) -> FactorizedResidualQuantizer:
    torch.manual_seed(seed)
    quantizer = build_quantizer(QuantizerConfig(**{**vars(CONFIG), **changes}))
    assert isinstance(quantizer, FactorizedResidualQuantizer)
    return quantizer


def theirs_of(ours: FactorizedResidualQuantizer) -> DacResidualVectorQuantizer:
    """transformers' quantizer with the same weights."""
    first = ours.stages[0]
    config = DacConfig(
        encoder_hidden_size=ours.dim, downsampling_ratios=[], n_codebooks=len(ours.stages),
        codebook_size=ours.codebook_size, codebook_dim=first.codebook.shape[1],
    )  # fmt: skip
    theirs = DacResidualVectorQuantizer(config)
    with torch.no_grad():
        for stage, quantizer in zip(ours.stages, theirs.quantizers, strict=True):
            quantizer.codebook.weight.copy_(stage.codebook)
            for name in ("in_proj", "out_proj"):
                matrix, convolution = getattr(stage, name), getattr(quantizer, name)
                convolution.weight.copy_(matrix.weight[..., None])
                convolution.bias.copy_(matrix.bias)
    return theirs


def test_interface() -> None:
    quantizer, z = made(), torch.randn(2, 5, 7, 12)
    assert quantizer.codebook_sizes == [32, 32, 32]
    shapes = {
        name: tuple(tensor.shape) for name, tensor in quantizer.state_dict().items() if name.startswith("stages.2")
    }
    assert shapes == {
        "stages.2.codebook": (32, 4), "stages.2.in_proj.weight": (4, 12), "stages.2.in_proj.bias": (4,),
        "stages.2.out_proj.weight": (12, 4), "stages.2.out_proj.bias": (12,),
    }  # fmt: skip
    codes = quantizer.codes(z)
    assert codes.dtype == torch.int64
    assert codes.shape == (2, 5, 7, 3)
    assert torch.equal(quantizer.codes(z, 2), codes[..., :2])
    assert quantizer.latents(codes).shape == quantizer.latents(codes[..., :1]).shape == z.shape
    assert quantizer.margin(z).shape == (2, 5, 7)
    out = quantizer.eval()(z)
    assert torch.equal(out.codes, codes)
    assert torch.equal(out.latents, quantizer.latents(codes))
    assert not out.losses


def test_one_codebook_has_no_codebook_axis() -> None:
    quantizer, z = made(codebooks=1), torch.randn(2, 50, 12)
    codes = quantizer.codes(z)
    assert torch.equal(quantizer(z).codes, codes)
    assert codes.shape == (2, 50)
    (stage,) = quantizer.stages
    torch.testing.assert_close(quantizer.latents(codes), stage.out_proj(stage.codebook[codes]))


def test_look_up_is_that_of_the_library() -> None:
    quantizer, z = made(codebooks=1, codebook_size=200), torch.randn(1, 3000, 12)
    (stage,) = quantizer.stages
    library = VectorQuantize(4, 200, use_cosine_sim=True).eval()
    library._codebook.embed.copy_(F.normalize(stage.codebook.detach(), dim=-1)[None])
    projected = stage.in_proj(z).detach()
    indices = library(projected)[1]
    clear = quantizer.margin(z) > 1e-5
    assert torch.equal(quantizer.codes(z)[clear], indices[clear])
    cosines = F.normalize(projected, dim=-1) @ F.normalize(stage.codebook, dim=-1).T
    assert torch.equal(cosines.argmax(-1)[clear], indices[clear])
    assert clear.float().mean() > 0.99


def test_codes_latents_losses_and_gradients_are_those_of_transformers() -> None:
    ours = made(commitment=0.25)
    theirs = theirs_of(ours)
    z = torch.randn(2, 40, 12)
    ours_in, theirs_in = z.clone().requires_grad_(), z.mT.clone().requires_grad_()
    weight = torch.randn_like(z)

    out = ours(ours_in)
    (((out.latents * weight).sum()) + sum(out.losses.values())).backward()
    latents, codes, _, commitment, codebook = theirs(theirs_in)
    ((latents.mT * weight).sum() + 0.25 * commitment.mean() + codebook.mean()).backward()

    assert torch.equal(out.codes, codes.movedim(1, -1))
    torch.testing.assert_close(out.latents, latents.mT)
    torch.testing.assert_close(out.losses["commitment"], 0.25 * commitment.mean())
    torch.testing.assert_close(out.losses["codebook"], codebook.mean())
    assert ours_in.grad is not None
    assert theirs_in.grad is not None
    torch.testing.assert_close(ours_in.grad, theirs_in.grad.mT, atol=1e-5, rtol=1e-4)
    for stage, quantizer in zip(ours.stages, theirs.quantizers, strict=True):
        torch.testing.assert_close(stage.codebook.grad, quantizer.codebook.weight.grad, atol=1e-5, rtol=1e-4)
        for name in ("in_proj", "out_proj"):
            matrix, convolution = getattr(stage, name), getattr(quantizer, name)
            torch.testing.assert_close(matrix.weight.grad, convolution.weight.grad[..., 0], atol=1e-4, rtol=1e-4)
            torch.testing.assert_close(matrix.bias.grad, convolution.bias.grad, atol=1e-4, rtol=1e-4)

    with torch.no_grad():
        decoded, *_ = theirs.from_codes(codes)
    torch.testing.assert_close(ours.latents(out.codes), decoded.mT)


def test_dropout_is_drawn_per_sample() -> None:
    quantizer = made(dropout=0.6, commitment=1.0)
    z = torch.randn(300, 2, 12, requires_grad=True)
    out = quantizer(z)
    codes = quantizer.codes(z)
    assert torch.equal(out.codes, codes)
    prefixes = torch.stack([quantizer.latents(codes[..., :q]) for q in (1, 2, 3)])
    is_prefix = ((prefixes - out.latents).abs() < 1e-5).flatten(2).all(-1)
    assert is_prefix.any(0).all()
    share = is_prefix.float().mean(1)
    assert (share[:2] - 0.2).abs().max() < 0.1
    assert abs(share[2] - 0.6) < 0.1
    # The losses are of the codebooks that a sample keeps.
    residual, errors = z.detach(), []
    for i, stage in enumerate(quantizer.stages):
        errors.append((stage.in_proj(residual) - stage.codebook[codes[..., i]]).square().mean((1, 2)))
        residual = z.detach() - prefixes[i]
    kept = torch.stack(errors).cumsum(0)[is_prefix.float().argmax(0), torch.arange(300)].mean()
    torch.testing.assert_close(out.losses["commitment"], kept)
    torch.testing.assert_close(out.losses["codebook"], kept)


@settings(deadline=None, max_examples=20)
@given(there=st.integers(1, 12), seed=st.integers(0, 1 << 30))
def test_without_dropout_all_codebooks_are_kept_and_with_it_at_least_one(there: int, seed: int) -> None:
    torch.manual_seed(seed)
    x = torch.zeros(50, 3, 2)
    assert (kept_codebooks(x, there, 0.0) == there).all()
    kept = kept_codebooks(x, there, 1.0)
    assert kept.shape == (50, 1, 1)
    assert 1 <= kept.min() <= kept.max() <= there
    assert len(kept.unique()) > 1 or there == 1


@settings(deadline=None, max_examples=20)
@given(seed=st.integers(0, 1 << 30))
def test_codes_to_latents_to_codes_is_the_identity_where_codebooks_do_not_share_channels(seed: int) -> None:
    quantizer = made(seed)
    basis = torch.linalg.qr(torch.randn(12, 12)).Q
    with torch.no_grad():
        for stage, columns in zip(quantizer.stages, basis.split(4, 1), strict=True):
            stage.out_proj.weight.copy_(columns)
            stage.in_proj.weight.copy_(columns.T)
            stage.in_proj.bias.zero_()
            stage.out_proj.bias.zero_()
    codes = torch.randint(32, (2, 30, 3))
    assert torch.equal(quantizer.codes(quantizer.latents(codes)), codes)


@pytest.mark.parametrize("z", [torch.zeros(2, 3, 12), torch.full((2, 3, 12), 1e20), torch.full((2, 3, 12), 1e-20)])
def test_gradients_stay_finite(z: Tensor) -> None:
    quantizer, z = made(), z.clone().requires_grad_()
    out = quantizer(z)
    (out.latents.mean() + sum(loss.clamp(max=1e30) for loss in out.losses.values())).backward()
    gradients = [z.grad, *(parameter.grad for parameter in quantizer.parameters())]
    assert all(gradient is not None and gradient.isfinite().all() for gradient in gradients)


def test_codes_are_float32_under_autocast_and_in_bfloat16_modules() -> None:
    quantizer, z = made(), torch.randn(4000, 12)
    codes, decoded = quantizer.codes(z), quantizer.latents(quantizer.codes(z))
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(quantizer.codes(z), codes)
        assert torch.equal(quantizer(z).codes, codes)
        assert torch.equal(quantizer.latents(codes), decoded)
    cast = copy.deepcopy(quantizer).bfloat16()
    rounded = copy.deepcopy(cast).float()
    assert torch.equal(cast.codes(z), rounded.codes(z))
    assert torch.equal(cast.latents(codes), rounded.latents(codes))


def test_loads_from_the_meta_device() -> None:
    quantizer = made()
    with torch.device("meta"):
        empty = build_quantizer(CONFIG)
    empty.load_state_dict(quantizer.state_dict(), assign=True)
    z = torch.randn(50, 12)
    assert torch.equal(empty.codes(z), quantizer.codes(z))
    assert not quantizer.training_state()


def test_codes_that_flip_have_a_small_margin() -> None:
    stage = FactorizedCodebook(32, 12, 4)
    x = torch.randn(20000, 4)
    step = 1e-3
    flipped = stage.nearest(x) != stage.nearest(x + step * F.normalize(torch.randn_like(x), dim=-1))
    bound = 2.02 * step / x.norm(dim=-1) + 1e-5
    margin = stage.margin(x)
    assert flipped.sum() > 5
    assert (margin <= bound)[flipped].all()
    assert (margin > bound).float().mean() > 0.5


def test_codebooks_learn_to_refine() -> None:
    quantizer = made(dropout=0.5)
    mix = torch.randn(4, 12)  # latents in a subspace that few channels can hold
    optimizer = torch.optim.Adam(quantizer.parameters(), 1e-2)
    for _ in range(250):
        z = torch.randn(16, 16, 4) @ mix
        out = quantizer(z)
        loss = F.mse_loss(out.latents, z) + sum(out.losses.values())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    z = torch.randn(2000, 4) @ mix
    codes = quantizer.codes(z)
    errors = [(quantizer.latents(codes[:, :q]) - z).square().mean().item() for q in (1, 2, 3)]
    assert errors[0] < 0.5 * z.square().mean()
    assert errors[1] < 0.7 * errors[0]
    assert errors[2] < 0.8 * errors[1]
    assert all(len(column.unique()) > 16 for column in codes.T)


@pytest.mark.parametrize("codebooks", [1, 3])
def test_plaits_audio_tokenizer_trains_with_it(codebooks: int, tmp_path: Path) -> None:
    torch.manual_seed(0)
    half = HalfConfig(widths=(4, 8), strides=(4,), blocks=(0, 1))
    quantizer = QuantizerConfig("rvq_l2", codebook_size=16, dim=8, codebooks=codebooks, dropout=0.5)
    assert quantizer.code_dim == 8
    tokenizer = AudioTokenizer(AudioConfig(8000, 1, half, half, quantizer))
    decoded, quantized = tokenizer(0.3 * torch.randn(2, 1, 30))
    (decoded.square().mean() + sum(quantized.losses.values())).backward()
    assert not [name for name, p in tokenizer.named_parameters() if p.grad is None or not p.grad.isfinite().all()]
    tokenizer.eval().save_pretrained(tmp_path)
    loaded = load_tokenizer(tmp_path)
    samples = 0.3 * torch.randn(2, 1, 30)
    encoded = loaded.encode(samples)
    assert encoded.codes.shape == ((2, 8) if codebooks == 1 else (2, 3, 8))
    assert torch.equal(encoded.codes, tokenizer.encode(samples).codes)
    assert loaded.decode(encoded).shape == samples.shape


def test_a_field_that_came_later_changes_no_fingerprint() -> None:
    assert "code_dim" not in AudioTokenizer()._fingerprint_settings()["quantizer"]
    assert AudioTokenizer(AudioConfig(quantizer=CONFIG))._fingerprint_settings()["quantizer"]["code_dim"] == 4


@pytest.mark.parametrize(
    ("field", "fields"),
    [
        ("codebooks", {"codebooks": 0}),
        ("codebooks", {"codebooks": 2.0}),
        ("code_dim", {"code_dim": -1}),
        ("code_dim", {"code_dim": 4.0}),
        ("code_dim", {"kind": "rvq"}),
        ("code_dim", {"kind": "vq_ema", "codebooks": 1}),
        ("dim", {"dim": 0}),
        ("codebook_size", {"codebook_size": 1}),
        ("commitment", {"commitment": math.nan}),
        ("dropout", {"dropout": 1.5}),
        ("entropy", {"entropy": 0.1}),
    ],
)
def test_impossible_configurations_are_refused(field: str, fields: dict[str, Any]) -> None:
    with pytest.raises(PlaitError, match=f"^quantizer: {field} "):
        QuantizerConfig(**{**vars(CONFIG), **fields})
