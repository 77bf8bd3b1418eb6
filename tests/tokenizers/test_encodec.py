import json
import re
from collections.abc import Iterator
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import Tensor
from transformers import EncodecConfig, EncodecModel

from plait.errors import PlaitError
from plait.tokenizers.base import Codes
from plait.tokenizers.encodec import LAYOUTS, EnCodecConfig, EnCodecTokenizer
from plait.tokenizers.foreign import convert, load_foreign
from plait.tokenizers.loading import load_tokenizer
from plait.tokenizers.streaming import Stream, whole

MANIFESTS = Path(__file__).parents[1] / "data" / "manifests"
ORIGINAL, TRANSFORMERS = LAYOUTS

TINY: dict[str, Any] = {
    "num_filters": 4, "hidden_size": 12, "codebook_size": 32, "upsampling_ratios": [4, 3, 2], "sampling_rate": 2400,
    "target_bandwidths": [0.5, 1.0, 2.0, 4.0],
}  # fmt: skip
# The 48 kHz release's other settings; segments of 10 steps less 1 sample, 229 samples apart.
STEREO: dict[str, Any] = {
    "audio_channels": 2, "use_causal_conv": False, "norm_type": "time_group_norm", "chunk_length_s": 0.0996,
    "overlap": 0.04, "normalize": True,
}  # fmt: skip
CENTRED: dict[str, Any] = {"use_causal_conv": False, "use_conv_shortcut": False, "upsampling_ratios": [5, 4, 2]}
VARIANTS: dict[str, dict[str, Any]] = {
    "24 kHz": {},
    "48 kHz": STEREO,
    "32 kHz of MusicGen": CENTRED,
    "units": {"num_residual_layers": 3, "dilation_growth_rate": 3, "residual_kernel_size": 5, "compress": 1},
    "identity shortcuts": {"use_conv_shortcut": False, "num_residual_layers": 2},
    "zeros": {"pad_mode": "constant"},
    "trim": {"trim_right_ratio": 0.3, "upsampling_ratios": [5, 3, 1], "num_lstm_layers": 1},
    "kernels": {"kernel_size": 4, "last_kernel_size": 1, "upsampling_ratios": [6]},
    "causal segments": {"chunk_length_s": 0.1, "overlap": 0.6},
    "stereo in one": {"audio_channels": 2},
}


