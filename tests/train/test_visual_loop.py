"""Real runs of tiny visual tokenizers."""

import json
import math
import multiprocessing
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import nn

from plait.__main__ import main
from plait.errors import PlaitError
from plait.tokenizers.loading import load_tokenizer
from plait.tokenizers.metrics import psnr
from plait.tokenizers.visual import VisualConfig, VisualTokenizer
from plait.train import visual_loop
from plait.train.crops import load_heldout
from plait.train.pack import pack
from plait.train.recipe import LossConfig, VisualTokenizerRecipe
from plait.train.recipe_file import load_recipe
from plait.train.tokenizer_loop import update_average
from plait.train.visual_loop import (
    Data,
    Trainer,
    evaluate,
    initialise,
    reconstruction_losses,
    to_float,
    train_visual,
)

pytestmark = pytest.mark.usefixtures("_end_workers")

BIN = Path(sys.executable).parent
Fork = Callable[[int, Path, Callable[[int], Any]], list[int]]
CONFIG = """
kind: visual-tokenizer
image_size: 32
batch_size: 8
streams: 2
steps: 3
log_every: 1
eval_every: 100
optimizer: {lr: 5.0e-3, warmup_steps: 2}
model: {patch: 4, widths: [8, 16], encoder_blocks: 1, decoder_blocks: 1, quantizer: {levels: [5, 4, 3]}}
clips: {batch_size: 4, frames: 5, fps: 12, share: 0.5}
store: float32
"""
ADVERSARIAL = (
    "adversarial={weight: 0.1, adaptive: true, lecam: 0.01, start_generator: 2, ramp: 2, "
    "discriminator: {kind: patch3d, width: 8, layers: 2}}"
)
VQ_EMA = "model.quantizer={kind: vq_ema, codebook_size: 16, dim: 4, dead_code: 0.5}"


@pytest.fixture
def config(raw: Path, tmp_path: Path) -> Path:
    (tmp_path / "recipe.yaml").write_text(f"{CONFIG}shards: ['{raw}']\nheldout: '{raw}'\nout: '{tmp_path / 'run'}'\n")
    return tmp_path / "recipe.yaml"


@pytest.fixture
def films(clips: Path) -> tuple[str, ...]:
    """What a run needs to train on clips too."""
    return f"clips.shards=['{clips}']", f"clips.heldout='{clips}'", "model.temporal_factor=2"


def read(config: Path, *overrides: str) -> VisualTokenizerRecipe:
    recipe = load_recipe(str(config), overrides)
    assert isinstance(recipe, VisualTokenizerRecipe)
    return recipe


def run(config: Path, *overrides: str) -> Path:
    return train_visual(read(config, *overrides))


def metrics(out: Path, name: str) -> dict[int, float]:
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    steps = [row["step"] for row in rows if name in row]
    assert len(steps) == len(set(steps))
    return {row["step"]: row[name] for row in rows if name in row}


def figures(out: Path) -> dict[str, dict[int, float]]:
    """All figures but times and those of the live codebook, which begin anew when a run goes on."""
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    names = {name for row in rows for name in row if not name.startswith(("step", "seconds", "live_", "dead_"))}
    return {name: metrics(out, name) for name in sorted(names)}


# Parts


@pytest.mark.parametrize("shape", [(3, 3, 4, 4), (3, 3, 5, 4, 4)])
def test_losses_are_their_formulas(shape: tuple[int, ...]) -> None:
    generator = torch.Generator().manual_seed(0)
    decoded, pixels = (torch.rand(shape, generator=generator) * 2 - 1 for _ in range(2))
    error = (decoded - pixels).double().reshape(3, -1)
    terms = reconstruction_losses(
        decoded, pixels, VisualTokenizerRecipe(["a"], "h", "o", loss=LossConfig(0.3, 0.5, 0.07)), 1, None
    )
    assert terms.keys() == {"l1", "l2", "log_l2"}
    assert float(terms["l1"]) == pytest.approx(0.3 * float(error.abs().mean()), rel=1e-5)
    assert float(terms["l2"]) == pytest.approx(0.5 * float((error**2).mean()), rel=1e-5)
    assert float(terms["log_l2"]) == pytest.approx(0.07 * float((error**2).mean(1).log().mean()), rel=1e-5)


