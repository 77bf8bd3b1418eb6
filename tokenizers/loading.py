"""Find tokenizers by path or shipped name, and load them."""

import importlib.resources
from importlib import import_module
from pathlib import Path
from typing import Any

from plait.errors import PlaitError
from plait.tokenizers.base import read_json
from plait.tokenizers.vocabulary import Vocabulary

# What config.json calls a tokenizer, "kind" or "kind/architecture", and its class.
_CLASSES = {
    "text": "plait.tokenizers.text:TextTokenizer",
    "visual/plait": "plait.tokenizers.visual:VisualTokenizer",
    "visual/emu3": "plait.tokenizers.emu3:Emu3Tokenizer",
    "visual/vqgan": "plait.tokenizers.vqgan:VQGANTokenizer",
    "visual/vidtok": "plait.tokenizers.vidtok:VidTokTokenizer",
    "audio/plait": "plait.tokenizers.audio:AudioTokenizer",
    "audio/dac": "plait.tokenizers.dac:DACTokenizer",
    "audio/snac": "plait.tokenizers.snac:SNACTokenizer",
    "audio/encodec": "plait.tokenizers.encodec:EnCodecTokenizer",
    "audio/mimi": "plait.tokenizers.mimi:MimiTokenizer",
    "text/hf": "plait.tokenizers.text_foreign:HFText",
    "text/sentencepiece": "plait.tokenizers.text_foreign:SentencePieceText",
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
        name: a tokenizer's folder, a bundle's folder, a shipped name, or another project's checkpoint, a file or a
            folder that holds one: Emu3's, Chameleon's and other VQGANs', LlamaGen's, MoVQGAN's, VidTok's, EnCodec's,
            DAC's, Mimi's, SNAC's.
        modality: which of a bundle's tokenizers, "image" for instance.

    Returns:
        A `plait.tokenizers.pixels.PixelTokenizer`, a `plait.tokenizers.waves.WaveTokenizer` or a tokenizer of text, on
        the CPU.

    Raises:
        PlaitError: not found, damaged, unknown, or without that modality.
    """
    folder = find_weights(name)
    if (folder / "vocabulary.json").is_file():
        modalities = Vocabulary.load(folder / "vocabulary.json").modalities
        if modality is None or modality not in modalities:
            raise PlaitError(f"{folder}: is a bundle; name one of its modalities: {', '.join(modalities)}")
        folder = folder / "tokenizers" / modalities[modality].tokenizer
    tokenizer = _load(folder)
    if modality is not None and modality not in tokenizer.modalities:
        raise PlaitError(f"{folder}: is of kind {tokenizer.kind}, it has no {modality}")
    return tokenizer


def _load(path: Path) -> Any:
    config = read_json(path / "config.json") if (path / "config.json").is_file() else {}
    if "tokenizer" not in config:
        from plait.tokenizers.foreign import load_foreign

        if (tokenizer := load_foreign(path)) is None:
            raise PlaitError(f"{path / 'config.json'}: no such file, and no checkpoint of another project is there")
        return tokenizer
    kind = str(config["tokenizer"])
    if architecture := config.get("architecture", "plait" if kind in ("visual", "audio") else None):
        kind += f"/{architecture}"
    if kind not in _CLASSES:
        raise PlaitError(f"{path}/config.json: tokenizer is {kind!r}, this plait knows {', '.join(_CLASSES)}")
    module, class_name = _CLASSES[kind].split(":")
    return getattr(import_module(module), class_name).from_pretrained(path)


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
    path = find_weights(name)
    is_single = not (path / "vocabulary.json").is_file() and (
        path.is_file() or (path / "config.json").is_file() or any(path.glob("*.safetensors*"))
    )
    found = {path.name: load_tokenizer(path)} if is_single else load_tokenizers(path)
    return [_describe(key, tokenizer) for key, tokenizer in found.items()]


def _describe(name: str, tokenizer: Any) -> dict[str, Any]:
    row = {
        "name": name,
        "kind": tokenizer.kind,
        "modalities": " ".join(tokenizer.modalities),
        "codes": " ".join(map(str, tokenizer.codebook_sizes)),
    }
    if tokenizer.kind == "visual":
        frames = tokenizer.temporal_factor
        row |= {
            "architecture": tokenizer.architecture,
            "pixels per code": f"{tokenizer.factor}×{tokenizer.factor}" + (f"×{frames} frames" if frames > 1 else ""),
            "parameters": sum(p.numel() for p in tokenizer.parameters()),
        }
    if tokenizer.kind == "audio":
        codebooks = len(tokenizer.codebook_sizes)
        row |= {
            "architecture": tokenizer.architecture,
            "sample rate": tokenizer.sample_rate,
            "channels": tokenizer.channels,
            "samples per step": tokenizer.factor,
            "steps per second": round(tokenizer.frame_rate, 3),
            "codebooks": codebooks,
            "codes per second": round(tokenizer.frame_rate * getattr(tokenizer, "codes_per_step", codebooks), 3),
            "kbit/s": round(tokenizer.bitrate / 1000, 4),
            "parameters": sum(p.numel() for p in tokenizer.parameters()),
        }
    return row | {"fingerprint": tokenizer.fingerprint[:16]}
