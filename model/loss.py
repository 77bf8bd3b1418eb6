"""Next-token loss: weighted cross-entropy with z-loss and figures per group, without ever holding all logits.

The idea is that of Liger's fused linear cross-entropy (Hsu et al., 2024, arXiv 2410.10989): the loss is a sum, so its
gradient is known up to one factor while the logits of a few positions are still at hand. They are turned into their own
gradient where they lie and multiplied out at once; the backward pass only has to scale the two results.
"""

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

_BUFFER_BYTES = 2**28  # logits that exist at the same time


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


class LossSums(NamedTuple):
    """Sums, not means: the caller divides by the weight of the whole optimizer step.

    A tuple, because DeepSpeed looks for a module's tensors in tuples, lists and dictionaries only.

    Attributes:
        loss: weighted sum of cross-entropy and z-loss, differentiable.
        group_loss: unweighted cross-entropy of each group's positions, float ``[group_count]``.
        group_count: positions of each group, float ``[group_count]``.
    """

    loss: Tensor
    group_loss: Tensor
    group_count: Tensor


class Head(nn.Linear):
    """The projection onto the vocabulary, and the loss of what it predicts.

    Both are one module because ZeRO-3 gathers a parameter only while the module that owns it runs.
    """

    def forward(self, hidden: Tensor, targets: Targets | None = None, z_loss: float = 0.0) -> Any:
        """Logits or loss.

        Args:
            hidden: output of the last norm, ``[B, T, width]`` (without targets also other leading shapes).
            targets: what to predict. Positions of weight 0 are left out: whatever their hidden states and tokens are,
                they change neither loss nor gradients.
            z_loss: weight of the squared log-partition (PaLM, arXiv 2204.02311, section 5).

        Returns:
            logits ``[..., vocabulary_size]``, or with ``targets`` the `LossSums`.
        """
        if targets is None:
            return super().forward(hidden)
        kind = hidden.device.type
        if torch.is_autocast_enabled(kind):
            hidden = hidden.to(torch.get_autocast_dtype(kind))
        tokens, weights, groups = (t.flatten() for t in (targets.tokens, targets.weights, targets.groups))
        learns = torch.is_grad_enabled()
        loss, entropy, _, _ = linear_cross_entropy(
            hidden.flatten(0, -2), self.weight, tokens, weights, z_loss,
            learns and hidden.requires_grad, learns and self.weight.requires_grad,
        )  # fmt: skip
        counted = weights != 0
        sums = entropy.new_zeros(2, targets.group_count)
        sums.index_add_(1, torch.where(counted, groups, 0), torch.stack([entropy, counted.to(entropy.dtype)]))
        return LossSums(loss, sums[0], sums[1])


