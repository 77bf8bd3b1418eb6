import multiprocessing
import os
import socket
from typing import Any

import pytest
import torch
import torch.distributed as dist

from plait.train.processes import (
    gather,
    join_processes,
    leave_processes,
    mean_over_processes,
    set_environment,
    wait,
)

LAUNCHER = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


@pytest.fixture(autouse=True)
def _no_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in LAUNCHER:
        monkeypatch.setenv(name, "")  # so that it is put back afterwards
        monkeypatch.delenv(name)


def test_alone_needs_no_group() -> None:
    rank, world_size, device = join_processes()
    assert (rank, world_size) == (0, 1)
    assert device.type == ("cuda" if torch.cuda.is_available() else "cpu")
    assert not dist.is_initialized()
    assert mean_over_processes({"a": torch.tensor(0.1, dtype=torch.float64), "b": torch.tensor(2)}) == {
        "a": 0.1,
        "b": 2,
    }
    assert mean_over_processes({}) == {}
    assert gather({"x": 1}) == [{"x": 1}]
    wait()
    leave_processes()


def test_a_launcher_s_environment_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "3")
    set_environment()
    assert os.environ["RANK"] == "3"
    assert "WORLD_SIZE" not in os.environ


def _rank(rank: int, port: int, answers: Any) -> None:
    os.environ.update(
        RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="3", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port)
    )
    joined = join_processes()[:2]
    mean = mean_over_processes({"a": torch.tensor(float(rank)), "b": torch.tensor(10 * rank)})
    everything = gather({"rank": rank})
    wait()
    leave_processes()
    answers.put((rank, joined, mean, everything))


@pytest.mark.slow
def test_three_processes() -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    fork = multiprocessing.get_context("fork")
    answers = fork.Queue()
    ranks = [fork.Process(target=_rank, args=(rank, port, answers)) for rank in range(3)]
    for process in ranks:
        process.start()
    found = sorted(answers.get(timeout=120) for _ in ranks)
    for process in ranks:
        process.join(60)
    for rank, (number, joined, mean, everything) in enumerate(found):
        assert number == rank
        assert joined == (rank, 3)
        assert mean == {"a": 1.0, "b": 10.0}
        assert everything == ([{"rank": 0}, {"rank": 1}, {"rank": 2}] if rank == 0 else [])
