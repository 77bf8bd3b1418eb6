"""Layers for signals ``[B, C, T]`` that come whole or in chunks: both ways give the same.

A layer is written once, for a chunk of a signal: what it needs of the chunks before is in a `Stream`, and what it can
only give when more has come it gives with a later chunk. So a layer that looks ahead works too, it merely gives its
outputs later; a whole signal is one chunk that is the last. Nothing is computed twice, and what is remembered does not
grow with the length of the signal.
"""

from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

T = TypeVar("T")


class Stream:
    """What the layers of one network remember of one signal.

    Attributes:
        last: whether the chunk that goes through now ends the signal; set it before that chunk.
    """

    def __init__(self, last: bool = False) -> None:
        self.last = last
        self._memory: dict[object, Any] = {}

    def take(self, key: object, default: T) -> T:
        """What was put under this key, which is any hashable object, a layer mostly."""
        found: T = self._memory.pop(key, default)
        return found

    def put(self, key: object, value: Any) -> None:
        """Remember for the next chunk; tensors should be no views of larger ones."""
        self._memory[key] = value


class Streamed:
    """Marks a layer whose ``forward`` takes the stream too."""


class Chain(nn.Sequential, Streamed):
    """Layers one after the other, streamed or not."""

    def forward(self, x: Tensor, stream: Stream) -> Tensor:  # type: ignore[override]
        """``[B, C, T]`` → ``[B, C', T']``."""
        for layer in self:
            x = layer(x, stream) if isinstance(layer, Streamed) else layer(x)
        return x


def whole() -> Stream:
    """The stream of a signal that goes through in one pass."""
    return Stream(last=True)


def join(past: Tensor | None, x: Tensor) -> Tensor:
    """What was kept and what came, along time."""
    return x if past is None or not past.shape[-1] else torch.cat([past, x], -1)


