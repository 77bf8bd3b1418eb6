from pathlib import Path
from typing import Any

import pytest

import plait.launch
from plait.errors import PlaitError
from plait.train.recipe import DecoderRecipe, VisualTokenizerRecipe
from plait.train.recipe_file import load_recipe, save_recipe

BASE = "kind: decoder\nshards: [a]\ntokenizers: t\nout: o\n"
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
        tmp_path, BASE + "steps: 5\n", "optimizer.lr=3e-4", "optimizer.betas=[0.8,1]", "shards=[x, y]", "out=12",
        "sequence.loss_weights.text=2", "model.qk_norm=false", "steps=7", "generation={image: {top_k: 3}}", "seed=1",
    )  # fmt: skip
    assert isinstance(recipe, DecoderRecipe)
    assert recipe.optimizer.lr == 3e-4
    assert recipe.optimizer.betas == (0.8, 1.0)
    assert recipe.shards == ["x", "y"]
    assert recipe.out == "12"
    assert recipe.sequence.loss_weights == {"text": 2.0}
    assert recipe.model.qk_norm is False
    assert recipe.steps == 7
    assert recipe.generation == {"image": {"top_k": 3}}


def test_the_last_override_wins(tmp_path: Path) -> None:
    assert load(tmp_path, BASE, "steps=3", "steps=4").steps == 4


def test_visual_levels_are_a_tuple(tmp_path: Path) -> None:
    text = "kind: visual-tokenizer\nshards: [a]\nheldout: h\nout: o\nmodel: {levels: [3, 3]}\n"
    recipe = load(tmp_path, text, "model.widths=[8]", kinds=("visual-tokenizer",))
    assert isinstance(recipe, VisualTokenizerRecipe)
    assert recipe.model.levels == (3, 3)
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


def test_unknown_key_without_a_near_one_lists_all(tmp_path: Path) -> None:
    assert "known keys: shards, tokenizers" in refusal(tmp_path, BASE, "qqqqqqqq=1")


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
