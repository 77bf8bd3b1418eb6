import random
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from plait.errors import PlaitError
from plait.model.loss import Targets
from plait.tokenizers.grammar import Grammar, Span
from plait.tokenizers.vocabulary import Block, Vocabulary
from plait.train.documents import TokenDocument
from plait.train.recipe import SequenceConfig
from plait.train.sequences import Batch, Sequence, arrange, encode, fit, pack_sequences

TEXT = Span("text", torch.tensor([5, 6, 7]))
IMAGE = Span("image", torch.arange(6).reshape(2, 3))


@pytest.fixture(scope="module")
def grammar(vocabulary: Vocabulary) -> Grammar:
    return Grammar(vocabulary)


def names(weighted: list[tuple[Span, float]]) -> list[tuple[str, float]]:
    return [(span.modality, weight) for span, weight in weighted]


def arranged(document: TokenDocument, seed: int = 0, **config: float) -> list[tuple[str, float]]:
    return names(arrange(document, SequenceConfig(**config), random.Random(seed)))  # type: ignore[arg-type]


@pytest.mark.parametrize("spans", [[TEXT, IMAGE], [IMAGE, TEXT]])
def test_pair_is_turned_or_dropped_with_its_weights(spans: list[Span]) -> None:
    pair = TokenDocument(spans)
    assert arranged(pair, media_first=1, drop_text=1, context_loss=0.25) == [("image", 0.25), ("text", 1)]
    assert arranged(pair, media_first=0, drop_text=0, context_loss=0.25) == [("text", 0.25), ("image", 1)]
    assert arranged(pair, media_first=0, drop_text=1, context_loss=0.25) == [("image", 1)]


def test_several_media_keep_their_order() -> None:
    other = Span("image", torch.zeros(1, 1, dtype=torch.int64))
    weighted = arrange(TokenDocument([IMAGE, TEXT, other]), SequenceConfig(media_first=1), random.Random(0))
    assert [span for span, _ in weighted] == [IMAGE, other, TEXT]


@pytest.mark.parametrize("spans", [[TEXT], [IMAGE], [TEXT, IMAGE, TEXT]])
def test_only_pairs_are_touched(spans: list[Span]) -> None:
    for media_first in (0, 1):
        found = arranged(TokenDocument(spans), media_first=media_first, drop_text=1, context_loss=0)
        assert found == [(span.modality, 1) for span in spans]


def test_given_order_is_kept() -> None:
    found = arranged(TokenDocument([TEXT, IMAGE], ordered=True), media_first=1, drop_text=1)
    assert found == [("text", 1), ("image", 1)]


def test_loss_weights_and_flags_multiply() -> None:
    silent = Span("image", IMAGE.codes, loss=False)
    config = SequenceConfig(media_first=0, drop_text=0, context_loss=0.5, loss_weights={"text": 4, "image": 3})
    draw = random.Random(0)
    assert names(arrange(TokenDocument([TEXT, IMAGE]), config, draw)) == [("text", 2), ("image", 3)]
    assert names(arrange(TokenDocument([TEXT, silent]), config, draw)) == [("text", 2), ("image", 0)]


def test_shares_are_those_of_the_recipe() -> None:
    pair, config = TokenDocument([TEXT, IMAGE]), SequenceConfig(media_first=0.3, drop_text=0.2)
    found = [tuple(m for m, _ in names(arrange(pair, config, random.Random(seed)))) for seed in range(4000)]
    assert abs(found.count(("image", "text")) / 4000 - 0.3) < 0.03
    assert abs(found.count(("image",)) / 4000 - 0.7 * 0.2) < 0.02


def test_same_seed_same_arrangement() -> None:
    pair = TokenDocument([TEXT, IMAGE])
    first = [arranged(pair, seed) for seed in range(50)]
    assert first == [arranged(pair, seed) for seed in range(50)]
    assert len({str(f) for f in first}) > 1


def test_turning_share_does_not_move_the_drop() -> None:
    pair = TokenDocument([TEXT, IMAGE])
    for seed in range(100):
        if arranged(pair, seed, media_first=0.5, drop_text=0.5)[0][0] == "image":
            continue
        assert arranged(pair, seed, media_first=0, drop_text=0.5)[0][0] == "text"


def test_weights_are_zero_exactly_at_forced_tokens(grammar: Grammar) -> None:
    sequence = encode([(TEXT, 0.5), (IMAGE, 2.0)], grammar)
    vocabulary = grammar.vocabulary
    named = [vocabulary.describe(int(token)) for token in sequence.ids]
    expected = [
        ("<bos>", 0), ("<text>", 0.5), *[("text", 0.5)] * 3, ("</text>", 0.5),
        ("<image>", 2), ("number", 2), ("number", 2),
        *[("visual", 2)] * 3, ("<row>", 0), *[("visual", 2)] * 3, ("<row>", 0), ("</image>", 0), ("<eos>", 2),
    ]  # fmt: skip
    assert len(named) == len(expected)
    for token, weight, (name, wanted) in zip(named, sequence.weights.tolist(), expected, strict=True):
        assert token.startswith(name)
        assert weight == wanted, token
    modalities = list(grammar.forms)
    groups = [modalities[g] for g in sequence.groups.tolist()]
    assert groups[1:] == ["text"] * 5 + ["image"] * 13


