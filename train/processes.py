"""The processes of a run: joining them, and the few things they tell each other."""

import os
import socket
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


def set_environment() -> None:
    """Fill in what a launcher would have set, when this process runs alone."""
    if "RANK" not in os.environ:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))


def join_processes() -> tuple[int, int, torch.device]:
    """Join the process group that ``torchrun`` or ``deepspeed`` describes, if there is more than this process.

    Returns:
        rank, world size, and this process's device: its GPU if there is one.
    """
    set_environment()
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if torch.cuda.is_available() else torch.device("cpu")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if int(os.environ["WORLD_SIZE"]) > 1 and not dist.is_initialized():
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    return int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"]), device


def leave_processes() -> None:
    """Leave the process group, if there is one."""
    if dist.is_initialized():
        dist.destroy_process_group()


def mean_over_processes(figures: dict[str, Tensor]) -> dict[str, float]:
    """Scalars averaged over all processes, which must all call this with the same names."""
    values = torch.stack([value.detach().double() for value in figures.values()]) if figures else torch.zeros(0)
    if dist.is_initialized() and figures:
        # NCCL and older accelerators take no float64.
        values = values.float()
        dist.all_reduce(values)
        values /= dist.get_world_size()
    return dict(zip(figures, values.tolist(), strict=True))


def gather(value: Any) -> list[Any]:
    """A Python object of every process, by rank; only rank 0 gets them, the others an empty list."""
    if not dist.is_initialized():
        return [value]
    gathered: list[Any] = [None] * dist.get_world_size() if dist.get_rank() == 0 else []
    dist.gather_object(value, gathered or None)
    return gathered


def wait() -> None:
    """Wait for all processes."""
    if dist.is_initialized():
        dist.barrier()
