"""Models of other families, from end to end: random weights, small tokenizers, their own grammars and prompts."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from foreign_models import chameleon_tokenizer, emu3_tokenizer, train_bpe, write_config
from PIL import Image
from transformers import PreTrainedTokenizerFast

from plait.errors import PlaitError
from plait.infer import pipeline as module
from plait.infer.bundle import save_bundle
from plait.infer.document import Document
from plait.infer.generate import Request, generate
from plait.infer.pipeline import Finished, Model, load
from plait.model.config import DecoderConfig
from plait.model.decoder import Decoder
from plait.tokenizers.emu3 import Emu3Config, Emu3Tokenizer
from plait.tokenizers.families import read_family
from plait.tokenizers.vqgan import VQGANConfig, VQGANTokenizer

CODES = 30
GRID = {"chameleon": (3, 3)}


def make_visual(family: str) -> Any:
    """Untrained; 2 × 2 pixels a code."""
    torch.manual_seed(0)
    if family == "emu3":
        config = Emu3Config(CODES, 4, 32, (1, 2), 1, (), 4)
        return Emu3Tokenizer(config).eval().requires_grad_(False)
    config = VQGANConfig(32, (1, 2), 1, (), 4, CODES, 4, normalized=False)
    return VQGANTokenizer(config).eval().requires_grad_(False)


@pytest.fixture(scope="module")
def bundles(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Bundles by family, each made once."""
    made: dict[str, Path] = {}

    def make(family: str) -> Path:
        if family in made:
            return made[family]
        folder = tmp_path_factory.mktemp(family.replace(".", "-"))
        source = folder / "source"
        if family == "chameleon":
            chameleon_tokenizer(CODES).save_pretrained(source)
            write_config(source, bos_token_id=1, eos_token_id=2, vq_config={"resolution": 6})
        elif family == "text":
            engine = train_bpe()
            engine.add_special_tokens(["<s>", "</s>"])
            PreTrainedTokenizerFast(tokenizer_object=engine, bos_token="<s>", eos_token="</s>").save_pretrained(source)
        elif family == "ids":
            write_config(source, bos_token_id=1, eos_token_id=2)
        else:
            emu3_tokenizer(CODES).save_pretrained(source)
            write_config(source, max_position_embeddings=600)
        visual = make_visual(family) if family not in ("text", "ids") else None
        read = read_family(family, source, visual, 700)
        for name, tokenizer in read.tokenizers.items():
            tokenizer.save_pretrained(folder / "tokenizers" / name)
        torch.manual_seed(0)
        config = DecoderConfig(vocabulary_size=700, width=32, layers=2, heads=4, kv_heads=2, qk_norm="none")
        weights = {name: 6 * t if t.ndim == 2 else t for name, t in Decoder(config).state_dict().items()}
        made[family] = folder / "bundle"
        save_bundle(
            made[family], config, weights, read.vocabulary, folder / "tokenizers", read.generation, 600, torch.float32
        )
        return made[family]

    return make


@pytest.fixture
def requests(monkeypatch: pytest.MonkeyPatch) -> list[Request]:
    """What the model hands to the engine."""
    seen: list[Request] = []

    def watched(decoder: Any, asked: list[Request]) -> Any:
        seen.extend(asked)
        return generate(decoder, asked)

    monkeypatch.setattr(module, "generate", watched)
    return seen


def picture(width: int = 24, height: int = 16) -> Image.Image:
    return Image.radial_gradient("L").resize((width, height)).convert("RGB")


def names(model: Model, ids: list[int]) -> list[str]:
    return [model.bundle.vocabulary.describe(i) for i in ids]


@pytest.mark.parametrize("family", ["emu3", "emu3.5", "chameleon"])
def test_the_command_makes_pictures_and_texts(
    bundles: Callable[[str], Path], family: str, main: Any, tmp_path: Path
) -> None:
    bundle, out = bundles(family), tmp_path / "x.png"
    options = ("--model", bundle, "--seed", 1)
    ran = main("generate", "a red apple", "--to", "image", "-o", out, "--max-tokens", 120, *options)
    assert ran.code == 0, ran.err
    with Image.open(out) as image:
        assert image.mode == "RGB"
        assert family != "chameleon" or image.size == (6, 6)
    for prompt in (["a red apple"], [out, "What is this?"]):
        ran = main("generate", *prompt, "--to", "text", "--max-tokens", 12, *options)
        assert ran.code == 0, ran.err
        assert ran.out


