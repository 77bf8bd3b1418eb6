"""Draw the fetched emoji at 64x64 and write the demo folders with their manifests.

Run by ``fetch_demo.sh``; needs only resvg-py, so that the data can be made before plait is installed.

Skin-tone variants are left out: they are half of the pictures and near-copies. A *concept* folds what differs only in
gender, and a concept is in one split in every style: held-out figures are about concepts never seen. The split is
90/10 by a hash of the concept, so it does not move when the packages grow.
"""

import hashlib
import json
import os
import re
import sys
from collections import defaultdict
from pathlib import Path
from typing import Any

import resvg_py

STYLES = {
    "noto": ("Apache-2.0", "Noto Emoji, Google (npm @iconify-json/noto)"),
    "twemoji": ("CC-BY-4.0", "Twemoji, Twitter, Inc and other contributors (npm @iconify-json/twemoji)"),
    "fluent": ("MIT", "Fluent Emoji, Microsoft Corporation (npm @iconify-json/fluent-emoji-flat)"),
}
# Categories whose pictures can be told apart at 64x64: no flags (some countries share one), clocks or people.
TINY_CATEGORIES = {"Animals & Nature", "Food & Drink", "Activities", "Objects"}
TINY_CONCEPTS = 350
EXAMPLES = 24
SIZE = 64

SKIN_TONES = {"1f3fb", "1f3fc", "1f3fd", "1f3fe", "1f3ff"}
GENDER_SIGNS = {"2640", "2642"}
MAN_WOMAN = {"1f468", "1f469"}
JOINER, VARIATION, PERSON = "200d", "fe0f", "1f9d1"


def concept_of(codepoints: str) -> str:
    """The code points without gender sign and man/woman, joined by dashes."""
    parts = [PERSON if p in MAN_WOMAN else p for p in codepoints.split("-") if p not in GENDER_SIGNS]
    joined = re.sub(f"(-{JOINER})+(?=-{JOINER}|$)", "", "-".join(parts))
    return joined.strip("-")


def order_of(concept: str) -> int:
    """A fixed pseudo-random number of the concept."""
    return int.from_bytes(hashlib.sha256(f"plait-demo:{concept}".encode()).digest()[:8], "big")


def read_style(folder: Path, style: str) -> list[dict[str, Any]]:
    """Every picture of one style but skin-tone variants: its SVG text and what the manifest says of it."""
    icons = json.loads((folder / "icons.json").read_text("utf-8"))
    names = json.loads((folder / "chars.json").read_text("utf-8"))
    categories = json.loads((folder / "metadata.json").read_text("utf-8"))["categories"]
    category_of = {name: category for category, members in categories.items() for name in members}
    license_name, source = STYLES[style]
    rows = []
    for codepoints, name in sorted(names.items()):
        icon_name = name
        while icon_name not in icons["icons"] and icon_name in icons.get("aliases", {}):
            icon_name = icons["aliases"][icon_name]["parent"]
        icon = icons["icons"].get(icon_name)
        if icon is None or SKIN_TONES & set(codepoints.lower().split("-")):
            continue
        width, height = (icon.get(side, icons.get(side, 16)) for side in ("width", "height"))
        codepoints = "-".join(p for p in codepoints.lower().split("-") if p != VARIATION)
        rows.append(
            {
                "codepoints": codepoints,
                "name": re.sub(r"[-_]+", " ", name).strip(),
                "style": style,
                "category": category_of.get(name, ""),
                "concept": concept_of(codepoints),
                "source": source,
                "license": license_name,
                "svg": f'<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
                f'width="{SIZE}" height="{SIZE}" viewBox="{icon.get("left", 0)} {icon.get("top", 0)} {width} {height}">'
                f"{icon['body']}</svg>",
            }
        )
    return rows


def write_atomically(path: Path, content: bytes) -> None:
    """Write a file so that an interrupted run leaves no half of it."""
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_bytes(content)
    temporary.replace(path)


def write_folder(folder: Path, rows: list[dict[str, Any]], drawn_in: Path | None = None) -> None:
    """Draw the rows' pictures (or link those that ``drawn_in`` already holds) and write the manifest."""
    lines = []
    for row in rows:
        relative = f"{row['style']}/{row['codepoints']}.png"
        path = folder / relative
        path.parent.mkdir(parents=True, exist_ok=True)
        if not path.exists():
            if drawn_in is not None:
                os.link(drawn_in / relative, path)
            else:
                write_atomically(path, bytes(resvg_py.svg_to_bytes(svg_string=row["svg"])))
        keep = ("caption", "style", "concept", "category", "source", "license")
        lines.append(json.dumps({"path": relative} | {key: row[key] for key in keep}, ensure_ascii=False))
    write_atomically(folder / "manifest.jsonl", ("\n".join(lines) + "\n").encode())
    print(f"{folder}: {len(rows)} pictures of {len({row['concept'] for row in rows})} concepts")


def main(out: Path) -> None:
    """Write train, heldout, tiny and examples below ``out``."""
    by_style = {style: read_style(out / "raw" / style, style) for style in STYLES}
    # One name for a picture in every style, so that a caption differs between styles only in the style.
    names: dict[str, str] = {}
    for rows in by_style.values():
        for row in rows:
            row["caption"] = f"{names.setdefault(row['codepoints'], row['name'])}, {row['style']} style"
    everything = [row for rows in by_style.values() for row in rows]

    train = [row for row in everything if order_of(row["concept"]) % 10 != 0]
    write_folder(out / "train", train)
    write_folder(out / "heldout", [row for row in everything if order_of(row["concept"]) % 10 == 0])

    plain = defaultdict(list)  # pictures without gender, by concept
    for row in train:
        if row["category"] in TINY_CATEGORIES and row["codepoints"] == row["concept"]:
            plain[row["concept"]].append(row)
    complete = sorted((c for c, rows in plain.items() if len(rows) == len(STYLES)), key=order_of)
    chosen = set(complete[:TINY_CONCEPTS])
    write_folder(out / "tiny", [r for r in train if r["concept"] in chosen and r in plain[r["concept"]]], out / "train")

    # One picture each of some concepts, the styles in turn.
    shown = [plain[c][i % len(STYLES)] for i, c in enumerate(complete[:EXAMPLES])]
    write_folder(out / "examples", shown, out / "train")

    credits = "\n".join(f"- {style}: {source}, {licence}" for style, (licence, source) in STYLES.items())
    write_atomically(out / "LICENSES.md", f"The pictures' drawings:\n\n{credits}\n".encode())


if __name__ == "__main__":
    main(Path(sys.argv[1]))
