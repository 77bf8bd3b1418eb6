import copy
import json
import math
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from plait.errors import PlaitError
from plait.tokenizers.audio import AudioConfig, AudioTokenizer, HalfConfig
from plait.tokenizers.base import Codes
from plait.tokenizers.loading import load_tokenizer
from plait.tokenizers.quantizer import QuantizerConfig
from plait.tokenizers.streaming import Chain, whole

SPECTRA = HalfConfig(hop=40, window=160, widths=(12, 16), strides=(2,), blocks=(1, 1))
SAMPLES = HalfConfig(hop=1, window=0, widths=(4, 8, 8), strides=(8, 10), blocks=(1, 2, 0))
RVQ = QuantizerConfig(kind="rvq", codebook_size=16, dim=4, codebooks=3)
CONFIGS = {
    "fsq": AudioConfig(encoder=SAMPLES, decoder=replace(SPECTRA, causal=False)),
    "rvq": AudioConfig(encoder=SAMPLES, decoder=SAMPLES, quantizer=RVQ),
    "spectra": AudioConfig(encoder=replace(SPECTRA, causal=False), decoder=SPECTRA, quantizer=RVQ),
    "stereo": AudioConfig(sample_rate=44100, channels=2, encoder=SAMPLES, decoder=replace(SAMPLES, causal=False)),
}


def build(config: AudioConfig) -> AudioTokenizer:
    torch.manual_seed(0)
    tokenizer = AudioTokenizer(config).eval().requires_grad_(False)
    last = tokenizer.encoder[-1]
    last.weight *= 30  # else nearly all latents of random weights have one code
    return tokenizer


TOKENIZERS = {name: build(config) for name, config in CONFIGS.items()}


@pytest.fixture(params=TOKENIZERS)
def tokenizer(request: pytest.FixtureRequest) -> AudioTokenizer:
    return TOKENIZERS[request.param]


