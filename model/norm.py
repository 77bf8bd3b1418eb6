"""RMSNorm (Zhang and Sennrich, 2019, arXiv 1910.07467) whose backward pass is fast on a CPU too."""

from typing import Any

import torch
from torch import Tensor, nn


class RMSNorm(nn.RMSNorm):
    """``nn.RMSNorm``, which trains on a CPU in a third of the time.

    There PyTorch differentiates it operation by operation. On a GPU and in compiled code it is fused anyway, and where
    nothing is to be differentiated there is nothing to gain.
    """

    def forward(self, x: Tensor) -> Tensor:
        """``[..., width]`` → the same shape."""
        plain = x.is_cpu and x.dtype == self.weight.dtype in (torch.float32, torch.float64)
        if not plain or self.eps is None or not torch.is_grad_enabled() or torch.compiler.is_compiling():
            return super().forward(x)
        y: Tensor = _Normalize.apply(x, self.weight, self.eps)
        return y


class _Normalize(torch.autograd.Function):
    """y = w · n with n = x · r and r = (mean(x²) + ε)^(−½).

    With g the gradient with respect to y: ∂w = Σ g · n over the positions, ∂x = r · (g · w − n · mean(g · w · n)).
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        width = x.shape[-1]
        scale = torch.linalg.vector_norm(x, dim=-1, keepdim=True).square_().div_(width).add_(eps).rsqrt_()
        ctx.save_for_backward(x, weight, scale)
        return (x * scale).mul_(weight)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        x, weight, scale = ctx.saved_tensors
        normed = x * scale
        product = gradient * normed
        to_weight = product.reshape(-1, x.shape[-1]).sum(0) if ctx.needs_input_grad[1] else None
        if not ctx.needs_input_grad[0]:
            return None, to_weight, None
        mean = (product @ weight).unsqueeze_(-1).div_(x.shape[-1])
        to_x = torch.mul(gradient, weight, out=product).addcmul_(normed, mean, value=-1).mul_(scale)
        return to_x, to_weight, None
