import io
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from plait.errors import PlaitError
from plait.tokenizers.media import Video
from plait.tokenizers.video import write_video
from plait.train.crops import (
    ClipEncoder,
    CropEncoder,
    ImageEncoder,
    clip_squares,
    crop_square,
    image_square,
    load_heldout,
)
from plait.train.loader import batches, open_loader
from plait.train.pack import pack
from plait.train.recipe import ClipConfig, VisualTokenizerRecipe


def recipe(**values: Any) -> VisualTokenizerRecipe:
    return VisualTokenizerRecipe(**{"shards": ["a"], "heldout": "h", "out": "o", "image_size": 16, **values})


def png(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


@pytest.fixture(scope="module")
def numbered(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """12 frames at 20 fps, the t-th of them grey 20·t."""
    folder = tmp_path_factory.mktemp("numbered")
    frames = torch.stack([torch.full((16, 24, 3), 20 * t, dtype=torch.uint8) for t in range(12)])
    for suffix in ("gif", "mp4", "webp"):
        write_video(Video(frames, 20.0), folder / f"a.{suffix}")
    return {path.suffix[1:]: path.read_bytes() for path in folder.iterdir()}


def frame_numbers(pixels: Tensor | None) -> list[int]:
    assert pixels is not None
    return (pixels.float().mean((0, 2, 3)) / 20).round().int().tolist()


@pytest.mark.parametrize("size", [(8, 8), (20, 8), (8, 20), (5, 7), (1, 30)])
def test_crops_are_square(size: tuple[int, int]) -> None:
    assert crop_square(Image.new("RGB", size), 8).size == (8, 8)


def test_crop_takes_the_middle() -> None:
    image = Image.new("RGB", (24, 8), "red")
    image.paste("blue", (8, 0, 16, 8))
    assert crop_square(image, 8).getpixel((4, 4)) == (0, 0, 255)


def test_a_picture_of_the_right_size_keeps_its_bytes() -> None:
    values = np.random.default_rng(0).integers(0, 256, (16, 16, 3), np.uint8)
    pixels = image_square({"__key__": "k", "png": png(Image.fromarray(values))}, 16)
    assert pixels is not None
    assert pixels.dtype == torch.uint8
    assert torch.equal(pixels, torch.from_numpy(values).permute(2, 0, 1))


def test_samples_without_the_medium_give_nothing(numbered: dict[str, bytes]) -> None:
    assert image_square({"__key__": "k", "txt": b"words", "mp4": numbered["mp4"]}, 16) is None
    still = {"__key__": "k", "png": png(Image.new("RGB", (9, 9)))}
    assert clip_squares(still, 16, 5, 12.0) is None
    assert clip_squares({"__key__": "k", "txt": b"words"}, 16, 5, 12.0) is None


@pytest.mark.parametrize("suffix", ["gif", "mp4", "webp"])
@pytest.mark.parametrize(
    ("fps", "frames", "start", "expected"),
    [
        (20.0, 5, 0.0, [0, 1, 2, 3, 4]),
        (20.0, 5, 0.999, [7, 8, 9, 10, 11]),
        (20.0, 5, 0.5, [4, 5, 6, 7, 8]),
        (10.0, 5, 0.0, [0, 2, 4, 6, 8]),
        (10.0, 5, 0.999, [3, 5, 7, 9, 11]),
        (8.0, 5, 0.0, [0, 2, 5, 7, 10]),
        (50.0, 3, 0.0, [0, 1, 2]),  # slower than asked for: its own rate
        (5.0, 5, 0.999, [0, 4, 8, 11, 11]),  # shorter than asked for: it rests at its end
        (20.0, 14, 0.3, [*range(12), 11, 11]),
        (20.0, 1, 0.999, [11]),
    ],
)
def test_frames_of_a_clip(
    numbered: dict[str, bytes], suffix: str, fps: float, frames: int, start: float, expected: list[int]
) -> None:
    pixels = clip_squares({"__key__": "k", suffix: numbered[suffix]}, 8, frames, fps, start)
    assert pixels is not None
    assert pixels.shape == (3, frames, 8, 8)
    assert pixels.dtype == torch.uint8
    assert frame_numbers(pixels) == expected


def test_an_animation_is_also_its_first_picture(numbered: dict[str, bytes]) -> None:
    pixels = image_square({"__key__": "k", "webp": numbered["webp"]}, 8)
    assert pixels is not None
    assert int(pixels.max()) < 10


def test_broken_media_are_named_by_their_key(numbered: dict[str, bytes]) -> None:
    for suffix, read in (("png", image_square), ("webp", image_square)):
        with pytest.raises(PlaitError, match=r"^key: "):
            read({"__key__": "key", suffix: b"no image"}, 8)
    for suffix in ("gif", "mp4", "webp"):
        with pytest.raises(PlaitError, match=r"^key: ") as caught:
            clip_squares({"__key__": "key", suffix: numbered[suffix][: len(numbered[suffix]) // 2]}, 8, 5, 12.0)
        assert "\n" not in str(caught.value)


def crops(encoder: CropEncoder, folder: Path, scratch: Path, n: int) -> Tensor:
    loader = open_loader([folder], encoder, kind="raw", scratch=scratch, batch_size=4, seed=0, shuffle_buffer=8)
    found = list(islice(batches(loader), n))
    loader._iterator._shutdown_workers()  # type: ignore[attr-defined]
    return torch.cat(found)


def test_crops_come_mirrored_half_of_the_time(raw: Path, tmp_path: Path) -> None:
    plain, mirrored = (crops(ImageEncoder(recipe(flip=flip)), raw, tmp_path, 30) for flip in (False, True))
    turned = [torch.equal(a.flip(-1), b) and not torch.equal(a, b) for a, b in zip(plain, mirrored, strict=True)]
    same = [torch.equal(a, b) for a, b in zip(plain, mirrored, strict=True)]
    assert sum(turned) + sum(same) == 120
    assert 35 < sum(turned) < 85
    assert torch.equal(mirrored, crops(ImageEncoder(recipe(flip=True)), raw, tmp_path, 30))
    assert not torch.equal(mirrored, crops(ImageEncoder(recipe(flip=True, seed=1)), raw, tmp_path, 30))
    # The two times that a picture comes by are drawn apart.
    rounds: dict[bytes, set[bool]] = {}
    for picture, turn in zip(plain, turned, strict=True):
        rounds.setdefault(picture.numpy().tobytes(), set()).add(turn)
    assert {True, False} in rounds.values()


def test_shift_moves_and_repeats_the_edge(tmp_path: Path) -> None:
    values = np.random.default_rng(0).integers(0, 256, (16, 16, 3), np.uint8)
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.png").write_bytes(png(Image.fromarray(values)))
    pack(tmp_path / "in", tmp_path / "raw")
    found = set()
    edged = np.pad(values, ((3, 3), (3, 3), (0, 0)), mode="edge")
    windows = {
        edged[y : y + 16, x : x + 16].transpose(2, 0, 1).tobytes(): (y - 3, x - 3) for y in range(7) for x in range(7)
    }
    for crop in crops(ImageEncoder(recipe(flip=False, shift=3)), tmp_path / "raw", tmp_path, 25):
        found.add(windows[crop.numpy().tobytes()])
    assert {y for y, _ in found} == {x for _, x in found} == set(range(-3, 4))


def test_clips_move_as_one(clips: Path, tmp_path: Path) -> None:
    config = ClipConfig(shards=["c"], heldout="c", frames=3, fps=25.0)
    plain = crops(ClipEncoder(recipe(flip=False, clips=config)), clips, tmp_path, 8)
    moved = crops(ClipEncoder(recipe(flip=True, shift=2, clips=config)), clips, tmp_path, 8)
    assert plain.shape == moved.shape == (32, 3, 3, 16, 16)
    assert moved.dtype == torch.uint8
    for before, after in zip(plain, moved, strict=True):
        # Each frame is a window of that frame with its edge repeated; the same window fits them all.
        fitting = []
        for film in (before, before.flip(-1)):
            edged = F.pad(film.flatten(0, 1).float(), (2, 2, 2, 2), mode="replicate").to(torch.uint8)
            windows = (edged[:, y : y + 16, x : x + 16] for y in range(5) for x in range(5))
            fitting += [torch.equal(window.reshape(after.shape), after) for window in windows]
        assert any(fitting)
    assert not torch.equal(plain, moved)


def test_unreadable_media_are_skipped_and_named_once(
    emoji: Path, numbered: dict[str, bytes], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    source = tmp_path / "in"
    source.mkdir()
    picture = next((emoji / "noto").glob("*.png")).read_bytes()
    for name, content in (
        ("good.png", picture), ("cut.png", picture[:60]), ("words.txt", b"text"), ("film.mp4", numbered["mp4"]),
        ("half.mp4", numbered["mp4"][:900]),
    ):  # fmt: skip
        (source / name).write_bytes(content)
    pack(source, tmp_path / "raw")
    good = crops(ImageEncoder(recipe(flip=False)), tmp_path / "raw", tmp_path, 4)
    assert all(torch.equal(crop, good[0]) for crop in good)
    assert capfd.readouterr().out.count("skipped cut") == 1
    config = ClipConfig(shards=["c"], heldout=str(tmp_path / "raw"), frames=5, fps=20.0)
    films = crops(ClipEncoder(recipe(flip=False, clips=config)), tmp_path / "raw", tmp_path, 4)
    assert all(frame_numbers(film) in [[s + t for t in range(5)] for s in range(8)] for film in films)
    assert len({tuple(frame_numbers(film)) for film in films}) > 1
    assert capfd.readouterr().out.count("skipped half") == 1
    heldout = load_heldout(recipe(heldout=str(tmp_path / "raw"), clips=config))
    assert len(heldout["images"]) == len(heldout["clips"]) == 1
    assert frame_numbers(heldout["clips"][0]) == [0, 1, 2, 3, 4]
    out = capfd.readouterr().out
    assert out.count("skipped cut") == 1
    assert out.count("skipped half") == 1


def test_heldout(raw: Path, clips: Path, tmp_path: Path) -> None:
    images = load_heldout(recipe(heldout=str(raw)))
    assert {name: items.shape for name, items in images.items()} == {"images": (60, 3, 16, 16)}
    assert images["images"].dtype == torch.uint8
    both = load_heldout(recipe(heldout=str(raw), clips=ClipConfig(heldout=str(clips), frames=9)))
    assert both["clips"].shape == (9, 3, 9, 16, 16)
    assert torch.equal(both["images"], images["images"])
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.txt").write_text("no image")
    pack(tmp_path / "in", tmp_path / "words")
    for values in ({"heldout": str(tmp_path / "words")}, {"heldout": str(raw), "clips": ClipConfig(heldout=str(raw))}):
        with pytest.raises(PlaitError, match=r": holds nothing that can be read"):
            load_heldout(recipe(**values))