@torch.library.custom_op("plait::linear_cross_entropy", mutates_args=())
def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    tokens: Tensor,
    weights: Tensor,
    z_loss: float,
    hidden_gradient: bool,
    weight_gradient: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Weighted cross-entropy of ``hidden @ weight.T``; torch.compile takes it as one opaque operation.

    Args:
        hidden: ``[N, width]``; its dtype is that of the matrix products. The softmax is at least float32.
        weight: ``[V, width]``.
        tokens: int64 ``[N]`` in ``[0, V)`` wherever the weight is not 0.
        weights: float ``[N]``.
        z_loss: weight of the squared log-partition.
        hidden_gradient: whether the hidden states' gradient is wanted.
        weight_gradient: whether the weight's gradient is wanted.

    Returns:
        the loss (a scalar); the unweighted cross-entropy ``[N]``, 0 at positions of weight 0; the loss's gradient with
        respect to the hidden states and to the weight, each empty if not wanted. Only the loss is differentiable.
    """
    exact = torch.promote_types(hidden.dtype, torch.float32)
    chosen = weights.nonzero().flatten()
    states, tokens, weights = hidden[chosen], tokens[chosen], weights[chosen].to(exact)
    matrix = weight.to(hidden.dtype)
    rows = max(1, min(len(chosen), _BUFFER_BYTES // (len(weight) * exact.itemsize)))
    buffer = states.new_empty(rows, len(weight))
    entropy, partition = weights.new_empty(len(chosen)), weights.new_empty(len(chosen))
    state_gradient = torch.empty_like(states) if hidden_gradient else None
    # Summed in float32 also where the weight is bfloat16: in that, the sum over many chunks would lose what each adds.
    matrix_gradient = torch.zeros_like(weight, dtype=exact) if weight_gradient else None
    with torch.autocast(hidden.device.type, enabled=False):
        for start in range(0, len(chosen), rows):
            part = slice(start, start + rows)
            logits = buffer[: len(states[part])]
            torch.mm(states[part], matrix.T, out=logits)
            logits = logits.to(exact)
            entropy[part], partition[part] = _differentiate(logits, tokens[part], weights[part], z_loss)
            change = logits.to(hidden.dtype)
            if state_gradient is not None:
                torch.mm(change, matrix, out=state_gradient[part])
            if matrix_gradient is not None:
                _add_product(matrix_gradient, change.T, states[part])
    loss = (weights * (entropy + z_loss * partition.square())).sum()
    return (
        loss,
        entropy.new_zeros(len(hidden)).index_copy_(0, chosen, entropy),
        hidden.new_empty(0) if state_gradient is None else torch.zeros_like(hidden).index_copy_(0, chosen, state_gradient),
        weight.new_empty(0) if matrix_gradient is None else matrix_gradient.to(weight.dtype),
    )


def _differentiate(logits: Tensor, tokens: Tensor, weights: Tensor, z_loss: float) -> tuple[Tensor, Tensor]:
    """Turn logits ``[n, V]`` in place into the gradient of their weighted loss; returns cross-entropy and log-partition.

    With p the softmax and Z the partition: d(−log p_t + z log² Z) = (1 + 2 z log Z) p − onehot(t).
    """
    top = logits.amax(-1, keepdim=True)
    target = logits.sub_(top).gather(-1, tokens[:, None])
    total = logits.exp_().sum(-1, keepdim=True)
    log_total = total.log()
    partition = (log_total + top).squeeze(-1)
    logits.mul_((weights * (1 + 2 * z_loss * partition))[:, None] / total)
    logits.scatter_add_(-1, tokens[:, None], -weights[:, None])
    return (log_total - target).squeeze(-1), partition


def _add_product(total: Tensor, left: Tensor, right: Tensor) -> None:
    """``total += left @ right``, where the total may be more precise than the factors."""
    if total.dtype == left.dtype:
        total.addmm_(left, right)
    else:
        total.add_(left @ right)


@linear_cross_entropy.register_fake
def _(
    hidden: Tensor,
    weight: Tensor,
    tokens: Tensor,
    weights: Tensor,
    z_loss: float,
    hidden_gradient: bool,
    weight_gradient: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    entropy = hidden.new_empty(len(hidden), dtype=torch.promote_types(hidden.dtype, torch.float32))
    gradients = ((hidden, hidden_gradient), (weight, weight_gradient))
    return (entropy.new_empty(()), entropy, *(torch.empty_like(x) if wanted else x.new_empty(0) for x, wanted in gradients))


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    _, entropy, hidden_gradient, weight_gradient = output
    ctx.mark_non_differentiable(entropy, hidden_gradient, weight_gradient)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(hidden_gradient, weight_gradient)


def _backward(ctx: Any, factor: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
    wanted = [x if x.numel() else None for x in ctx.saved_tensors]
    keep = torch._C._autograd._get_current_graph_task_keep_graph()
    scaled = [x if x is None or factor is None else x * factor if keep else x.mul_(factor) for x in wanted]
    return (*scaled, None, None, None, None, None)


linear_cross_entropy.register_autograd(_backward, setup_context=_keep)
