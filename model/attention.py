"""Causal grouped-query attention: projections, QK-norm and rotation; packed documents in training, a cache after it."""

from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from plait.model.config import DecoderConfig
from plait.model.norm import RMSNorm
from plait.model.rope import Table, rotate


class Place(Protocol):
    """Where the tokens of a forward pass stand, and so what they see: `Packing`, `FlexPacking` or `Cached`."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor, layer: int, window: int, dropout: float) -> Tensor:
        """``[B, T, heads, d]`` of queries, and of as many or fewer heads of keys and values, → the shape of ``q``."""


class HeadNorm(nn.Module):
    """LayerNorm over each head, with a weight and a bias for each head (Chameleon, arXiv 2405.09818)."""

    EPS = 1e-5  # the models' other norms may have another

    def __init__(self, heads: int, head_size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(heads, head_size))
        self.bias = nn.Parameter(torch.zeros(heads, head_size))

    def forward(self, x: Tensor) -> Tensor:
        """``[..., heads, head_size]`` → the same shape."""
        return F.layer_norm(x, x.shape[-1:], eps=self.EPS) * self.weight + self.bias


def build_qk_norm(config: DecoderConfig, heads: int) -> nn.Module:
    """The norm on queries or keys."""
    match config.qk_norm:
        case "rms":
            return RMSNorm(config.head_size, eps=config.norm_eps)
        case "layer":
            return HeadNorm(heads, config.head_size)
    return nn.Identity()


class Attention(nn.Module):
    """Self-attention over ``[B, T, width]``."""

    def __init__(self, config: DecoderConfig, layer: int) -> None:
        super().__init__()
        self.layer, self.window, self.dropout = layer, config.sliding_window, config.attention_dropout
        self.head_size = config.head_size
        inner, inner_kv = config.heads * config.head_size, config.kv_heads * config.head_size
        self.q_proj = nn.Linear(config.width, inner, bias=config.qkv_bias)
        self.k_proj = nn.Linear(config.width, inner_kv, bias=config.qkv_bias)
        self.v_proj = nn.Linear(config.width, inner_kv, bias=config.qkv_bias)
        self.o_proj = nn.Linear(inner, config.width, bias=False)
        self.q_norm = build_qk_norm(config, config.heads)
        self.k_norm = build_qk_norm(config, config.kv_heads)

    def forward(self, x: Tensor, table: Table, place: Place) -> Tensor:
        """Attend.

        Args:
            x: ``[B, T, width]``.
            table: rotary cosines and sines ``[B, T, head_size / 2]``.
            place: the packing in training, the place in the cache in generation.
        """
        q, k, v = (f(x).unflatten(-1, (-1, self.head_size)) for f in (self.q_proj, self.k_proj, self.v_proj))
        q, k = rotate(self.q_norm(q), table), rotate(self.k_norm(k), table)
        out = place.attend(q, k, v, self.layer, self.window, self.dropout if self.training else 0.0)
        return self.o_proj(out.flatten(-2))
