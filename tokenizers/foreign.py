"""Tokenizer checkpoints of other projects: read without running code, recognised by their tensors' names, renamed.

Each network's module lists its `Layout`s: ways in which released files name its tensors. A converter only renames and
reshapes; what does not come out as exactly the network's own tensors is an error that names the tensor.
"""

import pickle
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import safetensors
import torch
from safetensors.torch import load_file
from torch import Tensor

from plait.errors import PlaitError
from plait.tokenizers.base import read_json
from plait.tokenizers.pixels import PixelTokenizer

Tensors = dict[str, Tensor]

# Modules with a `LAYOUTS` tuple.
_MODULES = ("plait.tokenizers.emu3", "plait.tokenizers.vqgan", "plait.tokenizers.vidtok")
_WEIGHTS = (".safetensors", ".ckpt", ".pt", ".pth", ".bin")
# Where training code wraps the weights in its checkpoints, the averaged ones first.
_WRAPPERS = ("ema", "state_dict", "model")


@dataclass(frozen=True)
class Layout:
    """One way in which released files name a network's tensors.

    Attributes:
        name: what to call it in errors, "LlamaGen" for instance.
        tokenizer: the class, as "module:Class".
        recognise: whether tensors of these names (with any prefix taken off by `rename`) are of this layout; the second
            argument is the folder's config.json or {}.
        configure: the network's configuration, from the tensors' shapes and the folder's config.json or {}.
        rename: the file's tensors → the network's own names and shapes; drops what the network has no use for (losses,
            counters).
    """

    name: str
    tokenizer: str
    recognise: Callable[[Mapping[str, Tensor], dict[str, Any]], bool]
    configure: Callable[[Mapping[str, Tensor], dict[str, Any]], Any]
    rename: Callable[[Tensors, Any], Tensors]


def load_foreign(path: Path) -> PixelTokenizer | None:
    """Load another project's checkpoint: a weights file, or a folder that holds one (and perhaps a config.json).

    Returns:
        the tokenizer in float32, ready for inference, or None when nothing here looks like a checkpoint.

    Raises:
        PlaitError: a file that cannot be read safely, unknown tensors, or a missing, extra or mis-shaped one.
    """
    files = weight_files(path)
    if not files:
        return None
    beside = path / "config.json" if path.is_dir() else path.with_name("config.json")
    config = read_json(beside) if beside.is_file() else {}
    tensors: Tensors = {}
    for file in files:
        tensors |= read_checkpoint(file)
    for layout in known_layouts():
        if layout.recognise(tensors, config):
            return convert(tensors, config, layout, path)
    names = ", ".join(layout.name for layout in known_layouts())
    raise PlaitError(
        f"{path}: its tensors ({', '.join(sorted(tensors)[:2])}, …) are of no tokenizer that is known here; known: {names}"
    )


def known_layouts() -> list[Layout]:
    """Every layout, the more particular ones of a module first."""
    return [layout for module in _MODULES for layout in import_module(module).LAYOUTS]


def convert(tensors: Tensors, config: dict[str, Any], layout: Layout, where: Path | str) -> PixelTokenizer:
    """Build a layout's network and fill it.

    Raises:
        PlaitError: a tensor is missing, extra or of another shape, or holds values that are not finite.
    """
    module, class_name = layout.tokenizer.split(":")
    settings = layout.configure(tensors, config)
    with torch.device("meta"):
        tokenizer: PixelTokenizer = getattr(import_module(module), class_name)(settings)
    renamed = layout.rename(dict(tensors), settings)
    expected = tokenizer.state_dict()
    for problem, names in (("is missing", set(expected) - set(renamed)), ("is extra", set(renamed) - set(expected))):
        if names:
            raise PlaitError(f"{where}: tensor {min(names)!r} {problem}; not a whole {layout.name} checkpoint")
    for name, tensor in renamed.items():
        if tensor.shape != expected[name].shape:
            raise PlaitError(
                f"{where}: tensor {name!r} has shape {tuple(tensor.shape)}, expected {tuple(expected[name].shape)} "
                f"in a {layout.name} checkpoint"
            )
        if tensor.is_floating_point() and not bool(tensor.isfinite().all()):
            raise PlaitError(f"{where}: tensor {name!r} holds values that are not finite; the file is damaged")
    stored = {name: tensor.to(expected[name].dtype, copy=True) for name, tensor in renamed.items()}
    tokenizer.load_state_dict(stored, assign=True)
    tokenizer.eval().requires_grad_(False)
    return tokenizer


def weight_files(path: Path) -> list[Path]:
    """The weights file, or those in a folder: a sharded set by its index, else the one there is.

    Raises:
        PlaitError: a folder with several unrelated weights files, or an index that names a missing file.
    """
    if path.is_file():
        return [path] if path.suffix in _WEIGHTS else []
    indexes = sorted(path.glob("*.safetensors.index.json"))
    if indexes:
        names = sorted({str(name) for name in read_json(indexes[0]).get("weight_map", {}).values()})
        for name in names:
            if Path(name).name != name or not (path / name).is_file():
                raise PlaitError(f"{path / name}: named by {indexes[0].name} but not there; copy the folder again")
        return [path / name for name in names]
    for suffix in _WEIGHTS:
        found = sorted(path.glob(f"*{suffix}"))
        if len(found) > 1:
            raise PlaitError(f"{path}: holds {found[0].name} and {found[1].name}; name the file to load")
        if found:
            return found
    return []


def read_checkpoint(path: Path) -> Tensors:
    """The tensors of a .safetensors file, or of a .pt, .pth, .ckpt or .bin file that holds nothing but tensors.

    Raises:
        PlaitError: the file is broken, or needs Python objects to be unpickled, which would run its code.
    """
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        reason = str(error).splitlines()[0].removeprefix("Weights only load failed. ").strip()
        raise PlaitError(
            f"{path}: holds Python objects besides tensors, and loading those runs code from the file ({reason[:120]}); "
            "on a machine where you trust it, convert it: state = torch.load(path, weights_only=False)['state_dict']; "
            "safetensors.torch.save_file({k: v.contiguous() for k, v in state.items()}, 'model.safetensors')"
        ) from None
    except (OSError, RuntimeError, ValueError, EOFError, KeyError, safetensors.SafetensorError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise PlaitError(f"{path}: not a readable checkpoint ({reason}); copy it again") from None
    while isinstance(content, dict) and (
        inner := next((w for w in _WRAPPERS if isinstance(content.get(w), dict)), None)
    ):
        content = content[inner]
    if not isinstance(content, dict):
        raise PlaitError(f"{path}: holds a {type(content).__name__}, expected a dictionary of tensors")
    tensors = {str(name): value for name, value in content.items() if isinstance(value, Tensor)}
    if not tensors:
        raise PlaitError(f"{path}: holds no tensors; expected a checkpoint's state_dict")
    return tensors
