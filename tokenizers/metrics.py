"""Figures of reconstruction quality and codebook use.

Pictures are ``[B, 3, H, W]`` and clips ``[B, 3, T, H, W]``, floating point in ``[-1, 1]``; what lies outside is
clamped, as a screen would. Every function gives one figure per item, so that
means are over items, however they were batched.
"""

from collections import deque
from collections.abc import Callable

import torch
from einops import rearrange
from torch import Tensor

from plait.errors import PlaitError

# The least side in pixels that SSIM's window and the five scales of MS-SSIM need.
SSIM_SIDE = 11
MS_SSIM_SIDE = 161


def psnr(a: Tensor, b: Tensor) -> Tensor:
    """Peak signal-to-noise ratio in dB, with the range of values (2, that is, 255 in bytes) as the peak.

    Args:
        a: ``[B, 3, H, W]`` or ``[B, 3, T, H, W]`` in ``[-1, 1]``.
        b: the same shape.

    Returns:
        ``[B]``; a clip's is that of the squared error over all its frames. Equal pictures have 106 dB.
    """
    return _decibels((a.clamp(-1, 1) - b.clamp(-1, 1)).square().flatten(1).mean(1))


def temporal_psnr(a: Tensor, b: Tensor) -> Tensor:
    """`psnr` of the differences between neighbouring frames: low where a reconstruction flickers.

    The peak is that of `psnr`, so that the two compare: errors that are independent from frame to frame give 3 dB less
    than `psnr`, an error that stands still gives no loss at all.

    Args:
        a: ``[B, 3, T, H, W]`` in ``[-1, 1]``, T ≥ 2.
        b: the same shape.

    Returns:
        ``[B]`` in dB.

    Raises:
        PlaitError: a single frame.
    """
    if a.shape[2] < 2:
        raise PlaitError("temporal PSNR needs two frames, and there are clips of one")
    return _decibels((a.clamp(-1, 1).diff(dim=2) - b.clamp(-1, 1).diff(dim=2)).square().flatten(1).mean(1))


def ssim(a: Tensor, b: Tensor) -> Tensor:
    """Structural similarity (Wang et al., "Image Quality Assessment", IEEE TIP 2004), 1 for equal pictures.

    On RGB with values in [0, 1]: Gaussian window of 11 × 11 (σ = 1.5) without padding, K = (0.01, 0.03), the mean over
    positions, channels and frames.

    Args:
        a: ``[B, 3, H, W]`` or ``[B, 3, T, H, W]`` in ``[-1, 1]``; sides of at least 11.
        b: the same shape.

    Returns:
        ``[B]`` in ``[-1, 1]``.

    Raises:
        PlaitError: a side is smaller than the window.
    """
    from pytorch_msssim import ssim as similarity

    return _similarity(similarity, a, b, SSIM_SIDE, "SSIM")


def ms_ssim(a: Tensor, b: Tensor) -> Tensor:
    """SSIM over five scales (Wang et al., "Multiscale structural similarity", Asilomar 2003), settings as in `ssim`.

    Args:
        a: ``[B, 3, H, W]`` or ``[B, 3, T, H, W]`` in ``[-1, 1]``; sides of at least 161.
        b: the same shape.

    Returns:
        ``[B]`` in ``[0, 1]``.

    Raises:
        PlaitError: a side is too small for the coarsest scale.
    """
    from pytorch_msssim import ms_ssim as similarity

    return _similarity(similarity, a, b, MS_SSIM_SIDE, "MS-SSIM")


def frames(pixels: Tensor) -> Tensor:
    """Pictures as they are, clips ``[B, 3, T, H, W]`` as pictures ``[B·T, 3, H, W]``."""
    return pixels if pixels.ndim == 4 else rearrange(pixels, "b c t h w -> (b t) c h w")


def per_frame(measure: Callable[[Tensor, Tensor], Tensor], a: Tensor, b: Tensor) -> Tensor:
    """A measure of pictures, two ``[N, 3, H, W]`` → ``[N]``, as the mean over the frames of clips.

    Args:
        measure: of pictures.
        a: ``[B, 3, H, W]`` or ``[B, 3, T, H, W]``.
        b: the same shape.

    Returns:
        ``[B]``.
    """
    return measure(frames(a), frames(b)).reshape(len(a), -1).mean(1)


def _decibels(error: Tensor) -> Tensor:
    """Mean squared error of values with a range of 2 → PSNR in dB."""
    return 10 * torch.log10(4.0 / error.clamp_min(1e-10))


