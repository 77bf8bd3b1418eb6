import json
import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import MimiConfig as TheirConfig
from transformers import MimiModel

from plait.errors import PlaitError
from plait.tokenizers.foreign import convert, load_foreign
from plait.tokenizers.loading import load_tokenizer
from plait.tokenizers.mimi import LAYOUTS, MimiConfig, MimiTokenizer, banded
from plait.tokenizers.streaming import Stream, whole

MANIFESTS = Path(__file__).parents[1] / "data" / "manifests"
ORIGINAL, TRANSFORMERS = LAYOUTS
WINDOW = 8


def sound(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * 0.5


def reference(**changes: Any) -> MimiModel:
    """transformers' network, with weights of which none is at a value that would hide it."""
    fields: dict[str, Any] = {
        "hidden_size": 32, "num_filters": 4, "upsampling_ratios": [3, 2], "num_hidden_layers": 2,
        "num_attention_heads": 2, "num_key_value_heads": 2, "intermediate_size": 48, "codebook_size": 64,
        "codebook_dim": 8, "vector_quantization_hidden_dimension": 8, "num_quantizers": 5, "sliding_window": WINDOW,
    } | changes  # fmt: skip
    fields |= {"upsample_groups": fields["hidden_size"]}
    torch.manual_seed(len(repr(changes)))
    network = MimiModel(TheirConfig(**fields)).eval().requires_grad_(False)
    for name, tensor in network.state_dict().items():
        if name.endswith("bias"):
            tensor.normal_(0, 0.3)
        elif name.endswith(("cluster_usage", "norm.weight", ".scale")):
            tensor.uniform_(0.5, 1.5)
        elif "_proj.weight" in name and "self_attn" in name:
            tensor.normal_(0, 0.4)  # attention that tells positions apart
    # A code that was never used; its vector must not be infinite.
    chains = network.quantizer.semantic_residual_vector_quantizer, network.quantizer.acoustic_residual_vector_quantizer
    chains[1].layers[0].codebook.cluster_usage[3] = 0
    # Codes of random weights crowd in one corner of a random codebook unless it is spread over the latents.
    latents = network.encoder(sound(2, network.config.audio_channels, 64 * network.config.frame_size)).latents
    for chain in chains:
        left = chain.input_proj(latents).movedim(1, -1).flatten(0, 1)
        for layer in chain.layers:
            book = layer.codebook
            vectors = left.mean(0) + torch.randn(book.codebook_size, left.shape[1]) * left.std(0)
            book.embed_sum.copy_(vectors * book.cluster_usage.clamp(min=1e-5)[:, None])
            left = left - layer.codebook.decode(layer.codebook.encode(left))
    # Samples from about -1 to 1, as errors are measured against that.
    decoded = network.decode(torch.randint(64, (1, network.config.num_quantizers, 40))).audio_values
    network.decoder.decoder_seanet.layers[-1].conv.weight.div_(decoded.std() * 2)
    return network


def ours_of(theirs: MimiModel, **config: Any) -> MimiTokenizer:
    tokenizer = convert(theirs.state_dict(), theirs.config.to_dict() | config, TRANSFORMERS, "transformers")
    assert isinstance(tokenizer, MimiTokenizer)
    return tokenizer


@pytest.fixture(scope="module")
def theirs() -> MimiModel:
    return reference()


@pytest.fixture(scope="module")
def tokenizer(theirs: MimiModel) -> MimiTokenizer:
    return ours_of(theirs)


def assert_same_codes(ours: MimiTokenizer, samples: Tensor, codes: Tensor, expected: Tensor) -> None:
    """Equal, but for steps at which a vector lies between two codes of a codebook, and the rest follows suit."""
    with torch.no_grad():
        margin = ours.quantizer.margin(ours.to_latents(samples, whole()).movedim(1, -1))
    assert codes.shape == expected.shape
    assert margin.shape == (len(codes), codes.shape[-1])
    assert not ((codes != expected).any(1) & (margin > 1e-5)).any()
    assert (margin > 1e-5).float().mean() > 0.9 or margin.numel() < 20


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"upsampling_ratios": [8, 6, 5, 4], "num_filters": 2},
        {"upsampling_ratios": [5], "num_attention_heads": 8, "num_key_value_heads": 8, "num_hidden_layers": 1},
        {"sliding_window": 1},
        {"sliding_window": 5, "rope_parameters": {"rope_type": "default", "rope_theta": 50.0}},
        {"audio_channels": 2, "num_quantizers": 3, "hidden_size": 16, "vector_quantization_hidden_dimension": 12,
         "codebook_dim": 12},
    ],
    ids=lambda changes: " ".join(f"{k}={v}" for k, v in changes.items()) or "base",
)  # fmt: skip
def test_codes_and_samples_are_those_of_transformers(changes: dict[str, Any]) -> None:
    theirs = reference(**changes)
    ours = ours_of(theirs)
    assert ours.factor == theirs.config.frame_size
    assert ours.frame_rate == theirs.config.frame_rate
    with torch.no_grad():
        for n in (1, ours.factor - 1, 2 * ours.factor, 41 * ours.factor + 5):
            samples = sound(2, ours.channels, n, seed=n)
            expected = theirs(samples)
            encoded = ours.encode(samples)
            assert_same_codes(ours, samples, encoded.codes, expected.audio_codes)
            decoded = ours.decode(expected.audio_codes, (n,))
            assert decoded.shape == samples.shape
            torch.testing.assert_close(decoded, expected.audio_values, rtol=0, atol=1e-5)
        assert 0.1 < decoded.std() < 5
        assert len(encoded.codes.unique()) > 20


