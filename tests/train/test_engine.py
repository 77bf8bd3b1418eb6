import pytest

from plait.errors import PlaitError
from plait.train.engine import divide_batch
from plait.train.recipe import DecoderRecipe


def recipe(global_batch: int, micro_batch: int, streams: int) -> DecoderRecipe:
    return DecoderRecipe(["a"], "t", "o", global_batch=global_batch, micro_batch=micro_batch, streams=streams)


@pytest.mark.parametrize(
    ("plan", "world_size", "divided"),
    [
        ((8, 8, 1), 1, (8, 1)),
        ((8, 2, 1), 1, (2, 4)),
        ((8, 8, 2), 2, (4, 1)),
        ((8, 3, 4), 2, (2, 2)),
        ((8, 1, 8), 8, (1, 1)),
        ((7, 3, 1), 1, (1, 7)),
        ((2, 64, 1), 1, (2, 1)),
    ],
)
def test_share_of_a_process(plan: tuple[int, int, int], world_size: int, divided: tuple[int, int]) -> None:
    assert divide_batch(recipe(*plan), world_size) == divided


@pytest.mark.parametrize("world_size", [1, 2, 3, 4, 6, 12])
@pytest.mark.parametrize("micro_batch", range(1, 26))
def test_passes_make_up_the_global_batch(world_size: int, micro_batch: int) -> None:
    size, passes = divide_batch(recipe(24, micro_batch, 12), world_size)
    assert size * passes * world_size == 24
    assert 1 <= size <= micro_batch


@pytest.mark.parametrize(
    ("plan", "world_size", "reason"),
    [
        ((8, 2, 3), 1, "streams: 3 must divide"),
        ((2, 1, 4), 1, "streams: 4 must divide"),
        ((8, 8, 1), 2, "streams: 1 is not a multiple of the 2"),
        ((8, 2, 4), 3, "streams: 4 is not a multiple of the 3"),
    ],
)
def test_batch_that_does_not_divide(plan: tuple[int, int, int], world_size: int, reason: str) -> None:
    with pytest.raises(PlaitError, match=f"^{reason}"):
        divide_batch(recipe(*plan), world_size)