def test_no_loss_is_zero_and_has_a_gradient() -> None:
    decoded = torch.ones(1, 3, 2, 2, requires_grad=True)
    recipe = VisualTokenizerRecipe(["a"], "h", "o", loss=LossConfig(0, 0, 0))
    (term,) = reconstruction_losses(decoded, torch.zeros(1, 3, 2, 2), recipe, 1, None).values()
    term.backward()
    assert term == 0
    assert decoded.grad is not None


def test_perceptual_term_comes_every_so_often_and_counts_as_much_more() -> None:
    class Distance(nn.Module):
        def forward(self, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
            assert a.shape == b.shape == (6, 3, 4, 4)
            return (a - b).abs().flatten(1).mean(1)

    decoded, pixels = torch.zeros(2, 3, 3, 4, 4), torch.full((2, 3, 3, 4, 4), 0.5)
    recipe = VisualTokenizerRecipe(["a"], "h", "o", loss=LossConfig(perceptual=0.2, perceptual_every=3))
    found = [reconstruction_losses(decoded, pixels, recipe, step, Distance()) for step in range(1, 7)]
    assert ["perceptual" in terms for terms in found] == [False, False, True] * 2
    assert float(found[2]["perceptual"]) == pytest.approx(3 * 0.2 * 0.5)


def test_average_moves_its_share_and_copies_buffers() -> None:
    average, model = (nn.Sequential(nn.Linear(1, 1), nn.BatchNorm1d(1)) for _ in range(2))
    average.requires_grad_(False)[0].weight.fill_(1)
    model.requires_grad_(False)[0].weight.fill_(3)
    model[1].running_mean.fill_(7)
    update_average(average, model, 0.75)
    assert average[0].weight.item() == 1.5
    assert model[0].weight.item() == 3
    assert average[1].running_mean.item() == 7


def test_evaluation_does_not_depend_on_the_batch(config: Path, films: tuple[str, ...], tmp_path: Path) -> None:
    recipe = read(config, *films, "model.quantizer={kind: rvq, codebook_size: 8, dim: 3, codebooks: 2}")
    torch.manual_seed(0)
    tokenizer = VisualTokenizer(recipe.model).eval()
    heldout = {name: items[:7] for name, items in load_heldout(recipe).items()}
    one, sheets = evaluate(tokenizer, heldout, batch=3)
    two, _ = evaluate(tokenizer, heldout, batch=64)
    assert one == pytest.approx(two, rel=1e-4)
    assert sheets.keys() == {"images", "clips"}
    pixels = to_float(heldout["clips"])
    decoded = tokenizer.decode(tokenizer.encode(pixels))
    assert one["clip_psnr"] == pytest.approx(float(psnr(decoded, pixels).mean()), rel=1e-5)
    assert {"image_ssim", "clip_ssim", "image_thumbnail_psnr", "codebook_use_0", "codebook_perplexity_1"} <= set(one)


def test_passes_hold_the_same_items_in_the_order_of_the_ranks(config: Path, films: tuple[str, ...]) -> None:
    recipe = read(config, *films, "accumulate=2", "streams=4", "batch_size=16", "clips.batch_size=8")
    alone, *ranks = [Data(recipe, 0, 1), Data(recipe, 0, 2), Data(recipe, 1, 2)]
    for step in range(1, 7):
        whole, *parts = [data.next(step) for data in (alone, *ranks)]
        assert len(whole) == 2
        assert whole[0].ndim == (5 if step % 2 == 0 else 4)
        for j in range(2):
            assert torch.equal(whole[j], torch.cat([part[j] for part in parts]))


# Starting from another tokenizer


def saved(folder: Path, **values: Any) -> VisualTokenizer:
    torch.manual_seed(1)
    base = {"patch": 4, "widths": (8, 16), "encoder_blocks": 1, "decoder_blocks": 1}
    tokenizer = VisualTokenizer(VisualConfig(**{**base, **values})).eval()
    tokenizer.save_pretrained(folder, dtype=torch.float32)
    return tokenizer


def test_a_run_starts_from_its_init(config: Path, films: tuple[str, ...], tmp_path: Path) -> None:
    image = saved(tmp_path / "image")
    settings = (f"init='{tmp_path / 'image'}'", "model.quantizer.levels=[8,5,5,5]", "model.quantizer.entropy=0.1")
    same = Trainer(read(config, *settings), torch.device("cpu"))
    for name, tensor in image.state_dict().items():
        assert torch.equal(same.model.state_dict()[name], tensor)
        assert torch.equal(same.average.state_dict()[name], tensor)
    video = Trainer(read(config, *settings, *films), torch.device("cpu")).model.eval()
    still = torch.rand(1, 3, 32, 32) * 2 - 1
    resting = still[:, :, None].expand(1, 3, 5, 32, 32)
    codes = image.encode(still).codes
    assert torch.equal(video.encode(still).codes, codes)
    assert (video.encode(resting).codes == codes.reshape(1, 1, 4, 4)).all()


@pytest.mark.parametrize(
    ("its", "key"),
    [
        ({"stem": "haar"}, "stem"),
        ({"widths": (8, 8)}, "widths"),
        ({"decoder_blocks": 2}, "decoder_blocks"),
        ({"decoder_norm": "spatial"}, "decoder_norm"),
        ({"temporal_factor": 4}, "temporal_factor"),
    ],
)
@pytest.mark.parametrize("temporal_factor", [1, 2])
def test_init_of_another_architecture(its: dict[str, Any], key: str, temporal_factor: int, tmp_path: Path) -> None:
    saved(tmp_path / "other", **its)
    base = {"patch": 4, "widths": (8, 16), "encoder_blocks": 1, "decoder_blocks": 1}
    model = VisualTokenizer(VisualConfig(**base, temporal_factor=temporal_factor))
    with pytest.raises(PlaitError, match=f"^init: .*other has {key} ") as caught:
        initialise(model, str(tmp_path / "other"))
    assert "\n" not in str(caught.value)


def test_init_with_other_levels(config: Path, tmp_path: Path) -> None:
    saved(tmp_path / "image")
    with pytest.raises(PlaitError, match=r"other|quantizer\.levels"):
        run(config, f"init='{tmp_path / 'image'}'")


# Whole runs


@pytest.mark.slow
@pytest.mark.parametrize(
    "quantizer",
    [
        "{kind: fsq, levels: [5, 4, 3], entropy: 0.1}",
        "{kind: vq_ema, codebook_size: 8, dim: 4}",
        "{kind: vq_grad, codebook_size: 8, dim: 4}",
        "{kind: lfq, codebook_size: 16, entropy: 0.1}",
        "{kind: bsq, codebook_size: 16, entropy: 0.1}",
        "{kind: simvq, codebook_size: 8, dim: 4}",
        "{kind: rvq, codebook_size: 8, dim: 4, codebooks: 3, dropout: 0.5}",
    ],
)
def test_quantizers_learn(quantizer: str, config: Path, tmp_path: Path) -> None:
    folder = run(config, f"model.quantizer={quantizer}", "steps=12", "log_every=2")
    psnrs = list(metrics(tmp_path / "run", "psnr").values())
    assert psnrs[-1] > psnrs[0] + 1
    tokenizer = load_tokenizer(folder)
    assert isinstance(tokenizer, VisualTokenizer)
    found, _ = evaluate(tokenizer, load_heldout(read(config)))
    assert metrics(tmp_path / "run", "stored_image_psnr")[12] == pytest.approx(found["image_psnr"], rel=1e-4)
    uses = [name for name in figures(tmp_path / "run") if name.startswith("codebook_use")]
    assert len(uses) == (3 if "rvq" in quantizer else 1)


@pytest.mark.slow
@pytest.mark.parametrize(
    "overrides",
    [
        ("model.temporal_factor=1",),
        ("shards=[]", "clips.share=1", "model.temporal_factor=4"),
        (
            "model={stem: haar, decoder_norm: spatial, widths: [8, 32], attention: [1]}", "precision=bfloat16",
            "loss={ssim: 0.1, temporal: 0.1}", "flip=true", "shift=2",
        ),
        (ADVERSARIAL, "clips.share=0.7", "accumulate=2", "precision=bfloat16"),
    ],
)  # fmt: skip
def test_images_and_clips(overrides: tuple[str, ...], config: Path, films: tuple[str, ...], tmp_path: Path) -> None:
    run(config, *films, *overrides, "steps=4")
    out = tmp_path / "run"
    assert len(metrics(out, "loss")) == 4
    assert metrics(out, "stored_clip_psnr").keys() == metrics(out, "stored_image_psnr").keys() == {4}
    assert Image.open(out / "clips.png").width > Image.open(out / "images.png").height > 32
    if "adversarial" in overrides[0]:
        assert metrics(out, "generator_loss").keys() == {2, 3, 4}
        assert metrics(out, "discriminator_loss").keys() == {1, 2, 3, 4}


@pytest.mark.slow
def test_trains_by_the_command_line(config: Path, raw: Path, tmp_path: Path, plait: Callable[..., Any]) -> None:
    done = plait("tokenizer", "train", config, "steps=40", "eval_every=20", "streams=1", "--json")
    assert done.returncode == 0, done.stderr
    out = tmp_path / "run"
    assert json.loads(done.stdout.splitlines()[-1]) == {"tokenizer": str(out / "tokenizer")}
    losses, quality = metrics(out, "loss"), metrics(out, "image_psnr")
    assert losses[40] < losses[1]
    assert quality[40] > quality[20]
    tokenizer = load_tokenizer(out / "tokenizer")
    assert isinstance(tokenizer, VisualTokenizer)
    found, _ = evaluate(tokenizer, load_heldout(read(config)))
    # Stored in float32, so what was measured is what is loaded.
    assert metrics(out, "stored_image_psnr")[40] == pytest.approx(found["image_psnr"], rel=1e-4)
    assert quality[40] == pytest.approx(found["image_psnr"], rel=1e-4)


# Several processes


@pytest.mark.slow
@pytest.mark.parametrize(
    "settings",
    [
        ("model.quantizer.entropy=0.1", "accumulate=2", "loss={ssim: 0.1, temporal: 0.1, log_l2: 0.02}"),
        (VQ_EMA, ADVERSARIAL, "accumulate=2"),
    ],
)
def test_two_processes_equal_one(
    settings: tuple[str, ...], config: Path, films: tuple[str, ...], tmp_path: Path, fork: Fork
) -> None:
    plan = (*films, *settings, "steps=6", "eval_every=3")
    codes = [
        fork(n, tmp_path / f"log{n}", lambda _, n=n: run(config, *plan, f"out={tmp_path / str(n)}")) for n in (1, 2)
    ]
    assert codes == [[0], [0, 0]], (tmp_path / "log2-1").read_text()
    one, two = (figures(tmp_path / str(n)) for n in (1, 2))
    assert one.keys() == two.keys()
    for name in one:
        assert two[name] == pytest.approx(one[name], rel=1e-3, abs=1e-5), name
    assert two["loss"] == pytest.approx(one["loss"], rel=1e-5)
    weights, again = (load_file(tmp_path / str(n) / "tokenizer" / "model.safetensors") for n in (1, 2))
    for name, tensor in weights.items():
        assert torch.allclose(tensor, again[name], rtol=1e-3, atol=1e-4), name
    if VQ_EMA in settings:
        assert torch.allclose(weights["quantizer.codebook"], again["quantizer.codebook"], atol=1e-4)
    facts = json.loads((tmp_path / "2" / "run.json").read_text())
    assert facts["processes"] == 2


@pytest.mark.slow
def test_codebooks_that_part_are_noticed(config: Path, tmp_path: Path, fork: Fork) -> None:
    def work(rank: int) -> None:
        step = Trainer.step

        def parted(self: Trainer, number: int, passes: list[torch.Tensor]) -> dict[str, torch.Tensor]:
            found = step(self, number, passes)
            self.model.quantizer.codebook[3, 1] += rank * 1e-6
            return found

        Trainer.step = parted  # type: ignore[method-assign]
        run(config, VQ_EMA, "steps=2")

    assert fork(2, tmp_path / "log", work) == [2, 2]
    assert "the processes' codebooks differ" in (tmp_path / "log-0").read_text()
    assert not (tmp_path / "run" / "checkpoint.pt").exists()


@pytest.mark.slow
def test_a_loss_that_is_no_number_on_one_process_stops_all(config: Path, tmp_path: Path, fork: Fork) -> None:
    def work(rank: int) -> None:
        if rank == 1:
            losses = visual_loop.reconstruction_losses
            visual_loop.reconstruction_losses = lambda decoded, pixels, recipe, step, network: {
                name: term * (math.nan if step == 2 else 1)
                for name, term in losses(decoded, pixels, recipe, step, network).items()
            }
        run(config, "accumulate=2", "eval_every=1")

    assert fork(2, tmp_path / "log", work) == [2, 2]
    for rank in (0, 1):
        assert "is nan at step 2; lower optimizer.lr" in (tmp_path / f"log-{rank}").read_text()
    assert torch.load(tmp_path / "run" / "checkpoint.pt", weights_only=False)["step"] == 1


@pytest.mark.slow
def test_a_process_that_ends_does_not_leave_the_other_waiting(config: Path, tmp_path: Path, fork: Fork) -> None:
    def work(rank: int) -> None:
        following = Data.next

        def ending(self: Data, step: int) -> list[torch.Tensor]:
            if rank == 1 and step == 2:
                os._exit(7)
            return following(self, step)

        Data.next = ending  # type: ignore[method-assign]
        run(config)

    assert fork(2, tmp_path / "log", work) == [1, 7]


@pytest.mark.slow
@pytest.mark.parametrize(
    "launcher",
    [
        [str(BIN / "torchrun"), "--standalone", "--nproc_per_node", "2", "-m", "plait"],
        [sys.executable, str(BIN / "deepspeed"), "--num_accelerators", "2", "--module", "plait"],
    ],
    ids=["torchrun", "deepspeed"],
)
def test_launchers(launcher: list[str], config: Path, tmp_path: Path) -> None:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "PATH": f"{BIN}:{os.environ['PATH']}"}
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        environment.pop(name, None)
    command = [*launcher, "tokenizer", "train", str(config), "--json"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=240)
    assert done.returncode == 0, done.stdout + done.stderr
    reports = [line for line in done.stdout.splitlines() if '{"tokenizer"' in line]
    assert len(reports) == 1
    assert json.loads(reports[0][reports[0].index("{") :]) == {"tokenizer": str(tmp_path / "run" / "tokenizer")}
    run(config, f"out={tmp_path / 'alone'}")
    assert metrics(tmp_path / "run", "loss") == pytest.approx(metrics(tmp_path / "alone", "loss"), rel=1e-5)


