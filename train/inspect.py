"""`plait data inspect`: what is in a folder of shards, as text and as a contact sheet."""

import statistics
from itertools import chain
from pathlib import Path
from typing import Any

from PIL import Image

from plait.errors import PlaitError
from plait.tokenizers.base import make_folder, write_file
from plait.tokenizers.layouts import build_layout
from plait.tokenizers.loading import load_tokenizers
from plait.tokenizers.media import contact_sheet
from plait.tokenizers.modalities import MODALITIES
from plait.train.documents import TokenDocument, raw_parts, unpack_document
from plait.train.shards import read_manifest, read_shard

SHOWN = 32


def inspect(folder: Path, sheet: Path, tokenizers: str | None) -> tuple[dict[str, Any], str]:
    """Read all of a folder's shards.

    Args:
        folder: raw or token shards.
        sheet: PNG to write: the first images with their captions.
        tokenizers: what token shards were made with; without it their counts are given, no sheet and no seconds of
            sound.

    Returns:
        the facts, and the same as text.

    Raises:
        PlaitError: the shards are missing or broken, or the sheet's name does not end in .png.
    """
    if sheet.suffix.lower() != ".png":
        raise PlaitError(f"{sheet}: the contact sheet is a PNG; choose a name that ends in .png")
    manifest = read_manifest(folder)
    raw = manifest["kind"] == "raw"
    loaded = {} if raw or tokenizers is None else load_tokenizers(tokenizers)
    if not raw:
        for name, tokenizer in loaded.items():
            if manifest["tokenizers"].get(name, tokenizer.fingerprint) != tokenizer.fingerprint:
                raise PlaitError(f"{tokenizers}: the {name} tokenizer is not the one that made {folder}")
    counts: dict[str, int] = {}
    sizes: dict[str, int] = {}
    lengths: list[int] = []
    licences: dict[str, int] = {}
    broken: list[str] = []
    shown: list[tuple[Image.Image, str]] = []
    captions: list[str] = []
    seconds: list[float] = []
    for sample in chain.from_iterable(read_shard(folder / row["name"]) for row in manifest["shards"]):
        try:
            if raw:
                media, durations, facts = _raw_media(sample)
            else:
                media, durations, facts = _token_media(unpack_document(sample), loaded, with_images=len(shown) < SHOWN)
        except PlaitError as error:
            broken.append(str(error))
            continue
        licence = str(facts.get("license", "not given"))
        licences[licence] = licences.get(licence, 0) + 1
        images = [medium for modality, medium, _ in media if modality == "image" and medium is not None]
        texts = [medium for modality, medium, _ in media if modality == "text" and medium is not None]
        for modality, _, size in media:
            counts[modality] = counts.get(modality, 0) + 1
            sizes[size] = sizes.get(size, 0) + (modality != "text")
        lengths += [len(text) for text in texts]
        seconds += durations
        captions += texts[: SHOWN - len(captions)]
        if images and len(shown) < SHOWN:
            shown.append((images[0], texts[0] if texts else ""))
    facts = {
        "kind": manifest["kind"], "shards": len(manifest["shards"]),
        "samples": sum(row["samples"] for row in manifest["shards"]),
        "bytes": sum(row["bytes"] for row in manifest["shards"]),
        "media": counts, "sizes": {k: n for k, n in sorted(sizes.items(), key=lambda kv: -kv[1])[:10] if n},
        "text_length_median": statistics.median(lengths) if lengths else 0, "licenses": licences, "broken": broken,
        "captions": captions[:8],
    }  # fmt: skip
    if seconds:
        facts["seconds"] = {"total": sum(seconds), "median": statistics.median(seconds), "most": max(seconds)}
    if shown:
        make_folder(sheet.parent)
        page = contact_sheet([image for image, _ in shown], 8, [text for _, text in shown], 96)
        write_file(sheet, MODALITIES["image"].write(page))
        facts["sheet"] = str(sheet)
    return facts, _as_text(folder, facts)


Medium = tuple[str, Any, str]  # modality, the medium or None where it cannot be shown, its size in words


def _raw_media(sample: dict[str, Any]) -> tuple[list[Medium], list[float], dict[str, Any]]:
    """A sample's media, the seconds of each sound, and what else came with it."""
    parts, _, facts = raw_parts(sample)
    media: list[Medium] = []
    seconds = []
    for part in parts:
        if part.modality not in MODALITIES:
            media.append((part.modality, None, f"{len(part.data)} bytes"))
            continue
        medium = MODALITIES[part.modality].read(part.data, f"{sample['__key__']} ({part.modality})")
        size = ""
        if part.modality == "image":
            size = f"{medium.width}×{medium.height}"
        elif part.modality == "audio":
            channels, samples = medium.samples.shape
            size = f"{medium.sample_rate} Hz, {channels} channel{'s' * (channels > 1)}"
            seconds.append(samples / medium.sample_rate)
        media.append((part.modality, medium, size))
    return media, seconds, facts


def _token_media(
    document: TokenDocument, tokenizers: dict[str, Any], with_images: bool
) -> tuple[list[Medium], list[float], dict[str, Any]]:
    media: list[Medium] = []
    seconds = []
    for span in document.spans:
        entry = MODALITIES.get(span.modality)
        tokenizer = tokenizers.get(entry.tokenizer) if entry else None
        wanted = span.modality == "text" or (span.modality == "image" and with_images)
        medium = entry.decode(tokenizer, span.codes) if entry and tokenizer and wanted else None
        size = "×".join(map(str, span.codes.shape)) + " codes"
        if span.modality == "audio":
            size = f"{span.codes.shape[0] if span.codes.ndim > 1 else 1} × … codes"  # hardly two are of one length
            if tokenizer:
                layout = build_layout(getattr(tokenizer, "layout", "flatten"), len(tokenizer.codebook_sizes))
                seconds.append(layout.steps(span.codes.shape) / tokenizer.frame_rate)
        media.append((span.modality, medium, size))
    return media, seconds, document.facts


def _as_text(folder: Path, facts: dict[str, Any]) -> str:
    lines = [
        f"{folder}: {facts['samples']} samples, {facts['shards']} {facts['kind']} shards, "
        f"{facts['bytes'] / 1e6:.1f} MB",
        "media     " + ", ".join(f"{n} {modality}" for modality, n in facts["media"].items()),
        "sizes     " + ", ".join(f"{size} ({n})" for size, n in facts["sizes"].items()),
        "licences  " + ", ".join(f"{name} ({n})" for name, n in facts["licenses"].items()),
    ]
    if "seconds" in facts:
        total, median, most = facts["seconds"].values()
        lines.append(f"sound     {total / 60:.1f} minutes, median {median:.1f} s, at most {most:.1f} s")
    if facts["captions"]:
        lines.append(f"text      median {facts['text_length_median']:g} characters, such as:")
        lines += [f"          {caption}" for caption in facts["captions"]]
    lines += [f"broken    {line}" for line in facts["broken"]]
    if "sheet" in facts:
        lines.append(f"sheet     {facts['sheet']}")
    return "\n".join(lines)
