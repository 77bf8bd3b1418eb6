from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from plait.errors import PlaitError
from plait.train.discriminator import (
    DiscriminatorConfig,
    PatchDiscriminator,
    PatchDiscriminator3d,
    build_discriminator,
)

SMALL = DiscriminatorConfig(width=8, layers=2)
KINDS = ["patch2d", "patch3d"]
NORMS = ["group", "spectral"]


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def made(**settings: object) -> PatchDiscriminator:
    torch.manual_seed(0)
    return build_discriminator(replace(SMALL, **settings))  # type: ignore[arg-type]


def test_image_discriminator_is_pix2pix() -> None:
    config = DiscriminatorConfig(width=16, layers=3)
    torch.manual_seed(0)
    network = build_discriminator(config)
    weights = list(network.parameters())
    pixels = noise(2, 3, 64, 56)
    x = F.leaky_relu(F.conv2d(pixels, weights[0], weights[1], stride=2, padding=1), 0.2)
    # (weights, biases, gains and offsets of the norm), channels, stride
    for start, channels, stride in ((2, 32, 2), (6, 64, 2), (10, 128, 1)):
        kernel, bias, gain, offset = weights[start : start + 4]
        assert kernel.shape == (channels, channels // 2, 4, 4)
        x = F.conv2d(x, kernel, bias, stride=stride, padding=1)
        x = F.leaky_relu(F.group_norm(x, channels // 8, gain, offset), 0.2)
    expected = F.conv2d(x, weights[14], weights[15], padding=1)
    assert len(weights) == 16
    torch.testing.assert_close(network(pixels), expected)
    assert expected.shape == (2, 1, 6, 5)


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize(("layers", "patch"), [(1, 16), (2, 34), (3, 70)])
def test_a_logit_sees_its_patch(layers: int, patch: int, norm: str) -> None:
    network = made(layers=layers, norm=norm).double()
    for module in network.modules():  # GroupNorm sees the whole picture
        if isinstance(module, nn.GroupNorm):
            module.forward = lambda x: x  # type: ignore[method-assign]
    side = 4 * patch // 2**layers * 2**layers
    pixels = noise(1, 3, side, side).double().requires_grad_()
    logits = network(pixels)
    middle = logits.shape[-1] // 2
    logits[0, 0, middle, middle].backward()
    assert pixels.grad is not None
    seen = pixels.grad[0].abs().sum(0).nonzero()
    assert (seen.amax(0) - seen.amin(0) + 1).tolist() == [patch, patch]


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("kind", KINDS)
def test_every_weight_learns(kind: str, norm: str) -> None:
    network = made(kind=kind, norm=norm)
    network(noise(2, 3, 3, 16, 16)).square().sum().backward()
    assert [name for name, p in network.named_parameters() if p.grad is None or not p.grad.any()] == []


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("kind", KINDS)
def test_items_of_a_batch_do_not_see_each_other(kind: str, norm: str) -> None:
    network = made(kind=kind, norm=norm).eval()
    clips = noise(3, 3, 5, 16, 24)
    alone = torch.cat([network(clips[i : i + 1]) for i in range(3)])
    torch.testing.assert_close(network(clips), alone)


@settings(deadline=None, max_examples=15)
@given(frames=st.integers(1, 9), height=st.integers(12, 40), width=st.integers(12, 40))
def test_clips_of_any_size(frames: int, height: int, width: int) -> None:
    clip = noise(2, 3, frames, height, width)
    with torch.no_grad():
        judged, framewise = made(kind="patch3d")(clip), made()(clip)
    h, w = height // 4 - 2, width // 4 - 2
    assert judged.shape == (2, 1, (frames + 1) // 2, h, w)
    assert judged.isfinite().all()
    assert framewise.shape == (2 * frames, 1, h, w)


def test_a_clip_is_its_frames_in_2d_and_a_picture_is_a_clip_in_3d() -> None:
    flat, deep = made(), made(kind="patch3d")
    clip = noise(2, 3, 4, 16, 16)
    frames = torch.stack([flat(clip[:, :, t]) for t in range(4)], 1)
    torch.testing.assert_close(flat(clip), frames.flatten(0, 1))
    torch.testing.assert_close(deep(clip[:, :, 0]), deep(clip[:, :, :1]))


def test_3d_tells_flicker_from_stillness() -> None:
    # The same frames in another order: the mean 2D logit cannot differ, the 3D one does.
    flat, deep = made(), made(kind="patch3d")
    clip = noise(1, 3, 6, 16, 16)
    other = clip[:, :, [0, 3, 1, 5, 2, 4]]
    torch.testing.assert_close(flat(clip).mean(), flat(other).mean())
    assert (deep(clip).mean() - deep(other).mean()).abs() > 1e-4


def test_spectral_norm_bounds_every_convolution() -> None:
    network = made(norm="spectral")
    for _ in range(30):
        network(noise(1, 3, 16, 16))
    network.eval()
    kernels = [m.weight for m in network.modules() if isinstance(m, nn.Conv2d)]
    assert len(kernels) == 4
    for kernel in kernels:
        assert torch.linalg.matrix_norm(kernel.detach().flatten(1), 2).item() == pytest.approx(1, abs=0.02)


@pytest.mark.parametrize("kind", KINDS)
def test_learns_to_tell_smooth_from_noisy(kind: str) -> None:
    torch.manual_seed(0)
    network = made(kind=kind)
    optimizer = torch.optim.Adam(network.parameters(), 2e-3)
    for step in range(20):
        noisy = noise(2, 3, 2, 16, 16, seed=step)
        smooth = F.avg_pool3d(noisy, (1, 5, 5), 1, (0, 2, 2)) * 3
        loss = F.softplus(-network(smooth)).mean() + F.softplus(network(noisy)).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    noisy = noise(4, 3, 2, 16, 16, seed=1000)
    smooth = F.avg_pool3d(noisy, (1, 5, 5), 1, (0, 2, 2)) * 3
    assert network(smooth).min() > 0 > network(noisy).max()


def test_default_sizes_suit_small_clips() -> None:
    with torch.no_grad():
        assert build_discriminator(DiscriminatorConfig())(noise(1, 3, 64, 64)).shape == (1, 1, 6, 6)
        deep = build_discriminator(DiscriminatorConfig(kind="patch3d", width=16))
        assert deep(noise(1, 3, 5, 64, 64)).shape == (1, 1, 2, 6, 6)
    assert isinstance(deep, PatchDiscriminator3d)


@pytest.mark.parametrize("shape", [(1, 3, 11, 30), (1, 4, 16, 16), (3, 16, 16), (1, 3, 2, 30, 11)])
def test_wrong_pictures_are_named(shape: tuple[int, ...]) -> None:
    for kind in KINDS:
        with pytest.raises(PlaitError, match=r"pixels: shape is \(.*of 2 layers takes .* ≥ 12; give it fewer layers"):
            made(kind=kind)(noise(*shape))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"kind": "patch4d"}, "kind is 'patch4d', must be 'patch2d' or 'patch3d'"),
        ({"norm": "batch"}, "norm is 'batch', must be 'group' or 'spectral'"),
        ({"width": 12}, "width is 12, must be a multiple of 8"),
        ({"width": 0}, "width is 0"),
        ({"layers": 0}, "layers is 0, must be a whole number from 1 to 6"),
        ({"layers": 2.0}, "layers is 2.0"),
    ],
)
def test_wrong_settings_are_named(settings: dict[str, object], message: str) -> None:
    with pytest.raises(PlaitError, match=f"^discriminator: {message}"):
        replace(SMALL, **settings)  # type: ignore[arg-type]
