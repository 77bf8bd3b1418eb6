"""Reconstruction losses between decoded and original pixels; `PIXEL_LOSSES` names them for recipes.

All take float tensors of one shape, ``[B, 3, H, W]`` or ``[B, 3, T, H, W]`` in ``[-1, 1]`` (decoded values may lie
outside), and return a scalar averaged over the batch.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from pytorch_msssim import ssim
from torch import Tensor

from plait.errors import PlaitError

_WINDOW = 11


def log_mse(decoded: Tensor, pixels: Tensor) -> Tensor:
    """The log of each item's mean squared error, in ``[log 1e-5, ∞)``.

    This is the negative PSNR up to scale: a halved error counts the same on easy and on hard pictures.
    """
    squared = F.mse_loss(decoded, pixels, reduction="none").flatten(1).mean(1)
    return squared.clamp_min(1e-5).log().mean()


def ssim_loss(decoded: Tensor, pixels: Tensor) -> Tensor:
    """``1 − SSIM`` of pictures or frames (Gaussian window of 11 pixels), in ``[0, 2]``.

    Unlike the figure `plait.tokenizers.metrics.ssim` it does not clamp, which would stop gradients where decoded values
    lie outside the range.

    Raises:
        PlaitError: the pictures are smaller than the window.
    """
    if min(pixels.shape[-2:]) < _WINDOW:
        raise PlaitError(
            f"ssim: pictures of {pixels.shape[-2]}×{pixels.shape[-1]} are smaller than its window of 11×11"
        )
    if pixels.ndim == 5:
        decoded, pixels = (x.movedim(2, 1).flatten(0, 1) for x in (decoded, pixels))
    # Its constants are meant for values from 0 on, and its variances are small differences of large numbers.
    with torch.autocast(pixels.device.type, enabled=False):
        similarity = ssim((decoded.float() + 1) / 2, (pixels.float() + 1) / 2, data_range=1.0, win_size=_WINDOW)
    return 1 - similarity


def temporal_difference_loss(decoded: Tensor, pixels: Tensor) -> Tensor:
    """Mean absolute error of the change from each frame to the next, in ``[0, ∞)``; 0 for pictures and single frames.

    Punishes flicker, which the error of each frame by itself hardly shows.
    """
    if pixels.ndim == 4 or pixels.shape[2] < 2:
        return decoded.new_zeros(())
    return F.l1_loss(decoded.diff(dim=2), pixels.diff(dim=2))


PIXEL_LOSSES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "l1": F.l1_loss,
    "l2": F.mse_loss,
    "log_l2": log_mse,
    "ssim": ssim_loss,
    "temporal": temporal_difference_loss,
}
