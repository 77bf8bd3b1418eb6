"""EnCodec's loss balancer: weights say which share of the gradient a loss has, whatever its scale."""

import torch
from torch import Tensor

from plait.tokenizers.averages import mean_over_ranks


class Balancer:
    """Combine losses of a reconstruction by the sizes of their gradients (Défossez et al., 2022, arXiv 2210.13438).

    With ``g_i`` the gradient of loss i with respect to an item of the reconstruction, and ``⟨‖g_i‖⟩`` the running mean
    of its norm over items and processes, the combined gradient of the item is

        ``Σ_i  λ_i / Σ_j λ_j  ·  g_i / ⟨‖g_i‖⟩``

    Running means are exponential with the bias of their start taken out. Every process holds the same.

    Args:
        decay: of the running means, per pass.
    """

    def __init__(self, decay: float = 0.999) -> None:
        self.decay = decay
        self._means: dict[str, tuple[Tensor, float]] = {}  # sums of decayed norms and of their weights

    def combine(self, losses: dict[str, Tensor], weights: dict[str, float], decoded: Tensor) -> Tensor:
        """A loss whose gradient with respect to ``decoded`` is the balanced one; its value means nothing.

        All processes must call this together, with the same names.

        Args:
            losses: scalars by name, means over the batch; their graphs are kept.
            weights: λ of each, at least 0 and not all of them 0.
            decoded: the reconstruction ``[B, ...]`` that all losses depend on.
        """
        gradients = {
            # Of each item by itself: the losses are means over the batch.
            name: len(decoded) * torch.autograd.grad(loss, decoded, retain_graph=True)[0].float()
            for name, loss in losses.items()
        }
        norms = torch.stack([g.flatten(1).norm(dim=1).mean() for g in gradients.values()])
        total = sum(weights[name] for name in losses)
        balanced = torch.zeros_like(decoded, dtype=torch.float32)
        for (name, gradient), norm in zip(gradients.items(), mean_over_ranks(norms), strict=True):
            held, count = self._means.get(name, (torch.zeros_like(norm), 0.0))
            self._means[name] = held, count = self.decay * held.to(norm) + norm, self.decay * count + 1
            balanced += weights[name] / total * gradient / (held / count).clamp_min(1e-12)
        return (decoded * balanced.detach()).flatten(1).sum(1).mean()

    def state_dict(self) -> dict[str, tuple[Tensor, float]]:
        """The running means."""
        return dict(self._means)

    def load_state_dict(self, state: dict[str, tuple[Tensor, float]]) -> None:
        """Go on from a `state_dict`."""
        self._means = dict(state)
