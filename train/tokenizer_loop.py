"""Training of a tokenizer that is a network, top to bottom: raw shards → batches → steps → ``out/tokenizer``.

`train_tokenizer` is the run; `TokenizerTrainer.step` is one optimizer step. What is particular to a medium is in
`plait.train.visual_loop` and `plait.train.audio_loop`: where batches come from, what a reconstruction is judged by,
and how it is measured.

A run works alone, under ``torchrun`` and under ``deepspeed`` (data parallel; tokenizers are small). With the same
``streams``, one process and several see the same batches, and their losses agree up to rounding. Killed at any time, a
run goes on from its last checkpoint as if nothing had happened.
"""

import contextlib
import copy
import hashlib
import itertools
import math
import os
from abc import ABC, abstractmethod
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from plait.errors import PlaitError
from plait.tokenizers.metrics import CodebookUse
from plait.tokenizers.network import NetworkTokenizer
from plait.tokenizers.quantizer import Quantized
from plait.train.adversarial import ScheduledDiscriminator
from plait.train.journal import Exhibit, Journal, keep
from plait.train.loader import batches, open_loader
from plait.train.medium import MediumEncoder
from plait.train.optimizer import build_optimizer, learning_rate, set_learning_rate
from plait.train.processes import gather, join_processes, leave_processes, mean_over_processes, wait
from plait.train.recipe import AudioTokenizerRecipe, VisualTokenizerRecipe
from plait.train.recipe_file import check_resumable

# Live codebook figures are over the last so many batches.
_WINDOW = 100

NetworkRecipe = VisualTokenizerRecipe | AudioTokenizerRecipe
# What one forward pass takes: a tensor, or several with the same items.
Batch = Tensor | tuple[Tensor, ...]


def train_tokenizer(
    recipe: Any,
    load_heldout: Callable[[Any], Any],
    data_class: "Callable[[Any, int, int], TokenizerData]",
    trainer_class: "Callable[[Any, torch.device], TokenizerTrainer]",
    evaluate: Callable[[Any, Any], tuple[dict[str, float], dict[str, Exhibit]]],
) -> Path:
    """Run a recipe to its end, from its last checkpoint if it has one.

    Args:
        recipe: of a tokenizer that is a network.
        load_heldout: the recipe → what is evaluated on; called on the first process only.
        data_class: recipe, rank and number of processes → the training data.
        trainer_class: recipe and device → the trainer.
        evaluate: tokenizer and held-out data → figures, and what there is to see and hear, by name.

    Returns:
        the tokenizer's folder, ``out/tokenizer``.

    Raises:
        PlaitError: data or ``init`` are missing or do not fit, the batch cannot be divided, the loss is no number, or
            ``out`` holds a run that began with another recipe.
    """
    out = Path(recipe.out)
    if (out / "checkpoint.pt").is_file():
        check_resumable(recipe, out)
    heldout = load_heldout(recipe) if os.environ.get("RANK", "0") == "0" else {}
    rank, world_size, device = join_processes()
    data = data_class(recipe, rank, world_size)
    trainer = trainer_class(recipe, device)
    facts = {"processes": world_size, "parameters": sum(p.numel() for p in trainer.model.parameters())}
    journal = Journal(out, recipe, active=rank == 0, **facts)
    first = restore(out / "checkpoint.pt", trainer, data, world_size)
    journal.rewind(first)

    for step in range(first + 1, recipe.steps + 1):
        figures = trainer.step(step, data.next(step))
        if step % recipe.log_every == 0 or step == recipe.steps:
            journal.log(step, **mean_over_processes(figures), **trainer.codebook_figures())
        if step % recipe.eval_every == 0 or step == recipe.steps:
            check_same_codebooks(trainer.model)
            if rank == 0:
                quality, exhibits = evaluate(trainer.average, heldout)
                journal.log(step, **quality)
                for name, exhibit in exhibits.items():
                    keep(exhibit, out / name)
                    journal.show(step, name, exhibit)
            save(out / "checkpoint.pt", step, trainer, data)

    if rank == 0:
        trainer.average.cpu().save_pretrained(out / "tokenizer", dtype=getattr(torch, recipe.store))
        quality, exhibits = evaluate(type(trainer.average).from_pretrained(out / "tokenizer"), heldout)
        journal.log(recipe.steps, **{f"stored_{name}": value for name, value in quality.items()})
        for name, exhibit in exhibits.items():
            keep(exhibit, out / name)
    leave_processes()
    return out / "tokenizer"


