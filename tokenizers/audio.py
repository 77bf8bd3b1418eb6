"""plait's own audio tokenizer: a waveform codec for speech, sounds and music, one stream of codes or several.

Encoder, quantizer and decoder are chosen independently. Both halves of the network are levels of blocks with strides
between them; at its finest level a half works either on samples (``hop`` 1: dilated residual units, as in SoundStream,
EnCodec and DAC) or on short-time spectra (ConvNeXt blocks; as decoder: Vocos). So the ``fsq`` family is a causal
encoder, finite scalar quantization and a spectral decoder: one code per step, no codebook to collapse. The ``rvq``
family is samples all the way with residual codebooks.
"""

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import torch
from einops import rearrange
from torch import Tensor, nn

from plait.errors import PlaitError
from plait.tokenizers.base import config_from_json
from plait.tokenizers.quantizer import Quantized, QuantizerConfig, build_quantizer
from plait.tokenizers.streaming import Chain, Conv1d, ConvTranspose1d, Stream, whole
from plait.tokenizers.waveblocks import Analysis, ChannelNorm, ConvNeXtBlock, Snake, Synthesis, dilated_unit
from plait.tokenizers.waves import WaveTokenizer

# Beyond any network there is, so that a damaged file asks for no terabytes.
MOST_SAMPLES = 2**20
MOST_LEVELS = 16


@dataclass(frozen=True)
class HalfConfig:
    """The encoder or the decoder of an `AudioTokenizer`. Levels are counted from the finest, 0.

    Attributes:
        hop: samples per step of level 0. 1 works on the samples; more, on short-time spectra.
        window: samples per spectrum, a multiple of twice the hop; 0 with hop 1.
        widths: channels of each level.
        strides: steps of a level per step of the next; one fewer than levels.
        blocks: blocks of each level.
        causal: nothing looks ahead beyond its own step. A decoder that looks ahead sounds better, and gives the end of
            a chunk only with the next.
    """

    hop: int = 1
    window: int = 0
    widths: tuple[int, ...] = (32, 64, 128, 256, 256)
    strides: tuple[int, ...] = (2, 4, 5, 8)
    blocks: tuple[int, ...] = (0, 3, 3, 3, 3)
    causal: bool = True

    def __post_init__(self) -> None:
        for name, least in (("hop", 1), ("window", 0)):
            if type(number := getattr(self, name)) is not int or not least <= number <= MOST_SAMPLES:
                raise PlaitError(
                    f"audio tokenizer: {name} is {number!r}, must be a whole number from {least} to {MOST_SAMPLES}"
                )
        for name, least, most in (("widths", 1, 2**14), ("strides", 2, 2**10), ("blocks", 0, 2**6)):
            numbers = getattr(self, name)
            if (
                not isinstance(numbers, list | tuple)
                or len(numbers) > MOST_LEVELS
                or any(type(n) is not int or not least <= n <= most for n in numbers)
            ):
                raise PlaitError(
                    f"audio tokenizer: {name} is {numbers!r}, must list up to {MOST_LEVELS} numbers, {least} to {most}"
                )
            object.__setattr__(self, name, tuple(numbers))
        if type(self.causal) is not bool:
            raise PlaitError(f"audio tokenizer: causal is {self.causal!r}, must be true or false")
        levels = len(self.widths)
        if not levels or len(self.strides) != levels - 1 or len(self.blocks) != levels:
            raise PlaitError(
                f"audio tokenizer: {levels} widths, {len(self.strides)} strides and {len(self.blocks)} blocks; for n "
                "widths there must be n − 1 strides and n blocks"
            )
        if self.window % (2 * self.hop) or (self.window == 0) != (self.hop == 1):
            raise PlaitError(
                f"audio tokenizer: window is {self.window} and hop {self.hop}; the window must be a multiple of twice "
                "the hop, or 0 with hop 1"
            )

    @property
    def samples_per_code(self) -> int:
        """Samples per step of the coarsest level."""
        return self.hop * math.prod(self.strides)


@dataclass(frozen=True)
class AudioConfig:
    """Architecture of an `AudioTokenizer`.

    Attributes:
        sample_rate: Hz.
        channels: 1, or 2 for stereo, which the network sees as its middle (L + R) / 2 and side (L − R) / 2.
        encoder: samples → latents.
        decoder: latents → samples; as many samples per code as the encoder.
        quantizer: between encoder and decoder.
    """

    sample_rate: int = 16000
    channels: int = 1
    encoder: HalfConfig = field(default_factory=HalfConfig)
    decoder: HalfConfig = field(default_factory=lambda: HalfConfig(160, 640, (256, 384), (2,), (4, 4), causal=False))
    quantizer: QuantizerConfig = field(default_factory=lambda: QuantizerConfig(levels=(8, 8, 8, 8)))

    def __post_init__(self) -> None:
        if type(self.sample_rate) is not int or not 1000 <= self.sample_rate <= 384_000:
            raise PlaitError(f"audio tokenizer: sample_rate is {self.sample_rate!r}, must be 1000 to 384000 Hz")
        if type(self.channels) is not int or self.channels not in (1, 2):
            raise PlaitError(f"audio tokenizer: channels is {self.channels!r}, must be 1 or 2")
        for name, kind in (("encoder", HalfConfig), ("decoder", HalfConfig), ("quantizer", QuantizerConfig)):
            if not isinstance(getattr(self, name), kind):
                raise PlaitError(f"audio tokenizer: {name} is {getattr(self, name)!r}, must be a {kind.__name__}")
        hops = self.encoder.samples_per_code, self.decoder.samples_per_code
        if hops[0] != hops[1]:
            raise PlaitError(
                f"audio tokenizer: the encoder has {hops[0]} samples per code, the decoder {hops[1]}; "
                "hop × strides must be the same"
            )


