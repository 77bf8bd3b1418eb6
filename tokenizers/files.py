"""`plait tokenizer encode` and `decode`: picture and video files to files of codes, and back.

One file after the other, and of a video only a few frames at a time: what stays in memory of a long one is its codes.
"""

import math
import os
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from PIL import Image
from torch import Tensor

from plait.errors import PlaitError
from plait.tokenizers.base import Codes, check_codes, make_folder
from plait.tokenizers.loading import load_tokenizer
from plait.tokenizers.media import read_image, to_image, to_pixels, write_image
from plait.tokenizers.pixels import CHUNK
from plait.tokenizers.video import DEFAULT_FPS, FPS_RANGE, VideoWriter, is_clip, stream_video

SUFFIX = ".codes.safetensors"
# Larger pictures go through in overlapping tiles of this many pixels a side, and as many pixels of a video at a time.
TILE = 2048
IMAGE_FORMATS = ("png", "jpg", "webp", "gif")
VIDEO_FORMATS = ("mp4", "webm", "gif", "webp")

# Called with the frames done and, as far as known, those in all.
Advance = Callable[[int, int], None]


@dataclass
class Written:
    """One file's way.

    Attributes:
        source: what was read.
        file: what was written.
        modality: "image" or "video".
        size: (H, W) or (T, H, W) in pixels.
        grid: the codes' shape.
        fps: frames per second, of a video.
        seconds: what it took.
    """

    source: str
    file: str
    modality: str
    size: tuple[int, ...]
    grid: tuple[int, ...]
    fps: float | None
    seconds: float


def encode_files(
    paths: Sequence[Path],
    out: Path,
    tokenizer: str | Path = "tiny-vision",
    *,
    size: int | None = None,
    fps: float | None = None,
    tile: int | None = None,
    device: str = "cpu",
    overwrite: bool = False,
    advance: Advance = lambda done, total: None,
) -> list[Written]:
    """Encode pictures and videos, each into ``out/<stem>.codes.safetensors``.

    Args:
        paths: PNG, JPEG, WebP, GIF, MP4, WebM, told apart by content. Animations and videos give video codes.
        out: folder, made if missing.
        tokenizer: of images and videos: its folder, a bundle's, or a shipped name.
        size: scale so that the short side is this many pixels; the file's own size by default.
        fps: bring videos to this frame rate by leaving out or repeating frames; the file's own rate by default.
        tile: larger pictures go through in overlapping squares of this side, `TILE` by default. Their codes are close
            to those of one pass, but not the same.
        device: what torch calls it, such as "cuda".
        overwrite: replace files that are there.
        advance: told of the progress.

    Raises:
        PlaitError: before any work: two files of one stem, a missing file, an option out of range. Then at the first
            file that is not readable; those before it are done.
    """
    targets = _targets(paths, out, lambda path: f"{_stem(path)}{SUFFIX}")
    _check_positive(size=size, tile=tile)
    if fps is not None and not FPS_RANGE[0] <= fps <= FPS_RANGE[1]:
        raise PlaitError(f"fps: is {fps!r}, must be a number from {FPS_RANGE[0]} to {FPS_RANGE[1]:g}")
    model = _load(tokenizer, device)
    make_folder(out)
    count = _Counter(len(paths), advance)
    written = []
    for path, target in targets:
        start = time.perf_counter()
        _check_free(target, overwrite)
        with _named(path):
            if is_clip(path):
                codes = _encode_clip(model, path, size, fps, tile or TILE, count)
            else:
                pixels = _scaled(to_pixels(read_image(path))[None], size)
                codes = model.encode(pixels, tile=tile or TILE)
                count.add(1)
            codes.codes = codes.codes.cpu()
        codes.save(target)
        written.append(_written(path, target, codes, start))
    return written


