"""The KV cache: one slot per position and row."""

import torch
from torch import Tensor

from plait.model.config import DecoderConfig


class KVCache:
    """Keys and values of every layer, written at their positions.

    Rows may have different lengths: a query at position p sees slots 0 to p, so what padding wrote beyond a row's end
    is never read before it is overwritten.

    Args:
        config: of the decoder.
        rows: batch size.
        capacity: positions per row.
    """

    def __init__(
        self,
        config: DecoderConfig,
        rows: int,
        capacity: int,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> None:
        shape = (config.layers, rows, config.kv_heads, capacity, config.head_size)
        self.keys, self.values = (torch.zeros(shape, device=device, dtype=dtype) for _ in range(2))
        self.capacity = capacity
        self._rows = torch.arange(rows, device=device)[:, None]

    def update(self, layer: int, k: Tensor, v: Tensor, positions: Tensor, used: int) -> tuple[Tensor, Tensor]:
        """Write keys and values ``[B, T, kv_heads, d]`` at ``positions`` ``[B, T]``.

        Returns:
            all keys and values up to slot ``used``, ``[B, kv_heads, used, d]``.
        """
        # Advanced indices around a slice put [B, T] first: the assigned value is [B, T, kv_heads, d].
        self.keys[layer][self._rows, :, positions] = k
        self.values[layer][self._rows, :, positions] = v
        return self.keys[layer][:, :, :used], self.values[layer][:, :, :used]
