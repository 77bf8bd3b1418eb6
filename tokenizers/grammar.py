"""The grammar: how documents stand in the id space, declared once per modality.

A document is ``<bos>`` span… ``<eos>``. A modality declares its span as a `SpanGrammar`: the axes of its code grid,
outermost first, and the mark that follows each step along an axis. An image is::

    <image> H W  code×W <row>  code×W <row>  …  </image>

where H and W are number tokens. A modality without axes (text) has a free length and ends with its end token. A step
along the innermost axis may have several codes, each of a codebook with a block of its own; the layout that the
vocabulary names says in which order they come (see `plait.tokenizers.layouts`). Sound in two codebooks is::

    <audio> 0 T  a0 b0 a1 b1 …  </audio>

with its steps in two digits, 1024 · 0 + T. As the header says how long a span is, every position's codebook is known.

From the declaration come the writer (`Grammar.write`), the parser (`Grammar.parse`), the logits mask
(`Cursor.allowed`), the loss mask (`Grammar.choices`) and the length budget (`Grammar.length`, and the mask, which lets
nothing begin that cannot end in time). What is sampled under the mask parses.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from plait.errors import PlaitError
from plait.tokenizers.base import check_codes
from plait.tokenizers.modalities import MODALITIES, SpanGrammar
from plait.tokenizers.vocabulary import BOS, EOS, NUMBERS, Vocabulary

_UNLIMITED = 1 << 60


@dataclass
class Span:
    """One modality's part of a document.

    Attributes:
        modality: name in the registry.
        codes: int64 grid, one dimension per axis of the grammar, after that of codebooks if the vocabulary has several
            for it; ``[n]`` for text.
        loss: False for what is given and not to be learned.
        time: start and end in seconds, for spans that belong together in time.
    """

    modality: str
    codes: Tensor
    loss: bool = True
    time: tuple[float, float] | None = None


class SpanForm:
    """A `SpanGrammar` in the ids of a vocabulary.

    Raises:
        PlaitError: codes of several codebooks in a span without axes, whose end would not be known.
    """

    def __init__(self, grammar: SpanGrammar, vocabulary: Vocabulary) -> None:
        entry = vocabulary.modalities[grammar.modality]
        self.grammar, self.layout = grammar, entry.build_layout()
        self.begin, self.end = vocabulary.special(grammar.begin), vocabulary.special(grammar.end)
        self.marks = [None if axis.mark is None else vocabulary.special(axis.mark) for axis in grammar.axes[:-1]]
        self.numbers = vocabulary.block("number").ids
        self.books = [vocabulary.block(name).ids for name in entry.blocks]
        self.sized = bool(grammar.axes)
        # What each number of the header counts: steps of which axis, times what.
        self.places = [
            (i, NUMBERS**place) for i, axis in enumerate(grammar.axes) for place in reversed(range(axis.digits))
        ]
        if len(self.books) > 1 and not self.sized:
            raise PlaitError(f"{grammar.modality}: has {len(self.books)} codebooks and no axes; give its span an axis")

    def template(self, shape: Sequence[int]) -> list[int]:
        """The ids of a span of this grid, −1 − k where a code of codebook k goes."""
        if self.sized:
            body = (-1 - self.layout.books(shape[-1])).tolist()
            for steps, mark in zip(reversed(shape[:-1]), reversed(self.marks), strict=True):
                body = (body + ([] if mark is None else [mark])) * steps
        else:
            body = [-1] * shape[0]
        header = [self.numbers[shape[axis] // unit % NUMBERS] for axis, unit in self.places]
        return [self.begin, *header, *body, self.end]

    def length(self, shape: Sequence[int]) -> int:
        """Tokens of a span of this grid."""
        body = self.layout.length(shape[-1])
        if self.sized:
            for steps, mark in zip(reversed(shape[:-1]), reversed(self.marks), strict=True):
                body = (body + (mark is not None)) * steps
        return 2 + len(self.places) + body

    @property
    def least(self) -> int:
        """Tokens of the smallest span."""
        return self.length([1] * len(self.grammar.axes) or [0])

    def choices(self, shape: Sequence[int]) -> Tensor:
        """Bool ``[length]``: True where the grammar leaves a choice, False where it forces the token."""
        free = torch.tensor(self.template(shape)) < 0
        free[: 1 + len(self.places)] = True
        free[-1] |= not self.sized
        return free

    def shape(self, codes: Tensor) -> tuple[int, ...]:
        """The grid of codes: the steps of each axis.

        Raises:
            PlaitError: the wrong rank, or a size that the header cannot name.
        """
        axes, layout = self.grammar.axes, self.layout
        if codes.ndim == max(1, len(axes)) + layout.has_axis:
            if not axes:
                return tuple(codes.shape)
            rows = self._rows(codes)
            try:
                shape = (*rows.shape[: len(axes) - 1], layout.steps(rows.shape))
            except PlaitError as error:
                raise PlaitError(f"{self.grammar.modality} {error}") from None
            if all(0 < n < NUMBERS**axis.digits for n, axis in zip(shape, axes, strict=True)):
                return shape
        most = "".join(f", each 1 to {NUMBERS**n - 1}" for n in sorted({axis.digits for axis in axes}))
        names = [f"{layout.codebooks} codebooks"] * layout.has_axis + [axis.name for axis in axes]
        expected = " × ".join(names) + most if axes else "one dimension"
        raise PlaitError(f"{self.grammar.modality} codes: shape is {tuple(codes.shape)}, expected {expected}")

    def write(self, codes: Tensor) -> Tensor:
        """Codes → the span's ids, int64 ``[n]``.

        Raises:
            PlaitError: as `shape`, or codes that are not integers or that their codebook's block does not have.
        """
        ids = torch.tensor(self.template(self.shape(codes)))
        stream = self.layout.write(self._rows(codes)).flatten().cpu()
        books = -1 - ids[ids < 0]
        for k, block in enumerate(self.books):
            of_which = f" of codebook {k}" if len(self.books) > 1 else ""
            check_codes(stream[books == k], len(block), f"{self.grammar.modality} codes{of_which}")
        ids[ids < 0] = stream.to(torch.int64) + torch.tensor([block.start for block in self.books])[books]
        return ids

    def read(self, codes: Sequence[int], shape: Sequence[int]) -> Tensor:
        """The codes that stand in a span of this grid, in their order → int64 codes.

        They may break off: what comes back are the steps of the outermost axis that are complete.
        """
        stream = torch.tensor(codes, dtype=torch.int64)
        if len(shape) < 2:
            return self.layout.read(stream, shape[0])
        step = *shape[1:-1], self.layout.length(shape[-1])
        whole = len(stream) // math.prod(step)
        grid = self.layout.read(stream[: whole * math.prod(step)].reshape(whole, *step))
        return grid.movedim(-2, 0) if self.layout.has_axis else grid

    def sizes(self, header: Sequence[int]) -> tuple[int, ...]:
        """The sizes of the axes whose numbers the header has."""
        counted = [0] * len(self.grammar.axes)
        for number, (axis, unit) in zip(header, self.places, strict=False):
            counted[axis] += number * unit
        return tuple(counted[axis] for axis, unit in self.places[: len(header)] if unit == 1)

    def next_numbers(self, header: Sequence[int], budget: int) -> range:
        """The ids that may come next in a header so that the span fits ``budget`` tokens."""
        axis, unit = self.places[len(header)]
        shape = self.sizes(header)
        so_far = sum(number * u for number, (a, u) in zip(header, self.places, strict=False) if a == axis)
        least = 1 if unit == 1 and not so_far else 0  # no axis has size 0
        most = min(NUMBERS - 1, (self._most(shape, budget) - so_far) // unit)
        return self.numbers[least : most + 1]

    def _most(self, shape: Sequence[int], budget: int) -> int:
        """The largest next axis so that the span fits ``budget`` tokens; 0 if none does."""
        axes = self.grammar.axes
        rest = [1] * (len(axes) - len(shape) - 1)
        low, high = 0, NUMBERS ** axes[len(shape)].digits - 1
        while low < high:
            middle = (low + high + 1) // 2
            low, high = (middle, high) if self.length([*shape, middle, *rest]) <= budget else (low, middle - 1)
        return low

    def _rows(self, codes: Tensor) -> Tensor:
        """Codes as the layout takes them, which knows the innermost axis alone."""
        return codes.movedim(0, -2) if self.layout.has_axis else codes


class Grammar:
    """All spans of a vocabulary: documents to ids and back."""

    def __init__(self, vocabulary: Vocabulary) -> None:
        self.vocabulary = vocabulary
        self.bos, self.eos = vocabulary.special(BOS), vocabulary.special(EOS)
        self.forms = {name: SpanForm(MODALITIES[name].grammar, vocabulary) for name in vocabulary.modalities}
        self.by_begin = {form.begin: form for form in self.forms.values()}

    def form(self, modality: str) -> SpanForm:
        """A modality's span.

        Raises:
            PlaitError: the vocabulary has no such modality.
        """
        if modality not in self.forms:
            raise PlaitError(f"{modality}: this model has no such modality; it has {', '.join(self.forms)}")
        return self.forms[modality]

    def write(self, span: Span) -> Tensor:
        """A span's ids, int64 ``[n]``.

        Raises:
            PlaitError: unknown modality, a grid of the wrong rank or of a size numbers cannot name, or codes that are
                not integers or that the modality's block does not have.
        """
        return self.form(span.modality).write(span.codes)

    def choices(self, span: Span) -> Tensor:
        """Bool ``[n]`` along `write`'s ids: True where the grammar leaves a choice; only those carry loss."""
        form = self.form(span.modality)
        return form.choices(form.shape(span.codes))

    def length(self, span: Span) -> int:
        """Tokens that the span takes."""
        form = self.form(span.modality)
        return form.length(form.shape(span.codes))

    def document(self, spans: Sequence[Span]) -> Tensor:
        """``<bos>`` spans ``<eos>``, int64 ``[n]``."""
        parts = [self.write(span) for span in spans]
        return torch.cat([torch.tensor([self.bos]), *parts, torch.tensor([self.eos])])

    def parse(self, ids: Sequence[int] | Tensor) -> list[Span]:
        """A whole document's ids → its spans.

        Raises:
            PlaitError: the ids are no document; names the first position that does not fit.
        """
        ids = [int(i) for i in ids]
        if not ids or ids[0] != self.bos:
            raise PlaitError(f"token 0: a document begins with {BOS}, found {self._name(ids, 0)}")
        cursor = Cursor(self, budget=_UNLIMITED)
        for position, token in enumerate(ids[1:], 1):
            if cursor.done:
                raise PlaitError(f"token {position}: {self._name(ids, position)} after {EOS}")
            if not cursor.allows(token):
                raise PlaitError(
                    f"token {position}: {self._name(ids, position)} where {cursor.expectation} is expected"
                )
            cursor.push(token)
            if (short := cursor.left - (len(ids) - 1 - position)) > 0:
                raise PlaitError(f"document ends after {len(ids)} tokens, its last span goes on for {short} more")
        if not cursor.done:
            raise PlaitError(f"document ends after {len(ids)} tokens, {cursor.expectation} is missing")
        return cursor.spans

    def _name(self, ids: Sequence[int], position: int) -> str:
        return self.vocabulary.describe(ids[position]) if position < len(ids) else "nothing"


