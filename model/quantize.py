"""Weight-only quantization: linear layers that keep int8 or int4 weights and multiply with activations in float.

int8 has one scale for each output channel; int4 has a scale and a zero point for each group of ``group_size`` inputs.
What is stored is plain (codes, scales, zeros); how a kernel wants it laid out is decided where it runs. At a few tokens
the weights' bytes are what takes the time, and the kernels read the codes only; at many tokens the codes are turned
into floats once and multiplied as such, which is also the path of gradients and of every device and shape that has no
kernel.

A Torch kernel of these is exact in the codes but takes its activations, scales and zeros as bfloat16. So scales and
zeros are rounded to bfloat16 first and the codes chosen for them: their rounding adds no error.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Self, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from plait.errors import PlaitError
from plait.model.loss import Head, Targets

GROUP_SIZES = (32, 64, 128, 256)
INT8_ROWS = 64  # from more tokens on, multiplying floats is faster than the int8 kernel
_SHRINKS = (1.0, 0.95, 0.9, 0.85, 0.8, 0.75)


@dataclass(frozen=True)
class Quantization:
    """How weights are kept.

    Attributes:
        bits: 8 or 4.
        group_size: inputs that share a scale and a zero point: 32, 64, 128 or 256 with 4 bits; 0 with 8 bits, where a
            whole output channel shares a scale.
    """

    bits: int = 8
    group_size: int = 0

    def __post_init__(self) -> None:
        if type(self.bits) is not int or self.bits not in (4, 8):
            raise PlaitError(f"quantization: bits is {self.bits!r}, must be 8 or 4")
        sizes = (0,) if self.bits == 8 else GROUP_SIZES
        if type(self.group_size) is not int or self.group_size not in sizes:
            known = ", ".join(map(str, sizes))
            raise PlaitError(f"quantization: group_size is {self.group_size!r}, must be {known} with {self.bits} bits")

    @classmethod
    def named(cls, name: str) -> Self:
        """The settings of this name: int8, or int4 in groups of 32.

        Raises:
            PlaitError: another name.
        """
        if name not in ("int8", "int4"):
            raise PlaitError(f"quantize: is {name!r}, must be int8 or int4")
        return cls(8) if name == "int8" else cls(4, 32)


class QuantizedLinear(nn.Module):
    """``x @ dequantize().T + bias``, with gradients for ``x`` and ``bias``.

    Attributes:
        weight: the codes: int8 ``[out, in]``; with 4 bits uint8 ``[out, ⌈in / 2⌉]``, the even inputs in the low halves.
            Weights are ``(code − 8) · scale + zero`` with 4 bits, ``code · scale`` with 8.
        scales: bfloat16 ``[out]``; with 4 bits ``[out, ⌈in / group_size⌉]``.
        zeros: with 4 bits, bfloat16 as ``scales``; None with 8.
        bias: ``[out]`` or None.
    """

    weight: Tensor
    scales: Tensor
    zeros: Tensor | None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        settings: Quantization,
        bias: nn.Parameter | None = None,
        device: torch.device | None = None,
    ) -> None:
        super().__init__()
        self.in_features, self.out_features, self.settings = in_features, out_features, settings
        shape: tuple[int, ...] = (out_features,)
        zeros = None
        if settings.bits == 8:
            weight = torch.zeros(out_features, in_features, dtype=torch.int8, device=device)
        else:
            weight = torch.zeros(out_features, -(-in_features // 2), dtype=torch.uint8, device=device)
            shape = (out_features, -(-in_features // settings.group_size))
            zeros = torch.zeros(shape, dtype=torch.bfloat16, device=device)
        self.register_buffer("weight", weight)
        self.register_buffer("scales", torch.ones(shape, dtype=torch.bfloat16, device=device))
        self.register_buffer("zeros", zeros)
        self.bias = bias
        self._packed: tuple[Tensor, Tensor] | None = None

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The weights, ``[out, in]``."""
        self._check_plain()
        if self.zeros is None:
            return self.weight.to(dtype) * self.scales.to(dtype)[:, None]
        out, groups = self.scales.shape
        size = self.settings.group_size
        codes = F.pad(split_halves(self.weight, self.in_features), (0, groups * size - self.in_features))
        scales, zeros = (t.to(dtype)[..., None] for t in (self.scales, self.zeros))
        weights = codes.view(out, groups, size).to(dtype).sub_(8).mul_(scales).add_(zeros)
        return weights.view(out, -1)[:, : self.in_features]

    def forward(self, x: Tensor) -> Tensor:
        """``[..., in]`` → ``[..., out]``, of the same dtype."""
        rows = x.numel() // self.in_features
        if torch.is_grad_enabled() and x.requires_grad:
            y: Tensor = _Product.apply(x, self)
        elif self._packed is not None:
            codes, scales = self._packed
            flat = x.reshape(rows, self.in_features).bfloat16()
            y = torch._weight_int4pack_mm_for_cpu(flat, codes, self.settings.group_size, scales)
            y = y[:, : self.out_features].to(x.dtype).reshape(*x.shape[:-1], self.out_features)
        elif self.settings.bits == 8 and rows <= INT8_ROWS and self._has_int8_kernel:
            flat = x.reshape(rows, self.in_features).bfloat16()
            y = torch._weight_int8pack_mm(flat, self.weight, self.scales).to(x.dtype)
            y = y.reshape(*x.shape[:-1], self.out_features)
        else:
            y = F.linear(x, self.dequantize(x.dtype))
        return y if self.bias is None else y + self.bias

    @torch.no_grad()
    def pack(self) -> None:
        """Lay int4 codes out for the CPU's kernel, instead of as they are stored: they can be multiplied with, no more.

        Nothing happens with 8 bits, on another device, and where groups do not fill the inputs.
        """
        size = self.settings.group_size
        fits = self.settings.bits == 4 and not self.in_features % size and self.weight.device.type == "cpu"
        if self._packed is not None or not fits:
            return
        assert self.zeros is not None
        rows = -self.out_features % 16  # the kernel wants whole blocks of 16
        codes = F.pad(split_halves(self.weight, self.in_features).int(), (0, 0, 0, rows))
        scales = F.pad(torch.stack([self.scales.T, self.zeros.T], -1), (0, 0, 0, rows)).contiguous()
        self._packed = torch._convert_weight_to_int4pack_for_cpu(codes, 1), scales
        self.weight, self.scales, self.zeros = (t.new_empty(0) for t in (self.weight, self.scales, self.zeros))

    @property
    def is_packed(self) -> bool:
        """Whether `pack` has taken the codes as they are stored."""
        return self._packed is not None

    def extra_repr(self) -> str:
        """For printing."""
        return f"in_features={self.in_features}, out_features={self.out_features}, bits={self.settings.bits}"

    @property
    def _has_int8_kernel(self) -> bool:
        # The kernel reads beyond the row's end where the inputs do not fill its vectors.
        return self.weight.device.type == "cpu" and not self.in_features % 16

    def _check_plain(self) -> None:
        if self._packed is not None:
            raise PlaitError("quantization: int4 weights were packed for generation; load the bundle again for this")

    def _save_to_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self._check_plain()
        super()._save_to_state_dict(*args, **kwargs)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Codes, scales and zeros follow to another device, but never change their dtype."""
        kept = self.scales, self.zeros
        moved = super()._apply(fn, recurse)
        if self._packed is not None and self.weight.device.type != "cpu":
            self._check_plain()
        if not kept[0].is_meta:
            self.scales, self.zeros = (None if t is None else t.to(self.weight.device) for t in kept)  # type: ignore
        return moved


class QuantizedHead(QuantizedLinear):
    """A `Head` with quantized weights. Its loss goes through the dequantized matrix."""

    def matrix(self) -> Tensor:
        """As `Head.matrix`."""
        return self.dequantize()

    def forward(self, x: Tensor, targets: Targets | None = None, z_loss: float = 0.0) -> Any:
        """As `Head.forward`."""
        if targets is None:
            return super().forward(x)
        return Head.forward(cast(Head, self), x, targets, z_loss)


class _Product(torch.autograd.Function):
    """``x @ W.T`` that keeps no floats of W for the backward pass, but makes them again."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, layer: QuantizedLinear) -> Tensor:
        ctx.layer = layer
        return F.linear(x, layer.dequantize(x.dtype))

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient @ ctx.layer.dequantize(gradient.dtype), None


