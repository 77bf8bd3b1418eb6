"""Families from folders as the libraries write them, and their documents against the processors of transformers."""

import base64
import json
import random
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from foreign_models import (
    EMU3_MARKS,
    chameleon_tokenizer,
    emu3_tokenizer,
    train_bpe,
    visual_tokens,
    write_config,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from transformers import PreTrainedTokenizerFast

from plait.errors import PlaitError
from plait.tokenizers.families import Family, read_family
from plait.tokenizers.grammar import Cursor, Grammar, Span
from plait.tokenizers.text_foreign import _byte_letters
from plait.tokenizers.vocabulary import Vocabulary

CODES = 64


@dataclass
class Visual:
    """What a family sees of an image tokenizer."""

    codebook_sizes: list[int] = field(default_factory=lambda: [CODES])
    fingerprint: str = "v"
    factor: int = 8


def make(family: str, folder: Path, visual: Any = None, **config: Any) -> tuple[Family, Any]:
    """The family read from its files, and transformers' tokenizer; ten rows of the decoder are left over."""
    if family == "chameleon":
        reference = chameleon_tokenizer(CODES)
        config = {"bos_token_id": 1, "eos_token_id": 2, "vq_config": {"resolution": 32}, **config}
    else:
        reference = emu3_tokenizer(CODES, special_first=family == "emu3.5")
    reference.save_pretrained(folder)
    write_config(folder, **config)
    return read_family(family, folder, visual or Visual(), len(reference) + 10), reference


@pytest.fixture(scope="module", params=["emu3", "emu3.5", "chameleon"])
def both(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Family, Any]:
    return make(request.param, tmp_path_factory.mktemp("family"))


# --- ids


def test_every_id_is_what_the_tokenizer_calls_it(both: tuple[Family, Any], tmp_path: Path) -> None:
    family, reference = both
    vocabulary, text = family.vocabulary, family.tokenizers["text"]
    names = visual_tokens(vocabulary.grammar, CODES)
    assert vocabulary.size == len(reference) + 10
    assert [i for block in vocabulary.blocks for i in block.ids] == list(range(vocabulary.size))
    for block in vocabulary.blocks:
        found = reference.convert_ids_to_tokens(list(block.ids))
        if block.tokens:
            assert list(block.tokens) == found
        elif block.name == "visual.0":
            assert found == names
        elif block.name == "text.0":
            assert (block.start, block.size) == (text.first, text.size) == (text.first, 320)
        else:
            assert (block.name, block.size) == ("reserved", 10)
    for part, token in {"<bos>": "bos_token", "<eos>": "eos_token", "<pad>": "pad_token"}.items():
        assert vocabulary.special(part) == getattr(reference, f"{token}_id")
    assert vocabulary.special("<image>") == reference.convert_tokens_to_ids(reference.boi_token)
    assert vocabulary.special("</image>") == reference.convert_tokens_to_ids(reference.eoi_token)
    vocabulary.save(tmp_path / "vocabulary.json")
    loaded = Vocabulary.load(tmp_path / "vocabulary.json")
    assert loaded == vocabulary
    assert loaded.fingerprint == vocabulary.fingerprint


def test_the_full_layouts_are_the_released_ones(tmp_path: Path) -> None:
    """With stand-ins for the text, of as many tokens."""
    letters = _byte_letters()
    text = [bytes([byte]) for byte in range(256)]
    text += [f"{i:05d}".encode() for i in range(151_643 - 256)]
    (tmp_path / "emu3").mkdir()
    rows = b"".join(base64.b64encode(token) + b" %d\n" % rank for rank, token in enumerate(text))
    (tmp_path / "emu3" / "emu3.tiktoken").write_bytes(rows)
    for family, visual, size in (("emu3", None, 184_622), ("emu3.5", Visual([131_072]), 282_926)):
        vocabulary = read_family(family, tmp_path / "emu3", visual, size).vocabulary
        assert [(b.name, b.start, b.size) for b in vocabulary.blocks] == [
            ("text.0", 0, 151_643),
            ("special", 151_643, 211),
            ("visual.0", 151_854, 32_768 if visual is None else 131_072),
        ]
        parts = {"<pad>": 151_643, "<row>": 151_846, "<bos>": 151_849, "<eos>": 151_850}
        parts |= {"<image codes>": 151_851, "<image>": 151_852, "</image>": 151_853}
        parts |= {"<frame>": 151_847} if family == "emu3" else {"<turn>": 151_747, "<|extra_100|>": 151_746}
        assert {part: vocabulary.special(part) for part in parts} == parts
        assert ("image" in vocabulary.modalities) == (visual is not None)
    names = ["<s>", "<pad>", "</s>", "<unk>", *visual_tokens("chameleon", 8192), "<eoss>", "<racm3:break>"]
    names += [f"<reserved{i:05d}>" for i in range(8194, 16_384)]
    names += letters + [f"{i:05d}" for i in range(65_536 - len(names) - 256)]
    model = {"type": "BPE", "vocab": {name: i for i, name in enumerate(names)}, "merges": []}
    added = [{"id": i, "content": names[i], "special": True} | dict.fromkeys(("lstrip", "rstrip", "single_word"), False)
             | {"normalized": False} for i in range(4)]  # fmt: skip
    (tmp_path / "text_tokenizer.json").write_text(json.dumps({"version": "1.0", "model": model, "added_tokens": added}))
    vocabulary = read_family("chameleon", tmp_path, Visual([8192], factor=16), 65_536).vocabulary
    assert [(b.name, b.start, b.size) for b in vocabulary.blocks] == [
        ("special", 0, 4),
        ("visual.0", 4, 8192),
        ("special.1", 8196, 8192),
        ("text.0", 16_388, 65_536 - 16_388),
    ]
    parts = {"<bos>": 0, "<pad>": 1, "<eos>": 2, "</image>": 8196, "<image>": 8197, "<turn>": 8710}
    assert {part: vocabulary.special(part) for part in parts} == parts
    assert vocabulary.modalities["image"].grid == (32, 32)


@pytest.mark.parametrize(
    ("tokenizer_config", "generation", "parts"),
    [
        # Llama 2, Qwen's base model, Llama 3's chat model
        ({"bos_token": "<s>", "eos_token": "</s>"}, {}, {"<bos>": "<s>", "<eos>": "</s>", "<pad>": "</s>"}),
        (
            {"bos_token": None, "eos_token": "<|endoftext|>", "pad_token": "<|endoftext|>"},
            {"bos_token_id": 323},
            dict.fromkeys(("<bos>", "<eos>", "<pad>"), "<|endoftext|>"),
        ),
        (
            {"bos_token": {"content": "<s>"}, "eos_token": {"content": "</s>"}},
            {"eos_token_id": [321, 324]},
            {"<bos>": "<s>", "<eos>": "</s>", "<turn>": "<|im_end|>"},
        ),
    ],
)
def test_language_models_name_their_own_ends(
    tmp_path: Path, tokenizer_config: dict[str, Any], generation: dict[str, Any], parts: dict[str, str]
) -> None:
    engine = train_bpe()
    marks = ["<s>", "</s>", "<pad?>", "<|endoftext|>", "<|im_end|>"]
    engine.add_special_tokens(marks)
    engine.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(tokenizer_config))
    (tmp_path / "generation_config.json").write_text(json.dumps(generation))
    family = read_family("text", tmp_path, None, 330)
    ids = dict(zip(marks, range(320, 325), strict=True))
    assert {part: family.vocabulary.special(part) for part in parts} == {p: ids[token] for p, token in parts.items()}
    assert [(b.name, b.size) for b in family.vocabulary.blocks] == [("text.0", 320), ("special", 5), ("reserved", 5)]
    assert family.generation == {"text": {"prompt": "{prompt}"}}