class Cursor:
    """A position in a document that grows token by token: what may come next, and the spans so far.

    Args:
        grammar: of the document.
        budget: tokens that may still come, ``<eos>`` included; nothing begins that cannot end within it.

    Attributes:
        left: tokens that the open span still takes, if its header has said so; else 0.
    """

    def __init__(self, grammar: Grammar, budget: int) -> None:
        self.grammar = grammar
        self.budget = budget
        self.done = False
        self.spans: list[Span] = []
        self._form: SpanForm | None = None
        self._header: list[int] = []
        self._template: list[int] | None = None
        self._codes: list[int] = []
        self.left = 0

    def allowed(self) -> list[range]:
        """The ids that may come next, as ranges; never empty before the end."""
        form, room = self._form, self.budget - 1  # one token is kept for <eos>
        if self.done:
            return []
        if form is None:
            begins = [range(f.begin, f.begin + 1) for f in self.grammar.forms.values() if f.least <= room]
            return [*begins, range(self.grammar.eos, self.grammar.eos + 1)]
        if not form.sized:
            end = range(form.end, form.end + 1)
            return [form.books[0], end] if room > 1 else [end]
        if len(self._header) < len(form.places):
            # What the header and begin tokens used up counts as part of the span.
            return [form.next_numbers(self._header, room + 1 + len(self._header))]
        token = self._declared(form)
        return [form.books[-1 - token] if token < 0 else range(token, token + 1)]

    def allows(self, token: int) -> bool:
        """Whether this id may come next."""
        return any(token in ids for ids in self.allowed())

    def push(self, token: int) -> None:
        """Take one token, which must be allowed."""
        self.budget -= 1
        form = self._form
        if form is None:
            if token == self.grammar.eos:
                self.done = True
            else:
                self._form = self.grammar.by_begin[token]
                self._header, self._codes, self._template, self.left = [], [], None, 0
        elif len(self._header) < len(form.places):
            self._header.append(token - form.numbers.start)
            if len(self._header) == len(form.places):
                self.left = form.length(form.sizes(self._header)) - 1 - len(self._header)
        elif token == form.end:
            span = self.partial()
            assert span is not None
            self.spans.append(span)
            self._form, self._template, self.left = None, None, 0
        else:
            book = -1 - self._declared(form) if form.sized else 0
            if book >= 0:
                self._codes.append(token - form.books[book].start)
            self.left -= form.sized

    def _declared(self, form: SpanForm) -> int:
        """What the open span's template has here; made on first use, as a header may claim more than ever comes."""
        if self._template is None:
            self._template = form.template(form.sizes(self._header))
        return self._template[-self.left]

    @property
    def open(self) -> tuple[str, tuple[int, ...], list[int]] | None:
        """The span that has begun and not ended: modality, grid as far as known, codes so far."""
        form = self._form
        return None if form is None else (form.grammar.modality, form.sizes(self._header), self._codes)

    def partial(self) -> Span | None:
        """The open span as far as it has come, in complete steps of its outermost axis; None if it has no grid yet."""
        form = self._form
        if form is None or len(self._header) < len(form.places):
            return None
        shape = form.sizes(self._header) if form.sized else (len(self._codes),)
        return Span(form.grammar.modality, form.read(self._codes, shape))

    @property
    def expectation(self) -> str:
        """What may come next, in words."""
        names = self.grammar.vocabulary
        ranges = [ids for ids in self.allowed() if len(ids)]
        parts = [
            names.describe(r[0]) if len(r) == 1 else f"{names.describe(r[0])}–{names.describe(r[-1])}" for r in ranges
        ]
        return " or ".join(parts) or "nothing"
