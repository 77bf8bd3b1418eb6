from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image, ImageChops

from plait.errors import PlaitError
from plait.infer import pipeline as module
from plait.infer.document import Document
from plait.infer.generate import Request, generate
from plait.infer.pipeline import Finished, ImageRows, Model, TextDelta, load
from plait.tokenizers.media import Audio


def same(a: Any, b: Any) -> bool:
    """Equal media; a document is as its parts."""
    if isinstance(a, Document) and isinstance(b, Document):
        return len(a.parts) == len(b.parts) and all(map(same, a, b))
    if isinstance(a, Image.Image) and isinstance(b, Image.Image):
        return a.size == b.size and ImageChops.difference(a, b).getbbox() is None
    return type(a) is type(b) and bool(a == b)


@pytest.fixture
def requests(monkeypatch: pytest.MonkeyPatch) -> list[Request]:
    """What the model hands to the engine."""
    seen: list[Request] = []

    def watched(decoder: Any, requests: Sequence[Request]) -> Iterator[Any]:
        seen.extend(requests)
        return generate(decoder, requests)

    monkeypatch.setattr(module, "generate", watched)
    return seen


def test_kinds_of_results(model: Model, picture: Image.Image) -> None:
    assert model.modalities == ["text", "image"]
    assert isinstance(model.generate(picture, to="text", seed=0), str)
    image = model.generate("a red", picture, "apple", to="image", seed=0)
    assert image.mode == "RGB"
    assert image.width % 8 == image.height % 8 == 0
    assert isinstance(model.generate("moon", to="interleaved", seed=0), Document)


@pytest.mark.parametrize("to", ["text", "image", "interleaved"])
def test_a_seed_repeats_and_n_only_adds(model: Model, to: str) -> None:
    settings = {"to": to, "seed": 7, "max_tokens": 60}
    one = model.generate("a cat", **settings)
    assert same(model.generate("a cat", **settings), one)
    many = model.generate("a cat", **settings, n=3)
    assert isinstance(many, list)
    assert len(many) == 3
    assert same(many[0], one)
    only = model.generate("a cat", **settings, n=1)
    assert isinstance(only, list)
    assert same(only[0], one)


def test_seeds_and_items_differ(model: Model) -> None:
    settings = {"to": "text", "max_tokens": 60, "temperature": 50.0}
    items = model.generate("a cat", n=4, seed=0, **settings) + model.generate("a cat", n=4, seed=1, **settings)
    assert len(set(items)) == 8


def test_without_a_seed_results_differ_and_torch_keeps_its_own(model: Model) -> None:
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    assert len({model.generate("a", to="text", max_tokens=40, temperature=50.0) for _ in range(3)}) == 3
    assert torch.equal(torch.rand(3), expected)


@pytest.mark.parametrize("seed", [-3, 0, 1 << 70])
def test_any_whole_number_is_a_seed(model: Model, seed: int) -> None:
    a, b = (model.generate("a", to="text", seed=seed, max_tokens=10) for _ in range(2))
    assert a == b


@pytest.mark.parametrize("to", ["text", "image", "interleaved"])
def test_temperature_zero_needs_no_seed(model: Model, to: str) -> None:
    results = [model.generate("moon", to=to, seed=seed, temperature=0.0, max_tokens=80) for seed in range(4)]
    assert all(same(result, results[0]) for result in results)


@pytest.mark.parametrize(("to", "least"), [("text", 1), ("image", 5), ("interleaved", 1)])
def test_max_tokens_is_kept_and_its_least_works(model: Model, requests: list[Request], to: str, least: int) -> None:
    # An image of one code is a height, a width, the code, a row mark and the end.
    for limit in (least, least + 1, 30):
        model.generate("a", to=to, n=6, seed=0, max_tokens=limit, temperature=3.0)
        assert all(0 < len(r.tokens) <= limit for r in requests)
        requests.clear()
    with pytest.raises(PlaitError, match=f"^max_tokens: is {least - 1}, {to} needs at least {least}"):
        model.generate("a", to=to, max_tokens=least - 1)


