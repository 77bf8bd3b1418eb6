"""Layouts: how the codes of several codebooks become one stream, and back.

A step of sound may have several codes: those of residual codebooks (SoundStream, EnCodec, DAC, Mimi), or those of
levels with rates of their own (SNAC). A decoder predicts one code after the other, so their order must be settled. With
codebooks a, b, c and steps 0, 1, 2::

    flatten     a0 b0 c0  a1 b1 c1  a2 b2 c2
    delay       a0  a1 b0  a2 b1 c0  b2 c1  c2
    interleave  a0 b0 c0 c1 b1 c2 c3  a1 b2 …
    parallel    (a0 b0 c0) (a1 b1 c1) (a2 b2 c2)

The first three hold every code once: a layout is a permutation, and which codebook a position belongs to follows from
the position and the number of steps. `delay` (MusicGen, arXiv 2306.05284; Moshi, arXiv 2410.00037) lets codebook k of a
step come k steps later; as one stream its corners need no filling. Delays longer than the sound give one codebook after
the other (coarse first, AudioLM, arXiv 2209.03143). `parallel` is for decoders with a head per codebook.

A layout is written as its name, or its name and numbers: ``flatten``, ``delay``, ``delay:0,1,1``, ``interleave:4,2,1``.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from plait.errors import PlaitError

LAYOUTS = ("flatten", "delay", "interleave", "parallel")
_MOST = 1 << 20  # beyond any sound's steps


class Layout(ABC):
    """Codes ``[..., q, t]`` ↔ stream ``[..., n]``; with one codebook, or interleaved ones, codes are ``[..., n]``."""

    @property
    @abstractmethod
    def spec(self) -> str:
        """The layout as text, for `build_layout`."""

    @property
    @abstractmethod
    def codebooks(self) -> int:
        """The number of codebooks, q."""

    @property
    def heads(self) -> int:
        """Codes that are predicted at once."""
        return 1

    @property
    def has_axis(self) -> bool:
        """Whether codes have a codebook axis, second to last."""
        return self.codebooks > 1

    @abstractmethod
    def length(self, steps: int) -> int:
        """Positions of the stream of so many steps."""

    @abstractmethod
    def books(self, steps: int) -> Tensor:
        """The codebook of each position, int64 ``[n]``."""

    @abstractmethod
    def write(self, codes: Tensor) -> Tensor:
        """Codes → stream.

        Raises:
            PlaitError: as `steps`.
        """

    @abstractmethod
    def read(self, stream: Tensor, steps: int | None = None) -> Tensor:
        """Stream → codes.

        Args:
            stream: ``[..., n]``, of any dtype.
            steps: of the whole stream, of which this may be the beginning: what comes back are the steps that have all
                their codes. By default the stream is whole.

        Raises:
            PlaitError: it does not come from whole steps, or is longer than that of ``steps`` steps.
        """

    def steps(self, shape: Sequence[int]) -> int:
        """The number of steps of codes of this shape.

        Raises:
            PlaitError: no codes of this layout have this shape.
        """
        if len(shape) < 1 + self.has_axis or (self.has_axis and shape[-2] != self.codebooks):
            expected = f"[..., {self.codebooks}, t]" if self.has_axis else "[..., t]"
            raise PlaitError(f"codes: shape is {tuple(shape)}, the {self.spec} layout takes {expected}")
        return shape[-1]

    def _whole_steps(self, stream: Tensor, steps: int | None) -> int:
        """The steps of a stream, or of the stream that it begins."""
        found, per = stream.shape[-1], self.length(1)
        if steps is None and found % per:
            raise PlaitError(
                f"stream: has {found} codes, the {self.spec} layout has {per} a step; it is cut off or another's"
            )
        if steps is not None and found > self.length(steps):
            raise PlaitError(f"stream: has {found} codes, {steps} steps in the {self.spec} layout have fewer")
        return found // per if steps is None else steps


@dataclass(frozen=True)
class Delay(Layout):
    """The code of step s and codebook k comes at time ``s + delays[k]``; those of one time in order of codebooks."""

    delays: tuple[int, ...]

    def __post_init__(self) -> None:
        # Only differences matter, so equal layouts get equal texts.
        object.__setattr__(self, "delays", tuple(delay - min(self.delays) for delay in self.delays))

    @property
    def spec(self) -> str:
        """``flatten`` where nothing is delayed."""
        return "delay:" + ",".join(map(str, self.delays)) if any(self.delays) else "flatten"

    @property
    def codebooks(self) -> int:
        """The number of codebooks, q."""
        return len(self.delays)

    def length(self, steps: int) -> int:
        """Positions of the stream: q a step."""
        return self.codebooks * steps

    def order(self, steps: int) -> Tensor:
        """Where in the flattened codes ``[q · t]`` each position's code is, int64 ``[n]``."""
        times = torch.tensor(self.delays)[:, None] + torch.arange(steps)
        return times.flatten().argsort(stable=True)  # stable: the codebooks of one time stay in order

    def books(self, steps: int) -> Tensor:
        """The codebook of each position, int64 ``[n]``."""
        return self.order(steps) // max(1, steps)

    def write(self, codes: Tensor) -> Tensor:
        """Codes ``[..., q, t]`` → stream ``[..., q · t]``."""
        steps = self.steps(codes.shape)
        return codes.flatten(-2)[..., self.order(steps).to(codes.device)] if self.has_axis else codes

    def read(self, stream: Tensor, steps: int | None = None) -> Tensor:
        """Stream ``[..., n]`` → codes ``[..., q, t]``; without ``steps``, n must be a multiple of q."""
        steps = self._whole_steps(stream, steps)
        if not self.has_axis:
            return stream
        places = self.order(steps).argsort().unflatten(0, (self.codebooks, steps))
        places = places[:, (places < stream.shape[-1]).all(0)]
        return stream[..., places.to(stream.device)]


