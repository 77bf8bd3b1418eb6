"""`plait tokenizer eval` of pictures: what a visual tokenizer keeps of a folder of images and clips.

`evaluate` measures; `evaluate_folder` writes the report as well; sound has `audio_evaluate.py`. The report says how its
figures were taken (see `Protocol`), since reconstruction figures compare only under one protocol.
"""

import math
import time
from collections import defaultdict
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from PIL import Image
from torch import Tensor

from plait.errors import PlaitError
from plait.tokenizers.base import FORMAT_VERSION, make_folder, tensors_fingerprint, write_json
from plait.tokenizers.features import Features, load_features
from plait.tokenizers.loading import find_weights, load_tokenizer
from plait.tokenizers.media import write_image
from plait.tokenizers.metrics import (
    CodebookUse,
    FeatureMoments,
    frames,
    frechet_distance,
    ms_ssim,
    per_frame,
    psnr,
    ssim,
    temporal_psnr,
)
from plait.tokenizers.perceptual import PerceptualDistance, load_perceptual
from plait.tokenizers.protocol import Item, Protocol, batches, find_media, read_items, split_media
from plait.tokenizers.sheets import clip_sheet, reconstruction_sheet

# How each figure is taken; part of the report.
MEASURES = {
    "psnr": "dB, mean over items of each one's PSNR; values in [-1, 1] with peak 2 (in bytes: 255); the reconstruction "
    "clamped, not rounded to bytes; a clip's PSNR is from its squared error over all frames",
    "ssim": "RGB in [0, 1], Gaussian window 11×11 with σ 1.5, no padding; mean over channels, frames and items "
    "(pytorch-msssim)",
    "ms_ssim": "as ssim, five scales",
    "temporal_psnr": "dB, psnr of the differences between neighbouring frames, with the same peak",
    "thumbnail_psnr": "dB, psnr of mean colours, one unquantized per code (area), scaled up again (bicubic, over time "
    "linear)",
    "perceptual": "under its network's name: originals against reconstructions, mean over frames and items",
    "frechet": "under its network's name: between pooled classifier features of originals and of reconstructions, "
    "frames of clips as pictures; too high for few pictures, so it compares only at equal numbers; not FID, which is "
    "another network's",
    "bits": "log2 of the codebook's size per code, over the pixels before padding",
}

# Pairs on the sheet of images, and clips on the sheet of clips, evenly spread over the data.
SHOWN = {"images": 32, "clips": 8}


def evaluate(
    tokenizer: Any,
    folder: Path,
    protocol: Protocol | None = None,
    *,
    perceptual: PerceptualDistance | None = None,
    features: Features | None = None,
    limit: int | None = None,
    advance: Callable[[int, int], None] = lambda done, total: None,
) -> tuple[dict[str, Any], dict[str, Image.Image]]:
    """Reconstruct the images and clips of a folder, and measure.

    Args:
        tokenizer: a visual tokenizer.
        folder: images and clips, searched recursively, or with a ``manifest.jsonl`` whose rows name them (``path``).
        protocol: how files become pixels; native size by default.
        perceptual: reported under its own name.
        features: whose Fréchet distance is reported, under its own name.
        limit: the first so many images and so many clips only.
        advance: called with (files done, files in all).

    Returns:
        the report's ``data``, ``protocol``, ``images`` and ``clips`` (None when there are none), and by name sheets
        of originals and reconstructions.

    Raises:
        PlaitError: the folder is missing or holds nothing that can be read, or the manifest is broken.
    """
    protocol = protocol or Protocol()
    if limit is not None and limit < 1:
        raise PlaitError(f"limit: is {limit}, must be at least 1")
    paths, skipped = find_media(folder)
    images, clips = split_media(paths, skipped)
    groups = {"images": images[:limit], "clips": clips[:limit]}
    total, done = sum(map(len, groups.values())), 0
    report: dict[str, Any] = {"images": None, "clips": None}
    sheets: dict[str, Image.Image] = {}
    together = [CodebookUse(size) for size in tokenizer.codebook_sizes]
    for kind, group in groups.items():
        measurement = _Measurement(tokenizer, kind, perceptual, features, spread(len(group), SHOWN[kind]))
        for batch in batches(read_items(group, folder, kind == "clips", protocol, skipped)):
            measurement.add(batch)
            done += len(batch)
            advance(done, total)
        if measurement.items:
            report[kind], sheets[kind] = measurement.figures(), measurement.sheet()
            for both, one in zip(together, measurement.use, strict=True):
                both.counts = both.counts + one.counts.to(both.counts.device)
    advance(total, total)  # broken files are done with, too
    if not sheets:
        raise PlaitError(
            f"{folder}: holds no image or clip that can be read" + (f"; the first: {skipped[0]}" if skipped else "")
        )
    if len(sheets) > 1:
        report["together"] = [{"used": use.used, "perplexity": use.perplexity} for use in together]
    data = {"folder": str(folder), "limit": limit, "skipped": skipped}
    return {"data": data, "protocol": protocol.in_words() | MEASURES, **report}, sheets


