"""The generation engine: ids in, ids out, several requests at a time. It knows no media.

`generate` is a step iterator: streaming reads it, cancelling stops reading it. Tokens that the grammar forces are not
sampled, they ride along with the next step.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from plait.infer.sampling import Sampling, draw, guide, restrict
from plait.model.cache import KVCache
from plait.model.decoder import Decoder
from plait.tokenizers.grammar import Cursor


@dataclass
class Request:
    """One sequence to continue.

    Attributes:
        prompt: ids, which ``cursor`` has taken already.
        cursor: says what may come next and when the document is done.
        sampling: settings by modality; a document may change modality on the way.
        between: settings between spans, where the next modality or the end is chosen.
        generator: the request's own random numbers, on the CPU.
        unconditional: the prompt without its condition, for guidance; None turns guidance off.
        until_spans: stop when the document has this many spans; None goes on to its end.
    """

    prompt: list[int]
    cursor: Cursor
    sampling: dict[str, Sampling]
    generator: torch.Generator
    unconditional: list[int] | None = None
    until_spans: int | None = None
    between: Sampling = Sampling()  # noqa: RUF009 (frozen)
    tokens: list[int] = field(default_factory=list)

    @property
    def done(self) -> bool:
        """Whether nothing more is to come."""
        return self.cursor.done or (self.until_spans is not None and len(self.cursor.spans) >= self.until_spans)

    def settings(self) -> Sampling:
        """The settings in force: those of the open span, or those between spans."""
        open_span = self.cursor.open
        return self.sampling.get(open_span[0], Sampling()) if open_span else self.between

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
    if not requests:
        return
    device = decoder.lm_head.weight.device
    guided = [r for r in requests if r.unconditional is not None]
    # Row i of the cache is request i; after them come the guided requests' unconditional rows.
    row_of = {id(r): len(requests) + i for i, r in enumerate(guided)}
    pending = [list(r.prompt) for r in requests] + [list(r.unconditional or []) for r in guided]
    longest = max(len(tokens) for tokens in pending)
    capacity = longest + max(r.cursor.budget for r in requests) + 1
    cache = KVCache(decoder.config, len(pending), capacity, device, decoder.lm_head.weight.dtype)
    fed = [0] * len(pending)
    while not all(r.done for r in requests):
        logits = _feed(decoder, cache, pending, fed, device)
        step = []
        pending = [[] for _ in pending]
        for index, request in enumerate(requests):
            if request.done:
                continue
            settings = request.settings()
            scores = logits[index]
            twin = row_of.get(id(request))
            if twin is not None and settings.guidance != 1:
                scores = guide(scores, logits[twin], settings.guidance)
            candidates, ids = restrict(scores, request.cursor.allowed())
            taken = request.take(int(ids[draw(candidates, settings, request.generator)]))
            pending[index] = taken
            if twin is not None:
                pending[twin] = taken
            step.append((index, taken))
        yield step


def _feed(decoder: Decoder, cache: KVCache, pending: list[list[int]], fed: list[int], device: torch.device) -> Tensor:
    """Run every row's pending ids through the decoder; returns the logits after each row's last, ``[rows, V]``.

    Rows are padded on the right with id 0: what padding writes lies beyond the row's end and is overwritten when the
    row gets there.
    """
    width = max(1, *(len(tokens) for tokens in pending))
    tokens = torch.tensor([row + [0] * (width - len(row)) for row in pending], device=device)
    start = torch.tensor(fed, device=device)
    positions = (start[:, None] + torch.arange(width, device=device)).clamp_max(cache.capacity - 1)
    last = torch.tensor([max(0, len(row) - 1) for row in pending], device=device)
    for i, row in enumerate(pending):
        fed[i] += len(row)
    return decoder.next_logits(tokens, positions, cache, last)
