from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from plait.errors import PlaitError
from plait.tokenizers.layouts import Layout, build_layout, deinterleave, interleave


def lettered(codebooks: int, steps: int) -> Tensor:
    """Codes ``[q, t]`` whose value says codebook and step: 203 is step 3 of codebook 2."""
    return 100 * torch.arange(codebooks)[:, None] + torch.arange(steps)


def letters(stream: Tensor) -> str:
    return " ".join(f"{'abcd'[code // 100]}{code % 100}" for code in stream.tolist())


@pytest.mark.parametrize(
    ("spec", "expected"),
    [
        ("flatten", "a0 b0 c0 a1 b1 c1 a2 b2 c2 a3 b3 c3"),
        ("delay", "a0 a1 b0 a2 b1 c0 a3 b2 c1 b3 c2 c3"),
        ("delay:0,1,1", "a0 a1 b0 c0 a2 b1 c1 a3 b2 c2 b3 c3"),  # Moshi
        ("delay:2,0,0", "b0 c0 b1 c1 a0 b2 c2 a1 b3 c3 a2 a3"),
        ("delay:0,100,200", "a0 a1 a2 a3 b0 b1 b2 b3 c0 c1 c2 c3"),
    ],
)
def test_the_order_is_the_documented_one(spec: str, expected: str) -> None:
    layout, codes = build_layout(spec, 3), lettered(3, 4)
    stream = layout.write(codes)
    assert letters(stream) == expected
    assert torch.equal(layout.books(4), stream // 100)
    assert torch.equal(layout.read(stream), codes)


def test_only_differences_of_delays_matter() -> None:
    assert build_layout("delay:3,4,4", 3) == build_layout("delay:0,1,1", 3)
    assert build_layout("delay:2,2", 2).spec == build_layout("flatten", 2).spec == "flatten"
    assert build_layout("delay", 3).spec == "delay:0,1,2"


def test_delay_is_musicgens_pattern_without_its_corners() -> None:
    """The textbook way: shift row k by its delay in a grid of blanks, and read the grid by columns."""
    codes, delays = lettered(4, 7), (0, 1, 1, 4)
    grid = torch.full((4, 7 + max(delays)), -1)
    for k, delay in enumerate(delays):
        grid[k, delay : delay + 7] = codes[k]
    columns = grid.T.flatten()
    assert torch.equal(build_layout("delay:0,1,1,4", 4).write(codes), columns[columns >= 0])


def test_parallel_is_the_steps_side_by_side() -> None:
    layout, codes = build_layout("parallel", 3), lettered(3, 4)
    stream = layout.write(codes)
    assert [letters(step) for step in stream] == ["a0 b0 c0", "a1 b1 c1", "a2 b2 c2", "a3 b3 c3"]
    assert (layout.heads, layout.length(4)) == (3, 4)
    assert torch.equal(layout.books(4), stream // 100)
    assert torch.equal(layout.read(stream), codes)
    assert torch.equal(layout.read(stream[:2], steps=4), codes[:, :2])
    with pytest.raises(PlaitError, match=r"^stream: shape is \(4, 2\), the parallel layout has \[\.\.\., t, 3\]"):
        layout.read(stream[:, :2])


def delays(most: int = 12) -> st.SearchStrategy[str]:
    numbers = st.lists(st.integers(0, most), min_size=1, max_size=5)
    return numbers.map(lambda found: "delay:" + ",".join(map(str, found)))


@settings(deadline=None, max_examples=150)
@given(
    spec=st.one_of(st.sampled_from(["flatten", "delay", "parallel"]), delays()),
    steps=st.integers(0, 20),
    codebooks=st.integers(1, 5),
    batch=st.lists(st.integers(1, 3), max_size=2),
    seed=st.integers(0, 1 << 30),
)
def test_codes_come_back(spec: str, steps: int, codebooks: int, batch: list[int], seed: int) -> None:
    codebooks = spec.count(",") + 1 if ":" in spec else codebooks
    layout = build_layout(spec, codebooks)
    shape = [*batch, codebooks, steps] if codebooks > 1 else [*batch, steps]
    codes = torch.randint(1000, shape, generator=torch.Generator().manual_seed(seed))
    stream = layout.write(codes)
    assert list(stream.shape) == [*batch, layout.length(steps)] + [layout.heads] * (layout.heads > 1)
    assert torch.equal(layout.read(stream), codes)
    assert torch.equal(layout.read(stream, steps), codes)
    assert build_layout(layout.spec, codebooks) == layout
    assert layout.steps(shape) == steps
    assert layout.books(steps).flatten().bincount(minlength=codebooks).tolist() == [steps] * codebooks
    # Each item of a batch is as alone.
    if batch and min(batch):
        first = (0,) * len(batch)
        assert torch.equal(layout.write(codes[first]), stream[first])


@settings(deadline=None, max_examples=100)
@given(spec=delays(), steps=st.integers(1, 15), share=st.floats(0, 1))
def test_a_beginning_gives_the_steps_that_are_complete(spec: str, steps: int, share: float) -> None:
    codebooks = spec.count(",") + 1
    layout, codes = build_layout(spec, codebooks), lettered(codebooks, steps)
    codes = codes if codebooks > 1 else codes[0]
    stream = layout.write(codes)
    there = stream[: round(share * len(stream))]
    found = layout.read(there, steps)
    counts = [int((there % 100 == step).sum()) for step in range(steps)]
    complete = next((step for step, count in enumerate(counts) if count < codebooks), steps)
    assert torch.equal(found, codes[..., :complete])


@pytest.mark.parametrize("spec", ["flatten", "delay", "delay:0,1,1", "interleave:4,2,1"])
def test_streams_that_cannot_be(spec: str) -> None:
    layout = build_layout(spec, 3)
    per = layout.length(1)
    for count in range(1, 3 * per):
        if count % per:
            with pytest.raises(PlaitError, match=f"^stream: has {count} codes, the .* layout has {per} a step"):
                layout.read(torch.zeros(count))
    with pytest.raises(PlaitError, match=f"^stream: has {2 * per + 1} codes, 2 steps in the .* have fewer"):
        layout.read(torch.zeros(2 * per + 1), 2)


@pytest.mark.parametrize("shape", [(4,), (2, 4), (4, 3), (), (3, 2, 4)])
def test_codes_of_another_shape(shape: tuple[int, ...]) -> None:
    with pytest.raises(PlaitError, match=r"^codes: shape is .*, the delay:0,1,2 layout takes \[\.\.\., 3, t\]"):
        build_layout("delay", 3).write(torch.zeros(shape))


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("", "is none of flatten, delay, interleave, parallel, nor"),
        ("flat", "is none of"),
        ("flatten:1,2,3", "is none of"),
        ("parallel:3", "is none of"),
        (None, "is none of"),
        (["delay"], "is none of"),
        ("delay:0,1", "gives 2 numbers, there are 3 codebooks"),
        ("interleave", "gives 0 numbers, there are 3 codebooks"),
        ("delay:0,1,", "whole numbers"),
        ("delay:0,1,-1", "whole numbers"),
        ("delay:0,1,x", "whole numbers"),
        ("delay:0,1,1.5", "whole numbers"),
        ("delay:0,1,99999999999999999999", "whole numbers below"),
        ("interleave:4,3,1", "must be a whole multiple of the next"),
        ("interleave:1,2,4", "must be a whole multiple of the next"),
        ("interleave:2,1,0", "must be a whole multiple of the next"),
    ],
)
def test_unknown_layouts_are_refused(spec: Any, message: str) -> None:
    with pytest.raises(PlaitError, match=message) as raised:
        build_layout(spec, 3)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("spec", ["flatten", "delay", "delay:3", "parallel"])
