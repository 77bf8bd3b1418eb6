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
from safetensors.torch import save_file
from torch import Tensor
from transformers import Emu3VQVAE, Emu3VQVAEConfig

from plait.errors import PlaitError
from plait.tokenizers.emu3 import LAYOUTS, Emu3Config, Emu3Tokenizer
from plait.tokenizers.foreign import convert, load_foreign
from plait.tokenizers.pixels import Cache

MANIFESTS = Path(__file__).parents[1] / "data" / "manifests"
ORIGINAL, TRANSFORMERS = LAYOUTS


def picture(*shape: int, seed: int = 0) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def reference(**changes: Any) -> Emu3VQVAE:
    """transformers' network, with weights of which none is at a value that would hide it."""
    settings: dict[str, Any] = {
        "codebook_size": 256, "base_channels": 32, "channel_multiplier": [1, 2], "num_res_blocks": 1,
        "attn_resolutions": [1],
    }  # fmt: skip
    settings |= changes
    settings["hidden_size"] = settings["base_channels"] * settings["channel_multiplier"][-1]
    torch.manual_seed(len(repr(changes)))
    network = Emu3VQVAE(Emu3VQVAEConfig(**settings)).eval().requires_grad_(False)
    for name, tensor in network.state_dict().items():
        if name.endswith(("running_mean", "bias")):
            tensor.normal_(0, 0.3)
        elif name.endswith("running_var") or tensor.ndim == 1:
            tensor.uniform_(0.5, 1.5)
    # Codes of random weights crowd in one corner of a random codebook unless it is spread over the latents.
    t, f = network.config.temporal_downsample_factor, network.spatial_scale_factor
    latents = network.quant_conv(network.encoder(picture(2, 2 * t, 3, 3 * f, 4 * f)).transpose(1, 2))
    vectors = latents.movedim(1, -1).flatten(0, -2)
    network.quantize.embedding.weight.copy_(vectors.mean(0) + torch.randn(256, 4) * vectors.std(0))
    return network


def ours_of(theirs: Emu3VQVAE) -> Emu3Tokenizer:
    tokenizer = convert(theirs.state_dict(), {}, TRANSFORMERS, "transformers")
    assert isinstance(tokenizer, Emu3Tokenizer)
    return tokenizer


@pytest.fixture(scope="module")
def theirs() -> Emu3VQVAE:
    return reference()


@pytest.fixture(scope="module")
def tokenizer(theirs: Emu3VQVAE) -> Emu3Tokenizer:
    return ours_of(theirs)


def assert_same_codes(ours: Emu3Tokenizer, pixels: Tensor, codes: Tensor, expected: Tensor) -> None:
    """Equal, but for latents that lie between two vectors of the codebook."""
    with torch.no_grad():
        margin = ours.quantizer.margin(ours.to_latents(pixels).movedim(1, -1))
    assert codes.shape == expected.shape == margin.shape
    assert not ((codes != expected) & (margin > 1e-5)).any()
    assert len(codes.unique()) > 5


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"channel_multiplier": [1, 2, 2, 4], "num_res_blocks": 2, "attn_resolutions": [3]},
        {"channel_multiplier": [2, 1, 2], "attn_resolutions": []},
        {"channel_multiplier": [2, 2], "attn_resolutions": [0, 1]},
        {"channel_multiplier": [1], "attn_resolutions": [0], "base_channels": 64},
        {"temporal_downsample_factor": 2},
        {"temporal_downsample_factor": 8, "num_res_blocks": 2},
    ],
    ids=lambda changes: " ".join(f"{k}={v}" for k, v in changes.items()) or "base",
)
def test_codes_and_pixels_are_those_of_transformers(changes: dict[str, Any]) -> None:
    theirs = reference(**changes)
    ours = ours_of(theirs)
    f, t = ours.factor, ours.temporal_factor
    assert t == theirs.config.temporal_downsample_factor
    with torch.no_grad():
        still = picture(2, 3, 3 * f, 5 * f)
        expected = torch.stack(theirs.encode(still, torch.tensor([[3 * f, 5 * f]] * 2)).image_tokens)
        encoded = ours.encode(still)
        assert_same_codes(
            ours, still.unsqueeze(2).repeat(1, 1, t, 1, 1), encoded.codes.unsqueeze(1), expected.unsqueeze(1)
        )
        decoded = theirs.decode(encoded.codes).clamp(-1, 1)
        torch.testing.assert_close(ours.decode(encoded), decoded, rtol=0, atol=1e-4)

        video = picture(2, 3, 2 * t, 2 * f, 3 * f, seed=1)
        # transformers crops the first axis of a video's codes by its height, so that a large size leaves them whole.
        expected = torch.stack(theirs.encode(video.transpose(1, 2), torch.tensor([[999, 999]] * 2)).image_tokens)
        encoded = ours.encode(video)
        assert_same_codes(ours, video, encoded.codes, expected)
        decoded = theirs.decode(encoded.codes).transpose(1, 2).clamp(-1, 1)
        torch.testing.assert_close(ours.decode(encoded), decoded, rtol=0, atol=1e-4)
        assert decoded.std() > 0.05


