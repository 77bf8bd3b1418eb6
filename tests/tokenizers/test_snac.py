import json
import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from snac import SNAC
from snac.layers import NoiseBlock
from torch import Tensor

from plait.errors import PlaitError
from plait.tokenizers import dac
from plait.tokenizers.foreign import convert, load_foreign
from plait.tokenizers.layouts import build_layout
from plait.tokenizers.loading import load_tokenizer
from plait.tokenizers.snac import LAYOUTS, NOISE_BLOCK, Noise, SNACConfig, SNACTokenizer
from plait.tokenizers.streaming import Stream

MANIFESTS = Path(__file__).parents[1] / "data" / "manifests"
(LAYOUT,) = LAYOUTS
# Released configurations, but for their sizes.
RELEASES: dict[str, dict[str, Any]] = {
    "24khz": {
        "sampling_rate": 24000, "encoder_dim": 48, "encoder_rates": [2, 4, 8, 8], "decoder_dim": 1024,
        "decoder_rates": [8, 8, 4, 2], "attn_window_size": None, "codebook_size": 4096, "codebook_dim": 8,
        "vq_strides": [4, 2, 1], "noise": True, "depthwise": True,
    },
    "32khz": {
        "sampling_rate": 32000, "encoder_dim": 64, "encoder_rates": [2, 3, 8, 8], "decoder_dim": 1536,
        "decoder_rates": [8, 8, 3, 2], "attn_window_size": 32, "codebook_size": 4096, "codebook_dim": 8,
        "vq_strides": [8, 4, 2, 1], "noise": True, "depthwise": True,
    },
}  # fmt: skip
PLAIN = {
    "sampling_rate": 24000, "encoder_dim": 8, "encoder_rates": [2, 3], "decoder_dim": 16, "decoder_rates": [3, 2],
    "attn_window_size": None, "codebook_size": 64, "codebook_dim": 4, "vq_strides": [4, 2, 1], "noise": True,
    "depthwise": True,
}  # fmt: skip
WINDOWS = PLAIN | {"encoder_dim": 16, "decoder_dim": 64, "attn_window_size": 6, "vq_strides": [4, 2]}


def sound(*shape: int, seed: int = 0) -> Tensor:
    return 0.3 * torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def reference(config: dict[str, Any]) -> SNAC:
    """The package's network, with weights of which none is at a value that would hide it, and no noise."""
    torch.manual_seed(len(repr(config)))
    network = SNAC(**config).eval().requires_grad_(False)
    tensors = network.state_dict()
    for name, tensor in tensors.items():
        if name.endswith("alpha"):
            tensor.uniform_(0.3, 2)
        elif name.endswith("bias"):
            tensor.normal_(0, 0.1)
        elif name.endswith("norm.weight"):
            tensor.uniform_(0.5, 1.5)
        elif name.endswith("original0"):
            # Branches are quieter, or rounding would grow with depth.
            taps = tensors[name.replace("original0", "original1")].shape[-1]
            is_up = name.startswith("decoder.model.") and name.endswith("block.1.parametrizations.weight.original0")
            loudness = math.sqrt(taps / 4) if is_up else 0.3 if ".block.1." in name or ".block.3." in name else 1
            tensor.uniform_(0.5, 1.1).mul_(loudness)
    residual = network.encoder(network.preprocess(sound(2, 1, 120 * int(network.hop_length), seed=1)))
    for quantizer in network.quantizer.quantizers:
        # The codes of random weights crowd in one corner of a random codebook unless it is spread over the latents.
        pooled = torch.nn.functional.avg_pool1d(residual, quantizer.stride, quantizer.stride)
        seen = quantizer.in_proj(pooled).movedim(1, -1).flatten(0, 1)
        quantizer.codebook.weight.copy_(seen[torch.randint(len(seen), (64,))] + 0.1 * torch.randn(64, 4))
        residual = residual - quantizer(residual)[0]
    for layer in network.modules():
        if isinstance(layer, NoiseBlock):
            layer.forward = lambda x: x
    return network


def ours_of(theirs: SNAC, config: dict[str, Any]) -> SNACTokenizer:
    tokenizer = convert(theirs.state_dict(), config, LAYOUT, "snac")
    assert isinstance(tokenizer, SNACTokenizer)
    return tokenizer


@pytest.fixture(scope="module")
def tokenizer() -> SNACTokenizer:
    return ours_of(reference(PLAIN), PLAIN)


@pytest.fixture(scope="module")
def windowed() -> SNACTokenizer:
    return ours_of(reference(WINDOWS), WINDOWS)


