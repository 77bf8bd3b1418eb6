"""Text tokenizers of other models against the libraries that they come from."""

import base64
import io
import json
import re
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
import torch
from foreign_models import TEXTS, train_bpe
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from plait.errors import PlaitError
from plait.tokenizers.loading import load_tokenizer
from plait.tokenizers.text_foreign import HFText, SentencePieceText, _byte_letters, convert_ranks

TYPED = [
    "",
    " ",
    "a red apple",
    "</s> <s>apple",
    "naïve 😀 漢字\u2581!",
    "  12*34\n\n\tx",
    "e\u0301",
    "<|im_end|>apple",
]


def hf_text(engine: Tokenizer, first: int = 0, size: int | None = None, excluded: tuple[int, ...] = ()) -> HFText:
    return HFText(engine.to_str().encode(), first, size or engine.get_vocab_size(False) - first, excluded)


@pytest.fixture(scope="module")
def byte_level() -> Tokenizer:
    """Special tokens before the text and behind it."""
    engine = train_bpe(["<s>", "</s>"])
    engine.add_special_tokens(["<|im_end|>"])
    return engine


@pytest.mark.parametrize("text", [*TYPED, *TEXTS])
def test_ids_are_those_of_transformers(byte_level: Tokenizer, text: str) -> None:
    reference = PreTrainedTokenizerFast(tokenizer_object=byte_level, split_special_tokens=True)
    ours = hf_text(byte_level, 2)
    codes = ours.encode(text)
    assert codes.dtype == torch.int64
    assert (codes + 2).tolist() == reference(text, add_special_tokens=False, split_special_tokens=True).input_ids
    assert not len(codes) or 0 <= int(codes.min()) <= int(codes.max()) < ours.codebook_sizes[0] == 320


@settings(deadline=None, max_examples=100)
@given(text=st.text())
def test_bytes_lose_nothing_that_the_normaliser_keeps(byte_level: Tokenizer, text: str) -> None:
    ours = hf_text(byte_level, 2)
    assert ours.decode(ours.encode(text)) == byte_level.normalizer.normalize_str(text)


def test_whole_word_models_do_not_see_special_tokens() -> None:
    """Their vocabulary has special tokens as words, which a user may type."""
    words = {"<s>": 0, "<unk>": 1, "a": 2, "<": 3, "s>": 4, "apple": 5}
    engine = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    engine.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    engine.add_special_tokens(["<s>", "<unk>"])
    ours = hf_text(engine, 2, 4)
    assert ours.encode("a <s> apple <s>").tolist() == [0, 1, 2, 3, 1, 2]
    assert ours.encode("a pear").tolist() == [0]


def test_added_text_is_found_and_marks_are_not() -> None:
    engine = train_bpe()
    engine.add_tokens(["    "])
    engine.add_tokens(["<tool>"])
    engine.add_special_tokens(["</s>"])
    reference = PreTrainedTokenizerFast(tokenizer_object=engine)
    ours = hf_text(engine, 0, 321)
    assert ours.encode("a    b").tolist() == reference("a    b").input_ids
    assert 320 in ours.encode("a    b")
    assert max(ours.encode("<tool></s>")) < 320
    assert ours.decode(ours.encode("a    <tool></s>")) == "a    <tool></s>"


def test_ids_between_that_are_no_text(byte_level: Tokenizer) -> None:
    plain, holed = hf_text(byte_level, 2), hf_text(byte_level, 2, excluded=(40, 41))
    codes = plain.encode("a red apple")
    assert torch.equal(codes, holed.encode("a red apple"))
    assert holed.decode([38, 39, *codes.tolist()]) == "a red apple"
    assert plain.fingerprint != holed.fingerprint


# --- tiktoken


def ranks_of(engine: Tokenizer) -> dict[bytes, int]:
    bytes_of = {letter: byte for byte, letter in enumerate(_byte_letters())}
    return {bytes(bytes_of[c] for c in token): i for token, i in engine.get_vocab(False).items()}


def write_ranks(ranks: dict[bytes, int]) -> bytes:
    rows = sorted(ranks.items(), key=lambda row: row[1])
    return b"".join(base64.b64encode(token) + b" %d\n" % rank for token, rank in rows)