def test_a_still_is_looked_at_once_and_decoded_once(tokenizer: Emu3Tokenizer) -> None:
    seen: list[tuple[str, int]] = []
    hooks = [
        layer.register_forward_hook(lambda _, args, out, name=name: seen.append((name, len(args[0]))))
        for name, layer in (("in", tokenizer.encoder.conv_in), ("out", tokenizer.decoder.conv_out))
    ]
    encoded = tokenizer.encode(picture(1, 3, 8, 8))
    tokenizer.decode(encoded)
    assert sum(n for name, n in seen if name == "in") == 1
    assert sum(n for name, n in seen if name == "out") == 1
    seen.clear()
    video = picture(1, 3, 6, 8, 8)
    video[:, :, 2] = video[:, :, 1]
    tokenizer.decode(tokenizer.encode(video))
    assert sum(n for name, n in seen if name == "in") == 5
    assert sum(n for name, n in seen if name == "out") == 6
    for hook in hooks:
        hook.remove()


def test_frames_that_differ_in_one_video_of_a_batch_are_all_looked_at(tokenizer: Emu3Tokenizer) -> None:
    moving = picture(1, 3, 8, 8, 8)
    standing = moving[:, :, :1].expand_as(moving)
    together = tokenizer.encode(torch.cat([standing, moving])).codes
    assert torch.equal(together[:1], tokenizer.encode(standing).codes)
    assert torch.equal(together[1:], tokenizer.encode(moving).codes)
    assert not torch.equal(together[0], together[1])


