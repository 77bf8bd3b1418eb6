"""Adversarial training of a tokenizer's decoder: losses, LeCam, the adaptive weight, and when each begins to count.

A discriminator that joins late and at full weight ruins reconstructions. So it learns alone from step
``start_discriminator`` on, and its judgement reaches the decoder from ``start_generator`` on, growing over ``ramp``
steps. All losses take logits of any shape and return a scalar.
"""

from abc import abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from plait.errors import PlaitError
from plait.train.discriminator import DiscriminatorConfig


def hinge_discriminator(real: Tensor, fake: Tensor) -> Tensor:
    """Half of ``mean max(0, 1 − real) + mean max(0, 1 + fake)``, in ``[0, ∞)`` (arXiv 1705.02894)."""
    return 0.5 * (F.relu(1 - real).mean() + F.relu(1 + fake).mean())


def hinge_generator(fake: Tensor) -> Tensor:
    """``−mean fake``, without bounds."""
    return -fake.mean()


def non_saturating_discriminator(real: Tensor, fake: Tensor) -> Tensor:
    """Half of ``−mean log σ(real) − mean log(1 − σ(fake))``, in ``[0, ∞)`` (arXiv 1406.2661)."""
    return 0.5 * (F.softplus(-real).mean() + F.softplus(fake).mean())


def non_saturating_generator(fake: Tensor) -> Tensor:
    """``−mean log σ(fake)``, in ``[0, ∞)``."""
    return F.softplus(-fake).mean()


def least_squares_discriminator(real: Tensor, fake: Tensor) -> Tensor:
    """``mean (1 − real)² + mean fake²``, in ``[0, ∞)`` (arXiv 1611.04076)."""
    return (1 - real).square().mean() + fake.square().mean()


def least_squares_generator(fake: Tensor) -> Tensor:
    """``mean (1 − fake)²``, in ``[0, ∞)``."""
    return (1 - fake).square().mean()


LOSSES = {
    "hinge": (hinge_discriminator, hinge_generator),
    "non_saturating": (non_saturating_discriminator, non_saturating_generator),
    "least_squares": (least_squares_discriminator, least_squares_generator),
}


class LeCam(nn.Module):
    """LeCam regulariser (arXiv 2104.03310): holds logits near the running mean of the other side's.

    ``mean max(0, real − running fake)² + mean max(0, running real − fake)²``, one-sided as in the authors' code. The
    running means are taken over all processes and are equal on all of them; they are part of the state dict. Until
    ``1 / (1 − decay)`` updates have been made they are plain means of all so far.

    Args:
        decay: of the running means.
    """

    real: Tensor
    fake: Tensor
    updates: Tensor

    def __init__(self, decay: float = 0.999) -> None:
        super().__init__()
        self.decay = decay
        for name in ("real", "fake"):
            self.register_buffer(name, torch.zeros(()))
        self.register_buffer("updates", torch.zeros((), dtype=torch.long))

    def forward(self, real: Tensor, fake: Tensor) -> Tensor:
        """Update the running means with these logits (any shape), then regularise them: a scalar in ``[0, ∞)``."""
        real, fake = real.float(), fake.float()
        means = _over_processes(torch.stack([real.detach().mean(), fake.detach().mean()]))
        self.updates += 1
        share = (1 / self.updates).clamp_min(1 - self.decay)
        for running, now in zip((self.real, self.fake), means, strict=True):
            running.lerp_(now, share)
        return F.relu(real - self.fake).square().mean() + F.relu(self.real - fake).square().mean()


