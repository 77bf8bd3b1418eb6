"""Families of models from elsewhere: which of their ids are what, and how they are prompted.

A checkpoint's folder holds its text tokenizer and some JSON files. From the names of its tokens come the blocks of a
`Vocabulary` and the parts that special tokens play; nothing in those files is run. Families:

- ``text``: a language model, as of Llama and Qwen. Documents are bare text.
- ``emu3``, ``emu3.5`` (arXiv 2409.18869, 2510.26583): text by Qwen's ranks; ``<|visual token 000017|>`` is a code.
- ``chameleon`` (arXiv 2405.09818), also Anole: a code's digits are letters, ``IMGIMGBHZ`` is 17.
- ``ids``: a decoder without tokenizers.
"""

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from plait.errors import PlaitError
from plait.tokenizers.base import read_json
from plait.tokenizers.prompts import chameleon_prompts, emu3_5_prompts, emu3_prompts, text_prompts
from plait.tokenizers.text_files import TextFile, find_text
from plait.tokenizers.text_foreign import ForeignText, read_bytes
from plait.tokenizers.vocabulary import BOS, EOS, GRAMMARS, PAD, Block, Vocabulary

FAMILIES = tuple(name for name in GRAMMARS if name != "plait")
_SETTINGS = ("tokenizer_config.json", "special_tokens_map.json", "processor_config.json", "preprocessor_config.json")
_CONFIGS = ("generation_config.json", "config.json")
# The parts that tokens play: what tokenizer_config.json calls it, and the names by which it goes otherwise.
_Parts = dict[str, tuple[str, tuple[str, ...]]]
_TEXT: _Parts = {BOS: ("bos_token", ("<s>", "<bos>")), EOS: ("eos_token", ("</s>", "<eos>", "<|endoftext|>"))}
_TEXT |= {PAD: ("pad_token", ("<pad>",))}
_EMU3_5: _Parts = {
    BOS: ("bos_token", ("<|extra_203|>",)),
    EOS: ("eos_token", ("<|extra_204|>",)),
    PAD: ("pad_token", ("<|endoftext|>",)),
    "<image>": ("boi_token", ("<|image start|>",)),
    "<image codes>": ("image_wrapper_token", ("<|image token|>",)),
    "<row>": ("eol_token", ("<|extra_200|>",)),
    "</image>": ("eoi_token", ("<|image end|>",)),
}
_EMU3: _Parts = {**_EMU3_5, "<frame>": ("eof_token", ("<|extra_201|>",))}
_CHAMELEON: _Parts = {
    BOS: ("bos_token", ("<s>",)),
    EOS: ("eos_token", ("</s>",)),
    PAD: ("pad_token", ("<pad>",)),
    "<image>": ("boi_token", ("<racm3:break>",)),
    "</image>": ("eoi_token", ("<eoss>",)),
}
_PARTS = {"text": _TEXT, "emu3": _EMU3, "emu3.5": _EMU3_5, "chameleon": _CHAMELEON}
# What may end a turn besides the end of the document.
_TURNS = {"emu3.5": "<|extra_101|>", "chameleon": "<reserved08706>"}
_VISUAL = {"chameleon": re.compile(r"IMGIMG([A-J]+)Z")}
_VISUAL |= dict.fromkeys(("emu3", "emu3.5"), re.compile(r"<\|visual token (\d+)\|>"))
_NEVER_TEXT = re.compile(r"<(unk|pad|s|/s|mask|bos|eos|racm3:break|eoss|image|reserved\d+)>|\[(UNK|PAD|CLS|SEP|MASK)\]")
_LETTERS = str.maketrans("ABCDEFGHIJ", "0123456789")


@dataclass
class Family:
    """What a bundle needs besides the decoder.

    Attributes:
        vocabulary: the model's ids.
        tokenizers: by folder name.
        generation: settings by target modality, as ``generation.json`` has them.
    """

    vocabulary: Vocabulary
    tokenizers: dict[str, Any]
    generation: dict[str, Any]


