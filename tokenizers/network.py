"""A tokenizer that is a network with a quantizer, whatever its medium: identity, files, checks."""

from dataclasses import asdict
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, Self

import torch
from torch import nn

from plait.errors import PlaitError
from plait.tokenizers.base import (
    FORMAT_VERSION,
    Tokenizer,
    check_format_version,
    config_from_json,
    load_weights,
    make_folder,
    read_json,
    tensors_fingerprint,
    write_json,
    write_tensors,
)

# Fields that configurations were given later, with the value that changes nothing: the fingerprints of tokenizers that
# were saved before must stay as they are.
_LATER = {"code_dim": 0}


def _without_later(fields: list[tuple[str, Any]]) -> dict[str, Any]:
    return {name: value for name, value in fields if name not in _LATER or value != _LATER[name]}


class NetworkTokenizer(nn.Module, Tokenizer):
    """Encoder, quantizer and decoder, stored as a folder.

    A subclass sets `config` (a frozen dataclass) and `quantizer` (with ``codes``, ``latents`` and ``codebook_sizes``).
    """

    # The name of the network in config.json, and its configuration class.
    architecture: ClassVar[str]
    config_class: ClassVar[type]
    # Beginnings of the names of all weights that move codes; the others are the decoder's.
    encoder_parts: ClassVar[tuple[str, ...]] = ("encoder.", "quantizer.", "quant_conv.")
    # Settings that only the decoder has: another value leaves the codes as they are.
    decoder_settings: ClassVar[tuple[str, ...]] = ()

    config: Any
    quantizer: Any

    @property
    def codebook_sizes(self) -> list[int]:
        """The number of codes of each codebook."""
        return list(self.quantizer.codebook_sizes)

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return next(self.parameters()).device

    @cached_property
    def fingerprint(self) -> str:
        """Hash of the weights and settings that move codes; for a finished tokenizer."""
        tensors = {k: v for k, v in self.state_dict().items() if k.startswith(self.encoder_parts)}
        return tensors_fingerprint(self._fingerprint_settings(), tensors)

    def _fingerprint_settings(self) -> dict[str, Any]:
        config = asdict(self.config, dict_factory=_without_later)
        settings = {k: v for k, v in config.items() if k not in self.decoder_settings}
        return settings | {
            "architecture": self.architecture,
            "quantizer_spec": self.quantizer.SPEC_VERSION,
        }

    def _check_codebooks(self, n_codebooks: int | None) -> None:
        there = len(self.codebook_sizes)
        if n_codebooks is not None and (type(n_codebooks) is not int or not 1 <= n_codebooks <= there):
            raise PlaitError(f"n_codebooks: is {n_codebooks!r}, this tokenizer has {there}")

    # Files

    def save_pretrained(self, folder: str | Path, dtype: torch.dtype = torch.float32) -> None:
        """Write ``config.json`` and ``model.safetensors``; ``dtype`` is that of the stored weights.

        Rounding to bfloat16 moves codes: the fingerprint is that of the weights as stored.

        Raises:
            PlaitError: ``dtype`` is neither float32 nor bfloat16, or the folder cannot be made or written to.
        """
        if dtype not in (torch.float32, torch.bfloat16):
            raise PlaitError(f"dtype: {dtype} must be torch.float32 or torch.bfloat16")
        folder = Path(folder)
        make_folder(folder)
        stored = {
            name: (tensor.to(dtype) if tensor.is_floating_point() else tensor).contiguous()
            for name, tensor in self.state_dict().items()
        }
        as_stored = type(self)(self.config)
        as_stored.load_state_dict(stored)
        write_tensors(folder / "model.safetensors", stored)
        header = {
            "format_version": FORMAT_VERSION, "tokenizer": self.kind, "architecture": self.architecture,
            "fingerprint": as_stored.fingerprint,
        }  # fmt: skip
        write_json(folder / "config.json", header | asdict(self.config))

    @classmethod
    def config_from(cls, content: dict[str, Any], where: Path) -> Any:
        """The configuration from the rest of a config.json.

        Raises:
            PlaitError: an unknown or missing field, or a value that is refused.
        """
        return config_from_json(cls.config_class, content, where)

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> Self:
        """Load what `save_pretrained` wrote, in float32 and ready for inference.

        Raises:
            PlaitError: a missing, broken or mismatched file, or weights that no longer give the stored fingerprint.
        """
        folder = Path(folder)
        content = read_json(folder / "config.json")
        check_format_version(content.pop("format_version", None), folder / "config.json")
        header = content.pop("tokenizer", None), content.pop("architecture", "plait")
        if header != (cls.kind, cls.architecture):
            raise PlaitError(f"{folder}/config.json: not a {cls.architecture} {cls.kind} tokenizer, but {header}")
        fingerprint = content.pop("fingerprint", None)
        config = cls.config_from(content, folder / "config.json")
        # Without memory for what the file may not hold; buffers that are not stored are made on the CPU all the same.
        with torch.device("meta"):
            tokenizer = cls(config)
        load_weights(tokenizer, folder / "model.safetensors")
        tokenizer.eval().requires_grad_(False)
        if fingerprint != tokenizer.fingerprint:
            raise PlaitError(
                f"{folder}: the weights do not give the stored fingerprint; the folder is damaged, copy it again"
            )
        return tokenizer
