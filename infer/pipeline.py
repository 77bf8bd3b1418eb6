"""The any-to-any model: parts in, media out. `load` opens a bundle; `Model` generates, streams and scores.

One prompt's way: parts → codes (the bundle's tokenizers) → the target's template (`plait.infer.prompting`) → ids (the
grammar) → new ids (`generate`) → spans (the cursor) → media (the tokenizers again).
"""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from plait.errors import PlaitError
from plait.infer.bundle import Bundle, load_bundle
from plait.infer.document import Document, read_parts
from plait.infer.generate import Request, generate
from plait.infer.prompting import Piece, Prompter, check_ids
from plait.infer.sampling import Sampling, restrict
from plait.infer.target import PLAIN, Target
from plait.model.quantize import pack_
from plait.model.quantize_gpu import use_torchao_
from plait.tokenizers.grammar import Cursor, Grammar, Span
from plait.tokenizers.grids import GridForm
from plait.tokenizers.loading import find_weights
from plait.tokenizers.media import Audio
from plait.tokenizers.modalities import MODALITIES

ROWS = 64  # requests that are generated together at most: each has its rows in the KV cache
CHUNK = 0.25  # seconds of sound that `Model.stream` waits for before it decodes them


@dataclass
class TextDelta:
    """Newly generated text."""

    text: str


@dataclass
class ImageRows:
    """An image so far: the rows that are complete."""

    image: Image.Image


@dataclass
class AudioChunk:
    """Newly generated sound; the chunks of a span, one after the other, are the whole of it."""

    audio: Audio


@dataclass
class Finished:
    """The last event of a stream: what was generated."""

    document: Document


Event = TextDelta | ImageRows | AudioChunk | Finished


@dataclass
class Score:
    """Log-probabilities of a target: natural logarithms, at most 0, under the grammar's mask, its end mark included.

    A target of bare ids has no mask and no end mark: its values are over all ids.

    Attributes:
        total: sum of ``per_token``.
        per_token: float ``[n]``; tokens that the grammar forces have 0.
    """

    total: float
    per_token: Tensor


def load(
    name: str | Path = "plait-tiny",
    device: str = "cpu",
    dtype: torch.dtype = torch.float32,
    quantize: str | None = None,
) -> "Model":
    """Load a bundle.

    Args:
        name: a path, or a shipped bundle's name.
        device: "cpu", "cuda" or "cuda:1", ….
        dtype: of the decoder's weights; tokenizers stay in float32.
        quantize: "int8" or "int4" keeps the decoder's weights in so few bits, and multiplies with them in ``dtype``.

    Raises:
        PlaitError: not found, damaged or mismatched, no such device, or quantized already.
    """
    known = re.fullmatch(r"cpu|cuda(?::(\d+))?", str(device), re.ASCII)
    if not known:
        raise PlaitError(f"device: {device!r} must be cpu, cuda or cuda with a number, such as cuda:1")
    if known[0] != "cpu" and int(known[1] or 0) >= (found := torch.cuda.device_count()):
        raise PlaitError(f"device: {device} was asked for and PyTorch finds {found} GPUs; use cpu or another number")
    bundle = load_bundle(find_weights(name), device, dtype, quantize)
    if known[0] == "cpu":
        pack_(bundle.decoder)
    else:
        use_torchao_(bundle.decoder, dtype)
    return Model(bundle)