def adaptive_weight(
    reconstruction_loss: Tensor, generator_loss: Tensor, last_layer: Tensor, most: float = 1e4
) -> Tensor:
    """The weight that gives the adversarial loss as much pull on the decoder's last layer as reconstruction has.

    The ratio of the gradients' norms there (VQGAN, arXiv 2012.09841). Under data parallelism the gradients are averaged
    over processes before their norms are taken, so every process gets the weight of the whole batch: all of them must
    call this together.

    Args:
        reconstruction_loss: scalar, perceptual terms included.
        generator_loss: scalar, unweighted.
        last_layer: the decoder's last weight, which both losses depend on.
        most: upper limit of the weight.

    Returns:
        a detached float32 scalar in ``[0, most]``. Both graphs stay whole for the backward pass.
    """
    gradients = torch.stack(
        [
            torch.autograd.grad(loss, last_layer, retain_graph=True)[0].float().flatten()
            for loss in (reconstruction_loss, generator_loss)
        ]
    )
    reconstruction, generator = torch.linalg.vector_norm(_over_processes(gradients), dim=1)
    return (reconstruction / (generator + 1e-4)).clamp(0, most).detach()


@dataclass(frozen=True)
class AdversarialSchedule:
    """How a decoder is trained against a discriminator, whatever they are networks of.

    Attributes:
        weight: of the adversarial loss once the ramp is over; 0 turns adversarial training off.
        loss: "hinge", "non_saturating" or "least_squares".
        start_discriminator: first step that trains the discriminator.
        start_generator: first step in which the decoder gets the adversarial loss.
        ramp: steps over which its weight grows linearly from there.
    """

    weight: float = 0.0
    loss: str = "hinge"
    start_discriminator: int = 1
    start_generator: int = 1
    ramp: int = 0

    def __post_init__(self) -> None:
        if self.loss not in LOSSES:
            raise PlaitError(f"adversarial: loss is {self.loss!r}, must be {' or '.join(map(repr, LOSSES))}")
        self._check_weights("weight")
        for name, least in (("start_discriminator", 0), ("start_generator", 0), ("ramp", 0)):
            if type(number := getattr(self, name)) is not int or number < least:
                raise PlaitError(f"adversarial: {name} is {number!r}, must be a whole number of at least {least}")
        if self.start_generator < self.start_discriminator:
            raise PlaitError(
                f"adversarial: start_generator ({self.start_generator}) is before start_discriminator "
                f"({self.start_discriminator}); a decoder cannot learn from an untrained discriminator"
            )

    def _check_weights(self, *names: str) -> None:
        for name in names:
            if not 0 <= getattr(self, name) < float("inf"):
                raise PlaitError(f"adversarial: {name} is {getattr(self, name)!r}, must be a number of at least 0")


@dataclass(frozen=True)
class AdversarialConfig(AdversarialSchedule):
    """Adversarial training of pictures and clips.

    Attributes:
        adaptive: multiply ``weight`` by `adaptive_weight` in every step.
        lecam: weight of the `LeCam` regulariser in the discriminator's loss.
        discriminator: the network.
    """

    adaptive: bool = False
    lecam: float = 0.0
    discriminator: DiscriminatorConfig = field(default_factory=DiscriminatorConfig)

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check_weights("lecam")


