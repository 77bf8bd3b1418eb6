import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import plait.launch
from plait.errors import PlaitError
from plait.model.config import DecoderConfig
from plait.model.cost import count_parameters, training_flops
from plait.model.decoder import Decoder
from plait.model.lora import LoRAConfig
from plait.tokenizers.vocabulary import Vocabulary
from plait.train.adapt import build_decoder, build_vocabulary
from plait.train.dry_run import describe, dry_run
from plait.train.engine import divide_batch
from plait.train.recipe import DecoderRecipe, ParallelConfig, SequenceConfig
from plait.train.recipe_file import load_recipe

FOLDER = Path(next(iter(plait.launch.__path__))) / "recipes" / "decoder"
RECIPES = sorted(path.stem for path in FOLDER.glob("*.yaml"))
MODEL = DecoderConfig(vocabulary_size=1000, width=64, layers=3, heads=4, kv_heads=2)
HEAD = re.compile(r"# ([\d,]+) parameters; ([\d.]+) GiB on (?:each of (\d+) devices|the only device), as --dry-run")


def recipe(**settings: Any) -> DecoderRecipe:
    return replace(DecoderRecipe(["nowhere"], "nowhere", "o", model=MODEL), **settings)


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_s_first_line_is_true(name: str) -> None:
    loaded: Any = load_recipe(f"decoder/{name}")
    # What lies where the tests run is not what the comment is about.
    elsewhere = {"shards": ["nowhere"], "tokenizers": loaded.tokenizers and "nowhere"}
    found = HEAD.match((FOLDER / f"{name}.yaml").read_text("utf-8"))
    assert found
    facts = dry_run(replace(loaded, **elsewhere), int(found[3] or 1))
    (run,) = facts["runs"]
    assert not run["problem"]
    assert int(found[1].replace(",", "")) == facts["parameters"]["total"]
    assert float(found[2]) == pytest.approx(run["memory"][loaded.parallel.zero]["peak"] / 2**30, rel=0.02)


def test_there_is_a_recipe_of_every_size() -> None:
    billions = {
        name: dry_run(replace(load_recipe(f"decoder/{name}"), shards=["nowhere"]))["parameters"]["total"] / 1e9
        for name in RECIPES
    }  # type: ignore[type-var]
    assert 0.005 < billions["tiny"] < 0.015
    rounded = {name: round(billions[name], 2) for name in ("150m", "1b", "emu3-8b", "chameleon-7b", "chameleon-34b")}
    assert rounded == {"150m": 0.15, "1b": 1.11, "emu3-8b": 8.49, "chameleon-7b": 7.01, "chameleon-34b": 34.29}


def test_figures_of_a_run() -> None:
    plan = recipe(sequence=SequenceConfig(length=100), global_batch=12, micro_batch=3, streams=4, steps=50)
    facts = dry_run(plan, 2, tflops=0.5)
    per_token = training_flops(MODEL, [100]).total
    assert facts["parameters"]["total"] == facts["parameters"]["trained"] == count_parameters(MODEL).total
    assert facts["tokens"] == {"sequence": 100, "step": 1200, "run": 60_000}
    assert facts["flops"]["step"] == 1200 * per_token
    (run,) = facts["runs"]
    assert (run["micro_batch"], run["passes"]) == divide_batch(plan, 2) == (3, 2)
    assert run["step_seconds"] == 1200 * per_token / 1e12
    assert run["run_days"] == pytest.approx(50 * run["step_seconds"] / 86400)
    assert len(run["memory"]) == 4
    json.dumps(facts)


def test_any_number_of_processes() -> None:
    assert [run["world_size"] for run in dry_run(recipe(streams=4))["runs"]] == [1, 2, 4]
    assert [run["world_size"] for run in dry_run(recipe(streams=512, global_batch=512))["runs"]] == [4, 8, 64, 512]
    three = dry_run(recipe(), 3)
    assert three["runs"][0]["problem"] == "streams: 4 is not a multiple of the 3 processes; make it one"
    assert three["runs"][0]["memory"][0]["peak"] > 0
    assert "cannot run: streams" in describe(three)
    assert dry_run(recipe(streams=5))["runs"][0]["problem"].startswith("streams: 5 must divide global_batch")


def test_the_recipe_s_stage_and_dtype_are_marked() -> None:
    text = describe(dry_run(recipe(parallel=ParallelConfig(zero=2, dtype="bfloat16")), 1))
    assert [line.split()[0] for line in text.splitlines() if re.search(r"\* \d ", line)] == ["*"]
    assert re.search(r"\* 2 ", text)
    assert "bfloat16, without activation checkpointing" in text


def test_checkpointing_trades_flops_for_memory() -> None:
    long = SequenceConfig(length=2000)
    kept, again = (dry_run(recipe(sequence=long, parallel=ParallelConfig(checkpoint_activations=c)), 1) for c in (0, 1))
    assert again["flops"]["step"] > kept["flops"]["step"]
    assert again["runs"][0]["memory"][0]["activations"] < kept["runs"][0]["memory"][0]["activations"]


def test_the_data_s_vocabulary_counts_if_it_is_there(tokens: Path, tokenizers: Path) -> None:
    there = recipe(shards=[str(tokens)], tokenizers=str(tokenizers))
    size = build_vocabulary(there).size
    facts = dry_run(there)
    assert facts["model"]["vocabulary_size"] == size
    assert facts["notes"] == [f"model.vocabulary_size is 1000, but the vocabulary of this run {size}"]
    silent = dry_run(replace(there, model=replace(MODEL, vocabulary_size=0)))
    assert silent["notes"] == []
    assert silent["parameters"] == facts["parameters"]


