"""Quantizers: latents → codes → latents, finite scalar, vector, binary and residual, behind one interface.

Three rules hold for all of them. Codes are computed in float32, whatever the autocast or the module's dtype. Look-up
and codes → latents are our own few lines over tensors that we name, so that stored codes keep their meaning whatever
the version of any library. What only training needs (moving averages, a pool of vectors to start from) is no part of
the state dict and so of no saved tokenizer; `Quantizer.training_state` hands it to a checkpoint.

vector-quantize-pytorch serves the training passes of the finite scalar and vector quantizers: it holds no state of its
own, since before each call it is given our tensors to work on. It is imported at the first training pass. Written here
are the parts in which it would be wrong or too large: k-means and the replacement of dead codes (which must draw the
same vectors on every rank, and start from more than one batch), quantizer dropout per sample, and the entropy of binary
codes (its average over ranks drops the collective's result, and its memory is tokens × codes).
"""

import math
from abc import abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from plait.errors import PlaitError
from plait.tokenizers.averages import DISTANCES, MovingAverages, mean_over_ranks, nearest, straight_through

KINDS = ("fsq", "vq_ema", "vq_grad", "lfq", "bsq", "simvq", "rvq")

# The joint distribution of a batch over all codes must fit into memory for its entropy.
_ENTROPY_CODES = 2**24


@dataclass(frozen=True)
class QuantizerConfig:
    """A quantizer and how it trains.

    Attributes:
        kind: "fsq", "vq_ema", "vq_grad", "lfq", "bsq", "simvq", or "rvq" (residual "vq_ema").
        levels: fsq: values per latent channel, at least 3 each.
        codebook_size: codes per codebook, for all kinds but fsq, whose levels imply it; a power of two for lfq, bsq.
        dim: latent channels, for the kinds with a codebook of vectors; implied for fsq, lfq and bsq.
        codebooks: rvq: how many, at least 2.
        decay: vq_ema, rvq: of the moving averages, per training pass.
        dead_code: vq_ema, rvq: a code used less than this share of the mean use is replaced; 0 replaces none.
        commitment: weight of the pull of latents towards their codes; not for fsq.
        entropy: fsq, lfq, bsq: weight of the entropy term. Binary codes collapse without one; 0.1 is usual.
        entropy_gamma: weight of the batch's entropy against the samples' within that term.
        entropy_temperature: of the soft assignment, in squared units of the latents.
        dropout: rvq: probability that a sample of the batch keeps only its first 1, 2, … codebooks, drawn evenly.

    Raises:
        PlaitError: a value that cannot be, or a field that this kind does not have.
    """

    kind: str = "fsq"
    levels: tuple[int, ...] = (8, 5, 5, 5)
    codebook_size: int = 0
    dim: int = 0
    codebooks: int = 1
    decay: float = 0.99
    dead_code: float = 0.1
    commitment: float = 0.25
    entropy: float = 0.0
    entropy_gamma: float = 1.0
    entropy_temperature: float = 0.01
    dropout: float = 0.0

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise PlaitError(f"quantizer: kind is {self.kind!r}, must be one of {', '.join(KINDS)}")
        for name, least, most in (
            ("decay", 0, 1), ("dead_code", 0, 1), ("commitment", 0, math.inf), ("entropy", 0, math.inf),
            ("entropy_gamma", 0, math.inf), ("entropy_temperature", 0, math.inf), ("dropout", 0, 1),
        ):  # fmt: skip
            value = getattr(self, name)
            if type(value) not in (int, float) or not least <= value <= most or math.isinf(value):
                raise PlaitError(f"quantizer: {name} is {value!r}, must be a number from {least} to {most}")
        if not self.entropy_temperature:
            raise PlaitError("quantizer: entropy_temperature is 0, must be above 0")
        if self.kind == "fsq":
            object.__setattr__(self, "levels", _checked_levels(self.levels))
        self._check_sizes()
        for name, kinds in (("entropy", ("fsq", "lfq", "bsq")), ("dropout", ("rvq",))):
            if getattr(self, name) and self.kind not in kinds:
                raise PlaitError(f"quantizer: {name} is {getattr(self, name)}, but only {', '.join(kinds)} has it")

    def _check_sizes(self) -> None:
        binary = self.kind in ("lfq", "bsq")
        size = self.codebook_size
        if self.kind != "fsq" and (type(size) is not int or not 2 <= size < 2**31):
            raise PlaitError(f"quantizer: codebook_size is {size!r}, must be a whole number of 2 to 2³¹ − 1")
        if binary and size & (size - 1):
            raise PlaitError(f"quantizer: codebook_size is {size}, must be a power of two for {self.kind}")
        if self.kind == "fsq":
            size = math.prod(self.levels)
            if self.codebook_size not in (0, size):
                raise PlaitError(f"quantizer: codebook_size is {self.codebook_size!r}, but the levels make it {size}")
        if binary or self.kind == "fsq":
            dim = size.bit_length() - 1 if binary else len(self.levels)
            if self.dim not in (0, dim):
                raise PlaitError(f"quantizer: dim is {self.dim!r}, but {self.kind} of {size} codes makes it {dim}")
        elif type(self.dim) is not int or self.dim < 1:
            raise PlaitError(f"quantizer: dim is {self.dim!r}, must be a whole number of at least 1")
        if type(self.codebooks) is not int or (self.codebooks < 2 if self.kind == "rvq" else self.codebooks != 1):
            must = "a whole number of at least 2 (one is vq_ema)" if self.kind == "rvq" else f"1 for {self.kind}"
            raise PlaitError(f"quantizer: codebooks is {self.codebooks!r}, must be {must}")
        if self.entropy and size > _ENTROPY_CODES:
            raise PlaitError(f"quantizer: entropy is {self.entropy}, must be 0 for {size} codes; it takes up to 2²⁴")


