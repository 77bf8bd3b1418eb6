import multiprocessing
import os
import socket
from typing import Any

import pytest
import torch
from torch import Tensor

from plait.train.balancer import Balancer
from plait.train.processes import join_processes, leave_processes

WEIGHTS = {"a": 3.0, "b": 1.0}


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def losses(decoded: Tensor, scale: float = 1.0) -> dict[str, Tensor]:
    return {
        "a": scale * (decoded - 0.3).square().flatten(1).mean(1).mean(),
        "b": 50 * decoded.sin().flatten(1).mean(1).mean(),
    }


def plain(batches: list[Tensor], decay: float) -> list[Tensor]:
    """The gradients of each pass, item by item from the formula."""
    sums, counts, found = dict.fromkeys(WEIGHTS, 0.0), 0.0, []
    for batch in batches:
        gradients: dict[str, list[Tensor]] = {name: [] for name in WEIGHTS}
        for item in batch:
            x = item[None].clone().requires_grad_()
            for name, loss in losses(x).items():
                gradients[name].append(torch.autograd.grad(loss, x, retain_graph=True)[0][0])
        counts = decay * counts + 1
        total = torch.zeros_like(batch)
        for name, each in gradients.items():
            norm = sum(float(g.square().sum()) ** 0.5 for g in each) / len(each)
            sums[name] = decay * sums[name] + norm
            total += WEIGHTS[name] / 4 * torch.stack(each) / (sums[name] / counts)
        found.append(total / len(batch))
    return found


def combined(balancer: Balancer, batch: Tensor, scale: float = 1.0) -> Tensor:
    decoded = batch.clone().requires_grad_()
    doubled = decoded * 1  # no leaf, as a decoder's output is none
    balancer.combine(losses(doubled, scale), WEIGHTS, doubled).backward()
    assert decoded.grad is not None
    return decoded.grad


def test_gradients_are_those_of_the_formula() -> None:
    batches = [noise(3, 1, 20, seed=i) for i in range(4)]
    balancer = Balancer(0.9)
    for batch, expected in zip(batches, plain(batches, 0.9), strict=True):
        assert torch.allclose(combined(balancer, batch), expected, rtol=1e-4, atol=1e-7)


def test_a_loss_s_scale_does_not_matter_and_its_weight_is_its_share() -> None:
    batch = noise(4, 1, 30)
    assert torch.allclose(combined(Balancer(), batch, 1.0), combined(Balancer(), batch, 1e4), rtol=1e-4, atol=1e-8)
    decoded = batch.clone().requires_grad_()
    Balancer().combine({"a": losses(decoded)["a"]}, WEIGHTS, decoded).backward()
    assert decoded.grad is not None
    # Alone it has all: the mean norm of an item's gradient is 1, in the mean over the batch.
    assert float((4 * decoded.grad).flatten(1).norm(dim=1).mean()) == pytest.approx(1, rel=1e-5)


def test_the_batch_s_size_does_not_matter() -> None:
    one = noise(1, 1, 30)
    assert torch.allclose(combined(Balancer(), one.expand(5, 1, 30)).sum(0), combined(Balancer(), one)[0], rtol=1e-4)


def test_a_loss_may_join_late_and_a_state_goes_on() -> None:
    first, second = noise(2, 1, 9), noise(2, 1, 9, seed=1)
    balancer = Balancer(0.9)
    decoded = first.clone().requires_grad_()
    balancer.combine({"b": losses(decoded)["b"]}, WEIGHTS, decoded)
    other = Balancer(0.9)
    other.load_state_dict(balancer.state_dict())
    assert torch.equal(combined(balancer, second), combined(other, second))
    assert not torch.allclose(combined(other, second), combined(Balancer(0.9), second))


def test_no_gradient_is_no_division_by_zero() -> None:
    decoded = torch.full((2, 1, 4), 0.3, requires_grad=True)
    Balancer().combine({"a": losses(decoded)["a"]}, WEIGHTS, decoded).backward()
    assert decoded.grad is not None
    assert float(decoded.grad.abs().max()) < 1e-5


def _rank(rank: int, port: int, answers: Any) -> None:
    os.environ.update(
        RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port)
    )
    join_processes()
    balancer, found = Balancer(0.9), []
    for i in range(3):
        batch = noise(4, 1, 20, seed=i) * torch.tensor([1.0, 1.0, 0.1, 0.1])[:, None, None]
        found.append(combined(balancer, batch[2 * rank : 2 * rank + 2]).tolist())
    leave_processes()
    answers.put((rank, found))


@pytest.mark.slow
def test_two_processes_equal_one() -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    fork = multiprocessing.get_context("fork")
    answers = fork.Queue()
    ranks = [fork.Process(target=_rank, args=(rank, port, answers)) for rank in range(2)]
    for process in ranks:
        process.start()
    found = dict(answers.get(timeout=120) for _ in ranks)
    for process in ranks:
        process.join(60)
    balancer = Balancer(0.9)
    for i in range(3):
        batch = noise(4, 1, 20, seed=i) * torch.tensor([1.0, 1.0, 0.1, 0.1])[:, None, None]
        alone = combined(balancer, batch)
        # Gradients are averaged over processes, and each has half of the batch.
        together = torch.cat([torch.tensor(found[rank][i]) for rank in (0, 1)]) / 2
        assert torch.allclose(together, alone, rtol=1e-4, atol=1e-7)
