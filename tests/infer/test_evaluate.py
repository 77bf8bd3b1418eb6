import json
from pathlib import Path

import pytest
import torch
from PIL import Image

from plait.errors import PlaitError
from plait.infer.bundle import save_bundle
from plait.infer.demo import gallery
from plait.infer.evaluate import captioned_images, evaluate, nearest
from plait.infer.pipeline import Model, load
from plait.model.config import DecoderConfig
from plait.model.decoder import Decoder
from plait.tokenizers.loading import load_tokenizers
from plait.tokenizers.vocabulary import Vocabulary


def test_manifest_rows_become_captions_and_images(emoji: Path) -> None:
    rows = captioned_images(emoji)
    assert len(rows) == 60
    assert all(image.mode == "RGB" and image.size == (64, 64) for _, image in rows)
    assert rows[0][0] == "lime, noto style"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "no such file"),
        (b"", "is empty"),
        (b"{\n", r"manifest\.jsonl:1: expected JSON"),
        (b'{"path": "a.png"}\n', r"manifest\.jsonl:1: expected JSON"),
        (b'{"path": 3, "caption": "x"}\n', r"manifest\.jsonl:1: expected JSON"),
        (b'{"path": "gone.png", "caption": "x"}\n', r"gone\.png: no such file"),
        (b"\xff\xfe\n", r"manifest\.jsonl"),
    ],
)
def test_broken_manifests(tmp_path: Path, content: bytes | None, message: str) -> None:
    if content is not None:
        (tmp_path / "manifest.jsonl").write_bytes(content)
    with pytest.raises(PlaitError, match=message) as raised:
        captioned_images(tmp_path)
    assert "\n" not in str(raised.value)


def test_only_line_feeds_end_rows_and_blank_lines_are_skipped(tmp_path: Path) -> None:
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    caption = "one\u2028two\x85three"
    row = json.dumps({"path": "a.png", "caption": caption}, ensure_ascii=False)
    (tmp_path / "manifest.jsonl").write_bytes(f"\n{row}\r\n \n{row}\n\n".encode())
    assert [text for text, _ in captioned_images(tmp_path)] == [caption, caption]
    (tmp_path / "manifest.jsonl").write_text("\n\n{\n")
    with pytest.raises(PlaitError, match=r"manifest\.jsonl:3: "):
        captioned_images(tmp_path)


@pytest.mark.parametrize(("has", "lacks"), [("text", "image"), ("image", "text")])
def test_a_bundle_without_a_modality(tokenizers: Path, tmp_path: Path, has: str, lacks: str) -> None:
    vocabulary = Vocabulary.build(load_tokenizers(tokenizers), [has])
    config = DecoderConfig(vocabulary_size=vocabulary.size, width=16, layers=1)
    weights = Decoder(config).state_dict()
    save_bundle(tmp_path / "one", config, weights, vocabulary, tokenizers, {}, 64, torch.float32)
    model, rows = load(tmp_path / "one"), [("a", Image.new("RGB", (8, 8)))]
    for use in (evaluate, gallery):
        with pytest.raises(PlaitError, match=f"^{lacks}: this model has no such modality; it has {has}"):
            use(model, rows)


def test_figures(model: Model, emoji: Path) -> None:
    rows = captioned_images(emoji)[:4]
    small = [(caption, image.resize((16, 16))) for caption, image in rows]
    found = evaluate(model, small, items=2, seed=1)
    assert found == evaluate(model, small, items=2, seed=1)
    assert (found["images"], found["items"], found["seed"]) == (4, 2, 1)
    assert 0 < found["psnr"] < 60
    assert 0 < found["codebook_use"] <= 1
    assert all(found[name] in (0, 0.5, 1) for name in ("caption_to_image", "image_to_caption"))
    json.dumps(found)
    assert evaluate(model, small[:1], items=50)["items"] == 1


def test_a_model_that_is_right_scores_one(model: Model, picture: Image.Image, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [("one", picture), ("two", picture.transpose(Image.Transpose.FLIP_LEFT_RIGHT).rotate(180))]
    rows.append(("three", Image.new("RGB", picture.size, "red")))
    images = dict(rows)

    def perfect(prompts: list[list[object]], to: str, seed: int) -> list[object]:
        if to == "image":
            return [images[str(prompt)] for (prompt,) in prompts]
        return [next(caption for caption, image in rows if image is prompt) for (prompt,) in prompts]

    monkeypatch.setattr(model, "generate_batch", perfect)
    found = evaluate(model, rows[1:], items=2)
    assert found["caption_to_image"] == found["image_to_caption"] == 1
    monkeypatch.setattr(model, "generate_batch", lambda prompts, to, seed: perfect(prompts[::-1], to, seed))
    found = evaluate(model, rows[1:], items=2)
    assert found["caption_to_image"] == found["image_to_caption"] == 0


def test_sizes_must_agree(model: Model) -> None:
    rows = [("a", Image.new("RGB", (8, 8))), ("b", Image.new("RGB", (16, 8)))]
    with pytest.raises(PlaitError, match="differ in size"):
        evaluate(model, rows)


def test_nearest_scales_to_the_data() -> None:
    pixels = torch.stack([torch.full((3, 4, 4), value) for value in (-1.0, 0.0, 1.0)])
    assert nearest(torch.full((3, 4, 4), 0.4), pixels) == 1
    assert nearest(torch.full((3, 16, 8), 0.7), pixels) == 2
