"""How a model is prompted: the settings of a target modality in ``generation.json``, and prompts made from templates.

A template is text with places: ``{prompt}`` for all parts that the user gives, ``{media}`` for those that are not text,
and special tokens by their names or parts, such as ``<bos>``. What stands in a user's text is never a special token.
"""

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any, Self

from PIL import Image
from torch import Tensor

from plait.errors import PlaitError
from plait.infer.sampling import Sampling
from plait.tokenizers.grammar import Grammar
from plait.tokenizers.vocabulary import BOS

PLAIN = f"{BOS}{{prompt}}"


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


@dataclass
class Piece:
    """What a prompt is made of: the text or codes of a modality, or bare ids where that is None."""

    modality: str | None
    content: Any


def fill(template: str, pieces: Sequence[Piece], grammar: Grammar) -> list[Piece]:
    """A template with the user's parts in their places; texts that touch become one where text has no marks."""
    filled: list[Piece] = []
    for chunk in re.split(r"(\{prompt\}|\{media\}|<[^<>]+>)", template):
        if chunk == "{prompt}":
            filled += pieces
        elif chunk == "{media}":
            filled += [piece for piece in pieces if piece.modality != "text"]
        elif chunk.startswith("<") and grammar.vocabulary.has_special(chunk):
            filled.append(Piece(None, [grammar.vocabulary.special(chunk)]))
        elif chunk:
            filled.append(Piece("text", chunk))
    if grammar.text is None:
        return filled
    joined: list[Piece] = []
    for piece in filled:
        if joined and joined[-1].modality == piece.modality == "text":
            joined[-1] = Piece("text", joined[-1].content + piece.content)
        else:
            joined.append(piece)
    return joined


def check_ids(ids: Tensor, size: int, name: str) -> list[int]:
    """Bare ids as a list.

    Raises:
        PlaitError: not int64, not one dimension, none, or beyond the vocabulary's ``size``.
    """
    found = f"{ids.dtype} of shape {tuple(ids.shape)}".removeprefix("torch.")
    if ids.ndim != 1 or str(ids.dtype) != "torch.int64" or not len(ids):
        raise PlaitError(f"{name}: is {found}, ids are int64 of shape (n,), at least one")
    if int(ids.min()) < 0 or int(ids.max()) >= size:
        raise PlaitError(f"{name}: has ids {int(ids.min())}..{int(ids.max())}, the model has 0..{size - 1}")
    return [int(i) for i in ids]


def crop_to(image: Image.Image, height: int, width: int) -> Image.Image:
    """The middle of an image at exactly this size: the side that is too short for it is scaled to fit."""
    scale = max(height / image.height, width / image.width)
    size = max(width, round(image.width * scale)), max(height, round(image.height * scale))
    scaled = image.resize(size, Image.Resampling.LANCZOS)
    left, top = (scaled.width - width) // 2, (scaled.height - height) // 2
    return scaled.crop((left, top, left + width, top + height))


def scale_between(image: Image.Image, least: int, most: int, factor: int) -> Image.Image:
    """An image with at least and at most so many pixels, its sides multiples of ``factor``; as Emu3 and Qwen-VL do.

    Raises:
        PlaitError: one side is over five times the other.
    """
    height, width = image.height, image.width
    if max(height, width) > 5 * min(height, width):
        raise PlaitError(f"image: is {width} × {height} pixels, the model takes sides of at most 5 to 1; crop it")
    sides = [max(1, round(n / factor)) * factor for n in (height, width)]
    if math.prod(sides) > most:
        shrink = math.sqrt(height * width / most)
        sides = [max(1, math.floor(n / shrink / factor)) * factor for n in (height, width)]
    elif math.prod(sides) < least:
        grow = math.sqrt(least / (height * width))
        sides = [math.ceil(n * grow / factor) * factor for n in (height, width)]
    return image.resize((sides[1], sides[0]), Image.Resampling.BICUBIC)
