"""The vision tokenizer of Emu3: stills and video with 8×8×4 pixels per code, its released weights included.

A two-dimensional VQGAN with MoVQ's conditioned decoder looks at each frame by itself; between it and the codes, causal
convolutions over the few latent channels join every group of frames to one latent frame, and part them again. A still
is a group of equal frames. Each latent vector becomes the number of the nearest vector of a codebook.

Paper: Wang et al., "Emu3: Next-Token Prediction is All You Need", 2024 (arXiv 2409.18869).
"""

import re
from bisect import bisect_right
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from plait.errors import PlaitError
from plait.tokenizers import vqgan
from plait.tokenizers.blocks import by_frame, swish
from plait.tokenizers.foreign import Layout, Tensors
from plait.tokenizers.pixels import Cache, PixelTokenizer, with_past
from plait.tokenizers.quantizer import build_quantizer
from plait.tokenizers.vqgan import VQGANConfig

# Frames that a causal convolution looks back, whatever its kernel.
PAST = 2

# Frames go through the two-dimensional networks in groups of up to this many pixels: a large one by itself, so that
# what is computed of it stays in a CPU's cache, small ones together.
PIXELS_AT_ONCE = 2**16


@dataclass(frozen=True)
class Emu3Config:
    """Architecture of an `Emu3Tokenizer`; the defaults are those of the released weights.

    Attributes:
        codebook_size: the number of codes.
        dim: channels of the latents and of the codebook's vectors.
        width: channels at full resolution.
        multipliers: channels of each level in widths; every level after the first halves the resolution.
        blocks: residual blocks per level of the encoder and per temporal stack; a level of the decoder has one more.
        attention_levels: the levels (0 is full size) with attention after every block.
        temporal_factor: frames per latent frame, a power of two.

    Raises:
        PlaitError: a value that cannot be.
    """

    codebook_size: int = 32768
    dim: int = 4
    width: int = 256
    multipliers: tuple[int, ...] = (1, 2, 2, 4)
    blocks: int = 2
    attention_levels: tuple[int, ...] = (3,)
    temporal_factor: int = 4

    def __post_init__(self) -> None:
        factor = self.temporal_factor
        if type(factor) is not int or factor < 1 or factor & (factor - 1):
            raise PlaitError(f"emu3: temporal_factor is {factor!r}, must be 1, 2, 4, 8 or another power of two")
        if type(self.dim) is not int or self.dim < 1:
            raise PlaitError(f"emu3: dim is {self.dim!r}, must be a whole number of at least 1")
        _ = self.frames  # its own checks are of all the rest

    @property
    def frames(self) -> VQGANConfig:
        """The part that looks at each frame by itself."""
        return VQGANConfig(
            width=self.width,
            multipliers=self.multipliers,
            blocks=self.blocks,
            attention_levels=self.attention_levels,
            z_channels=self.dim,
            codebook_size=self.codebook_size,
            codebook_dim=self.dim,
            normalized=False,
            spatial_norm=True,
        )

    @property
    def halvings(self) -> int:
        """How often the encoder halves the number of frames."""
        return self.temporal_factor.bit_length() - 1


class CausalConv(nn.Conv3d):
    """A convolution over frames and positions that sees this frame and earlier ones; there is nothing before the first.

    Args:
        channels: of input and output.
        kernel: (frames, rows, columns).
        stride: frames per frame of the output.
    """

    def __init__(self, channels: int, kernel: tuple[int, int, int], stride: int = 1) -> None:
        super().__init__(channels, channels, kernel, (stride, 1, 1), (0, kernel[1] // 2, kernel[2] // 2))

    def forward(self, x: Tensor, cache: Cache | None = None) -> Tensor:
        """``[B, C, T, H, W]``, T a multiple of the stride → ``[B, C, T / stride, H, W]``."""
        return super().forward(with_past(x, PAST, self, cache, mode="zeros"))


class FrozenBatchNorm(nn.Module):
    """Batch normalisation whose statistics are those of the weights, in training too; ``[B, C, T, H, W]``.

    With statistics of the batch at hand, a frame's codes would depend on what else is in the batch.
    """

    weight: Tensor
    bias: Tensor
    running_mean: Tensor
    running_var: Tensor

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.ones(channels)), nn.Parameter(torch.zeros(channels))
        self.register_buffer("running_mean", torch.zeros(channels))
        self.register_buffer("running_var", torch.ones(channels))

    def forward(self, x: Tensor) -> Tensor:
        """Any shape with the channels at dim 1 → the same."""
        return F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, eps=1e-5)


