"""Quantized layers are the matrices that their codes stand for, near the float ones, in every shape and path."""

import copy
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from plait.errors import PlaitError
from plait.model.cache import KVCache
from plait.model.config import DecoderConfig
from plait.model.decoder import Decoder
from plait.model.loss import Targets
from plait.model.quantize import (
    INT8_ROWS,
    Quantization,
    QuantizedHead,
    QuantizedLinear,
    join_halves,
    pack_,
    quantize_,
    quantize_linear,
    split_halves,
)

KINDS = [Quantization(8), Quantization(4, 32), Quantization(4, 64), Quantization(4, 128), Quantization(4, 256)]
SHAPES = [(5, 3), (1, 1), (33, 40), (48, 64), (17, 256), (64, 96), (3, 257), (200, 512)]


def linear(out: int, width: int, bias: bool = False, seed: int = 0) -> nn.Linear:
    torch.manual_seed(seed)
    return nn.Linear(width, out, bias=bias).requires_grad_(False)


def small_decoder(**fields: object) -> Decoder:
    torch.manual_seed(0)
    config = DecoderConfig(vocabulary_size=100, **({"width": 64, "layers": 2, "heads": 4, "kv_heads": 2} | fields))
    return Decoder(config).eval().requires_grad_(False)


@pytest.mark.parametrize("kind", KINDS, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_weights_are_within_half_a_step(kind: Quantization, shape: tuple[int, int]) -> None:
    weight = linear(*shape).weight
    found = quantize_linear(linear(*shape), kind).dequantize()
    if kind.bits == 8:
        step = weight.abs().amax(1, keepdim=True) / 127
        assert ((found - weight).abs() <= step * 0.75).all()  # half a step, and what bfloat16 takes from the scale
        return
    for start in range(0, shape[1], kind.group_size):
        part = slice(start, start + kind.group_size)
        low, high = weight[:, part].amin(1, keepdim=True), weight[:, part].amax(1, keepdim=True)
        # The range may be cut, so that some weights are further off, but then the others gain more.
        half_step = (high - low) / 15 / 2
        error = (found[:, part] - weight[:, part]).square().mean(1, keepdim=True).sqrt()
        assert (error <= half_step + 2**-8 * torch.maximum(low.abs(), high.abs())).all()


@pytest.mark.parametrize(
    ("kind", "least"), [(Quantization(8), 38.0), (Quantization(4, 32), 19.0), (Quantization(4, 128), 17.0)]
)
def test_noise_of_normal_weights_is_that_of_the_bits(kind: Quantization, least: float) -> None:
    torch.manual_seed(0)
    layer = nn.Linear(1024, 256, bias=False).requires_grad_(False)
    layer.weight.normal_(std=0.02)
    error = quantize_linear(layer, kind).dequantize() - layer.weight
    assert 20 * torch.log10(layer.weight.norm() / error.norm()) > least  # dB; a bit is 6


@pytest.mark.parametrize("kind", KINDS, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("rows", [1, 2, 7, INT8_ROWS + 1])
@torch.no_grad()
def test_products_are_those_of_the_dequantized_matrix(kind: Quantization, shape: tuple[int, int], rows: int) -> None:
    layer = quantize_linear(linear(*shape, bias=True), kind)
    x = torch.randn(rows, shape[1])
    # The kernels round activations to bfloat16, and so do we, to compare the rest tightly.
    x = x.bfloat16().float()
    expected = x @ layer.dequantize().T + layer.bias
    near = {"atol": 1e-2 * float(expected.abs().max()), "rtol": 0.0}
    torch.testing.assert_close(layer(x), expected, **near)
    layer.pack()
    torch.testing.assert_close(layer(x), expected, **near)
    torch.testing.assert_close(layer(x.view(1, rows, 1, -1)), expected.view(1, rows, 1, -1), **near)


@pytest.mark.parametrize("kind", KINDS[:2], ids=str)
@torch.no_grad()
def test_a_row_does_not_depend_on_the_batch(kind: Quantization) -> None:
    layer = quantize_linear(linear(96, 128), kind)
    layer.pack()
    x = torch.randn(9, 128)
    together = layer(x)
    for count in (1, 2, 3, 4, 5, 8):
        torch.testing.assert_close(layer(x[:count]), together[:count], atol=1e-2, rtol=1e-2)


@pytest.mark.parametrize("kind", KINDS[:2], ids=str)
@torch.no_grad()
def test_zeros_constants_and_small_or_large_rows(kind: Quantization) -> None:
    layer = linear(6, 64)
    layer.weight[0] = 0
    layer.weight[1] = 0.5
    layer.weight[2] *= 1e-12
    layer.weight[3] *= 1e12
    layer.weight[4, 1:] = 0
    found = quantize_linear(layer, kind).dequantize()
    assert found.isfinite().all()
    assert torch.equal(found[0], torch.zeros(64))
    for row in range(1, 6):
        assert (found[row] - layer.weight[row]).norm() < 0.1 * layer.weight[row].norm()


@pytest.mark.parametrize("kind", KINDS[:2], ids=str)
@pytest.mark.parametrize("shape", [(48, 64), (5, 37)], ids=str)
def test_gradients_are_those_of_the_dequantized_matrix(kind: Quantization, shape: tuple[int, int]) -> None:
    layer = quantize_linear(linear(*shape, bias=True), kind)
    assert layer.bias is not None
    layer.bias.requires_grad_(True)
    x = torch.randn(2, 3, shape[1], requires_grad=True)
    probe = torch.randn(2, 3, shape[0])
    y = layer(x)
    torch.testing.assert_close(y, x @ layer.dequantize().T + layer.bias)
    found = torch.autograd.grad((y * probe).sum(), (x, layer.bias))
    torch.testing.assert_close(found[0], probe @ layer.dequantize())
    torch.testing.assert_close(found[1], probe.sum((0, 1)))


@given(st.integers(1, 9), st.integers(1, 33), st.integers(0, 99))
@settings(max_examples=30, deadline=None)
def test_halves_round_trip(out: int, width: int, seed: int) -> None:
    codes = torch.randint(16, (out, width), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)
    joined = join_halves(codes)
    assert joined.shape == (out, (width + 1) // 2)
    assert torch.equal(split_halves(joined, width), codes)


@pytest.mark.parametrize("kind", KINDS[:3], ids=str)
@pytest.mark.parametrize("tied", [False, True])
@torch.no_grad()
def test_storage_round_trips_through_a_skeleton(kind: Quantization, tied: bool, tmp_path: Path) -> None:
    decoder = small_decoder(tie_embeddings=tied, qkv_bias=True)
    quantize_(decoder, kind)
    stored = decoder.state_dict()
    save_file(stored, tmp_path / "model.safetensors")
    with torch.device("meta"):
        skeleton = Decoder(decoder.config)
    quantize_(skeleton, kind)
    skeleton.load_state_dict(load_file(tmp_path / "model.safetensors"), assign=True)
    skeleton.eval()
    for name, tensor in skeleton.state_dict().items():
        assert tensor.dtype == stored[name].dtype
        assert torch.equal(tensor, stored[name])
    tokens, positions = torch.randint(100, (1, 7)), torch.arange(7)[None]
    assert torch.equal(decoder(tokens, positions), skeleton(tokens, positions))


@torch.no_grad()
def test_names_and_dtypes_of_what_is_stored() -> None:
    decoder = small_decoder()
    quantize_(decoder, Quantization(4, 32))
    state = decoder.state_dict()
    assert state["layers.0.self_attn.q_proj.weight"].dtype == torch.uint8
    assert state["layers.0.self_attn.q_proj.weight"].shape == (64, 32)
    assert state["layers.1.mlp.down_proj.scales"].shape == state["layers.1.mlp.down_proj.zeros"].shape == (64, 6)
    quantize_(decoder := small_decoder(), "int8")
    state = decoder.state_dict()
    assert state["lm_head.weight"].dtype == torch.int8
    assert state["lm_head.scales"].shape == (100,)
    assert not any(name.endswith("zeros") for name in state)


@pytest.mark.parametrize("kind", KINDS[:2], ids=str)
@torch.no_grad()
def test_tied_head_is_a_quantized_copy_and_the_embedding_stays(kind: Quantization) -> None:
    decoder = small_decoder()
    before = decoder.embed_tokens.weight.clone()
    quantize_(decoder, kind)
    assert torch.equal(decoder.embed_tokens.weight, before)
    assert isinstance(decoder.lm_head, QuantizedHead)
    assert (decoder.lm_head.matrix() - before).norm() < 0.1 * before.norm()


@pytest.mark.parametrize("name", ["int8", "int4"])
@torch.no_grad()
def test_a_decoder_generates_the_logits_of_its_dequantized_weights(name: str) -> None:
    decoder = small_decoder(tie_embeddings=False)
    quantize_(decoder, name)
    floats = small_decoder(tie_embeddings=False)
    for path, module in decoder.named_modules():
        if isinstance(module, QuantizedLinear):
            floats.get_submodule(path).weight.copy_(module.dequantize())
    tokens = torch.randint(100, (2, 9))
    positions = torch.arange(9).expand(2, -1)
    expected = floats(tokens, positions)
    pack_(decoder)
    cache = KVCache(decoder.config, 2, 9)
    for i in range(9):
        found = decoder.next_logits(
            tokens[:, i : i + 1], positions[:, i : i + 1], cache, torch.zeros(2, dtype=torch.int64)
        )
        assert found.dtype == torch.float32
        torch.testing.assert_close(found, expected[:, i], atol=0.02 * float(expected.abs().max()), rtol=0)


def test_the_head_gives_the_loss_of_its_dequantized_weights() -> None:
    decoder = small_decoder(tie_embeddings=False)
    quantize_(decoder, "int8")
    floats = copy.deepcopy(decoder)
    hidden = torch.randn(1, 6, 64, requires_grad=True)
    tokens = torch.randint(100, (1, 6))
    targets = Targets(tokens, torch.ones(1, 6), torch.zeros_like(tokens), 1)
    loss = decoder.lm_head(hidden, targets).loss
    plain = torch.nn.functional.cross_entropy((hidden @ floats.lm_head.dequantize().T)[0], tokens[0], reduction="sum")
    torch.testing.assert_close(loss, plain)
    found, expected = (torch.autograd.grad(x, hidden)[0] for x in (loss, plain))
    torch.testing.assert_close(found, expected)


@torch.no_grad()
def test_a_change_of_dtype_leaves_codes_scales_and_zeros_alone() -> None:
    layer = quantize_linear(linear(16, 64), "int4")
    before = {k: v.clone() for k, v in layer.state_dict().items()}
    layer.half().double().to(torch.float32)
    for name, tensor in layer.state_dict().items():
        assert tensor.dtype == before[name].dtype
        assert torch.equal(tensor, before[name])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
@torch.no_grad()
def test_the_output_has_the_dtype_of_the_input(dtype: torch.dtype) -> None:
    for name in ("int8", "int4"):
        layer = quantize_linear(linear(16, 64), name)
        layer.pack()
        x = torch.randn(3, 64)
        y = layer(x.to(dtype))
        assert y.dtype == dtype
        torch.testing.assert_close(y.float(), layer(x), atol=2e-2, rtol=2e-2)


@torch.no_grad()
def test_a_packed_layer_says_that_it_cannot_be_stored_or_dequantized() -> None:
    layer = quantize_linear(linear(20, 64), "int4")
    layer.pack()
    for use in (layer.state_dict, layer.dequantize):
        with pytest.raises(PlaitError, match="packed for generation"):
            use()


@pytest.mark.parametrize(
    ("bits", "group_size", "message"),
    [
        (3, 0, "bits is 3, must be 8 or 4"),
        (True, 0, "bits is True"),
        (4, 0, "group_size is 0, must be 32, 64, 128, 256 with 4 bits"),
        (8, 64, "group_size is 64, must be 0 with 8 bits"),
        (4, 48, "group_size is 48"),
    ],
)
def test_refused_settings(bits: int, group_size: int, message: str) -> None:
    with pytest.raises(PlaitError, match=message):
        Quantization(bits, group_size)


def test_refused_name() -> None:
    with pytest.raises(PlaitError, match="quantize: is 'int2', must be int8 or int4"):
        quantize_(small_decoder(), "int2")


def test_a_tensor_is_named_when_shapes_differ() -> None:
    decoder = small_decoder()
    quantize_(decoder, "int8")
    state: dict[str, Tensor] = decoder.state_dict()
    quantize_(other := small_decoder(), "int4")
    with pytest.raises(RuntimeError, match=r"q_proj\.weight"):
        other.load_state_dict(state)


@torch.no_grad()
def test_torchao_multiplies_with_about_the_same_weights() -> None:
    pytest.importorskip("torchao")
    from plait.model.quantize_gpu import use_torchao_

    decoder = small_decoder(tie_embeddings=False, qkv_bias=True)
    quantize_(decoder, "int8")
    tokens, positions = torch.randint(100, (1, 7)), torch.arange(7)[None]
    expected = decoder(tokens, positions)
    use_torchao_(decoder, torch.float32)
    assert not any(isinstance(module, QuantizedLinear) for module in decoder.modules())
    torch.testing.assert_close(decoder(tokens, positions), expected, atol=0.03 * float(expected.abs().max()), rtol=0)
    cache = KVCache(decoder.config, 1, 7)
    found = decoder.next_logits(tokens, positions, cache, torch.tensor([6]))
    torch.testing.assert_close(found, expected[:, -1], atol=0.03 * float(expected.abs().max()), rtol=0)
