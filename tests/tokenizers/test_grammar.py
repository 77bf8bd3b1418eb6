"""Every property holds for modalities of no axes (text) to three (video, made up here), of one codebook and several.

Sound has one axis and, here, three delayed codebooks; made up are ``film`` (two codebooks on a grid) and ``levels`` (of
different rates, as SNAC's).
"""

import math
import random
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from plait.errors import PlaitError
from plait.tokenizers.grammar import Cursor, Grammar, Span
from plait.tokenizers.layouts import build_layout
from plait.tokenizers.modalities import MODALITIES, Axis, SpanGrammar
from plait.tokenizers.vocabulary import Vocabulary

UNLIMITED = 1 << 60
SIZES = {"text": [300], "image": [60], "video": [60], "audio": [40, 17, 5], "film": [11, 7], "levels": [9, 8, 7]}
LEVELS = "interleave:4,2,1"


@dataclass
class Books:
    """What a vocabulary sees of a tokenizer."""

    codebook_sizes: list[int]
    layout: str | None = None
    fingerprint: str = ""


@pytest.fixture(scope="module")
def grammar(text_tokenizer: Any, visual_tokenizer: Any) -> Iterator[Grammar]:
    axes = (Axis("time", "<frame>"), Axis("height", "<row>"), Axis("width"))
    tokenizers = {
        "text": text_tokenizer, "visual": visual_tokenizer, "audio": Books(SIZES["audio"]),
        "film": Books(SIZES["film"]), "levels": Books(SIZES["levels"], LEVELS),
    }  # fmt: skip
    with pytest.MonkeyPatch.context() as patch:
        for name, tokenizer, declared in (
            ("video", "visual", axes),
            ("film", "film", axes),
            ("levels", "levels", MODALITIES["audio"].grammar.axes),
        ):
            entry = replace(MODALITIES["image"], tokenizer=tokenizer, grammar=SpanGrammar(name, declared))
            patch.setitem(MODALITIES, name, entry)
        yield Grammar(Vocabulary.build(tokenizers, SIZES, {"audio": "delay:0,1,1"}))  # type: ignore[arg-type]


def span(modality: str, *shape: int, seed: int = 0) -> Span:
    """Random codes on a grid of so many steps."""
    generator, sizes = torch.Generator().manual_seed(seed), torch.tensor(SIZES[modality])
    if modality == "levels":
        sizes = sizes[build_layout(LEVELS, 3).books(*shape)]
        shape = sizes.shape
    elif len(sizes) > 1:
        sizes = sizes.reshape(-1, *[1] * len(shape))
        shape = (len(sizes), *shape)
    return Span(modality, torch.randint(1 << 30, shape, generator=generator) % sizes)


