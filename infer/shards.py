"""Sets of tensors larger than memory: read where used, written one tensor after the other.

A set is one ``NAME.safetensors``, or several ``NAME-00001-of-00003.safetensors`` with ``NAME.safetensors.index.json``,
as on Hugging Face.
"""

import hashlib
import json
import math
import shutil
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from plait.errors import PlaitError
from plait.tokenizers.base import make_folder, read_json, write_json
from plait.tokenizers.foreign import read_checkpoint

SHARD_BYTES = 4 * 10**9
_BLOCK = 1 << 22  # bytes read or written at once
_DTYPES = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.int64: "I64",
    torch.int32: "I32", torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8", torch.bool: "BOOL",
}  # fmt: skip
STATE = "state.json"

Advance = Callable[[int, int], None]


class LazyFile:
    """A file of tensors that is mapped into memory, and let go of again before much of it has been read.

    Args:
        path: a safetensors file, or a PyTorch file of plain data.
        budget: bytes to read before the file is mapped anew; what was returned before must be gone by then.

    Raises:
        PlaitError: the file is broken, or holds code.
    """

    def __init__(self, path: Path, budget: int) -> None:
        self.path = path
        self.budget = budget
        self._tensors: dict[str, Tensor] | None = read_checkpoint(path)
        self._used = 0
        for name, tensor in self._tensors.items():
            if tensor.layout is not torch.strided or tensor.is_quantized or tensor.is_meta or tensor.is_nested:
                raise PlaitError(f"{path}: tensor {name!r} is not a plain array of numbers; save it again as one")
        self.meta = {name: tensor.to("meta") for name, tensor in self._tensors.items()}

    def read(self, name: str) -> Tensor:
        """A tensor, perhaps in mapped memory: copy what is kept."""
        if self._tensors is None or self._used > self.budget:
            self.close()
            self._tensors = read_checkpoint(self.path)
        tensor = self._tensors.get(name)
        if tensor is None or tensor.shape != self.meta[name].shape:
            raise PlaitError(f"{self.path}: has changed while it was read; start again")
        self._used += tensor.nbytes
        return tensor

    @property
    def is_open(self) -> bool:
        """Whether it is mapped."""
        return self._tensors is not None

    def close(self) -> None:
        """Unmap the file."""
        self._tensors, self._used = None, 0


def let_go(files: Sequence[LazyFile], kept: Sequence[LazyFile]) -> None:
    """Unmap all files but these: of what was read the pages count as memory in use."""
    for file in files:
        if file not in kept:
            file.close()


