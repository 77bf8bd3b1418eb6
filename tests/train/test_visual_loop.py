import json
import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import nn

from plait.errors import PlaitError
from plait.tokenizers.loading import load_tokenizer
from plait.tokenizers.visual import VisualTokenizer
from plait.train.loader import batches, open_loader
from plait.train.pack import pack
from plait.train.recipe import VisualTokenizerRecipe
from plait.train.recipe_file import load_recipe
from plait.train.visual_loop import (
    ImageEncoder,
    crop_square,
    evaluate,
    load_heldout,
    reconstruction_loss,
    train_visual,
    update_average,
)


def recipe(**values: Any) -> VisualTokenizerRecipe:
    return VisualTokenizerRecipe(["a"], "h", "o", **values)


def flat(values: Any) -> list[float]:
    return [x for value in values for x in flat(value)] if isinstance(values, list) else [values]


def test_loss_is_its_formula() -> None:
    generator = torch.Generator().manual_seed(0)
    decoded, pixels = (torch.rand(3, 3, 4, 4, generator=generator) * 2 - 1 for _ in range(2))
    pixels[2] = decoded[2]
    absolute, squared, logarithm = 0.0, 0.0, 0.0
    for d, p in zip(decoded.tolist(), pixels.tolist(), strict=True):
        errors = [a - b for a, b in zip(flat(d), flat(p), strict=True)]
        absolute += sum(abs(e) for e in errors) / len(errors) / 3
        mean = sum(e * e for e in errors) / len(errors)
        squared += mean / 3
        logarithm += math.log(max(mean, 1e-5)) / 3
    for l1, l2, log_l2 in ((1, 0, 0), (0, 1, 0), (0, 0, 1), (0.3, 0.5, 0.07)):
        loss = reconstruction_loss(decoded, pixels, recipe(l1=l1, l2=l2, log_l2=log_l2))
        assert float(loss) == pytest.approx(l1 * absolute + l2 * squared + log_l2 * logarithm, rel=1e-5)


def test_average_moves_its_share() -> None:
    average, model = nn.Linear(1, 1), nn.Linear(1, 1)
    average.requires_grad_(False).weight.fill_(1)
    model.requires_grad_(False).weight.fill_(3)
    update_average(average, model, 0.75)
    assert average.weight.item() == 1.5
    assert model.weight.item() == 3


@pytest.mark.parametrize("size", [(8, 8), (20, 8), (8, 20), (5, 7), (1, 30)])
def test_crops_are_square(size: tuple[int, int]) -> None:
    assert crop_square(Image.new("RGB", size), 8).size == (8, 8)


def test_crop_takes_the_middle() -> None:
    image = Image.new("RGB", (24, 8), "red")
    image.paste("blue", (8, 0, 16, 8))
    assert crop_square(image, 8).getpixel((4, 4)) == (0, 0, 255)


def test_heldout_images(raw: Path, tmp_path: Path) -> None:
    images = load_heldout(VisualTokenizerRecipe([str(raw)], str(raw), "o", image_size=16))
    assert images.shape == (60, 3, 16, 16)
    assert images.dtype == torch.uint8
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.txt").write_text("no image")
    pack(tmp_path / "in", tmp_path / "raw")
    with pytest.raises(PlaitError, match="raw: holds no images that can be read"):
        load_heldout(VisualTokenizerRecipe([str(raw)], str(tmp_path / "raw"), "o"))


def test_evaluation_does_not_depend_on_the_batch(visual_tokenizer: VisualTokenizer, raw: Path) -> None:
    images = load_heldout(VisualTokenizerRecipe([str(raw)], str(raw), "o", image_size=32))[:10]
    one, sheet = evaluate(visual_tokenizer, images, batch=3)
    two, _ = evaluate(visual_tokenizer, images, batch=10)
    assert one == pytest.approx(two, rel=1e-4)
    assert 0 < one["codebook_use"] <= 60
    assert sheet.width > 32


def crops(folder: Path, scratch: Path, flip: bool, seed: int = 0, n: int = 6) -> list[torch.Tensor]:
    encoder = ImageEncoder(16, flip, seed)
    loader = open_loader([folder], encoder, kind="raw", scratch=scratch, batch_size=4, seed=seed)
    found = list(islice(batches(loader), n))
    loader._iterator._shutdown_workers()  # type: ignore[attr-defined]
    return found


def test_crops_come_mirrored_half_of_the_time(raw: Path, tmp_path: Path) -> None:
    plain, mirrored = (torch.cat(crops(raw, tmp_path, flip, n=15)) for flip in (False, True))
    turned = sum(torch.equal(a.flip(-1), b) and not torch.equal(a, b) for a, b in zip(plain, mirrored, strict=True))
    same = sum(torch.equal(a, b) for a, b in zip(plain, mirrored, strict=True))
    assert turned + same == 60
    assert 12 < turned < 48
    assert torch.equal(mirrored, torch.cat(crops(raw, tmp_path, True, n=15)))