def spread(count: int, most: int) -> set[int]:
    """At most ``most`` of ``count`` indices, evenly spread."""
    return set(torch.linspace(0, count - 1, min(count, most)).round().long().tolist())


class _Measurement:
    """Figures of all images, or of all clips, gathered batch by batch."""

    def __init__(
        self,
        tokenizer: Any,
        kind: str,
        perceptual: PerceptualDistance | None,
        features: Features | None,
        shown: set[int],
    ) -> None:
        self.tokenizer, self.kind, self.features, self.shown = tokenizer, kind, features, shown
        self.measures: dict[str, Callable[[Tensor, Tensor], Tensor]] = {"psnr": psnr, "ssim": ssim, "ms_ssim": ms_ssim}
        if kind == "clips":
            self.measures["temporal_psnr"] = temporal_psnr
        if perceptual is not None:
            self.measures[perceptual.name] = lambda a, b: per_frame(perceptual, a, b)
        self.scores: dict[str, list[Tensor]] = defaultdict(list)
        self.left_out: dict[str, str] = {}
        self.moments = FeatureMoments(), FeatureMoments()
        self.use = [CodebookUse(size) for size in tokenizer.codebook_sizes]
        self.items = self.codes = self.pixels = 0
        self.bits = self.duration = self.encoding = self.decoding = 0.0
        self.sizes: set[tuple[int, ...]] = set()
        self.rates: set[float] = set()
        self.examples: list[tuple[int, str, Tensor, Tensor]] = []

    @torch.no_grad()
    def add(self, batch: list[Item]) -> None:
        """Reconstruct and measure items of one size."""
        pixels = torch.stack([item.pixels for item in batch]).to(self.tokenizer.device)
        start = now(pixels)
        encoded = self.tokenizer.encode(pixels)
        middle = now(pixels)
        decoded = self.tokenizer.decode(encoded)
        self.decoding += now(pixels) - middle
        self.encoding += middle - start

        codes = encoded.codes if len(self.use) > 1 else encoded.codes.unsqueeze(1)  # [B, q, (t,) h, w]
        for use, of_book in zip(self.use, codes.unbind(1), strict=True):
            use.update(of_book)
            self.bits += of_book.numel() * math.log2(len(use.counts))
        self.items += len(batch)
        self.codes += codes.numel()
        self.pixels += pixels[:, 0].numel()
        self.sizes.add(tuple(pixels.shape[2:]))
        if self.kind == "clips":
            self.rates |= {item.rate for item in batch}
            self.duration += sum(pixels.shape[2] / item.rate for item in batch)

        for name, measure in self.measures.items():
            if name not in self.left_out:
                try:
                    self.scores[name].append(measure(pixels, decoded).cpu())
                except PlaitError as error:  # the mean over the other items would compare with nothing
                    self.left_out[name] = str(error)
        self.scores["thumbnail_psnr"].append(psnr(thumbnail(pixels, tuple(codes.shape[2:])), pixels).cpu())
        if self.features is not None:
            for moments, shown in zip(self.moments, (pixels, decoded), strict=True):
                for few in frames(shown).split(16):  # enlarged to the network's input
                    moments.update(self.features(few).cpu())
        self.examples += [
            (item.index, item.name, original.cpu().clone(), reconstruction.cpu().clone())  # not views of the batch
            for i, (item, original, reconstruction) in enumerate(zip(batch, pixels, decoded, strict=True))
            if item.index in self.shown or not (self.examples or i)  # the first one, should all others be broken
        ]

    def figures(self) -> dict[str, Any]:
        """The report's part on these items; what was left out is None and has a reason in ``left_out``."""
        means = {name: float(torch.cat(scores).mean()) for name, scores in self.scores.items() if scores}
        found: dict[str, Any] = {"items": self.items, "size": _extent(size[-2:][::-1] for size in self.sizes)}
        if self.kind == "clips":
            found["frames"] = _extent(size[:1] for size in self.sizes)
            found["fps"] = _extent((round(rate, 3),) for rate in self.rates)
        found |= {name: None if name in self.left_out else means[name] for name in self.measures}
        left_out = dict(self.left_out)
        if self.features is not None:
            found[self.features.name] = None
            if (count := self.moments[0].count) > 1:
                (mean_a, covariance_a), (mean_b, covariance_b) = ((m.mean, m.covariance) for m in self.moments)
                found[self.features.name] = frechet_distance(mean_a, covariance_a, mean_b, covariance_b)
                found["frechet_pictures"] = count
            else:
                left_out[self.features.name] = "one picture has no covariance; it needs two"
        found["thumbnail_psnr"] = means["thumbnail_psnr"]
        found["bits_per_pixel"] = self.bits / self.pixels
        if self.kind == "clips":
            found["bits_per_second"] = self.bits / self.duration
        found["codes_per_item"] = self.codes / self.items
        found["codebooks"] = [
            {"codes": len(use.counts), "used": use.used, "perplexity": use.perplexity, "dead": len(use.dead)}
            for use in self.use
        ]
        found |= {"encode_seconds": self.encoding, "decode_seconds": self.decoding}
        found["pixels_per_second"] = self.pixels / (self.encoding + self.decoding)
        return found | {"left_out": left_out}

    def sheet(self) -> Image.Image:
        """Examples from all over the data."""
        _, names, originals, reconstructions = zip(*sorted(self.examples, key=lambda example: example[0]), strict=True)
        draw = clip_sheet if self.kind == "clips" else reconstruction_sheet
        return draw(originals, reconstructions, names=names)