@dataclass(frozen=True)
class Interleave(Layout):
    """Levels of codes, depth-first (SNAC, arXiv 2410.14411): after each code those of its time one level down.

    Levels differ in length, so the codes themselves are the stream; a step is one of the coarsest level.
    """

    strides: tuple[int, ...]

    @property
    def spec(self) -> str:
        """The layout as text."""
        return "interleave:" + ",".join(map(str, self.strides))

    @property
    def codebooks(self) -> int:
        """The number of levels."""
        return len(self.strides)

    @property
    def has_axis(self) -> bool:
        """Never: the codes are a stream."""
        return False

    def length(self, steps: int) -> int:
        """Positions of the stream."""
        return steps * len(_cycle(self.strides))

    def books(self, steps: int) -> Tensor:
        """The level of each position, int64 ``[n]``."""
        return torch.tensor(_cycle(self.strides)).repeat(steps)

    def steps(self, shape: Sequence[int]) -> int:
        """The number of coarsest codes in a stream of this shape."""
        return self._whole_steps(torch.empty(shape, device="meta"), None)

    def write(self, codes: Tensor) -> Tensor:
        """The codes, which are a stream already."""
        self.steps(codes.shape)
        return codes

    def read(self, stream: Tensor, steps: int | None = None) -> Tensor:
        """The stream ``[..., n]``, up to its last whole step."""
        self._whole_steps(stream, steps)
        return stream[..., : stream.shape[-1] // self.length(1) * self.length(1)]


@dataclass(frozen=True)
class Parallel(Layout):
    """All codebooks of a step at once: codes ``[..., q, t]`` ↔ stream ``[..., t, q]``, for a head per codebook."""

    count: int

    @property
    def spec(self) -> str:
        """The layout as text."""
        return "parallel"

    @property
    def codebooks(self) -> int:
        """The number of codebooks, q."""
        return self.count

    @property
    def heads(self) -> int:
        """Codes that are predicted at once: one of each codebook."""
        return self.count

    def length(self, steps: int) -> int:
        """Positions of the stream: one a step."""
        return steps

    def books(self, steps: int) -> Tensor:
        """The codebook of each code, int64 ``[t, q]``."""
        return torch.arange(self.count).expand(steps, -1)

    def write(self, codes: Tensor) -> Tensor:
        """Codes ``[..., q, t]`` → stream ``[..., t, q]``."""
        self.steps(codes.shape)
        return codes.mT

    def read(self, stream: Tensor, steps: int | None = None) -> Tensor:
        """Stream ``[..., t, q]`` → codes ``[..., q, t]``."""
        if stream.ndim < 2 or stream.shape[-1] != self.count:
            raise PlaitError(f"stream: shape is {tuple(stream.shape)}, the parallel layout has [..., t, {self.count}]")
        self._whole_steps(stream.mT, steps)
        return stream.mT


def build_layout(spec: str, codebooks: int) -> Layout:
    """A layout from its text, for so many codebooks.

    Raises:
        PlaitError: an unknown name, or numbers that are none or do not fit the codebooks.
    """
    name, _, text = spec.partition(":") if isinstance(spec, str) else ("", "", "")
    if name not in LAYOUTS or (text and name in ("flatten", "parallel")):
        raise PlaitError(
            f"layout: {spec!r} is none of {', '.join(LAYOUTS)}, nor delay or interleave with numbers, as delay:0,1,1"
        )
    parts = text.split(",") if text else []
    if not all(part.strip().isdecimal() and len(part) < 9 and int(part) < _MOST for part in parts):
        raise PlaitError(f"layout: {spec!r} must give whole numbers below {_MOST}, with commas between them")
    numbers = tuple(map(int, parts))
    if name == "interleave" or numbers:
        if len(numbers) != codebooks:
            raise PlaitError(f"layout: {spec!r} gives {len(numbers)} numbers, there are {codebooks} codebooks")
        if name == "interleave":
            _check_strides(numbers)
            return Interleave(numbers)
    if name == "parallel" and codebooks > 1:
        return Parallel(codebooks)
    return Delay(numbers or tuple(range(codebooks) if name == "delay" else [0] * codebooks))


def interleave(levels: Sequence[Tensor]) -> Tensor:
    """Levels of codes → one stream, depth-first.

    Args:
        levels: ``[..., n_l]`` each, coarsest first; each is a whole number of times as long as the one before.

    Returns:
        ``[..., n]``, where n is the sum of the levels' lengths.

    Raises:
        PlaitError: there are no levels, or their shapes do not fit.
    """
    lengths = [level.shape[-1] for level in levels]
    if not lengths or any(a == 0 or b % a for a, b in pairwise([1, *lengths])):
        raise PlaitError(f"levels: have {lengths} codes, each must have a whole multiple of those of the one before")
    if len({level.shape[:-1] for level in levels}) > 1:
        raise PlaitError(f"levels: shapes are {[tuple(level.shape) for level in levels]}, must differ in length only")
    cycle = torch.tensor(_cycle([lengths[-1] // length for length in lengths]), device=levels[0].device)
    by_level = torch.cat([level.unflatten(-1, (lengths[0], -1)) for level in levels], -1)
    return by_level[..., cycle.argsort(stable=True).argsort()].flatten(-2)


def deinterleave(stream: Tensor, strides: Sequence[int]) -> list[Tensor]:
    """One stream → its levels of codes, coarsest first; undoes `interleave`.

    Args:
        stream: ``[..., n]``.
        strides: how many steps of the codec one code of each level stands for, such as (4, 2, 1).

    Returns:
        ``[..., n_l]`` each.

    Raises:
        PlaitError: the strides do not nest, or the stream does not end with a whole coarsest code.
    """
    _check_strides(strides)
    Interleave(tuple(strides)).steps(stream.shape)
    cycle = torch.tensor(_cycle(strides), device=stream.device)
    steps = stream.shape[-1] // len(cycle)
    by_level = stream.unflatten(-1, (steps, len(cycle)))[..., cycle.argsort(stable=True)]
    return [level.flatten(-2) for level in by_level.split(cycle.bincount().tolist(), -1)]


def _cycle(strides: Sequence[int]) -> list[int]:
    """The levels of the codes of one coarsest step: 0 1 2 2 1 2 2 for strides 4, 2, 1."""
    cycle: list[int] = []
    for level, stride in reversed(list(enumerate(strides))):
        times = stride // strides[level + 1] if level + 1 < len(strides) else 0
        cycle = [level] + cycle * times
    return cycle


def _check_strides(strides: Sequence[int]) -> None:
    whole = all(type(stride) is int and 0 < stride < _MOST for stride in strides)
    if not strides or not whole or any(a % b for a, b in pairwise(strides)):
        raise PlaitError(f"strides: are {list(strides)}, each must be a whole multiple of the next, as in 4, 2, 1")
