import copy

import pytest
import torch
from torch import Tensor, nn

from plait.errors import PlaitError
from plait.train.adversarial import least_squares_discriminator, least_squares_generator
from plait.train.wave_adversary import WaveAdversarialConfig, WaveAdversary, feature_matching
from plait.train.wave_discriminators import Judgement, WaveDiscriminatorConfig, WaveDiscriminators

SMALL = WaveDiscriminatorConfig(("period", "stft"), periods=(2,), stft_windows=(64,), width=2)


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def adversary(loss: str = "least_squares", features: float = 2.0) -> WaveAdversary:
    torch.manual_seed(0)
    config = WaveAdversarialConfig(weight=0.5, features=features, loss=loss, ramp=4, discriminator=SMALL)
    return WaveAdversary(WaveDiscriminators(SMALL), config)


def test_least_squares() -> None:
    real, fake = torch.tensor([0.5, 2.0]), torch.tensor([-1.0, 0.25, 1.0])
    expected = (0.25 + 1) / 2 + (1 + 0.0625 + 1) / 3
    assert least_squares_discriminator(real, fake).item() == pytest.approx(expected)
    assert least_squares_generator(fake).item() == pytest.approx((4 + 0.5625 + 0) / 3)


def test_losses_are_sums_over_networks_and_activations() -> None:
    judged = adversary()
    decoded, real = noise(2, 1, 200), noise(2, 1, 200, seed=1)
    losses = judged.generator_losses(decoded, real)
    judged.network.requires_grad_(False)
    ours, theirs = judged.network(decoded), judged.network(real)
    logits = [((1 - j.logits) ** 2).mean() for j in ours]
    assert losses["adversarial"].item() == pytest.approx(sum(float(x) for x in logits), rel=1e-5)
    differences = [
        float((a - b).abs().mean()) for j, k in zip(ours, theirs, strict=True) for a, b in zip(j[1], k[1], strict=True)
    ]
    assert len(differences) == 10
    assert losses["features"].item() == pytest.approx(sum(differences), rel=1e-5)
    loss, figures = judged.discriminator_loss(real, decoded)
    expected = [((1 - k.logits) ** 2).mean() + (j.logits**2).mean() for j, k in zip(ours, theirs, strict=True)]
    assert loss.item() == pytest.approx(sum(float(x) for x in expected), rel=1e-5)
    assert figures["discriminator_loss"].item() == loss.item()
    assert figures["real_logits"].item() == pytest.approx(sum(float(k.logits.mean()) for k in theirs) / 2, rel=1e-4)


def test_gradients_go_to_one_side_only() -> None:
    judged = adversary("hinge")
    decoded, real = noise(2, 1, 200).requires_grad_(), noise(2, 1, 200, seed=1)
    sum(judged.generator_losses(decoded, real).values()).backward()
    assert decoded.grad is not None
    assert decoded.grad.abs().sum() > 0
    assert all(p.grad is None and p.requires_grad for p in judged.network.parameters())
    decoded.grad = None
    judged.discriminator_loss(real, decoded)[0].backward()
    assert decoded.grad is None
    assert all(p.grad is not None for p in judged.network.parameters())


def test_features_of_equal_sound_are_equal_and_may_be_left_out() -> None:
    real = noise(2, 1, 200)
    assert float(adversary().generator_losses(real, real)["features"].detach()) == pytest.approx(0, abs=1e-4)
    assert adversary(features=0).generator_losses(real, real).keys() == {"adversarial"}
    one = [Judgement(torch.zeros(1), [torch.tensor([1.0, 3.0]), torch.tensor([2.0])])]
    two = [Judgement(torch.ones(1), [torch.tensor([2.0, 5.0]), torch.tensor([-2.0])])]
    assert feature_matching(one, two).item() == pytest.approx(1.5 + 4)


def test_both_weights_follow_the_ramp() -> None:
    judged = adversary()
    assert judged.weights(2) == pytest.approx({"adversarial": 0.25, "features": 1.0})
    assert judged.weights(9) == pytest.approx({"adversarial": 0.5, "features": 2.0})


def test_a_few_steps_tell_two_kinds_of_sound_apart() -> None:
    judged = adversary("hinge")
    optimizer = torch.optim.Adam(judged.network.parameters(), 1e-2)
    time = torch.arange(200) / 16
    tones = torch.stack([torch.sin(time * (1 + i / 8))[None] for i in range(4)])
    for step in range(12):
        optimizer.zero_grad()
        loss, figures = judged.discriminator_loss(tones, noise(4, 1, 200, seed=step))
        loss.backward()
        optimizer.step()
    assert figures["real_logits"] > figures["fake_logits"] + 0.3


def test_a_state_goes_on() -> None:
    one, other = adversary(), adversary()
    with torch.no_grad():
        for parameter in one.network.parameters():
            parameter.add_(0.1)
    other.load_state_dict(copy.deepcopy(one.state_dict()))
    x, y = noise(1, 1, 200), noise(1, 1, 200, seed=1)
    assert torch.equal(one.discriminator_loss(x, y)[0], other.discriminator_loss(x, y)[0])
    assert isinstance(one.network, nn.Module)


def test_bad_configuration() -> None:
    with pytest.raises(PlaitError, match="adversarial: features is -1"):
        WaveAdversarialConfig(features=-1)
    with pytest.raises(PlaitError, match="adversarial: loss is 'wgan', must be 'hinge' or 'non_saturating' or 'least"):
        WaveAdversarialConfig(loss="wgan")
