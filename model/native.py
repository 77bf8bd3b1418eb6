"""The pass of generation in native code, for a few tokens in float32 on the CPU: `native.c`, called through ctypes.

It is built when plait is installed and there is a C compiler; without it, and for what it does not do, there is `Step`.
It uses the OpenMP that PyTorch has loaded, so that both share one pool of threads.
"""

import ctypes
import re
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from plait.model.attention import HeadNorm
from plait.model.cache import KVCache
from plait.model.loss import Head
from plait.model.quantize import QuantizedLinear

VERSION = 1  # of the structs, as in native.c
TOKENS = 64  # with more at once, PyTorch's products of whole matrices are faster

_Int, _Pointer = ctypes.c_int64, ctypes.c_void_p


class _Matrix(ctypes.Structure):
    _fields_ = [
        *((name, _Pointer) for name in ("codes", "scales", "zeros", "bias")),
        *((name, _Int) for name in ("out", "into", "bits", "group")),
    ]


class _Norm(ctypes.Structure):
    _fields_ = [
        ("weight", _Pointer),
        ("bias", _Pointer),
        ("eps", ctypes.c_double),
        ("per_head", _Int),
        ("centred", _Int),
    ]


class _Layer(ctypes.Structure):
    _fields_ = [
        *((name, _Norm) for name in ("attention_norm", "q_norm", "k_norm", "feed_forward_norm")),
        *((name, _Matrix) for name in ("q", "k", "v", "o", "gate", "up", "down")),
    ]


class _Model(ctypes.Structure):
    _fields_ = [
        *((name, _Int) for name in ("width", "heads", "kv_heads", "head_size", "inner", "layers", "post_norm")),
        ("norm", _Norm),
        ("head", _Matrix),
        ("layer", ctypes.POINTER(_Layer)),
        ("embedding", _Pointer),
        ("frequencies", _Pointer),
        ("rotary_factor", ctypes.c_double),
    ]


class _Pass(ctypes.Structure):
    _fields_ = [
        *((name, _Int) for name in ("tokens", "threads", "chosen")),
        *((name, _Pointer) for name in ("ids", "embedded", "rows", "positions", "wanted", "keys", "values")),
        *((name, _Int) for name in ("layer_stride", "row_stride", "slots", "window")),
        *((name, _Pointer) for name in ("work", "out")),
    ]


@cache
def library() -> ctypes.CDLL | None:
    """The compiled code; None if it was not built, is older than this file or cannot be loaded."""
    built = sorted(Path(__file__).parent.glob("_native*.so"))
    try:
        # Its OpenMP functions are those of the library that PyTorch has loaded: made visible, not loaded again.
        loaded = re.findall(r"/\S*/lib(?:gomp|iomp5|omp)[^/\s]*", Path("/proc/self/maps").read_text())
        ctypes.CDLL(loaded[0], mode=ctypes.RTLD_GLOBAL)
        found = next(code for code in map(ctypes.CDLL, map(str, built)) if code.plait_version() == VERSION)
    except (IndexError, OSError, AttributeError, StopIteration):
        return None
    found.plait_work.restype = found.plait_instructions.restype = _Int
    found.plait_work.argtypes = found.plait_step.argtypes = [_Pointer, _Pointer]
    found.plait_instructions.argtypes = [_Int]
    found.plait_instructions(2)
    return found


class Unsuitable(Exception):
    """A decoder has a part that the native code does not know."""


