"""The text tokenizer: SentencePiece BPE with byte fallback, lossless on any Unicode string.

Paper: Kudo and Richardson, "SentencePiece", 2018 (arXiv 1808.06226). Text is neither normalised nor stripped. The one
character that SentencePiece keeps for itself, U+2581 (its mark for a space), goes through byte pieces.
"""

import hashlib
import io
import re
from collections.abc import Iterable, Sequence
from functools import cached_property
from pathlib import Path
from typing import ClassVar, Self

import sentencepiece
import torch
from torch import Tensor

from plait.errors import PlaitError
from plait.tokenizers.base import (
    FORMAT_VERSION,
    Tokenizer,
    check_codes,
    check_format_version,
    make_folder,
    read_json,
    write_file,
    write_json,
)

_SPACE = "\u2581"
_MODEL = "tokenizer.model"


def check_text(text: str) -> None:
    """Refuse what is no text.

    Raises:
        PlaitError: no string, or one that holds half of a surrogate pair, which no Unicode text does.
    """
    if not isinstance(text, str):
        raise PlaitError(f"text: is a {type(text).__name__}, expected a str")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise PlaitError(
            f"text: character {error.start} is half of a surrogate pair; decode the text properly first"
        ) from None


def text_codes(codes: Tensor | Sequence[int], size: int) -> Tensor:
    """One text's codes as a tensor ``[n]``.

    Raises:
        PlaitError: another shape, codes that are not integers, or one that is not below ``size``.
    """
    checked = torch.as_tensor(codes)
    if checked.ndim != 1:
        raise PlaitError(f"codes: shape is {tuple(checked.shape)}, expected [n]; decode one text at a time")
    check_codes(checked, size)
    return checked


class TextTokenizer(Tokenizer):
    """Strings to piece ids and back.

    Args:
        model: a serialised SentencePiece model with byte fallback and no normalisation.

    Raises:
        PlaitError: ``model`` is not a SentencePiece model, or has no byte pieces.
    """

    kind: ClassVar[str] = "text"
    modalities: ClassVar[tuple[str, ...]] = ("text",)

    def __init__(self, model: bytes) -> None:
        self._model = model
        self._processor = sentencepiece.SentencePieceProcessor()
        try:
            self._processor.LoadFromSerializedProto(model)
        except RuntimeError:
            raise PlaitError("text tokenizer: not a SentencePiece model; copy the tokenizer's folder again") from None
        self._bytes = [self._bytes_of(i) for i in range(self._processor.GetPieceSize())]
        self._escape = [self._processor.PieceToId(f"<0x{byte:02X}>") for byte in _SPACE.encode()]
        if not all(self._processor.IsByte(i) for i in self._escape):
            raise PlaitError("text tokenizer: the SentencePiece model has no byte pieces; train it with byte_fallback")

    @classmethod
    def train(cls, texts: Iterable[str], vocabulary_size: int) -> Self:
        """Learn a BPE of ``vocabulary_size`` pieces, the 256 byte pieces and the unknown piece included.

        Raises:
            PlaitError: the texts are too few for that many pieces, or have too many characters for so few.
        """
        written = io.BytesIO()
        try:
            sentencepiece.SentencePieceTrainer.Train(
                sentence_iterator=iter(texts), model_writer=written, model_type="bpe", vocab_size=vocabulary_size,
                byte_fallback=True, normalization_rule_name="identity", add_dummy_prefix=False,
                remove_extra_whitespaces=False, allow_whitespace_only_pieces=True, split_digits=True,
                character_coverage=0.9995, max_sentence_length=1 << 20, num_threads=1, minloglevel=2,
                unk_id=0, bos_id=-1, eos_id=-1, pad_id=-1,
            )  # fmt: skip
        except (RuntimeError, OSError) as error:
            reason = str(error).strip().splitlines()[-1]
            if most := re.search(r"too high .*<= (\d+)", reason):
                problem = f"is too many for this text; choose at most {most[1]}"
            elif least := re.search(r"smaller than required_chars.* vs (\d+)", reason):
                problem = f"is too few for this text; choose at least {least[1]}"
            else:
                problem = f"pieces cannot be learned from this text ({reason})"
            raise PlaitError(f"vocabulary_size: {vocabulary_size} {problem}") from None
        return cls(written.getvalue())

    @property
    def codebook_sizes(self) -> list[int]:
        """The number of pieces."""
        return [len(self._bytes)]

    @cached_property
    def fingerprint(self) -> str:
        """Hash of the SentencePiece model."""
        return hashlib.sha256(self._model).hexdigest()

    def encode(self, text: str) -> Tensor:
        """Text → piece ids, int64 ``[n]``.

        Raises:
            PlaitError: no string, or one that holds half of a surrogate pair, which no Unicode text does.
        """
        check_text(text)
        ids: list[int] = []
        for i, part in enumerate(text.split(_SPACE)):
            ids += self._escape if i else []
            ids += self._processor.EncodeAsIds(part)
        return torch.tensor(ids, dtype=torch.int64)

    def decode(self, codes: Tensor | Sequence[int]) -> str:
        """Piece ids ``[n]`` → text; bytes that are not UTF-8 become U+FFFD.

        Raises:
            PlaitError: another shape, ids that are not integers, or an id that is no piece.
        """
        ids = text_codes(codes, len(self._bytes))
        return b"".join(self._bytes[i] for i in ids.tolist()).decode("utf-8", errors="replace")

    def save_pretrained(self, folder: str | Path) -> None:
        """Write ``config.json`` and the SentencePiece model, ``tokenizer.model``.

        Raises:
            PlaitError: the folder cannot be made or written to.
        """
        folder = Path(folder)
        make_folder(folder)
        write_file(folder / _MODEL, self._model)
        header = {"format_version": FORMAT_VERSION, "tokenizer": self.kind, "fingerprint": self.fingerprint}
        write_json(folder / "config.json", header)

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> Self:
        """Load what `save_pretrained` wrote.

        Raises:
            PlaitError: a missing, broken or changed file.
        """
        folder = Path(folder)
        config = read_json(folder / "config.json")
        check_format_version(config.get("format_version"), folder / "config.json")
        if config.get("tokenizer") != cls.kind:
            raise PlaitError(f"{folder}/config.json: not a text tokenizer")
        try:
            model = (folder / _MODEL).read_bytes()
        except OSError:
            raise PlaitError(f"{folder / _MODEL}: no such file; the folder is incomplete, copy it again") from None
        if hashlib.sha256(model).hexdigest() != config.get("fingerprint"):
            raise PlaitError(f"{folder / _MODEL}: is not the model that config.json describes; copy the folder again")
        return cls(model)

    def _bytes_of(self, piece_id: int) -> bytes:
        if self._processor.IsByte(piece_id):
            return bytes([int(self._processor.IdToPiece(piece_id)[3:5], 16)])
        if self._processor.IsUnknown(piece_id):
            return "\ufffd".encode()
        return str(self._processor.IdToPiece(piece_id)).replace(_SPACE, " ").encode()