def test_a_prompt_begins_as_the_tokenizer_says(tmp_path: Path) -> None:
    from tokenizers import processors

    engine = train_bpe()
    engine.add_special_tokens(["<s>", "</s>"])
    engine.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 320)])
    PreTrainedTokenizerFast(tokenizer_object=engine, bos_token="<s>", eos_token="</s>").save_pretrained(tmp_path)
    (tmp_path / "generation_config.json").write_text(json.dumps({"do_sample": True, "top_p": 0.8, "temperature": 0.6}))
    family = read_family("text", tmp_path, None, 322)
    assert family.generation == {"text": {"prompt": "<bos>{prompt}", "temperature": 0.6, "top_p": 0.8}}


def test_special_tokens_amid_the_text_are_no_text(tmp_path: Path) -> None:
    engine = train_bpe()
    reference = PreTrainedTokenizerFast(tokenizer_object=engine, bos_token="<s>", eos_token="e")
    reference.save_pretrained(tmp_path)
    family = read_family("text", tmp_path, None, len(reference))
    amid = reference.convert_tokens_to_ids("e")
    assert family.tokenizers["text"].excluded == (amid,)
    grammar = Grammar(family.vocabulary)
    cursor = Cursor(grammar, 100)
    assert grammar.eos == amid
    assert sorted(i for ids in cursor.allowed() for i in ids) == list(range(320))
    assert sum(amid in ids for ids in cursor.allowed()) == 1


