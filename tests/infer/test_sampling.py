import math
from typing import Any

import pytest
import torch
from torch import Tensor

from plait.errors import PlaitError
from plait.infer.sampling import GUIDANCE_DOMAINS, Sampling, draw, guide, restrict


def frequencies(logits: Tensor, settings: Sampling, draws: int = 4000) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    counts = torch.zeros(len(logits))
    for _ in range(draws):
        counts[draw(logits, settings, generator)] += 1
    return counts / draws


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_frequencies_are_the_softmax(temperature: float) -> None:
    logits = torch.tensor([0.3, -1.0, 1.2, 0.0, -0.4])
    expected = (logits / temperature).softmax(-1)
    # Four standard deviations of the rarest to the most frequent.
    torch.testing.assert_close(frequencies(logits, Sampling(temperature)), expected, atol=0.032, rtol=0)


def test_top_k_keeps_the_k_most_probable_and_their_proportions() -> None:
    logits = torch.tensor([0.3, -1.0, 1.2, 0.0, -0.4])
    expected = logits.clone()
    expected[[1, 3, 4]] = -math.inf
    torch.testing.assert_close(frequencies(logits, Sampling(top_k=2)), expected.softmax(-1), atol=0.032, rtol=0)


@pytest.mark.parametrize(
    ("top_p", "kept"), [(0.05, [2]), (0.39, [2]), (0.45, [2, 0]), (0.75, [2, 0, 3]), (1.0, range(5))]
)
def test_top_p_keeps_the_fewest_that_reach_it(top_p: float, kept: list[int]) -> None:
    logits = torch.tensor([0.25, 0.05, 0.4, 0.2, 0.1]).log()
    found = frequencies(logits, Sampling(top_p=top_p), 2000)
    assert set(found.nonzero().flatten().tolist()) == set(kept)
    expected = torch.zeros(5)
    expected[list(kept)] = logits.exp()[list(kept)] / logits.exp()[list(kept)].sum()
    torch.testing.assert_close(found, expected, atol=0.045, rtol=0)


def test_top_p_counts_within_top_k() -> None:
    # Of the two kept, the first has 4/7 of the probability, which reaches 0.5.
    logits = torch.tensor([0.4, 0.3, 0.2, 0.1]).log()
    assert frequencies(logits, Sampling(top_k=2, top_p=0.5), 300)[0] == 1


def test_temperature_comes_before_top_p() -> None:
    logits = torch.tensor([0.6, 0.3, 0.1]).log()
    assert (frequencies(logits, Sampling(top_p=0.55), 300) > 0).sum() == 1
    assert (frequencies(logits, Sampling(temperature=50.0, top_p=0.55), 300) > 0).sum() == 2


@pytest.mark.parametrize("temperature", [0.0, 1e-4, 1e-310])
def test_cold_takes_the_most_probable(temperature: float) -> None:
    logits = torch.tensor([-300.0, 7.0, 800.0, 799.0])
    assert {draw(logits, Sampling(temperature), torch.Generator().manual_seed(s)) for s in range(20)} == {2}


def test_hot_is_uniform() -> None:
    found = frequencies(torch.tensor([0.0, 50.0]), Sampling(temperature=math.inf), 1000)
    assert found[0] == pytest.approx(0.5, abs=0.06)


def test_a_seed_repeats_its_draws() -> None:
    logits = torch.randn(100)

    def draws(seed: int) -> list[int]:
        generator = torch.Generator().manual_seed(seed)
        return [draw(logits, Sampling(), generator) for _ in range(20)]

    assert draws(3) == draws(3)
    assert draws(3) != draws(4)


def test_one_random_number_a_draw_whatever_the_settings() -> None:
    used, plain = torch.Generator().manual_seed(0), torch.Generator().manual_seed(0)
    draw(torch.randn(100), Sampling(top_k=7, top_p=0.5), used)
    torch.rand((), generator=plain, dtype=torch.float64)
    assert torch.equal(used.get_state(), plain.get_state())


