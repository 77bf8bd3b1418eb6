"""The grammar: how documents stand in the id space, declared once per modality.

A document is ``<bos>`` span… ``<eos>``. A modality declares its span as a `SpanGrammar`: the axes of its code grid,
outermost first, and the mark that follows each step along an axis. An image is::

    <image> H W  code×W <row>  code×W <row>  …  </image>

where H and W are number tokens. A modality without axes (text) has a free length and ends with its end token. A step
along the innermost axis may have several codes, each of a codebook with a block of its own; the layout that the
vocabulary names says in which order they come (see `plait.tokenizers.layouts`). Sound in two codebooks is::

    <audio> 0 T  a0 b0 a1 b1 …  </audio>

with its steps in two digits, 1024 · 0 + T. As the header says how long a span is, every position's codebook is known.

Models from elsewhere write their spans in forms of their own (`plait.tokenizers.forms`). There text has no marks:
texts that follow each other are one. Special tokens of no form, which divide turns, may stand between their spans.

From the declaration come the writer (`Grammar.write`), the parser (`Grammar.parse`), the logits mask
(`Cursor.allowed`), the loss mask (`Grammar.choices`) and the length budget (`Grammar.length`, and the mask, which lets
nothing begin that cannot end in time). What is sampled under the mask parses.
"""

from collections.abc import Sequence
from copy import copy
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

from plait.errors import PlaitError
from plait.tokenizers.forms import BareText, MarkedText, SpanForm
from plait.tokenizers.grids import UNLIMITED, FixedGrid, GridForm, JoinedGrid, NumberedGrid, WrittenGrid
from plait.tokenizers.modalities import MODALITIES
from plait.tokenizers.vocabulary import BOS, EOS, Vocabulary


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


_FORMS: dict[str, dict[str, type[SpanForm]]] = {
    "text": {"text": BareText},
    "emu3": {"text": BareText, "image": WrittenGrid},
    "emu3.5": {"text": BareText, "image": JoinedGrid},
    "chameleon": {"text": BareText, "image": FixedGrid},
}


def build_form(modality: str, vocabulary: Vocabulary) -> SpanForm:
    """The form of a modality in a vocabulary: its family's own, else plait's.

    Raises:
        PlaitError: codes of several codebooks in a span without axes, whose end would not be known; or no grid where
            all spans have the same one.
    """
    plain = NumberedGrid if MODALITIES[modality].grammar.axes else MarkedText
    return _FORMS.get(vocabulary.grammar, {}).get(modality, plain)(modality, vocabulary)


