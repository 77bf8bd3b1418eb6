"""Tokenizer checkpoints of other projects: read without running code, recognised by their tensors' names, renamed.

Each network's module lists its `Layout`s: ways in which released files name its tensors. A converter only renames and
reshapes; what does not come out as exactly the network's own tensors is an error that names the tensor.
"""

import argparse
import re
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from plait.errors import PlaitError
from plait.tokenizers.base import read_json
from plait.tokenizers.network import NetworkTokenizer

Tensors = dict[str, Tensor]

# Modules with a `LAYOUTS` tuple.
_MODULES = (
    "plait.tokenizers.emu3",
    "plait.tokenizers.vqgan",
    "plait.tokenizers.vidtok",
    "plait.tokenizers.dac",
    "plait.tokenizers.snac",
    "plait.tokenizers.encodec",
    "plait.tokenizers.mimi",
)
_WEIGHTS = (".safetensors", ".ckpt", ".pt", ".pth", ".th", ".bin")
# Where training code wraps the weights in its checkpoints, the averaged ones first.
_WRAPPERS = ("ema", "state_dict", "model")


@dataclass(frozen=True)
class Layout:
    """One way in which released files name a network's tensors.

    Attributes:
        name: what to call it in errors, "LlamaGen" for instance.
        tokenizer: the class, as "module:Class".
        recognise: whether tensors of these names (with any prefix taken off by `rename`) are of this layout; the second
            argument is the config.json beside them, with the file's name (no suffix) as its "_name_or_path" and, of
            fields that it has not, those that the checkpoint's metadata gives.
        configure: the network's configuration, from the tensors' shapes and the same second argument.
        rename: the file's tensors → the network's own names and shapes; drops what the network has no use for (losses,
            counters).
    """

    name: str
    tokenizer: str
    recognise: Callable[[Mapping[str, Tensor], dict[str, Any]], bool]
    configure: Callable[[Mapping[str, Tensor], dict[str, Any]], Any]
    rename: Callable[[Tensors, Any], Tensors]


def load_foreign(path: Path) -> NetworkTokenizer | None:
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
    config = (read_json(beside) if beside.is_file() else {}) | {"_name_or_path": files[0].stem}
    tensors: Tensors = {}
    for file in files:
        found, settings = _read(file)
        tensors |= found
        config = settings | config
    layouts = known_layouts()
    for layout in layouts:
        if layout.recognise(tensors, config):
            return convert(tensors, config, layout, path)
    raise PlaitError(
        f"{path}: its tensors ({', '.join(map(repr, sorted(tensors)[:2]))}, …) are of no tokenizer that is known here; "
        f"known: {', '.join(layout.name for layout in layouts)}"
    )


def known_layouts() -> list[Layout]:
    """Every layout, the more particular ones of a module first."""
    return [layout for module in _MODULES for layout in import_module(module).LAYOUTS]


def convert(tensors: Tensors, config: dict[str, Any], layout: Layout, where: Path | str) -> NetworkTokenizer:
    """Build a layout's network and fill it.

    Raises:
        PlaitError: a tensor is missing, extra, of another shape or no plain numbers, or holds some that are not finite.
    """
    module, class_name = layout.tokenizer.split(":")
    try:
        settings = layout.configure(tensors, config)
        renamed = layout.rename(dict(tensors), settings)
        with torch.device("meta"):
            tokenizer: NetworkTokenizer = getattr(import_module(module), class_name)(settings)
    except PlaitError as error:
        raise PlaitError(f"{where}: {error}") from None
    except KeyError as error:
        raise PlaitError(
            f"{where}: tensor {error.args[0]!r} is missing; not a whole {layout.name} checkpoint"
        ) from None
    except (ArithmeticError, AttributeError, IndexError, TypeError, ValueError, RuntimeError) as error:
        raise PlaitError(f"{where}: not a {layout.name} checkpoint after all ({_first_line(error)})") from error
    expected = tokenizer.state_dict()
    for problem, names in (("is missing", set(expected) - set(renamed)), ("is extra", set(renamed) - set(expected))):
        if names:
            raise PlaitError(f"{where}: tensor {min(names)!r} {problem}; not a whole {layout.name} checkpoint")
    weights: Tensors = {}
    for name, target in expected.items():
        tensor = renamed[name]
        if tensor.shape != target.shape:
            raise PlaitError(
                f"{where}: tensor {name!r} has shape {tuple(tensor.shape)}, expected {tuple(target.shape)} "
                f"in a {layout.name} checkpoint"
            )
        is_dense = tensor.layout is torch.strided and not tensor.is_quantized and not tensor.is_meta
        if not is_dense or tensor.is_floating_point() != target.is_floating_point():
            kind = tensor.dtype if is_dense else "not a plain tensor"
            raise PlaitError(f"{where}: tensor {name!r} is {kind}, expected {target.dtype} or the like")
        # Copied, as the file may be mapped into memory and change.
        weights[name] = tensor.detach().to(target.dtype, copy=True)
        if not bool(weights[name].isfinite().all()):
            raise PlaitError(f"{where}: tensor {name!r} holds values that are not finite; the file is damaged")
    tokenizer.load_state_dict(weights, assign=True)
    tokenizer.eval().requires_grad_(False)
    return tokenizer


