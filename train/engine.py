"""DeepSpeed: the only file that imports it.

Its configuration is computed from the recipe, so no second file can disagree with it. A run works alone, under
``torchrun`` and under ``deepspeed``, on CPUs (gloo) and GPUs (NCCL).
"""

import os
import pickle
from pathlib import Path
from typing import Any

import torch
import torch.distributed
from torch import Tensor, nn

from plait.errors import PlaitError
from plait.train.processes import set_environment
from plait.train.recipe import DecoderRecipe

REDUCE_BUCKET = 500_000_000  # values that ZeRO reduces at once
# What torch.load raises for a file that was cut off, is empty or is of something else.
UNREADABLE = (OSError, RuntimeError, EOFError, pickle.UnpicklingError)
OTHER_CHECKPOINT = "write the name of another one into 'latest' beside it, or start in another folder"


def start_distributed() -> tuple[int, int]:
    """Join the process group that the launcher describes, or make one of this process alone.

    Returns:
        rank and world size.
    """
    set_environment()
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    import deepspeed

    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    deepspeed.init_distributed()
    return torch.distributed.get_rank(), torch.distributed.get_world_size()


def divide_batch(recipe: DecoderRecipe, world_size: int) -> tuple[int, int]:
    """How a process works through its share of the global batch: (sequences per forward pass, passes per step).

    A forward pass takes as many sequences as ``micro_batch`` allows and the share divides into.

    Raises:
        PlaitError: the streams do not divide the global batch, or the processes not the streams.
    """
    if recipe.global_batch % recipe.streams:
        raise PlaitError(f"streams: {recipe.streams} must divide global_batch ({recipe.global_batch})")
    if recipe.streams % world_size:
        raise PlaitError(f"streams: {recipe.streams} is not a multiple of the {world_size} processes; make it one")
    share = recipe.global_batch // world_size
    micro_batch = max(n for n in range(1, min(recipe.micro_batch, share) + 1) if share % n == 0)
    return micro_batch, share // micro_batch


class Engine:
    """One process's share of the decoder's training.

    Args:
        module: the decoder.
        optimizer: over the module's parameters.
        recipe: the run.
        world_size: number of processes.
    """

    def __init__(
        self, module: nn.Module, optimizer: torch.optim.Optimizer, recipe: DecoderRecipe, world_size: int
    ) -> None:
        import deepspeed

        self._deepspeed = deepspeed
        self.micro_batch, self.accumulation = divide_batch(recipe, world_size)
        self._scale = world_size * self.accumulation
        trained = sum(p.numel() for p in module.parameters() if p.requires_grad)
        config = {
            "train_batch_size": recipe.global_batch,
            "train_micro_batch_size_per_gpu": self.micro_batch,
            "gradient_accumulation_steps": self.accumulation,
            "gradient_clipping": recipe.optimizer.clip,
            "zero_optimization": {
                "stage": recipe.parallel.zero,
                # DeepSpeed's default, but no more than there is: it allocates that much whatever the model's size.
                "reduce_bucket_size": min(REDUCE_BUCKET, max(1, trained)),
            },
            "bf16": {"enabled": recipe.parallel.dtype == "bfloat16"},
            "steps_per_print": 1 << 40,
        }
        self._engine, *_ = deepspeed.initialize(model=module, optimizer=optimizer, config=config)
        self.zero = recipe.parallel.zero
        self._plain = self.zero == 0 and recipe.parallel.dtype == "float32"
        self._norm = 0.0
        self._all_train = all(parameter.requires_grad for parameter in module.parameters())
        if not self._all_train:
            module.register_state_dict_post_hook(_drop_frozen)  # DeepSpeed leaves buffers and a tied head in
        self.device: torch.device = self._engine.device

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The module's forward pass."""
        return self._engine(*args, **kwargs)

    def backward(self, loss_sum: Tensor, total_weight: float) -> None:
        """Add a micro-batch's gradients.

        Args:
            loss_sum: this micro-batch's weighted sum of losses.
            total_weight: of all tokens of the whole optimizer step, on all processes. DeepSpeed divides by
                accumulation steps and processes; that is undone here, so every token counts the same wherever it is.
        """
        self._engine.backward(loss_sum * (self._scale / total_weight))

    def step(self, lr: float) -> None:
        """Count a micro-batch; after the last of a step, clip and update with this learning rate."""
        if self._engine.is_gradient_accumulation_boundary() and self._plain:
            # Without ZeRO and mixed precision DeepSpeed clips but keeps no norm.
            gradients = [p.grad for p in self._engine.module.parameters() if p.grad is not None]
            self._norm = float(torch.stack([g.norm() for g in gradients]).norm())
        for group in self._engine.optimizer.param_groups:
            group["lr"] = lr
        self._engine.step()

    @property
    def gradient_norm(self) -> float:
        """Norm of the last step's whole gradient before clipping."""
        return self._norm if self._plain else float(self._engine.get_global_grad_norm() or 0.0)

    def total(self, values: Tensor) -> Tensor:
        """Sum over all processes."""
        values = values.to(self.device)
        torch.distributed.all_reduce(values)
        return values

    def save(self, folder: Path, tag: str) -> None:
        """Write this process's part of a checkpoint, without what is frozen; ``latest`` then names it."""
        self._engine.save_checkpoint(str(folder), tag=tag, exclude_frozen_parameters=True)

    def load(self, folder: Path, tag: str) -> None:
        """Read a checkpoint back, under the same ZeRO stage.

        Raises:
            PlaitError: the checkpoint is missing or incomplete.
        """
        try:
            path, _ = self._engine.load_checkpoint(str(folder), tag=tag, load_module_strict=self._all_train)
        except (*UNREADABLE, KeyError, AssertionError) as error:
            reason = str(error).partition("\n")[0] or "empty file"
            raise PlaitError(f"{folder / tag}: checkpoint cannot be read ({reason}); {OTHER_CHECKPOINT}") from None
        if path is None:
            raise PlaitError(f"{folder / tag}: checkpoint is incomplete; {OTHER_CHECKPOINT}")

    def weights(self) -> dict[str, Tensor]:
        """The parameters that train, on the CPU, in float32, from masters if there are any; a collective call."""
        from deepspeed.utils import safe_get_full_fp32_param

        full: dict[str, Tensor] = {}
        for name, parameter in self._engine.module.named_parameters():
            if not parameter.requires_grad:
                continue
            master = safe_get_full_fp32_param(parameter) if self.zero else parameter
            assert master is not None, name
            full[name] = master.detach().float().cpu().clone()
        return full

    def close(self) -> None:
        """Leave the process group."""
        self._engine.destroy()
        torch.distributed.destroy_process_group()


def _drop_frozen(module: nn.Module, state: dict[str, Tensor], prefix: str, _: Any) -> None:
    """Take what does not train out of a state dict: frozen parameters under all their names, quantized weights."""
    trained = {f"{prefix}{name}" for name, parameter in module.named_parameters() if parameter.requires_grad}
    for name in set(state) - trained:
        del state[name]
