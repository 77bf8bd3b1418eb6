"""Bundles: a folder that is a whole model.

``config.json`` (the decoder's architecture and the vocabulary's fingerprint), ``model.safetensors``,
``vocabulary.json``, ``generation.json`` (sampling settings per target modality) and ``tokenizers/``. No pickle.
"""

import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from plait.errors import PlaitError
from plait.infer.sampling import Sampling
from plait.model.config import DecoderConfig
from plait.model.decoder import Decoder
from plait.tokenizers.base import (
    FORMAT_VERSION,
    check_format_version,
    config_from_json,
    load_weights,
    make_folder,
    read_json,
    write_json,
    write_tensors,
)
from plait.tokenizers.loading import load_tokenizers
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
        dtype: of the stored weights.
    """
    folder = folder.resolve()
    temporary, old = (folder.with_name(f".{folder.name}.{end}") for end in ("tmp", "old"))
    shutil.rmtree(temporary, ignore_errors=True)
    make_folder(temporary)
    tied = {"lm_head.weight"} if config.tie_embeddings else set()
    stored = {name: tensor.to("cpu", dtype).contiguous() for name, tensor in weights.items() if name not in tied}
    write_tensors(temporary / "model.safetensors", stored)
    write_json(
        temporary / "config.json",
        {
            "format_version": FORMAT_VERSION,
            "vocabulary": vocabulary.fingerprint,
            "context": context,
            "decoder": asdict(config),
        },
    )
    vocabulary.save(temporary / "vocabulary.json")
    write_json(temporary / "generation.json", {"format_version": FORMAT_VERSION, **generation})
    for name in vocabulary.tokenizers:
        shutil.copytree(tokenizers / name, temporary / "tokenizers" / name)
    if folder.is_dir():
        shutil.rmtree(old, ignore_errors=True)
        folder.rename(old)
    temporary.rename(folder)
    shutil.rmtree(old, ignore_errors=True)


def load_bundle(folder: Path, device: str = "cpu", dtype: torch.dtype = torch.float32) -> Bundle:
    """Load a bundle for inference.

    Raises:
        PlaitError: a missing, broken or mismatched file: the vocabulary or a tokenizer is not the one it was
            trained with, or a tensor does not belong.
    """
    config_file = folder / "config.json"
    content = read_json(config_file)
    check_format_version(content.get("format_version"), config_file)
    if missing := {"vocabulary", "decoder", "context"} - set(content):
        raise PlaitError(f"{config_file}: not a bundle; the entry {min(missing)!r} is missing")
    if not isinstance(content["decoder"], dict) or not isinstance(content["context"], int):
        raise PlaitError(f"{config_file}: decoder must be an object and context a whole number; restore the file")
    vocabulary = Vocabulary.load(folder / "vocabulary.json")
    if vocabulary.fingerprint != content["vocabulary"]:
        raise PlaitError(
            f"{folder / 'vocabulary.json'}: is not the vocabulary that the model was trained with; restore it"
        )
    config = config_from_json(DecoderConfig, content["decoder"], config_file)
    if config.vocabulary_size != vocabulary.size:
        raise PlaitError(
            f"{config_file}: vocabulary_size is {config.vocabulary_size}, vocabulary.json has {vocabulary.size} ids"
        )
    tokenizers = load_tokenizers(folder)
    for name, fingerprint in vocabulary.tokenizers.items():
        if name not in tokenizers:
            raise PlaitError(f"{folder / 'tokenizers' / name}: tokenizer is missing; copy the bundle again")
        if tokenizers[name].fingerprint != fingerprint:
            raise PlaitError(
                f"{folder / 'tokenizers' / name}: is not the tokenizer that the model was trained with; restore it"
            )
        if isinstance(tokenizers[name], torch.nn.Module):
            tokenizers[name].to(device)
    try:
        with torch.device("meta"):  # sizes only: config.json may ask for more than the weights have
            decoder = Decoder(config)
    except RuntimeError as error:
        raise PlaitError(f"{config_file}: decoder: no tensor can be that large ({error}); restore the file") from None
    load_weights(decoder, folder / "model.safetensors", tied=("lm_head.weight",) if config.tie_embeddings else ())
    if config.tie_embeddings:
        decoder.lm_head.weight = decoder.embed_tokens.weight
    decoder.to(device=device, dtype=dtype).eval().requires_grad_(False)
    return Bundle(decoder, vocabulary, tokenizers, _load_generation(folder / "generation.json"), content["context"])


def _load_generation(path: Path) -> dict[str, dict[str, Any]]:
    generation = read_json(path)
    check_format_version(generation.pop("format_version", None), path)
    for modality, settings in generation.items():
        try:
            Sampling.of(settings)
        except (PlaitError, TypeError) as error:  # TypeError: the settings are no object
            raise PlaitError(f"{path}: {modality}: {error}; mend the entry") from None
    return generation
