"""What goes through the KV cache, in any portions, gives the logits of one full forward."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from plait.errors import PlaitError
from plait.model.cache import KVCache
from plait.model.config import DecoderConfig
from plait.model.decoder import Decoder

VOCABULARY = 50


def random_decoder(**fields: Any) -> Decoder:
    torch.manual_seed(0)
    decoder = Decoder(DecoderConfig(vocabulary_size=VOCABULARY, width=32, layers=2, **fields))
    for parameter in decoder.parameters():
        if parameter.ndim == 2:
            torch.nn.init.normal_(parameter, std=0.2)
    return decoder.eval().requires_grad_(False)


@pytest.fixture(params=[(4, 4), (4, 1)], ids=["heads=kv_heads", "grouped"])
def decoder(request: pytest.FixtureRequest) -> Decoder:
    heads, kv_heads = request.param
    return random_decoder(heads=heads, kv_heads=kv_heads)


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


def feed(decoder: Decoder, cache: KVCache, tokens: Tensor, start: int = 0) -> Tensor:
    """Logits of tokens ``[B, T]`` that stand from ``start`` on."""
    return decoder(tokens, torch.arange(start, start + tokens.shape[1]).expand_as(tokens), cache)


def test_a_fork_goes_on_as_its_source_would() -> None:
    decoder = random_decoder()
    prompt, ends = torch.randint(VOCABULARY, (1, 6)), torch.randint(VOCABULARY, (4, 5))
    cache = KVCache(decoder.config, 4, 11)
    feed(decoder, cache, torch.randint(VOCABULARY, (4, 9)))  # what the rows held before is gone
    feed(decoder, cache.narrow(2, 3), prompt)
    cache.fork(2, [0, 1, 3], 6)
    expected = full(decoder, torch.cat([prompt.expand(4, -1), ends], 1))
    torch.testing.assert_close(feed(decoder, cache, ends, 6), expected[:, 6:], atol=1e-5, rtol=0)


def test_a_fork_of_a_part_leaves_the_rest_alone() -> None:
    decoder = random_decoder()
    tokens = torch.randint(VOCABULARY, (2, 8))
    cache = KVCache(decoder.config, 2, 8)
    feed(decoder, cache, tokens)
    before = cache.keys.clone()
    cache.fork(0, [1], 3)
    assert torch.equal(cache.keys[:, 1, :, :3], before[:, 0, :, :3])
    assert torch.equal(cache.keys[:, 1, :, 3:], before[:, 1, :, 3:])
    assert torch.equal(cache.keys[:, 0], before[:, 0])


def test_a_row_goes_back_by_reading_from_there() -> None:
    """A new request keeps what its prompt has in common with the one before."""
    decoder = random_decoder()
    first, second = torch.randint(VOCABULARY, (2, 1, 12))
    second[:, :5] = first[:, :5]
    cache = KVCache(decoder.config, 1, 12)
    feed(decoder, cache, first)
    torch.testing.assert_close(feed(decoder, cache, second[:, 5:9], 5), full(decoder, second)[:, 5:9])


def test_reserve_keeps_what_is_there(decoder: Decoder) -> None:
    tokens = torch.randint(VOCABULARY, (2, 9))
    cache = KVCache(decoder.config, 2, 4)
    parts = [feed(decoder, cache, tokens[:, :4])]
    for capacity in (6, 5, 9):
        cache.reserve(capacity)
    assert cache.capacity == 9
    parts.append(feed(decoder, cache, tokens[:, 4:], 4))
    torch.testing.assert_close(torch.cat(parts, 1), full(decoder, tokens), atol=1e-5, rtol=0)


def test_a_narrow_cache_is_the_same_memory() -> None:
    decoder = random_decoder()
    tokens = torch.randint(VOCABULARY, (3, 6))
    whole, parts = KVCache(decoder.config, 3, 6), KVCache(decoder.config, 3, 6)
    feed(decoder, whole, tokens)
    feed(decoder, parts.narrow(0, 1), tokens[:1])
    feed(decoder, parts.narrow(1, 3), tokens[1:])
    torch.testing.assert_close(parts.keys, whole.keys, atol=1e-5, rtol=0)
    torch.testing.assert_close(parts.values, whole.values, atol=1e-5, rtol=0)


def test_padding_with_the_last_token_changes_nothing(decoder: Decoder) -> None:
    tokens = torch.randint(VOCABULARY, (2, 7))
    cache = KVCache(decoder.config, 2, 7)
    feed(decoder, cache, tokens[:, :3])
    padded = torch.tensor([[*tokens[0, 3:7]], [tokens[1, 3], tokens[1, 4], tokens[1, 4], tokens[1, 4]]])
    logits = decoder(padded, torch.tensor([[3, 4, 5, 6], [3, 4, 4, 4]]), cache)
    expected = full(decoder, tokens)
    torch.testing.assert_close(logits[0], expected[0, 3:], atol=1e-5, rtol=0)
    torch.testing.assert_close(logits[1, [0, 1, 3]], expected[1, [3, 4, 4]], atol=1e-5, rtol=0)
    rest = decoder(tokens[1:, 5:], torch.tensor([[5, 6]]), cache.narrow(1, 2))
    torch.testing.assert_close(rest[0], expected[1, 5:], atol=1e-5, rtol=0)


@settings(max_examples=30, deadline=None)
@given(
    st.lists(st.lists(st.integers(0, 4), min_size=3, max_size=3), min_size=1, max_size=12),
    st.sampled_from([0, 5]),
    st.booleans(),
    st.integers(0, 2**30),
)
def test_any_portions_of_rows_of_different_lengths(
    steps: list[list[int]], window: int, padded_with_last: bool, seed: int
) -> None:
    """Rows advance by different numbers of tokens; a ring, where there is a window, is overwritten many times."""
    steps = [[1, 2, 3], *steps]
    decoder = random_decoder(sliding_window=window)
    generator = torch.Generator().manual_seed(seed)
    lengths = [sum(row) for row in zip(*steps, strict=True)]
    rows = [torch.randint(VOCABULARY, (n,), generator=generator) for n in lengths]
    expected = [full(decoder, row[None])[0] for row in rows]
    cache = KVCache(decoder.config, 3, 60, chunk=4)
    assert cache.keys.shape[3] == (5 + 4 - 1 if window else 60)
    fed = [0, 0, 0]
    for sizes in steps:
        tokens, positions = [], []
        for i, size in enumerate(sizes):
            places = list(range(fed[i], fed[i] + max(sizes)))
            if padded_with_last:
                places = [min(p, fed[i] + size - 1) for p in places]
            positions.append(places)
            tokens.append([int(rows[i][p]) if p < fed[i] + size else 7 for p in places])
        if not tokens[0]:
            continue
        logits = decoder(torch.tensor(tokens), torch.tensor(positions), cache)
        for i, size in enumerate(sizes):
            found = logits[i, :size]
            torch.testing.assert_close(found, expected[i][fed[i] : fed[i] + size], atol=1e-5, rtol=0)
            fed[i] += size


@pytest.mark.parametrize("portions", [[30], [1] * 30, [4] * 7 + [2], [3, 1, 1, 4, 4, 2, 3, 4, 1, 1, 1, 4, 1]], ids=str)
@pytest.mark.parametrize("window", [1, 2, 5, 29, 30, 64])
def test_a_window_is_that_of_one_full_forward(portions: list[int], window: int) -> None:
    decoder = random_decoder(sliding_window=window)
    tokens = torch.randint(VOCABULARY, (2, 30))
    cache = KVCache(decoder.config, 2, 30, chunk=max(portions))
    parts, start = [], 0
    for size in portions:
        parts.append(feed(decoder, cache, tokens[:, start : start + size], start))
        start += size
    torch.testing.assert_close(torch.cat(parts, 1), full(decoder, tokens), atol=1e-5, rtol=0)
    assert cache.keys.shape[3] == min(30, window + max(portions) - 1)


@torch.no_grad()
def test_a_window_is_that_many_tokens_alone() -> None:
    """Of one layer, as only differences of positions matter."""
    decoder, plain = (random_decoder(sliding_window=window) for window in (6, 0))
    for each in (decoder, plain):
        each.layers = each.layers[:1]
    tokens = torch.randint(VOCABULARY, (1, 20))
    cache = KVCache(decoder.config, 1, 20, chunk=2)
    for i in range(20):
        expected = full(plain, tokens[:, max(0, i - 5) : i + 1])[:, -1:]
        torch.testing.assert_close(feed(decoder, cache, tokens[:, i : i + 1], i), expected, atol=1e-5, rtol=0)


def test_a_window_has_no_end() -> None:
    decoder = random_decoder(sliding_window=5)
    tokens = torch.randint(VOCABULARY, (1, 40))
    cache = KVCache(decoder.config, 1, 6, chunk=3)
    feed(decoder, cache, tokens[:, :6])
    assert cache.capacity == 6
    cache.reserve(1000)
    assert cache.capacity is None
    assert cache.keys.shape[3] == 7
    logits = [feed(decoder, cache, tokens[:, i : i + 2], i) for i in range(6, 40, 2)]
    torch.testing.assert_close(torch.cat(logits, 1), full(decoder, tokens)[:, 6:], atol=1e-5, rtol=0)


def test_a_fork_of_a_ring() -> None:
    decoder = random_decoder(sliding_window=4)
    tokens = torch.randint(VOCABULARY, (3, 30))
    tokens[1:, :20] = tokens[:1, :20]
    cache = KVCache(decoder.config, 3, 100, chunk=3)
    for i in range(20):
        feed(decoder, cache.narrow(0, 1), tokens[:1, i : i + 1], i)
    cache.fork(0, [1, 2])
    logits = [feed(decoder, cache, tokens[:, i : i + 2], i) for i in range(20, 30, 2)]
    torch.testing.assert_close(torch.cat(logits, 1), full(decoder, tokens)[:, 20:], atol=1e-5, rtol=0)


@pytest.mark.parametrize("length", range(15))
def test_a_ring_goes_back_as_far_as_its_window_is_kept(length: int) -> None:
    decoder = random_decoder(sliding_window=4)
    tokens = torch.randint(VOCABULARY, (1, 15))
    cache = KVCache(decoder.config, 1, 100, chunk=5)  # 8 slots hold positions 7 to 14
    for i in range(0, 15, 5):
        feed(decoder, cache, tokens[:, i : i + 5], i)
    assert cache.reaches(0, length) == (length >= 10)
    changed = torch.randint(VOCABULARY, (1, 20))
    changed[:, :length] = tokens[:, :length]
    if cache.reaches(0, length):
        logits = [feed(decoder, cache, changed[:, i : i + 1], i) for i in range(length, 20)]
        torch.testing.assert_close(torch.cat(logits, 1), full(decoder, changed)[:, length:], atol=1e-5, rtol=0)
        assert not cache.reaches(0, length)
    else:
        with pytest.raises(PlaitError, match="a row goes back further than its window is kept"):
            feed(decoder, cache, changed[:, length : length + 1], length)


def test_too_much_at_once_for_a_ring() -> None:
    decoder = random_decoder(sliding_window=4)
    cache = KVCache(decoder.config, 1, 100, chunk=3)
    with pytest.raises(PlaitError, match="4 tokens at once are more than the 3 of the cache's chunk"):
        feed(decoder, cache, torch.zeros(1, 4, dtype=torch.int64))
