"""How released checkpoints name and lay out a decoder's tensors, in both directions.

transformers' names are ours behind a prefix. Meta's (Llama's and Chameleon's releases) are others; there each file is
one rank of a tensor-parallel model and holds a slice of every matrix, and rotary pairs lie side by side instead of in
the two halves of a head.
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from plait.errors import PlaitError
from plait.model.config import DecoderConfig

EMBEDDING, HEAD = "embed_tokens.weight", "lm_head.weight"


@dataclass(frozen=True)
class Names:
    """What transformers puts before the decoder's names, and what it calls the head."""

    prefix: str
    head: str = HEAD

    def of(self, name: str) -> str:
        """Their name of our tensor."""
        return self.head if name == HEAD else self.prefix + name


# For writing, by model_type; other models have Llama's.
LLAMA = Names("model.")
EMU3_WHOLE = Names("text_model.model.", "text_model.lm_head.weight")
# For reading. Emu3 was renamed between versions of transformers; the last is a bare model without a head.
KNOWN_NAMES = (LLAMA, Names("model.text_model."), EMU3_WHOLE, Names("text_model.", HEAD), Names(""))


def find_names(tensors: Collection[str]) -> Names | None:
    """Which names these are, by where the embedding is."""
    return next((names for names in KNOWN_NAMES if names.of(EMBEDDING) in tensors), None)


def is_surplus(name: str) -> bool:
    """Whether a tensor is one that old checkpoints stored and that follows from the configuration."""
    return name.endswith("rotary_emb.inv_freq") or name == "rope.freqs"


# Meta's layout

_OUTER = {EMBEDDING: "tok_embeddings.weight", "norm.weight": "norm.weight", HEAD: "output.weight"}
_INNER = {
    "input_layernorm": "attention_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attention.wq",
    "self_attn.k_proj": "attention.wk",
    "self_attn.v_proj": "attention.wv",
    "self_attn.o_proj": "attention.wo",
    "self_attn.q_norm": "attention.q_normalization",
    "self_attn.k_norm": "attention.k_normalization",
    "mlp.gate_proj": "feed_forward.w1",
    "mlp.down_proj": "feed_forward.w2",
    "mlp.up_proj": "feed_forward.w3",
}
_ROWS = ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj", "lm_head")  # cut into shards along their outputs
_COLUMNS = ("o_proj", "down_proj")  # along their inputs


def meta_name(name: str) -> str:
    """Meta's name of our tensor."""
    if name in _OUTER:
        return _OUTER[name]
    _, index, rest = name.split(".", 2)
    part, _, end = rest.rpartition(".")
    return f"layers.{index}.{_INNER[part]}.{end}"


def join_meta(name: str, parts: Sequence[Tensor], config: DecoderConfig) -> Tensor:
    """Our tensor from each shard's part of it, which may be on the meta device.

    Raises:
        RuntimeError, IndexError, ZeroDivisionError: the parts do not fit together.
    """
    kind = _kind(name)
    if kind in ("q_norm", "k_norm"):
        heads = config.heads if kind == "q_norm" else config.kv_heads
        # Of each shard one norm, which all its heads share; some files hold several.
        rows = _cat([part.reshape(-1, config.head_size) for part in parts], 0)
        return _to_halves(rows.unsqueeze(-1)).squeeze(-1).repeat_interleave(heads // len(rows), 0)
    if kind in ("q_proj", "k_proj"):
        joined = _cat(parts, 0)
        return _to_halves(joined.view(-1, config.head_size, joined.shape[-1])).view_as(joined)
    if kind in _ROWS:
        return _cat(parts, 0)
    if kind in _COLUMNS:
        return _cat(parts, 1)
    if kind == "embed_tokens":  # Llama 3 cuts it by rows, all before by columns
        return _cat(parts, 0 if parts[0].shape[-1] == config.width else 1)
    # Norms are the same in every shard, but for what drifted in training.
    same = all(p.is_meta or torch.equal(p, parts[0]) for p in parts[1:])
    return parts[0] if same else torch.stack(list(parts)).mean(dim=0)


def split_meta(name: str, tensor: Tensor, shards: int, config: DecoderConfig) -> list[Tensor]:
    """Each shard's part of our tensor; what `join_meta` puts together."""
    kind = _kind(name)
    if kind in ("q_norm", "k_norm"):
        rows = tensor.view(shards, -1, config.head_size)[:, :1]
        return [_to_pairs(row.unsqueeze(-1)).flatten() for row in rows]
    if kind in ("q_proj", "k_proj"):
        tensor = _to_pairs(tensor.view(-1, config.head_size, tensor.shape[-1])).reshape(tensor.shape)
    if kind in _ROWS:
        return list(tensor.chunk(shards, 0))
    if kind in (*_COLUMNS, "embed_tokens"):
        return list(tensor.chunk(shards, 1))
    return [tensor] * shards


def meta_shards(norms: dict[str, Tensor], config: DecoderConfig) -> int:
    """The fewest tensor-parallel shards that can hold these QK-norms: a shard has one for all its heads.

    Args:
        norms: tensors ``[heads, head_size]`` or ``[kv_heads, head_size]``; none without QK-norm.
        config: the decoder's.

    Raises:
        PlaitError: the heads differ in a way that no number of shards gives.
    """
    for shards in range(1, config.kv_heads + 1):
        fits = not any(size % shards for size in (config.heads, config.kv_heads, config.ffn_width, config.width))
        if fits and config.vocabulary_size % shards == 0 and all(_is_shared(n, shards) for n in norms.values()):
            return shards
    raise PlaitError("export: the heads' QK-norms differ in a way that Meta's layout cannot hold; use --to hf")


def _is_shared(norm: Tensor, shards: int) -> bool:
    grouped = norm.unflatten(0, (shards, -1))
    return torch.equal(grouped, grouped[:, :1].expand_as(grouped))


def _kind(name: str) -> str:
    return name.split(".")[-2]


def _cat(parts: Sequence[Tensor], axis: int) -> Tensor:
    if len(parts) == 1:
        return parts[0]
    if not parts[0].is_meta:
        return torch.cat(list(parts), axis)
    # PyTorch's own, on the meta device, first imports 150 MB of modules.
    if len({(*part.shape[:axis], *part.shape[axis + 1 :]) for part in parts}) > 1:
        raise RuntimeError("the parts have different shapes")
    size = list(parts[0].shape)
    size[axis] = sum(part.shape[axis] for part in parts)
    return parts[0].new_empty(size)


def _to_halves(x: Tensor) -> Tensor:
    """Rotary pairs side by side → in halves, along dim 1 of ``[heads, head_size, …]``."""
    return x.unflatten(1, (-1, 2)).transpose(1, 2).reshape(x.shape)


def _to_pairs(x: Tensor) -> Tensor:
    """The inverse of `_to_halves`."""
    return x.unflatten(1, (2, -1)).transpose(1, 2).reshape(x.shape)
