"""What every quantizer is: its configuration, its interface, and the arithmetic that several kinds share."""

import math
from abc import abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from plait.errors import PlaitError
from plait.tokenizers.averages import DISTANCES, MovingAverages

KINDS = ("fsq", "vq_ema", "vq_grad", "lfq", "bsq", "simvq", "rvq", "rvq_l2")

# The joint distribution of a batch over all codes must fit into memory for its entropy.
_ENTROPY_CODES = 2**24


@dataclass(frozen=True)
class QuantizerConfig:
    """A quantizer and how it trains.

    Attributes:
        kind: "fsq", "vq_ema", "vq_grad", "lfq", "bsq", "simvq", "rvq" (residual "vq_ema"), or "rvq_l2" (residual, each
            codebook small and behind projections of its own, looked up by angle).
        levels: fsq: values per latent channel, at least 3 each.
        codebook_size: codes per codebook, for all kinds but fsq, whose levels imply it; a power of two for lfq, bsq.
        dim: latent channels, for the kinds with a codebook of vectors; implied for fsq, lfq and bsq.
        code_dim: rvq_l2: channels of a codebook's vectors, 8 if not given.
        codebooks: rvq: how many, at least 2; rvq_l2: at least 1.
        decay: vq_ema, rvq: of the moving averages, per training pass.
        dead_code: vq_ema, rvq: a code used less than this share of the mean use is replaced; 0 replaces none.
        commitment: weight of the pull of latents towards their codes; not for fsq.
        entropy: fsq, lfq, bsq: weight of the entropy term. Binary codes collapse without one; 0.1 is usual.
        entropy_gamma: weight of the batch's entropy against the samples' within that term.
        entropy_temperature: of the soft assignment, in squared units of the latents.
        dropout: rvq, rvq_l2: probability that a sample of the batch keeps only its first 1, 2, … codebooks, drawn
            evenly.

    Raises:
        PlaitError: a value that cannot be, or a field that this kind does not have.
    """

    kind: str = "fsq"
    levels: tuple[int, ...] = (8, 5, 5, 5)
    codebook_size: int = 0
    dim: int = 0
    code_dim: int = 0
    codebooks: int = 1
    decay: float = 0.99
    dead_code: float = 0.1
    commitment: float = 0.25
    entropy: float = 0.0
    entropy_gamma: float = 1.0
    entropy_temperature: float = 0.01
    dropout: float = 0.0

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise PlaitError(f"quantizer: kind is {self.kind!r}, must be one of {', '.join(KINDS)}")
        for name, least, most in (
            ("decay", 0, 1), ("dead_code", 0, 1), ("commitment", 0, math.inf), ("entropy", 0, math.inf),
            ("entropy_gamma", 0, math.inf), ("entropy_temperature", 0, math.inf), ("dropout", 0, 1),
        ):  # fmt: skip
            value = getattr(self, name)
            if type(value) not in (int, float) or not least <= value <= most or math.isinf(value):
                raise PlaitError(f"quantizer: {name} is {value!r}, must be a number from {least} to {most}")
        if not self.entropy_temperature:
            raise PlaitError("quantizer: entropy_temperature is 0, must be above 0")
        if self.kind == "fsq":
            object.__setattr__(self, "levels", checked_levels(self.levels))
        if self.kind == "rvq_l2" and self.code_dim == 0:
            object.__setattr__(self, "code_dim", 8)
        self._check_sizes()
        for name, kinds in (("entropy", ("fsq", "lfq", "bsq")), ("dropout", ("rvq", "rvq_l2"))):
            if getattr(self, name) and self.kind not in kinds:
                raise PlaitError(f"quantizer: {name} is {getattr(self, name)}, but only {', '.join(kinds)} has it")

    def _check_sizes(self) -> None:
        binary = self.kind in ("lfq", "bsq")
        size = self.codebook_size
        if self.kind != "fsq" and (type(size) is not int or not 2 <= size < 2**31):
            raise PlaitError(f"quantizer: codebook_size is {size!r}, must be a whole number of 2 to 2³¹ − 1")
        if binary and size & (size - 1):
            raise PlaitError(f"quantizer: codebook_size is {size}, must be a power of two for {self.kind}")
        if self.kind == "fsq":
            size = math.prod(self.levels)
            if self.codebook_size not in (0, size):
                raise PlaitError(f"quantizer: codebook_size is {self.codebook_size!r}, but the levels make it {size}")
        if binary or self.kind == "fsq":
            dim = size.bit_length() - 1 if binary else len(self.levels)
            if self.dim not in (0, dim):
                raise PlaitError(f"quantizer: dim is {self.dim!r}, but {self.kind} of {size} codes makes it {dim}")
        elif type(self.dim) is not int or not 1 <= self.dim <= 2**16:
            raise PlaitError(f"quantizer: dim is {self.dim!r}, must be a whole number of at least 1, at most 65536")
        must = {"rvq": "2 to 1024 (one is vq_ema)", "rvq_l2": "1 to 1024"}
        least = {"rvq": 2}.get(self.kind, 1)
        if (
            type(self.codebooks) is not int
            or not least <= self.codebooks <= 1024
            or (self.codebooks > 1 and self.kind not in must)
        ):
            must_be = must.get(self.kind, f"1 for {self.kind}")
            raise PlaitError(f"quantizer: codebooks is {self.codebooks!r}, must be {must_be}")
        if type(self.code_dim) is not int or (self.code_dim < 1 if self.kind == "rvq_l2" else self.code_dim != 0):
            must_be = "a whole number of at least 1" if self.kind == "rvq_l2" else f"0 for {self.kind}"
            raise PlaitError(f"quantizer: code_dim is {self.code_dim!r}, must be {must_be}")
        if self.entropy and size > _ENTROPY_CODES:
            raise PlaitError(f"quantizer: entropy is {self.entropy}, must be 0 for {size} codes; it takes up to 2²⁴")


