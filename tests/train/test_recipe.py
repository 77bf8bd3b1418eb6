from collections.abc import Iterator
from dataclasses import asdict, fields, is_dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml

import plait.launch
from plait.errors import PlaitError
from plait.train.recipe import AudioTokenizerRecipe, DecoderRecipe, TextTokenizerRecipe, VisualTokenizerRecipe
from plait.train.recipe_check import RANGES, flat
from plait.train.recipe_file import check_resumable, load_recipe, save_recipe

KINDS = TextTokenizerRecipe, VisualTokenizerRecipe, AudioTokenizerRecipe, DecoderRecipe
BASE = "kind: decoder\nshards: [a]\ntokenizers: t\nout: o\n"
VISUAL = "kind: visual-tokenizer\nshards: [a]\nheldout: h\nout: o\n"
SHIPPED = sorted(
    str(path.relative_to(folder).with_suffix(""))
    for folder in (Path(root) / "recipes" for root in plait.launch.__path__)
    for path in folder.rglob("*.yaml")
)


def load(tmp_path: Path, text: str = BASE, *overrides: str, kinds: tuple[str, ...] = ("decoder",)) -> Any:
    path = tmp_path / "recipe.yaml"
    path.write_text(text, "utf-8")
    return load_recipe(str(path), overrides, kinds)


def refusal(tmp_path: Path, text: str, *overrides: str) -> str:
    with pytest.raises(PlaitError) as caught:
        load(tmp_path, text, *overrides)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_recipes_are_shipped() -> None:
    assert {"tiny/text", "tiny/image", "tiny/decoder"} <= set(SHIPPED)


@pytest.mark.parametrize("name", SHIPPED)
def test_shipped_recipe_survives_saving(name: str, tmp_path: Path) -> None:
    recipe = load_recipe(name)
    save_recipe(recipe, tmp_path / "again.yaml")
    assert load_recipe(str(tmp_path / "again.yaml")) == recipe


def test_saved_recipe_keeps_overrides(tmp_path: Path) -> None:
    overrides = ["optimizer.lr=3e-4", "optimizer.betas=[0.8, 0.99]", "sequence.loss_weights={text: 2}", "z_loss=1e-4"]
    recipe = load(tmp_path, BASE, *overrides, "generation.image={temperature: 0.5, top_k: 7}", "out='it''s: #1'")
    save_recipe(recipe, tmp_path / "again.yaml")
    assert load_recipe(str(tmp_path / "again.yaml")) == recipe


def test_overrides_take_the_field_s_type(tmp_path: Path) -> None:
    recipe = load(
        tmp_path, BASE + "steps: 5\n", "optimizer.lr=3e-4", "optimizer.betas=[0.8,0]", "shards=[x, y]", "out=12",
        "sequence.loss_weights.text=2", "model.qk_norm=false", "steps=7", "generation={image: {top_k: 3}}", "seed=1",
    )  # fmt: skip
    assert isinstance(recipe, DecoderRecipe)
    assert recipe.optimizer.lr == 3e-4
    assert recipe.optimizer.betas == (0.8, 0.0)
    assert recipe.shards == ["x", "y"]
    assert recipe.out == "12"
    assert recipe.sequence.loss_weights == {"text": 2.0}
    assert recipe.model.qk_norm == "none"
    assert recipe.steps == 7
    assert recipe.generation == {"image": {"top_k": 3}}


def test_sizes_left_out_follow_from_those_given(tmp_path: Path) -> None:
    recipe = load(tmp_path, BASE, "model.width=1024", "model.heads=8", "model.kv_heads=8")
    assert (recipe.model.head_size, recipe.model.ffn_width) == (128, 2752)
    save_recipe(recipe, tmp_path / "again.yaml")
    assert load_recipe(str(tmp_path / "again.yaml")) == recipe


def test_the_last_override_wins(tmp_path: Path) -> None:
    assert load(tmp_path, BASE, "steps=3", "steps=4").steps == 4


def test_visual_levels_are_a_tuple(tmp_path: Path) -> None:
    recipe = load(
        tmp_path, VISUAL + "model: {quantizer: {levels: [3, 3]}}\n", "model.widths=[8]", kinds=("visual-tokenizer",)
    )
    assert isinstance(recipe, VisualTokenizerRecipe)
    assert recipe.model.quantizer.levels == (3, 3)
    assert recipe.model.widths == (8,)


