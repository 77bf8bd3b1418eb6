"""Text tokenizers of other models: Hugging Face's ``tokenizer.json``, tiktoken's rank files, SentencePiece models.

A model's ids are of text and of other things. Here a code is an id less the first id of text, so that text has one
block; ids between the first and the last that are not text are no codes of any text. What a user types is text, also
where it looks like a special token: ``<s>`` becomes the pieces of these three characters.
"""

import base64
import binascii
import hashlib
import io
import json
from abc import abstractmethod
from collections.abc import Sequence
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Any, ClassVar, Self

import sentencepiece
import torch
from torch import Tensor

from plait.errors import PlaitError
from plait.tokenizers.base import (
    FORMAT_VERSION,
    Tokenizer,
    check_format_version,
    make_folder,
    read_json,
    write_file,
    write_json,
)
from plait.tokenizers.text import check_text, text_codes

# How Qwen's tokenizers, and so Emu3's, cut text before they merge: one digit at a time.
QWEN_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


class ForeignText(Tokenizer):
    """Strings to codes and back, by a file that another library reads.

    Args:
        model: the file's bytes.
        first: the id of code 0.
        size: ids from there on that are codes.
        excluded: ids among them that are not text.

    Raises:
        PlaitError: the file is damaged, or a setting is no whole number.
    """

    kind: ClassVar[str] = "text"
    modalities: ClassVar[tuple[str, ...]] = ("text",)
    architecture: ClassVar[str]
    file: ClassVar[str]

    def __init__(self, model: bytes, first: int, size: int, excluded: Sequence[int] = ()) -> None:
        if any(type(n) is not int or n < 0 for n in (first, size, *excluded)) or size < 1:
            raise PlaitError(f"text tokenizer: first {first!r}, size {size!r} and excluded must be whole numbers")
        self.model, self.first, self.size, self.excluded = model, first, size, tuple(sorted(excluded))
        self._ids = frozenset(range(first, first + size)) - frozenset(excluded)

    @abstractmethod
    def _encode(self, text: str) -> list[int]:
        """Text → ids of text."""

    @abstractmethod
    def _decode(self, ids: list[int]) -> str:
        """Ids of text → text."""

    @property
    def codebook_sizes(self) -> list[int]:
        """The number of codes."""
        return [self.size]

    @cached_property
    def fingerprint(self) -> str:
        """Hash of the file and of which ids are text."""
        settings = json.dumps([self.architecture, self.first, self.size, self.excluded]).encode()
        return hashlib.sha256(settings + self.model).hexdigest()

    def encode(self, text: str) -> Tensor:
        """Text → codes, int64 ``[n]``. What the tokenizer has no piece for is left out.

        Raises:
            PlaitError: no string, or one that holds half of a surrogate pair, which no Unicode text does.
        """
        check_text(text)
        return torch.tensor(self._encode(text), dtype=torch.int64) - self.first

    def decode(self, codes: Tensor | Sequence[int]) -> str:
        """Codes ``[n]`` → text; bytes that are not UTF-8 become U+FFFD.

        Raises:
            PlaitError: another shape, codes that are not integers, or one that is no code.
        """
        ids = text_codes(codes, self.size).long() + self.first
        return self._decode([i for i in ids.tolist() if i in self._ids])

    def save_pretrained(self, folder: str | Path) -> None:
        """Write ``config.json`` and the tokenizer's own file.

        Raises:
            PlaitError: the folder cannot be made or written to.
        """
        folder = Path(folder)
        make_folder(folder)
        write_file(folder / self.file, self.model)
        header = {"format_version": FORMAT_VERSION, "tokenizer": self.kind, "architecture": self.architecture}
        ids = {"first": self.first, "size": self.size, "excluded": list(self.excluded)}
        write_json(folder / "config.json", {**header, "fingerprint": self.fingerprint, **ids})

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> Self:
        """Load what `save_pretrained` wrote.

        Raises:
            PlaitError: a missing, broken or changed file.
        """
        folder = Path(folder)
        config = read_json(folder / "config.json")
        check_format_version(config.get("format_version"), folder / "config.json")
        if (config.get("tokenizer"), config.get("architecture")) != (cls.kind, cls.architecture):
            raise PlaitError(f"{folder}/config.json: not a tokenizer of kind {cls.kind}/{cls.architecture}")
        try:
            tokenizer = cls(read_bytes(folder / cls.file), config["first"], config["size"], config["excluded"])
        except (PlaitError, TypeError, KeyError) as error:
            raise PlaitError(f"{folder / cls.file}: {error}; copy the folder again") from None
        if tokenizer.fingerprint != config.get("fingerprint"):
            raise PlaitError(f"{folder / cls.file}: is not what config.json describes; copy the folder again")
        return tokenizer