class TemporalBlock(nn.Module):
    """norm → SiLU → causal 3×3×3 → norm → SiLU → causal 3×3×3, added to the input."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = FrozenBatchNorm(channels), FrozenBatchNorm(channels)
        self.conv1, self.conv2 = CausalConv(channels, (3, 3, 3)), CausalConv(channels, (3, 3, 3))

    def forward(self, x: Tensor, cache: Cache | None = None) -> Tensor:
        """``[B, C, T, H, W]`` → the same shape."""
        h = self.conv1(swish(self.norm1(x)), cache)
        return x + self.conv2(swish(self.norm2(h)), cache)


class Encoder(vqgan.Encoder):
    """Pixels ``[B, 3, T, H, W]`` → latents ``[B, d, T / temporal_factor, h, w]``."""

    def __init__(self, config: Emu3Config) -> None:
        super().__init__(config.frames)
        self.time_conv = nn.ModuleList(CausalConv(config.dim, (4, 3, 3), stride=2) for _ in range(config.halvings))
        self.time_res_stack = nn.ModuleList(TemporalBlock(config.dim) for _ in range(config.blocks))

    def forward(self, pixels: Tensor, cache: Cache | None = None) -> Tensor:
        """Frames that repeat the one before, those of a still and of padding, are looked at once."""
        new, which = _distinct(pixels)
        at_once = PIXELS_AT_ONCE // pixels[0, 0, 0].numel()
        h = by_frame(super().forward, pixels[:, :, new], at_once=at_once)[:, :, which]
        for conv in self.time_conv:
            h = swish(conv(h, cache))
        for block in self.time_res_stack:
            h = block(h, cache)
        return h


def _distinct(video: Tensor) -> tuple[list[int], list[int]]:
    """The frames of ``[B, C, T, H, W]`` that differ from the one before, and for every frame which of these it is."""
    frames = list(range(video.shape[2]))
    if torch.compiler.is_exporting():  # an exported model cannot depend on what the pixels are
        return frames, frames
    differ = (video[:, :, 1:] != video[:, :, :-1]).any(-1).any(-1).any(1).any(0).tolist()
    new = [t for t in frames if t == 0 or differ[t - 1]]
    return new, [bisect_right(new, t) - 1 for t in frames]


class Decoder(vqgan.Decoder):
    """Latents ``[B, d, t, h, w]`` → pixels ``[B, 3, t · temporal_factor, H, W]``, not clamped."""

    def __init__(self, config: Emu3Config) -> None:
        super().__init__(config.frames)
        self.factor = config.frames.factor
        self.time_res_stack = nn.ModuleList(TemporalBlock(config.dim) for _ in range(config.blocks))
        self.time_conv = nn.ModuleList(CausalConv(config.dim, (3, 3, 3)) for _ in range(config.halvings))

    def forward(self, x: Tensor, z: Tensor, cache: Cache | None = None, frames: int | None = None) -> Tensor:
        """Latents, and the quantized ones that condition the norms, both ``[B, d, t, h, w]`` → the first ``frames``.

        The same temporal layers bring both to the frames' rate.
        """
        h = torch.cat([x, z])
        for block in self.time_res_stack:
            h = block(h, cache)
        for conv in self.time_conv:
            h = swish(conv(h.repeat_interleave(2, 2), cache))
        batch = x.shape[0]
        x, z = h[:batch, :, :frames], h[batch:, :, :frames]
        at_once = PIXELS_AT_ONCE // (x[0, 0, 0].numel() * self.factor**2)
        return by_frame(super().forward, x, z, at_once=at_once)


class Emu3Tokenizer(PixelTokenizer):
    """Emu3's vision tokenizer; a video's frames are coded in groups of ``temporal_factor``."""

    architecture: ClassVar[str] = "emu3"
    config_class: ClassVar[type] = Emu3Config
    first_alone: ClassVar[bool] = False

    def __init__(self, config: Emu3Config | None = None) -> None:
        super().__init__()
        self.config = config = config or Emu3Config()
        self.encoder = Encoder(config)
        self.quant_conv = CausalConv(config.dim, (3, 1, 1))
        self.quantizer = build_quantizer(config.frames.quantizer)
        self.post_quant_conv = CausalConv(config.dim, (3, 1, 1))
        self.decoder = Decoder(config)

    @property
    def factor(self) -> int:
        """Pixels per code along each side."""
        return int(self.config.frames.factor)

    @property
    def temporal_factor(self) -> int:
        """Frames per code."""
        return int(self.config.temporal_factor)

    def to_latents(self, pixels: Tensor, cache: Cache | None = None) -> Tensor:
        """``[B, 3, T, H, W]``, T a multiple of `temporal_factor` → ``[B, d, t, h, w]``."""
        return self.quant_conv(self.encoder(pixels, cache), cache)

    def from_latents(self, z: Tensor, cache: Cache | None = None, frames: int | None = None) -> Tensor:
        """Quantized ``[B, d, t, h, w]`` → ``[B, 3, T, H, W]``, or only the first ``frames`` of these."""
        return self.decoder(self.post_quant_conv(z, cache), z, cache, frames)


# Released weights: the network's tensors bear the names that the original release gave them, but for these.
_ORIGINAL = (
    (r"^quantize\.embedding\.weight$", "quantizer.codebook"),
    # Causal convolutions come in one or two wrappers; a change of resolution keeps its own.
    (r"(?<!sample)(?:\.conv)+\.(weight|bias)$", r".\1"),
)
_TRANSFORMERS = (
    (r"\.(?:down|up)_block\.", "."),
    (r"\.middle_block\.attn_norm\.", ".mid.attn_1.norm."),
    (r"\.middle_block\.", ".mid."),
    (r"\.attn_norms\.(\d+)\.", r".attn.\1.norm."),
    (r"\.([qkv])_proj\.", r".\1."),
    (r"\.out_proj\.", ".proj_out."),
    *_ORIGINAL,
)


# Our names → transformers'.
_TO_TRANSFORMERS = (
    (r"^quantizer\.codebook$", "quantize.embedding.weight"),
    (r"\.(down|up)\.(\d+)\.", r".\1_block.\1.\2."),
    (r"\.mid\.attn_1\.norm\.", ".middle_block.attn_norm."),
    (r"\.mid\.", ".middle_block."),
    (r"\.attn\.(\d+)\.norm\.", r".attn_norms.\1."),
    (r"\.([qkv])\.(weight|bias)$", r".\1_proj.\2"),
    (r"\.proj_out\.", ".out_proj."),
    (r"(time_conv\.\d+)\.(weight|bias)$", r"\1.conv.conv.\2"),
    (r"(time_res_stack\.\d+\.conv[12]|^quant_conv|^post_quant_conv)\.(weight|bias)$", r"\1.conv.\2"),
)


def to_transformers(tensors: Mapping[str, Tensor], config: Emu3Config) -> tuple[Tensors, dict[str, Any]]:
    """The network as the ``vqmodel`` of transformers' Emu3: its tensors (views of ours), and its ``vq_config``."""
    renamed: Tensors = {}
    for old, tensor in tensors.items():
        new = old
        for pattern, replacement in _TO_TRANSFORMERS:
            new = re.sub(pattern, replacement, new)
        renamed[new] = tensor[:, :, 0, 0] if re.search(r"_proj\.weight$", new) else tensor
        if new.endswith(".running_var"):  # an unused counter that transformers' layer stores beside it
            renamed[new.replace("running_var", "num_batches_tracked")] = torch.zeros((), dtype=torch.int64)
    return renamed, {
        "model_type": "emu3_vqgan",
        "codebook_size": config.codebook_size,
        "embed_dim": config.dim,
        "latent_channels": config.dim,
        "base_channels": config.width,
        "channel_multiplier": list(config.multipliers),
        "num_res_blocks": config.blocks,
        "attn_resolutions": list(config.attention_levels),
        "hidden_size": config.width * config.multipliers[-1],
        "num_attention_heads": 1,
        "temporal_downsample_factor": config.temporal_factor,
    }


