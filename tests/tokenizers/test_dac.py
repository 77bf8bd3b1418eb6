import json
import math
import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import Tensor
from transformers import DacConfig, DacModel

from plait.errors import PlaitError
from plait.tokenizers.dac import LAYOUTS, DACConfig, DACTokenizer
from plait.tokenizers.foreign import convert, load_foreign
from plait.tokenizers.loading import load_tokenizer
from plait.tokenizers.streaming import Stream

MANIFESTS = Path(__file__).parents[1] / "data" / "manifests"
ORIGINAL, TRANSFORMERS = LAYOUTS
RELEASES = {
    "16khz": {"sampling_rate": 16000, "downsampling_ratios": [2, 4, 5, 8], "n_codebooks": 12},
    "24khz": {"sampling_rate": 24000, "downsampling_ratios": [2, 4, 5, 8], "n_codebooks": 32},
    "44khz": {"sampling_rate": 44100, "downsampling_ratios": [2, 4, 8, 8], "n_codebooks": 9},
}


def sound(*shape: int, seed: int = 0) -> Tensor:
    return 0.3 * torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def reference(**changes: Any) -> DacModel:
    """transformers' network under weight norm, with weights of which none is at a value that would hide it."""
    settings: dict[str, Any] = {
        "encoder_hidden_size": 4, "decoder_hidden_size": 32, "n_codebooks": 4, "codebook_size": 64, "codebook_dim": 4,
        "downsampling_ratios": [2, 3], "sampling_rate": 16000,
    }  # fmt: skip
    torch.manual_seed(len(repr(changes)))
    network = DacModel(DacConfig(**settings | changes))
    network.apply_weight_norm()
    network.eval().requires_grad_(False)
    tensors = network.state_dict()
    for name, tensor in tensors.items():
        if name.endswith("alpha"):
            tensor.uniform_(0.3, 2)
        elif name.endswith("bias"):
            tensor.normal_(0, 0.1)
        elif name.endswith("original0"):
            # About as loud on as in, branches quieter, or rounding would grow with depth; a transposed convolution's
            # magnitudes are per input channel.
            cin, cout, taps = tensors[name.replace("original0", "original1")].shape
            loudness = math.sqrt(cout * taps / 2 / cin) if "conv_t1" in name else 0.8
            loudness = 0.3 if "res_unit" in name else 1.2 if "encoder" in name else loudness
            tensor.uniform_(0.5, 1.1).mul_(loudness)
    residual = network.encoder(sound(2, 1, 60 * network.config.hop_length, seed=1))
    for quantizer in network.quantizer.quantizers:
        # The codes of random weights crowd in one corner of a random codebook unless it is spread over the latents.
        seen = quantizer.in_proj(residual).movedim(1, -1).flatten(0, 1)
        quantizer.codebook.weight.copy_(seen[torch.randint(len(seen), (64,))] + 0.1 * torch.randn(64, 4))
        residual = residual - quantizer(residual)[0]
    return network


def ours_of(theirs: DacModel) -> DACTokenizer:
    tokenizer = convert(theirs.state_dict(), theirs.config.to_dict(), TRANSFORMERS, "transformers")
    assert isinstance(tokenizer, DACTokenizer)
    return tokenizer


@pytest.fixture(scope="module")
def theirs() -> DacModel:
    return reference()


@pytest.fixture(scope="module")
def tokenizer(theirs: DacModel) -> DACTokenizer:
    return ours_of(theirs)


def assert_same_codes(ours: DACTokenizer, samples: Tensor, codes: Tensor, expected: Tensor) -> None:
    """Equal, but for latents that lie between two vectors of a codebook."""
    assert codes.shape == expected.shape
    with torch.no_grad():
        margin = ours.quantizer.margin(ours.to_latents(samples, Stream(last=True)).movedim(1, -1))
    assert not ((codes != expected).any(1) & (margin > 1e-5)).any()
    assert (codes != expected).float().mean() < 0.01


