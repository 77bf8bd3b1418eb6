"""Our decoder and transformers' Llama with the same weights, for the benchmarks."""

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from plait.model.config import DecoderConfig
from plait.model.decoder import Decoder


def build_both(config: DecoderConfig, device: str = "cpu") -> tuple[Decoder, LlamaForCausalLM]:
    """Random weights; ``config`` must be that of a Llama."""
    torch.manual_seed(0)
    ours = Decoder(config)
    theirs = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=config.vocabulary_size,
            hidden_size=config.width,
            num_hidden_layers=config.layers,
            num_attention_heads=config.heads,
            num_key_value_heads=config.kv_heads,
            intermediate_size=config.ffn_width,
            rope_parameters={"rope_type": "default", "rope_theta": config.rope_theta},
            rms_norm_eps=config.norm_eps,
            tie_word_embeddings=config.tie_embeddings,
            attn_implementation="sdpa",
        )
    )
    theirs.load_state_dict({k if k.startswith("lm_head") else f"model.{k}": v for k, v in ours.state_dict().items()})
    return ours.to(device), theirs.to(device)