def sound(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * 0.2


@cache
def reference(variant: str) -> EncodecModel:
    """transformers' network, with weights of which none is at a value that would hide it."""
    torch.manual_seed(len(variant))
    network = EncodecModel(EncodecConfig(**(TINY | VARIANTS[variant]))).eval().requires_grad_(False)
    for name, tensor in network.state_dict().items():
        if name.endswith("original0"):
            tensor.mul_(torch.rand_like(tensor) + 0.7)
        elif ".norm." in name:
            tensor.add_(torch.randn_like(tensor) * 0.3)
    # Codebooks as wide as what is left over for them.
    length = network.config.chunk_length or 1000
    latents = network.encoder(sound(4, network.config.audio_channels, length)).transpose(1, 2).flatten(0, 1)
    for i, layer in enumerate(network.quantizer.layers):
        layer.codebook.embed.normal_().mul_(latents.std(0) * 0.7**i).add_(latents.mean(0) * (i == 0))
    return network


@cache
def ours_of(variant: str) -> EnCodecTokenizer:
    theirs = reference(variant)
    tokenizer = convert(theirs.state_dict(), theirs.config.to_dict(), TRANSFORMERS, "transformers")
    assert isinstance(tokenizer, EnCodecTokenizer)
    return tokenizer


def segments_of(config: EncodecConfig, samples: Tensor) -> list[Tensor]:
    stride = config.chunk_stride or samples.shape[-1]
    return [samples[..., i : i + (config.chunk_length or stride)] for i in range(0, samples.shape[-1], stride)]


def encoded_by(theirs: EncodecModel, samples: Tensor, bandwidth: float) -> tuple[list[Tensor], list[Tensor | None]]:
    """Codes and scale of each segment. `EncodecModel.encode` stacks them, and fails if two of them are short."""
    pairs = [theirs._encode_frame(part, bandwidth) for part in segments_of(theirs.config, samples)]
    return [codes.transpose(0, 1).movedim(0, 1) for codes, _ in pairs], [scale for _, scale in pairs]


def decoded_by(theirs: EncodecModel, parts: list[Tensor], scales: list[Tensor | None], length: int) -> Tensor:
    """`EncodecModel.decode` fails if the last segment ends before the one before it; here both end where they do."""
    decoded = [theirs._decode_frame(codes, scale) for codes, scale in zip(parts, scales, strict=True)]
    stride = theirs.config.chunk_stride or 0
    weight = 0.5 - (torch.arange(1, decoded[0].shape[-1] + 1) / (decoded[0].shape[-1] + 1) - 0.5).abs()
    end = max(i * stride + part.shape[-1] for i, part in enumerate(decoded))
    total, weights = torch.zeros(*decoded[0].shape[:2], end), torch.zeros(end)
    for i, part in enumerate(decoded):
        where = slice(i * stride, i * stride + part.shape[-1])
        total[..., where] += part * weight[: part.shape[-1]]
        weights[where] += weight[: part.shape[-1]]
    return (total / weights)[..., :length]


def margin_of(ours: EnCodecTokenizer, samples: Tensor) -> Tensor:
    """How far each step's codes are from others, ``[B, t]``."""
    margins, stride = [], ours.config.segment_stride or samples.shape[-1]
    for start in range(0, samples.shape[-1], stride):
        part = samples[..., start : start + (ours.config.segment or stride)]
        if ours.config.normalize:
            part = part / (part.mean(1, keepdim=True).square().mean(-1, keepdim=True).sqrt() + 1e-8)
        margins.append(ours.quantizer.margin(ours.to_latents(part, whole()).transpose(1, 2)))
    return torch.cat(margins, -1)


@torch.no_grad()
def assert_same_codes(ours: EnCodecTokenizer, samples: Tensor, codes: Tensor, expected: Tensor) -> None:
    """Equal, but for latents that lie between two vectors of a codebook."""
    assert codes.shape == expected.shape
    if not torch.equal(codes, expected):
        assert not ((codes != expected).any(1) & (margin_of(ours, samples) > 1e-5)).any()


LENGTHS = [*range(1, 15), 23, 24, 25, 47, 48, 49, 100, 229, 230, 231, 239, 240, 241, 300, 458, 459, 470, 500, 687, 700]


@pytest.mark.parametrize("variant", VARIANTS)
@torch.no_grad()
def test_codes_and_samples_are_those_of_transformers(variant: str) -> None:
    theirs, ours = reference(variant), ours_of(variant)
    largest, used = 0.0, set()
    for length in LENGTHS if "kHz" in variant else LENGTHS[::4]:
        samples = sound(2, ours.channels, length, seed=length)
        parts, scales = encoded_by(theirs, samples, 4.0)
        encoded = ours.encode(samples)
        assert_same_codes(ours, samples, encoded.codes, torch.cat(parts, -1))
        assert encoded.size == (length,)
        if ours.config.normalize:
            assert encoded.scale is not None
            torch.testing.assert_close(encoded.scale, torch.cat([s for s in scales if s is not None], 1))
        else:
            assert encoded.scale is None
        expected = decoded_by(theirs, parts, scales, length)
        encoded.codes = torch.cat(parts, -1)
        decoded = ours.decode(encoded)
        assert decoded.shape == samples.shape
        torch.testing.assert_close(decoded, expected, rtol=0, atol=1e-5 * max(1.0, float(expected.abs().max())))
        largest = max(largest, float(decoded.abs().max()))
        used |= set(encoded.codes.flatten().tolist())
    assert largest > 0.02
    assert len(used) > 20


@pytest.mark.parametrize("variant", ["24 kHz", "48 kHz"])
@torch.no_grad()
def test_what_transformers_itself_puts_together_is_the_same(variant: str) -> None:
    theirs, ours = reference(variant), ours_of(variant)
    for length in (100, 240, 350, 700):
        samples = sound(2, ours.channels, length, seed=length)
        given = theirs.encode(samples, bandwidth=4.0)
        codes = ours.encode(samples)
        expected = torch.cat(list(given.audio_codes), -1)[..., : codes.codes.shape[-1]]
        assert_same_codes(ours, samples, codes.codes, expected)
        codes.codes = expected
        decoded = theirs.decode(
            given.audio_codes, given.audio_scales, last_frame_pad_length=given.last_frame_pad_length
        )
        torch.testing.assert_close(ours.decode(codes), decoded.audio_values[..., :length], rtol=0, atol=1e-5)


@pytest.mark.parametrize("variant", ["24 kHz", "48 kHz"])
@torch.no_grad()
def test_fewer_codebooks_by_number_and_by_bandwidth(variant: str) -> None:
    theirs, ours = reference(variant), ours_of(variant)
    samples = sound(2, ours.channels, 333)
    every = ours.encode(samples).codes
    for bandwidth, count in ((0.5, 1), (1.0, 2), (2.0, 4), (4.0, 8)):
        assert theirs.quantizer.get_num_quantizers_for_bandwidth(bandwidth) == count
        parts, scales = encoded_by(theirs, samples, bandwidth)
        codes = ours.encode(samples, bandwidth=bandwidth)
        assert_same_codes(ours, samples, codes.codes, torch.cat(parts, -1))
        assert torch.equal(codes.codes, every[:, :count])
        assert torch.equal(codes.codes, ours.encode(samples, n_codebooks=count).codes)
        codes.codes = torch.cat(parts, -1)
        torch.testing.assert_close(ours.decode(codes), decoded_by(theirs, parts, scales, 333), rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("settings", "bandwidths"),
    [({}, [1.5, 3.0, 6.0, 12.0, 24.0]), (STEREO | {"sampling_rate": 48000}, [3.0, 6.0, 12.0, 24.0])],
)
def test_released_bandwidths_pay_for_as_many_codebooks(settings: dict[str, Any], bandwidths: list[float]) -> None:
    config = EncodecConfig(**settings, target_bandwidths=bandwidths)
    with torch.device("meta"):
        theirs = EncodecModel(config)
        ours = EnCodecTokenizer(TRANSFORMERS.configure({}, config.to_dict()))
    assert len(ours.codebook_sizes) == len(theirs.quantizer.layers)
    for bandwidth in bandwidths:
        assert ours.codebooks_of(bandwidth) == theirs.quantizer.get_num_quantizers_for_bandwidth(bandwidth)


# Streams


PLANS = st.tuples(st.integers(1, 700), st.lists(st.integers(1, 699), max_size=12), st.integers(1, 2))


@pytest.mark.parametrize(
    "variant", ["24 kHz", "48 kHz", "32 kHz of MusicGen", "identity shortcuts", "zeros", "trim", "causal segments"]
)
@settings(deadline=None, max_examples=12)
@given(plan=PLANS)
def test_streams_of_any_chunks(variant: str, plan: tuple[int, list[int], int]) -> None:
    ours, (length, cuts, batch) = ours_of(variant), plan
    samples = sound(batch, ours.channels, length, seed=length)
    encoded = ours.encode(samples)
    assert encoded.codes.shape == (batch, len(ours.codebook_sizes), ours.steps_of(length))
    pieces = torch.tensor_split(samples, sorted({cut for cut in cuts if cut < length}), -1)
    streamed = list(ours.encode_scaled(iter(pieces)))
    assert_same_codes(ours, samples, torch.cat([codes for codes, _ in streamed], -1), encoded.codes)
    if encoded.scale is not None:
        torch.testing.assert_close(torch.cat([s for _, s in streamed if s is not None], 1), encoded.scale)
    steps = encoded.codes.shape[-1]
    pieces = torch.tensor_split(encoded.codes, sorted({cut for cut in cuts if cut < steps}), -1)
    decoded = torch.cat(list(ours.decode_stream(iter(pieces), (length,), encoded.scale)), -1)
    torch.testing.assert_close(decoded, ours.decode(encoded), rtol=0, atol=1e-5)


@pytest.mark.parametrize("variant", ["24 kHz", "32 kHz of MusicGen", "trim", "identity shortcuts"])
@settings(deadline=None, max_examples=15)
@given(plan=PLANS)
def test_the_passes_alone_take_any_chunks(variant: str, plan: tuple[int, list[int], int]) -> None:
    ours, (length, cuts, batch) = ours_of(variant), plan
    with torch.no_grad():
        samples = sound(batch, ours.channels, length, seed=length)
        z = ours.to_latents(samples, whole())
        assert z.shape == (batch, 12, -(-length // ours.factor))
        stream, given_now = Stream(), []
        pieces = torch.tensor_split(samples, sorted({cut for cut in cuts if cut < length}), -1)
        for i, piece in enumerate(pieces, 1):
            stream.last = i == len(pieces)
            given_now.append(ours.to_latents(piece, stream))
        torch.testing.assert_close(torch.cat(given_now, -1), z, rtol=0, atol=1e-5)
        decoded = ours.from_latents(z, whole())
        assert decoded.shape[-1] == z.shape[-1] * ours.factor
        stream, given_now = Stream(), []
        pieces = torch.tensor_split(z, sorted({cut for cut in cuts if cut < z.shape[-1]}), -1)
        for i, piece in enumerate(pieces, 1):
            stream.last = i == len(pieces)
            given_now.append(ours.from_latents(piece, stream))
        torch.testing.assert_close(torch.cat(given_now, -1), decoded, rtol=0, atol=1e-5)


def test_causal_codes_come_with_their_samples() -> None:
    # Only the beginning is mirrored, and so must be known: for the last convolution, seven steps of it.
    for variant, first in (("24 kHz", 7), ("zeros", 1)):
        ours = ours_of(variant)
        parts = list(ours.encode_stream(iter(sound(1, 1, 20 * ours.factor).split(ours.factor, -1))))
        assert [part.shape[-1] for part in parts] == [first] + [1] * (20 - first)


@pytest.mark.parametrize("variant", ["24 kHz", "32 kHz of MusicGen"])
@torch.no_grad()
def test_what_is_remembered_does_not_grow(variant: str) -> None:
    def numbers(value: Any) -> int:
        if isinstance(value, Tensor):
            return value.untyped_storage().nbytes()
        return sum(map(numbers, value)) if isinstance(value, tuple) else 0

    ours, stream = ours_of(variant), Stream()
    sizes = []
    for i in range(12):
        z = ours.to_latents(sound(1, 1, 10 * ours.factor, seed=i), stream)
        ours.from_latents(z, stream)
        sizes.append(sum(map(numbers, stream._memory.values())))
    assert sizes[-1] == sizes[5] > 0


@torch.no_grad()
def test_pieces_on_a_cpu_are_one_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    for variant in ("24 kHz", "32 kHz of MusicGen"):
        ours, samples = ours_of(variant), sound(2, 1, 333)
        z = ours.to_latents(samples, whole())
        decoded = ours.from_latents(z, whole())
        for numbers in (1, 100, 1000):
            monkeypatch.setattr("plait.tokenizers.encodec.NUMBERS_AT_ONCE", numbers)
            torch.testing.assert_close(ours.to_latents(samples, whole()), z, rtol=0, atol=1e-5)
            torch.testing.assert_close(ours.from_latents(z, whole()), decoded, rtol=0, atol=1e-5)
        monkeypatch.undo()


# Lengths, loudness


@pytest.mark.parametrize("variant", ["24 kHz", "48 kHz", "causal segments"])
@settings(deadline=None, max_examples=30)
@given(length=st.integers(1, 5000))
def test_steps_and_samples_count(variant: str, length: int) -> None:
    ours = ours_of(variant)
    steps = ours.steps_of(length)
    if ours.config.segment:
        starts = range(0, length, ours.config.segment_stride)
        assert steps == sum(-(-min(ours.config.segment, length - start) // ours.factor) for start in starts)
    else:
        assert steps == -(-length // ours.factor)
    assert ours.samples_of(steps) >= length


@pytest.mark.parametrize("variant", ["24 kHz", "48 kHz"])
def test_ragged_batches(variant: str) -> None:
    ours = ours_of(variant)
    samples = sound(3, ours.channels, 700)
    lengths = torch.tensor([700, 300, 5])
    encoded = ours.encode(samples, lengths=lengths)
    assert encoded.lengths is not None
    assert encoded.lengths.tolist() == [ours.steps_of(n) for n in lengths.tolist()]
    silenced = samples.clone()
    for item, length in zip(silenced, lengths.tolist(), strict=True):
        item[:, length:] = 0
    assert torch.equal(encoded.codes, ours.encode(silenced).codes)
    decoded = ours.decode(encoded)
    for item, steps in zip(decoded, encoded.lengths.tolist(), strict=True):
        assert not item[:, ours.samples_of(steps) :].any()
        assert item[:, : ours.factor].any()


def test_the_loudness_of_every_segment_comes_back() -> None:
    ours = ours_of("48 kHz")
    samples = sound(1, 2, 600)
    samples[..., 229:458] *= 10
    encoded = ours.encode(samples)
    assert encoded.scale is not None
    assert encoded.scale.shape == (1, 3)
    assert encoded.scale[0, 1] > 5 * encoded.scale[0, 0]
    louder = ours.encode(samples * 4)
    torch.testing.assert_close(louder.scale, encoded.scale * 4)
    torch.testing.assert_close(ours.decode(louder), ours.decode(replace(encoded, codes=louder.codes)) * 4)
    levelled = ours.encode(samples, loudness=-20)
    torch.testing.assert_close(levelled.scale, encoded.scale)
    assert ours.encode(torch.zeros(1, 2, 300)).scale.max() < 1e-7  # type: ignore[union-attr]


def test_codes_of_segments_survive_a_file(tmp_path: Path) -> None:
    ours = ours_of("48 kHz")
    encoded = ours.encode(sound(1, 2, 500))
    encoded.save(tmp_path / "codes.safetensors")
    assert torch.equal(ours.decode(Codes.load(tmp_path / "codes.safetensors")), ours.decode(encoded))


def test_bare_codes_of_segments_decode_at_loudness_one() -> None:
    ours = ours_of("48 kHz")
    encoded = ours.encode(sound(1, 2, 600))
    assert encoded.scale is not None
    decoded = ours.decode(encoded.codes)
    assert decoded.shape[-1] == ours.samples_of(encoded.codes.shape[-1]) >= 600
    ones = replace(encoded, scale=torch.ones_like(encoded.scale))
    torch.testing.assert_close(decoded[..., :600], ours.decode(ones))


@pytest.mark.parametrize(
    ("scale", "message"),
    [
        (torch.ones(1, 2), "expected one for each"),
        (torch.ones(2, 3), "scale: must hold"),
        (torch.ones(1, 4), "4 segments"),
    ],
)
def test_scales_of_other_segments_are_refused(scale: Tensor, message: str) -> None:
    ours = ours_of("48 kHz")
    encoded = ours.encode(sound(1, 2, 600))
    with pytest.raises(PlaitError, match=message):
        ours.decode(replace(encoded, scale=scale))


@pytest.mark.parametrize("variant", ["24 kHz", "48 kHz"])
def test_what_cannot_be_encoded_or_decoded_is_refused(variant: str) -> None:
    ours = ours_of(variant)
    for samples, message in (
        (sound(300), "shape is"), (sound(1, 3, 300), "shape is"), (sound(1, ours.channels, 0), "shape is"),
        (torch.ones(1, ours.channels, 9, dtype=torch.int16), "dtype"),
        (torch.full((1, ours.channels, 9), torch.nan), "not finite"),
    ):  # fmt: skip
        with pytest.raises(PlaitError, match=message):
            ours.encode(samples)
    encoded = ours.encode(sound(1, ours.channels, 300))
    for size in ((299 + ours.factor,), (30,), (9000,)):
        with pytest.raises(PlaitError, match="do not fit" if encoded.scale is None else "do not fit|scale: "):
            ours.decode(encoded, size=size)
    for codes, message in (
        (encoded.codes[0], "shape is"), (encoded.codes + 32, "found"), (encoded.codes.float(), "dtype"),
        (encoded.codes.repeat(1, 2, 1), "has 16 codebooks"),
    ):  # fmt: skip
        with pytest.raises(PlaitError, match=message):
            ours.decode(codes)
    with pytest.raises(PlaitError, match="n_codebooks"):
        ours.encode(sound(1, ours.channels, 300), n_codebooks=9)


# Training, files


@pytest.mark.parametrize("variant", ["24 kHz", "48 kHz", "identity shortcuts"])
def test_gradients_reach_both_ends_and_are_those_of_transformers(variant: str) -> None:
    theirs, fresh = reference(variant), EnCodecTokenizer(ours_of(variant).config)
    fresh.load_state_dict(ours_of(variant).state_dict())
    samples = sound(1, fresh.channels, 239)
    fresh.from_latents(fresh.to_latents(samples, whole()), whole()).square().mean().backward()
    assert not [name for name, p in fresh.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
    bias = theirs.encoder.layers[0].conv.bias
    bias.requires_grad_(True)
    theirs.decoder(theirs.encoder(samples)).square().mean().backward()
    first = fresh.encoder[0].bias
    assert isinstance(first, Tensor)
    torch.testing.assert_close(first.grad, bias.grad)
    bias.requires_grad_(False)


def test_saved_and_loaded_it_is_the_same(tmp_path: Path) -> None:
    for variant in ("24 kHz", "48 kHz"):
        tokenizer = ours_of(variant)
        tokenizer.save_pretrained(tmp_path / variant)
        loaded = load_tokenizer(tmp_path / variant, "audio")
        assert isinstance(loaded, EnCodecTokenizer)
        assert loaded.config == tokenizer.config
        assert loaded.fingerprint == tokenizer.fingerprint
        samples = sound(1, tokenizer.channels, 500)
        assert torch.equal(loaded.encode(samples).codes, tokenizer.encode(samples).codes)


# Released layouts


def original_name(name: str, transposed: set[str]) -> str:
    """The name in the original release of a tensor of transformers'."""
    name = name.replace("parametrizations.weight.original0", "weight_g")
    name = name.replace("parametrizations.weight.original1", "weight_v")
    layer = ".".join(name.split(".")[:3])
    wrapper = "convtr" if layer in transposed else "conv"
    name = re.sub(r"\.conv\.(?=weight|bias)", f".{wrapper}.{wrapper}.", name)
    name = name.replace(".norm.", f".{wrapper}.norm.").replace("quantizer.layers", "quantizer.vq.layers")
    return name.replace(".codebook.", "._codebook.").replace("coder.layers.", "coder.model.")


def as_original(theirs: EncodecModel, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    kinds = dict(theirs.decoder.layers.named_children())
    transposed = {
        f"decoder.layers.{i}" for i, layer in kinds.items() if type(layer).__name__ == "EncodecConvTranspose1d"
    }
    assert transposed
    return {original_name(name, transposed): tensor for name, tensor in tensors.items()}


def old_style(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Weight norm's names of before PyTorch's parametrizations."""
    ends = {"parametrizations.weight.original0": "weight_g", "parametrizations.weight.original1": "weight_v"}
    return {re.sub("parametrizations.*", lambda m: ends[m[0]], name): tensor for name, tensor in tensors.items()}


@pytest.mark.parametrize("variant", ["24 kHz", "48 kHz", "32 kHz of MusicGen"])
@pytest.mark.parametrize("layout", ["original", "transformers", "older transformers", "MusicGen"])
def test_every_layout_loads_from_files(layout: str, variant: str, tmp_path: Path) -> None:
    theirs, tokenizer = reference(variant), ours_of(variant)
    tensors = {name: tensor.clone() for name, tensor in theirs.state_dict().items()}
    config = theirs.config.to_dict()
    if layout == "transformers":
        theirs.save_pretrained(tmp_path)
    else:
        if layout == "original":
            torch.save(as_original(theirs, tensors), tmp_path / "encodec.th")
        elif layout == "older transformers":
            save_file(old_style(tensors), tmp_path / "model.safetensors")
        else:
            whole_model = {f"audio_encoder.{name}": tensor for name, tensor in tensors.items()}
            whole_model |= {
                "decoder.model.decoder.layers.0.fc1.weight": torch.zeros(2, 2),
                "text.weight": torch.zeros(2),
            }
            save_file(whole_model, tmp_path / "model.safetensors")
            config = {"model_type": "musicgen", "audio_encoder": config}
        (tmp_path / "config.json").write_text(json.dumps(config | {"of_a_later_version": {"a": 1}}))
    loaded = load_tokenizer(tmp_path)
    assert isinstance(loaded, EnCodecTokenizer)
    assert loaded.config == tokenizer.config
    assert loaded.fingerprint == tokenizer.fingerprint
    samples = sound(1, tokenizer.channels, 500)
    assert torch.equal(loaded.decode(loaded.encode(samples)), tokenizer.decode(tokenizer.encode(samples)))


RELEASES = {
    "encodec-24khz": {},
    "encodec-48khz": STEREO | {"sampling_rate": 48000, "chunk_length_s": 1.0, "overlap": 0.01},
}


@pytest.mark.parametrize("suffix", ["", "-transformers"])
@pytest.mark.parametrize("release", RELEASES)
def test_the_released_tensors_are_the_networks(release: str, suffix: str) -> None:
    config = EncodecConfig(**RELEASES[release])
    with torch.device("meta"):
        network = EncodecModel(config)
    released = network.state_dict()
    released = released if suffix else as_original(network, released)
    manifest = json.loads((MANIFESTS / f"{release}{suffix}.json").read_text())
    assert manifest == {name: list(tensor.shape) for name, tensor in released.items()}
    layout = TRANSFORMERS if suffix else ORIGINAL
    tensors = {name: torch.empty(shape, device="meta") for name, shape in manifest.items()}
    assert [other.name for other in LAYOUTS if other.recognise(tensors, {})] == [layout.name]
    # The releases are told from each other by their tensors, and transformers' config.json says the same.
    ours = layout.configure(tensors, {})
    assert ours == layout.configure(tensors, config.to_dict())
    assert (ours.sample_rate, ours.codebooks, ours.segment, ours.segment_stride) == (
        (24000, 32, 0, 0) if release == "encodec-24khz" else (48000, 16, 48000, 47520)
    )
    with torch.device("meta"):
        tokenizer = EnCodecTokenizer(ours)
    assert sum(p.numel() for p in tokenizer.parameters()) + tokenizer.quantizer.codebooks.numel() > 14e6
    expected = {name: tensor.shape for name, tensor in tokenizer.state_dict().items()}
    assert {name: tensor.shape for name, tensor in layout.rename(tensors, ours).items()} == expected


def damaged() -> Iterator[tuple[dict[str, Tensor], dict[str, Any], str]]:
    theirs = reference("24 kHz")
    tensors, config = theirs.state_dict(), theirs.config.to_dict()
    for name in ("encoder.layers.0.conv.bias", "quantizer.layers.7.codebook.embed", "decoder.layers.1.lstm.bias_hh_l1"):
        yield {k: v for k, v in tensors.items() if k != name}, config, "is missing"
    for name in ("encoder.layers.0.conv.parametrizations.weight.original0",):
        yield {k: v for k, v in tensors.items() if k != name}, config, "is missing"
    for name in ("decoder.more", "quantizer.layers.8.codebook.embed", "encoder.layers.0.norm.weight"):
        yield tensors | {name: torch.zeros(1)}, config, "is extra"
    yield tensors | {"encoder.layers.0.conv.bias": torch.zeros(5)}, config, "has shape"
    yield tensors | {"encoder.layers.0.conv.bias": torch.full((4,), torch.nan)}, config, "not finite"
    yield tensors, {}, "encodec|EnCodec"  # of no released size
    for fields, message in (
        ({"num_filters": 8}, "has shape"),
        ({"upsampling_ratios": [4, 2, 3]}, "has shape"),
        ({"norm_type": "batch_norm"}, "norm_type is 'batch_norm'"),
        ({"pad_mode": "circular"}, "pad_mode is 'circular'"),
        ({"codebook_dim": 7}, "codebook_dim is 7"),
        ({"target_bandwidths": []}, "target_bandwidths is"),
        ({"target_bandwidths": [1e9]}, "target_bandwidths ends with"),
        ({"target_bandwidths": ["a"]}, "target_bandwidths is"),
        ({"chunk_length_s": "1"}, "chunk_length_s is"),
        ({"chunk_length_s": float("inf")}, "chunk_length_s is"),
        ({"chunk_length_s": 1.0}, "overlap is None"),
        ({"chunk_length_s": 1.0, "overlap": 1.0}, "overlap is 1.0"),
        ({"chunk_length_s": 1.0, "overlap": 0.1, "sampling_rate": "fast"}, "sample_rate is 'fast'"),
        ({"upsampling_ratios": 320}, "strides is 320"),
        ({"normalize": True}, "normalize is true but segment is 0"),
        ({"norm_type": "time_group_norm"}, "group_norm is true but segment is 0"),
        ({"num_filters": 10**9}, "width is 1000000000"),
        ({"num_residual_layers": 10**9}, "blocks is 1000000000"),
        ({"num_lstm_layers": 10**9}, "lstm_layers is 1000000000"),
        ({"hidden_size": 10**12, "codebook_dim": None}, "dim is 1000000000000"),
        ({"codebook_size": 2**40}, "codebook_size is"),
    ):
        yield tensors, config | fields, message


def test_other_tensors_and_settings_are_refused_by_name() -> None:
    for tensors, config, message in damaged():
        with pytest.raises(PlaitError, match=message) as raised:
            convert(tensors, config, TRANSFORMERS, "here")
        assert str(raised.value).startswith("here: ")
        assert "\n" not in str(raised.value)


def test_other_networks_are_not_taken_for_encodec(tmp_path: Path) -> None:
    mimi = {"quantizer.rvq_first.vq.layers.0._codebook.embedding_sum": torch.zeros(1)}
    mimi |= {"quantizer.semantic_residual_vector_quantizer.layers.0.codebook.embed_sum": torch.zeros(1)}
    assert not any(layout.recognise(tensors, {}) for layout in LAYOUTS for tensors in ({}, mimi))
    save_file(mimi | {"weight": torch.zeros(1)}, tmp_path / "model.safetensors")
    with pytest.raises(PlaitError):
        load_foreign(tmp_path)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"sample_rate": 24000.0}, "sample_rate is 24000.0"),
        ({"channels": 3}, "channels is 3"),
        ({"codebooks": 1}, "codebooks is 1"),
        ({"codebooks": 10**6}, "codebooks is 1000000"),
        ({"width": 0}, "width is 0"),
        ({"width": 2**13}, "width is 8192"),
        ({"width": "32"}, "width is '32'"),
        ({"strides": ()}, "strides is"),
        ({"strides": (2, 0)}, "strides is"),
        ({"strides": (2,) * 9}, "strides is"),
        ({"compress": 33}, "compress is 33"),
        ({"kernel": True}, "kernel is True"),
        ({"blocks": 16, "dilation_growth": 16}, "dilation_growth is 16"),
        ({"causal": 1}, "causal is 1"),
        ({"trim_right": 2.0}, "trim_right is 2.0"),
        ({"trim_right": 0.5, "causal": False}, "trim_right is 0.5"),
        ({"segment": 100}, "segment_stride is 0"),
        ({"segment": 100, "segment_stride": 101}, "segment_stride is 101"),
        ({"group_norm": True}, "group_norm is true"),
    ],
    ids=str,
)
def test_an_impossible_configuration_is_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(PlaitError, match=message):
        replace(EnCodecConfig(), **fields)
