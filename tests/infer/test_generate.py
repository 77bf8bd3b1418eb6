"""The engine against the plainest reading of its contract: one request at a time, no cache, no batch."""

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from plait.infer import generate as module
from plait.infer.generate import Request, generate
from plait.infer.pipeline import Model
from plait.infer.sampling import Sampling, draw
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
) -> Request:
    """A request after a prompt of one text; ``room`` counts its new tokens, ``<eos>`` included."""
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
                scores = free + settings.guidance * (scores - free)
            tokens.append(allowed[draw(scores[allowed], settings, request.generator)])
        else:
            tokens += allowed
        request.cursor.push(tokens[-1])
    return tokens


CASES: list[tuple[str, str | None, int, int, Sampling, bool]] = [
    ("a red apple", "image", 40, 1, GREEDY, False),
    ("two dogs and a cat look at the moon", "text", 25, 2, GREEDY, False),
    ("x", "image", 60, 3, Sampling(temperature=0.8, guidance=2.0), True),
    ("", "text", 12, 4, Sampling(top_p=0.9), False),
    ("the quick brown fox", None, 50, 5, Sampling(top_k=20), False),
    ("a", "text", 2, 6, Sampling(), False),
    ("rabbit", "text", 30, 7, Sampling(temperature=0.0, guidance=3.0), True),
    ("moon", "image", 30, 8, Sampling(temperature=0.9, guidance=1.0), True),
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_alone_equals_the_plain_computation(model: Model, case: tuple) -> None:
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
