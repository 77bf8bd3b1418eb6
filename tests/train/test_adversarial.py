import copy
import math
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from plait.errors import PlaitError
from plait.train.adversarial import (
    AdversarialConfig,
    Adversary,
    LeCam,
    adaptive_weight,
    hinge_discriminator,
    hinge_generator,
    non_saturating_discriminator,
    non_saturating_generator,
)
from plait.train.discriminator import DiscriminatorConfig, build_discriminator

SMALL = DiscriminatorConfig(width=8, layers=1)
CONFIG = AdversarialConfig(weight=0.5, discriminator=SMALL)
LOGITS = st.lists(st.floats(-8, 8, width=32), min_size=1, max_size=6)


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def adversary(**settings: Any) -> Adversary:
    torch.manual_seed(0)
    config = replace(CONFIG, **settings)
    return Adversary(build_discriminator(config.discriminator), config)


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def mean(values: list[float]) -> float:
    return sum(values) / len(values)


@settings(deadline=None)
@given(real=LOGITS, fake=LOGITS)
def test_losses_are_their_scalar_formulas(real: list[float], fake: list[float]) -> None:
    r, f = torch.tensor(real, dtype=torch.float64), torch.tensor(fake, dtype=torch.float64)
    hinge = (mean([max(0.0, 1 - x) for x in real]) + mean([max(0.0, 1 + x) for x in fake])) / 2
    assert hinge_discriminator(r, f).item() == pytest.approx(hinge)
    assert hinge_generator(f).item() == pytest.approx(-mean(fake))
    # Binary cross-entropy with target 1 for real and 0 for fake.
    entropy = (mean([-math.log(sigmoid(x)) for x in real]) + mean([-math.log(1 - sigmoid(x)) for x in fake])) / 2
    assert non_saturating_discriminator(r, f).item() == pytest.approx(entropy)
    assert non_saturating_generator(f).item() == pytest.approx(mean([-math.log(sigmoid(x)) for x in fake]))


@pytest.mark.parametrize("discriminator", [hinge_discriminator, non_saturating_discriminator])
def test_discriminator_losses_push_real_up_and_fake_down(discriminator: Any) -> None:
    real, fake = torch.zeros(3, requires_grad=True), torch.zeros(3, requires_grad=True)
    discriminator(real, fake).backward()
    assert real.grad is not None
    assert fake.grad is not None
    assert (real.grad < 0).all()
    assert (fake.grad > 0).all()
    # Swapping the two must be seen: a perfect discriminator has hardly any loss, a perfectly wrong one has much.
    good, bad = torch.full((4,), 9.0), torch.full((4,), -9.0)
    assert discriminator(good, bad) < 1e-3
    assert discriminator(bad, good) > 8


@pytest.mark.parametrize("generator", [hinge_generator, non_saturating_generator])
def test_generator_losses_push_fake_up(generator: Any) -> None:
    fake = torch.tensor([-20.0, 0.0, 1.0], requires_grad=True)
    generator(fake).backward()
    assert fake.grad is not None
    assert (fake.grad < 0).all()
    # The point of not saturating: a surely rejected picture still gets its whole gradient.
    assert fake.grad[0].item() == pytest.approx(-1 / 3, rel=1e-4)


def test_losses_take_targets_and_logits_in_the_right_order() -> None:
    # Cross-entropy of (ones, logits) in swapped places is −logits-like and misses the sigmoid.
    fake = torch.tensor([-2.0, 0.3, 1.5])
    right = nn.functional.binary_cross_entropy_with_logits(fake, torch.ones(3))
    swapped = nn.functional.binary_cross_entropy_with_logits(torch.ones(3), fake)
    assert non_saturating_generator(fake).item() == pytest.approx(right.item())
    assert abs(non_saturating_generator(fake).item() - swapped.item()) > 0.1
    real = torch.tensor([0.5, 2.0, -1.0])
    zeros = nn.functional.binary_cross_entropy_with_logits(fake, torch.zeros(3))
    ones = nn.functional.binary_cross_entropy_with_logits(real, torch.ones(3))
    assert non_saturating_discriminator(real, fake).item() == pytest.approx((ones + zeros).item() / 2)


