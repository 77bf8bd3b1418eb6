"""Training some rows of embedding and head: those of new tokens, or those of one modality's codes.

The matrix stays frozen, and a copy of its chosen rows is trained in their stead. So neither weight decay nor the
optimizer's moments can touch the other rows, and they cost no optimizer state, under any ZeRO stage.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from plait.model.decoder import Decoder
from plait.model.loss import Head


class RowsEmbedding(nn.Embedding):
    """An embedding of which some rows train.

    Args:
        weight: the whole matrix ``[V, width]``, a parameter, frozen from now on.
        ids: int64 ``[n]``, the rows that train, each once.
    """

    def __init__(self, weight: Tensor, ids: Tensor) -> None:
        with torch.device("meta"):
            super().__init__(*weight.shape)
        self.weight = weight.requires_grad_(False)
        self.rows = nn.Parameter(weight.detach()[ids].clone())
        self.ids: Tensor
        self.register_buffer("ids", ids)
        self.places: Tensor
        places = torch.full((len(weight),), -1, dtype=torch.int64, device=weight.device)
        places[ids] = torch.arange(len(ids), device=weight.device)
        self.register_buffer("places", places, persistent=False)

    def forward(self, tokens: Tensor) -> Tensor:
        """int64 ``[B, T]`` → ``[B, T, width]``."""
        places = self.places[tokens]
        trained = F.embedding(places.clamp_min(0), self.rows)
        return torch.where(places[..., None] >= 0, trained, F.embedding(tokens, self.weight))


class RowsHead(Head):
    """A head of which some rows train.

    Args:
        weight: the whole matrix ``[V, width]``, a parameter, frozen from now on.
        ids: int64 ``[n]``, the rows that train, each once.
        rows: the rows themselves, where the embedding is the same matrix.
    """

    def __init__(self, weight: Tensor, ids: Tensor, rows: nn.Parameter | None = None) -> None:
        with torch.device("meta"):
            super().__init__(weight.shape[1], weight.shape[0])
        self.weight = weight.requires_grad_(False)
        self.rows = nn.Parameter(weight.detach()[ids].clone()) if rows is None else rows
        self.ids: Tensor
        self.register_buffer("ids", ids)

    def matrix(self) -> Tensor:
        """The whole matrix, with the rows as they are now."""
        return self.weight.index_copy(0, self.ids, self.rows)


def split_rows(decoder: Decoder, ids: Sequence[int] | Tensor, embedding: bool = True, head: bool = True) -> None:
    """Have only these rows of embedding and head train, in place; other parameters stay as they are.

    Args:
        decoder: to change.
        ids: the rows that train.
        embedding: of the embedding.
        head: of the head; a tied head shares its rows with the embedding.
    """
    chosen = torch.as_tensor(ids, dtype=torch.int64).to(decoder.lm_head.weight.device)
    shared = None
    if embedding or decoder.config.tie_embeddings:
        decoder.embed_tokens = split = RowsEmbedding(decoder.embed_tokens.weight, chosen)
        shared = split.rows if decoder.config.tie_embeddings else None
    if head or decoder.config.tie_embeddings:
        decoder.lm_head = RowsHead(decoder.lm_head.weight, chosen, shared)


def row_ids(decoder: Decoder) -> dict[str, Tensor]:
    """Which rows train, by the buffers' names: ``embed_tokens.ids`` and ``lm_head.ids``, where they were split."""
    return {
        f"{name}.ids": module.ids for name, module in decoder.named_children()
        if isinstance(module, (RowsEmbedding, RowsHead))
    }  # fmt: skip


@torch.no_grad()
def merge_rows(decoder: Decoder) -> None:
    """Undo `split_rows`, in place: the trained rows go to their places in the matrices."""
    split = [m for m in (decoder.embed_tokens, decoder.lm_head) if isinstance(m, (RowsEmbedding, RowsHead))]
    if not split:
        return
    for module in split:
        module.weight[module.ids] = module.rows.to(module.weight.dtype)
    with torch.device("meta"):
        embedding, head = nn.Embedding(*decoder.embed_tokens.weight.shape), Head(*decoder.lm_head.weight.shape[::-1])
    embedding.weight, head.weight = decoder.embed_tokens.weight, decoder.lm_head.weight
    decoder.embed_tokens, decoder.lm_head = embedding, head
