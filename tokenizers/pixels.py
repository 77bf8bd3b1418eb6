"""What every visual tokenizer shares, whatever its network: checks, padding, codes, long video, large images, files.

A network supplies two passes, `to_latents` and `from_latents`, and a quantizer; everything here is built on them. Both
passes take a *cache*, which holds what causal layers need of the frames before: with it a video goes through in chunks
and gives what one pass over all frames gives, in memory that does not grow with its length.
"""

import math
from abc import abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from itertools import pairwise
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from plait.errors import PlaitError
from plait.tokenizers.base import Codes, check_codes
from plait.tokenizers.network import NetworkTokenizer

# What a causal layer keeps of the frames it has seen, by layer. Empty before the first chunk of a video.
Cache = dict[nn.Module, Tensor]

# A long video goes through the network in chunks of about this many frames.
CHUNK = 16


def with_past(
    x: Tensor, count: int, layer: nn.Module, cache: Cache | None, mode: str = "replicate", dim: int = 2
) -> Tensor:
    """Prepend the ``count`` frames that came before ``x``, and remember the last ones for the next chunk.

    Args:
        x: frames along ``dim``, ``[B, C, T, ...]`` by default.
        count: frames a causal layer looks back.
        layer: whose past it is.
        cache: None for a whole video in one pass.
        mode: before the first frame there is the first frame again ("replicate") or nothing ("zeros").
        dim: the axis of time.

    Returns:
        ``x`` with ``count`` more frames in front.
    """
    past = None if cache is None else cache.get(layer)
    if past is None:
        first = x.narrow(dim, 0, 1)
        first = first if mode == "replicate" else torch.zeros_like(first)
        past = first.expand(*(count if axis == dim else -1 for axis in range(x.ndim)))
    x = torch.cat([past, x], dim)
    if cache is not None:
        cache[layer] = x.narrow(dim, x.shape[dim] - count, count).clone()
    return x


