"""The decoder's architecture, in one dataclass."""

import math
from dataclasses import dataclass, field
from typing import Any

from plait.errors import PlaitError

ROPE_SCALINGS = ("none", "linear", "ntk", "dynamic", "yarn", "llama3")
QK_NORMS = ("none", "rms", "layer")
NORM_PLACEMENTS = ("pre", "post")


@dataclass(frozen=True)
class RopeScaling:
    """How rotary frequencies are changed so that a model reads longer sequences than it was trained on.

    Attributes:
        kind: "none"; "linear" divides positions by ``factor`` (arXiv 2306.15595); "ntk" raises theta once and for all,
            "dynamic" by how long the sequence is (NTK-aware scaling); "yarn" (arXiv 2309.00071); "llama3" (Llama 3.1).
        factor: how many times longer.
        original_context: positions that the unscaled model was trained on; for "dynamic", "yarn" and "llama3".
        low_freq_factor: "llama3": wavelengths above ``original_context`` / this are scaled in full.
        high_freq_factor: "llama3": wavelengths below ``original_context`` / this are left alone.
        beta_fast: "yarn": frequencies with more turns than this in ``original_context`` are left alone.
        beta_slow: "yarn": frequencies with fewer turns than this are scaled in full.
        attention_factor: "yarn": factor on queries and keys; 0 is 0.1 ln ``factor`` + 1.
        truncate: "yarn": the bounds between which frequencies are blended are whole numbers.
    """

    kind: str = "none"
    factor: float = 1.0
    original_context: int = 0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    attention_factor: float = 0.0
    truncate: bool = True

    def __post_init__(self) -> None:
        if self.kind not in ROPE_SCALINGS:
            raise PlaitError(f"decoder: rope_scaling.kind is {self.kind!r}, expected {', '.join(ROPE_SCALINGS)}")
        for name in ("factor", "low_freq_factor", "high_freq_factor", "beta_fast", "beta_slow"):
            if not _is_number(value := getattr(self, name)) or value <= 0:
                raise PlaitError(f"decoder: rope_scaling.{name} is {value!r}, must be a number above 0")
        if not _is_number(self.attention_factor) or self.attention_factor < 0:
            raise PlaitError(f"decoder: rope_scaling.attention_factor is {self.attention_factor!r}, must be at least 0")
        if not isinstance(self.truncate, bool):
            raise PlaitError(f"decoder: rope_scaling.truncate is {self.truncate!r}, must be true or false")
        least = int(self.kind in ("dynamic", "yarn", "llama3"))
        if type(self.original_context) is not int or self.original_context < least:
            reason = f"must be a whole number of at least {least} with kind {self.kind}"
            raise PlaitError(f"decoder: rope_scaling.original_context is {self.original_context!r}, {reason}")
        if self.kind == "llama3" and self.low_freq_factor >= self.high_freq_factor:
            raise PlaitError("decoder: rope_scaling.low_freq_factor must be below high_freq_factor")


@dataclass
class DecoderConfig:
    """A Llama-style decoder: RMSNorm, RoPE, grouped-query attention, SwiGLU.

    It is also that of Qwen 2 (``qkv_bias``) and 3 (``qk_norm`` "rms"), Emu3 (dropout), Emu3.5 (``qk_norm`` "rms",
    ``head_size``) and Chameleon (``qk_norm`` "layer"; 34B with ``norm_placement`` "post").

    Attributes:
        vocabulary_size: rows of embedding and head; 0 until the run knows its vocabulary.
        width: size of the residual stream.
        layers: number of blocks.
        heads: query heads.
        kv_heads: key/value heads; ``heads`` is a multiple of it.
        head_size: size of a head, even; 0 means ``width / heads``.
        ffn_width: inner size of SwiGLU; 0 means 8/3 of ``width``, rounded up to a multiple of 64.
        rope_theta: base of the rotary frequencies.
        rope_scaling: how they are stretched.
        norm_eps: added to the mean square in RMSNorm.
        norm_placement: "pre" normalizes what goes into attention and feed-forward, "post" what comes out of them and is
            added to the residual stream (Swin v2, arXiv 2111.09883).
        qk_norm: on queries and keys, per head and before RoPE: "none", "rms" (RMSNorm with one weight for all heads) or
            "layer" (LayerNorm with a weight and a bias for each head, as in Chameleon, arXiv 2405.09818).
        qkv_bias: biases in the query, key and value projections.
        tie_embeddings: the head is the embedding's transpose.
        sliding_window: a token sees itself and this many less one before it; 0 is all.
        dropout: on embeddings and on both residual branches.
        attention_dropout: on attention's weights.
    """

    vocabulary_size: int = 0
    width: int = 256
    layers: int = 4
    heads: int = 4
    kv_heads: int = 2
    head_size: int = 0
    ffn_width: int = 0
    rope_theta: float = 10_000.0
    rope_scaling: RopeScaling = field(default_factory=RopeScaling)
    norm_eps: float = 1e-5
    norm_placement: str = "pre"
    qk_norm: str = "rms"
    qkv_bias: bool = False
    tie_embeddings: bool = True
    sliding_window: int = 0
    dropout: float = 0.0
    attention_dropout: float = 0.0

    def __post_init__(self) -> None:
        # Earlier versions wrote whether there is an RMSNorm.
        self.qk_norm = {"True": "rms", "False": "none"}.get(str(self.qk_norm), self.qk_norm)
        for name in ("width", "layers", "heads", "kv_heads"):
            if type(size := getattr(self, name)) is not int or size < 1:
                raise PlaitError(f"decoder: {name} is {size!r}, must be a whole number of at least 1")
        for name in ("vocabulary_size", "head_size", "ffn_width", "sliding_window"):
            if type(size := getattr(self, name)) is not int or size < 0:
                raise PlaitError(f"decoder: {name} is {size!r}, must be a whole number of at least 0")
        for name in ("rope_theta", "norm_eps"):
            if not _is_number(value := getattr(self, name)) or value <= 0:
                raise PlaitError(f"decoder: {name} is {value!r}, must be a number above 0")
        for name in ("dropout", "attention_dropout"):
            if not _is_number(value := getattr(self, name)) or not 0 <= value < 1:
                raise PlaitError(f"decoder: {name} is {value!r}, must be a number of at least 0 and below 1")
        for name in ("qkv_bias", "tie_embeddings"):
            if not isinstance(value := getattr(self, name), bool):
                raise PlaitError(f"decoder: {name} is {value!r}, must be true or false")
        for name, known in (("qk_norm", QK_NORMS), ("norm_placement", NORM_PLACEMENTS)):
            if (value := getattr(self, name)) not in known:
                raise PlaitError(f"decoder: {name} is {value!r}, expected {', '.join(known)}")
        if not isinstance(self.rope_scaling, RopeScaling):
            raise PlaitError(f"decoder: rope_scaling is {self.rope_scaling!r}, expected settings such as kind: linear")
        if not self.ffn_width:
            self.ffn_width = -(-8 * self.width // (3 * 64)) * 64
        if not self.head_size:
            if self.width % (2 * self.heads):
                raise PlaitError(f"decoder: width {self.width} is not heads ({self.heads}) × an even head size")
            self.head_size = self.width // self.heads
        if self.head_size % 2:
            raise PlaitError(f"decoder: head_size is {self.head_size}, must be even")
        if self.heads % self.kv_heads:
            raise PlaitError(f"decoder: heads ({self.heads}) is not a multiple of kv_heads ({self.kv_heads})")


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