@pytest.mark.parametrize("family", ["emu3", "emu3.5", "chameleon", "text"])
def test_all_that_is_generated_parses(bundles: Callable[[str], Path], family: str, requests: list[Request]) -> None:
    model = load(bundles(family))
    grammar = model.grammar
    for to in (*model.modalities, "interleaved"):
        prompt = ["two dogs"] if family == "text" else [picture(), "two dogs"]
        results = model.generate(*prompt, to=to, n=4, seed=0, max_tokens=100, temperature=2.0)
        kinds = {"text": str, "image": Image.Image, "interleaved": Document}
        assert all(isinstance(result, kinds[to]) for result in results)
        for request, result in zip(requests, results, strict=True):
            ids = [*request.prompt, *request.tokens]
            # A tokenizer that puts no <bos> before a text leaves it out of the prompt.
            ids = ids if ids[0] == grammar.bos else [grammar.bos, *ids]
            assert len(request.tokens) <= 100 + (to == "text")
            spans = grammar.parse(ids if request.cursor.done and ids[-1] == grammar.eos else [*ids, grammar.eos])
            if to == "image":
                assert torch.equal(spans[-1].codes, request.cursor.spans[-1].codes)
                assert result.size == tuple(2 * n for n in reversed(spans[-1].codes.shape))
        requests.clear()


def test_emu3_is_prompted_as_its_processor_does(bundles: Callable[[str], Path], requests: list[Request]) -> None:
    model = load(bundles("emu3"))
    model.bundle.generation["image"]["grid"] = [3, 4]
    model.generate("a red apple", to="image", seed=0)
    model.generate(picture(8, 4), "What is this?", to="text", seed=0, max_tokens=3)
    text = model.bundle.tokenizers["text"]
    image, question = requests
    begin = ["<|image start|>", "text.0 18", "text.0 9", "text.0 19", "<|image token|>"]  # 3*4
    pieces = [f"text.0 {i}" for i in text.encode("a red apple masterpiece, film grained, best quality.").tolist()]
    assert names(model, image.prompt) == ["<|extra_203|>", *pieces, *begin]
    assert image.unconditional is not None
    assert image.unconditional[-5:] == image.prompt[-5:]
    assert text.decode(torch.tensor(image.unconditional[1:-5]) - text.first).startswith("lowres, bad anatomy")
    assert image.sampling["image"].guidance == 3.0
    assert image.sampling["image"].top_k == 2048
    before = [f"text.0 {i}" for i in text.encode("You are a helpful assistant. USER: ").tolist()]
    after = [f"text.0 {i}" for i in text.encode("What is this?. ASSISTANT:").tolist()]
    found = names(model, question.prompt)
    begin = ["<|image start|>", "text.0 17", "text.0 9", "text.0 19", "<|image token|>"]  # 2*4
    assert found[: len(before) + 6] == ["<|extra_203|>", *before, *begin]
    assert found[-len(after) - 2 :] == ["<|extra_201|>", "<|image end|>", *after]
    assert question.unconditional is None


def test_a_grid_without_room_is_left_to_the_model(bundles: Callable[[str], Path], requests: list[Request]) -> None:
    model = load(bundles("emu3"))
    model.bundle.generation["image"]["grid"] = [10, 10]
    model.generate("a", to="image", seed=0, max_tokens=112)
    model.generate("a", to="image", seed=0, max_tokens=111)
    chosen = requests[0].cursor.spans[-1].codes.shape, requests[1].cursor.spans[-1].codes.shape
    assert chosen[0] == (10, 10)
    assert len(requests[0].tokens) == 112
    assert names(model, requests[1].prompt)[-1] == "<|image start|>"
    assert len(requests[1].tokens) <= 111


def test_chameleon_is_guided_three_ways(bundles: Callable[[str], Path], requests: list[Request]) -> None:
    model = load(bundles("chameleon"))
    model.generate("a red apple", to="image", seed=0)
    model.generate(picture(), "a red apple", to="image", seed=0)
    alone, both = requests
    text = [f"text.0 {i}" for i in model.bundle.tokenizers["text"].encode("a red apple").tolist()]
    assert names(model, alone.prompt) == ["<s>", *text, "<reserved08706>", "<racm3:break>"]
    assert names(model, alone.unconditional or []) == ["<s>", "<racm3:break>"]
    assert alone.image_only is None
    assert both.image_only is not None
    image = names(model, both.image_only)[1:-1]
    assert names(model, both.image_only) == ["<s>", *image, "<racm3:break>"]
    assert (image[0], image[-1], len(image)) == ("<racm3:break>", "<eoss>", 11)
    assert names(model, both.prompt) == ["<s>", *image, *text, "<reserved08706>", "<racm3:break>"]
    settings = both.sampling["image"]
    assert (settings.guidance, settings.guidance_image, settings.guidance_domain) == (3.0, 1.2, "logits")