def test_without_a_text_tokenizer_there_are_ids(tmp_path: Path) -> None:
    write_config(tmp_path, bos_token_id=1, eos_token_id=[2, 3], pad_token_id=None)
    for name in ("text", "emu3", "chameleon", "ids"):
        family = read_family(name, tmp_path, Visual(), 100)
        assert family.vocabulary == Vocabulary(family.vocabulary.blocks, grammar="ids", names={"<bos>": 1, "<eos>": 2})
        assert [(b.name, b.size) for b in family.vocabulary.blocks] == [("ids", 100)]
        assert (family.tokenizers, family.generation) == ({}, {})
        assert Grammar(family.vocabulary).forms == {}
    family.vocabulary.save(tmp_path / "vocabulary.json")
    assert Vocabulary.load(tmp_path / "vocabulary.json") == family.vocabulary


@pytest.mark.parametrize(
    ("settings", "grid"),
    [
        ({}, [90, 90]),
        ({"max_position_embeddings": 9216}, [90, 90]),
        ({"max_position_embeddings": 131_072}, [64, 64]),
        ({"max_position_embeddings": 131_072, "image_area": 518_400}, [90, 90]),
        ({"max_position_embeddings": 512}, None),
        ({"image_area": 32 * 32}, [4, 4]),
    ],
)
def test_emu3s_grid_follows_from_its_files(tmp_path: Path, settings: dict[str, Any], grid: list[int] | None) -> None:
    family, _ = make("emu3", tmp_path, **settings)
    assert family.generation["image"].get("grid") == grid


# --- what cannot be read


def drop(name: str) -> Callable[[Path], None]:
    """Rename a token out of the way."""

    def damage(folder: Path) -> None:
        for file in ("tokenizer.json", "tokenizer_config.json"):
            (folder / file).write_text((folder / file).read_text().replace(json.dumps(name), '"<gone>"'))

    return damage


@pytest.mark.parametrize(
    ("family", "damage", "message"),
    [
        ("emu3", drop("<|image start|>"), None),
        ("emu3", drop("<|visual token 000063|>"), "has 63 image codes, the image tokenizer 64"),
        ("emu3", drop("<|visual token 000007|>"), "are not one row of ids, from code 0 upwards"),
        ("emu3", drop("<|visual token 000000|>"), "are not one row of ids, from code 0 upwards"),
        ("chameleon", drop("IMGIMGFDZ"), "are not one row of ids"),
        (
            "chameleon",
            lambda f: drop("<eoss>")(f) or (f / "tokenizer_config.json").unlink(),
            "has no token <eoss> to be",
        ),
        ("text", lambda f: (f / "tokenizer.json").write_text("{"), "is not a tokenizer of Hugging Face's"),
        (
            "text",
            lambda f: (f / "tokenizer.json").write_text('{"model": {"vocab": [3]}}'),
            r"tokenizer\.json: is not a tokenizer after all",
        ),
        (
            "text",
            lambda f: (f / "tokenizer.json").write_text('{"model": {"vocab": {"a": "b"}}}'),
            r"tokenizer\.json: ",
        ),
        ("text", lambda f: (f / "config.json").write_text("{"), r"config\.json: not readable as JSON"),
    ],
)
def test_damaged_files_are_named(
    tmp_path: Path, family: str, damage: Callable[[Path], Any], message: str | None
) -> None:
    _, reference = make("chameleon" if family == "chameleon" else "emu3", tmp_path)
    damage(tmp_path)
    if message is None:  # the settings give the part to another token
        assert read_family(family, tmp_path, Visual(), len(reference)).vocabulary.has_special("<image>")
        return
    with pytest.raises(PlaitError, match=message) as raised:
        read_family(family, tmp_path, Visual(), len(reference))
    assert "\n" not in str(raised.value)
    assert str(tmp_path) in str(raised.value)


