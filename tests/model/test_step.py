"""The pass of generation gives what the decoder's modules give, whatever they are and however they were changed."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor

from plait.model.cache import KVCache
from plait.model.config import DecoderConfig, RopeScaling
from plait.model.decoder import Decoder
from plait.model.quantize import quantize_

VOCABULARY = 60

pytestmark = pytest.mark.usefixtures("kind")

CONFIGS: list[dict[str, Any]] = [
    {},
    {"kv_heads": 1, "qk_norm": "none", "tie_embeddings": False},
    {"kv_heads": 4, "qk_norm": "layer", "norm_placement": "post"},
    {"qkv_bias": True, "sliding_window": 3, "qk_norm": "none"},
    {"head_size": 6, "width": 20, "rope_scaling": RopeScaling("yarn", factor=4.0, original_context=8)},
    {"rope_scaling": RopeScaling("dynamic", factor=2.0, original_context=4), "norm_eps": 0.1},
]


def random_decoder(seed: int = 0, **fields: Any) -> Decoder:
    torch.manual_seed(seed)
    config = DecoderConfig(vocabulary_size=VOCABULARY, **({"width": 32, "layers": 2, "heads": 4} | fields))
    decoder = Decoder(config).eval()
    with torch.no_grad():
        for parameter in decoder.parameters():
            if parameter.ndim == 1:
                parameter.uniform_(0.5, 1.5)
            else:
                parameter.normal_(std=0.2)
    return decoder


def run(decoder: Decoder, stepped: bool, portions: tuple[int, ...] = (4, 1, 2, 1), rows: int = 3) -> Tensor:
    """The logits after each portion of the same tokens, by `next_logits` or by the modules' own forward."""
    tokens = torch.randint(VOCABULARY, (rows, sum(portions)), generator=torch.Generator().manual_seed(1))
    cache = KVCache(decoder.config, rows, sum(portions), dtype=decoder.embed_tokens.weight.dtype)
    found, start = [], 0
    for size in portions:
        part = tokens[:, start : start + size]
        positions = torch.arange(start, start + size).expand(rows, -1)
        if stepped:
            found.append(decoder.next_logits(part, positions, cache, torch.full((rows,), size - 1)))
        else:
            with torch.no_grad():
                logits = decoder(part, positions, cache)
            assert isinstance(logits, Tensor)
            found.append(logits[:, -1].float())
        start += size
    return torch.stack(found)


def check(decoder: Decoder, **near: float) -> None:
    torch.testing.assert_close(run(decoder, True), run(decoder, False), **(near or {"atol": 1e-5, "rtol": 1e-5}))


@pytest.mark.parametrize("fields", CONFIGS, ids=str)
def test_it_equals_the_modules(fields: dict[str, Any]) -> None:
    decoder = random_decoder(**fields)
    assert run(decoder, False).std() > 0.5
    check(decoder)


@pytest.mark.parametrize("fields", CONFIGS[:3], ids=str)
def test_in_other_dtypes(fields: dict[str, Any]) -> None:
    decoder = random_decoder(**fields)
    run(decoder, True)  # in float32 first
    check(decoder.double())
    check(decoder.bfloat16(), atol=0.2, rtol=0.05)


def test_with_quantized_layers() -> None:
    decoder = random_decoder(width=64)
    run(decoder, True)
    quantize_(decoder, "int8")
    check(decoder, atol=0.05, rtol=0.0)


def test_changes_of_weights_and_parts_are_seen() -> None:
    decoder, other = random_decoder(), random_decoder(seed=5)
    first = run(decoder, True)

    def changed() -> None:
        nonlocal first
        check(decoder)
        again = run(decoder, True)
        assert (again - first).abs().max() > 1e-3
        first = again

    with torch.no_grad():
        decoder.layers[1].mlp.up_proj.weight.mul_(1.5)
    changed()
    decoder.layers[0].self_attn.q_proj.weight.data = torch.randn(32, 32)
    changed()
    decoder.load_state_dict({name: tensor.clone() for name, tensor in other.state_dict().items()}, assign=True)
    decoder.lm_head.weight = decoder.embed_tokens.weight
    changed()
    decoder.layers[0].mlp.down_proj = torch.nn.Linear(decoder.config.ffn_width, 32)
    changed()
    decoder.layers[1] = copy.deepcopy(decoder.layers[0])
    decoder.layers[1].self_attn.layer = 1
    changed()
    decoder.layers[1].post_attention_layernorm = torch.nn.LayerNorm(32)
    changed()


def test_a_copy_has_its_own_weights() -> None:
    decoder = random_decoder()
    before = run(decoder, True)
    twin = copy.deepcopy(decoder)
    with torch.no_grad():
        for parameter in decoder.parameters():
            parameter.zero_()
    assert torch.equal(run(twin, True), before)
    check(twin)


def test_hooks_run() -> None:
    decoder = random_decoder()
    run(decoder, True)
    seen: list[torch.Size] = []
    handle = decoder.layers[0].mlp.register_forward_hook(lambda module, inputs, out: seen.append(out.shape))
    run(decoder, True)
    assert seen == [(3, 4, 32), (3, 1, 32), (3, 2, 32), (3, 1, 32)]
    handle.remove()
    run(decoder, True)
    assert len(seen) == 4


def test_dropout_in_training_only() -> None:
    decoder = random_decoder(dropout=0.5)
    assert torch.equal(run(decoder, True), run(decoder, True))
    decoder.train()
    assert not torch.equal(run(decoder, True), run(decoder, True))


def test_the_logits_may_be_changed_and_the_decoder_trained_afterwards() -> None:
    decoder = random_decoder()
    logits = run(decoder, True)
    logits[0] += 1
    logits.requires_grad_(True)
    tokens = torch.randint(VOCABULARY, (1, 6))
    out = decoder(tokens, torch.arange(6)[None])
    assert isinstance(out, Tensor)
    out.sum().backward()
    assert all(parameter.grad is not None for parameter in decoder.parameters())
