"""Real runs of a tiny decoder, each in processes of its own as a user starts them."""

import contextlib
import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from safetensors.torch import load_file

import plait as package
from plait.errors import PlaitError
from plait.train.decoder_loop import build_vocabulary
from plait.train.recipe import DecoderRecipe

BIN = Path(sys.executable).parent
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "PATH": f"{BIN}:{os.environ['PATH']}"}
ALONE = [sys.executable, "-m", "plait"]
TORCHRUN = [str(BIN / "torchrun"), "--standalone", "--nproc_per_node", "2", "-m", "plait"]
DEEPSPEED = [sys.executable, str(BIN / "deepspeed"), "--num_accelerators", "2", "--module", "plait"]


@pytest.fixture(scope="session")
def recipe(tokens: Path, tokenizers: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("recipe") / "tiny.yaml"
    path.write_text(
        f"""
kind: decoder
shards: ['{tokens}']
tokenizers: '{tokenizers}'
out: nowhere
model: {{width: 32, layers: 2, heads: 4, kv_heads: 2}}
optimizer: {{lr: 1.0e-2, warmup_steps: 2}}
sequence: {{length: 256}}
global_batch: 4
micro_batch: 2
streams: 2
steps: 6
log_every: 1
save_every: 2
store: float32
generation: {{text: {{temperature: 1.0}}, image: {{temperature: 1.0}}}}
"""
    )
    return path


def start(launcher: list[str], recipe: Path, out: Path, *overrides: str) -> subprocess.Popen[str]:
    command = [*launcher, "train", str(recipe), f"out={out}", *overrides]
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=ENVIRONMENT, start_new_session=True
    )


def kill(process: subprocess.Popen[str]) -> None:
    # The launchers give their workers sessions of their own, so killing the group would leave them running.
    everyone = [*psutil.Process(process.pid).children(recursive=True), psutil.Process(process.pid)]
    for each in everyone:
        with contextlib.suppress(psutil.NoSuchProcess):
            each.kill()
    psutil.wait_procs(everyone)
    process.communicate()


def run(launcher: list[str], recipe: Path, out: Path, *overrides: str) -> str:
    process = start(launcher, recipe, out, *overrides)
    try:
        output, _ = process.communicate(timeout=180)
    finally:
        if process.poll() is None:
            kill(process)
    assert process.returncode == 0, output
    return output


def figures(out: Path, name: str = "loss") -> list[float]:
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == list(range(1, len(rows) + 1))
    return [row[name] for row in rows]