def test_a_vocabulary_of_unknown_size_is_refused() -> None:
    with pytest.raises(
        PlaitError, match=r"^model.vocabulary_size: is not known \(nowhere: .*add model.vocabulary_size=N"
    ):
        dry_run(recipe(model=DecoderConfig()))


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"train": ["*norm.weight"]},
        {"rows": ["visual.0"]},
        {"train": ["lm_head.weight"], "rows": ["visual.*"]},
        {"lora": LoRAConfig(4), "rows": ["visual.0"]},
        {"lora": LoRAConfig(2, targets=["*.q_proj"]), "train": ["layers.1.*"]},
    ],
    ids=["all", "norms", "rows", "anole", "lora", "both"],
)
def test_what_learns_is_what_training_trains(settings: dict[str, Any], bundle: Path, tokens: Path) -> None:
    plan = DecoderRecipe([str(tokens)], init=str(bundle), out="o", **settings)
    decoder: Decoder = build_decoder(plan, build_vocabulary(plan))
    facts = dry_run(plan)
    assert facts["parameters"]["trained"] == sum(p.numel() for p in decoder.parameters() if p.requires_grad)
    assert facts["notes"] == []
    everything = dry_run(replace(plan, train=[], rows=[], lora=LoRAConfig()))
    assert (facts["flops"]["step"] < everything["flops"]["step"]) == bool(settings)
    smaller = [f["runs"][0]["memory"][0]["optimizer"] for f in (facts, everything)]
    assert (smaller[0] < smaller[1]) == bool(settings)


def test_without_shards_the_bundle_says_what_it_is(bundle: Path) -> None:
    facts = dry_run(DecoderRecipe(["nowhere"], init=str(bundle), out="o", train=["lm_head.weight"], rows=["visual.0"]))
    block = Vocabulary.load(bundle / "vocabulary.json").block("visual.0")
    assert facts["parameters"]["trained"] == block.size * facts["model"]["width"]
    assert len(facts["notes"]) == 1
    assert facts["notes"][0].startswith("the vocabulary is init's, not the data's")


def test_new_rows_are_not_known_before_the_data(bundle: Path) -> None:
    facts = dry_run(DecoderRecipe(["nowhere"], init=str(bundle), out="o", rows=["new"]))
    assert facts["parameters"]["trained"] == 0
    assert facts["notes"][1] == "how many rows are new is not known, none are counted"


def test_without_the_bundle_all_rows_count(tmp_path: Path) -> None:
    facts = dry_run(recipe(tokenizers="", init=str(tmp_path / "no"), rows=["visual.0"], model=MODEL))
    assert facts["parameters"]["trained"] == MODEL.vocabulary_size * MODEL.width
    assert facts["notes"][0].startswith("the architecture is the recipe's, not init's")


def test_a_wrong_pattern_is_refused(bundle: Path, tokens: Path) -> None:
    with pytest.raises(PlaitError, match=r"^train: 'lm_haed.weight' matches none"):
        dry_run(DecoderRecipe([str(tokens)], init=str(bundle), out="o", train=["lm_haed.weight"]))


@pytest.mark.parametrize(("name", "slack"), [("int4", 0.0), ("int8", 0.15)])  # at 32 inputs, int8's scales do count
def test_quantized_weights_are_those_of_training(name: str, slack: float, bundle: Path, tokens: Path) -> None:
    plan = DecoderRecipe([str(tokens)], init=str(bundle), out="o", lora=LoRAConfig(2, quantize=name))
    decoder = build_decoder(plan, build_vocabulary(plan))
    held = sum(p.nbytes for p in decoder.parameters())
    held += sum(b.nbytes for n, b in decoder.named_buffers() if ".base." in n)
    predicted = dry_run(plan, 1)["runs"][0]["memory"][0]["parameters"]
    assert predicted == pytest.approx(held, rel=slack)


def test_command(plait: Callable[..., Any], tmp_path: Path) -> None:
    done = plait("train", "decoder/chameleon-34b", "--dry-run", "--world-size", 256, "--tflops", 400, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "34,294,308,864" in done.stdout
    assert "s a step" in done.stdout
    done = plait("train", "decoder/tiny", "--dry-run", "--json", "model.layers=1", cwd=tmp_path)
    facts = json.loads(done.stdout)
    assert facts["model"]["layers"] == 1
    assert [run["world_size"] for run in facts["runs"]] == [1, 2, 4]
    assert list(tmp_path.iterdir()) == []


def test_command_imports_neither_deepspeed_nor_a_compiler(tmp_path: Path) -> None:
    import subprocess
    import sys

    probe = (
        "import sys; from plait.__main__ import main\ntry: main()\nfinally: print(sorted(sys.modules), file=sys.stderr)"
    )
    command = [sys.executable, "-c", probe, "train", "decoder/emu3-8b", "--dry-run"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert "8,492,011,520" in done.stdout
    loaded = set(re.findall(r"'([\w.]+)'", done.stderr))
    assert not {"deepspeed", "torch._dynamo", "transformers"} & loaded


def test_options_of_the_dry_run_need_it(plait: Callable[..., Any], tmp_path: Path) -> None:
    done = plait("train", "decoder/tiny", "--world-size", 2, cwd=tmp_path)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("plait: --world-size: is for --dry-run")
    assert done.stderr.count("\n") == 1
    assert plait("train", "decoder/tiny", "--dry-run", "--world-size", 0, cwd=tmp_path).returncode == 2