@pytest.mark.parametrize(("to", "tokens"), [("text", 1), ("image", 5), ("interleaved", 1)])
def test_the_context_is_filled_but_never_exceeded(model: Model, requests: list[Request], to: str, tokens: int) -> None:
    # <bos> <text> … </text> and the begin token of the answer stand around the pieces.
    room = 256 - tokens - 3 - (to != "interleaved")
    longest = "0" * room
    assert len(model.bundle.tokenizers["text"].encode(longest)) == room
    model.generate(longest, to=to, seed=0)
    assert len(requests[0].prompt) + len(requests[0].tokens) <= 256
    span = tokens + (to != "interleaved")
    message = f"^prompt: takes {257 - span} of the context's 256 tokens, {to} needs at least {span}; shorten the prompt"
    for limit in (None, 30):
        with pytest.raises(PlaitError, match=message):
            model.generate(longest + "0", to=to, max_tokens=limit)


def test_prompts_of_a_batch_are_as_alone(model: Model, picture: Image.Image) -> None:
    prompts: list[list[Any]] = [["a"], [picture, "two dogs and a cat look at the moon"], []]
    together = model.generate_batch(prompts, to="text", seed=3, temperature=0.0, max_tokens=30)
    assert together == [model.generate(*p, to="text", seed=0, temperature=0.0, max_tokens=30) for p in prompts]
    # Prompt 0 draws as a single request of the same seed does.
    drawn = model.generate_batch(prompts, to="image", seed=3, max_tokens=40)
    assert same(drawn[0], model.generate("a", to="image", seed=3, max_tokens=40))


def test_equal_prompts_of_a_batch_draw_for_themselves(model: Model) -> None:
    found = model.generate_batch([["a"]] * 4, to="text", seed=3, temperature=50.0, max_tokens=30)
    assert len(set(found)) == 4


def test_an_empty_batch(model: Model) -> None:
    assert model.generate_batch([], to="image") == []


def test_guidance_needs_a_prompt_and_one_modality(model: Model, requests: list[Request]) -> None:
    model.generate("a", to="image", seed=0, max_tokens=10)  # 1.5 in the bundle
    model.generate("a", to="image", seed=0, max_tokens=10, guidance=1.0)
    model.generate(to="image", seed=0, max_tokens=10)
    model.generate("a", to="interleaved", seed=0, max_tokens=10, guidance=2.0)
    begin = model.grammar.form("image").begin
    assert [r.unconditional for r in requests] == [[model.grammar.bos, begin], None, None, None]
    assert requests[0].sampling["image"].guidance == 1.5


@pytest.mark.parametrize(
    ("parts", "settings", "message"),
    [
        (["a"], {"to": "audio"}, "^audio: this model has no such modality; it has text, image"),
        ([Audio(torch.zeros(1, 10), 16_000)], {"to": "text"}, "^audio: this model has no such modality"),
        (["a"], {"to": "text", "n": 0}, "^n: 0 must be at least 1"),
        (["a"], {"to": "text", "max_tokens": 0}, "^max_tokens: is 0, text needs at least 1"),
        (["a"], {"to": "text", "max_tokens": -4}, "^max_tokens: is -4, text needs at least 1"),
        (["a"], {"to": "text", "max_tokens": 9.0}, "^max_tokens: 9.0 must be a whole number"),
        (["a"], {"to": "text", "seed": 1.5}, "^seed: 1.5 must be a whole number"),
        (["a"], {"to": "text", "n": True}, "^n: True must be a whole number"),
        (["a" * 300], {"to": "text"}, "shorten the prompt"),
        ([3], {"to": "text"}, "^part: int is no str"),
        ([Path("missing.png")], {"to": "text"}, r"^missing\.png: no such file"),
        (["a\ud800"], {"to": "text"}, "surrogate"),
        (["a"], {"to": "text", "temperature": -1}, "^temperature: "),
        (["a"], {"to": "image", "top_p": 0}, "^top_p: "),
        (["a"], {"to": "image", "top_p": "much"}, "^top_p: 'much' must be a number"),
        (["a"], {"to": "text", "temperature": float("nan")}, "^temperature: nan must be a number"),
    ],
)
def test_bad_requests_are_one_line(model: Model, parts: list[Any], settings: dict[str, Any], message: str) -> None:
    with pytest.raises(PlaitError, match=message) as raised:
        model.generate(*parts, **settings)
    assert "\n" not in str(raised.value)
    if "n" not in settings:
        with pytest.raises(PlaitError, match=message):
            list(model.stream(*parts, **settings))


