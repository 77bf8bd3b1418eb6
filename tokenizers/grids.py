"""Span forms with a grid of codes behind a header that says its size, plait's and other families'."""

import math
from abc import abstractmethod
from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor

from plait.errors import PlaitError
from plait.tokenizers.forms import Shape, SpanForm
from plait.tokenizers.modalities import MODALITIES
from plait.tokenizers.vocabulary import NUMBERS, Vocabulary

UNLIMITED = 1 << 60


class GridForm(SpanForm):
    """A grid of codes behind a header that says its size.

    Attributes:
        marks: the id after each step of an axis but the innermost, or None.
        tail: what follows the last step, `end` included.
        joined: marks of the outermost axis stand between its steps only, not after the last.
    """

    joined: ClassVar[bool] = False
    marks: list[int | None]
    tail: list[int]

    @abstractmethod
    def header(self, shape: Shape) -> list[int]:
        """The ids that say how large the grid is."""

    @abstractmethod
    def sizes(self, header: Sequence[int]) -> tuple[int, ...]:
        """The sizes that the header says, as far as it has come."""

    @abstractmethod
    def complete(self, header: Sequence[int]) -> bool:
        """Whether the header is at its end."""

    @abstractmethod
    def next_header(self, header: Sequence[int], budget: int) -> list[range]:
        """The ids that may come next in a header so that the span fits ``budget`` tokens."""

    @property
    def fixed(self) -> list[int]:
        """Begin, tail and the marks between."""
        return [self.begin, *self.tail, *(mark for mark in self.marks if mark is not None)]

    def template(self, shape: Shape) -> list[int]:
        """Begin, header, the codes with their marks, tail."""
        body = (-1 - self.layout.books(shape[-1])).tolist()
        for steps, mark in zip(reversed(shape[:-1]), reversed(self.marks), strict=True):
            body = (body + ([] if mark is None else [mark])) * steps
        return [self.begin, *self.header(shape), *body[: len(body) - self.joined], *self.tail]

    def length(self, shape: Shape) -> int:
        """Tokens of a span of this grid."""
        body = self.layout.length(shape[-1])
        for steps, mark in zip(reversed(shape[:-1]), reversed(self.marks), strict=True):
            body = (body + (mark is not None)) * steps
        return 1 + self.header_length(shape) + body - self.joined + len(self.tail)

    def header_length(self, shape: Shape) -> int:
        """Tokens of the header."""
        return len(self.header(shape))

    @property
    def least(self) -> int:
        """One step along each axis."""
        return self.length([1] * len(self.axes))

    def choices(self, shape: Shape) -> Tensor:
        """Begin, codes, and what of the header is open."""
        free = torch.tensor(self.template(shape)) < 0
        header = self.header(shape)
        open_ids = (sum(map(len, self.next_header(header[:i], UNLIMITED))) for i in range(len(header)))
        free[: 1 + len(header)] = torch.tensor([True, *(n > 1 for n in open_ids)])
        return free

    def shape(self, codes: Tensor) -> tuple[int, ...]:
        """The grid of codes: the steps of each axis."""
        axes, layout = self.axes, self.layout
        if codes.ndim == len(axes) + layout.has_axis:
            rows = self._rows(codes)
            try:
                shape = (*rows.shape[: len(axes) - 1], layout.steps(rows.shape))
            except PlaitError as error:
                raise PlaitError(f"{self.modality} {error}") from None
            if self._has(shape):
                return shape
        names = [f"{layout.codebooks} codebooks"] * layout.has_axis + [axis.name for axis in axes]
        raise self._refusal(codes, " × ".join(names) + self._limits)

    def check(self, grid: Shape) -> tuple[int, ...]:
        """A grid that was asked for.

        Raises:
            PlaitError: no span has it.
        """
        if len(grid) != len(self.axes) or not self._has(grid):
            names = " × ".join(axis.name for axis in self.axes) + self._limits
            raise PlaitError(f"{self.modality}: grid is {list(grid)}, expected {names}")
        return tuple(grid)

    @abstractmethod
    def _has(self, shape: Shape) -> bool:
        """Whether a span may have these sizes."""

    @property
    @abstractmethod
    def _limits(self) -> str:
        """The same in words."""

    def read(self, codes: Sequence[int], shape: Shape) -> Tensor:
        """The codes that stand in a span of this grid, in their order → int64 codes."""
        if len(shape) < 2:
            return super().read(codes, shape)
        step = *shape[1:-1], self.layout.length(shape[-1])
        whole = len(codes) // math.prod(step)
        stream = torch.tensor(codes[: whole * math.prod(step)], dtype=torch.int64)
        grid = self.layout.read(stream.reshape(whole, *step))
        return grid.movedim(-2, 0) if self.layout.has_axis else grid

    def _most(self, shape: Shape, budget: int, limit: int) -> int:
        """The largest next axis, up to ``limit``, so that the span fits ``budget`` tokens; 0 if none does."""
        rest = [1] * (len(self.axes) - len(shape) - 1)
        low, high = 0, limit
        while low < high:
            middle = (low + high + 1) // 2
            low, high = (middle, high) if self.length([*shape, middle, *rest]) <= budget else (low, middle - 1)
        return low


