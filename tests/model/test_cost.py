"""The formulas, against the decoder itself: its tensors, PyTorch's FLOP counter, what autograd keeps."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.distributed._tools.mem_tracker import MemTracker
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from plait.model.cache import KVCache
from plait.model.config import DecoderConfig
from plait.model.cost import (
    Learning,
    cache_bytes,
    count_activations,
    count_parameters,
    decode_bytes,
    forward_flops,
    mean_keys,
    training_flops,
)
from plait.model.decoder import Decoder
from plait.model.hollow import hollow
from plait.model.loss import Targets

SMALL = DecoderConfig(vocabulary_size=96, width=64, layers=3, heads=4, kv_heads=2, ffn_width=160)


@st.composite
def configs(draw: st.DrawFn) -> DecoderConfig:
    kv_heads = draw(st.integers(1, 3))
    return DecoderConfig(
        vocabulary_size=draw(st.integers(1, 300)),
        width=draw(st.integers(1, 9)) * 8,
        layers=draw(st.integers(1, 4)),
        heads=kv_heads * draw(st.integers(1, 3)),
        kv_heads=kv_heads,
        head_size=draw(st.integers(1, 8)) * 2,
        ffn_width=draw(st.integers(0, 100)),
        qk_norm=draw(st.sampled_from(("none", "rms", "layer"))),
        norm_placement=draw(st.sampled_from(("pre", "post"))),
        qkv_bias=draw(st.booleans()),
        tie_embeddings=draw(st.booleans()),
    )


@given(configs())
@settings(deadline=None)
def test_parameters_are_the_decoder_s(config: DecoderConfig) -> None:
    with hollow():
        decoder = Decoder(config)
    counted = count_parameters(config)
    assert counted.total == sum(p.numel() for p in decoder.parameters())
    assert counted.embedding == decoder.embed_tokens.weight.numel()
    assert {counted.block} == {sum(p.numel() for p in block.parameters()) for block in decoder.layers}
    assert counted.projections == sum(
        m.weight.numel() for m in decoder.layers[0].modules() if type(m) is torch.nn.Linear
    )
    assert counted.head == (0 if config.tie_embeddings else decoder.lm_head.weight.numel())
    assert counted.non_embedding == counted.total - counted.embedding - counted.head


def test_released_models_have_the_sizes_they_are_named_for() -> None:
    emu3 = DecoderConfig(184_622, 4096, 32, 32, 8, ffn_width=14336, qk_norm="none", tie_embeddings=False)
    chameleon = DecoderConfig(65_536, 4096, 32, 32, 32, ffn_width=11008, qk_norm="layer", tie_embeddings=False)
    large = DecoderConfig(65_536, 8192, 48, 64, 8, ffn_width=22016, qk_norm="layer", tie_embeddings=False)
    assert [round(count_parameters(c).total / 1e9, 2) for c in (emu3, chameleon, large)] == [8.49, 7.01, 34.29]


@pytest.mark.parametrize("config", [SMALL, replace(SMALL, heads=3, kv_heads=1, head_size=6, tie_embeddings=False)])
def test_flops_are_pytorch_s(config: DecoderConfig) -> None:
    decoder, length = Decoder(config), 24
    tokens, positions = torch.zeros(2, length, dtype=torch.int64), torch.arange(length).repeat(2, 1)
    counts = []
    for backward in (False, True):
        # The plain kernel, as the counter does not know the CPU's fused one.
        with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
            logits = decoder(tokens, positions)
            if backward:
                logits.sum().backward()
        by_name = {str(op): n / tokens.numel() for op, n in counter.get_flop_counts()["Global"].items()}
        assert set(by_name) == {"aten.mm", "aten.bmm"}
        counts.append((by_name["aten.mm"], by_name["aten.bmm"]))
    (matrices, attention), (trained_matrices, trained_attention) = counts
    forward, training = forward_flops(config, [length]), training_flops(config, [length])
    assert forward.projections + forward.head == matrices
    assert training.projections + training.head == trained_matrices
    # It computes the whole square.
    assert forward.attention == pytest.approx(attention * (length + 1) / (2 * length))
    assert training.attention == pytest.approx(trained_attention * (length + 1) / (2 * length))


@given(st.lists(st.integers(1, 12), min_size=1, max_size=4), st.integers(0, 14))
def test_keys_are_those_of_the_mask(documents: list[int], window: int) -> None:
    document = torch.arange(len(documents)).repeat_interleave(torch.tensor(documents))
    step = torch.arange(len(document))
    seen = (document[:, None] == document) & (step[:, None] >= step)
    if window:
        seen &= step[:, None] - step < window
    assert mean_keys(documents, window) == pytest.approx(seen.sum(1).double().mean().item())


def test_recomputation_is_one_more_forward_pass_of_the_blocks() -> None:
    forward, without, with_it = (
        forward_flops(SMALL, [50]),
        training_flops(SMALL, [50]),
        training_flops(SMALL, [50], recompute=True),
    )
    assert without.total == 3 * forward.total
    assert with_it.total - without.total == forward.projections + forward.attention


def test_what_does_not_learn_costs_less() -> None:
    forward = forward_flops(SMALL, [50])
    head_alone = training_flops(SMALL, [50], recompute=True, learning=Learning(0, 0.0, True))
    assert head_alone.total == forward.total + forward.head
    adapters = training_flops(SMALL, [50], learning=Learning(SMALL.layers, 0.0, False))
    assert adapters.total == 2 * forward.projections + 3 * forward.attention + 2 * forward.head


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_cache_bytes_are_the_cache_s(dtype: torch.dtype) -> None:
    cache = KVCache(SMALL, rows=2, capacity=16, dtype=dtype)
    held = cache.keys.nbytes + cache.values.nbytes
    assert cache_bytes(SMALL, dtype.itemsize) == held / (2 * cache.keys.shape[3])


@pytest.mark.parametrize("tied", [False, True])
def test_a_decoding_step_reads_all_but_the_embedding_s_other_rows(tied: bool) -> None:
    config = replace(SMALL, tie_embeddings=tied, sliding_window=10)
    decoder = Decoder(config).bfloat16()
    weights = sum(p.nbytes for name, p in decoder.named_parameters() if tied or name != "embed_tokens.weight")
    read = decode_bytes(config, 4, rows=3)
    assert read == weights + 3 * 2 * config.width + 3 * 4 * cache_bytes(config)
    assert decode_bytes(config, 50) == decode_bytes(config, 10)  # the window
    assert decode_bytes(config, 0, weight_bytes=1) * 2 == decode_bytes(config, 0)


MANY = replace(SMALL, layers=6)
VARIANTS = [
    MANY,
    replace(MANY, qk_norm="layer", norm_placement="post", tie_embeddings=False),
    replace(MANY, qk_norm="none", heads=4, kv_heads=4, ffn_width=96),
    replace(MANY, dropout=0.1),
]


@pytest.mark.parametrize("recompute", [False, True], ids=["kept", "recomputed"])
@pytest.mark.parametrize("config", VARIANTS)
def test_activations_are_about_what_is_held(config: DecoderConfig, recompute: bool) -> None:
    decoder, rows, length = Decoder(config), 4, 256
    decoder.checkpoint_activations = recompute
    tokens, positions = torch.zeros(rows, length, dtype=torch.int64), torch.arange(length).repeat(rows, 1)
    targets = Targets(tokens, torch.ones(rows, length), torch.zeros_like(tokens), 1)
    tracker = MemTracker()
    tracker.track_external(decoder, tokens, positions, targets.tokens, targets.weights, targets.groups)
    with tracker:
        decoder(tokens, positions, targets=targets).loss.backward()
    peak = tracker.get_tracker_snapshot("peak")[torch.device("cpu")]["Total"]
    predicted = count_activations(config, rows * length, 4, recompute=recompute)
    # Not all of a block is there when SwiGLU's gradients are at their widest, least so when it is computed again.
    assert 0.8 < (peak - 4 * count_parameters(config).total) / (predicted.kept + predicted.working) < 1.1


def test_a_frozen_beginning_keeps_nothing() -> None:
    head_alone = count_activations(SMALL, 100, learning=Learning(0, 0.0, True))
    assert head_alone.kept == 100 * 2 * SMALL.width * 2
    frozen_head = count_activations(SMALL, 100, learning=Learning(SMALL.layers, 1.0, False))
    assert frozen_head.kept == count_activations(SMALL, 100).kept
    assert frozen_head.working < count_activations(SMALL, 100).working


def test_the_loss_never_holds_all_logits() -> None:
    config = replace(SMALL, vocabulary_size=184_622, width=1024)
    working = count_activations(config, 4096).working
    assert working < 4096 * config.vocabulary_size * 4 + 3 * config.vocabulary_size * config.width * 4
    assert count_activations(config, 65536).working - working < 65536 * config.vocabulary_size
