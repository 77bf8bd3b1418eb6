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
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from plait.tokenizers.averages import MovingAverages, mean_over_ranks, nearest, straight_through
from plait.tokenizers.quantizer_base import Quantized as Quantized
from plait.tokenizers.quantizer_base import Quantizer as Quantizer
from plait.tokenizers.quantizer_base import QuantizerConfig as QuantizerConfig
from plait.tokenizers.quantizer_base import checked_levels, exact_float32, nearest_margin
from plait.tokenizers.residual import FactorizedResidualQuantizer, ResidualQuantizer


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
        case "rvq_l2":
            return FactorizedResidualQuantizer(config)
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
        self.levels = checked_levels(levels)
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
        with exact_float32(z.device):
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
        with exact_float32(z.device):
            digits = self._bounded(z).round().long() + self._count // 2
            return (digits * self._place).sum(-1)

    def latents(self, codes: Tensor) -> Tensor:
        """Codes int ``[...]`` → latents float32 ``[..., d]`` in ``[-1, 1]``."""
        digits = codes.unsqueeze(-1) // self._place % self._count
        half_width = (self._count // 2).float()
        return (digits - half_width) / half_width

    def margin(self, z: Tensor) -> Tensor:
        """Distance of the squashed latents ``[..., d]`` to the nearest rounding boundary, where levels are 1 apart."""
        with exact_float32(z.device):
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
        with exact_float32(z.device):
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
        with exact_float32(z.device):
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
        with exact_float32(z.device):
            return nearest(self._input(z).reshape(-1, self.dim), self._table()).reshape(z.shape[:-1])

    def latents(self, codes: Tensor) -> Tensor:
        """Codes int ``[...]`` → latents float32 ``[..., dim]``."""
        with exact_float32(codes.device):
            return F.embedding(codes, self._table())

    @torch.no_grad()
    def margin(self, z: Tensor) -> Tensor:
        """The second smallest distance to a vector of the codebook minus the smallest."""
        with exact_float32(z.device):
            return nearest_margin(self._input(z).reshape(-1, self.dim), self._table()).reshape(z.shape[:-1])


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
        with exact_float32(z.device):
            codebooks = self.codebook[None]
            if not self._averages.ready(codebooks, x):
                return Quantized(z.float(), self.codes(z), {"commitment": x.new_zeros(())})
            quantized, codes = self._averages.step(codebooks, 0, x)
        values = quantized.detach()
        losses = {"commitment": self.commitment * F.mse_loss(x, values)}
        return Quantized(quantized.reshape(z.shape), codes.reshape(z.shape[:-1]), losses)


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
        with exact_float32(z.device):
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
