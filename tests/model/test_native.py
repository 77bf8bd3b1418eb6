"""The native pass gives what PyTorch gives, for any sizes, instructions, threads and numbers of bits."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from plait.errors import PlaitError
from plait.model import native
from plait.model.cache import KVCache
from plait.model.config import DecoderConfig, RopeScaling
from plait.model.decoder import Decoder
from plait.model.native import TOKENS
from plait.model.quantize import Quantization, QuantizedLinear, quantize_

pytestmark = pytest.mark.skipif(native.library() is None, reason="the native code was not built")

VOCABULARY = 61
ODD: dict[str, Any] = {"width": 22, "heads": 6, "kv_heads": 2, "head_size": 10, "ffn_width": 37, "qkv_bias": True}
KINDS = [None, Quantization(8), Quantization(4, 32), Quantization(4, 128)]


@pytest.fixture(params=[0, 1, 2], ids=["plain", "avx2", "avx512"])
def instructions(request: pytest.FixtureRequest) -> Iterator[int]:
    library = native.library()
    assert library is not None
    if library.plait_instructions(request.param) != request.param:
        pytest.skip("this processor does not have them")
    yield request.param
    library.plait_instructions(2)


@pytest.fixture(params=[1, 3])
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


@torch.no_grad()
def decoders(kind: Quantization | None = None, **fields: Any) -> tuple[Decoder, Decoder]:
    """One with these weights, quantized perhaps, and one of floats that computes the same."""
    torch.manual_seed(0)
    config = DecoderConfig(vocabulary_size=VOCABULARY, **({"layers": 2, **ODD} | fields))
    decoder = Decoder(config).eval().requires_grad_(False)
    for parameter in decoder.parameters():
        if parameter.ndim == 1:
            parameter.uniform_(0.5, 1.5)
        else:
            parameter.normal_(std=0.2)
    floats = Decoder(config).eval().requires_grad_(False)
    if config.tie_embeddings and kind is not None:
        floats.lm_head.weight = nn.Parameter(decoder.embed_tokens.weight.clone())
    floats.load_state_dict(decoder.state_dict())
    if kind is not None:
        quantize_(decoder, kind)
        for name, module in decoder.named_modules():
            if isinstance(module, QuantizedLinear):
                floats.get_submodule(name).weight.copy_(module.dequantize())
    return decoder, floats


@torch.no_grad()
def check(decoder: Decoder, floats: Decoder, portions: tuple[int, ...] = (1, 3, 1, 5), rows: int = 1) -> None:
    tokens = torch.randint(VOCABULARY, (rows, sum(portions)))
    caches = [KVCache(decoder.config, rows, sum(portions)) for _ in range(2)]
    start = 0
    for size in portions:
        part = tokens[:, start : start + size]
        positions = torch.arange(start, start + size).expand(rows, -1)
        start += size
        found = decoder.next_logits(part, positions, caches[0], torch.full((rows,), size - 1))
        expected = floats(part, positions, caches[1])
        assert isinstance(expected, Tensor)
        assert expected.std() > 0.3
        torch.testing.assert_close(found, expected[:, -1], atol=2e-5, rtol=2e-5)
    assert decoder._step is not None
    assert decoder._step.native is not None
    torch.testing.assert_close(caches[0].keys, caches[1].keys, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(caches[0].values, caches[1].values, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", KINDS, ids=str)
@pytest.mark.parametrize(
    "fields", [{}, {"width": 96, "ffn_width": 136, "head_size": 64, "heads": 2, "kv_heads": 1}], ids=str
)
def test_odd_and_even_sizes(kind: Quantization | None, fields: dict[str, Any], instructions: int) -> None:
    check(*decoders(kind, **fields))
    check(*decoders(kind, **fields), portions=(1, 1), rows=7)


@pytest.mark.parametrize(
    "fields",
    [
        {"norm_placement": "post", "qk_norm": "layer"},
        {"qk_norm": "none", "tie_embeddings": False, "norm_eps": 0.1},
        {"rope_scaling": RopeScaling("yarn", factor=4.0, original_context=8), "qkv_bias": False},
        {"kv_heads": 6},
    ],
    ids=str,
)
def test_architectures(fields: dict[str, Any], threads: int) -> None:
    check(*decoders(**fields), rows=2)


def test_a_window_and_the_ring_that_it_becomes(threads: int) -> None:
    decoder, floats = decoders(sliding_window=4)
    tokens = torch.randint(VOCABULARY, (2, 23))
    cache = KVCache(decoder.config, 2, 23, chunk=3)
    assert cache.capacity is None
    expected = floats(tokens, torch.arange(23).expand(2, -1))
    assert isinstance(expected, Tensor)
    start = 0
    for size in (3, 1, 1, 2, 3, 3, 1, 3, 1, 1, 1, 3):
        positions = torch.arange(start, start + size).expand(2, -1)
        start += size
        found = decoder.next_logits(tokens[:, start - size : start], positions, cache, torch.full((2,), size - 1))
        torch.testing.assert_close(found, expected[:, start - 1], atol=1e-5, rtol=1e-5)


def test_rows_of_different_lengths_in_a_part_of_a_cache() -> None:
    decoder, floats = decoders()
    lengths = [3, 9, 6]
    tokens = torch.randint(VOCABULARY, (3, 10))
    whole = KVCache(decoder.config, 5, 10)
    whole.keys.normal_()
    cache = whole.narrow(1, 4)
    for i, length in enumerate(lengths):
        part = whole.narrow(1 + i, 2 + i)
        decoder.next_logits(tokens[i : i + 1, :length], torch.arange(length)[None], part, torch.tensor([length - 1]))
    last = torch.tensor(lengths)[:, None]
    found = decoder.next_logits(tokens.gather(1, last), last, cache, torch.zeros(3, dtype=torch.int64))
    for i, length in enumerate(lengths):
        expected = floats(tokens[i : i + 1, : length + 1], torch.arange(length + 1)[None])
        assert isinstance(expected, Tensor)
        torch.testing.assert_close(found[i], expected[0, -1], atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_a_long_row() -> None:
    decoder, floats = decoders(layers=1)
    check(decoder, floats, portions=(700, 1, 2))  # the first is too long for it, and by PyTorch


def test_as_many_tokens_as_it_takes_and_one_more() -> None:
    decoder, floats = decoders()
    for count in (TOKENS, TOKENS + 1):
        check(decoder, floats, portions=(count, 1))
        check(decoder, floats, portions=(1,), rows=count)


@torch.no_grad()
def test_an_unknown_head_or_embedding_is_called() -> None:
    class Doubled(nn.Embedding):
        def forward(self, tokens: Tensor) -> Tensor:
            return 2 * super().forward(tokens)

    decoder, floats = decoders(tie_embeddings=False)
    embedding = Doubled(VOCABULARY, 22)
    embedding.weight = nn.Parameter(decoder.embed_tokens.weight / 2)
    decoder.embed_tokens = embedding
    head = decoder.lm_head
    decoder.lm_head = nn.Sequential(head, nn.ReLU())
    floats.lm_head = nn.Sequential(floats.lm_head, nn.ReLU())
    check(decoder, floats)
    assert decoder._step is not None
    assert decoder._step.native is not None
    assert not decoder._step.native.has_head


def test_wrong_ids_and_a_full_cache_are_errors() -> None:
    decoder, _ = decoders()
    cache = KVCache(decoder.config, 1, 2)
    last = torch.zeros(1, dtype=torch.int64)
    for token in (-1, VOCABULARY):
        with pytest.raises(IndexError):
            decoder.next_logits(torch.tensor([[token]]), torch.tensor([[0]]), cache, last)
    with pytest.raises(PlaitError, match="position 2 is beyond"):
        decoder.next_logits(torch.tensor([[1]]), torch.tensor([[2]]), cache, last)


@torch.no_grad()
def test_large_scores_do_not_overflow() -> None:
    decoder, floats = decoders(qk_norm="none")
    for model in (decoder, floats):
        for layer in model.layers:
            layer.self_attn.q_proj.weight.mul_(30)
            layer.self_attn.k_proj.weight.mul_(30)
            layer.mlp.gate_proj.weight.mul_(100)
    tokens, positions = torch.randint(VOCABULARY, (1, 8)), torch.arange(8)[None]
    found = decoder.next_logits(tokens, positions, KVCache(decoder.config, 1, 8), torch.tensor([7]))
    expected = floats(tokens, positions)
    assert isinstance(expected, Tensor)
    assert found.isfinite().all()
    torch.testing.assert_close(found, expected[:, -1], atol=1e-3 * float(expected.abs().max()), rtol=0)
