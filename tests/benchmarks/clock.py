"""How the benchmarks take the time."""

import time
from collections.abc import Callable, Sequence

import torch


def seconds(runs: Sequence[Callable[[], object]], repeats: int, device: str) -> list[float]:
    """The least time of each call after one to warm up; they take turns, so that a busy machine slows all alike.

    On a CPU it is the processor's time for this process, in which other programs have a smaller share.
    """
    clock = time.process_time if device == "cpu" else time.perf_counter
    times: list[list[float]] = [[] for _ in runs]
    for _ in range(repeats + 1):
        for run, taken in zip(runs, times, strict=True):
            start = clock()
            run()
            if device != "cpu":
                torch.cuda.synchronize()
            taken.append(clock() - start)
    return [min(taken[1:]) for taken in times]
