import json
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from plait.errors import PlaitError
from plait.tokenizers.text import TextTokenizer

STRINGS = [
    "",
    " ",
    "   leading and trailing   ",
    "a  b   c",
    "\r\n",
    "line\nline\r\n\tline\n",
    "\0",
    "a\0b\0",
    "\u2581",
    "\u2581\u2581",
    " \u2581 a\u2581b \u2581",
    "😀 👩‍👩‍👧‍👦 🇩🇪 ❤️",
    "日本語 العربية हिन्दी",
    "e\u0301 \u00e9 \ufb01 \u2126 \uff21",  # normalisation would merge these
    "\ufeffx\u200b\u00a0\u2028\x1b\x7f",
    "\ufffd \uffff \U0010ffff",
    "<0x41>",
    "<0xE2><0x96><0x81>",
    "<unk> <s> </s> <pad> <image>",
    "0123456789",
]


@pytest.mark.parametrize("text", STRINGS, ids=ascii)
def test_text_round_trips(text_tokenizer: TextTokenizer, text: str) -> None:
    ids = text_tokenizer.encode(text)
    assert ids.dtype == torch.int64
    assert ids.ndim == 1
    assert text_tokenizer.decode(ids) == text
    assert text_tokenizer.decode(ids.tolist()) == text


@settings(deadline=None, max_examples=300)
@given(text=st.text() | st.text("\u2581 \r\n\0<>x041Aae/s\ufffd") | st.text("a red pl\u2581😀", max_size=200))
def test_any_text_round_trips(text_tokenizer: TextTokenizer, text: str) -> None:
    assert text_tokenizer.decode(text_tokenizer.encode(text)) == text


@settings(deadline=None, max_examples=50)
@given(text=st.text())
def test_a_tokenizer_of_strange_texts_is_lossless(strange: TextTokenizer, text: str) -> None:
    assert strange.decode(strange.encode(text)) == text


@pytest.fixture(scope="module")
def strange() -> TextTokenizer:
    return TextTokenizer.train(["a\u2581b \u2581\n  c\r\n", "\ufffd\ufffd", "<0x41> </s> <unk>", "日本 " * 5] * 9, 280)


@settings(deadline=None, max_examples=100)
@given(ids=st.lists(st.integers(0, 299)))
def test_any_ids_decode(text_tokenizer: TextTokenizer, ids: list[int]) -> None:
    text_tokenizer.decode(ids).encode()


def test_training_learns_pieces(text_tokenizer: TextTokenizer) -> None:
    text = "the quick brown fox"
    assert text_tokenizer.codebook_sizes == [300]
    assert len(text_tokenizer.encode(text)) < len(text)


@pytest.mark.parametrize("text", ["\ud800", "a \udfff", "\ude00\ud83d"], ids=ascii)
def test_half_a_surrogate_pair_is_refused(text_tokenizer: TextTokenizer, text: str) -> None:
    with pytest.raises(PlaitError, match=r"^text: character \d+ is half of a surrogate pair"):
        text_tokenizer.encode(text)


@pytest.mark.parametrize("text", [None, b"a", 3, ["a"]], ids=str)
def test_what_is_no_string_is_refused(text_tokenizer: TextTokenizer, text: object) -> None:
    with pytest.raises(PlaitError, match=r"^text: is a \w+, expected a str"):
        text_tokenizer.encode(text)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "ids",
    [[300], [-1], [0, 1 << 40], [1.0], torch.tensor([1.5]), torch.tensor([True]), [[1, 2]], torch.tensor(1)],
    ids=str,
)
def test_what_is_no_piece_is_refused(text_tokenizer: TextTokenizer, ids: list[int]) -> None:
    with pytest.raises(PlaitError, match=r"^codes: "):
        text_tokenizer.decode(ids)