def sound(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * 0.2


def assert_same_codes(tokenizer: AudioTokenizer, samples: Tensor, a: Tensor, b: Tensor) -> None:
    """Equal, but where a latent lies between two codes."""
    assert a.shape == b.shape
    if not torch.equal(a, b):
        z = tokenizer.to_latents(tokenizer._pad(samples), whole())
        margin = tokenizer.quantizer.margin(z.mT)
        differ = (a != b) if a.ndim == 2 else (a != b).any(1)
        assert margin[differ].max() < 1e-5


@settings(deadline=None, max_examples=40)
@given(name=st.sampled_from(sorted(CONFIGS)), length=st.integers(1, 1000), batch=st.integers(1, 2))
def test_any_length_comes_back(name: str, length: int, batch: int) -> None:
    tokenizer = TOKENIZERS[name]
    samples = sound(batch, tokenizer.channels, length)
    encoded = tokenizer.encode(samples)
    q = len(tokenizer.codebook_sizes)
    assert tokenizer.factor == 80
    assert encoded.codes.shape == (batch, *([q] if q > 1 else []), math.ceil(length / 80))
    assert encoded.codes.dtype == torch.int64
    assert (encoded.modality, encoded.size, encoded.sample_rate) == ("audio", (length,), tokenizer.sample_rate)
    assert encoded.fingerprint == tokenizer.fingerprint
    decoded = tokenizer.decode(encoded)
    assert decoded.shape == samples.shape
    assert decoded.dtype == torch.float32
    assert torch.equal(decoded, tokenizer.decode(encoded.codes, size=(length,)))
    assert torch.equal(decoded, tokenizer.decode(encoded.codes)[..., :length])


def test_every_length_to_ten_seconds_comes_back(tokenizer: AudioTokenizer) -> None:
    for length in (1, 2, 79, 80, 81, 159, 16000, 77777, 10 * tokenizer.sample_rate - 1, 10 * tokenizer.sample_rate):
        samples = sound(1, tokenizer.channels, length)
        assert tokenizer.decode(tokenizer.encode(samples)).shape == samples.shape


@settings(deadline=None, max_examples=40)
@given(
    name=st.sampled_from(sorted(CONFIGS)),
    sizes=st.lists(st.integers(1, 700), min_size=1, max_size=8),
    steps=st.lists(st.integers(1, 9), min_size=1, max_size=8),
)
def test_chunk_plans_agree(name: str, sizes: list[int], steps: list[int]) -> None:
    tokenizer = TOKENIZERS[name]
    samples = sound(2, tokenizer.channels, sum(sizes))
    one_pass = tokenizer.encode(samples).codes
    in_chunks = torch.cat(list(tokenizer.encode_stream(samples.split(sizes, -1))), -1)
    assert_same_codes(tokenizer, samples, in_chunks, one_pass)

    cuts = [0, *(min(sum(steps[:i]), one_pass.shape[-1]) for i in range(1, len(steps) + 1)), one_pass.shape[-1]]
    parts = [one_pass[..., a:b] for a, b in pairwise(cuts) if b > a]
    decoded = torch.cat(list(tokenizer.decode_stream(parts, (sum(sizes),))), -1)
    torch.testing.assert_close(decoded, tokenizer.decode(one_pass, (sum(sizes),)), atol=1e-5, rtol=0)


def test_causal_encoders_do_not_look_ahead() -> None:
    for name in ("fsq", "rvq", "stereo"):
        tokenizer = TOKENIZERS[name]
        samples = sound(1, tokenizer.channels, 1600)
        later = samples.clone()
        later[..., 800:] = 0.5
        assert torch.equal(tokenizer.encode(later).codes[..., :10], tokenizer.encode(samples).codes[..., :10])
        assert not torch.equal(tokenizer.encode(later).codes, tokenizer.encode(samples).codes)


def test_a_batch_is_its_items() -> None:
    for name in ("fsq", "rvq", "stereo"):  # causal ones; the others see that silence follows
        tokenizer = TOKENIZERS[name]
        samples = sound(2, tokenizer.channels, 900)
        together = tokenizer.encode(samples, lengths=torch.tensor([900, 500]))
        assert together.lengths is not None
        assert together.lengths.tolist() == [12, 7]
        for item, length, steps in ((0, 900, 12), (1, 500, 7)):
            alone = tokenizer.encode(samples[item : item + 1, :, :length])
            assert_same_codes(
                tokenizer,
                samples[item : item + 1, :, :length],
                together.codes[item : item + 1, ..., :steps],
                alone.codes,
            )
        decoded = tokenizer.decode(together)
        assert not decoded[1, :, 560:].any()
        assert decoded[1, :, :560].any()


def test_loudness_is_taken_out_and_put_back() -> None:
    tokenizer = TOKENIZERS["spectra"]
    samples = torch.cat([sound(1, 1, 800), sound(1, 1, 800) * 0.01, torch.zeros(1, 1, 800)])
    encoded = tokenizer.encode(samples, loudness=-20)
    assert encoded.scale is not None
    rms = samples.square().mean((1, 2)).sqrt()
    torch.testing.assert_close(encoded.scale[:2], rms[:2] / 0.1)
    assert encoded.scale[2] == 1
    assert torch.equal(encoded.codes[0], encoded.codes[1])
    torch.testing.assert_close(tokenizer.decode(encoded)[1], tokenizer.decode(encoded)[0] * 0.01, atol=1e-6, rtol=1e-3)


def test_bandwidth_pays_for_codebooks() -> None:
    tokenizer = TOKENIZERS["rvq"]  # 200 steps a second, 4 bits each
    assert tokenizer.frame_rate == 200
    assert tokenizer.bitrate == 2400
    samples = sound(1, 1, 800)
    full = tokenizer.encode(samples).codes
    for bandwidth, count in ((0.1, 1), (0.8, 1), (1.59, 1), (1.6, 2), (2.4, 3), (99, 3)):
        codes = tokenizer.encode(samples, bandwidth=bandwidth).codes
        assert codes.shape == (1, count, 10)
        assert torch.equal(codes, full[:, :count])
        assert torch.equal(codes, tokenizer.encode(samples, n_codebooks=count).codes)
        assert tokenizer.decode(codes).shape == (1, 1, 800)


def test_stereo_is_middle_and_side() -> None:
    tokenizer = TOKENIZERS["stereo"]
    samples = sound(1, 2, 800)
    seen: list[Tensor] = []
    handle = tokenizer.encoder[0].register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    tokenizer.encode(samples)
    handle.remove()
    torch.testing.assert_close(seen[0][0, 0], samples[0].mean(0))
    torch.testing.assert_close(seen[0][0, 1], (samples[0, 0] - samples[0, 1]) / 2)
    decoder = copy.deepcopy(tokenizer)
    decoder.decoder = Chain()
    z = sound(1, 2, 7)
    left_right = torch.stack([z[:, 0] + z[:, 1], z[:, 0] - z[:, 1]], 1)
    torch.testing.assert_close(decoder.from_latents(z, whole()), left_right)


@pytest.mark.parametrize("name", CONFIGS)
def test_training_pass_reaches_all_weights(name: str) -> None:
    tokenizer = AudioTokenizer(CONFIGS[name])
    samples = sound(2, tokenizer.channels, 1000)
    reconstruction, quantized = tokenizer(samples)
    assert reconstruction.shape == samples.shape
    (reconstruction.square().mean() + sum(quantized.losses.values())).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in tokenizer.parameters())
    assert tokenizer.last_layer.grad is not None
    tokenizer.eval()
    with torch.no_grad():
        reconstruction, quantized = tokenizer(samples)
    encoded = tokenizer.encode(samples)
    codes = quantized.codes if quantized.codes.ndim == 2 else quantized.codes.mT
    assert torch.equal(codes, encoded.codes)
    torch.testing.assert_close(reconstruction, tokenizer.decode(encoded), atol=1e-5, rtol=0)