def spans(most: int = 4, side: int = 5) -> st.SearchStrategy[list[Span]]:
    sides, seeds = st.integers(1, side), st.integers(0, 1 << 30)
    one = st.one_of(
        st.builds(lambda n, s: span("text", n, seed=s), st.integers(0, 2 * side), seeds),
        st.builds(lambda h, w, s: span("image", h, w, seed=s), sides, sides, seeds),
        st.builds(lambda t, h, w, s: span("video", t, h, w, seed=s), st.integers(1, 3), sides, sides, seeds),
        st.builds(lambda t, h, w, s: span("film", t, h, w, seed=s), st.integers(1, 2), sides, sides, seeds),
        st.builds(lambda t, s: span("audio", t, seed=s), sides, seeds),
        st.builds(lambda t, s: span("levels", t, seed=s), st.integers(1, 3), seeds),
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


@pytest.mark.parametrize(
    ("layout", "expected"),
    [
        ("flatten", "audio.0 10|audio.1 4|audio.0 11|audio.1 5|audio.0 12|audio.1 6"),
        ("delay", "audio.0 10|audio.0 11|audio.1 4|audio.0 12|audio.1 5|audio.1 6"),
    ],
)
def test_sound_is_written_as_documented(layout: str, expected: str) -> None:
    grammar = Grammar(Vocabulary.build({"audio": Books([20, 9])}, ["audio"], {"audio": layout}))  # type: ignore[dict-item]
    given = Span("audio", torch.tensor([[10, 11, 12], [4, 5, 6]]))
    ids = grammar.write(given).tolist()
    assert "|".join(map(grammar.vocabulary.describe, ids)) == f"<audio>|number 0|number 3|{expected}|</audio>"
    assert same(grammar.parse([grammar.bos, *ids, grammar.eos]), [given])


def test_sound_in_one_codebook_is_a_row_of_codes() -> None:
    grammar = Grammar(Vocabulary.build({"audio": Books([4096])}, ["audio"]))  # type: ignore[dict-item]
    codes = torch.arange(1500)
    ids = grammar.write(Span("audio", codes))
    numbers, block = (grammar.vocabulary.block(name).start for name in ("number", "audio.0"))
    form = grammar.form("audio")
    header = [form.begin, numbers + 1, numbers + 1500 - 1024]
    assert ids.tolist() == [*header, *(block + codes).tolist(), form.end]


def test_codebooks_alternate_in_every_cell_of_a_grid(grammar: Grammar) -> None:
    names = grammar.vocabulary.describe
    ids = grammar.write(Span("film", torch.tensor([[[[1, 2], [3, 4]]], [[[5, 6], [0, 1]]]])))
    expected = (
        "<film>|number 1|number 2|number 2|film.0 1|film.1 5|film.0 2|film.1 6|<row>|film.0 3|film.1 0|film.0 4"
        "|film.1 1|<row>|<frame>|</film>"
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


LARGE = [("image", 1, 1023), ("image", 1023, 1), ("text", 5000), ("levels", 1025)]
LARGE += [("audio", n) for n in (1022, 1023, 1024, 1025, 2047, 2048, 5000)]


@pytest.mark.parametrize("part", [span(*row) for row in LARGE], ids=[str(row) for row in LARGE])
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
    assert "".join("FT"[c] for c in grammar.choices(span("audio", 2)).tolist()) == "TTT" + "TTT" * 2 + "F"


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


@settings(deadline=None, max_examples=60)
@given(
    modality=st.sampled_from(["audio", "levels", "film", "image"]),
    budget=st.integers(30, 20_000),
    seed=st.integers(0, 1 << 30),
)
def test_long_spans_end_in_time_and_parse(grammar: Grammar, modality: str, budget: int, seed: int) -> None:
    """Headers at random among those allowed, so that sound has more than 1,023 steps, too."""
    draw, form = random.Random(seed), grammar.form(modality)

    def choose(ranges: list[range]) -> int:
        if cursor.open is None:
            return next((r[0] for r in ranges if form.begin in r and not cursor.spans), grammar.eos)
        (chosen,) = ranges
        return draw.choice([chosen[-1], draw.choice(chosen)])

    cursor = Cursor(grammar, budget)
    ids = walk(cursor, choose)
    assert len(ids) - 1 <= budget
    assert same(grammar.parse(ids), cursor.spans)
    assert grammar.document(cursor.spans).tolist() == ids


@pytest.mark.parametrize("modality", ["text", "image", "video", "audio", "levels", "film"])
@pytest.mark.parametrize("budget", range(1, 40))
def test_a_budget_is_used_to_the_full(grammar: Grammar, modality: str, budget: int) -> None:
    """With one modality and no wish to end, what remains is less than its smallest span."""
    cursor, begin = Cursor(grammar, budget), grammar.form(modality).begin

    def choose(ranges: list[range]) -> int:
        between = grammar.eos in ranges[-1]
        return next((r[0] for r in ranges if begin in r), grammar.eos) if between else ranges[0][0]

    walk(cursor, choose)
    assert {part.modality for part in cursor.spans} <= {modality}
    smallest = {"text": 2, "image": 6, "video": 8, "audio": 7, "levels": 11, "film": 9}[modality]
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


@pytest.mark.parametrize(("modality", "per_step"), [("audio", 3), ("levels", 7)])
def test_the_mask_offers_the_longest_sound_that_fits(grammar: Grammar, modality: str, per_step: int) -> None:
    numbers, form = grammar.vocabulary.block("number").ids, grammar.form(modality)
    for most in (1, 2, 500, 1023, 1024, 1025, 2047, 2048, 5000, 1024**2 - 1):
        for spare in (0, per_step - 1):
            # begin, two digits, codes, end and <eos>
            cursor = Cursor(grammar, 3 + per_step * most + 1 + 1 + spare)
            cursor.push(form.begin)
            high, low = divmod(most, 1024)
            assert cursor.allowed() == [numbers[: high + 1]]
            for chosen in {0, high // 2, high}:
                deeper = Cursor(grammar, cursor.budget + 1)
                deeper.push(form.begin)
                deeper.push(numbers[chosen])
                last = low if chosen == high else 1023
                assert deeper.allowed() == [numbers[0 if chosen else 1 : last + 1]]


def test_every_code_comes_from_the_block_of_its_codebook(grammar: Grammar) -> None:
    for modality in ("audio", "film", "levels"):
        form, part = grammar.form(modality), span(modality, *[3] * len(MODALITIES[modality].grammar.axes), seed=1)
        cursor, books = Cursor(grammar, UNLIMITED), []
        for token in grammar.write(part).tolist():
            allowed = cursor.allowed()
            books += [form.books.index(ids) for ids in allowed if ids in form.books]
            assert len(allowed) == 1 or cursor.open is None
            cursor.push(token)
        steps = part.codes.shape[-1] if modality != "levels" else 3
        rows = part.codes[0, ..., 0].numel() if modality == "film" else 1
        assert books == form.layout.books(steps).tolist() * rows


def test_the_mask_is_cheap(grammar: Grammar) -> None:
    """A minute of 8 codebooks at 75 steps a second, mask and push: well under a millisecond a token."""
    many = Grammar(Vocabulary.build({"audio": Books([1024] * 8)}, ["audio"], {"audio": "delay"}))  # type: ignore[dict-item]
    ids = many.write(Span("audio", torch.zeros(8, 4500, dtype=torch.int64))).tolist()
    cursor = Cursor(many, len(ids) + 1)
    begun = time.process_time()
    for token in ids:
        assert cursor.allows(token)
        cursor.push(token)
    assert (time.process_time() - begun) / len(ids) < 1e-3


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


def test_an_open_sound_is_told_in_steps(grammar: Grammar) -> None:
    part = span("audio", 1030)
    cursor = Cursor(grammar, UNLIMITED)
    assert cursor.partial() is None
    sizes, complete = [], []
    for token in grammar.write(part).tolist()[:-1]:
        cursor.push(token)
        assert cursor.open is not None
        sizes.append(cursor.open[1])
        if len(sizes) % 100 < 10:
            so_far = cursor.partial()
            complete.append(None if so_far is None else so_far.codes.shape[-1])
            assert so_far is None or torch.equal(so_far.codes, part.codes[:, : complete[-1]])
    assert sizes[:4] == [(), (), (1030,), (1030,)]
    # Steps are complete when their last codebook, delayed by one, has come.
    assert complete[:9] == [None, None, 0, 0, 0, 0, 1, 1, 1]
    assert complete[-1] is not None
    assert complete[-1] > 1000


def test_open_grids_are_told_in_whole_steps_of_their_outermost_axis(grammar: Grammar) -> None:
    part = span("film", 2, 2, 3)
    cursor = Cursor(grammar, UNLIMITED)
    found = []
    for token in grammar.write(part).tolist()[:-1]:
        cursor.push(token)
        so_far = cursor.partial()
        found.append(None if so_far is None else so_far.codes.shape[1])
        assert so_far is None or torch.equal(so_far.codes, part.codes[:, : found[-1]])
    frame = math.prod((2, 3, 2)) + 2 + 1
    assert found == [None] * 3 + [0] * (frame - 2) + [1] * frame + [2] * 3


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


@settings(deadline=None, max_examples=15)
@given(document=spans(most=3, side=3), seed=st.integers(0, 1 << 30))
def test_a_corrupted_document_is_refused_or_another_one(grammar: Grammar, document: list[Span], seed: int) -> None:
    vocabulary, ids = grammar.vocabulary, grammar.document(document).tolist()
    specials = [vocabulary.special(token) for block in vocabulary.blocks for token in block.tokens]
    edges = [i for block in vocabulary.blocks for i in (block.ids[0], block.ids[1], block.ids[-1])]
    draw = random.Random(seed)
    for position, old in enumerate(ids):
        around = [old - 1, old + 1, draw.randrange(vocabulary.size)]
        for token in {*draw.sample([*specials, *edges, -1, vocabulary.size], 10), *around} - {old}:
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
    with pytest.raises(PlaitError, match=r"^document ends after 6 tokens, its last span goes on for 5 more$"):
        grammar.parse(ids[:6])
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
        ("audio", torch.zeros(4, dtype=torch.int64), r"expected 3 codebooks × steps, each 1 to 1048575"),
        ("audio", torch.zeros(3, 0, dtype=torch.int64), "expected 3 codebooks × steps, each 1 to 1048575"),
        ("audio", torch.zeros(2, 4, dtype=torch.int64), r"shape is \(2, 4\), the delay:0,1,1 layout takes"),
        ("audio", torch.tensor([[0], [17], [0]]), r"of codebook 1: found 17\.\.17.* 0\.\.16"),
        ("audio", torch.tensor([[0], [0], [-1]]), r"of codebook 2: found -1\.\.-1"),
        ("audio", torch.zeros(3, 2), "of codebook 0: dtype is torch.float32"),
        ("film", torch.zeros(2, 1, 1, dtype=torch.int64), "expected 2 codebooks × time × height × width, each 1 to"),
        ("film", torch.zeros(2, 1, 0, 1, dtype=torch.int64), "expected 2 codebooks × time × height × width"),
        ("levels", torch.zeros(3, 7, dtype=torch.int64), "expected steps, each 1 to 1048575"),
        ("levels", torch.zeros(0, dtype=torch.int64), "expected steps, each 1 to 1048575"),
        ("levels", torch.tensor([0, 0, 0, 7, 0, 0, 0]), r"of codebook 2: found 0\.\.7.* 0\.\.6"),
    ],
)
def test_codes_that_do_not_fit_are_refused(grammar: Grammar, modality: str, codes: torch.Tensor, message: str) -> None:
    with pytest.raises(PlaitError, match=f"^{modality} codes.*{message}"):
        grammar.document([Span(modality, codes)])
    if "shape" in message or "expected" in message:
        with pytest.raises(PlaitError):
            grammar.length(Span(modality, codes))
        with pytest.raises(PlaitError):
            grammar.choices(Span(modality, codes))


def test_levels_that_break_off_are_refused(grammar: Grammar) -> None:
    with pytest.raises(PlaitError, match="^levels stream: has 9 codes, the interleave:4,2,1 layout has 7 a step"):
        grammar.write(Span("levels", torch.zeros(9, dtype=torch.int64)))


def test_codebooks_need_an_axis() -> None:
    vocabulary = Vocabulary.build({"text": Books([300, 7])}, ["text"])  # type: ignore[dict-item]
    with pytest.raises(PlaitError, match="^text: has 2 codebooks and no axes"):
        Grammar(vocabulary)


def test_unknown_modalities_are_refused(vocabulary: Vocabulary) -> None:
    grammar = Grammar(vocabulary)
    for use in (
        lambda: grammar.write(Span("video", torch.zeros(1, 1, 1, dtype=torch.int64))),
        lambda: grammar.length(Span("smell", torch.zeros(1))),
    ):
        with pytest.raises(PlaitError, match="this model has no such modality; it has text, image"):
            use()