def read_family(
    family: str, folder: Path, visual: Any | None, size: int, text: Path | None = None, pictures: Path | None = None
) -> Family:
    """Read a model's text tokenizer and the files beside it.

    Args:
        family: one of `FAMILIES`. Without a text tokenizer every one is read as "ids".
        folder: of the checkpoint; its JSON files say more than names do, where they are there.
        visual: the model's image tokenizer; without it the codes have their block, and no modality uses them yet.
        size: ids that the decoder has. Those that the tokenizers do not use are a reserved block.
        text: the text tokenizer's file, or the folder that holds it; by default ``folder``.
        pictures: the image tokenizer's file or folder, where it has its own; files there say how large images are.

    Raises:
        PlaitError: an unknown family, a file that cannot be read, a token that the family needs and is not there, or
            more ids or another number of codes than the decoder or the image tokenizer has.
    """
    if family not in FAMILIES:
        raise PlaitError(f"family: {family!r} is none of {', '.join(FAMILIES)}")
    if text is not None and not text.exists():
        raise PlaitError(f"{text}: no such file; name the text tokenizer's file or folder")
    found = find_text(folder if text is None else text, family, size, visual)
    files = _Files(folder, found.path.parent if found else folder)
    if pictures is not None:
        files.read_sizes(pictures if pictures.is_dir() else pictures.parent)
    if found is None or family == "ids":
        return Family(_bare_ids(size, files), {}, {})
    sorted_ids = _Ids(family, found, files, size, visual)
    tokenizer = found.open(*sorted_ids.text)
    names = sorted_ids.names | _digits(tokenizer, found, family)
    vocabulary = Vocabulary(tuple(sorted_ids.blocks), grammar=family, names=names).grow("text", "text", tokenizer)
    tokenizers: dict[str, Any] = {"text": tokenizer}
    if visual is not None and family in _VISUAL:
        vocabulary = vocabulary.grow("image", "visual", visual)
        tokenizers["visual"] = visual
    if family == "chameleon" and "image" in vocabulary.modalities:
        entry = replace(vocabulary.modalities["image"], grid=_fixed_grid(files, visual))
        vocabulary = replace(vocabulary, modalities={**vocabulary.modalities, "image": entry})
    return Family(vocabulary, tokenizers, _generation(family, vocabulary, files, found, visual))


class _Files:
    """The JSON files beside a checkpoint and its tokenizer, whichever of them are there."""

    def __init__(self, *folders: Path) -> None:
        self.settings, self.configs = (
            [read_json(f / name) for f in dict.fromkeys(folders) for name in names if (f / name).is_file()]
            for names in (_SETTINGS, _CONFIGS)
        )
        self.configs += [c[k] for c in self.configs for k in ("text_config",) if isinstance(c.get(k), dict)]

    def read_sizes(self, folder: Path) -> None:
        """What an image tokenizer's folder says of the size of images: Emu3's as JSON, Chameleon's as YAML."""
        if (own := folder / "preprocessor_config.json").is_file():
            self.settings.append(read_json(own))
        if (own := folder / "vqgan.yaml").is_file():
            found = re.search(rb"^\s*resolution:\s*(\d{1,9})\s*$", read_bytes(own), re.MULTILINE)
            self.settings += [{"resolution": int(found[1])}] if found else []

    def token(self, key: str) -> str | None:
        """What the tokenizer's settings call the token of this part."""
        for content in self.settings:
            inner = (content.get(k) for k in ("extra_special_tokens", "model_specific_special_tokens"))
            for place in (content, *(d for d in inner if isinstance(d, dict))):
                value = place.get(key)
                value = value.get("content") if isinstance(value, dict) else value
                if isinstance(value, str):
                    return value
        return None

    def ids(self, key: str) -> list[int]:
        """The ids that the model's configuration names for a part, such as ``eos_token_id``."""
        named = [config.get(key) for config in self.configs]
        flat = [i for value in named for i in (value if isinstance(value, list) else [value])]
        return list(dict.fromkeys(i for i in flat if type(i) is int))

    def number(self, key: str) -> int | None:
        """The first whole number of this name in any file, also within an image processor's or tokenizer's settings."""
        for content in (*self.settings, *self.configs):
            inner = (content.get(k) for k in ("image_processor", "vq_config"))
            for place in (content, *(d for d in inner if isinstance(d, dict))):
                if type(value := place.get(key)) is int and value > 0:
                    return value
        return None


