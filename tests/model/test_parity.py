"""Random weights give the logits of transformers' Llama, Mistral, Qwen 2 and 3, Emu3 and Chameleon."""

from typing import Any

import pytest
import torch
import transformers as hf
from random_decoders import VOCABULARY, random_decoder
from torch import Tensor, nn

from plait.model.config import RopeScaling
from plait.model.decoder import Decoder

# config, without what every family shares: rows of embedding, layers, context
SIZES = {
    "one head": {"width": 16, "heads": 1, "kv_heads": 1},
    "all heads": {"width": 32, "heads": 4, "kv_heads": 4, "rope_theta": 1e6},
    "grouped": {"width": 48, "heads": 6, "kv_heads": 2, "norm_eps": 1e-2, "ffn_width": 40},
    "one for all": {"width": 64, "heads": 8, "kv_heads": 1, "rope_theta": 100.0},
}
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {"qk_norm": "none"},
    "mistral": {"qk_norm": "none", "sliding_window": 9},
    "qwen2": {"qk_norm": "none", "qkv_bias": True},
    "qwen3": {"qk_norm": "rms"},
    "emu3": {"qk_norm": "none", "dropout": 0.1, "attention_dropout": 0.1},
    "chameleon": {"qk_norm": "layer"},
    "chameleon-34b": {"qk_norm": "layer", "norm_placement": "post"},
}
CLASSES = {
    "llama": (hf.LlamaConfig, hf.LlamaForCausalLM),
    "mistral": (hf.MistralConfig, hf.MistralForCausalLM),
    "qwen2": (hf.Qwen2Config, hf.Qwen2ForCausalLM),
    "qwen3": (hf.Qwen3Config, hf.Qwen3ForCausalLM),
    "emu3": (hf.Emu3TextConfig, hf.Emu3ForCausalLM),
}
SCALINGS = [
    (RopeScaling("linear", 4.0), {"rope_type": "linear", "factor": 4.0}),
    (RopeScaling("dynamic", 4.0, 32), {"rope_type": "dynamic", "factor": 4.0}),
    (RopeScaling("yarn", 4.0, 32), {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}),
    (
        RopeScaling("llama3", 8.0, 32),
        {"rope_type": "llama3", "factor": 8.0, "original_max_position_embeddings": 32, "low_freq_factor": 1.0,
         "high_freq_factor": 4.0},
    ),
]  # fmt: skip


def theirs_of(decoder: Decoder, family: str, rope: dict[str, Any] | None = None) -> nn.Module:
    """The same model in transformers, with the same weights."""
    config = decoder.config
    settings = {
        "vocab_size": config.vocabulary_size,
        "hidden_size": config.width,
        "intermediate_size": config.ffn_width,
        "num_hidden_layers": config.layers,
        "num_attention_heads": config.heads,
        "num_key_value_heads": config.kv_heads,
        "head_dim": config.head_size,
        "rms_norm_eps": config.norm_eps,
        "rope_parameters": (rope or {"rope_type": "default"}) | {"rope_theta": config.rope_theta},
        "tie_word_embeddings": config.tie_embeddings,
        "max_position_embeddings": 32,
        "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
    }  # fmt: skip
    if family.startswith("chameleon"):
        from transformers.models.chameleon.configuration_chameleon import ChameleonVQVAEConfig

        vq = ChameleonVQVAEConfig(
            embed_dim=8, num_embeddings=4, latent_channels=8, base_channels=32, channel_multiplier=[1], num_res_blocks=1
        )
        theirs: nn.Module = hf.ChameleonModel(
            hf.ChameleonConfig(
                **settings,
                swin_norm=config.norm_placement == "post",
                vq_config=vq,
                vocabulary_map={"<image>": 3, "IMGIMGAZ": 4},
            )
        )
        weights = {k: v for k, v in decoder.state_dict().items() if k != "lm_head.weight"}
        found = theirs.load_state_dict(weights, strict=False)
        assert all(name.startswith("vqmodel.") for name in found.missing_keys)
    else:
        config_class, model_class = CLASSES[family]
        extra = {"sliding_window": config.sliding_window} if family == "mistral" else {}
        theirs = model_class(config_class(**settings, **extra))
        weights = {k if k.startswith("lm_head.") else f"model.{k}": v for k, v in decoder.state_dict().items()}
        found = theirs.load_state_dict(weights, strict=False)
        assert not found.missing_keys
    assert not found.unexpected_keys
    return theirs.eval()


@torch.no_grad()
def compare(decoder: Decoder, theirs: nn.Module, length: int = 70) -> None:
    tokens = torch.randint(VOCABULARY, (2, length))
    out = theirs(tokens)
    # transformers' Chameleon masks its image logits, so its hidden states are compared.
    expected: Tensor = out.logits if "logits" in out else decoder.lm_head(out.last_hidden_state)
    assert expected.std() > 0.5  # a comparison of near-zero logits would prove nothing
    found = decoder(tokens, torch.arange(length).expand(2, -1))
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("family", FAMILIES)
def test_logits_equal_transformers(family: str, size: str, tied: bool) -> None:
    decoder = random_decoder(layers=3, **SIZES[size], **FAMILIES[family], tie_embeddings=tied)
    compare(decoder, theirs_of(decoder, family))


@pytest.mark.parametrize(("scaling", "rope"), SCALINGS, ids=lambda value: getattr(value, "kind", ""))
@pytest.mark.parametrize("family", ["llama", "emu3", "qwen3", "chameleon"])
def test_rope_scalings_equal_transformers(family: str, scaling: RopeScaling, rope: dict[str, Any]) -> None:
    decoder = random_decoder(layers=3, **SIZES["grouped"], **FAMILIES[family], rope_scaling=scaling)
    compare(decoder, theirs_of(decoder, family, rope))


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
def test_head_size_need_not_fit_the_width(family: str) -> None:
    decoder = random_decoder(layers=3, width=40, heads=8, kv_heads=2, head_size=16, **FAMILIES[family])
    compare(decoder, theirs_of(decoder, family))