class Model:
    """A bundle ready to generate."""

    def __init__(self, bundle: Bundle) -> None:
        self.bundle = bundle
        self.grammar = Grammar(bundle.vocabulary)
        self.prompter = Prompter(self.grammar, bundle.tokenizers)
        self.context = bundle.context

    @property
    def modalities(self) -> list[str]:
        """What the model reads and writes."""
        return list(self.grammar.forms)

    def generate(
        self,
        *parts: Any,
        to: str,
        n: int | None = None,
        seed: int | None = None,
        temperature: float | None = None,
        top_k: int | None = None,
        top_p: float | None = None,
        guidance: float | None = None,
        max_tokens: int | None = None,
    ) -> Any:
        """Generate a medium from a prompt.

        Args:
            parts: the prompt: str is text, Path a file, besides PIL images, `Audio`, `Video` and `Document`.
            to: "text", "image", … or "interleaved".
            n: how many; with a number the result is a list.
            seed: item i of a seed is the same whatever ``n`` is (up to rounding between batch sizes).
            temperature: see `Sampling`; those left out come from the bundle.
            top_k: see `Sampling`.
            top_p: see `Sampling`.
            guidance: see `Sampling`.
            max_tokens: new tokens at most; the grammar ends every span within it.

        Returns:
            str, PIL image, … or `Document`; a list of them with ``n``.

        Raises:
            PlaitError: a part cannot be read, the model lacks a modality, or the prompt leaves no room.
        """
        overrides = {"temperature": temperature, "top_k": top_k, "top_p": top_p, "guidance": guidance}
        results = self._finish(self._requests(parts, to, 1 if n is None else n, seed, overrides, max_tokens), to)
        return results[0] if n is None else results

    def generate_batch(self, prompts: Sequence[Sequence[Any]], to: str, seed: int = 0, **settings: Any) -> list[Any]:
        """Generate one medium for each of several prompts, together; ``settings`` as in `generate`.

        Prompt i draws from the random numbers of ``seed`` and i.

        Raises:
            PlaitError: a prompt is no sequence of parts, or as `generate`.
        """
        for i, parts in enumerate(prompts):
            if isinstance(parts, str) or not isinstance(parts, Sequence):
                raise PlaitError(f"prompts[{i}]: is a {type(parts).__name__}; give a list of parts, even for one part")
        max_tokens = settings.pop("max_tokens", None)
        requests = [
            self._requests(parts, to, 1, seed, settings, max_tokens, first=i)[0] for i, parts in enumerate(prompts)
        ]
        return self._finish(requests, to)

    def stream(
        self, *parts: Any, to: str, seed: int | None = None, max_tokens: int | None = None, **settings: Any
    ) -> Iterator[Event]:
        """Generate and report on the way; `Finished` comes last.

        Text is reported as it comes, an image after each row, sound about every `CHUNK` seconds.
        """
        request = self._requests(parts, to, 1, seed, settings, max_tokens)[0]
        cursor, given = request.cursor, len(request.cursor.spans)
        steps = generate(self.bundle.decoder, [request])
        shown: tuple[int, int] = (given, 0)  # span, and how much of it was reported
        for _ in steps:
            if cursor.open is not None and cursor.open[0] == "audio":
                yield from self._sound(cursor, steps)
                shown = (len(cursor.spans), 0)
            while shown[0] < len(cursor.spans):
                yield from self._progress(cursor.spans[shown[0]], shown[1], True)
                shown = (shown[0] + 1, 0)
            for event in self._progress(cursor.partial(), shown[1], False):
                shown = (shown[0], shown[1] + (len(event.text) if isinstance(event, TextDelta) else 1))
                yield event
        yield Finished(self._document(cursor.spans[given:]))

    @torch.no_grad()
    def score(self, *parts: Any, target: Any) -> Score:
        """How probable a target is after a prompt.

        Args:
            parts: the prompt, as in `generate`. Where one of them is a tensor, bare ids int64 ``[n]``, all parts are
                read as they stand, without the target's template and without a ``<bos>`` before them.
            target: one part, or bare ids. Those are scored without a mask, whatever the model; if nothing comes before
                them, the first is given.

        Raises:
            PlaitError: a part cannot be read, the model lacks a modality, ``target`` is not one part, or prompt and
                target are longer than the context.
        """
        if isinstance(target, Tensor):
            return self._score_ids(parts, check_ids(target, self.bundle.vocabulary.size, "target"))
        targets = list(read_parts([target]))
        if len(targets) != 1:
            raise PlaitError(f"target: is a document of {len(targets)} parts; score one part")
        modality = targets[0][0]
        settings = self._target(modality, {})
        prompt = self.prompter.prompt(settings.prompt, self.prompter.read(parts, settings.pixels))
        ids = [*prompt, *self.prompter.encode(self.prompter.read([target]))]
        form = self.grammar.form(modality)
        if form is self.grammar.text:
            ids.append(self.grammar.eos)
        logits = self._logits(ids)
        # As in generation: the target's own length gives nothing away.
        cursor = self._cursor(prompt, self.context + 1 - len(prompt))
        cursor.aim(modality)
        values = []
        for position in range(len(prompt), len(ids)):
            if position > len(prompt) or form.begin < 0:  # the target's begin token is given
                candidates, allowed = restrict(logits[position - 1], cursor.allowed())
                chosen = (allowed == ids[position]).nonzero()
                values.append(candidates.log_softmax(-1)[chosen].reshape(()))
            cursor.push(ids[position])
        return _as_score(torch.stack(values))

    def _score_ids(self, parts: Sequence[Any], target: list[int]) -> Score:
        prompt = self._ids(parts) if parts else []
        ids = [*prompt, *target]
        logits = self._logits(ids)[max(0, len(prompt) - 1) : -1]
        chosen = torch.tensor(ids[max(1, len(prompt)) :], device=logits.device)
        return _as_score(logits.log_softmax(-1).gather(-1, chosen[:, None])[:, 0])

    def _logits(self, ids: list[int]) -> Tensor:
        """The logits after each id, float32 ``[n, V]``."""
        if len(ids) > self.context:
            raise PlaitError(
                f"target: takes {len(ids)} tokens with its prompt, the context is {self.context}; shorten one of them"
            )
        tokens = torch.tensor([ids], device=self._device)
        logits: Tensor = self.bundle.decoder(tokens, torch.arange(len(ids), device=self._device)[None])[0].float()
        return logits

    def tokenizer(self, modality: str) -> Any:
        """A modality's tokenizer.

        Raises:
            PlaitError: the model has no such modality.
        """
        return self.prompter.tokenizer(modality)

    @property
    def _device(self) -> torch.device:
        return self.bundle.decoder.lm_head.weight.device

    def _requests(
        self,
        parts: Sequence[Any],
        to: str,
        n: int,
        seed: int | None,
        overrides: dict[str, Any],
        max_tokens: int | None,
        first: int = 0,
    ) -> list[Request]:
        for name, value in (("n", n), ("seed", seed), ("max_tokens", max_tokens)):
            if value is not None and type(value) is not int:
                raise PlaitError(f"{name}: {value!r} must be a whole number")
        if n < 1:
            raise PlaitError(f"n: {n} must be at least 1")
        for modality in (self.modalities or ["text"]) if to == "interleaved" else [to]:
            self.prompter.check_target(modality)
        targets = {m: self._target(m, overrides) for m in self.grammar.forms}
        target = self._target(to, overrides)
        read = self.prompter.read(parts, target.pixels)
        prompt = self.prompter.prompt(target.prompt, read)
        room = self.context - len(prompt)
        most = room if max_tokens is None else max_tokens
        begin, least = self._begin(to, target, room, most)
        if max_tokens is not None and max_tokens < least:
            raise PlaitError(f"max_tokens: is {max_tokens}, {to} needs at least {least}; raise it")
        if room - len(begin) < least:
            raise PlaitError(
                f"prompt: takes {len(prompt)} of the context's {self.context} tokens, {to} needs at least "
                f"{len(begin) + least}; shorten the prompt"
            )
        room = min(room - len(begin), most)
        unconditional, image_only = self._guidance(to, target, read, begin)
        if seed is None:
            seed = torch.Generator().seed()
        # <eos> closes the cursor's budget; a single medium is finished before it.
        cursor = self._cursor(prompt, len(begin) + room + (to != "interleaved"))
        cursor.aim(None if to == "interleaved" else to)
        until = None if to == "interleaved" else len(cursor.spans) + 1
        for token in begin:
            cursor.push(token)
        return [
            Request(
                prompt=prompt + begin,
                cursor=cursor.copy(),
                sampling={m: t.sampling for m, t in targets.items()},
                generator=torch.Generator().manual_seed((seed + 1_000_003 * (first + i)) % (1 << 63)),
                unconditional=unconditional,
                until_spans=until,
                # Where text has no marks, what comes between spans is text as a rule.
                between=targets["text"].sampling if self.grammar.text else Sampling.of({}, **overrides),
                image_only=image_only,
            )
            for i in range(n)
        ]

    def _target(self, to: str, overrides: dict[str, Any]) -> Target:
        return Target.of(self.bundle.generation.get(to, {}), **overrides)

    def _begin(self, to: str, target: Target, room: int, most: int) -> tuple[list[int], int]:
        """The ids that begin what is generated, and how many more it needs at least.

        The grid of the settings is taken if there is room for it; else the model chooses one that fits.
        """
        if to == "interleaved":
            return [], 1
        form = self.grammar.form(to)
        if target.grid is not None and isinstance(form, GridForm):
            begin = self.grammar.begin(to, target.grid)
            if (whole := form.length(target.grid)) <= room and whole - len(begin) <= most:
                return begin, whole - len(begin)
        begin = self.grammar.begin(to)
        return begin, form.least - len(begin)

    def _guidance(
        self, to: str, target: Target, read: Sequence[Piece], begin: list[int]
    ) -> tuple[list[int] | None, list[int] | None]:
        """The prompts beside the whole one that guidance needs."""
        if not read or to == "interleaved" or not target.sampling.guided:
            return None, None
        unconditional = self.prompter.prompt(target.unconditional, read) + begin
        if target.image_only is None or all(piece.modality == "text" for piece in read):
            return unconditional, None
        return unconditional, self.prompter.prompt(target.image_only, read) + begin

    def _cursor(self, ids: Sequence[int], room: int) -> Cursor:
        """A cursor that has taken ``ids``, a first ``<bos>`` aside; ``room`` tokens may follow.

        Raises:
            PlaitError: bare ids among them that are no beginning of a document.
        """
        taken = ids[1:] if ids[:1] == [self.grammar.bos] else ids
        cursor = Cursor(self.grammar, len(taken) + room)
        for position, token in enumerate(taken):
            if not cursor.allows(token):
                found = self.bundle.vocabulary.describe(token)
                raise PlaitError(f"prompt: token {position}: {found} where {cursor.expectation} is expected")
            cursor.push(token)
        return cursor

    def _ids(self, parts: Sequence[Any]) -> list[int]:
        """``<bos>`` and the parts."""
        return self.prompter.prompt(PLAIN, self.prompter.read(parts))

    def _medium(self, span: Span) -> Any:
        return MODALITIES[span.modality].decode(self.tokenizer(span.modality), span.codes)

    def _document(self, spans: Sequence[Span]) -> Document:
        return Document([self._medium(span) for span in spans])

    def _finish(self, requests: list[Request], to: str) -> list[Any]:
        """Generate what is asked for, at most `ROWS` requests at a time."""
        for first in range(0, len(requests), ROWS):
            for _ in generate(self.bundle.decoder, requests[first : first + ROWS]):
                pass
        return [self._result(request, to) for request in requests]

    def _result(self, request: Request, to: str) -> Any:
        if to != "interleaved":
            return self._medium(request.cursor.spans[-1])
        cursor = self._cursor(request.prompt, len(request.tokens))
        cursor.aim()
        return self._document(request.cursor.spans[len(cursor.spans) :])

    def _sound(self, cursor: Cursor, steps: Iterator[Any]) -> Iterator[AudioChunk]:
        """Decode the open span of sound while it is generated."""
        tokenizer = self.tokenizer("audio")
        for samples in tokenizer.decode_stream(self._sound_codes(cursor, steps, round(CHUNK * tokenizer.frame_rate))):
            yield AudioChunk(Audio(samples[0].clamp(-1, 1).cpu(), tokenizer.sample_rate))

    def _sound_codes(self, cursor: Cursor, steps: Iterator[Any], least: int) -> Iterator[Tensor]:
        """The open span's codes in chunks of about so many steps; generation is carried on until the span ends."""
        span, given, seen = len(cursor.spans), 0, 0
        wait = max(1, least) * self.grammar.form("audio").layout.length(1)
        while cursor.open is not None and len(cursor.spans) == span:
            if len(cursor.open[2]) >= seen + wait and (so_far := cursor.partial()) is not None:
                seen = len(cursor.open[2])
                if so_far.codes.shape[-1] > given:
                    yield so_far.codes[None, ..., given:]
                given = so_far.codes.shape[-1]
            next(steps, None)
        if cursor.spans[span].codes.shape[-1] > given:
            yield cursor.spans[span].codes[None, ..., given:]

    def _progress(self, span: Span | None, reported: int, complete: bool) -> Iterator[Event]:
        if span is None:
            return
        if span.modality == "text":
            text = self._medium(span)
            # An unfinished character decodes to U+FFFD: it is held back until its bytes are there.
            text = text if complete else text.rstrip("\ufffd")
            if len(text) > reported:
                yield TextDelta(text[reported:])
        elif span.modality == "image" and span.codes.shape[-2] > reported:
            yield ImageRows(self._medium(span))


def _as_score(values: Tensor) -> Score:
    per_token = values.cpu()
    return Score(float(per_token.double().sum()), per_token)