@pytest.mark.parametrize(
    ("wrong", "right"),
    [
        ("optimizer.lrr=1", "optimizer.lr"),
        ("optimiser.lr=1", "optimizer"),
        ("stepz=1", "steps"),
        ("model.widht=3", "model.width"),
        ("sequence.lenght=3", "sequence.length"),
    ],
)
def test_unknown_key_names_the_nearest(wrong: str, right: str, tmp_path: Path) -> None:
    key = wrong.partition("=")[0]
    message = refusal(tmp_path, BASE, wrong)
    assert "command line" in message
    assert repr(right) in message
    if "." not in key:
        assert repr(key) in message
    outer, _, inner = key.rpartition(".")
    message = refusal(tmp_path, BASE + (f"{outer}:\n  {inner}: 3\n" if outer else f"{key}: 3\n"))
    assert "recipe.yaml" in message
    assert repr(right) in message


def test_unknown_key_without_a_near_one_lists_its_level(tmp_path: Path) -> None:
    message = refusal(tmp_path, BASE, "qqqqqqqq=1")
    assert "known keys: shards, tokenizers" in message
    assert "optimizer.lr" not in message
    message = refusal(tmp_path, BASE, "parallel.qqqqqqqq=1")
    assert "known keys: parallel.zero, parallel.dtype, " in message
    assert "optimizer" not in message


@pytest.mark.parametrize(
    ("override", "field"),
    [
        ("steps=abc", "steps"),
        ("steps=1.5", "steps"),
        ("steps=true", "steps"),
        ("steps=null", "steps"),
        ("steps=", "steps"),
        ("steps=[1", "steps"),
        ("steps=[1]", "steps"),
        ("out=null", "out"),
        ("out={a: 1}", "out"),
        ("out=${nope}", "out"),
        ("out=${oc.env:PLAIT_NO_SUCH}", "out"),
        ("shards=foo", "shards"),
        ("shards.0=foo", "shards"),
        ("optimizer=5", "optimizer"),
        ("optimizer.lr=1e-3=4", "optimizer.lr"),
        ("optimizer.lr.x=1", "optimizer.lr"),
        ("optimizer.betas=[0.9]", "optimizer.betas"),
        ("sequence.loss_weights.text=much", "sequence.loss_weights.text"),
        ("generation=5", "generation"),
        ("model=[1]", "model"),
    ],
)
def test_wrong_type_names_the_field(override: str, field: str, tmp_path: Path) -> None:
    assert f"{field}" in refusal(tmp_path, BASE, override).removeprefix(str(tmp_path)).split(": ")[1]


@pytest.mark.parametrize(
    ("override", "field"),
    [
        ("parallel.zero=4", "parallel.zero"),
        ("parallel.zero=-1", "parallel.zero"),
        ("parallel.dtype=fp8", "parallel.dtype"),
        ("store=float16", "store"),
        ("steps=0", "steps"),
        ("micro_batch=0", "micro_batch"),
        ("streams=-1", "streams"),
        ("save_every=0", "save_every"),
        ("log_every=0", "log_every"),
        ("keep=0", "keep"),
        ("keep=-1", "keep"),
        ("sequence.length=0", "sequence.length"),
        ("sequence.media_first=1.5", "sequence.media_first"),
        ("sequence.drop_text=nan", "sequence.drop_text"),
        ("model.width=33", "width 33"),
        ("model.kv_heads=3", "kv_heads"),
        ("kind=visual-tokenizer", "kind"),
    ],
)
def test_invalid_value_names_the_field(override: str, field: str, tmp_path: Path) -> None:
    assert field in refusal(tmp_path, BASE, override)