def decode_files(
    paths: Sequence[Path],
    out: Path,
    tokenizer: str | Path = "tiny-vision",
    *,
    format: str | None = None,
    tile: int | None = None,
    device: str = "cpu",
    overwrite: bool = False,
    advance: Advance = lambda done, total: None,
) -> list[Written]:
    """Decode files of codes, each into a picture or video ``out/<stem>.<format>``.

    Args:
        paths: what `encode_files` or `Codes.save` wrote, one item each.
        out: folder, made if missing.
        tokenizer: the one that encoded.
        format: png, jpg, webp or gif of pictures, by default png; mp4, webm, gif or webp of videos, by default mp4.
        tile: as in `encode_files`; the tiles are blended.
        device: what torch calls it, such as "cuda".
        overwrite: replace files that are there.
        advance: told of the progress.

    Raises:
        PlaitError: before any work: two files of one stem, a missing file, an option out of range. Then at the first
            file that is damaged, of another tokenizer or of another modality; those before it are done.
    """
    targets = _targets(paths, out, _stem)
    _check_positive(tile=tile)
    if format not in (None, *IMAGE_FORMATS, *VIDEO_FORMATS):
        raise PlaitError(f"format: {format!r} is none of {', '.join(dict.fromkeys(IMAGE_FORMATS + VIDEO_FORMATS))}")
    model = _load(tokenizer, device)
    make_folder(out)
    count = _Counter(len(paths), advance)
    written = []
    for path, stem in targets:
        start = time.perf_counter()
        codes = Codes.load(path)
        with _named(path):
            _check(codes, model)
            formats = VIDEO_FORMATS if codes.modality == "video" else IMAGE_FORMATS
            if format not in (None, *formats):
                raise PlaitError(f"is {codes.modality}, which is written as {', '.join(formats)} and not {format}")
            target = stem.with_name(f"{stem.name}.{format or formats[0]}")
            _check_free(target, overwrite)
            if codes.modality == "video":
                _decode_clip(model, codes, target, tile or TILE, count)
            else:
                write_image(to_image(model.decode(codes, tile=tile or TILE)[0]), target)
                count.add(1)
        written.append(_written(path, target, codes, start))
    return written


# One file


def _encode_clip(model: Any, path: Path, size: int | None, fps: float | None, tile: int, count: "_Counter") -> Codes:
    facts, chunks = stream_video(path, 1)
    height, width = _scaled_size(facts.height, facts.width, size)
    rate = fps or facts.fps
    step = Fraction(facts.fps) / Fraction(rate)
    total = math.ceil(facts.frames / step) if facts.frames else 0
    count.expect(total)
    frames = 0

    def pixels() -> Iterator[Tensor]:
        nonlocal frames
        for chunk in _batched(_at_rate(chunks, step), _at_once(height, width)):
            frames += len(chunk)
            floats = rearrange(chunk, "t h w c -> t c h w").float() / 127.5 - 1
            yield rearrange(_scaled(floats, size), "t c h w -> 1 c t h w")
            count.add(len(chunk))

    # On the CPU, and as int32 until all are there: on long videos the codes are what memory holds.
    parts = [codes.to("cpu", torch.int32) for codes in model.encode_stream(pixels(), tile=tile)]
    codes = torch.cat(parts, -3).long()
    return Codes(codes, "video", size=(frames, height, width), fps=rate, fingerprint=model.fingerprint)


