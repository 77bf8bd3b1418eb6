"""What every tokenizer is: `encode` a medium into `Codes`, `decode` them back, save and load as a folder.

A tokenizer's folder holds ``config.json`` (``format_version``, ``tokenizer`` = its kind, ``fingerprint``, the
configuration) and ``model.safetensors``. It knows nothing of vocabularies, ids or the decoder.
"""

import dataclasses
import hashlib
import json
import os
import re
from abc import ABC, abstractmethod
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Self, TypeVar

import safetensors
import torch
from safetensors.torch import load_file, save
from torch import Tensor, nn

from plait.errors import PlaitError

FORMAT_VERSION = 1

T = TypeVar("T")


@dataclass
class Codes:
    """Discrete codes of one batch, with what decoding needs besides the codes.

    Attributes:
        codes: int64 in ``[0, codebook_size)``: image ``[B, h, w]``, video ``[B, t, h, w]``, audio ``[B, n]``; with
            several codebooks the codebook axis is dim 1.
        modality: "image", "video", "audio", ...
        size: what went in: (H, W) or (T, H, W) pixels, or (N,) samples. `decode` crops to it.
        lengths: valid steps per item along the last grid axis of a ragged batch, int64 ``[B]``.
        sample_rate: Hz, audio only.
        fps: frames per second, video only.
        scale: loudness that was taken out, float ``[B]`` or of each segment ``[B, segments]``, audio only.
        fingerprint: of the tokenizer that made the codes.
    """

    codes: Tensor
    modality: str
    size: tuple[int, ...] | None = None
    lengths: Tensor | None = None
    sample_rate: int | None = None
    fps: float | None = None
    scale: Tensor | None = None
    fingerprint: str | None = None

    _TENSORS: ClassVar[tuple[str, ...]] = ("codes", "lengths", "scale")

    def save(self, path: str | Path) -> None:
        """Write one safetensors file; what is not a tensor goes into its metadata."""
        tensors = {k: getattr(self, k).contiguous() for k in self._TENSORS if getattr(self, k) is not None}
        plain = {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name not in self._TENSORS}
        write_tensors(Path(path), tensors, {"format_version": str(FORMAT_VERSION), "plait": json.dumps(plain)})

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """Read what `save` wrote.

        Raises:
            PlaitError: the file is missing, broken, or not a codes file of this format version.
        """
        try:
            with safetensors.safe_open(str(path), "pt") as file:
                metadata = file.metadata() or {}
                tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (not a dict)
        except (OSError, safetensors.SafetensorError) as error:
            raise PlaitError(f"{path}: not a readable codes file ({error}); encode the original again") from None
        if "plait" not in metadata or "codes" not in tensors:
            raise PlaitError(f"{path}: holds no plait codes; write it with `Codes.save`")
        check_format_version(metadata.get("format_version"), path)
        try:
            plain = json.loads(metadata["plait"])
            if plain.get("size") is not None:
                plain["size"] = tuple(plain["size"])
            return cls(**tensors, **plain)
        except (ValueError, TypeError, AttributeError, RecursionError) as error:
            raise PlaitError(f"{path}: broken metadata ({error}); encode the original again") from None


class Tokenizer(ABC):
    """The contract of a tokenizer. `modalities` names what it can encode and decode, for one codebook numbering."""

    kind: ClassVar[str]
    modalities: ClassVar[tuple[str, ...]]

    @property
    @abstractmethod
    def codebook_sizes(self) -> list[int]:
        """The number of codes of each codebook."""

    @property
    @abstractmethod
    def fingerprint(self) -> str:
        """Hash of what determines the codes: preprocessing, encoder and quantizer. A better decoder keeps it."""

    @abstractmethod
    def save_pretrained(self, folder: str | Path) -> None:
        """Write the tokenizer as a folder that `from_pretrained` and `plait.load_tokenizer` read."""


def check_format_version(found: object, where: str | Path) -> None:
    """Refuse files of a format this version does not know.

    Raises:
        PlaitError: ``found`` is not a known format version.
    """
    if str(found) != str(FORMAT_VERSION):
        raise PlaitError(
            f"{where}: format_version is {found!r}, this plait reads {FORMAT_VERSION}; "
            "write the file again with this version, or install the plait that wrote it"
        )


