import shutil
import statistics
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch

from plait.errors import PlaitError
from plait.tokenizers.grammar import Grammar
from plait.tokenizers.vocabulary import Vocabulary
from plait.train.documents import unpack_document
from plait.train.loader import batches, open_loader
from plait.train.recipe import SequenceConfig
from plait.train.sequences import Batch, SequenceEncoder
from plait.train.shards import read_samples


@pytest.fixture
def loader(tokens: Path, vocabulary: Vocabulary, tmp_path: Path) -> Callable[..., Any]:
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


def take(stream: Iterator[Batch], n: int) -> list[bytes]:
    return [content(batch) for batch in islice(stream, n)]


def close(loader: Any) -> None:
    # Workers that the garbage collector stops while others run keep it waiting for seconds.
    loader._iterator._shutdown_workers()


def first(loader: Any, n: int) -> list[bytes]:
    found = take(batches(loader), n)
    close(loader)
    return found


def test_batch(loader: Any, vocabulary: Vocabulary) -> None:
    opened = loader()
    batch = next(batches(opened))
    close(opened)
    assert batch.tokens.shape == batch.positions.shape == batch.targets.weights.shape == (1, 256)
    assert batch.targets.group_count == 2
    starts = batch.tokens == vocabulary.special("<bos>")
    assert starts.sum() > 1
    assert batch.positions[starts].tolist() == [0] * int(starts.sum())
    carrying = batch.targets.weights[:, :-1] > 0
    assert torch.equal(batch.targets.tokens[:, :-1][carrying], batch.tokens[:, 1:][carrying])


def test_two_processes_see_the_batches_of_one(loader: Any) -> None:
    # 40 batches a stream are more than twice the data, so what comes again is compared too.
    alone = first(loader(), 80)
    one, two = (first(loader(rank, 2), 40) for rank in range(2))
    for step in range(40):
        assert set(alone[2 * step : 2 * step + 2]) == {one[step], two[step]}
    assert len(set(alone)) == 80


def test_two_folders_and_two_processes(loader: Any, tokens: Path, tmp_path: Path) -> None:
    shutil.copytree(tokens, tmp_path / "copy")
    folders = [tokens, tmp_path / "copy"]
    alone = first(loader(folders=folders), 20)
    one, two = (first(loader(rank, 2, folders=folders), 10) for rank in range(2))
    assert [set(alone[2 * i : 2 * i + 2]) for i in range(10)] == [set(pair) for pair in zip(one, two, strict=True)]


def test_seed_decides(loader: Any) -> None:
    once = first(loader(), 6)
    assert first(loader(), 6) == once
    assert not set(first(loader(seed=1), 6)) & set(once)


@pytest.mark.parametrize(("rank", "world_size", "taken"), [(0, 1, 1), (0, 1, 36), (1, 2, 5)])
def test_restored_loader_goes_on_exactly(loader: Any, rank: int, world_size: int, taken: int) -> None:
    whole = loader(rank, world_size)
    stream = batches(whole)
    take(stream, taken)
    state = whole.save_state_rank()
    rest = take(stream, 12)
    close(whole)
    again = loader(rank, world_size)
    again.restore_state_rank(state)
    assert first(again, 12) == rest


def test_streams_must_divide(loader: Any) -> None:
    with pytest.raises(PlaitError, match="streams: 3 cannot be divided over 2 processes"):
        loader(world_size=2, streams=3)


def test_missing_shard(loader: Any, tokens: Path, tmp_path: Path) -> None:
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


def lengths(tokens: Path, vocabulary: Vocabulary) -> dict[str, int]:
    grammar = Grammar(vocabulary)
    return {s["__key__"]: len(grammar.document(unpack_document(s).spans)) for s in read_samples(tokens)}


def test_too_long_documents_are_left_out_and_named(
    loader: Any, tokens: Path, vocabulary: Vocabulary, capfd: pytest.CaptureFixture[str]
) -> None:
    sizes = lengths(tokens, vocabulary)
    limit = int(statistics.median(sizes.values()))
    first(loader(length=limit, drop_text=0, streams=1), 60)
    named = {line.split(":")[0].removeprefix("skipped ") for line in capfd.readouterr().out.splitlines()}
    assert named == {key for key, size in sizes.items() if size > limit}


@pytest.mark.slow
def test_nothing_fits(loader: Any) -> None:
    opened = loader(length=10, streams=1)
    with pytest.raises(PlaitError, match=r"tokens do not fit sequence\.length 10"):
        next(batches(opened))


def test_an_error_in_a_worker_is_not_swallowed(loader: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any) -> Any:
        raise ArithmeticError("broken packer")

    monkeypatch.setattr("plait.train.sequences.pack_sequences", broken)
    with pytest.raises(ArithmeticError, match="broken packer"):
        next(batches(loader(streams=1)))