@pytest.mark.parametrize(
    ("override", "reason"),
    [
        ("optimizer.lr=0", "optimizer.lr is 0.0, expected a number in (0, inf)"),
        ("optimizer.lr=.nan", "optimizer.lr is nan"),
        ("optimizer.lr=.inf", "optimizer.lr is inf"),
        ("optimizer.lr=1e-9", "optimizer.min_lr is 5e-05, expected no more than optimizer.lr"),
        ("optimizer.min_lr=-1", "optimizer.min_lr"),
        ("optimizer.warmup_steps=-1", "optimizer.warmup_steps"),
        ("optimizer.betas=[0.9, 1]", "optimizer.betas is (0.9, 1.0), expected numbers in [0, 1)"),
        ("optimizer.weight_decay=-1", "optimizer.weight_decay"),
        ("optimizer.clip=-1", "optimizer.clip"),
        ("z_loss=-1", "z_loss"),
        ("seed=-1", "seed"),
        ("sequence.context_loss=-1", "sequence.context_loss"),
        ("sequence.loss_weights.text=-1", "sequence.loss_weights.text is -1.0"),
        ("sequence.loss_weights.smell=1", "sequence.loss_weights.smell is of no known modality; there are text, image"),
        ("generation.smell={}", "generation.smell is of no known modality"),
        ("generation={image: {temperature: abc}}", "generation.image.temperature is 'abc', expected a number"),
        ("generation={image: {top_p: 2}}", "generation.image.top_p"),
        ("generation={image: {warmth: 2}}", "generation.image.warmth"),
        ("generation.image=1", "generation.image is 1"),
        ("model.vocabulary_size=-1", "model.vocabulary_size is -1, expected a number in [0, inf)"),
        ("model.dropout=1", "model.dropout is 1.0, expected a number in [0, 1)"),
        ("model.attention_dropout=-0.1", "model.attention_dropout is -0.1, expected a number in [0, 1)"),
        ("model.head_size=-2", "model.head_size is -2, expected a number in [0, inf)"),
        ("model.head_size=7", "model is wrong: decoder: head_size is 7, must be even"),
        ("model.sliding_window=-1", "model.sliding_window is -1, expected a number in [0, inf)"),
        ("model.qk_norm=batch", "model is wrong: decoder: qk_norm is 'batch', expected none, rms, layer"),
        ("model.norm_placement=mid", "model is wrong: decoder: norm_placement is 'mid', expected pre, post"),
        ("model.rope_scaling.kind=long", "model is wrong: decoder: rope_scaling.kind is 'long', expected none, linear"),
        ("model.rope_scaling.kind=yarn", "model is wrong: decoder: rope_scaling.original_context is 0, must be"),
        ("model.rope_scaling.factor=0", "model.rope_scaling.factor is 0.0, expected a number in (0, inf)"),
        ("model.rope_scaling.original_context=-1", "model.rope_scaling.original_context is -1"),
        ("model.rope_scaling.low_freq_factor=0", "model.rope_scaling.low_freq_factor is 0.0"),
        ("model.rope_scaling.high_freq_factor=0", "model.rope_scaling.high_freq_factor is 0.0"),
        ("model.rope_scaling.beta_fast=-1", "model.rope_scaling.beta_fast is -1.0"),
        ("model.rope_scaling.beta_slow=.nan", "model.rope_scaling.beta_slow is nan"),
        ("model.rope_scaling.attention_factor=-1", "model.rope_scaling.attention_factor is -1.0"),
        ("model.rope_scaling.fator=2", "unknown key 'model.rope_scaling.fator'; did you mean 'model.rope_scaling.fact"),
        ("model.width=33", "model"),
        ("train=[lm_head.weight]", "train needs init, a trained model of which the rest is kept"),
        ("rows=[new]", "rows needs init"),
        ("lora.rank=4", "lora.rank needs init"),
        ("lora.quantize=int4", "lora.quantize quantizes what LoRA learns beside; it needs a lora.rank above 0"),
        ("out=''", "out is empty"),
        ("steps=???", "steps: ??? stands for no value"),
        ("shards=foo", "shards: expected a list; write shards=[foo]"),
    ],
)
def test_the_command_line_is_blamed_for_its_values(override: str, reason: str, tmp_path: Path) -> None:
    assert refusal(tmp_path, BASE, override).startswith(f"command line: {reason}")


