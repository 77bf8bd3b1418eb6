import pytest
import torch
from torch import nn

from plait.train.optimizer import build_optimizer, learning_rate, set_learning_rate
from plait.train.recipe import OptimizerConfig

CONFIG = OptimizerConfig(lr=1e-3, min_lr=1e-4, warmup_steps=10)


def test_warm_up_is_linear_and_ends_at_the_peak() -> None:
    rates = [learning_rate(step, 100, CONFIG) for step in range(11)]
    assert rates[0] == pytest.approx(1e-4)
    assert rates[4] == pytest.approx(5e-4)
    assert rates[9] == pytest.approx(1e-3)
    assert rates[10] == pytest.approx(1e-3)


def test_decay_is_half_a_cosine() -> None:
    assert learning_rate(55, 100, CONFIG) == pytest.approx((1e-3 + 1e-4) / 2)
    assert learning_rate(32, 100, CONFIG) > 1e-4 + 0.75 * 9e-4
    assert learning_rate(99, 100, CONFIG) == pytest.approx(1e-4, rel=0.01)
    assert learning_rate(100, 100, CONFIG) == pytest.approx(1e-4)
    assert learning_rate(500, 100, CONFIG) == pytest.approx(1e-4)
    rates = [learning_rate(step, 100, CONFIG) for step in range(10, 100)]
    assert rates == sorted(rates, reverse=True)


def test_edges() -> None:
    assert learning_rate(0, 100, OptimizerConfig(lr=1.0, warmup_steps=0)) == 1.0
    assert learning_rate(4, 5, OptimizerConfig(lr=1.0, warmup_steps=10)) == pytest.approx(0.5)
    assert learning_rate(10, 10, OptimizerConfig(lr=1.0, warmup_steps=10)) == 1.0


def test_only_matrices_decay() -> None:
    module = nn.Sequential(nn.Conv2d(3, 4, 3), nn.GroupNorm(1, 4), nn.Linear(4, 4), nn.Embedding(5, 4))
    module[2].bias.requires_grad_(False)
    optimizer = build_optimizer(module, OptimizerConfig(weight_decay=0.3, betas=(0.7, 0.8)))
    decays = {id(p): group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    named = {name: decays.get(id(p)) for name, p in module.named_parameters()}
    assert named == {
        "0.weight": 0.3, "0.bias": 0.0, "1.weight": 0.0, "1.bias": 0.0, "2.weight": 0.3, "2.bias": None,
        "3.weight": 0.3,
    }  # fmt: skip
    assert all(group["betas"] == (0.7, 0.8) for group in optimizer.param_groups)


def test_no_empty_group() -> None:
    assert len(build_optimizer(nn.Linear(2, 2, bias=False), CONFIG).param_groups) == 1


def test_set_learning_rate_reaches_all_groups() -> None:
    module = nn.Linear(2, 2)
    optimizer = build_optimizer(module, CONFIG)
    set_learning_rate(optimizer, 0.0)
    before = [p.clone() for p in module.parameters()]
    module(torch.ones(1, 2)).sum().backward()
    optimizer.step()
    assert all(torch.equal(a, b) for a, b in zip(before, module.parameters(), strict=True))
