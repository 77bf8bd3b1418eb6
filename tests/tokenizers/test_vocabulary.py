import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from plait.errors import PlaitError
from plait.tokenizers.grammar import Grammar, Span
from plait.tokenizers.loading import find_weights
from plait.tokenizers.modalities import MODALITIES, Axis, SpanGrammar
from plait.tokenizers.text import TextTokenizer
from plait.tokenizers.visual import VisualTokenizer
from plait.tokenizers.vocabulary import Block, Vocabulary


@pytest.fixture
def video(monkeypatch: pytest.MonkeyPatch) -> str:
    """A second modality of the visual tokenizer, with one mark of its own and one of the image's."""
    axes = (Axis("time", "<frame>"), Axis("height", "<row>"), Axis("width"))
    monkeypatch.setitem(MODALITIES, "video", replace(MODALITIES["image"], grammar=SpanGrammar("video", axes)))
    return "video"


@pytest.fixture
def both(text_tokenizer: TextTokenizer, visual_tokenizer: VisualTokenizer) -> dict[str, Any]:
    return {"text": text_tokenizer, "visual": visual_tokenizer}


@dataclass
class Books:
    """What a vocabulary sees of a tokenizer."""

    codebook_sizes: list[int]
    layout: str | None = None
    fingerprint: str = "f"


def sound(sizes: list[int], layout: str | None = None, own: str | None = None) -> Vocabulary:
    """A vocabulary of sound alone."""
    layouts = None if layout is None else {"audio": layout}
    return Vocabulary.build({"audio": Books(sizes, own)}, ["audio"], layouts)  # type: ignore[dict-item]


def names(vocabulary: Vocabulary) -> list[str]:
    """What every id is."""
    return [vocabulary.describe(i) for i in range(vocabulary.size)]


def test_every_id_is_one_thing(vocabulary: Vocabulary) -> None:
    everything = names(vocabulary)
    assert everything[:4] == ["<pad>", "<bos>", "<eos>", "number 0"]
    assert len(set(everything)) == vocabulary.size == 3 + 1024 + 2 + 300 + 3 + 60
    assert [i for block in vocabulary.blocks for i in block.ids] == list(range(vocabulary.size))
    for block in vocabulary.blocks:
        assert vocabulary.block(block.name) is block
        for offset, token in enumerate(block.tokens):
            assert vocabulary.special(token) == block.start + offset
    assert vocabulary.block("number").size == 1024
    assert vocabulary.block("visual.0").size == 60
    assert vocabulary.block("text.0").size == 300


@pytest.mark.parametrize("token", [-1, 1392, 1 << 40])
def test_ids_outside_are_described_as_such(vocabulary: Vocabulary, token: int) -> None:
    assert vocabulary.describe(token) == f"id {token} outside the vocabulary of 1392"


def test_growing_moves_no_id(both: dict[str, Any], video: str) -> None:
    grown = Vocabulary.build(both, [])
    for modality in ("text", "image", video):
        before = grown
        grown = before.grow(modality, MODALITIES[modality].tokenizer, both[MODALITIES[modality].tokenizer])
        assert grown.size > before.size
        assert names(grown)[: before.size] == names(before)
        assert grown.blocks[: len(before.blocks)] == before.blocks
        assert before.modalities.keys() == grown.modalities.keys() - {modality}
        assert grown.fingerprint != before.fingerprint
    assert grown == Vocabulary.build(both, ["text", "image", video])


def test_modalities_share_a_tokenizers_block_and_marks(both: dict[str, Any], video: str) -> None:
    before = Vocabulary.build(both, ["text", "image"])
    grown = before.grow(video, "visual", both["visual"])
    assert grown.modalities[video].blocks == grown.modalities["image"].blocks == ("visual.0",)
    # Only <video>, <frame> and </video> are new; <row> is the image's.
    assert names(grown)[before.size :] == ["<video>", "<frame>", "</video>"]
    assert [block.name for block in grown.blocks].count("visual.0") == 1