def thumbnail(pixels: Tensor, grid: tuple[int, ...]) -> Tensor:
    """The yardstick of a reconstruction: one unquantized colour per code, the mean of its area, scaled up again.

    Args:
        pixels: ``[B, 3, H, W]`` or ``[B, 3, T, H, W]``.
        grid: of the codes, (h, w) or (t, h, w).

    Returns:
        the same shape; bicubic over the picture, linear over time.
    """
    if pixels.ndim == 4:
        return F.interpolate(F.interpolate(pixels, grid, mode="area"), pixels.shape[-2:], mode="bicubic")
    colours = F.interpolate(pixels, grid, mode="area")
    pictures = F.interpolate(frames(colours), pixels.shape[-2:], mode="bicubic")
    video = rearrange(pictures, "(b t) c h w -> b c t h w", b=len(pixels))
    return F.interpolate(video, pixels.shape[2:], mode="trilinear")


def now(like: Tensor) -> float:
    """Seconds, with the device's work done."""
    if like.is_cuda:
        torch.cuda.synchronize(like.device)
    return time.perf_counter()


def _extent(values: Iterable[tuple[float, ...]]) -> str:
    """One value such as "64×64", or the smallest and the largest: "32×48 to 640×480"."""
    ordered = ["×".join(f"{number:g}" for number in value) for value in sorted(set(values), key=math.prod)]
    return ordered[0] if len(ordered) == 1 else f"{ordered[0]} to {ordered[-1]}"