def test_every_length_is_that_of_transformers(theirs: MimiModel, tokenizer: MimiTokenizer) -> None:
    samples = sound(1, 1, 3 * tokenizer.factor + 1)
    for n in range(1, samples.shape[-1] + 1):
        part = samples[..., :n]
        codes = tokenizer.encode(part).codes
        assert codes.shape[-1] == -(-n // tokenizer.factor)
        assert_same_codes(tokenizer, part, codes, theirs.encode(part).audio_codes)


def test_first_codebooks(theirs: MimiModel, tokenizer: MimiTokenizer) -> None:
    samples = sound(1, 1, 500)
    every = tokenizer.encode(samples).codes
    assert every.shape[1] == theirs.config.num_quantizers == len(tokenizer.codebook_sizes) == 5
    for n in range(1, 6):
        codes = tokenizer.encode(samples, n_codebooks=n)
        assert torch.equal(codes.codes, every[:, :n])
        expected = theirs.decode(codes.codes).audio_values[..., :500]
        torch.testing.assert_close(tokenizer.decode(codes), expected, rtol=0, atol=1e-5)
    # 2,000 steps per second of 6 bits.
    assert tokenizer.encode(samples, bandwidth=24.1).codes.shape[1] == 2


@pytest.mark.parametrize("change", [{"sliding_window": 7}, {"sliding_window": 9}, {"num_attention_heads": 1}], ids=str)
def test_parity_would_tell_another_window_or_head(
    theirs: MimiModel, tokenizer: MimiTokenizer, change: dict[str, int]
) -> None:
    codes = theirs.encode(sound(1, 1, 400)).audio_codes
    other = ours_of(theirs, **change).decode(codes)
    assert (other - tokenizer.decode(codes)).abs().max() > 1e-3


@given(past=st.integers(0, 9), new=st.integers(1, 30), window=st.integers(1, 10))
def test_bands_are_causal_windows(past: int, new: int, window: int) -> None:
    past = min(past, window - 1)
    seen = torch.zeros(new, past + new, dtype=torch.bool)
    for band in banded(past, new, window, torch.device("cpu")):
        part = seen[band.queries, band.keys]
        part |= torch.ones_like(part).tril() if band.mask is None else band.mask
        assert band.mask is not None or part.shape[0] == part.shape[1]
        assert part.shape[1] < 2 * window
    apart = past + torch.arange(new)[:, None] - torch.arange(past + new)
    assert torch.equal(seen, (apart >= 0) & (apart < window))


@settings(deadline=None, max_examples=25)
@given(
    n=st.integers(1, 420), cuts=st.sets(st.integers(1, 419), max_size=8), code_cuts=st.sets(st.integers(1, 34)),
    batch=st.integers(1, 2), pieces=st.integers(1, 100),
)  # fmt: skip
def test_streams_of_any_chunks(
    tokenizer: MimiTokenizer, n: int, cuts: set[int], code_cuts: set[int], batch: int, pieces: int
) -> None:
    samples = sound(batch, 1, n)
    encoded = tokenizer.encode(samples)
    decoded = tokenizer.decode(encoded)
    assert decoded.shape == samples.shape
    levels = [*tokenizer.encoder.get_submodule("levels"), *tokenizer.decoder.get_submodule("levels")]
    before = [level.steps for level in levels]
    for level in levels:
        level.steps = pieces  # type: ignore[assignment]
    try:
        chunks = torch.tensor_split(samples, sorted(cut for cut in cuts if cut < n), -1)
        streamed = torch.cat(list(tokenizer.encode_stream(iter(chunks))), -1)
        assert_same_codes(tokenizer, samples, streamed, encoded.codes)
        steps = encoded.codes.shape[-1]
        parts = torch.tensor_split(encoded.codes, sorted(cut for cut in code_cuts if cut < steps), -1)
        streamed = torch.cat(list(tokenizer.decode_stream(iter(parts), encoded.size)), -1)
    finally:
        for level, steps_before in zip(levels, before, strict=True):
            level.steps = steps_before
    torch.testing.assert_close(streamed, decoded, rtol=0, atol=1e-5)


@settings(deadline=None, max_examples=15)
@given(cuts=st.sets(st.integers(1, 59), max_size=20))
def test_passes_take_chunks_that_are_no_whole_steps(tokenizer: MimiTokenizer, cuts: set[int]) -> None:
    samples = sound(1, 1, 60)
    stream, latents = Stream(), []
    chunks = torch.tensor_split(samples, sorted(cuts), -1)
    with torch.no_grad():
        for i, chunk in enumerate(chunks, 1):
            stream.last = i == len(chunks)
            latents.append(tokenizer.to_latents(chunk, stream))
        torch.testing.assert_close(torch.cat(latents, -1), tokenizer.to_latents(samples, whole()), rtol=1e-5, atol=1e-5)


def remembered(stream: Stream) -> int:
    """Numbers that a stream holds."""
    held = [value if isinstance(value, tuple) else (value,) for value in stream._memory.values()]
    tensors = [tensor for value in held for tensor in value if isinstance(tensor, Tensor)]
    assert all(tensor.untyped_storage().nbytes() == 4 * tensor.numel() for tensor in tensors)
    return sum(tensor.numel() for tensor in tensors)


def test_what_a_stream_holds_does_not_grow(tokenizer: MimiTokenizer) -> None:
    encoding, decoding, sizes = Stream(), Stream(), []
    with torch.no_grad():
        for _ in range(12):
            z = tokenizer.to_latents(sound(1, 1, 2 * tokenizer.factor), encoding)
            tokenizer.from_latents(z, decoding)
            sizes.append((remembered(encoding), remembered(decoding)))
    assert sizes[0] < sizes[1]
    assert len(set(sizes[1:])) == 1
    keys = encoding._memory[next(iter(tokenizer.encoder.get_submodule("transformer.layers")))][0]
    assert keys.shape[2] == WINDOW - 1


def test_a_long_stream_keeps_its_positions_exact(tokenizer: MimiTokenizer) -> None:
    transformer = tokenizer.encoder.get_submodule("transformer")
    x = sound(1, 20, 32)
    late = Stream()
    late.put(transformer, 2**30)
    for layer in transformer.get_submodule("layers"):  # type: ignore[attr-defined]
        late.put(layer, (torch.zeros(1, 2, WINDOW - 1, 16),) * 2)
    early = Stream()
    early.put(transformer, 2 * WINDOW)
    for layer in transformer.get_submodule("layers"):  # type: ignore[attr-defined]
        early.put(layer, (torch.zeros(1, 2, WINDOW - 1, 16),) * 2)
    with torch.no_grad():
        torch.testing.assert_close(transformer(x, late), transformer(x, early), rtol=1e-5, atol=1e-5)


def test_items_of_a_batch_know_nothing_of_each_other(tokenizer: MimiTokenizer) -> None:
    samples = sound(2, 1, 300)
    lengths = torch.tensor([120, 300])
    encoded = tokenizer.encode(samples, lengths=lengths)
    assert encoded.lengths is not None
    assert encoded.lengths.tolist() == [10, 25]
    assert_same_codes(tokenizer, samples[1:], encoded.codes[1:], tokenizer.encode(samples[1:]).codes)
    alone = tokenizer.encode(samples[:1, :, :120])
    assert_same_codes(tokenizer, samples[:1, :, :120], encoded.codes[:1, :, :10], alone.codes)


def test_gradients_reach_both_ends(tokenizer: MimiTokenizer) -> None:
    fresh = MimiTokenizer(tokenizer.config).train()
    fresh.load_state_dict(tokenizer.state_dict())
    samples = sound(1, 1, 90).requires_grad_()
    z = fresh.to_latents(samples, whole())
    torch.testing.assert_close(z.detach(), tokenizer.to_latents(samples.detach(), whole()), rtol=1e-5, atol=1e-5)
    quantized = fresh.quantizer(z.movedim(1, -1))
    fresh.from_latents(quantized.latents.movedim(-1, 1), whole()).square().mean().backward()
    assert not [name for name, p in fresh.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
    assert samples.grad is not None
    for name, tensor in tokenizer.state_dict().items():
        assert torch.equal(fresh.state_dict()[name], tensor), name


def test_saved_and_loaded_it_is_the_same(tokenizer: MimiTokenizer, tmp_path: Path) -> None:
    tokenizer.save_pretrained(tmp_path)
    loaded = load_tokenizer(tmp_path)
    assert isinstance(loaded, MimiTokenizer)
    assert loaded.config == tokenizer.config
    assert loaded.fingerprint == tokenizer.fingerprint
    assert torch.equal(loaded.encode(sound(1, 1, 77)).codes, tokenizer.encode(sound(1, 1, 77)).codes)
    content = json.loads((tmp_path / "config.json").read_text())
    for change, message in (({"more": 1}, "unknown field 'more'"), ({"layers": 10**6}, "layers is 1000000")):
        (tmp_path / "config.json").write_text(json.dumps(content | change))
        with pytest.raises(PlaitError, match=message):
            load_tokenizer(tmp_path)


# Released layouts


def flat_name(name: str) -> str:
    """The name in a file of a tensor of transformers' network."""
    for half in ("encoder", "decoder"):
        if name.startswith(f"{half}."):
            return name[len(half) + 1 :].replace("_seanet", "", 1)
    return name


def as_original(tensors: dict[str, Tensor], heads: int, listed: bool = False) -> dict[str, Tensor]:
    """What transformers' tensors, by their names in files, are in the original release."""
    original: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        head, *rest = name.split(".")
        if head.endswith("sample"):
            kind = "conv" if head == "downsample" else "convtr"
            original[f"{head}.{kind}.{kind}.{kind}.weight"] = tensor
        elif head in ("encoder", "decoder"):
            place, end = ".".join(rest[1:-2]), rest[-1]
            kind = "convtr" if head == "decoder" and "." not in place and int(place) % 3 == 2 else "conv"
            last = max(int(other.split(".")[2]) for other in tensors if other.startswith("decoder.layers."))
            kind = "conv" if place == str(last) else kind
            original[f"{head}.model.{place}.{kind}.{kind}.{end}"] = tensor
        elif head == "quantizer":
            chain = "rvq_first" if rest[0].startswith("semantic") else "rvq_rest"
            if rest[1] == "layers":
                end = {"initialized": "_initialized", "embed_sum": "embedding_sum"}.get(rest[-1], rest[-1])
                original[f"quantizer.{chain}.vq.layers.{rest[2]}._codebook.{end}"] = tensor
            else:
                original[f"quantizer.{chain}.{rest[1]}.weight"] = tensor
        else:
            place, end = f"{head}.transformer.layers.{rest[1]}", ".".join(rest[2:])
            if end == "self_attn.q_proj.weight":
                stem = name.removesuffix("q_proj.weight")
                rows = []
                for which in "qk":
                    matrix = tensors[f"{stem}{which}_proj.weight"]
                    size = len(matrix) // heads
                    # Row i of a head's first half and row i of its second become rows 2i and 2i + 1.
                    order = [h * size + i + half * size // 2 for h in range(heads) for i in range(size // 2)
                             for half in (0, 1)]  # fmt: skip
                    rows.append(matrix[order])
                fused = torch.cat([*rows, tensors[f"{stem}v_proj.weight"]])
                original[f"{place}.self_attn.{'in_projs.0.weight' if listed else 'in_proj_weight'}"] = fused
            elif not end.startswith("self_attn.") or end == "self_attn.o_proj.weight":
                names = {
                    "self_attn.o_proj.weight": f"self_attn.{'out_projs.0' if listed else 'out_proj'}.weight",
                    "mlp.fc1.weight": "linear1.weight", "mlp.fc2.weight": "linear2.weight",
                    "input_layernorm.weight": "norm1.weight", "input_layernorm.bias": "norm1.bias",
                    "post_attention_layernorm.weight": "norm2.weight", "post_attention_layernorm.bias": "norm2.bias",
                    "self_attn_layer_scale.scale": "layer_scale_1.scale",
                    "mlp_layer_scale.scale": "layer_scale_2.scale",
                }  # fmt: skip
                original[f"{place}.{names[end]}"] = tensor
    return original


def flat(theirs: MimiModel) -> dict[str, Tensor]:
    return {flat_name(name): tensor.contiguous() for name, tensor in theirs.state_dict().items()}


def assert_is(loaded: Any, tokenizer: MimiTokenizer) -> None:
    assert isinstance(loaded, MimiTokenizer)
    assert loaded.config == tokenizer.config
    for name, tensor in tokenizer.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor), name


def test_files_of_transformers_load(theirs: MimiModel, tokenizer: MimiTokenizer, tmp_path: Path) -> None:
    theirs.save_pretrained(tmp_path)
    assert set(load_file(tmp_path / "model.safetensors")) == set(flat(theirs))
    assert_is(load_tokenizer(tmp_path), tokenizer)
    # Version 5's own names, as in memory.
    save_file(theirs.state_dict(), tmp_path / "model.safetensors")
    assert_is(load_tokenizer(tmp_path), tokenizer)


@pytest.mark.parametrize("listed", [False, True], ids=["in_proj_weight", "in_projs.0.weight"])
def test_files_of_the_original_load(listed: bool, theirs: MimiModel, tokenizer: MimiTokenizer, tmp_path: Path) -> None:
    save_file(as_original(flat(theirs), 2, listed), tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(theirs.config.to_dict()))
    assert_is(load_foreign(tmp_path), tokenizer)


def test_a_codec_within_a_larger_model_loads(theirs: MimiModel, tokenizer: MimiTokenizer, tmp_path: Path) -> None:
    tensors = {f"codec_model.{name}": tensor for name, tensor in flat(theirs).items()}
    save_file(tensors | {"lm_head.weight": torch.zeros(2, 2)}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps({"sliding_window": 3, "codec_config": theirs.config.to_dict()}))
    assert_is(load_foreign(tmp_path), tokenizer)


def test_parity_would_tell_rows_in_the_wrong_order(theirs: MimiModel, tokenizer: MimiTokenizer) -> None:
    tensors = as_original(flat(theirs), 2)
    for name in [name for name in tensors if name.endswith("in_proj_weight")]:
        stem = name.replace(".transformer", "").removesuffix("in_proj_weight")
        tensors[name] = torch.cat([flat(theirs)[f"{stem}{which}_proj.weight"] for which in "qkv"])
    wrong = convert(tensors, theirs.config.to_dict(), ORIGINAL, "wrong")
    assert isinstance(wrong, MimiTokenizer)
    codes = torch.arange(5 * 30).view(1, 5, 30) % 64
    assert (wrong.decode(codes) - tokenizer.decode(codes)).abs().max() > 1e-3


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout.name)
def test_the_released_tensors_are_the_networks(layout: Any) -> None:
    file = "mimi.json" if layout is ORIGINAL else "mimi-transformers.json"
    manifest = json.loads((MANIFESTS / file).read_text())
    assert len(manifest) == (318 if layout is ORIGINAL else 350)
    tensors = {name: torch.empty(shape, device="meta") for name, shape in manifest.items()}
    assert [other.name for other in LAYOUTS if other.recognise(tensors, {})] == [layout.name]
    config = layout.configure(tensors, {})
    assert config == MimiConfig()
    with torch.device("meta"):
        expected = {name: tensor.shape for name, tensor in MimiTokenizer(config).state_dict().items()}
    assert {name: tensor.shape for name, tensor in layout.rename(tensors, config).items()} == expected


