"""Causal grouped-query attention: packed documents in training, a KV cache in generation.

In training a row holds several documents, each with positions from 0, and no document sees another. Every document
then is a row of its own in one padded, plainly causal attention: exact, and as fast as the documents are short.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from plait.model.cache import KVCache
from plait.model.config import DecoderConfig
from plait.model.rope import rotate


@dataclass
class Packing:
    """Where the documents of a batch ``[B, T]`` lie.

    Attributes:
        gather: int64 ``[documents, longest]``, index into ``B·T``; the padding repeats some valid index.
        valid: bool ``[documents, longest]``; its True entries in order are the tokens in order.
    """

    gather: Tensor
    valid: Tensor

    @classmethod
    def of(cls, positions: Tensor) -> "Packing":
        """Find the documents: one begins wherever a position is 0 (and at the start of every row)."""
        begins = positions == 0
        begins[:, 0] = True
        starts = begins.flatten().nonzero().flatten()
        total = torch.tensor([positions.numel()], device=positions.device)
        lengths = torch.diff(starts, append=total)
        step = torch.arange(int(lengths.max()), device=positions.device)
        gather = (starts[:, None] + step).clamp_max(positions.numel() - 1)
        return cls(gather, step < lengths[:, None])


@dataclass
class Cached:
    """A place in the KV cache.

    Attributes:
        cache: to write to and attend over.
        positions: int64 ``[B, T]`` of the new tokens.
        mask: bool ``[B, 1, T, used]`` of what each may see; None when all may see all.
        used: slots in use.
    """

    cache: KVCache
    positions: Tensor
    mask: Tensor | None
    used: int


Where = Packing | Cached


class Attention(nn.Module):
    """Self-attention over ``[B, T, width]``."""

    def __init__(self, config: DecoderConfig, layer: int) -> None:
        super().__init__()
        self.layer = layer
        self.heads, self.kv_heads, self.head_size = config.heads, config.kv_heads, config.head_size
        self.q_proj = nn.Linear(config.width, config.heads * config.head_size, bias=False)
        self.k_proj = nn.Linear(config.width, config.kv_heads * config.head_size, bias=False)
        self.v_proj = nn.Linear(config.width, config.kv_heads * config.head_size, bias=False)
        self.o_proj = nn.Linear(config.heads * config.head_size, config.width, bias=False)
        self.q_norm = nn.RMSNorm(config.head_size, eps=config.norm_eps) if config.qk_norm else nn.Identity()
        self.k_norm = nn.RMSNorm(config.head_size, eps=config.norm_eps) if config.qk_norm else nn.Identity()

    def forward(self, x: Tensor, table: tuple[Tensor, Tensor], where: Where) -> Tensor:
        """Attend.

        Args:
            x: ``[B, T, width]``.
            table: rotary cosines and sines ``[B, T, head_size / 2]``.
            where: the packing in training, the place in the cache in generation.
        """
        q = self.q_norm(rearrange(self.q_proj(x), "b t (n d) -> b t n d", n=self.heads))
        k = self.k_norm(rearrange(self.k_proj(x), "b t (n d) -> b t n d", n=self.kv_heads))
        v = rearrange(self.v_proj(x), "b t (n d) -> b t n d", n=self.kv_heads)
        q, k = rotate(q, table), rotate(k, table)
        out = self._packed(q, k, v, where) if isinstance(where, Packing) else self._cached(q, k, v, where)
        return self.o_proj(rearrange(out, "b t n d -> b t (n d)"))

    def _packed(self, q: Tensor, k: Tensor, v: Tensor, packing: Packing) -> Tensor:
        rows = len(q)
        q, k, v = (rearrange(x, "b t n d -> (b t) n d")[packing.gather].transpose(1, 2) for x in (q, k, v))
        out = F.scaled_dot_product_attention(q, self._spread(k), self._spread(v), is_causal=True)
        return rearrange(out.transpose(1, 2)[packing.valid], "(b t) n d -> b t n d", b=rows)

    def _cached(self, q: Tensor, k: Tensor, v: Tensor, at: Cached) -> Tensor:
        k, v = at.cache.update(self.layer, k, v, at.positions, at.used)
        out = F.scaled_dot_product_attention(q.transpose(1, 2), self._spread(k), self._spread(v), attn_mask=at.mask)
        return out.transpose(1, 2)

    def _spread(self, x: Tensor) -> Tensor:
        """Give every query head its key/value head: ``[B, kv_heads, S, d]`` → ``[B, heads, S, d]``."""
        return x if self.heads == self.kv_heads else x.repeat_interleave(self.heads // self.kv_heads, dim=1)
