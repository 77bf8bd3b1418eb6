"""Adversarial training of an audio decoder: several discriminators at once, and feature matching."""

from collections.abc import Iterable
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from plait.train.adversarial import LOSSES, AdversarialSchedule, ScheduledDiscriminator
from plait.train.wave_discriminators import Judgement, WaveDiscriminatorConfig


@dataclass(frozen=True)
class WaveAdversarialConfig(AdversarialSchedule):
    """Adversarial training of sound.

    Attributes:
        features: weight of feature matching; it grows along the same ramp.
        discriminator: the networks.
    """

    features: float = 2.0
    discriminator: WaveDiscriminatorConfig = field(default_factory=WaveDiscriminatorConfig)

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check_weights("features")


class WaveAdversary(ScheduledDiscriminator):
    """`plait.train.wave_discriminators` with their losses, which are summed over the networks as HiFi-GAN and DAC do.

    Args:
        discriminator: the networks, bare or in DistributedDataParallel.
        config: losses and schedule.
    """

    def __init__(self, discriminator: nn.Module, config: WaveAdversarialConfig) -> None:
        super().__init__(discriminator, config)
        self.config = config

    def generator_losses(self, decoded: Tensor, real: Tensor) -> dict[str, Tensor]:
        """What the decoder is judged by; leaves no gradients in the discriminators.

        Args:
            decoded: what the decoder made, ``[B, C, N]``.
            real: what it should have made.

        Returns:
            scalars without their weights: ``adversarial``, and ``features`` unless its weight is 0.
        """
        with self.frozen() as network:
            judged: list[Judgement] = network(decoded)
            losses = {"adversarial": _sum(LOSSES[self.config.loss][1](j.logits.float()) for j in judged)}
            if self.config.features:
                with torch.no_grad():
                    wanted: list[Judgement] = network(real)
                losses["features"] = feature_matching(judged, wanted)
        return losses

    def weights(self, step: int) -> dict[str, float]:
        """The weights of `generator_losses` in a step."""
        weight = self.weight(step)
        return {"adversarial": weight, "features": self.config.features * weight / self.config.weight}

    def discriminator_loss(self, real: Tensor, decoded: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """The discriminators' loss; leaves no gradients in the decoder.

        Args:
            real: sound, ``[B, C, N]``.
            decoded: what the decoder made of it.

        Returns:
            the scalar loss, and what to log: it as ``discriminator_loss``, and the means of ``real_logits`` and
            ``fake_logits``.
        """
        # One pass for both halves: DistributedDataParallel expects one forward for each backward.
        judged: list[Judgement] = self.discriminator(torch.cat([real.detach(), decoded.detach().to(real.dtype)]))
        halves = [judgement.logits.float().chunk(2) for judgement in judged]
        loss = _sum(LOSSES[self.config.loss][0](is_real, fake) for is_real, fake in halves)
        means = [torch.stack([half[side].detach().mean() for half in halves]).mean() for side in (0, 1)]
        return loss, {"discriminator_loss": loss.detach(), "real_logits": means[0], "fake_logits": means[1]}


def feature_matching(judged: list[Judgement], wanted: list[Judgement]) -> Tensor:
    """Mean absolute difference of each activation, summed over them: scalar in ``[0, ∞)`` (arXiv 2010.05646, 2.3)."""
    return _sum(
        F.l1_loss(ours.float(), theirs.float())
        for a, b in zip(judged, wanted, strict=True)
        for ours, theirs in zip(a.features, b.features, strict=True)
    )


def _sum(terms: Iterable[Tensor]) -> Tensor:
    return torch.stack(list(terms)).sum()
