"""Rotary position embedding (Su et al., 2021, arXiv 2104.09864), in the half-split layout of Llama on Hugging Face.

The scalings are those of `RopeScaling`. Angles are always in float32, whatever the dtype of the weights.
"""

import math

import torch
from torch import Tensor

from plait.model.config import DecoderConfig, RopeScaling

Table = tuple[Tensor, Tensor]


class Rotary:
    """Positions to rotations.

    No module: a change of the decoder's dtype must not touch the frequencies.
    """

    def __init__(self, config: DecoderConfig) -> None:
        self.config = config
        self.frequencies = scaled_frequencies(config)
        self.factor = attention_factor(config.rope_scaling)
        self.is_dynamic = config.rope_scaling.kind == "dynamic"

    def table(self, positions: Tensor, lengths: Tensor | None = None) -> Table:
        """Cosines and sines, float32 ``[..., head_size / 2]``.

        Args:
            positions: int ``[...]``.
            lengths: int ``[...]``, how long the sequence of each position is; the scaling "dynamic" needs it.
        """
        if self.frequencies.device != positions.device:
            self.frequencies = self.frequencies.to(positions.device)
        frequencies = self.frequencies
        if self.is_dynamic:
            assert lengths is not None
            frequencies = _dynamic(self.config, lengths)
        angles = positions.unsqueeze(-1).float() * frequencies
        cos, sin = angles.cos(), angles.sin()
        return (cos, sin) if self.factor == 1 else (cos * self.factor, sin * self.factor)


def rotate(x: Tensor, table: Table) -> Tensor:
    """Rotate heads ``[B, T, n, d]`` by a table ``[B, T, d / 2]``."""
    cos, sin = (t.unsqueeze(-2).to(x.dtype) for t in table)
    a, b = x.chunk(2, dim=-1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1)


def scaled_frequencies(config: DecoderConfig) -> Tensor:
    """Radians per position of each pair, float32 ``[head_size / 2]`` on the CPU; of "dynamic" before it scales."""
    scaling, size = config.rope_scaling, config.head_size
    theta = config.rope_theta
    if scaling.kind == "ntk":
        theta *= scaling.factor ** (size / max(1, size - 2))
    steps = torch.arange(0, size, 2, dtype=torch.float32, device="cpu") / size
    plain = 1.0 / theta**steps
    match scaling.kind:
        case "linear":
            return plain / scaling.factor
        case "llama3":
            return _llama3(plain, scaling)
        case "yarn":
            return _yarn(plain, config)
    return plain


def attention_factor(scaling: RopeScaling) -> float:
    """What YaRN multiplies queries and keys with (arXiv 2309.00071, equation 22); 1 for the others."""
    if scaling.kind != "yarn":
        return 1.0
    return scaling.attention_factor or (0.1 * math.log(scaling.factor) + 1.0 if scaling.factor > 1 else 1.0)


def _dynamic(config: DecoderConfig, lengths: Tensor) -> Tensor:
    """NTK-aware frequencies for sequences of these lengths ``[...]``, ``[..., head_size / 2]``."""
    scaling, size = config.rope_scaling, config.head_size
    longer = scaling.factor * lengths.clamp_min(scaling.original_context) / scaling.original_context
    theta = config.rope_theta * (longer - (scaling.factor - 1)).float() ** (size / max(1, size - 2))
    steps = torch.arange(0, size, 2, dtype=torch.float32, device=lengths.device) / size
    return 1.0 / theta.unsqueeze(-1) ** steps


def _llama3(plain: Tensor, scaling: RopeScaling) -> Tensor:
    """Long waves are scaled, short ones left alone, those between blended."""
    turns = scaling.original_context * plain / (2 * math.pi)
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    kept = ((turns - low) / (high - low)).clamp(0, 1)
    return plain * (kept + (1 - kept) / scaling.factor)


def _yarn(plain: Tensor, config: DecoderConfig) -> Tensor:
    """Frequencies with few turns in the original context are scaled, those with many left alone, a ramp between."""
    scaling, size = config.rope_scaling, config.head_size

    def pair_with(turns: float) -> float:
        """The (fractional) pair that turns so often in the original context."""
        return size * math.log(scaling.original_context / (turns * 2 * math.pi)) / (2 * math.log(config.rope_theta))

    low, high = pair_with(scaling.beta_fast), pair_with(scaling.beta_slow)
    if scaling.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, size - 1)
    ramp = (torch.arange(size // 2, dtype=torch.float32, device="cpu") - low) / (high - low or 1e-3)
    scaled = ramp.clamp(0, 1)
    return plain * (1 - scaled) + plain / scaling.factor * scaled
