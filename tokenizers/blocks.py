"""Blocks of two-dimensional VQGANs: residual block, attention, resampling and the decoder's conditioned norm.

Every block takes ``[N, C, H, W]`` float and its weights bear the names that taming-transformers gave them, which nearly
all released image tokenizers still use. Blocks that normalise also take the quantized latents ``z``: a `SpatialNorm` is
conditioned on them, a `GroupNorm` ignores them.

Papers: Esser et al., "Taming Transformers for High-Resolution Image Synthesis", 2021 (arXiv 2012.09841);
Zheng et al., "MoVQ: Modulating Quantized Vectors for High-Fidelity Image Generation", 2022 (arXiv 2209.09002).
"""

from collections.abc import Callable
from itertools import pairwise

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

# All released networks have this many groups, so that widths are its multiples.
GROUPS = 32


def swish(x: Tensor) -> Tensor:
    """SiLU, in the memory of ``x`` where no gradient needs it: large allocations cost more than the function."""
    return F.silu(x, inplace=not x.requires_grad)


def lay_channels_last(module: nn.Module, *_: object) -> None:
    """Lay out the weights of 2D convolutions with the channels last, now, and after each loading as a hook.

    Pictures lie so too, as convolutions are faster on them; weights that lie otherwise are rearranged by every pass.
    """
    for parameter in module.parameters():
        if parameter.ndim == 4:
            parameter.data = parameter.data.contiguous(memory_format=torch.channels_last)


def by_frame(network: Callable[..., Tensor], *videos: Tensor, at_once: int = 1) -> Tensor:
    """Apply a network of pictures ``[N, C, H, W]`` to the frames of videos ``[B, C, T, H, W]``.

    Args:
        network: takes as many pictures as there are videos.
        videos: of equal B and T.
        at_once: frames per pass, at least one whatever is given.

    Returns:
        ``[B, C', T, H', W']``.
    """
    frames = [rearrange(video, "b c t h w -> (b t) c h w") for video in videos]
    if torch.compiler.is_exporting():  # an exported model would have as many parts as its example
        pictures = network(*frames)
    else:
        parts = zip(*(part.split(max(1, at_once)) for part in frames), strict=True)
        pictures = torch.cat([network(*part) for part in parts])
    return rearrange(pictures, "(b t) c h w -> b c t h w", b=videos[0].shape[0])


def build_norm(channels: int, latent: int | None) -> "GroupNorm | SpatialNorm":
    """The norm of a block: conditioned on ``latent`` channels of quantized latents, or plain when that is None."""
    return GroupNorm(channels) if latent is None else SpatialNorm(channels, latent)


class GroupNorm(nn.GroupNorm):
    """Group normalisation that may be called like a `SpatialNorm`."""

    def __init__(self, channels: int) -> None:
        super().__init__(GROUPS, channels, eps=1e-6)

    def forward(self, x: Tensor, z: Tensor | None = None) -> Tensor:
        """``[N, C, H, W]`` → the same shape."""
        # nn.functional's refuses one value per group, as a narrow network has of a picture of one cell.
        return torch.group_norm(x, self.num_groups, self.weight, self.bias, self.eps)


class SpatialNorm(nn.Module):
    """Group normalisation, then scaled and shifted at each position by linear maps of the quantized latents there.

    Args:
        channels: of what is normalised.
        latent: channels of the quantized latents.
    """

    def __init__(self, channels: int, latent: int) -> None:
        super().__init__()
        self.norm_layer = GroupNorm(channels)
        self.conv_y = nn.Conv2d(latent, channels, 1)
        self.conv_b = nn.Conv2d(latent, channels, 1)

    def forward(self, x: Tensor, z: Tensor | None) -> Tensor:
        """``[N, C, H, W]`` and quantized latents ``[N, latent, h, w]`` → ``[N, C, H, W]``; h divides H and w divides W.

        The maps are pointwise, so they are taken at the latents' size and repeated, not the latents themselves.
        """
        assert z is not None, "this network's norms need the quantized latents"
        h, w = z.shape[-2:]
        scale, shift = (conv(z)[:, :, :, None, :, None] for conv in (self.conv_y, self.conv_b))
        x = self.norm_layer(x)
        # In place, as a view of which each cell of the latents' grid is two axes.
        x.unflatten(3, (w, -1)).unflatten(2, (h, -1)).mul_(scale).add_(shift)
        return x


class ResnetBlock(nn.Module):
    """norm → SiLU → 3×3 → norm → SiLU → 3×3, added to the input (by way of a 1×1 convolution if the width changes).

    Args:
        channels: of the input.
        out_channels: of the output.
        latent: channels of the quantized latents that condition the norms; None for plain norms.
    """

    def __init__(self, channels: int, out_channels: int, latent: int | None = None) -> None:
        super().__init__()
        self.norm1 = build_norm(channels, latent)
        self.conv1 = nn.Conv2d(channels, out_channels, 3, padding=1)
        self.norm2 = build_norm(out_channels, latent)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        self.nin_shortcut = nn.Conv2d(channels, out_channels, 1) if channels != out_channels else nn.Identity()

    def forward(self, x: Tensor, z: Tensor | None = None) -> Tensor:
        """``[N, C, H, W]`` → ``[N, C_out, H, W]``."""
        h = self.conv1(swish(self.norm1(x, z)))
        h = self.conv2(swish(self.norm2(h, z)))
        return h.add_(self.nin_shortcut(x))


