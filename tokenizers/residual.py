"""Residual quantizers: each codebook quantizes what the codebooks before it left over, and latents are the sum."""

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from plait.tokenizers.averages import MovingAverages, nearest, straight_through
from plait.tokenizers.quantizer_base import Quantized, Quantizer, QuantizerConfig, exact_float32, nearest_margin


def kept_codebooks(x: Tensor, there: int, dropout: float) -> Tensor:
    """How many codebooks each sample of ``[B, ...]`` keeps in a training pass, int64 ``[B, 1, ...]``."""
    shape = len(x), *[1] * (x.ndim - 1)
    drawn = torch.randint(1, there + 1, shape, device=x.device)
    return torch.where(torch.rand(shape, device=x.device) < dropout, drawn, there)


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
        with exact_float32(z.device):
            if not self._averages.ready(self.codebooks, x.reshape(-1, self.dim)):
                return Quantized(x, self.codes(z), {"commitment": x.new_zeros(())})
            kept = kept_codebooks(x, len(self.codebooks), self.dropout)
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
        with exact_float32(z.device):
            codes = [codes for *_, codes in self._stages(z, n_codebooks)]
        return torch.stack(codes, -1).reshape(*z.shape[:-1], len(codes))

    def latents(self, codes: Tensor) -> Tensor:
        """Codes int ``[..., q']`` of the first q' ≤ q codebooks → latents float32 ``[..., dim]``."""
        tables = self.codebooks.float()
        return torch.stack([tables[i][codes[..., i]] for i in range(codes.shape[-1])]).sum(0)

    @torch.no_grad()
    def margin(self, z: Tensor) -> Tensor:
        """The smallest of the codebooks' margins, each the second smallest distance minus the smallest."""
        with exact_float32(z.device):
            margins = [nearest_margin(residual, table) for residual, table, _ in self._stages(z, None)]
        return torch.stack(margins).amin(0).reshape(z.shape[:-1])


class FactorizedCodebook(nn.Module):
    """A codebook of few channels between two projections, looked up by angle, decoded from the vectors as they are.

    With few channels more of the codes come into use, and the projections keep the latents wide (Yu et al.,
    "Vector-quantized Image Modeling with Improved VQGAN", 2021, arXiv 2110.04627; in audio: DAC, arXiv 2306.06546).

    Args:
        codebook_size: K.
        dim: channels of the latents.
        code_dim: channels of the codebook's vectors.
    """

    def __init__(self, codebook_size: int, dim: int, code_dim: int) -> None:
        super().__init__()
        self.in_proj = nn.Linear(dim, code_dim)
        self.codebook = nn.Parameter(torch.randn(codebook_size, code_dim))
        self.out_proj = nn.Linear(code_dim, dim)

    def project(self, z: Tensor) -> Tensor:
        """Latents ``[..., dim]`` → where they are looked up, float32 ``[..., code_dim]``."""
        return F.linear(z.float(), self.in_proj.weight.float(), self.in_proj.bias.float())

    def nearest(self, projected: Tensor) -> Tensor:
        """Projected latents ``[..., code_dim]`` → codes int64 ``[...]``."""
        return nearest(*self._angles(projected)).reshape(projected.shape[:-1])

    def margin(self, projected: Tensor) -> Tensor:
        """How far projected latents ``[..., code_dim]`` are from another code, on the unit sphere, ``[...]``."""
        return nearest_margin(*self._angles(projected)).reshape(projected.shape[:-1])

    def _angles(self, projected: Tensor) -> tuple[Tensor, Tensor]:
        flat = projected.detach().reshape(-1, projected.shape[-1])
        return F.normalize(flat, dim=-1), F.normalize(self.codebook.detach().float(), dim=-1)

    def vectors(self, codes: Tensor) -> Tensor:
        """Codes int ``[...]`` → vectors of the codebook, float32 ``[..., code_dim]``."""
        return F.embedding(codes, self.codebook.float())

    def expand(self, vectors: Tensor) -> Tensor:
        """Vectors ``[..., code_dim]`` → latents float32 ``[..., dim]``."""
        return F.linear(vectors, self.out_proj.weight.float(), self.out_proj.bias.float())

    def latents(self, codes: Tensor) -> Tensor:
        """Codes int ``[...]`` → latents float32 ``[..., dim]``."""
        return self.expand(self.vectors(codes))


