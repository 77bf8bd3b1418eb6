"""`plait data tokenize`: raw shards → token shards.

One token shard per raw shard, several at a time. A finished shard leaves its row of the manifest beside it, so a
restart skips it. A sample that cannot be read is counted and named, and the rest goes on.
"""

import multiprocessing
import os
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from plait.errors import PlaitError
from plait.tokenizers.base import read_json, write_json
from plait.tokenizers.grammar import Span
from plait.tokenizers.loading import load_tokenizers
from plait.tokenizers.modalities import MODALITIES
from plait.train.documents import TokenDocument, count_codes, pack_document, raw_parts
from plait.train.shards import MANIFEST, make_folder, read_shard, shard_paths, shard_writer, write_manifest


@dataclass
class TokenizeReport:
    """What was tokenized: counts, codes per modality, and ``skipped`` as one line per sample left out."""

    samples: int = 0
    shards: int = 0
    reused: int = 0
    codes: dict[str, int] = field(default_factory=dict)
    skipped: list[str] = field(default_factory=list)


_tokenizers: dict[str, Any] = {}  # of a worker process, loaded once


def tokenize(
    shards: Path,
    out: Path,
    tokenizers: str,
    workers: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> TokenizeReport:
    """Tokenize a folder of raw shards.

    Args:
        shards: folder of raw shards.
        out: folder for the token shards; what an interrupted run finished there is kept.
        tokenizers: a bundle, or a folder with one subfolder per tokenizer.
        workers: processes; as many as there are CPUs by default.
        progress: called with (shards done, shards in all).

    Raises:
        PlaitError: a shard or tokenizer is missing or broken, or ``out`` was made with other tokenizers or
            from other data.
    """
    sources = shard_paths(shards, "raw")
    fingerprints = {name: tokenizer.fingerprint for name, tokenizer in load_tokenizers(tokenizers).items()}
    if (out / MANIFEST).is_file() and read_json(out / MANIFEST).get("kind") == "raw":
        raise PlaitError(f"{out}: holds raw shards, which would be overwritten; choose another folder")
    make_folder(out)
    report = TokenizeReport(shards=len(sources))
    todo = []
    for source in sources:
        row = _finished(out, source, fingerprints)
        report.reused += row is not None
        if row is None:
            todo.append(source)
    workers = min(workers or os.cpu_count() or 1, max(1, len(todo)))
    jobs = [(source, out, fingerprints) for source in todo]
    if workers == 1:
        _load(tokenizers, None)
        for done, job in enumerate(jobs):
            _tokenize_shard(*job)
            if progress:
                progress(report.reused + done + 1, len(sources))
    else:
        context = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(workers, context, initializer=_load, initargs=(tokenizers, 1)) as pool:
            for done, _ in enumerate(pool.map(_tokenize_shard, *zip(*jobs, strict=True))):
                if progress:
                    progress(report.reused + done + 1, len(sources))
    rows = [_finished(out, source, fingerprints) for source in sources]
    for row in rows:
        assert row is not None
        report.samples += row["samples"]
        report.skipped += row["skipped"]
        for modality, count in row["codes"].items():
            report.codes[modality] = report.codes.get(modality, 0) + count
    if not report.samples:
        raise PlaitError(
            f"{shards}: no sample could be tokenized; the first: {report.skipped[0] if report.skipped else 'none'}"
        )
    private = ("tokenizers", "source_bytes")
    shown = [{k: v for k, v in row.items() if k not in private} for row in rows if row]
    write_manifest(out, "tokens", shown, tokenizers=fingerprints)
    return report


def _finished(out: Path, source: Path, fingerprints: dict[str, str]) -> dict[str, Any] | None:
    """The manifest row of a shard that an earlier run finished."""
    path, row_file = out / source.name, out / f"{source.name}.json"
    if not row_file.is_file() or not path.is_file():
        return None
    row = read_json(row_file)
    if row.get("tokenizers") != fingerprints:
        raise PlaitError(
            f"{path}: was made with other tokenizers (fingerprints differ); use a new folder or remove {out}"
        )
    if row.get("source_bytes") != source.stat().st_size:
        raise PlaitError(f"{path}: was made from other data than {source}; use a new folder or remove {out}")
    return row if row["bytes"] == path.stat().st_size else None


def _load(tokenizers: str, threads: int | None) -> None:
    global _tokenizers
    if threads:
        torch.set_num_threads(threads)
    _tokenizers = load_tokenizers(tokenizers)


def _tokenize_shard(source: Path, out: Path, fingerprints: dict[str, str]) -> None:
    samples, skipped, codes = 0, [], dict[str, int]()
    with shard_writer(out / source.name) as write:
        for sample in read_shard(source):
            try:
                document = tokenize_sample(sample, _tokenizers)
            except PlaitError as error:
                skipped.append(f"{source.name}: {error}")
                continue
            write(pack_document(sample["__key__"], document))
            samples += 1
            for modality, count in count_codes(document.spans).items():
                codes[modality] = codes.get(modality, 0) + count
    row = {
        "name": source.name, "samples": samples, "bytes": (out / source.name).stat().st_size,
        "codes": codes, "skipped": skipped, "tokenizers": fingerprints, "source_bytes": source.stat().st_size,
    }  # fmt: skip
    write_json(out / f"{source.name}.json", row)


def tokenize_sample(sample: dict[str, Any], tokenizers: dict[str, Any]) -> TokenDocument:
    """A raw sample → a document of codes.

    Raises:
        PlaitError: a part cannot be read, or no tokenizer serves it.
    """
    parts, ordered, facts = raw_parts(sample)
    key = sample["__key__"]
    spans = []
    for part in parts:
        modality = MODALITIES.get(part.modality)
        if modality is None or modality.tokenizer not in tokenizers:
            raise PlaitError(f"{key}: no tokenizer for {part.modality}; there are {', '.join(tokenizers)}")
        medium = modality.read(part.data, f"{key} ({part.modality})")
        spans.append(Span(part.modality, modality.encode(tokenizers[modality.tokenizer], medium), part.loss, part.time))
    if not spans:
        raise PlaitError(f"{key}: has no text and no media")
    return TokenDocument(spans, ordered, facts)