def decided(ours: SNACTokenizer, samples: Tensor) -> Tensor:
    """Of which steps of the encoder no latent lies between two vectors of a codebook, ``[B, T]``."""
    stream = Stream(last=True)
    filled = torch.cat(list(ours._filled([samples])), -1)
    with torch.no_grad():
        return ours.quantizer.margin(ours.to_latents(filled, stream).movedim(1, -1)) > 1e-5


def assert_same_levels(ours: SNACTokenizer, samples: Tensor, levels: list[Tensor], expected: list[Tensor]) -> None:
    sure = decided(ours, samples)
    assert len(levels) == len(expected)
    for level, wanted, stride in zip(levels, expected, ours.config.code_strides, strict=True):
        assert level.shape == wanted.shape
        assert not ((level != wanted) & sure.unflatten(1, (-1, stride)).all(-1)).any()
        assert (level != wanted).float().mean() < 0.01


CONFIGS = {
    "24 kHz": RELEASES["24khz"] | {"encoder_dim": 4, "decoder_dim": 32, "codebook_size": 64, "codebook_dim": 4},
    "32 kHz": RELEASES["32khz"] | {"encoder_dim": 4, "decoder_dim": 64, "codebook_size": 64, "codebook_dim": 4},
    "plain": PLAIN,
    "windows": WINDOWS,
    "not depthwise": WINDOWS | {"depthwise": False, "noise": False, "vq_strides": [3, 3, 1], "attn_window_size": 5},
    "one level": PLAIN | {"vq_strides": [2], "encoder_rates": [5], "decoder_rates": [5], "depthwise": False},
}


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_codes_and_samples_are_those_of_the_package(config: dict[str, Any]) -> None:
    theirs = reference(config)
    ours = ours_of(theirs, config)
    window = int(theirs.hop_length) * math.lcm(config["vq_strides"][0], config["attn_window_size"] or 1)
    for n in (1, window - 1, window, 5 * window + window // 2 + 1):
        samples = sound(2, 1, n, seed=n)
        expected = theirs.encode(samples)
        encoded = ours.encode(samples)
        assert_same_levels(ours, samples, ours.levels(encoded), expected)
        decoded = ours.decode(encoded.codes)
        assert decoded.shape[-1] == -(-n // window) * window
        torch.testing.assert_close(decoded, theirs.decode(ours.levels(encoded)), rtol=0, atol=1e-5)
        assert torch.equal(ours.decode(encoded), decoded[..., :n])
    assert decoded.std() > 0.03
    assert min(len(level.unique()) for level in expected) > 2


def test_a_code_is_followed_by_those_of_its_time(tokenizer: SNACTokenizer) -> None:
    levels = [torch.tensor([[0, 1]]), torch.tensor([[10, 11, 12, 13]]), torch.arange(20, 28)[None]]
    stream = tokenizer.interleaved(levels)
    assert stream.tolist() == [[0, 10, 20, 21, 11, 22, 23, 1, 12, 24, 25, 13, 26, 27]]
    assert all(torch.equal(a, b) for a, b in zip(tokenizer.levels(stream), levels, strict=True))
    with pytest.raises(PlaitError, match=r"levels: have \[2, 4\] codes"):
        tokenizer.interleaved(levels[:2])
    layout = build_layout(tokenizer.layout, 3)
    assert torch.equal(layout.write(stream), stream)
    assert layout.length(1) == tokenizer.codes_per_step == 7


def test_rates_of_the_releases() -> None:
    with torch.device("meta"):
        speech = SNACTokenizer(LAYOUT.configure({}, RELEASES["24khz"]))
        music = SNACTokenizer(LAYOUT.configure({}, RELEASES["32khz"]))
    assert speech.codebook_sizes == [4096] * 3
    assert (speech.factor, speech.codes_per_step, round(speech.bitrate)) == (2048, 7, 984)
    assert (music.factor, music.codes_per_step, round(music.bitrate)) == (3072, 15, 1875)


# Noise


@pytest.mark.parametrize("noisy", [PLAIN, WINDOWS])
def test_with_a_seed_the_noise_is_the_packages_up_to_its_draw(noisy: dict[str, Any]) -> None:
    theirs = reference(noisy)
    ours = ours_of(theirs, noisy)
    encoded = ours.encode(sound(2, 1, 200))
    assert ours.noise_seed is None
    silent = ours.decode(encoded.codes)
    ours.noise_seed = 7
    noises = [layer for layer in ours.modules() if isinstance(layer, Noise)]
    blocks = [layer for layer in theirs.modules() if isinstance(layer, NoiseBlock)]
    for mine, block in zip(noises, blocks, strict=True):
        block.forward = lambda x, b=block, m=mine: x + m.drawn(0, x.shape[-1]) * b.linear(x)
    loud = ours.decode(encoded.codes)
    torch.testing.assert_close(loud, theirs.decode(ours.levels(encoded)), rtol=0, atol=1e-5)
    assert (loud - silent).abs().max() > 0.01
    assert torch.equal(ours.decode(encoded.codes), loud)
    torch.testing.assert_close(ours.decode(encoded.codes[:1]), loud[:1], rtol=0, atol=1e-6)
    ours.noise_seed = 8
    assert (ours.decode(encoded.codes) - loud).abs().max() > 0.01
    ours.noise_seed = None
    assert torch.equal(ours.decode(encoded.codes), silent)
    for wrong in (-1, 1.5, True, "7"):
        with pytest.raises(PlaitError, match=r"^noise_seed: is "):
            ours.noise_seed = wrong


def test_noise_is_normal_and_the_same_from_wherever_it_is_drawn() -> None:
    first, second = Noise(2, 0), Noise(2, 1)
    first.seed = second.seed = 3
    whole = first.drawn(0, 3 * NOISE_BLOCK)
    for start, end in ((0, 5), (NOISE_BLOCK - 3, NOISE_BLOCK + 4), (NOISE_BLOCK, NOISE_BLOCK + 1), (5000, 12000)):
        assert torch.equal(first.drawn(start, end), whole[start:end])
    assert abs(whole.mean()) < 0.05
    assert abs(whole.std() - 1) < 0.05
    others = (second.drawn(0, NOISE_BLOCK), whole[NOISE_BLOCK : 2 * NOISE_BLOCK])
    assert all(abs(torch.corrcoef(torch.stack([whole[:NOISE_BLOCK], other]))[0, 1]) < 0.1 for other in others)


# Streams


@settings(deadline=None, max_examples=20)
@given(
    plan=st.lists(st.integers(1, 60), min_size=1, max_size=10),
    cuts=st.lists(st.integers(1, 20), min_size=1, max_size=30),
    has_windows=st.booleans(),
    seed=st.sampled_from([None, 5]),
)
def test_any_chunks_give_what_one_pass_gives(
    tokenizer: SNACTokenizer,
    windowed: SNACTokenizer,
    plan: list[int],
    cuts: list[int],
    has_windows: bool,
    seed: int | None,
) -> None:
    ours = windowed if has_windows else tokenizer
    samples = sound(2, 1, sum(plan), seed=len(plan))
    encoded = ours.encode(samples)
    codes = torch.cat(list(ours.encode_stream(samples.split(plan, -1))), -1)
    assert_same_levels(ours, samples, ours.levels(codes), ours.levels(encoded))

    ours.noise_seed = seed
    chunks = [part for part in encoded.codes.tensor_split(torch.tensor(cuts).cumsum(0), -1) if part.numel()]
    decoded = torch.cat(list(ours.decode_stream(chunks, encoded.size)), -1)
    assert decoded.shape == samples.shape
    torch.testing.assert_close(decoded, ours.decode(encoded), rtol=0, atol=1e-5)
    ours.noise_seed = None


def remembered(stream: Stream) -> int:
    def numbers(value: Any) -> int:
        if isinstance(value, Tensor):
            return value.untyped_storage().nbytes() // 4
        return sum(map(numbers, value)) if isinstance(value, tuple) else 0

    return sum(map(numbers, stream._memory.values()))


@torch.no_grad()
def test_a_stream_does_not_grow(windowed: SNACTokenizer) -> None:
    down, up, sizes = Stream(), Stream(), []
    windowed.noise_seed = 0
    for i in range(12):
        windowed.from_latents(windowed.to_latents(sound(1, 1, 12 * windowed.factor, seed=i), down), up)
        sizes.append((remembered(down), remembered(up)))
    windowed.noise_seed = None
    assert len(set(sizes[6:])) == 1
    assert 0 < sum(sizes[-1]) < 40000


@pytest.mark.parametrize("n", [1, 5, 6, 23, 24, 25, 72, 73, 100])
def test_what_comes_back_is_as_long_as_what_went_in(n: int, tokenizer: SNACTokenizer, windowed: SNACTokenizer) -> None:
    for ours in (tokenizer, windowed):
        encoded = ours.encode(sound(1, 1, n))
        step = ours.factor * (3 if ours is windowed else 1)
        assert encoded.codes.shape == (1, -(-n // step) * step // ours.factor * ours.codes_per_step)
        assert ours.decode(encoded).shape == (1, 1, n)


def test_whole_steps_that_end_within_a_window_are_decoded(windowed: SNACTokenizer) -> None:
    codes = windowed.encode(sound(1, 1, 500)).codes
    for steps in (1, 2, 4):
        part = codes[:, : steps * windowed.codes_per_step]
        decoded = windowed.decode(part)
        assert decoded.shape == (1, 1, steps * windowed.factor)
        chunks = torch.cat(list(windowed.decode_stream(part.split(2, -1))), -1)
        torch.testing.assert_close(chunks, decoded, rtol=0, atol=1e-6)


def test_lengths_count_codes_and_silence_comes_after_them(tokenizer: SNACTokenizer) -> None:
    samples, lengths = sound(2, 1, 100), torch.tensor([30, 100])
    encoded = tokenizer.encode(samples, lengths)
    assert encoded.lengths is not None
    assert encoded.lengths.tolist() == [14, 35]
    decoded = tokenizer.decode(encoded)
    assert not decoded[0, :, 48:].any()
    assert decoded[0, :, :48].any()
    assert encoded.lengths.tolist() == [14, 35]
    alone = tokenizer.encode(samples[:1, :, :30]).codes
    assert torch.equal(encoded.codes[:1, :7], alone[:, :7])


def test_loudness_comes_back(tokenizer: SNACTokenizer) -> None:
    samples = sound(2, 1, 100) * torch.tensor([0.01, 1])[:, None, None]
    encoded = tokenizer.encode(samples, loudness=-20)
    assert encoded.scale is not None
    torch.testing.assert_close(
        tokenizer.decode(encoded), tokenizer.decode(encoded.codes)[..., :100] * encoded.scale[:, None, None]
    )


@pytest.mark.parametrize(
    ("codes", "message"),
    [
        (torch.zeros(1, 3, 7, dtype=torch.int64), r"codes: shape is \(1, 3, 7\), expected \[B, n\]"),
        (torch.zeros(1, 0, dtype=torch.int64), r"codes: shape is \(1, 0\)"),
        (torch.zeros(1, 10, dtype=torch.int64), "codes: 3 are left over at the end, 7 make a step"),
        (torch.full((1, 7), 64), "codes: found 64..64"),
        (torch.zeros(1, 7), "codes: dtype is torch.float32"),
        ([0] * 7, "codes: is a list"),
    ],
)
def test_other_codes_are_refused(tokenizer: SNACTokenizer, codes: Any, message: str) -> None:
    with pytest.raises(PlaitError, match=message):
        tokenizer.decode(codes)


def test_what_does_not_apply_is_refused(tokenizer: SNACTokenizer, windowed: SNACTokenizer) -> None:
    samples = sound(1, 1, 50)
    with pytest.raises(PlaitError, match="n_codebooks: is 2, SNAC decodes all"):
        tokenizer.encode(samples, n_codebooks=2)
    with pytest.raises(PlaitError, match="bandwidth: SNAC decodes all"):
        tokenizer.encode(samples, bandwidth=1.0)
    assert torch.equal(tokenizer.encode(samples, n_codebooks=3).codes, tokenizer.encode(samples).codes)
    codes = tokenizer.encode(samples).codes
    for size in ((24,), (73,), (0,), (10.0,), 50):
        with pytest.raises(PlaitError, match="^size: "):
            tokenizer.decode(codes, size)
    chunks = [codes[:, :7], codes[:, 7:].repeat(2, 1)]
    with pytest.raises(PlaitError, match=r"codes: a chunk is \(2, 14\)"):
        list(tokenizer.decode_stream(chunks))
    with pytest.raises(PlaitError, match="samples: is a list"):
        list(tokenizer.encode_stream([[0.0]]))


# Files


def test_the_release_loads_from_its_folder(tokenizer: SNACTokenizer, tmp_path: Path) -> None:
    tensors = {name: tensor.contiguous() for name, tensor in reference(PLAIN).state_dict().items()}
    for name, save in (("pytorch_model.bin", torch.save), ("model.safetensors", save_file)):
        folder = tmp_path / name
        folder.mkdir()
        save(tensors, folder / name)
        (folder / "config.json").write_text(json.dumps(PLAIN))
        loaded = load_tokenizer(folder, "audio")
        assert isinstance(loaded, SNACTokenizer)
        assert loaded.config == tokenizer.config
        assert loaded.fingerprint == tokenizer.fingerprint
    (folder / "config.json").unlink()
    with pytest.raises(PlaitError, match=r"config\.json has no 'attn_window_size'; put SNAC's own beside the weights"):
        load_foreign(folder)


def test_saved_and_loaded_it_is_the_same(windowed: SNACTokenizer, tmp_path: Path) -> None:
    windowed.save_pretrained(tmp_path)
    loaded = load_tokenizer(tmp_path, "audio")
    assert isinstance(loaded, SNACTokenizer)
    assert loaded.config == windowed.config
    assert loaded.fingerprint == windowed.fingerprint
    samples = sound(1, 1, 90)
    assert torch.equal(loaded.decode(loaded.encode(samples)), windowed.decode(windowed.encode(samples)))
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"hop": 512}))
    with pytest.raises(PlaitError, match="unknown field 'hop'"):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize(("release", "millions"), [("24khz", 19.8), ("32khz", 54.5)])
def test_the_released_tensors_are_the_networks(release: str, millions: float) -> None:
    manifest = json.loads((MANIFESTS / f"snac-{release}.json").read_text())
    with torch.device("meta"):
        assert manifest == {n: list(t.shape) for n, t in SNAC(**RELEASES[release]).state_dict().items()}
    tensors = {name: torch.empty(shape, device="meta") for name, shape in manifest.items()}
    assert [layout.name for layout in (*dac.LAYOUTS, *LAYOUTS) if layout.recognise(tensors, {})] == ["SNAC"]
    config = LAYOUT.configure(tensors, RELEASES[release])
    if release == "24khz":
        assert config == SNACConfig()
    with torch.device("meta"):
        shapes = {name: tensor.shape for name, tensor in SNACTokenizer(config).state_dict().items()}
    assert {name: tensor.shape for name, tensor in LAYOUT.rename(tensors, config).items()} == shapes
    assert round(sum(map(math.prod, shapes.values())) / 1e6, 1) == millions


def damaged() -> Iterator[tuple[dict[str, Tensor], dict[str, Any], str]]:
    tensors = dict(reference(WINDOWS).state_dict())
    attention, config = "encoder.block.3.to_qkv.weight", WINDOWS
    yield {k: v for k, v in tensors.items() if k != attention}, config, "'encoder.3.to_qkv.weight' is missing"
    yield {**tensors, "decoder.more": torch.zeros(1)}, config, "'decoder.more' is extra"
    yield {**tensors, attention: torch.zeros(2, 64)}, config, "has shape"
    yield {**tensors, attention: torch.full((192, 64), math.nan)}, config, "not finite"
    yield tensors, config | {"attn_window_size": None}, "tensor 'decoder"
    yield tensors, config | {"encoder_rates": [2, 4], "decoder_rates": [4, 2]}, "has shape"
    yield tensors, config | {"decoder_rates": [2, 3]}, "decoder_rates is"
    yield tensors, config | {"latent_dim": 5}, "latent_dim is 5"
    yield tensors, config | {"hop": 3}, "has an unknown field 'hop'"
    yield tensors, {k: v for k, v in config.items() if k != "vq_strides"}, "has no 'vq_strides'"
    yield tensors, config | {"vq_strides": [4, 3]}, "code_strides is"
    yield tensors, config | {"vq_strides": "4"}, "code_strides is"
    yield tensors, config | {"encoder_dim": 1 << 50}, "width is"


def test_other_tensors_are_refused_by_name() -> None:
    for tensors, config, message in damaged():
        with pytest.raises(PlaitError, match=message) as raised:
            convert(tensors, config, LAYOUT, "here")
        assert "\n" not in str(raised.value)
        assert str(raised.value).startswith("here: ")


@pytest.mark.parametrize(
    "fields",
    [
        {"sample_rate": 0}, {"width": 0}, {"width": "48"}, {"strides": ()}, {"strides": (1, 2)},
        {"decoder_width": 1000}, {"code_strides": ()}, {"code_strides": (1, 2)}, {"code_strides": (4, 2, 0)},
        {"code_strides": (4.0, 1)}, {"code_strides": 4}, {"code_strides": (1,) * 17}, {"codebook_size": 1},
        {"codebook_size": 1 << 40}, {"code_dim": 0}, {"window": -1}, {"window": 1 << 40}, {"window": None},
        {"noise": 1}, {"depthwise": "yes"},
    ],
    ids=str,
)  # fmt: skip
def test_an_impossible_configuration_is_refused(fields: dict[str, Any]) -> None:
    with pytest.raises(PlaitError, match=f"^snac: {min(fields)} is"):
        replace(SNACConfig(), **fields)


def test_attention_needs_whole_heads() -> None:
    with pytest.raises(PlaitError, match="^snac: attention has heads of 64 channels, but there are 80"):
        replace(SNACConfig(), width=5, window=4)
