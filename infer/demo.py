"""`plait demo`: what the shipped model does, on one picture.

``gallery.png`` has three parts: captions with the images generated from them, images with the captions generated from
them, and originals beside what the image tokenizer makes of them.
"""

from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw

from plait.infer.evaluate import captioned_images
from plait.infer.pipeline import Model, load
from plait.tokenizers.base import make_folder, write_file
from plait.tokenizers.loading import find_weights
from plait.tokenizers.media import contact_sheet
from plait.tokenizers.modalities import MODALITIES


def gallery(model: Model, shown: list[tuple[str, Image.Image]], seed: int = 0) -> tuple[Image.Image, dict[str, Any]]:
    """The gallery, and what was generated for it.

    Args:
        model: with text and image.
        shown: captions and their images.
        seed: of the generation.
    """
    captions, images = [caption for caption, _ in shown], [image for _, image in shown]
    pictures = model.generate_batch([[caption] for caption in captions], to="image", seed=seed)
    texts = model.generate_batch([[image] for image in images], to="text", seed=seed)
    entry, tokenizer = MODALITIES["image"], model.tokenizer("image")
    again = [entry.decode(tokenizer, entry.encode(tokenizer, image)) for image in images]
    pairs = [picture for pair in zip(images, again, strict=True) for picture in pair]
    labels = [label for caption in captions for label in (caption, "reconstructed")]
    parts = [
        ("Caption to image", contact_sheet(pictures, 8, captions, 128)),
        ("Image to caption", contact_sheet(images, 8, texts, 128)),
        ("Through the image tokenizer", contact_sheet(pairs[:32], 8, labels[:32], 128)),
    ]
    return stack(parts), {"captions": captions, "generated_captions": texts}


def stack(parts: list[tuple[str, Image.Image]]) -> Image.Image:
    """Sheets under each other, each below its title."""
    title = 28
    page = Image.new("RGB", (max(s.width for _, s in parts), sum(s.height + title for _, s in parts)), "white")
    draw, y = ImageDraw.Draw(page), 0
    for text, sheet in parts:
        draw.text((8, y + 8), text, fill="black", font_size=16)
        page.paste(sheet, (0, y + title))
        y += title + sheet.height
    return page


def run_demo(bundle: str, out: Path) -> Path:
    """Write ``out/gallery.png`` from the examples that come with a bundle, and return it."""
    page, _ = gallery(load(bundle), captioned_images(find_weights(bundle) / "examples"))
    make_folder(out)
    write_file(out / "gallery.png", MODALITIES["image"].write(page))
    return out / "gallery.png"