def _checked_levels(levels: Sequence[int]) -> tuple[int, ...]:
    if not isinstance(levels, list | tuple) or not levels or any(type(n) is not int or n < 3 for n in levels):
        raise PlaitError(f"quantizer: levels is {levels!r}, must list whole numbers of at least 3")
    if math.prod(levels) >= 2**31:
        # The library numbers codes in int32.
        raise PlaitError(f"quantizer: levels {list(levels)} give 2³¹ codes or more; use fewer or smaller levels")
    return tuple(levels)


class Quantized(NamedTuple):
    """What a training pass gives.

    Attributes:
        latents: float32 ``[..., dim]``, with gradients to the latents that went in.
        codes: int64 ``[...]``, or ``[..., q]`` of a residual quantizer.
        losses: weighted scalars by name, to be added to the loss; none in eval mode.
    """

    latents: Tensor
    codes: Tensor
    losses: dict[str, Tensor]


class Quantizer(nn.Module):
    """Latents ``[..., dim]`` to codes and back.

    Attributes:
        dim: channels of the latents.
        codebook_sizes: the number of codes of each codebook.
        SPEC_VERSION: raised when a change moves codes or latents; part of every fingerprint.
    """

    SPEC_VERSION: ClassVar[int] = 1
    dim: int
    codebook_sizes: list[int]
    _averages: "MovingAverages | None" = None

    @property
    def codebook_size(self) -> int:
        """Codes of one codebook."""
        return self.codebook_sizes[0]

    @abstractmethod
    def forward(self, z: Tensor) -> Quantized:
        """Quantize for training.

        Args:
            z: latents ``[..., dim]``.
        """

    @abstractmethod
    def codes(self, z: Tensor) -> Tensor:
        """Latents ``[..., dim]`` → codes int64 ``[...]``, or ``[..., q]`` of a residual quantizer."""

    @abstractmethod
    def latents(self, codes: Tensor) -> Tensor:
        """Codes → latents float32 ``[..., dim]``."""

    @abstractmethod
    def margin(self, z: Tensor) -> Tensor:
        """How far the decision for each of ``[..., dim]`` is from flipping, float32 ``[...]``, at least 0."""

    def training_state(self) -> dict[str, Tensor]:
        """What a checkpoint needs besides the state dict to go on training; the same on every rank."""
        return {} if self._averages is None else self._averages.state()

    def load_training_state(self, state: dict[str, Tensor]) -> None:
        """Go on from a `training_state`; to be called after `load_state_dict`.

        Raises:
            PlaitError: it is of another kind of quantizer.
        """
        if self._averages is not None:
            self._averages.load(state)
        elif state:
            raise PlaitError(f"quantizer: the training state has {sorted(state)[0]!r}, which this kind does not keep")

    def _load_from_state_dict(self, state_dict: dict[str, Tensor], prefix: str, *args: Any) -> None:
        super()._load_from_state_dict(state_dict, prefix, *args)
        if self._averages is not None and any(prefix + name in state_dict for name in self._buffers):
            self._averages.restart()

    def _apply(self, fn: Any, recurse: bool = True) -> "Quantizer":
        # Buffers follow the device but not the dtype: averages that move by 1 % per step stand still in bfloat16.
        buffers = {id(buffer) for buffer in self._buffers.values()}

        def keep_dtype(tensor: Tensor) -> Tensor:
            moved: Tensor = fn(tensor)
            return tensor.to(moved.device) if id(tensor) in buffers and moved.dtype != tensor.dtype else moved

        return super()._apply(keep_dtype, recurse)


