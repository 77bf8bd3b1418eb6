"""From logits to a token: mask, guidance, temperature, top-k, top-p."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, Self

import torch
from torch import Tensor

from plait.errors import PlaitError


@dataclass(frozen=True)
class Sampling:
    """How tokens are drawn.

    Attributes:
        temperature: logits are divided by it; 0 takes the most probable token.
        top_k: draw among this many most probable tokens; 0 keeps all.
        top_p: draw among the most probable tokens that together reach this probability (arXiv 1904.09751).
        guidance: classifier-free guidance scale on log-probabilities (arXiv 2207.12598, 2203.13131): 1 is none.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    guidance: float = 1.0

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if isinstance(value, bool) or not isinstance(value, (int, float)) or math.isnan(value):
                raise PlaitError(f"{name}: {value!r} must be a number")
        if self.temperature < 0:
            raise PlaitError(f"temperature: {self.temperature} must be at least 0")
        if not isinstance(self.top_k, int) or self.top_k < 0:
            raise PlaitError(f"top_k: {self.top_k} must be a whole number of at least 0")
        if not 0 < self.top_p <= 1:
            raise PlaitError(f"top_p: {self.top_p} must lie above 0 and not above 1")
        if not 0 <= self.guidance < float("inf"):
            raise PlaitError(f"guidance: {self.guidance} must be at least 0")

    @classmethod
    def of(cls, settings: dict[str, Any], **overrides: Any) -> Self:
        """From a bundle's settings, with those overrides that are not None.

        Raises:
            PlaitError: an unknown setting, or a value that is no number or out of range.
        """
        known = [f.name for f in fields(cls)]
        if unknown := {*settings, *overrides} - set(known):
            raise PlaitError(f"unknown setting {min(unknown)!r}; the settings are {', '.join(known)}")
        return replace(cls(**settings), **{k: v for k, v in overrides.items() if v is not None})


def guide(conditional: Tensor, unconditional: Tensor, scale: float) -> Tensor:
    """``u + scale · (c − u)`` on log-probabilities ``[V]``."""
    c, u = conditional.log_softmax(-1), unconditional.log_softmax(-1)
    return u + scale * (c - u)


def restrict(logits: Tensor, allowed: Sequence[range]) -> tuple[Tensor, Tensor]:
    """Logits ``[V]`` of the allowed ids only, and those ids, both ``[n]``."""
    ids = torch.cat([torch.arange(r.start, r.stop, device=logits.device) for r in allowed])
    return logits[ids], ids


def draw(logits: Tensor, settings: Sampling, generator: torch.Generator) -> int:
    """Draw an index of logits ``[n]``.

    The generator is on the CPU and one uniform number is used per token, so a seed gives the same draw on any device
    for equal probabilities.
    """
    if settings.temperature == 0:
        return int(logits.argmax())
    logits = logits.double().cpu()
    # The highest logit is made 0 first, so that no temperature is too small to divide by.
    values, order = ((logits - logits.max()) / settings.temperature).sort(descending=True, stable=True)
    if settings.top_k:
        values, order = values[: settings.top_k], order[: settings.top_k]
    cumulative = values.softmax(-1).cumsum(-1)
    if settings.top_p < 1:
        kept = int(torch.searchsorted(cumulative, settings.top_p)) + 1
        cumulative, order = cumulative[:kept], order[:kept]
    point = torch.rand((), generator=generator, dtype=torch.float64) * cumulative[-1]
    return int(order[min(int(torch.searchsorted(cumulative, point)), len(order) - 1)])