def _similarity(measure: Callable[..., Tensor], a: Tensor, b: Tensor, side: int, name: str) -> Tensor:
    """A measure of pytorch-msssim on values in [0, 1]."""
    height, width = a.shape[-2:]
    if min(height, width) < side:
        raise PlaitError(f"{name} needs sides of at least {side} pixels, and there are pictures of {width}×{height}")
    a, b = (x.clamp(-1, 1) / 2 + 0.5 for x in (a, b))
    return per_frame(lambda x, y: measure(x, y, data_range=1.0, size_average=False), a, b)


class FeatureMoments:
    """Mean and covariance of feature vectors, gathered batch by batch in float64."""

    def __init__(self) -> None:
        self.count = 0
        self._sum: Tensor | float = 0.0
        self._products: Tensor | float = 0.0

    def update(self, features: Tensor) -> None:
        """Add feature vectors ``[N, d]``."""
        features = features.double()
        self.count += len(features)
        self._sum = self._sum + features.sum(0)
        self._products = self._products + features.T @ features

    @property
    def mean(self) -> Tensor:
        """``[d]``, float64."""
        return torch.as_tensor(self._sum) / self.count

    @property
    def covariance(self) -> Tensor:
        """``[d, d]``, float64, unbiased; it needs two vectors."""
        return (torch.as_tensor(self._products) - self.count * torch.outer(self.mean, self.mean)) / (self.count - 1)


def frechet_distance(mean_a: Tensor, covariance_a: Tensor, mean_b: Tensor, covariance_b: Tensor) -> float:
    """Squared Fréchet distance of two Gaussians: ``|μa − μb|² + tr(A + B − 2 (A B)^½)``.

    Dowson and Landau, 1982; for pictures Heusel et al., 2017 (arXiv 1706.08500). The eigenvalues of A B are those of
    the symmetric A^½ B A^½, which come out real whatever the rounding.

    Args:
        mean_a: ``[d]``.
        covariance_a: A, ``[d, d]``.
        mean_b: ``[d]``.
        covariance_b: B, ``[d, d]``.

    Returns:
        at least 0; computed in float64.
    """
    a, b = covariance_a.double(), covariance_b.double()
    values, vectors = torch.linalg.eigh(a)
    root = vectors * values.clamp_min(0).sqrt() @ vectors.T
    cross = torch.linalg.eigvalsh(root @ b @ root).clamp_min(0).sqrt().sum()
    distance = (mean_a.double() - mean_b.double()).square().sum() + a.trace() + b.trace() - 2 * cross
    return max(0.0, float(distance))


class CodebookUse:
    """Counts codes over many batches.

    Args:
        codebook_size: how many codes there are.
        window: count the last so many batches only; all of them by default.
    """

    def __init__(self, codebook_size: int, window: int | None = None) -> None:
        self.counts = torch.zeros(codebook_size, dtype=torch.long)
        self.window = window
        self._recent: deque[Tensor] = deque()

    def update(self, codes: Tensor) -> None:
        """Add a batch of int codes of any shape; the counts move to its device."""
        codes = codes.detach().flatten().long()
        self.counts = self.counts.to(codes.device)
        self._add(codes, 1)
        if self.window is not None:
            self._recent.append(codes.clone())
            if len(self._recent) > self.window:
                self._add(self._recent.popleft(), -1)

    def _add(self, codes: Tensor, times: int) -> None:
        codes = codes.to(self.counts.device)
        self.counts.index_add_(0, codes, torch.ones_like(codes), alpha=times)

    def all_reduced(self) -> "CodebookUse":
        """The counts of all processes together where `torch.distributed` is initialised; all of them must call it."""
        together = CodebookUse(len(self.counts))
        together.counts = self.counts.clone()
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            torch.distributed.all_reduce(together.counts)
        return together

    @property
    def used(self) -> float:
        """Share of the codebook seen at least once, in ``[0, 1]``."""
        return float((self.counts > 0).double().mean())

    @property
    def dead(self) -> Tensor:
        """The codes never seen, int64 ``[n]``."""
        return (self.counts == 0).nonzero().flatten()

    @property
    def perplexity(self) -> float:
        """Exponential of the codes' entropy: how many codes the data uses, were they equally frequent."""
        p = self.counts[self.counts > 0].double()
        p = p / p.sum()
        return float(torch.exp(-(p * p.log()).sum()))
