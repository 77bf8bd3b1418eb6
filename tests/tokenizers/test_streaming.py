from collections.abc import Sequence

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from plait.tokenizers.streaming import Chain, Conv1d, ConvTranspose1d, Frames, Residual, Stream, whole
from plait.tokenizers.waveblocks import Analysis, ConvNeXtBlock, Snake, Synthesis, dilated_unit

LAYERS = {
    "causal": lambda: Conv1d(2, 3, 7),
    "looks ahead": lambda: Conv1d(2, 3, 7, dilation=3, causal=False),
    "stride": lambda: Conv1d(2, 3, 8, stride=4, causal=False),
    "ceil": lambda: Conv1d(2, 3, 8, stride=4, ceil=True),
    "upsampling": lambda: ConvTranspose1d(2, 3, 8, 4),
    "upsampling, centred": lambda: ConvTranspose1d(2, 3, 10, 5, causal=False),
    "unit": lambda: dilated_unit(2, 9, causal=False),
    "nested": lambda: Residual(Conv1d(2, 2, 5, causal=False), Residual(Conv1d(2, 2, 3, causal=False)), nn.ELU()),
    "convnext": lambda: ConvNeXtBlock(2, causal=False),
    "spectra": lambda: Analysis(4, 16, causal=True),
    "spectra, centred": lambda: Analysis(4, 16, causal=False),
    "synthesis": lambda: Synthesis(2, 1, 4, 16, causal=True),
    "synthesis, centred": lambda: Synthesis(2, 2, 4, 16, causal=False),
    "chain": lambda: Chain(Conv1d(2, 4, 4, 2), Snake(4), ConvTranspose1d(4, 2, 4, 2, causal=False), nn.Tanh()),
}


def streamed(layer: nn.Module, x: Tensor, sizes: Sequence[int]) -> list[Tensor]:
    stream, parts = Stream(), list(x.split(list(sizes), -1))
    results = []
    for i, part in enumerate(parts):
        stream.last = i == len(parts) - 1
        results.append(layer(part, stream))
    return results


@pytest.mark.parametrize("name", LAYERS)
@settings(max_examples=25, deadline=None)
@given(sizes=st.lists(st.integers(0, 23), min_size=1, max_size=8).filter(sum))
def test_chunks_of_any_size_give_what_one_pass_gives(name: str, sizes: list[int]) -> None:
    torch.manual_seed(0)
    layer = LAYERS[name]()
    x = torch.randn(2, 2, sum(sizes))
    together = torch.cat(streamed(layer, x, sizes), -1)
    torch.testing.assert_close(together, layer(x, whole()), atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("name", ["looks ahead", "upsampling, centred", "nested", "spectra", "synthesis, centred"])
def test_memory_does_not_grow(name: str) -> None:
    layer, stream, sizes = LAYERS[name](), Stream(), []
    with torch.no_grad():
        for _ in range(30):
            layer(torch.randn(1, 2, 40), stream)
            kept = [v[0] if isinstance(v, tuple) else v for v in stream._memory.values()]
            sizes.append(sum(tensor.untyped_storage().nbytes() for tensor in kept))
    assert sizes[2:] == sizes[2:3] * 28


def test_causal_layers_give_their_outputs_at_once() -> None:
    stream = Stream()
    for layer in (Conv1d(2, 3, 7), Conv1d(3, 3, 8, 4), ConvTranspose1d(3, 3, 8, 4)):
        assert layer(torch.randn(1, layer.in_channels, 8), stream).shape[-1] in (8, 2, 32)


@pytest.mark.parametrize(("kernel", "stride", "dilation"), [(7, 1, 1), (3, 1, 9), (8, 4, 1), (10, 5, 1)])
def test_convolutions_are_torchs(kernel: int, stride: int, dilation: int) -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 3, 60)
    total = (kernel - 1) * dilation + 1 - stride
    for causal, pads in ((True, (total, 0)), (False, (total // 2, total - total // 2))):
        layer = Conv1d(3, 4, kernel, stride, dilation, causal=causal)
        expected = F.conv1d(F.pad(x, pads), layer.weight, layer.bias, stride, dilation=dilation)
        torch.testing.assert_close(layer(x, whole()), expected)


@pytest.mark.parametrize(("kernel", "stride"), [(8, 4), (10, 5), (5, 2)])
def test_transposed_convolutions_are_torchs(kernel: int, stride: int) -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 3, 60)
    for causal, first in ((True, 0), (False, (kernel - stride) // 2)):
        layer = ConvTranspose1d(3, 4, kernel, stride, causal=causal)
        expected = F.conv_transpose1d(x, layer.weight, layer.bias, stride)
        torch.testing.assert_close(layer(x, whole()), expected[..., first : first + 60 * stride])


def test_spectra_are_torchs() -> None:
    x = torch.randn(2, 1, 64)
    layer = Analysis(4, 16, causal=False)
    spectra = torch.stft(F.pad(x[:, 0], (6, 6)), 16, 4, window=torch.hann_window(16), center=False, return_complex=True)
    torch.testing.assert_close(layer(x, whole()), spectra.abs().clamp(min=1e-5).log() / 4)
    frames = Frames(4, 16, causal=True)(torch.arange(1.0, 6)[None, None], whole())
    assert frames[0, 0, 0].tolist() == [0.0] * 12 + [1, 2, 3, 4]
    assert frames.shape == (1, 1, 2, 16)  # ceil(5 / 4)


def test_synthesis_inverts_spectra() -> None:
    # With the magnitudes and phases of a signal, the samples are the signal away from its ends.
    torch.manual_seed(0)
    x = torch.randn(1, 64)
    window = torch.hann_window(16)
    spectra = torch.fft.rfft(F.pad(x, (6, 6)).unfold(-1, 16, 4) * window)
    layer = Synthesis(18, 1, 4, 16, causal=False)
    nn.init.eye_(layer.head.weight[..., 0].detach())
    with torch.no_grad():
        layer.head.weight.copy_(torch.eye(18)[..., None])
        layer.head.bias.zero_()  # type: ignore[union-attr]
    inputs = torch.cat([spectra.abs().clamp(min=1e-12).log(), spectra.angle()], -1).mT
    samples = layer(inputs, whole())
    assert samples.shape == (1, 1, 64)
    torch.testing.assert_close(samples[0, 0, 12:-12], x[0, 12:-12], atol=1e-5, rtol=1e-4)
