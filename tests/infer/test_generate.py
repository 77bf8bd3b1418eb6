"""The engine against the plainest reading of its contract: one request at a time, no cache, no batch."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from plait.infer import generate as module
from plait.infer.generate import WORTH, Batch, Request, generate, plan_sharing
from plait.infer.pipeline import Model
from plait.infer.sampling import Sampling, draw
from plait.model.config import DecoderConfig, RopeScaling
from plait.model.decoder import Decoder
from plait.tokenizers.grammar import Cursor, Grammar

GREEDY = Sampling(temperature=0.0)


def make_request(
    model: Model,
    text: str,
    to: str | None,
    room: int,
    seed: int = 0,
    settings: Sampling = GREEDY,
    guided: bool = False,
    images: bool = False,
) -> Request:
    """A request after a prompt of one text; ``room`` counts its new tokens, ``<eos>`` included.

    The "image" of guidance with two scales is the text's first half: the engine knows no modalities.
    """
    grammar = model.grammar
    begin = [grammar.form(to).begin] if to else []
    prompt = [*model._ids([text]), *begin]
    cursor = Cursor(grammar, len(prompt) - 1 + room)
    for token in prompt[1:]:
        cursor.push(token)
    return Request(
        prompt=prompt,
        cursor=cursor,
        sampling=dict.fromkeys(grammar.forms, settings),
        generator=torch.Generator().manual_seed(seed),
        unconditional=[grammar.bos, *begin] if guided else None,
        until_spans=2 if to else None,
        between=settings,
        image_only=[*prompt[: len(prompt) // 2], *begin] if images else None,
    )


def run(decoder: Decoder, requests: Sequence[Request]) -> list[list[int]]:
    for _ in generate(decoder, requests):
        pass
    return [r.tokens for r in requests]


def last_logits(decoder: Decoder, ids: list[int]) -> Tensor:
    return decoder(torch.tensor([ids]), torch.arange(len(ids))[None])[0, -1]


def plainly(decoder: Decoder, request: Request) -> list[int]:
    """Every token after a full forward, guidance and mask written out; forced tokens taken without a draw."""
    tokens: list[int] = []
    while not request.done:
        allowed = [token for ids in request.cursor.allowed() for token in ids]
        if len(allowed) > 1:
            settings = request.settings()
            scores = last_logits(decoder, request.prompt + tokens).log_softmax(-1)
            if request.unconditional is not None:
                free = last_logits(decoder, request.unconditional + tokens).log_softmax(-1)
                image = free
                if request.image_only is not None:
                    image = last_logits(decoder, request.image_only + tokens).log_softmax(-1)
                image_scale = settings.guidance if settings.guidance_image is None else settings.guidance_image
                scores = free + image_scale * (image - free) + settings.guidance * (scores - image)
            tokens.append(allowed[draw(scores[allowed], settings, request.generator)])
        else:
            tokens += allowed
        request.cursor.push(tokens[-1])
    return tokens


CASES: list[tuple[Any, ...]] = [  # as `make_request` takes them
    ("a red apple", "image", 40, 1, GREEDY, False),
    ("two dogs and a cat look at the moon", "text", 25, 2, GREEDY, False),
    ("x", "image", 60, 3, Sampling(temperature=0.8, guidance=2.0), True),
    ("", "text", 12, 4, Sampling(top_p=0.9), False),
    ("the quick brown fox", None, 50, 5, Sampling(top_k=20), False),
    ("a", "text", 2, 6, Sampling(), False),
    ("rabbit", "text", 30, 7, Sampling(temperature=0.0, guidance=3.0), True),
    ("moon", "image", 30, 8, Sampling(temperature=0.9, guidance=1.0), True),
    ("two dogs and a moon", "image", 50, 9, Sampling(guidance=2.0, guidance_image=1.2), True, True),
    ("two dogs and a cat", "text", 20, 10, Sampling(guidance_image=3.0, guidance_domain="logits"), True, True),
    ("two dogs and a cat", "text", 20, 11, Sampling(guidance=1.5, guidance_domain="logits"), True, True),
    ("two dogs", "image", 20, 12, Sampling(guidance=3.0, guidance_image=1.2), True),
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_alone_equals_the_plain_computation(model: Model, case: tuple[Any, ...]) -> None:
    decoder = model.bundle.decoder
    expected = plainly(decoder, make_request(model, *case))
    assert run(decoder, [make_request(model, *case)]) == [expected]


def test_a_batch_equals_each_alone(model: Model) -> None:
    """Prompts and answers of different lengths, guided and not, greedy and drawn, ending at different steps."""
    decoder = model.bundle.decoder
    alone = [run(decoder, [make_request(model, *case)])[0] for case in CASES]
    assert len({len(tokens) for tokens in alone}) > 4
    assert run(decoder, [make_request(model, *case) for case in CASES]) == alone
    assert run(decoder, [make_request(model, *case) for case in reversed(CASES)]) == alone[::-1]


def test_guidance_changes_what_is_taken(model: Model) -> None:
    decoder = model.bundle.decoder
    plain, guided = (
        run(decoder, [make_request(model, "rabbit", "text", 30, 0, Sampling(0.0, guidance=g), True)])
        for g in (1.0, 3.0)
    )
    assert plain != guided


@pytest.mark.parametrize("to", ["text", "image", None])
def test_all_that_an_untrained_model_says_parses(model: Model, to: str | None) -> None:
    grammar: Grammar = model.grammar
    requests = [
        make_request(model, "hi", to, room, seed, Sampling(temperature=2.0))
        for seed, room in enumerate([6, 7, 8, 9, 10, 15, 30, 60, 100, 6, 7, 30])
    ]
    for request, tokens in zip(requests, run(model.bundle.decoder, requests), strict=True):
        ids = request.prompt + tokens
        spans = grammar.parse(ids if to is None else [*ids, grammar.eos])
        assert [s.modality for s in spans] == [s.modality for s in request.cursor.spans]
        assert to is None or (len(spans) == 2 and spans[-1].modality == to)


@pytest.mark.parametrize("to", ["text", "image", None])
@pytest.mark.parametrize("room", [6, 7, 11, 40])
def test_the_budget_is_kept(model: Model, to: str | None, room: int) -> None:
    requests = [make_request(model, "hi", to, room, seed, Sampling(temperature=2.0)) for seed in range(12)]
    lengths = [len(tokens) for tokens in run(model.bundle.decoder, requests)]
    assert max(lengths) <= room - (to is not None)  # a single span leaves one for <eos>


def test_text_may_use_its_whole_budget(model: Model) -> None:
    end = model.grammar.form("text").end
    requests = [make_request(model, "hi", "text", 4, seed, Sampling(temperature=50.0)) for seed in range(8)]
    tokens = run(model.bundle.decoder, requests)
    assert max(map(len, tokens)) == 3
    assert all(t[-1] == end and end not in t[:-1] for t in tokens)


def test_forced_tokens_are_never_sampled(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    candidates = []

    def watched(logits: Tensor, settings: Sampling, generator: torch.Generator) -> int:
        candidates.append(len(logits))
        return draw(logits, settings, generator)

    monkeypatch.setattr(module, "draw", watched)
    request = make_request(model, "hi", "image", 60, 3, Sampling())
    steps = [step[0][1] for step in generate(model.bundle.decoder, [request])]
    height, width = request.cursor.spans[-1].codes.shape
    assert min(candidates) > 1
    # Two numbers and the codes are chosen; rows and the end ride along.
    assert len(steps) == len(candidates) == 2 + height * width
    assert [token for step in steps for token in step] == request.tokens
    assert len(request.tokens) == 2 + height * width + height + 1


def test_steps_name_only_requests_that_go_on(model: Model) -> None:
    requests = [make_request(model, "a", "text", room, 1, Sampling(temperature=50.0)) for room in (3, 20)]
    found: list[list[int]] = [[], []]
    for step in generate(model.bundle.decoder, requests):
        assert step
        for index, ids in step:
            assert ids
            found[index] += ids
    assert found == [r.tokens for r in requests]


def test_a_done_request_gets_nothing(model: Model) -> None:
    done, other = (make_request(model, "a", None, 20) for _ in range(2))
    done.cursor.push(model.grammar.eos)
    alone = run(model.bundle.decoder, [make_request(model, "a", None, 20)])
    assert run(model.bundle.decoder, [done, other]) == [[], *alone]


def test_nothing_asked(model: Model) -> None:
    assert list(generate(model.bundle.decoder, [])) == []


def test_greedy_uses_no_random_numbers(model: Model) -> None:
    for to in ("text", "image", None):
        first, second = (run(model.bundle.decoder, [make_request(model, "hi", to, 60, seed)]) for seed in (0, 1))
        assert first == second


def test_gradients_stay_on_between_steps(model: Model) -> None:
    for _ in generate(model.bundle.decoder, [make_request(model, "hi", "text", 4)]):
        assert torch.is_grad_enabled()


@pytest.fixture
def shapes(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """Rows and tokens of every forward pass."""
    seen: list[tuple[int, int]] = []
    next_logits = Decoder.next_logits

    def watched(self: Decoder, tokens: Tensor, *rest: Any) -> Tensor:
        seen.append((tokens.shape[0], tokens.shape[1]))
        return next_logits(self, tokens, *rest)

    monkeypatch.setattr(Decoder, "next_logits", watched)
    return seen


@pytest.mark.parametrize("portion", [1, 7, 20])
def test_portions_and_growth_change_nothing(model: Model, portion: int, monkeypatch: pytest.MonkeyPatch) -> None:
    decoder = model.bundle.decoder
    expected = run(decoder, [make_request(model, *case) for case in CASES])
    monkeypatch.setattr(module, "PORTION", portion)
    monkeypatch.setattr(module, "ROOM", 1)
    assert run(decoder, [make_request(model, *case) for case in CASES]) == expected


def test_a_portion_bounds_what_a_pass_reads(
    model: Model, monkeypatch: pytest.MonkeyPatch, shapes: list[tuple[int, int]]
) -> None:
    monkeypatch.setattr(module, "PORTION", 16)
    run(model.bundle.decoder, [make_request(model, "two dogs and a cat look " * n, "text", 5) for n in (1, 2, 5)])
    assert all(rows * tokens <= 16 for rows, tokens in shapes)


def test_equal_prompts_are_read_once(model: Model, shapes: list[tuple[int, int]]) -> None:
    requests = [make_request(model, "a cat", "image", 40, seed, Sampling(guidance=2.0), True) for seed in range(5)]
    prompt = len(requests[0].prompt)
    alone = [run(model.bundle.decoder, [make_request(model, "a cat", "image", 40, 3, Sampling(guidance=2.0), True)])]
    shapes.clear()
    steps = generate(model.bundle.decoder, requests)
    next(steps)
    # The prompt and the prompt without its condition begin alike.
    assert sum(rows * tokens for rows, tokens in shapes) == prompt + 1
    assert all(rows == 1 for rows, _ in shapes)
    shapes.clear()
    next(steps)
    assert [rows for rows, _ in shapes] == [10]
    for _ in steps:
        pass
    assert requests[3].tokens == alone[0][0]


def test_guidance_without_effect_has_no_rows(model: Model, shapes: list[tuple[int, int]]) -> None:
    run(model.bundle.decoder, [make_request(model, "a cat", "text", 9, 0, Sampling(0.0), True, True)])
    assert {rows for rows, _ in shapes} == {1}
    shapes.clear()
    run(model.bundle.decoder, [make_request(model, "a cat", "text", 9, 0, Sampling(0.0, guidance=2.0), True, True)])
    assert {rows for rows, _ in shapes[2:]} == {2}


def test_finished_rows_cost_nothing(model: Model, shapes: list[tuple[int, int]]) -> None:
    hot = Sampling(temperature=50.0, guidance=2.0)
    requests = [make_request(model, "a", "text", room, 1, hot, room == 9) for room in (9, 3, 20, 5)]
    rows: list[int] = []
    for step in generate(model.bundle.decoder, requests):
        assert not rows or shapes[-1][0] == rows[-1]
        rows.append(sum(1 + (requests[i].unconditional is not None) for i, _ in step if not requests[i].done))
    assert rows == sorted(rows, reverse=True)
    assert rows[-1] == 0
    assert len({*rows}) > 3


PROMPTS = st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=80), min_size=1, max_size=8)


@given(PROMPTS, st.lists(st.tuples(st.integers(0, 7), st.integers(0, 7), st.integers(1, 80)), max_size=8))
def test_the_plan_of_sharing(prompts: list[list[int]], grafts: list[tuple[int, int, int]]) -> None:
    for a, b, length in grafts:  # random prompts would have little in common
        a, b = a % len(prompts), b % len(prompts)
        prompts[a] = prompts[b][:length] + prompts[a][length:]
    plan = plan_sharing(prompts)
    for index, (source, shared) in enumerate(plan):
        prompt = prompts[index]
        assert prompt[:shared] == prompts[source][:shared]
        if shared == len(prompt):
            assert prompts[source] == prompt
            assert source != index
            assert plan[source][1] < len(prompt)  # read before
        elif source == index:
            assert shared == 0
        else:
            assert plan[source] == (source, 0)
            assert shared > 0
    copies = sum(shared == len(prompt) for prompt, (_, shared) in zip(prompts, plan, strict=True))
    assert len(prompts) - copies == len({tuple(prompt) for prompt in prompts})


def test_two_families_of_prompts_share_within_each() -> None:
    first, second = [1, *[2] * WORTH], [1, *[3] * WORTH]
    prompts = [[*first, 4], [*second, 4], [*first, 5, 5], [*second, 6], [*first, 4]]
    assert plan_sharing(prompts) == [(0, 0), (1, 0), (0, WORTH + 1), (1, WORTH + 1), (0, WORTH + 2)]


def test_rows_that_move_keep_their_sequence(model: Model) -> None:
    decoder = model.bundle.decoder
    prompts = [[1, 2, 3], [1, 2], [4, 5, 6, 7], [1, 2, 3], [9]]
    batch = Batch(decoder, prompts, 8)
    for dropped in ([0, 3], [], [1], [4]):
        batch.drop(dropped)
        prompts = [prompt if i in batch.logits else [] for i, prompt in enumerate(prompts)]
        for i, prompt in enumerate(prompts):
            if prompt:
                torch.testing.assert_close(batch.logits[i], last_logits(decoder, prompt), atol=1e-4, rtol=0)
                more = [i] * (i + 1)
                batch.push([i], more)
                prompt += more
        batch.read()
    torch.testing.assert_close(batch.logits[2], last_logits(decoder, prompts[2]), atol=1e-4, rtol=0)
    assert [*batch.logits] == [2]


@dataclass
class Anything:
    """A cursor that allows every id, until its budget is used up or the end has come."""

    size: int
    budget: int
    end: int | None = None
    done: bool = False
    open: None = None
    spans: list[Any] = field(default_factory=list)

    def allowed(self) -> list[range]:
        return [range(self.size)]

    def push(self, token: int) -> None:
        self.budget -= 1
        self.done = token == self.end or not self.budget


def free_request(prompt: list[int], budget: int, settings: Sampling = GREEDY, **fields: Any) -> Request:
    cursor: Any = Anything(60, budget, fields.pop("end", None))
    return Request(prompt, cursor, {}, torch.Generator(), between=settings, **fields)


@pytest.fixture(scope="module")
def llamas() -> tuple[Decoder, Any]:
    """The same random weights here and in transformers."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    theirs = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=60,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=3,
            num_attention_heads=4,
            num_key_value_heads=2,
            initializer_range=0.3,
            bos_token_id=None,
            eos_token_id=None,
            pad_token_id=0,
        )
    ).eval()
    config = DecoderConfig(
        60, 32, 3, 4, 2, ffn_width=48, norm_eps=theirs.config.rms_norm_eps, qk_norm="none", tie_embeddings=False
    )
    ours = Decoder(config).eval()
    ours.load_state_dict({name.removeprefix("model."): w for name, w in theirs.state_dict().items()})
    return ours, theirs


