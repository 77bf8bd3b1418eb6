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
    """

    # Raise it when a change moves indices or latents: it is part of every fingerprint.
    SPEC_VERSION = 1
    _EPS = 1e-3

    def __init__(self, levels: tuple[int, ...]) -> None:
        super().__init__()
        if not levels or any(level < 3 for level in levels):
            raise PlaitError(f"quantizer levels: {list(levels)} must be integers of at least 3")
        self.levels = tuple(levels)
        self.codebook_size = math.prod(levels)
        count = torch.tensor(levels, dtype=torch.float32)
        half = (count - 1) * (1 + self._EPS) / 2
        offset = torch.where(count % 2 == 0, 0.5, 0.0)
        place = torch.tensor([math.prod(levels[:i]) for i in range(len(levels))])
        for name, value in {
            "_half": half, "_offset": offset, "_shift": torch.atanh(offset / half),
            "_half_width": count // 2, "_count": count.long(), "_place": place,
        }.items():  # fmt: skip
            self.register_buffer(name, value, persistent=False)
        self._library: Any = None

    _half: Tensor
    _offset: Tensor
    _shift: Tensor
    _half_width: Tensor
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
            bounded = torch.tanh(z.float() + self._shift) * self._half - self._offset
            digits = bounded.round() + self._half_width
            return (digits.long() * self._place).sum(-1)

    def latents(self, codes: Tensor) -> Tensor:
        """Codes int ``[...]`` → latents float32 ``[..., d]`` in ``[-1, 1]``."""
        digits = codes.unsqueeze(-1) // self._place % self._count
        return (digits - self._half_width) / self._half_width