def test_what_a_user_types_is_text(bundles: Callable[[str], Path], requests: list[Request]) -> None:
    for family in ("emu3", "chameleon", "text"):
        model = load(bundles(family))
        model.generate("</s><|extra_204|><eos><image>{media}", to="text", seed=0, max_tokens=2)
        prompt = requests[-1].prompt
        assert model.grammar.eos not in prompt
        typed = (
            model.bundle.tokenizers["text"].encode("</s><|extra_204|><eos><image>{media}")
            + model.bundle.tokenizers["text"].first
        )
        assert set(typed.tolist()) <= set(prompt)


def test_text_is_cut_off_at_the_limit(bundles: Callable[[str], Path], requests: list[Request]) -> None:
    """An end that the mask forces is no token of the model's: as many tokens as were asked for are text."""
    model = load(bundles("text"))
    for limit in (1, 5, 30):
        model.generate("two dogs", to="text", seed=3, max_tokens=limit, temperature=0.5)
        text = requests[-1].cursor.spans[-1].codes
        assert len(text) <= limit
        assert requests[-1].tokens[-1] == model.grammar.eos
    assert len(requests[0].cursor.spans[-1].codes) == 1


@pytest.mark.parametrize("family", ["emu3", "chameleon", "text"])
def test_streams_tell_what_is_generated(bundles: Callable[[str], Path], family: str) -> None:
    model = load(bundles(family))
    for to in model.modalities:
        settings = {"to": to, "seed": 5, "max_tokens": 60, "temperature": 3.0}
        *events, last = model.stream("two dogs", **settings)
        assert isinstance(last, Finished)
        expected = model.generate("two dogs", **settings)
        if to == "text":
            assert "".join(event.text for event in events) == expected == last.document.parts[0]
        else:
            assert events[-1].image.tobytes() == expected.tobytes() == last.document.parts[0].tobytes()


def log_softmax(model: Model, ids: list[int]) -> torch.Tensor:
    return model.bundle.decoder(torch.tensor([ids]), torch.arange(len(ids))[None])[0].log_softmax(-1)


def test_bare_ids_are_scored_over_all_ids(bundles: Callable[[str], Path]) -> None:
    prompt, target = torch.tensor([5, 17, 600]), torch.tensor([3, 699, 0, 12])
    for family in ("ids", "emu3", "text"):
        model = load(bundles(family))
        ids = [*prompt.tolist(), *target.tolist()]
        values = log_softmax(model, ids)
        expected = [float(values[i - 1, ids[i]]) for i in range(1, len(ids))]
        assert model.score(prompt, target=target).per_token.tolist() == pytest.approx(expected[2:], abs=1e-5)
        alone = model.score(target=torch.tensor(ids))
        assert alone.per_token.tolist() == pytest.approx(expected, abs=1e-5)
        assert alone.total == pytest.approx(sum(expected), abs=1e-4)


def test_text_is_scored_under_the_mask_with_its_end(bundles: Callable[[str], Path]) -> None:
    model = load(bundles("chameleon"))
    grammar, text = model.grammar, model.bundle.tokenizers["text"]
    prompt = [grammar.bos, *(text.encode("a red") + text.first).tolist(), *grammar.turns]
    ids = [*prompt, *(text.encode(" apple") + text.first).tolist(), grammar.eos]
    allowed = [*grammar.form("text").books[0], *grammar.turns, grammar.eos]
    values = model.bundle.decoder(torch.tensor([ids]), torch.arange(len(ids))[None])[0]
    expected = [
        float(values[i - 1, ids[i]] - values[i - 1, allowed].logsumexp(-1)) for i in range(len(prompt), len(ids))
    ]
    assert model.score("a red", target=" apple").per_token.tolist() == pytest.approx(expected, abs=1e-4)