# Going on


def scalars(out: Path, name: str) -> list[int]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(out / "tensorboard"))
    events.Reload()
    return [event.step for event in events.Scalars(name)]


@pytest.mark.slow
@pytest.mark.parametrize(
    "settings",
    [
        (VQ_EMA, ADVERSARIAL, "clips.share=0.4"),
        # What is drawn at random goes on too; and the run is killed before the first clip.
        ("model.quantizer={kind: rvq, codebook_size: 8, dim: 4, codebooks: 3, dropout: 0.5}", "clips.share=0.2"),
    ],
)
def test_a_killed_run_goes_on_exactly(
    settings: tuple[str, ...], config: Path, films: tuple[str, ...], tmp_path: Path, fork: Fork
) -> None:
    plan = (*films, *settings, "steps=6", "eval_every=2")

    def killed(_: int) -> None:
        following = Data.next

        def next_or_die(self: Data, step: int) -> list[torch.Tensor]:
            if step == 4:
                os.kill(os.getpid(), signal.SIGKILL)
            return following(self, step)

        Data.next = next_or_die  # type: ignore[method-assign]
        run(config, *plan)

    assert fork(1, tmp_path / "log", killed) == [-signal.SIGKILL]
    out = tmp_path / "run"
    assert torch.load(out / "checkpoint.pt", weights_only=False)["step"] == 2
    assert sorted(metrics(out, "loss")) == [1, 2, 3]
    run(config, *plan)
    run(config, *plan, f"out={tmp_path / 'whole'}")
    found, whole = figures(out), figures(tmp_path / "whole")
    assert found.keys() == whole.keys()
    for name in whole:
        assert found[name] == pytest.approx(whole[name], rel=1e-6), name
    weights, again = (load_file(folder / "tokenizer" / "model.safetensors") for folder in (out, tmp_path / "whole"))
    assert all(torch.equal(tensor, again[name]) for name, tensor in weights.items())
    assert scalars(out, "loss") == [1, 2, 3, 4, 5, 6]
    assert scalars(out, "image_psnr") == [2, 4, 6]