def merge_plainly(word: bytes, ranks: dict[bytes, int]) -> list[int]:
    """tiktoken's way: a known word is itself; else the two neighbours of lowest rank are joined until none are left."""
    if word in ranks:
        return [ranks[word]]
    parts = [word[i : i + 1] for i in range(len(word))]
    while True:
        joined = [(ranks[a + b], i) for i, (a, b) in enumerate(pairwise(parts)) if a + b in ranks]
        if not joined:
            return [ranks[part] for part in parts]
        _, at = min(joined)
        parts[at : at + 2] = [parts[at] + parts[at + 1]]


@pytest.fixture(scope="module")
def ranks() -> dict[bytes, int]:
    """Of 600 tokens, one of which no merge reaches."""
    learned = ranks_of(train_bpe(size=600))
    return {**learned, b"xqzj": len(learned)}


@settings(deadline=None, max_examples=200)
@given(
    words=st.lists(
        st.one_of(st.sampled_from(["red", "apple", "masterpiece", "assistant", "xqzj", "xqzjx"]), st.text("aeprst")),
        max_size=4,
    )
)
def test_ranks_merge_as_tiktoken_does(ranks: dict[bytes, int], words: list[str]) -> None:
    ours = _opened(ranks)
    text = " ".join(words)
    # Qwen's pattern, for letters and single spaces.
    cut = re.findall(r"[^\w]?\w+|\s+(?!\S)|\s+", text)
    assert "".join(cut) == text
    expected = [token for word in cut for token in merge_plainly(word.encode(), ranks)]
    assert ours.encode(text).tolist() == expected


_made: dict[int, HFText] = {}


def _opened(ranks: dict[bytes, int]) -> HFText:
    if id(ranks) not in _made:
        definition = json.dumps(convert_ranks(write_ranks(ranks))).encode()
        _made[id(ranks)] = HFText(definition, 0, len(ranks))
    return _made[id(ranks)]


@pytest.mark.parametrize("text", [*TYPED, *TEXTS])
def test_ranks_are_cut_as_qwens_tokenizer_cuts(ranks: dict[bytes, int], text: str) -> None:
    """The same merges in an engine that was trained, and so has its own list of them."""
    engine = train_bpe(size=600)
    learned = {token: rank for token, rank in ranks.items() if token != b"xqzj"}
    definition = json.dumps(convert_ranks(write_ranks(learned))).encode()
    assert HFText(definition, 0, 600).encode(text).tolist() == engine.encode(text).ids
    assert _opened(ranks).decode(_opened(ranks).encode(text)) == engine.normalizer.normalize_str(text)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda data: data + b"%%% 7\n", r"line \d+ is not a token in base64 and its rank"),
        (lambda data: data.replace(b" 5\n", b" five\n"), "line 6 is not"),
        (lambda data: data.replace(b" 5\n", b" 6\n"), "ranks are not 0, 1, 2"),
        (lambda data: data[data.index(b"\n") + 1 :], "ranks are not 0, 1, 2"),
        (lambda data: b"", "ranks are not 0, 1, 2"),
    ],
)
def test_damaged_ranks_are_refused(ranks: dict[bytes, int], damage: Callable[[bytes], bytes], message: str) -> None:
    with pytest.raises(PlaitError, match=message):
        convert_ranks(damage(write_ranks(ranks)))


# --- SentencePiece


@pytest.fixture(scope="module")
def llama() -> bytes:
    """As of Llama 2: <unk>, <s>, </s>, bytes, pieces; a space before the text."""
    written = io.BytesIO()
    sentencepiece.SentencePieceTrainer.Train(
        sentence_iterator=iter(TEXTS * 8), model_writer=written, model_type="bpe", vocab_size=340, byte_fallback=True,
        normalization_rule_name="identity", split_digits=True, remove_extra_whitespaces=False, num_threads=1,
        minloglevel=2, allow_whitespace_only_pieces=True,
    )  # fmt: skip
    return written.getvalue()