def check_codes(codes: Tensor, codebook_size: int, name: str = "codes") -> None:
    """Refuse what is not int codes in ``[0, codebook_size)``; no codes at all are fine.

    Args:
        codes: of any shape.
        codebook_size: the number of codes there are.
        name: what to call them in errors.

    Raises:
        PlaitError: the dtype is not an integer, or a code is out of range.
    """
    if not codes.numel():
        return
    if codes.dtype not in (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8):
        raise PlaitError(f"{name}: dtype is {codes.dtype}, expected integers such as torch.int64")
    if int(codes.min()) < 0 or int(codes.max()) >= codebook_size:
        raise PlaitError(
            f"{name}: found {int(codes.min())}..{int(codes.max())}, this tokenizer has codes 0..{codebook_size - 1}; "
            "were they made by another tokenizer?"
        )


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object.

    Raises:
        PlaitError: the file is missing or not a JSON object.
    """
    try:
        content = json.loads(path.read_text("utf-8"))
    except FileNotFoundError:
        raise PlaitError(f"{path}: no such file") from None
    except (OSError, ValueError, RecursionError) as error:
        raise PlaitError(f"{path}: not readable as JSON ({error}); restore it from where it came") from None
    if not isinstance(content, dict):
        raise PlaitError(f"{path}: expected a JSON object")
    return content


def make_folder(path: Path) -> None:
    """Make a folder unless it is there.

    Raises:
        PlaitError: a file is in the way, or it cannot be made.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise PlaitError(f"{path}: cannot make this folder ({error.strerror}); choose another") from None


def write_file(path: Path, data: bytes) -> None:
    """Write a file whole or not at all.

    Raises:
        PlaitError: the folder is missing or full, or may not be written to.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.write_bytes(data)
        temporary.replace(path)
    except OSError as error:
        raise PlaitError(f"{path}: cannot be written ({error.strerror or error}); choose another place") from None
    finally:
        with suppress(OSError):  # whatever made the write fail
            temporary.unlink(missing_ok=True)


def write_tensors(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str] | None = None) -> None:
    """Write a safetensors file whole or not at all.

    Raises:
        PlaitError: as `write_file`.
    """
    write_file(path, save(tensors, metadata))


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write a JSON object whole or not at all.

    Raises:
        PlaitError: as `write_file`.
    """
    text = json.dumps(content, indent=2, ensure_ascii=False) + "\n"
    # Half a surrogate pair, which a JSON file can spell and UTF-8 cannot, stays spelt.
    halves = re.compile(r"[\ud800-\udfff]")
    write_file(path, halves.sub(lambda half: f"\\u{ord(half[0]):04x}", text).encode())


def config_from_json(config_class: type[T], content: dict[str, Any], where: Path) -> T:
    """Build a configuration dataclass from JSON, lists becoming tuples.

    Raises:
        PlaitError: an unknown or missing field, or a value that the dataclass refuses.
    """
    known = {f.name for f in dataclasses.fields(config_class)}  # type: ignore[arg-type]
    unknown = sorted(set(content) - known)
    if unknown:
        raise PlaitError(f"{where}: unknown field {unknown[0]!r}; known fields: {', '.join(sorted(known))}")
    try:
        return config_class(**{k: tuple(v) if isinstance(v, list) else v for k, v in content.items()})
    except TypeError as error:
        raise PlaitError(f"{where}: {error}") from None


def tensors_fingerprint(config: dict[str, Any], tensors: dict[str, Tensor]) -> str:
    """SHA-256 over a configuration and named tensors, the same for bf16 storage and its float32 copy."""
    digest = hashlib.sha256(json.dumps(config, sort_keys=True).encode())
    for name in sorted(tensors):
        tensor = tensors[name].detach().float().cpu().contiguous()
        digest.update(f"{name}{tuple(tensor.shape)}".encode())
        digest.update(tensor.numpy().tobytes())
    return digest.hexdigest()


def load_weights(module: nn.Module, path: Path, tied: tuple[str, ...] = ()) -> None:
    """Load a safetensors file into a module, in the module's own dtype.

    Args:
        module: what to fill; it may be on the meta device, and then takes memory only for tensors that belong.
        path: the file.
        tied: parameters that are another one's alias and are not stored.

    Raises:
        PlaitError: the file is missing or broken, or a tensor is missing, extra or of another shape.
    """
    if not path.is_file():
        raise PlaitError(f"{path}: no such file; the folder is incomplete, copy it again")
    try:
        tensors = load_file(path)
    except (OSError, safetensors.SafetensorError) as error:
        raise PlaitError(f"{path}: not a readable safetensors file ({error}); copy it again") from None
    expected = {name: tensor for name, tensor in module.state_dict().items() if name not in tied}
    for problem, names in (("is missing", set(expected) - set(tensors)), ("is extra", set(tensors) - set(expected))):
        if names:
            raise PlaitError(f"{path}: tensor {min(names)!r} {problem}; the weights do not belong to this config.json")
    for name, tensor in tensors.items():
        if tensor.shape != expected[name].shape:
            raise PlaitError(
                f"{path}: tensor {name!r} has shape {tuple(tensor.shape)}, "
                f"config.json says {tuple(expected[name].shape)}"
            )
    # Copied, as the file may be mapped into memory and change.
    tensors = {name: tensor.to(expected[name].dtype, copy=True) for name, tensor in tensors.items()}
    module.load_state_dict(tensors, strict=not tied, assign=True)