class Source(NamedTuple):
    """Where a step may take its batch from.

    Attributes:
        folders: of raw shards.
        encoder: samples → batches.
        batch_size: items per step over all processes.
        buffer: samples to shuffle among.
    """

    folders: list[str]
    encoder: MediumEncoder
    batch_size: int
    buffer: int


class TokenizerData:
    """This process's share of each step's batch.

    Args:
        recipe: the run.
        sources: by name.
        rank: of this process.
        world_size: number of processes.

    Raises:
        PlaitError: the shards are missing, or the streams cannot be divided over the processes.
    """

    def __init__(self, recipe: NetworkRecipe, sources: dict[str, Source], rank: int, world_size: int) -> None:
        self.accumulate = recipe.accumulate
        self.streams = recipe.streams // world_size
        self.loaders = {
            name: open_loader(
                source.folders, source.encoder, kind="raw", scratch=Path(recipe.out) / name,
                batch_size=source.batch_size // recipe.streams, seed=recipe.seed, streams=recipe.streams, rank=rank,
                world_size=world_size, shuffle_buffer=source.buffer,
            )
            for name, source in sources.items()
        }  # fmt: skip
        self._iterators: dict[str, Iterator[Batch]] = {}

    def source(self, step: int) -> str:
        """The source of a step."""
        return next(iter(self.loaders))

    def next(self, step: int) -> list[Batch]:
        """The batches of a step's forward passes.

        Each pass takes a part of every stream's batch, so that a pass is over the same items on any number of
        processes.
        """
        name = self.source(step)
        if name not in self._iterators:
            self._iterators[name] = batches(self.loaders[name])
        parts = [_chunks(next(self._iterators[name]), self.accumulate) for _ in range(self.streams)]
        return [_together(one_pass) for one_pass in zip(*parts, strict=True)]

    def state(self) -> dict[str, Any]:
        """Where each loader is."""
        return {name: loader.save_state_rank() for name, loader in self.loaders.items()}

    def restore(self, state: dict[str, Any]) -> None:
        """Go on from `state`."""
        for name, loader in self.loaders.items():
            loader.restore_state_rank(state[name])


def _chunks(batch: Batch, count: int) -> list[Batch]:
    if isinstance(batch, Tensor):
        return list(batch.chunk(count))
    return list(zip(*(tensor.chunk(count) for tensor in batch), strict=True))


def _together(parts: tuple[Batch, ...]) -> Batch:
    if isinstance(parts[0], Tensor):
        return torch.cat([part for part in parts if isinstance(part, Tensor)])
    return tuple(torch.cat(tensors) for tensors in zip(*parts, strict=True))


