"""Adapters: what a run trained of an otherwise frozen decoder, in a small folder, and the way back into the decoder.

``adapter.json`` holds LoRA's settings, ``adapter.safetensors`` the trained tensors: LoRA's matrices, rows of embedding
and head with their ids, and whatever else was not frozen.
"""

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path

import safetensors
import torch
from safetensors.torch import load_file
from torch import Tensor

from plait.errors import PlaitError
from plait.model.decoder import Decoder
from plait.model.lora import LoRAConfig, add_lora, merge_lora
from plait.model.rows import merge_rows, row_ids, split_rows
from plait.tokenizers.base import (
    FORMAT_VERSION,
    check_format_version,
    config_from_json,
    make_folder,
    read_json,
    write_json,
    write_tensors,
)


def save_adapter(folder: Path, tensors: Mapping[str, Tensor], lora: LoRAConfig) -> None:
    """Write an adapter.

    Args:
        folder: where to.
        tensors: as `adapter_tensors` gives them.
        lora: settings, of rank 0 without LoRA.
    """
    make_folder(folder)
    write_tensors(folder / "adapter.safetensors", {name: t.detach().cpu().clone() for name, t in tensors.items()})
    write_json(folder / "adapter.json", {"format_version": FORMAT_VERSION, **asdict(lora)})


def load_adapter(folder: Path, decoder: Decoder) -> None:
    """Attach an adapter that `save_adapter` wrote to the decoder it was trained beside, in place.

    Raises:
        PlaitError: a file is missing or broken, or the adapter belongs to another decoder.
    """
    content = read_json(folder / "adapter.json")
    check_format_version(content.pop("format_version", None), folder / "adapter.json")
    lora = config_from_json(LoRAConfig, content, folder / "adapter.json")
    path = folder / "adapter.safetensors"
    try:
        tensors = load_file(path)
    except (OSError, safetensors.SafetensorError) as error:
        raise PlaitError(f"{path}: not a readable safetensors file ({error}); copy it again") from None
    attach(decoder, tensors, lora, str(path))


def adapter_tensors(decoder: Decoder) -> dict[str, Tensor]:
    """What of a decoder trains, and which rows of embedding and head its trained rows are."""
    return {name: p for name, p in decoder.named_parameters() if p.requires_grad} | row_ids(decoder)


def attach(decoder: Decoder, tensors: Mapping[str, Tensor], lora: LoRAConfig, name: str = "adapter") -> None:
    """Put an adapter's tensors beside a plain decoder's weights, in place. Only they train then.

    Args:
        decoder: the one that they were trained beside.
        tensors: as `adapter_tensors` gives them.
        lora: the settings they were trained with.
        name: of the adapter, for errors.

    Raises:
        PlaitError: a tensor is missing, extra or of another shape.
    """
    decoder.requires_grad_(False)
    if lora.rank:
        add_lora(decoder, lora)
    ids = {key.removesuffix(".ids"): tensor for key, tensor in tensors.items() if key.endswith(".ids")}
    for rows in ids.values():
        if rows.dtype != torch.int64 or rows.amin() < 0 or rows.amax() >= decoder.config.vocabulary_size:
            raise PlaitError(f"{name}: has ids beyond the decoder's {decoder.config.vocabulary_size}; grow it first")
    if ids:
        split_rows(decoder, next(iter(ids.values())), "embed_tokens" in ids, "lm_head" in ids)
    parameters = dict(decoder.named_parameters())
    trained = {key: tensor for key, tensor in tensors.items() if not key.endswith(".ids")}
    if lost := [key for key, p in parameters.items() if p.requires_grad and key not in trained]:
        raise PlaitError(f"{name}: tensor {lost[0]!r} is missing; the adapter does not belong to this decoder")
    for key, tensor in trained.items():
        if key not in parameters or parameters[key].shape != tensor.shape:
            has = f"has {tuple(parameters[key].shape)}" if key in parameters else "has no such tensor"
            raise PlaitError(f"{name}: tensor {key!r} is {tuple(tensor.shape)}, the decoder {has}; take the right one")
        parameters[key].data = tensor.to(parameters[key].dtype, copy=True)
        parameters[key].requires_grad_(True)


def merge(decoder: Decoder) -> None:
    """Make a decoder plain again, in place: what its adapters learnt goes into its weights."""
    merge_lora(decoder)
    merge_rows(decoder)