def test_unreadable_images_are_skipped_and_named(
    emoji: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    source = tmp_path / "in"
    source.mkdir()
    data = next((emoji / "noto").glob("*.png")).read_bytes()
    for name, content in (("good.png", data), ("cut.png", data[:60]), ("words.txt", b"text")):
        (source / name).write_bytes(content)
    pack(source, tmp_path / "raw")
    good = crops(tmp_path / "raw", tmp_path, False, n=4)
    assert all(torch.equal(crop, good[0][0]) for batch in good for crop in batch)
    assert capfd.readouterr().out.count("skipped cut") == 1
    heldout = load_heldout(VisualTokenizerRecipe(["a"], str(tmp_path / "raw"), "o", image_size=16))
    assert len(heldout) == 1
    assert capfd.readouterr().out.count("skipped cut") == 1


CONFIG = """
kind: visual-tokenizer
image_size: 32
batch_size: 8
steps: 20
eval_every: 10
optimizer: {lr: 5.0e-3, warmup_steps: 2}
model: {patch: 4, widths: [8, 16], encoder_blocks: 1, decoder_blocks: 1, levels: [5, 4, 3]}
store: float32
"""


@pytest.fixture
def config(raw: Path, tmp_path: Path) -> Path:
    (tmp_path / "recipe.yaml").write_text(f"{CONFIG}shards: ['{raw}']\nheldout: '{raw}'\nout: '{tmp_path / 'run'}'\n")
    return tmp_path / "recipe.yaml"


def run(config: Path, *overrides: str) -> VisualTokenizer:
    recipe = load_recipe(str(config), overrides)
    assert isinstance(recipe, VisualTokenizerRecipe)
    return train_visual(recipe)


def test_loss_that_is_no_number_saves_nothing(config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(decoded: torch.Tensor, *_: Any) -> torch.Tensor:
        return decoded.mean() * math.nan

    monkeypatch.setattr("plait.train.visual_loop.reconstruction_loss", broken)
    with pytest.raises(PlaitError, match=r"loss is nan at step 1; lower optimizer\.lr"):
        run(config, "eval_every=1")
    assert not (tmp_path / "run" / "checkpoint.pt").exists()
    assert not (tmp_path / "run" / "tokenizer").exists()


def test_run_goes_on_with_its_recipe_only(config: Path, tmp_path: Path) -> None:
    run(config, "steps=2", "log_every=1")
    assert sorted(metrics(tmp_path / "run", "loss")) == [1, 2]
    for override in ("l1=0.5", "model.widths=[8, 8]"):
        with pytest.raises(PlaitError, match=rf"run: the run began with {override.partition('=')[0]}"):
            run(config, "steps=3", override)
    run(config, "steps=3", "log_every=1")
    assert sorted(metrics(tmp_path / "run", "loss")) == [1, 2, 3]
    # A checkpoint that is not what the recipe beside it says.
    (tmp_path / "run" / "recipe.yaml").unlink()
    with pytest.raises(PlaitError, match="run: its checkpoint is not of this recipe's model") as caught:
        run(config, "steps=4", "model.widths=[8, 8]")
    assert "\n" not in str(caught.value)


def metrics(out: Path, name: str) -> dict[int, float]:
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return {row["step"]: row[name] for row in rows if name in row}


@pytest.mark.slow
def test_run_writes_tokenizer_sheet_and_metrics(
    config: Path, raw: Path, tmp_path: Path, plait: Callable[..., Any]
) -> None:
    done = plait("tokenizer", "train", config, "steps=100", "eval_every=50", "--json")
    assert done.returncode == 0, done.stderr
    out = tmp_path / "run"
    assert json.loads(done.stdout.splitlines()[-1]) == {"tokenizer": str(out / "tokenizer")}
    tokenizer = load_tokenizer(out / "tokenizer")
    losses, quality = metrics(out, "loss"), metrics(out, "heldout_psnr")
    assert losses[100] < losses[50]
    assert quality[100] > quality[50]
    figures, _ = evaluate(tokenizer, load_heldout(VisualTokenizerRecipe(["a"], str(raw), "o", image_size=32)))
    # Stored in float32, so what was measured is what is loaded.
    assert metrics(out, "stored_heldout_psnr")[100] == pytest.approx(figures["heldout_psnr"], rel=1e-4)
    assert quality[100] == pytest.approx(figures["heldout_psnr"], rel=1e-4)
    assert Image.open(out / "reconstructions.png").width > 32


@pytest.mark.slow
def test_killed_run_goes_on_exactly(config: Path, tmp_path: Path, plait: Callable[..., Any]) -> None:
    out, plan = tmp_path / "run", ["steps=40", "eval_every=10"]
    command = [sys.executable, "-m", "plait", "tokenizer", "train", str(config), *plan]
    with (tmp_path / "log").open("w") as log:
        process = subprocess.Popen(
            command, stdout=log, stderr=log, start_new_session=True, env={**os.environ, "OMP_NUM_THREADS": "1"}
        )
        while not ((out / "metrics.jsonl").exists() and 20 in metrics(out, "heldout_psnr")):
            assert process.poll() is None, (tmp_path / "log").read_text()
            time.sleep(0.02)
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    step = torch.load(out / "checkpoint.pt", weights_only=False)["step"]
    assert 10 <= step < 40
    for folder in (out, tmp_path / "whole"):
        done = plait("tokenizer", "train", config, *plan, f"out={folder}")
        assert done.returncode == 0, done.stderr
    for name in ("loss", "heldout_psnr", "stored_heldout_psnr"):
        assert metrics(out, name) == pytest.approx(metrics(tmp_path / "whole", name), rel=1e-5)
    assert len(metrics(out, "heldout_psnr")) == 4


@pytest.mark.slow
def test_bad_input_is_one_line(config: Path, plait: Callable[..., Any]) -> None:
    for override, reason in (("shards=[nowhere]", "nowhere: no such folder"), ("stes=1", "'steps'")):
        done = plait("tokenizer", "train", config, override)
        assert done.returncode == 2
        assert reason in done.stderr
        assert len(done.stderr.splitlines()) == 1