@pytest.mark.parametrize(
    ("override", "reason"),
    [
        ("loss.l1=-1", "loss.l1 is -1.0, expected a number in [0, inf)"),
        ("loss.log_l2=nan", "loss.log_l2 is nan"),
        ("loss.perceptual_every=0", "loss.perceptual_every is 0"),
        ("loss.perceptual=1", "loss.network and loss.perceptual need each other"),
        ("loss.network=vgg16.pth", "loss.network and loss.perceptual need each other"),
        ("ema=1", "ema is 1.0, expected a number in [0, 1)"),
        ("log_every=0", "log_every is 0"),
        ("accumulate=0", "accumulate is 0"),
        ("shift=-1", "shift is -1"),
        ("discriminator_lr=0", "discriminator_lr is 0.0"),
        ("precision=float16", "precision is 'float16', expected 'float32' or 'bfloat16'"),
        ("store=int8", "store is 'int8'"),
        ("heldout=''", "heldout is empty"),
        ("shards=[]", "shards is empty; name folders of images, or train on clips alone with clips.share=1"),
        ("image_size=0", "image_size is 0"),
        ("image_size=30", "image_size is 30, expected a multiple of the model's factor, 8"),
        ("{image_size: 8, loss: {ssim: 1}}", "image_size is below 11, the window of loss.ssim"),
        ("batch_size=9", "batch_size is 9, expected a multiple of streams × accumulate, 2"),
        ("accumulate=32", "batch_size is 32, expected a multiple of streams × accumulate, 64"),
        ("model.patch=0", "model.patch is 0"),
        ("model.stem=wavelet", "model is wrong: visual tokenizer: stem is 'wavelet'"),
        ("model.temporal_factor=3", "model is wrong: visual tokenizer: temporal_factor is 3"),
        ("model.attention=[5]", "model is wrong: visual tokenizer: attention at level 5"),
        ("model.quantizer.kind=vqvae", "model.quantizer is wrong: quantizer: kind is 'vqvae', must be one of fsq"),
        ("model.quantizer.kind=vq_ema", "model.quantizer is wrong: quantizer: codebook_size is 0"),
        ("model.quantizer.levels=[2]", "model.quantizer.levels is (2,)"),
        ("model.quantizer.dropout=0.5", "model.quantizer is wrong: quantizer: dropout is 0.5"),
        ("model.quantizer.entropy_temperature=0", "model.quantizer.entropy_temperature is 0.0"),
        ("adversarial.weight=-1", "adversarial.weight is -1.0"),
        ("adversarial.loss=wgan", "adversarial is wrong: adversarial: loss is 'wgan'"),
        ("adversarial.start_discriminator=5", "adversarial is wrong: adversarial: start_generator (1) is before"),
        ("adversarial.discriminator.kind=patch4d", "adversarial is wrong: discriminator: kind is 'patch4d'"),
        ("adversarial.discriminator.width=12", "adversarial is wrong: discriminator: width is 12"),
        ("{image_size: 16, adversarial: {weight: 0.1}}", "image_size is 16, expected at least 24"),
        ("clips.share=1.5", "clips.share is 1.5, expected a number in [0, 1]"),
        ("clips.fps=0", "clips.fps is 0.0"),
        ("clips.frames=0", "clips.frames is 0"),
        ("clips.shards=[c]", "clips.heldout is empty"),
        ("{clips: {shards: [c], heldout: h, batch_size: 5}}", "clips.batch_size is 5, expected a multiple"),
        (
            "{clips: {shards: [c], heldout: h, frames: 8}, model: {temporal_factor: 4}}",
            "clips.frames is 8, expected 1 + a multiple of the temporal factor, 4",
        ),
        ("{clips: {shards: [c], heldout: h}, shards: []}", "shards is empty"),
    ],
)
def test_visual_values_are_checked(override: str, reason: str, tmp_path: Path) -> None:
    load(tmp_path, VISUAL, kinds=("visual-tokenizer",))
    # Several keys at once as a file, one key both ways.
    overrides = [] if override.startswith("{") else [override]
    text = yaml.safe_dump({**yaml.safe_load(VISUAL), **({} if overrides else yaml.safe_load(override))})
    with pytest.raises(PlaitError) as caught:
        load(tmp_path, text, *overrides, kinds=("visual-tokenizer",))
    assert str(caught.value).startswith(f"{'command line' if overrides else tmp_path / 'recipe.yaml'}: {reason}")
    assert "\n" not in str(caught.value)


def test_clips_alone_need_no_images(tmp_path: Path) -> None:
    clips = "clips.shards=[c]", "clips.heldout=h", "clips.share=1", "shards=[]"
    assert load(tmp_path, VISUAL, *clips, kinds=("visual-tokenizer",)).shards == []


def test_frames_and_batches_of_clips_do_not_matter_without_any(tmp_path: Path) -> None:
    overrides = "clips.frames=8", "clips.batch_size=5", "model.temporal_factor=4"
    assert load(tmp_path, VISUAL, *overrides, kinds=("visual-tokenizer",)).clips.frames == 8


def test_a_shipped_recipe_s_init_has_its_architecture() -> None:
    recipes = [recipe for recipe in map(load_recipe, SHIPPED) if isinstance(recipe, VisualTokenizerRecipe)]
    by_tokenizer = {f"{recipe.out}/tokenizer": recipe for recipe in recipes}
    for recipe in recipes:
        if recipe.init:
            mine, its = (dict(flat(asdict(r.model))) for r in (recipe, by_tokenizer[recipe.init]))
            trained = [f"quantizer.{k}" for k in ("decay", "dead_code", "commitment", "dropout")]
            trained += [key for key in mine if key.startswith("quantizer.entropy")]
            assert {key for key in mine if mine[key] != its[key]} <= {"temporal_factor", *trained}