# The command


def load_measured(name: str, modality: str | None = None) -> Any:
    """The tokenizer to evaluate.

    Args:
        name: a tokenizer's or bundle's folder, a checkpoint, or a shipped name.
        modality: which of a bundle's tokenizers; by default that of images.

    Raises:
        PlaitError: it cannot be loaded, or is neither visual nor of sound.
    """
    in_bundle = (find_weights(name) / "vocabulary.json").is_file()
    tokenizer = load_tokenizer(name, modality or ("image" if in_bundle else None))
    if tokenizer.kind not in ("visual", "audio"):
        raise PlaitError(f"{name}: is a {tokenizer.kind} tokenizer; images, video and audio can be measured")
    return tokenizer


def evaluate_folder(
    tokenizer: Any,
    name: str,
    folder: Path,
    out: Path,
    protocol: Protocol,
    *,
    perceptual: str | None = None,
    heads: str | None = None,
    features: str | None = None,
    limit: int | None = None,
    device: str = "cpu",
    advance: Callable[[int, int], None] = lambda done, total: None,
) -> tuple[dict[str, Any], str]:
    """Evaluate a tokenizer and write ``report.json``, ``images.png`` and ``clips.png``.

    Args:
        tokenizer: as in `evaluate`.
        name: what the report calls it.
        folder: as in `evaluate`.
        out: folder for the report.
        protocol: as in `evaluate`.
        perceptual: weights of a perceptual distance, see `load_perceptual`; by default "stlpips-vgg" if installed.
        heads: learned heads for it, see `load_perceptual`.
        features: weights of a feature network, see `load_features`; by default "efflite0" if installed.
        limit: as in `evaluate`.
        device: to compute on, "cuda" for instance.
        advance: as in `evaluate`.

    Returns:
        the report, and a table of it.

    Raises:
        PlaitError: as `evaluate`, or something named here cannot be loaded or written to.
    """
    missing: dict[str, str] = {}
    distance = network = None
    try:
        distance = load_perceptual(perceptual or "stlpips-vgg", heads)
    except PlaitError as error:
        if perceptual or heads:
            raise
        missing["perceptual"] = f"a perceptual distance; {error}"
    try:
        network = load_features(features or "efflite0")
    except PlaitError as error:
        if features:
            raise
        missing["frechet"] = f"a Fréchet distance; {error}"
    for module in filter(None, (tokenizer, distance, network)):
        try:
            module.to(device)
        except (RuntimeError, AssertionError) as error:  # PyTorch's ways to say that there is none
            raise PlaitError(f"device: {device} cannot be used ({str(error).splitlines()[0]}); use cpu") from None
    make_folder(out)
    measured, sheets = evaluate(
        tokenizer, folder, protocol, perceptual=distance, features=network, limit=limit, advance=advance
    )
    for kind in sheets:
        measured[kind]["left_out"] |= missing
    report = {
        "format_version": FORMAT_VERSION,
        "tokenizer": {
            "name": name,
            "fingerprint": tokenizer.fingerprint,
            # The fingerprint is of what makes the codes; the decoder moves the figures too.
            "weights": tensors_fingerprint({}, tokenizer.state_dict()),
            "codebook_sizes": tokenizer.codebook_sizes,
            "pixels_per_code": tokenizer.factor,
            "frames_per_code": getattr(tokenizer, "temporal_factor", 1),
        },
        "computed_on": f"{device} with PyTorch {torch.__version__}, threads: {torch.get_num_threads()}",
        **measured,
    }
    write_json(out / "report.json", report)
    for kind, sheet in sheets.items():
        write_image(sheet, out / f"{kind}.png")
    written = ", ".join(str(out / file) for file in ("report.json", *(f"{kind}.png" for kind in sheets)))
    return report, f"{table(report)}\n\nwrote {written}"


