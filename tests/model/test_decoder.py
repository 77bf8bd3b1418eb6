"""The decoder on documents packed in any way, recomputed or compiled; its numbers are in test_parity.py."""

from typing import Any

import pytest
import torch
from random_decoders import VOCABULARY, random_decoder
from torch import Tensor

from plait.errors import PlaitError
from plait.model.config import DecoderConfig, RopeScaling
from plait.model.decoder import Decoder
from plait.model.loss import Targets
from plait.model.packing import FlexPacking, MaskPacking, Packing, document_lengths, lay_out


def along(*lengths: int) -> Tensor:
    """Positions of one row that holds documents of these lengths."""
    return torch.cat([torch.arange(n) for n in lengths])[None]


# What changes how tokens see each other or where they stand.
KINDS: dict[str, dict[str, Any]] = {
    "llama": {"qk_norm": "none"},
    "rms": {"qk_norm": "rms", "kv_heads": 1},
    "chameleon": {"qk_norm": "layer", "norm_placement": "post", "kv_heads": 4},
    "biases": {"qkv_bias": True, "tie_embeddings": False},
    "window": {"sliding_window": 4},
    "dynamic": {"rope_scaling": RopeScaling("dynamic", 4.0, 6)},
    "yarn": {"rope_scaling": RopeScaling("yarn", 4.0, 6)},
}
# Lengths of the documents in each row; the last are of one length, and need no gathering.
PACKED = [[(5, 9, 6), (20,)], [(1, 9, 3, 7), (2, 18)], [(1, 9, 10), (17, 3)], [(10, 10), (10, 10)], [(20,), (20,)]]


@pytest.mark.parametrize("rows", PACKED, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_packed_document_is_as_alone_in_logits_and_gradients(kind: str, rows: list[tuple[int, ...]]) -> None:
    decoder = random_decoder(**{"width": 32, "layers": 2, "heads": 4, "kv_heads": 2} | KINDS[kind])
    tokens = torch.randint(VOCABULARY, (2, 20))
    positions = torch.cat([along(*lengths) for lengths in rows])
    probe = torch.randn(2, 20, VOCABULARY)

    def run(tokens: Tensor, positions: Tensor, probe: Tensor) -> tuple[Tensor, list[Tensor]]:
        logits = decoder(tokens, positions)
        return logits, list(torch.autograd.grad((logits * probe).sum(), list(decoder.parameters())))

    for row, lengths in enumerate(rows):
        for i, length in enumerate(lengths):
            part = slice(sum(lengths[:i]), sum(lengths[:i]) + length)
            only = torch.zeros_like(probe)
            only[row, part] = probe[row, part] / probe[row, part].numel()
            packed, packed_gradients = run(tokens, positions, only)
            packed = packed[row, part]
            alone, alone_gradients = run(tokens[row : row + 1, part], along(length), only[row : row + 1, part])
            alone = alone[0]
            torch.testing.assert_close(packed, alone, atol=1e-5, rtol=0)
            for a, b in zip(packed_gradients, alone_gradients, strict=True):
                torch.testing.assert_close(a, b, atol=1e-5, rtol=0)


@pytest.mark.parametrize("window", [0, 5])
@pytest.mark.parametrize("rows", PACKED, ids=str)
def test_the_packings_see_the_same(rows: list[tuple[int, ...]], window: int) -> None:
    torch.manual_seed(0)
    positions = torch.cat([along(*lengths) for lengths in rows])
    q, k, v = (torch.randn(2, 20, heads, 16) for heads in (4, 2, 2))
    expected = Packing.of(positions).attend(q, k, v, 0, window, 0.0)
    for other in (FlexPacking.of(positions, window), MaskPacking.of(positions, window)):
        torch.testing.assert_close(other.attend(q, k, v, 0, window, 0.0), expected, atol=1e-5, rtol=0)


def targets_of(tokens: Tensor) -> Targets:
    return Targets(tokens.roll(-1, 1), torch.ones(tokens.shape), torch.zeros_like(tokens), 1)


def gradients(decoder: Decoder, tokens: Tensor, positions: Tensor) -> list[Tensor]:
    torch.manual_seed(5)  # of dropout
    decoder.zero_grad()
    decoder(tokens, positions, targets=targets_of(tokens)).loss.backward()
    return [parameter.grad.clone() for parameter in decoder.parameters()]


def test_recomputed_activations_give_the_same_gradients() -> None:
    decoder = random_decoder(width=32, layers=3, dropout=0.2, attention_dropout=0.2).train()
    tokens, positions = torch.randint(VOCABULARY, (2, 20)), torch.cat([along(5, 9, 6), along(20)])
    expected = gradients(decoder, tokens, positions)
    decoder.checkpoint_activations = True
    seen = []
    decoder.layers[0].register_forward_pre_hook(lambda *_: seen.append(1))
    for a, b in zip(gradients(decoder, tokens, positions), expected, strict=True):
        torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-5)
    assert len(seen) == 2


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["rms", "dynamic"])
def test_a_whole_decoder_compiles_without_a_break(kind: str) -> None:
    decoder = random_decoder(**{"width": 32, "layers": 2, "heads": 4, "kv_heads": 2} | KINDS[kind])
    tokens, positions = torch.randint(VOCABULARY, (2, 20)), torch.cat([along(5, 9, 6), along(20)])
    torch._dynamo.reset()
    compiled = torch.compile(decoder, fullgraph=True)
    torch.testing.assert_close(compiled(tokens, positions), decoder(tokens, positions), atol=1e-4, rtol=1e-4)
    expected = gradients(decoder, tokens, positions)
    decoder.zero_grad()
    compiled(tokens, positions, targets=targets_of(tokens)).loss.backward()
    for a, b in zip(decoder.parameters(), expected, strict=True):
        torch.testing.assert_close(a.grad, b, atol=1e-4, rtol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["rms", "chameleon", "window"])