@pytest.mark.parametrize("plan", [(4, 4, 4, 4), (8, 8), (4, 12), (12, 4)])
def test_chunked_passes_are_one_pass(tokenizer: Emu3Tokenizer, plan: tuple[int, ...]) -> None:
    pixels = picture(1, 3, 16, 6, 10)
    with torch.no_grad():
        z = tokenizer.to_latents(pixels)
        cache: Cache = {}
        chunks = [tokenizer.to_latents(part, cache) for part in pixels.split(plan, 2)]
        torch.testing.assert_close(torch.cat(chunks, 2), z, rtol=0, atol=5e-5)
        quantized = tokenizer.quantizer.latents(tokenizer.quantizer.codes(z.movedim(1, -1))).movedim(-1, 1)
        whole = tokenizer.from_latents(quantized)
        cache = {}
        chunks = [tokenizer.from_latents(part, cache) for part in quantized.split([n // 4 for n in plan], 2)]
        torch.testing.assert_close(torch.cat(chunks, 2), whole, rtol=0, atol=5e-5)
        # What is remembered does not grow.
        assert all(past.shape[2] == 2 for past in cache.values())
        for frames in (1, 5):
            first = tokenizer.from_latents(quantized, frames=frames)
            torch.testing.assert_close(first, whole[:, :, :frames], rtol=0, atol=5e-5)


@settings(deadline=None, max_examples=8)
@given(
    frames=st.integers(1, 14), height=st.integers(1, 9), width=st.integers(3, 9), cuts=st.sets(st.integers(1, 13)),
    batch=st.integers(1, 2),
)  # fmt: skip
def test_streams_of_any_chunks_and_sizes(
    tokenizer: Emu3Tokenizer, frames: int, height: int, width: int, cuts: set[int], batch: int
) -> None:
    pixels = picture(batch, 3, frames, height, width)
    encoded = tokenizer.encode(pixels)
    assert encoded.codes.shape == (batch, -(-frames // 4), -(-height // 2), -(-width // 2))
    parts = torch.tensor_split(pixels, sorted(cut for cut in cuts if cut < frames), 2)
    streamed = torch.cat(list(tokenizer.encode_stream(iter(parts))), 1)
    # Convolutions of other lengths may round otherwise, which moves codes only where two vectors are equally near.
    group = torch.cat([pixels, pixels[:, :, -1:].expand(-1, -1, -frames % 4, -1, -1)], 2)
    with torch.no_grad():
        z = tokenizer.to_latents(tokenizer._pad(group)).movedim(1, -1)
    assert not ((streamed != encoded.codes) & (tokenizer.quantizer.margin(z) > 1e-5)).any()
    decoded = tokenizer.decode(encoded)
    assert decoded.shape == pixels.shape
    parts = encoded.codes.split(1, 1)
    streamed_pixels = torch.cat(list(tokenizer.decode_stream(iter(parts), encoded.size)), 2)
    torch.testing.assert_close(streamed_pixels, decoded, rtol=0, atol=5e-5)


def test_a_still_is_the_first_frame_of_a_standing_video(tokenizer: Emu3Tokenizer) -> None:
    still = picture(1, 3, 7, 5)
    encoded = tokenizer.encode(still)
    video = tokenizer.encode(still.unsqueeze(2).repeat(1, 1, 4, 1, 1))
    assert encoded.codes.shape == (1, 4, 3)
    assert torch.equal(video.codes[:, 0], encoded.codes)
    assert tokenizer.decode(encoded).shape == still.shape
    torch.testing.assert_close(tokenizer.decode(encoded), tokenizer.decode(video)[:, :, 0])


def test_gradients_reach_both_ends(tokenizer: Emu3Tokenizer) -> None:
    fresh = Emu3Tokenizer(tokenizer.config).train()
    fresh.load_state_dict(tokenizer.state_dict())
    pixels = picture(1, 3, 4, 4, 4)
    fresh.from_latents(fresh.to_latents(pixels)).square().mean().backward()
    assert not [name for name, p in fresh.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
    for name, tensor in tokenizer.state_dict().items():
        assert torch.equal(fresh.state_dict()[name], tensor), name


def test_saved_and_loaded_it_is_the_same(tokenizer: Emu3Tokenizer, tmp_path: Path) -> None:
    tokenizer.save_pretrained(tmp_path)
    loaded = Emu3Tokenizer.from_pretrained(tmp_path)
    pixels = picture(1, 3, 5, 6, 6)
    assert loaded.config == tokenizer.config
    assert loaded.fingerprint == tokenizer.fingerprint
    assert torch.equal(loaded.encode(pixels).codes, tokenizer.encode(pixels).codes)


# Released layouts


def original_name(name: str) -> str:
    """The name in the original release of a tensor of transformers'."""
    name = re.sub(r"(down_block|up_block)\.", "", name).replace("middle_block", "mid")
    name = name.replace("mid.attn_norm", "mid.attn_1.norm")
    name = re.sub(r"attn_norms\.(\d)", r"attn.\1.norm", name)
    return re.sub(r"(attn\.\d|attn_1)\.(?:([qkv])_proj|out_proj)", lambda m: f"{m[1]}.{m[2] or 'proj_out'}", name)


def as_original(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """What transformers' tensors are in the original release: attention's matrices are 1×1 convolutions."""
    return {
        original_name(name): tensor[:, :, None, None] if re.search(r"_proj\.weight$", name) else tensor
        for name, tensor in tensors.items()
    }


@pytest.mark.parametrize("prefix", ["", "vqmodel.", "model.vqmodel."])
@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout.name)
def test_both_layouts_load_from_files(
    layout: Any, prefix: str, theirs: Emu3VQVAE, tokenizer: Emu3Tokenizer, tmp_path: Path
) -> None:
    tensors = theirs.state_dict()
    tensors = as_original(tensors) if layout is ORIGINAL else tensors
    rest = {"lm_head.weight": torch.zeros(2, 2), "model.text_model.norm.weight": torch.zeros(2)} if prefix else {}
    save_file({prefix + k: v.contiguous() for k, v in tensors.items()} | rest, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps({"vq_config": {"num_attention_heads": 1}} if prefix else {}))
    loaded = load_foreign(tmp_path)
    assert isinstance(loaded, Emu3Tokenizer)
    assert loaded.config == tokenizer.config
    assert loaded.fingerprint == tokenizer.fingerprint
    codes = torch.arange(4 * 9).view(1, 4, 3, 3)
    assert torch.equal(loaded.decode(codes), tokenizer.decode(codes))


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout.name)
def test_the_released_tensors_are_the_networks(layout: Any) -> None:
    file = "emu3.json" if layout is ORIGINAL else "emu3-transformers.json"
    manifest = json.loads((MANIFESTS / file).read_text())
    tensors = {name: torch.empty(shape, device="meta") for name, shape in manifest.items()}
    assert [other.name for other in LAYOUTS if other.recognise(tensors, {})] == [layout.name]
    config = layout.configure(tensors, {})
    assert config == Emu3Config()
    with torch.device("meta"):
        expected = {name: tensor.shape for name, tensor in Emu3Tokenizer(config).state_dict().items()}
    assert {name: tensor.shape for name, tensor in layout.rename(tensors, config).items()} == expected


def test_the_manifests_are_of_transformers_own_network() -> None:
    with torch.device("meta"):
        released = Emu3VQVAE(Emu3VQVAEConfig()).state_dict()
    for file, tensors in (("emu3-transformers.json", released), ("emu3.json", as_original(released))):
        manifest = json.loads((MANIFESTS / file).read_text())
        assert manifest == {name: list(tensor.shape) for name, tensor in tensors.items()}


def damaged(theirs: Emu3VQVAE) -> Iterator[tuple[dict[str, Tensor], dict[str, Any], str]]:
    tensors = theirs.state_dict()
    for name in ("encoder.conv_in.weight", "quantize.embedding.weight", "decoder.time_conv.0.conv.conv.bias"):
        yield {k: v for k, v in tensors.items() if k != name}, {}, "is missing"
    yield {**tensors, "decoder.more": torch.zeros(1)}, {}, "tensor 'decoder.more' is extra"
    yield {**tensors, "encoder.conv_out.bias": torch.zeros(5)}, {}, "has shape"
    yield tensors, {"num_attention_heads": 2}, "num_attention_heads is 2"
    yield tensors, {"vq_config": {"num_attention_heads": 2}}, "num_attention_heads is 2"


def test_other_tensors_are_refused_by_name(theirs: Emu3VQVAE) -> None:
    for tensors, config, message in damaged(theirs):
        with pytest.raises(PlaitError, match=message) as raised:
            convert(tensors, config, TRANSFORMERS, "here")
        assert "\n" not in str(raised.value)


def test_other_networks_are_not_taken_for_emu3() -> None:
    vqgan = {"encoder.down.0.block.0.conv1.weight": torch.zeros(1), "quantize.embedding.weight": torch.zeros(1)}
    assert not any(layout.recognise(tensors, {}) for layout in LAYOUTS for tensors in ({}, vqgan))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"temporal_factor": 3}, "temporal_factor is 3"),
        ({"temporal_factor": 0}, "temporal_factor is 0"),
        ({"temporal_factor": 4.0}, "temporal_factor is 4.0"),
        ({"dim": 0}, "dim is 0"),
        ({"dim": True}, "dim is True"),
        ({"width": 48}, "width is 48"),
        ({"codebook_size": 0}, "codebook_size is 0"),
        ({"blocks": 0}, "blocks is 0"),
        ({"multipliers": ()}, "multipliers is"),
        ({"multipliers": (1, 0)}, "multipliers is"),
        ({"attention_levels": (4,)}, "attention_levels is"),
        ({"attention_levels": 3}, "attention_levels is"),
    ],
    ids=str,
)
def test_an_impossible_configuration_is_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(PlaitError, match=message):
        replace(Emu3Config(), **fields)