@pytest.mark.slow
def test_a_run_goes_on_with_its_recipe_and_processes_only(
    config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fork: Fork
) -> None:
    run(config, "steps=2")
    assert sorted(metrics(tmp_path / "run", "loss")) == [1, 2]
    for override in ("loss.l1=0.5", "model.widths=[8, 8]", "clips.share=0.1", "streams=4"):
        with pytest.raises(PlaitError, match=rf"run: the run began with {override.partition('=')[0]}"):
            run(config, "steps=3", override)
    assert fork(2, tmp_path / "log", lambda _: run(config, "steps=3")) == [2, 2]
    assert "run: the run began with 1 processes, this is 2; start as many" in (tmp_path / "log-0").read_text()
    # A full disk leaves the checkpoint that there is.
    (tmp_path / "run" / "checkpoint.tmp").symlink_to("/dev/full")
    with pytest.raises(PlaitError, match=r"checkpoint\.pt: cannot be written \(.*\); make room") as caught:
        run(config, "steps=3")
    assert "\n" not in str(caught.value)
    assert torch.load(tmp_path / "run" / "checkpoint.pt", weights_only=False)["step"] == 2
    run(config, "steps=3")
    assert sorted(metrics(tmp_path / "run", "loss")) == [1, 2, 3]
    # A checkpoint that is not what the recipe beside it says.
    (tmp_path / "run" / "recipe.yaml").unlink()
    with pytest.raises(PlaitError, match="run: its checkpoint is not of this recipe's model") as caught:
        run(config, "steps=4", "model.widths=[8, 8]")
    assert "\n" not in str(caught.value)