@settings(deadline=None, max_examples=30)
@given(batches=st.lists(st.tuples(LOGITS, LOGITS), min_size=1, max_size=6), decay=st.sampled_from([0.5, 0.75, 0.999]))
def test_lecam_is_its_formula(batches: list[tuple[list[float], list[float]]], decay: float) -> None:
    lecam = LeCam(decay)
    running_real = running_fake = 0.0
    for n, (real, fake) in enumerate(batches, start=1):
        share = max(1 / n, 1 - decay)
        running_real += share * (mean(real) - running_real)
        running_fake += share * (mean(fake) - running_fake)
        expected = mean([max(0.0, x - running_fake) ** 2 for x in real]) + mean(
            [max(0.0, running_real - x) ** 2 for x in fake]
        )
        assert lecam(torch.tensor(real), torch.tensor(fake)).item() == pytest.approx(expected, rel=1e-3, abs=1e-4)
    assert lecam.real.item() == pytest.approx(running_real, rel=1e-4, abs=1e-5)
    assert lecam.fake.item() == pytest.approx(running_fake, rel=1e-4, abs=1e-5)


def test_lecam_pulls_the_two_sides_together_and_goes_on_from_its_state() -> None:
    lecam = LeCam(0.9)
    lecam(torch.full((4,), 2.0), torch.full((4,), -1.0))
    real, fake = torch.full((2,), 2.0, requires_grad=True), torch.full((2,), -1.0, requires_grad=True)
    lecam(real, fake).backward()
    assert real.grad is not None
    assert fake.grad is not None
    assert (real.grad > 0).all()
    assert (fake.grad < 0).all()
    assert not lecam.real.requires_grad
    other = LeCam(0.9)
    other.load_state_dict(copy.deepcopy(lecam.state_dict()))
    a, b = noise(5, seed=1), noise(5, seed=2)
    assert torch.equal(lecam(a, b), other(a, b))


def two_losses() -> tuple[nn.Conv2d, Tensor, Tensor]:
    torch.manual_seed(0)
    last = nn.Conv2d(4, 3, 3, padding=1)
    decoded = last(noise(2, 4, 8, 8))
    return last, (decoded - noise(2, 3, 8, 8, seed=1)).square().mean(), (decoded * noise(2, 3, 8, 8, seed=2)).mean()


def test_adaptive_weight_is_the_ratio_of_gradient_norms() -> None:
    last, reconstruction, generator = two_losses()
    weight = adaptive_weight(reconstruction, generator, last.weight)
    norms = []
    for loss in (reconstruction, generator):
        last.zero_grad()
        loss.backward(retain_graph=True)
        assert last.weight.grad is not None
        norms.append(math.sqrt(sum(x * x for x in last.weight.grad.flatten().tolist())))
    assert weight.item() == pytest.approx(norms[0] / (norms[1] + 1e-4), rel=1e-4)
    assert not weight.requires_grad
    # So weighted, both losses pull with the same strength.
    (reconstruction + weight * generator).backward()


def test_adaptive_weight_has_a_limit_and_scales() -> None:
    last, reconstruction, generator = two_losses()
    base = adaptive_weight(reconstruction, generator, last.weight).item()
    assert adaptive_weight(reconstruction * 1e9, generator, last.weight).item() == 1e4
    assert adaptive_weight(reconstruction, generator * 0, last.weight, most=7).item() == 7
    assert adaptive_weight(reconstruction, generator * 0.5, last.weight).item() == pytest.approx(2 * base, rel=1e-2)
    assert adaptive_weight(reconstruction * 0, generator, last.weight).item() == 0
    assert last.weight.grad is None


def test_schedule() -> None:
    warm = adversary(start_discriminator=10, start_generator=20, ramp=4, weight=0.8)
    assert [warm.trains(step) for step in (9, 10, 11)] == [False, True, True]
    weights = [warm.weight(step) for step in (1, 19, 20, 21, 22, 23, 24, 1000)]
    assert weights == pytest.approx([0, 0, 0.2, 0.4, 0.6, 0.8, 0.8, 0.8])
    at_once = adversary(start_discriminator=0, start_generator=5)
    assert [at_once.weight(step) for step in (4, 5, 6)] == [0, 0.5, 0.5]
    off = adversary(weight=0.0)
    assert not off.trains(100)
    assert off.weight(100) == 0


