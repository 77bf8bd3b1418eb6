"""From the parts that a user gives to the ids of a prompt, by way of a template.

A template is text with places: ``{prompt}`` for all parts that the user gives, ``{media}`` for those that are not text,
and special tokens by their names or parts, such as ``<bos>``. What stands in a user's text is never a special token.
"""

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from PIL import Image
from torch import Tensor

from plait.errors import PlaitError
from plait.infer.document import read_parts
from plait.tokenizers.grammar import Grammar, Span
from plait.tokenizers.grids import FixedGrid
from plait.tokenizers.modalities import MODALITIES


@dataclass
class Piece:
    """What a prompt is made of: the text or codes of a modality, or bare ids where that is None."""

    modality: str | None
    content: Any


class Prompter:
    """Reads parts and makes prompts of them.

    Args:
        grammar: of the model.
        tokenizers: by folder name.
    """

    def __init__(self, grammar: Grammar, tokenizers: dict[str, Any]) -> None:
        self.grammar, self.tokenizers = grammar, tokenizers

    def tokenizer(self, modality: str) -> Any:
        """A modality's tokenizer.

        Raises:
            PlaitError: the model has no such modality.
        """
        self.grammar.form(modality)
        return self.tokenizers[self.grammar.vocabulary.modalities[modality].tokenizer]

    def check_target(self, modality: str) -> None:
        """Refuse what could be generated and not decoded, before time is spent on it.

        Raises:
            PlaitError: the model has no such modality, or its tokenizer only encodes.
        """
        config = getattr(self.tokenizer(modality), "config", None)
        if getattr(config, "decoder", True) is False:
            raise PlaitError(
                f"{modality}: the bundle's tokenizer has no decoder, nothing can be made of its codes; "
                "import the model again with one that has, such as the original release's vqgan.ckpt: --visual FILE"
            )

    def read(self, parts: Sequence[Any], pixels: tuple[int, int] | None = None) -> list[Piece]:
        """Parts → texts, codes and bare ids.

        Args:
            parts: as `plait.infer.pipeline.Model.generate` takes them, and bare ids.
            pixels: the least and the most that an image has; it is scaled to lie between.

        Raises:
            PlaitError: a part cannot be read, or the model lacks its modality.
        """
        pieces = []
        for number, part in enumerate(parts):
            if isinstance(part, Tensor):
                ids = check_ids(part, self.grammar.vocabulary.size, f"parts[{number}]")
                pieces.append(Piece(None, ids))
            else:
                pieces += [self._piece(*read, pixels) for read in read_parts([part])]
        return pieces

    def _piece(self, modality: str, medium: Any, pixels: tuple[int, int] | None) -> Piece:
        """A medium's codes; text stays text, as it may have to be joined with more."""
        tokenizer, form = self.tokenizer(modality), self.grammar.form(modality)
        if modality == "text":
            return Piece(modality, medium)
        if isinstance(medium, Image.Image) and isinstance(form, FixedGrid):
            medium = crop_to(medium, *(n * tokenizer.factor for n in form.grid))
        elif isinstance(medium, Image.Image) and pixels is not None:
            medium = scale_between(medium, *pixels, tokenizer.factor)
        return Piece(modality, MODALITIES[modality].encode(tokenizer, medium).cpu())

    def prompt(self, template: str, pieces: Sequence[Piece]) -> list[int]:
        """The ids of a prompt, at least one. Where bare ids are given they stand without a template."""
        bare = any(piece.modality is None for piece in pieces)
        ids = self.encode(fill("{prompt}" if bare else template, pieces, self.grammar))
        return ids or [self.grammar.bos]

    def encode(self, pieces: Sequence[Piece]) -> list[int]:
        """Pieces → ids."""
        ids: list[int] = []
        for piece in pieces:
            if piece.modality is None:
                ids += piece.content
                continue
            codes = self.tokenizer("text").encode(piece.content) if piece.modality == "text" else piece.content
            ids += self.grammar.write(Span(piece.modality, codes)).tolist()
        return ids


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
