"""The pass of generation: what `Decoder` computes with a cache, with as few and as small operations as can be.

A token of one row is little arithmetic. On a CPU calling a module costs as much as one of its smaller operations, and
a model that fits into the processor's cache spends most of its time between them. So this goes over the layers' tensors
by itself. What is no plain layer (quantized, with adapters) is called as it is.
"""

from collections.abc import Callable
from functools import partial
from operator import getitem, is_
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from plait.model.cache import Cached
from plait.model.config import DecoderConfig
from plait.model.native import NativeStep, Unsuitable
from plait.model.rope import Table

Function = Callable[[Tensor], Tensor]


class Layer(NamedTuple):
    """The parts of a block, as functions."""

    attention_norm: Function
    q: Function
    k: Function
    v: Function
    q_norm: Function | None
    k_norm: Function | None
    o: Function
    feed_forward_norm: Function
    gate: Function
    up: Function
    down: Function


class Step:
    """A decoder's embedding and blocks.

    Args:
        decoder: the `Decoder`; its tensors may change afterwards, `is_current` tells whether its parts did.

    Attributes:
        native: the same in native code, where there is any.
    """

    def __init__(self, decoder: Any) -> None:
        self.config: DecoderConfig = decoder.config
        self.embed = decoder.embed_tokens
        self.norm = _norm(decoder.norm)
        self.layers = [_layer(block) for block in decoder.layers]
        try:
            self.native: NativeStep | None = NativeStep(decoder)
        except Unsuitable:
            self.native = None
        modules = list(decoder.modules())
        owners = [held for m in modules for held in (m._modules, m._parameters, m._buffers)]
        self._owners = [held for held in owners for _ in held]
        self._names = [name for held in owners for name in held]
        self._parts = [part for held in owners for part in held.values()]
        self._hooks = [hooks for m in modules for hooks in (m._forward_hooks, m._forward_pre_hooks)]

    def is_current(self) -> bool:
        """Whether the decoder still has the parts it had."""
        if self.native is not None and not self.native.is_current():
            return False
        try:
            return all(map(is_, self._parts, map(getitem, self._owners, self._names)))
        except KeyError:
            return False

    def has_hooks(self) -> bool:
        """Whether a part has hooks, which only a call of it runs."""
        return any(self._hooks)

    def __reduce__(self) -> Any:
        """A copy of the decoder makes its own."""
        return type(None), ()

    @torch.inference_mode()
    def __call__(self, tokens: Tensor, table: Table, place: Cached) -> Tensor:
        """Feed tokens through the cache.

        Args:
            tokens: int64 ``[B, T]``.
            table: rotary cosines and sines ``[B, T, head_size / 2]``.
            place: in the cache.

        Returns:
            hidden states before the head, ``[B, T, width]``.
        """
        rows, count = tokens.shape
        inner = self.config.heads * self.config.head_size
        heads = (rows, count, -1, self.config.head_size)
        half = self.config.head_size // 2
        normalizes_first = self.config.norm_placement == "pre"
        x = self.embed(tokens).flatten(0, 1)
        # With both halves of a head swapped, a rotation is two products: by the cosines and by signed sines.
        cos, sin = (t.unsqueeze(2).to(x.dtype) for t in table)
        cos, sin = torch.cat([cos, cos], -1), torch.cat([-sin, sin], -1)
        for index, layer in enumerate(self.layers):
            h = layer.attention_norm(x) if normalizes_first else x
            q, k, v = layer.q(h).view(heads), layer.k(h).view(heads), layer.v(h).view(heads)
            if layer.q_norm is not None and layer.k_norm is not None:
                q, k = layer.q_norm(q), layer.k_norm(k)
            q = torch.addcmul(q * cos, q.roll(half, -1), sin)
            k = torch.addcmul(k * cos, k.roll(half, -1), sin)
            h = layer.o(place.attend(q, k, v, index, 0, 0.0).reshape(-1, inner))
            x = x + (h if normalizes_first else layer.attention_norm(h))
            h = layer.feed_forward_norm(x) if normalizes_first else x
            h = layer.down(F.silu(layer.gate(h)).mul_(layer.up(h)))
            x = x + (h if normalizes_first else layer.feed_forward_norm(h))
        return self.norm(x).view(rows, count, -1)


def _layer(block: Any) -> Layer:
    attention, mlp = block.self_attn, block.mlp
    return Layer(
        attention_norm=_norm(block.input_layernorm),
        q=_product(attention.q_proj),
        k=_product(attention.k_proj),
        v=_product(attention.v_proj),
        q_norm=_head_norm(attention.q_norm),
        k_norm=_head_norm(attention.k_norm),
        o=_product(attention.o_proj),
        feed_forward_norm=_norm(block.post_attention_layernorm),
        gate=_product(mlp.gate_proj),
        up=_product(mlp.up_proj),
        down=_product(mlp.down_proj),
    )


def _product(module: nn.Module) -> Function:
    if type(module) is nn.Linear and type(module.weight) is nn.Parameter:
        return partial(F.linear, weight=module.weight, bias=module.bias)  # type: ignore[arg-type]
    return module


def _norm(module: nn.Module) -> Function:
    if not isinstance(module, nn.RMSNorm) or module.weight is None or module.eps is None:
        return module
    return partial(_rms_norm, weight=module.weight, eps=torch.tensor([module.eps], device="cpu"), module=module)


def _head_norm(module: nn.Module) -> Function | None:
    return None if isinstance(module, nn.Identity) else _norm(module)


def _rms_norm(x: Tensor, weight: Tensor, eps: Tensor, module: nn.Module) -> Tensor:
    """`F.rms_norm`, which on the CPU is made of twice as many operations."""
    if x.dtype != torch.float32 or not x.is_cpu:
        y: Tensor = module(x)
        return y
    norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    return torch.mul(x, torch.addcmul(eps, norm, norm, value=1 / x.shape[-1]).rsqrt_()).mul_(weight)