def test_saved_and_loaded(tokenizer: AudioTokenizer, tmp_path: Path) -> None:
    tokenizer.save_pretrained(tmp_path)
    samples = sound(1, tokenizer.channels, 500)
    loaded = load_tokenizer(tmp_path, "audio")
    assert isinstance(loaded, AudioTokenizer)
    assert loaded.config == tokenizer.config
    assert torch.equal(loaded.encode(samples).codes, tokenizer.encode(samples).codes)
    encoded = loaded.encode(samples)
    encoded.save(tmp_path / "a.codes.safetensors")
    again = Codes.load(tmp_path / "a.codes.safetensors")
    assert torch.equal(tokenizer.decode(again), tokenizer.decode(encoded))
    tokenizer.save_pretrained(tmp_path / "half", torch.bfloat16)
    assert load_tokenizer(tmp_path / "half").fingerprint != tokenizer.fingerprint


def test_fingerprint_is_of_what_moves_codes() -> None:
    tokenizer = build(CONFIGS["fsq"])
    for name, moves in (("decoder.0.weight", False), ("encoder.0.weight", True)):
        other = build(CONFIGS["fsq"])
        other.get_parameter(name).view(-1)[0] += 0.5
        assert (other.fingerprint != tokenizer.fingerprint) == moves
    wider = build(replace(CONFIGS["fsq"], decoder=replace(SPECTRA, blocks=(2, 2))))
    assert wider.fingerprint == tokenizer.fingerprint
    assert build(replace(CONFIGS["fsq"], sample_rate=24000)).fingerprint != tokenizer.fingerprint