def test_impossible_tokens_are_never_drawn() -> None:
    logits = torch.tensor([-math.inf, 0.0, -math.inf, 0.0, -math.inf])
    found = frequencies(logits, Sampling(), 500)
    assert set(found.nonzero().flatten().tolist()) == {1, 3}


@pytest.mark.parametrize("logits", [[0.0, math.nan], [0.0, math.inf], [-math.inf, -math.inf]], ids=str)
@pytest.mark.parametrize("settings", [Sampling(), Sampling(top_k=1), Sampling(top_p=0.5), Sampling(0.0)], ids=str)
def test_nothing_to_draw_from(logits: list[float], settings: Sampling) -> None:
    with pytest.raises(PlaitError, match="^generation: the model's logits are not finite; "):
        draw(torch.tensor(logits), settings, torch.Generator())


def draw_by_sorting(logits: Tensor, settings: Sampling, generator: torch.Generator) -> int:
    """The plainest reading: all in descending order, the nucleus, one uniform number along the cumulative sum."""
    values, order = (logits.double() / settings.temperature).sort(descending=True, stable=True)
    values, order = values[: settings.top_k or None], order[: settings.top_k or None]
    cumulative = values.softmax(-1).cumsum(-1)
    cumulative = cumulative[: int((cumulative < settings.top_p).sum()) + 1]
    point = torch.rand((), generator=generator, dtype=torch.float64) * cumulative[-1]
    return int(order[int((cumulative < point).sum())])


@pytest.mark.parametrize("size", [30, 3000])
@pytest.mark.parametrize("decimals", [0, 1, 7], ids=lambda n: f"{n} decimals")
@pytest.mark.parametrize(
    "settings", [Sampling(0.7, 20), Sampling(1.0, 1), Sampling(1.5, 0, 0.9), Sampling(0.9, 50, 0.5)], ids=str
)
def test_draws_are_those_of_a_stable_sort(size: int, decimals: int, settings: Sampling) -> None:
    """Few decimals make many ties, as half precision does."""
    used, plain = torch.Generator().manual_seed(0), torch.Generator().manual_seed(0)
    for seed in range(20):
        logits = (torch.randn(size, generator=torch.Generator().manual_seed(seed)) * 2).round(decimals=decimals)
        assert draw(logits, settings, used) == draw_by_sorting(logits, settings, plain)


def test_guidance_is_linear_in_log_probabilities() -> None:
    c, u = torch.randn(2, 9)

    def at(scale: float) -> Sampling:
        return Sampling(guidance=scale)

    torch.testing.assert_close(guide(c, u, at(1.0)), c.log_softmax(-1))
    torch.testing.assert_close(guide(c, u, at(0.0)), u.log_softmax(-1))
    expected = u.softmax(-1).log() + 2.5 * (c.softmax(-1).log() - u.softmax(-1).log())
    torch.testing.assert_close(guide(c, u, at(2.5)), expected, atol=1e-5, rtol=1e-5)
    # Logits are defined up to a constant, which must not be amplified.
    torch.testing.assert_close(guide(c + 5, u - 3, at(2.5)), expected, atol=1e-5, rtol=1e-5)


def test_guidance_equals_transformers() -> None:
    """Its processor is what Emu3's released code guides with."""
    from transformers import UnbatchedClassifierFreeGuidanceLogitsProcessor
    from transformers.modeling_outputs import CausalLMOutputWithPast

    class Fixed:
        def __call__(self, *_: object, **__: object) -> CausalLMOutputWithPast:
            return CausalLMOutputWithPast(logits=unconditional[:, None])

    full, unconditional = torch.randn(2, 1, 50) * 4
    processor = UnbatchedClassifierFreeGuidanceLogitsProcessor(3.0, Fixed(), torch.zeros(1, 4, dtype=torch.int64))
    expected = processor(torch.zeros(1, 4, dtype=torch.int64), full)
    torch.testing.assert_close(guide(full[0], unconditional[0], Sampling(guidance=3.0)), expected[0])


