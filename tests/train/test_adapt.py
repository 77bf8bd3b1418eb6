"""Adapting a bundle by recipe: what it starts from, what may change, and real runs in processes of their own."""

import contextlib
import os
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
from torch import Tensor

import plait as package
from plait.errors import PlaitError
from plait.infer.adapter import load_adapter, merge
from plait.infer.bundle import Bundle, load_bundle
from plait.infer.grow import grow_bundle
from plait.model.config import DecoderConfig
from plait.model.grow import grow_decoder
from plait.model.lora import LoRAConfig
from plait.tokenizers.loading import find_weights
from plait.train.adapt import build_decoder, build_vocabulary, find_rows
from plait.train.recipe import DecoderRecipe, ParallelConfig
from plait.train.tokenize import tokenize

BIN = Path(sys.executable).parent
ALONE = [sys.executable, "-m", "plait"]
TORCHRUN = [str(BIN / "torchrun"), "--standalone", "--nproc_per_node", "2", "-m", "plait"]
TINY = find_weights("plait-tiny")


@pytest.fixture(scope="session")
def sound(speech: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Token shards of speech, and tokenizers of which plait-tiny lacks that of sound."""
    folder = tmp_path_factory.mktemp("sound")
    shutil.copytree(find_weights("tiny-audio"), folder / "tokenizers" / "audio")
    shutil.copytree(TINY / "tokenizers" / "text", folder / "tokenizers" / "text")
    tokenize(speech, folder / "shards", str(folder / "tokenizers"), workers=1)
    return folder / "shards", folder / "tokenizers"


@pytest.fixture
def recipe(sound: tuple[Path, Path], tmp_path: Path) -> DecoderRecipe:
    return DecoderRecipe([str(sound[0])], str(sound[1]), str(tmp_path / "run"), "plait-tiny")


def trained(recipe: DecoderRecipe) -> tuple[Any, set[str]]:
    decoder = build_decoder(recipe, build_vocabulary(recipe))
    return decoder, {name for name, p in decoder.named_parameters() if p.requires_grad}


def test_vocabulary_is_the_bundle_s_grown(recipe: DecoderRecipe) -> None:
    old, new = load_bundle(TINY).vocabulary, build_vocabulary(recipe)
    assert new.blocks[: len(old.blocks)] == old.blocks
    assert list(new.modalities) == ["text", "image", "audio"]
    assert set(new.tokenizers) == {"text", "visual", "audio"}


def test_shards_with_nothing_new_need_no_tokenizers(recipe: DecoderRecipe, tmp_path: Path, raw: Path) -> None:
    tokenize(raw, tmp_path / "t", "plait-tiny", workers=1)
    plain = DecoderRecipe([str(tmp_path / "t")], init="plait-tiny", out="o")
    assert build_vocabulary(plain) == load_bundle(TINY).vocabulary


def test_all_trains_by_default(recipe: DecoderRecipe) -> None:
    decoder, names = trained(recipe)
    assert names == {name for name, _ in decoder.named_parameters()}
    assert decoder.training
    assert decoder.embed_tokens.weight.shape[0] == build_vocabulary(recipe).size


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"train": ["*norm.weight", "layers.?.mlp.up_proj.weight"]}, None),
        ({"rows": ["new"]}, {"embed_tokens.rows"}),
        ({"train": ["lm_head.weight"], "rows": ["visual.0"]}, {"embed_tokens.rows"}),
        ({"train": ["norm.weight"], "rows": ["visual.0"]}, {"norm.weight", "embed_tokens.rows"}),
        (
            {"lora": LoRAConfig(2, targets=["*.0.*.q_proj"]), "rows": ["new"]},
            {"embed_tokens.rows", "layers.0.self_attn.q_proj.lora_a", "layers.0.self_attn.q_proj.lora_b"},
        ),
        (
            {"lora": LoRAConfig(2, targets=["*.0.*.q_proj"]), "train": ["layers.0.self_attn.q_proj.weight"]},
            {f"layers.0.self_attn.q_proj.{n}" for n in ("base.weight", "lora_a", "lora_b")},
        ),
    ],
    ids=["patterns", "teal", "anole", "both", "lora", "lora-and-base"],
)
def test_only_what_is_planned_trains(settings: dict[str, Any], expected: set[str] | None, recipe: Any) -> None:
    for name, value in settings.items():
        setattr(recipe, name, value)
    decoder, names = trained(recipe)
    if expected is None:
        expected = {n for n, p in decoder.named_parameters() if p.ndim == 1 and "norm.weight" in n and "k_" not in n}
        expected |= {n for n, _ in decoder.named_parameters() if "k_norm" in n or "mlp.up_proj" in n}
    assert names == expected


def test_the_head_alone_learns_where_it_is_not_tied(recipe: Any, bundle: Path, tokens: Path, tmp_path: Path) -> None:
    untie(bundle)
    anole = DecoderRecipe([str(tokens)], init=str(bundle), out="o", train=["lm_head.weight"], rows=["visual.*"])
    decoder, names = trained(anole)
    assert names == {"lm_head.rows"}
    assert decoder.lm_head.ids.tolist() == list(build_vocabulary(anole).block("visual.0").ids)


def untie(bundle: Path) -> None:
    """The same bundle with a head of its own."""
    import json

    from safetensors.torch import save_file

    config = json.loads((bundle / "config.json").read_text())
    config["decoder"]["tie_embeddings"] = False
    (bundle / "config.json").write_text(json.dumps(config))
    weights = load_file(bundle / "model.safetensors")
    save_file(weights | {"lm_head.weight": weights["embed_tokens.weight"].flip(0)}, bundle / "model.safetensors")


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"train": ["lm_haed.weight"]}, r"train: 'lm_haed\.weight' matches none .* did you mean 'lm_head\.weight'\?"),
        ({"rows": ["visual.1"]}, r"rows: 'visual\.1' matches none .* did you mean 'visual\.0'\?"),
        ({"lora": LoRAConfig(1, targets=["q_proj"])}, r"lora\.targets: 'q_proj' .* did you mean '\*\.q_proj'\?"),
        ({"model": DecoderConfig(layers=3)}, r"model\.layers: is 3, .*plait-tiny has 4; leave model out"),
        ({"init": "", "train": ["*"]}, "train: needs init"),
        ({"init": "", "lora": LoRAConfig(1)}, r"lora\.rank: needs init"),
        ({"tokenizers": ""}, "was made with another audio tokenizer than plait-tiny/audio"),
        ({"layouts": {"image": "delay"}}, "layouts: names 'image', the new modalities are audio"),
        ({"init": "nowhere"}, "nowhere: no such path"),
    ],
    ids=str,
)
def test_plan_that_cannot_be_is_one_line(settings: dict[str, Any], reason: str, recipe: Any) -> None:
    for name, value in settings.items():
        setattr(recipe, name, value)
    with pytest.raises(PlaitError, match=reason) as caught:
        build_decoder(recipe, build_vocabulary(recipe))
    assert "\n" not in str(caught.value)


def test_new_rows_need_new_ids() -> None:
    vocabulary = load_bundle(TINY).vocabulary
    with pytest.raises(PlaitError, match="rows: nothing is new"):
        find_rows(["new"], vocabulary, vocabulary.size)
    assert find_rows(["special.*", "special"], vocabulary, vocabulary.size).tolist() == [
        0, 1, 2, 1027, 1028, 2053, 2054, 2055,
    ]  # fmt: skip


def test_model_may_say_what_init_has(recipe: DecoderRecipe) -> None:
    recipe.model = DecoderConfig(width=256, kv_heads=2)
    build_decoder(recipe, build_vocabulary(recipe))


def test_switches_reach_the_decoder(recipe: DecoderRecipe) -> None:
    recipe.parallel = ParallelConfig(checkpoint_activations=True, compile=True)
    decoder, _ = trained(recipe)
    assert decoder.checkpoint_activations
    assert all(block._compiled_call_impl is not None for block in decoder.layers)


def test_bundle_grows_without_training(sound: tuple[Path, Path], tmp_path: Path) -> None:
    grow_bundle("plait-tiny", sound[1], ["audio"], tmp_path / "grown")
    old, new = package.load(TINY), package.load(tmp_path / "grown")
    assert new.modalities == ["text", "image", "audio"]
    assert new.bundle.generation == old.bundle.generation
    ids = torch.tensor([[1, 1027, 1100, 1200, 1028, 2053]])
    positions, size = torch.arange(6)[None], old.bundle.vocabulary.size
    ours, theirs = (m.bundle.decoder(ids, positions) for m in (new, old))
    torch.testing.assert_close(ours[..., :size], theirs, atol=1e-6, rtol=0)
    first, second = (load_file(f / "model.safetensors") for f in (TINY, tmp_path / "grown"))
    assert {n: t.dtype for n, t in first.items()} == {n: t.dtype for n, t in second.items()}
    assert all(torch.equal(second[n][: len(t)], t) for n, t in first.items())
    a, b = (m.generate("a red apple", to="image", seed=3, max_tokens=90) for m in (old, new))
    assert a.tobytes() == b.tobytes()
    assert new.generate("hello", to="audio", seed=0, max_tokens=40).samples.shape[-1] > 0


def test_growing_by_what_is_there_is_refused(sound: tuple[Path, Path], tmp_path: Path) -> None:
    with pytest.raises(PlaitError, match="has text already"):
        grow_bundle("plait-tiny", sound[1], ["text"], tmp_path / "grown")
    assert not (tmp_path / "grown").exists()


# Real runs.


def start(launcher: list[str], file: Path, out: Path, *overrides: str) -> subprocess.Popen[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "PATH": f"{BIN}:{os.environ['PATH']}"}
    return subprocess.Popen(
        [*launcher, "train", str(file), f"out={out}", *overrides], stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        text=True, env=environment, start_new_session=True,
    )  # fmt: skip


def finish(process: subprocess.Popen[str]) -> None:
    try:
        output, _ = process.communicate(timeout=170)
    finally:
        kill(process)
    assert process.returncode == 0, output


def kill(process: subprocess.Popen[str]) -> None:
    if process.poll() is None:
        everyone = [*psutil.Process(process.pid).children(recursive=True), psutil.Process(process.pid)]
        for each in everyone:
            with contextlib.suppress(psutil.NoSuchProcess):
                each.kill()
        psutil.wait_procs(everyone)
    process.communicate()


@pytest.fixture
def file(sound: tuple[Path, Path], tmp_path: Path) -> Path:
    """plait-tiny learns to speak, by LoRA and the new rows."""
    path = tmp_path / "speak.yaml"
    path.write_text(
        f"""
kind: decoder
shards: ['{sound[0]}']
tokenizers: '{sound[1]}'
out: nowhere
init: plait-tiny
rows: [new]
lora: {{rank: 2, alpha: 8}}
optimizer: {{lr: 1.0e-2, warmup_steps: 1, weight_decay: 0.5}}
sequence: {{length: 1200}}
generation: {{audio: {{temperature: 0.9}}, image: {{guidance: 2.0}}}}
global_batch: 2
micro_batch: 1
streams: 2
steps: 3
log_every: 1
save_every: 1
"""
    )
    return path


def grown_weights(size: int) -> dict[str, Tensor]:
    return grow_decoder(load_bundle(TINY, dtype=torch.bfloat16).decoder, size).state_dict()


def check_lora_run(out: Path) -> Bundle:
    """Only new rows and LoRA's targets have changed, and the adapter is the whole difference."""
    bundle = load_bundle(out / "bundle")
    old = load_bundle(TINY)
    size = old.vocabulary.size
    before = grown_weights(bundle.vocabulary.size)
    changed = {n for n, t in load_file(out / "bundle" / "model.safetensors").items() if not torch.equal(t, before[n])}
    assert changed == {n for n in before if n.endswith("_proj.weight")} | {"embed_tokens.weight"}
    after = load_file(out / "bundle" / "model.safetensors")["embed_tokens.weight"]
    assert torch.equal(after[:size], before["embed_tokens.weight"][:size])
    assert not (after[size:] == before["embed_tokens.weight"][size:]).all(1).any()
    assert bundle.generation == {
        "image": {"temperature": 0.5, "top_p": 0.95, "guidance": 2.0}, "text": {"temperature": 0.0},
        "audio": {"temperature": 0.9},
    }  # fmt: skip
    assert bundle.context == 1200
    decoder = grow_decoder(old.decoder, bundle.vocabulary.size)
    load_adapter(out / "adapter", decoder)
    merge(decoder)
    for name, tensor in decoder.state_dict().items():
        torch.testing.assert_close(bundle.decoder.state_dict()[name], tensor, atol=2e-2, rtol=1e-2)
    return bundle


def lora_size(rank: int) -> int:
    """Numbers in the LoRA of all linear layers of plait-tiny's blocks."""
    blocks = load_bundle(TINY).decoder.layers
    return rank * sum(sum(m.weight.shape) for m in blocks.modules() if isinstance(m, torch.nn.Linear))


@pytest.mark.slow
def test_lora_with_new_rows_speaks(file: Path, tmp_path: Path) -> None:
    finish(start(ALONE, file, tmp_path / "run", "steps=4"))
    bundle = check_lora_run(tmp_path / "run")
    model = package.load(tmp_path / "run" / "bundle")
    assert model.generate("hello", to="audio", seed=0, max_tokens=60).samples.shape[-1] > 0
    # Neither checkpoints nor the adapter hold what is frozen.
    largest = max(p.stat().st_size for p in (tmp_path / "run" / "checkpoints").rglob("*") if p.is_file())
    adapter = (tmp_path / "run" / "adapter" / "adapter.safetensors").stat().st_size
    assert largest < 3.2 * adapter  # with Adam's two moments
    assert adapter < 1.1 * 4 * ((bundle.vocabulary.size - 3056) * 256 + lora_size(2))


@pytest.mark.slow
@pytest.mark.parametrize(
    "overrides",
    [["parallel.zero=3"], ["parallel.zero=2", "parallel.dtype=bfloat16", "lora.quantize=int4"]],
    ids=["lora-3", "qlora-2-bfloat16"],
)
def test_two_processes_share_it(overrides: list[str], file: Path, tmp_path: Path) -> None:
    finish(start(TORCHRUN, file, tmp_path / "run", *overrides))
    check_lora_run(tmp_path / "run")


@pytest.mark.slow
def test_old_media_stay_when_only_new_rows_train(file: Path, tmp_path: Path) -> None:
    overrides = ("lora.rank=0", "parallel.checkpoint_activations=true", "generation.image.guidance=1.5")
    finish(start(ALONE, file, tmp_path / "run", *overrides))
    old, new = package.load(TINY), package.load(tmp_path / "run" / "bundle")
    before = grown_weights(new.bundle.vocabulary.size)
    size = old.bundle.vocabulary.size
    for name, tensor in load_file(tmp_path / "run" / "bundle" / "model.safetensors").items():
        assert tensor.dtype == torch.bfloat16
        assert torch.equal(tensor[:size], before[name][:size]), name
    a, b = (m.generate("a red apple", to="image", seed=3, max_tokens=90) for m in (old, new))
    assert a.tobytes() == b.tobytes()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("launcher", "overrides"), [(ALONE, []), (TORCHRUN, ["parallel.zero=3"])], ids=["alone", "torchrun-3"]
)
def test_killed_run_goes_on_exactly(launcher: list[str], overrides: list[str], file: Path, tmp_path: Path) -> None:
    long, out = [*overrides, "steps=8", "keep=8"], tmp_path / "run"
    process = start(launcher, file, out, *long)
    deadline = time.monotonic() + 150
    while not (out / "checkpoints" / "step-3").exists():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.01)
    kill(process)
    assert not (out / "bundle").exists()
    finish(start(launcher, file, out, *long))
    finish(start(launcher, file, tmp_path / "whole", *long))
    ours, theirs = (load_file(f / "adapter" / "adapter.safetensors") for f in (out, tmp_path / "whole"))
    assert set(ours) == set(theirs)
    for name, tensor in ours.items():
        torch.testing.assert_close(tensor, theirs[name], atol=1e-4, rtol=0)


@pytest.mark.slow
def test_bad_plan_is_one_line(file: Path, tmp_path: Path, plait: Callable[..., Any]) -> None:
    done = plait("train", file, f"out={tmp_path / 'run'}", "rows=[nwe]")
    assert (done.returncode, len(done.stderr.splitlines())) == (2, 1)
    assert "rows: 'nwe' matches none" in done.stderr
    assert not (tmp_path / "run" / "bundle").exists()
