"""From logits to a token: guidance, mask, temperature, top-k, top-p."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor

from plait.errors import PlaitError

GUIDANCE_DOMAINS = ("log_softmax", "logits")


@dataclass(frozen=True)
class Sampling:
    """How tokens are drawn.

    Attributes:
        temperature: logits are divided by it; 0 takes the most probable token.
        top_k: draw among this many most probable tokens; 0 keeps all.
        top_p: draw among the most probable tokens that together reach this probability (arXiv 1904.09751).
        guidance: classifier-free guidance scale (arXiv 2207.12598, 2203.13131), at least 0: 1 is none.
        guidance_image: scale of the prompt's images where it differs from that of the rest (arXiv 2211.09800), at least
            0; None takes ``guidance`` for the whole prompt.
        guidance_domain: what is guided: "log_softmax" (Emu3) or "logits" (Chameleon). They differ by a constant for
            each token drawn, hence not in what is drawn; a bundle keeps it so that its scores are the reference's.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    guidance: float = 1.0
    guidance_image: float | None = None
    guidance_domain: str = "log_softmax"

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if name == "guidance_domain" or (name == "guidance_image" and value is None):
                continue
            if isinstance(value, bool) or not isinstance(value, (int, float)) or math.isnan(value):
                raise PlaitError(f"{name}: {value!r} must be a number")
        if self.temperature < 0:
            raise PlaitError(f"temperature: {self.temperature} must be at least 0")
        if not isinstance(self.top_k, int) or self.top_k < 0:
            raise PlaitError(f"top_k: {self.top_k} must be a whole number of at least 0")
        if not 0 < self.top_p <= 1:
            raise PlaitError(f"top_p: {self.top_p} must lie above 0 and not above 1")
        for name in ("guidance", "guidance_image"):
            if (scale := getattr(self, name)) is not None and not 0 <= scale < math.inf:
                raise PlaitError(f"{name}: {scale} must be at least 0 and finite")
        if self.guidance_domain not in GUIDANCE_DOMAINS:
            raise PlaitError(f"guidance_domain: {self.guidance_domain!r} must be {' or '.join(GUIDANCE_DOMAINS)}")

    @classmethod
    def of(cls, settings: dict[str, Any], **overrides: Any) -> Self:
        """From a bundle's settings, with those overrides that are not None.

        Raises:
            PlaitError: an unknown setting, or a value of the wrong kind or out of range.
        """
        known = [f.name for f in fields(cls)]
        if unknown := {*settings, *overrides} - set(known):
            raise PlaitError(f"unknown setting {min(unknown)!r}; the settings are {', '.join(known)}")
        return replace(cls(**settings), **{k: v for k, v in overrides.items() if v is not None})

    @property
    def guided(self) -> bool:
        """Whether guidance changes anything: the prompt without its condition has to be read beside it."""
        return self.guidance != 1 or self.three_way

    @property
    def three_way(self) -> bool:
        """Whether images have a scale of their own: the prompt with nothing but its images has to be read as well."""
        return self.guidance_image is not None and self.guidance_image != self.guidance


def guide(full: Tensor, unconditional: Tensor, settings: Sampling, image_only: Tensor | None = None) -> Tensor:
    """Classifier-free guidance: ``u + s (f − u)``, or ``u + s_image (i − u) + s (f − i)``.

    Args:
        full: logits ``[V]`` after the whole prompt, f.
        unconditional: after the prompt without its condition, u.
        settings: the scales, s and s_image, and the domain.
        image_only: after the prompt's images alone, i; None if it has none, which makes i = u.

    Returns:
        ``[V]``, guided in ``settings.guidance_domain``.
    """
    if settings.guidance_domain == "log_softmax":
        full, unconditional = full.log_softmax(-1), unconditional.log_softmax(-1)
        image_only = None if image_only is None else image_only.log_softmax(-1)
    if image_only is None or settings.guidance_image is None:
        return unconditional + settings.guidance * (full - unconditional)
    images = settings.guidance_image * (image_only - unconditional)
    return unconditional + images + settings.guidance * (full - image_only)


def restrict(logits: Tensor, allowed: Sequence[range]) -> tuple[Tensor, Tensor]:
    """Logits ``[V]`` of the allowed ids only, and those ids, both ``[n]``; ``allowed`` is not empty."""
    ids = [torch.arange(r.start, r.stop, device=logits.device) for r in allowed]
    if len(allowed) == 1:
        return logits[allowed[0].start : allowed[0].stop], ids[0]
    return torch.cat([logits[r.start : r.stop] for r in allowed]), torch.cat(ids)


def draw(logits: Tensor, settings: Sampling, generator: torch.Generator) -> int:
    """Draw an index of logits ``[n]``.

    All is done on the CPU with one uniform number per token, so a seed gives the same draw on any device for equal
    logits. Tokens of logit −∞ are never drawn; among equal logits the first are the more probable.

    Raises:
        PlaitError: there is nothing to draw from, as the logits are NaN, +∞ or all −∞.
    """
    if settings.temperature == 0:
        best = int(logits.argmax())  # a NaN is the highest
        _check(float(logits[best]))
        return best
    logits = logits.float().cpu()
    truncated = settings.top_p < 1 or 0 < settings.top_k < len(logits)
    kept = _descending(logits, settings.top_k) if truncated else logits
    # The highest logit is made 0 first, so that no temperature is too small to divide by.
    weights = ((kept.double() - logits.max()) / settings.temperature).exp()
    cumulative = weights.cumsum(0)
    _check(total := float(cumulative[-1]))
    if settings.top_p < 1:
        cumulative = cumulative[: int(torch.searchsorted(cumulative, settings.top_p * total)) + 1]
        total = float(cumulative[-1])
    point = float(torch.rand((), generator=generator, dtype=torch.float64)) * total
    # Above 0, or the first token would be drawn even with no probability.
    index = int(torch.searchsorted(cumulative, max(point, 1e-300)))
    if not truncated:
        return index
    # Sorting values without their indices is several times faster; the index is that of the value found. The kept
    # values that are equal stand for tokens in the order of their ids.
    rank = int((kept[:index] == kept[index]).sum())
    return int(np.flatnonzero(logits.numpy() == kept[index].item())[rank])


def _descending(logits: Tensor, k: int) -> Tensor:
    """The k highest of float32 ``[n]`` (0: all) in descending order. NumPy sorts with vector instructions."""
    values = logits.numpy()
    if 0 < k < len(values):
        values = np.partition(values, -k)[-k:]
    return torch.from_numpy(np.sort(values)[::-1].copy())


def _check(number: float) -> None:
    if not math.isfinite(number):
        raise PlaitError("generation: the model's logits are not finite; try another dtype, or check its weights")