@settings(deadline=None, max_examples=50)
@given(st.lists(st.tuples(st.booleans(), st.integers(1, 4), st.integers(1, 4), st.booleans()), min_size=1, max_size=4))
def test_weights_follow_the_parser(grammar: Grammar, plan: list[tuple[bool, int, int, bool]]) -> None:
    """Weight where the cursor leaves more than one id, and nowhere in a span without loss."""
    spans = [
        Span("text" if text else "image", torch.zeros(h if text else (h, w), dtype=torch.int64), loss)
        for text, h, w, loss in plan
    ]
    ordered = arrange(TokenDocument(spans, ordered=True), SequenceConfig(), random.Random(0))
    sequence = encode(ordered, grammar)
    assert torch.equal(sequence.ids, grammar.document(spans))
    position = 1
    for span in spans:
        length, free = grammar.length(span), grammar.choices(span)
        inside = sequence.weights[position : position + length]
        assert torch.equal(inside > 0, free & span.loss)
        position += length
    assert sequence.weights[0] == 0
    assert sequence.weights[-1] == float(spans[-1].loss)


@given(st.lists(st.integers(1, 50), max_size=40))
def test_fit_is_a_valid_packing(lengths: list[int]) -> None:
    bins = fit(lengths, 50)
    assert sorted(i for members in bins for i in members) == list(range(len(lengths)))
    totals = [sum(lengths[i] for i in members) for members in bins]
    assert all(0 < total <= 50 for total in totals)
    # First fit: two bins that fit together would have been one.
    assert all(a + b > 50 for i, a in enumerate(totals) for b in totals[i + 1 :])
    assert bins == fit(lengths, 50)


def test_fit_fills_exactly() -> None:
    assert fit([2, 3, 5, 4, 6], 10) == [[4, 3], [2, 1, 0]]


def document(start: int, n: int) -> Sequence:
    return Sequence(torch.arange(start, start + n), torch.arange(n) + 1.0, torch.full((n,), start % 2))


def test_packed_sequences() -> None:
    packed = pack_sequences([document(10, 4), document(21, 3)], 10, pad=99)
    assert packed["tokens"].tolist() == [10, 11, 12, 13, 21, 22, 23, 99, 99, 99]
    assert packed["positions"].tolist() == [0, 1, 2, 3, 0, 1, 2, 0, 1, 2]
    assert packed["next"].tolist() == [11, 12, 13, 99, 22, 23, 99, 99, 99, 99]
    assert packed["weights"].tolist() == [2, 3, 4, 0, 2, 3, 0, 0, 0, 0]
    assert packed["groups"].tolist()[4:6] == [1, 1]


def test_packed_without_room_to_spare() -> None:
    packed = pack_sequences([document(10, 4), document(20, 1), document(30, 3)], 8, pad=99)
    assert packed["positions"].tolist() == [0, 1, 2, 3, 0, 0, 1, 2]
    assert packed["weights"].tolist() == [2, 3, 4, 0, 0, 2, 3, 0]
    assert 99 not in packed["tokens"]


def test_modality_that_the_vocabulary_lacks(tokenizers: Path, vocabulary: Vocabulary) -> None:
    from plait.tokenizers.loading import load_tokenizers

    only_text = Grammar(Vocabulary.build(load_tokenizers(tokenizers), ["text"]))
    with pytest.raises(PlaitError, match="image"):
        encode([(IMAGE, 1.0)], only_text)


def test_batches_split_and_join() -> None:
    tokens = torch.arange(12).reshape(6, 2)
    batch = Batch(tokens, tokens + 100, Targets(tokens + 200, tokens / 2, tokens % 2, 3))
    parts = batch.split(4)
    assert [part.tokens.tolist() for part in parts] == [tokens[:4].tolist(), tokens[4:].tolist()]
    assert parts[1].targets.weights.tolist() == (tokens[4:] / 2).tolist()
    again = Batch.join(parts).to(torch.device("cpu"))
    assert torch.equal(again.tokens, batch.tokens)
    assert torch.equal(again.positions, batch.positions)
    for name in ("tokens", "weights", "groups"):
        assert torch.equal(getattr(again.targets, name), getattr(batch.targets, name))
    assert again.targets.group_count == parts[0].targets.group_count == 3


def test_text_without_marks_is_learned_with_its_end() -> None:
    """As of a language model from elsewhere that has learned images."""
    blocks = (Block("special", 0, 2, ("<s>", "</s>")), Block("text.0", 2, 300))
    plain = Vocabulary(blocks, grammar="text", names={"<bos>": 0, "<eos>": 1, "<pad>": 1})
    books = (
        SimpleNamespace(codebook_sizes=[300], fingerprint="t"),
        SimpleNamespace(codebook_sizes=[60], fingerprint="v"),
    )
    grammar = Grammar(plain.grow("text", "text", books[0]).grow("image", "visual", books[1]))  # type: ignore[arg-type]
    sequence = encode([(TEXT, 0.5), (IMAGE, 2.0), (Span("text", torch.arange(0)), 0.25)], grammar)
    names = [grammar.vocabulary.describe(i) for i in sequence.ids.tolist()]
    assert names[:6] == ["<s>", "text.0 5", "text.0 6", "text.0 7", "<image>", "number 2"]
    assert sequence.weights.tolist() == [0, 0.5, 0.5, 0.5, *[2] * 3, *[2, 2, 2, 0] * 2, 0, 0.25]
    assert sequence.groups.tolist() == [0, 0, 0, 0, *[1] * 13]
