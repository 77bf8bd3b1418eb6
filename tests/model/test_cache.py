"""What goes through the KV cache, in any portions, gives the logits of one full forward."""

import pytest
import torch
from torch import Tensor

from plait.errors import PlaitError
from plait.model.cache import KVCache
from plait.model.config import DecoderConfig
from plait.model.decoder import Decoder

VOCABULARY = 50


@pytest.fixture(params=[(4, 4), (4, 1)], ids=["heads=kv_heads", "grouped"])
def decoder(request: pytest.FixtureRequest) -> Decoder:
    torch.manual_seed(0)
    heads, kv_heads = request.param
    decoder = Decoder(DecoderConfig(vocabulary_size=VOCABULARY, width=32, layers=2, heads=heads, kv_heads=kv_heads))
    for parameter in decoder.parameters():
        if parameter.ndim == 2:
            torch.nn.init.normal_(parameter, std=0.2)
    return decoder.eval().requires_grad_(False)


def full(decoder: Decoder, tokens: Tensor) -> Tensor:
    return decoder(tokens, torch.arange(tokens.shape[1]).expand_as(tokens))


@pytest.mark.parametrize("portions", [[1] * 15, [15], [4, 1, 1, 7, 2], [1, 14]], ids=str)
def test_any_portions_give_the_full_forward(decoder: Decoder, portions: list[int]) -> None:
    tokens = torch.randint(VOCABULARY, (3, 15))
    cache = KVCache(decoder.config, 3, 15)
    parts, start = [], 0
    for size in portions:
        positions = torch.arange(start, start + size).expand(3, -1)
        parts.append(decoder(tokens[:, start : start + size], positions, cache))
        start += size
    torch.testing.assert_close(torch.cat(parts, 1), full(decoder, tokens), atol=1e-5, rtol=0)


def test_right_padded_rows_of_different_lengths(decoder: Decoder) -> None:
    """Rows advance by different numbers of tokens a step, one of them not at all; the padding is noise."""
    steps = [[5, 2, 7], [1, 3, 0], [2, 1, 1], [1, 1, 4]]
    lengths = [sum(row) for row in zip(*steps, strict=True)]
    rows = [torch.randint(VOCABULARY, (n,)) for n in lengths]
    expected = [full(decoder, row[None])[0] for row in rows]
    cache = KVCache(decoder.config, 3, 24)
    fed = torch.zeros(3, dtype=torch.int64)
    for sizes in steps:
        width = max(sizes)
        tokens = torch.randint(VOCABULARY, (3, width))
        for i, size in enumerate(sizes):
            tokens[i, :size] = rows[i][fed[i] : fed[i] + size]
        last = torch.tensor([max(0, size - 1) for size in sizes])
        logits = decoder.next_logits(tokens, fed[:, None] + torch.arange(width), cache, last)
        fed += torch.tensor(sizes)
        for i, size in enumerate(sizes):
            if size:
                torch.testing.assert_close(logits[i], expected[i][fed[i] - 1], atol=1e-5, rtol=0)
    assert fed.tolist() == lengths


def test_a_full_cache_is_a_clear_error(decoder: Decoder) -> None:
    cache = KVCache(decoder.config, 1, 4)
    decoder(torch.zeros(1, 4, dtype=torch.int64), torch.arange(4)[None], cache)
    with pytest.raises(PlaitError, match=r"position 4 is beyond the cache's 4 slots"):
        decoder(torch.zeros(1, 1, dtype=torch.int64), torch.tensor([[4]]), cache)


def test_overflow_leaves_the_cache_as_it_was(decoder: Decoder) -> None:
    cache = KVCache(decoder.config, 1, 4)
    decoder(torch.ones(1, 3, dtype=torch.int64), torch.arange(3)[None], cache)
    before = cache.keys.clone()
    with pytest.raises(PlaitError):
        decoder(torch.zeros(1, 3, dtype=torch.int64), torch.arange(3, 6)[None], cache)
    assert torch.equal(cache.keys, before)


def test_cache_holds_kv_heads_only() -> None:
    config = DecoderConfig(vocabulary_size=9, width=32, heads=4, kv_heads=2, layers=3)
    cache = KVCache(config, 5, 7, dtype=torch.bfloat16)
    assert cache.keys.shape == cache.values.shape == (3, 5, 2, 7, 8)
    assert cache.keys.dtype == torch.bfloat16


def test_next_logits_are_float32_in_any_dtype(decoder: Decoder) -> None:
    decoder.bfloat16()
    cache = KVCache(decoder.config, 1, 3, dtype=torch.bfloat16)
    logits = decoder.next_logits(torch.tensor([[1, 2, 3]]), torch.arange(3)[None], cache, torch.tensor([2]))
    assert logits.dtype == torch.float32
    assert logits.shape == (1, VOCABULARY)