class FactorizedResidualQuantizer(Quantizer):
    """Residual `FactorizedCodebook`s, which learn by gradient.

    The state dict has ``stages.i.codebook``, ``stages.i.in_proj.*`` and ``stages.i.out_proj.*``. The losses are those
    of VQ-VAE on each codebook's own channels, averaged over tokens and channels and summed over codebooks: "codebook"
    ``|sg(x) − c|²`` and "commitment" ``commitment · |x − sg(c)|²``. Paper: Kumar et al., "High-Fidelity Audio
    Compression with Improved RVQGAN", 2023 (arXiv 2306.06546).

    With a single codebook, codes have no codebook axis.
    """

    stages: Any  # a list of FactorizedCodebook

    def __init__(self, config: QuantizerConfig) -> None:
        super().__init__()
        self.dim = config.dim
        self.codebook_sizes = [config.codebook_size] * config.codebooks
        self.commitment, self.dropout = config.commitment, config.dropout
        self.stages = nn.ModuleList(
            FactorizedCodebook(config.codebook_size, config.dim, config.code_dim) for _ in range(config.codebooks)
        )

    def forward(self, z: Tensor) -> Quantized:
        """Quantize; gradients pass straight through each look-up, and through the projections around it.

        A dropped codebook adds nothing to its sample's latents and losses; its codes are given all the same.

        Args:
            z: latents ``[B, ..., dim]``.
        """
        x = z.float()
        if not self.training:
            codes = self.codes(z)
            return Quantized(straight_through(x, self.latents(codes)), codes, {})
        with exact_float32(z.device):
            kept = kept_codebooks(x, len(self.stages), self.dropout)
            residual, total, all_codes = x, torch.zeros_like(x), []
            codebook, commitment = x.new_zeros(()), x.new_zeros(())
            for i, stage in enumerate(self.stages):
                projected, mask = stage.project(residual), (kept > i).float()
                codes = stage.nearest(projected)
                vectors = stage.vectors(codes)
                codebook = codebook + ((projected.detach() - vectors) ** 2 * mask).mean()
                commitment = commitment + ((projected - vectors.detach()) ** 2 * mask).mean()
                quantized = stage.expand(straight_through(projected, vectors))
                total = total + quantized * mask
                residual = residual - quantized
                all_codes.append(codes)
        losses = {"codebook": codebook, "commitment": self.commitment * commitment}
        return Quantized(total, self._joined(all_codes), losses)

    def _joined(self, codes: list[Tensor]) -> Tensor:
        return codes[0] if len(self.stages) == 1 else torch.stack(codes, -1)

    def _stages(self, z: Tensor, count: int | None) -> Iterator[tuple[FactorizedCodebook, Tensor, Tensor]]:
        """Each codebook, what it sees ``[..., code_dim]``, and its codes ``[...]``."""
        residual = z.float()
        for stage in self.stages[:count]:
            projected = stage.project(residual)
            codes = stage.nearest(projected)
            yield stage, projected, codes
            residual = residual - stage.latents(codes)

    @torch.no_grad()
    def codes(self, z: Tensor, n_codebooks: int | None = None) -> Tensor:
        """Latents ``[..., dim]`` → codes int64 ``[..., q]`` of the first ``n_codebooks``, by default of all."""
        with exact_float32(z.device):
            return self._joined([codes for *_, codes in self._stages(z, n_codebooks)])

    def latents(self, codes: Tensor) -> Tensor:
        """Codes int ``[..., q']`` of the first q' ≤ q codebooks → latents float32 ``[..., dim]``."""
        with exact_float32(codes.device):
            each = (codes,) if len(self.stages) == 1 else codes.unbind(-1)
            parts = [stage.latents(codes) for stage, codes in zip(self.stages, each, strict=False)]
            return torch.stack(parts).sum(0)

    @torch.no_grad()
    def margin(self, z: Tensor) -> Tensor:
        """The smallest margin of the codebooks: the second smallest distance on the unit sphere minus the smallest."""
        with exact_float32(z.device):
            return torch.stack([stage.margin(x) for stage, x, _ in self._stages(z, None)]).amin(0)
