from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch

from plait.errors import PlaitError
from plait.tokenizers.grammar import Grammar
from plait.tokenizers.vocabulary import Vocabulary
from plait.train.loader import open_loader
from plait.train.recipe import SequenceConfig
from plait.train.sequences import Batch, SequenceEncoder

pytestmark = pytest.mark.filterwarnings("ignore:.*pin_memory")


@pytest.fixture
def loader(tokens: Path, vocabulary: Vocabulary, tmp_path: Path) -> Any:
    def build(rank: int = 0, world_size: int = 1, streams: int = 2, seed: int = 0, **options: Any) -> Any:
        folders = options.pop("folders", [tokens])
        encoder = SequenceEncoder(Grammar(vocabulary), SequenceConfig(**{"length": 256, **options}), seed)
        return open_loader(
            folders, encoder, kind="tokens", scratch=tmp_path / f"scratch-{world_size}", batch_size=1, seed=seed,
            streams=streams, rank=rank, world_size=world_size, packing_buffer=8, shuffle_buffer=20,
        )  # fmt: skip

    return build


def content(batch: Batch) -> bytes:
    parts = (batch.tokens, batch.positions, batch.targets.tokens, batch.targets.weights, batch.targets.groups)
    return b"".join(part.numpy().tobytes() for part in parts)


def take(batches: Iterator[Batch], n: int) -> list[bytes]:
    return [content(batch) for batch in islice(batches, n)]


def test_batch(loader: Any, vocabulary: Vocabulary) -> None:
    batch = next(iter(loader()))
    assert batch.tokens.shape == batch.positions.shape == batch.targets.weights.shape == (1, 256)
    assert batch.targets.group_count == 2
    starts = (batch.positions == 0).sum()
    assert starts >= (batch.tokens == vocabulary.special("<bos>")).sum() > 1
    carrying = batch.targets.weights > 0
    assert torch.equal(batch.targets.tokens[:, :-1][carrying[:, :-1]], batch.tokens[:, 1:][carrying[:, :-1]])


@pytest.mark.slow
def test_two_processes_see_the_batches_of_one(loader: Any) -> None:
    # 40 batches a stream are more than three times the data, so the repeats are compared too.
    alone = take(iter(loader()), 80)
    first, second = (take(iter(loader(rank, 2)), 40) for rank in range(2))
    for step in range(40):
        assert set(alone[2 * step : 2 * step + 2]) == {first[step], second[step]}
    assert len(set(alone)) == 80


@pytest.mark.slow
def test_seed_decides(loader: Any) -> None:
    assert take(iter(loader()), 6) == take(iter(loader()), 6)
    assert not set(take(iter(loader()), 6)) & set(take(iter(loader(seed=1)), 6))


@pytest.mark.slow
@pytest.mark.parametrize(("rank", "world_size", "taken"), [(0, 1, 5), (1, 2, 4), (0, 1, 37)])
def test_restored_loader_goes_on_exactly(loader: Any, rank: int, world_size: int, taken: int) -> None:
    whole = loader(rank, world_size)
    batches = iter(whole)
    take(batches, taken)
    state = whole.save_state_rank()
    rest = take(batches, 12)
    again = loader(rank, world_size)
    again.restore_state_rank(state)
    assert take(iter(again), 12) == rest


def test_streams_must_divide(loader: Any) -> None:
    with pytest.raises(PlaitError, match="streams: 3 cannot be divided over 2 processes"):
        loader(world_size=2, streams=3)


def test_missing_shard(loader: Any, tokens: Path, tmp_path: Path) -> None:
    import shutil

    shutil.copytree(tokens, tmp_path / "copy")
    (tmp_path / "copy" / "shard-000002.tar").unlink()
    with pytest.raises(PlaitError, match=r"copy/shard-000002\.tar: shard is missing"):
        loader(folders=[tokens, tmp_path / "copy"])


def test_wrong_folders(loader: Any, raw: Path, tmp_path: Path) -> None:
    with pytest.raises(PlaitError, match="holds raw shards, expected tokens"):
        loader(folders=[raw])
    with pytest.raises(PlaitError, match="names no folder"):
        loader(folders=[])
    with pytest.raises(PlaitError, match="no such folder"):
        loader(folders=[tmp_path / "nowhere"])


@pytest.mark.slow
def test_too_long_documents_are_named_and_left_out(loader: Any, capfd: pytest.CaptureFixture[str]) -> None:
    batches = take(iter(loader(length=45)), 4)
    assert len(batches) == 4
    assert "do not fit sequence.length 45" in capfd.readouterr().out