def quantize_(module: nn.Module, settings: Quantization | str) -> None:
    """`quantize_linear` for every `nn.Linear` inside, in place.

    The embedding stays as it is, a head that is tied to it becomes a quantized copy of it. On the meta device this
    makes the skeleton that stored codes are loaded into.
    """
    for name, child in list(module.named_children()):
        if isinstance(child, nn.Linear):
            setattr(module, name, quantize_linear(child, settings))
        else:
            quantize_(child, settings)


def quantize_linear(linear: nn.Linear, settings: Quantization | str) -> QuantizedLinear:
    """The quantized form of a layer; of one on the meta device, only the shapes.

    Args:
        linear: may be a `Head`. Its bias is passed on.
        settings: or "int8" or "int4", as in `Quantization.named`.
    """
    if isinstance(settings, str):
        settings = Quantization.named(settings)
    weight = linear.weight
    kind = QuantizedHead if isinstance(linear, Head) else QuantizedLinear
    made = kind(linear.in_features, linear.out_features, settings, linear.bias, weight.device)
    if weight.is_meta:
        return made
    if settings.bits == 8:
        made.weight, made.scales = quantize_int8(weight)
    else:
        codes, made.scales, made.zeros = quantize_int4(weight, settings.group_size)
        made.weight = join_halves(codes)
    return made