def test_sizes_that_do_not_belong_are_both_named(tmp_path: Path) -> None:
    _, reference = make("emu3", tmp_path)
    top = len(reference) - 1
    with pytest.raises(PlaitError, match=f"has tokens up to id {top}, the decoder has {top} ids"):
        read_family("emu3", tmp_path, Visual(), top)
    with pytest.raises(PlaitError, match="has 64 image codes, the image tokenizer 60"):
        read_family("emu3", tmp_path, Visual([60]), top + 1)
    with pytest.raises(PlaitError, match="^family: 'emu4' is none of text, emu3"):
        read_family("emu4", tmp_path, Visual(), top + 1)
    with pytest.raises(PlaitError, match="nowhere: no such file"):
        read_family("emu3", tmp_path, Visual(), top + 1, text=tmp_path / "nowhere")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "vocab.json").write_text("{}")
    with pytest.raises(PlaitError, match=r"vocab\.json: is not read; save the tokenizer as tokenizer\.json"):
        read_family("text", tmp_path, None, top + 1, text=tmp_path / "other")
    (tmp_path / "other" / "broken.tiktoken").write_text("AA== 0")
    with pytest.raises(PlaitError, match=r"broken\.tiktoken: its ranks are not"):
        read_family("text", tmp_path, None, top + 1, text=tmp_path / "other" / "broken.tiktoken")


# --- documents


def emu3_image(codes: torch.Tensor, reference: Any, joined: bool) -> str:
    """The reference formula, as a string of tokens."""
    rows = ["".join(f"<|visual token {int(c):06d}|>" for c in row) for row in codes]
    size = "{}*{}".format(*codes.shape)
    body = reference.eol_token.join(rows) + ("" if joined else reference.eol_token + reference.eof_token)
    return f"{reference.boi_token}{size}{reference.image_wrapper_token}{body}{reference.eoi_token}"


def image_span(draw: random.Random, family: str, most: int = 12) -> Span:
    shape = (4, 4) if family == "chameleon" else (draw.randint(1, most), draw.randint(1, most))
    return Span("image", torch.tensor([[draw.randrange(CODES) for _ in range(shape[1])] for _ in range(shape[0])]))


@pytest.mark.parametrize("seed", range(4))
def test_documents_are_those_of_the_formula(both: tuple[Family, Any], seed: int) -> None:
    family, reference = both
    name, draw = family.vocabulary.grammar, random.Random(seed)
    span, text = image_span(draw, name), family.tokenizers["text"]
    if name == "chameleon":
        codes = "".join(visual_tokens(name, CODES)[int(c)] for c in span.codes.flatten())
        image = f"{reference.boi_token}{codes}{reference.eoi_token}"
    else:
        image = emu3_image(span.codes, reference, joined=name == "emu3.5")
    whole = f"{reference.bos_token}USER: {image}What is this?{reference.eos_token}"
    spans = [Span("text", text.encode("USER: ")), span, Span("text", text.encode("What is this?"))]
    ids = Grammar(family.vocabulary).document(spans).tolist()
    assert ids == reference(whole, add_special_tokens=False).input_ids


def test_emu3_documents_are_those_of_transformers(tmp_path: Path) -> None:
    from transformers import Emu3ImageProcessor, Emu3Processor
    from transformers.models.emu3.modeling_emu3 import Emu3ImageVocabularyMapping

    family, reference = make("emu3", tmp_path)
    processor = Emu3Processor(Emu3ImageProcessor(min_pixels=32 * 48, max_pixels=32 * 48), reference)
    grammar, text = Grammar(family.vocabulary), family.tokenizers["text"]
    inputs = processor(
        images=[Image.new("RGB", (48, 32))], text="USER: <image>What is this?", return_tensors="pt"
    )  # fmt: skip
    codes = torch.randint(CODES, (4, 6))
    # The model puts its codes where the processor left places for them.
    mapping = Emu3ImageVocabularyMapping(reference.get_vocab())
    expected = inputs["input_ids"][0]
    expected[expected == reference.convert_tokens_to_ids("<image>")] = mapping.convert_img2bpe(codes).flatten().long()
    spans = [Span("text", text.encode("USER: ")), Span("image", codes), Span("text", text.encode("What is this?"))]
    assert grammar.document(spans)[:-1].tolist() == expected.tolist()
    prompt = processor(text="a red apple", return_for_image_generation=True, ratio="4:3", image_area=32 * 48)
    height, width = prompt["image_sizes"][0]
    ours = [
        grammar.bos,
        *grammar.write(Span("text", text.encode("a red apple"))),
        *grammar.begin("image", (height, width)),
    ]
    assert [int(i) for i in ours] == prompt["input_ids"][0]


