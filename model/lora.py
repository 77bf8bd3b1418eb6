"""LoRA (Hu et al., 2021, arXiv 2106.09685): a frozen linear layer learns by a product of two thin matrices beside it.

With the layers it stands beside kept in 8 or 4 bits it is QLoRA (Dettmers et al., 2023, arXiv 2305.14314).
"""

import difflib
import math
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from fnmatch import fnmatchcase

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from plait.errors import PlaitError
from plait.model.decoder import Decoder
from plait.model.quantize import QuantizedLinear, quantize_linear

QUANTIZATIONS = ("", "int8", "int4")


@dataclass(frozen=True)
class LoRAConfig:
    """Which layers get adapters, and of what kind.

    Attributes:
        rank: inner size of the two matrices; 0 is no LoRA.
        alpha: what they add is scaled by ``alpha / rank``.
        dropout: on what goes into them.
        targets: patterns of linear layers of the blocks, such as ``*.q_proj``; by default all of them, as QLoRA's
            authors found necessary.
        quantize: "int8" or "int4" keeps these layers' own weights in so few bits (QLoRA); "" leaves them.
    """

    rank: int = 0
    alpha: float = 16.0
    dropout: float = 0.0
    targets: list[str] = field(default_factory=lambda: ["layers.*"])
    quantize: str = ""

    def __post_init__(self) -> None:
        if type(self.rank) is not int or self.rank < 0:
            raise PlaitError(f"lora: rank is {self.rank!r}, must be a whole number of at least 0")
        if not self.alpha > 0:
            raise PlaitError(f"lora: alpha is {self.alpha!r}, must be above 0")
        if not 0 <= self.dropout < 1:
            raise PlaitError(f"lora: dropout is {self.dropout!r}, must be at least 0 and below 1")
        if not self.targets:
            raise PlaitError("lora: targets is empty; leave it out for all linear layers of the blocks")
        if self.quantize not in QUANTIZATIONS:
            raise PlaitError(f"lora: quantize is {self.quantize!r}, expected {', '.join(map(repr, QUANTIZATIONS))}")


class LoRALinear(nn.Module):
    """A linear layer and what is learnt beside it: ``base(x) + alpha / rank · B A x``.

    B starts at zero, so that nothing changes before the first step.

    Args:
        base: the layer, frozen from now on.
        config: rank, alpha and dropout.
    """

    def __init__(self, base: nn.Linear | QuantizedLinear, config: LoRAConfig) -> None:
        super().__init__()
        self.base = base.requires_grad_(False)
        self.scale = config.alpha / config.rank
        self.dropout = nn.Dropout(config.dropout)
        device = base.weight.device
        self.lora_a = nn.Parameter(torch.empty(config.rank, base.in_features, device=device))
        self.lora_b = nn.Parameter(torch.zeros(base.out_features, config.rank, device=device))
        nn.init.kaiming_uniform_(self.lora_a, a=math.sqrt(5))

    def forward(self, x: Tensor) -> Tensor:
        """``[..., in_features]`` → ``[..., out_features]``."""
        if isinstance(self.base, QuantizedLinear) and not (torch.is_grad_enabled() and x.requires_grad):
            # Its kernels round the activations, and an adapter must do the same in use as in training.
            out = F.linear(x, self.base.dequantize(x.dtype), self.base.bias)
        else:
            out = self.base(x)
        learnt = F.linear(F.linear(self.dropout(x).to(self.lora_a.dtype), self.lora_a), self.lora_b)
        return out + (self.scale * learnt).to(out.dtype)

    @torch.no_grad()
    def merged(self) -> nn.Linear:
        """One linear layer that does the same, in the dtype of the base's weight; in float32 if that is quantized."""
        weight = self.base.weight if isinstance(self.base, nn.Linear) else self.base.dequantize()
        total = weight.float() + self.scale * (self.lora_b.float() @ self.lora_a.float())
        with torch.device("meta"):
            linear = nn.Linear(self.base.in_features, self.base.out_features, bias=self.base.bias is not None)
        linear.weight = nn.Parameter(total.to(weight.dtype), requires_grad=False)
        if self.base.bias is not None:
            linear.bias = nn.Parameter(self.base.bias.detach(), requires_grad=False)
        return linear


def add_lora(decoder: Decoder, config: LoRAConfig) -> list[str]:
    """Give linear layers of the blocks adapters, in place. Everything but the adapters is frozen.

    Returns:
        the names of these layers.

    Raises:
        PlaitError: a pattern matches none, or the rank is 0.
    """
    if not config.rank:
        raise PlaitError("lora: rank is 0, must be at least 1")
    decoder.requires_grad_(False)
    linears = {n: m for n, m in decoder.layers.named_modules(prefix="layers") if isinstance(m, nn.Linear)}
    chosen = matching(linears, config.targets, "lora.targets")
    for name in chosen:
        base = quantize_linear(linears[name], config.quantize) if config.quantize else linears[name]
        decoder.set_submodule(name, LoRALinear(base, config))
    return chosen


def merge_lora(decoder: Decoder) -> None:
    """Undo `add_lora`, in place: what the adapters learnt goes into the layers' weights."""
    for name, module in list(decoder.named_modules()):
        if isinstance(module, LoRALinear):
            decoder.set_submodule(name, module.merged())


def matching(names: Iterable[str], patterns: Iterable[str], field: str) -> list[str]:
    """The names that match a pattern (as of file names: ``*``, ``?``, ``[…]``), in their order.

    Args:
        names: to choose from.
        patterns: that each must match one of them.
        field: what the patterns are called in errors.

    Raises:
        PlaitError: a pattern matches nothing; the nearest name is suggested.
    """
    names, chosen = list(names), set[str]()
    for pattern in patterns:
        found = {name for name in names if fnmatchcase(name, pattern)}
        if not found:
            general = {re.sub(r"\.\d+\.", ".*.", name) for name in names}
            near = difflib.get_close_matches(pattern, [*general, *(f"*.{n.rpartition('.')[2]}" for n in general)], 1, 0)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise PlaitError(f"{field}: {pattern!r} matches none of the {len(names)} names{hint}")
        chosen |= found
    return [name for name in names if name in chosen]