@pytest.fixture(scope="session")
def alone(recipe: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of one process."""
    out = tmp_path_factory.mktemp("alone") / "run"
    run(ALONE, recipe, out)
    return out


def test_vocabulary_has_what_the_shards_hold(recipe: Path, tokens: Path, tokenizers: Path) -> None:
    assert list(build_vocabulary(DecoderRecipe([str(tokens)], str(tokenizers), "o")).modalities) == ["text", "image"]


def test_shards_of_other_tokenizers_are_refused(
    tokens: Path, tokenizers: Path, tmp_path: Path, text_tokenizer: Any
) -> None:
    shutil.copytree(tokenizers, tmp_path / "tokenizers")
    type(text_tokenizer).train(["other words"] * 60, 275).save_pretrained(tmp_path / "tokenizers" / "text")
    with pytest.raises(PlaitError, match=f"{tokens}: was made with another text tokenizer"):
        build_vocabulary(DecoderRecipe([str(tokens)], str(tmp_path / "tokenizers"), "o"))


@pytest.mark.slow
def test_run_writes_its_folder_and_learns(alone: Path) -> None:
    losses = figures(alone)
    assert len(losses) == 6
    assert losses[-1] < losses[0] - 1
    assert figures(alone, "loss_text")
    assert all(norm > 0 for norm in figures(alone, "gradient"))
    assert {"recipe.yaml", "run.json", "metrics.jsonl", "checkpoints", "bundle"} <= {p.name for p in alone.iterdir()}
    assert list((alone / "tensorboard").rglob("events*"))
    # keep is 2.
    assert sorted(p.name for p in (alone / "checkpoints").glob("step-*")) == ["step-4", "step-6"]


@pytest.mark.slow
def test_bundle_generates(alone: Path) -> None:
    model = package.load(alone / "bundle")
    image = model.generate("a red apple", to="image", seed=0, max_tokens=200)
    assert image.width > 0
    assert isinstance(model.generate(image, to="text", seed=0, max_tokens=20), str)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("launcher", "zero", "micro_batch"),
    [(TORCHRUN, 1, 1), (TORCHRUN, 2, 1), (TORCHRUN, 3, 1), (DEEPSPEED, 0, 2)],
    ids=["torchrun-1", "torchrun-2", "torchrun-3", "deepspeed-0"],
)
def test_two_processes_agree_with_one(
    launcher: list[str], zero: int, micro_batch: int, alone: Path, recipe: Path, tmp_path: Path
) -> None:
    output = run(launcher, recipe, tmp_path / "run", f"parallel.zero={zero}", f"micro_batch={micro_batch}")
    assert output.count(f"wrote {tmp_path / 'run' / 'bundle'}") == 1
    for name in ("loss", "loss_image", "loss_text", "tokens"):
        assert figures(tmp_path / "run", name) == pytest.approx(figures(alone, name), abs=1e-3)
    assert figures(tmp_path / "run", "gradient") == pytest.approx(figures(alone, "gradient"), rel=0.01)
    ours, theirs = (load_file(out / "bundle" / "model.safetensors") for out in (tmp_path / "run", alone))
    assert set(ours) == set(theirs)
    for tensor, other in zip(ours.values(), theirs.values(), strict=True):
        assert torch.allclose(tensor, other, atol=5e-3)


def wait_for(path: Path, process: subprocess.Popen[str], seconds: float = 120) -> None:
    """Wait until a file is there."""
    deadline = time.monotonic() + seconds
    while not path.exists():
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.01)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("launcher", "overrides"),
    [(ALONE, []), (TORCHRUN, ["parallel.zero=3", "parallel.dtype=bfloat16"])],
    ids=["alone", "torchrun-3-bfloat16"],
)
def test_killed_run_goes_on_exactly(launcher: list[str], overrides: list[str], recipe: Path, tmp_path: Path) -> None:
    out, long = tmp_path / "run", [*overrides, "steps=20", "save_every=3"]
    process = start(launcher, recipe, out, *long)
    wait_for(out / "checkpoints" / "step-6", process)
    kill(process)
    resumed_from = int((out / "checkpoints" / "latest").read_text().strip().removeprefix("step-"))
    assert 3 <= resumed_from < 20
    # A line of the future and half a line, which the resumed run must drop.
    with (out / "metrics.jsonl").open("a") as file:
        file.write('{"step": 20, "loss": 0}\n{"step": 4')
    run(launcher, recipe, out, *long)
    whole = tmp_path / "whole"
    run(launcher, recipe, whole, *long)
    assert figures(out) == pytest.approx(figures(whole), abs=1e-6 if launcher is ALONE else 1e-4)
    assert figures(out, "lr") == figures(whole, "lr")


@pytest.mark.slow
def test_finished_run_stays_as_it_is(alone: Path, recipe: Path, tmp_path: Path) -> None:
    shutil.copytree(alone, tmp_path / "run")
    run(ALONE, recipe, tmp_path / "run")
    for name in ("metrics.jsonl", "bundle/model.safetensors"):
        assert (tmp_path / "run" / name).read_bytes() == (alone / name).read_bytes()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("overrides", "reason"),
    [
        (["optimizer.lrr=1"], "unknown key 'optimizer.lrr'; did you mean 'optimizer.lr'?"),
        (["shards=[nowhere]"], "nowhere: no such folder of shards"),
        (["tokenizers=nowhere"], "nowhere: no such path"),
        (["streams=3"], "streams: 3 must divide"),
        (["sequence.loss_weights={text: 0, image: 0}"], "no token of this step carries loss"),
    ],
)
def test_bad_input_is_one_line(
    overrides: list[str], reason: str, recipe: Path, tmp_path: Path, plait: Callable[..., Any]
) -> None:
    done = plait("train", recipe, f"out={tmp_path / 'run'}", *overrides)
    assert done.returncode == 2
    assert reason in done.stderr
    lines = [line for line in done.stderr.splitlines() if line.startswith("plait: ")]
    assert len(lines) == 1
    assert "Traceback" not in done.stderr


@pytest.mark.slow
def test_missing_shard_is_one_line(recipe: Path, tokens: Path, tmp_path: Path, plait: Callable[..., Any]) -> None:
    shutil.copytree(tokens, tmp_path / "tokens")
    (tmp_path / "tokens" / "shard-000001.tar").unlink()
    done = plait("train", recipe, f"out={tmp_path / 'run'}", f"shards=[{tmp_path / 'tokens'}]")
    assert done.returncode == 2
    assert len(done.stderr.splitlines()) == 1
    assert "tokens/shard-000001.tar: shard is missing" in done.stderr


@pytest.mark.slow
def test_resuming_under_another_plan_is_refused(
    alone: Path, recipe: Path, tmp_path: Path, plait: Callable[..., Any]
) -> None:
    shutil.copytree(alone, tmp_path / "run")
    (tmp_path / "run" / "checkpoints" / "step-6" / "loader-0.pt").unlink()
    done = plait("train", recipe, f"out={tmp_path / 'run'}")
    assert done.returncode == 2
    assert "loader-0.pt: missing" in done.stderr


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "size", "reason"),
    [
        ("step-6/loader-0.pt", 100, r"step-6/loader-0\.pt: checkpoint cannot be read \("),
        ("step-6/mp_rank_00_model_states.pt", 0, r"step-6: checkpoint cannot be read \("),
        ("latest", 0, r"latest: names '', which is no checkpoint"),
    ],
    ids=["loader", "weights", "latest"],
)
def test_file_that_was_cut_off_is_one_line(
    name: str, size: int, reason: str, alone: Path, recipe: Path, tmp_path: Path, plait: Callable[..., Any]
) -> None:
    shutil.copytree(alone, tmp_path / "run")
    os.truncate(tmp_path / "run" / "checkpoints" / name, size)
    done = plait("train", recipe, f"out={tmp_path / 'run'}", "steps=7")
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    assert re.search("plait: .*" + reason + ".*write the name of another one", done.stderr)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("override", "reason"),
    [
        ("sequence.length=300", "the run began with sequence.length 256, not 300"),
        ("seed=9", "the run began with seed 0, not 9"),
    ],
)
def test_another_recipe_in_the_same_folder_is_refused(
    override: str, reason: str, alone: Path, recipe: Path, tmp_path: Path, plait: Callable[..., Any]
) -> None:
    shutil.copytree(alone, tmp_path / "run")
    done = plait("train", recipe, f"out={tmp_path / 'run'}", override)
    assert (done.returncode, len(done.stderr.splitlines())) == (2, 1)
    assert reason in done.stderr
    assert (tmp_path / "run" / "recipe.yaml").read_bytes() == (alone / "recipe.yaml").read_bytes()


@pytest.mark.slow
def test_other_data_under_the_same_name_is_refused(
    alone: Path, recipe: Path, tmp_path: Path, plait: Callable[..., Any]
) -> None:
    shutil.copytree(alone, tmp_path / "run")
    path = tmp_path / "run" / "checkpoints" / "step-6" / "loader-0.pt"
    torch.save({**torch.load(path, weights_only=False), "data": "other"}, path)
    done = plait("train", recipe, f"out={tmp_path / 'run'}")
    assert done.returncode == 2
    assert "the run began with other shards" in done.stderr


@pytest.mark.slow
def test_loss_that_is_no_number_ends_the_run(recipe: Path, tmp_path: Path, plait: Callable[..., Any]) -> None:
    done = plait("train", recipe, f"out={tmp_path / 'run'}", "optimizer.lr=1e30", "optimizer.warmup_steps=0")
    assert done.returncode == 2
    assert "is nan; go on from the last checkpoint" in done.stderr
    assert not (tmp_path / "run" / "bundle").exists()