class Grammar:
    """All spans of a vocabulary: documents to ids and back.

    Attributes:
        forms: by modality.
        bos: id that begins a document; −1 where bare ids have none, and so on.
        eos: id that ends it.
        turns: ids that end an answer, though not the document.
        text: the form of bare text, if the vocabulary has it.
        between: special tokens that may stand between spans if there is bare text.
    """

    def __init__(self, vocabulary: Vocabulary) -> None:
        self.vocabulary = vocabulary
        self.bos, self.eos = (vocabulary.special(t) if vocabulary.has_special(t) else -1 for t in (BOS, EOS))
        self.forms = {name: build_form(name, vocabulary) for name in vocabulary.modalities}
        self.by_begin = {form.begin: form for form in self.forms.values() if form.begin >= 0}
        self.text = next((form for form in self.forms.values() if isinstance(form, BareText)), None)
        names = vocabulary.names
        self.turns = sorted({i for name, i in names.items() if name.startswith("<turn")})
        used = {i for form in self.forms.values() for i in form.fixed} | set(names.values()) - set(self.turns)
        tokens = (i for block in vocabulary.blocks if block.tokens for i in block.ids)
        self.between = frozenset(tokens) - used if self.text else frozenset()

    def form(self, modality: str) -> SpanForm:
        """A modality's span.

        Raises:
            PlaitError: the vocabulary has no such modality.
        """
        if modality not in self.forms:
            if not self.forms:
                mend = "import it again with its text tokenizer: plait import … --text FILE"
                raise PlaitError(f"{modality}: this model has no tokenizer and can only score ids; {mend}")
            raise PlaitError(f"{modality}: this model has no such modality; it has {', '.join(self.forms)}")
        return self.forms[modality]

    def begin(self, modality: str, grid: Sequence[int] | None = None) -> list[int]:
        """The ids that begin a span, up to its first code or the header that is left open.

        Args:
            modality: of the span.
            grid: sizes of its axes; without them a model chooses them under the mask.

        Raises:
            PlaitError: the vocabulary has no such modality, or its spans cannot have this grid.
        """
        form = self.form(modality)
        if not isinstance(form, GridForm) or (grid is None and not form.complete([])):
            return [] if form is self.text else [form.begin]
        shape = form.check(form.sizes([]) if grid is None else grid)
        return [form.begin, *form.header(shape)]

    def write(self, span: Span) -> Tensor:
        """A span's ids, int64 ``[n]``.

        Raises:
            PlaitError: unknown modality, a grid of the wrong rank or of a size the span cannot have, or codes that are
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
        cursor = Cursor(self, budget=UNLIMITED)
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
        self._only: SpanForm | None = None
        self._answers = False
        self.left = 0

    def aim(self, modality: str | None = None) -> None:
        """Say that a prompt ends here: what follows are spans of their own, and a turn's end is the document's.

        Args:
            modality: what has to follow: one span of this modality and no other. It has not begun yet.

        Raises:
            PlaitError: the vocabulary has no such modality.
        """
        self._answers = True
        if self._bare:
            self._close()
        if modality is not None:
            self._only = self.grammar.form(modality)
            if isinstance(self._only, BareText):
                self._open(self._only)

    def copy(self) -> Self:
        """Another cursor at the same place, which goes on by itself."""
        other = copy(self)
        other.spans, other._header, other._codes = list(self.spans), list(self._header), list(self._codes)
        return other

    def allowed(self) -> list[range]:
        """The ids that may come next, as ranges; never empty before the end."""
        form, room = self._form, self.budget - 1  # one token is kept for <eos>
        if self.done:
            return []
        if form is None or self._bare:
            forms = self.grammar.forms.values() if self._only is None else [self._only]
            ends = [*(self.grammar.turns if self._answers else ()), self.grammar.eos]
            starts = [ids for f in forms if f.least <= room for ids in f.starts]
            return [*starts, *(range(end, end + 1) for end in ends)]
        if not isinstance(form, GridForm):
            end = range(form.end, form.end + 1)
            return [form.books[0], end] if room > 1 else [end]
        if not form.complete(self._header):
            # What the header and begin tokens used up counts as part of the span.
            return form.next_header(self._header, room + 1 + len(self._header))
        token = self._declared(form)
        return [form.books[-1 - token] if token < 0 else range(token, token + 1)]

    def allows(self, token: int) -> bool:
        """Whether this id may come next in a document; marks between turns may, although they are not offered."""
        if token in self.grammar.between and not self.done and (self._form is None or self._bare):
            return True
        return any(token in ids for ids in self.allowed())

    def push(self, token: int) -> None:
        """Take one token, which must be allowed."""
        self.budget -= 1
        form = self._form
        if form is None or self._bare:
            self._push_between(token)
        elif not isinstance(form, GridForm):
            if token == form.end:
                self._close()
            else:
                self._codes.append(token - form.books[0].start)
        elif not form.complete(self._header):
            self._header.append(token)
            self._size(form)
        else:
            book = -1 - self._declared(form)
            if book >= 0:
                self._codes.append(token - form.books[book].start)
            self.left -= 1
            if not self.left:
                self._close()

    def _push_between(self, token: int) -> None:
        begun, text = self.grammar.by_begin.get(token), self.grammar.text
        if token == self.grammar.eos or begun is not None or token in self.grammar.between:
            if self._bare:
                self._close()
            self.done = token == self.grammar.eos or (self._answers and token in self.grammar.turns)
            if begun is not None:
                self._open(begun)
            return
        assert text is not None
        if not self._bare:
            self._open(text)
        self._codes.append(token - text.books[0].start)

    @property
    def _bare(self) -> bool:
        """Whether a text without marks is open."""
        return self._form is not None and self._form is self.grammar.text

    def _open(self, form: SpanForm) -> None:
        self._form, self._header, self._codes, self._template, self.left = form, [], [], None, 0
        if isinstance(form, GridForm):
            self._size(form)

    def _size(self, form: GridForm) -> None:
        if form.complete(self._header):
            self.left = form.length(form.sizes(self._header)) - 1 - len(self._header)

    def _close(self) -> None:
        span = self.partial()
        assert span is not None
        self.spans.append(span)
        self._form, self._template, self.left = None, None, 0

    def _declared(self, form: GridForm) -> int:
        """What the open span's template has here; made on first use, as a header may claim more than ever comes."""
        if self._template is None:
            self._template = form.template(form.sizes(self._header))
        return self._template[-self.left]

    @property
    def open(self) -> tuple[str, tuple[int, ...], list[int]] | None:
        """The span that has begun and not ended: modality, grid as far as known, codes so far."""
        form = self._form
        if form is None:
            return None
        return form.modality, form.sizes(self._header) if isinstance(form, GridForm) else (), self._codes

    def partial(self) -> Span | None:
        """The open span as far as it has come, in complete steps of its outermost axis; None if it has no grid yet."""
        form = self._form
        if form is None or (isinstance(form, GridForm) and not form.complete(self._header)):
            return None
        shape = form.sizes(self._header) if isinstance(form, GridForm) else (len(self._codes),)
        return Span(form.modality, form.read(self._codes, shape))

    @property
    def expectation(self) -> str:
        """What may come next, in words."""
        names = self.grammar.vocabulary
        ranges = [ids for ids in self.allowed() if len(ids)]
        parts = [
            names.describe(r[0]) if len(r) == 1 else f"{names.describe(r[0])}–{names.describe(r[-1])}" for r in ranges
        ]
        return " or ".join(parts) or "nothing"
