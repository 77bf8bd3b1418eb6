import importlib.util
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
import torchvision
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import Tensor, nn

from plait.errors import PlaitError
from plait.tokenizers.perceptual import BlurPool, PerceptualDistance, load_perceptual

NETS = {"vgg": torchvision.models.vgg16, "alex": torchvision.models.alexnet}
# Positions of the ReLUs whose outputs LPIPS compares, in torchvision's numbering.
RELUS = {"vgg": (3, 8, 15, 22, 29), "alex": (1, 4, 7, 9, 11)}
WIDTHS = {"vgg": (64, 128, 256, 512, 512), "alex": (64, 192, 384, 256, 256)}
NAMES = {"vgg": ("VGG16", "VGG"), "alex": ("AlexNet", "Alex")}


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def random_features(net: str) -> nn.Sequential:
    """Torchvision's own layers, without the memory of its classifier."""
    with torch.device("meta"):
        features = NETS[net](weights=None).features
    torch.manual_seed(0)
    features.to_empty(device="cpu").apply(lambda m: m.reset_parameters() if isinstance(m, nn.Conv2d) else None)
    return features.requires_grad_(False)


@pytest.fixture(scope="module", params=["vgg", "alex"])
def plain(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[str, nn.Module, Path, Path]:
    """A net's name, torchvision's network, its file (.pth, with a classifier) and a file of heads."""
    folder, net = tmp_path_factory.mktemp(request.param), request.param
    features = random_features(net)
    named = {f"features.{k}": v for k, v in features.state_dict().items()}
    torch.save({**named, "classifier.6.bias": torch.zeros(1000)}, folder / "net.pth")
    heads = {f"lin{i}.model.1.weight": noise(1, c, 1, 1, seed=i) + 1 for i, c in enumerate(WIDTHS[net])}
    torch.save(heads, folder / "heads.pth")
    return net, features, folder / "net.pth", folder / "heads.pth"


def compared(net: str, features: nn.Module, pixels: Tensor) -> list[Tensor]:
    """Unit-normalised features by torchvision's network and torch's own normalisation."""
    mean, deviation = torch.tensor([-0.030, -0.088, -0.188]), torch.tensor([0.458, 0.448, 0.450])
    x, found = (pixels - mean[:, None, None]) / deviation[:, None, None], []
    for i, layer in enumerate(list(features.children())[: RELUS[net][-1] + 1]):
        x = layer(x.clone())
        if i in RELUS[net]:
            found.append(F.normalize(x.clone(), dim=1, eps=1e-10))
    return found


@pytest.mark.parametrize("size", [(32, 32), (47, 65)])
def test_distances_are_lpips_formula_on_torchvisions_features(
    plain: tuple[str, nn.Module, Path, Path], size: tuple[int, int]
) -> None:
    net, features, path, heads = plain
    a, b = noise(2, 3, *size, seed=1), noise(2, 3, *size, seed=2)
    pairs = list(zip(compared(net, features, a), compared(net, features, b), strict=True))

    headless = load_perceptual(path)
    expected = sum((x - y).square().sum(1).mean((1, 2)) for x, y in pairs) / 5
    torch.testing.assert_close(headless(a, b), expected)
    assert headless.name == f"{NAMES[net][0]} features (no heads)"

    learned = load_perceptual(str(path), heads)
    weights = torch.load(heads, weights_only=True)
    expected = sum(
        F.conv2d((x - y) ** 2, weights[f"lin{i}.model.1.weight"]).mean((1, 2, 3)) for i, (x, y) in enumerate(pairs)
    )
    torch.testing.assert_close(learned(a, b), expected)
    assert learned.name == f"LPIPS-{NAMES[net][1]}"


def test_gradients_reach_both_pictures_and_no_weight(plain: tuple[str, nn.Module, Path, Path]) -> None:
    distance = load_perceptual(plain[2], plain[3])
    a, b = noise(2, 3, 32, 32, seed=1).requires_grad_(), noise(2, 3, 32, 32, seed=2).requires_grad_()
    distance(a, b).sum().backward()
    for pixels in (a, b):
        assert pixels.grad is not None
        assert pixels.grad.isfinite().all()
        assert all(item.any() for item in pixels.grad)
    assert not any(p.requires_grad for p in distance.parameters())
    assert not distance.training
    # Following them brings the pictures nearer to each other.
    assert a.grad is not None
    with torch.no_grad():
        assert (distance(a - 0.05 * a.grad / a.grad.abs().max(), b).sum() < distance(a, b).sum()).item()


def test_equal_and_dead_pictures_have_finite_gradients(plain: tuple[str, nn.Module, Path, Path]) -> None:
    distance = load_perceptual(plain[2])
    for p in distance.parameters():
        p.zero_()  # all features are zero
    for module in (distance, load_perceptual(plain[2])):
        a = noise(1, 3, 32, 32).requires_grad_()
        value = module(a, a.detach().clone())
        value.sum().backward()
        assert value.item() == 0
        assert a.grad is not None
        assert not a.grad.any()


@pytest.mark.parametrize("plain", ["alex"], indirect=True)
def test_autocast_changes_nothing(plain: tuple[str, nn.Module, Path, Path]) -> None:
    distance = load_perceptual(plain[2])
    a, b = noise(1, 3, 32, 32, seed=1), noise(1, 3, 32, 32, seed=2)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = distance(a, b)
    assert inside.dtype == torch.float32
    assert torch.equal(inside, distance(a, b))
    assert distance(a.bfloat16(), b.bfloat16()).dtype == torch.float32


@pytest.mark.parametrize("plain", ["alex"], indirect=True)
def test_pictures_of_a_batch_do_not_see_each_other(plain: tuple[str, nn.Module, Path, Path]) -> None:
    distance = load_perceptual(plain[2])
    a, b = noise(3, 3, 33, 40, seed=1), noise(3, 3, 33, 40, seed=2)
    together = distance(a, b)
    assert together.shape == (3,)
    torch.testing.assert_close(together, torch.cat([distance(a[i : i + 1], b[i : i + 1]) for i in range(3)]))
    torch.testing.assert_close(together, distance(b, a))
    assert (together > 0).all()
    assert (together <= 2).all()


# Shift-tolerant networks, by their numbered layers: c = convolution and ReLU, C = convolution, blur and ReLU,
# m = max-pooling with stride 1 and blur; a space ends a stage.
SHIFT_TOLERANT = {"vgg": "cc mcc mccc mccc mccc", "alex": "C mc mc c c"}
SHIFT_WIDTHS = {
    "vgg": (64, 64, 128, 128, 256, 256, 256, 512, 512, 512, 512, 512, 512),
    "alex": (64, 192, 384, 256, 256),
}
KERNELS = {"vgg": (3,) * 13, "alex": (11, 5, 3, 3, 3)}
BINOMIAL = torch.tensor([[1.0, 2, 1], [2, 4, 2], [1, 2, 1]]) / 16


def shift_tolerant_weights(net: str) -> dict[str, Tensor]:
    """Random weights under the names that ST-LPIPS's released files have."""
    weights = {
        "scaling_layer.shift": torch.tensor([-0.030, -0.088, -0.188]).view(1, 3, 1, 1),
        "scaling_layer.scale": torch.tensor([0.458, 0.448, 0.450]).view(1, 3, 1, 1),
    }
    number, before, shapes = 0, 3, iter(zip(SHIFT_WIDTHS[net], KERNELS[net], strict=True))
    for stage, letters in enumerate(SHIFT_TOLERANT[net].split(), start=1):
        for letter in letters:
            name = f"net.slice{stage}."
            if letter == "m":
                weights[f"{name}{number + 1}.filt"] = BINOMIAL.expand(before, 1, 3, 3).clone()
                number += 2
                continue
            after, kernel = next(shapes)
            bound = (3 / (before * kernel**2)) ** 0.5
            weights[f"{name}{number}.weight"] = noise(after, before, kernel, kernel, seed=number) * bound
            weights[f"{name}{number}.bias"] = noise(after, seed=number + 1) * 0.1
            if letter == "C":
                weights[f"{name}{number + 1}.filt"] = BINOMIAL.expand(after, 1, 3, 3).clone()
            number += 2 if letter == "c" else 3
            before = after
    widths = WIDTHS[net]
    return weights | {f"lin{i}.model.1.weight": noise(1, c, 1, 1, seed=i) + 1 for i, c in enumerate(widths)}


def blurred(x: Tensor) -> Tensor:
    """Every second position of the picture filtered by 1-2-1 in both directions, edges mirrored twice."""
    x = F.pad(x, (2, 2, 2, 2), mode="reflect")
    for dim in (2, 3):
        n = x.shape[dim]
        x = (x.narrow(dim, 0, n - 2) + 2 * x.narrow(dim, 1, n - 2) + x.narrow(dim, 2, n - 2)) / 4
    return x[..., ::2, ::2]


def shift_tolerant_features(net: str, weights: dict[str, Tensor], pixels: Tensor) -> list[Tensor]:
    x = (pixels - weights["scaling_layer.shift"]) / weights["scaling_layer.scale"]
    convolutions = iter([k for k in weights if k.startswith("net.") and k.endswith("weight")])
    found = []
    for letters in SHIFT_TOLERANT[net].split():
        for letter in letters:
            if letter == "m":
                x = blurred(F.max_pool2d(x, 2 if net == "vgg" else 3, stride=1))
                continue
            name = next(convolutions)
            kernel = weights[name].shape[-1]
            x = F.conv2d(x, weights[name], weights[name[:-6] + "bias"], padding=2 if kernel == 11 else kernel // 2)
            x = F.relu(blurred(x) if letter == "C" else x)
        found.append(F.normalize(x, dim=1, eps=1e-10))
    return found


@pytest.mark.parametrize("net", ["vgg", "alex"])
def test_shift_tolerant_distance_is_its_formula(net: str, tmp_path: Path) -> None:
    weights = shift_tolerant_weights(net)
    save_file(weights, tmp_path / "st.safetensors")
    distance = load_perceptual(tmp_path / "st.safetensors")
    assert distance.name == f"ST-LPIPS-{NAMES[net][1]}"
    a, b = noise(2, 3, 33, 36, seed=1), noise(2, 3, 33, 36, seed=2)
    pairs = zip(shift_tolerant_features(net, weights, a), shift_tolerant_features(net, weights, b), strict=True)
    expected = sum(
        F.conv2d((x - y) ** 2, weights[f"lin{i}.model.1.weight"]).mean((1, 2, 3)) for i, (x, y) in enumerate(pairs)
    )
    torch.testing.assert_close(distance(a, b), expected)
    with pytest.raises(PlaitError, match=r"st.safetensors brings its own heads"):
        load_perceptual(tmp_path / "st.safetensors", tmp_path / "heads.pth")


@settings(deadline=None, max_examples=30)
@given(height=st.integers(3, 20), width=st.integers(3, 20), channels=st.integers(1, 3))
def test_blur_pool_is_the_binomial_filter(height: int, width: int, channels: int) -> None:
    x = noise(2, channels, height, width)
    pooled = BlurPool(channels)(x)
    assert pooled.shape[2:] == ((height + 1) // 2 + 1, (width + 1) // 2 + 1)
    torch.testing.assert_close(pooled, blurred(x))


# What the package's own forward pass (stlpips-pytorch 0.0.2) gives for `waves`.
PACKAGE = {"vgg": 0.22458440, "alex": 0.07260001}


def waves() -> tuple[Tensor, Tensor]:
    y, x = torch.meshgrid(torch.arange(48.0), torch.arange(40.0), indexing="ij")
    a = torch.stack([torch.sin(x / (3 + c) + y / 5) * torch.cos(y / (2 + c)) for c in range(3)])[None]
    return a, (a * 0.7).roll(3, -1)


@pytest.mark.skipif(importlib.util.find_spec("stlpips_pytorch") is None, reason="stlpips-pytorch is not installed")
@pytest.mark.parametrize("net", ["vgg", "alex"])
def test_released_weights_give_the_packages_distance(net: str) -> None:
    distance = load_perceptual(f"stlpips-{net}")
    a, b = waves()
    assert distance(a, b).item() == pytest.approx(PACKAGE[net], rel=1e-4)
    assert distance(a, a.roll(1, -1)).item() < distance(a, b).item()


def test_package_is_found_without_being_imported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "stlpips_pytorch"
    (folder / "weights" / "vST0.0").mkdir(parents=True)
    (folder / "__init__.py").write_text("raise RuntimeError('imported')")
    torch.save(shift_tolerant_weights("alex"), folder / "weights" / "vST0.0" / "alex_shift_tolerant.pth")
    monkeypatch.syspath_prepend(tmp_path)
    assert load_perceptual("stlpips-alex").name == "ST-LPIPS-Alex"
    with pytest.raises(PlaitError, match=r"stlpips-vgg: .*pip install --no-deps stlpips-pytorch==0\.0\.2"):
        load_perceptual("stlpips-vgg")


def test_missing_package_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(PlaitError, match=r"stlpips-alex: .*pip install --no-deps stlpips-pytorch"):
        load_perceptual("stlpips-alex")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop("features.10.bias"), r"net\.pth: tensor features\.10\.bias is missing"),
        (lambda t: t.update({"features.30.weight": torch.zeros(1)}), r"tensor features\.30\.weight is extra"),
        (
            lambda t: t.update({"features.3.bias": torch.zeros(7)}),
            r"tensor features\.3\.bias has shape \(7,\), expected",
        ),
        (lambda t: t["features.6.bias"].fill_(float("nan")), r"tensor features\.6\.bias holds values that are not"),
        (lambda t: [t.pop(k) for k in list(t)[:-1]], r"net\.pth: holds neither VGG16 nor AlexNet"),
        (lambda t: t.update({"features.0.weight": torch.zeros(())}), r"net\.pth: holds neither VGG16 nor AlexNet"),
    ],
)
def test_wrong_weights_are_named(change: object, message: str, tmp_path: Path) -> None:
    tensors = {f"features.{k}": v for k, v in random_features("alex").state_dict().items()}
    change(tensors)  # type: ignore[operator]
    torch.save(tensors, tmp_path / "net.pth")
    with pytest.raises(PlaitError, match=message) as error:
        load_perceptual(tmp_path / "net.pth")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("plain", ["alex"], indirect=True)
