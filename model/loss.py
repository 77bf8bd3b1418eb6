"""Next-token loss: weighted cross-entropy with z-loss and figures per group, without ever holding all logits.

The idea is that of Liger's fused linear cross-entropy (Hsu et al., 2024, arXiv 2410.10989): the loss is a sum, so its
gradient is known up to one factor while the logits of a few positions are still at hand. They are turned into their own
gradient where they lie and multiplied out at once; the backward pass only has to scale the two results.
"""

from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn


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

    def __init__(self, width: int, vocabulary_size: int) -> None:
        super().__init__(width, vocabulary_size, bias=False)

    def matrix(self) -> Tensor:
        """The matrix that states are multiplied with, ``[vocabulary_size, width]``."""
        return self.weight

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
        weight = self.matrix()
        if targets is None:
            return F.linear(hidden, weight)
        kind = hidden.device.type
        if torch.is_autocast_enabled(kind):
            hidden = hidden.to(torch.get_autocast_dtype(kind))
        tokens, weights, groups = (t.flatten() for t in (targets.tokens, targets.weights, targets.groups))
        learns = torch.is_grad_enabled()
        loss, entropy, _, _ = torch.ops.plait.linear_cross_entropy(
            hidden.flatten(0, -2), weight, tokens, weights, z_loss,
            learns and hidden.requires_grad, learns and weight.requires_grad,
        )  # fmt: skip
        counted = weights != 0
        sums = entropy.new_zeros(2, targets.group_count)
        sums.index_add_(1, torch.where(counted, groups, 0), torch.stack([entropy, counted.to(entropy.dtype)]))
        return LossSums(loss, sums[0], sums[1])


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    tokens: Tensor,
    weights: Tensor,
    z_loss: float,
    hidden_gradient: bool,
    weight_gradient: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Weighted cross-entropy of ``hidden @ weight.T``.

    It is called as ``torch.ops.plait.linear_cross_entropy``, which is differentiable, and one opaque operation to
    torch.compile.

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
    entropy, weighted = (torch.zeros(len(hidden), dtype=exact, device=hidden.device) for _ in range(2))
    to_hidden = torch.zeros_like(hidden if hidden_gradient else hidden[:0])
    # Summed in float32 also where the weight is bfloat16, which would lose what one chunk adds to many.
    to_weight = torch.zeros_like(weight if weight_gradient else weight[:0], dtype=exact)
    matrix = weight.to(hidden.dtype)
    with torch.autocast(hidden.device.type, enabled=False):
        parts = chosen.split(chunk_positions(len(chosen), len(weight) * exact.itemsize))
        buffer = hidden.new_empty(len(parts[0]), len(weight))
        for part in parts:
            states, share = hidden[part], weights[part].to(exact)
            logits = torch.mm(states, matrix.T, out=buffer[: len(part)]).to(exact)
            entropy[part], loss = differentiate(logits, tokens[part], share, z_loss)
            weighted[part] = share * loss
            logits = logits.to(hidden.dtype)
            if hidden_gradient:
                to_hidden[part] = logits @ matrix
            if weight_gradient:
                _add_product(to_weight, logits.T, states)
    return weighted.sum(), entropy, to_hidden, to_weight.to(weight.dtype)


def chunk_positions(positions: int, row_bytes: int) -> int:
    """How many positions' logits exist at the same time.

    A sixteenth of all, where that is enough for fast matrix products (each one reads and writes the whole gradient of
    the weight) and not more than these need; more if the rows are short.
    """
    return max(min(max(positions // 16, 256), 1024), 2**26 // row_bytes)


def differentiate(logits: Tensor, tokens: Tensor, weights: Tensor, z_loss: float) -> tuple[Tensor, Tensor]:
    """Turn logits ``[n, V]`` in place into the gradient of their weighted loss.

    With p the softmax and Z its denominator: ∂(−log p_t + z log² Z) = (1 + 2 z log Z) p − onehot(t).

    Returns:
        cross-entropy ``[n]`` and the same with z-loss, both without the weights.
    """
    if logits.is_cuda and _has_liger():
        return differentiate_with_liger(logits, tokens, weights, z_loss)
    top = logits.amax(-1, keepdim=True)
    target = logits.sub_(top).gather(-1, tokens[:, None])
    total = logits.exp_().sum(-1, keepdim=True)
    entropy = (total.log() - target).squeeze(-1)
    log_partition = (total.log() + top).squeeze(-1)
    logits.mul_((weights * (1 + 2 * z_loss * log_partition))[:, None] / total)
    logits.scatter_add_(-1, tokens[:, None], -weights[:, None])
    return entropy, entropy + z_loss * log_partition.square()


@cache
def _has_liger() -> bool:
    return find_spec("liger_kernel") is not None


def differentiate_with_liger(logits: Tensor, tokens: Tensor, weights: Tensor, z_loss: float) -> tuple[Tensor, Tensor]:
    """`differentiate` in one Triton kernel, which passes over the logits three times instead of eight.

    Checked in Triton's interpreter; not yet run on a GPU.
    """
    from liger_kernel.ops.cross_entropy import cross_entropy_forward

    # Asked for no reduction and for a gradient, it writes that of each row's own loss over the row.
    rows = logits.detach().requires_grad_()
    loss, penalty, *_ = cross_entropy_forward(rows, tokens, None, -100, z_loss, 0.0, "none", None, True)
    logits.mul_(weights[:, None])
    return loss - penalty, loss


def _add_product(total: Tensor, left: Tensor, right: Tensor) -> None:
    """``total += left @ right``, where the total may be more precise than the factors."""
    if total.dtype == left.dtype:
        total.addmm_(left, right)
        return
    for rows, of_left in zip(total.split(8192), left.split(8192), strict=True):  # a small product at a time
        rows.add_(of_left @ right)


def _shapes(
    hidden: Tensor,
    weight: Tensor,
    tokens: Tensor,
    weights: Tensor,
    z_loss: float,
    hidden_gradient: bool,
    weight_gradient: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    entropy = hidden.new_empty(len(hidden), dtype=torch.promote_types(hidden.dtype, torch.float32))
    to_hidden = torch.empty_like(hidden if hidden_gradient else hidden[:0])
    return entropy.new_empty(()), entropy, to_hidden, torch.empty_like(weight if weight_gradient else weight[:0])


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)
    ctx.wanted = inputs[-2:]
    ctx.save_for_backward(*output[2:])


def _scale(ctx: Any, factor: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
    """The gradients of the loss itself, scaled by the gradient with respect to the loss."""
    # In place, as the weight's gradient is large, unless somebody may yet ask for them again.
    again = torch._C._autograd._get_current_graph_task_keep_graph()
    to_inputs: list[Tensor | None] = [None] * 7
    for i, gradient in enumerate(ctx.saved_tensors):
        if factor is not None and ctx.wanted[i]:
            to_inputs[i] = gradient * factor if again else gradient.mul_(factor)
    return tuple(to_inputs)


# torch.library.custom_op would do the same, and import all of torch.compile at the first call.
_NAME = "plait::linear_cross_entropy"
torch.library.define(_NAME, torch.library.infer_schema(linear_cross_entropy, mutates_args=()))
torch.library.impl(_NAME, "default", linear_cross_entropy)
torch.library.register_fake(_NAME, _shapes)
torch.library.register_autograd(_NAME, _scale, setup_context=_keep)