def _layout(name: str, first: str, rules: tuple[tuple[str, str], ...]) -> Layout:
    """A layout whose files hold a tensor ``first``, alone or under a prefix in a whole Emu3, renamed by ``rules``."""

    def prefix(tensors: Mapping[str, Tensor]) -> str | None:
        # Other VQGANs have a first block too, but nothing temporal.
        return next(
            (
                found
                for name in tensors
                if name.endswith(first)
                and f"{(found := name.removesuffix(first))}encoder.time_res_stack.0.conv1.conv.weight" in tensors
            ),
            None,
        )

    def rename(tensors: Tensors, config: Any = None) -> Tensors:
        start, renamed = prefix(tensors) or "", {}
        for old, tensor in tensors.items():
            # How many batches the statistics were gathered from moves nothing.
            if not old.startswith(start) or old.endswith(".num_batches_tracked"):
                continue
            new = old.removeprefix(start)
            for pattern, replacement in rules:
                new = re.sub(pattern, replacement, new)
            # Attention's maps are 1×1 convolutions in one layout, matrices in the other.
            is_matrix = tensor.ndim == 2 and new != "quantizer.codebook"
            renamed[new] = tensor[:, :, None, None] if is_matrix else tensor
        return renamed

    def configure(tensors: Mapping[str, Tensor], config: dict[str, Any]) -> Emu3Config:
        heads = config.get("vq_config", config).get("num_attention_heads", 1)
        if heads != 1:
            raise PlaitError(f"config.json: num_attention_heads is {heads}, released Emu3 tokenizers have 1")
        return _config_of(rename(dict(tensors)))

    return Layout(
        name, "plait.tokenizers.emu3:Emu3Tokenizer", lambda tensors, _: prefix(tensors) is not None, configure, rename
    )


