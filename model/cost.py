"""What a decoder costs, by formula: parameters, arithmetic, memory. Nothing is built, so 34 B take no longer than 3 M.

With W the width, F the inner width of SwiGLU, H and K the total size of the query and of the key/value heads, V the
vocabulary, and one multiply-add counted as two floating-point operations (FLOPs), a token of a forward pass costs

    blocks × 2 (2 W H + 2 W K + 3 W F)      the projections: two for each of their weights
  + blocks × 4 H × (keys that it sees)      attention: scores, and the mean of the values
  + 2 W V                                   the head

A backward pass costs twice that where everything learns. Norms, RoPE, activation functions and the softmax are left
out: they are below 1 % at width 1,024. Unlike the usual 6 × parameters (Kaplan et al., 2020, arXiv 2001.08361) and
PaLM's 12 × blocks × H × length for attention (arXiv 2204.02311, appendix B), what the causal mask and the packing hide
is not counted, and neither is the embedding.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

from plait.model.config import DecoderConfig
from plait.model.loss import chunk_positions


@dataclass(frozen=True)
class ParameterCount:
    """Parameters of a decoder.

    Attributes:
        embedding: of the embedding.
        block: of one block.
        blocks: number of blocks.
        norm: of the last norm.
        head: of the head; 0 when it is the embedding.
        projections: those of one block that are matrices, which is nearly all.
    """

    embedding: int
    block: int
    blocks: int
    norm: int
    head: int
    projections: int

    @property
    def non_embedding(self) -> int:
        """All but embedding and head."""
        return self.blocks * self.block + self.norm

    @property
    def total(self) -> int:
        """All, a shared embedding counted once."""
        return self.embedding + self.non_embedding + self.head


def count_parameters(config: DecoderConfig) -> ParameterCount:
    """Exactly those of ``Decoder(config)``."""
    inner, inner_kv = _inner(config)
    projections = 2 * config.width * (inner + inner_kv) + 3 * config.width * config.ffn_width
    biases = inner + 2 * inner_kv if config.qkv_bias else 0
    qk_norm = {"none": 0, "rms": 2 * config.head_size, "layer": 2 * (inner + inner_kv)}[config.qk_norm]
    block = projections + biases + qk_norm + 2 * config.width
    table = config.vocabulary_size * config.width
    head = 0 if config.tie_embeddings else table
    return ParameterCount(table, block, config.layers, config.width, head, projections)


@dataclass(frozen=True)
class Flops:
    """Floating-point operations for one token.

    Attributes:
        projections: of all blocks.
        attention: of all blocks.
        head: of the projection onto the vocabulary.
    """

    projections: float
    attention: float
    head: float

    @property
    def total(self) -> float:
        """All of them."""
        return self.projections + self.attention + self.head


def forward_flops(config: DecoderConfig, documents: Sequence[int]) -> Flops:
    """FLOPs of a forward pass for one token, on average over a packed sequence.

    Args:
        config: the decoder.
        documents: their lengths in tokens; one length is a sequence of one document, which costs most.
    """
    inner, _ = _inner(config)
    sizes = count_parameters(config)
    return Flops(
        2.0 * sizes.blocks * sizes.projections,
        4.0 * sizes.blocks * inner * mean_keys(documents, config.sliding_window),
        2.0 * config.width * config.vocabulary_size,
    )


@dataclass(frozen=True)
class Learning:
    """What of a decoder learns, where not everything does.

    Attributes:
        depth: blocks that the backward pass goes through: from the first in which, or before which, something learns.
        weights: share of the blocks' matrices that learns; the others need no gradient of their own.
        head: whether the head learns, or rows of it.
    """

    depth: int
    weights: float
    head: bool

    @classmethod
    def everything(cls, config: DecoderConfig) -> Self:
        """All of it."""
        return cls(config.layers, 1.0, True)


def training_flops(
    config: DecoderConfig, documents: Sequence[int], *, recompute: bool = False, learning: Learning | None = None
) -> Flops:
    """FLOPs of a training step for one token: forward, backward, and with ``recompute`` the blocks once more.

    A backward pass costs as much as the forward pass for the gradients of what went in, and as much again for those of
    the weights.

    Args:
        config: the decoder.
        documents: as in `forward_flops`.
        recompute: activation checkpointing.
        learning: what learns; everything by default.
    """
    forward, learning = forward_flops(config, documents), learning or Learning.everything(config)
    reached, again = learning.depth / config.layers, float(recompute)
    return Flops(
        forward.projections * (1 + reached * (1 + again) + learning.weights),
        forward.attention * (1 + reached * (2 + again)),
        forward.head * (1 + (learning.depth > 0) + learning.head),
    )


def mean_keys(documents: Sequence[int], window: int = 0) -> float:
    """How many keys a token sees on average, itself included, in causal attention over documents of these lengths."""
    seen = 0
    for length in documents:
        near = min(window or length, length)
        seen += near * (near + 1) // 2 + (length - near) * near
    return seen / sum(documents)


def cache_bytes(config: DecoderConfig, value_bytes: float = 2) -> float:
    """Bytes of the KV cache for each position."""
    return 2 * config.layers * _inner(config)[1] * value_bytes


def decode_bytes(
    config: DecoderConfig, context: int, *, rows: int = 1, weight_bytes: float = 2, value_bytes: float = 2
) -> float:
    """Bytes that a decoding step must read: all weights once, and of every row what it attends to.

    Divided by the memory's bandwidth it is the least time that a step can take.

    Args:
        config: the decoder.
        context: tokens that each row sees.
        rows: that are decoded together.
        weight_bytes: of a weight; 1 for int8, 0.5 for int4, scales not counted.
        value_bytes: of a value in the cache.
    """
    sizes = count_parameters(config)
    # Of the embedding only the rows' own entries are read, but a tied head reads all of it.
    weights = sizes.non_embedding + config.width * (config.vocabulary_size + rows)
    seen = min(context, config.sliding_window or context)
    return weights * weight_bytes + rows * seen * cache_bytes(config, value_bytes)


@dataclass(frozen=True)
class Activations:
    """Bytes of a micro-batch's activations; an estimate.

    Attributes:
        kept: from the forward pass for the backward pass.
        working: at the height of what comes and goes besides: the loss, or the backward pass through one block.
    """

    kept: int
    working: int


def count_activations(
    config: DecoderConfig,
    tokens: int,
    value_bytes: int = 2,
    *,
    recompute: bool = False,
    learning: Learning | None = None,
) -> Activations:
    """What a micro-batch needs besides parameters and their gradients.

    It counts what plait's blocks hand to autograd with fused norms and attention: what goes into both norms and
    into the projections after them, queries, keys and values as they are attended to (and as they came, with QK-norm),
    attention's output, and in SwiGLU four tensors of the inner width. A compiler may keep less. A CPU keeps more:
    padding between documents, and all scores with ``attention_dropout``.

    Args:
        config: the decoder.
        tokens: of the micro-batch.
        value_bytes: of an activation.
        recompute: activation checkpointing: only each block's input is kept, and one block at a time is gone through
            again.
        learning: what learns; everything by default.
    """
    learning = learning or Learning.everything(config)
    inner, inner_kv = _inner(config)
    qk_norm = {"none": 0, "rms": 1, "layer": 2}[config.qk_norm]
    values = 4 * config.width + (2 + qk_norm) * (inner + inner_kv) + inner + 4 * config.ffn_width
    mask = config.width if config.dropout else 0  # a byte for each entry
    block = values * value_bytes + 2 * mask
    blocks = learning.depth * (config.width * value_bytes if recompute else block)
    kept = tokens * (blocks + mask + 2 * config.width * value_bytes)
    # The widest gradients of a block are SwiGLU's: of the product and of both its factors.
    backward = tokens * (3 * config.ffn_width * value_bytes + (block if recompute else 0))
    return Activations(kept, max(backward, _loss_bytes(config, tokens, value_bytes, learning.head)))


def _loss_bytes(config: DecoderConfig, tokens: int, value_bytes: int, head_learns: bool) -> int:
    """What `plait.model.loss` holds at its height: some positions' logits, and the gradients of states and head."""
    rows = min(tokens, chunk_positions(tokens, 4 * config.vocabulary_size))
    # float32 is worked on in place; a smaller type needs a float32 copy and one back.
    each = 4 if value_bytes == 4 else 4 + 2 * value_bytes
    logits = rows * config.vocabulary_size * each
    head = config.vocabulary_size * config.width * each if head_learns else 0
    return logits + head + tokens * config.width * value_bytes


def _inner(config: DecoderConfig) -> tuple[int, int]:
    """Total size of the query heads and of the key/value heads."""
    return config.heads * config.head_size, config.kv_heads * config.head_size
