"""The generation engine: ids in, ids out, several requests at a time. It knows no media.

`generate` is a step iterator: streaming reads it, cancelling stops reading it. Tokens that the grammar forces are not
sampled, they ride along with the next step. A request is a row in the KV cache, and with guidance one or two more;
what prompts have in common is computed once, and the rows of a finished request cost nothing from then on.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from plait.infer.sampling import Sampling, draw, guide, restrict
from plait.model.cache import CHUNK, KVCache
from plait.model.decoder import Decoder
from plait.tokenizers.grammar import Cursor

PORTION = 2048  # tokens that a forward pass reads at most (one of each row at least), so that memory is bounded
ROOM = 256  # positions beyond the prompts that the cache begins with; it doubles when they are used up
WORTH = 32  # tokens that must be saved for a prompt to be read before others, so that they take its beginning over


@dataclass
class Request:
    """One sequence to continue.

    Attributes:
        prompt: ids, at least one, which ``cursor`` has taken already.
        cursor: says what may come next and when the document is done.
        sampling: settings by modality; a document may change modality on the way.
        generator: the request's own random numbers, on the CPU.
        unconditional: the prompt without its condition, at least one id, for guidance; None turns guidance off.
        until_spans: stop when the document has this many spans; None goes on to its end.
        between: settings between spans, where the next modality or the end is chosen.
        image_only: the prompt with no condition but its images, for settings that give them a scale of their own
            (`Sampling.guidance_image`); None if it has no images. It counts only beside ``unconditional``.
        tokens: what was generated, the forced tokens among it.
    """

    prompt: list[int]
    cursor: Cursor
    sampling: dict[str, Sampling]
    generator: torch.Generator
    unconditional: list[int] | None = None
    until_spans: int | None = None
    between: Sampling = Sampling()  # noqa: RUF009 (frozen)
    image_only: list[int] | None = None
    tokens: list[int] = field(default_factory=list)

    @property
    def done(self) -> bool:
        """Whether nothing more is to come."""
        return self.cursor.done or (self.until_spans is not None and len(self.cursor.spans) >= self.until_spans)

    def settings(self) -> Sampling:
        """The settings in force: those of the open span, or those between spans."""
        open_span = self.cursor.open
        return self.sampling.get(open_span[0], Sampling()) if open_span else self.between

    def prompts(self) -> list[list[int]]:
        """The prompt in all the versions that its settings ask for: whole, without its condition, its images alone."""
        settings = [*self.sampling.values(), self.between]
        if self.unconditional is None or not any(s.guided for s in settings):
            return [self.prompt]
        if self.image_only is None or not any(s.three_way for s in settings):
            return [self.prompt, self.unconditional]
        return [self.prompt, self.unconditional, self.image_only]

    def choose(self, logits: Sequence[Tensor]) -> list[int]:
        """Draw the next token from the logits ``[V]`` after each version of the prompt; as `take`."""
        settings = self.settings()
        scores = guide(logits[0], logits[1], settings, *logits[2:]) if settings.guided and logits[1:] else logits[0]
        candidates, ids = restrict(scores, self.cursor.allowed())
        return self.take(int(ids[draw(candidates, settings, self.generator)]))

    def take(self, token: int) -> list[int]:
        """Take a token and those that the grammar forces after it; returns all of them."""
        taken = [token]
        self.cursor.push(token)
        while not self.done:
            allowed = [ids for ids in self.cursor.allowed() if len(ids)]
            if len(allowed) != 1 or len(allowed[0]) != 1:
                break
            taken.append(allowed[0][0])
            self.cursor.push(taken[-1])
        self.tokens += taken
        return taken


@torch.no_grad()
def generate(decoder: Decoder, requests: Sequence[Request]) -> Iterator[list[tuple[int, list[int]]]]:
    """Continue all requests together.

    Yields:
        after each step, (index of the request, its new ids) for every request that was not done.
    """
    prompts: list[list[int]] = []
    rows_of: dict[int, list[int]] = {}
    for index, request in enumerate(requests):
        if not request.done:
            versions = request.prompts()
            rows_of[index] = list(range(len(prompts), len(prompts) + len(versions)))
            prompts += versions
    if not prompts:
        return
    batch = Batch(decoder, prompts, max(requests[index].cursor.budget for index in rows_of))
    while True:
        step = []
        for index, rows in list(rows_of.items()):
            taken = requests[index].choose([batch.logits[row] for row in rows])
            step.append((index, taken))
            if requests[index].done:
                batch.drop(rows_of.pop(index))
            else:
                batch.push(rows, taken)
        yield step
        if not rows_of:
            return
        batch.read()


@dataclass
class Row:
    """A row of the cache.

    Attributes:
        name: which of the batch's prompts it continues.
        last: the last token read.
        length: tokens read.
        pending: tokens to read.
    """

    name: int
    last: int
    length: int
    pending: list[int]


class Batch:
    """Sequences in a KV cache.

    Args:
        decoder: the model.
        prompts: how they begin; read at once.
        room: tokens that may be pushed to each at most.

    Attributes:
        logits: after each sequence that was not dropped, by its index among ``prompts``, ``[V]``.
    """

    def __init__(self, decoder: Decoder, prompts: Sequence[list[int]], room: int) -> None:
        self.decoder = decoder
        like = decoder.norm.weight  # the head's may be quantized
        self.device = like.device
        # Then keys depend on how much is read at once.
        self.reads_whole = decoder.rotary.is_dynamic
        longest = max(len(prompt) for prompt in prompts)
        self.limit = longest + room
        capacity = longest + min(room, ROOM)
        self.cache = KVCache(decoder.config, len(prompts), capacity, self.device, like.dtype, CHUNK)
        self.logits: dict[int, Tensor] = {}
        self.rows: list[Row] = []  # row i of the cache is that of rows[i]
        self.row_of: dict[int, Row] = {}
        plan = plan_sharing(prompts)
        leaders = [name for name, (source, _) in enumerate(plan) if source == name]
        copies = [name for name, (_, shared) in enumerate(plan) if shared == len(prompts[name])]
        others = set(range(len(prompts))) - {*leaders, *copies}
        for wave in (leaders, sorted(others), copies):
            first = len(self.rows)
            # The longest come first, so that rows of like length lie together.
            for name in sorted(wave, key=lambda name: plan[name][1] - len(prompts[name])):
                self._join(name, prompts[name], *plan[name])
            self._read_prompts(first)

    def push(self, names: Sequence[int], tokens: Sequence[int]) -> None:
        """Continue sequences with these tokens; `read` reads them."""
        for name in names:
            self.row_of[name].pending += tokens

    def drop(self, names: Sequence[int]) -> None:
        """End sequences. The last rows move into the gaps, which costs each about what a step does."""
        for index in reversed(range(len(self.rows))):
            if self.rows[index].name in names:
                del self.logits[self.rows[index].name], self.row_of[self.rows[index].name]
                last = self.rows.pop()
                if index < len(self.rows):
                    self.cache.fork(len(self.rows), [index], last.length)
                    self.rows[index] = last

    def read(self) -> None:
        """Run what was pushed through the decoder."""
        self._read(0, len(self.rows))

    def _join(self, name: int, prompt: list[int], source: int, shared: int) -> None:
        """Add a row that takes over the first ``shared`` positions of another."""
        index = len(self.rows)
        at = next((i for i, row in enumerate(self.rows) if row.name == source), index)
        parts_do = shared == len(prompt) or not self.reads_whole
        if at == index or not parts_do or not self.cache.reaches(at, shared):
            shared = 0
        else:
            self.cache.fork(at, [index], shared)
        if shared == len(prompt):
            self.logits[name] = self.logits[source]
        self.row_of[name] = Row(name, prompt[shared - 1], shared, prompt[shared:])
        self.rows.append(self.row_of[name])

    def _read_prompts(self, first: int) -> None:
        """Read what is pending from row ``first`` on, in groups without much padding."""
        while first < len(self.rows) and (longest := len(self.rows[first].pending)):
            stop = first + sum(2 * len(row.pending) > longest for row in self.rows[first:])
            self._read(first, stop)
            first = stop

    def _read(self, first: int, stop: int) -> None:
        """Read what is pending in some rows, in portions.

        Rows are padded with their last token at its own position: that writes to the cache what is there already, and
        the logits after it are those after the row.
        """
        rows = self.rows[first:stop]
        self._reserve(max(row.length + len(row.pending) for row in rows))
        cache = self.cache.narrow(first, stop)
        while longest := max(len(row.pending) for row in rows):
            most = longest if self.reads_whole else max(1, PORTION // len(rows))
            width = min(longest, most, cache.chunk if cache.window else most)
            tokens, positions = [], []
            for row in rows:
                portion, row.pending = row.pending[:width], row.pending[width:]
                positions.append(range(row.length, row.length + len(portion)))
                row.length += len(portion)
                row.last = portion[-1] if portion else row.last
                tokens.append(portion + [row.last] * (width - len(portion)))
            steps = [[*p, *[row.length - 1] * (width - len(p))] for p, row in zip(positions, rows, strict=True)]
            last = torch.full((len(rows),), width - 1, device=self.device)
            logits = self.decoder.next_logits(
                torch.tensor(tokens, device=self.device), torch.tensor(steps, device=self.device), cache, last
            )
            self.logits.update({row.name: logits[i] for i, row in enumerate(rows)})

    def _reserve(self, needed: int) -> None:
        if self.cache.capacity is not None and needed > self.cache.capacity:
            self.cache.reserve(max(needed, min(self.limit, 2 * self.cache.capacity)))


def plan_sharing(prompts: Sequence[list[int]]) -> list[tuple[int, int]]:
    """Which prompt takes over what from which.

    Returns:
        for each prompt the index of another and how many of its tokens it takes over: all from an equal prompt, else
        less than it has, from one that takes over nothing; (its own index, 0) for those that are read from the start.
    """
    firsts: dict[tuple[int, ...], int] = {}
    for index, prompt in enumerate(prompts):
        firsts.setdefault(tuple(prompt), index)
    plan = [(firsts[tuple(prompt)], len(prompt)) for prompt in prompts]
    order = sorted(firsts)  # so that neighbours have the most in common
    leader: tuple[int, ...] = ()
    for this, following in zip(order, [*order[1:], ()], strict=True):
        shared = min(_count_common(leader, this), len(this) - 1)
        if not shared or _count_common(this, following) >= shared + WORTH:
            leader, shared = this, 0
        plan[firsts[this]] = (firsts[leader], shared)
    return plan


def _count_common(a: Sequence[int], b: Sequence[int]) -> int:
    """Length of the common beginning."""
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
