"""`plait data tokenize`: raw shards → token shards.

One token shard per raw shard, several at a time. A finished shard leaves its row of the manifest beside it, so a
restart skips it. A sample that cannot be read is counted and named, and the rest goes on.
"""

import multiprocessing
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from plait.errors import PlaitError
from plait.tokenizers.base import make_folder, read_json, write_json
from plait.tokenizers.grammar import Span
from plait.tokenizers.loading import load_tokenizers
from plait.tokenizers.modalities import MODALITIES
from plait.train.documents import TokenDocument, count_codes, pack_document, raw_parts
from plait.train.shards import MANIFEST, read_manifest, read_shard, shard_hash, shard_writer, write_manifest


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
    # Shards made by hand may come without their hashes.
    sources = {
        shards / row["name"]: row.get("sha256") or shard_hash(shards / row["name"])
        for row in read_manifest(shards, "raw")["shards"]
    }
    fingerprints = {name: tokenizer.fingerprint for name, tokenizer in load_tokenizers(tokenizers).items()}
    if (out / MANIFEST).is_file() and read_json(out / MANIFEST).get("kind") == "raw":
        raise PlaitError(f"{out}: holds raw shards, which would be overwritten; choose another folder")
    make_folder(out)
    rows = {source: _finished(out, source, digest, fingerprints) for source, digest in sources.items()}
    jobs = [(source, out, sources[source], fingerprints) for source, row in rows.items() if row is None]
    reused = len(sources) - len(jobs)
    for done, (job, row) in enumerate(zip(jobs, _run(jobs, tokenizers, workers), strict=True), reused + 1):
        rows[job[0]] = row
        if progress:
            progress(done, len(sources))
    report = _report([row for row in rows.values() if row], reused)
    if not report.samples:
        raise PlaitError(f"{shards}: no sample could be tokenized; the first: {[*report.skipped, 'none'][0]}")
    shown = [{k: v for k, v in row.items() if k != "tokenizers"} for row in rows.values() if row]
    write_manifest(out, "tokens", shown, tokenizers=fingerprints)
    return report


Job = tuple[Path, Path, str, dict[str, str]]  # raw shard, output folder, the shard's hash, fingerprints


def _run(jobs: list[Job], tokenizers: str, workers: int | None) -> Iterator[dict[str, Any]]:
    """Yield the jobs' rows in order."""
    workers = min(workers or os.cpu_count() or 1, len(jobs))
    if workers > 1:
        context = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(workers, context, initializer=_load, initargs=(tokenizers, 1)) as pool:
            yield from pool.map(_tokenize_shard, *zip(*jobs, strict=True))
    elif jobs:
        _load(tokenizers, None)
        yield from (_tokenize_shard(*job) for job in jobs)


def _report(rows: list[dict[str, Any]], reused: int) -> TokenizeReport:
    report = TokenizeReport(shards=len(rows), reused=reused)
    for row in rows:
        report.samples += row["samples"]
        report.skipped += row["skipped"]
        for modality, count in row["codes"].items():
            report.codes[modality] = report.codes.get(modality, 0) + count
    return report


def _finished(out: Path, source: Path, digest: str, fingerprints: dict[str, str]) -> dict[str, Any] | None:
    """The manifest row of a shard that an earlier run finished."""
    path, row_file = out / source.name, out / f"{source.name}.json"
    if not row_file.is_file() or not path.is_file():
        return None
    row = read_json(row_file)
    if row.get("tokenizers") != fingerprints:
        raise PlaitError(
            f"{path}: was made with other tokenizers (fingerprints differ); use a new folder or remove {out}"
        )
    if row.get("source") != digest:
        raise PlaitError(f"{path}: was made from other data than {source}; use a new folder or remove {out}")
    return row if row["bytes"] == path.stat().st_size else None


def _load(tokenizers: str, threads: int | None) -> None:
    global _tokenizers
    if threads:
        torch.set_num_threads(threads)
    _tokenizers = load_tokenizers(tokenizers)


def _tokenize_shard(source: Path, out: Path, digest: str, fingerprints: dict[str, str]) -> dict[str, Any]:
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
        "codes": codes, "skipped": skipped, "source": digest, "tokenizers": fingerprints,
    }  # fmt: skip
    write_json(out / f"{source.name}.json", row)
    return row


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