class HFText(ForeignText):
    """A ``tokenizer.json``, run by Hugging Face's ``tokenizers``.

    Its special tokens are not looked for in text; added tokens that are text, such as runs of spaces, are.
    """

    architecture: ClassVar[str] = "hf"
    file: ClassVar[str] = "tokenizer.json"

    def __init__(self, model: bytes, first: int, size: int, excluded: Sequence[int] = ()) -> None:
        super().__init__(model, first, size, excluded)
        definition = read_definition(model)
        added = [token for token in definition.get("added_tokens") or () if token["id"] in self._ids]
        off = dict.fromkeys(("post_processor", "truncation", "padding"))
        self._tokenizer = open_definition({**definition, **off, "added_tokens": added})
        self._words = self._ids | {self._tokenizer.token_to_id(str(definition["model"].get("unk_token")))}

    def _encode(self, text: str) -> list[int]:
        ids: list[int] = []
        texts = [text]
        while texts:
            text = texts.pop()
            found = self._tokenizer.encode(text, add_special_tokens=False)
            spans = zip(found.ids, found.offsets, strict=True)
            # Some kinds of model know special tokens as whole words. Cut in two it is no longer one.
            cut = next(
                (start + 1 for token, (start, end) in spans if token not in self._words and end > start + 1), None
            )
            if cut is None:
                ids += [token for token in found.ids if token in self._ids]
            else:
                texts += [text[cut:], text[:cut]]
        return ids

    def _decode(self, ids: list[int]) -> str:
        text: str = self._tokenizer.decode(ids, skip_special_tokens=False)
        return text


class SentencePieceText(ForeignText):
    """A SentencePiece ``tokenizer.model``, as of Llama 2: with control pieces, and a space put before the text."""

    architecture: ClassVar[str] = "sentencepiece"
    file: ClassVar[str] = "tokenizer.model"

    def __init__(self, model: bytes, first: int, size: int, excluded: Sequence[int] = ()) -> None:
        super().__init__(model, first, size, excluded)
        self._processor = open_sentencepiece(model)

    def _encode(self, text: str) -> list[int]:
        return [token for token in self._processor.EncodeAsIds(text) if token in self._ids]

    def _decode(self, ids: list[int]) -> str:
        return str(self._processor.DecodeIds(ids))


def read_bytes(path: Path) -> bytes:
    """A file's bytes.

    Raises:
        PlaitError: it is missing or cannot be read.
    """
    try:
        content = path.read_bytes()
    except OSError as error:
        raise PlaitError(f"{path}: cannot be read ({error.strerror})") from None
    if content.startswith(b"version https://git-lfs"):
        raise PlaitError(f"{path}: is a Git LFS pointer, not the file; fetch it with `git lfs pull`")
    return content


def read_definition(model: bytes) -> dict[str, Any]:
    """A ``tokenizer.json`` as a dictionary.

    Raises:
        PlaitError: it is not JSON, or has no model.
    """
    try:
        definition = json.loads(model)
        added = definition.get("added_tokens") or ()
        if isinstance(definition["model"], dict) and all(type(token["id"]) is int for token in added):
            return dict(definition)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        pass
    raise PlaitError("is not a tokenizer of Hugging Face's tokenizers library")


