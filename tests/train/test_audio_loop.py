"""Real runs of tiny audio tokenizers."""

import json
import math
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor

from plait.__main__ import main
from plait.errors import PlaitError
from plait.tokenizers.audio import AudioTokenizer
from plait.tokenizers.audio_metrics import mel_distance
from plait.tokenizers.loading import load_tokenizer
from plait.tokenizers.quantizer import Quantized, QuantizerConfig, build_quantizer
from plait.tokenizers.sound import read_sound
from plait.train import audio_loop
from plait.train.audio_loop import (
    Data,
    Trainer,
    evaluate,
    first_latents,
    initialise,
    teacher_distance,
    train_audio,
)
from plait.train.pack import pack
from plait.train.recipe import AudioTokenizerRecipe
from plait.train.recipe_file import load_recipe
from plait.train.shards import read_samples, shard_writer, write_manifest
from plait.train.sounds import load_heldout

pytestmark = pytest.mark.usefixtures("_end_workers")

Fork = Callable[[int, Path, Callable[[int], Any]], list[int]]
CONFIG = """
kind: audio-tokenizer
seconds: 0.1
batch_size: 8
streams: 2
steps: 3
log_every: 1
eval_every: 100
eval_items: 3
speed: [0.9, 1.1]
gain_db: [-6, 6]
loss: {wave: 1.0, stft: 0.3, windows: [128, 512], mels: [10, 30], stft_windows: [128]}
optimizer: {lr: 5.0e-3, warmup_steps: 2}
model:
  encoder: {hop: 160, window: 640, widths: [16], strides: [], blocks: [1]}
  decoder: {hop: 160, window: 640, widths: [16], strides: [], blocks: [1], causal: false}
  quantizer: {levels: [5, 4, 3]}
store: float32
"""
RVQ = "model.quantizer={kind: rvq, codebook_size: 8, dim: 4, codebooks: 3, dropout: 0.5}"
RVQ_L2 = "model.quantizer={kind: rvq_l2, codebook_size: 16, dim: 8, code_dim: 4, codebooks: 2, dropout: 0.5}"
ADVERSARIAL = (
    "adversarial={weight: 0.5, features: 0.5, start_generator: 2, ramp: 2, loss: least_squares, "
    "discriminator: {kinds: [period, bands], periods: [2], band_windows: [128], width: 1}}"
)


@pytest.fixture
def config(speech: Path, tmp_path: Path) -> Path:
    folders = f"shards: ['{speech}']\nheldout: '{speech}'\nout: '{tmp_path / 'run'}'\n"
    (tmp_path / "recipe.yaml").write_text(CONFIG + folders)
    return tmp_path / "recipe.yaml"


@pytest.fixture
def taught(speech: Path, tmp_path: Path) -> str:
    """The sounds with a teacher's latents beside each, as an override."""
    import io

    folder = tmp_path / "taught"
    folder.mkdir()
    with shard_writer(folder / "shard-000000.tar") as write:
        samples = list(read_samples(speech))
        for i, sample in enumerate(samples):
            buffer = io.BytesIO()
            np.save(buffer, np.random.default_rng(i).normal(size=(20, 6)).astype(np.float32))
            write({k: v for k, v in sample.items() if k in ("__key__", "flac")} | {"npy": buffer.getvalue()})
    size = (folder / "shard-000000.tar").stat().st_size
    write_manifest(folder, "raw", [{"name": "shard-000000.tar", "samples": len(samples), "bytes": size}])
    return f"shards=['{folder}']"


def read(config: Path, *overrides: str) -> AudioTokenizerRecipe:
    recipe = load_recipe(str(config), overrides)
    assert isinstance(recipe, AudioTokenizerRecipe)
    return recipe


def run(config: Path, *overrides: str) -> Path:
    return train_audio(read(config, *overrides))


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