class _Ids:
    """A decoder's ids, sorted by what they are.

    Attributes:
        blocks: one after the other, covering all of them.
        names: the parts that they play.
        text: first id of text, number of ids from there to the last, and those between that are not text.
    """

    def __init__(self, family: str, found: TextFile, files: _Files, size: int, visual: Any | None) -> None:
        vocabulary_map = next((m for c in files.configs if isinstance(m := c.get("vocabulary_map"), dict)), {})
        tokens = {name: i for name, i in vocabulary_map.items() if type(i) is int} | found.tokens
        if (top := max(tokens.values())) >= size:
            raise PlaitError(f"{found.path}: has tokens up to id {top}, the decoder has {size} ids; they do not belong")
        codes = self._codes(family, found, tokens, visual)
        self.names = _find_parts(family, tokens, files, found, size)
        by_id = {i: name for name, i in tokens.items()}
        never = found.special | set(self.names.values()) | {i for n, i in tokens.items() if _NEVER_TEXT.fullmatch(n)}
        text = sorted(set(found.text) - never - set(codes))
        before, after = (
            ([i for i in text if i < codes.start], [i for i in text if i >= codes.stop]) if codes else ([], text)
        )
        text = max(before, after, key=len)
        if not text:
            raise PlaitError(f"{found.path}: has no tokens of text")
        whole = range(text[0], text[-1] + 1)
        self.text = whole.start, len(whole), sorted(set(whole) - set(text))
        self.names |= {by_id[i]: i for i in self.text[2] if i in by_id and by_id[i] not in self.names}
        self.blocks: list[Block] = []
        start = 0
        for fixed, name in sorted(((whole, "text.0"), (codes, "visual.0")), key=lambda pair: pair[0].start):
            if fixed:
                self._fill(range(start, fixed.start), by_id)
                self.blocks.append(Block(name, fixed.start, len(fixed)))
                start = fixed.stop
        self._fill(range(start, size), by_id)

    def _fill(self, ids: range, by_id: Mapping[int, str]) -> None:
        """Blocks of what is neither text nor codes: special tokens where ids have names, else reserved."""
        start = ids.start
        while start < ids.stop:
            named = start in by_id
            stop = next((i for i in range(start, ids.stop) if (i in by_id) != named), ids.stop)
            kind = "special" if named else "reserved"
            number = sum(block.name.split(".")[0] == kind for block in self.blocks)
            tokens = tuple(by_id[i] for i in range(start, stop)) if named else ()
            self.blocks.append(Block(f"{kind}.{number}" if number else kind, start, stop - start, tokens))
            start = stop

    @staticmethod
    def _codes(family: str, found: TextFile, tokens: Mapping[str, int], visual: Any | None) -> range:
        """The ids of image codes, in the order of the codes."""
        if family not in _VISUAL:
            return range(0)
        matches = ((_VISUAL[family].fullmatch(name), i) for name, i in tokens.items())
        ids = dict(sorted((int(match[1].translate(_LETTERS)), i) for match, i in matches if match))
        if not ids:
            raise PlaitError(f"{found.path}: has no tokens of image codes, such as {_VISUAL[family].pattern}")
        codes = range(ids.get(0, 0), ids.get(0, 0) + len(ids))
        if dict(enumerate(codes)) != ids:
            raise PlaitError(f"{found.path}: its tokens of image codes are not one row of ids, from code 0 upwards")
        if visual is not None and visual.codebook_sizes != [len(codes)]:
            raise PlaitError(
                f"{found.path}: has {len(codes)} image codes, the image tokenizer {visual.codebook_sizes[0]}; "
                "give the model's own image tokenizer"
            )
        return codes


