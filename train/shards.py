"""Shards: WebDataset tars with a manifest, written and read in one place.

A folder of shards holds ``shard-000000.tar`` …, ``manifest.json`` (what is inside) and the loader's index
(``.nv-meta``). Two kinds exist: ``raw`` (media files and text, made by `plait data pack`) and ``tokens`` (documents as
codes, made by `plait data tokenize`). A shard appears under its name only when complete.
"""

import contextlib
import hashlib
import io
import os
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import webdataset
from webdataset.tariterators import group_by_keys, tar_file_expander

from plait.errors import PlaitError
from plait.tokenizers.base import FORMAT_VERSION, check_format_version, read_json, write_json

MANIFEST = "manifest.json"


def shard_name(index: int) -> str:
    """File name of the shard with this number."""
    return f"shard-{index:06d}.tar"


def shard_hash(path: Path) -> str:
    """The SHA-256 of a shard's bytes, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextlib.contextmanager
def shard_writer(path: Path) -> Iterator[Callable[[dict[str, Any]], None]]:
    """Open a shard for writing; yields a function that adds one sample (``__key__`` and one entry per extension).

    The bytes depend on the samples alone. On an error nothing is left under ``path``.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        # Both here and in `read_shard` webdataset is given open files: it takes names for URLs.
        with temporary.open("wb") as file, webdataset.TarWriter(file, mtime=0.0) as writer:
            yield writer.write
        temporary.replace(path)
    except OSError as error:
        raise PlaitError(
            f"{path}: cannot write ({error.strerror or error}); free some space or choose another folder"
        ) from None
    finally:
        temporary.unlink(missing_ok=True)


def read_shard(path: Path) -> Iterator[dict[str, Any]]:
    """Yield a shard's samples: ``__key__`` and the raw bytes of each extension.

    Raises:
        PlaitError: the shard is missing or its tar structure is broken.
    """
    try:
        with path.open("rb") as file:
            members = tar_file_expander([{"url": str(path), "stream": file}])
            yield from group_by_keys(members)
    except FileNotFoundError:
        raise PlaitError(f"{path}: no such shard; make it again with the command that made the folder") from None
    except Exception as error:
        if isinstance(error, PlaitError):
            raise
        raise PlaitError(
            f"{path}: broken shard ({error.args[0] if error.args else error}); make it again or restore a copy"
        ) from None


def read_samples(folder: Path) -> Iterator[dict[str, Any]]:
    """Yield the samples of all shards of a folder."""
    for shard in shard_paths(folder):
        yield from read_shard(shard)


def write_manifest(folder: Path, kind: str, shards: list[dict[str, Any]], **facts: Any) -> None:
    """Write ``manifest.json`` and the loader's index: the last step of making a folder of shards.

    Args:
        folder: where the shards are.
        kind: "raw" or "tokens".
        shards: one row per shard: ``name``, ``samples``, ``bytes`` and more counts.
        facts: further entries, the fingerprints for instance.
    """
    # The loader refuses a shard without samples, as one is when none of its media could be tokenized.
    _write_loader_index(folder, [row["name"] for row in shards if row["samples"]])
    write_json(folder / MANIFEST, {"format_version": FORMAT_VERSION, "kind": kind, **facts, "shards": shards})


def read_manifest(folder: Path, kind: str | None = None) -> dict[str, Any]:
    """Read a folder's manifest and see that every shard it lists is there, whole.

    Raises:
        PlaitError: no manifest or a broken one, another kind or format version, or a shard is missing or of another
            size.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise PlaitError(f"{folder}: no such folder of shards")
    if not (folder / MANIFEST).is_file():
        raise PlaitError(f"{folder}: has no {MANIFEST}; make it with `plait data pack` or `plait data tokenize`")
    manifest = read_json(folder / MANIFEST)
    check_format_version(manifest.get("format_version"), folder / MANIFEST)
    if kind is not None and manifest.get("kind") != kind:
        other = {"raw": "plait data pack", "tokens": "plait data tokenize"}[kind]
        raise PlaitError(f"{folder}: holds {manifest.get('kind')} shards, expected {kind} shards (made by `{other}`)")
    try:
        sizes = [(folder / row["name"], row["bytes"]) for row in manifest["shards"]]
    except (KeyError, TypeError) as error:
        raise PlaitError(f"{folder / MANIFEST}: lists no shards ({error!r}); restore it or make it again") from None
    for path, size in sizes:
        if not path.is_file():
            raise PlaitError(f"{path}: shard is missing; restore it or make the folder again")
        if path.stat().st_size != size:
            raise PlaitError(f"{path}: shard has {path.stat().st_size} bytes, the manifest says {size}; restore it")
    return manifest


def shard_paths(folder: Path, kind: str | None = None) -> list[Path]:
    """The shards of a folder in order, as its manifest lists them."""
    return [Path(folder) / row["name"] for row in read_manifest(folder, kind)["shards"]]


def _write_loader_index(folder: Path, names: Iterable[str]) -> None:
    """Index the tars for megatron-energon, which reads them in training."""
    from megatron.energon.flavors import BaseWebdatasetFactory

    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        BaseWebdatasetFactory.prepare_dataset(
            folder, list(names), split_parts_patterns=[("train", ".*")], shuffle_seed=None, workers=1
        )
    (folder / ".nv-meta" / "dataset.yaml").write_text(
        "__module__: megatron.energon\n__class__: CrudeWebdataset\n", "utf-8"
    )