def test_the_manifests_are_of_transformers_own_network() -> None:
    with torch.device("meta"):
        released = flat(MimiModel(TheirConfig()))
    for file, tensors in (("mimi-transformers.json", released), ("mimi.json", as_original(released, 8))):
        assert json.loads((MANIFESTS / file).read_text()) == {name: list(t.shape) for name, t in tensors.items()}


def test_the_defaults_are_those_of_transformers() -> None:
    config, theirs = MimiConfig(), TheirConfig()
    assert (config.sample_rate, config.window, config.heads) == (
        theirs.sampling_rate, theirs.sliding_window, theirs.num_attention_heads,
    )  # fmt: skip
    assert config.rope_base == theirs.rope_parameters["rope_theta"]
    with torch.device("meta"):
        released = MimiTokenizer()
    assert (released.frame_rate, released.factor) == (12.5, 1920)


def damaged(theirs: MimiModel) -> Iterator[tuple[dict[str, Tensor], dict[str, Any], str]]:
    tensors, config = flat(theirs), theirs.config.to_dict()
    for name in (
        "encoder.layers.0.conv.weight", "decoder.layers.2.conv.bias", "upsample.conv.weight",
        "decoder_transformer.layers.1.self_attn.k_proj.weight", "encoder.layers.8.conv.bias",
        "quantizer.acoustic_residual_vector_quantizer.layers.2.codebook.cluster_usage",
    ):  # fmt: skip
        yield {k: v for k, v in tensors.items() if k != name}, config, "tensor '.*' is missing"
    yield {**tensors, "decoder.more": torch.zeros(1)}, config, "tensor 'decoder.more' is extra"
    yield {**tensors, "downsample.conv.bias": torch.zeros(32)}, config, "is extra"
    yield {**tensors, "encoder.layers.8.conv.bias": torch.zeros(5)}, config, "has shape"
    yield {**tensors, "encoder.layers.0.conv.weight": torch.zeros(4, 1, 9)}, config, "has shape"
    yield {**tensors, "upsample.conv.weight": torch.zeros(32, 2, 4)}, config, "not a Mimi"
    yield {**tensors, "upsample.conv.weight": torch.zeros(5)}, config, "not a Mimi"
    yield {**tensors, "downsample.conv.weight": torch.zeros(5)}, config, "not a Mimi"
    for name, value in (
        ("use_causal_conv", False), ("pad_mode", "reflect"), ("num_residual_layers", 2), ("norm_eps", 1e-6),
        ("num_semantic_quantizers", 2), ("use_conv_shortcut", True), ("trim_right_ratio", 0.5), ("hidden_act", "relu"),
    ):  # fmt: skip
        yield tensors, config | {name: value}, f"{name} is {value!r}"
    yield tensors, config | {"rope_parameters": {"rope_type": "yarn"}}, "rope_type is 'yarn'"
    yield tensors, config | {"num_attention_heads": 3}, "heads"
    yield tensors, config | {"sliding_window": 0}, "window is 0"
    yield tensors, config | {"sliding_window": None}, "window is None"


