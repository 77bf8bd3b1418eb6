"""Rotations, and their scalings beside transformers'."""

from typing import Any

import pytest
import torch
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from plait.errors import PlaitError
from plait.model.config import DecoderConfig, RopeScaling
from plait.model.rope import Rotary, Table, rotate


def rotary(head_size: int, theta: float = 10_000.0, **scaling: Any) -> Rotary:
    return Rotary(DecoderConfig(width=32, head_size=head_size, rope_theta=theta, rope_scaling=RopeScaling(**scaling)))


def table(position: int, head_size: int, theta: float = 10_000.0) -> Table:
    return rotary(head_size, theta).table(torch.tensor([[position]]))


def test_scores_depend_on_the_distance_only() -> None:
    torch.manual_seed(0)
    q, k = torch.randn(2, 1, 1, 3, 8).double()

    def score(at_q: int, at_k: int) -> torch.Tensor:
        return (rotate(q, table(at_q, 8)) * rotate(k, table(at_k, 8))).sum(-1)

    torch.testing.assert_close(score(7, 2), score(25, 20), atol=1e-5, rtol=0)
    assert not torch.allclose(score(7, 2), score(7, 3), atol=1e-3)


def test_position_zero_is_the_identity_and_lengths_are_kept() -> None:
    x = torch.randn(1, 5, 2, 6)
    turned = rotate(x, rotary(6, 100.0).table(torch.arange(5)[None]))
    assert torch.equal(turned[:, 0], x[:, 0])
    torch.testing.assert_close(turned.norm(dim=-1), x.norm(dim=-1))


def test_table_stays_float32_and_rotation_keeps_the_dtype() -> None:
    # In bfloat16 the angles of high positions would be wrong by whole turns.
    of_1000 = table(1000, 8)
    assert of_1000[0].dtype == torch.float32
    torch.testing.assert_close(of_1000[0][0, 0, 0], torch.tensor(1000.0).cos())
    assert rotate(torch.randn(1, 1, 2, 8).bfloat16(), of_1000).dtype == torch.bfloat16


SCALINGS: list[tuple[dict[str, Any], dict[str, Any]]] = [
    ({}, {"rope_type": "default"}),
    ({"kind": "linear", "factor": 4.0}, {"rope_type": "linear", "factor": 4.0}),
    ({"kind": "dynamic", "factor": 2.0, "original_context": 64}, {"rope_type": "dynamic", "factor": 2.0}),
    (
        {"kind": "yarn", "factor": 8.0, "original_context": 64},
        {"rope_type": "yarn", "factor": 8.0, "original_max_position_embeddings": 64},
    ),
    (
        {"kind": "yarn", "factor": 4.0, "original_context": 256, "beta_fast": 16.0, "beta_slow": 2.0,
         "attention_factor": 1.3, "truncate": False},
        {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 256, "beta_fast": 16.0,
         "beta_slow": 2.0, "attention_factor": 1.3, "truncate": False},
    ),
    (
        {"kind": "llama3", "factor": 8.0, "original_context": 128},
        {"rope_type": "llama3", "factor": 8.0, "original_max_position_embeddings": 128, "low_freq_factor": 1.0,
         "high_freq_factor": 4.0},
    ),
    (
        {"kind": "llama3", "factor": 32.0, "original_context": 8192, "low_freq_factor": 2.0, "high_freq_factor": 3.0},
        {"rope_type": "llama3", "factor": 32.0, "original_max_position_embeddings": 8192, "low_freq_factor": 2.0,
         "high_freq_factor": 3.0},
    ),
]  # fmt: skip


@pytest.mark.parametrize("length", [40, 300])
@pytest.mark.parametrize("theta", [10_000.0, 5e5])
@pytest.mark.parametrize(("ours", "theirs"), SCALINGS, ids=lambda value: str(value.get("kind", "none")))
def test_scalings_equal_transformers(ours: dict[str, Any], theirs: dict[str, Any], theta: float, length: int) -> None:
    config = LlamaConfig(
        hidden_size=64,
        num_attention_heads=2,
        max_position_embeddings=64,
        rope_parameters=theirs | {"rope_theta": theta},
    )
    positions = torch.arange(length)[None]
    cos, sin = LlamaRotaryEmbedding(config)(torch.zeros(1), positions)
    found = rotary(32, theta, **ours).table(positions, torch.full_like(positions, length))
    torch.testing.assert_close(found[0], cos[..., :16], atol=1e-4, rtol=0)
    torch.testing.assert_close(found[1], sin[..., :16], atol=1e-4, rtol=0)


def test_ntk_stretches_the_slowest_wave_by_the_factor_and_leaves_the_fastest() -> None:
    plain, stretched = rotary(64), rotary(64, kind="ntk", factor=4.0)
    torch.testing.assert_close(stretched.frequencies[-1] * 4, plain.frequencies[-1])
    assert stretched.frequencies[0] == plain.frequencies[0] == 1


def test_dynamic_leaves_short_sequences_alone_and_looks_at_each_length() -> None:
    positions = torch.arange(50)[None].repeat(2, 1)
    lengths = torch.tensor([[50], [200]]).expand_as(positions)
    found = rotary(16, kind="dynamic", factor=2.0, original_context=64).table(positions, lengths)
    plain = rotary(16).table(positions)
    torch.testing.assert_close(found[0][0], plain[0][0])
    assert (found[0][1] - plain[0][1]).abs().max() > 0.1


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"kind": "longrope"}, r"rope_scaling\.kind is 'longrope', expected none, linear"),
        ({"kind": "linear", "factor": 0}, r"rope_scaling\.factor is 0"),
        ({"kind": "linear", "factor": True}, r"rope_scaling\.factor is True"),
        ({"kind": "yarn", "factor": 2.0}, r"rope_scaling\.original_context is 0, .*at least 1 with kind yarn"),
        ({"kind": "yarn", "attention_factor": -1.0}, r"rope_scaling\.attention_factor is -1"),
        ({"kind": "llama3", "original_context": 8, "low_freq_factor": 4.0}, "must be below high_freq_factor"),
        ({"kind": "yarn", "original_context": 1, "truncate": 1}, r"rope_scaling\.truncate is 1"),
    ],
)
def test_bad_scalings_name_their_field(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(PlaitError, match=message):
        RopeScaling(**fields)
