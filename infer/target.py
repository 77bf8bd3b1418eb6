"""Targets: how one modality is prompted and drawn, an entry of a bundle's ``generation.json``."""

from dataclasses import dataclass, fields
from typing import Any, Self

from plait.errors import PlaitError
from plait.infer.sampling import Sampling
from plait.tokenizers.vocabulary import BOS

PLAIN = f"{BOS}{{prompt}}"  # the parts and nothing else


@dataclass(frozen=True)
class Target:
    """How one target modality is prompted and drawn.

    Attributes:
        sampling: how tokens are drawn.
        prompt: template of what comes before.
        unconditional: the same without the condition, for guidance.
        image_only: the same with the prompt's media alone, for guidance that gives them a scale of their own.
        grid: sizes of the axes of what is generated; without them the model chooses.
        pixels: the least and the most pixels that an image of the prompt is scaled to; without them it stays as it is.
    """

    sampling: Sampling
    prompt: str = PLAIN
    unconditional: str = BOS
    image_only: str | None = None
    grid: tuple[int, ...] | None = None
    pixels: tuple[int, int] | None = None

    def __post_init__(self) -> None:
        for name in ("prompt", "unconditional", "image_only"):
            template = getattr(self, name)
            if not isinstance(template, str) and (name != "image_only" or template is not None):
                raise PlaitError(f"{name}: {template!r} must be text")
        if self.grid is not None and (not self.grid or any(type(n) is not int or n < 1 for n in self.grid)):
            raise PlaitError(f"grid: {list(self.grid)} must be whole numbers of at least 1")
        if self.pixels is not None and (
            len(self.pixels) != 2
            or any(type(n) is not int for n in self.pixels)
            or not 0 < self.pixels[0] <= self.pixels[1]
        ):
            raise PlaitError(f"pixels: {list(self.pixels)} must be two whole numbers, the least and the most")

    @classmethod
    def of(cls, settings: dict[str, Any], **overrides: Any) -> Self:
        """From a bundle's settings, with those overrides of the sampling that are not None.

        Raises:
            PlaitError: an unknown setting, or a value of the wrong kind or out of range.
        """
        if not isinstance(settings, dict):
            raise PlaitError(f"settings: {settings!r} must be an object")
        own = [f.name for f in fields(cls) if f.name != "sampling"]
        drawing = [f.name for f in fields(Sampling)]
        if unknown := {*settings} - {*own, *drawing} | {*overrides} - set(drawing):
            raise PlaitError(f"unknown setting {min(unknown)!r}; the settings are {', '.join([*drawing, *own])}")
        sampling = Sampling.of({k: v for k, v in settings.items() if k in drawing}, **overrides)
        given = {k: v for k, v in settings.items() if k in own}
        for name in ("grid", "pixels"):
            if given.get(name) is not None:
                if not isinstance(given[name], list):
                    raise PlaitError(f"{name}: {given[name]!r} must be a list of whole numbers")
                given[name] = tuple(given[name])
        return cls(sampling, **given)
