"""`plait eval`: what a bundle of text and images does on a folder of captioned images."""

import json
import random
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from plait.errors import PlaitError
from plait.infer.pipeline import Model
from plait.tokenizers.media import read_image, to_pixels
from plait.tokenizers.metrics import CodebookUse, psnr


def captioned_images(folder: Path) -> list[tuple[str, Image.Image]]:
    """The (caption, image) rows of a folder's ``manifest.jsonl``.

    Raises:
        PlaitError: there is no manifest, or a row is broken.
    """
    manifest = folder / "manifest.jsonl"
    try:
        lines = manifest.read_text("utf-8").split("\n")  # alone: JSON strings may hold other line separators
    except OSError:
        raise PlaitError(f"{manifest}: no such file; expected lines of JSON with path and caption") from None
    except UnicodeDecodeError:
        raise PlaitError(f"{manifest}: not UTF-8 text; save it as UTF-8") from None
    rows = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            rows.append((str(row["caption"]), folder / row["path"]))
        except (ValueError, KeyError, TypeError) as error:
            raise PlaitError(f"{manifest}:{number}: expected JSON with path and caption ({error!r})") from None
    if not rows:
        raise PlaitError(f"{manifest}: is empty")
    return [(caption, read_image(path)) for caption, path in rows]


def evaluate(model: Model, rows: list[tuple[str, Image.Image]], items: int = 50, seed: int = 0) -> dict[str, Any]:
    """Measure a bundle on captioned images of one size.

    Args:
        model: with text and image.
        rows: captions and images.
        items: captions and images to generate from, chosen by ``seed``.
        seed: of the choice and of the sampling.

    Returns:
        ``psnr``: mean over all images of the image tokenizer's PSNR in dB; ``codebook_use``: share of its codes that
        the images use; ``caption_to_image``: share of captions whose generated image is nearest (mean absolute pixel
        difference, over all the images) to one that carries the caption; ``image_to_caption``: share of images whose
        generated caption is exactly one of theirs.

    Raises:
        PlaitError: the images differ in size, or the model lacks text or image.
    """
    model.tokenizer("text")
    if len({image.size for _, image in rows}) > 1:
        raise PlaitError("eval: the images differ in size; scale them to one size first")
    tokenizer = model.tokenizer("image")
    pixels = torch.stack([to_pixels(image) for _, image in rows])
    use = CodebookUse(tokenizer.codebook_sizes[0])
    quality = []
    for chunk in torch.split(pixels, 64):
        codes = tokenizer.encode(chunk)
        use.update(codes.codes)
        quality.append(psnr(tokenizer.decode(codes).cpu(), chunk))
    chosen = random.Random(seed).sample(range(len(rows)), min(items, len(rows)))
    captions = [rows[i][0] for i in chosen]
    pictures = model.generate_batch([[caption] for caption in captions], to="image", seed=seed)
    found = [rows[nearest(to_pixels(picture), pixels)][0] for picture in pictures]
    texts = model.generate_batch([[rows[i][1]] for i in chosen], to="text", seed=seed)
    return {
        "images": len(rows),
        "items": len(chosen),
        "seed": seed,
        "psnr": float(torch.cat(quality).mean()),
        "codebook_use": use.used,
        "caption_to_image": sum(a == b for a, b in zip(captions, found, strict=True)) / len(chosen),
        "image_to_caption": sum(a == b for a, b in zip(captions, texts, strict=True)) / len(chosen),
    }


def nearest(picture: Tensor, pixels: Tensor) -> int:
    """Index of the image in ``[N, 3, H, W]`` with the smallest mean absolute difference to ``[3, H, W]``."""
    if picture.shape != pixels.shape[1:]:
        # A generated picture of another size matches none; compare at the data's size.
        picture = torch.nn.functional.interpolate(picture[None], size=pixels.shape[-2:], mode="area")[0]
    return int((pixels - picture).abs().flatten(1).mean(1).argmin())