def _decode_clip(model: Any, codes: Codes, target: Path, tile: int, count: "_Counter") -> None:
    assert codes.size is not None
    frames, height, width = codes.size
    count.expect(frames)
    steps = max(1, _at_once(height, width) // model.temporal_factor)
    with VideoWriter(target, codes.fps or DEFAULT_FPS) as writer:
        for pixels in model.decode_stream(codes.codes.split(steps, -3), codes.size, tile):
            shown = ((pixels[0].clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
            writer.write(rearrange(shown, "c t h w -> t h w c"))
            count.add(shown.shape[1])


def _at_once(height: int, width: int) -> int:
    """Frames that go through the network together."""
    return max(1, min(CHUNK, TILE**2 // (height * width)))


def _at_rate(frames: Iterable[Tensor], step: Fraction) -> Iterator[Tensor]:
    """Every frame as often as an even sampling with this step in frames meets it: sample k lies at k · step."""
    taken = 0
    for i, frame in enumerate(frames):
        while taken * step < i + 1:
            yield frame
            taken += 1


def _batched(frames: Iterator[Tensor], count: int) -> Iterator[Tensor]:
    held: list[Tensor] = []
    for frame in frames:
        held.append(frame)
        if len(held) == count:
            yield torch.cat(held)
            held = []
    if held:
        yield torch.cat(held)


def _scaled_size(height: int, width: int, size: int | None) -> tuple[int, int]:
    """The size whose short side is ``size``.

    Raises:
        PlaitError: more pixels than a picture may have.
    """
    if size is None:
        return height, width
    scale = Fraction(size, min(height, width))
    scaled = max(1, round(height * scale)), max(1, round(width * scale))
    _check_area(*scaled)
    return scaled


def _scaled(pixels: Tensor, size: int | None) -> Tensor:
    """``[n, 3, H, W]`` in ``[-1, 1]`` → the same with ``size`` as the short side: bicubic, with antialiasing."""
    shape = _scaled_size(pixels.shape[2], pixels.shape[3], size)
    if shape == tuple(pixels.shape[2:]):
        return pixels
    return F.interpolate(pixels, shape, mode="bicubic", antialias=True).clamp(-1, 1)


def _written(path: Path, target: Path, codes: Codes, start: float) -> Written:
    assert codes.size is not None
    grid, seconds = tuple(codes.codes.shape[1:]), round(time.perf_counter() - start, 3)
    return Written(str(path), str(target), codes.modality, codes.size, grid, codes.fps, seconds)


class _Counter:
    """Frames done and to do, of which a file's are known when it is opened; until then it counts as one."""

    def __init__(self, files: int, advance: Advance) -> None:
        self._done, self._total, self._advance = 0, files, advance

    def expect(self, frames: int) -> None:
        self._total += max(0, frames - 1)

    def add(self, frames: int) -> None:
        self._done += frames
        self._total = max(self._total, self._done)
        self._advance(self._done, self._total)


# Checks


def _stem(path: Path) -> str:
    return path.name.removesuffix(SUFFIX) if path.name.endswith(SUFFIX) else path.stem


def _targets(paths: Sequence[Path], out: Path, name: Callable[[Path], str]) -> list[tuple[Path, Path]]:
    """What each file becomes.

    Raises:
        PlaitError: no file, a folder, or two that would be written to one place.
    """
    found: dict[str, Path] = {}
    for path in paths:
        try:
            if path.is_dir():
                raise PlaitError(f"{path}: is a folder; name its files")
            if not path.is_file():
                raise PlaitError(f"{path}: no such file")
        except OSError as error:  # a name that is too long, for instance
            raise PlaitError(f"{path}: cannot be read ({error.strerror})") from None
        key = name(path).casefold()  # some file systems take A and a for one name
        if key in found:
            raise PlaitError(f"{found[key]} and {path}: have one stem and would overwrite each other; use two folders")
        found[key] = path
    if out.is_dir() and not os.access(out, os.W_OK):
        raise PlaitError(f"{out}: may not be written to; choose another folder")
    return [(path, out / name(path)) for path in paths]


def _check_free(target: Path, overwrite: bool) -> None:
    try:
        taken = target.exists()
    except OSError as error:
        raise PlaitError(f"{target}: cannot be written ({error.strerror}); rename the original") from None
    if taken and not overwrite:
        raise PlaitError(f"{target}: is there already; choose another folder or give --overwrite")


def _check_positive(**options: int | None) -> None:
    for name, value in options.items():
        if value is not None and value < 1:
            raise PlaitError(f"{name}: is {value!r}, must be at least 1")


def _check_area(height: int, width: int) -> None:
    limit = Image.MAX_IMAGE_PIXELS
    if limit and height * width > limit:
        raise PlaitError(f"size: {height}×{width} are more than {limit} pixels; make it smaller")


def _load(tokenizer: str | Path, device: str) -> Any:
    """A tokenizer of images and videos on its device.

    Raises:
        PlaitError: not found, not one, or no such device.
    """
    model = load_tokenizer(tokenizer, "image")
    try:
        return model.to(device)
    except (RuntimeError, AssertionError) as error:  # the second from a torch without CUDA
        raise PlaitError(f"device: {device!r} cannot be used ({str(error).splitlines()[0]}); try cpu") from None


def _check(codes: Codes, model: Any) -> None:
    """Refuse codes that are no picture or video of this tokenizer, before anything is written.

    Raises:
        PlaitError: what is wrong with them.
    """
    if codes.modality not in ("image", "video"):
        raise PlaitError(f"holds {codes.modality} codes; this decodes images and videos")
    if codes.fingerprint not in (None, model.fingerprint):
        raise PlaitError("made by another tokenizer (fingerprints differ); name the one that encoded with --tokenizer")
    video, several = codes.modality == "video", len(model.codebook_sizes) > 1
    grid = tuple(codes.codes.shape[-3 if video else -2 :])
    if codes.codes.ndim != 3 + video + several or 0 in codes.codes.shape:
        raise PlaitError(f"codes of shape {list(codes.codes.shape)} are no {codes.modality} of this tokenizer")
    if len(codes.codes) != 1:
        raise PlaitError(f"holds a batch of {len(codes.codes)}; save one {codes.modality} per file")
    check_codes(codes.codes, model.codebook_sizes[0])
    sides = tuple(side * model.factor for side in grid[-2:])
    _check_area(*sides)
    size = codes.size or (*(model.frames_of(t) for t in grid[:-2]), *sides)
    if not all(type(side) is int and side > 0 for side in size) or len(size) != len(grid) or grid != (
        *(model.grid_frames_of(t) for t in size[:-2]), *(math.ceil(side / model.factor) for side in size[-2:])
    ):  # fmt: skip
        raise PlaitError(f"size {size} does not fit a grid of {'×'.join(map(str, grid))} codes; encode it again")
    codes.size = size


@contextmanager
def _named(path: Path) -> Iterator[None]:
    """Begin every error with the file's name.

    Raises:
        PlaitError: the block's own error, or memory ran out.
    """
    try:
        yield
    except PlaitError as error:
        if str(error).startswith(f"{path}: "):
            raise
        raise PlaitError(f"{path}: {error}") from None
    except torch.OutOfMemoryError:
        raise PlaitError(f"{path}: does not fit into the device's memory; give --tile 512 or --size") from None
