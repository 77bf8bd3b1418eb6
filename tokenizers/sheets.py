"""Contact sheets of originals and their reconstructions: what figures cannot say."""

from collections.abc import Sequence

import torch
from PIL import Image
from torch import Tensor

from plait.tokenizers.media import contact_sheet, to_image
from plait.tokenizers.metrics import psnr


def reconstruction_sheet(
    originals: Sequence[Tensor] | Tensor,
    reconstructions: Sequence[Tensor] | Tensor,
    columns: int = 4,
    names: Sequence[str] | None = None,
) -> Image.Image:
    """Each original with its reconstruction to the right of it, and the PSNR below.

    Args:
        originals: pictures ``[3, H, W]`` in ``[-1, 1]``, of any sizes, or a batch of them.
        reconstructions: as many, of the same sizes.
        columns: pairs per row.
        names: captions of the originals.
    """
    images, captions = [], []
    for i, (original, reconstruction) in enumerate(zip(originals, reconstructions, strict=True)):
        images += [to_image(original), to_image(reconstruction)]
        captions += [names[i] if names else "original", _decibels(original, reconstruction)]
    return contact_sheet(images, 2 * columns, captions, _cell(originals))


def clip_sheet(
    originals: Sequence[Tensor] | Tensor,
    reconstructions: Sequence[Tensor] | Tensor,
    columns: int = 9,
    names: Sequence[str] | None = None,
) -> Image.Image:
    """For each clip a row of its frames over time and below it a row of the same frames reconstructed, with their PSNR.

    Args:
        originals: clips ``[3, T, H, W]`` in ``[-1, 1]``, of any sizes, or a batch of them.
        reconstructions: as many, of the same sizes.
        columns: frames per row, evenly spread from the first to the last; a shorter clip leaves the rest white.
        names: captions of the clips.
    """
    images, captions = [], []
    for i, (original, reconstruction) in enumerate(zip(originals, reconstructions, strict=True)):
        length = original.shape[1]
        shown = torch.linspace(0, length - 1, min(columns, length)).round().long().tolist()
        blank = columns - len(shown)
        images += [to_image(original[:, t]) for t in shown] + [Image.new("RGB", (1, 1), "white")] * blank
        images += [to_image(reconstruction[:, t]) for t in shown] + [Image.new("RGB", (1, 1), "white")] * blank
        captions += [f"frame {t + 1}" if k else names[i] if names else "original" for k, t in enumerate(shown)]
        captions += [""] * blank
        captions += [_decibels(original[:, t], reconstruction[:, t]) for t in shown] + [""] * blank
    return contact_sheet(images, columns, captions, _cell(originals))


def _decibels(original: Tensor, reconstruction: Tensor) -> str:
    return f"{float(psnr(original[None], reconstruction[None])):.1f} dB"


def _cell(pictures: Sequence[Tensor] | Tensor) -> int:
    """A cell as large as the largest picture, within reason."""
    return min(256, max([128, *(max(picture.shape[-2:]) for picture in pictures)]))
