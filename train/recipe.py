"""Recipes: one YAML file is one run, read into typed dataclasses.

``kind`` at the top of the file says which of the three it is: ``text-tokenizer``, ``visual-tokenizer`` or ``decoder``.
Defaults are those of the dataclasses, the file overrides them, ``key.sub=value`` arguments override the file. Paths
are relative to where the command runs.
"""

import difflib
import importlib.resources
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, cast

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from plait.errors import PlaitError
from plait.infer.sampling import Sampling
from plait.model.config import DecoderConfig
from plait.tokenizers.visual import VisualConfig


@dataclass
class OptimizerConfig:
    """AdamW with linear warm-up and cosine decay.

    Attributes:
        lr: peak learning rate, reached after ``warmup_steps``.
        min_lr: learning rate at the last step.
        warmup_steps: optimizer steps of linear warm-up from 0.
        betas: AdamW's decay of the two moments.
        weight_decay: on matrices only, never on norms or biases.
        clip: largest norm of the whole gradient; 0 turns clipping off.
    """

    lr: float = 5e-4
    min_lr: float = 5e-5
    warmup_steps: int = 100
    betas: tuple[float, float] = (0.9, 0.95)
    weight_decay: float = 0.05
    clip: float = 1.0


@dataclass
class TextTokenizerRecipe:
    """Train a SentencePiece BPE on the text of raw shards.

    Attributes:
        shards: folders of raw shards.
        out: folder that the tokenizer is written to.
        vocabulary_size: pieces, the 256 byte pieces included.
    """

    shards: list[str]
    out: str
    vocabulary_size: int = 1024
    kind: str = "text-tokenizer"


@dataclass
class VisualTokenizerRecipe:
    """Train a visual tokenizer on the images of raw shards.

    Attributes:
        shards: folders of raw shards to train on.
        heldout: folder of raw shards to evaluate on.
        out: run folder; the tokenizer ends in ``out/tokenizer``.
        image_size: images are scaled to cover a square of this side and cropped to it.
        batch_size: images per optimizer step.
        steps: optimizer steps.
        l1: weight of the absolute error.
        l2: weight of the squared error.
        log_l2: weight of the logarithm of each image's squared error.
        flip: mirror half of the images.
        ema: decay of the averaged weights, which are what is evaluated and saved.
        eval_every: steps between evaluations and checkpoints.
        store: dtype of the saved weights, "float32" or "bfloat16".
    """

    shards: list[str]
    heldout: str
    out: str
    model: VisualConfig = field(default_factory=VisualConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    image_size: int = 64
    batch_size: int = 32
    steps: int = 4000
    l1: float = 0.2
    l2: float = 1.0
    log_l2: float = 0.0
    flip: bool = True
    ema: float = 0.999
    eval_every: int = 500
    seed: int = 0
    store: str = "bfloat16"
    kind: str = "visual-tokenizer"


@dataclass
class ParallelConfig:
    """How the decoder is spread over processes.

    Attributes:
        zero: DeepSpeed ZeRO stage, 0 to 3.
        dtype: "float32" or "bfloat16" for parameters and activations; bfloat16 keeps float32 masters.
    """

    zero: int = 0
    dtype: str = "float32"


@dataclass
class SequenceConfig:
    """From documents to training sequences.

    Attributes:
        length: tokens per packed sequence.
        media_first: share of text–media documents that are turned round, so the model learns both directions.
        drop_text: share of documents with text before media that lose the text, for classifier-free guidance.
        context_loss: loss weight of media that stand before text: they are what the text is about, not what the
            document teaches.
        loss_weights: weight of each modality's tokens; 1 where not named.
    """

    length: int = 512
    media_first: float = 0.5
    drop_text: float = 0.1
    context_loss: float = 0.0
    loss_weights: dict[str, float] = field(default_factory=dict)


@dataclass
class DecoderRecipe:
    """Train a decoder on token shards, ending in a bundle.

    Attributes:
        shards: folders of token shards.
        tokenizers: folder whose subfolders are the tokenizers that made the shards.
        out: run folder; checkpoints go to ``out/checkpoints``, the bundle to ``out/bundle``.
        global_batch: sequences per optimizer step over all processes and accumulation steps.
        micro_batch: sequences per forward pass of one process at most.
        streams: independent data streams over all processes, each in a worker process of its own; they divide
            ``global_batch``. The same number gives the same batches on any number of processes that divides it.
        steps: optimizer steps.
        z_loss: weight of the squared log-partition term (PaLM, arXiv 2204.02311), 0 turns it off.
        save_every: steps between checkpoints.
        log_every: steps between log lines.
        keep: checkpoints that are kept.
        store: dtype of the bundle's weights, "float32" or "bfloat16".
        generation: settings that `plait generate` takes from the bundle.
    """

    shards: list[str]
    tokenizers: str
    out: str
    model: DecoderConfig = field(default_factory=DecoderConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    sequence: SequenceConfig = field(default_factory=SequenceConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    global_batch: int = 8
    micro_batch: int = 8
    streams: int = 4
    steps: int = 1000
    z_loss: float = 0.0
    save_every: int = 500
    log_every: int = 10
    keep: int = 2
    seed: int = 0
    store: str = "bfloat16"
    generation: dict[str, Any] = field(default_factory=dict)
    kind: str = "decoder"


Recipe = TextTokenizerRecipe | VisualTokenizerRecipe | DecoderRecipe
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
