"""The KV cache: keys and values of every layer, a row per sequence, each row as long as it is.

Without a sliding window a position is a slot. With one a row is a ring of window + chunk − 1 slots, and a position's
slot is its remainder: what a chunk overwrites has left the window of all that come after.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from plait.errors import PlaitError
from plait.model.config import DecoderConfig

CHUNK = 512


@dataclass
class Cached:
    """A place in the cache for the tokens of one forward pass.

    Attributes:
        cache: to write to and attend over.
        slots: where the tokens go: the same slots in every row, or int64 ``[B, T]``.
        mask: bool ``[B or 1, 1, T, used]`` of what each may see; None when all may see all, or as ``causal`` says.
        causal: the tokens are the first of their rows, and each sees itself and those before it.
        used: slots in use.
    """

    cache: "KVCache"
    slots: slice | Tensor
    mask: Tensor | None
    causal: bool
    used: int

    def attend(self, q: Tensor, k: Tensor, v: Tensor, layer: int, window: int, dropout: float) -> Tensor:
        """As `Packing.attend`; the window is in the mask already."""
        k, v = self.cache.update(layer, k, v, self.slots, self.used)
        if q.shape[1] == 1:
            # Heads that share keys are the queries of one attention: on a CPU in half the time of enable_gqa.
            grouped = q.reshape(q.shape[0], k.shape[1], -1, q.shape[3])
            return F.scaled_dot_product_attention(grouped, k, v, attn_mask=self.mask).reshape(q.shape)
        out = F.scaled_dot_product_attention(
            q.transpose(1, 2),
            k,
            v,
            attn_mask=self.mask,
            is_causal=self.causal,
            enable_gqa=q.shape[2] != k.shape[1],
        )
        return out.transpose(1, 2)


class KVCache:
    """Keys and values that were computed once, for the tokens that come after.

    Rows may have different lengths: a query at position p sees its row's positions 0 to p, whatever was written beyond.
    So a row goes back to an earlier length when tokens are fed from there.

    Args:
        config: of the decoder; its ``sliding_window`` bounds the memory.
        rows: batch size.
        capacity: positions per row; `reserve` raises it.
        device: of the tensors.
        dtype: of the tensors.
        chunk: with a sliding window, tokens per row that are fed at once at most.

    Attributes:
        keys: ``[layers, rows, kv_heads, slots, head_size]``.
        values: the same.
    """

    def __init__(
        self,
        config: DecoderConfig,
        rows: int,
        capacity: int,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
        chunk: int = CHUNK,
    ) -> None:
        self.window, self.chunk = config.sliding_window, chunk
        shape = (config.layers, rows, config.kv_heads, self._slots(capacity), config.head_size)
        self.keys, self.values = (torch.zeros(shape, device=device, dtype=dtype) for _ in range(2))
        # How many positions were ever written to each row of a ring.
        self._ends = torch.zeros(rows, dtype=torch.int64, device=device)
        self._rows = torch.arange(rows, device=device)[:, None]

    @property
    def capacity(self) -> int | None:
        """Positions per row; None when there is no limit, as the window lets go of the first."""
        return None if self._is_ring else self.keys.shape[3]

    def reserve(self, capacity: int) -> None:
        """Make room for at least so many positions per row; what is in the cache stays."""
        more = self._slots(capacity) - self.keys.shape[3]
        if more > 0:
            # What becomes a ring was none so far: its positions are their slots.
            self.keys = F.pad(self.keys, (0, 0, 0, more))
            self.values = F.pad(self.values, (0, 0, 0, more))

    def fork(self, row: int, rows: Sequence[int], length: int | None = None) -> None:
        """Copy a row's first ``length`` positions (None: all) over other rows, which then go on by themselves."""
        used = slice(None if self._is_ring else length)
        for other in rows:
            for stored in (self.keys, self.values):
                stored[:, other, :, used].copy_(stored[:, row, :, used])
            self._ends[other] = self._ends[row].clone()

    def reaches(self, row: int, length: int) -> bool:
        """Whether a row can go back to this many positions; only what a window has let go of is lost."""
        kept_from = int(self._ends[row]) - self.keys.shape[3]
        return not self._is_ring or kept_from <= max(0, length - self.window + 1)

    def narrow(self, start: int, stop: int) -> "KVCache":
        """Rows ``start`` to ``stop`` as a cache of their own, in the same memory until either calls `reserve`."""
        part = object.__new__(KVCache)
        part.window, part.chunk = self.window, self.chunk
        part.keys, part.values = self.keys[:, start:stop], self.values[:, start:stop]
        part._ends, part._rows = self._ends[start:stop], self._rows[: stop - start]
        return part

    def place(self, positions: Tensor) -> Cached:
        """Find where tokens go and what they see.

        Args:
            positions: int64 ``[B, T]``, consecutive in each row; at its end the last may be repeated, with the same
                token, as padding.

        Raises:
            PlaitError: a position is beyond the capacity; with a window, more than ``chunk`` tokens at once, or a row
                that went on so far that what these tokens should see is overwritten.
        """
        first, last = (int(edge) for edge in positions.aminmax())
        count = positions.shape[1]
        if self._is_ring:
            return self._place_in_ring(positions, last)
        aligned = last - first == count - 1 and (count == 1 or bool((positions == positions[:1]).all()))
        slots = self.keys.shape[3]
        if last >= slots:
            raise PlaitError(f"generation: position {last} is beyond the cache's {slots} slots")
        where = slice(first, last + 1) if aligned else positions
        unbounded = not self.window or last < self.window
        if aligned and unbounded and (count == 1 or first == 0):
            return Cached(self, where, None, count > 1, last + 1)
        held = torch.arange(last + 1, device=positions.device)
        mask = self._mask(positions[:1] if aligned else positions, held)
        return Cached(self, where, mask, False, last + 1)

    def update(self, layer: int, k: Tensor, v: Tensor, slots: slice | Tensor, used: int) -> tuple[Tensor, Tensor]:
        """Write keys and values ``[B, T, kv_heads, d]`` to their slots.

        Returns:
            all keys and values up to slot ``used``, ``[B, kv_heads, used, d]``.
        """
        keys, values = self.keys[layer], self.values[layer]
        if isinstance(slots, slice):
            keys[:, :, slots], values[:, :, slots] = k.transpose(1, 2), v.transpose(1, 2)
        else:
            # Advanced indices around a slice put [B, T] first: the assigned value is [B, T, kv_heads, d].
            keys[self._rows, :, slots], values[self._rows, :, slots] = k, v
        return keys[:, :, :used], values[:, :, :used]

    @property
    def _is_ring(self) -> bool:
        return self.window > 0 and self.keys.shape[3] == self.window + self.chunk - 1

    def _slots(self, capacity: int) -> int:
        return min(capacity, self.window + self.chunk - 1) if self.window else capacity

    def _mask(self, positions: Tensor, held: Tensor) -> Tensor:
        """What tokens ``[B, T]`` see of the positions that the slots hold, ``[used]`` or ``[B, 1, used]``."""
        behind = positions.unsqueeze(-1) - held
        seen = (behind >= 0) & (held >= 0)
        if self.window:
            seen &= behind < self.window
        return seen.unsqueeze(1)

    def _place_in_ring(self, positions: Tensor, last: int) -> Cached:
        slots = self.keys.shape[3]
        if positions.shape[1] > self.chunk:
            raise PlaitError(
                f"generation: {positions.shape[1]} tokens at once are more than the {self.chunk} of the cache's chunk; "
                "feed them in portions"
            )
        needed = (positions[:, 0] - self.window + 1).clamp_min(0)
        if bool((self._ends - slots > needed).any()):
            raise PlaitError("generation: a row goes back further than its window is kept; feed it from the start")
        highest = positions[:, -1:]
        self._ends.copy_(torch.maximum(self._ends, highest[:, 0] + 1))
        used = min(last + 1, slots)
        # The highest position up to a row's last that falls on the slot; below 0 where nothing was written.
        held = highest - (highest - torch.arange(used, device=positions.device)) % slots
        return Cached(self, positions % slots, self._mask(positions, held.unsqueeze(1)), False, used)