LENGTHS = [3, 17, 1, 9, 17]


def test_generation_equals_transformers(llamas: tuple[Decoder, Any]) -> None:
    """Greedy; their prompts are padded on the left, ours not at all."""
    ours, theirs = llamas
    prompts = [torch.randint(1, 60, (n,)).tolist() for n in LENGTHS]
    longest = max(LENGTHS)
    ids = torch.tensor([[0] * (longest - len(p)) + p for p in prompts])
    mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts])
    expected = theirs.generate(ids, attention_mask=mask, max_new_tokens=40, do_sample=False)[:, longest:].tolist()
    assert len({tuple(tokens) for tokens in expected}) == len(LENGTHS)
    assert run(ours, [free_request(prompt, 40) for prompt in prompts]) == expected
    end = expected[1][12]
    cut = [tokens[: tokens.index(end) + 1 if end in tokens else None] for tokens in expected]
    assert run(ours, [free_request(prompt, 40, end=end) for prompt in prompts]) == cut


def test_guided_generation_equals_transformers(llamas: tuple[Decoder, Any]) -> None:
    ours, theirs = llamas
    prompt, negative = torch.randint(1, 60, (1, 12)), torch.randint(1, 60, (1, 12))
    expected = theirs.generate(
        prompt,
        attention_mask=torch.ones_like(prompt),
        negative_prompt_ids=negative,
        negative_prompt_attention_mask=torch.ones_like(negative),
        guidance_scale=2.5,
        max_new_tokens=30,
        do_sample=False,
    )[0, 12:].tolist()
    settings = Sampling(0.0, guidance=2.5)
    ids = prompt[0].tolist()
    assert run(ours, [free_request(ids, 30, settings, unconditional=negative[0].tolist())]) == [expected]
    assert run(ours, [free_request(ids, 30)]) != [expected]


