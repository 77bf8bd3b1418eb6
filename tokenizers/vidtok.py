"""VidTok's causal tokenizer with finite scalar quantization: video in space and time → codes → video.

Paper: Tang et al., "VidTok: A Versatile and Open-Source Video Tokenizer", 2024 (arXiv 2412.13061). Released weights of
both versions load and give VidTok's own codes.

Space and time are convolved in turn, and no layer of the encoder sees a later frame. The first frame is repeated in
front until it fills a group of `VidTokConfig.temporal_factor` frames, so 1 + f·k frames become 1 + k latent frames and
an image is a video of one frame. The two versions have the same weights' names and shapes and differ in arithmetic:

- 1.0: before the first frame there are zeros, and frames are doubled by repeating them. Everything is causal.
- 1.1: before the first frame there is the first frame again, and frames are doubled by linear interpolation. That looks
  one latent frame ahead, so a stream's pixels come one latent frame late (see `VidTokTokenizer.decode_stream`).
"""

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from plait.errors import PlaitError
from plait.tokenizers.foreign import Layout, Tensors
from plait.tokenizers.pixels import CHUNK, Cache, PixelTokenizer, with_past
from plait.tokenizers.quantizer import FiniteScalarQuantizer

# What stands before the first frame, by version; modes of `with_past`.
_PADDING = {"1.0": "zeros", "1.1": "replicate"}


@dataclass(frozen=True)
class VidTokConfig:
    """Architecture of a `VidTokTokenizer`; the defaults are those of ``vidtok_fsq_causal_488_32768``.

    Attributes:
        width: channels at full resolution.
        multipliers: channels of each level in units of ``width``; every level after the first halves height and width.
        blocks: pairs of residual blocks (space, time) per level of the encoder; the decoder has one more.
        levels: values per latent channel of the quantizer; released weights have 8 each.
        temporal_down: levels, counted from full resolution, after which the encoder halves the number of frames.
        temporal_up: levels, counted likewise, after which the decoder doubles it.
        version: "1.0" or "1.1", VidTok's own; see the module.
    """

    width: int = 128
    multipliers: tuple[int, ...] = (1, 2, 4, 4)
    blocks: int = 2
    levels: tuple[int, ...] = (8, 8, 8, 8, 8)
    temporal_down: tuple[int, ...] = (1, 2)
    temporal_up: tuple[int, ...] = (1, 2)
    version: str = "1.1"

    def __post_init__(self) -> None:
        for name in ("width", "blocks"):
            if type(number := getattr(self, name)) is not int or number < 1:
                raise PlaitError(f"vidtok: {name} is {number!r}, must be a whole number of at least 1")
        for name, least in (("multipliers", 1), ("levels", 3)):
            numbers = getattr(self, name)
            if not isinstance(numbers, Sequence) or any(type(n) is not int or n < least for n in numbers or [None]):
                raise PlaitError(f"vidtok: {name} is {numbers!r}, must list whole numbers of at least {least}")
        last = len(self.multipliers) - 1
        # The encoder shrinks after every level but the last, the decoder grows after every level but the first.
        for name, there in (("temporal_down", range(last)), ("temporal_up", range(1, last + 1))):
            numbers = getattr(self, name)
            if not isinstance(numbers, Sequence) or any(type(n) is not int for n in numbers):
                raise PlaitError(f"vidtok: {name} is {numbers!r}, must list whole numbers")
            if len(set(numbers)) < len(numbers) or not set(numbers) <= set(there):
                raise PlaitError(f"vidtok: {name} is {numbers!r}, must list different ones of {list(there)}")
        if len(self.temporal_down) != len(self.temporal_up):
            raise PlaitError(
                f"vidtok: temporal_down is {self.temporal_down!r} and temporal_up is {self.temporal_up!r}, "
                "must be equally many"
            )
        if self.temporal_factor > CHUNK // 2:
            raise PlaitError(f"vidtok: temporal_down is {self.temporal_down!r}, at most 3 levels may halve the frames")
        if self.version not in _PADDING:
            raise PlaitError(f"vidtok: version is {self.version!r}, must be one of {', '.join(_PADDING)}")

    @property
    def factor(self) -> int:
        """Pixels per code along each side."""
        return int(2 ** (len(self.multipliers) - 1))

    @property
    def temporal_factor(self) -> int:
        """Frames per code."""
        return int(2 ** len(self.temporal_down))


