"""Attention over packed documents: a row holds several, each with positions from 0, and none sees another.

On a CPU (`Packing`) every document becomes a row of its own in a plainly causal attention, documents of like length
together: exact, and as fast as the documents are short. On a GPU (`FlexPacking`) the rows stay as they are and
FlexAttention leaves out the blocks of the mask in which nothing is seen; it has not been run on a GPU yet. Inside
``torch.compile``, where no shape may depend on the data, there is the whole mask (`MaskPacking`).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass
class Bucket:
    """Documents that are attended to together.

    Attributes:
        gather: int64 ``[documents, longest]``, index into ``B·T``; the padding repeats some valid index.
        valid: bool ``[documents, longest]``, what is not padding; None where nothing is.
    """

    gather: Tensor
    valid: Tensor | None


@dataclass
class Packing:
    """Where the documents of a batch ``[B, T]`` lie.

    Attributes:
        buckets: documents whose lengths round up to the same power of two.
        order: int64 ``[B·T]``, where each token is among the buckets' valid tokens, laid end to end; None when the
            documents lie in their order and all have ``length`` tokens, which needs no gathering.
        length: of the longest document.
    """

    buckets: list[Bucket]
    order: Tensor | None
    length: int

    @classmethod
    def of(cls, positions: Tensor) -> "Packing":
        """Lay out the documents of ``positions`` ``[B, T]``."""
        starts, lengths = lay_out(positions)
        longest = int(lengths.max())
        if int(lengths.min()) == longest:
            return cls([], None, longest)
        sizes = 2 ** (lengths - 1).clamp_min(15).log2().floor().long()  # short ones all together
        buckets = [_bucket(starts[chosen], lengths[chosen]) for size in sizes.unique() for chosen in [sizes == size]]
        parts = [b.gather.flatten() if b.valid is None else b.gather[b.valid] for b in buckets]
        return cls(buckets, torch.cat(parts).argsort(), longest)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, layer: int, window: int, dropout: float) -> Tensor:
        """Causal attention within each document.

        Args:
            q: ``[B, T, heads, d]``.
            k: ``[B, T, kv_heads, d]``.
            v: as ``k``.
            layer: which layer's it is; nothing is kept here.
            window: tokens that a token sees, itself included; 0 is all.
            dropout: on the weights.

        Returns:
            ``[B, T, heads, d]``.
        """
        if self.order is None:
            rows = [x.reshape(-1, self.length, *x.shape[2:]) for x in (q, k, v)]
            return _causal(rows, window, dropout).reshape(q.shape)
        flat = [x.flatten(0, 1) for x in (q, k, v)]
        outs = []
        for bucket in self.buckets:
            out = _causal([x[bucket.gather] for x in flat], window, dropout)
            outs.append(out.flatten(0, 1) if bucket.valid is None else out[bucket.valid])
        return torch.cat(outs)[self.order].view(q.shape)


@dataclass
class FlexPacking:
    """The mask of a batch for FlexAttention, which compiles a kernel for it.

    Attributes:
        mask: the blocks in which something is seen.
    """

    mask: Any

    @classmethod
    def of(cls, positions: Tensor, window: int) -> "FlexPacking":
        """The mask of ``positions`` ``[B, T]``; ``window`` as in `Packing.attend`."""
        from torch.nn.attention.flex_attention import create_block_mask

        document = number_documents(positions)

        def sees(b: Tensor, h: Tensor, query: Tensor, key: Tensor) -> Tensor:
            near = (query >= key) & (document[b, query] == document[b, key])
            return near & (query - key < window) if window else near

        rows, length = positions.shape
        mask = create_block_mask(sees, rows, None, length, length, device=str(positions.device))
        return cls(mask)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, layer: int, window: int, dropout: float) -> Tensor:
        """As `Packing.attend`, but without dropout."""
        assert not dropout, "FlexAttention has no dropout"
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        flex = _flex_attention(q.device.type)
        return flex(q, k, v, block_mask=self.mask, enable_gqa=q.shape[1] != k.shape[1]).transpose(1, 2)


@dataclass
class MaskPacking:
    """The mask of a batch in full.

    Attributes:
        mask: bool ``[B, 1, T, T]``, which queries see which keys.
    """

    mask: Tensor

    @classmethod
    def of(cls, positions: Tensor, window: int) -> "MaskPacking":
        """The mask of ``positions`` ``[B, T]``; ``window`` as in `Packing.attend`."""
        document = number_documents(positions)
        same = document[:, :, None] == document[:, None, :]
        step = torch.arange(positions.shape[1], device=positions.device)
        behind = step[:, None] - step
        seen = (behind >= 0) & (behind < window) if window else behind >= 0
        return cls((same & seen)[:, None])

    def attend(self, q: Tensor, k: Tensor, v: Tensor, layer: int, window: int, dropout: float) -> Tensor:
        """As `Packing.attend`."""
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        grouped = q.shape[1] != k.shape[1]
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=self.mask, dropout_p=dropout, enable_gqa=grouped)
        return out.transpose(1, 2)


def number_documents(positions: Tensor) -> Tensor:
    """Which of its row's documents each token belongs to, int64 ``[B, T]`` from 1.

    A document begins wherever a position is 0, and at the start of every row.
    """
    column = torch.arange(positions.shape[1], device=positions.device)
    return ((positions == 0) | (column == 0)).cumsum(1)


def document_lengths(positions: Tensor) -> Tensor:
    """How long the document of each token is, int64 ``[B, T]``."""
    document = number_documents(positions)
    counts = torch.zeros(len(positions), positions.shape[1] + 1, dtype=torch.int64, device=positions.device)
    return counts.scatter_add(1, document, torch.ones_like(document)).gather(1, document)


def lay_out(positions: Tensor) -> tuple[Tensor, Tensor]:
    """Where in ``B·T`` each document starts and how long it is, both int64 ``[documents]``."""
    document = number_documents(positions)
    begins = torch.diff(document, dim=1, prepend=torch.zeros_like(document[:, :1])) > 0
    starts = begins.flatten().nonzero().flatten()
    return starts, torch.diff(starts, append=torch.tensor([positions.numel()], device=positions.device))


@cache
def _flex_attention(device: str) -> Any:
    from torch.nn.attention.flex_attention import flex_attention

    # Without compilation it holds all the scores at once, which is for tests only.
    attend: Any = torch.compile(flex_attention) if device == "cuda" else flex_attention
    return attend


def find_documents(positions: Tensor, window: int, dropout: float) -> Packing | FlexPacking | MaskPacking:
    """The packing for where this runs; FlexAttention has no dropout on attention's weights."""
    if positions.is_cuda and not dropout:
        return FlexPacking.of(positions, window)
    return MaskPacking.of(positions, window) if torch.compiler.is_compiling() else Packing.of(positions)


def _bucket(starts: Tensor, lengths: Tensor) -> Bucket:
    longest = int(lengths.max())
    step = torch.arange(longest, device=starts.device)
    valid = step < lengths[:, None]
    # Padding repeats the document's last token.
    gather = starts[:, None] + torch.minimum(step, lengths[:, None] - 1)
    return Bucket(gather, None if bool(valid.all()) else valid)


def _causal(qkv: Sequence[Tensor], window: int, dropout: float) -> Tensor:
    """Plain causal attention of rows: queries, keys and values ``[N, L, heads, d]``."""
    q, k, v = (x.transpose(1, 2) for x in qkv)
    length, grouped = q.shape[2], q.shape[1] != k.shape[1]
    mask = None
    if 0 < window < length:
        step = torch.arange(length, device=q.device)
        behind = step[:, None] - step
        mask = (behind >= 0) & (behind < window)
    out = F.scaled_dot_product_attention(
        q, k, v, attn_mask=mask, is_causal=mask is None, dropout_p=dropout, enable_gqa=grouped
    )
    return out.transpose(1, 2)