class PixelTokenizer(NetworkTokenizer):
    """Images ``[B, 3, H, W]`` and videos ``[B, 3, T, H, W]``, float32 in ``[-1, 1]``, to codes and back.

    A subclass sets `config` (a frozen dataclass) and `quantizer` (with ``codes``, ``latents`` and ``codebook_sizes``)
    and writes the two passes.
    """

    kind: ClassVar[str] = "visual"
    modalities: ClassVar[tuple[str, ...]] = ("image", "video")
    # Whether the first frame is coded by itself (T = 1 + f·k) or as one of a group of f equal rank (T = f·k).
    first_alone: ClassVar[bool] = True

    @property
    @abstractmethod
    def factor(self) -> int:
        """Pixels per code along each side."""

    @property
    def temporal_factor(self) -> int:
        """Frames per code."""
        return 1

    @abstractmethod
    def to_latents(self, pixels: Tensor, cache: Cache | None = None) -> Tensor:
        """Pixels → latents before quantization.

        Args:
            pixels: ``[B, 3, T, H, W]``; H and W multiples of `factor`; T whole groups of frames, see `first_alone`.
            cache: of the chunks before; None for one pass.

        Returns:
            ``[B, d, t, h, w]``.
        """

    @abstractmethod
    def from_latents(self, z: Tensor, cache: Cache | None = None, frames: int | None = None) -> Tensor:
        """Quantized latents → pixels.

        Args:
            z: ``[B, d, t, h, w]``.
            cache: of the chunks before; None for one pass.
            frames: how many frames from the first on are wanted; a network may leave out the others.

        Returns:
            ``[B, 3, T, H, W]``, not clamped.
        """

    def _fingerprint_settings(self) -> dict[str, Any]:
        return super()._fingerprint_settings() | {"input": "rgb on white, [-1, 1], edge-padded"}

    # Codes

    @torch.no_grad()
    def encode(self, pixels: Tensor, n_codebooks: int | None = None, tile: int | None = None) -> Codes:
        """Pixels → codes.

        Any size goes in: it is padded by repeating the last row, column and frame, and remembered. Long videos take
        no more memory than short ones.

        Args:
            pixels: ``[B, 3, H, W]`` or ``[B, 3, T, H, W]``, floating point in ``[-1, 1]``.
            n_codebooks: the first so many codebooks of a residual quantizer; all by default.
            tile: encode large pictures in overlapping squares of this many pixels a side. The codes are close to but
                not those of one pass, as norms and attention see one tile each.

        Returns:
            codes ``[B, h, w]`` or ``[B, t, h, w]``, with the codebook axis at dim 1 if there are several.

        Raises:
            PlaitError: no tensor, another shape, an integer dtype, or values that are not finite or out of range.
        """
        self._check_pixels(pixels)
        video = pixels if pixels.ndim == 5 else pixels.unsqueeze(2)
        codes = torch.cat(list(self.encode_stream([video], n_codebooks, tile)), -3)
        if pixels.ndim == 4:
            codes = codes.squeeze(-3)
        modality = "video" if pixels.ndim == 5 else "image"
        return Codes(codes, modality, size=tuple(pixels.shape[2:]), fingerprint=self.fingerprint)

    @torch.no_grad()
    def encode_stream(
        self, chunks: Iterable[Tensor], n_codebooks: int | None = None, tile: int | None = None
    ) -> Iterator[Tensor]:
        """A video in chunks of any number of frames → its codes in chunks, which together are those of `encode`.

        Args:
            chunks: ``[B, 3, n, H, W]`` each, n ≥ 1, in ``[-1, 1]``.
            n_codebooks: as in `encode`.
            tile: as in `encode`.

        Yields:
            codes ``[B, t, h, w]``, with the codebook axis at dim 1 if there are several.

        Raises:
            PlaitError: as `encode`, or chunks of different sizes.
        """
        self._check_codebooks(n_codebooks)
        caches: list[Cache] = []
        for chunk in _regroup(self._checked(chunks), self._group):
            with torch.autocast(self.device.type, enabled=False):
                codes = self._encode_chunk(chunk.to(self.device, torch.float32), caches, n_codebooks, tile)
            yield codes  # outside, or the consumer's own autocast would be off

    @torch.no_grad()
    def decode(self, codes: Codes | Tensor, size: tuple[int, ...] | None = None, tile: int | None = None) -> Tensor:
        """Codes → pixels in ``[-1, 1]``, float32.

        Args:
            codes: a `Codes`, or a bare int tensor ``[B, h, w]`` or ``[B, t, h, w]``, with the codebook axis at dim 1
                if there are several.
            size: (H, W) or (T, H, W) to crop to; by default a `Codes`'s own size, else the whole grid.
            tile: decode large pictures in overlapping squares of this many pixels a side, blended.

        Returns:
            ``[B, 3, H, W]`` or ``[B, 3, T, H, W]``.

        Raises:
            PlaitError: wrong shape, codes out of range, made by another tokenizer, or a size that the grid cannot hold.
        """
        if isinstance(codes, Codes):
            if codes.fingerprint not in (None, self.fingerprint):
                raise PlaitError(
                    "codes: made by another tokenizer (fingerprints differ); decode with the one that encoded"
                )
            size = size or codes.size
            codes = codes.codes
        is_video = self._check_grid(codes)
        grid = tuple(codes.shape[-3 if is_video else -2 :])
        size = self._checked_size(size, grid)
        video = codes if is_video else codes.unsqueeze(-3)
        if not is_video:
            size = (1, *size[-2:])
        pixels = torch.cat(list(self.decode_stream([video], size, tile)), 2)
        return pixels if is_video else pixels.squeeze(2)

    @torch.no_grad()
    def decode_stream(
        self, chunks: Iterable[Tensor], size: tuple[int, ...] | None = None, tile: int | None = None
    ) -> Iterator[Tensor]:
        """Codes in chunks of any number of latent frames → pixels in chunks, which together are those of `decode`.

        Args:
            chunks: ``[B, t, h, w]`` each, with the codebook axis at dim 1 if there are several.
            size: (T, H, W) or (H, W) to crop to.
            tile: as in `decode`.

        Yields:
            ``[B, 3, n, H, W]`` in ``[-1, 1]``.

        Raises:
            PlaitError: as `decode`, or chunks of different sizes.
        """
        left = size[0] if size is not None and len(size) == 3 else None
        caches: list[Cache] = []
        per_chunk = max(1, CHUNK // self.temporal_factor)
        for whole in self._checked_codes(chunks, size):
            for codes in whole.split(per_chunk, -3):
                if left == 0:
                    return
                with torch.autocast(self.device.type, enabled=False):
                    pixels = self._decode_chunk(codes.to(self.device, torch.int64), caches, tile, left).clamp(-1, 1)
                pixels = pixels[:, :, :left]
                left = None if left is None else left - pixels.shape[2]
                yield pixels if size is None else pixels[..., : size[-2], : size[-1]]

    # The two chunk passes, whole or in tiles

    def _encode_chunk(self, pixels: Tensor, caches: list[Cache], n_codebooks: int | None, tile: int | None) -> Tensor:
        pixels = self._pad(pixels)
        height, width = pixels.shape[-2:]
        if tile is None or max(height, width) <= self._tile(tile):
            tiles = [(slice(0, height), slice(0, width), slice(0, height), slice(0, width))]
        else:
            tiles = _tiles(height, width, self._tile(tile), self.factor)
        caches.extend({} for _ in range(len(tiles) - len(caches)))
        first: Tensor | None = None
        f = self.factor
        for (rows, columns, inner_rows, inner_columns), cache in zip(tiles, caches, strict=True):
            z = self.to_latents(pixels[..., rows, columns], cache)
            codes = self.quantizer.codes(rearrange(z, "b d t h w -> b t h w d"))
            codes = codes if len(self.codebook_sizes) == 1 else rearrange(codes, "b t h w q -> b q t h w")
            codes = codes[:, :n_codebooks] if codes.ndim == 5 else codes
            if first is None:
                first = codes.new_empty(*codes.shape[:-2], height // f, width // f)
            inside = (inner_rows.start - rows.start) // f, (inner_columns.start - columns.start) // f
            target = first[
                ..., inner_rows.start // f : inner_rows.stop // f, inner_columns.start // f : inner_columns.stop // f
            ]
            target.copy_(codes[..., inside[0] : inside[0] + target.shape[-2], inside[1] : inside[1] + target.shape[-1]])
        assert first is not None
        return first

    def _decode_chunk(self, codes: Tensor, caches: list[Cache], tile: int | None, frames: int | None) -> Tensor:
        several = len(self.codebook_sizes) > 1
        z = self.quantizer.latents(rearrange(codes, "b q t h w -> b t h w q") if several else codes)
        z = rearrange(z, "b t h w d -> b d t h w")
        f = self.factor
        height, width = z.shape[-2] * f, z.shape[-1] * f
        if tile is None or max(height, width) <= self._tile(tile):
            caches.extend({} for _ in range(1 - len(caches)))
            return self.from_latents(z, caches[0], frames)
        tiles = _tiles(height, width, self._tile(tile), f)
        caches.extend({} for _ in range(len(tiles) - len(caches)))
        total: Tensor | None = None
        weights = z.new_zeros(height, width)
        for (rows, columns, _, _), cache in zip(tiles, caches, strict=True):
            part = self.from_latents(
                z[..., rows.start // f : rows.stop // f, columns.start // f : columns.stop // f], cache, frames
            )
            if total is None:
                total = part.new_zeros(*part.shape[:-2], height, width)
            weight = _ramp(rows, height, part)[:, None] * _ramp(columns, width, part)
            total[..., rows, columns] += part * weight
            weights[rows, columns] += weight
        assert total is not None
        return total / weights

    def _tile(self, tile: int) -> int:
        """The tile's side in whole codes.

        Raises:
            PlaitError: it is too small to hold an overlap.
        """
        if type(tile) is not int or tile < 8 * self.factor:
            raise PlaitError(f"tile: is {tile!r}, must be a whole number of at least {8 * self.factor} pixels")
        return tile // self.factor * self.factor

    # Checks

    @property
    def _group(self) -> tuple[int, int]:
        """Frames that the first chunk and every later chunk must have a multiple of: (first, later)."""
        return (1 if self.first_alone else self.temporal_factor), self.temporal_factor

    def frames_of(self, grid_frames: int) -> int:
        """Frames that decode from this many latent frames."""
        first, later = self._group
        return first + later * (grid_frames - 1)

    def grid_frames_of(self, frames: int) -> int:
        """Latent frames of a video of this many frames."""
        first, later = self._group
        return 1 + math.ceil(max(0, frames - first) / later)

    def _check_pixels(self, pixels: Tensor, video: bool = False) -> None:
        expected = "[B, 3, T, H, W]" if video else "[B, 3, H, W] or [B, 3, T, H, W]"
        if not isinstance(pixels, Tensor):
            raise PlaitError(f"pixels: is a {type(pixels).__name__}, expected a tensor {expected}")
        if pixels.ndim not in ((5,) if video else (4, 5)) or pixels.shape[1] != 3 or 0 in pixels.shape:
            raise PlaitError(f"pixels: shape is {tuple(pixels.shape)}, expected {expected}")
        if not pixels.is_floating_point():
            raise PlaitError(f"pixels: dtype is {pixels.dtype}, expected floating point in [-1, 1]")
        # One comparison for NaN, infinity and range; a little room for resizing filters that overshoot.
        low, high = pixels.aminmax()
        if not -1.5 <= float(low) <= float(high) <= 1.5:
            raise PlaitError("pixels: values are not finite or lie outside [-1, 1]; scale bytes with x / 127.5 - 1")

    def _checked(self, chunks: Iterable[Tensor]) -> Iterator[Tensor]:
        size = None
        for chunk in chunks:
            self._check_pixels(chunk, video=True)
            found = (chunk.shape[0], *chunk.shape[-2:])
            if size not in (None, found):
                raise PlaitError(f"pixels: a chunk is {tuple(chunk.shape)}, the chunks before differ in more than T")
            size = found
            yield chunk

    def _checked_codes(self, chunks: Iterable[Tensor], size: tuple[int, ...] | None) -> Iterator[Tensor]:
        shape = None
        for chunk in chunks:
            self._check_grid(chunk, video=True)
            found = (*chunk.shape[:-3], *chunk.shape[-2:])
            if shape is None and size is not None:
                self._checked_size(size[-2:], tuple(found[-2:]))
            if shape not in (None, found):
                raise PlaitError(f"codes: a chunk is {tuple(chunk.shape)}, the chunks before differ in more than t")
            shape = found
            yield chunk

    def _check_grid(self, codes: Tensor, video: bool | None = None) -> bool:
        """Whether the codes are a video's.

        Raises:
            PlaitError: another shape, or codes out of range.
        """
        if not isinstance(codes, Tensor):
            raise PlaitError(f"codes: is a {type(codes).__name__}, expected Codes or a tensor of integers")
        several = len(self.codebook_sizes) > 1
        axes = codes.ndim - several
        if axes not in ((4,) if video else (3, 4)) or 0 in codes.shape:
            q = "q, " if several else ""
            expected = f"[B, {q}t, h, w]" if video else f"[B, {q}h, w] or [B, {q}t, h, w]"
            raise PlaitError(f"codes: shape is {tuple(codes.shape)}, expected {expected}")
        if several and codes.shape[1] > len(self.codebook_sizes):
            raise PlaitError(f"codes: has {codes.shape[1]} codebooks, this tokenizer has {len(self.codebook_sizes)}")
        check_codes(codes, self.codebook_sizes[0])
        return bool(axes == 4)

    def _checked_size(self, size: tuple[int, ...] | None, grid: tuple[int, ...]) -> tuple[int, ...]:
        """The size to crop to.

        Raises:
            PlaitError: no size, or one that this grid of codes does not stand for.
        """
        whole = (*(self.frames_of(t) for t in grid[:-2]), *(side * self.factor for side in grid[-2:]))
        if size is None:
            return whole
        if not isinstance(size, Sequence) or any(type(side) is not int or side < 1 for side in size):
            raise PlaitError(f"size: {size!r} must be whole numbers, (H, W) or (T, H, W)")
        size = tuple(size)
        needed = (
            *(self.grid_frames_of(t) for t in size[:-2]),
            *(math.ceil(side / self.factor) for side in size[-2:]),
        )
        if len(size) not in (2, len(grid)) or needed != grid[len(grid) - len(needed) :]:
            raise PlaitError(
                f"size: {'×'.join(map(str, size))} does not fit a grid of {'×'.join(map(str, grid))} codes; "
                "give the size that was encoded"
            )
        return size if len(size) == len(grid) else (whole[0], *size)

    def _pad(self, pixels: Tensor) -> Tensor:
        """Repeat the last row and column up to multiples of the factor; ``[..., H, W]``."""
        down, right = (-side % self.factor for side in pixels.shape[-2:])
        if not (down or right):
            return pixels
        flat = pixels.reshape(-1, 1, *pixels.shape[-2:])
        padded = F.pad(flat, (0, right, 0, down), mode="replicate")
        return padded.reshape(*pixels.shape[:-2], *padded.shape[-2:])


def _regroup(chunks: Iterable[Tensor], group: tuple[int, int]) -> Iterator[Tensor]:
    """Chunks of any number of frames → chunks of whole groups, as soon as they are whole; the last one is padded."""
    least, later = group
    most = max(1, CHUNK // later) - 1  # groups that may follow the first in a chunk
    held: Tensor | None = None
    for chunk in chunks:
        held = chunk if held is None else torch.cat([held, chunk], 2)
        while (count := held.shape[2]) >= least:
            whole = least + min(count - least, most) // later * later
            yield held[:, :, :whole]
            held, least = held[:, :, whole:], later
    if held is not None and (count := held.shape[2]):
        yield torch.cat([held, held[:, :, -1:].expand(-1, -1, least - count, -1, -1)], 2)


def _tiles(height: int, width: int, tile: int, factor: int) -> list[tuple[slice, slice, slice, slice]]:
    """Overlapping tiles over a picture and the part of each that is its own: (rows, columns, own rows, own columns)."""
    rows, columns = _spans(height, tile, factor), _spans(width, tile, factor)
    return [(r, c, own_r, own_c) for r, own_r in rows for c, own_c in columns]


def _spans(length: int, tile: int, factor: int) -> list[tuple[slice, slice]]:
    """Cover ``[0, length)`` with spans of ``tile``, a quarter of which overlaps the next; all multiples of factor."""
    if length <= tile:
        return [(slice(0, length), slice(0, length))]
    step = max(factor, tile * 3 // 4 // factor * factor)
    starts = [*range(0, length - tile, step), length - tile]
    cuts = [0, *((a + tile + b) // 2 // factor * factor for a, b in pairwise(starts)), length]
    return [(slice(s, s + tile), slice(a, b)) for s, (a, b) in zip(starts, pairwise(cuts), strict=True)]


def _ramp(span: slice, length: int, like: Tensor) -> Tensor:
    """Blending weights of a tile along one side: rising over a quarter of it from each edge inside the picture."""
    size = span.stop - span.start
    rise = (torch.arange(size, device=like.device, dtype=like.dtype) + 0.5) / (size / 4)
    ones = torch.ones_like(rise)
    start = ones if span.start == 0 else rise.clamp(max=1)
    stop = ones if span.stop == length else rise.flip(0).clamp(max=1)
    return start * stop
