"""What an evaluation measures on: a folder's images and clips as the pixels that a `Protocol` makes of them, or its
sounds as the samples that an `AudioProtocol` makes of them.
"""

import json
import math
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image, ImageOps
from torch import Tensor

from plait.errors import PlaitError
from plait.tokenizers.media import EXTENSIONS, modality_of, read_image, to_pixels
from plait.tokenizers.sound import stream_sound
from plait.tokenizers.video import is_clip, stream_video

# Items of one size are batched up to this many pixels, which bounds memory.
BATCH_PIXELS = 2**19


@dataclass(frozen=True)
class Protocol:
    """How files become what is measured.

    Attributes:
        size: scale the short side to this many pixels; None keeps the native size.
        crop: with a size, crop the middle square.
        frames: of a clip, at most.
        fps: at which frames are taken from a clip's start; a slower clip keeps its own rate.
    """

    size: int | None = None
    crop: bool = True
    frames: int = 9
    fps: float = 12.0

    def __post_init__(self) -> None:
        for name in ("size", "frames"):
            value = getattr(self, name)
            if (type(value) is not int or value < 1) and (name, value) != ("size", None):
                raise PlaitError(f"{name}: is {value!r}, must be a whole number of at least 1")
        if not 0 < self.fps < math.inf:
            raise PlaitError(f"fps: is {self.fps!r}, must be a number above 0")

    def in_words(self) -> dict[str, str]:
        """What one must do alike to get figures that compare."""
        if self.size is None:
            size = "native size, not cropped"
        elif self.crop:
            size = (
                f"middle square, scaled to {self.size}×{self.size} (antialiased bicubic; smaller pictures are enlarged)"
            )
        else:
            size = f"short side scaled to {self.size} (antialiased bicubic; smaller pictures are enlarged), not cropped"
        return {
            "size": size,
            "colour": "8-bit RGB, transparency on white, EXIF rotation applied",
            "clips": f"the first {self.frames} frames at {self.fps:g} per second: those on screen at each instant from "
            "the start; a slower clip at its own rate, a shorter one as it is",
        }


@dataclass(frozen=True)
class AudioProtocol:
    """How files of sound become what is measured.

    Attributes:
        seconds: of a file, at most, from its start.
    """

    seconds: float = 20.0

    def __post_init__(self) -> None:
        if isinstance(self.seconds, bool) or not 0 < self.seconds < math.inf:
            raise PlaitError(f"seconds: is {self.seconds!r}, must be a number above 0")

    def in_words(self, sample_rate: int, channels: int) -> dict[str, str]:
        """What one must do alike to get figures that compare.

        Args:
            sample_rate: the tokenizer's, Hz.
            channels: the tokenizer's.
        """
        return {
            "rate": f"originals resampled to {sample_rate} Hz, the tokenizer's rate, before all else: what lies above "
            f"{sample_rate / 2000:g} kHz is in no figure",
            "channels": "mixed into one" if channels == 1 else f"{channels}; one is taken for each of them",
            "length": f"the first {self.seconds:g} seconds of a file, a shorter one as it is",
            "level": "as in the file, clamped to [-1, 1], as is the reconstruction",
            "alignment": "none: sample by sample, at the length that went in",
        }

    def read(self, path: Path, sample_rate: int, channels: int) -> Tensor:
        """A file's sound, float32 ``[channels, n]`` in ``[-1, 1]``.

        Raises:
            PlaitError: the file is missing, broken or holds no sound.
        """
        left, parts = max(1, round(self.seconds * sample_rate)), []
        for chunk in stream_sound(path, sample_rate, channels):
            parts.append(chunk[:, :left])
            left -= parts[-1].shape[1]
            if not left:
                break
        return torch.cat(parts, 1).clamp(-1, 1)


@dataclass
class Item:
    """One image ``[3, H, W]`` or clip ``[3, T, H, W]``, float32 in ``[-1, 1]``."""

    index: int
    name: str
    pixels: Tensor
    rate: float = 0.0