def test_the_order_of_modalities_is_kept(both: dict[str, Any]) -> None:
    assert list(Vocabulary.build(both, ["image", "text"]).modalities) == ["image", "text"]
    assert (
        Vocabulary.build(both, ["image", "text"]).fingerprint != Vocabulary.build(both, ["text", "image"]).fingerprint
    )


def test_every_codebook_has_a_block(both: dict[str, Any]) -> None:
    class TwoCodebooks(TextTokenizer):
        @property
        def codebook_sizes(self) -> list[int]:
            return [300, 7]

    vocabulary = Vocabulary.build({"text": TwoCodebooks(both["text"]._model)}, ["text"])
    assert vocabulary.modalities["text"].blocks == ("text.0", "text.1")
    assert [vocabulary.block(name).size for name in vocabulary.modalities["text"].blocks] == [300, 7]


def test_growing_by_sound_appends_a_block_per_codebook(vocabulary: Vocabulary) -> None:
    grown = vocabulary.grow("audio", "audio", Books([40, 17, 5]), "delay")  # type: ignore[arg-type]
    assert names(grown)[: vocabulary.size] == names(vocabulary)
    assert [(b.name, b.size) for b in grown.blocks[len(vocabulary.blocks) :]] == [
        ("special.audio", 2),
        ("audio.0", 40),
        ("audio.1", 17),
        ("audio.2", 5),
    ]
    assert grown.modalities["audio"].blocks == ("audio.0", "audio.1", "audio.2")
    # What was written before is written alike.
    image = Span("image", torch.tensor([[1, 2], [3, 4]]))
    assert torch.equal(Grammar(vocabulary).write(image), Grammar(grown).write(image))


@pytest.mark.parametrize(
    ("sizes", "layout", "own", "stored"),
    [
        ([4096], None, None, "flatten"),
        ([4096], "delay", None, "flatten"),
        ([4096], "parallel", None, "flatten"),
        ([20, 9], None, None, "flatten"),
        ([20, 9], "flatten", None, "flatten"),
        ([20, 9], "delay", None, "delay:0,1"),
        ([20, 9, 9], "delay:1,2,2", None, "delay:0,1,1"),
        ([8, 8, 8], None, "interleave:4,2,1", "interleave:4,2,1"),
        ([8, 8, 8], "interleave:4,2,1", "interleave:4,2,1", "interleave:4,2,1"),
    ],
)
def test_the_layout_is_kept(tmp_path: Path, sizes: list[int], layout: str | None, own: str | None, stored: str) -> None:
    vocabulary = sound(sizes, layout, own)
    assert vocabulary.modalities["audio"].layout == stored
    vocabulary.save(tmp_path / "vocabulary.json")
    loaded = Vocabulary.load(tmp_path / "vocabulary.json")
    assert loaded == vocabulary
    assert loaded.fingerprint == vocabulary.fingerprint
    assert loaded.modalities["audio"].build_layout().spec == stored
    written = json.loads((tmp_path / "vocabulary.json").read_text())["modalities"]["audio"]
    assert written.get("layout", "flatten") == stored
    # Files of versions that knew no layouts must stay as they are.
    assert ("layout" in written) == (stored != "flatten")


def test_layouts_have_fingerprints_of_their_own() -> None:
    assert len({sound([9, 9, 9], layout).fingerprint for layout in ("flatten", "delay", "delay:0,1,1")}) == 3


@pytest.mark.parametrize(
    ("sizes", "layout", "own", "message"),
    [
        ([20, 9], "parallel", None, r"predicts 2 codes at once, plait's decoder one; use flatten or delay"),
        ([20, 9], "delay:0,1,2", None, "gives 3 numbers, there are 2 codebooks"),
        ([20, 9], "sideways", None, "'sideways' is none of flatten"),
        ([20, 9], "interleave:2,1", None, "its codes have no levels; use flatten or delay"),
        ([8, 8], "delay", "interleave:2,1", "its codes are one stream already, 'interleave:2,1'; leave it out"),
        ([8, 8], "interleave:4,1", "interleave:2,1", "its codes are one stream already, 'interleave:2,1'"),
    ],
)
def test_layouts_that_do_not_fit_are_refused(sizes: list[int], layout: str, own: str | None, message: str) -> None:
    with pytest.raises(PlaitError, match=f"^layout: .*{message}") as raised:
        sound(sizes, layout, own)
    assert "\n" not in str(raised.value)


