"""Modules in shape only: on PyTorch's meta device, with nothing computed to fill them."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.overrides import TorchFunctionMode


@contextmanager
def hollow() -> Iterator[None]:
    """What is built within has sizes and no values.

    ``torch.device("meta")`` alone does the same, but initializes, and for that PyTorch imports its compiler: 3 s.
    """
    with torch.device("meta"), _WithoutInit():
        yield


class _WithoutInit(TorchFunctionMode):
    """Leaves out `torch.nn.init`."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Iterable[type], args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if getattr(func, "__module__", "") == "torch.nn.init":  # a built-in method has none
            return args[0] if args else kwargs["tensor"]
        return func(*args, **kwargs)
