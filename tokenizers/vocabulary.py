"""The unified vocabulary: one id space for text pieces, special tokens, numbers and every codebook.

It is a list of contiguous blocks. Growing it appends blocks; no id ever moves, so token shards (which hold codes, not
ids) and trained embedding rows keep their meaning.

The vocabulary of a model from elsewhere is described in the same way: its blocks lie where that model has them,
`grammar` says how its documents are written, and `names` which of its ids play which part (see
`plait.tokenizers.families`).
"""

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Self

from plait.errors import PlaitError
from plait.tokenizers.base import FORMAT_VERSION, Tokenizer, check_format_version, read_json, write_json
from plait.tokenizers.layouts import Interleave, Layout, build_layout
from plait.tokenizers.modalities import MODALITIES

NUMBERS = 1024
BOS, EOS, PAD = "<bos>", "<eos>", "<pad>"
# How documents are written: plait's own way, bare text, Emu3's, Emu3.5's, Chameleon's, and not at all: bare ids.
GRAMMARS = ("plait", "text", "emu3", "emu3.5", "chameleon", "ids")
_SIZE = (*"0123456789*",)
# The modalities that they write in a way of their own, with the names that it needs; others are written plait's way.
_OWN: dict[str, dict[str, tuple[str, ...]]] = {
    "text": {"text": ()},
    "emu3": {"text": (), "image": ("<image>", *_SIZE, "<image codes>", "<row>", "<frame>", "</image>")},
    "emu3.5": {"text": (), "image": ("<image>", *_SIZE, "<image codes>", "<row>", "</image>")},
    "chameleon": {"text": (), "image": ("<image>", "</image>")},
}


@dataclass(frozen=True)
class Block:
    """Ids ``start`` to ``start + size − 1``. ``tokens`` names them where they are special tokens."""

    name: str
    start: int
    size: int
    tokens: tuple[str, ...] = ()

    @property
    def ids(self) -> range:
        """The block's ids."""
        return range(self.start, self.start + self.size)


@dataclass(frozen=True)
class ModalityEntry:
    """Which tokenizer makes a modality's codes, which block each of its codebooks has, and how they become one stream.

    Attributes:
        tokenizer: its folder in a bundle.
        blocks: one per codebook.
        layout: as `build_layout` takes it.
        grid: the sizes of the span's axes where all spans have the same ones, as Chameleon's images do; else empty.
    """

    tokenizer: str
    blocks: tuple[str, ...]
    layout: str = "flatten"
    grid: tuple[int, ...] = ()

    def build_layout(self) -> Layout:
        """The layout.

        Raises:
            PlaitError: it is none, does not fit the codebooks, or predicts several codes at once.
        """
        layout = build_layout(self.layout, len(self.blocks))
        if layout.heads > 1:
            raise PlaitError(
                f"layout: {self.layout} predicts {layout.heads} codes at once, plait's decoder one; "
                "use flatten or delay"
            )
        return layout


