"""Perceptual distances: how different two pictures look to a frozen image classifier.

The unit-normalised features of five stages are compared (LPIPS, arXiv 1801.03924), weighted per channel by learned
heads if there are any. ST-LPIPS (arXiv 2207.13686) does the same with a network that blurs before it subsamples, so
that a shift by a pixel hardly counts. No weights come with plait: they are read from files that the user has, and every
distance carries a name that says what it is.
"""

import importlib.util
import re
from itertools import pairwise
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from plait.errors import PlaitError
from plait.tokenizers.foreign import Tensors, read_checkpoint

LEAST_SIDE = 32

# Sources by name: files of the optional package stlpips-pytorch.
_SHIFT_TOLERANT = {"stlpips-vgg": "vgg_shift_tolerant.pth", "stlpips-alex": "alex_shift_tolerant.pth"}
_VGG_WIDTHS = ((64, 64), (128, 128), (256, 256, 256), (512, 512, 512), (512, 512, 512))
# What LPIPS takes off colours in [-1, 1] and divides them by: ImageNet's mean and deviation on that scale.
_SHIFT, _SCALE = (-0.030, -0.088, -0.188), (0.458, 0.448, 0.450)


class BlurPool(nn.Module):
    """Blur with the binomial filter 1-2-1 and keep every second position (arXiv 1904.11486); ``[B, C, H, W]``."""

    filt: Tensor

    def __init__(self, channels: int) -> None:
        super().__init__()
        line = torch.tensor([1.0, 2.0, 1.0]) / 4
        self.register_buffer("filt", torch.outer(line, line).repeat(channels, 1, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        """``[B, C, H, W]`` with sides of at least 3 → ``[B, C, (H + 1) // 2 + 1, (W + 1) // 2 + 1]``."""
        return F.conv2d(F.pad(x, (2, 2, 2, 2), mode="reflect"), self.filt, stride=2, groups=x.shape[1])


def _vgg16(shift_tolerant: bool) -> list[list[nn.Module]]:
    """The layers of VGG16's (arXiv 1409.1556) convolutional half, one list for each stage that is compared."""
    stages: list[list[nn.Module]] = []
    before = 3
    for widths in _VGG_WIDTHS:
        pool: list[nn.Module] = []
        if stages:
            pool = [nn.MaxPool2d(2, stride=1), BlurPool(before)] if shift_tolerant else [nn.MaxPool2d(2)]
        layers: list[nn.Module] = [
            layer
            for a, b in pairwise((before, *widths))
            for layer in (nn.Conv2d(a, b, 3, padding=1), nn.ReLU(inplace=True))
        ]
        stages.append(pool + layers)
        before = widths[-1]
    return stages


def _alexnet(shift_tolerant: bool) -> list[list[nn.Module]]:
    """The layers of AlexNet's (arXiv 1404.5997) convolutional half, one list for each stage that is compared."""

    def pool(channels: int) -> list[nn.Module]:
        return [nn.MaxPool2d(3, stride=1), BlurPool(channels)] if shift_tolerant else [nn.MaxPool2d(3, stride=2)]

    first: list[nn.Module] = [nn.Conv2d(3, 64, 11, stride=1 if shift_tolerant else 4, padding=2)]
    return [
        [*first, *([BlurPool(64)] if shift_tolerant else []), nn.ReLU(inplace=True)],
        [*pool(64), nn.Conv2d(64, 192, 5, padding=2), nn.ReLU(inplace=True)],
        [*pool(192), nn.Conv2d(192, 384, 3, padding=1), nn.ReLU(inplace=True)],
        [nn.Conv2d(384, 256, 3, padding=1), nn.ReLU(inplace=True)],
        [nn.Conv2d(256, 256, 3, padding=1), nn.ReLU(inplace=True)],
    ]


class PerceptualDistance(nn.Module):
    """Distance of two batches of pictures, differentiable in both. Its weights are frozen; `load_perceptual` makes it.

    With heads: over five stages, the sum of the head-weighted squared differences of unit-normalised features, averaged
    over positions; not bounded above. Without: all channels count the same and the stages are averaged; in ``[0, 2]``.

    Attributes:
        name: exactly what the distance is, for reports: "LPIPS-VGG", "ST-LPIPS-Alex", "VGG16 features (no heads)", ...
    """

    shift: Tensor
    scale: Tensor

    def __init__(self, name: str, stages: list[list[nn.Module]]) -> None:
        super().__init__()
        self.name = name
        # Layers are numbered through, as in the checkpoints.
        self.features = nn.Sequential(*(layer for stage in stages for layer in stage))
        self.compared = {sum(map(len, stages[: i + 1])) - 1 for i in range(len(stages))}
        widths = [[x.out_channels for x in stage if isinstance(x, nn.Conv2d)][-1] for stage in stages]
        self.heads = nn.ParameterDict(
            {f"lin{i}": torch.full((width,), 1 / len(widths)) for i, width in enumerate(widths)}
        )
        self.register_buffer("shift", torch.tensor(_SHIFT).view(1, 3, 1, 1))
        self.register_buffer("scale", torch.tensor(_SCALE).view(1, 3, 1, 1))
        self.eval().requires_grad_(False)

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        """Compare picture by picture, in float32 whatever autocast says.

        Args:
            a: float ``[B, 3, H, W]`` in ``[-1, 1]``.
            b: the same shape.

        Returns:
            distances, float32 ``[B]``, at least 0.

        Raises:
            PlaitError: another shape, or pictures of less than 32 pixels a side.
        """
        if a.shape != b.shape or a.ndim != 4 or a.shape[1] != 3 or min(a.shape[-2:]) < LEAST_SIDE:
            raise PlaitError(
                f"{self.name}: shapes are {tuple(a.shape)} and {tuple(b.shape)}, expected two of [B, 3, H, W] with "
                f"sides of at least {LEAST_SIDE}; leave the perceptual term out for smaller pictures"
            )
        with torch.autocast(a.device.type, enabled=False):
            x, y = ((pixels.float() - self.shift) / self.scale for pixels in (a, b))
            distance = x.new_zeros(len(x))
            heads = iter(self.heads.values())
            for i, layer in enumerate(self.features):
                x, y = layer(x), layer(y)
                if i in self.compared:
                    distance = distance + (_unit(x) - _unit(y)).square().mean((2, 3)) @ next(heads)
        return distance


def load_perceptual(source: str | Path, heads: str | Path | None = None) -> PerceptualDistance:
    """Load a perceptual distance, frozen and on the CPU.

    Args:
        source: a file of VGG16 or AlexNet weights in torchvision's layout (.pth, .pt or .safetensors), a file of
            ST-LPIPS weights, or "stlpips-vgg" or "stlpips-alex" for those of the installed package stlpips-pytorch.
        heads: a file of learned heads in the layout of the package lpips; only for torchvision's layout. Without them
            the distance is no LPIPS, and its name says so.

    Raises:
        PlaitError: a file or the package is missing or broken, or a tensor is missing, extra or of another shape.
    """
    path = _find(source)
    tensors = read_checkpoint(path)
    shift_tolerant = "net.slice1.0.weight" in tensors
    first = tensors.get("net.slice1.0.weight" if shift_tolerant else "features.0.weight")
    if first is None or first.shape[2:] not in ((3, 3), (11, 11)):
        raise PlaitError(
            f"{path}: holds neither VGG16 nor AlexNet weights (features.0.weight, … as in torchvision) nor those of "
            "ST-LPIPS (net.slice1.0.weight, …); give such a file"
        )
    vgg = first.shape[2] == 3
    short, long = ("VGG", "VGG16") if vgg else ("Alex", "AlexNet")
    stages = (_vgg16 if vgg else _alexnet)(shift_tolerant)
    if shift_tolerant:
        if heads is not None:
            raise PlaitError(f"{heads}: {path.name} brings its own heads; leave heads out")
        module = PerceptualDistance(f"ST-LPIPS-{short}", stages)
        _fill(module, _renamed(tensors), path)
        return module
    name = f"{long} features (no heads)" if heads is None else f"LPIPS-{short}"
    module = PerceptualDistance(name, stages)
    features = {key: tensor for key, tensor in tensors.items() if key.startswith("features.")}
    _fill(nn.ModuleDict({"features": module.features}), features, path)
    if heads is not None:
        if not (file := Path(heads)).is_file():
            raise PlaitError(f"{file}: no such file; heads must name the lpips package's weights, or leave it out")
        _fill(nn.ModuleDict({"heads": module.heads}), _renamed(read_checkpoint(file)), file)
    return module


def _find(source: str | Path) -> Path:
    """The file of a source.

    Raises:
        PlaitError: it is not there.
    """
    if str(source) not in _SHIFT_TOLERANT:
        if not (path := Path(source)).is_file():
            raise PlaitError(
                f"{source}: no such file; give a file of VGG16 or AlexNet weights, or {' or '.join(_SHIFT_TOLERANT)}"
            )
        return path
    # Only looked up, never imported: the package needs other packages at import, and its code is not free to use.
    spec = importlib.util.find_spec("stlpips_pytorch")
    for folder in (spec.submodule_search_locations or []) if spec else []:
        if (path := Path(folder) / "weights" / "vST0.0" / _SHIFT_TOLERANT[str(source)]).is_file():
            return path
    raise PlaitError(
        f"{source}: its weights are not installed; run `pip install --no-deps stlpips-pytorch==0.0.2`, "
        "or give a file of VGG16 or AlexNet weights"
    )


def _renamed(tensors: Tensors) -> Tensors:
    """ST-LPIPS's and the lpips package's names → ours; heads are stored as 1×1 convolutions ``[1, C, 1, 1]``."""
    renamed = {}
    for name, tensor in tensors.items():
        if head := re.fullmatch(r"(lin\d)\.model\.1\.weight", name):
            renamed[f"heads.{head[1]}"] = tensor.flatten()
        else:
            renamed[re.sub(r"^net\.slice\d\.", "features.", name).removeprefix("scaling_layer.")] = tensor
    return renamed


def _fill(module: nn.Module, tensors: Tensors, path: Path) -> None:
    """Load tensors strictly.

    Raises:
        PlaitError: one is missing, extra, of another shape, or not finite.
    """
    expected = module.state_dict()
    for problem, names in (("missing", set(expected) - set(tensors)), ("extra", set(tensors) - set(expected))):
        if names:
            raise PlaitError(f"{path}: tensor {min(names)} is {problem}; the file is of another network")
    for name, tensor in tensors.items():
        if tensor.shape != expected[name].shape:
            raise PlaitError(
                f"{path}: tensor {name} has shape {tuple(tensor.shape)}, expected {tuple(expected[name].shape)}; "
                "the file is of another network"
            )
        if not tensor.isfinite().all():
            raise PlaitError(f"{path}: tensor {name} holds values that are not finite; the file is damaged")
    module.load_state_dict(tensors)


def _unit(x: Tensor) -> Tensor:
    """Features ``[B, C, H, W]`` of length 1 at every position; zeros stay zeros."""
    return x / (torch.linalg.vector_norm(x, dim=1, keepdim=True) + 1e-10)