@pytest.mark.parametrize("domain", GUIDANCE_DOMAINS)
def test_guidance_in_its_domain(domain: str) -> None:
    f, u, i = logits = torch.randn(3, 9)
    settings = Sampling(guidance=3.0, guidance_image=1.2, guidance_domain=domain)
    if domain == "log_softmax":
        f, u, i = (x - x.exp().sum().log() for x in logits)
    torch.testing.assert_close(guide(logits[0], logits[1], settings), u + 3 * (f - u))
    torch.testing.assert_close(guide(*logits[:2], settings, logits[2]), u + 1.2 * (i - u) + 3 * (f - i))
    # One scale for the whole prompt is guidance without the third row; no scales at all are the prompt.
    for scale in (0.0, 2.5):
        same = Sampling(guidance=scale, guidance_image=scale, guidance_domain=domain)
        torch.testing.assert_close(guide(*logits[:2], same, logits[2]), u + scale * (f - u))
    torch.testing.assert_close(guide(*logits[:2], Sampling(guidance_domain=domain), logits[2]), f)


def test_the_domain_does_not_change_what_is_drawn() -> None:
    full, unconditional, image_only = torch.randn(3, 9)
    probabilities = [
        guide(full, unconditional, Sampling(1.0, 0, 1.0, 3.0, 1.2, domain), image_only).softmax(-1)
        for domain in GUIDANCE_DOMAINS
    ]
    torch.testing.assert_close(*probabilities)


@pytest.mark.parametrize(
    ("fields", "guided", "three_way"),
    [
        ({}, False, False),
        ({"guidance": 2.0}, True, False),
        ({"guidance_image": 2.0}, True, True),
        ({"guidance": 2.0, "guidance_image": 2.0}, True, False),
        ({"guidance": 2.0, "guidance_image": 1.0}, True, True),
        ({"guidance_image": 1.0}, False, False),
    ],
)
def test_what_guidance_needs(fields: dict[str, float], guided: bool, three_way: bool) -> None:
    settings = Sampling(**fields)
    assert (settings.guided, settings.three_way) == (guided, three_way)


def test_restrict_keeps_the_allowed_ids_in_order() -> None:
    logits = torch.arange(10.0)
    for values, ids in (restrict(logits, [range(4, 7)]), restrict(logits, [range(4, 6), range(6, 7)])):
        assert ids.tolist() == values.tolist() == [4, 5, 6]
    values, ids = restrict(logits, [range(7, 9), range(2, 2), range(0, 1)])
    assert ids.tolist() == [7, 8, 0]
    assert values.tolist() == [7.0, 8.0, 0.0]


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("temperature", -0.1),
        ("temperature", math.nan),
        ("top_k", -1),
        ("top_k", 2.5),
        ("top_p", 0.0),
        ("top_p", 1.01),
        ("top_p", math.nan),
        ("guidance", -1.0),
        ("guidance", math.inf),
        ("guidance", math.nan),
        ("guidance", None),
        ("guidance_image", -0.5),
        ("guidance_image", "2"),
        ("guidance_domain", "softmax"),
        ("guidance_domain", 1),
        ("guidance_domain", None),
        ("temperature", True),
    ],
)
def test_bad_settings_name_themselves(field: str, value: Any) -> None:
    with pytest.raises(PlaitError, match=f"^{field}: ") as raised:
        Sampling.of({field: value})
    assert "\n" not in str(raised.value)


def test_overrides_win_where_given() -> None:
    found = Sampling.of({"temperature": 0.5, "top_k": 3}, temperature=0.0, top_k=None, top_p=None, guidance=2.0)
    assert found == Sampling(temperature=0.0, top_k=3, top_p=1.0, guidance=2.0)


def test_settings_that_are_no_numbers() -> None:
    settings = {"guidance": 3.0, "guidance_image": 1.2, "guidance_domain": "logits"}
    assert Sampling.of(settings) == Sampling(guidance=3.0, guidance_image=1.2, guidance_domain="logits")
    assert Sampling.of(settings, guidance_domain="log_softmax", guidance_image=2.0).guidance_image == 2.0
    assert Sampling.of({"guidance_image": None}) == Sampling()


def test_unknown_setting() -> None:
    with pytest.raises(PlaitError, match=r"unknown setting 'heat'.*temperature, top_k"):
        Sampling.of({"heat": 1.0})