def find_media(folder: Path, modalities: Sequence[str] = ("image", "video")) -> tuple[list[Path], list[str]]:
    """A folder's media files: those that its ``manifest.jsonl`` names, in its order, else all, by path.

    Args:
        folder: searched recursively.
        modalities: what to look for, by extension (`EXTENSIONS`).

    Returns:
        the paths, and a line for each row of the manifest that was left out.

    Raises:
        PlaitError: no such folder, or a manifest that is not lines of JSON with ``path``.
    """
    if not folder.is_dir():
        raise PlaitError(f"{folder}: no such folder")
    manifest = folder / "manifest.jsonl"
    if not manifest.is_file():
        found = [path for path in folder.rglob("*") if modality_of(path) in modalities and path.is_file()]
        return sorted(found), []
    paths: dict[Path, None] = {}  # ordered, and a picture with several captions counts once
    skipped = []
    try:
        lines = manifest.read_bytes().split(b"\n")  # alone: JSON strings may hold other line separators
    except OSError as error:
        raise PlaitError(f"{manifest}: cannot be read ({error.strerror})") from None
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            name = str(json.loads(line)["path"])
        except (ValueError, KeyError, TypeError) as error:
            raise PlaitError(f"{manifest}:{number}: expected JSON with path ({error!r})") from None
        path = folder / name
        if not path.resolve().is_relative_to(folder.resolve()):
            skipped.append(f"{manifest}:{number}: {name} lies outside {folder}")
        elif modality_of(path) not in modalities:
            suffixes = ", ".join(suffix for modality in modalities for suffix in EXTENSIONS[modality])
            skipped.append(f"{manifest}:{number}: {name} ends in none of {suffixes}")
        else:
            paths[path] = None
    return list(paths), skipped


def split_media(paths: list[Path], skipped: list[str]) -> tuple[list[Path], list[Path]]:
    """Images and clips apart; what is broken gets a line in ``skipped``."""
    images: list[Path] = []
    clips: list[Path] = []
    for path in paths:
        try:
            (clips if is_clip(path) else images).append(path)
        except PlaitError as error:
            skipped.append(str(error))
    return images, clips


def read_items(paths: list[Path], folder: Path, clips: bool, protocol: Protocol, skipped: list[str]) -> Iterator[Item]:
    """Files as pixels; what cannot be read gets a line in ``skipped``."""
    for index, path in enumerate(paths):
        name = str(path.relative_to(folder))
        try:
            if clips:
                frames, rate = read_clip(path, protocol)
                yield Item(index, name, torch.stack([to_pixels(scale(frame, protocol)) for frame in frames], 1), rate)
            else:
                yield Item(index, name, to_pixels(scale(read_image(path), protocol)))
        except PlaitError as error:
            skipped.append(str(error))


def read_clip(path: Path, protocol: Protocol) -> tuple[list[Image.Image], float]:
    """A clip's frames by the protocol, and how many there are per second.

    Raises:
        PlaitError: the file is broken or not a video.
    """
    facts, chunks = stream_video(path)
    rate = min(protocol.fps, facts.fps)
    # The frame on screen at k / rate seconds; a little room for rates that are no exact fractions.
    shown = [math.floor(k * facts.fps / rate + 1e-3) for k in range(protocol.frames)]
    frames: list[Tensor] = []
    for chunk in chunks:
        frames += chunk
        if len(frames) > shown[-1]:
            break
    return [Image.fromarray(frames[t].numpy()) for t in shown if t < len(frames)], rate


def scale(image: Image.Image, protocol: Protocol) -> Image.Image:
    """Scale and crop one picture by the protocol."""
    if protocol.size is None:
        return image
    side = protocol.size
    if protocol.crop:
        return image if image.size == (side, side) else ImageOps.fit(image, (side, side), Image.Resampling.BICUBIC)
    short = min(image.size)
    size = round(image.width * side / short), round(image.height * side / short)
    return image if image.size == size else image.resize(size, Image.Resampling.BICUBIC)


def batches(items: Iterable[Item]) -> Iterator[list[Item]]:
    """Items of one size together, as they come; never more than `BATCH_PIXELS` wait, whatever the sizes."""
    waiting: dict[tuple[int, ...], list[Item]] = defaultdict(list)

    def pixels(batch: list[Item]) -> int:
        return len(batch) * batch[0].pixels[0].numel()

    for item in items:
        batch = waiting[tuple(item.pixels.shape)]
        batch.append(item)
        if sum(map(pixels, waiting.values())) + item.pixels[0].numel() > BATCH_PIXELS:
            yield waiting.pop(max(waiting, key=lambda shape: pixels(waiting[shape])))
    yield from waiting.values()