def test_other_tensors_and_settings_are_refused_by_name(theirs: MimiModel) -> None:
    for tensors, config, message in damaged(theirs):
        with pytest.raises(PlaitError, match=message) as raised:
            convert(tensors, config, TRANSFORMERS, "here")
        assert "\n" not in str(raised.value)


def test_other_networks_are_not_taken_for_mimi() -> None:
    encodec = {"encoder.layers.0.conv.weight": torch.zeros(1), "quantizer.layers.0.codebook.embed": torch.zeros(1)}
    assert not any(layout.recognise(tensors, {}) for layout in LAYOUTS for tensors in ({}, encodec))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"sample_rate": 0}, "sample_rate is 0"),
        ({"channels": True}, "channels is True"),
        ({"width": 3}, "width is 3"),
        ({"width": 10**9}, "width is 1000000000"),
        ({"strides": ()}, "strides is"),
        ({"strides": (4, 0)}, "strides is"),
        ({"strides": 4}, "strides is 4"),
        ({"strides": (32,) * 7}, "strides is"),
        ({"dim": 10**6}, "dim is 1000000"),
        ({"layers": 0}, "layers is 0"),
        ({"heads": 7}, "7 heads"),
        ({"hidden": 0.5}, "hidden is 0.5"),
        ({"window": 0}, "window is 0"),
        ({"rope_base": float("inf")}, "rope_base is inf"),
        ({"downsampling": 0}, "downsampling is 0"),
        ({"codebooks": 2}, "codebooks is 2"),
        ({"codebook_size": 1}, "codebook_size is 1"),
        ({"codebook_dim": 0}, "codebook_dim is 0"),
    ],
    ids=str,
)
def test_an_impossible_configuration_is_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(PlaitError, match=re.escape(message)):
        replace(MimiConfig(), **fields)
