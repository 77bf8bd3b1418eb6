import json
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from plait.errors import PlaitError
from plait.tokenizers.grammar import Span
from plait.train.documents import Part, TokenDocument, count_codes, member, pack_document, raw_parts, unpack_document


def sample(facts: Any = None, **members: bytes) -> dict[str, Any]:
    head = {} if facts is None else {"json": facts if isinstance(facts, bytes) else json.dumps(facts).encode()}
    return {"__key__": "some/key", "__url__": "x.tar", **{k.replace("_", "."): v for k, v in members.items()}, **head}


def test_members_without_parts() -> None:
    parts, ordered, facts = raw_parts(sample({"license": "CC0"}, png=b"P", txt=b"T", cls=b"7"))
    assert parts == [Part("text", b"T"), Part("image", b"P")]
    assert ordered is False
    assert facts == {"license": "CC0"}


def test_sample_without_anything() -> None:
    assert raw_parts(sample()) == ([], False, {})
    assert raw_parts(sample({"parts": None}, txt=b"T")) == ([Part("text", b"T")], False, {})


def test_parts_give_order_loss_and_time() -> None:
    rows = [
        {"image": "0.png", "loss": False, "time": [0, 1.5]}, {"text": "what is it? é"}, {"image": "1.jpg"},
        {"text": "", "loss": True},
    ]  # fmt: skip
    parts, ordered, facts = raw_parts({**sample({"parts": rows, "id": 3}, txt=b"unused"), "0.png": b"A", "1.jpg": b"B"})
    assert parts == [
        Part("image", b"A", False, (0.0, 1.5)), Part("text", "what is it? é".encode()), Part("image", b"B"),
        Part("text", b""),
    ]  # fmt: skip
    assert ordered is True
    assert facts == {"id": 3}


@pytest.mark.parametrize(
    "facts",
    [
        b"{", b"\xff", b"[]", b"5", b"null", b'"x"',
        {"parts": 5}, {"parts": "image"}, {"parts": {"text": 1, "image": 2}}, {"parts": [5]}, {"parts": ["text"]},
        {"parts": [None]}, {"parts": [{}]}, {"parts": [{"text": "a", "image": "png"}]}, {"parts": [{"smell": "x"}]},
        {"parts": [{"image": "9.png"}]}, {"parts": [{"image": None}]}, {"parts": [{"text": "a", "time": 3}]},
        {"parts": [{"text": "a", "time": [1]}]}, {"parts": [{"text": "a", "time": ["x", 2]}]},
        {"parts": [{"text": "a", "time": None}]}, {"parts": [{"text": "a", "time": {}}]},
    ],
)  # fmt: skip
def test_broken_facts_name_the_sample(facts: Any) -> None:
    with pytest.raises(PlaitError) as caught:
        raw_parts(sample(facts, png=b"P"))
    assert str(caught.value).startswith("some/key.json: ")


times = st.none() | st.tuples(st.floats(0, 1e6), st.floats(0, 1e6))
texts = st.builds(
    lambda codes, loss, time: Span("text", torch.tensor(codes, dtype=torch.int64), loss, time),
    st.lists(st.integers(0, 2**31 - 1), max_size=8), st.booleans(), times,
)  # fmt: skip
images = st.builds(
    lambda h, w, start, loss, time: Span("image", torch.arange(start, start + h * w).reshape(h, w), loss, time),
    st.integers(1, 4), st.integers(1, 4), st.integers(0, 1000), st.booleans(), times,
)  # fmt: skip


@settings(deadline=None, max_examples=60)
@given(
    st.lists(texts | images, min_size=1, max_size=4),
    st.booleans(),
    st.dictionaries(st.text(max_size=5), st.text(max_size=5) | st.integers(), max_size=3),
)
def test_round_trip(spans: list[Span], ordered: bool, facts: dict[str, Any]) -> None:
    packed = pack_document("k", TokenDocument(spans, ordered, facts))
    assert packed["__key__"] == "k"
    found = unpack_document(packed)
    assert (found.ordered, found.facts, len(found.spans)) == (ordered, facts, len(spans))
    for a, b in zip(found.spans, spans, strict=True):
        assert (a.modality, a.loss, a.time) == (b.modality, b.loss, b.time)
        assert a.codes.dtype == torch.int64
        assert torch.equal(a.codes, b.codes)


def test_transposed_codes_keep_their_order() -> None:
    codes = torch.arange(6).reshape(2, 3).T
    found = unpack_document(pack_document("k", TokenDocument([Span("image", codes)])))
    assert torch.equal(found.spans[0].codes, codes)


def broken(**change: Any) -> dict[str, Any]:
    whole = pack_document("the/key", TokenDocument([Span("text", torch.tensor([1, 2]))]))
    return {k: v for k, v in {**whole, **change}.items() if v is not None}


@pytest.mark.parametrize(
    "change",
    [
        {"json": None}, {"safetensors": None}, {"json": b"{"}, {"json": b"[]"}, {"json": b"{}"}, {"json": b"3"},
        {"json": b'{"spans": [{}], "ordered": false}'}, {"json": b'{"spans": 3, "ordered": false}'},
        {"json": b'{"spans": [{"modality": "text"}]}'}, {"json": b'{"spans": [3], "ordered": false}'},
        {"json": b'{"spans": [{"modality": "text"}, {"modality": "text"}], "ordered": false}'},
        {"json": b'{"spans": [{"modality": "text", "time": 3}], "ordered": false}'},
        {"safetensors": b""}, {"safetensors": b"garbage" * 9},
    ],
)  # fmt: skip
def test_broken_document_names_its_key(change: dict[str, Any]) -> None:
    with pytest.raises(PlaitError, match="the/key: not a tokenized document"):
        unpack_document(broken(**change))


def test_truncated_tensors_name_the_key() -> None:
    with pytest.raises(PlaitError, match="the/key"):
        unpack_document(broken(safetensors=broken()["safetensors"][:-3]))


def test_count_codes() -> None:
    spans = [Span("text", torch.zeros(3)), Span("image", torch.zeros(2, 4)), Span("text", torch.zeros(0))]
    assert count_codes(spans) == {"text": 3, "image": 8}


def test_the_first_medium_of_a_kind_counts() -> None:
    sample = {"__key__": "k", "webp": b"W", "jpg": b"J", "txt": b"t", "gif": b"G"}
    assert member(sample, "image") == b"J"
    assert [(part.modality, part.data) for part in raw_parts(sample)[0]] == [
        ("text", b"t"), ("image", b"J"), ("video", b"G"),
    ]  # fmt: skip
    assert member({"__key__": "k", "txt": b"t"}, "image") is None
