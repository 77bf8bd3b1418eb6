"""From token documents to training sequences.

1. A document becomes spans in an order: a text–media pair is turned round or loses its text by a draw that depends on
   the seed, the document and how often it came by, not on the process (`arrange`).
2. Spans become ids, loss weights and groups under the grammar (`encode`).
3. Documents are packed, never split, into sequences of one length (`SequenceEncoder`).
4. Sequences are stacked into a `Batch`, targets shifted by one within each document.
"""

import hashlib
import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Self

import torch
from megatron.energon import SkipSample, WorkerConfig, stateless
from megatron.energon.errors import FatalSampleError
from torch import Tensor

from plait.model.loss import Targets
from plait.tokenizers.grammar import Grammar, Span
from plait.tokenizers.vocabulary import PAD
from plait.train.documents import TokenDocument, unpack_document
from plait.train.loader import SampleEncoder
from plait.train.recipe import SequenceConfig

_HOPELESS = 10_000  # documents in a row that do not fit


@dataclass
class Sequence:
    """One document's ids ``[n]`` with the loss weight and the group of each token."""

    ids: Tensor
    weights: Tensor
    groups: Tensor


@dataclass
class Batch:
    """Packed sequences: tokens and positions int64 ``[B, T]``, and what they are to predict."""

    tokens: Tensor
    positions: Tensor
    targets: Targets

    @classmethod
    def join(cls, batches: list[Self]) -> Self:
        """One batch of all rows."""
        return batches[0]._map(lambda *tensors: torch.cat(tensors), *batches[1:])

    def split(self, rows: int) -> list[Self]:
        """Batches of ``rows`` rows."""
        return [self._map(lambda t, i=i: t[i : i + rows]) for i in range(0, len(self.tokens), rows)]

    def to(self, device: torch.device) -> Self:
        """The same on another device."""
        return self._map(lambda t: t.to(device))

    def _map(self, change: Callable[..., Tensor], *others: Self) -> Self:
        """Change every tensor, together with the others' tensors of the same name."""
        rows = [(b.tokens, b.positions, b.targets.tokens, b.targets.weights, b.targets.groups) for b in (self, *others)]
        tokens, positions, wanted, weights, groups = (change(*column) for column in zip(*rows, strict=True))
        return type(self)(tokens, positions, Targets(wanted, weights, groups, self.targets.group_count))


def arrange(document: TokenDocument, config: SequenceConfig, draw: random.Random) -> list[tuple[Span, float]]:
    """Order a document's spans and give each a loss weight.

    Only a text–media pair without a given order is touched: with probability ``media_first`` the media come first and
    weigh ``context_loss``; otherwise the text comes first and weighs ``context_loss``, or is dropped with probability
    ``drop_text``.
    """
    weighted = [(span, config.loss_weights.get(span.modality, 1.0) * span.loss) for span in document.spans]
    texts = [w for w in weighted if w[0].modality == "text"]
    media = [w for w in weighted if w[0].modality != "text"]
    if document.ordered or len(texts) != 1 or not media:
        return weighted
    # Both draws happen whatever the first says, so changing one share does not move the other's draws.
    turned, dropped = draw.random() < config.media_first, draw.random() < config.drop_text
    if turned:
        return [(span, weight * config.context_loss) for span, weight in media] + texts
    if dropped:
        return media
    return [(span, weight * config.context_loss) for span, weight in texts] + media


def encode(weighted: list[tuple[Span, float]], grammar: Grammar) -> Sequence:
    """Ids, loss weights and groups of a document. Tokens that the grammar forces have weight 0."""
    modalities = list(grammar.forms)
    weights, groups = [torch.zeros(1)], [torch.zeros(1, dtype=torch.int64)]
    for span, weight in weighted:
        choices = grammar.choices(span)
        weights.append(choices * weight)
        groups.append(torch.full((len(choices),), modalities.index(span.modality)))
    weights.append(torch.tensor([weighted[-1][1]]))
    groups.append(torch.cat(groups)[-1:])
    ids = grammar.document([span for span, _ in weighted])
    return Sequence(ids, torch.cat(weights).float(), torch.cat(groups))


