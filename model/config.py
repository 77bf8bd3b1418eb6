"""The decoder's architecture, in one dataclass."""

from dataclasses import dataclass

from plait.errors import PlaitError


@dataclass
class DecoderConfig:
    """A Llama-style decoder: pre-norm, RoPE, grouped-query attention, SwiGLU, no biases.

    Attributes:
        vocabulary_size: rows of embedding and head; 0 until the run knows its vocabulary.
        width: size of the residual stream.
        layers: number of blocks.
        heads: query heads; ``width`` is a multiple of it.
        kv_heads: key/value heads; ``heads`` is a multiple of it.
        ffn_width: inner size of SwiGLU; 0 means 8/3 of ``width``, rounded up to a multiple of 64.
        rope_theta: base of the rotary frequencies.
        norm_eps: added to the mean square in RMSNorm.
        qk_norm: RMSNorm on each query and key head before RoPE (arXiv 2302.05442).
        tie_embeddings: the head is the embedding's transpose.
        dropout: on embeddings and on both residual branches.
    """

    vocabulary_size: int = 0
    width: int = 256
    layers: int = 4
    heads: int = 4
    kv_heads: int = 2
    ffn_width: int = 0
    rope_theta: float = 10_000.0
    norm_eps: float = 1e-5
    qk_norm: bool = True
    tie_embeddings: bool = True
    dropout: float = 0.0

    def __post_init__(self) -> None:
        for name in ("width", "layers", "heads", "kv_heads"):
            if not isinstance(size := getattr(self, name), int) or size < 1:
                raise PlaitError(f"decoder: {name} is {size!r}, must be a whole number of at least 1")
        if not isinstance(self.ffn_width, int) or self.ffn_width < 0:
            raise PlaitError(f"decoder: ffn_width is {self.ffn_width!r}, must be a whole number of at least 0")
        if not (self.rope_theta > 0 and self.norm_eps > 0):
            raise PlaitError(f"decoder: rope_theta ({self.rope_theta}) and norm_eps ({self.norm_eps}) must be above 0")
        if not 0 <= self.dropout < 1:
            raise PlaitError(f"decoder: dropout is {self.dropout}, must be at least 0 and below 1")
        if not self.ffn_width:
            self.ffn_width = -(-8 * self.width // (3 * 64)) * 64
        if self.width % (2 * self.heads):
            raise PlaitError(f"decoder: width {self.width} is not heads ({self.heads}) × an even head size")
        if self.heads % self.kv_heads:
            raise PlaitError(f"decoder: heads ({self.heads}) is not a multiple of kv_heads ({self.kv_heads})")

    @property
    def head_size(self) -> int:
        """Size of one attention head."""
        return self.width // self.heads
