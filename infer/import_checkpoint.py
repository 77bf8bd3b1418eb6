"""`plait import`: another project's decoder checkpoint, with its tokenizers, as a bundle.

Tensor by tensor: of a checkpoint larger than memory little is ever in it. The bundle is made in a folder beside its
place, ``.NAME.partial``, which an interrupted import leaves behind and the next one goes on with.
"""

import shutil
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from plait.errors import PlaitError
from plait.infer.bundle import replace_folder, write_description
from plait.infer.foreign_checkpoint import Checkpoint, find_checksums, identity_of, open_checkpoint, verify
from plait.infer.shards import STATE, Advance, cast, shard_limit, write_set
from plait.infer.target import Target
from plait.tokenizers.foreign import convert, known_layouts
from plait.tokenizers.loading import load_tokenizer

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def import_checkpoint(
    source: Path,
    out: Path,
    kind: str | None = None,
    visual: Path | None = None,
    text: Path | None = None,
    dtype: str | None = None,
    advance: Advance = lambda done, total: None,
) -> dict[str, Any]:
    """Import a decoder checkpoint.

    Args:
        source: its folder; see `plait.infer.foreign_checkpoint.open_checkpoint`.
        out: the bundle to write; an existing bundle is replaced when the new one is complete.
        kind: what the checkpoint is, where it does not say so.
        visual: the image tokenizer, where it is not in the checkpoint.
        text: the text tokenizer's folder or file, where it is not in the checkpoint's folder.
        dtype: "float32", "bfloat16" or "float16" of the stored weights; the checkpoint's own by default.
        advance: told of (bytes done, bytes in all).

    Returns:
        what was imported, for `--json`.

    Raises:
        PlaitError: a file or tensor is broken, missing, extra or of another shape; a setting, an architecture or a
            tokenizer that is not supported; the checkpoint's checksums do not hold; no room, or no right to write.
    """
    from plait.tokenizers.families import read_family

    if dtype is not None and dtype not in DTYPES:
        raise PlaitError(f"--dtype: is {dtype!r}, expected {', '.join(DTYPES)}")
    opened = open_checkpoint(source, kind)
    out = check_target(out, opened.folder, replaces="vocabulary.json")
    found_text, found_visual = _find_tokenizers(opened)
    visual = visual or found_visual
    tokenizer = _visual(opened, visual)
    family = read_family(
        opened.family, opened.folder, tokenizer, opened.config.vocabulary_size, text or found_text, visual
    )
    for to, settings in family.generation.items():
        try:
            Target.of(settings)
        except PlaitError as error:
            raise PlaitError(f"{opened.folder}: its settings for {to}, in the JSON files there: {error}") from None
    if family.vocabulary.size != opened.config.vocabulary_size:
        raise PlaitError(
            f"{source}: the tokenizers have {family.vocabulary.size} ids, the embedding has "
            f"{opened.config.vocabulary_size} rows; they do not belong together"
        )
    meta = {name: t.to(DTYPES[dtype]) if dtype else t for name, t in opened.meta().items()}
    sums_of_source = find_checksums(opened, text or found_text, visual)
    to_read, to_write = sum(path.stat().st_size for path, *_ in sums_of_source), sum(t.nbytes for t in meta.values())
    tell = count_bytes(advance, to_read + to_write)
    for summed in sums_of_source:
        verify(*summed, tell)
    partial = out.with_name(f".{out.name}.partial")
    limit = shard_limit(opened.files, meta)
    identity = {
        "source": identity_of(opened),
        "decoder": asdict(opened.config),
        "dtype": dtype,
        "limit": limit,
    }
    sums = write_set(
        partial,
        meta,
        lambda name: cast(name, opened.read(name), meta[name].dtype, opened.folder),
        limit=limit,
        identity=identity,
        advance=lambda done, _: advance(to_read + done, to_read + to_write),
    )
    if identity_of(opened) != identity["source"]:
        raise PlaitError(f"{opened.folder}: has changed while it was read; start again")
    shutil.rmtree(partial / "tokenizers", ignore_errors=True)
    # Without a text tokenizer no modality uses the image tokenizer; it is kept for an export all the same.
    for name, part in (({"visual": tokenizer} if tokenizer else {}) | family.tokenizers).items():
        part.save_pretrained(partial / "tokenizers" / name)
    origin = {"family": opened.family, "token_ids": opened.kept, "model_type": opened.settings.get("model_type", "")}
    if not family.tokenizers:
        origin |= {k: opened.settings[k] for k in ("vocabulary_map", "vq_config") if opened.settings.get(k)}
    write_description(partial, opened.config, family.vocabulary, family.generation, opened.context, sums, origin=origin)
    (partial / STATE).unlink(missing_ok=True)
    replace_folder(out, partial)
    return {
        "bundle": str(out),
        "family": opened.family,
        "modalities": sorted(family.vocabulary.modalities),
        "parameters": sum(t.numel() for t in meta.values()),
        "dtype": "/".join(sorted(str(d).removeprefix("torch.") for d in {t.dtype for t in meta.values()})),
        "files": sorted(sums),
    }


def check_target(out: Path, source: Path, replaces: str | None = None) -> Path:
    """Where to write a folder to, absolute.

    Args:
        out: the folder.
        source: what is read, which must not be overwritten.
        replaces: a folder that holds this file may be replaced; others only if they are empty.

    Raises:
        PlaitError: a file or another folder is in the way.
    """
    out, source = out.resolve(), source.resolve()
    if source.is_relative_to(out):
        raise PlaitError(f"{out}: holds what is to be read; choose another folder")
    if out.exists() and not out.is_dir():
        raise PlaitError(f"{out}: is a file; choose another folder")
    if out.is_dir() and any(out.iterdir()) and not (replaces and (out / replaces).is_file()):
        raise PlaitError(f"{out}: is there and not empty; choose another folder, or delete it")
    return out


def _find_tokenizers(opened: Checkpoint) -> tuple[Path | None, Path | None]:
    """Text and vision tokenizer beside a checkpoint in Meta's layout, as Chameleon's download has them."""
    if opened.family != "chameleon" or opened.settings:
        return None, None
    for folder in (opened.folder, *opened.folder.parents[:2]):
        for at in (folder / "tokenizer", folder):
            text, visual = at / "text_tokenizer.json", at / "vqgan.ckpt"
            if text.is_file():
                return text, visual if visual.is_file() else None
    return None, None


def _visual(opened: Checkpoint, path: Path | None) -> Any | None:
    """The image tokenizer: the one named, else the one among the checkpoint's tensors."""
    if path is not None:
        tokenizer = load_tokenizer(path)
        if tokenizer.kind != "visual":
            raise PlaitError(f"--visual: {path} is a {tokenizer.kind} tokenizer, expected one of images")
        return tokenizer
    if not opened.rest:
        return None
    tensors = {name: file.read(name) for name, file in opened.rest.items()}
    for layout in known_layouts():
        if layout.recognise(tensors, opened.settings):
            return convert(tensors, opened.settings, layout, opened.folder)
    raise PlaitError(f"{opened.folder}: its vision tokenizer ({min(tensors)!r}, …) is none that is known here")


def count_bytes(advance: Advance, total: int) -> Callable[[int], None]:
    """From bytes read by and by to (bytes done, bytes in all)."""
    done = 0

    def tell(read: int) -> None:
        nonlocal done
        done += read
        advance(done, total)

    return tell