def test_the_loss_is_the_weighted_sum_of_what_is_logged(config: Path) -> None:
    trainer = Trainer(read(config, "loss.mel=2", "loss.wave=0.5"), torch.device("cpu"))
    sound = torch.rand(2, 1, 1600, generator=torch.Generator().manual_seed(0)) - 0.5
    found = trainer.step(1, [sound])
    assert {"loss", "mel", "stft", "wave", "gradient"} == found.keys()
    assert float(found["loss"]) == pytest.approx(
        2 * float(found["mel"]) + 0.3 * float(found["stft"]) + 0.5 * float(found["wave"]), rel=1e-5
    )


def test_discriminators_alone_are_a_loss_from_their_start_on(config: Path) -> None:
    trainer = Trainer(read(config, "loss={wave: 0, mel: 0, stft: 0}", ADVERSARIAL), torch.device("cpu"))
    sound = torch.rand(2, 1, 1600, generator=torch.Generator().manual_seed(0)) - 0.5
    first, second = (trainer.step(step, [sound]) for step in (1, 2))
    assert float(first["loss"]) == 0
    assert "adversarial" not in first
    assert float(second["loss"]) == pytest.approx(
        0.25 * float(second["adversarial"]) + 0.25 * float(second["features"]), rel=1e-5
    )


def test_passes_hold_the_same_items_in_the_order_of_the_ranks(config: Path, taught: str) -> None:
    recipe = read(config, taught, "distill={weight: 1, dim: 6}", "accumulate=2", "streams=2", "batch_size=8")
    alone, *ranks = [Data(recipe, 0, 1), Data(recipe, 0, 2), Data(recipe, 1, 2)]
    for step in (1, 2):
        whole, *parts = [data.next(step) for data in (alone, *ranks)]
        assert len(whole) == 2
        for j in range(2):
            for k, shape in enumerate([(4, 1, 1600), (4, 10, 6)]):
                assert whole[j][k].shape == shape
                assert torch.equal(whole[j][k], torch.cat([part[j][k] for part in parts]))


def test_the_teacher_is_compared_with_the_first_codebook(config: Path) -> None:
    torch.manual_seed(0)
    z = torch.randn(2, 5, 4, requires_grad=True)
    for kind in ("rvq", "rvq_l2"):
        quantizer = build_quantizer(QuantizerConfig(kind=kind, codebook_size=8, dim=4, codebooks=3)).eval()
        quantized = quantizer(z)
        latents = first_latents(quantizer, quantized)
        assert torch.allclose(latents, quantizer.latents(quantized.codes[..., :1]))
        assert not torch.allclose(latents, quantized.latents)
        (gradient,) = torch.autograd.grad((latents * 3).sum(), z)
        assert torch.allclose(gradient, torch.full_like(z, 3.0))
    alone = Quantized(z, torch.zeros(2, 5, dtype=torch.long), {})
    assert first_latents(build_quantizer(QuantizerConfig(levels=(5, 5, 5, 5))), alone) is z


def test_distance_to_a_teacher() -> None:
    teacher = torch.tensor([[[1.0, 0.0], [0.0, 2.0], [3.0, 0.0], [0.0, 0.0]]])
    ours = torch.tensor([[[5.0, 0.0], [0.0, -1.0], [1.0, 1.0], [1.0, 1.0]]], requires_grad=True)
    distance = teacher_distance(ours, teacher)
    assert distance.item() == pytest.approx((0 + 2 + 1 - math.sqrt(0.5)) / 4)
    distance.backward()
    assert ours.grad is not None
    assert (ours.grad[0, 3] == 0).all()  # where there is no sound


