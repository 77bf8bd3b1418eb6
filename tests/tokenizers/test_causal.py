import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from plait.tokenizers.causal import (
    Attention,
    Clip,
    HaarShuffle,
    HaarUnshuffle,
    ResidualBlock,
    SpatialNorm,
    TemporalBlock,
    TimeDown,
    TimeUp,
    average_frames,
    haar_basis,
    repeat_frames,
    run,
)
from plait.tokenizers.pixels import Cache


def drawn(layer: nn.Module, seed: int = 0) -> nn.Module:
    """A layer with no weight at its quiet start, so that a mistake shows."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in layer.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator) * 0.3
    return layer.eval().requires_grad_(False)


def frames(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def unfolded(x: Tensor, batch: int) -> Tensor:
    return x.unflatten(0, (batch, -1))


# Haar


def two_point_haar(x: Tensor) -> Tensor:
    """One level of the textbook transform on 2 × 2 patches ``[N, H, W]`` → ``[N, 4, H/2, W/2]``: LL, LH, HL, HH."""
    a, b, c, d = x[:, ::2, ::2], x[:, ::2, 1::2], x[:, 1::2, ::2], x[:, 1::2, 1::2]
    return torch.stack([a + b + c + d, a - b + c - d, a + b - c - d, a - b - c + d], 1) / 2


@pytest.mark.parametrize("patch", [1, 2, 4, 8])
def test_haar_is_orthonormal_and_inverted(patch: int) -> None:
    basis = haar_basis(patch)
    torch.testing.assert_close(basis @ basis.T, torch.eye(patch**2), atol=1e-6, rtol=0)
    x = frames(2, 3, 16, 24)
    bands = HaarUnshuffle(patch)(x)
    assert bands.shape == (2, 3 * patch**2, 16 // patch, 24 // patch)
    torch.testing.assert_close(bands.square().sum(), x.square().sum())
    torch.testing.assert_close(HaarShuffle(patch)(bands), x, atol=1e-5, rtol=0)
    # The first band of each colour is its local mean.
    torch.testing.assert_close(bands[:, :: patch**2], F.avg_pool2d(x, patch) * patch, atol=1e-5, rtol=0)


def test_haar_of_two_by_two_is_the_textbook_transform() -> None:
    x = frames(1, 3, 6, 8)
    expected = torch.cat([two_point_haar(x[:, c]) for c in range(3)], 1)
    torch.testing.assert_close(HaarUnshuffle(2)(x), expected, atol=1e-6, rtol=0)


def test_haar_of_four_by_four_is_the_transform_twice() -> None:
    x = frames(1, 3, 8, 8)
    once = two_point_haar(x[:, 0])
    twice = torch.cat([two_point_haar(once[:, band]) for band in range(4)], 1)
    # As a packet, in another order of bands.
    mine = HaarUnshuffle(4)(x)[:, :16]
    torch.testing.assert_close(mine.square().sum((2, 3)).sort().values, twice.square().sum((2, 3)).sort().values)


# Along time


def test_temporal_block_is_the_plain_causal_convolution() -> None:
    block = drawn(TemporalBlock(4))
    x = frames(2, 5, 4, 3, 2)  # [B, T, C, H, W]
    h = F.silu(F.group_norm(x.flatten(0, 1), 1, block.norm.weight, block.norm.bias)).unflatten(0, (2, 5))
    h = F.pad(h.movedim(1, 2), (0, 0, 0, 0, 2, 0), mode="replicate")
    weight = block.conv.weight.unflatten(1, (3, 4)).movedim(1, 2)[..., None, None]
    expected = x + F.conv3d(h, weight, block.conv.bias).movedim(1, 2)
    torch.testing.assert_close(unfolded(block(x.flatten(0, 1), Clip(2)), 2), expected, atol=1e-5, rtol=0)


def test_time_layers_by_hand() -> None:
    x = torch.arange(5.0).reshape(5, 1, 1, 1).expand(5, 3, 1, 1).clone()
    assert TimeDown(3)(x, Clip(1))[:, 0].flatten().tolist() == [0, 1.5, 3.5]
    assert average_frames(x, 4, Clip(1))[:, 0].flatten().tolist() == [0, 2.5]
    assert average_frames(x[1:], 2, Clip(1, starts=False))[:, 0].flatten().tolist() == [1.5, 3.5]
    assert average_frames(x, 1, Clip(1))[:, 0].flatten().tolist() == [0, 1, 2, 3, 4]
    clip = Clip(1, z=x[:2])
    assert TimeUp(3)(x[:2], clip)[:, 0].flatten().tolist() == [0, 1, 1]
    assert clip.z is not None
    assert clip.z[:, 0].flatten().tolist() == [0, 1, 1]
    assert repeat_frames(x[:3], 4, Clip(1))[:, 0].flatten().tolist() == [0, 1, 1, 1, 1, 2, 2, 2, 2]
    assert repeat_frames(x[1:3], 2, Clip(1, starts=False))[:, 0].flatten().tolist() == [1, 1, 2, 2]


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("plan", [[1] * 9, [1, 8], [1, 2, 4, 2], [3, 2, 4], [5, 4]])
def test_chunks_give_what_one_pass_gives(plan: list[int], batch: int) -> None:
    down = [drawn(TemporalBlock(4)), drawn(TimeDown(4), 1), drawn(TemporalBlock(4), 2)]
    up = [drawn(TimeUp(4), 3), drawn(TemporalBlock(4), 4)]
    video = frames(batch, 9, 4, 3, 2)

    def passed(layers: list[nn.Module], chunks: list[Tensor], cache: Cache | None) -> Tensor:
        out = []
        for i, chunk in enumerate(chunks):
            clip = Clip(batch, starts=i == 0, cache=cache)
            out.append(unfolded(run(layers, chunk.flatten(0, 1), clip), batch))
        return torch.cat(out, 1)

    latents = passed(down, [video], None)
    assert latents.shape[1] == 5
    groups = [1 if i == 0 else 2 for i in range(5)]
    torch.testing.assert_close(passed(down, list(video.split(groups, 1)), {}), latents, atol=1e-5, rtol=0)
    whole = passed(up, [video], None)
    assert whole.shape[1] == 17
    torch.testing.assert_close(passed(up, list(video.split(plan, 1)), {}), whole, atol=1e-5, rtol=0)


# In space


def test_spatial_norm_is_steered_by_the_latents_at_each_position() -> None:
    norm = drawn(SpatialNorm(6, 2))
    x, z = frames(3, 6, 4, 8), frames(3, 2, 2, 2, seed=1)
    spread = z.repeat_interleave(2, 2).repeat_interleave(4, 3)
    scale, shift = (
        torch.einsum("oi,nihw->nohw", conv.weight[..., 0, 0], spread) + conv.bias[:, None, None]
        for conv in (norm.scale, norm.shift)
    )
    mean, variance = x.mean((1, 2, 3), keepdim=True), x.var((1, 2, 3), keepdim=True, correction=0)
    expected = (x - mean) / (variance + 1e-5).sqrt() * scale + shift
    torch.testing.assert_close(norm(x, Clip(3, z=z)), expected, atol=1e-5, rtol=0)


def test_attention_is_the_plain_formula() -> None:
    layer = drawn(Attention(64))
    x = frames(2, 64, 3, 5)
    normed = F.group_norm(x, 1, layer.norm.weight, layer.norm.bias).flatten(2)
    q, k, v = (torch.einsum("oi,nis->nos", w[..., 0, 0], normed) + b[:, None] for w, b in (
        (layer.qkv.weight[i : i + 64], layer.qkv.bias[i : i + 64]) for i in (0, 64, 128)
    ))  # fmt: skip
    heads = []
    for i in (0, 32):
        scores = torch.einsum("ncs,nct->nst", q[:, i : i + 32], k[:, i : i + 32]) / math.sqrt(32)
        heads.append(torch.einsum("nst,nct->ncs", scores.softmax(-1), v[:, i : i + 32]))
    mixed = torch.einsum("oi,nis->nos", layer.out.weight[..., 0, 0], torch.cat(heads, 1)) + layer.out.bias[:, None]
    torch.testing.assert_close(layer(x), x + mixed.unflatten(2, (3, 5)), atol=1e-4, rtol=0)


@pytest.mark.parametrize("latent", [0, 2])
def test_no_frame_sees_another_in_space(latent: int) -> None:
    layers = [drawn(ResidualBlock(32, latent)), drawn(Attention(32))]
    x, z = frames(4, 32, 4, 4), frames(4, 2, 2, 2, seed=1)
    before = run(layers, x, Clip(1, z=z))
    x[2], z[2] = 1e3, -1e3
    after = run(layers, x, Clip(1, z=z))
    assert torch.equal(before[[0, 1, 3]], after[[0, 1, 3]])
    assert not torch.equal(before[2], after[2])