class TokenizerTrainer(ABC):
    """Networks, losses and optimizers of one process.

    Args:
        recipe: the run.
        device: where it computes.

    Raises:
        PlaitError: ``init`` cannot be loaded or does not fit.
    """

    def __init__(self, recipe: NetworkRecipe, device: torch.device) -> None:
        self.recipe, self.device = recipe, device
        # The same seed on all processes, so that they begin alike.
        torch.manual_seed(recipe.seed)
        self.model = self.build_model()
        self.average = copy.deepcopy(self.model).eval().requires_grad_(False)
        self.parallel = parallel(self.model)
        self.head = self.build_head()
        self.trained = nn.ModuleList([self.model] if self.head is None else [self.model, self.head])
        self.optimizer = build_optimizer(self.trained, recipe.optimizer)
        self.adversary = self.build_adversary() if recipe.adversarial.weight else None
        if self.adversary is not None:
            self.discriminator_optimizer = torch.optim.AdamW(
                self.adversary.network.parameters(),
                lr=recipe.discriminator_lr,
                betas=recipe.optimizer.betas,
                weight_decay=0.0,
            )
        self.use = [CodebookUse(size, window=_WINDOW) for size in self.model.codebook_sizes]

    @abstractmethod
    def build_model(self) -> NetworkTokenizer:
        """The tokenizer to train, on the device."""

    def build_head(self) -> nn.Module | None:
        """What is trained with the tokenizer and is no part of it, on the device; None if there is nothing."""
        return None

    @abstractmethod
    def build_adversary(self) -> ScheduledDiscriminator:
        """The discriminator, on the device."""

    @abstractmethod
    def inputs(self, batch: Batch) -> Tensor:
        """A batch on the device → what the tokenizer's training pass takes."""

    @abstractmethod
    def judge(
        self, decoded: Tensor, original: Tensor, quantized: Quantized, batch: Batch, step: int, last: bool
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss of a reconstruction, without the quantizer's own.

        Args:
            decoded: the reconstruction, float32.
            original: what `inputs` gave.
            quantized: what the quantizer says.
            batch: on the device.
            step: from 1.
            last: whether this is the step's last pass.

        Returns:
            a scalar, and what to log.
        """

    def step(self, step: int, passes: list[Batch]) -> dict[str, Tensor]:
        """One optimizer step of tokenizer and discriminator.

        Args:
            step: from 1.
            passes: the batch of each forward pass.

        Returns:
            scalars to log, over this process's items.

        Raises:
            PlaitError: the loss is no number.
        """
        recipe = self.recipe
        # What is drawn in a step (a quantizer's dropout) does not depend on the steps before, nor on a resume.
        torch.manual_seed(recipe.seed + step)
        set_learning_rate(self.optimizer, learning_rate(step - 1, recipe.steps, recipe.optimizer))
        adversary = self.adversary if self.adversary is not None and self.adversary.trains(step) else None
        self.optimizer.zero_grad()
        if adversary:
            self.discriminator_optimizer.zero_grad()
        figures: dict[str, Tensor] = defaultdict(lambda: torch.zeros((), device=self.device))
        codes: list[Tensor] = []
        # Passes can differ in nothing but their items, so the mean of their gradients is the batch's.
        for i, batch in enumerate(passes):
            last = i == len(passes) - 1
            batch = batch.to(self.device) if isinstance(batch, Tensor) else tuple(x.to(self.device) for x in batch)
            original = self.inputs(batch)
            with reduced(self.parallel, last), self.autocast():
                decoded, quantized = self.parallel(original)
            decoded = decoded.float()
            loss, logged = self.judge(decoded, original, quantized, batch, step, last)
            loss = loss + sum(quantized.losses.values())
            logged |= quantized.losses
            with reduced(self.parallel, last):
                (loss / len(passes)).backward()
            if adversary:
                with reduced(adversary.discriminator, last):
                    with self.autocast(on_cpu=False):
                        judged, more = adversary.discriminator_loss(original, decoded)
                    (judged / len(passes)).backward()
                logged |= more
            for name, value in {"loss": loss, **logged}.items():
                figures[name] = figures[name] + value.detach() / len(passes)
            codes.append(quantized.codes)
        figures["gradient"] = nn.utils.clip_grad_norm_(self.trained.parameters(), recipe.optimizer.clip or float("inf"))
        # The gradient is that of all processes: what is wrong on one stops all of them, before it is in the weights.
        for name, number in zip(figures, torch.stack(list(figures.values())).tolist(), strict=True):
            if not math.isfinite(number):
                raise PlaitError(f"{name} is {number} at step {step}; lower optimizer.lr or look at the data")
        for part in codes:
            for use, book in zip(self.use, self._by_codebook(part), strict=True):
                use.update(book)
        self.optimizer.step()
        if adversary:
            self.discriminator_optimizer.step()
        update_average(self.average, self.model, min(recipe.ema, step / (step + 10)))
        return dict(figures)

    def codebook_figures(self) -> dict[str, float]:
        """Over the last batches of all processes: share of each codebook in use, perplexity, dead codes."""
        figures: dict[str, float] = {}
        for i, use in enumerate(self.use):
            together, suffix = use.all_reduced(), f"_{i}" if len(self.use) > 1 else ""
            figures |= {
                f"live_use{suffix}": together.used,
                f"live_perplexity{suffix}": together.perplexity,
                f"dead_codes{suffix}": float(len(together.dead)),
            }
        return figures

    def state(self) -> dict[str, Any]:
        """Everything that the next step depends on but the data; the live codebook figures begin anew."""
        return {
            "model": self.model.state_dict(), "average": self.average.state_dict(),
            "quantizer": self.model.quantizer.training_state(), "optimizer": self.optimizer.state_dict(),
            "head": self.head and self.head.state_dict(), "adversary": self.adversary and self.adversary.state_dict(),
            "discriminator_optimizer": self.adversary and self.discriminator_optimizer.state_dict(),
        }  # fmt: skip

    def load_state(self, state: dict[str, Any]) -> None:
        """Take back what `state` gave."""
        self.model.load_state_dict(state["model"])
        self.average.load_state_dict(state["average"])
        self.model.quantizer.load_training_state(state["quantizer"])
        self.optimizer.load_state_dict(state["optimizer"])
        if self.head is not None:
            self.head.load_state_dict(state["head"])
        if self.adversary is not None:
            self.adversary.load_state_dict(state["adversary"])
            self.discriminator_optimizer.load_state_dict(state["discriminator_optimizer"])

    def autocast(self, on_cpu: bool = True) -> torch.autocast:
        """The recipe's precision; on CPUs only ``on_cpu``."""
        # Not of the discriminator on CPUs: PyTorch's padded bfloat16 Conv3d makes NaN of single frames there.
        enabled = self.recipe.precision == "bfloat16" and (on_cpu or self.device.type != "cpu")
        return torch.autocast(self.device.type, torch.bfloat16, enabled=enabled)

    def _by_codebook(self, codes: Tensor) -> list[Tensor]:
        return [codes] if len(self.use) == 1 else list(codes.unbind(-1))


@torch.no_grad()
def update_average(average: nn.Module, model: nn.Module, decay: float) -> None:
    """Move the averaged weights ``1 − decay`` of the way to the trained ones; buffers (codebooks) are copied."""
    for a, p in zip(average.parameters(), model.parameters(), strict=True):
        a.lerp_(p, 1 - decay)
    for copied, buffer in zip(average.buffers(), model.buffers(), strict=True):
        copied.copy_(buffer)


def codebook_figures(use: list[CodebookUse]) -> dict[str, float]:
    """What an evaluation says of the codebooks: share in use and perplexity of each."""
    figures: dict[str, float] = {}
    for i, counter in enumerate(use):
        suffix = f"_{i}" if len(use) > 1 else ""
        figures |= {f"codebook_use{suffix}": counter.used, f"codebook_perplexity{suffix}": counter.perplexity}
    return figures


def check_same_codebooks(model: NetworkTokenizer) -> None:
    """See that all processes hold the same quantizer.

    Raises:
        PlaitError: they do not; a run that went on would mix codes of different meaning.
    """
    if not dist.is_initialized():
        return
    digest = hashlib.sha256()
    for tensor in itertools.chain(model.quantizer.parameters(), model.quantizer.buffers()):
        digest.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
    digests: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(digests, digest.hexdigest())
    if len(set(digests)) > 1:
        raise PlaitError("the processes' codebooks differ; start again from the last checkpoint")


def save(path: Path, step: int, trainer: TokenizerTrainer, data: TokenizerData) -> None:
    """Write a checkpoint whole or not at all; all processes must call this.

    Raises:
        PlaitError: the disk is full, or the folder may not be written to.
    """
    state = gather({"data": data.state()})
    if state:
        temporary = path.with_suffix(".tmp")
        try:
            torch.save({"step": step, "processes": state, **trainer.state()}, temporary)
            temporary.replace(path)
        except (OSError, RuntimeError) as error:  # the latter is what torch.save says to a full disk
            raise PlaitError(f"{path}: cannot be written ({str(error).splitlines()[0]}); make room") from None
        finally:
            temporary.unlink(missing_ok=True)
    wait()


def restore(path: Path, trainer: TokenizerTrainer, data: TokenizerData, world_size: int) -> int:
    """Load a checkpoint of this run, if there is one; returns its step.

    Raises:
        PlaitError: it cannot be read, is of another architecture, or of another number of processes.
    """
    if not path.is_file():
        return 0
    try:
        # The run's own file, and the loader's state is a Python object: this is not for files from elsewhere.
        state = torch.load(path, map_location="cpu", weights_only=False)
        trainer.load_state(state)
    except Exception as error:  # unpickling and loading raise whatever they meet
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise PlaitError(
            f"{path.parent}: its checkpoint is not of this recipe's model ({reason}); choose another out"
        ) from None
    if len(state["processes"]) != world_size:
        raise PlaitError(
            f"{path.parent}: the run began with {len(state['processes'])} processes, this is {world_size}; "
            "start as many, or choose another out"
        )
    rank = dist.get_rank() if dist.is_initialized() else 0
    data.restore(state["processes"][rank]["data"])
    return int(state["step"])


def parallel(module: nn.Module) -> nn.Module:
    """The module as its processes train it together; buffers are kept alike by the quantizer itself."""
    if not dist.is_initialized():
        return module
    devices = [next(module.parameters()).device.index] if torch.cuda.is_available() else None
    return DistributedDataParallel(module, device_ids=devices, broadcast_buffers=False)


def reduced(module: nn.Module, last: bool) -> Any:
    """Average gradients over the processes in a step's last pass only."""
    return module.no_sync() if isinstance(module, DistributedDataParallel) and not last else contextlib.nullcontext()