@pytest.mark.parametrize(("texts", "size"), [(["a b c"], 5000), (["a b c"], 20), (["a b c"], 0), ([], 300)])
def test_impossible_vocabulary_sizes_are_refused(texts: list[str], size: int) -> None:
    with pytest.raises(PlaitError, match=f"^vocabulary_size: {size} ") as raised:
        TextTokenizer.train(texts, size)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("size", "problem"),
    [(1024, "is too many for this text; choose at most 288"), (258, "is too few for this text; choose at least 267")],
)
def test_a_vocabulary_size_that_fits_is_named(size: int, problem: str) -> None:
    texts = ["the cat sat on the mat"] * 9
    with pytest.raises(PlaitError) as raised:
        TextTokenizer.train(texts, size)
    assert str(raised.value) == f"vocabulary_size: {size} {problem}"
    fitting = int(problem.split()[-1])
    assert TextTokenizer.train(texts, fitting).codebook_sizes == [fitting]


def test_training_again_gives_the_same_tokenizer() -> None:
    texts = ["two dogs and a cat look at the moon"] * 4
    assert TextTokenizer.train(texts, 280).fingerprint == TextTokenizer.train(texts, 280).fingerprint
    assert TextTokenizer.train(texts, 280).fingerprint != TextTokenizer.train(texts, 281).fingerprint


def test_saved_and_loaded_it_is_the_same(text_tokenizer: TextTokenizer, tmp_path: Path) -> None:
    text_tokenizer.save_pretrained(tmp_path / "a" / "text")
    loaded = TextTokenizer.from_pretrained(tmp_path / "a" / "text")
    assert loaded.fingerprint == text_tokenizer.fingerprint
    assert json.loads((tmp_path / "a" / "text" / "config.json").read_text())["fingerprint"] == loaded.fingerprint
    for text in STRINGS:
        assert torch.equal(loaded.encode(text), text_tokenizer.encode(text))


@pytest.mark.parametrize("damage", ["flip", "truncate", "empty", "other", "missing"])
def test_a_changed_model_is_refused(text_tokenizer: TextTokenizer, tmp_path: Path, damage: str) -> None:
    text_tokenizer.save_pretrained(tmp_path)
    model = tmp_path / "tokenizer.model"
    content = model.read_bytes()
    if damage == "missing":
        model.unlink()
    elif damage == "other":
        TextTokenizer.train(["another text"], 270).save_pretrained(tmp_path / "other")
        model.write_bytes((tmp_path / "other" / "tokenizer.model").read_bytes())
    else:
        flipped = content[:500] + bytes([content[500] ^ 1]) + content[501:]
        model.write_bytes({"flip": flipped, "truncate": content[:-7], "empty": b""}[damage])
    with pytest.raises(PlaitError, match=r"tokenizer\.model"):
        TextTokenizer.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("format_version", 2, "format_version is 2"),
        ("format_version", None, "format_version is None"),
        ("tokenizer", "visual", "not a text tokenizer"),
        ("fingerprint", "0" * 64, r"not the model that config\.json describes"),
    ],
)
def test_a_changed_config_is_refused(
    text_tokenizer: TextTokenizer, tmp_path: Path, field: str, value: object, message: str
) -> None:
    text_tokenizer.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, field: value}))
    with pytest.raises(PlaitError, match=message):
        TextTokenizer.from_pretrained(tmp_path)


@pytest.mark.parametrize("content", [None, "", "{", "[]", "\xff"])
def test_a_broken_config_is_refused(text_tokenizer: TextTokenizer, tmp_path: Path, content: str | None) -> None:
    text_tokenizer.save_pretrained(tmp_path)
    if content is None:
        (tmp_path / "config.json").unlink()
    else:
        (tmp_path / "config.json").write_text(content, "latin-1")
    with pytest.raises(PlaitError, match=r"config\.json"):
        TextTokenizer.from_pretrained(tmp_path)


@pytest.mark.parametrize("model", [b"", b"junk" * 99])
def test_bytes_that_are_no_model_are_refused(model: bytes) -> None:
    with pytest.raises(PlaitError, match="not a SentencePiece model"):
        TextTokenizer(model)


def test_a_model_without_byte_pieces_is_refused() -> None:
    import io

    import sentencepiece

    written = io.BytesIO()
    sentencepiece.SentencePieceTrainer.Train(
        sentence_iterator=iter(["a b c d e f"] * 9), model_writer=written, vocab_size=12, model_type="bpe",
        minloglevel=2,
    )  # fmt: skip
    with pytest.raises(PlaitError, match="no byte pieces"):
        TextTokenizer(written.getvalue())