def shard_limit(files: Sequence[LazyFile], tensors: Mapping[str, Tensor]) -> int:
    """Bytes of a shard that is to be written: those of the largest file read, more if what is written is wider.

    So there is something to go on with after an interruption, and one file stays one.
    """
    sizes = [sum(t.nbytes for t in file.meta.values()) for file in files]
    total = max(sum(sizes), sum(t.nbytes for t in tensors.values()))
    return min(SHARD_BYTES, -(-max(sizes) * total // max(1, sum(sizes))))


def shard_files(folder: Path, stem: str = "model") -> list[Path]:
    """The files of a set that `write_set` wrote, which need not exist.

    Raises:
        PlaitError: the index is broken, or names files elsewhere.
    """
    index = folder / f"{stem}.safetensors.index.json"
    if not index.is_file():
        return [folder / f"{stem}.safetensors"]
    where = read_json(index).get("weight_map")
    if not isinstance(where, dict) or not where or not all(isinstance(name, str) for name in where.values()):
        raise PlaitError(f"{index}: has no weight_map; copy the folder again")
    names = sorted(set(where.values()))
    for name in names:
        if Path(name).name != name or "\0" in name or not (folder / name).is_file():
            raise PlaitError(f"{index}: names {name!r}, which is not in its folder; copy the folder again")
    return [folder / name for name in names]


def file_hash(path: Path, advance: Callable[[int], None] = lambda _: None, kind: str = "sha256") -> str:
    """Hash of a file; ``advance`` is told of the bytes read.

    Raises:
        PlaitError: it cannot be read.
    """
    digest = hashlib.new(kind, usedforsecurity=False)
    try:
        with path.open("rb") as file:
            while block := file.read(_BLOCK):
                digest.update(block)
                advance(len(block))
    except OSError as error:
        raise PlaitError(f"{path}: cannot be read ({error.strerror}); copy it again") from None
    return digest.hexdigest()


def write_set(
    folder: Path,
    tensors: Mapping[str, Tensor],
    produce: Callable[[str], Tensor],
    stem: str = "model",
    limit: int | None = None,
    identity: Any = None,
    advance: Advance = lambda done, total: None,
) -> dict[str, str]:
    """Write a set of tensors shard by shard, in the order given.

    Args:
        folder: is made.
        tensors: name → shape and dtype; may be on the meta device.
        produce: makes a tensor when it is its turn.
        stem: of the file names.
        limit: bytes of a shard at most, `SHARD_BYTES` by default; a single tensor may be larger.
        identity: what the tensors are made of, as JSON. With one the folder is this function's own: undamaged shards
            that an interrupted call with the same one has finished are kept, whatever else is there is deleted, and
            `STATE` stays, for the caller to delete.
        advance: told of (bytes done, bytes in all).

    Returns:
        SHA-256 by file name.

    Raises:
        PlaitError: the folder cannot be made or is full.
    """
    plan = _plan(tensors, limit or SHARD_BYTES)
    total, done = sum(t.nbytes for t in tensors.values()), 0
    names = [f"{stem}-{i + 1:05}-of-{len(plan):05}.safetensors" for i in range(len(plan))]
    if len(plan) == 1:
        names = [f"{stem}.safetensors"]
    hashes = _finished(folder, identity)
    make_folder(folder)
    for name, shard in zip(names, plan, strict=True):
        path, size = folder / name, sum(tensors[key].nbytes for key in shard)
        if hashes.get(name) is None or not path.is_file() or file_hash(path) != hashes[name]:
            before = done

            def tell(written: int, before: int = before) -> None:
                advance(before + written, total)

            hashes[name] = _write_shard(path, {key: tensors[key] for key in shard}, produce, tell)
            if identity is not None:
                write_json(folder / STATE, {"identity": identity, "shards": hashes})
        done += size
        advance(done, total)
    if len(plan) > 1:
        where = {key: name for name, shard in zip(names, plan, strict=True) for key in shard}
        write_json(
            folder / f"{stem}.safetensors.index.json",
            {"metadata": {"total_size": total}, "weight_map": dict(sorted(where.items()))},
        )
    return {name: hashes[name] for name in names}


def _finished(folder: Path, identity: Any) -> dict[str, str]:
    """The shards that an interrupted call has finished; without any, what it has left is deleted."""
    if identity is None or not folder.is_dir():
        return {}
    with suppress(PlaitError):
        state = read_json(folder / STATE)
        if state.get("identity") == identity and isinstance(state.get("shards"), dict):
            for begun in folder.glob(".*.tmp"):
                begun.unlink(missing_ok=True)
            return dict(state["shards"])
    shutil.rmtree(folder, ignore_errors=True)
    return {}


def _plan(tensors: Mapping[str, Tensor], limit: int) -> list[list[str]]:
    """The names in each shard."""
    plan: list[list[str]] = [[]]
    used = 0
    for name, tensor in tensors.items():
        if plan[-1] and used + tensor.nbytes > limit:
            plan.append([])
            used = 0
        plan[-1].append(name)
        used += tensor.nbytes
    return plan


def _write_shard(
    path: Path, tensors: Mapping[str, Tensor], produce: Callable[[str], Tensor], tell: Callable[[int], None]
) -> str:
    """Write a safetensors file whole or not at all, without holding more than a tensor; returns its SHA-256.

    The format is a length, a JSON header and the tensors' bytes one after the other. The library writes only what is
    in memory as a whole.
    """
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    # Wider elements first, so that all lie at multiples of their size.
    order = sorted(tensors, key=lambda name: -tensors[name].element_size())
    for name in order:
        tensor = tensors[name]
        end = offset + tensor.nbytes
        header[name] = {"dtype": _DTYPES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    temporary = path.with_name(f".{path.name}.tmp")
    digest = hashlib.sha256()
    try:
        with temporary.open("wb") as file:
            _put(file, len(text).to_bytes(8, "little") + text, digest)
            for name in order:
                tensor = produce(name)
                if tensor.shape != tensors[name].shape or tensor.dtype != tensors[name].dtype:
                    raise PlaitError(f"tensor {name!r} became {tuple(tensor.shape)}, {tensor.dtype}; start again")
                _put_tensor(file, tensor, digest)
                tell(header[name]["data_offsets"][1])
                del tensor  # before the next is made
        temporary.replace(path)
    except OSError as error:
        raise PlaitError(f"{path}: cannot be written ({error.strerror or error}); make room and run it again") from None
    finally:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
    return digest.hexdigest()


def _put_tensor(file: BinaryIO, tensor: Tensor, digest: Any) -> None:
    flat = tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy()
    for start in range(0, len(flat), _BLOCK):
        _put(file, flat[start : start + _BLOCK].data, digest)


def _put(file: BinaryIO, data: bytes | memoryview, digest: Any) -> None:
    file.write(data)
    digest.update(data)


def check_finite(name: str, tensor: Tensor, where: Path) -> None:
    """Refuse NaN and infinity, which a damaged file has, without a copy of the tensor.

    Raises:
        PlaitError: there are some.
    """
    if not math.isfinite(_largest(tensor)):
        raise PlaitError(f"{where}: tensor {name!r} holds values that are not finite; the file is damaged")


def cast(name: str, tensor: Tensor, dtype: torch.dtype, where: Path) -> Tensor:
    """A tensor as another dtype.

    Raises:
        PlaitError: it has values that this dtype has not.
    """
    if dtype != tensor.dtype and _largest(tensor) > torch.finfo(dtype).max:
        kind = str(dtype).removeprefix("torch.")
        raise PlaitError(f"{where}: tensor {name!r} has values too large for {kind}; choose another --dtype")
    return tensor.to(dtype)


def _largest(tensor: Tensor) -> float:
    """The largest absolute value, NaN or infinity if there is one."""
    if not tensor.is_floating_point() or not tensor.numel():
        return 0.0
    least, most = (x.item() for x in tensor.aminmax())
    return float(max(-least, most))
