"""Draw what the visual tokenizer trains on besides the demo pictures: more picture sets, and animated emoji.

Run by ``fetch_demo.sh DIR more`` after ``draw_emoji.py``; needs resvg-py and Pillow. The same concepts are held out as
there: a picture of another set is drawn only if its name is that of a concept to train on.
"""

import io
import json
import re
import sys
from pathlib import Path
from typing import Any

import resvg_py
from draw_emoji import SIZE, SKIN_TONES, STYLES, VARIATION, concept_of, order_of, write_atomically
from PIL import Image

# Emoji sets, whose pictures are chosen by name, and sets without emoji, which are taken whole.
EMOJI = {
    "noto-v1": ("Apache-2.0", "Noto Emoji v1, Google (npm @iconify-json/noto-v1)"),
    "emojione": ("CC-BY-4.0", "EmojiOne (npm @iconify-json/emojione)"),
    "fxemoji": ("Apache-2.0", "Firefox OS Emoji, Mozilla (npm @iconify-json/fxemoji)"),
    "fluent-emoji": ("MIT", "Fluent Emoji, Microsoft Corporation (npm @iconify-json/fluent-emoji)"),
}
OTHER = {
    "flat-color-icons": ("MIT", "Flat Color Icons, Icons8 (npm @iconify-json/flat-color-icons)"),
    "fluent-color": ("MIT", "Fluent UI System Color Icons, Microsoft Corporation (npm @iconify-json/fluent-color)"),
}
ANIMATED = "Fluent Emoji, Microsoft Corporation (npm @lobehub/fluent-emoji-anim-1)"
# The animations have 24 frames a second; every second one is kept.
STRIDE, MILLISECONDS = 2, 84


def plain(name: str) -> str:
    """A name's words."""
    return re.sub("[^a-z0-9]+", " ", name.lower()).strip()


def codepoints_of(text: str) -> str:
    """Code points without variation selectors."""
    return "-".join(p for p in text.lower().split("-") if p != VARIATION)


def training_names(raw: Path) -> set[str]:
    """Names of the concepts to train on."""
    names: dict[bool, set[str]] = {True: set(), False: set()}
    for style in STYLES:
        for codepoints, name in json.loads((raw / style / "chars.json").read_text("utf-8")).items():
            codepoints = codepoints_of(codepoints)
            if not SKIN_TONES & set(codepoints.split("-")):
                names[order_of(concept_of(codepoints)) % 10 != 0].add(plain(name))
    return names[True] - names[False]


def draw(folder: Path, out: Path, style: str, keep: set[str] | None) -> list[dict[str, Any]]:
    """Draw one set's pictures whose names are to be kept, and return their rows of the manifest."""
    icons = json.loads((folder / "icons.json").read_text("utf-8"))
    rows = []
    for name, icon in sorted(icons["icons"].items()):
        if (
            (plain(name) not in keep)
            if keep is not None
            else (style == "fluent-color" and not re.search("48|32", name))
        ):
            continue
        width, height = (icon.get(side, icons.get(side, 16)) for side in ("width", "height"))
        path = out / style / f"{name}.png"
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            svg = (
                f'<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" width="{SIZE}" '
                f'height="{SIZE}" viewBox="{icon.get("left", 0)} {icon.get("top", 0)} {width} {height}">'
                f"{icon['body']}</svg>"
            )
            write_atomically(path, bytes(resvg_py.svg_to_bytes(svg_string=svg)))
        licence, source = (EMOJI | OTHER)[style]
        caption = f"{plain(name)}, {style} style"
        rows.append({"path": f"{style}/{name}.png", "caption": caption, "source": source, "license": licence})
    return rows


def animate(source: Path, path: Path) -> bool:
    """Write an animation at 64×64, lossless; False if it is a still picture."""
    with Image.open(source) as image:
        count = getattr(image, "n_frames", 1)
        if count < 2:
            return False
        if path.exists():
            return True
        frames = []
        for i in range(0, count, STRIDE):
            image.seek(i)
            frame = Image.new("RGBA", image.size, "white")
            frame.alpha_composite(image.convert("RGBA"))
            frames.append(frame.convert("RGB").resize((SIZE, SIZE), Image.Resampling.BICUBIC))
    buffer = io.BytesIO()
    frames[0].save(
        buffer, "WEBP", save_all=True, append_images=frames[1:], duration=MILLISECONDS, loop=0, lossless=True
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, buffer.getvalue())
    return True


def write_manifest(folder: Path, rows: list[dict[str, Any]], what: str) -> None:
    """Write the folder's ``manifest.jsonl``."""
    lines = [json.dumps(row, ensure_ascii=False) for row in rows]
    write_atomically(folder / "manifest.jsonl", ("\n".join(lines) + "\n").encode())
    print(f"{folder}: {len(rows)} {what}")


def main(out: Path) -> None:
    """Write more, clips/train and clips/heldout below ``out``."""
    raw = out / "raw"
    keep = training_names(raw)
    rows = [row for style in EMOJI for row in draw(raw / style, out / "more", style, keep)]
    rows += [row for style in OTHER for row in draw(raw / style, out / "more", style, None)]
    write_manifest(out / "more", rows, "pictures")

    names = {codepoints_of(k): v for k, v in json.loads((raw / "fluent" / "chars.json").read_text("utf-8")).items()}
    clips: dict[str, list[dict[str, Any]]] = {"train": [], "heldout": []}
    for source in sorted((raw / "animated" / "assets").glob("*.webp")):
        codepoints = codepoints_of(source.stem)
        if SKIN_TONES & set(codepoints.split("-")):
            continue
        concept = concept_of(codepoints)
        split = "heldout" if order_of(concept) % 10 == 0 else "train"
        if animate(source, out / "clips" / split / f"{codepoints}.webp"):
            caption = plain(names.get(codepoints, codepoints))
            row = {"path": f"{codepoints}.webp", "caption": caption, "concept": concept, "source": ANIMATED}
            clips[split].append(row | {"license": "MIT"})
    for split, found in clips.items():
        write_manifest(out / "clips" / split, found, "clips")
    credits = "\n".join(f"- more/{style}: {source}, {licence}" for style, (licence, source) in (EMOJI | OTHER).items())
    licenses = (out / "LICENSES.md").read_text("utf-8")
    write_atomically(out / "LICENSES.md", f"{licenses}{credits}\n- clips: {ANIMATED}, MIT\n".encode())


if __name__ == "__main__":
    main(Path(sys.argv[1]))