def test_chameleon_documents_are_those_of_transformers(tmp_path: Path) -> None:
    from transformers import ChameleonImageProcessor, ChameleonProcessor
    from transformers.models.chameleon.modeling_chameleon import ChameleonImageVocabularyMapping

    family, reference = make("chameleon", tmp_path)
    reference.add_bos_token = False
    processor = ChameleonProcessor(ChameleonImageProcessor(), reference, image_seq_length=16)
    grammar, text = Grammar(family.vocabulary), family.tokenizers["text"]
    inputs = processor(images=[Image.new("RGB", (512, 512))], text="<image>What is this?", return_tensors="pt")
    codes = torch.randint(CODES, (4, 4))
    mapping = ChameleonImageVocabularyMapping(reference.get_vocab())
    expected = inputs["input_ids"][0]
    expected[expected == reference.convert_tokens_to_ids("<image>")] = mapping.convert_img2bpe(codes).flatten().long()
    spans = [Span("image", codes), Span("text", text.encode("What is this?"))]
    ours = [*grammar.document(spans)[1:-1].tolist(), *grammar.turns]
    assert ours == expected.tolist()


def same(a: list[Span], b: list[Span]) -> bool:
    """Equal, where texts that touch are one and empty ones none."""

    def joined(spans: list[Span]) -> list[tuple[str, list[int]]]:
        found: list[tuple[str, list[int]]] = []
        for span in spans:
            if span.modality == "text" and found and found[-1][0] == "text":
                found[-1][1].extend(span.codes.tolist())
            elif span.modality != "text" or len(span.codes):
                found.append((span.modality, span.codes.tolist()))
        return found

    return joined(a) == joined(b)


@settings(deadline=None, max_examples=60)
@given(seed=st.integers(0, 1 << 30), count=st.integers(0, 5))
def test_parsing_undoes_writing(both: tuple[Family, Any], seed: int, count: int) -> None:
    vocabulary, draw = both[0].vocabulary, random.Random(seed)
    grammar = Grammar(vocabulary)
    spans = [
        image_span(draw, vocabulary.grammar)
        if draw.random() < 0.5
        else Span("text", torch.tensor([draw.randrange(320) for _ in range(draw.randint(0, 6))], dtype=torch.int64))
        for _ in range(count)
    ]
    ids = grammar.document(spans)
    assert same(grammar.parse(ids), spans)
    assert len(ids) == 2 + sum(map(grammar.length, spans))
    cursor = Cursor(grammar, 1 << 60)
    for span in spans:
        written, free = grammar.write(span).tolist(), grammar.choices(span).tolist()
        for token, choice in zip(written, free, strict=True):
            assert cursor.allows(token)
            assert (sum(map(len, cursor.allowed())) > 1) == choice
            cursor.push(token)


@settings(deadline=None, max_examples=120)
@given(budget=st.integers(1, 400), seed=st.integers(0, 1 << 30), greedy=st.booleans())
def test_sampled_documents_end_in_time_and_parse(
    both: tuple[Family, Any], budget: int, seed: int, greedy: bool
) -> None:
    grammar, draw = Grammar(both[0].vocabulary), random.Random(seed)
    cursor, ids = Cursor(grammar, budget), [grammar.bos]
    while not cursor.done:
        ranges = cursor.allowed()
        assert all(len(r) for r in ranges)
        if greedy and len(ranges) > 1 and cursor.open is None:
            ranges = [r for r in ranges if grammar.form("image").begin in r] or ranges
        chosen = draw.choice(ranges)
        ids.append(chosen[-1] if greedy else draw.choice(chosen))
        assert cursor.allows(ids[-1])
        cursor.push(ids[-1])
    assert len(ids) - 1 == budget - cursor.budget <= budget
    assert same(grammar.parse(ids), cursor.spans)
    assert grammar.document(cursor.spans).tolist() == ids