@pytest.mark.parametrize("kind", ["patch2d", "patch3d"])
@pytest.mark.parametrize("loss", ["hinge", "non_saturating"])
def test_each_side_gets_its_own_gradients(kind: str, loss: str) -> None:
    both = adversary(discriminator=replace(SMALL, kind=kind), loss=loss, lecam=0.1)
    pixels, decoded = noise(2, 3, 3, 8, 8), noise(2, 3, 3, 8, 8, seed=1).requires_grad_()
    term, figures = both.generator_loss(decoded, 1, decoded.mean(), decoded)
    term.backward()
    assert decoded.grad is not None
    assert decoded.grad.any()
    assert all(p.grad is None and p.requires_grad for p in both.network.parameters())
    assert term.item() == pytest.approx(0.5 * figures["generator_loss"].item())
    assert figures["generator_weight"].item() == 0.5
    decoded.grad = None
    loss_value, figures = both.discriminator_loss(pixels, decoded)
    loss_value.backward()
    assert decoded.grad is None
    assert all(p.grad is not None for p in both.network.parameters())
    assert loss_value > figures["discriminator_loss"]
    real, fake = both.network(pixels), both.network(decoded)
    plain = {"hinge": hinge_discriminator, "non_saturating": non_saturating_discriminator}[loss](real, fake)
    assert figures["discriminator_loss"].item() == pytest.approx(plain.item(), rel=1e-5)
    assert figures["real_logits"].item() == pytest.approx(real.mean().item(), abs=1e-6)
    assert figures["fake_logits"].item() == pytest.approx(fake.mean().item(), abs=1e-6)


def test_generator_loss_is_adapted_and_ramped() -> None:
    both = adversary(adaptive=True, ramp=4)
    last = nn.Conv2d(3, 3, 1)
    decoded = last(noise(2, 3, 8, 8))
    reconstruction = (decoded - noise(2, 3, 8, 8, seed=1)).abs().mean()
    ratio = adaptive_weight(reconstruction, -both.network(decoded).mean(), last.weight).item()
    term, figures = both.generator_loss(decoded, 2, reconstruction, last.weight)
    assert figures["generator_weight"].item() == pytest.approx(0.5 * 2 / 4 * ratio, rel=1e-4)
    assert term.item() == pytest.approx(-0.25 * ratio * both.network(decoded).mean().item(), rel=1e-4)
    (reconstruction + term).backward()
    assert last.weight.grad is not None


def test_autocast_keeps_losses_in_float32() -> None:
    both = adversary(lecam=0.1)
    pixels, decoded = noise(2, 3, 8, 8), noise(2, 3, 8, 8, seed=1).bfloat16()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss, figures = both.discriminator_loss(pixels, decoded)
        term, _ = both.generator_loss(decoded, 1, loss, decoded)
    assert {loss.dtype, term.dtype, *(x.dtype for x in figures.values())} == {torch.float32}


def test_state_comes_back(tmp_path: Path) -> None:
    one, other = adversary(lecam=0.1), adversary(lecam=0.1)
    optimizer = torch.optim.SGD(one.network.parameters(), 0.1)
    for seed in range(3):
        one.discriminator_loss(noise(2, 3, 8, 8, seed=seed), noise(2, 3, 8, 8, seed=seed + 9))[0].backward()
        optimizer.step()
    torch.save(one.state_dict(), tmp_path / "state.pt")
    other.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    pixels, decoded = noise(2, 3, 8, 8, seed=20), noise(2, 3, 8, 8, seed=21)
    assert torch.equal(one.discriminator_loss(pixels, decoded)[0], other.discriminator_loss(pixels, decoded)[0])


