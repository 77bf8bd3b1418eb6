"""The 60 pictures as raw and as token shards, and a few clips of them, made once; runs in processes of their own."""

import contextlib
import multiprocessing
import os
import socket
import sys
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from plait.errors import PlaitError
from plait.tokenizers.media import Video, read_image
from plait.tokenizers.video import write_video
from plait.train.pack import pack
from plait.train.tokenize import tokenize


@pytest.fixture(scope="session")
def raw(emoji: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """60 samples in 3 raw shards."""
    folder = tmp_path_factory.mktemp("raw") / "shards"
    pack(emoji, folder, 20)
    return folder


@pytest.fixture(scope="session")
def tokens(raw: Path, tokenizers: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """60 documents in 3 token shards."""
    folder = tmp_path_factory.mktemp("tokens") / "shards"
    tokenize(raw, folder, str(tokenizers), workers=1)
    return folder


@pytest.fixture(scope="session")
def clips(emoji: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """9 clips in 3 raw shards: pictures that move to the right, GIF, MP4 and animated WebP in turn, 40×32."""
    source = tmp_path_factory.mktemp("clips")
    for i, path in enumerate(sorted(emoji.glob("*/*.png"))[:9]):
        picture = torch.from_numpy(np.array(read_image(path).resize((40, 32))))
        frames = torch.stack([picture.roll(2 * t, 1) for t in range(6 + i)])
        write_video(Video(frames, 12.5), source / f"clip{i}{('.gif', '.mp4', '.webp')[i % 3]}")
    folder = tmp_path_factory.mktemp("clip-shards") / "shards"
    pack(source, folder, 3)
    return folder


@pytest.fixture(scope="session")
def speech(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """12 sounds, most of them speech, in 3 raw shards."""
    folder = tmp_path_factory.mktemp("speech") / "shards"
    pack(Path(__file__).parents[1] / "data" / "speech", folder, 4)
    return folder


@pytest.fixture
def _end_workers(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """End the loaders' workers in order; left to the garbage collector they wait for one another."""
    from plait.train import loader, tokenizer_loop

    opened = []

    def open_loader(*arguments: Any, **options: Any) -> Any:
        opened.append(loader.open_loader(*arguments, **options))
        return opened[-1]

    monkeypatch.setattr(tokenizer_loop, "open_loader", open_loader)
    yield
    for each in opened:
        if (iterator := getattr(each, "_iterator", None)) is not None:
            with contextlib.suppress(RuntimeError):  # one that was too slow and was ended for it
                iterator._shutdown_workers()


def _fork(processes: int, log: Path, work: Callable[[int], Any]) -> list[int]:
    """Run ``work(rank)`` in each of so many processes that a launcher might have started; their exit codes."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]

    def child(rank: int) -> None:
        sys.stdout = sys.stderr = log.with_name(f"{log.name}-{rank}").open("w", buffering=1)
        os.environ.update(
            RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(processes), MASTER_ADDR="127.0.0.1",
            MASTER_PORT=str(port),
        )  # fmt: skip
        code = 1
        try:
            work(rank)
            code = 0
        except PlaitError as error:
            print(f"plait: {error}")
            code = 2
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(code)

    context = multiprocessing.get_context("fork")
    children = [context.Process(target=child, args=(rank,)) for rank in range(processes)]
    for each in children:
        each.start()
    for each in children:
        each.join(180)
    late = [each for each in children if each.is_alive()]
    for each in late:
        each.kill()
        each.join()
    assert not late, log.with_name(f"{log.name}-0").read_text()
    return [each.exitcode or 0 for each in children]


@pytest.fixture
def fork() -> Callable[[int, Path, Callable[[int], Any]], list[int]]:
    """Processes are forked, so that they need not import everything anew."""
    return _fork