class NativeStep:
    """A decoder's pass of generation.

    Args:
        decoder: the `Decoder`; `is_current` tells whether its tensors were replaced since.

    Attributes:
        has_head: whether its head is done too: it is a plain or a quantized matrix.

    Raises:
        Unsuitable: there is no native code for it.
    """

    def __init__(self, decoder: Any) -> None:
        if library() is None or decoder.rotary.is_dynamic:
            raise Unsuitable
        config = decoder.config
        self._tensors: list[Tensor] = []
        self._embed = decoder.embed_tokens
        layers = (_Layer * config.layers)(*map(self._layer, decoder.layers))
        try:
            head = self._matrix(decoder.lm_head)
        except Unsuitable:
            head = _Matrix()
        self.has_head = head.out > 0
        self._outputs = head.out or config.width
        self._model = _Model(
            *(config.width, config.heads, config.kv_heads, config.head_size, config.ffn_width, config.layers),
            config.norm_placement == "post",
            self._norm(decoder.norm),
            head,
            layers,
            self._keep(self._embed.weight) if type(self._embed) is nn.Embedding else None,
            self._keep(decoder.rotary.frequencies),
            decoder.rotary.factor,
        )
        self._pointers = [tensor.data_ptr() for tensor in self._tensors]

    def takes(self, tokens: Tensor, cache: KVCache) -> bool:
        """Whether these tokens ``[B, T]`` and this cache are for the native code."""
        return tokens.numel() <= TOKENS and cache.keys.is_cpu and cache.keys.dtype == torch.float32

    def is_current(self) -> bool:
        """Whether the tensors lie where they lay."""
        return [tensor.data_ptr() for tensor in self._tensors] == self._pointers

    def __call__(self, tokens: Tensor, positions: Tensor, cache: KVCache, wanted: Tensor) -> Tensor:
        """Feed tokens.

        Args:
            tokens: int64 ``[B, T]``.
            positions: int64 ``[B, T]``, which the cache has a place for.
            cache: of float32 on the CPU.
            wanted: int64 ``[n]``, indices into B·T of the tokens that count.

        Returns:
            their logits ``[n, vocabulary_size]``, or, without `has_head`, hidden states ``[n, width]``.
        """
        native = library()
        assert native is not None
        count, known = tokens.shape[1], self._model.embedding
        if known and not 0 <= int(tokens.min()) <= int(tokens.max()) < self._embed.num_embeddings:
            raise IndexError("index out of range in self")  # as the embedding has it
        given = [tokens.contiguous(), positions.contiguous(), wanted]
        rows = wanted if count == 1 else torch.arange(len(tokens)).repeat_interleave(count)
        embedded = None if known else self._embed(tokens).contiguous()
        out = torch.empty(len(wanted), self._outputs)
        keys = cache.keys
        call = _Pass(
            *(tokens.numel(), torch.get_num_threads(), len(wanted)),
            given[0].data_ptr(),
            None if embedded is None else embedded.data_ptr(),
            *(t.data_ptr() for t in (rows, given[1], given[2], keys, cache.values)),
            *(keys.stride(0), keys.stride(1), keys.shape[3], cache.window),
            None,
            out.data_ptr(),
        )
        model, call_pointer = ctypes.byref(self._model), ctypes.byref(call)
        work = torch.empty(native.plait_work(model, call_pointer))
        call.work = work.data_ptr()
        native.plait_step(model, call_pointer)
        return out

    def _layer(self, block: Any) -> _Layer:
        attention, mlp = block.self_attn, block.mlp
        norms = (block.input_layernorm, attention.q_norm, attention.k_norm, block.post_attention_layernorm)
        matrices = (attention.q_proj, attention.k_proj, attention.v_proj, attention.o_proj)
        return _Layer(
            *map(self._norm, norms), *map(self._matrix, (*matrices, mlp.gate_proj, mlp.up_proj, mlp.down_proj))
        )

    def _norm(self, module: Any) -> _Norm:
        if type(module) is nn.Identity:
            return _Norm()
        if type(module) is HeadNorm:
            return _Norm(self._keep(module.weight), self._keep(module.bias), module.EPS, 1, 1)
        if isinstance(module, nn.RMSNorm) and module.eps is not None:
            return _Norm(self._keep(module.weight), None, module.eps, 0, 0)
        raise Unsuitable

    def _matrix(self, module: Any) -> _Matrix:
        if isinstance(module, QuantizedLinear) and not module.is_packed:
            settings = module.settings
            codes = self._keep(module.weight, torch.int8 if settings.bits == 8 else torch.uint8)
            scales, zeros = (self._keep(t, torch.bfloat16) for t in (module.scales, module.zeros))
            sizes = (module.out_features, module.in_features, settings.bits, settings.group_size)
            return _Matrix(codes, scales, zeros, self._keep(module.bias), *sizes)
        if type(module) in (nn.Linear, Head):
            weight, bias = self._keep(module.weight), self._keep(module.bias)
            return _Matrix(weight, None, None, bias, module.out_features, module.in_features, 32, 0)
        raise Unsuitable

    def _keep(self, tensor: Tensor | None, dtype: torch.dtype = torch.float32) -> int | None:
        if tensor is None:
            return None
        plain = type(tensor) in (Tensor, nn.Parameter)  # others may have no memory of their own
        if not plain or tensor.dtype != dtype or not tensor.is_cpu or not tensor.is_contiguous():
            raise Unsuitable
        self._tensors.append(tensor)
        return tensor.data_ptr()