@pytest.mark.parametrize("budget", range(1, 60))
def test_an_image_begins_only_if_it_can_end(both: tuple[Family, Any], budget: int) -> None:
    grammar = Grammar(both[0].vocabulary)
    form, cursor = grammar.form("image"), Cursor(grammar, budget)
    least = {"emu3": 1 + 4 + 2 + 2, "emu3.5": 1 + 4 + 1 + 1, "chameleon": 18}[both[0].vocabulary.grammar]
    assert form.least == least
    begins = any(form.begin in ids for ids in cursor.allowed())
    assert begins == (budget > least)
    if begins and least < 18:
        cursor.push(form.begin)
        written = grammar.begin("image", (9, 1))[1]
        fits = form.length((9, 1)) < budget
        assert any(written in ids for ids in cursor.allowed()) == fits


@pytest.mark.parametrize("to", ["text", "image", None])
def test_an_aim_leaves_nothing_else(both: tuple[Family, Any], to: str | None) -> None:
    grammar = Grammar(both[0].vocabulary)
    image, text = grammar.form("image"), grammar.form("text")
    cursor = Cursor(grammar, 400)
    for token in (text.books[0][5], text.books[0][6]):
        cursor.push(token)
    other = cursor.copy()
    cursor.aim(to)
    assert [span.codes.tolist() for span in cursor.spans] == [[5, 6]]
    ids = {i for r in cursor.allowed() for i in r}
    assert (image.begin in ids) == (to != "text")
    assert (text.books[0][0] in ids) == (to != "image")
    assert ids >= {grammar.eos, *grammar.turns}
    cursor.push(grammar.turns[0] if grammar.turns else grammar.eos)
    assert cursor.done
    assert [span.codes.tolist() for span in cursor.spans] == [[5, 6], *([[]] if to == "text" else [])]
    # The copy goes on by itself.
    assert other.open == ("text", (), [5, 6])


def test_marks_between_spans_are_read_over(both: tuple[Family, Any]) -> None:
    family, reference = both
    grammar, text = Grammar(family.vocabulary), family.tokenizers["text"]
    mark = "<reserved08706>" if family.vocabulary.grammar == "chameleon" else "<|extra_100|>"
    ids = reference(
        f"{reference.bos_token}two dogs{mark}a cat{reference.eos_token}", add_special_tokens=False
    ).input_ids
    assert [text.decode(span.codes) for span in grammar.parse(ids)] == ["two dogs", "a cat"]
    begin = grammar.begin("image")
    with pytest.raises(PlaitError, match="where .* is expected|goes on for"):
        grammar.parse([grammar.bos, *begin, reference.convert_tokens_to_ids(mark), grammar.eos])


def test_growing_moves_no_id(both: tuple[Family, Any], tmp_path: Path) -> None:
    vocabulary = both[0].vocabulary
    grown = vocabulary.grow("audio", "audio", Visual([7, 5], "sound"), "delay")  # type: ignore[arg-type]
    assert [grown.describe(i) for i in range(vocabulary.size)] == [
        vocabulary.describe(i) for i in range(vocabulary.size)
    ]
    assert [(b.name, b.size) for b in grown.blocks[len(vocabulary.blocks) :]] == [
        ("number", 1024), ("special.audio", 2), ("audio.0", 7), ("audio.1", 5)
    ]  # fmt: skip
    grown.save(tmp_path / "vocabulary.json")
    assert Vocabulary.load(tmp_path / "vocabulary.json") == grown
    before, after = Grammar(vocabulary), Grammar(grown)
    spans = [image_span(random.Random(0), vocabulary.grammar), Span("text", torch.tensor([4, 5]))]
    assert torch.equal(before.document(spans), after.document(spans))
    sound = Span("audio", torch.tensor([[1, 2, 6], [0, 4, 3]]))
    assert same(after.parse(after.document([*spans, sound])), [*spans, sound])


def test_a_language_model_learns_images(tmp_path: Path) -> None:
    engine = train_bpe()
    engine.add_special_tokens(["<s>", "</s>"])
    PreTrainedTokenizerFast(tokenizer_object=engine, bos_token="<s>", eos_token="</s>").save_pretrained(tmp_path)
    vocabulary = read_family("text", tmp_path, None, 322).vocabulary
    grown = vocabulary.grow("image", "visual", Visual())  # type: ignore[arg-type]
    grammar = Grammar(grown)
    image = Span("image", torch.tensor([[1, 2], [3, 4]]))
    ids = grammar.document([Span("text", torch.tensor([7])), image]).tolist()
    names = (
        "<s>|text.0 7|<image>|number 2|number 2|visual.0 1|visual.0 2|<row>|visual.0 3|visual.0 4|<row>|</image>|</s>"
    )
    assert "|".join(map(grown.describe, ids)) == names
    assert same(grammar.parse(ids), [Span("text", torch.tensor([7])), image])
    bare = Vocabulary(read_family("ids", tmp_path, None, 9).vocabulary.blocks, grammar="ids")
    learned = bare.grow("image", "visual", Visual())  # type: ignore[arg-type]
    assert same(Grammar(learned).parse(Grammar(learned).document([image])), [image])