class CausalConv(nn.Conv3d):
    """Convolution over ``time`` past frames and ``space``×``space`` positions, which keeps the size.

    Args:
        channels: of the input.
        out_channels: of the output.
        time: frames of the kernel, this one and those before.
        space: rows and columns of the kernel, odd.
        padding: what stands before the first frame, a mode of `with_past`.
    """

    def __init__(self, channels: int, out_channels: int, time: int, space: int, padding: str) -> None:
        super().__init__(channels, out_channels, (time, space, space), padding=(0, space // 2, space // 2))
        self.before = padding

    def forward(self, x: Tensor, cache: Cache | None = None) -> Tensor:
        """``[B, C, T, H, W]`` → ``[B, C_out, T, H, W]``."""
        looks_back = self.kernel_size[0] - 1
        return super().forward(with_past(x, looks_back, self, cache, self.before) if looks_back else x)


class ChannelNorm(nn.LayerNorm):
    """Normalise the channels of each position: neither frames nor positions see each other."""

    def __init__(self, channels: int) -> None:
        super().__init__(channels, eps=1e-6)

    def forward(self, x: Tensor) -> Tensor:
        """``[B, C, T, H, W]`` → the same shape."""
        return super().forward(x.movedim(1, -1)).movedim(-1, 1)


class ResidualBlock(nn.Module):
    """norm → SiLU → convolution, twice, added to the input (through a 1×1×1 convolution if the width changes)."""

    def __init__(self, channels: int, out_channels: int, time: int, space: int, padding: str) -> None:
        super().__init__()
        self.norm1, self.norm2 = ChannelNorm(channels), ChannelNorm(out_channels)
        self.conv1 = CausalConv(channels, out_channels, time, space, padding)
        self.conv2 = CausalConv(out_channels, out_channels, time, space, padding)
        self.shortcut = nn.Conv3d(channels, out_channels, 1) if channels != out_channels else nn.Identity()

    def forward(self, x: Tensor, cache: Cache | None = None) -> Tensor:
        """``[B, C, T, H, W]`` → ``[B, C_out, T, H, W]``."""
        h = self.conv1(F.silu(self.norm1(x)), cache)
        return self.shortcut(x) + self.conv2(F.silu(self.norm2(h)), cache)


class FrameAttention(nn.Module):
    """Single-head self-attention over the positions of each frame, added to the input."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = ChannelNorm(channels)
        self.q, self.k, self.v, self.proj_out = (nn.Conv3d(channels, channels, 1) for _ in range(4))

    def forward(self, x: Tensor, cache: Cache | None = None) -> Tensor:
        """``[B, C, T, H, W]`` → the same shape."""
        h = self.norm(x)
        q, k, v = (rearrange(layer(h), "b c t h w -> b t (h w) c") for layer in (self.q, self.k, self.v))
        h = F.scaled_dot_product_attention(q, k, v)
        return x + self.proj_out(rearrange(h, "b t (h w) c -> b c t h w", h=x.shape[-2]))


class Stage(nn.Module):
    """One level's residual blocks, over space and over time in turn."""

    def __init__(self, channels: int, out_channels: int, blocks: int, padding: str) -> None:
        super().__init__()
        widths = [channels, *[out_channels] * blocks]
        self.spatial = nn.ModuleList(ResidualBlock(a, out_channels, 1, 3, padding) for a in widths[:-1])
        self.temporal = nn.ModuleList(ResidualBlock(a, out_channels, 3, 1, padding) for a in widths[1:])

    def forward(self, x: Tensor, cache: Cache | None = None) -> Tensor:
        """``[B, C, T, H, W]`` → ``[B, C_out, T, H, W]``."""
        for spatial, temporal in zip(self.spatial, self.temporal, strict=True):
            x = temporal(spatial(x), cache)
        return x


class Middle(nn.Module):
    """The coarsest level: two residual blocks over space and time at once, attention between them."""

    def __init__(self, channels: int, padding: str) -> None:
        super().__init__()
        self.block_1 = ResidualBlock(channels, channels, 3, 3, padding)
        self.attn_1 = FrameAttention(channels)
        self.block_2 = ResidualBlock(channels, channels, 3, 3, padding)

    def forward(self, x: Tensor, cache: Cache | None = None) -> Tensor:
        """``[B, C, T, H, W]`` → the same shape."""
        return self.block_2(self.attn_1(self.block_1(x, cache)), cache)


class Down(nn.Module):
    """Half the height and width, and half the frames if ``temporal``: a learned mix of averaging and convolution."""

    def __init__(self, channels: int, temporal: bool, padding: str) -> None:
        super().__init__()
        self.before = padding
        self.space = nn.Conv3d(channels, channels, (1, 3, 3), stride=(1, 2, 2))
        self.time = nn.Conv3d(channels, channels, 3, stride=(2, 1, 1), padding=(0, 1, 1)) if temporal else None
        self.mix = nn.Parameter(torch.full((1,), 2.0)) if temporal else None

    def forward(self, x: Tensor, cache: Cache | None = None) -> Tensor:
        """``[B, C, T, H, W]``, even sizes → ``[B, C, T or T/2, H/2, W/2]``."""
        x = self.space(F.pad(x, (0, 1, 0, 1)))
        if self.time is None or self.mix is None:
            return x
        x = with_past(x, 1, self, cache, self.before)
        mix = self.mix.sigmoid()
        return mix * F.avg_pool3d(x, (3, 1, 1), (2, 1, 1)) + (1 - mix) * self.time(x)


class Up(nn.Module):
    """Twice the height and width, and twice the frames if ``temporal``, mixed with their convolution.

    Args:
        channels: of input and output.
        temporal: whether frames are doubled.
        version: of `VidTokConfig`.
        group: frames that one latent frame has become before this layer.
    """

    def __init__(self, channels: int, temporal: bool, version: str, group: int) -> None:
        super().__init__()
        self.linear = version == "1.1"
        self.group = group
        self.space = nn.Conv3d(channels, channels, (1, 3, 3), padding=(0, 1, 1))
        self.time = CausalConv(channels, channels, 3, 3, _PADDING[version]) if temporal else None
        self.mix = nn.Parameter(torch.full((1,), 2.0)) if temporal else None

    def forward(self, x: Tensor, cache: Cache | None = None, ends: bool = True) -> Tensor:
        """``[B, C, T, H, W]`` → ``[B, C, T', 2H, 2W]``; T' is T or, over all chunks of a video, 2·T.

        Args:
            x: a chunk's frames.
            cache: of the chunks before.
            ends: whether the video ends here. If not, the last frame's second half waits for the next chunk.
        """
        x = self.space(F.interpolate(x, scale_factor=(1.0, 2.0, 2.0)))
        if self.time is None or self.mix is None:
            return x
        x = self._interpolated(x, cache, ends) if self.linear else x.repeat_interleave(2, 2)
        mix = self.mix.sigmoid()
        return mix * x + (1 - mix) * self.time(x, cache)

    def _interpolated(self, x: Tensor, cache: Cache | None, ends: bool) -> Tensor:
        """Double the frames linearly: those of the first latent frame by themselves, then all others."""
        head = x[:, :, :0]
        past = None if cache is None else cache.get(self)
        if past is None:
            head, x = _doubled(x[:, :, : self.group], True, True), x[:, :, self.group :]
            past = x[:, :, :0]
        frames = torch.cat([past, x], 2)
        if cache is not None:
            cache[self] = frames[:, :, -1:].clone()
        return torch.cat([head, _doubled(frames, not past.shape[2], ends)], 2)


def _doubled(x: Tensor, starts: bool, ends: bool) -> Tensor:
    """Frames a quarter and three quarters of the way between each two of ``[B, C, T, H, W]``.

    The first frame also comes as it is if the video starts with it, and the last one if it ends: that is linear
    interpolation to twice the length.
    """
    left, right = x[:, :, :-1], x[:, :, 1:]
    between = torch.stack([left.lerp(right, 0.25), left.lerp(right, 0.75)], 3).flatten(2, 3)
    return torch.cat([x[:, :, :1]] * starts + [between] + [x[:, :, -1:]] * ends, 2)


class Encoder(nn.Module):
    """Pixels ``[B, 3, T, H, W]``, whole groups of frames → latents ``[B, d, T/f, H/factor, W/factor]``."""

    def __init__(self, config: VidTokConfig) -> None:
        super().__init__()
        padding = _PADDING[config.version]
        widths = [config.width * m for m in (1, *config.multipliers)]
        self.conv_in = CausalConv(3, widths[0], 3, 3, padding)
        self.stages = nn.ModuleList(Stage(a, b, config.blocks, padding) for a, b in pairwise(widths))
        self.downs = nn.ModuleList(
            Down(width, i in config.temporal_down, padding) for i, width in enumerate(widths[1:-1])
        )
        self.mid = Middle(widths[-1], padding)
        self.norm_out = ChannelNorm(widths[-1])
        self.conv_out = CausalConv(widths[-1], len(config.levels), 3, 3, padding)

    def forward(self, x: Tensor, cache: Cache | None = None) -> Tensor:
        """Pixels → latents."""
        x = self.conv_in(x, cache)
        for i, stage in enumerate(self.stages):
            x = stage(x, cache)
            if i < len(self.downs):
                x = self.downs[i](x, cache)
        return self.conv_out(F.silu(self.norm_out(self.mid(x, cache))), cache)


class Decoder(nn.Module):
    """Latents ``[B, d, t, h, w]`` → pixels ``[B, 3, f·t, h·factor, w·factor]``, f frames for the first latent too."""

    def __init__(self, config: VidTokConfig) -> None:
        super().__init__()
        padding = _PADDING[config.version]
        # By level, counted from full resolution as in the encoder; run through backwards.
        widths = [config.width * m for m in (*config.multipliers, config.multipliers[-1])]
        self.conv_in = CausalConv(len(config.levels), widths[-1], 3, 3, padding)
        self.mid = Middle(widths[-1], padding)
        self.stages = nn.ModuleList(Stage(a, b, config.blocks + 1, padding) for b, a in pairwise(widths))
        self.ups = nn.ModuleList(
            Up(widths[i], i in config.temporal_up, config.version, 2 ** sum(j > i for j in config.temporal_up))
            for i in range(1, len(config.multipliers))
        )
        self.norm_out = ChannelNorm(widths[0])
        self.conv_out = CausalConv(widths[0], 3, 3, 3, padding)

    def forward(self, z: Tensor, cache: Cache | None = None, ends: bool = True) -> Tensor:
        """Latents → pixels; ``ends`` as in `Up`."""
        x = self.mid(self.conv_in(z, cache), cache)
        for i in reversed(range(len(self.stages))):
            x = self.stages[i](x, cache)
            if i > 0:
                x = self.ups[i - 1](x, cache, ends)
        return self.conv_out(F.silu(self.norm_out(x)), cache)


class VidTokTokenizer(PixelTokenizer):
    """Images and videos to the codes of VidTok's causal FSQ models and back.

    Args:
        config: the architecture.
    """

    architecture: ClassVar[str] = "vidtok"
    config_class: ClassVar[type] = VidTokConfig
    decoder_settings: ClassVar[tuple[str, ...]] = ("temporal_up",)

    def __init__(self, config: VidTokConfig) -> None:
        super().__init__()
        self.config: VidTokConfig = config
        self.encoder = Encoder(config)
        self.decoder = Decoder(config)
        # VidTok numbers codes as we do: first channel fastest, the lowest value first.
        self.quantizer = FiniteScalarQuantizer(config.levels)

    @property
    def factor(self) -> int:
        """Pixels per code along each side."""
        return self.config.factor

    @property
    def temporal_factor(self) -> int:
        """Frames per code."""
        return self.config.temporal_factor

    @property
    def lookahead(self) -> int:
        """Latent frames after its own that a frame's pixels depend on."""
        return int(self.config.version == "1.1" and self.temporal_factor > 1)

    def to_latents(self, pixels: Tensor, cache: Cache | None = None) -> Tensor:
        """As `PixelTokenizer.to_latents`."""
        if not cache:  # the video begins
            first = pixels[:, :, :1].expand(-1, -1, self.temporal_factor - 1, -1, -1)
            pixels = torch.cat([first, pixels], 2)
        return self.encoder(pixels, cache)

    def from_latents(self, z: Tensor, cache: Cache | None = None, frames: int | None = None) -> Tensor:
        """As `PixelTokenizer.from_latents`, but version 1.1's chunks overlap by one latent frame.

        With a cache, the last of several latent frames is only announced: pixels come for those before it, as far as
        they are settled, and it must come again as the first of the next chunk. A chunk of one frame ends the video.
        """
        begins = not cache
        ends = not self.lookahead or cache is None or z.shape[2] == 1
        pixels: Tensor = self.decoder(z if ends else z[:, :, :-1], cache, ends)
        return pixels[:, :, self.temporal_factor - 1 :] if begins else pixels

    def decode_stream(
        self, chunks: Iterable[Tensor], size: tuple[int, ...] | None = None, tile: int | None = None
    ) -> Iterator[Tensor]:
        """As `PixelTokenizer.decode_stream`; version 1.1's pixels come one latent frame late."""
        if self.lookahead:
            chunks = self._overlapping(chunks)
        yield from super().decode_stream(chunks, size, tile)

    def _overlapping(self, chunks: Iterable[Tensor]) -> Iterator[Tensor]:
        """Codes in chunks of any length → in those that `from_latents` takes, the last one of a single frame."""
        held: Tensor | None = None
        for chunk in chunks:
            self._check_grid(chunk, video=True)
            held = chunk if held is None else torch.cat([held, chunk], 1)
            while (count := min(held.shape[1], CHUNK // self.temporal_factor)) > 1:
                yield held[:, :count]
                held = held[:, count - 1 :]
        if held is not None:
            yield held


# Released weights. VidTok's own files and diffusers' `AutoencoderVidTok` name tensors alike; the former also hold the
# discriminator and the perceptual network of training.

_ENCODER_WIDTH = "encoder.conv_in.conv.weight"
_UNUSED = ("loss.", "regularization.", "regularizer.", "model_ema.")
_RENAMES = [
    (re.compile(pattern), replacement)
    for pattern, replacement in (
        (r"\.(?:down|up)\.(\d+)\.block\.", r".stages.\1.spatial."),
        (r"\.(?:down|up)_temporal\.(\d+)\.block\.", r".stages.\1.temporal."),
        (r"\.(down|up)\.(\d+)\.(?:down|up)sample\.conv\.", r".\1s.\2.space."),
        (r"\.(down|up)_temporal\.(\d+)\.(?:down|up)sample\.conv\.conv\.", r".\1s.\2.time."),
        (r"\.(down|up)_temporal\.(\d+)\.(?:down|up)sample\.mix_factor$", r".\1s.\2.mix"),
        (r"\.nin_shortcut\.", ".shortcut."),
        (r"\.(?:conv|norm)\.(weight|bias)$", r".\1"),  # what is left wraps another layer
    )
]


def _rename(tensors: Tensors, config: VidTokConfig) -> Tensors:
    renamed = {}
    for name, tensor in tensors.items():
        if name.startswith(_UNUSED):
            continue
        for pattern, replacement in _RENAMES:
            name = pattern.sub(replacement, name)
        # The first level has no upsampling.
        name = re.sub(r"(?<=^decoder\.ups\.)\d+", lambda match: str(int(match[0]) - 1), name)
        # Convolutions over space or over time alone become those over both.
        if tensor.ndim == 4:
            tensor = tensor.unsqueeze(2)
        elif tensor.ndim == 3:
            tensor = tensor[..., None, None]
        renamed[name] = tensor
    return renamed


def _configure(tensors: Mapping[str, Tensor], config: Mapping[str, Any]) -> VidTokConfig:
    if _ENCODER_WIDTH not in tensors and "encoder.conv_in.weight" in tensors:
        raise PlaitError("is a non-causal VidTok; only causal ones are supported, with `causal` in their names")
    latent = tensors["encoder.conv_out.conv.weight"].shape[0]
    if latent != tensors["decoder.conv_in.conv.weight"].shape[1]:
        raise PlaitError("is a continuous VidTok; only those with codes are supported, with `fsq` in their names")
    width = max(1, tensors[_ENCODER_WIDTH].shape[0])

    def count(pattern: str) -> int:
        return next(i for i in range(len(tensors) + 1) if pattern.format(i) not in tensors)

    def levels_of(pattern: str) -> tuple[int, ...]:
        return tuple(i for i in range(levels) if pattern.format(i) in tensors)

    levels = count("encoder.down.{}.block.0.conv1.weight")
    return VidTokConfig(
        width=width,
        multipliers=tuple(tensors[f"encoder.down.{i}.block.0.conv1.weight"].shape[0] // width for i in range(levels)),
        blocks=count("encoder.down.0.block.{}.conv1.weight"),
        levels=(8,) * latent,
        temporal_down=levels_of("encoder.down_temporal.{}.downsample.mix_factor"),
        temporal_up=levels_of("decoder.up_temporal.{}.upsample.mix_factor"),
        version=_version(config),
    )


def _version(config: Mapping[str, Any]) -> str:
    """The version, which tensors do not tell: said by config.json, or by the released file's name."""
    if "version" in config:
        return str(config["version"])
    if config.get("_class_name") == "AutoencoderVidTok":
        return "1.1"
    name = str(config.get("_name_or_path", ""))
    if name.startswith("vidtok_fsq_causal_"):
        return "1.1" if name.endswith("_v1_1") else "1.0"
    raise PlaitError(
        'may be VidTok 1.0 or 1.1, which differ only in arithmetic; write {"version": "1.0"} or {"version": "1.1"} '
        "into a config.json beside it, or give it back its released name"
    )


LAYOUTS = (
    Layout(
        name="VidTok",
        tokenizer="plait.tokenizers.vidtok:VidTokTokenizer",
        recognise=lambda tensors, config: any(name.startswith("encoder.down_temporal.") for name in tensors),
        configure=_configure,
        rename=_rename,
    ),
)
