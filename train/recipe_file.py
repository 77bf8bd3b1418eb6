"""Recipe files: one YAML file is one run, read into the dataclasses of `plait.train.recipe`.

``kind`` at the top of the file says which of the three it is: ``text-tokenizer``, ``visual-tokenizer`` or ``decoder``.
Defaults are those of the dataclasses, the file overrides them, ``key.sub=value`` arguments override the file. Paths
are relative to where the command runs.
"""

import difflib
import importlib.resources
from collections.abc import Callable, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any, cast

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from plait.errors import PlaitError
from plait.infer.sampling import Sampling
from plait.train.recipe import DecoderRecipe, Recipe, TextTokenizerRecipe, VisualTokenizerRecipe

_RECIPES: dict[str, type[Recipe]] = {
    "text-tokenizer": TextTokenizerRecipe,
    "visual-tokenizer": VisualTokenizerRecipe,
    "decoder": DecoderRecipe,
}


def load_recipe(name: str, overrides: Sequence[str] = (), kinds: Sequence[str] = tuple(_RECIPES)) -> Recipe:
    """Read a recipe.

    Args:
        name: a path, or a shipped recipe's name such as "tiny/image".
        overrides: ``key.sub=value`` strings.
        kinds: the kinds that the calling command can run.

    Raises:
        PlaitError: the recipe does not exist or is broken, or a key or value is wrong.
    """
    path = find_recipe(name)
    try:
        content: Any = OmegaConf.create(path.read_text("utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise PlaitError(f"{path}: not readable as YAML ({' '.join(str(error).split())})") from None
    except AssertionError:  # what OmegaConf says to a lone number
        raise PlaitError(f"{path}: expected a mapping of keys to values") from None
    plain: Any = OmegaConf.to_container(content)
    kind: Any = plain.get("kind") if isinstance(plain, dict) else None
    if kind not in kinds:
        found = "missing" if kind is None else repr(kind)
        raise PlaitError(f"{path}: kind is {found}, this command runs {' or '.join(map(repr, kinds))}")
    for override in overrides:
        if "=" not in override:
            raise PlaitError(f"{override}: overrides are written key=value")
    config = OmegaConf.structured(_RECIPES[kind])
    # One key at a time, because not every error of OmegaConf says which key it is about.
    layers: list[tuple[str, Any, Callable[[], Any]]] = [
        *((str(path), key, partial(OmegaConf.masked_copy, content, [key])) for key in plain),
        *(("command line", o.partition("=")[0], partial(OmegaConf.from_dotlist, [o])) for o in overrides),
    ]
    for source, key, read in layers:
        try:
            config = OmegaConf.merge(config, read())
        except (OmegaConfBaseException, yaml.YAMLError, TypeError) as error:
            raise PlaitError(f"{source}: {_explain(error, str(key), kind)}") from None
    try:
        missing = sorted(OmegaConf.missing_keys(config))
        if missing:
            raise PlaitError(f"{path}: {missing[0]} is not set; add it or give {missing[0]}=… as an argument")
        recipe = cast(Recipe, OmegaConf.to_object(config))
    except OmegaConfBaseException as error:
        raise PlaitError(f"{path}: {_explain(error, 'value', kind)}") from None
    if recipe.kind != kind:
        raise PlaitError(f"command line: kind is {recipe.kind!r}, {path} is of kind {kind!r}; choose another recipe")
    _check(recipe, path)
    return recipe


def find_recipe(name: str) -> Path:
    """A recipe's file: a path if it exists, else a shipped name.

    Raises:
        PlaitError: neither is there.
    """
    if Path(name).is_file():
        return Path(name)
    shipped = Path(str(importlib.resources.files("plait.launch").joinpath("recipes")))
    if (shipped / f"{name}.yaml").is_file():
        return shipped / f"{name}.yaml"
    names = sorted(str(p.relative_to(shipped).with_suffix("")) for p in shipped.rglob("*.yaml"))
    raise PlaitError(f"{name}: no such recipe file, and the shipped recipes are {', '.join(names)}")


def save_recipe(recipe: Recipe, path: Path) -> None:
    """Write the resolved recipe; it can be run again as it stands."""
    plain = {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(recipe).items()}
    path.write_text(OmegaConf.to_yaml(OmegaConf.create(plain)), "utf-8")


def _explain(error: Exception, key: str, kind: str) -> str:
    """Say which key is wrong and why; ``key`` is what the error is about if it does not know itself."""
    key = str(getattr(error, "full_key", "") or key)
    if type(error).__name__ not in ("ConfigKeyError", "ConfigAttributeError"):
        return f"{key}: {str(error).splitlines()[0]}"
    known = _known_keys(OmegaConf.structured(_RECIPES[kind]))
    near = difflib.get_close_matches(key, known, n=1, cutoff=0.5)
    return f"unknown key {key!r}" + (f"; did you mean {near[0]!r}?" if near else f"; known keys: {', '.join(known)}")


def _known_keys(config: Any, prefix: str = "") -> list[str]:
    keys = []
    for key in config:
        keys.append(f"{prefix}{key}")
        if not OmegaConf.is_missing(config, key) and OmegaConf.is_dict(config[key]):
            keys += _known_keys(config[key], f"{prefix}{key}.")
    return keys


def _check(recipe: Recipe, path: Path) -> None:
    """Refuse values that would fail late or silently do nothing."""
    for name in (
        "steps",
        "batch_size",
        "global_batch",
        "micro_batch",
        "streams",
        "save_every",
        "eval_every",
        "log_every",
        "keep",
        "image_size",
    ):
        if getattr(recipe, name, 1) < 1:
            raise PlaitError(f"{path}: {name} is {getattr(recipe, name)}, it must be at least 1")
    if getattr(recipe, "store", "float32") not in ("float32", "bfloat16"):
        raise PlaitError(f"{path}: store is {recipe.store!r}, expected 'float32' or 'bfloat16'")  # type: ignore[union-attr]
    if isinstance(recipe, DecoderRecipe):
        if recipe.parallel.zero not in (0, 1, 2, 3):
            raise PlaitError(f"{path}: parallel.zero is {recipe.parallel.zero}, expected 0, 1, 2 or 3")
        if recipe.parallel.dtype not in ("float32", "bfloat16"):
            raise PlaitError(f"{path}: parallel.dtype is {recipe.parallel.dtype!r}, expected 'float32' or 'bfloat16'")
        if recipe.sequence.length < 1:
            raise PlaitError(f"{path}: sequence.length is {recipe.sequence.length}, it must be at least 1")
        for modality, settings in recipe.generation.items():
            try:
                Sampling.of(settings)
            except (PlaitError, TypeError) as error:
                raise PlaitError(f"{path}: generation.{modality}: {error}") from None
        for share in ("media_first", "drop_text"):
            if not 0 <= getattr(recipe.sequence, share) <= 1:
                raise PlaitError(f"{path}: sequence.{share} is {getattr(recipe.sequence, share)}, expected 0 to 1")