# What goes wrong


@pytest.mark.parametrize("name", ["loss", "gradient"])
def test_what_is_no_number_saves_nothing(
    name: str, config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(decoded: torch.Tensor, *_: Any) -> dict[str, torch.Tensor]:
        # The root's value at 0 is a number, its gradient is none.
        return {"l1": decoded.mean() * math.nan if name == "loss" else (decoded.mean() * 0).sqrt()}

    monkeypatch.setattr(visual_loop, "reconstruction_losses", broken)
    with pytest.raises(PlaitError, match=rf"^{name} is nan at step 1; lower optimizer\.lr"):
        run(config, "eval_every=1")
    assert not (tmp_path / "run" / "checkpoint.pt").exists()
    assert not (tmp_path / "run" / "tokenizer").exists()


def test_two_runs_in_one_folder(config: Path, tmp_path: Path) -> None:
    held, go = multiprocessing.get_context("fork").Event(), multiprocessing.get_context("fork").Event()

    def hold() -> None:
        from plait.train.journal import Journal

        journal = Journal(tmp_path / "run", read(config))
        held.set()
        go.wait(60)
        del journal

    other = multiprocessing.get_context("fork").Process(target=hold)
    other.start()
    try:
        assert held.wait(60)
        with pytest.raises(PlaitError, match="another run is writing to this folder"):
            run(config)
    finally:
        go.set()
        other.join()


def test_shards_without_a_picture(config: Path, tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    for i in range(3):
        (tmp_path / "in" / f"{i}.txt").write_text("no image")
    pack(tmp_path / "in", tmp_path / "words")
    with pytest.raises(PlaitError) as caught:
        run(config, f"shards=['{tmp_path / 'words'}']")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("override", "reason"),
    [
        ("shards=[nowhere]", "nowhere: no such folder"),
        ("heldout=nowhere", "nowhere: no such folder"),
        ("init=nowhere", "nowhere"),
        ("stes=1", "'steps'"),
        ("streams=3", "batch_size is 8, expected a multiple of streams × accumulate, 3"),
    ],
)
def test_bad_input_is_one_line(
    override: str, reason: str, config: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["plait", "tokenizer", "train", str(config), override])
    with pytest.raises(SystemExit) as caught:
        main()
    assert caught.value.code == 2
    said = capsys.readouterr().err
    assert reason in said
    assert len(said.splitlines()) == 1
