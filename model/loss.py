"""Next-token loss: weighted cross-entropy with z-loss and figures per group, a chunk of logits at a time."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

_CHUNK = 4096  # positions whose logits exist at the same time


@dataclass
class Targets:
    """What a batch ``[B, T]`` is to predict.

    Attributes:
        tokens: int64 ``[B, T]``, the token after each position.
        weights: float ``[B, T]``; 0 takes a position out.
        groups: int64 ``[B, T]`` in ``[0, group_count)``, for figures per group.
        group_count: number of groups.
    """

    tokens: Tensor
    weights: Tensor
    groups: Tensor
    group_count: int


@dataclass
class LossSums:
    """Sums, not means: the caller divides by the weight of the whole optimizer step.

    Attributes:
        loss: weighted sum of cross-entropy and z-loss, differentiable.
        group_loss: unweighted cross-entropy of each group's positions, float ``[group_count]``.
        group_count: positions of each group, float ``[group_count]``.
    """

    loss: Tensor
    group_loss: Tensor
    group_count: Tensor


def next_token_loss(head: Callable[[Tensor], Tensor], hidden: Tensor, targets: Targets, z_loss: float) -> LossSums:
    """The loss of hidden states ``[B, T, width]``.

    Args:
        head: hidden states → logits; only positions with weight go through it.
        hidden: output of the last norm.
        targets: what to predict.
        z_loss: weight of the squared log-partition (PaLM, arXiv 2204.02311, section 5).
    """
    chosen = targets.weights.flatten().nonzero().flatten()
    states = hidden.flatten(0, 1)[chosen]
    tokens, weights, groups = (t.flatten()[chosen] for t in (targets.tokens, targets.weights, targets.groups))

    def chunk_loss(states: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
        logits = head(states).float()
        log_partition = logits.logsumexp(-1)
        entropy = log_partition - logits.gather(-1, tokens[:, None]).squeeze(-1)
        return entropy, log_partition

    entropies, partitions = [], []
    for part, wanted in zip(states.split(_CHUNK), tokens.split(_CHUNK), strict=True):
        if len(states) > _CHUNK and torch.is_grad_enabled():
            entropy, partition = checkpoint(chunk_loss, part, wanted, use_reentrant=False)
        else:
            entropy, partition = chunk_loss(part, wanted)
        entropies.append(entropy)
        partitions.append(partition)
    entropy, partition = torch.cat(entropies), torch.cat(partitions)
    loss = (weights * (entropy + z_loss * partition.square())).sum() if z_loss else (weights * entropy).sum()
    sums = torch.zeros(2, targets.group_count, device=hidden.device)
    sums.index_add_(1, groups, torch.stack([entropy.detach(), torch.ones_like(entropy.detach())]))
    return LossSums(loss, sums[0], sums[1])