def test_a_layout_of_no_modality_is_refused(both: dict[str, Any]) -> None:
    with pytest.raises(PlaitError, match="^layouts: names 'audio', the modalities are text, image$"):
        Vocabulary.build(both, ["text", "image"], {"audio": "delay"})


@pytest.mark.parametrize(
    ("layout", "message"),
    [
        ("parallel", "modality 'audio': layout: parallel predicts 2 codes at once"),
        ("delay:0,1,2", "modality 'audio': layout: .* gives 3 numbers"),
        ("", "modality 'audio': layout: '' is none of"),
        (None, "modality 'audio': layout: None is none of"),
        (["delay"], r"modality 'audio': layout: \['delay'\] is none of"),
    ],
)
def test_a_damaged_layout_is_refused(tmp_path: Path, layout: Any, message: str) -> None:
    path = tmp_path / "vocabulary.json"
    sound([20, 9], "delay").save(path)
    content = json.loads(path.read_text())
    content["modalities"]["audio"]["layout"] = layout
    path.write_text(json.dumps(content))
    with pytest.raises(PlaitError, match=rf"vocabulary\.json: {message}"):
        Vocabulary.load(path)


def test_plait_tinys_vocabulary_has_not_moved(tmp_path: Path) -> None:
    folder = find_weights("plait-tiny")
    vocabulary = Vocabulary.load(folder / "vocabulary.json")
    assert vocabulary.fingerprint == json.loads((folder / "config.json").read_text())["vocabulary"]
    vocabulary.save(tmp_path / "vocabulary.json")
    assert (tmp_path / "vocabulary.json").read_bytes() == (folder / "vocabulary.json").read_bytes()


def test_what_cannot_be_built_is_refused(both: dict[str, Any], vocabulary: Vocabulary, video: str) -> None:
    with pytest.raises(PlaitError, match="no modality is called 'smell'; there are text, image"):
        Vocabulary.build(both, ["smell"])
    with pytest.raises(PlaitError, match="image needs a tokenizer called 'visual'"):
        Vocabulary.build({"text": both["text"]}, ["text", "image"])
    with pytest.raises(PlaitError, match="has image already"):
        Vocabulary.build(both, ["image", "image"])
    with pytest.raises(PlaitError, match="another visual tokenizer"):
        vocabulary.grow(video, "visual", VisualTokenizer(both["visual"].config))


def test_saved_and_loaded_it_is_the_same(vocabulary: Vocabulary, tmp_path: Path) -> None:
    vocabulary.save(tmp_path / "vocabulary.json")
    loaded = Vocabulary.load(tmp_path / "vocabulary.json")
    assert loaded == vocabulary
    assert loaded.fingerprint == vocabulary.fingerprint
    assert names(loaded) == names(vocabulary)
    assert list(loaded.modalities) == list(vocabulary.modalities)