def test_codes_of_an_image_tokenizer_that_comes_later(tmp_path: Path) -> None:
    make("emu3", tmp_path)
    family = read_family("emu3", tmp_path, None, 605)
    assert list(family.vocabulary.modalities) == ["text"]
    with pytest.raises(PlaitError, match=r"vocabulary: has 64 codes in visual\.0, the visual tokenizer has 60"):
        family.vocabulary.grow("image", "visual", Visual([60]))  # type: ignore[arg-type]
    later = family.vocabulary.grow("image", "visual", Visual())  # type: ignore[arg-type]
    assert later == read_family("emu3", tmp_path, Visual(), 605).vocabulary


@pytest.mark.parametrize(
    ("codes", "message"),
    [
        (torch.zeros(1, 10_000, dtype=torch.int64), "image codes: shape"),
        (torch.zeros(0, 3, dtype=torch.int64), "image codes: shape"),
        (torch.zeros(16, dtype=torch.int64), "image codes: shape"),
        (torch.full((4, 4), CODES), r"image codes: found 64\.\.64"),
    ],
)
def test_codes_that_do_not_fit_are_refused(both: tuple[Family, Any], codes: torch.Tensor, message: str) -> None:
    with pytest.raises(PlaitError, match=f"^{message}"):
        Grammar(both[0].vocabulary).write(Span("image", codes))


def test_only_chameleons_grid_is_an_image_of_it(tmp_path: Path) -> None:
    grammar = Grammar(make("chameleon", tmp_path)[0].vocabulary)
    with pytest.raises(PlaitError, match=r"^image codes: shape is \(4, 5\), expected height × width of 4 × 4"):
        grammar.write(Span("image", torch.zeros(4, 5, dtype=torch.int64)))
    with pytest.raises(PlaitError, match=r"^image: grid is \[5, 4\], expected height × width of 4 × 4"):
        grammar.begin("image", (5, 4))
    assert grammar.begin("image") == grammar.begin("image", (4, 4)) == [grammar.form("image").begin]


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        ({"grammar": "emu4"}, "grammar is 'emu4', this plait knows plait, text"),
        ({"grammar": ["emu3"]}, r"grammar is \['emu3'\]"),
        ({"names": {"<bos>": 9999}}, "names: <bos> is 9999, must be one of its"),
        ({"names": {"<bos>": "1"}}, "names: <bos> is '1'"),
        ({"names": {}}, "special token .* is missing"),
        ({"names": 3}, "not a vocabulary"),
        ({"grammar": "plait"}, "has no block of 1024 numbers"),
    ],
)
def test_a_damaged_vocabulary_is_refused(
    both: tuple[Family, Any], tmp_path: Path, damage: dict[str, Any], message: str
) -> None:
    path = tmp_path / "vocabulary.json"
    both[0].vocabulary.save(path)
    path.write_text(json.dumps({**json.loads(path.read_text()), **damage}))
    with pytest.raises(PlaitError, match=rf"vocabulary\.json: {message}"):
        Vocabulary.load(path)


def test_marks_of_emu3_are_in_its_list(tmp_path: Path) -> None:
    """The original release names what follows its ranks in a file; a changed one is believed."""
    ranks = b"".join(base64.b64encode(bytes([byte])) + b" %d\n" % byte for byte in range(256))
    (tmp_path / "emu3.tiktoken").write_bytes(ranks)
    names = [*EMU3_MARKS, "<|one more|>", *visual_tokens("emu3", CODES)]
    (tmp_path / "emu3_vision_tokens.txt").write_text("\n".join(names) + "\n")
    vocabulary = read_family("emu3", tmp_path, Visual(), 256 + 208 + 4 + CODES).vocabulary
    assert vocabulary.special("<|one more|>") == 256 + 208 + 3
    assert vocabulary.block("visual.0").start == 256 + 208 + 4