def _find_parts(family: str, tokens: Mapping[str, int], files: _Files, found: TextFile, size: int) -> dict[str, int]:
    """The ids of the parts that a family's documents need, by what the files call them, else by their usual names."""
    parts: dict[str, int] = {}
    for part, (key, usual) in _PARTS[family].items():
        named, by_name = (
            [tokens[name] for name in names if name in tokens] for names in ([files.token(key) or ""], usual)
        )
        configured = [i for i in files.ids(f"{key}_id") if 0 <= i < size]
        # A family's own names are surer than the ids of a configuration: Chameleon's on Hugging Face are wrong.
        ids = [*named, *configured, *by_name] if family == "text" else [*named, *by_name, *configured]
        if ids:
            parts[part] = ids[0]
    # A model may do without a token of its own for these.
    for part, others in ((EOS, (PAD, BOS)), (BOS, (EOS,)), (PAD, (EOS,))):
        if part not in parts and (other := next((o for o in others if o in parts), None)):
            parts[part] = parts[other]
    if missing := [part for part in _PARTS[family] if part not in parts]:
        key, usual = _PARTS[family][missing[0]]
        raise PlaitError(
            f"{found.path}: has no token {' or '.join(usual)} to be {missing[0]}; "
            f"name another as {key} in tokenizer_config.json"
        )
    turns = [tokens[name] for name in (files.token("sep_token") or "", _TURNS.get(family, "")) if name in tokens][:1]
    if family == "text":
        turns = [i for i in files.ids("eos_token_id") if i < size and i != parts[EOS]]
    return parts | {f"<turn {n}>" if n else "<turn>": i for n, i in enumerate(turns)}


def _digits(tokenizer: ForeignText, found: TextFile, family: str) -> dict[str, int]:
    """The ids of the characters of an image's written size, for families that write it."""
    if family not in ("emu3", "emu3.5"):
        return {}
    codes = {character: tokenizer.encode(character).tolist() for character in "0123456789*"}
    if long := next((character for character, found_codes in codes.items() if len(found_codes) != 1), None):
        raise PlaitError(f"{found.path}: has no token for {long!r}, of which the size of an {family} image is written")
    return {character: only[0] + tokenizer.first for character, only in codes.items()}


def _bare_ids(size: int, files: _Files) -> Vocabulary:
    parts = {BOS: "bos_token_id", EOS: "eos_token_id", PAD: "pad_token_id"}
    names = {part: i for part, key in parts.items() for i in files.ids(key)[:1] if 0 <= i < size}
    return Vocabulary((Block("ids", 0, size),), grammar="ids", names=names)


def _fixed_grid(files: _Files, visual: Any) -> tuple[int, int]:
    """Rows and columns of all of Chameleon's images: 1,024 codes unless its files say otherwise."""
    side = max(1, (files.number("resolution") or 32 * visual.factor) // visual.factor)
    if (length := files.number("image_seq_length")) and math.isqrt(length) ** 2 == length:
        side = math.isqrt(length)
    return side, side


def _generation(
    family: str, vocabulary: Vocabulary, files: _Files, found: TextFile, visual: Any | None
) -> dict[str, Any]:
    context = files.number("max_position_embeddings") or math.inf
    if family == "text":
        return text_prompts(_begins(files, found, vocabulary), _sampling(files))
    if family == "chameleon":
        settings = chameleon_prompts(vocabulary.has_special("<turn>"))
    elif family == "emu3.5":
        settings = emu3_5_prompts(vocabulary.has_special("<|extra_100|>"))
    else:
        factor = visual.factor if visual is not None else 8
        # Emu3-Gen draws 720 × 720 pixels, Emu3-Chat, which reads longer sequences, 512 × 512.
        area = files.number("image_area") or (262_144 if 131_072 <= context < math.inf else 518_400)
        side = max(1, round(math.sqrt(area) / factor))
        pixels = [files.number("min_pixels"), files.number("max_pixels")]

        def fits(rows: int) -> bool:
            return rows * (rows + 1) + 64 <= context

        known = None not in pixels and fits(round(math.sqrt(pixels[1] or 0) / factor))
        settings = emu3_prompts([side, side] if fits(side) else None, [p or 0 for p in pixels] if known else None)
    return {to: setting for to, setting in settings.items() if to in (*vocabulary.modalities, "interleaved")}


def _begins(files: _Files, found: TextFile, vocabulary: Vocabulary) -> bool:
    """Whether the tokenizer puts <bos> before a prompt."""
    told = [s["add_bos_token"] for s in files.settings if isinstance(s.get("add_bos_token"), bool)]
    return told[0] if told else found.begins_with(vocabulary.special(BOS))


def _sampling(files: _Files) -> dict[str, Any]:
    """The sampling settings of ``generation_config.json``, if it samples."""
    chosen: Iterable[dict[str, Any]] = (c for c in files.configs if c.get("do_sample") is True)
    first = next(iter(chosen), {})
    return {key: first[key] for key in ("temperature", "top_k", "top_p") if isinstance(first.get(key), (int, float))}