def open_definition(definition: dict[str, Any]) -> Any:
    """A ``tokenizers.Tokenizer`` of a definition.

    Raises:
        PlaitError: the library refuses it.
    """
    from tokenizers import Tokenizer as Engine

    try:
        return Engine.from_str(json.dumps(definition))
    except Exception as error:  # the library raises nothing more particular
        reason = str(error).splitlines()[0]
        raise PlaitError(f"cannot be read by the tokenizers library ({reason})") from None


def open_sentencepiece(model: bytes) -> sentencepiece.SentencePieceProcessor:
    """A SentencePiece processor.

    Raises:
        PlaitError: the bytes are no SentencePiece model.
    """
    processor = sentencepiece.SentencePieceProcessor()
    try:
        processor.LoadFromSerializedProto(model)
    except RuntimeError:
        raise PlaitError("is not a SentencePiece model") from None
    return processor


def convert_ranks(ranks_file: bytes, pattern: str = QWEN_PATTERN) -> dict[str, Any]:
    """A tiktoken rank file → the definition of an equal ``tokenizer.json``: NFC, cut by ``pattern``, bytes, BPE.

    tiktoken joins any two neighbours that together are a token, the one of lowest rank first; the library joins pairs
    that are listed. One pair a token is enough: when its turn comes, nothing of lower rank is left to join anywhere, so
    its bytes stand as they would alone.

    Raises:
        PlaitError: a line is not ``base64 rank``, or a rank or token is there twice, or a byte has no token.
    """
    from tokenizers import Regex, decoders, models, normalizers, pre_tokenizers
    from tokenizers import Tokenizer as Engine

    ranks = _read_ranks(ranks_file)
    letters = _byte_letters()
    names = {token: "".join(map(letters.__getitem__, token)) for token in ranks}
    ordered = sorted(ranks, key=ranks.__getitem__)
    pairs = [_last_pair(token, ranks) for token in ordered if len(token) > 1]
    merges = [(names[a], names[b]) for a, b in filter(None, pairs)]
    vocabulary = {names[token]: ranks[token] for token in ordered}
    # A token that no merge reaches is found whole, as by tiktoken.
    engine = Engine(models.BPE(vocabulary, merges, ignore_merges=True))
    engine.normalizer = normalizers.NFC()
    engine.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(pattern), "isolated"), pre_tokenizers.ByteLevel(False, use_regex=False)]
    )
    engine.decoder = decoders.ByteLevel()
    definition: dict[str, Any] = json.loads(engine.to_str())
    return definition


def _read_ranks(ranks_file: bytes) -> dict[bytes, int]:
    ranks: dict[bytes, int] = {}
    for number, line in enumerate(io.BytesIO(ranks_file), 1):
        if not line.strip():
            continue
        try:
            token, rank = line.split()
            ranks[base64.b64decode(token, validate=True)] = int(rank)
        except (ValueError, binascii.Error):
            raise PlaitError(f"line {number} is not a token in base64 and its rank; not a tiktoken file") from None
    if sorted(ranks.values()) != list(range(len(ranks))) or any(bytes([byte]) not in ranks for byte in range(256)):
        raise PlaitError("its ranks are not 0, 1, 2, …, one for each token and every byte among them")
    return ranks


def _last_pair(token: bytes, ranks: dict[bytes, int]) -> tuple[bytes, bytes] | None:
    """The two parts that joins of lower rank make of a token; None if they make more, or the token is one already."""
    limit = ranks[token]
    parts = [token[i : i + 1] for i in range(len(token))]
    joined = [ranks.get(a + b, limit) for a, b in pairwise(parts)]
    while len(parts) > 2:
        lowest = min(joined)
        if lowest >= limit:
            return None
        at = joined.index(lowest)
        parts[at : at + 2] = [parts[at] + parts[at + 1]]
        del joined[at]
        for i in range(max(0, at - 1), min(at + 1, len(joined))):
            joined[i] = ranks.get(parts[i] + parts[i + 1], limit)
    return parts[0], parts[1]


def _byte_letters() -> list[str]:
    """The letter that stands for each byte in byte-level vocabularies: itself if it can be seen, else one above 255."""
    seen = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    unseen = iter(range(256, 512))
    return [chr(byte if byte in seen else next(unseen)) for byte in range(256)]