def test_the_fingerprint_sees_every_part(vocabulary: Vocabulary) -> None:
    variants = [
        vocabulary,
        replace(vocabulary, blocks=(*vocabulary.blocks, Block("more", vocabulary.size, 1))),
        replace(vocabulary, modalities={"text": vocabulary.modalities["text"]}),
        replace(vocabulary, tokenizers={**vocabulary.tokenizers, "visual": "0"}),
    ]
    assert len({variant.fingerprint for variant in variants}) == len(variants)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda v: v["blocks"][2].update(start=1026), "block 'special.text' overlaps, leaves a gap"),
        (lambda v: v["blocks"][2].update(start=1028), "block 'special.text' overlaps, leaves a gap"),
        (lambda v: v["blocks"][0].update(start=1), "block 'special' overlaps"),
        (lambda v: v["blocks"][3].update(size=299), "block 'special.image' overlaps"),
        (lambda v: v["blocks"].reverse(), "overlaps"),
        (lambda v: v["blocks"].pop(3), "overlaps"),
        (lambda v: v["blocks"][-1].update(size=0), "block 'visual.0' .* mis-sized"),
        (lambda v: v["blocks"][-1].update(size=-5), "block 'visual.0' .* mis-sized"),
        (lambda v: v["blocks"][-1].update(size="60"), "block 'visual.0' .* mis-sized"),
        (lambda v: v["blocks"][-1].update(size=60.5), "block 'visual.0' .* mis-sized"),
        (lambda v: v["blocks"][0].update(start=0.0), "block 'special' .* mis-sized"),
        (lambda v: v["blocks"][0]["tokens"].pop(), "block 'special' .* mis-sized"),
        (lambda v: v["blocks"][0]["tokens"].append("<x>"), "block 'special' .* mis-sized"),
        (lambda v: v["blocks"][2].update(name="special"), "have one name"),
        (lambda v: v["blocks"][2].update(tokens=["<bos>", "</text>"]), "have one name"),
        (lambda v: v["blocks"][2].update(tokens=["<txt>", "</text>"]), "special token <text> is missing"),
        (lambda v: v["blocks"][0].update(tokens="abc"), "special token <bos> is missing"),
        (lambda v: v["blocks"][1].update(name="digit"), "no block of 1024 numbers"),
        (lambda v: v.update(blocks=[]), "no block of 1024 numbers"),
        (lambda v: v["blocks"].pop(), "modality 'image' uses block 'visual.0', which is not there"),
        (lambda v: v["modalities"]["image"].update(blocks=["visual.1"]), "uses block 'visual.1'"),
        (lambda v: v["modalities"]["image"].update(blocks=[]), "modality 'image' has no blocks"),
        (lambda v: v["modalities"]["image"].update(tokenizer="other"), "modality 'image' has no .* tokenizer"),
        (lambda v: v["tokenizers"].pop("visual"), "modality 'image' has no .* tokenizer"),
        (lambda v: v["modalities"].update(smell=v["modalities"]["image"]), "modality 'smell', this plait knows text"),
        (lambda v: v["blocks"][0].pop("size"), "not a vocabulary"),
        (lambda v: v["blocks"][0].pop("name"), "not a vocabulary"),
        (lambda v: v["blocks"][0].update(colour="blue"), "not a vocabulary"),
        (lambda v: v["blocks"].append(3), "not a vocabulary"),
        (lambda v: v.update(blocks=None), "not a vocabulary"),
        (lambda v: v.pop("blocks"), "not a vocabulary"),
        (lambda v: v.pop("modalities"), "not a vocabulary"),
        (lambda v: v.pop("tokenizers"), "not a vocabulary"),
        (lambda v: v.update(modalities=[]), "not a vocabulary"),
        (lambda v: v.update(tokenizers=["text"]), "not a vocabulary"),
        (lambda v: v["modalities"]["text"].pop("tokenizer"), "not a vocabulary"),
        (lambda v: v.update(format_version=2), "format_version is 2"),
        (lambda v: v.pop("format_version"), "format_version is None"),
    ],
)
def test_a_damaged_file_is_refused(
    vocabulary: Vocabulary, tmp_path: Path, damage: Callable[[dict[str, Any]], Any], message: str
) -> None:
    path = tmp_path / "vocabulary.json"
    vocabulary.save(path)
    content = json.loads(path.read_text())
    damage(content)
    path.write_text(json.dumps(content))
    with pytest.raises(PlaitError, match=rf"vocabulary\.json: .*{message}") as raised:
        Vocabulary.load(path)
    assert "\n" not in str(raised.value)


def test_a_missing_or_broken_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(PlaitError, match=r"vocabulary\.json: no such file"):
        Vocabulary.load(tmp_path / "vocabulary.json")
    (tmp_path / "vocabulary.json").write_text('{"blocks": [')
    with pytest.raises(PlaitError, match=r"vocabulary\.json: not readable as JSON"):
        Vocabulary.load(tmp_path / "vocabulary.json")


def test_what_loads_has_a_grammar(vocabulary: Vocabulary, tmp_path: Path) -> None:
    vocabulary.save(tmp_path / "vocabulary.json")
    assert set(Grammar(Vocabulary.load(tmp_path / "vocabulary.json")).forms) == {"text", "image"}
