"""`plait data pack`: a folder of files → raw WebDataset shards.

A folder is read in one of two ways. With a ``manifest.jsonl`` each line is one sample: ``path`` names its file,
``caption`` or ``text`` its text, everything else goes into ``key.json``. Without one, files that share a stem within
a folder make one sample (``rabbit.png`` + ``rabbit.txt``), recursively; of several files of one kind the first by the
order of `EXTENSIONS` counts, unless the sample's JSON file lists its ``parts``. In both ways ``voice.npy`` goes with
``voice.wav``: a teacher's latents, for a tokenizer's training.
"""

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

from plait.errors import PlaitError
from plait.tokenizers.base import make_folder
from plait.tokenizers.media import EXTENSIONS, modality_of
from plait.train.shards import MANIFEST, shard_hash, shard_name, shard_writer, write_manifest

SUFFIXES = [*(suffix for suffixes in EXTENSIONS.values() for suffix in suffixes), ".json", ".npy"]


@dataclass
class PackReport:
    """What was packed: counts, and ``skipped`` as one line per file that was left out, with the reason."""

    samples: int = 0
    shards: int = 0
    bytes: int = 0
    skipped: list[str] = field(default_factory=list)


def pack(source: Path, out: Path, samples_per_shard: int = 2000) -> PackReport:
    """Pack a folder into raw shards, in an order that mixes sub-folders and is the same every time.

    Args:
        source: folder of files, with or without ``manifest.jsonl``.
        out: folder for the shards; it must not hold shards yet.
        samples_per_shard: at most this many samples go into one shard.

    Raises:
        PlaitError: ``source`` is missing or holds nothing to pack, ``out`` has shards, or the manifest is broken.
    """
    if not source.is_dir():
        raise PlaitError(f"{source}: no such folder")
    if (out / MANIFEST).exists():
        raise PlaitError(f"{out}: holds shards already; choose another folder or remove it")
    report = PackReport()
    manifest = source / "manifest.jsonl"
    listed = _from_manifest(source, manifest, report) if manifest.is_file() else _from_stems(source, report)
    # A fixed shuffle: neighbours in a folder are alike, and a training stream wants them apart.
    samples = sorted(listed, key=lambda sample: hashlib.sha256(sample[0].encode()).digest())
    if not samples:
        raise PlaitError(f"{source}: nothing to pack; expected files ending in {', '.join(sorted(SUFFIXES))}")
    make_folder(out)
    rows: list[dict[str, Any]] = []
    for start in range(0, len(samples), samples_per_shard):
        path = out / shard_name(len(rows))
        chunk = samples[start : start + samples_per_shard]
        with shard_writer(path) as write:
            for key, members in chunk:
                write({"__key__": key} | {extension: _content(member) for extension, member in members.items()})
        row = {"name": path.name, "samples": len(chunk), "bytes": path.stat().st_size, "sha256": shard_hash(path)}
        rows.append(row)
        report.bytes += rows[-1]["bytes"]
    write_manifest(out, "raw", rows)
    report.samples, report.shards = len(samples), len(rows)
    return report


Sample = tuple[str, dict[str, bytes | Path]]  # key and, by extension, content or the file that holds it


def _content(member: bytes | Path) -> bytes:
    if isinstance(member, bytes):
        return member
    try:
        return member.read_bytes()
    except OSError as error:
        raise PlaitError(f"{member}: cannot be read ({error.strerror}); mend or remove it") from None


def _from_manifest(source: Path, manifest: Path, report: PackReport) -> Iterator[Sample]:
    keys: set[str] = set()
    root = source.resolve()
    # Not splitlines: JSON strings may hold U+2028 and other characters that it takes for the end of a line.
    for number, line in enumerate(_content(manifest).split(b"\n"), 1):
        if not line.strip():
            continue
        where = f"{manifest}:{number}"
        try:
            row = json.loads(line)
        except ValueError as error:
            raise PlaitError(f"{where}: not JSON ({error})") from None
        if not isinstance(row, dict):
            raise PlaitError(f"{where}: expected an object with path, caption or text")
        text = row.pop("caption", None) or row.pop("text", None)
        name = row.pop("path", None)
        members: dict[str, bytes | Path] = {}
        if name is not None:
            path = source / str(name)
            if not path.resolve().is_relative_to(root):
                report.skipped.append(f"{where}: {name} lies outside {source}")
                continue
            if not path.is_file() or path.suffix.lower() not in SUFFIXES:
                report.skipped.append(
                    f"{where}: {name} " + ("is not a known media file" if path.is_file() else "does not exist")
                )
                continue
            members[path.suffix.lower()[1:]] = path
            if (latents := path.with_suffix(".npy")).is_file():
                members["npy"] = latents
        if text is not None:
            members["txt"] = str(text).encode()
        if not members:
            report.skipped.append(f"{where}: has neither path nor text")
            continue
        if row:
            members["json"] = json.dumps(row, ensure_ascii=False).encode()
        yield _unique(_key(PurePosixPath(str(name or f"line-{number:08d}"))), keys), members


def _from_stems(source: Path, report: PackReport) -> Iterator[Sample]:
    stems: dict[PurePosixPath, list[Path]] = {}
    for path in sorted(source.rglob("*")):
        relative = PurePosixPath(path.relative_to(source).as_posix())
        if path.is_file() and path.suffix.lower() in SUFFIXES and not any(p.startswith(".") for p in relative.parts):
            stems.setdefault(relative.with_suffix(""), []).append(path)
    keys: set[str] = set()
    for stem, paths in stems.items():
        members: dict[str, bytes | Path] = {}
        first: dict[str, Path] = {}
        for path in sorted(paths, key=lambda path: SUFFIXES.index(path.suffix.lower())):
            extension, kind = path.suffix.lower()[1:], modality_of(path) or path.suffix.lower()[1:]
            taken = first.setdefault(kind, path)
            if taken is path or (extension not in members and any(map(_lists_parts, paths))):
                members[extension] = path
            else:
                report.skipped.append(f"{path}: {taken.name} is this sample's {kind}; rename one of them")
        if set(members) == {"npy"}:
            report.skipped.append(f"{stem}.npy: there is no file of this stem whose latents it could hold")
            continue
        yield _unique(_key(stem), keys), members


def _lists_parts(path: Path) -> bool:
    return path.suffix.lower() == ".json" and b'"parts"' in _content(path)


def _key(path: PurePosixPath) -> str:
    """A WebDataset key: no dot, since the first dot of a member's name begins its extension."""
    stem = path.with_suffix("") if path.suffix.lower() in SUFFIXES else path
    return stem.as_posix().replace(".", "_").strip("/")


def _unique(key: str, taken: set[str]) -> str:
    candidate, n = key, 1
    while candidate in taken:
        n += 1
        candidate = f"{key}-{n}"
    taken.add(candidate)
    return candidate
