"""Find tokenizers by path or shipped name, and load them."""

import importlib.resources
from importlib import import_module
from pathlib import Path
from typing import Any

from plait.errors import PlaitError
from plait.tokenizers.base import read_json
from plait.tokenizers.vocabulary import Vocabulary

_CLASSES = {
    "text": "plait.tokenizers.text:TextTokenizer",
    "visual": "plait.tokenizers.visual:VisualTokenizer",
}


def find_weights(name: str | Path) -> Path:
    """A model's or tokenizer's folder: a path if it exists, else a shipped name.

    Raises:
        PlaitError: neither is there.
    """
    try:
        if Path(name).exists():
            return Path(name)
    except OSError as error:  # too long, or in a folder that may not be read
        raise PlaitError(f"{name}: cannot be read ({error.strerror}); name a folder or a shipped model") from None
    shipped = Path(str(importlib.resources.files("plait.weights").joinpath(".")))
    if str(name) in (names := shipped_names()):
        return shipped / name
    raise PlaitError(f"{name}: no such path, and the shipped names are {', '.join(names) or '(none)'}")


def shipped_names() -> list[str]:
    """The bundles and tokenizers that come with the package."""
    shipped = Path(str(importlib.resources.files("plait.weights").joinpath(".")))
    return sorted(path.parent.name for path in shipped.glob("*/config.json"))


def load_tokenizer(name: str | Path, modality: str | None = None) -> Any:
    """Load a tokenizer.

    Args:
        name: a tokenizer's folder, a bundle's folder, or a shipped name.
        modality: which of a bundle's tokenizers, "image" for instance.

    Returns:
        A `plait.tokenizers.visual.VisualTokenizer` or `plait.tokenizers.text.TextTokenizer`, on the CPU.

    Raises:
        PlaitError: not found, damaged, or a bundle without that modality.
    """
    folder = find_weights(name)
    if (folder / "vocabulary.json").is_file():
        modalities = Vocabulary.load(folder / "vocabulary.json").modalities
        if modality is None or modality not in modalities:
            raise PlaitError(f"{folder}: is a bundle; name one of its modalities: {', '.join(modalities)}")
        folder = folder / "tokenizers" / modalities[modality].tokenizer
    kind = str(read_json(folder / "config.json").get("tokenizer"))
    if kind not in _CLASSES:
        raise PlaitError(f"{folder}/config.json: tokenizer is {kind!r}, this plait knows {', '.join(_CLASSES)}")
    module, class_name = _CLASSES[kind].split(":")
    tokenizer = getattr(import_module(module), class_name).from_pretrained(folder)
    if modality is not None and modality not in tokenizer.modalities:
        raise PlaitError(f"{folder}: is a {kind} tokenizer, it has no {modality}")
    return tokenizer


def load_tokenizers(name: str | Path) -> dict[str, Any]:
    """Load all tokenizers of a bundle, or of a folder with one subfolder per tokenizer, by subfolder name.

    Raises:
        PlaitError: not found, damaged, or a folder without tokenizers.
    """
    folder = find_weights(name)
    folder = folder / "tokenizers" if (folder / "tokenizers").is_dir() else folder
    found = sorted(path.parent for path in folder.glob("*/config.json"))
    if not found:
        raise PlaitError(f"{folder}: holds no tokenizers; expected subfolders such as text/ and visual/")
    return {path.name: load_tokenizer(path) for path in found}


def describe_tokenizers(name: str | Path) -> list[dict[str, Any]]:
    """What `plait tokenizer info` says of a tokenizer, or of each tokenizer of a bundle.

    Raises:
        PlaitError: not found or damaged.
    """
    folder = find_weights(name)
    single = "tokenizer" in read_json(folder / "config.json") if (folder / "config.json").is_file() else False
    found = {folder.name: load_tokenizer(folder)} if single else load_tokenizers(folder)
    return [
        {
            "name": key,
            "kind": tokenizer.kind,
            "modalities": " ".join(tokenizer.modalities),
            "codes": " ".join(map(str, tokenizer.codebook_sizes)),
            "fingerprint": tokenizer.fingerprint[:16],
        }
        for key, tokenizer in found.items()
    ]