class Conv1d(nn.Conv1d, Streamed):
    """Convolution over a stream; it gives every output as soon as its inputs are there.

    Args:
        in_channels: of the signal.
        out_channels: of the result.
        kernel_size: inputs per output.
        stride: inputs from one output to the next.
        dilation: inputs from one tap to the next.
        groups: as in torch.
        bias: as in torch.
        padding: zeros before and after the signal; by default ``reach − stride`` in all, all of them before it, so
            that an output depends on no later input but those of its own stride.
        causal: False shares the default padding out to both sides, the right one getting the odd one.
        ceil: the signal is filled up with zeros for a last output, rather than some inputs being left over.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int,
        stride: int = 1,
        dilation: int = 1,
        groups: int = 1,
        bias: bool = True,
        padding: tuple[int, int] | None = None,
        causal: bool = True,
        ceil: bool = False,
    ) -> None:
        super().__init__(in_channels, out_channels, kernel_size, stride, dilation=dilation, groups=groups, bias=bias)
        self.reach = (kernel_size - 1) * dilation + 1
        total = max(0, self.reach - stride)
        self.pads = padding if padding is not None else ((total, 0) if causal else (total // 2, total - total // 2))
        self.ceil = ceil

    def forward(self, x: Tensor, stream: Stream) -> Tensor:  # type: ignore[override]
        """``[B, C, T]`` → ``[B, C', T']``, where T' may be 0."""
        x = self.padded(x, stream)
        step = self.stride[0]
        count = max(0, (x.shape[-1] - self.reach) // step + 1)
        if not stream.last:
            stream.put(self, x[..., count * step :].clone())
        if not count:
            return x.new_zeros(x.shape[0], self.out_channels, 0)
        return F.conv1d(x, self.weight, self.bias, self.stride, 0, self.dilation, self.groups)

    def padded(self, x: Tensor, stream: Stream) -> Tensor:
        """What is to be convolved now: kept inputs, new ones, and the padding at the signal's ends."""
        past = stream.take(self, None)
        left = self.pads[0] if past is None else 0
        x = join(past, x)
        right = 0
        if stream.last:
            right = self.pads[1]
            over = left + x.shape[-1] + right - self.reach
            if self.ceil and over > -self.stride[0]:  # else no input is left over
                right += -over % self.stride[0]
        return F.pad(x, (left, right)) if left or right else x


class ConvTranspose1d(nn.ConvTranspose1d, Streamed):
    """Transposed convolution over a stream, from T inputs to ``T · stride`` outputs.

    Args:
        in_channels: of the signal.
        out_channels: of the result.
        kernel_size: outputs per input, at least the stride.
        stride: outputs from one input to the next.
        groups: as in torch.
        bias: as in torch.
        trim: outputs to drop at the beginning and at the end of the signal; by default ``kernel_size − stride`` in
            all, all of them at the end, so that no output depends on a later input.
        causal: False shares the default trim out to both ends, the right one getting the odd one.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int,
        stride: int,
        groups: int = 1,
        bias: bool = True,
        trim: tuple[int, int] | None = None,
        causal: bool = True,
    ) -> None:
        super().__init__(in_channels, out_channels, kernel_size, stride, groups=groups, bias=bias)
        total = kernel_size - stride
        self.trim = trim if trim is not None else ((0, total) if causal else (total // 2, total - total // 2))

    def forward(self, x: Tensor, stream: Stream) -> Tensor:  # type: ignore[override]
        """``[B, C, T]`` → ``[B, C', T']``; ``T · stride`` over the whole signal with the default trim."""
        if x.shape[-1]:
            y = F.conv_transpose1d(x, self.weight, None, self.stride, 0, 0, self.groups)
        else:
            y = x.new_zeros(x.shape[0], self.out_channels, 0)
        y = overlap_add(self, y, x.shape[-1] * self.stride[0], self.trim, stream)
        return y if self.bias is None else y + self.bias[:, None]


def overlap_add(key: object, x: Tensor, count: int, trim: tuple[int, int], stream: Stream) -> Tensor:
    """Add up parts of a signal that overlap from chunk to chunk.

    Args:
        key: of what is remembered, a layer mostly.
        x: ``[B, C, count + overlap]``, the next part; one without any samples is empty.
        count: samples from this part's beginning to the next part's.
        trim: samples to drop at the signal's beginning and end.
        stream: of the signal.

    Returns:
        The samples that no later part adds to.
    """
    tail, skip = stream.take(key, (x[..., :0], trim[0]))
    if x.shape[-1]:
        overlap = tail.shape[-1]
        x = torch.cat([x[..., :overlap] + tail, x[..., overlap:]], -1) if overlap else x
    else:
        x = tail
    end = max(0, x.shape[-1] - trim[1]) if stream.last else count
    if not stream.last:
        # A view would keep the whole chunk.
        stream.put(key, (x[..., end:].clone(), max(0, skip - end)))
    return x[..., skip:end] if skip < end else x[..., :0]


def delayed(key: object, x: Tensor, count: int, stream: Stream) -> Tensor:
    """The next ``count`` inputs of a shortcut, whose branch gives its outputs later.

    Args:
        key: of what is remembered; another than the branch's layers.
        x: the shortcut's new inputs ``[B, C, T]``.
        count: outputs of the branch.
        stream: of the signal.
    """
    x = join(stream.take(key, None), x)
    if not stream.last:
        stream.put(key, x[..., count:].clone())
    return x[..., :count]


class Residual(nn.Module, Streamed):
    """A branch beside a shortcut: ``x + branch(x)``. The branch may look ahead.

    Args:
        *layers: the branch.
    """

    def __init__(self, *layers: nn.Module) -> None:
        super().__init__()
        self.branch = Chain(*layers)

    def forward(self, x: Tensor, stream: Stream) -> Tensor:
        """``[B, C, T]`` → ``[B, C, T']``."""
        y = self.branch(x, stream)
        return delayed(self, x, y.shape[-1], stream) + y


class Frames(nn.Module, Streamed):
    """Overlapping frames of a signal.

    Args:
        hop: samples from one frame to the next; the signal is filled up to whole hops.
        window: samples per frame, at least the hop.
        causal: a frame ends with its hop; else it has as many samples before its hop as after it.
    """

    def __init__(self, hop: int, window: int, causal: bool) -> None:
        super().__init__()
        self.hop, self.window = hop, window
        total = window - hop
        self.pads = (total, 0) if causal else (total // 2, total - total // 2)

    def forward(self, x: Tensor, stream: Stream) -> Tensor:
        """``[B, C, N]`` → ``[B, C, T, window]``, over the whole signal T is ``ceil(N / hop)``."""
        past = stream.take(self, None)
        left = self.pads[0] if past is None else 0
        x = join(past, x)
        right = 0
        if stream.last:
            right = self.pads[1] + -(left + x.shape[-1] - (self.window - self.hop - self.pads[1])) % self.hop
        x = F.pad(x, (left, right)) if left or right else x
        count = max(0, (x.shape[-1] - self.window) // self.hop + 1)
        if not stream.last:
            stream.put(self, x[..., count * self.hop :].clone())
        return x.unfold(-1, self.window, self.hop) if count else x.new_zeros(*x.shape[:-1], 0, self.window)
