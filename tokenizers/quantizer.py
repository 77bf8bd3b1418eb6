"""Finite scalar quantization behind our own adapter.

Paper: Mentzer et al., "Finite Scalar Quantization: VQ-VAE Made Simple", 2023 (arXiv 2309.15505).

vector-quantize-pytorch serves training (its straight-through rounding). Look-up and codes → latents are our own
formulas, so that stored codes keep their meaning whatever the library's version; a test holds the two equal.
"""

import math
from typing import Any

import torch
from torch import Tensor, nn

from plait.errors import PlaitError


class FiniteScalarQuantizer(nn.Module):
    """Each of ``d`` latent channels is squashed and rounded to ``levels[i]`` values; a code numbers the combination.

    It has no parameters.

    Args:
        levels: values per channel, each at least 3; the codebook has their product of codes.

    Raises:
        PlaitError: a level below 3, or more codes than int32 can number, which is what the library uses.
    """

    # Raise it when a change moves indices or latents: it is part of every fingerprint.
    SPEC_VERSION = 1
    _EPS = 1e-3

    def __init__(self, levels: tuple[int, ...]) -> None:
        super().__init__()
        if not levels or any(level < 3 for level in levels):
            raise PlaitError(f"quantizer levels: {list(levels)} must be integers of at least 3")
        if math.prod(levels) >= 2**31:
            raise PlaitError(f"quantizer levels: {list(levels)} give 2³¹ codes or more; use fewer or smaller levels")
        self.levels = tuple(levels)
        self.codebook_size = math.prod(levels)
        # Integers only: casting the module to bfloat16 would round float constants and so move codes.
        self.register_buffer("_count", torch.tensor(levels), persistent=False)
        place = torch.tensor([math.prod(levels[:i]) for i in range(len(levels))])
        self.register_buffer("_place", place, persistent=False)
        self._library: Any = None

    _count: Tensor
    _place: Tensor

    def forward(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """Quantize for training, with straight-through gradients.

        Args:
            z: latents ``[..., d]``.

        Returns:
            quantized latents ``[..., d]`` in ``[-1, 1]`` and codes int64 ``[...]``.
        """
        if self._library is None:
            from vector_quantize_pytorch import FSQ

            self._library = FSQ(levels=list(self.levels)).to(z.device)
        with torch.autocast(z.device.type, enabled=False):
            quantized, indices = self._library(z.float().reshape(1, -1, len(self.levels)))
        return quantized.reshape(z.shape), indices.reshape(z.shape[:-1]).long()

    def codes(self, z: Tensor) -> Tensor:
        """Latents ``[..., d]`` → codes int64 ``[...]``, computed in float32 under any autocast."""
        with torch.autocast(z.device.type, enabled=False):
            half = (self._count.float() - 1) * (1 + self._EPS) / 2
            offset = (self._count % 2 == 0) * 0.5
            bounded = torch.tanh(z.float() + torch.atanh(offset / half)) * half - offset
            digits = bounded.round().long() + self._count // 2
            return (digits * self._place).sum(-1)

    def latents(self, codes: Tensor) -> Tensor:
        """Codes int ``[...]`` → latents float32 ``[..., d]`` in ``[-1, 1]``."""
        digits = codes.unsqueeze(-1) // self._place % self._count
        half_width = (self._count // 2).float()
        return (digits - half_width) / half_width