def test_wrong_heads_are_named(plain: tuple[str, nn.Module, Path, Path], tmp_path: Path) -> None:
    net, _, path, heads = plain
    tensors = torch.load(heads, weights_only=True)
    del tensors["lin3.model.1.weight"]
    torch.save(tensors, tmp_path / "heads.pth")
    with pytest.raises(PlaitError, match=r"heads\.pth: tensor heads\.lin3 is missing"):
        load_perceptual(path, tmp_path / "heads.pth")
    other = {f"lin{i}.model.1.weight": torch.ones(1, c + 1, 1, 1) for i, c in enumerate(WIDTHS[net])}
    torch.save(other, tmp_path / "heads.pth")
    with pytest.raises(PlaitError, match=r"heads\.pth: tensor heads\.lin\d has shape"):
        load_perceptual(path, tmp_path / "heads.pth")
    with pytest.raises(PlaitError, match=r"absent\.pth: no such file"):
        load_perceptual(path, tmp_path / "absent.pth")
    with pytest.raises(PlaitError, match=r"absent\.pth: no such file; give .* or stlpips-vgg or stlpips-alex"):
        load_perceptual(tmp_path / "absent.pth")


@pytest.mark.parametrize("plain", ["alex"], indirect=True)
def test_wrong_pictures_are_named(plain: tuple[str, nn.Module, Path, Path]) -> None:
    distance: PerceptualDistance = load_perceptual(plain[2])
    for a, b in (
        (noise(1, 3, 31, 40), noise(1, 3, 31, 40)),
        (noise(1, 3, 40, 40), noise(2, 3, 40, 40)),
        (noise(1, 4, 40, 40), noise(1, 4, 40, 40)),
        (noise(1, 3, 2, 40, 40), noise(1, 3, 2, 40, 40)),
    ):
        with pytest.raises(PlaitError, match=r"features \(no heads\): shapes are .* at least 32"):
            distance(a, b)