def test_blocks_compile_without_a_break(kind: str) -> None:
    decoder = random_decoder(**{"width": 32, "layers": 2, "heads": 4, "kv_heads": 2} | KINDS[kind])
    tokens, positions = torch.randint(VOCABULARY, (2, 20)), torch.cat([along(5, 9, 6), along(20)])
    expected = gradients(decoder, tokens, positions)
    torch._dynamo.reset()
    for block in decoder.layers:
        block.compile(fullgraph=True)
    for a, b in zip(gradients(decoder, tokens, positions), expected, strict=True):
        torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_neighbours_do_not_matter() -> None:
    decoder = random_decoder(width=32, layers=2)
    tokens = torch.randint(VOCABULARY, (2, 20))
    positions = torch.cat([along(5, 9, 6), along(12, 8)])
    other = torch.randint(VOCABULARY, (2, 20))
    other[0, 5:14] = tokens[0, 5:14]
    a, b = decoder(tokens, positions), decoder(other, positions)
    torch.testing.assert_close(a[0, 5:14], b[0, 5:14], atol=1e-5, rtol=0)
    assert (a[0, 14:] - b[0, 14:]).abs().max() > 0.1


@pytest.mark.parametrize("tail", [along(7), torch.zeros(1, 7, dtype=torch.int64), 11 + along(7)])
@torch.no_grad()
def test_padding_tail_does_not_matter(tail: Tensor) -> None:
    decoder = random_decoder(width=32, layers=2)
    tokens = torch.randint(VOCABULARY, (1, 18))
    padded = decoder(tokens, torch.cat([along(11), tail], dim=1))[:, :11]
    torch.testing.assert_close(padded, decoder(tokens[:, :11], along(11)), atol=1e-5, rtol=0)