def test_the_file_is_blamed_for_its_values(tmp_path: Path) -> None:
    message = refusal(tmp_path, BASE + "z_loss: -1\n", "optimizer.lr=0.1")
    assert message.startswith(f"{tmp_path / 'recipe.yaml'}: z_loss is -1.0")


def _names(kind: Any, prefix: str = "") -> Iterator[str]:
    for field in fields(kind):
        yield f"{prefix}{field.name}"
        if is_dataclass(field.type):
            yield from _names(field.type, f"{prefix}{field.name}.")


def test_every_number_has_a_range() -> None:
    numbers = {
        key
        for name in SHIPPED
        for key, value in flat(asdict(load_recipe(name)))
        if isinstance(value[0] if value and isinstance(value, tuple) else value, (int, float, tuple))
        and not isinstance(value, bool)
        and not key.startswith("generation.")
    }
    assert {key.rpartition(".")[0] for key in numbers if key not in RANGES} == {"sequence.loss_weights"}
    # And no range is of a key that there no longer is: a new name would go unchecked.
    keys = {key for kind in KINDS for key in _names(kind)}
    assert set(RANGES) <= keys


def test_a_run_goes_on_with_its_recipe_only(tmp_path: Path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    check_resumable(load(tmp_path), run)
    save_recipe(load(tmp_path), run / "recipe.yaml")
    check_resumable(load(tmp_path, BASE, "steps=7", "optimizer.lr=0.1", "generation.text.top_k=1", "keep=9"), run)
    for override in ("sequence.loss_weights.text=2", "model.layers=3", "seed=1"):
        with pytest.raises(PlaitError, match=rf"run: the run began with {override.partition('=')[0]} "):
            check_resumable(load(tmp_path, BASE, override), run)


def test_a_name_too_long_for_a_file() -> None:
    with pytest.raises(PlaitError, match="File name too long"):
        load_recipe("x" * 300)


@pytest.mark.parametrize("missing", ["shards", "tokenizers", "out"])
def test_required_key_is_named(missing: str, tmp_path: Path) -> None:
    text = "".join(line + "\n" for line in BASE.splitlines() if not line.startswith(missing))
    assert f"{missing} is not set" in refusal(tmp_path, text)
    value = "[b]" if missing == "shards" else "b"
    assert getattr(load(tmp_path, text, f"{missing}={value}"), missing) in ("b", ["b"])


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "kind is missing"),
        ("# nothing\n", "kind is missing"),
        ("- kind\n- decoder\n", "kind is missing"),
        ("hello", "kind is missing"),
        ("5", "expected a mapping"),
        ("kind: foo\n", "kind is 'foo', this command runs 'decoder'"),
        ("kind: text-tokenizer\n", "kind is 'text-tokenizer', this command runs 'decoder'"),
        ("kind: ${x}\n", "kind is '${x}'"),
        (BASE + "x: [\n", "not readable as YAML"),
        (BASE + "out: p\n", "duplicate key out"),
        (BASE + "\tsteps: 1\n", "not readable as YAML"),
        ("kind: !!python/object:os.system x\n", "not readable as YAML"),
        (BASE + "model: null\n", "model"),
        (BASE + "model: [1]\n", "model"),
        (BASE + "1: 2\n", "unknown key '1'"),
    ],
)
def test_broken_file_is_named(text: str, reason: str, tmp_path: Path) -> None:
    message = refusal(tmp_path, text)
    assert message.startswith(str(tmp_path / "recipe.yaml"))
    assert reason in message


def test_file_that_is_not_text(tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(PlaitError, match=r"recipe\.yaml: not readable as YAML"):
        load_recipe(str(tmp_path / "recipe.yaml"))


def test_override_without_equals_sign(tmp_path: Path) -> None:
    assert refusal(tmp_path, BASE, "steps") == "steps: overrides are written key=value"


def test_unknown_recipe_lists_the_shipped_ones(tmp_path: Path) -> None:
    for name in ("tiny/nope", str(tmp_path)):
        with pytest.raises(PlaitError) as caught:
            load_recipe(name)
        assert all(shipped in str(caught.value) for shipped in SHIPPED)


def test_a_path_wins_over_a_shipped_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "tiny").mkdir()
    (tmp_path / "tiny" / "decoder").write_text(BASE + "steps: 77\n")
    monkeypatch.chdir(tmp_path)
    assert load_recipe("tiny/decoder").steps == 77  # type: ignore[union-attr]
