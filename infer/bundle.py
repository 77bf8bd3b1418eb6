"""Bundles: a folder that is a whole model.

``config.json`` (the decoder's architecture, the vocabulary's fingerprint, the weights' checksums),
``model.safetensors`` (or a sharded set), ``vocabulary.json``, ``generation.json`` (sampling settings per target
modality) and ``tokenizers/``. No pickle.
"""

import re
import shutil
from collections.abc import Collection
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import safetensors
import torch
from safetensors.torch import load_file
from torch import Tensor

from plait.errors import PlaitError
from plait.infer.shards import shard_files, write_set
from plait.infer.target import Target
from plait.model.config import DecoderConfig, RopeScaling
from plait.model.decoder import Decoder
from plait.model.hollow import hollow
from plait.model.quantize import Quantization, quantize_
from plait.tokenizers.base import (
    FORMAT_VERSION,
    check_format_version,
    config_from_json,
    make_folder,
    read_json,
    write_json,
)
from plait.tokenizers.loading import load_tokenizers
from plait.tokenizers.modalities import MODALITIES
from plait.tokenizers.vocabulary import Vocabulary


@dataclass
class Bundle:
    """A loaded bundle.

    Attributes:
        decoder: the model.
        vocabulary: its id space.
        tokenizers: by folder name.
        generation: sampling settings by target modality.
        context: longest document that it was trained on, in tokens.
    """

    decoder: Decoder
    vocabulary: Vocabulary
    tokenizers: dict[str, Any]
    generation: dict[str, dict[str, Any]]
    context: int