@torch.no_grad()
def test_positions_restart_and_later_tokens_are_not_seen() -> None:
    decoder = random_decoder(width=32, layers=2)
    document = torch.randint(VOCABULARY, (1, 8))
    logits = decoder(document.repeat(1, 2), along(8, 8))
    torch.testing.assert_close(logits[:, :8], logits[:, 8:], atol=1e-5, rtol=0)
    changed = document.clone()
    changed[0, 5] = (changed[0, 5] + 1) % VOCABULARY
    again = decoder(changed, along(8))
    torch.testing.assert_close(again[:, :5], logits[:, :5], atol=1e-5, rtol=0)
    assert (again[:, 5:] - logits[:, 5:8]).abs().amax(-1).min() > 1e-3


def test_packing_restarts_on_every_row() -> None:
    # The second row continues a document's numbering, and still must not see the first row.
    positions = torch.tensor([[0, 1, 0, 1], [2, 3, 4, 0]])
    starts, lengths = lay_out(positions)
    assert lengths.tolist() == [2, 2, 3, 1]
    assert starts.tolist() == [0, 2, 4, 7]
    assert document_lengths(positions).tolist() == [[2, 2, 2, 2], [3, 3, 3, 1]]


def test_documents_of_like_length_share_a_bucket() -> None:
    packing = Packing.of(along(40, 3, 200, 17, 16, 33, 70))
    kept = [b.gather if b.valid is None else b.gather[b.valid] for b in packing.buckets]
    assert [b.gather.shape for b in packing.buckets] == [(2, 16), (1, 17), (2, 40), (1, 70), (1, 200)]
    assert torch.equal(torch.cat([k.flatten() for k in kept])[packing.order], torch.arange(379))


def test_packing_leaves_the_positions_alone() -> None:
    positions = torch.tensor([[3, 4, 0, 1]])
    Packing.of(positions)
    assert positions.tolist() == [[3, 4, 0, 1]]


def test_tied_head_shares_the_embedding() -> None:
    tied = Decoder(DecoderConfig(vocabulary_size=9, width=16))
    untied = Decoder(DecoderConfig(vocabulary_size=9, width=16, tie_embeddings=False))
    assert tied.lm_head.weight is tied.embed_tokens.weight
    assert untied.lm_head.weight is not untied.embed_tokens.weight
    assert not torch.equal(untied.lm_head.weight, untied.embed_tokens.weight)


def test_initial_weights_scale_with_depth() -> None:
    torch.manual_seed(0)
    decoder = Decoder(DecoderConfig(vocabulary_size=400, width=128, layers=8))
    weights = dict(decoder.named_parameters())
    for name, std in (
        ("embed_tokens.weight", 0.02),
        ("layers.3.self_attn.q_proj.weight", 0.02),
        ("layers.3.self_attn.o_proj.weight", 0.02 / 4),
        ("layers.3.mlp.down_proj.weight", 0.02 / 4),
    ):
        assert weights[name].std().item() == pytest.approx(std, rel=0.05)
    assert all(torch.equal(w, torch.ones_like(w)) for w in weights.values() if w.ndim == 1)


def test_dropout_is_on_in_training_only() -> None:
    decoder = random_decoder(width=32, layers=1, dropout=0.5)
    tokens = torch.randint(VOCABULARY, (1, 6))
    assert torch.equal(decoder(tokens, along(6)), decoder(tokens, along(6)))
    decoder.train()
    assert not torch.equal(decoder(tokens, along(6)), decoder(tokens, along(6)))


@torch.no_grad()
def test_a_row_is_one_document_unless_positions_say_otherwise() -> None:
    decoder = random_decoder(width=32, layers=2)
    tokens = torch.randint(VOCABULARY, (2, 9))
    assert torch.equal(decoder(tokens), decoder(tokens, torch.arange(9).repeat(2, 1)))


def test_vocabulary_size_must_be_set() -> None:
    with pytest.raises(PlaitError, match="vocabulary_size is not set"):
        Decoder(DecoderConfig())