def test_unknown_settings_are_refused(model: Model) -> None:
    with pytest.raises(PlaitError, match="^unknown setting 'heat'; the settings are temperature"):
        model.generate_batch([["a"]], to="text", heat=1)
    with pytest.raises(PlaitError, match="^unknown setting 'heat'"):
        list(model.stream("a", to="text", heat=1))


@pytest.mark.parametrize("prompts", [["a", "b"], [["a"], Path("b.png")], "ab"])
def test_a_prompt_of_a_batch_is_a_list(model: Model, prompts: Any) -> None:
    with pytest.raises(PlaitError, match=r"^prompts\[[01]\]: is a \w+; give a list of parts"):
        model.generate_batch(prompts, to="text")


def test_many_requests_run_in_groups(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = []

    def watched(decoder: Any, requests: Sequence[Request]) -> Iterator[Any]:
        sizes.append(len(requests))
        return generate(decoder, requests)

    monkeypatch.setattr(module, "generate", watched)
    settings = {"to": "text", "seed": 3, "max_tokens": 20}
    together = model.generate("a", n=5, **settings), model.generate_batch([["a"], [], ["b"]], **settings)
    assert sizes == [5, 3]
    sizes.clear()
    monkeypatch.setattr(module, "ROWS", 2)
    assert together == (model.generate("a", n=5, **settings), model.generate_batch([["a"], [], ["b"]], **settings))
    assert sizes == [2, 2, 1, 2, 1]


@pytest.mark.parametrize("device", ["gpu", "meta", "mps", "cuda:", "cuda:-1", "cpu:0", "", 3])
def test_unknown_devices_are_refused(bundle: Path, device: Any) -> None:
    with pytest.raises(PlaitError, match=f"^device: {device!r} must be cpu, cuda"):
        load(bundle, device=device)


@pytest.mark.parametrize("name", ["no-such-model", "no/such/folder"])
def test_unknown_model(name: str) -> None:
    with pytest.raises(PlaitError, match=f"^{name}: no such path"):
        load(name)


@pytest.mark.skipif(torch.cuda.is_available(), reason="has a GPU")
def test_a_missing_gpu_is_said(bundle: Path) -> None:
    with pytest.raises(PlaitError, match=r"^device: cuda"):
        load(bundle, device="cuda")
    with pytest.raises(PlaitError, match=r"^device: cuda:1 .* 0 GPUs"):
        load(bundle, device="cuda:1")


def test_other_dtypes_generate(bundle: Path) -> None:
    model = load(bundle, dtype=torch.bfloat16)
    assert model.bundle.decoder.lm_head.weight.dtype == torch.bfloat16
    assert isinstance(model.generate("a", to="image", seed=0, max_tokens=20), Image.Image)


# --- streaming


@pytest.mark.parametrize("seed", range(6))
def test_streamed_text_adds_up(model: Model, seed: int) -> None:
    settings = {"to": "text", "seed": seed, "max_tokens": 120, "temperature": 5.0}
    *deltas, last = model.stream("a", **settings)
    assert all(isinstance(event, TextDelta) and event.text for event in deltas)
    assert isinstance(last, Finished)
    text = "".join(event.text for event in deltas)
    assert [text] == last.document.parts == [model.generate("a", **settings)]
    assert seed != 0 or len(deltas) > 3


def test_streamed_image_grows_row_by_row(model: Model) -> None:
    seed, final = next(
        (s, image) for s in range(50) if (image := model.generate("a", to="image", seed=s, max_tokens=40)).height >= 24
    )
    *rows, last = model.stream("a", to="image", seed=seed, max_tokens=40)
    assert isinstance(last, Finished)
    assert all(isinstance(event, ImageRows) for event in rows)
    assert [event.image.size for event in rows] == [(final.width, h) for h in range(8, final.height + 1, 8)]
    assert same(rows[-1].image, final)
    assert same(last.document, Document([final]))


def test_streamed_document_is_the_generated_one(model: Model) -> None:
    kinds = set()
    for seed in range(6):
        settings = {"to": "interleaved", "seed": seed, "max_tokens": 150}
        *events, last = model.stream("hello", **settings)
        assert isinstance(last, Finished)
        assert same(last.document, model.generate("hello", **settings))
        text = "".join(event.text for event in events if isinstance(event, TextDelta))
        assert text == "".join(part for part in last.document if isinstance(part, str))
        images = [part for part in last.document if isinstance(part, Image.Image)]
        shown = [event.image for event in events if isinstance(event, ImageRows)]
        assert sum(image.height for image in images) == 8 * len(shown)
        assert not images or same(shown[-1], images[-1])
        kinds |= {type(event) for event in events}
    assert kinds == {TextDelta, ImageRows}


def test_unfinished_characters_are_held_back(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    text = "naïve 😀 漢\u2581字!"
    codes = model.bundle.tokenizers["text"].encode(text).tolist()

    def scripted(decoder: Any, requests: Sequence[Request]) -> Iterator[Any]:
        form = model.grammar.form("text")
        for token in [*(code + form.books[0].start for code in codes), form.end]:
            yield [(0, requests[0].take(token))]

    monkeypatch.setattr(module, "generate", scripted)
    *deltas, last = [event for event in model.stream("a", to="text") if not isinstance(event, Finished)]
    assert "".join(event.text for event in [*deltas, last]) == text
    assert all("\ufffd" not in event.text for event in [*deltas, last])
    assert len(deltas) > 4


def test_a_stream_can_be_left(model: Model) -> None:
    stream = model.stream("a", to="text", seed=0, temperature=50.0)
    next(stream)
    stream.close()
    assert torch.is_grad_enabled()


# --- scoring


def log_probability(model: Model, ids: list[int], position: int, allowed: Sequence[int]) -> float:
    """Of the token at a position, after a full forward without a cursor."""
    tokens = torch.tensor([ids])
    logits = model.bundle.decoder(tokens, torch.arange(len(ids))[None])[0, position - 1].double()
    return float(logits[ids[position]] - logits[list(allowed)].logsumexp(0))


@pytest.mark.parametrize("target", ["red apple", "", "é"])
def test_text_score_is_the_masked_log_probability(model: Model, picture: Image.Image, target: str) -> None:
    form, prompt = model.grammar.form("text"), model._ids([picture, "what?"])
    codes = model.bundle.tokenizers["text"].encode(target).tolist()
    ids = [*prompt, form.begin, *(form.books[0].start + code for code in codes), form.end]
    allowed = [*form.books[0], form.end]
    expected = [log_probability(model, ids, i, allowed) for i in range(len(prompt) + 1, len(ids))]
    score = model.score(picture, "what?", target=target)
    assert score.per_token.tolist() == pytest.approx(expected, abs=1e-4)
    assert score.total == pytest.approx(sum(expected), abs=1e-3)


def test_image_score_is_the_masked_log_probability(model: Model, picture: Image.Image) -> None:
    form, prompt = model.grammar.form("image"), model._ids(["a red apple"])
    codes = model.bundle.tokenizers["visual"].encode(torch.from_numpy(_pixels(picture))[None]).codes[0]
    assert codes.shape == (2, 3)
    number = model.grammar.vocabulary.block("number").start
    row = model.grammar.vocabulary.special("<row>")
    lines = [[*(form.books[0].start + c for c in line), row] for line in codes.tolist()]
    ids = [*prompt, form.begin, number + 2, number + 3, *lines[0], *lines[1], form.end]
    # A grid is allowed if its span, begin and end included, fits what the prompt left of the context.
    room = 256 - len(prompt)
    heights = [number + h for h in range(1, 1024) if 4 + h * (1 + 1) <= room]
    widths = [number + w for w in range(1, 1024) if 4 + 2 * (w + 1) <= room]
    at = len(prompt) + 1
    expected = [log_probability(model, ids, at, heights), log_probability(model, ids, at + 1, widths)]
    for i in range(at + 2, len(ids)):
        free = ids[i] in form.books[0]
        expected.append(log_probability(model, ids, i, form.books[0]) if free else 0.0)
    score = model.score("a red apple", target=picture)
    assert score.per_token.tolist() == pytest.approx(expected, abs=1e-4)
    forced = [i for i, value in enumerate(expected) if value == 0]
    assert len(forced) == 3
    assert (score.per_token[forced] == 0).all()


def _pixels(image: Image.Image) -> Any:
    import numpy as np

    return (np.asarray(image, dtype=np.float32) / 127.5 - 1).transpose(2, 0, 1).copy()


def test_scores_are_log_probabilities(model: Model, picture: Image.Image) -> None:
    for target in ("a cat", picture):
        score = model.score("x", target=target)
        assert score.total <= 0
        assert (score.per_token <= 0).all()
        assert score.total == pytest.approx(float(score.per_token.sum()), rel=1e-5)
        assert not score.per_token.requires_grad


def test_the_prompt_matters_to_the_score(model: Model) -> None:
    assert model.score("a", target="cat").total != pytest.approx(model.score("moon", target="cat").total, abs=1e-3)


def test_a_continuation_does_not_change_its_beginning(model: Model) -> None:
    """The mask must not give the target's length away, neither at its end nor in an image's size."""
    pieces = model.bundle.tokenizers["text"]
    long, short = "abcdef", "abc"
    n = len(pieces.encode(short))
    assert pieces.encode(long)[:n].tolist() == pieces.encode(short).tolist()
    a, b = model.score(target=long).per_token, model.score(target=short).per_token
    torch.testing.assert_close(a[:n], b[:n], atol=1e-5, rtol=0)
    assert b[n] < -0.1
    # Not a comparison of values: only that a choice of heights was left.
    assert model.score(target=Image.new("RGB", (8, 8))).per_token[0] < -0.1


@pytest.mark.parametrize(
    ("parts", "target", "message"),
    [
        (["a"], Document(["a", "b"]), "document of 2 parts"),
        (["a"], Document(), "document of 0 parts"),
        (["a" * 200], "b" * 100, "the context is 256"),
        (["a"], Image.new("RGB", (800, 800)), "the context is 256"),
        (["a"], Audio(torch.zeros(1, 9), 9), "^audio: "),
    ],
)
def test_what_cannot_be_scored(model: Model, parts: list[Any], target: Any, message: str) -> None:
    with pytest.raises(PlaitError, match=message):
        model.score(*parts, target=target)


def test_the_whole_context_can_be_scored(model: Model) -> None:
    # <bos> <text> … </text>: the last piece is followed by an end that is forced.
    score = model.score(target="0" * 253)
    assert len(score.per_token) == 254
    assert score.per_token[-1] == 0
    assert score.per_token[-2] < 0