# What the table calls a figure, and what to make of it. Distances go by their own names.
_ROWS = {
    "items": ("items", ""),
    "size": ("width × height", ""),
    "frames": ("frames per clip", ""),
    "fps": ("frames per second", ""),
    "psnr": ("PSNR, dB", "higher is better"),
    "ssim": ("SSIM", "higher is better, at most 1"),
    "ms_ssim": ("MS-SSIM", "higher is better, at most 1"),
    "temporal_psnr": ("temporal PSNR, dB", "higher is better; of the changes from frame to frame"),
    "thumbnail_psnr": ("thumbnail PSNR, dB", "a yardstick for PSNR: one exact colour per code, scaled up"),
    "bits_per_pixel": ("bits per pixel", "what the codes cost; uncompressed it is 24"),
    "bits_per_second": ("bits per second", "what the codes cost"),
    "codes_per_item": ("codes per item", ""),
    "codebook_use": ("codebook use", "share of the codes that occur"),
    "perplexity": ("perplexity", "as many codes, were they used equally"),
    "dead": ("dead codes", "that never occur"),
    "pixels_per_second": ("pixels per second", "encoded and decoded"),
}
_JSON_ONLY = ("codebooks", "encode_seconds", "decode_seconds", "frechet_pictures", "left_out")


def table(report: dict[str, Any]) -> str:
    """A report as text: a column for images and one for clips, then what was left out and why."""
    tokenizer = report["tokenizer"]
    columns: dict[str, dict[str, Any]] = {}
    for kind in ("images", "clips"):
        if figures := report[kind]:
            # Several codebooks share a cell: from the least to the most.
            books = {
                label: _extent((book[key],) for book in figures["codebooks"])
                for label, key in (("codebook_use", "used"), ("perplexity", "perplexity"), ("dead", "dead"))
            }
            speed = {"pixels_per_second": figures["pixels_per_second"]}
            columns[kind] = {k: v for k, v in figures.items() if k not in (*_JSON_ONLY, *speed)} | books | speed
    keys = dict.fromkeys(key for kind in reversed(columns) for key in columns[kind])  # clips have more rows
    rows = {key: _ROWS.get(key, (key, "lower is better")) for key in keys}
    width = max(len(label) for label, _ in rows.values())
    sizes = tokenizer["codebook_sizes"]
    lines = [
        f"{tokenizer['name']}: {len(sizes)} codebook{'s' * (len(sizes) > 1)} of {_extent((n,) for n in sizes)} codes, "
        f"{tokenizer['pixels_per_code']}×{tokenizer['pixels_per_code']} pixels and {tokenizer['frames_per_code']} "
        f"frame{'s' * (tokenizer['frames_per_code'] > 1)} per code, fingerprint {tokenizer['fingerprint'][:16]}",
        "",
        " " * width + "".join(f"{kind:>16}" for kind in columns),
    ]
    for key, (label, note) in rows.items():
        cells = "".join(f"{_cell(column.get(key)):>16}" for column in columns.values())
        lines.append(f"{label:{width}}{cells}   {note}".rstrip())
    if both := report.get("together"):
        used, perplexity = (_extent((book[key],) for book in both) for key in ("used", "perplexity"))
        lines += ["", f"images and clips together: codebook use {_cell(used)}, perplexity {_cell(perplexity)}"]
    lines += ["", f"pictures: {report['protocol']['size']}"]
    if "clips" in columns:
        lines.append(f"clips: {report['protocol']['clips']}")
    lines.append(f"computed on {report['computed_on']}; how each figure is taken: see report.json")
    reasons = [f"left out: {reason}" for kind in columns for reason in report[kind]["left_out"].values()]
    skipped = report["data"]["skipped"]
    return "\n".join([*lines, *dict.fromkeys(reasons), *([f"skipped: {len(skipped)} files"] if skipped else [])])


def _cell(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.5g}"
    return "–" if value is None else str(value)