def test_evaluation_is_of_each_sound_by_itself(config: Path) -> None:
    recipe = read(config, RVQ)
    torch.manual_seed(0)
    tokenizer = AudioTokenizer(recipe.model).eval()
    heldout = [*load_heldout(recipe), torch.zeros(1, 500)]
    found, exhibits = evaluate(tokenizer, heldout)
    assert {"mel_distance", "si_sdr", "stoi", "codebook_use_0", "codebook_perplexity_2"} <= found.keys()
    distances = []
    for sound in heldout:
        decoded = tokenizer.decode(tokenizer.encode(sound[None]))
        distances.append(float(mel_distance(sound[None], decoded, 16000)))
    assert found["mel_distance"] == pytest.approx(sum(distances) / 4, rel=1e-4)
    assert isinstance(exhibits["spectrograms"], Image.Image)
    assert torch.equal(exhibits["sound-0"].samples, heldout[0])  # type: ignore[union-attr]


def test_a_run_starts_from_its_init(config: Path, tmp_path: Path) -> None:
    torch.manual_seed(1)
    AudioTokenizer(read(config).model).save_pretrained(tmp_path / "first")
    trainer = Trainer(read(config, f"init='{tmp_path / 'first'}'"), torch.device("cpu"))
    for name, tensor in load_file(tmp_path / "first" / "model.safetensors").items():
        assert torch.equal(trainer.model.state_dict()[name], tensor)
        assert torch.equal(trainer.average.state_dict()[name], tensor)
    other = AudioTokenizer(read(config, "model.decoder.blocks=[2]").model)
    with pytest.raises(PlaitError, match="^init: .*first and the recipe's model differ: decoder") as caught:
        initialise(other, str(tmp_path / "first"))
    assert "\n" not in str(caught.value)


# Whole runs


@pytest.mark.slow
def test_training_lowers_the_distance_of_held_out_sound(config: Path, tmp_path: Path) -> None:
    folder = run(config, "seconds=0.25", "steps=40", "eval_every=40", "log_every=40", "ema=0.9", "optimizer.lr=1e-2")
    out = tmp_path / "run"
    torch.manual_seed(0)
    heldout = load_heldout(read(config))
    untrained, _ = evaluate(AudioTokenizer(read(config).model).eval(), heldout)
    tokenizer = load_tokenizer(folder)
    assert isinstance(tokenizer, AudioTokenizer)
    trained, _ = evaluate(tokenizer, heldout)
    assert trained["mel_distance"] < 0.85 * untrained["mel_distance"]
    # Stored in float32, so what was measured is what is loaded.
    for name in ("mel_distance", "stored_mel_distance"):
        assert metrics(out, name)[40] == pytest.approx(trained["mel_distance"], rel=1e-4)
    assert Image.open(out / "spectrograms.png").width > 100
    assert read_sound(out / "sound-0-decoded.wav").samples.shape == heldout[0].shape
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(out / "tensorboard"))
    events.Reload()
    assert set(events.Tags()["audio"]) == {f"sound-{i}{end}" for i in range(3) for end in ("", "-decoded")}
    assert events.Tags()["images"] == ["spectrograms"]


@pytest.mark.slow
@pytest.mark.parametrize(
    "overrides",
    [
        ("model.channels=2", "precision=bfloat16"),
        (RVQ_L2, ADVERSARIAL, "balance=true", "accumulate=2"),
        (RVQ, "distill={weight: 1, dim: 6}"),
    ],
)
def test_kinds_of_runs(overrides: tuple[str, ...], config: Path, taught: str, tmp_path: Path) -> None:
    run(config, *overrides, *([taught] if "distill" in overrides[-1] else []))
    out = tmp_path / "run"
    assert len(metrics(out, "loss")) == 3
    assert metrics(out, "stored_mel_distance").keys() == {3}
    if ADVERSARIAL in overrides:
        assert metrics(out, "adversarial").keys() == metrics(out, "features").keys() == {2, 3}
        assert metrics(out, "discriminator_loss").keys() == metrics(out, "codebook").keys() == {1, 2, 3}
    if "distill" in overrides[-1]:
        assert metrics(out, "distill").keys() == {1, 2, 3}