def fit(lengths: list[int], capacity: int) -> list[list[int]]:
    """Pack items into bins by first-fit decreasing; returns the indices in each bin, ties in the given order."""
    bins: list[list[int]] = []
    room: list[int] = []
    for index in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        place = next((b for b, free in enumerate(room) if free >= lengths[index]), None)
        if place is None:
            bins.append([])
            room.append(capacity)
            place = len(bins) - 1
        bins[place].append(index)
        room[place] -= lengths[index]
    return bins


def pack_sequences(sequences: list[Sequence], length: int, pad: int) -> dict[str, Tensor]:
    """Lay documents end to end; the rest is padding without loss. Each value is ``[length]``."""
    packed = {
        "tokens": torch.full((length,), pad), "positions": torch.zeros(length, dtype=torch.int64),
        "next": torch.full((length,), pad), "weights": torch.zeros(length),
        "groups": torch.zeros(length, dtype=torch.int64),
    }  # fmt: skip
    start = 0
    for sequence in sequences:
        n = len(sequence.ids)
        packed["tokens"][start : start + n] = sequence.ids
        packed["positions"][start : start + n] = torch.arange(n)
        # The last token of a document predicts nothing.
        packed["next"][start : start + n - 1] = sequence.ids[1:]
        packed["weights"][start : start + n - 1] = sequence.weights[1:]
        packed["groups"][start : start + n - 1] = sequence.groups[1:]
        start += n
    packed["positions"][start:] = torch.arange(length - start)
    return packed


class SequenceEncoder(SampleEncoder):
    """Token-shard samples → `Batch`."""

    def __init__(self, grammar: Grammar, config: SequenceConfig, seed: int) -> None:
        super().__init__()
        self.grammar, self.config, self.seed = grammar, config, seed
        self.pad = grammar.vocabulary.special(PAD)
        self._skipped: set[str] = set()
        self._skipped_in_a_row = 0

    @stateless
    def encode_sample(self, sample: dict[str, Any]) -> Any:
        """One document; too long for a sequence, it is skipped and named once.

        Raises:
            FatalSampleError: nothing has fitted for so long that nothing seems to fit.
        """
        key = sample["__key__"]
        worker = WorkerConfig.active_worker_config
        # Counted within the logical worker, so that it does not depend on the number of processes.
        turn = self.current_sample_index // max(1, worker.num_workers if worker else 1)
        draw = random.Random(hashlib.sha256(f"{self.seed}/{key}/{turn}".encode()).digest())
        sequence = encode(arrange(unpack_document(sample), self.config, draw), self.grammar)
        if len(sequence.ids) > self.config.length:
            problem = f"{key}: {len(sequence.ids)} tokens do not fit sequence.length {self.config.length}"
            if key not in self._skipped:
                print(f"skipped {problem}", flush=True)
            self._skipped.add(key)
            self._skipped_in_a_row += 1
            if self._skipped_in_a_row == _HOPELESS:
                raise FatalSampleError(
                    f"{problem}, nor did the {_HOPELESS - 1} documents before; raise sequence.length"
                )
            raise SkipSample
        self._skipped_in_a_row = 0
        return {**{k: v for k, v in sample.items() if k.startswith("__")}, "sequence": sequence}

    def select_samples_to_pack(self, samples: list[Any]) -> list[list[Any]]:
        """Choose which documents share a sequence."""
        bins = fit([len(sample["sequence"].ids) for sample in samples], self.config.length)
        return [[samples[i] for i in members] for members in bins]

    @stateless
    def pack_selected_samples(self, samples: list[Any]) -> Any:
        """Lay the chosen documents end to end."""
        first = {k: v for k, v in samples[0].items() if k.startswith("__")}
        return {**first, **pack_sequences([s["sequence"] for s in samples], self.config.length, self.pad)}

    @stateless
    def batch(self, samples: list[Any]) -> Batch:
        """Stack sequences."""
        stacked = {
            k: torch.stack([s[k] for s in samples]) for k in ("tokens", "positions", "next", "weights", "groups")
        }
        targets = Targets(stacked["next"], stacked["weights"], stacked["groups"], len(self.grammar.forms))
        return Batch(stacked["tokens"], stacked["positions"], targets)
