"""Still pictures in and out, and the plain classes that carry audio and video; `video.py` reads and writes clips.

Whatever a file holds (palette, alpha, 16 bits, EXIF rotation) becomes 8-bit RGB on white. Of an animation this file
reads the first frame.
"""

import io
import math
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import numpy as np
import torch
from einops import rearrange
from PIL import Image, ImageDraw, ImageOps, UnidentifiedImageError
from torch import Tensor

from plait.errors import PlaitError
from plait.tokenizers.base import write_file

EXTENSIONS: dict[str, tuple[str, ...]] = {
    "text": (".txt",),
    "image": (".png", ".jpg", ".jpeg", ".webp"),
    "audio": (".wav", ".flac", ".mp3", ".ogg"),
    "video": (".mp4", ".webm", ".gif"),
}


def modality_of(path: str | Path) -> str | None:
    """The modality that a file's extension names, or None."""
    suffix = Path(path).suffix.lower()
    return next((modality for modality, suffixes in EXTENSIONS.items() if suffix in suffixes), None)


@dataclass
class Audio:
    """Sound: ``samples`` float32 ``[channels, n]`` in ``[-1, 1]`` at ``sample_rate`` Hz."""

    samples: Tensor
    sample_rate: int


@dataclass
class Video:
    """Moving pictures: ``frames`` uint8 ``[t, h, w, 3]`` at ``fps`` frames per second."""

    frames: Tensor
    fps: float


def read_image(source: str | Path | bytes | IO[bytes], name: str | None = None) -> Image.Image:
    """Read an image file as RGB on white.

    Args:
        source: a path, the file's bytes, or an open binary file.
        name: what to call it in errors when ``source`` is not a path.

    Raises:
        PlaitError: the file is missing, truncated, not an image or unreasonably large.
    """
    name = name or (str(source) if isinstance(source, (str, Path)) else "image")
    with (
        pillow_errors(name),
        Image.open(io.BytesIO(source) if isinstance(source, bytes) else source) as image,
    ):
        image.load()
        return to_rgb(image)


@contextmanager
def pillow_errors(name: str) -> Iterator[None]:
    """Turn whatever Pillow raises on a file into one line.

    Raises:
        PlaitError: the file is missing, truncated, not an image or unreasonably large.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # such as those of broken EXIF data, which is no reason to refuse a picture
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            warnings.filterwarnings("error", "Invalid APNG")  # it would be shown as a still
            yield
    except PlaitError:
        raise
    except FileNotFoundError:
        raise PlaitError(f"{name}: no such file") from None
    except UnidentifiedImageError:
        raise PlaitError(f"{name}: not an image that can be read") from None
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise PlaitError(f"{name}: too large ({error}); scale it down first") from None
    except Exception as error:  # on damaged files its parsers raise SyntaxError, IndexError and many others
        if isinstance(error, OSError) and error.strerror:
            raise PlaitError(f"{name}: cannot be read ({error.strerror})") from None
        raise PlaitError(f"{name}: broken image ({error}); replace the file or leave it out") from None


def write_image(image: Image.Image, path: str | Path) -> None:
    """Write a still picture, whole or not at all, in the format that the extension names.

    Raises:
        PlaitError: another extension than .png, .jpg, .jpeg, .webp and .gif, a picture too large for the format, or a
            file that cannot be written.
    """
    path = Path(path)
    formats = {".png": "PNG", ".jpg": "JPEG", ".jpeg": "JPEG", ".webp": "WEBP", ".gif": "GIF"}
    if path.suffix.lower() not in formats:
        raise PlaitError(f"{path}: a picture is written as {', '.join(formats)}; give a name that ends so")
    buffer = io.BytesIO()
    try:
        image.save(buffer, formats[path.suffix.lower()], quality=95)
    except (OSError, ValueError, OverflowError) as error:
        raise PlaitError(f"{path}: cannot hold {image.width}×{image.height} pixels ({error}); write a .png") from None
    write_file(path, buffer.getvalue())


def to_rgb(image: Image.Image) -> Image.Image:
    """8-bit RGB, alpha laid over white, EXIF rotation applied."""
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I;16") or image.mode == "I":
        # Pillow would clip 16-bit grey instead of scaling it.
        image = Image.fromarray((np.asarray(image, dtype=np.float64) / 257).round().clip(0, 255).astype(np.uint8))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        return Image.alpha_composite(white, image).convert("RGB")
    return image.convert("RGB")


def to_pixels(image: Image.Image) -> Tensor:
    """RGB image → float32 ``[3, H, W]`` in ``[-1, 1]``."""
    array = torch.from_numpy(np.array(image.convert("RGB")))
    return rearrange(array, "h w c -> c h w").float() / 127.5 - 1


def to_image(pixels: Tensor) -> Image.Image:
    """Float ``[3, H, W]`` in ``[-1, 1]`` → RGB image."""
    array = ((pixels.detach().float().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
    return Image.fromarray(rearrange(array, "c h w -> h w c").cpu().numpy())


def contact_sheet(
    images: Sequence[Image.Image], columns: int = 8, captions: Sequence[str] | None = None, cell: int = 128
) -> Image.Image:
    """Images in a grid, each scaled to fit a square of ``cell`` pixels, captions below."""
    line = 12
    wrapped = [_wrap(caption, cell // 6) for caption in captions] if captions else [[] for _ in images]
    text_height = line * max((len(lines) for lines in wrapped), default=0)
    rows = max(1, math.ceil(len(images) / columns))
    pad = 6
    sheet = Image.new("RGB", (columns * (cell + pad) + pad, rows * (cell + text_height + pad) + pad), "white")
    draw = ImageDraw.Draw(sheet)
    for i, (image, lines) in enumerate(zip(images, wrapped, strict=True)):
        x, y = pad + i % columns * (cell + pad), pad + i // columns * (cell + text_height + pad)
        scale = min(cell / image.width, cell / image.height)
        side = max(1, round(image.width * scale)), max(1, round(image.height * scale))
        sheet.paste(image.convert("RGB").resize(side, Image.Resampling.NEAREST if scale > 1 else None), (x, y))
        for k, text in enumerate(lines):
            draw.text((x, y + cell + k * line), text, fill="black")
    return sheet


def _wrap(text: str, width: int) -> list[str]:
    """At most three lines of at most ``width`` characters."""
    import textwrap

    return textwrap.wrap(text, max(width, 8), max_lines=3, placeholder="…") or [""]
