"""Span forms: how one modality's spans stand in the ids of a vocabulary, in plait's way or another family's.

===========  ==========================================================================
plait        ``<image> H W  code×W <row> … code×W <row> </image>``, H and W as numbers
plait, text  ``<text> code… </text>``
Emu3         ``<image> 9 0 * 9 0 <image codes>  code×W <row> … code×W <row>  <frame> </image>``
Emu3.5       the same, ``<row>`` between rows only and no ``<frame>``
Chameleon    ``<image> code×1024 </image>``
bare text    ``code…``
===========  ==========================================================================

A form writes codes, reads them and says how long a span is. Those with a grid are in `plait.tokenizers.grids`.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor

from plait.errors import PlaitError
from plait.tokenizers.base import check_codes
from plait.tokenizers.modalities import MODALITIES
from plait.tokenizers.vocabulary import Vocabulary

Shape = Sequence[int]


class SpanForm(ABC):
    """One modality's spans.

    Attributes:
        modality: name in the registry.
        books: ids of each codebook.
        layout: the order of the codes of a step.
        begin: id that begins a span, −1 if it begins with its first code.
        end: id that ends it, −1 if anything else does.
    """

    begin: int = -1
    end: int = -1

    def __init__(self, modality: str, vocabulary: Vocabulary) -> None:
        entry = vocabulary.modalities[modality]
        self.modality, self.layout, self.axes = modality, entry.build_layout(), MODALITIES[modality].grammar.axes
        self.books = [vocabulary.block(name).ids for name in entry.blocks]
        if len(self.books) > 1 and not self.axes:
            raise PlaitError(f"{modality}: has {len(self.books)} codebooks and no axes; give its span an axis")

    @property
    def starts(self) -> list[range]:
        """The ids with which a span may begin."""
        return [range(self.begin, self.begin + 1)]

    @property
    def fixed(self) -> list[int]:
        """The ids of its own that are always the same: its marks."""
        return [i for i in (self.begin, self.end) if i >= 0]

    @abstractmethod
    def template(self, shape: Shape) -> list[int]:
        """The ids of a span of this grid, −1 − k where a code of codebook k goes."""

    @abstractmethod
    def length(self, shape: Shape) -> int:
        """Tokens of a span of this grid."""

    @property
    @abstractmethod
    def least(self) -> int:
        """Tokens of the smallest span."""

    def choices(self, shape: Shape) -> Tensor:
        """Bool ``[length]``: True where the grammar leaves a choice, False where it forces the token."""
        return torch.ones(self.length(shape), dtype=torch.bool)

    def shape(self, codes: Tensor) -> tuple[int, ...]:
        """The grid of codes: the steps of each axis.

        Raises:
            PlaitError: the wrong rank, or a size that a span cannot have.
        """
        if codes.ndim != 1:
            raise self._refusal(codes, "one dimension")
        return tuple(codes.shape)

    def write(self, codes: Tensor) -> Tensor:
        """Codes → the span's ids, int64 ``[n]``.

        Raises:
            PlaitError: as `shape`, or codes that are not integers or that their codebook's block does not have.
        """
        ids = torch.tensor(self.template(self.shape(codes)), dtype=torch.int64)
        stream = self.layout.write(self._rows(codes)).flatten().cpu()
        books = -1 - ids[ids < 0]
        for k, block in enumerate(self.books):
            of_which = f" of codebook {k}" if len(self.books) > 1 else ""
            check_codes(stream[books == k], len(block), f"{self.modality} codes{of_which}")
        ids[ids < 0] = stream.to(torch.int64) + torch.tensor([block.start for block in self.books])[books]
        return ids

    def read(self, codes: Sequence[int], shape: Shape) -> Tensor:
        """The codes that stand in a span of this grid, in their order → int64 codes.

        They may break off: what comes back are the steps of the outermost axis that are complete.
        """
        return self.layout.read(torch.tensor(codes, dtype=torch.int64), shape[0])

    def _rows(self, codes: Tensor) -> Tensor:
        """Codes as the layout takes them, which knows the innermost axis alone."""
        return codes.movedim(0, -2) if self.layout.has_axis else codes

    def _refusal(self, codes: Tensor, expected: str) -> PlaitError:
        return PlaitError(f"{self.modality} codes: shape is {tuple(codes.shape)}, expected {expected}")


class BareText(SpanForm):
    """Text without marks: it goes on until something else begins or the document ends.

    Ids between the first and the last that are not text, but the special tokens of `names`, are left out.
    """

    def __init__(self, modality: str, vocabulary: Vocabulary) -> None:
        super().__init__(modality, vocabulary)
        ids = self.books[0]
        digits = set("0123456789*")
        holes = sorted({i for name, i in vocabulary.names.items() if i in ids and name not in digits})
        edges = [ids.start - 1, *holes, ids.stop]
        self.ids = [range(a + 1, b) for a, b in pairwise(edges) if b - a > 1]

    @property
    def starts(self) -> list[range]:
        """All ids of text."""
        return self.ids

    def template(self, shape: Shape) -> list[int]:
        """A code at every position."""
        return [-1] * shape[0]

    def length(self, shape: Shape) -> int:
        """As many as there are codes."""
        return shape[0]

    @property
    def least(self) -> int:
        """One: what has no tokens is not there."""
        return 1


class MarkedText(SpanForm):
    """Text, or anything else without axes, between two marks; its length is free."""

    def __init__(self, modality: str, vocabulary: Vocabulary) -> None:
        super().__init__(modality, vocabulary)
        grammar = MODALITIES[modality].grammar
        self.begin, self.end = vocabulary.special(grammar.begin), vocabulary.special(grammar.end)

    def template(self, shape: Shape) -> list[int]:
        """Codes between the marks."""
        return [self.begin, *[-1] * shape[0], self.end]

    def length(self, shape: Shape) -> int:
        """The codes and two marks."""
        return 2 + shape[0]

    @property
    def least(self) -> int:
        """The two marks."""
        return 2