def test_bare_ids_alone_ask_for_a_tokenizer(bundles: Callable[[str], Path], main: Any) -> None:
    bundle = bundles("ids")
    model = load(bundle)
    assert model.modalities == []
    message = "this model has no tokenizer and can only score ids; import it again with its text tokenizer"
    for use in (
        lambda: model.generate(to="text"),
        lambda: model.generate("a", to="interleaved"),
        lambda: model.generate(torch.tensor([1, 2]), to="image"),
        lambda: model.score("a", target=torch.tensor([1])),
        lambda: model.score(torch.tensor([1]), target="a"),
    ):
        with pytest.raises(PlaitError, match=message):
            use()
    ran = main("generate", "a", "--to", "text", "--model", bundle)
    assert ran.code != 0
    assert message in ran.err


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        (torch.tensor([700]), r"target: has ids 700\.\.700, the model has 0\.\.699"),
        (torch.tensor([-1, 3]), r"target: has ids -1\.\.3"),
        (torch.tensor([1.0]), r"target: is float32 of shape \(1,\), ids are int64"),
        (torch.tensor([[1]]), r"target: is int64 of shape \(1, 1\)"),
        (torch.tensor([], dtype=torch.int64), "at least one"),
        (torch.ones(601, dtype=torch.int64), "the context is 600"),
    ],
)
def test_what_are_no_ids(bundles: Callable[[str], Path], ids: torch.Tensor, message: str) -> None:
    with pytest.raises(PlaitError, match=message):
        load(bundles("ids")).score(target=ids)


def test_ids_that_begin_no_document_are_not_continued(bundles: Callable[[str], Path]) -> None:
    model = load(bundles("emu3"))
    code = model.bundle.vocabulary.block("visual.0").start
    assert isinstance(model.generate(torch.tensor([model.grammar.bos, 3, 4]), to="text", seed=0, max_tokens=3), str)
    with pytest.raises(PlaitError, match=r"^prompt: token 1: visual\.0 0 where text\.0 0.* is expected$"):
        model.generate(torch.tensor([model.grammar.bos, 3, code]), to="text")


def test_a_tokenizer_that_only_encodes_is_refused_first(
    bundles: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch, requests: list[Request]
) -> None:
    model = load(bundles("chameleon"))
    visual = model.bundle.tokenizers["visual"]
    monkeypatch.setattr(visual, "config", replace(visual.config, decoder=False))
    assert isinstance(model.generate(picture(), to="text", seed=0, max_tokens=3), str)
    requests.clear()
    for to in ("image", "interleaved"):
        with pytest.raises(PlaitError, match="^image: the bundle's tokenizer has no decoder, .*--visual FILE"):
            model.generate("a", to=to)
    assert requests == []


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({"heat": 1}, "unknown setting 'heat'; the settings are temperature, .*, prompt, unconditional"),
        ({"prompt": 3}, "prompt: 3 must be text"),
        ({"image_only": ["a"]}, r"image_only: \['a'\] must be text"),
        ({"grid": [0, 3]}, r"grid: \[0, 3\] must be whole numbers"),
        ({"grid": 3}, "grid: 3 must be a list"),
        ({"pixels": [9, 3]}, r"pixels: \[9, 3\] must be two whole numbers"),
        ({"top_k": "many"}, "top_k: 'many' must be a number"),
    ],
)
def test_damaged_settings_are_named(
    bundles: Callable[[str], Path], tmp_path: Path, entry: dict[str, Any], message: str
) -> None:
    folder = tmp_path / "bundle"
    folder.symlink_to(bundles("emu3"))
    copied = tmp_path / "copied"
    copied.mkdir()
    for path in folder.iterdir():
        if path.name != "generation.json":
            (copied / path.name).symlink_to(path)
    (copied / "generation.json").write_text(json.dumps({"format_version": 1, "image": entry}))
    with pytest.raises(PlaitError, match=f"generation.json: image: {message}"):
        load(copied)
    (copied / "generation.json").write_text(json.dumps({"format_version": 1, "smell": {}}))
    with pytest.raises(PlaitError, match="generation.json: unknown target 'smell'; there are text, image"):
        load(copied)


def test_pictures_are_made_to_fit(bundles: Callable[[str], Path], requests: list[Request]) -> None:
    model = load(bundles("chameleon"))
    for size in ((6, 6), (7, 90), (200, 20), (1, 1)):
        model.generate(picture(*size), to="text", seed=0, max_tokens=2)
        assert model.grammar.parse([*requests[-1].prompt, model.grammar.eos])[0].codes.shape == (3, 3)
    model = load(bundles("emu3"))
    model.bundle.generation["text"]["pixels"] = [64, 256]
    for size, grid in {(8, 8): (4, 4), (100, 100): (8, 8), (2, 2): (4, 4), (30, 10): (4, 13)}.items():
        model.generate(picture(*size), to="text", seed=0, max_tokens=2)
        spans = model.grammar.parse([*requests[-1].prompt, model.grammar.eos])
        assert next(s for s in spans if s.modality == "image").codes.shape == grid
    with pytest.raises(PlaitError, match="^image: is 66 × 13 pixels, .* at most 5 to 1"):
        model.generate(picture(66, 13), to="text")
