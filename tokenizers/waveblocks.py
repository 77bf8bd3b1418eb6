"""Blocks of waveform codecs, for signals ``[B, C, T]`` whole or in chunks: see `plait.tokenizers.streaming`."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from plait.tokenizers.streaming import Conv1d, Frames, Residual, Stream, Streamed, delayed, overlap_add

# Magnitudes below this are silence: -100 dB of a full-scale sample.
FLOOR = 1e-5


class Snake(nn.Module):
    """``x + sin²(αx) / α``, one α per channel (Ziyin et al., 2020, arXiv 2006.08195; in audio: BigVGAN, DAC).

    The state dict has one tensor, ``alpha`` ``[1, C, 1]``.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.alpha = nn.Parameter(torch.ones(1, channels, 1))

    def forward(self, x: Tensor) -> Tensor:
        """``[B, C, T]`` → the same shape."""
        return x + (self.alpha * x).sin().square() / (self.alpha + 1e-9)


class ELU(nn.Module):
    """``x`` where it is above 0, ``eˣ − 1`` below."""

    def forward(self, x: Tensor) -> Tensor:
        """Any shape → the same."""
        if x.requires_grad or x.device.type != "cpu":
            return F.elu(x)
        # The same to the last bit of 1, in half of the time: for small x, PyTorch's is exact to the last bit of x.
        below = x.clamp(max=0).exp_().sub_(1)
        return torch.maximum(x, below, out=below)


def dilated_unit(channels: int, dilation: int, causal: bool, groups: int = 1) -> Residual:
    """SEANet's residual unit as DAC has it: a dilated convolution of seven taps, and one over channels."""
    return Residual(
        Snake(channels),
        Conv1d(channels, channels, 7, dilation=dilation, groups=groups, causal=causal),
        Snake(channels),
        Conv1d(channels, channels, 1),
    )


class ConvNeXtBlock(nn.Module, Streamed):
    """A convolution of seven taps per channel, then two layers at each step (Liu et al., 2022, arXiv 2201.03545; in
    audio: Vocos, arXiv 2306.00814).

    Args:
        channels: of the signal.
        causal: whether it looks ahead by three steps.
    """

    def __init__(self, channels: int, causal: bool) -> None:
        super().__init__()
        self.depthwise = Conv1d(channels, channels, 7, groups=channels, causal=causal)
        self.norm = nn.LayerNorm(channels)
        self.expand = nn.Linear(channels, 3 * channels)
        self.contract = nn.Linear(3 * channels, channels)
        self.scale = nn.Parameter(torch.full((channels,), 0.1))

    def forward(self, x: Tensor, stream: Stream) -> Tensor:
        """``[B, C, T]`` → ``[B, C, T']``."""
        y = self.depthwise(x, stream).transpose(1, 2)
        y = self.contract(F.gelu(self.expand(self.norm(y)), approximate="tanh"))
        y = (self.scale * y).transpose(1, 2)
        return delayed(self, x, y.shape[-1], stream) + y


class ChannelNorm(nn.LayerNorm):
    """Layer norm over the channels of each step."""

    def forward(self, x: Tensor) -> Tensor:
        """``[B, C, T]`` → the same shape."""
        return super().forward(x.transpose(1, 2)).transpose(1, 2)


class Analysis(nn.Module, Streamed):
    """Samples → log magnitudes of short-time spectra, under a Hann window.

    Args:
        hop: samples from one spectrum to the next.
        window: samples per spectrum.
        causal: see `Frames`.
    """

    def __init__(self, hop: int, window: int, causal: bool) -> None:
        super().__init__()
        self.frames = Frames(hop, window, causal)
        self.bins = window // 2 + 1
        self.register_buffer("hann", torch.hann_window(window, device="cpu"), persistent=False)

    hann: Tensor

    def forward(self, x: Tensor, stream: Stream) -> Tensor:
        """``[B, C, N]`` → ``[B, C · (window // 2 + 1), T]``, about -3 to 3."""
        frames = self.frames(x, stream) * self.hann
        if not frames.shape[-2]:
            return x.new_zeros(len(x), x.shape[1] * self.bins, 0)
        magnitudes = torch.fft.rfft(frames).abs().clamp(min=FLOOR).log()
        return (magnitudes / 4).transpose(2, 3).flatten(1, 2)


class Synthesis(nn.Module, Streamed):
    """Channels → magnitudes and phases of short-time spectra → samples, by overlap-add (Vocos' head).

    The number of samples is the number of steps times the hop exactly. A Hann window both ways; their squares add up
    to a constant, as the window is a multiple of twice the hop.

    Args:
        channels: of the input.
        out: channels of samples.
        hop: samples per step.
        window: samples per spectrum.
        causal: the samples of a step are complete with the step; else the spectrum is centred on them.
    """

    def __init__(self, channels: int, out: int, hop: int, window: int, causal: bool) -> None:
        super().__init__()
        self.hop, self.window, self.out = hop, window, out
        self.head = Conv1d(channels, out * (window + 2), 1)
        total = window - hop
        self.trim = (0, total) if causal else (total // 2, total - total // 2)
        self.register_buffer("hann", torch.hann_window(window, device="cpu"), persistent=False)

    hann: Tensor

    def forward(self, x: Tensor, stream: Stream) -> Tensor:
        """``[B, C, T]`` → ``[B, out, T · hop]`` over the whole signal."""
        steps = x.shape[-1]
        y = self.head(x, stream).float().unflatten(1, (self.out, 2, -1))  # autocast: no spectra of bfloat16
        magnitude, phase = y[:, :, 0].clamp(max=6).exp(), y[:, :, 1]
        spectra = torch.complex(magnitude * phase.cos(), magnitude * phase.sin()).transpose(2, 3)
        if steps:
            frames = torch.fft.irfft(spectra, self.window) * (self.hann * (self.hop / self.hann.square().sum()))
            samples = _fold(frames, self.hop)
        else:
            samples = x.new_zeros(len(x), self.out, 0)
        return overlap_add(self, samples, steps * self.hop, self.trim, stream)


def _fold(frames: Tensor, hop: int) -> Tensor:
    """Overlap-add ``[B, C, T, W]`` → ``[B, C, (T − 1) · hop + W]``."""
    parts = frames.unflatten(-1, (-1, hop))
    count, several = parts.shape[2:4]
    total = parts.new_zeros(*parts.shape[:2], count + several - 1, hop)
    for i in range(several):
        total[:, :, i : i + count] += parts[:, :, :, i]
    return total.flatten(2)
