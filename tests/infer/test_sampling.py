import math

import pytest
import torch
from torch import Tensor

from plait.errors import PlaitError
from plait.infer.sampling import Sampling, draw, guide, restrict


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


def test_guidance_is_linear_in_log_probabilities() -> None:
    c, u = torch.randn(2, 9)
    torch.testing.assert_close(guide(c, u, 1.0), c.log_softmax(-1))
    torch.testing.assert_close(guide(c, u, 0.0), u.log_softmax(-1))
    expected = u.softmax(-1).log() + 2.5 * (c.softmax(-1).log() - u.softmax(-1).log())
    torch.testing.assert_close(guide(c, u, 2.5), expected, atol=1e-5, rtol=1e-5)
    # Logits are defined up to a constant, which must not be amplified.
    torch.testing.assert_close(guide(c + 5, u - 3, 2.5), expected, atol=1e-5, rtol=1e-5)


def test_restrict_keeps_the_allowed_ids_in_order() -> None:
    logits = torch.arange(10.0)
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
    ],
)
def test_bad_settings_name_themselves(field: str, value: float) -> None:
    with pytest.raises(PlaitError, match=f"^{field}: ") as raised:
        Sampling.of({}, **{field: value})
    assert "\n" not in str(raised.value)


def test_overrides_win_where_given() -> None:
    found = Sampling.of({"temperature": 0.5, "top_k": 3}, temperature=0.0, top_k=None, top_p=None, guidance=2.0)
    assert found == Sampling(temperature=0.0, top_k=3, top_p=1.0, guidance=2.0)


def test_unknown_setting() -> None:
    with pytest.raises(PlaitError, match=r"unknown setting 'heat'.*temperature, top_k"):
        Sampling.of({"heat": 1.0})