def build_quantizer(config: QuantizerConfig) -> Quantizer:
    """The quantizer that a configuration describes."""
    entropy = Entropy(config.entropy, config.entropy_gamma, config.entropy_temperature)
    match config.kind:
        case "fsq":
            return FiniteScalarQuantizer(config.levels, entropy)
        case "lfq" | "bsq":
            return BinaryQuantizer(config.codebook_size, config.kind == "bsq", config.commitment, entropy)
        case "vq_grad":
            return GradientVectorQuantizer(config.codebook_size, config.dim, config.commitment)
        case "simvq":
            return SimVectorQuantizer(config.codebook_size, config.dim, config.commitment)
        case "rvq":
            return ResidualQuantizer(config)
        case _:
            return VectorQuantizer(config)


# Scalars


@dataclass(frozen=True)
class Entropy:
    """The entropy term of quantizers whose channels are rounded one by one: confident samples, an evenly used codebook.

    Channel i of latent n is assigned softly to that channel's values v: ``p_ni(v) = softmax_v(−(x_ni − v)² / τ)``. A
    code is one value per channel, so that ``P_n(c) = Π_i p_ni(c_i)`` and

        ``loss = weight · (mean_n H(P_n) − γ · H(mean_n P_n))``,  ``H(P_n) = Σ_i H(p_ni)``.

    Both are exact over all codes. ``mean_n P_n`` takes tokens × √codes numbers instead of tokens × codes: with the
    channels split in two groups a and b it is the matrix ``P_aᵀ P_b / N``. Under data parallelism it is the mean over
    all ranks, with the gradient of each rank's own part, which is right where gradients are averaged.

    Papers: Yu et al., "Language Model Beats Diffusion" (MAGVIT-v2), 2023 (arXiv 2310.05737), for binary codes; Tang et
    al., "VidTok", 2024 (arXiv 2412.13061), for finite scalar ones.

    Attributes:
        weight: of the term; 0 turns it off.
        gamma: γ.
        temperature: τ.
    """

    weight: float = 0.0
    gamma: float = 1.0
    temperature: float = 0.01

    def losses(self, x: Tensor, values: list[Tensor]) -> dict[str, Tensor]:
        """The weighted term under the name "entropy", or nothing.

        Args:
            x: continuous latents ``[..., d]``, float32, in the units of the values.
            values: what each of the d channels may become, ``[levels]`` each.
        """
        if not self.weight:
            return {}
        x = x.reshape(-1, x.shape[-1])
        logs = [(-((x[:, i, None] - v) ** 2) / self.temperature).log_softmax(-1) for i, v in enumerate(values)]
        per_sample = -torch.stack([(log.exp() * log).sum(-1).mean() for log in logs]).sum()
        sizes = [len(v) for v in values]
        split = min(range(len(sizes)), key=lambda i: math.prod(sizes[:i]) + math.prod(sizes[i:]))
        marginal = _joint(logs[:split], x).T @ _joint(logs[split:], x) / len(x)
        marginal = marginal + (mean_over_ranks(marginal.detach()) - marginal.detach())
        batch = -(marginal * marginal.clamp_min(1e-20).log()).sum()
        return {"entropy": self.weight * (per_sample - self.gamma * batch)}


def _joint(logs: list[Tensor], like: Tensor) -> Tensor:
    """Log-probabilities ``[N, L_i]`` of independent channels → joint probabilities ``[N, Π L_i]``."""
    joint = like.new_zeros(len(like), 1)
    for log in logs:
        joint = (joint[:, :, None] + log[:, None, :]).flatten(1)
    return joint.exp()