class ScheduledDiscriminator:
    """A discriminator and when it counts: what `Adversary` and sound's `WaveAdversary` share.

    Args:
        discriminator: the network, bare or in DistributedDataParallel.
        config: losses and schedule.
    """

    def __init__(self, discriminator: nn.Module, config: AdversarialSchedule) -> None:
        self.schedule = config
        self.discriminator = discriminator
        bare = discriminator.module if isinstance(discriminator, DistributedDataParallel) else discriminator
        self.network: nn.Module = bare

    def trains(self, step: int) -> bool:
        """Whether the discriminator is trained in this step."""
        return self.schedule.weight > 0 and step >= self.schedule.start_discriminator

    def weight(self, step: int) -> float:
        """What the adversarial loss is multiplied by in this step, before any `adaptive_weight`."""
        since = step - self.schedule.start_generator + 1
        return self.schedule.weight * min(1.0, max(0, since) / max(1, self.schedule.ramp))

    @abstractmethod
    def discriminator_loss(self, real: Tensor, decoded: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """The discriminator's loss; leaves no gradients in the decoder.

        Args:
            real: what the decoder should have made.
            decoded: what it made.

        Returns:
            the scalar loss, and what to log.
        """

    @contextmanager
    def frozen(self) -> Iterator[nn.Module]:
        """The bare network, which takes no gradients in here.

        Not in DistributedDataParallel: no gradient is reduced, and it would wait for those of its parameters.
        """
        self.network.requires_grad_(False)
        try:
            yield self.network
        finally:
            self.network.requires_grad_(True)

    def state_dict(self) -> dict[str, Any]:
        """Weights of the bare network."""
        return {"discriminator": self.network.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take back what `state_dict` gave."""
        self.network.load_state_dict(state["discriminator"])


class Adversary(ScheduledDiscriminator):
    """A discriminator with its losses and its schedule.

    One step of training::

        total = reconstruction
        if adversary.weight(step):
            term, figures = adversary.generator_loss(decoded, step, reconstruction, decoder.last.weight)
            total = total + term
        total.backward()
        ...
        if adversary.trains(step):
            loss, figures = adversary.discriminator_loss(pixels, decoded)
            loss.backward()

    Args:
        discriminator: the network, bare or in DistributedDataParallel.
        config: losses and schedule.
    """

    def __init__(self, discriminator: nn.Module, config: AdversarialConfig) -> None:
        super().__init__(discriminator, config)
        self.config = config
        self.lecam = LeCam().to(next(self.network.parameters()).device)

    def generator_loss(
        self, decoded: Tensor, step: int, reconstruction_loss: Tensor, last_layer: Tensor
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The weighted adversarial term for the decoder; leaves no gradients in the discriminator.

        Args:
            decoded: what the decoder made, ``[B, 3, H, W]`` or ``[B, 3, T, H, W]``.
            step: for the schedule.
            reconstruction_loss: scalar; only an adaptive weight needs it.
            last_layer: the decoder's last weight; only an adaptive weight needs it.

        Returns:
            the scalar term and what to log: ``generator_loss`` before and ``generator_weight`` of the weighting.
        """
        with self.frozen() as network:
            loss = LOSSES[self.config.loss][1](network(decoded).float())
        weight = torch.as_tensor(self.weight(step), device=loss.device)
        if self.config.adaptive:
            weight = weight * adaptive_weight(reconstruction_loss, loss, last_layer)
        return weight * loss, {"generator_loss": loss.detach(), "generator_weight": weight}

    def discriminator_loss(self, real: Tensor, decoded: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """The discriminator's loss; leaves no gradients in the decoder.

        Args:
            real: pictures or clips, ``[B, 3, H, W]`` or ``[B, 3, T, H, W]``.
            decoded: what the decoder made of them.

        Returns:
            the scalar loss, LeCam included, and what to log: ``discriminator_loss`` without LeCam, and the means of
            ``real_logits`` and ``fake_logits``.
        """
        # One pass for both halves: DistributedDataParallel expects one forward for each backward.
        logits = self.discriminator(torch.cat([real.detach(), decoded.detach().to(real.dtype)]))
        is_real, fake = logits.float().chunk(2)
        loss = plain = LOSSES[self.config.loss][0](is_real, fake)
        if self.config.lecam:
            loss = loss + self.config.lecam * self.lecam(is_real, fake)
        means = {"real_logits": is_real.detach().mean(), "fake_logits": fake.detach().mean()}
        return loss, {"discriminator_loss": plain.detach(), **means}

    def state_dict(self) -> dict[str, Any]:
        """Weights of the bare network and LeCam's running means."""
        return super().state_dict() | {"lecam": self.lecam.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take back what `state_dict` gave."""
        super().load_state_dict(state)
        self.lecam.load_state_dict(state["lecam"])


@torch.no_grad()
def _over_processes(values: Tensor) -> Tensor:
    """The mean over all processes, each of which has as many pictures."""
    if torch.distributed.is_initialized() and torch.distributed.get_world_size() > 1:
        torch.distributed.all_reduce(values)
        values /= torch.distributed.get_world_size()
    return values
