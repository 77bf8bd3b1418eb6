"""The decoder: a Llama-style transformer over one id space.

It knows nothing of modalities: ids, positions and targets come in, logits or loss sums go out. Parameter names are
those of Llama on Hugging Face.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from plait.errors import PlaitError
from plait.model.attention import Attention, Place
from plait.model.cache import Cached, KVCache
from plait.model.config import DecoderConfig
from plait.model.loss import Head, LossSums, Targets
from plait.model.norm import RMSNorm
from plait.model.packing import document_lengths, find_documents
from plait.model.rope import Rotary, Table
from plait.model.step import Step


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
    """Attention and feed-forward, each added to the residual stream, normalized before or after."""

    def __init__(self, config: DecoderConfig, layer: int) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(config.width, eps=config.norm_eps)
        self.self_attn = Attention(config, layer)
        self.post_attention_layernorm = RMSNorm(config.width, eps=config.norm_eps)
        self.mlp = SwiGLU(config)
        self.dropout = nn.Dropout(config.dropout)
        self.normalizes_first = config.norm_placement == "pre"

    def forward(self, x: Tensor, table: Table, place: Place) -> Tensor:
        """``[B, T, width]`` → the same shape; the other arguments are `Attention`'s."""
        if self.normalizes_first:
            x = x + self.dropout(self.self_attn(self.input_layernorm(x), table, place))
            return x + self.dropout(self.mlp(self.post_attention_layernorm(x)))
        x = x + self.dropout(self.input_layernorm(self.self_attn(x, table, place)))
        return x + self.dropout(self.post_attention_layernorm(self.mlp(x)))


class Decoder(nn.Module):
    """Embedding, blocks, final norm and head.

    Args:
        config: its ``vocabulary_size`` must be set.

    Attributes:
        checkpoint_activations: in training, keep only each block's input and compute the rest again in the backward
            pass (arXiv 1604.06174).
    """

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        if config.vocabulary_size < 1:
            raise PlaitError("decoder: vocabulary_size is not set")
        self.config = config
        self.checkpoint_activations = False
        self.rotary = Rotary(config)
        self._step: Step | None = None
        self.embed_tokens = nn.Embedding(config.vocabulary_size, config.width)
        self.dropout = nn.Dropout(config.dropout)
        self.layers = nn.ModuleList(Block(config, i) for i in range(config.layers))
        self.norm = RMSNorm(config.width, eps=config.norm_eps)
        self.lm_head = Head(config.width, config.vocabulary_size)
        if config.tie_embeddings:
            self.lm_head.weight = self.embed_tokens.weight
        self._initialize()

    def forward(
        self,
        tokens: Tensor,
        positions: Tensor | None = None,
        cache: KVCache | None = None,
        targets: Targets | None = None,
        z_loss: float = 0.0,
    ) -> Tensor | LossSums:
        """Logits or loss.

        Args:
            tokens: int64 ``[B, T]``.
            positions: int64 ``[B, T]``, from 0 in every document; by default each row is one document.
            cache: for generation; rows then hold one document each, and ``tokens`` are those from ``positions`` on.
            targets: for training.
            z_loss: weight of the z-loss.

        Returns:
            logits ``[B, T, vocabulary_size]``, or with ``targets`` the `LossSums`.
        """
        if positions is None:
            positions = torch.arange(tokens.shape[1], device=tokens.device).expand_as(tokens)
        hidden = self._hidden(tokens, positions, cache)
        out: Tensor | LossSums = self.lm_head(hidden) if targets is None else self.lm_head(hidden, targets, z_loss)
        return out

    @torch.no_grad()
    def next_logits(self, tokens: Tensor, positions: Tensor, cache: KVCache, last: Tensor) -> Tensor:
        """Feed tokens through the cache and return the logits after index ``last`` ``[B]`` of each row, ``[B, V]``."""
        rows, count = tokens.shape
        wanted = torch.arange(rows, device=tokens.device)
        if count > 1:
            wanted = wanted * count + last
        if self._step is None or not self._step.is_current():
            self._step = Step(self)
        if self.training or self._step.has_hooks():
            hidden = self._hidden(tokens, positions, cache)
        elif (native := self._step.native) is not None and native.takes(tokens, cache):
            cache.place(positions)
            chosen = native(tokens, positions, cache, wanted)
            return chosen if native.has_head else self.lm_head(chosen).float()
        else:
            hidden = self._step(tokens, *self._place(positions, cache))
        return self.lm_head(hidden.flatten(0, 1)[wanted]).float()

    def _hidden(self, tokens: Tensor, positions: Tensor, cache: KVCache | None) -> Tensor:
        place: Place
        if cache is None:
            place = find_documents(positions, self.config.sliding_window, self._attention_dropout)
            lengths = document_lengths(positions) if self.rotary.is_dynamic else None
            table = self.rotary.table(positions, lengths)
        else:
            table, place = self._place(positions, cache)
        x = self.dropout(self.embed_tokens(tokens))
        recompute = self.checkpoint_activations and torch.is_grad_enabled()
        for block in self.layers:
            x = checkpoint(block, x, table, place, use_reentrant=False) if recompute else block(x, table, place)
        normed: Tensor = self.norm(x)
        return normed

    def _place(self, positions: Tensor, cache: KVCache) -> tuple[Table, Cached]:
        place = cache.place(positions)
        lengths = (positions.amax(1, keepdim=True) + 1).expand_as(positions) if self.rotary.is_dynamic else None
        return self.rotary.table(positions, lengths), place

    @property
    def _attention_dropout(self) -> float:
        return self.config.attention_dropout if self.training else 0.0

    @torch.no_grad()
    def _initialize(self) -> None:
        """Normal with standard deviation 0.02; projections into the residual stream are scaled by depth (GPT-2)."""
        for name, module in self.named_modules():
            if isinstance(module, (nn.Linear, nn.Embedding)):
                into_residual = name.endswith(("o_proj", "down_proj"))
                std = 0.02 / math.sqrt(2 * self.config.layers) if into_residual else 0.02
                nn.init.normal_(module.weight, std=std)
            if isinstance(module, nn.Linear) and module.bias is not None:
                nn.init.zeros_(module.bias)