class AttentionBlock(nn.Module):
    """Single-head self-attention over all positions of a picture, added to the input.

    Args:
        channels: of input and output.
        latent: as in `ResnetBlock`.
    """

    def __init__(self, channels: int, latent: int | None = None) -> None:
        super().__init__()
        self.norm = build_norm(channels, latent)
        self.q = nn.Conv2d(channels, channels, 1)
        self.k = nn.Conv2d(channels, channels, 1)
        self.v = nn.Conv2d(channels, channels, 1)
        self.proj_out = nn.Conv2d(channels, channels, 1)

    def forward(self, x: Tensor, z: Tensor | None = None) -> Tensor:
        """``[N, C, H, W]`` → the same shape."""
        h = self.norm(x, z)
        q, k, v = (rearrange(layer(h), "n c h w -> n 1 (h w) c") for layer in (self.q, self.k, self.v))
        h = F.scaled_dot_product_attention(q, k, v)
        h = rearrange(h, "n 1 (h w) c -> n c h w", h=x.shape[-2])
        return self.proj_out(h).add_(x)


class Downsample(nn.Module):
    """3×3 convolution of stride 2, padded by one zero at the bottom and right only; halves even sizes."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        """``[N, C, H, W]`` → ``[N, C, H // 2, W // 2]``."""
        return self.conv(F.pad(x, (0, 1, 0, 1)))


class Upsample(nn.Module):
    """Every pixel becomes 2×2, then a 3×3 convolution.

    Both are one linear map: as a transposed convolution with a 4×4 kernel it needs 4 products per output instead of 9,
    and no enlarged copy.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """``[N, C, H, W]`` → ``[N, C, 2H, 2W]``."""
        return F.conv_transpose2d(x, enlarging_kernel(self.conv.weight), self.conv.bias, stride=2, padding=1)


def enlarging_kernel(weight: Tensor) -> Tensor:
    """The 3×3 kernel that follows an enlargement by 2 → the 4×4 kernel of the one transposed convolution they are.

    Along one axis, tap j of the new kernel is what an input pixel gives to an output pixel through its two copies.

    Args:
        weight: ``[C_out, C_in, 3, 3]``.

    Returns:
        ``[C_in, C_out, 4, 4]``.
    """
    taps = weight.new_tensor([[0, 0, 1], [0, 1, 1], [1, 1, 0], [1, 0, 0]])
    return (weight.flatten(2) @ torch.kron(taps, taps).T).unflatten(2, (4, 4)).transpose(0, 1)


class Level(nn.Module):
    """Residual blocks at one resolution, each followed by attention on some levels; then the way to the next level.

    Args:
        channels: of the input.
        out_channels: of the output.
        blocks: residual blocks.
        attention: whether attention follows each block.
        latent: as in `ResnetBlock`.
        downsample: halve the resolution at the end.
        upsample: double it at the end.
    """

    def __init__(
        self,
        channels: int,
        out_channels: int,
        blocks: int,
        attention: bool,
        latent: int | None = None,
        downsample: bool = False,
        upsample: bool = False,
    ) -> None:
        super().__init__()
        widths = [channels] + [out_channels] * blocks
        self.block = nn.ModuleList(ResnetBlock(a, b, latent) for a, b in pairwise(widths))
        self.attn = nn.ModuleList(AttentionBlock(out_channels, latent) for _ in range(blocks) if attention)
        self.downsample = Downsample(out_channels) if downsample else nn.Identity()
        self.upsample = Upsample(out_channels) if upsample else nn.Identity()

    def forward(self, x: Tensor, z: Tensor | None = None) -> Tensor:
        """``[N, C, H, W]`` → ``[N, C_out, H', W']``."""
        for i, block in enumerate(self.block):
            x = block(x, z)
            if self.attn:
                x = self.attn[i](x, z)
        return self.upsample(self.downsample(x))


class Middle(nn.Module):
    """Block, attention, block at the lowest resolution; ``[N, C, H, W]`` → the same shape."""

    def __init__(self, channels: int, latent: int | None = None) -> None:
        super().__init__()
        self.block_1 = ResnetBlock(channels, channels, latent)
        self.attn_1 = AttentionBlock(channels, latent)
        self.block_2 = ResnetBlock(channels, channels, latent)

    def forward(self, x: Tensor, z: Tensor | None = None) -> Tensor:
        """``[N, C, H, W]`` → the same shape."""
        return self.block_2(self.attn_1(self.block_1(x, z), z), z)
