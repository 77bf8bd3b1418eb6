"""Rotary position embedding (Su et al., 2021, arXiv 2104.09864), in the half-split layout of Llama on Hugging Face."""

import torch
from torch import Tensor


def rotary_table(positions: Tensor, head_size: int, theta: float) -> tuple[Tensor, Tensor]:
    """Cosines and sines, float32 ``[..., head_size / 2]``, of int positions ``[...]``."""
    frequencies = theta ** (-torch.arange(0, head_size, 2, device=positions.device, dtype=torch.float32) / head_size)
    angles = positions.unsqueeze(-1).float() * frequencies
    return angles.cos(), angles.sin()


def rotate(x: Tensor, table: tuple[Tensor, Tensor]) -> Tensor:
    """Rotate heads ``[B, T, n, d]`` by a table ``[B, T, d / 2]``."""
    cos, sin = (t.unsqueeze(-2).to(x.dtype) for t in table)
    a, b = x.chunk(2, dim=-1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1)
