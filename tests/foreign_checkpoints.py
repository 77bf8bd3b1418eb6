"""Random checkpoints of other projects, as transformers writes them."""

import json
import os
from pathlib import Path
from typing import Any

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

import torch
from torch import Tensor

SMALL = {
    "vocab_size": 61, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 64, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
EMU3_VQ = {
    "codebook_size": 16, "embed_dim": 4, "latent_channels": 4, "base_channels": 32, "channel_multiplier": [1, 1],
    "num_res_blocks": 1, "attn_resolutions": [1], "hidden_size": 32,
}  # fmt: skip
CHAMELEON_VQ = {
    "embed_dim": 8, "num_embeddings": 16, "latent_channels": 8, "resolution": 8, "base_channels": 32,
    "channel_multiplier": [1, 1], "num_res_blocks": 1,
}  # fmt: skip
# Image codes are the last ids of Emu3 and early ones of Chameleon.
EMU3_MAP = {"<image>": 3, "<|extra_200|>": 4} | {f"<|visual token {i:06}|>": 45 + i for i in range(16)}
CHAMELEON_MAP = {"<image>": 50} | {f"IMGIMG{''.join(chr(65 + int(d)) for d in str(i))}Z": 4 + i for i in range(16)}


def build(kind: str, **fields: Any) -> torch.nn.Module:
    """A model of transformers with random weights, large enough that every part shows in the logits."""
    import transformers as hf

    fields = {**SMALL, **fields}
    own_map = fields.pop("vocabulary_map", None)
    if kind == "emu3":
        inner = {k: v for k, v in fields.items() if k != "tie_word_embeddings"}
        tied = fields.get("tie_word_embeddings", False)
        config: Any = hf.Emu3Config(
            text_config=inner, vq_config=EMU3_VQ, vocabulary_map=own_map or EMU3_MAP, tie_word_embeddings=tied
        )
        model: Any = hf.Emu3ForConditionalGeneration(config)
    elif kind == "chameleon":
        model = hf.ChameleonForConditionalGeneration(
            hf.ChameleonConfig(**fields, vq_config=CHAMELEON_VQ, vocabulary_map=own_map or CHAMELEON_MAP)
        )
    elif kind == "emu3-text":
        model = hf.Emu3ForCausalLM(hf.Emu3TextConfig(**fields))
    else:
        name = {"llama": "Llama", "mistral": "Mistral", "qwen2": "Qwen2", "qwen3": "Qwen3"}[kind]
        model = getattr(hf, f"{name}ForCausalLM")(getattr(hf, f"{name}Config")(**fields))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(1.0 if parameter.ndim == 1 else 0.0, 0.25)
    return model.eval()


def save(model: Any, folder: Path, shard: str = "5GB") -> Path:
    model.save_pretrained(folder, max_shard_size=shard)
    return folder


@torch.no_grad()
def logits(model: Any, tokens: Tensor) -> Tensor:
    """The logits, of Chameleon those that transformers hides too: of image codes."""
    inner = getattr(model, "model", model)
    hidden = getattr(inner, "language_model", inner)(input_ids=tokens).last_hidden_state
    return model.lm_head(hidden)


def to_meta(state: dict[str, Tensor], heads: dict[str, int], size: int, shards: int) -> list[dict[str, Tensor]]:
    """Chameleon's release from transformers' state dict, row by row and without the converter."""
    files: list[dict[str, Tensor]] = [{"rope.freqs": torch.ones(size // 2)} for _ in range(shards)]
    rename = {
        "q_proj": "attention.wq", "k_proj": "attention.wk", "v_proj": "attention.wv", "o_proj": "attention.wo",
        "gate_proj": "feed_forward.w1", "up_proj": "feed_forward.w3", "down_proj": "feed_forward.w2",
        "input_layernorm": "attention_norm", "post_attention_layernorm": "ffn_norm",
        "q_norm": "attention.q_normalization", "k_norm": "attention.k_normalization",
    }  # fmt: skip
    # Place 2i of a head in Meta's layout is place i of transformers', 2i + 1 is place i + size / 2.
    order = [i // 2 + (i % 2) * (size // 2) for i in range(size)]
    for name, tensor in state.items():
        parts = name.removeprefix("model.").split(".")
        if parts[0] == "vqmodel":
            continue
        kind = parts[-2]
        if kind in ("q_proj", "k_proj"):
            rows = [head * size + place for head in range(heads[kind[0]]) for place in order]
            tensor = tensor[rows]
        new = {"embed_tokens": "tok_embeddings", "lm_head": "output", "norm": "norm"}.get(kind)
        new = f"{new}.weight" if new else f"layers.{parts[1]}.{rename[kind]}.{parts[-1]}"
        for i, file in enumerate(files):
            if kind in ("q_norm", "k_norm"):
                file[new] = tensor[i * heads[kind[0]] // shards][order].clone()
            elif kind in ("o_proj", "down_proj", "embed_tokens"):
                file[new] = tensor.chunk(shards, dim=1)[i].clone()
            elif kind.endswith(("_proj", "lm_head")):
                file[new] = tensor.chunk(shards, dim=0)[i].clone()
            else:
                file[new] = tensor.clone()
    return files


def chameleon(shards: int, **fields: Any) -> Any:
    """A Chameleon as was trained on so many tensor-parallel ranks: each has one QK-norm for its heads."""
    model = build("chameleon", **{"vocab_size": 64, "num_key_value_heads": 4, **fields})
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".q_norm." in name or ".k_norm." in name:
                rows = len(parameter) // shards
                parameter.copy_(parameter[::rows].repeat_interleave(rows, 0))
    return model


def save_meta(model: Any, folder: Path, shards: int, name: str = "consolidated.{:02}.pth") -> Path:
    config = model.config
    heads = {"q": config.num_attention_heads, "k": config.num_key_value_heads}
    folder.mkdir(parents=True)
    for i, file in enumerate(to_meta(model.state_dict(), heads, 8, shards)):
        torch.save(file, folder / name.format(i))
    params = {
        "dim": 32, "n_layers": 2, "n_heads": heads["q"], "n_kv_heads": heads["k"], "vocab_size": config.vocab_size,
        "multiple_of": 16, "ffn_dim_multiplier": 0.5, "norm_eps": config.rms_norm_eps, "rope_theta": 10000.0,
        "qk_normalization": True, "swin_norm": config.swin_norm,
    }  # fmt: skip
    (folder / "params.json").write_text(json.dumps({"model": params}))
    (folder / "consolidate_params.json").write_text(json.dumps({"model_parallel_size": shards}))
    return folder
