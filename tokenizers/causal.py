"""Layers of the visual tokenizer: 2D convolutions on frames, causal mixing along time, one normalisation per frame.

Frames travel folded into the batch axis, ``[B·T, C, H, W]`` in channels-last memory, so spatial layers are ordinary 2D
layers and an image is a clip of one frame. Layers that look along time are `ClipLayer`s and also get a `Clip`. Time
factorised from space after (2+1)D convolutions (arXiv 1711.11248); causal, so that the first frame is coded alone and
a video can be cut anywhere (MAGVIT-v2, arXiv 2310.05737).
"""

from collections.abc import Iterable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from einops import rearrange, repeat
from torch import Tensor, nn

from plait.tokenizers.pixels import Cache, with_past

# Channels per attention head.
HEAD = 32


@dataclass
class Clip:
    """What a layer may need to know of the frames folded into the batch axis.

    Attributes:
        batch: number of clips.
        starts: whether these frames begin with their clips' first one.
        cache: the past of causal layers; None when the whole clip is here.
        z: in a decoder the quantized latents ``[B·T, d, h, w]`` at the frame rate that the layers have reached.
    """

    batch: int
    starts: bool = True
    cache: Cache | None = None
    z: Tensor | None = None


class ClipLayer(nn.Module):
    """A layer whose ``forward(x, clip)`` looks at more than single frames."""


def run(layers: Iterable[nn.Module], x: Tensor, clip: Clip) -> Tensor:
    """Apply layers in turn; ``[B·T, C, H, W]`` → the last layer's output."""
    for layer in layers:
        x = layer(x, clip) if isinstance(layer, ClipLayer) else layer(x)
    return x


def split_time(x: Tensor, clip: Clip) -> Tensor:
    """Folded frames ``[B·T, C, H, W]`` → ``[B, T, H, W, C]``; no copy in channels-last memory."""
    return rearrange(x, "(b t) c h w -> b t h w c", b=clip.batch)


def fold_time(x: Tensor) -> Tensor:
    """``[B, T, H, W, C]`` → folded frames ``[B·T, C, H, W]``."""
    return rearrange(x, "b t h w c -> (b t) c h w")


class FrameNorm(nn.GroupNorm):
    """Normalise each frame over all channels and positions (``[N, C, H, W]``): no frame sees another."""

    def __init__(self, channels: int) -> None:
        super().__init__(1, channels)


class SpatialNorm(ClipLayer):
    """`FrameNorm` whose scale and shift are maps made from the quantized latents (MoVQ, arXiv 2209.09002)."""

    def __init__(self, channels: int, latent: int) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(1, channels, affine=False)
        self.scale, self.shift = nn.Conv2d(latent, channels, 1), nn.Conv2d(latent, channels, 1)
        nn.init.zeros_(self.scale.weight)
        nn.init.ones_(self.scale.bias)  # type: ignore[arg-type]
        nn.init.zeros_(self.shift.weight)
        nn.init.zeros_(self.shift.bias)  # type: ignore[arg-type]

    def forward(self, x: Tensor, clip: Clip) -> Tensor:
        """``[B·T, C, H, W]`` → the same shape."""
        assert clip.z is not None
        # A 1×1 convolution commutes with nearest up-sampling, and is cheaper before it.
        scale, shift = (F.interpolate(conv(clip.z), size=x.shape[-2:]) for conv in (self.scale, self.shift))
        return self.norm(x) * scale + shift


class ResidualBlock(ClipLayer):
    """norm → SiLU → 3×3 → norm → SiLU → 3×3, added to the input; frame by frame.

    Args:
        channels: in and out.
        latent: latent channels that a `SpatialNorm` is steered by; 0 for `FrameNorm`.
    """

    def __init__(self, channels: int, latent: int = 0) -> None:
        super().__init__()
        self.norm1, self.norm2 = frame_norm(channels, latent), frame_norm(channels, latent)
        self.conv1, self.conv2 = (nn.Conv2d(channels, channels, 3, padding=1) for _ in range(2))

    def forward(self, x: Tensor, clip: Clip) -> Tensor:
        """``[B·T, C, H, W]`` → the same shape."""
        h = self.conv1(F.silu(run([self.norm1], x, clip)))
        return x + self.conv2(F.silu(run([self.norm2], h, clip)))


def frame_norm(channels: int, latent: int) -> nn.Module:
    """A `SpatialNorm` over ``latent`` channels, or a `FrameNorm` if that is 0."""
    return SpatialNorm(channels, latent) if latent else FrameNorm(channels)