def weight_files(path: Path) -> list[Path]:
    """The weights file, or those in a folder: a sharded set by its index, else the one there is.

    Raises:
        PlaitError: a folder with several unrelated weights files, or an index that is broken or names another folder's
            or a missing file.
    """
    if path.is_file():
        return [path] if path.suffix in _WEIGHTS else []
    if indexes := sorted(path.glob("*.safetensors.index.json")):
        return _shards(_only(indexes)[0])
    for suffix in _WEIGHTS:
        if found := sorted(path.glob(f"*{suffix}")):
            return _only(found)
    return []


def _only(files: list[Path]) -> list[Path]:
    if len(files) > 1:
        raise PlaitError(f"{files[0].parent}: holds {files[0].name} and {files[1].name}; name the file to load")
    return files


def _shards(index: Path) -> list[Path]:
    shards = read_json(index).get("weight_map")
    if not isinstance(shards, dict) or not shards:
        raise PlaitError(f"{index}: has no weight_map; copy the folder again")
    names = sorted({str(name) for name in shards.values()})
    for name in names:
        # A plain name: an index must not reach into other folders.
        if Path(name).name != name or "\0" in name or not (index.parent / name).is_file():
            raise PlaitError(f"{index}: names {name!r}, which is not in its folder; copy the folder again")
    return [index.parent / name for name in names]


def read_checkpoint(path: Path) -> Tensors:
    """The tensors of a safetensors file, or of a PyTorch file that holds nothing but plain data, whatever its suffix.

    Of a training checkpoint the averaged weights are taken, if it has some.

    Raises:
        PlaitError: the file is broken, or needs Python objects to be unpickled, which would run its code.
    """
    return _read(path)[0]


def _read(path: Path) -> tuple[Tensors, dict[str, Any]]:
    """The tensors, and the settings of the network where the file tells them (DAC's do)."""
    try:
        with path.open("rb") as file:
            start = file.read(9)
            file.seek(0)
            if start.startswith(b"version "):
                raise PlaitError(f"{path}: is a Git LFS pointer, not the file; fetch it with `git lfs pull`")
            # A safetensors file begins with the length of its header, which is JSON.
            if start[8:] == b"{":
                content: Any = load_file(path)
            else:
                # Command line arguments, which LlamaGen's training stores, are as harmless as a dictionary.
                # What is mapped into memory is read only where it is used.
                # PyTorch takes a path that ends in .safetensors for one.
                mapped = zipfile.is_zipfile(path) and path.suffix != ".safetensors"
                with torch.serialization.safe_globals([argparse.Namespace]):
                    content = torch.load(
                        path if mapped else file, map_location="cpu", weights_only=True, mmap=mapped or None
                    )
    except PlaitError:
        raise
    except Exception as error:  # a hostile pickle can raise anything
        if refused := re.search(r"GLOBAL (\S+)", str(error)):
            raise PlaitError(
                f"{path}: holds Python objects besides tensors ({refused[1]}), and loading those runs code from the "
                "file; where you trust it, convert it: state = torch.load(path, weights_only=False)['state_dict']; "
                "safetensors.torch.save_file({k: v.clone() for k, v in state.items()}, 'model.safetensors')"
            ) from None
        raise PlaitError(f"{path}: not a readable checkpoint ({_first_line(error)}); copy it again") from None
    metadata = content.get("metadata") if isinstance(content, dict) else None
    settings = metadata.get("kwargs") if isinstance(metadata, dict) else None
    for _ in _WRAPPERS:
        inner = (content[w] for w in _WRAPPERS if isinstance(content, dict) and isinstance(content.get(w), dict))
        content = next((found for found in inner if found), content)
    if not isinstance(content, dict):
        raise PlaitError(f"{path}: holds a {type(content).__name__}, expected a dictionary of tensors")
    tensors = {str(name): value for name, value in content.items() if isinstance(value, Tensor)}
    if not tensors:
        raise PlaitError(f"{path}: holds no tensors; expected a checkpoint's state_dict")
    return tensors, settings if isinstance(settings, dict) else {}


# How the two forms of weight norm in PyTorch end the names of magnitude and direction.
_NORMED = {"weight_g": "weight_v", "parametrizations.weight.original0": "parametrizations.weight.original1"}


def fold_weight_norm(tensors: Mapping[str, Tensor]) -> Tensors:
    """Weights in place of their magnitudes and directions (Salimans & Kingma, 2016, arXiv 1602.07868).

    ``weight = g · v / |v|``, the norm being over all axes but the first, as in PyTorch.

    Raises:
        PlaitError: a magnitude has another shape than one number for each along the first axis.
    """
    folded = dict(tensors)
    for name, magnitude in tensors.items():
        for end, other in _NORMED.items():
            stem = name.removesuffix(end)
            if name == stem or (direction := tensors.get(stem + other)) is None:
                continue
            if magnitude.shape != (*direction.shape[:1], *[1] * (direction.ndim - 1)):
                raise PlaitError(
                    f"tensor {name!r} has shape {tuple(magnitude.shape)}, which does not fit its direction"
                )
            norm = direction.float().flatten(1).norm(dim=1).view(magnitude.shape)
            del folded[name], folded[stem + other]
            folded[stem + "weight"] = direction.float() * (magnitude.float() / norm)
    return folded


def _first_line(error: Exception) -> str:
    """What an exception says, short enough for one line."""
    text = str(error).rpartition("WeightsUnpickler error:")[2].strip()  # after PyTorch's own advice
    return (text.splitlines() or [type(error).__name__])[0][:160]
