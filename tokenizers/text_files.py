"""Find a model's text tokenizer among its files, and what its tokens are called."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from plait.errors import PlaitError
from plait.tokenizers.text_foreign import (
    ForeignText,
    HFText,
    SentencePieceText,
    convert_ranks,
    open_definition,
    open_sentencepiece,
    read_bytes,
    read_definition,
)

_QWEN = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", *(f"<|extra_{i}|>" for i in range(205)))
_VISION = ("<|image token|>", "<|image start|>", "<|image end|>")


@dataclass
class TextFile:
    """A text tokenizer's file.

    Attributes:
        path: of the file.
        kind: the class that runs it.
        model: what that class takes.
        tokens: ids by name, of all tokens.
        text: ids that may be text.
        special: ids that are certainly not.
    """

    path: Path
    kind: type[ForeignText]
    model: bytes
    tokens: dict[str, int]
    text: set[int]
    special: set[int]

    def open(self, first: int, size: int, excluded: Sequence[int]) -> ForeignText:
        """The tokenizer, for these ids of text.

        Raises:
            PlaitError: the library that runs it refuses the file.
        """
        try:
            return self.kind(self.model, first, size, excluded)
        except PlaitError as error:
            raise PlaitError(f"{self.path}: {error}; copy it again") from None

    def begins_with(self, token: int) -> bool:
        """Whether the file itself says that text begins with this token."""
        if self.kind is SentencePieceText:  # whose own settings say nothing: Llama's way
            return True
        return open_definition(read_definition(self.model)).encode("a").ids[:1] == [token]


def find_text(place: Path, family: str, size: int, visual: Any | None) -> TextFile | None:
    """The text tokenizer of a folder, or of a file that is one; None if there is none.

    Args:
        place: where to look: ``tokenizer.json`` goes before tiktoken's ranks, and those before SentencePiece.
        family: whose special tokens follow the ranks.
        size: ids of the decoder.
        visual: image tokenizer, of which there are as many tokens after the ranks as it has codes.

    Raises:
        PlaitError: the file is damaged, or is of a kind that is not read here.
    """
    if place.is_dir():
        patterns = ("tokenizer.json", "text_tokenizer.json", "*.tiktoken", "tokenizer.model")
        files = [file for pattern in patterns for file in sorted(place.glob(pattern)) if file.is_file()]
        if not files:
            if (place / "vocab.json").is_file():
                raise PlaitError(f"{place / 'vocab.json'}: is not read; save the tokenizer as tokenizer.json")
            return None
        place = files[0]
    model = read_bytes(place)
    try:
        if place.suffix == ".tiktoken":
            return _from_ranks(place, model, family, size, visual)
        if place.suffix == ".model":
            return _from_sentencepiece(place, model)
        return _from_definition(place, model)
    except PlaitError as error:
        raise PlaitError(f"{place}: {error}; copy it again") from None
    except (TypeError, KeyError, IndexError, ValueError, AttributeError) as error:
        raise PlaitError(f"{place}: is not a tokenizer after all ({error!r}); copy it again") from None


def _from_definition(path: Path, model: bytes) -> TextFile:
    definition = read_definition(model)
    vocabulary = definition["model"].get("vocab")
    if isinstance(vocabulary, list):  # Unigram: pieces with their scores, in the order of their ids
        vocabulary = {piece[0]: i for i, piece in enumerate(vocabulary)}
    if not isinstance(vocabulary, dict) or not vocabulary:
        raise PlaitError("its model has no vocabulary")
    if any(type(i) is not int or i < 0 for i in vocabulary.values()):
        raise PlaitError("an id of its vocabulary is no whole number")
    added = {token["content"]: token for token in definition.get("added_tokens") or ()}
    special = {token["id"] for token in added.values() if token.get("special")}
    unknown = definition["model"].get("unk_token")
    special |= {vocabulary[unknown]} if unknown in vocabulary else set()
    text = set(vocabulary.values())
    # Added tokens that go on where the vocabulary ends are text: runs of spaces, for instance. Marks are not.
    top = max(text)
    for name, token in sorted(added.items(), key=lambda pair: pair[1]["id"]):
        if token["id"] == top + 1 and not token.get("special") and not (name[0] == "<" and name[-1] == ">"):
            top += 1
            text.add(top)
    tokens = vocabulary | {name: token["id"] for name, token in added.items()}
    return TextFile(path, HFText, model, tokens, text, special)


def _from_ranks(path: Path, model: bytes, family: str, size: int, visual: Any | None) -> TextFile:
    """Ranks, then Qwen's special tokens; of Emu3 also the image marks and codes, or what a list beside it says."""
    import json

    definition = convert_ranks(model)
    vocabulary = definition["model"]["vocab"]
    names = list(_QWEN)
    beside = next(iter(sorted(path.parent.glob("*vision_tokens.txt"))), None)
    if family in ("emu3", "emu3.5"):
        count = visual.codebook_sizes[0] if visual else size - len(vocabulary) - len(_QWEN) - len(_VISION)
        listed = read_bytes(beside).decode("utf-8", "replace").split("\n") if beside else []
        names += [name.strip() for name in listed if name.strip()]
        names += [] if beside else [*_VISION, *(f"<|visual token {i:06d}|>" for i in range(count))]
    ids = {name: len(vocabulary) + i for i, name in enumerate(names)}
    text = set(vocabulary.values())
    return TextFile(path, HFText, json.dumps(definition).encode(), vocabulary | ids, text, set(ids.values()))


def _from_sentencepiece(path: Path, model: bytes) -> TextFile:
    processor = open_sentencepiece(model)
    count = processor.GetPieceSize()
    special = {i for i in range(count) if processor.IsControl(i) or processor.IsUnknown(i) or processor.IsUnused(i)}
    tokens = {str(processor.IdToPiece(i)): i for i in range(count)}
    return TextFile(path, SentencePieceText, model, tokens, set(range(count)) - special, special)