class NumberedGrid(GridForm):
    """plait's: sizes as number tokens, a mark after every step, one end mark."""

    def __init__(self, modality: str, vocabulary: Vocabulary) -> None:
        super().__init__(modality, vocabulary)
        grammar = MODALITIES[modality].grammar
        self.begin, self.end = vocabulary.special(grammar.begin), vocabulary.special(grammar.end)
        self.marks = [None if axis.mark is None else vocabulary.special(axis.mark) for axis in self.axes[:-1]]
        self.tail = [self.end]
        self.numbers = vocabulary.block("number").ids
        # What each number of the header counts: steps of which axis, times what.
        self.places = [(i, NUMBERS**place) for i, a in enumerate(self.axes) for place in reversed(range(a.digits))]

    def header(self, shape: Shape) -> list[int]:
        """Each axis in as many digits of base 1,024 as it has."""
        return [self.numbers[shape[axis] // unit % NUMBERS] for axis, unit in self.places]

    def header_length(self, shape: Shape) -> int:
        """The same for all grids."""
        return len(self.places)

    def complete(self, header: Sequence[int]) -> bool:
        """Whether all numbers are there."""
        return len(header) == len(self.places)

    def sizes(self, header: Sequence[int]) -> tuple[int, ...]:
        """The sizes of the axes whose numbers the header has."""
        counted = [0] * len(self.axes)
        for token, (axis, unit) in zip(header, self.places, strict=False):
            counted[axis] += (token - self.numbers.start) * unit
        return tuple(counted[axis] for axis, unit in self.places[: len(header)] if unit == 1)

    def next_header(self, header: Sequence[int], budget: int) -> list[range]:
        """The numbers that may come next."""
        axis, unit = self.places[len(header)]
        said = ((token - self.numbers.start, place) for token, place in zip(header, self.places, strict=False))
        so_far = sum(number * u for number, (a, u) in said if a == axis)
        least = 1 if unit == 1 and not so_far else 0  # no axis has size 0
        most = self._most(self.sizes(header), budget, NUMBERS ** self.axes[axis].digits - 1)
        return [self.numbers[least : min(NUMBERS - 1, (most - so_far) // unit) + 1]]

    def _has(self, shape: Shape) -> bool:
        return all(0 < n < NUMBERS**axis.digits for n, axis in zip(shape, self.axes, strict=True))

    @property
    def _limits(self) -> str:
        return "".join(f", each 1 to {NUMBERS**n - 1}" for n in sorted({axis.digits for axis in self.axes}))


class WrittenGrid(GridForm):
    """Emu3's: the size is written out in digits of text, "90*90", rows first."""

    DIGITS: ClassVar[int] = 4  # of a side at most
    before_end: ClassVar[tuple[str, ...]] = ("<frame>",)

    def __init__(self, modality: str, vocabulary: Vocabulary) -> None:
        super().__init__(modality, vocabulary)
        special = vocabulary.special
        self.begin, self.end = special("<image>"), special("</image>")
        self.marks, self.tail = [special("<row>")], [*map(special, self.before_end), self.end]
        self.digits, self.times, self.codes = [special(d) for d in "0123456789"], special("*"), special("<image codes>")
        self.value = {token: digit for digit, token in enumerate(self.digits)}

    def header(self, shape: Shape) -> list[int]:
        """Digits, times, digits, and the mark before the codes."""
        height, width = ([self.digits[int(d)] for d in str(n)] for n in shape)
        return [*height, self.times, *width, self.codes]

    def header_length(self, shape: Shape) -> int:
        """A token per digit and two more."""
        return len(str(shape[0])) + len(str(shape[1])) + 2

    def complete(self, header: Sequence[int]) -> bool:
        """Whether the mark before the codes is there."""
        return bool(header) and header[-1] == self.codes

    def sizes(self, header: Sequence[int]) -> tuple[int, ...]:
        """The numbers that a sign has ended."""
        numbers, number = [], 0
        for token in header:
            if token in self.value:
                number = 10 * number + self.value[token]
            else:
                numbers.append(number)
                number = 0
        return tuple(numbers)

    def next_header(self, header: Sequence[int], budget: int) -> list[range]:
        """The digits that may come next, and the sign that ends a number."""
        shape = self.sizes(header)
        if len(shape) == 2:
            return []
        written = list(header[header.index(self.times) + 1 :] if shape else header)
        so_far = self.sizes([*written, self.times])[0]
        most = self._most(shape, budget, 10**self.DIGITS - 1)
        ids = [token for digit, token in enumerate(self.digits) if 0 < 10 * so_far + digit <= most]
        ids += [self.codes if shape else self.times] * (0 < so_far <= most)
        return _ranges(ids)

    def _has(self, shape: Shape) -> bool:
        return all(0 < n < 10**self.DIGITS for n in shape)

    @property
    def _limits(self) -> str:
        return f", each 1 to {10**self.DIGITS - 1}"


class JoinedGrid(WrittenGrid):
    """Emu3.5's: as Emu3's, with row marks between rows only and nothing else before the end."""

    joined: ClassVar[bool] = True
    before_end: ClassVar[tuple[str, ...]] = ()


class FixedGrid(GridForm):
    """Chameleon's: the codes of a grid that is always the same, row by row."""

    def __init__(self, modality: str, vocabulary: Vocabulary) -> None:
        super().__init__(modality, vocabulary)
        self.begin, self.end = vocabulary.special("<image>"), vocabulary.special("</image>")
        self.marks, self.tail = [None] * (len(self.axes) - 1), [self.end]
        self.grid = vocabulary.modalities[modality].grid
        if len(self.grid) != len(self.axes):
            raise PlaitError(f"{modality}: the vocabulary gives it no grid of {len(self.axes)} sizes; import it again")

    def header(self, shape: Shape) -> list[int]:
        """Nothing has to be said."""
        return []

    def complete(self, header: Sequence[int]) -> bool:
        """From the start."""
        return True

    def sizes(self, header: Sequence[int]) -> tuple[int, ...]:
        """The only ones."""
        return self.grid

    def next_header(self, header: Sequence[int], budget: int) -> list[range]:
        """Nothing."""
        return []

    @property
    def least(self) -> int:
        """All spans are as long."""
        return self.length(self.grid)

    def _has(self, shape: Shape) -> bool:
        return tuple(shape) == self.grid

    @property
    def _limits(self) -> str:
        return f" of {' × '.join(map(str, self.grid))}"


def _ranges(ids: list[int]) -> list[range]:
    """Ids as ranges, as few as possible."""
    found: list[range] = []
    for i in sorted(ids):
        if found and found[-1].stop == i:
            found[-1] = range(found[-1].start, i + 1)
        else:
            found.append(range(i, i + 1))
    return found