def test_a_decoder_moves_towards_what_the_discriminator_takes_for_real() -> None:
    # Real pictures are bright. A "decoder" of one colour learns to be bright from the discriminator alone.
    both = adversary(loss="non_saturating", weight=1.0)
    colour = torch.full((1, 3, 1, 1), -0.5, requires_grad=True)
    learners = [torch.optim.Adam([colour], 0.05), torch.optim.Adam(both.network.parameters(), 5e-3)]
    for step in range(1, 41):
        pixels = 0.5 + 0.1 * noise(4, 3, 8, 8, seed=step)
        decoded = colour + 0.1 * noise(4, 3, 8, 8, seed=1000 + step)
        term, _ = both.generator_loss(decoded, step, decoded.mean(), colour)
        loss, _ = both.discriminator_loss(pixels, decoded)
        for learner, value in zip(learners, (term, loss), strict=True):
            learner.zero_grad()
            value.backward()
            learner.step()
    assert colour.mean() > 0.1


# The whole batch on one process, then halves on two: the same weights, running means and gradients.
WORKER = """
import sys
import torch, torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from plait.train.adversarial import AdversarialConfig, Adversary
from plait.train.discriminator import DiscriminatorConfig, build_discriminator

def train(norm, rank, size):
    wrap = DistributedDataParallel if size > 1 else lambda module: module
    torch.manual_seed(0)
    config = AdversarialConfig(
        weight=0.5, adaptive=True, lecam=0.1, discriminator=DiscriminatorConfig(width=8, layers=1, norm=norm)
    )
    bare, decoder = build_discriminator(config.discriminator), nn.Conv2d(3, 3, 3, padding=1)
    adversary, wrapped = Adversary(wrap(bare), config), wrap(decoder)
    learners = [torch.optim.SGD(m.parameters(), 0.05) for m in (bare, decoder)]
    weights = []
    for step in range(1, 4):
        whole = torch.rand(4, 3, 8, 8, generator=torch.Generator().manual_seed(step)) * 2 - 1
        pixels = whole.chunk(size)[rank]
        decoded = wrapped(pixels)
        loss = (decoded - pixels).abs().mean()
        term, figures = adversary.generator_loss(decoded, step, loss, decoder.weight)
        learners[1].zero_grad()
        (loss + term).backward()
        learners[1].step()
        weights.append(figures["generator_weight"])
        learners[0].zero_grad()
        adversary.discriminator_loss(pixels, decoded)[0].backward()
        learners[0].step()
    state = adversary.state_dict() | {"decoder": decoder.state_dict(), "figures": {"weights": torch.stack(weights)}}
    return {f"{norm} {part} {name}": tensor for part, named in state.items() for name, tensor in named.items()}

folder, rank = sys.argv[1], int(sys.argv[2])
torch.set_num_threads(1)
norms = ("group", "spectral")
alone = [train(norm, 0, 1) for norm in norms]
dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
together = [train(norm, rank, 2) for norm in norms]
torch.save([alone[0] | alone[1], together[0] | together[1]], f"{folder}/{rank}.pt")
dist.destroy_process_group()
"""


@pytest.mark.slow
def test_two_processes_are_one(tmp_path: Path) -> None:
    processes = [
        subprocess.Popen([sys.executable, "-c", WORKER, str(tmp_path), str(rank)], stderr=subprocess.PIPE, text=True)
        for rank in range(2)
    ]
    for process in processes:
        _, errors = process.communicate(timeout=240)
        assert process.returncode == 0, errors
    (alone, first), (_, second) = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2))
    assert {name.split()[1] for name in first} == {"discriminator", "lecam", "decoder", "figures"}
    for name, value in first.items():
        assert torch.equal(value, second[name]), name
        torch.testing.assert_close(value, alone[name], rtol=2e-4, atol=1e-5, msg=name)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"loss": "wasserstein"}, "loss is 'wasserstein', must be 'hinge' or 'non_saturating'"),
        ({"weight": -1.0}, "weight is -1.0, must be a number of at least 0"),
        ({"weight": math.nan}, "weight is nan"),
        ({"lecam": math.inf}, "lecam is inf"),
        ({"ramp": -1}, "ramp is -1, must be a whole number of at least 0"),
        ({"start_generator": 2.5}, "start_generator is 2.5"),
        (
            {"start_discriminator": 9, "start_generator": 3},
            r"start_generator \(3\) is before start_discriminator \(9\)",
        ),
    ],
)
def test_wrong_settings_are_named(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(PlaitError, match=f"^adversarial: {message}"):
        AdversarialConfig(**settings)
