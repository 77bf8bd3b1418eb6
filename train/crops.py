"""Raw samples → what a visual tokenizer trains on: squares of images, and of frames of clips."""

import random
import tempfile
from abc import abstractmethod
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from PIL import Image, ImageOps
from torch import Tensor

from plait.errors import PlaitError
from plait.tokenizers.media import read_image, to_pixels
from plait.tokenizers.video import is_clip, stream_video
from plait.train.documents import member
from plait.train.medium import MediumEncoder
from plait.train.recipe import VisualTokenizerRecipe
from plait.train.shards import read_samples


def crop_square(image: Image.Image, side: int, place: float = 0.5) -> Image.Image:
    """Scale to cover a square of ``side`` pixels and crop it: from the middle, the start (0) or the end (1)."""
    if image.size == (side, side):
        return image
    return ImageOps.fit(image, (side, side), Image.Resampling.BICUBIC, centering=(place, place))


def image_square(sample: dict[str, Any], side: int, place: float = 0.5) -> Tensor | None:
    """A sample's image as uint8 ``[3, side, side]``, cropped as by `crop_square`; None when it has none.

    Raises:
        PlaitError: the image is broken.
    """
    data = member(sample, "image")
    return None if data is None else _square(read_image(data, sample["__key__"]), side, place)


def clip_squares(
    sample: dict[str, Any], side: int, frames: int, fps: float, start: float = 0.0, place: float = 0.5
) -> Tensor | None:
    """Frames of a sample's clip as uint8 ``[3, frames, side, side]``; None when it has none.

    Args:
        sample: a raw sample; an animated picture is a clip too.
        side: of the square.
        frames: how many; a clip that is shorter rests at its end.
        fps: at which frames are taken; a slower clip keeps its own rate.
        start: where in what is left over of the clip the first frame lies, in ``[0, 1)``.
        place: of the crop, as in `crop_square`.

    Raises:
        PlaitError: the clip is broken.
    """
    data, key = member(sample, "video") or member(sample, "image"), sample["__key__"]
    if data is None:
        return None
    with tempfile.NamedTemporaryFile() as file:
        file.write(data)
        file.flush()
        try:
            return _frames(file.name, side, frames, fps, start, place) if is_clip(file.name) else None
        except PlaitError as error:
            raise PlaitError(str(error).replace(file.name, key)) from None


def _frames(path: str, side: int, frames: int, fps: float, start: float, place: float) -> Tensor:
    """The frames that `clip_squares` takes of a file; no others are held."""
    facts, chunks = stream_video(path)
    length = facts.frames or sum(len(chunk) for chunk in chunks)
    stride = max(1.0, facts.fps / fps)
    spare = max(0.0, length - 1 - stride * (frames - 1))
    first = int(start * (spare + 1))
    wanted = [min(length - 1, first + int(i * stride + 1e-3)) for i in range(frames)]
    found: dict[int, Tensor] = {}
    seen = 0
    for chunk in stream_video(path)[1]:
        for i in range(seen, seen + len(chunk)):
            if i in wanted:
                found[i] = _square(Image.fromarray(chunk[i - seen].numpy()), side, place)
        last, seen = chunk[-1], seen + len(chunk)
        if seen > wanted[-1]:
            break
    else:  # the file said that it holds more
        found |= {i: _square(Image.fromarray(last.numpy()), side, place) for i in wanted if i >= seen}
    return torch.stack([found[i] for i in wanted], 1)


def _square(image: Image.Image, side: int, place: float) -> Tensor:
    return ((to_pixels(crop_square(image, side, place)) + 1) * 127.5).round().to(torch.uint8)


class CropEncoder(MediumEncoder):
    """Raw samples → batches of uint8 pixels, augmented."""

    def __init__(self, recipe: VisualTokenizerRecipe) -> None:
        super().__init__(recipe.seed)
        self.recipe = recipe

    @abstractmethod
    def crop(self, sample: dict[str, Any], draw: random.Random) -> Tensor | None:
        """A sample's pixels ``[3, ..., side, side]``, or None."""

    def place(self, draw: random.Random) -> float:
        """Where the crop lies."""
        return draw.random() if self.recipe.random_crop else 0.5

    def read(self, sample: dict[str, Any], draw: random.Random) -> tuple[Tensor] | None:
        """Decode, crop, mirror, shift."""
        pixels = self.crop(sample, draw)
        if pixels is None:
            return None
        if self.recipe.flip and draw.random() < 0.5:
            pixels = pixels.flip(-1)
        if shift := self.recipe.shift:
            left, top = (draw.randint(0, 2 * shift) for _ in range(2))
            side = pixels.shape[-1]
            edged = F.pad(pixels.flatten(0, -3).float(), (shift,) * 4, mode="replicate").to(torch.uint8)
            pixels = edged[:, top : top + side, left : left + side].reshape(pixels.shape)
        return (pixels,)


class ImageEncoder(CropEncoder):
    """Images, ``[B, 3, side, side]``."""

    medium = "image"

    def crop(self, sample: dict[str, Any], draw: random.Random) -> Tensor | None:
        """The image."""
        return image_square(sample, self.recipe.image_size, self.place(draw))


class ClipEncoder(CropEncoder):
    """Clips, ``[B, 3, T, side, side]``, from anywhere in the recording."""

    medium = "clip"

    def crop(self, sample: dict[str, Any], draw: random.Random) -> Tensor | None:
        """Some consecutive frames."""
        clips = self.recipe.clips
        return clip_squares(sample, self.recipe.image_size, clips.frames, clips.fps, draw.random(), self.place(draw))


def load_heldout(recipe: VisualTokenizerRecipe) -> dict[str, Tensor]:
    """The held-out ``"images"`` ``[N, 3, side, side]`` and, if there are any, ``"clips"`` ``[N, 3, T, side, side]``.

    uint8. What cannot be read is named and left out.

    Raises:
        PlaitError: nothing can be read.
    """
    side, clips = recipe.image_size, recipe.clips
    found = {"images": _all(recipe.heldout, lambda sample: image_square(sample, side))}
    if clips.heldout:
        found["clips"] = _all(clips.heldout, lambda sample: clip_squares(sample, side, clips.frames, clips.fps))
    return found


def _all(folder: str, read: Any) -> Tensor:
    crops = []
    for sample in read_samples(Path(folder)):
        try:
            if (pixels := read(sample)) is not None:
                crops.append(pixels)
        except PlaitError as error:
            print(f"skipped {error}", flush=True)
    if not crops:
        raise PlaitError(f"{folder}: holds nothing that can be read; there must be something to evaluate on")
    return torch.stack(crops)
