import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from plait.infer.demo import gallery, stack
from plait.infer.pipeline import Model


@pytest.fixture
def shown(bundle: Path, emoji: Path) -> Path:
    """The bundle with two examples."""
    rows = [json.loads(line) for line in (emoji / "manifest.jsonl").read_text("utf-8").splitlines()][:2]
    for row in rows:
        (bundle / "examples" / row["path"]).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(emoji / row["path"], bundle / "examples" / row["path"])
    (bundle / "examples" / "manifest.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n", "utf-8")
    return bundle


def test_demo_writes_the_gallery(main: Callable[..., Any], shown: Path, tmp_path: Path) -> None:
    out = tmp_path / "new" / "out"
    ran = main("demo", "--model", shown, "--out", out, "--json")
    assert ran.code == 0, ran.err
    assert json.loads(ran.out) == {"gallery": str(out / "gallery.png")}
    with Image.open(out / "gallery.png") as image:
        assert image.width > 8 * 96
        assert image.height > 3 * 96
    assert [p.name for p in out.iterdir()] == ["gallery.png"]


def test_gallery_says_what_was_generated(model: Model, picture: Image.Image) -> None:
    page, facts = gallery(model, [("a red apple", picture)], seed=3)
    assert facts["captions"] == ["a red apple"]
    assert facts["generated_captions"] == model.generate_batch([[picture]], to="text", seed=3)
    again, _ = gallery(model, [("a red apple", picture)], seed=3)
    assert page.tobytes() == again.tobytes()


def test_stack_keeps_every_sheet() -> None:
    page = stack([("one", Image.new("RGB", (300, 20), "red")), ("two", Image.new("RGB", (90, 30), "blue"))])
    assert page.size == (300, 20 + 30 + 2 * 28)
    assert page.getpixel((299, 28 + 19)) == (255, 0, 0)
    assert page.getpixel((89, page.height - 1)) == (0, 0, 255)


@pytest.mark.parametrize("manifest", [None, "", "{}\n"])
def test_a_bundle_without_examples(
    main: Callable[..., Any], bundle: Path, tmp_path: Path, manifest: str | None
) -> None:
    if manifest is not None:
        (bundle / "examples").mkdir()
        (bundle / "examples" / "manifest.jsonl").write_text(manifest)
    ran = main("demo", "--model", bundle, "--out", tmp_path / "out")
    assert ran.code == 2
    assert ran.err.startswith(f"plait: {bundle / 'examples' / 'manifest.jsonl'}")
    assert ran.err.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_out_is_a_file(main: Callable[..., Any], shown: Path, tmp_path: Path) -> None:
    (tmp_path / "out").write_text("")
    ran = main("demo", "--model", shown, "--out", tmp_path / "out")
    assert ran.code == 2
    assert "cannot make this folder" in ran.err