@pytest.mark.parametrize("text", [*TYPED, *TEXTS])
def test_pieces_are_those_of_sentencepiece(llama: bytes, text: str) -> None:
    reference = sentencepiece.SentencePieceProcessor()
    reference.LoadFromSerializedProto(llama)
    ours = SentencePieceText(llama, 3, 337)
    codes = ours.encode(text)
    assert (codes + 3).tolist() == reference.EncodeAsIds(text)
    # Its own mark for a space is a space to it.
    assert ours.decode(codes) == text.replace("\u2581", " ")


def test_pieces_of_llama_are_those_of_transformers(llama: bytes, tmp_path: Path) -> None:
    """The same model as tokenizer.json, with Llama's normaliser and decoder."""
    processor = sentencepiece.SentencePieceProcessor()
    processor.LoadFromSerializedProto(llama)
    pieces = {processor.IdToPiece(i): i for i in range(processor.GetPieceSize())}
    merges = sorted(
        ((a, b, pieces[a + b]) for whole in pieces for a, b in ((whole[:i], whole[i:]) for i in range(1, len(whole)))
         if a in pieces and b in pieces and not whole.startswith("<")),
        key=lambda row: (row[2], pieces[row[0]], pieces[row[1]]),
    )  # fmt: skip
    engine = Tokenizer(models.BPE(pieces, [(a, b) for a, b, _ in merges], unk_token="<unk>", byte_fallback=True))
    from tokenizers import normalizers

    engine.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
    engine.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    engine.add_special_tokens(["<unk>", "<s>", "</s>"])
    ours, other = hf_text(engine, 3, 337), SentencePieceText(llama, 3, 337)
    for text in ("a red apple", "What is this?", " two  dogs", "漢 90*90", "</s> a"):
        assert torch.equal(ours.encode(text), other.encode(text))
        assert ours.decode(ours.encode(text)) == text


# --- folders


@pytest.fixture(params=["hf", "sentencepiece"])
def tokenizer(request: pytest.FixtureRequest, byte_level: Tokenizer, llama: bytes) -> Any:
    return hf_text(byte_level, 2) if request.param == "hf" else SentencePieceText(llama, 3, 337)


def test_saved_and_loaded_it_is_the_same(tokenizer: Any, tmp_path: Path) -> None:
    tokenizer.save_pretrained(tmp_path / "text")
    loaded = load_tokenizer(tmp_path / "text", "text")
    assert type(loaded) is type(tokenizer)
    assert loaded.fingerprint == tokenizer.fingerprint
    assert torch.equal(loaded.encode("a red apple"), tokenizer.encode("a red apple"))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        ({"size": 7}, "is not what config.json describes"),
        ({"first": None}, "must be whole numbers"),
        ({"excluded": None}, "copy the folder again"),
        ({"architecture": "sentence"}, "this plait knows"),
        ({"format_version": 9}, "format_version is 9"),
    ],
)
def test_changed_settings_are_refused(tokenizer: Any, tmp_path: Path, damage: dict[str, Any], message: str) -> None:
    tokenizer.save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **damage}))
    with pytest.raises(PlaitError, match=message):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize("content", [b"", b"{}", b'{"model": 3}', b"[]", b'{"model": {"type": "BPE"}}', b"\x00\x01"])
def test_a_damaged_file_is_refused(tokenizer: Any, tmp_path: Path, content: bytes) -> None:
    tokenizer.save_pretrained(tmp_path)
    (tmp_path / tokenizer.file).write_bytes(content)
    with pytest.raises(PlaitError, match="copy the folder again") as raised:
        load_tokenizer(tmp_path)
    assert "\n" not in str(raised.value)
    (tmp_path / tokenizer.file).unlink()
    with pytest.raises(PlaitError, match="cannot be read"):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize(
    ("codes", "message"),
    [([[1, 2]], "shape is"), ([-1], "found -1"), ([10_000], "found 10000"), ([1.5], "dtype")],
)
def test_what_are_no_codes(tokenizer: Any, codes: Any, message: str) -> None:
    with pytest.raises(PlaitError, match=message):
        tokenizer.decode(codes)


def test_what_is_no_text(tokenizer: Any) -> None:
    with pytest.raises(PlaitError, match="^text: is a bytes"):
        tokenizer.encode(b"a")
    with pytest.raises(PlaitError, match="^text: character 1 is half of a surrogate pair"):
        tokenizer.encode("a\ud800")
