"""Reconstruction figures, one number per image, and codebook use."""

import torch
from torch import Tensor


def psnr(a: Tensor, b: Tensor) -> Tensor:
    """Peak signal-to-noise ratio of each image in dB; ``[B, 3, H, W]`` in ``[-1, 1]`` → ``[B]``."""
    error = (a.clamp(-1, 1) - b.clamp(-1, 1)).square().flatten(1).mean(1)
    return 10 * torch.log10(4.0 / error.clamp_min(1e-10))


class CodebookUse:
    """Counts codes over many batches."""

    def __init__(self, codebook_size: int) -> None:
        self.counts = torch.zeros(codebook_size, dtype=torch.long)

    def update(self, codes: Tensor) -> None:
        """Add int codes of any shape."""
        self.counts += torch.bincount(codes.flatten().cpu(), minlength=len(self.counts))

    @property
    def used(self) -> float:
        """Share of the codebook seen at least once, in ``[0, 1]``."""
        return float((self.counts > 0).float().mean())

    @property
    def perplexity(self) -> float:
        """Exponential of the codes' entropy: how many codes the data uses, were they equally frequent."""
        p = self.counts[self.counts > 0].double()
        p = p / p.sum()
        return float(torch.exp(-(p * p.log()).sum()))