def _encoder(config: HalfConfig, channels: int, latent: int) -> Chain:
    """Samples ``[B, C, N]`` → latents ``[B, latent, T]``."""
    widths, causal = config.widths, config.causal
    layers: list[nn.Module] = []
    if config.hop > 1:
        stem = Analysis(config.hop, config.window, causal)
        layers += [stem, Conv1d(channels * stem.bins, widths[0], 1)]
    else:
        layers.append(Conv1d(channels, widths[0], 7, causal=causal))
    for i, width in enumerate(widths):
        if i:
            stride = config.strides[i - 1]
            layers.append(_activation(config, widths[i - 1]))
            layers.append(Conv1d(widths[i - 1], width, 2 * stride, stride, causal=causal))
        layers += _blocks(config, i)
    return Chain(*layers, _activation(config, widths[-1]), Conv1d(widths[-1], latent, 1))


def _decoder(config: HalfConfig, channels: int, latent: int) -> Chain:
    """Latents ``[B, latent, T]`` → samples ``[B, C, T · samples_per_code]``."""
    widths, causal = config.widths, config.causal
    layers: list[nn.Module] = [Conv1d(latent, widths[-1], 7, causal=causal)]
    for i in reversed(range(len(widths))):
        if i < len(widths) - 1:
            stride = config.strides[i]
            layers.append(_activation(config, widths[i + 1]))
            layers.append(ConvTranspose1d(widths[i + 1], widths[i], 2 * stride, stride, causal=causal))
        layers += _blocks(config, i)
    layers.append(_activation(config, widths[0]))
    if config.hop > 1:
        layers.append(Synthesis(widths[0], channels, config.hop, config.window, causal))
    else:
        layers.append(Conv1d(widths[0], channels, 7, causal=causal))
    return Chain(*layers)


def _blocks(config: HalfConfig, level: int) -> list[nn.Module]:
    width, count = config.widths[level], config.blocks[level]
    if config.hop > 1:
        return [ConvNeXtBlock(width, config.causal) for _ in range(count)]
    return [dilated_unit(width, 3 ** (i % 3), config.causal) for i in range(count)]


def _activation(config: HalfConfig, width: int) -> nn.Module:
    """What comes before a convolution between levels: ConvNeXt has a norm there, SEANet a non-linearity."""
    return ChannelNorm(width) if config.hop > 1 else Snake(width)


class AudioTokenizer(WaveTokenizer):
    """Sound ``[B, C, N]``, float32 in ``[-1, 1]``, to codes and back."""

    architecture: ClassVar[str] = "plait"
    config_class: ClassVar[type] = AudioConfig
    decoder_settings: ClassVar[tuple[str, ...]] = ("decoder",)
    config: AudioConfig

    def __init__(self, config: AudioConfig | None = None) -> None:
        super().__init__()
        self.config = config or AudioConfig()
        self.quantizer = build_quantizer(self.config.quantizer)
        channels, latent = self.config.channels, self.quantizer.dim
        self.encoder = _encoder(self.config.encoder, channels, latent)
        self.decoder = _decoder(self.config.decoder, channels, latent)

    @property
    def sample_rate(self) -> int:
        """Hz."""
        return self.config.sample_rate

    @property
    def channels(self) -> int:
        """1, or 2 for stereo."""
        return self.config.channels

    @property
    def factor(self) -> int:
        """Samples per code."""
        return self.config.encoder.samples_per_code

    @property
    def last_layer(self) -> Tensor:
        """The weight that turns the decoder's last channels into samples, where losses are compared."""
        last = self.decoder[-1]
        weight = last.head.weight if isinstance(last, Synthesis) else last.weight
        assert isinstance(weight, Tensor)
        return weight

    def to_latents(self, samples: Tensor, stream: Stream) -> Tensor:
        """Samples ``[B, C, n]``, whole multiples of `factor`, → latents ``[B, d, t]`` before quantization."""
        latents: Tensor = self.encoder(_middle_and_side(samples), stream)
        return latents

    def from_latents(self, z: Tensor, stream: Stream) -> Tensor:
        """Quantized latents ``[B, d, t]`` → samples ``[B, C, n]``, not clamped."""
        # Left is middle plus side: the same sums without the halves.
        return 2 * _middle_and_side(self.decoder(z, stream)) if self.channels == 2 else self.decoder(z, stream)

    def forward(self, samples: Tensor) -> tuple[Tensor, Quantized]:
        """The training pass.

        Args:
            samples: ``[B, C, N]``, float32.

        Returns:
            the reconstruction in the same shape, not clamped, and what the quantizer says.
        """
        z = self.to_latents(self._pad(samples), whole())
        quantized = self.quantizer(rearrange(z, "b d t -> b t d"))
        decoded = self.from_latents(rearrange(quantized.latents, "b t d -> b d t"), whole())
        return decoded[..., : samples.shape[-1]], quantized

    @classmethod
    def config_from(cls, content: dict[str, Any], where: Path) -> AudioConfig:
        """The configuration from the rest of a config.json."""
        for name, kind in (("encoder", HalfConfig), ("decoder", HalfConfig), ("quantizer", QuantizerConfig)):
            if not isinstance(part := content.get(name), dict):
                raise PlaitError(f"{where}: {name} is {part!r}, expected an object")
            content[name] = config_from_json(kind, part, where)
        return config_from_json(AudioConfig, content, where)


def _middle_and_side(x: Tensor) -> Tensor:
    """Left and right ``[B, 2, N]`` → half their sum and half their difference; one channel stays as it is."""
    if x.shape[1] == 1:
        return x
    left, right = x.unbind(1)
    return torch.stack([left + right, left - right], 1) / 2