class Attention(nn.Module):
    """Self-attention among the positions of one frame, added to the input; ``[N, C, H, W]`` → the same."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = FrameNorm(channels)
        self.qkv, self.out = nn.Conv2d(channels, 3 * channels, 1), nn.Conv2d(channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        """``[N, C, H, W]`` → the same shape."""
        qkv = rearrange(self.qkv(self.norm(x)), "n (three k d) h w -> three n k (h w) d", three=3, d=HEAD)
        mixed = F.scaled_dot_product_attention(*qkv)
        return x + self.out(rearrange(mixed, "n k (h w) d -> n (k d) h w", h=x.shape[-2]))


class TemporalBlock(ClipLayer):
    """norm → SiLU → causal convolution over 3 frames, added to the input.

    It starts as the identity, so an image tokenizer that is inflated to video begins as what it was.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = FrameNorm(channels)
        self.conv = nn.Linear(3 * channels, channels)
        nn.init.zeros_(self.conv.weight)
        nn.init.zeros_(self.conv.bias)

    def forward(self, x: Tensor, clip: Clip) -> Tensor:
        """``[B·T, C, H, W]`` → the same shape."""
        h = split_time(F.silu(self.norm(x)), clip)
        frames = h.shape[1]
        h = with_past(h, 2, self, clip.cache, dim=1)
        window = torch.cat([h[:, i : i + frames] for i in range(3)], -1)
        return x + fold_time(self.conv(window))


class TimeDown(ClipLayer):
    """Halve the frame rate: 1 + 2k frames → 1 + k. Pairs of frames are mixed; the first frame pairs with itself."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Linear(2 * channels, channels)
        with torch.no_grad():
            self.conv.weight.copy_(torch.eye(channels).repeat(1, 2) / 2)
            self.conv.bias.zero_()

    def forward(self, x: Tensor, clip: Clip) -> Tensor:
        """``[B·T, C, H, W]`` → ``[B·ceil(T/2), C, H, W]``."""
        h = split_time(x, clip)
        h = torch.cat([h[:, :1], h], 1) if clip.starts else h
        return fold_time(self.conv(rearrange(h, "b (t two) h w c -> b t h w (two c)", two=2)))


class TimeUp(ClipLayer):
    """Double the frame rate: 1 + k frames → 1 + 2k. Each becomes two; of the first frame's only the second is kept."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Linear(channels, 2 * channels)
        with torch.no_grad():
            self.conv.weight.copy_(torch.eye(channels).repeat(2, 1))
            self.conv.bias.zero_()

    def forward(self, x: Tensor, clip: Clip) -> Tensor:
        """``[B·T, C, H, W]`` → ``[B·(2T − 1), C, H, W]``, or ``[B·2T, C, H, W]`` of a chunk that does not start."""
        h = rearrange(self.conv(split_time(x, clip)), "b t h w (two c) -> b (t two) h w c", two=2)
        if clip.z is not None:
            clip.z = repeat_frames(clip.z, 2, clip)
        return fold_time(h[:, 1:] if clip.starts else h)


def repeat_frames(x: Tensor, times: int, clip: Clip) -> Tensor:
    """Show each frame ``times`` times, the clip's first one once: ``[B·T, ...]`` → ``[B·(1 + times·(T − 1)), ...]``."""
    h = repeat(x, "(b t) c h w -> b (t times) c h w", b=clip.batch, times=times)
    return (h[:, times - 1 :] if clip.starts else h).flatten(0, 1)


def average_frames(x: Tensor, count: int, clip: Clip) -> Tensor:
    """The mean of each ``count`` frames, the first one by itself: ``[B·(1 + count·k), ...]`` → ``[B·(1 + k), ...]``."""
    h = rearrange(x, "(b t) c h w -> b t c h w", b=clip.batch)
    h = torch.cat([h[:, :1].expand(-1, count - 1, -1, -1, -1), h], 1) if clip.starts else h
    return h.unflatten(1, (-1, count)).mean(2).flatten(0, 1)


class HaarUnshuffle(nn.Module):
    """Pixel-unshuffle, then a Haar wavelet packet over each colour's patch: the first channel is the patch's mean.

    After Cosmos (arXiv 2501.03575). Orthonormal; ``[N, 3, H, W]`` → ``[N, 3·p², H/p, W/p]``; p a power of two.
    """

    def __init__(self, patch: int) -> None:
        super().__init__()
        self.patch = patch
        self.register_buffer("_basis", haar_basis(patch), persistent=False)

    _basis: Tensor

    def forward(self, x: Tensor) -> Tensor:
        """Pixels → wavelet coefficients."""
        patches = rearrange(F.pixel_unshuffle(x, self.patch), "n (c k) h w -> n c k h w", c=3)
        return torch.einsum("jk,nckhw->ncjhw", self._basis, patches).flatten(1, 2)


class HaarShuffle(HaarUnshuffle):
    """The inverse of `HaarUnshuffle`."""

    def forward(self, x: Tensor) -> Tensor:
        """Wavelet coefficients → pixels."""
        bands = rearrange(x, "n (c j) h w -> n c j h w", c=3)
        return F.pixel_shuffle(torch.einsum("jk,ncjhw->nckhw", self._basis, bands).flatten(1, 2), self.patch)


def haar_basis(patch: int) -> Tensor:
    """The orthonormal basis ``[p², p²]`` of a p × p patch: Kronecker products of the 2-point Haar transform."""
    # Never on the meta device: no state dict would fill it.
    step = torch.tensor([[1.0, 1.0], [1.0, -1.0]], device="cpu") / 2**0.5
    basis = torch.ones(1, 1, device="cpu")
    while basis.shape[0] < patch:
        basis = torch.kron(basis, step)
    return torch.kron(basis, basis)
