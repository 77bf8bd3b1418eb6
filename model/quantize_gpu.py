"""Quantized layers on a GPU, by torchao's kernels where torchao is installed. Not yet run on a GPU."""

import torch
from torch import nn

from plait.model.loss import Head
from plait.model.quantize import QuantizedHead, QuantizedLinear


@torch.no_grad()
def use_torchao_(module: nn.Module, dtype: torch.dtype) -> None:
    """Give a module's quantized layers torchao's weights of as many bits, in place.

    They are quantized again from what they stand for, which changes a weight by at most a step. A layer that torchao
    has no kernel for is left as it is, and multiplies with floats that it makes of its codes every time.

    Args:
        module: on the GPU.
        dtype: of the activations; int4 wants bfloat16.
    """
    try:
        from torchao.quantization import (  # type: ignore[import-not-found, unused-ignore]
            Int4WeightOnlyConfig,
            Int8WeightOnlyConfig,
            quantize_,
        )
    except ImportError:
        return
    for name, layer in list(module.named_modules()):
        if not isinstance(layer, QuantizedLinear):
            continue
        with torch.device("meta"):
            linear: nn.Linear = (
                Head(layer.in_features, layer.out_features)
                if isinstance(layer, QuantizedHead)
                else nn.Linear(layer.in_features, layer.out_features, bias=False)
            )
        linear.weight = nn.Parameter(layer.dequantize(dtype), requires_grad=False)
        linear.register_parameter("bias", layer.bias)
        eight = layer.settings.bits == 8
        try:
            quantize_(linear, Int8WeightOnlyConfig() if eight else Int4WeightOnlyConfig(layer.settings.group_size))
        except (ImportError, RuntimeError, NotImplementedError):
            continue
        module.set_submodule(name, linear.train(layer.training))