def random_decoder(**fields: Any) -> Decoder:
    torch.manual_seed(1)
    decoder = Decoder(DecoderConfig(60, 32, 2, 4, 2, **fields)).eval()
    for parameter in decoder.parameters():
        if parameter.ndim == 2:
            torch.nn.init.normal_(parameter, std=0.3)
    return decoder


def test_a_scaling_that_depends_on_the_length(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a prompt shares with a longer one, and the portions it is read in, do not show."""
    decoder = random_decoder(rope_scaling=RopeScaling("dynamic", 4.0, original_context=8))
    common = torch.randint(60, (20,)).tolist()
    prompts = [[*common, 1, 2, 3, 4, 5], [*common, 2], [*common, 2], common[:5]]
    expected = [run(decoder, [free_request(prompt, 20)])[0] for prompt in prompts]
    monkeypatch.setattr(module, "PORTION", 8)
    assert run(decoder, [free_request(prompt, 20) for prompt in prompts]) == expected
    decoder.rotary.is_dynamic = False
    assert run(decoder, [free_request(prompt, 20) for prompt in prompts]) != expected


def test_a_sliding_window(monkeypatch: pytest.MonkeyPatch) -> None:
    """Prompts longer than window and chunk together, some alike, in a ring that is overwritten several times."""
    decoder = random_decoder(sliding_window=6)
    common = torch.randint(60, (30,)).tolist()
    prompts = [[*common, 1], [*common, 2, 3], common[:9], common, common[:9], [5]]

    def plain(prompt: list[int]) -> list[int]:
        tokens: list[int] = []
        for _ in range(20):
            tokens.append(int(last_logits(decoder, prompt + tokens).argmax()))
        return tokens

    monkeypatch.setattr(module, "CHUNK", 4)
    with torch.no_grad():
        expected = [plain(prompt) for prompt in prompts]
    assert run(decoder, [free_request(prompt, 20) for prompt in prompts]) == expected
