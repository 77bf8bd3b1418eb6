"""The grammar: how documents stand in the id space, declared once per modality.

A document is ``<bos>`` span… ``<eos>``. A modality declares its span as a `SpanGrammar`: the axes of its code grid,
outermost first, and the mark that follows each step along an axis. An image is::

    <image> H W  code×W <row>  code×W <row>  …  </image>

where H and W are number tokens. A modality without axes (text) has a free length and ends with its end token.

From the declaration come the writer (`Grammar.write`), the parser (`Grammar.parse`), the logits mask
(`Cursor.allowed`), the loss mask (`Grammar.choices`) and the length budget (`Grammar.length`, and the mask, which lets
nothing begin that cannot end in time). What is sampled under the mask parses.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from plait.errors import PlaitError
from plait.tokenizers.base import check_codes
from plait.tokenizers.modalities import MODALITIES, SpanGrammar
from plait.tokenizers.vocabulary import BOS, EOS, NUMBERS, Vocabulary

_CODE = -1  # in a template: a position that holds a code
_UNLIMITED = 1 << 60


@dataclass
class Span:
    """One modality's part of a document.

    Attributes:
        modality: name in the registry.
        codes: int64 grid, one dimension per axis of the grammar; ``[n]`` for text.
        loss: False for what is given and not to be learned.
        time: start and end in seconds, for spans that belong together in time.
    """

    modality: str
    codes: Tensor
    loss: bool = True
    time: tuple[float, float] | None = None


class SpanForm:
    """A `SpanGrammar` in the ids of a vocabulary."""

    def __init__(self, grammar: SpanGrammar, vocabulary: Vocabulary) -> None:
        self.grammar = grammar
        self.begin, self.end = vocabulary.special(grammar.begin), vocabulary.special(grammar.end)
        self.marks = [None if axis.mark is None else vocabulary.special(axis.mark) for axis in grammar.axes]
        self.numbers = vocabulary.block("number").ids
        self.codes = vocabulary.block(vocabulary.modalities[grammar.modality].blocks[0]).ids
        self.sized = bool(grammar.axes)

    def template(self, shape: Sequence[int]) -> list[int]:
        """The ids of a span of this grid, −1 where a code goes."""
        body = [_CODE] * (1 if self.sized else shape[0])
        for steps, mark in zip(reversed(shape), reversed(self.marks), strict=self.sized):
            body = (body + ([] if mark is None else [mark])) * steps
        return [self.begin, *(self.numbers[n] for n in shape if self.sized), *body, self.end]

    def length(self, shape: Sequence[int]) -> int:
        """Tokens of a span of this grid."""
        body = 1 if self.sized else shape[0]
        for steps, mark in zip(reversed(shape), reversed(self.marks), strict=self.sized):
            body = (body + (mark is not None)) * steps
        return 2 + len(self.marks) + body

    @property
    def least(self) -> int:
        """Tokens of the smallest span."""
        return self.length([1] * len(self.marks) or [0])

    def choices(self, shape: Sequence[int]) -> Tensor:
        """Bool ``[length]``: True where the grammar leaves a choice, False where it forces the token."""
        template = torch.tensor(self.template(shape))
        free = template == _CODE
        free[: 1 + len(self.marks)] = True
        free[-1] |= not self.sized
        return free

    def most(self, header: Sequence[int], budget: int) -> int:
        """The largest number for the next axis so that the span fits ``budget`` tokens; 0 if none does."""
        rest = [1] * (len(self.marks) - len(header) - 1)
        low, high = 0, NUMBERS - 1
        while low < high:
            middle = (low + high + 1) // 2
            low, high = (middle, high) if self.length([*header, middle, *rest]) <= budget else (low, middle - 1)
        return low


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
        form, shape = self._form_and_shape(span)
        check_codes(span.codes, len(form.codes), f"{span.modality} codes")
        ids = torch.tensor(form.template(shape))
        ids[ids == _CODE] = span.codes.flatten().to(torch.int64) + form.codes.start
        return ids

    def choices(self, span: Span) -> Tensor:
        """Bool ``[n]`` along `write`'s ids: True where the grammar leaves a choice; only those carry loss."""
        form, shape = self._form_and_shape(span)
        return form.choices(shape)

    def length(self, span: Span) -> int:
        """Tokens that the span takes."""
        form, shape = self._form_and_shape(span)
        return form.length(shape)

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
        if not cursor.done:
            raise PlaitError(f"document ends after {len(ids)} tokens, {cursor.expectation} is missing")
        return cursor.spans

    def _form_and_shape(self, span: Span) -> tuple[SpanForm, tuple[int, ...]]:
        form, shape = self.form(span.modality), tuple(span.codes.shape)
        axes = form.grammar.axes
        if len(shape) != max(1, len(axes)) or (axes and not all(0 < n < NUMBERS for n in shape)):
            names = " × ".join(axis.name for axis in axes)
            expected = f"{names}, each 1 to {NUMBERS - 1}" if axes else "one dimension"
            raise PlaitError(f"{span.modality} codes: shape is {shape}, expected {expected}")
        return form, shape

    def _name(self, ids: Sequence[int], position: int) -> str:
        return self.vocabulary.describe(ids[position]) if position < len(ids) else "nothing"


class Cursor:
    """A position in a document that grows token by token: what may come next, and the spans so far.

    Args:
        grammar: of the document.
        budget: tokens that may still come, ``<eos>`` included; nothing begins that cannot end within it.
    """

    def __init__(self, grammar: Grammar, budget: int) -> None:
        self.grammar = grammar
        self.budget = budget
        self.done = False
        self.spans: list[Span] = []
        self._form: SpanForm | None = None
        self._header: list[int] = []
        self._template: list[int] = []
        self._codes: list[int] = []
        self._position = 0

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
            return [form.codes, end] if room > 1 else [end]
        if len(self._header) < len(form.marks):
            # What the header and begin tokens used up counts as part of the span.
            most = form.most(self._header, room + 1 + len(self._header))
            return [form.numbers[1 : most + 1]]
        token = self._template[self._position]
        return [form.codes] if token == _CODE else [range(token, token + 1)]

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
                self._header, self._codes, self._position = [], [], 0
        elif form.sized and len(self._header) < len(form.marks):
            self._header.append(token - form.numbers.start)
            if len(self._header) == len(form.marks):
                self._template = form.template(self._header)[1 + len(self._header) :]
        elif token in form.codes:
            self._codes.append(token - form.codes.start)
            self._position += 1
        elif token == form.end:
            shape = self._header if form.sized else [len(self._codes)]
            codes = torch.tensor(self._codes, dtype=torch.int64).reshape(shape)
            self.spans.append(Span(form.grammar.modality, codes))
            self._form = None
        else:
            self._position += 1

    @property
    def open(self) -> tuple[str, tuple[int, ...], list[int]] | None:
        """The span that has begun and not ended: modality, grid as far as known, codes so far."""
        return None if self._form is None else (self._form.grammar.modality, tuple(self._header), self._codes)

    @property
    def expectation(self) -> str:
        """What may come next, in words."""
        names = self.grammar.vocabulary
        ranges = [ids for ids in self.allowed() if len(ids)]
        parts = [
            names.describe(r[0]) if len(r) == 1 else f"{names.describe(r[0])}–{names.describe(r[-1])}" for r in ranges
        ]
        return " or ".join(parts) or "nothing"
