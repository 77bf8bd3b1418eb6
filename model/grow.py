"""A larger vocabulary for a trained decoder: its rows stay as they are, new ones are put behind them."""

import dataclasses
import math

import torch
from torch import Tensor

from plait.errors import PlaitError
from plait.model.decoder import Decoder
from plait.model.hollow import hollow

HEAD_NOISE = 0.1
EMBEDDING_NOISE = 1.0
_MIXED = 16  # old rows that a new row's noise is mixed of


def grow_decoder(decoder: Decoder, size: int, seed: int = 0) -> Decoder:
    """A decoder with so many ids; old ones keep their embeddings and logits, to the bit.

    Args:
        decoder: the old one; everything but its embedding and head is shared with the new one.
        size: ids of the new one, at least as many as the old one has.
        seed: of the new rows. Without new rows the decoder itself is returned.

    Raises:
        PlaitError: the size is below what there is.
    """
    config = decoder.config
    if size == config.vocabulary_size:
        return decoder
    weights = grow_weights(decoder.state_dict(), size, config.tie_embeddings, seed)
    with hollow():
        grown = Decoder(dataclasses.replace(config, vocabulary_size=size))
    grown.load_state_dict(weights, assign=True)
    if config.tie_embeddings:
        grown.lm_head.weight = grown.embed_tokens.weight
    for new, old in zip(grown.parameters(), decoder.parameters(), strict=True):
        new.requires_grad_(old.requires_grad)
    return grown.train(decoder.training)


def grow_weights(weights: dict[str, Tensor], size: int, tied: bool, seed: int = 0) -> dict[str, Tensor]:
    """`grow_decoder` for a state dict: embedding and head become larger, the other tensors are passed on.

    Args:
        weights: the decoder's.
        size: rows of the new embedding and head.
        tied: the head is the embedding.
        seed: of the new rows.

    Raises:
        PlaitError: the size is below what there is.
    """
    generator = torch.Generator().manual_seed(seed)
    noise = HEAD_NOISE if tied else EMBEDDING_NOISE
    grown = {**weights, "embed_tokens.weight": grow_rows(weights["embed_tokens.weight"], size, generator, noise)}
    if tied:
        return {**grown, "lm_head.weight": grown["embed_tokens.weight"]} if "lm_head.weight" in weights else grown
    return {**grown, "lm_head.weight": grow_rows(weights["lm_head.weight"], size, generator, HEAD_NOISE)}


@torch.no_grad()
def grow_rows(old: Tensor, size: int, generator: torch.Generator, noise: float) -> Tensor:
    """A matrix with new rows behind the old ones: the old rows' mean, and noise with their covariance.

    In a head, a row that is the mean gets the mean logit, and that takes next to nothing from the old ids' probability
    where logits differ at all: the partition grows by a factor of at most 1 + new / old, by Jensen's inequality
    (Hewitt, 2021, "Initializing New Word Embeddings for Pretrained Language Models"). The noise tells the new rows
    apart; in a head it must be small. An embedding that is no head can have all of it, so that a new token looks to the
    layers like any other.

    Args:
        old: ``[V, width]``, of any floating dtype.
        size: rows of the result, at least V.
        generator: on the CPU; the same one gives the same rows.
        noise: its standard deviation relative to that of the old rows.

    Returns:
        ``[size, width]``, of the same dtype; its first V rows are the old ones.

    Raises:
        PlaitError: the size is below V.
    """
    fresh = size - len(old)
    if fresh < 0:
        raise PlaitError(f"vocabulary: has {len(old)} ids, it cannot be grown to {size}")
    mean = old.mean(0, dtype=torch.float32)
    new = mean.repeat(fresh, 1)
    # A sum of old rows' deviations with normal factors has their covariance, which need not be computed for it.
    for _ in range(_MIXED):
        picked = torch.randint(len(old), (fresh,), generator=generator).to(old.device)
        factor = torch.randn(fresh, 1, generator=generator).to(old.device)
        new += noise / math.sqrt(_MIXED) * factor * (old[picked].float() - mean)
    return torch.cat([old, new.to(old.dtype)])
