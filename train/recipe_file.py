"""Recipe files: one YAML file is one run, read into the dataclasses of `plait.train.recipe`.

``kind`` at the top of the file says which it is: ``text-tokenizer``, ``visual-tokenizer``, ``audio-tokenizer`` or
``decoder``. Defaults are those of the dataclasses, the file overrides them, ``key.sub=value`` arguments override the
file. Paths are relative to where the command runs.
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
from plait.model.config import DecoderConfig
from plait.train.recipe import (
    AudioTokenizerRecipe,
    DecoderRecipe,
    Recipe,
    TextTokenizerRecipe,
    VisualTokenizerRecipe,
)
from plait.train.recipe_check import flat, problems

_RECIPES: dict[str, type[Recipe]] = {
    "text-tokenizer": TextTokenizerRecipe,
    "visual-tokenizer": VisualTokenizerRecipe,
    "audio-tokenizer": AudioTokenizerRecipe,
    "decoder": DecoderRecipe,
}

# What may differ when a run goes on: how long and how carefully it learns, what it reports, keeps and stores, and the
# folder's name.
_MAY_CHANGE = {
    "out", "steps", "save_every", "eval_every", "log_every", "keep", "generation", "store", "optimizer", "micro_batch",
    "z_loss", "discriminator_lr", "eval_items",
}  # fmt: skip


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
    overridden = [override.partition("=")[0] for override in overrides]
    config = OmegaConf.structured(_RECIPES[kind])
    if kind == "decoder":
        # Of the class: an instance has worked out what its zeros stand for, and not from this recipe's width.
        config.model = OmegaConf.structured(DecoderConfig)
    # One key at a time, because not every error of OmegaConf says which key it is about.
    layers: list[tuple[str, Any, Callable[[], Any]]] = [
        *((str(path), key, partial(OmegaConf.masked_copy, content, [key])) for key in plain),
        *(("command line", key, partial(_override, o)) for key, o in zip(overridden, overrides, strict=True)),
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
        if config.kind != kind:
            raise PlaitError(
                f"command line: kind is {config.kind!r}, {path} is of kind {kind!r}; choose another recipe"
            )
        for keys, reason in problems(OmegaConf.to_container(config, resolve=True)):
            given = any(f"{key}.".startswith(f"{o}.") or o.startswith(f"{key}.") for key in keys for o in overridden)
            raise PlaitError(f"{'command line' if given else path}: {keys[0]} {reason}")
        return cast(Recipe, OmegaConf.to_object(config))
    except OmegaConfBaseException as error:
        raise PlaitError(f"{path}: {_explain(error, 'value', kind)}") from None


def find_recipe(name: str) -> Path:
    """A recipe's file: a path if it exists, else a shipped name.

    Raises:
        PlaitError: neither is there, or the name is none that a file can have.
    """
    shipped = Path(str(importlib.resources.files("plait.launch").joinpath("recipes")))
    try:
        for path in (Path(name), shipped / f"{name}.yaml"):
            if path.is_file():
                return path
    except OSError as error:
        raise PlaitError(f"{name}: cannot be read ({error.strerror}); give a recipe's path or name") from None
    names = sorted(str(p.relative_to(shipped).with_suffix("")) for p in shipped.rglob("*.yaml"))
    raise PlaitError(f"{name}: no such recipe file, and the shipped recipes are {', '.join(names)}")


def save_recipe(recipe: Recipe, path: Path) -> None:
    """Write the resolved recipe; it can be run again as it stands."""
    plain = {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(recipe).items()}
    path.write_text(OmegaConf.to_yaml(OmegaConf.create(plain)), "utf-8")


def check_resumable(recipe: Recipe, out: Path) -> None:
    """See that a run goes on with the recipe it began with, which is in ``out/recipe.yaml`` if it began at all.

    Raises:
        PlaitError: a setting differs that makes it another run.
    """
    if not (out / "recipe.yaml").is_file():
        return
    now, before = (dict(flat(asdict(r))) for r in (recipe, load_recipe(str(out / "recipe.yaml"))))
    for key in {**now, **before}:
        if key.partition(".")[0] not in _MAY_CHANGE and now.get(key) != before.get(key):
            raise PlaitError(
                f"{out}: the run began with {key} {before.get(key)!r}, not {now.get(key)!r}; "
                "set it back or choose another out"
            )


def _explain(error: Exception, key: str, kind: str) -> str:
    """Say which key is wrong and why; ``key`` is what the error is about if it does not know itself."""
    key = str(getattr(error, "full_key", "") or key)
    if type(error).__name__ not in ("ConfigKeyError", "ConfigAttributeError"):
        reason = str(error).splitlines()[0]
        if "ListConfig, " in reason:
            reason = f"expected a list; write {key}=[{getattr(error, 'value', None) or '…'}]"
        return f"{key}: {reason}"
    known = _known_keys(OmegaConf.structured(_RECIPES[kind]))
    level = key.rpartition(".")[0]
    beside = [other for other in known if other.rpartition(".")[0] == level]
    start = len(level) + 1 if level in known else 0  # within a known level, only the last name is compared
    if near := difflib.get_close_matches(key[start:], [k[start:] for k in (beside if start else known)], 1, 0.5):
        return f"unknown key {key!r}; did you mean {key[:start] + near[0]!r}?"
    return f"unknown key {key!r}; known keys: {', '.join(beside)}"


def _known_keys(config: Any, prefix: str = "") -> list[str]:
    keys = []
    for key in config:
        keys.append(f"{prefix}{key}")
        if not OmegaConf.is_missing(config, key) and OmegaConf.is_dict(config[key]):
            keys += _known_keys(config[key], f"{prefix}{key}.")
    return keys


def _override(text: str) -> Any:
    """One ``key.sub=value`` as a config."""
    layer = OmegaConf.from_dotlist([text])
    if OmegaConf.missing_keys(layer):
        raise TypeError("??? stands for no value; give one")
    return layer
