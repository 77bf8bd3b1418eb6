"""Settings and names of other projects' checkpoints ↔ ours."""

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from plait.errors import PlaitError
from plait.model.checkpoints import EMBEDDING, find_names, join_meta, meta_name, meta_shards, split_meta
from plait.model.config import DecoderConfig, RopeScaling
from plait.model.decoder import Decoder
from plait.model.foreign_config import from_transformers, model_type, to_transformers
from plait.model.meta_config import from_params, to_params

SMALL = {
    "vocab_size": 40, "hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 64,
}  # fmt: skip


def read(kind: str, tensors: tuple[str, ...] = (), **fields: Any) -> tuple[DecoderConfig, int]:
    return from_transformers({"model_type": kind, **SMALL, **fields}, tensors)


REFUSED = [
    ("llama", {"hidden_act": "gelu"}, "hidden_act is 'gelu'"),
    ("llama", {"mlp_bias": True}, "mlp_bias is True"),
    ("llama", {"attention_bias": True}, "attention_bias is True"),
    ("qwen3", {"attention_bias": True}, "attention_bias is True"),
    ("llama", {"partial_rotary_factor": 0.5}, "partial_rotary_factor is 0.5"),
    ("llama", {"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5}}, "partial_rotary_factor"),
    ("llama", {"quantization_config": {"bits": 4}}, "quantization_config"),
    ("llama", {"num_local_experts": 8}, "num_local_experts is 8"),
    ("llama", {"rope_parameters": {"rope_type": "longrope"}}, "rope_parameters.rope_type is 'longrope'"),
    ("llama", {"rope_scaling": {"type": "linear"}}, "rope_scaling: decoder: rope_scaling.factor is None"),
    ("llama", {"rope_parameters": {"rope_type": "default", "mrope_section": [1]}}, "rope_parameters.mrope_section"),
    ("llama", {"rope_scaling": "linear"}, "rope_scaling is 'linear'"),
    ("llama", {"vocab_size": "many"}, "vocab_size is 'many'"),
    ("llama", {"hidden_size": 0}, "hidden_size is 0"),
    ("llama", {"num_key_value_heads": 3}, "kv_heads"),
    ("llama", {"rms_norm_eps": "small"}, "norm_eps is 'small'"),
    ("llama", {"tie_word_embeddings": "yes"}, "tie_embeddings is 'yes'"),
    ("qwen2", {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1}, "layer_types mixes"),
    ("qwen3", {"layer_types": ["full_attention", "chunked"], "use_sliding_window": True}, "layer_types has 'chunked'"),
    ("qwen3", {"layer_types": 3}, "layer_types has 3"),
    ("qwen2", {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": "x"}, "max_window_layers is 'x'"),
    ("mistral", {"sliding_window": "x"}, "sliding_window is 'x'"),
    ("llama", {"sliding_window": 8}, "sliding_window is 8"),  # transformers' Llama passes it over
    ("llama", {"bos_token_id": {}}, "bos_token_id is {}"),
    ("gpt2", {}, "model_type is 'gpt2'"),
    ("emu3", {}, "vocab_size is 40"),
    ("emu3", {k: None for k in SMALL}, "text_config is missing"),
]  # fmt: skip


@pytest.mark.parametrize(("kind", "fields", "message"), REFUSED, ids=[m for *_, m in REFUSED])
def test_what_cannot_be_computed_is_refused_by_name(kind: str, fields: dict[str, Any], message: str) -> None:
    with pytest.raises(PlaitError, match="config.json: ") as raised:
        read(kind, **fields)
    assert message in str(raised.value)
    assert "\n" not in str(raised.value)


def test_fields_that_are_off_change_nothing() -> None:
    noise = {"num_local_experts": None, "some_flag": False, "extras": [], "embd_pdrop": 0.0, "rope_scaling": None}
    ids = {"bos_token_id": 1, "eos_token_id": [2, 3], "transformers_version": "4.40.0", "torch_dtype": "bfloat16"}
    assert read("llama", **noise, **ids) == read("llama")


def test_older_and_newer_rope_fields_are_one() -> None:
    for kind, more in (
        ("linear", {}),
        ("dynamic", {}),
        ("yarn", {"original_max_position_embeddings": 32, "beta_fast": 16}),
        ("llama3", {"original_max_position_embeddings": 32, "low_freq_factor": 1.0, "high_freq_factor": 4.0}),
    ):
        new = read("llama", rope_parameters={"rope_type": kind, "rope_theta": 5e5, "factor": 4.0, **more})
        for name in ("type", "rope_type"):
            assert read("llama", rope_theta=5e5, rope_scaling={name: kind, "factor": 4.0, **more}) == new
        assert new[0].rope_theta == 5e5
        assert (new[0].rope_scaling.kind, new[0].rope_scaling.factor) == (kind, 4.0)
    assert read("llama", rope_scaling={"type": "yarn", "factor": 2.0})[0].rope_scaling.original_context == 64
    ratio = {"rope_type": "yarn", "factor": 40.0, "mscale": 1.0, "mscale_all_dim": 1.0}
    assert read("llama", rope_parameters=ratio)[0].rope_scaling.attention_factor == 1.0


def test_defaults_of_a_class_stand_in_for_what_is_left_out() -> None:
    nested = {
        "model_type": "emu3",
        "text_config": {"num_hidden_layers": 2},
        "vq_config": {},
        "vocabulary_map": {"a": 1},
    }
    config, context = from_transformers(nested, ())
    assert (config.vocabulary_size, config.width, config.ffn_width, config.layers) == (184622, 4096, 14336, 2)
    assert (config.kv_heads, config.rope_theta, config.norm_eps, context) == (8, 1e6, 1e-5, 9216)
    assert (config.dropout, config.attention_dropout, config.tie_embeddings) == (0.1, 0.1, False)


def test_emu3_5_is_told_by_its_tensors() -> None:
    name = "model.layers.0.self_attn.q_norm.weight"
    large = {"hidden_size": 40, "num_attention_heads": 8, "num_key_value_heads": 1, "head_dim": 16}
    assert read("Emu3")[0].qk_norm == "none"
    config, _ = read("Emu3", (name,), **large)
    assert (config.qk_norm, config.head_size, config.width, config.heads) == ("rms", 16, 40, 8)


def test_of_two_rope_settings_transformers_takes_the_older() -> None:
    linear = {"type": "linear", "factor": 2.0}
    scaling = read("llama", rope_scaling=linear, rope_parameters={"rope_type": "default"})[0].rope_scaling
    assert (scaling.kind, scaling.factor) == ("linear", 2.0)


def test_windows() -> None:
    assert read("mistral", sliding_window=8)[0].sliding_window == 8
    assert read("mistral", sliding_window=None)[0].sliding_window == 0
    assert read("mistral")[0].sliding_window == 4096
    assert read("qwen2", sliding_window=8)[0].sliding_window == 0
    assert read("qwen2", use_sliding_window=True, sliding_window=8, max_window_layers=2)[0].sliding_window == 0
    assert read("qwen3", use_sliding_window=True, sliding_window=8, max_window_layers=0)[0].sliding_window == 8


def small(**fields: Any) -> DecoderConfig:
    base = {"vocabulary_size": 40, "width": 24, "layers": 2, "heads": 4, "kv_heads": 2, "ffn_width": 40}
    return DecoderConfig(**{**base, "qk_norm": "none", **fields})


def scalings() -> st.SearchStrategy[RopeScaling]:
    factor = st.floats(1.5, 8)
    return st.one_of(
        st.just(RopeScaling()),
        st.builds(RopeScaling, st.just("linear"), factor),
        st.builds(RopeScaling, st.just("dynamic"), factor, st.just(64)),
        st.builds(RopeScaling, st.just("llama3"), factor, st.integers(8, 64)),
        st.builds(
            RopeScaling, st.just("yarn"), factor, st.integers(8, 64), beta_fast=st.floats(16, 32),
            attention_factor=st.sampled_from([0.0, 1.25]), truncate=st.booleans(),
        ),
    )  # fmt: skip


@given(
    scaling=scalings(),
    kind=st.sampled_from(["llama", "mistral", "qwen2", "qwen3", "emu3", "chameleon", "chameleon-post"]),
    tied=st.booleans(),
    head=st.sampled_from([0, 10]),
    theta=st.sampled_from([1e4, 1e6]),
)
def test_a_configuration_comes_back_from_transformers_fields(
    scaling: RopeScaling, kind: str, tied: bool, head: int, theta: float
) -> None:
    fields: dict[str, Any] = {
        "mistral": {"sliding_window": 7, "head_size": head},
        "qwen2": {"qkv_bias": True, "head_size": head},
        "qwen3": {"qk_norm": "rms", "sliding_window": 7, "head_size": head},
        "chameleon": {"qk_norm": "layer"},
        "chameleon-post": {"qk_norm": "layer", "norm_placement": "post"},
    }.get(kind, {"head_size": head})
    config = small(rope_scaling=scaling, tie_embeddings=tied, rope_theta=theta, **fields)
    chosen = model_type(config, kind)
    assert chosen.split("_")[0] == kind.split("-")[0]
    written = to_transformers(chosen, config, 64, "float32", {})
    assert from_transformers(written, ()) == (config, 64)


def test_architectures_that_nobody_has() -> None:
    for fields, message in (
        ({"norm_placement": "post"}, "norm_placement 'post'"),
        ({"qk_norm": "layer", "qkv_bias": True}, "qkv_bias True"),
        ({"qk_norm": "layer", "head_size": 8}, "head_size 8"),
        ({"qk_norm": "rms", "qkv_bias": True}, "qkv_bias True"),
    ):
        with pytest.raises(PlaitError, match=message):
            model_type(small(**fields), "text")
    assert model_type(small(width=26, head_size=8), "text") == "mistral"  # transformers' Llama refuses 26 / 4
    assert model_type(small(), "text", "mistral") == "mistral"


@pytest.mark.parametrize("prefix", ["model.", "model.text_model.", "text_model.model.", "text_model.", ""])
def test_names_are_found_by_the_embedding(prefix: str) -> None:
    names = find_names({prefix + EMBEDDING: 0, "model.layers.0.mlp.up_proj.weight": 0})
    assert names is not None
    assert names.of("norm.weight") == f"{prefix}norm.weight"


@pytest.mark.parametrize("shards", [1, 2, 4])
@pytest.mark.parametrize("qk_norm", ["none", "layer"])
def test_metas_layout_is_inverted_exactly(shards: int, qk_norm: str) -> None:
    torch.manual_seed(0)
    config = small(heads=8, kv_heads=4, width=32, qk_norm=qk_norm, tie_embeddings=False)
    state = {name: torch.randn(t.shape) for name, t in Decoder(config).state_dict().items()}
    for name, tensor in state.items():
        if "_norm." in name:  # the heads of a shard share their norm
            state[name] = tensor[:shards].repeat_interleave(len(tensor) // shards, 0)
    norms = {name: t for name, t in state.items() if "_norm." in name}
    assert meta_shards(norms, config) == (shards if norms else 1)
    for name, tensor in state.items():
        parts = split_meta(name, tensor, shards, config)
        assert torch.equal(join_meta(name, parts, config), tensor), name
    assert len({meta_name(name) for name in state}) == len(state)


def test_params_come_back() -> None:
    for fields in ({}, {"qk_norm": "layer", "norm_placement": "post"}, {"ffn_width": 256}, {"rope_theta": 5e5}):
        config = small(tie_embeddings=False, **fields)
        params = to_params(config, 4096)
        assert from_params(params, 40, config.ffn_width, config.qk_norm == "layer") == (config, 4096)
        inner = int(2 * 4 * config.width / 3)  # as Meta's code computes the width
        inner = int(params["ffn_dim_multiplier"] * inner) if params["ffn_dim_multiplier"] else inner
        assert -(-inner // params["multiple_of"]) * params["multiple_of"] == config.ffn_width
    with pytest.raises(PlaitError, match="Meta's layout"):
        to_params(small(qk_norm="rms"), 4096)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"n_layers": None}, "n_layers is None"),
        ({"vocab_size": 41}, "vocab_size is 41"),
        ({"moe": 8}, "moe is 8"),
        ({"qk_normalization": True}, "qk_normalization is True"),
    ],
)
def test_params_that_do_not_fit_are_refused(fields: dict[str, Any], message: str) -> None:
    params = {"dim": 24, "n_layers": 2, "n_heads": 4, "norm_eps": 1e-5, **fields}
    with pytest.raises(PlaitError, match=f"params.json: {message}"):
        from_params(params, 40, 40, chameleon=False)