@pytest.mark.parametrize(
    ("samples", "message"),
    [
        (torch.zeros(1, 100), r"samples: shape is \(1, 100\), expected \[B, 1, N\]"),
        (torch.zeros(1, 2, 100), "samples: shape"),
        (torch.zeros(1, 1, 0), "samples: shape"),
        (torch.zeros(1, 1, 10, dtype=torch.int16), "samples: dtype is torch.int16"),
        (torch.full((1, 1, 10), math.nan), "samples: values are not finite"),
        (torch.full((1, 1, 10), math.inf), "samples: values are not finite"),
        ([0.0], "samples: is a list"),
    ],
)
def test_bad_samples(samples: Any, message: str) -> None:
    with pytest.raises(PlaitError, match=message):
        TOKENIZERS["fsq"].encode(samples)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"n_codebooks": 4}, "n_codebooks: is 4, this tokenizer has 3"),
        ({"n_codebooks": 0}, "n_codebooks"),
        ({"bandwidth": 0}, "bandwidth: is 0"),
        ({"bandwidth": "6"}, "bandwidth"),
        ({"bandwidth": 1.0, "n_codebooks": 1}, "bandwidth: n_codebooks is given too"),
        ({"loudness": 3}, "loudness: is 3"),
        ({"lengths": torch.tensor([1, 2])}, "lengths"),
        ({"lengths": torch.tensor([0])}, "lengths"),
        ({"lengths": torch.tensor([801])}, "lengths"),
    ],
)
def test_bad_options(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(PlaitError, match=message):
        TOKENIZERS["rvq"].encode(sound(1, 1, 800), **arguments)


def test_bad_codes() -> None:
    tokenizer = TOKENIZERS["rvq"]
    codes = tokenizer.encode(sound(1, 1, 800)).codes
    for bad, size, message in (
        (codes[0], None, r"codes: shape is \(3, 10\)"),
        (codes.repeat(1, 2, 1), None, "codes: has 6 codebooks, this tokenizer has 3"),
        (codes + 16, None, "codes of codebook 0: found"),
        (codes.float(), None, "dtype"),
        (codes, (801,), "size: 801 samples do not fit 10 steps"),
        (codes, (720,), "size: 720 samples do not fit 10 steps"),
        (codes, (0,), "size"),
        (codes, (1, 800), "size"),
        (Codes(codes, "audio", fingerprint="of another"), None, "made by another tokenizer"),
    ):
        with pytest.raises(PlaitError, match=message):
            tokenizer.decode(bad, size)
    with pytest.raises(PlaitError, match="differ in more than n"):
        list(tokenizer.encode_stream([sound(1, 1, 80), sound(2, 1, 80)]))
    with pytest.raises(PlaitError, match="differ in more than t"):
        list(tokenizer.decode_stream([codes, codes[:, :2]]))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"sample_rate": 10}, "sample_rate is 10"),
        ({"channels": 3}, "channels is 3"),
        ({"encoder": {"hop": 0}}, "hop is 0"),
        ({"encoder": {"window": 100}}, "window is 100 and hop 1"),
        ({"encoder": {"widths": [4]}}, "1 widths, 2 strides"),
        ({"encoder": {"strides": [8, 1]}}, "strides is"),
        ({"encoder": {"strides": [8, 5]}}, "the encoder has 40 samples per code, the decoder 80"),
        ({"encoder": {"causal": 1}}, "causal is 1"),
        ({"encoder": {"depth": 1}}, "unknown field 'depth'"),
        ({"encoder": 3}, "encoder is 3, expected an object"),
        ({"layers": 1}, "unknown field 'layers'"),
        ({"quantizer": {"kind": "mfq"}}, "kind is 'mfq'"),
    ],
)
def test_bad_configuration(change: dict[str, Any], message: str, tmp_path: Path) -> None:
    TOKENIZERS["rvq"].save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    content = json.loads(path.read_text())
    for name, value in change.items():
        content[name] = content[name] | value if isinstance(value, dict) else value
    path.write_text(json.dumps(content))
    with pytest.raises(PlaitError, match=message):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize(
    ("facts", "message"),
    [
        ({"scale": torch.ones(2)}, "scale: must hold"),
        ({"scale": torch.ones(1, 2)}, "scale: must hold"),
        ({"scale": 2.0}, "scale: must hold"),
        ({"scale": torch.tensor([math.nan])}, "scale: must hold"),
        ({"scale": torch.tensor([0.0])}, "scale: must hold"),
        ({"lengths": torch.tensor([1, 2, 3])}, "lengths: must be ints"),
        ({"lengths": torch.tensor([11])}, "lengths: must be ints"),
        ({"lengths": torch.tensor([-1])}, "lengths: must be ints"),
        ({"lengths": torch.tensor([1.5])}, "lengths: must be ints"),
        ({"modality": "image"}, "modality is 'image'"),
        ({"sample_rate": 44100}, "sample_rate is 44100"),
    ],
)
def test_what_goes_with_codes_must_fit_them(facts: dict[str, Any], message: str) -> None:
    codes = replace(TOKENIZERS["rvq"].encode(sound(1, 1, 800)), **facts)
    with pytest.raises(PlaitError, match=message):
        TOKENIZERS["rvq"].decode(codes)


def test_too_loud_to_be_encoded() -> None:
    with pytest.raises(PlaitError, match="not finite"):
        TOKENIZERS["fsq"].encode(torch.full((1, 1, 80), 1e300, dtype=torch.float64))
    with pytest.raises(PlaitError, match="loudness: the samples are too loud"):
        TOKENIZERS["fsq"].encode(torch.full((1, 1, 80), 1e30), loudness=-20)
