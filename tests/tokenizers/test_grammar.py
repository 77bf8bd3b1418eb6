"""Every property holds for a modality of no axes (text), of two (image) and of three (video, made up here)."""

import random
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from plait.errors import PlaitError
from plait.tokenizers.grammar import Cursor, Grammar, Span
from plait.tokenizers.modalities import MODALITIES, Axis, SpanGrammar
from plait.tokenizers.vocabulary import Vocabulary

UNLIMITED = 1 << 60
CODES = {"text": 300, "image": 60, "video": 60}


@pytest.fixture(scope="module")
def grammar(text_tokenizer: Any, visual_tokenizer: Any) -> Iterator[Grammar]:
    axes = (Axis("time", "<frame>"), Axis("height", "<row>"), Axis("width"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(MODALITIES, "video", replace(MODALITIES["image"], grammar=SpanGrammar("video", axes)))
        tokenizers = {"text": text_tokenizer, "visual": visual_tokenizer}
        yield Grammar(Vocabulary.build(tokenizers, ["text", "image", "video"]))


def span(modality: str, *shape: int, seed: int = 0) -> Span:
    generator = torch.Generator().manual_seed(seed)
    return Span(modality, torch.randint(CODES[modality], shape, generator=generator))


def spans(most: int = 4, side: int = 5) -> st.SearchStrategy[list[Span]]:
    sides, seeds = st.integers(1, side), st.integers(0, 1 << 30)
    one = st.one_of(
        st.builds(lambda n, s: span("text", n, seed=s), st.integers(0, 2 * side), seeds),
        st.builds(lambda h, w, s: span("image", h, w, seed=s), sides, sides, seeds),
        st.builds(lambda t, h, w, s: span("video", t, h, w, seed=s), st.integers(1, 3), sides, sides, seeds),
    )
    return st.lists(one, max_size=most)


def same(a: list[Span], b: list[Span]) -> bool:
    return len(a) == len(b) and all(
        x.modality == y.modality and torch.equal(x.codes, y.codes) for x, y in zip(a, b, strict=True)
    )


def test_an_image_is_written_as_documented(grammar: Grammar) -> None:
    names = grammar.vocabulary.describe
    ids = grammar.document([Span("image", torch.tensor([[7, 8, 9], [0, 59, 1]])), Span("text", torch.tensor([4]))])
    expected = (
        "<bos>|<image>|number 2|number 3|visual.0 7|visual.0 8|visual.0 9|<row>|visual.0 0|visual.0 59|visual.0 1|<row>"
        "|</image>|<text>|text.0 4|</text>|<eos>"
    )
    assert [names(i) for i in ids.tolist()] == expected.split("|")


def test_marks_nest(grammar: Grammar) -> None:
    names = grammar.vocabulary.describe
    ids = grammar.write(Span("video", torch.tensor([[[1], [2]], [[3], [4]]])))
    expected = (
        "<video>|number 2|number 2|number 1|visual.0 1|<row>|visual.0 2|<row>|<frame>|visual.0 3|<row>|visual.0 4|<row>"
        "|<frame>|</video>"
    )
    assert [names(i) for i in ids.tolist()] == expected.split("|")


@settings(deadline=None, max_examples=100)
@given(document=spans(side=9))
def test_parsing_undoes_writing(grammar: Grammar, document: list[Span]) -> None:
    ids = grammar.document(document)
    assert ids.dtype == torch.int64
    assert same(grammar.parse(ids), document)
    assert same(grammar.parse(ids.tolist()), document)
    for part in document:
        assert grammar.length(part) == len(grammar.write(part)) == len(grammar.choices(part))
    assert len(ids) == 2 + sum(map(grammar.length, document))


@pytest.mark.parametrize("part", [span("image", 1, 1023), span("image", 1023, 1), span("text", 5000)], ids=str)
def test_the_largest_grids_round_trip(grammar: Grammar, part: Span) -> None:
    assert same(grammar.parse(grammar.document([part])), [part])


@pytest.mark.parametrize("dtype", [torch.int32, torch.int16, torch.uint8])
def test_other_integer_types_are_written_alike(grammar: Grammar, dtype: torch.dtype) -> None:
    part = span("image", 3, 2)
    assert torch.equal(grammar.write(Span("image", part.codes.to(dtype))), grammar.write(part))


@settings(deadline=None, max_examples=60)
@given(document=spans())
def test_choices_are_where_the_cursor_has_a_choice(grammar: Grammar, document: list[Span]) -> None:
    cursor = Cursor(grammar, UNLIMITED)
    for part in document:
        free = grammar.choices(part)
        assert free.dtype == torch.bool
        for token, choice in zip(grammar.write(part).tolist(), free.tolist(), strict=True):
            assert (sum(map(len, cursor.allowed())) > 1) == choice
            cursor.push(token)


def test_choices_are_begin_header_codes_and_free_ends(grammar: Grammar) -> None:
    image = "TTT" + "TTF" * 2 + "F"
    assert "".join("FT"[c] for c in grammar.choices(span("image", 2, 2)).tolist()) == image
    assert grammar.choices(span("text", 3)).all()
    assert grammar.choices(span("text", 0)).tolist() == [True, True]
    assert "".join("FT"[c] for c in grammar.choices(span("video", 1, 2, 1)).tolist()) == "TTTT" + "TF" * 2 + "F" + "F"


@settings(deadline=None, max_examples=60)
@given(document=spans())
def test_a_document_fits_its_length_and_nothing_less(grammar: Grammar, document: list[Span]) -> None:
    ids = grammar.document(document).tolist()[1:]

    def accepted(budget: int) -> bool:
        cursor = Cursor(grammar, budget)
        for token in ids:
            if not cursor.allows(token):
                return False
            cursor.push(token)
        return cursor.done

    assert accepted(len(ids))
    assert accepted(len(ids) + 1)
    assert len(ids) == 1 or not accepted(len(ids) - 1)


def walk(cursor: Cursor, choose: Any) -> list[int]:
    """Push what ``choose`` picks from the allowed ranges until the document ends."""
    ids = [cursor.grammar.bos]
    while not cursor.done:
        ranges = cursor.allowed()
        assert ranges
        assert all(len(choices) > 0 for choices in ranges)
        ids.append(choose(ranges))
        assert cursor.allows(ids[-1])
        cursor.push(ids[-1])
        assert cursor.budget >= 0
    assert cursor.allowed() == []
    assert not cursor.allows(cursor.grammar.eos)
    return ids


@settings(deadline=None, max_examples=200)
@given(budget=st.integers(1, 300), seed=st.integers(0, 1 << 30), greed=st.sampled_from(["random", "long", "large"]))
def test_sampled_documents_end_in_time_and_parse(grammar: Grammar, budget: int, seed: int, greed: str) -> None:
    draw = random.Random(seed)

    def choose(ranges: list[range]) -> int:
        if greed != "random" and len(ranges) > 1:
            ranges = ranges[:-1]  # never end of one's own accord
        chosen = draw.choice(ranges)
        return chosen[-1] if greed == "large" else draw.choice(chosen)

    cursor = Cursor(grammar, budget)
    ids = walk(cursor, choose)
    assert len(ids) - 1 == budget - cursor.budget <= budget
    assert same(grammar.parse(ids), cursor.spans)
    assert grammar.document(cursor.spans).tolist() == ids
    if greed == "long" and budget > 3:
        # Text, the smallest span, takes 2 tokens and <eos> 1; what is left over is too small for another span.
        assert cursor.budget < 2


@pytest.mark.parametrize("modality", ["text", "image", "video"])
@pytest.mark.parametrize("budget", range(1, 40))
def test_a_budget_is_used_to_the_full(grammar: Grammar, modality: str, budget: int) -> None:
    """With one modality and no wish to end, what remains is less than its smallest span."""
    cursor, begin = Cursor(grammar, budget), grammar.form(modality).begin

    def choose(ranges: list[range]) -> int:
        between = grammar.eos in ranges[-1]
        return next((r[0] for r in ranges if begin in r), grammar.eos) if between else ranges[0][0]

    walk(cursor, choose)
    assert {part.modality for part in cursor.spans} <= {modality}
    smallest = {"text": 2, "image": 6, "video": 8}[modality]
    assert grammar.form(modality).least == smallest
    assert cursor.budget < smallest


def test_the_mask_offers_the_largest_header_that_fits(grammar: Grammar) -> None:
    numbers = grammar.vocabulary.block("number").ids
    for budget in range(7, 60):
        cursor = Cursor(grammar, budget)
        cursor.push(grammar.form("image").begin)
        heights = [h for h in range(1, 60) if 4 + h * 2 + 1 <= budget]
        assert cursor.allowed() == [numbers[1 : heights[-1] + 1]]
        for height in heights:
            taller = Cursor(grammar, budget)
            taller.push(grammar.form("image").begin)
            taller.push(numbers[height])
            widths = [w for w in range(1, 60) if 4 + height * (w + 1) + 1 <= budget]
            assert taller.allowed() == [numbers[1 : widths[-1] + 1]]


def test_without_a_budget_every_number_but_zero_is_offered(grammar: Grammar) -> None:
    numbers = grammar.vocabulary.block("number").ids
    cursor = Cursor(grammar, UNLIMITED)
    cursor.push(grammar.form("image").begin)
    assert cursor.allowed() == [numbers[1:]]
    cursor.push(numbers[1023])
    assert cursor.allowed() == [numbers[1:]]


def test_the_open_span_is_told(grammar: Grammar) -> None:
    cursor = Cursor(grammar, UNLIMITED)
    seen = [cursor.open]
    for token in grammar.write(Span("image", torch.tensor([[5, 6]]))).tolist():
        cursor.push(token)
        seen.append(cursor.open and (*cursor.open[:2], list(cursor.open[2])))
    header, shape = ("image", (1,), []), ("image", (1, 2))
    assert seen == [None, ("image", (), []), header, (*shape, []), (*shape, [5]), *[(*shape, [5, 6])] * 2, None]


@settings(deadline=None, max_examples=30)
@given(document=spans(most=3, side=3))
def test_every_truncation_is_refused(grammar: Grammar, document: list[Span]) -> None:
    ids = grammar.document(document).tolist()
    for end in range(len(ids)):
        with pytest.raises(PlaitError):
            grammar.parse(ids[:end])
    for start in range(1, len(ids)):
        with pytest.raises(PlaitError):
            grammar.parse(ids[start:])


@settings(deadline=None, max_examples=25)
@given(document=spans(most=3, side=3), seed=st.integers(0, 1 << 30))
def test_a_corrupted_document_is_refused_or_another_one(grammar: Grammar, document: list[Span], seed: int) -> None:
    vocabulary, ids = grammar.vocabulary, grammar.document(document).tolist()
    specials = [vocabulary.special(token) for block in vocabulary.blocks for token in block.tokens]
    edges = [i for block in vocabulary.blocks for i in (block.ids[0], block.ids[1], block.ids[-1])]
    draw = random.Random(seed)
    for position, old in enumerate(ids):
        around = [old - 1, old + 1, draw.randrange(vocabulary.size)]
        for token in {*specials, *edges, *around, -1, vocabulary.size} - {old}:
            corrupted = [*ids[:position], token, *ids[position + 1 :]]
            try:
                found = grammar.parse(corrupted)
            except PlaitError:
                continue
            # No two documents share their spans: what parses writes back to exactly the corrupted ids.
            assert grammar.document(found).tolist() == corrupted
            assert not same(found, document)


@settings(deadline=None, max_examples=50)
@given(document=spans(most=3, side=3), seed=st.integers(0, 1 << 30))
def test_lost_and_doubled_tokens_never_pass_unseen(grammar: Grammar, document: list[Span], seed: int) -> None:
    ids = grammar.document(document).tolist()
    position = random.Random(seed).randrange(len(ids))
    for edited in (ids[:position] + ids[position + 1 :], [*ids[:position], ids[position], *ids[position:]]):
        try:
            found = grammar.parse(edited)
        except PlaitError:
            continue
        assert grammar.document(found).tolist() == edited


def test_errors_name_the_token(grammar: Grammar) -> None:
    ids = grammar.document([span("image", 2, 2)]).tolist()
    row = ids.index(grammar.vocabulary.special("<row>"))
    with pytest.raises(PlaitError, match=r"^token 6: number 5 where <row> is expected$"):
        grammar.parse([*ids[:row], grammar.vocabulary.block("number").ids[5], *ids[row + 1 :]])
    with pytest.raises(PlaitError, match=r"^token 2: number 0 where number 1–number 1023 is expected$"):
        grammar.parse([*ids[:2], grammar.vocabulary.block("number").ids[0], *ids[3:]])
    with pytest.raises(PlaitError, match=r"^token 12: <eos> after <eos>$"):
        grammar.parse([*ids, grammar.eos])
    with pytest.raises(PlaitError, match=r"^token 0: a document begins with <bos>, found nothing$"):
        grammar.parse([])
    with pytest.raises(PlaitError, match=r"^token 0: a document begins with <bos>, found <image>$"):
        grammar.parse(ids[1:])
    with pytest.raises(PlaitError, match=r"^document ends after 11 tokens, <text> or .* or <eos> is missing"):
        grammar.parse(ids[:-1])


@pytest.mark.parametrize(
    ("modality", "codes", "message"),
    [
        ("image", torch.tensor([[60]]), r"found 60\.\.60.* 0\.\.59"),
        ("image", torch.tensor([[0, -1]]), r"found -1\.\.0"),
        ("text", torch.tensor([300]), r"found 300\.\.300.* 0\.\.299"),
        ("image", torch.tensor([[1.0]]), "dtype is torch.float32"),
        ("text", torch.tensor([1.5]), "dtype is torch.float32"),
        ("image", torch.zeros(4, dtype=torch.int64), r"shape is \(4,\), expected height × width, each 1 to 1023"),
        ("image", torch.zeros(1, 2, 2, dtype=torch.int64), "shape is"),
        ("image", torch.zeros(0, 4, dtype=torch.int64), "shape is"),
        ("image", torch.zeros(4, 0, dtype=torch.int64), "shape is"),
        ("image", torch.zeros(1, 1024, dtype=torch.int64), "shape is"),
        ("image", torch.zeros(1024, 1, dtype=torch.int64), "shape is"),
        ("image", torch.tensor(3), "shape is"),
        ("text", torch.zeros(1, 4, dtype=torch.int64), r"shape is \(1, 4\), expected one dimension"),
        ("text", torch.tensor(3), "shape is"),
        ("video", torch.zeros(2, 2, dtype=torch.int64), "expected time × height × width"),
    ],
)
def test_codes_that_do_not_fit_are_refused(grammar: Grammar, modality: str, codes: torch.Tensor, message: str) -> None:
    with pytest.raises(PlaitError, match=f"^{modality} codes: .*{message}"):
        grammar.document([Span(modality, codes)])
    if "shape" in message or "expected" in message:
        with pytest.raises(PlaitError):
            grammar.length(Span(modality, codes))
        with pytest.raises(PlaitError):
            grammar.choices(Span(modality, codes))


def test_unknown_modalities_are_refused(vocabulary: Vocabulary) -> None:
    grammar = Grammar(vocabulary)
    for use in (
        lambda: grammar.write(Span("video", torch.zeros(1, 1, 1, dtype=torch.int64))),
        lambda: grammar.length(Span("smell", torch.zeros(1))),
    ):
        with pytest.raises(PlaitError, match="this model has no such modality; it has text, image"):
            use()