def checked_levels(levels: Sequence[int]) -> tuple[int, ...]:
    """Levels of a finite scalar quantizer.

    Raises:
        PlaitError: one is no whole number or below 3, or they make more codes than int32 can number.
    """
    if not isinstance(levels, list | tuple) or not levels or any(type(n) is not int or n < 3 for n in levels):
        raise PlaitError(f"quantizer: levels is {levels!r}, must list whole numbers of at least 3")
    if math.prod(levels) >= 2**31:
        # The library numbers codes in int32.
        raise PlaitError(f"quantizer: levels {list(levels)} give 2³¹ codes or more; use fewer or smaller levels")
    return tuple(levels)


class Quantized(NamedTuple):
    """What a training pass gives.

    Attributes:
        latents: float32 ``[..., dim]``, with gradients to the latents that went in.
        codes: int64 ``[...]``, or ``[..., q]`` of a residual quantizer.
        losses: weighted scalars by name, to be added to the loss; none in eval mode.
    """

    latents: Tensor
    codes: Tensor
    losses: dict[str, Tensor]


class Quantizer(nn.Module):
    """Latents ``[..., dim]`` to codes and back.

    Attributes:
        dim: channels of the latents.
        codebook_sizes: the number of codes of each codebook.
        SPEC_VERSION: raised when a change moves codes or latents; part of every fingerprint.
    """

    SPEC_VERSION: ClassVar[int] = 1
    dim: int
    codebook_sizes: list[int]
    _averages: "MovingAverages | None" = None

    @property
    def codebook_size(self) -> int:
        """Codes of one codebook."""
        return self.codebook_sizes[0]

    @abstractmethod
    def forward(self, z: Tensor) -> Quantized:
        """Quantize for training.

        Args:
            z: latents ``[..., dim]``.
        """

    @abstractmethod
    def codes(self, z: Tensor) -> Tensor:
        """Latents ``[..., dim]`` → codes int64 ``[...]``, or ``[..., q]`` of a residual quantizer."""

    @abstractmethod
    def latents(self, codes: Tensor) -> Tensor:
        """Codes → latents float32 ``[..., dim]``."""

    @abstractmethod
    def margin(self, z: Tensor) -> Tensor:
        """How far the decision for each of ``[..., dim]`` is from flipping, float32 ``[...]``, at least 0."""

    def training_state(self) -> dict[str, Tensor]:
        """What a checkpoint needs besides the state dict to go on training; the same on every rank."""
        return {} if self._averages is None else self._averages.state()

    def load_training_state(self, state: dict[str, Tensor]) -> None:
        """Go on from a `training_state`; to be called after `load_state_dict`.

        Raises:
            PlaitError: it is of another kind of quantizer.
        """
        if self._averages is not None:
            self._averages.load(state)
        elif state:
            raise PlaitError(f"quantizer: the training state has {sorted(state)[0]!r}, which this kind does not keep")

    def _load_from_state_dict(self, state_dict: dict[str, Tensor], prefix: str, *args: Any) -> None:
        super()._load_from_state_dict(state_dict, prefix, *args)
        if self._averages is not None and any(prefix + name in state_dict for name in self._buffers):
            self._averages.restart()

    def _apply(self, fn: Any, recurse: bool = True) -> "Quantizer":
        # Buffers follow the device but not the dtype: averages that move by 1 % per step stand still in bfloat16.
        buffers = {id(buffer) for buffer in self._buffers.values()}

        def keep_dtype(tensor: Tensor) -> Tensor:
            moved: Tensor = fn(tensor)
            return tensor.to(moved.device) if id(tensor) in buffers and moved.dtype != tensor.dtype else moved

        return super()._apply(keep_dtype, recurse)


def nearest_margin(z: Tensor, table: Tensor) -> Tensor:
    """Distance to the second nearest row of the table ``[K, d]`` minus that to the nearest, for each of ``[N, d]``."""
    squares = table.square().sum(-1)
    margins = []
    for part in z.split(max(1, DISTANCES // len(table))):
        two = torch.addmm(squares, part, table.T, alpha=-2).topk(min(2, len(table)), largest=False).indices
        # Again from the differences, as |c|² − 2 z·c cancels.
        distances = (part[:, None] - table[two]).norm(dim=-1)
        margins.append(distances.amax(-1) - distances.amin(-1))
    return torch.cat(margins)


@contextmanager
def exact_float32(device: torch.device) -> Iterator[None]:
    """Full float32 in here: no autocast, and no TF32 in CUDA's matrix products, whose 10 bits would move codes."""
    precision = torch.get_float32_matmul_precision()
    with torch.autocast(device.type, enabled=False):
        if device.type == "cuda" and precision != "highest":
            torch.set_float32_matmul_precision("highest")
        try:
            yield
        finally:
            if torch.get_float32_matmul_precision() != precision:
                torch.set_float32_matmul_precision(precision)