@dataclass(frozen=True)
class Vocabulary:
    """The one id space.

    Attributes:
        blocks: of all ids.
        modalities: those that use them.
        tokenizers: fingerprints of the tokenizers that it was built for.
        grammar: one of `GRAMMARS`.
        names: ids by the part they play, where that is not the name of their token: ``<bos>``, ``<image>``, ``<row>``,
            or the digits of a size that is written out. An id may play several.
    """

    blocks: tuple[Block, ...] = ()
    modalities: Mapping[str, ModalityEntry] = field(default_factory=dict)
    tokenizers: Mapping[str, str] = field(default_factory=dict)
    grammar: str = "plait"
    names: Mapping[str, int] = field(default_factory=dict)

    @classmethod
    def build(
        cls,
        tokenizers: Mapping[str, Tokenizer],
        modalities: Iterable[str],
        layouts: Mapping[str, str] | None = None,
    ) -> Self:
        """A vocabulary for these tokenizers (by the name of their folder) and modalities.

        Args:
            tokenizers: those of the modalities; others are left out.
            modalities: in the order of their blocks.
            layouts: by modality, as in `grow`.

        Raises:
            PlaitError: an unknown modality, one whose tokenizer is not given, or as `grow`.
        """
        modalities, layouts = list(modalities), layouts or {}
        if strangers := sorted(set(layouts) - set(modalities)):
            raise PlaitError(f"layouts: names {strangers[0]!r}, the modalities are {', '.join(modalities)}")
        vocabulary = cls()._with_block("special", tokens=(PAD, BOS, EOS))._with_block("number", NUMBERS)
        for name in modalities:
            if name not in MODALITIES:
                raise PlaitError(f"vocabulary: no modality is called {name!r}; there are {', '.join(MODALITIES)}")
            if MODALITIES[name].tokenizer not in tokenizers:
                raise PlaitError(f"vocabulary: {name} needs a tokenizer called {MODALITIES[name].tokenizer!r}; add it")
            tokenizer_name = MODALITIES[name].tokenizer
            vocabulary = vocabulary.grow(name, tokenizer_name, tokenizers[tokenizer_name], layouts.get(name))
        return vocabulary

    def grow(self, modality: str, tokenizer_name: str, tokenizer: Tokenizer, layout: str | None = None) -> Self:
        """Add a modality: its special tokens, and its tokenizer's codebooks unless they are there already.

        A vocabulary from elsewhere first gets what plait's documents need and it lacks.

        Args:
            modality: its name in the registry.
            tokenizer_name: the tokenizer's folder in a bundle.
            tokenizer: which makes the modality's codes.
            layout: how the codes of several codebooks become one stream, as `build_layout` takes it; by default the
                tokenizer's own, else "flatten".

        Raises:
            PlaitError: the modality is there already, the tokenizer is another one than the vocabulary's, or the layout
                does not fit its codes or the decoder.
        """
        if modality in self.modalities:
            raise PlaitError(f"vocabulary: has {modality} already")
        names = tuple(f"{tokenizer_name}.{i}" for i in range(len(tokenizer.codebook_sizes)))
        entry = _with_layout(ModalityEntry(tokenizer_name, names), tokenizer, layout)
        if self.tokenizers.get(tokenizer_name, tokenizer.fingerprint) != tokenizer.fingerprint:
            raise PlaitError(f"vocabulary: was built with another {tokenizer_name} tokenizer (fingerprints differ)")
        grown = self
        if not self.has_own(modality):
            grown = grown._with_block("special", tokens=(PAD, BOS, EOS))
            if "number" not in self._by_name:
                grown = grown._with_block("number", NUMBERS)
            grown = grown._with_block(f"special.{modality}", tokens=MODALITIES[modality].grammar.tokens)
        for name, size in zip(names, tokenizer.codebook_sizes, strict=True):
            if name not in self._by_name:
                grown = grown._with_block(name, size)
            elif (there := self.block(name).size) != size:
                raise PlaitError(
                    f"vocabulary: has {there} codes in {name}, the {tokenizer_name} tokenizer has {size}; "
                    "give the model's own"
                )
        return replace(
            grown,
            modalities={**self.modalities, modality: entry},
            tokenizers={**self.tokenizers, tokenizer_name: tokenizer.fingerprint},
        )

    @property
    def size(self) -> int:
        """The number of ids."""
        return self.blocks[-1].start + self.blocks[-1].size if self.blocks else 0

    def block(self, name: str) -> Block:
        """The block of this name."""
        return self._by_name[name]

    def special(self, token: str) -> int:
        """The id of a special token such as ``<bos>`` or ``<image>``, by the part it plays, else by its own name."""
        return self._special[token]

    def has_special(self, token: str) -> bool:
        """Whether `special` knows it."""
        return token in self._special

    def describe(self, token_id: int) -> str:
        """What an id is, for messages: ``<row>``, ``number 8``, ``visual.0 code 17``."""
        for block in self.blocks:
            if token_id in block.ids:
                offset = token_id - block.start
                return block.tokens[offset] if block.tokens else f"{block.name} {offset}"
        return f"id {token_id} outside the vocabulary of {self.size}"

    def has_own(self, modality: str) -> bool:
        """Whether this modality's spans are written in the grammar's own way, not plait's."""
        return modality in _OWN.get(self.grammar, {})

    @cached_property
    def fingerprint(self) -> str:
        """Hash of the whole vocabulary."""
        return hashlib.sha256(json.dumps(self._content(), sort_keys=True).encode()).hexdigest()

    def save(self, path: str | Path) -> None:
        """Write ``vocabulary.json``."""
        write_json(Path(path), {"format_version": FORMAT_VERSION, **self._content()})

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """Read ``vocabulary.json``.

        Raises:
            PlaitError: the file is missing or broken, its blocks overlap or leave gaps, or a modality is unknown or
                lacks blocks or special tokens.
        """
        path = Path(path)
        content = read_json(path)
        check_format_version(content.pop("format_version", None), path)
        try:
            vocabulary = cls(
                tuple(Block(**{**row, "tokens": tuple(row.get("tokens", ()))}) for row in content["blocks"]),
                {
                    name: ModalityEntry(
                        e["tokenizer"], tuple(e["blocks"]), e.get("layout", "flatten"), tuple(e.get("grid", ()))
                    )
                    for name, e in content["modalities"].items()
                },
                dict(content["tokenizers"]),
                content.get("grammar", "plait"),
                dict(content.get("names", {})),
            )
            problem = vocabulary._problem()
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise PlaitError(f"{path}: not a vocabulary ({error!r}); restore it from where it came") from None
        if problem:
            raise PlaitError(f"{path}: {problem}")
        return vocabulary

    def _problem(self) -> str | None:
        """What makes a vocabulary that was read unusable, if anything does."""
        start = 0
        for block in self.blocks:
            whole = type(block.start) is int and type(block.size) is int
            if not whole or block.start != start or block.size != max(1, len(block.tokens) or block.size):
                return f"block {block.name!r} overlaps, leaves a gap or is mis-sized; restore the file"
            start += block.size
        tokens = [token for block in self.blocks for token in block.tokens]
        if len(self._by_name) < len(self.blocks) or len(set(tokens)) < len(tokens):
            return "two blocks or special tokens have one name; restore the file"
        if self.grammar not in GRAMMARS:
            return f"grammar is {self.grammar!r}, this plait knows {', '.join(GRAMMARS)}; install the one that wrote it"
        for role, number in self.names.items():
            if type(number) is not int or not 0 <= number < self.size:
                return f"names: {role} is {number!r}, must be one of its {self.size} ids; restore the file"
        plain = self.grammar == "plait" or not all(map(self.has_own, self.modalities))
        if plain and ("number" not in self._by_name or self.block("number").size != NUMBERS):
            return f"has no block of {NUMBERS} numbers; restore the file"
        needed = {PAD, BOS, EOS} if plain or self.modalities else set()
        for name, entry in self.modalities.items():
            if problem := self._entry_problem(name, entry):
                return problem
            own = _OWN.get(self.grammar, {}).get(name)
            needed |= set(MODALITIES[name].grammar.tokens if own is None else own)
        if lost := needed - set(self._special):
            return f"special token {min(lost)} is missing; restore the file"
        return None

    def _entry_problem(self, name: str, entry: ModalityEntry) -> str | None:
        if name not in MODALITIES:
            return f"has modality {name!r}, this plait knows {', '.join(MODALITIES)}; install the one that wrote it"
        if not entry.blocks or entry.tokenizer not in self.tokenizers:
            return f"modality {name!r} has no blocks or no tokenizer; restore the file"
        if missing := [block for block in entry.blocks if block not in self._by_name]:
            return f"modality {name!r} uses block {missing[0]!r}, which is not there; restore the file"
        if any(type(n) is not int or n < 1 for n in entry.grid):
            return (
                f"modality {name!r}: grid is {list(entry.grid)}, must be whole numbers of at least 1; restore the file"
            )
        try:
            entry.build_layout()
        except PlaitError as error:
            return f"modality {name!r}: {error}"
        return None

    def _content(self) -> dict[str, Any]:
        rows = [{k: v for k, v in asdict(block).items() if v != ()} for block in self.blocks]
        # What is as in earlier versions' vocabularies is not written, so that their fingerprints stay.
        entries = {
            name: {k: v for k, v in asdict(entry).items() if (k, v) not in (("layout", "flatten"), ("grid", ()))}
            for name, entry in self.modalities.items()
        }
        content = {"blocks": rows, "modalities": entries, "tokenizers": dict(self.tokenizers)}
        if self.grammar != "plait":
            content["grammar"] = self.grammar
        return content | ({"names": dict(self.names)} if self.names else {})

    def _with_block(self, name: str, size: int = 0, tokens: tuple[str, ...] = ()) -> Self:
        new = tuple(token for token in tokens if token not in self._special)
        if tokens and not new:
            return self
        return replace(self, blocks=(*self.blocks, Block(name, self.size, len(new) or size, new)))

    @cached_property
    def _by_name(self) -> dict[str, Block]:
        return {block.name: block for block in self.blocks}

    @cached_property
    def _special(self) -> dict[str, int]:
        tokens = {token: block.start + i for block in self.blocks for i, token in enumerate(block.tokens)}
        return {**tokens, **self.names}


def _with_layout(entry: ModalityEntry, tokenizer: Tokenizer, layout: str | None) -> ModalityEntry:
    """The entry with the layout that is wanted, if the tokenizer's codes can have it."""
    own = getattr(tokenizer, "layout", None)  # of codes that are one stream already
    entry = replace(entry, layout=layout or own or "flatten")
    built = entry.build_layout()
    if built.spec != own and (own or isinstance(built, Interleave)):
        mend = f"are one stream already, {own!r}; leave it out" if own else "have no levels; use flatten or delay"
        raise PlaitError(f"layout: {layout!r} does not fit this tokenizer: its codes {mend}")
    return replace(entry, layout=built.spec)