def _config_of(tensors: Tensors) -> Emu3Config:
    """The configuration of tensors that bear the network's names.

    Raises:
        KeyError: one that tells a size is missing.
    """

    def number(pattern: str) -> int:
        return len({found[0] for name in tensors if (found := re.match(pattern, name))})

    width = tensors["encoder.conv_in.weight"].shape[0]
    levels = number(r"encoder\.down\.\d+\.")
    codebook_size, dim = tensors["quantizer.codebook"].shape
    firsts = [f"encoder.down.{i}.block.0.conv1.weight" for i in range(levels)]
    return Emu3Config(
        codebook_size=codebook_size,
        dim=dim,
        width=width,
        multipliers=tuple(tensors[name].shape[0] // width for name in firsts),
        blocks=number(r"encoder\.time_res_stack\.\d+\."),
        attention_levels=tuple(i for i in range(levels) if f"encoder.down.{i}.attn.0.q.weight" in tensors),
        temporal_factor=2 ** number(r"encoder\.time_conv\.\d+\."),
    )


LAYOUTS: tuple[Layout, ...] = (
    _layout("Emu3", "encoder.down.0.block.0.conv1.weight", _ORIGINAL),
    _layout("Emu3 of transformers", "encoder.down_block.down.0.block.0.conv1.weight", _TRANSFORMERS),
)
