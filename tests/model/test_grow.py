from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from plait.errors import PlaitError
from plait.infer.bundle import load_bundle
from plait.model.config import DecoderConfig, RopeScaling
from plait.model.decoder import Decoder
from plait.model.grow import EMBEDDING_NOISE, HEAD_NOISE, grow_decoder, grow_rows, grow_weights
from plait.model.loss import Targets
from plait.tokenizers.loading import find_weights

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def decoder(tied: bool, dtype: torch.dtype = torch.float32, **fields: Any) -> Decoder:
    torch.manual_seed(0)
    return Decoder(DecoderConfig(vocabulary_size=97, width=32, layers=2, tie_embeddings=tied, **fields)).to(dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tied", [True, False])
def test_old_rows_stay_and_the_rest_is_shared(tied: bool, dtype: torch.dtype) -> None:
    old = decoder(tied, dtype)
    new = grow_decoder(old, 150)
    assert new.config.vocabulary_size == 150
    assert (new.lm_head.weight is new.embed_tokens.weight) == tied
    theirs = new.state_dict()
    for name, tensor in old.state_dict().items():
        assert theirs[name].dtype == dtype
        assert torch.equal(theirs[name][: len(tensor)], tensor), name
    assert set(theirs) == set(old.state_dict())
    assert theirs["layers.1.mlp.up_proj.weight"].data_ptr() == old.layers[1].mlp.up_proj.weight.data_ptr()
    assert theirs["embed_tokens.weight"].shape == theirs["lm_head.weight"].shape == (150, 32)


@pytest.mark.parametrize("scaling", ["none", "llama3"])
@pytest.mark.parametrize("tied", [True, False])
@torch.no_grad()
def test_old_ids_keep_their_logits(tied: bool, scaling: str) -> None:
    old = decoder(tied, rope_scaling=RopeScaling(scaling, 4.0, 64))
    tokens, positions = torch.randint(97, (2, 20)), torch.arange(20).expand(2, -1)
    torch.testing.assert_close(
        grow_decoder(old, 150)(tokens, positions)[..., :97], old(tokens, positions), atol=1e-6, rtol=0
    )


@given(
    st.integers(2, 30), st.integers(0, 40), st.integers(1, 9), st.integers(0, 2**32), st.sampled_from(DTYPES),
)  # fmt: skip
@settings(max_examples=30, deadline=None)
def test_rows_are_deterministic_and_finite(rows: int, fresh: int, width: int, seed: int, dtype: torch.dtype) -> None:
    old = torch.randn(rows, width).to(dtype)
    first, again = (grow_rows(old, rows + fresh, torch.Generator().manual_seed(seed), 0.5) for _ in range(2))
    assert torch.equal(first, again)
    assert first.shape == (rows + fresh, width)
    assert first.dtype == dtype
    assert first.isfinite().all()
    assert torch.equal(first[:rows], old)


def test_another_seed_gives_other_rows() -> None:
    weights = decoder(False).state_dict()
    a, b = (grow_weights(weights, 120, False, seed) for seed in (0, 1))
    for name in ("embed_tokens.weight", "lm_head.weight"):
        assert not torch.equal(a[name][97:], b[name][97:])


@pytest.mark.parametrize("noise", [HEAD_NOISE, EMBEDDING_NOISE])
def test_new_rows_have_the_old_ones_mean_and_covariance(noise: float) -> None:
    torch.manual_seed(0)
    old = torch.randn(3000, 6) @ torch.randn(6, 6) + torch.randn(6)
    new = grow_rows(old, 3000 + 40_000, torch.Generator().manual_seed(0), noise)[3000:]
    scale = old.std()
    torch.testing.assert_close(new.mean(0), old.mean(0), atol=0.03 * noise * scale, rtol=0)
    torch.testing.assert_close(new.T.cov() / noise**2, old.T.cov(), atol=0.05 * scale**2, rtol=0)


@torch.no_grad()
def test_a_trained_model_hardly_loses() -> None:
    # Twice as many ids. Were the new rows like old ones (noise 1) or zero, this would cost much more.
    old = load_bundle(find_weights("plait-tiny")).decoder
    size = old.config.vocabulary_size
    torch.manual_seed(0)
    tokens = old_tokens(old)
    positions = torch.arange(tokens.shape[1])[None]
    targets = Targets(tokens[:, 1:], torch.ones(1, tokens.shape[1] - 1), torch.zeros_like(tokens[:, 1:]), 1)
    losses = [
        float(d(tokens[:, :-1], positions[:, :-1], targets=targets).loss) / (tokens.shape[1] - 1)
        for d in (old, grow_decoder(old, 2 * size))
    ]
    assert losses[0] < 4
    assert losses[1] - losses[0] < 0.01


def old_tokens(old: Decoder) -> torch.Tensor:
    """A document that the shipped model makes itself: ``[1, 80]``."""
    tokens = torch.tensor([[1, 1027]])
    for _ in range(78):
        probabilities = old(tokens, torch.arange(tokens.shape[1])[None])[0, -1].softmax(-1)
        tokens = torch.cat([tokens, probabilities.multinomial(1)[None]], 1)
    return tokens


def test_frozen_stays_frozen_and_equal_stays_itself() -> None:
    old = decoder(True).requires_grad_(False).eval()
    new = grow_decoder(old, 98)
    assert not any(p.requires_grad for p in new.parameters())
    assert not new.training
    assert grow_decoder(old, 97) is old


def test_it_cannot_shrink() -> None:
    with pytest.raises(PlaitError, match="has 97 ids, it cannot be grown to 96"):
        grow_decoder(decoder(True), 96)