class FiniteScalarQuantizer(Quantizer):
    """Each of ``d`` latent channels is squashed and rounded to ``levels[i]`` values; a code numbers the combination.

    It has no parameters. Paper: Mentzer et al., "Finite Scalar Quantization: VQ-VAE Made Simple", 2023 (arXiv
    2309.15505).

    Args:
        levels: values per channel, each at least 3; the codebook has their product of codes.
        entropy: the optional entropy term of training.

    Raises:
        PlaitError: a level below 3, or more codes than int32 can number, which is what the library uses.
    """

    _EPS = 1e-3

    def __init__(self, levels: tuple[int, ...], entropy: Entropy | None = None) -> None:
        super().__init__()
        self.levels = _checked_levels(levels)
        self.dim = len(self.levels)
        self.codebook_sizes = [math.prod(self.levels)]
        self.entropy = entropy or Entropy()
        # Never on the meta device: no state dict would fill them.
        self.register_buffer("_count", torch.tensor(self.levels, device="cpu"), persistent=False)
        place = torch.tensor([math.prod(self.levels[:i]) for i in range(self.dim)], device="cpu")
        self.register_buffer("_place", place, persistent=False)
        self._library: Any = None

    _count: Tensor
    _place: Tensor

    def forward(self, z: Tensor) -> Quantized:
        """Quantize for training, with straight-through gradients; the latents are in ``[-1, 1]``."""
        if self._library is None:
            from vector_quantize_pytorch import FSQ

            self.__dict__["_library"] = FSQ(levels=list(self.levels))  # no submodule
        self._library.to(z.device)
        with _exact_float32(z.device):
            quantized, indices = self._library(z.float().reshape(1, -1, self.dim))
            losses = {}
            if self.training and self.entropy.weight:
                half_width = self._count // 2
                values = [torch.arange(n, device=z.device) for n in self.levels]
                values = [v.sub(n // 2).div(n // 2) for v, n in zip(values, self.levels, strict=True)]
                losses = self.entropy.losses(self._bounded(z) / half_width, values)
        return Quantized(quantized.reshape(z.shape), indices.reshape(z.shape[:-1]).long(), losses)

    def _bounded(self, z: Tensor) -> Tensor:
        half = (self._count.float() - 1) * (1 + self._EPS) / 2
        offset = (self._count % 2 == 0) * 0.5
        return torch.tanh(z.float() + torch.atanh(offset / half)) * half - offset

    def codes(self, z: Tensor) -> Tensor:
        """Latents ``[..., d]`` → codes int64 ``[...]``, computed in float32 under any autocast."""
        with _exact_float32(z.device):
            digits = self._bounded(z).round().long() + self._count // 2
            return (digits * self._place).sum(-1)

    def latents(self, codes: Tensor) -> Tensor:
        """Codes int ``[...]`` → latents float32 ``[..., d]`` in ``[-1, 1]``."""
        digits = codes.unsqueeze(-1) // self._place % self._count
        half_width = (self._count // 2).float()
        return (digits - half_width) / half_width

    def margin(self, z: Tensor) -> Tensor:
        """Distance of the squashed latents ``[..., d]`` to the nearest rounding boundary, where levels are 1 apart."""
        with _exact_float32(z.device):
            bounded = self._bounded(z)
            return (0.5 - (bounded - bounded.round()).abs()).amin(-1)


class BinaryQuantizer(Quantizer):
    """Each channel keeps its sign only; the first channel is a code's highest bit.

    Latents are ±1 (lookup-free quantization: Yu et al., 2023, arXiv 2310.05737), or ±1/√d on the unit sphere that the
    latents are projected to before (binary spherical quantization: Zhao et al., 2024, arXiv 2406.07548).

    Args:
        codebook_size: a power of two; its logarithm is the number of channels.
        spherical: project to the unit sphere.
        commitment: weight of the pull towards the codes.
        entropy: the entropy term.
    """

    def __init__(self, codebook_size: int, spherical: bool, commitment: float, entropy: Entropy) -> None:
        super().__init__()
        self.dim = codebook_size.bit_length() - 1
        self.codebook_sizes = [codebook_size]
        self.spherical, self.commitment, self.entropy = spherical, commitment, entropy
        self.scale = self.dim**-0.5 if spherical else 1.0
        # Never on the meta device: no state dict would fill it.
        self.register_buffer("_place", 2 ** torch.arange(self.dim - 1, -1, -1, device="cpu"), persistent=False)

    _place: Tensor

    def _input(self, z: Tensor) -> Tensor:
        return F.normalize(z.float(), dim=-1) if self.spherical else z.float()

    def forward(self, z: Tensor) -> Quantized:
        """Quantize for training, with straight-through gradients."""
        with _exact_float32(z.device):
            x = self._input(z)
            codes = self.codes(z)
            quantized = self.latents(codes)
            values = [x.new_tensor([-self.scale, self.scale])] * self.dim
            losses = {}
            if self.training:
                losses = {"commitment": self.commitment * F.mse_loss(x, quantized)} | self.entropy.losses(x, values)
        return Quantized(straight_through(x, quantized), codes, losses)

    def codes(self, z: Tensor) -> Tensor:
        """Latents ``[..., d]`` → codes int64 ``[...]``; zero counts as negative."""
        # Projecting to the sphere moves no sign.
        return ((z > 0) * self._place).sum(-1)

    def latents(self, codes: Tensor) -> Tensor:
        """Codes int ``[...]`` → latents float32 ``[..., d]``, plus or minus `scale`."""
        return ((codes.unsqueeze(-1) & self._place) != 0) * (2 * self.scale) - self.scale

    def margin(self, z: Tensor) -> Tensor:
        """Distance of the (projected) latents ``[..., d]`` to the nearest change of sign."""
        with _exact_float32(z.device):
            return self._input(z).abs().amin(-1)


# Vectors


class NearestCodebook(Quantizer):
    """A codebook of vectors that stays as it is; a code is the number of the nearest one. It needs no library.

    Args:
        codebook_size: K.
        dim: channels of a vector.
        normalized: latents and codebook are projected to the unit sphere, for look-up and for decoding.
    """

    codebook: Tensor

    def __init__(self, codebook_size: int, dim: int, normalized: bool = False) -> None:
        super().__init__()
        self.dim = dim
        self.codebook_sizes = [codebook_size]
        self.normalized = normalized
        self.register_buffer(
            "codebook", torch.empty(codebook_size, dim).uniform_(-1 / codebook_size, 1 / codebook_size)
        )

    def _input(self, z: Tensor) -> Tensor:
        return F.normalize(z.float(), dim=-1) if self.normalized else z.float()

    def _table(self) -> Tensor:
        """The vectors that codes stand for, float32 ``[K, dim]``."""
        return self._input(self.codebook)

    def forward(self, z: Tensor) -> Quantized:
        """Quantize with straight-through gradients and no losses."""
        codes = self.codes(z)
        return Quantized(straight_through(self._input(z), self.latents(codes)), codes, {})

    @torch.no_grad()
    def codes(self, z: Tensor) -> Tensor:
        """Latents ``[..., dim]`` → codes int64 ``[...]``; among equally near vectors, the first."""
        with _exact_float32(z.device):
            return nearest(self._input(z).reshape(-1, self.dim), self._table()).reshape(z.shape[:-1])

    def latents(self, codes: Tensor) -> Tensor:
        """Codes int ``[...]`` → latents float32 ``[..., dim]``."""
        with _exact_float32(codes.device):
            return F.embedding(codes, self._table())

    @torch.no_grad()
    def margin(self, z: Tensor) -> Tensor:
        """The second smallest distance to a vector of the codebook minus the smallest."""
        with _exact_float32(z.device):
            return _nearest_margin(self._input(z).reshape(-1, self.dim), self._table()).reshape(z.shape[:-1])


class VectorQuantizer(NearestCodebook):
    """A codebook that follows the latents by moving averages.

    The state dict has one tensor, ``codebook``. The averages start at the first training pass, see `MovingAverages`;
    until k-means has seen enough vectors, training passes leave the latents as they are. Each training pass moves the
    averages once: the quantizer must be outside of regions whose activations are recomputed, and gradient accumulation
    moves them once per part.

    Papers: van den Oord et al., "Neural Discrete Representation Learning", 2017 (arXiv 1711.00937); gradients: Fifty et
    al., "Restructuring Vector Quantization with the Rotation Trick", 2024 (arXiv 2410.06424).
    """

    def __init__(self, config: QuantizerConfig) -> None:
        super().__init__(config.codebook_size, config.dim)
        self.commitment = config.commitment
        self._averages: MovingAverages = MovingAverages(config.decay, config.dead_code)

    def forward(self, z: Tensor) -> Quantized:
        """Quantize, and in training mode move the averages.

        Raises:
            PlaitError: it runs a second time, within the backward pass.
        """
        if not self.training:
            return super().forward(z)
        x = z.float().reshape(-1, self.dim)
        with _exact_float32(z.device):
            codebooks = self.codebook[None]
            if not self._averages.ready(codebooks, x):
                return Quantized(z.float(), self.codes(z), {"commitment": x.new_zeros(())})
            quantized, codes = self._averages.step(codebooks, 0, x)
        values = quantized.detach()
        losses = {"commitment": self.commitment * F.mse_loss(x, values)}
        return Quantized(quantized.reshape(z.shape), codes.reshape(z.shape[:-1]), losses)


def _nearest_margin(z: Tensor, table: Tensor) -> Tensor:
    squares = table.square().sum(-1)
    margins = []
    for part in z.split(max(1, DISTANCES // len(table))):
        two = torch.addmm(squares, part, table.T, alpha=-2).topk(min(2, len(table)), largest=False).indices
        # Again from the differences, as |c|² − 2 z·c cancels.
        distances = (part[:, None] - table[two]).norm(dim=-1)
        margins.append(distances.amax(-1) - distances.amin(-1))
    return torch.cat(margins)


class GradientVectorQuantizer(NearestCodebook):
    """A codebook that learns by gradient, on the unit sphere (Yu et al., "Vector-quantized Image Modeling with Improved
    VQGAN", 2021, arXiv 2110.04627, with 8 or fewer channels).

    The state dict has one tensor, ``codebook``, a parameter that need not be normalised. The loss "codebook" is
    ``|sg(z) − c|² + commitment · |z − sg(c)|²``, averaged over tokens and channels.

    Args:
        codebook_size: K.
        dim: channels of a vector.
        commitment: weight of the pull of latents towards their codes.
    """

    def __init__(self, codebook_size: int, dim: int, commitment: float, normalized: bool = True) -> None:
        super().__init__(codebook_size, dim, normalized)
        self.commitment = commitment
        self.codebook = nn.Parameter(torch.randn(codebook_size, dim))
        self._library: Any = None

    def forward(self, z: Tensor) -> Quantized:
        """Quantize, with the rotation trick's gradients; in training mode with the loss."""
        if not self.training:
            return super().forward(z)
        if self._library is None:
            from vector_quantize_pytorch import SimVQ

            # It draws a codebook, which is never used: a resumed run must go on with the same random numbers.
            with torch.random.fork_rng(devices=[]):
                self.__dict__["_library"] = SimVQ(  # no submodule
                    self.dim,
                    self.codebook_size,
                    codebook_transform=nn.Identity(),
                    input_to_quantize_commit_loss_weight=self.commitment,
                )
        with _exact_float32(z.device):
            table = self._table()
            self._library.frozen_codebook = table
            carrier, codes, loss = self._library(self._input(z).reshape(1, -1, self.dim))
            self._library.frozen_codebook = None  # a graph must not outlive its step, nor be in a deep copy
            latents = straight_through(carrier[0], F.embedding(codes[0], table))
        return Quantized(latents.reshape(z.shape), codes.reshape(z.shape[:-1]), {"codebook": loss})


class SimVectorQuantizer(GradientVectorQuantizer):
    """A frozen Gaussian codebook under one learned linear map, which moves all codes at once and so leaves none behind.

    The state dict has ``codebook`` (frozen) and ``transform.weight``. Paper: Zhu et al., "Addressing Representation
    Collapse in Vector Quantized Models with One Linear Layer", 2024 (arXiv 2411.02038).
    """

    def __init__(self, codebook_size: int, dim: int, commitment: float) -> None:
        super().__init__(codebook_size, dim, commitment, normalized=False)
        del self.codebook
        self.register_buffer("codebook", torch.randn(codebook_size, dim) * dim**-0.5)
        self.transform = nn.Linear(dim, dim, bias=False)

    def _table(self) -> Tensor:
        return F.linear(self.codebook.float(), self.transform.weight.float())


class ResidualQuantizer(Quantizer):
    """Each codebook quantizes what the codebooks before it left over; latents are the sum.

    The state dict has one tensor, ``codebooks`` ``[q, K, dim]``, which trains as `VectorQuantizer`'s does. Paper:
    Zeghidour et al., "SoundStream", 2021 (arXiv 2107.03312). Dropout is drawn for each sample of the batch, as in Kumar
    et al., "High-Fidelity Audio Compression with Improved RVQGAN", 2023 (arXiv 2306.06546).
    """

    codebooks: Tensor

    def __init__(self, config: QuantizerConfig) -> None:
        super().__init__()
        self.dim = config.dim
        self.codebook_sizes = [config.codebook_size] * config.codebooks
        self.commitment, self.dropout = config.commitment, config.dropout
        shape = config.codebooks, config.codebook_size, config.dim
        self.register_buffer("codebooks", torch.empty(shape).uniform_(-1 / shape[1], 1 / shape[1]))
        self._averages: MovingAverages = MovingAverages(config.decay, config.dead_code)

    def forward(self, z: Tensor) -> Quantized:
        """Quantize, and in training mode move the averages; gradients pass straight through the sum.

        A dropped codebook adds nothing to its sample's latents and commitment loss. Its codes are given and its average
        moves all the same, as what is left over is there whether or not it is decoded.

        Args:
            z: latents ``[B, ..., dim]``.

        Raises:
            PlaitError: it runs a second time, within the backward pass.
        """
        x = z.float()
        if not self.training:
            codes = self.codes(z)
            return Quantized(straight_through(x, self.latents(codes)), codes, {})
        with _exact_float32(z.device):
            if not self._averages.ready(self.codebooks, x.reshape(-1, self.dim)):
                return Quantized(x, self.codes(z), {"commitment": x.new_zeros(())})
            kept = self._kept(x)
            residual, total, commitment, all_codes = x, torch.zeros_like(x), x.new_zeros(()), []
            for i in range(len(self.codebooks)):
                flat = residual.detach().reshape(-1, self.dim)
                quantized, codes = self._averages.step(self.codebooks, i, flat)
                quantized, mask = quantized.reshape(x.shape), (kept > i).float()
                commitment = commitment + ((residual - quantized) ** 2 * mask).mean()
                total = total + quantized * mask
                residual = residual - quantized
                all_codes.append(codes.reshape(x.shape[:-1]))
        losses = {"commitment": self.commitment * commitment}
        return Quantized(straight_through(x, total), torch.stack(all_codes, -1), losses)

    def _kept(self, x: Tensor) -> Tensor:
        """How many codebooks each sample keeps, int64 ``[B, 1, ...]``."""
        there, shape = len(self.codebooks), (len(x), *[1] * (x.ndim - 1))
        drawn = torch.randint(1, there + 1, shape, device=x.device)
        return torch.where(torch.rand(shape, device=x.device) < self.dropout, drawn, there)

    def _stages(self, z: Tensor, count: int | None) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """What each codebook sees ``[N, dim]``, the codebook, and its codes ``[N]``."""
        residual = z.float().reshape(-1, self.dim)
        for table in self.codebooks[:count].float():
            codes = nearest(residual, table)
            yield residual, table, codes
            residual = residual - table[codes]

    @torch.no_grad()
    def codes(self, z: Tensor, n_codebooks: int | None = None) -> Tensor:
        """Latents ``[..., dim]`` → codes int64 ``[..., q]`` of the first ``n_codebooks``, by default of all."""
        with _exact_float32(z.device):
            codes = [codes for *_, codes in self._stages(z, n_codebooks)]
        return torch.stack(codes, -1).reshape(*z.shape[:-1], len(codes))

    def latents(self, codes: Tensor) -> Tensor:
        """Codes int ``[..., q']`` of the first q' ≤ q codebooks → latents float32 ``[..., dim]``."""
        tables = self.codebooks.float()
        return torch.stack([tables[i][codes[..., i]] for i in range(codes.shape[-1])]).sum(0)

    @torch.no_grad()
    def margin(self, z: Tensor) -> Tensor:
        """The smallest of the codebooks' margins, each the second smallest distance minus the smallest."""
        with _exact_float32(z.device):
            margins = [_nearest_margin(residual, table) for residual, table, _ in self._stages(z, None)]
        return torch.stack(margins).amin(0).reshape(z.shape[:-1])


# Helpers


@contextmanager
def _exact_float32(device: torch.device) -> Iterator[None]:
    """Full float32 in here: no autocast, and no TF32 in CUDA's matrix products, whose 10 bits would move codes."""
    precision = torch.get_float32_matmul_precision()
    with torch.autocast(device.type, enabled=False):
        if device.type == "cuda" and precision != "highest":
            torch.set_float32_matmul_precision("highest")
        try:
            yield
        finally:
            if torch.get_float32_matmul_precision() != precision:
                torch.set_float32_matmul_precision(precision)
