"""One picture or clip to codes, and back to a file; of a clip only a few frames are in memory at a time."""

import math
from collections.abc import Iterable, Iterator
from fractions import Fraction
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from PIL import Image
from torch import Tensor

from plait.errors import PlaitError
from plait.tokenizers.base import Codes, check_codes
from plait.tokenizers.counter import Counter
from plait.tokenizers.media import read_image, to_image, to_pixels, write_image
from plait.tokenizers.pixels import CHUNK
from plait.tokenizers.video import DEFAULT_FPS, FPS_RANGE, VideoWriter, is_clip, stream_video

# Larger pictures go through in overlapping tiles of this many pixels a side, and as many pixels of a video at a time.
TILE = 2048
IMAGE_FORMATS = ("png", "jpg", "webp", "gif")
VIDEO_FORMATS = ("mp4", "webm", "gif", "webp")


def check_fps(fps: float | None) -> None:
    """Refuse a frame rate that is out of range.

    Raises:
        PlaitError: it is.
    """
    if fps is not None and not FPS_RANGE[0] <= fps <= FPS_RANGE[1]:
        raise PlaitError(f"fps: is {fps!r}, must be a number from {FPS_RANGE[0]} to {FPS_RANGE[1]:g}")


def encode_visual(
    model: Any, path: Path, size: int | None, fps: float | None, tile: int | None, count: Counter
) -> Codes:
    """A picture's or clip's codes; the options are those of `plait.tokenizers.files.encode_files`.

    Raises:
        PlaitError: the file cannot be read.
    """
    if is_clip(path):
        return _encode_clip(model, path, size, fps, tile or TILE, count)
    pixels = _scaled(to_pixels(read_image(path))[None], size)
    codes: Codes = model.encode(pixels, tile=tile or TILE)
    count.add(1)
    return codes


def decode_visual(model: Any, codes: Codes, target: Path, tile: int | None, count: Counter) -> None:
    """A picture or clip of checked codes, written to ``target``.

    Raises:
        PlaitError: it cannot be written.
    """
    if codes.modality == "video":
        _decode_clip(model, codes, target, tile or TILE, count)
    else:
        write_image(to_image(model.decode(codes, tile=tile or TILE)[0]), target)
        count.add(1)


def _encode_clip(model: Any, path: Path, size: int | None, fps: float | None, tile: int, count: Counter) -> Codes:
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


def _decode_clip(model: Any, codes: Codes, target: Path, tile: int, count: Counter) -> None:
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


def _check_area(height: int, width: int) -> None:
    limit = Image.MAX_IMAGE_PIXELS
    if limit and height * width > limit:
        raise PlaitError(f"size: {height}×{width} are more than {limit} pixels; make it smaller")


def check_visual(codes: Codes, model: Any) -> None:
    """Refuse codes that are no picture or video of this tokenizer, before anything is written.

    Raises:
        PlaitError: what is wrong with them.
    """
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
