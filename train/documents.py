"""Documents in shards: a raw sample's parts, and the stored form of a tokenized document.

A tokenized document is a WebDataset sample: ``key.safetensors`` holds the codes of span i under the name ``i``
(int32), ``key.json`` the rest.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save

from plait.errors import PlaitError
from plait.tokenizers.grammar import Span
from plait.tokenizers.media import EXTENSIONS
from plait.tokenizers.modalities import MODALITIES


@dataclass
class Part:
    """One part of a raw document: its modality, the medium's bytes, and whether it carries loss."""

    modality: str
    data: bytes
    loss: bool = True
    time: tuple[float, float] | None = None


@dataclass
class TokenDocument:
    """A tokenized document.

    Attributes:
        spans: in order.
        ordered: False when the parts only share a stem, so that training may turn them round.
        facts: source, licence and whatever else came with the sample.
    """

    spans: list[Span]
    ordered: bool = False
    facts: dict[str, Any] = field(default_factory=dict)


def member(sample: dict[str, Any], modality: str) -> bytes | None:
    """A raw sample's file of a modality; of several the first by the order of `EXTENSIONS`."""
    found = (data for suffix in EXTENSIONS[modality] for name, data in sample.items() if f".{name}".endswith(suffix))
    return next(found, None)


def raw_parts(sample: dict[str, Any]) -> tuple[list[Part], bool, dict[str, Any]]:
    """The parts of a raw sample, whether their order is given, and its other facts.

    ``key.json`` may give the order: ``{"parts": [{"text": …}, {"image": "0.jpg", "loss": false}, …]}``, where a
    medium is named by its extension in the sample.

    Raises:
        PlaitError: ``key.json`` is broken, names a member that is missing, or a modality nobody registered.
    """
    key = sample["__key__"]
    try:
        facts = json.loads(sample.get("json", b"{}"))
        rows = facts.pop("parts", None)
    except (ValueError, AttributeError, TypeError) as error:
        raise PlaitError(f"{key}.json: not a JSON object ({error})") from None
    if rows is None:
        return [Part(m, data) for m in EXTENSIONS if (data := member(sample, m)) is not None], False, facts
    parts = []
    for row in rows if isinstance(rows, list) else [rows]:
        named = [m for m in MODALITIES if m in row] if isinstance(row, dict) else []
        if len(named) != 1:
            raise PlaitError(f"{key}.json: part {row} must name one modality of {', '.join(MODALITIES)}")
        modality = named[0]
        data = str(row[modality]).encode() if modality == "text" else sample.get(str(row[modality]))
        if data is None:
            raise PlaitError(f"{key}.json: part {row[modality]!r} is not in the sample")
        try:
            time = (float(row["time"][0]), float(row["time"][1])) if "time" in row else None
        except (ValueError, TypeError, LookupError):
            raise PlaitError(f"{key}.json: time is {row['time']!r}, expected [start, end] in seconds") from None
        parts.append(Part(modality, data, bool(row.get("loss", True)), time))
    return parts, True, facts


def pack_document(key: str, document: TokenDocument) -> dict[str, Any]:
    """A tokenized document as a WebDataset sample."""
    rows = []
    for span in document.spans:
        row: dict[str, Any] = {"modality": span.modality}
        if not span.loss:
            row["loss"] = False
        if span.time is not None:
            row["time"] = list(span.time)
        rows.append(row)
    head = {"spans": rows, "ordered": document.ordered, **({"facts": document.facts} if document.facts else {})}
    codes = {str(i): span.codes.to(torch.int32).contiguous() for i, span in enumerate(document.spans)}
    return {"__key__": key, "json": json.dumps(head, ensure_ascii=False).encode(), "safetensors": save(codes)}


def unpack_document(sample: dict[str, Any]) -> TokenDocument:
    """What `pack_document` stored.

    Raises:
        PlaitError: the sample is no tokenized document.
    """
    try:
        head = json.loads(sample["json"])
        codes = load(sample["safetensors"])
        spans = [
            Span(
                row["modality"],
                codes[str(i)].long(),
                row.get("loss", True),
                tuple(row["time"]) if "time" in row else None,
            )
            for i, row in enumerate(head["spans"])
        ]
        return TokenDocument(spans, head["ordered"], head.get("facts", {}))
    except (KeyError, ValueError, TypeError, SafetensorError) as error:
        raise PlaitError(
            f"{sample.get('__key__')}: not a tokenized document ({error!r}); tokenize the shard again"
        ) from None


def count_codes(spans: Sequence[Span]) -> dict[str, int]:
    """Codes per modality."""
    counts: dict[str, int] = {}
    for span in spans:
        counts[span.modality] = counts.get(span.modality, 0) + span.codes.numel()
    return counts