@pytest.mark.parametrize(
    "changes",
    [*RELEASES.values(), {"downsampling_ratios": [5]}, {"downsampling_ratios": [3, 3, 2], "encoder_hidden_size": 3}],
    ids=lambda changes: " ".join(map(str, changes["downsampling_ratios"])) + f" {changes.get('sampling_rate', '')}",
)
def test_codes_and_samples_are_those_of_transformers(changes: dict[str, Any]) -> None:
    theirs = reference(**changes | ({"n_codebooks": 4} if changes.get("n_codebooks", 0) > 9 else {}))
    ours = ours_of(theirs)
    hop, there = theirs.config.hop_length, theirs.config.n_codebooks
    assert (ours.factor, ours.sample_rate) == (hop, theirs.config.sampling_rate)
    for n in (1, hop - 1, hop, 4 * hop + hop // 2, 9 * hop):
        samples = sound(2, 1, n, seed=n)
        filled = F.pad(samples, (0, -n % hop))
        expected = theirs.encode(filled).audio_codes
        encoded = ours.encode(samples)
        assert_same_codes(ours, filled, encoded.codes, expected)
        for count in (1, there - 1):
            fewer = ours.encode(samples, n_codebooks=count).codes
            assert torch.equal(fewer, encoded.codes[:, :count])
            assert_same_codes(ours, filled, fewer, theirs.encode(filled, n_quantizers=count).audio_codes)
            wanted = theirs.decode(audio_codes=fewer).audio_values.unsqueeze(1)
            torch.testing.assert_close(ours.decode(fewer)[..., : wanted.shape[-1]], wanted, rtol=0, atol=1e-5)
        wanted = theirs.decode(audio_codes=encoded.codes).audio_values.unsqueeze(1)
        decoded = ours.decode(encoded.codes)
        torch.testing.assert_close(decoded[..., : wanted.shape[-1]], wanted, rtol=0, atol=1e-5)
        assert decoded.shape == filled.shape
        assert torch.equal(ours.decode(encoded), decoded[..., :n])
    assert wanted.std() > 0.03
    assert min(len(codes.unique()) for codes in encoded.codes.movedim(1, 0)) > 5


@pytest.mark.parametrize("rate", RELEASES)
def test_the_samples_that_odd_strides_leave_out_hold_the_last_one(rate: str) -> None:
    ours = ours_of(reference(**RELEASES[rate] | {"n_codebooks": 2}))
    missing = 0 if rate == "44khz" else 8
    assert ours.missing == missing
    decoded = ours.decode(torch.arange(2 * 2 * 3).view(2, 2, 3))
    assert (decoded.diff()[..., -missing - 1 :] == 0).sum() == 2 * missing


# Streams


@st.composite
def plans(draw: st.DrawFn, most: int = 200) -> list[int]:
    return draw(st.lists(st.integers(1, 40), min_size=1, max_size=12).filter(lambda plan: sum(plan) <= most))


@settings(deadline=None, max_examples=20)
@given(plan=plans(), seed=st.integers(0, 99))
def test_any_chunks_give_what_one_pass_gives(tokenizer: DACTokenizer, plan: list[int], seed: int) -> None:
    samples = sound(2, 1, sum(plan), seed=seed)
    whole = tokenizer.encode(samples)
    with torch.no_grad():
        margin = tokenizer.quantizer.margin(
            tokenizer.to_latents(tokenizer._pad(samples), Stream(last=True)).movedim(1, -1)
        )
    codes = torch.cat(list(tokenizer.encode_stream(samples.split(plan, -1))), -1)
    assert codes.shape == whole.codes.shape
    assert not ((codes != whole.codes).any(1) & (margin > 1e-5)).any()

    steps = whole.codes.split([1] * min(3, whole.codes.shape[-1]) + [max(0, whole.codes.shape[-1] - 3)], -1)
    decoded = torch.cat(list(tokenizer.decode_stream([part for part in steps if part.numel()], whole.size)), -1)
    assert decoded.shape == samples.shape
    torch.testing.assert_close(decoded, tokenizer.decode(whole), rtol=0, atol=1e-5)


def remembered(stream: Stream) -> int:
    def numbers(value: Any) -> int:
        if isinstance(value, Tensor):
            return value.untyped_storage().nbytes() // 4
        return sum(map(numbers, value)) if isinstance(value, tuple) else 0

    return sum(map(numbers, stream._memory.values()))


@torch.no_grad()
def test_a_stream_does_not_grow(tokenizer: DACTokenizer) -> None:
    down, up, sizes = Stream(), Stream(), []
    for i in range(12):
        tokenizer.from_latents(tokenizer.to_latents(sound(1, 1, 10 * tokenizer.factor, seed=i), down), up)
        sizes.append((remembered(down), remembered(up)))
    assert len(set(sizes[5:])) == 1
    assert 0 < sum(sizes[-1]) < 20000


@pytest.mark.parametrize("n", [1, 2, 5, 6, 7, 12, 13, 100])
def test_what_comes_back_is_as_long_as_what_went_in(tokenizer: DACTokenizer, n: int) -> None:
    encoded = tokenizer.encode(sound(1, 1, n))
    assert encoded.codes.shape == (1, 4, -(-n // 6))
    assert tokenizer.decode(encoded).shape == (1, 1, n)


# Files


def original_name(name: str, levels: int) -> str:
    """The name in the original release of a tensor of transformers'."""
    name = name.replace("parametrizations.weight.original0", "weight_g")
    name = name.replace("parametrizations.weight.original1", "weight_v")
    ends = {"conv1": 0, "snake1": levels + 1, "conv2": levels + 2}
    name = re.sub(r"^encoder\.(conv1|snake1|conv2)\.", lambda m: f"encoder.block.{ends[m[1]]}.", name)
    name = re.sub(r"^decoder\.(conv1|snake1|conv2)\.", lambda m: f"decoder.model.{ends[m[1]]}.", name)
    name = re.sub(r"res_unit(\d)\.snake(\d)", lambda m: f"unit{m[1]}.block.{2 * int(m[2]) - 2}", name)
    name = re.sub(r"res_unit(\d)\.conv(\d)", lambda m: f"unit{m[1]}.block.{2 * int(m[2]) - 1}", name)
    parts = {
        "encoder": ("unit1", "unit2", "unit3", "snake1", "conv1"),
        "decoder": ("snake1", "conv_t1", "unit1", "unit2", "unit3"),
    }
    if match := re.match(r"(encoder|decoder)\.block\.(\d+)\.(\w+)\.", name):
        half, level, part = match.groups()
        if part in parts[half]:
            middle = "block" if half == "encoder" else "model"
            place = parts[half].index(part)
            name = f"{half}.{middle}.{int(level) + 1}.block.{place}.{name[match.end() :]}"
    return name


def as_original(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    levels = len({m[0] for name in tensors if (m := re.match(r"encoder\.block\.\d+", name))})
    return {original_name(name, levels): tensor.contiguous() for name, tensor in tensors.items()}


def folded(network: DacModel) -> dict[str, Tensor]:
    """A network's tensors with weight norm taken out by PyTorch."""
    for module in list(network.modules()):
        if torch.nn.utils.parametrize.is_parametrized(module):
            torch.nn.utils.parametrize.remove_parametrizations(module, "weight")
    return dict(network.state_dict())


def assert_same_weights(loaded: Any, tokenizer: DACTokenizer) -> None:
    assert isinstance(loaded, DACTokenizer)
    assert loaded.config == tokenizer.config
    wanted = tokenizer.state_dict()
    for name, tensor in loaded.state_dict().items():
        torch.testing.assert_close(tensor, wanted[name], rtol=1e-5, atol=1e-7, msg=name)


def test_all_layouts_load_from_files(theirs: DacModel, tokenizer: DACTokenizer, tmp_path: Path) -> None:
    normed = dict(theirs.state_dict())
    original, plain = as_original(normed), folded(reference())
    assert any(name.endswith("weight_g") for name in original)
    kwargs = {"encoder_rates": [2, 3], "sample_rate": 16000, "latent_dim": None}
    torch.save({"state_dict": original, "metadata": {"kwargs": kwargs}}, tmp_path / "weights_16khz.pth")
    assert load_tokenizer(tmp_path / "weights_16khz.pth", "audio").fingerprint == tokenizer.fingerprint
    for i, tensors in enumerate((normed, plain, original, as_original(plain))):
        folder = tmp_path / str(i)
        folder.mkdir()
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / "model.safetensors")
        config = {"sample_rate": 16000} if i > 1 else {"sampling_rate": 16000, "model_type": "dac"}
        (folder / "config.json").write_text(json.dumps(config))
        assert_same_weights(load_foreign(folder), tokenizer)
    theirs.save_pretrained(tmp_path / "saved")
    assert_same_weights(load_foreign(tmp_path / "saved"), tokenizer)


def test_saved_and_loaded_it_is_the_same(tokenizer: DACTokenizer, tmp_path: Path) -> None:
    tokenizer.save_pretrained(tmp_path)
    loaded = load_tokenizer(tmp_path, "audio")
    assert isinstance(loaded, DACTokenizer)
    assert loaded.config == tokenizer.config
    assert loaded.fingerprint == tokenizer.fingerprint
    samples = sound(1, 1, 50)
    assert torch.equal(loaded.decode(loaded.encode(samples)), tokenizer.decode(tokenizer.encode(samples)))


def released(rate: str) -> dict[str, Tensor]:
    with torch.device("meta"):
        return dict(DacModel(DacConfig(**RELEASES[rate])).state_dict())


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout.name)
@pytest.mark.parametrize("rate", RELEASES)
def test_the_released_tensors_are_the_networks(rate: str, layout: Any) -> None:
    manifest = json.loads((MANIFESTS / f"dac-{rate}.json").read_text())
    if layout is TRANSFORMERS:
        manifest = {name: list(tensor.shape) for name, tensor in released(rate).items()}
    tensors = {name: torch.empty(shape, device="meta") for name, shape in manifest.items()}
    assert [other.name for other in LAYOUTS if other.recognise(tensors, {})] == [layout.name]
    config = layout.configure(tensors, {"sampling_rate": RELEASES[rate]["sampling_rate"]})
    expected = DACConfig(
        sample_rate=RELEASES[rate]["sampling_rate"],
        strides=tuple(RELEASES[rate]["downsampling_ratios"]),
        codebooks=RELEASES[rate]["n_codebooks"],
    )
    assert config == expected
    with torch.device("meta"):
        shapes = {name: tensor.shape for name, tensor in DACTokenizer(config).state_dict().items()}
    assert {name: tensor.shape for name, tensor in layout.rename(tensors, config).items()} == shapes
    millions = sum(map(math.prod, shapes.values())) / 1e6
    assert round(millions, 1) == {"16khz": 74.1, "24khz": 74.7, "44khz": 76.6}[rate]


@pytest.mark.parametrize("rate", RELEASES)
def test_the_manifests_are_transformers_own_network_under_its_first_names(rate: str) -> None:
    manifest = json.loads((MANIFESTS / f"dac-{rate}.json").read_text())
    shapes: dict[str, list[int]] = {}
    for name, tensor in as_original(released(rate)).items():
        if name.endswith(".weight") and "codebook" not in name:
            shapes[f"{name}_g"] = [len(tensor), 1, 1]
            name = f"{name}_v"
        shapes[name] = list(tensor.shape)
    assert manifest == shapes


def damaged(theirs: DacModel) -> Iterator[tuple[dict[str, Tensor], dict[str, Any], str]]:
    tensors = dict(theirs.state_dict())
    rate = {"sampling_rate": 16000}
    for name in ("encoder.conv1.bias", "quantizer.quantizers.0.codebook.weight", "decoder.block.1.conv_t1.bias"):
        yield {k: v for k, v in tensors.items() if k != name}, rate, "is missing"
    half = "encoder.conv2.parametrizations.weight.original1"
    yield {k: v for k, v in tensors.items() if k != half}, rate, "tensor 'encoder.4"
    for name in (
        "decoder.more",
        "encoder.block.0.more.alpha",
        "decoder.block.1.res_unit2.more.alpha",
        "quantizer.more",
    ):
        yield {**tensors, name: torch.zeros(1)}, rate, "is extra"
    yield {**tensors, "encoder.conv2.bias": torch.zeros(5)}, rate, "has shape"
    magnitude = "encoder.conv1.parametrizations.weight.original0"
    yield {**tensors, magnitude: torch.zeros(4)}, rate, "does not fit its direction"
    yield {**tensors, magnitude: torch.full((4, 1, 1), math.nan)}, rate, "not finite"
    yield {**tensors, "quantizer.quantizers.0.codebook.weight": torch.zeros(4)}, rate, "not a DAC"
    yield (
        {**tensors, "decoder.block.0.conv_t1.parametrizations.weight.original1": torch.zeros(32, 16, 9)},
        rate,
        "in reve",
    )
    yield tensors, {}, "has no sample rate; put a config.json"
    yield tensors, {"sampling_rate": "16 kHz"}, "sample_rate is '16 kHz'"


def test_other_tensors_are_refused_by_name(theirs: DacModel) -> None:
    for tensors, config, message in damaged(theirs):
        with pytest.raises(PlaitError, match=message) as raised:
            convert(tensors, config, TRANSFORMERS, "here")
        assert "\n" not in str(raised.value)
        assert str(raised.value).startswith("here: ")


def test_other_networks_are_not_taken_for_dac() -> None:
    half = {"encoder.block.0.weight_v": torch.zeros(4, 1, 7)}
    scalar = {"encoder.block.4.weight": torch.zeros(()), "quantizer.quantizers.0.codebook.weight": torch.zeros(1)}
    assert not any(layout.recognise(tensors, {}) for layout in LAYOUTS for tensors in ({}, half, scalar))


@pytest.mark.parametrize(
    "fields",
    [
        {"sample_rate": 0}, {"sample_rate": 44100.0}, {"width": 0}, {"width": 2**12}, {"width": True},
        {"strides": ()}, {"strides": (2, 1)}, {"strides": (2, 1000)}, {"strides": 8}, {"strides": (2,) * 9},
        {"latent_dim": 0}, {"latent_dim": 1 << 40}, {"decoder_width": 24}, {"decoder_width": "wide"},
        {"codebooks": 0}, {"codebooks": 10**6}, {"codebook_size": 1}, {"codebook_size": 1 << 40}, {"code_dim": 0},
    ],
    ids=str,
)  # fmt: skip
def test_an_impossible_configuration_is_refused(fields: dict[str, Any]) -> None:
    with pytest.raises(PlaitError, match=f"^dac: {min(fields)} is"):
        replace(DACConfig(), **fields)


def test_an_unknown_field_is_refused(tokenizer: DACTokenizer, tmp_path: Path) -> None:
    tokenizer.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"hop": 512}))
    with pytest.raises(PlaitError, match="unknown field 'hop'"):
        load_tokenizer(tmp_path)


def test_a_new_network_has_the_configured_shape() -> None:
    config = DACConfig(8000, 2, (2, 2), 6, 8, 1, 16, 3)
    tokenizer = DACTokenizer(config).eval()
    encoded = tokenizer.encode(sound(3, 1, 10))
    assert encoded.codes.shape == (3, 3)  # a single codebook has no axis
    assert tokenizer.decode(encoded).shape == (3, 1, 10)