def save_bundle(
    folder: Path,
    config: DecoderConfig,
    weights: dict[str, Tensor],
    vocabulary: Vocabulary,
    tokenizers: Path,
    generation: dict[str, Any],
    context: int,
    dtype: torch.dtype,
    quantization: Quantization | None = None,
) -> None:
    """Write a bundle; an existing one at ``folder`` is replaced only when the new one is complete.

    Args:
        folder: where to.
        config: the decoder's architecture.
        weights: the decoder's state dict; a tied head is stored once.
        vocabulary: the id space the decoder was trained in.
        tokenizers: folder with one subfolder per tokenizer, copied.
        generation: sampling settings by target modality.
        context: longest document that it was trained on, in tokens.
        dtype: of the stored weights, but for quantized ones.
        quantization: how the weights are quantized, if they are.
    """
    folder = folder.resolve()
    temporary = folder.with_name(f".{folder.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    make_folder(temporary)
    tied = {"lm_head.weight"} if config.tie_embeddings and quantization is None else set()
    stored = {
        name: tensor.to("meta", tensor.dtype if _is_quantized(name, tensor) else dtype)
        for name, tensor in weights.items()
        if name not in tied
    }
    sums = write_set(temporary, stored, lambda name: weights[name].detach().to("cpu", stored[name].dtype))
    others = {} if quantization is None else {"quantization": asdict(quantization)}
    write_description(temporary, config, vocabulary, generation, context, sums, **others)
    for name in vocabulary.tokenizers:
        shutil.copytree(tokenizers / name, temporary / "tokenizers" / name)
    replace_folder(folder, temporary)


def write_description(
    folder: Path,
    config: DecoderConfig,
    vocabulary: Vocabulary,
    generation: dict[str, Any],
    context: int,
    sums: dict[str, str],
    **others: Any,
) -> None:
    """Write what a bundle holds besides weights and tokenizers: three JSON files.

    Args:
        folder: the bundle's.
        config: the decoder's architecture.
        vocabulary: the id space.
        generation: sampling settings by target modality.
        context: longest document in tokens.
        sums: SHA-256 of each file of weights.
        others: further entries of config.json.
    """
    write_json(
        folder / "config.json",
        {
            "format_version": FORMAT_VERSION,
            "vocabulary": vocabulary.fingerprint,
            "context": context,
            "decoder": asdict(config),
            "sha256": sums,
            **others,
        },
    )
    vocabulary.save(folder / "vocabulary.json")
    write_json(folder / "generation.json", {"format_version": FORMAT_VERSION, **generation})


def replace_folder(folder: Path, finished: Path) -> None:
    """Give a finished folder its name; a folder that had it is deleted only then."""
    old = folder.with_name(f".{folder.name}.old")
    if folder.is_dir():
        shutil.rmtree(old, ignore_errors=True)
        folder.rename(old)
    finished.rename(folder)
    shutil.rmtree(old, ignore_errors=True)


def load_bundle(
    folder: Path, device: str = "cpu", dtype: torch.dtype = torch.float32, quantize: str | None = None
) -> Bundle:
    """Load a bundle for inference.

    Args:
        folder: the bundle's.
        device: where its networks go.
        dtype: of the decoder's weights, but for quantized ones.
        quantize: "int8" or "int4" quantizes the decoder's weights, unless they are stored so.

    Raises:
        PlaitError: a missing, broken or mismatched file: the vocabulary or a tokenizer is not the one it was
            trained with, or a tensor does not belong.
    """
    content, config, vocabulary = read_description(folder)
    tokenizers = load_tokenizers(folder) if vocabulary.tokenizers else {}
    for name, fingerprint in vocabulary.tokenizers.items():
        if name not in tokenizers:
            raise PlaitError(f"{folder / 'tokenizers' / name}: tokenizer is missing; copy the bundle again")
        if tokenizers[name].fingerprint != fingerprint:
            raise PlaitError(
                f"{folder / 'tokenizers' / name}: is not the tokenizer that the model was trained with; restore it"
            )
        if isinstance(tokenizers[name], torch.nn.Module):
            tokenizers[name].to(device)
    quantization = read_quantization(content, folder / "config.json")
    decoder = load_decoder(folder, config, device, dtype, quantization)
    if quantize is not None:
        if quantization is not None:
            raise PlaitError(f"quantize: the weights of {folder} are stored in {quantization.bits} bits already")
        quantize_(decoder, quantize)
    return Bundle(decoder, vocabulary, tokenizers, _load_generation(folder / "generation.json"), content["context"])


def read_description(folder: Path) -> tuple[dict[str, Any], DecoderConfig, Vocabulary]:
    """A bundle's config.json, the decoder's architecture in it, and the vocabulary.

    Raises:
        PlaitError: a missing, broken or mismatched file.
    """
    config_file = folder / "config.json"
    content = read_json(config_file)
    check_format_version(content.get("format_version"), config_file)
    if missing := {"vocabulary", "decoder", "context"} - set(content):
        raise PlaitError(f"{config_file}: not a bundle; the entry {min(missing)!r} is missing")
    if not isinstance(content["decoder"], dict) or type(content["context"]) is not int or content["context"] < 1:
        raise PlaitError(f"{config_file}: decoder must be an object, context a whole number above 0; restore the file")
    vocabulary = Vocabulary.load(folder / "vocabulary.json")
    if vocabulary.fingerprint != content["vocabulary"]:
        raise PlaitError(
            f"{folder / 'vocabulary.json'}: is not the vocabulary that the model was trained with; restore it"
        )
    settings = dict(content["decoder"])
    if isinstance(scaling := settings.get("rope_scaling"), dict):
        settings["rope_scaling"] = config_from_json(RopeScaling, scaling, config_file)
    config = config_from_json(DecoderConfig, settings, config_file)
    if config.vocabulary_size != vocabulary.size:
        raise PlaitError(
            f"{config_file}: vocabulary_size is {config.vocabulary_size}, vocabulary.json has {vocabulary.size} ids"
        )
    return content, config, vocabulary


def build_decoder(config: DecoderConfig, names: Collection[str], where: Path) -> Decoder:
    """A decoder on the meta device: sizes only, as a configuration may ask for more than the weights have.

    Args:
        config: the architecture.
        names: of the tensors there are.
        where: the file that the configuration comes from, for errors.

    Raises:
        PlaitError: it asks for more layers than there are, or for tensors that cannot be.
    """
    layers = {int(found[1]) for name in names if (found := re.match(r"layers\.(\d{1,9})\.", name))}
    if config.layers > len(layers):  # a damaged file may ask for billions
        raise PlaitError(f"{where}: says {config.layers} layers, the tensors are those of {len(layers)}")
    try:
        with hollow():
            return Decoder(config)
    except (RuntimeError, TypeError, OverflowError) as error:  # PyTorch's for sizes beyond its own
        reason = str(error).splitlines()[0]
        raise PlaitError(f"{where}: decoder: no tensor can be that large ({reason}); restore the file") from None


def read_quantization(content: dict[str, Any], where: Path) -> Quantization | None:
    """How a bundle's weights are quantized, by its config.json.

    Raises:
        PlaitError: an unknown field or value.
    """
    if (settings := content.get("quantization")) is None:
        return None
    if not isinstance(settings, dict):
        raise PlaitError(f"{where}: quantization is {settings!r}, must be an object; restore the file")
    return config_from_json(Quantization, settings, where)


def _is_quantized(name: str, tensor: Tensor) -> bool:
    """Whether a tensor is part of a quantized weight: its codes, scales or zero points."""
    return not tensor.is_floating_point() or name.endswith((".scales", ".zeros"))


def load_decoder(
    folder: Path,
    config: DecoderConfig,
    device: str,
    dtype: torch.dtype,
    quantization: Quantization | None = None,
) -> Decoder:
    """A bundle's decoder, ready for inference; besides it, a shard is in memory at most.

    Raises:
        PlaitError: a file is missing or broken, or a tensor is missing, extra or of another shape.
    """
    files = shard_files(folder)
    found = {name: (path, tensor.shape) for path in files for name, tensor in _read_shard(path).items()}
    decoder = check_tensors(folder, config, found, quantization)
    for path in files:
        # Copied, as the file is mapped into memory and may change.
        loaded = {
            name: t.to(device, t.dtype if _is_quantized(name, t) else dtype, copy=True)
            for name, t in _read_shard(path).items()
        }
        decoder.load_state_dict(loaded, strict=False, assign=True)
    if config.tie_embeddings and quantization is None:
        decoder.lm_head.weight = decoder.embed_tokens.weight
    return decoder.eval().requires_grad_(False)


def check_tensors(
    folder: Path,
    config: DecoderConfig,
    found: dict[str, tuple[Path, torch.Size]],
    quantization: Quantization | None = None,
) -> Decoder:
    """The decoder of a configuration, on the meta device, if these tensors, with their files and shapes, are its own.

    Raises:
        PlaitError: one is missing, extra or of another shape.
    """
    decoder = build_decoder(config, found, folder / "config.json")
    if quantization is not None:  # the head then is one of its own
        quantize_(decoder, quantization)
    tied = {"lm_head.weight"} if config.tie_embeddings and quantization is None else set()
    expected = {name: tensor for name, tensor in decoder.state_dict().items() if name not in tied}
    for problem, names in (("is missing", set(expected) - set(found)), ("is extra", set(found) - set(expected))):
        if names:
            path = found[min(names)][0] if problem == "is extra" else folder / "model.safetensors"
            raise PlaitError(f"{path}: tensor {min(names)!r} {problem}; the weights do not belong to this config.json")
    for name, (path, shape) in found.items():
        if shape != expected[name].shape:
            raise PlaitError(
                f"{path}: tensor {name!r} has shape {tuple(shape)}, config.json says {tuple(expected[name].shape)}"
            )
    return decoder


def _read_shard(path: Path) -> dict[str, Tensor]:
    """A file's tensors, mapped into memory and not yet read."""
    if not path.is_file():
        raise PlaitError(f"{path}: no such file; the folder is incomplete, copy it again")
    try:
        return load_file(path)
    except (OSError, safetensors.SafetensorError) as error:
        raise PlaitError(f"{path}: not a readable safetensors file ({error}); copy it again") from None


def _load_generation(path: Path) -> dict[str, dict[str, Any]]:
    generation = read_json(path)
    check_format_version(generation.pop("format_version", None), path)
    for modality, settings in generation.items():
        if modality not in (*MODALITIES, "interleaved"):
            raise PlaitError(f"{path}: unknown target {modality!r}; there are {', '.join(MODALITIES)} and interleaved")
        try:
            Target.of(settings)
        except (PlaitError, TypeError) as error:  # TypeError: the settings are no object
            raise PlaitError(f"{path}: {modality}: {error}; mend the entry") from None
    return generation