def pack_(module: nn.Module) -> None:
    """`QuantizedLinear.pack` for all of a module's layers, unless there is native code that takes plain codes."""
    from plait.model.native import library

    if library() is None:
        for child in module.modules():
            if isinstance(child, QuantizedLinear):
                child.pack()


@torch.no_grad()
def quantize_int8(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Codes int8 in [−127, 127] and scales bfloat16 ``[out]`` of a matrix ``[out, in]``."""
    weight = weight.float()
    scales = (weight.abs().amax(1) / 127).bfloat16()
    scales[scales == 0] = 1  # of a row of zeros
    return (weight / scales.float()[:, None]).round_().clamp_(-127, 127).to(torch.int8), scales


@torch.no_grad()
def quantize_int4(weight: Tensor, group_size: int) -> tuple[Tensor, Tensor, Tensor]:
    """Codes uint8 in [0, 15] ``[out, in]``, scales and zeros bfloat16 ``[out, groups]`` of a matrix ``[out, in]``.

    A group's codes span its least to its greatest value, or, where that makes the squared error smaller, somewhat less.
    """
    out, width = weight.shape
    groups = -(-width // group_size)
    counts = (torch.arange(groups * group_size, device=weight.device) < width).view(groups, group_size)
    filler = weight[:, -1:].expand(-1, groups * group_size - width)  # changes no group's range
    filled = torch.cat([weight, filler], 1).float().view(out, groups, group_size)
    low, high = filled.amin(-1), filled.amax(-1)
    codes = torch.zeros_like(filled, dtype=torch.uint8)
    scales, zeros = (torch.zeros_like(low, dtype=torch.bfloat16) for _ in range(2))
    least = torch.full_like(low, torch.inf)
    for shrink in _SHRINKS:
        step = (shrink * (high - low) / 15).bfloat16().float()
        step[step == 0] = 1  # of a group of equal values
        # Code 8 is the zero point, and the middle of the codes is 7.5.
        zero = torch.where(high > low, (low + high + step) / 2, low).bfloat16().float()
        tried = ((filled - zero[..., None]) / step[..., None]).round_().add_(8).clamp_(0, 15)
        error = ((tried - 8) * step[..., None] + zero[..., None] - filled).mul_(counts).square_().sum(-1)
        better = error < least
        codes[better], scales[better], zeros[better] = (
            tried[better].to(torch.uint8),
            step[better].bfloat16(),
            zero[better].bfloat16(),
        )
        least[better] = error[better]
    return codes.view(out, -1)[:, :width].contiguous(), scales, zeros


def join_halves(codes: Tensor) -> Tensor:
    """Codes in [0, 15] ``[out, in]`` → two of them a byte, ``[out, ⌈in / 2⌉]``."""
    codes = F.pad(codes, (0, codes.shape[1] % 2))
    return codes[:, ::2] | (codes[:, 1::2] << 4)


def split_halves(bytes: Tensor, width: int) -> Tensor:
    """What `join_halves` joined, ``[out, width]``."""
    return torch.stack([bytes & 15, bytes >> 4], -1).flatten(1)[:, :width]