@pytest.mark.slow
@pytest.mark.parametrize(
    "settings",
    [
        ("accumulate=2", "distill={weight: 1, dim: 6}"),
        # Quantizer dropout is drawn by each process for itself.
        (ADVERSARIAL, "balance=true", RVQ_L2.replace("0.5", "0")),
    ],
)
def test_two_processes_equal_one(
    settings: tuple[str, ...], config: Path, taught: str, tmp_path: Path, fork: Fork
) -> None:
    # Slowly, as rounding grows from step to step.
    plan = (*settings, taught, "optimizer.lr=1e-3", "steps=4", "eval_every=4")
    codes = [
        fork(n, tmp_path / f"log{n}", lambda _, n=n: run(config, *plan, f"out={tmp_path / str(n)}")) for n in (1, 2)
    ]
    assert codes == [[0], [0, 0]], (tmp_path / "log2-1").read_text()
    one, two = (figures(tmp_path / str(n)) for n in (1, 2))
    assert one.keys() == two.keys()
    for name in one:
        close = 1e-5 if name in ("mel", "stft", "wave", "distill") else 1e-3
        assert two[name] == pytest.approx(one[name], rel=close, abs=1e-5), name
    weights, again = (load_file(tmp_path / str(n) / "tokenizer" / "model.safetensors") for n in (1, 2))
    for name, tensor in weights.items():
        assert torch.allclose(tensor, again[name], rtol=1e-3, atol=1e-4), name


@pytest.mark.slow
@pytest.mark.parametrize("settings", [(RVQ, ADVERSARIAL, "balance=true"), (RVQ_L2, "distill={weight: 1, dim: 6}")])
def test_a_killed_run_goes_on_exactly(
    settings: tuple[str, ...], config: Path, taught: str, tmp_path: Path, fork: Fork
) -> None:
    plan = (*settings, taught, "steps=4", "eval_every=2")

    def killed(_: int) -> None:
        following = Data.next

        def next_or_die(self: Data, step: int) -> list[Any]:
            if step == 4:
                os.kill(os.getpid(), signal.SIGKILL)
            return following(self, step)

        Data.next = next_or_die  # type: ignore[method-assign]
        run(config, *plan)

    assert fork(1, tmp_path / "log", killed) == [-signal.SIGKILL]
    out = tmp_path / "run"
    assert sorted(metrics(out, "loss")) == [1, 2, 3]
    run(config, *plan)
    run(config, *plan, f"out={tmp_path / 'whole'}")
    assert figures(out) == figures(tmp_path / "whole")
    weights, again = (load_file(folder / "tokenizer" / "model.safetensors") for folder in (out, tmp_path / "whole"))
    assert all(torch.equal(tensor, again[name]) for name, tensor in weights.items())


# What goes wrong


def test_what_is_no_number_saves_nothing(config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Broken(torch.nn.Module):
        def __init__(self, *_: Any) -> None:
            super().__init__()

        def forward(self, decoded: Tensor, _: Tensor) -> dict[str, Tensor]:
            return {"wave": decoded.mean() * math.nan}

    monkeypatch.setattr(audio_loop, "WaveLosses", Broken)
    with pytest.raises(PlaitError, match=r"^loss is nan at step 1; lower optimizer\.lr"):
        run(config, "eval_every=1")
    assert not (tmp_path / "run" / "checkpoint.pt").exists()


def test_shards_without_a_sound(config: Path, tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    for i in range(3):
        (tmp_path / "in" / f"{i}.txt").write_text("no sound")
    pack(tmp_path / "in", tmp_path / "words")
    with pytest.raises(PlaitError, match="samples in a row hold no sound that can be read") as caught:
        run(config, f"shards=['{tmp_path / 'words'}']")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("override", "reason"),
    [
        ("shards=[nowhere]", "nowhere: no such folder"),
        ("heldout=nowhere", "nowhere: no such folder"),
        ("init=nowhere", "nowhere"),
        ("secnds=1", "'seconds'"),
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
