"""The decoder: a Llama-style transformer over one id space.

It knows nothing of modalities: ids, positions and targets come in, logits or loss sums go out. Parameter names are
those of Llama on Hugging Face.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from plait.errors import PlaitError
from plait.model.attention import Attention, Cached, Packing, Where
from plait.model.cache import KVCache
from plait.model.config import DecoderConfig
from plait.model.loss import LossSums, Targets, next_token_loss
from plait.model.rope import rotary_table


class SwiGLU(nn.Module):
    """Gated feed-forward (Shazeer, 2020, arXiv 2002.05202): ``down(silu(gate(x)) · up(x))``."""

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(config.width, config.ffn_width, bias=False)
        self.up_proj = nn.Linear(config.width, config.ffn_width, bias=False)
        self.down_proj = nn.Linear(config.ffn_width, config.width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """``[B, T, width]`` → the same shape."""
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Block(nn.Module):
    """Pre-norm attention and feed-forward, each added to the residual stream."""

    def __init__(self, config: DecoderConfig, layer: int) -> None:
        super().__init__()
        self.input_layernorm = nn.RMSNorm(config.width, eps=config.norm_eps)
        self.self_attn = Attention(config, layer)
        self.post_attention_layernorm = nn.RMSNorm(config.width, eps=config.norm_eps)
        self.mlp = SwiGLU(config)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x: Tensor, table: tuple[Tensor, Tensor], where: Where) -> Tensor:
        """``[B, T, width]`` → the same shape; the other arguments are `Attention`'s."""
        x = x + self.dropout(self.self_attn(self.input_layernorm(x), table, where))
        return x + self.dropout(self.mlp(self.post_attention_layernorm(x)))


class Decoder(nn.Module):
    """Embedding, blocks, final norm and head.

    Args:
        config: its ``vocabulary_size`` must be set.
    """

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        if config.vocabulary_size < 1:
            raise PlaitError("decoder: vocabulary_size is not set")
        self.config = config
        self.embed_tokens = nn.Embedding(config.vocabulary_size, config.width)
        self.dropout = nn.Dropout(config.dropout)
        self.layers = nn.ModuleList(Block(config, i) for i in range(config.layers))
        self.norm = nn.RMSNorm(config.width, eps=config.norm_eps)
        self.lm_head = nn.Linear(config.width, config.vocabulary_size, bias=False)
        if config.tie_embeddings:
            self.lm_head.weight = self.embed_tokens.weight
        self._initialize()

    def forward(
        self,
        tokens: Tensor,
        positions: Tensor,
        cache: KVCache | None = None,
        targets: Targets | None = None,
        z_loss: float = 0.0,
    ) -> Tensor | LossSums:
        """Logits or loss.

        Args:
            tokens: int64 ``[B, T]``.
            positions: int64 ``[B, T]``, from 0 in every document.
            cache: for generation; rows then hold one document each, and ``tokens`` are those from ``positions`` on.
            targets: for training.
            z_loss: weight of the z-loss.

        Returns:
            logits ``[B, T, vocabulary_size]``, or with ``targets`` the `LossSums`.
        """
        hidden = self._hidden(tokens, positions, cache)
        if targets is None:
            logits: Tensor = self.lm_head(hidden)
            return logits
        return next_token_loss(self.lm_head, hidden, targets, z_loss)

    def next_logits(self, tokens: Tensor, positions: Tensor, cache: KVCache, last: Tensor) -> Tensor:
        """Feed tokens through the cache and return the logits after index ``last`` ``[B]`` of each row, ``[B, V]``."""
        hidden = self._hidden(tokens, positions, cache)
        chosen = hidden[torch.arange(len(hidden), device=hidden.device), last]
        return self.lm_head(chosen).float()

    def _hidden(self, tokens: Tensor, positions: Tensor, cache: KVCache | None) -> Tensor:
        where: Where
        if cache is None:
            where = Packing.of(positions)
        else:
            used = int(positions.max()) + 1
            if used > cache.capacity:
                raise PlaitError(f"generation: position {used - 1} is beyond the cache's {cache.capacity} slots")
            seen = torch.arange(used, device=tokens.device) <= positions[:, None, :, None]
            where = Cached(cache, positions, None if bool(seen.all()) else seen, used)
        table = rotary_table(positions, self.config.head_size, self.config.rope_theta)
        x = self.dropout(self.embed_tokens(tokens))
        for block in self.layers:
            x = block(x, table, where)
        normed: Tensor = self.norm(x)
        return normed

    @torch.no_grad()
    def _initialize(self) -> None:
        """Normal with standard deviation 0.02; projections into the residual stream are scaled by depth (GPT-2)."""
        for name, parameter in self.named_parameters():
            if parameter.ndim == 2:
                into_residual = name.endswith(("o_proj.weight", "down_proj.weight"))
                nn.init.normal_(parameter, std=0.02 / math.sqrt(2 * self.config.layers) if into_residual else 0.02)