def test_one_codebook_needs_no_order(spec: str) -> None:
    layout = build_layout(spec, 1)
    assert layout.spec == "flatten"
    assert torch.equal(layout.write(torch.arange(5)), torch.arange(5))


# --- levels


def test_snacs_order() -> None:
    stream = interleave([lettered(1, 2)[0], 100 + torch.arange(4), 200 + torch.arange(8)])
    assert letters(stream) == "a0 b0 c0 c1 b1 c2 c3 a1 b2 c4 c5 b3 c6 c7"
    assert torch.equal(build_layout("interleave:4,2,1", 3).books(2), stream // 100)


def test_four_levels_are_depth_first() -> None:
    """Against the definition: each code, then for every code below it the same again."""

    def below(level: int, place: int) -> list[int]:
        children = [place * ratios[level] + i for i in range(ratios[level])] if level < 3 else []
        return [100 * level + place, *(code for child in children for code in below(level + 1, child))]

    ratios = [2, 1, 3]
    levels = [100 * level + torch.arange(3 * n) for level, n in enumerate((1, 2, 2, 6))]
    expected = [code for place in range(3) for code in below(0, place)]
    assert interleave(levels).tolist() == expected


@st.composite
def strides(draw: st.DrawFn) -> list[int]:
    found = [draw(st.integers(1, 3))]
    for ratio in draw(st.lists(st.integers(1, 3), max_size=3)):
        found.insert(0, found[0] * ratio)
    return found


@settings(deadline=None, max_examples=100)
@given(strides=strides(), steps=st.integers(1, 5), batch=st.integers(1, 3), seed=st.integers(0, 1 << 30))
def test_levels_come_back(strides: list[int], steps: int, batch: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    lengths = [steps * strides[0] // stride for stride in strides]
    levels = [torch.randint(1000, (batch, n), generator=generator) for n in lengths]
    stream = interleave(levels)
    found = deinterleave(stream, strides)
    assert all(torch.equal(a, b) for a, b in zip(levels, found, strict=True))
    layout: Layout = build_layout("interleave:" + ",".join(map(str, strides)), len(strides))
    assert torch.equal(layout.read(layout.write(stream)), stream)
    assert layout.steps(stream.shape) == steps
    assert layout.books(steps).bincount(minlength=len(strides)).tolist() == lengths
    # The positions of a level hold its codes in their order.
    for level, codes in enumerate(levels):
        assert torch.equal(stream[:, layout.books(steps) == level], codes)
    # A beginning is cut to whole steps.
    assert torch.equal(layout.read(stream[:, :-1], steps), stream[:, : layout.length(steps - 1)])


@pytest.mark.parametrize(
    "levels", [[], [2, 3], [4, 2], [0, 0], [1, 2, 5]], ids=lambda lengths: "-".join(map(str, lengths))
)
def test_levels_that_do_not_nest(levels: list[int]) -> None:
    with pytest.raises(PlaitError, match="^levels: "):
        interleave([torch.zeros(n) for n in levels])


def test_levels_of_several_batches_and_streams_that_are_cut() -> None:
    with pytest.raises(PlaitError, match=r"^levels: shapes are \[\(1, 2\), \(2, 4\)\], must differ in length only"):
        interleave([torch.zeros(1, 2), torch.zeros(2, 4)])
    with pytest.raises(PlaitError, match="^stream: has 8 codes, the interleave:4,2,1 layout has 7 a step"):
        deinterleave(torch.zeros(1, 8), (4, 2, 1))
    with pytest.raises(PlaitError, match="^strides: are .*must be a whole multiple"):
        deinterleave(torch.zeros(1, 8), (4, 3))
