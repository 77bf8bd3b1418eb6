"""Training of the visual tokenizer, top to bottom: raw shards → crops → steps → ``out/tokenizer``.

`train_visual` is the run; `Trainer.step` is one optimizer step. It works alone, under ``torchrun`` and under
``deepspeed`` (data parallel; tokenizers are small). With the same ``streams``, one process and several see the same
batches, and their losses agree up to rounding. Killed at any time, a run goes on from its last checkpoint as if nothing
had happened.
"""

import contextlib
import copy
import hashlib
import itertools
import math
import os
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from einops import rearrange
from PIL import Image
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from plait.errors import PlaitError
from plait.tokenizers.evaluate import thumbnail
from plait.tokenizers.loading import load_tokenizer
from plait.tokenizers.metrics import CodebookUse, psnr, ssim
from plait.tokenizers.perceptual import load_perceptual
from plait.tokenizers.sheets import clip_sheet, reconstruction_sheet
from plait.tokenizers.visual import VisualTokenizer, architecture_of
from plait.train.adversarial import Adversary
from plait.train.crops import ClipEncoder, CropEncoder, ImageEncoder, load_heldout
from plait.train.discriminator import build_discriminator
from plait.train.journal import Journal
from plait.train.loader import batches, open_loader
from plait.train.optimizer import build_optimizer, learning_rate, set_learning_rate
from plait.train.processes import gather, join_processes, leave_processes, mean_over_processes, wait
from plait.train.recipe import VisualTokenizerRecipe
from plait.train.recipe_file import check_resumable
from plait.train.reconstruction import PIXEL_LOSSES

# Live codebook figures are over the last so many batches.
_WINDOW = 100


def train_visual(recipe: VisualTokenizerRecipe) -> Path:
    """Run a recipe to its end, from its last checkpoint if it has one.

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
    data = Data(recipe, rank, world_size)
    trainer = Trainer(recipe, device)
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
                quality, sheets = evaluate(trainer.average, heldout)
                journal.log(step, **quality)
                for name, sheet in sheets.items():
                    sheet.save(out / f"{name}.png")
                    journal.show(step, name, sheet)
            save(out / "checkpoint.pt", step, trainer, data)

    if rank == 0:
        trainer.average.cpu().save_pretrained(out / "tokenizer", dtype=getattr(torch, recipe.store))
        quality, sheets = evaluate(VisualTokenizer.from_pretrained(out / "tokenizer"), heldout)
        journal.log(recipe.steps, **{f"stored_{name}": value for name, value in quality.items()})
        for name, sheet in sheets.items():
            sheet.save(out / f"{name}.png")
    leave_processes()
    return out / "tokenizer"


class Data:
    """This process's share of each step's batch.

    Args:
        recipe: the run.
        rank: of this process.
        world_size: number of processes.

    Raises:
        PlaitError: the shards are missing, or the streams cannot be divided over the processes.
    """

    def __init__(self, recipe: VisualTokenizerRecipe, rank: int, world_size: int) -> None:
        self.recipe = recipe
        self.streams = recipe.streams // world_size
        clips = recipe.clips
        self.share = clips.share if clips.shards else 0.0
        # What a step may take: folders, encoder, items per step, samples to shuffle among.
        sources: dict[str, tuple[list[str], CropEncoder, int, int]] = {}
        if self.share < 1:
            sources["images"] = recipe.shards, ImageEncoder(recipe), recipe.batch_size, 5000
        if self.share > 0:
            # The buffer holds whole recordings.
            sources["clips"] = clips.shards, ClipEncoder(recipe), clips.batch_size, 100
        self.loaders = {}
        for name, (folders, encoder, size, buffer) in sources.items():
            self.loaders[name] = open_loader(
                folders, encoder, kind="raw", scratch=Path(recipe.out) / name, batch_size=size // recipe.streams,
                seed=recipe.seed, streams=recipe.streams, rank=rank, world_size=world_size, shuffle_buffer=buffer,
            )  # fmt: skip
        self._iterators: dict[str, Iterator[Tensor]] = {}

    def next(self, step: int) -> list[Tensor]:
        """The pixels of a step's forward passes, uint8 ``[B, 3, H, W]`` or ``[B, 3, T, H, W]``.

        Each pass takes a part of every stream's batch, so that a pass is over the same items on any number of
        processes.
        """
        name = "clips" if int(step * self.share) > int((step - 1) * self.share) else "images"
        if name not in self._iterators:
            self._iterators[name] = batches(self.loaders[name])
        parts = [next(self._iterators[name]).chunk(self.recipe.accumulate) for _ in range(self.streams)]
        return [torch.cat(one_pass) for one_pass in zip(*parts, strict=True)]

    def state(self) -> dict[str, Any]:
        """Where each loader is."""
        return {name: loader.save_state_rank() for name, loader in self.loaders.items()}

    def restore(self, state: dict[str, Any]) -> None:
        """Go on from `state`."""
        for name, loader in self.loaders.items():
            loader.restore_state_rank(state[name])


class Trainer:
    """Networks, losses and optimizers of one process.

    Args:
        recipe: the run.
        device: where it computes.

    Raises:
        PlaitError: ``init`` or the perceptual network cannot be loaded or do not fit.
    """

    def __init__(self, recipe: VisualTokenizerRecipe, device: torch.device) -> None:
        self.recipe, self.device = recipe, device
        # The same seed on all processes, so that they begin alike.
        torch.manual_seed(recipe.seed)
        self.model = VisualTokenizer(recipe.model)
        if recipe.init:
            initialise(self.model, recipe.init)
        self.model.to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.average = copy.deepcopy(self.model).eval().requires_grad_(False)
        self.parallel = _parallel(self.model)
        self.optimizer = build_optimizer(self.model, recipe.optimizer)
        self.perceptual: nn.Module | None = None
        if recipe.loss.perceptual:
            self.perceptual = load_perceptual(recipe.loss.network, recipe.loss.heads or None).to(device)
        self.adversary: Adversary | None = None
        if recipe.adversarial.weight:
            discriminator = build_discriminator(recipe.adversarial.discriminator).to(device)
            self.adversary = Adversary(_parallel(discriminator), recipe.adversarial)
            self.discriminator_optimizer = torch.optim.AdamW(
                discriminator.parameters(), lr=recipe.discriminator_lr, betas=recipe.optimizer.betas, weight_decay=0.0
            )
        self.use = [CodebookUse(size, window=_WINDOW) for size in self.model.codebook_sizes]

    def step(self, step: int, passes: list[Tensor]) -> dict[str, Tensor]:
        """One optimizer step of tokenizer and discriminator.

        Args:
            step: from 1.
            passes: uint8 pixels of each forward pass.

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
        for i, part in enumerate(passes):
            last = i == len(passes) - 1
            pixels = to_float(part.to(self.device))
            with _reduce(self.parallel, last), self._autocast():
                decoded, quantized = self.parallel(pixels)
            decoded = decoded.float()
            terms = reconstruction_losses(decoded, pixels, recipe, step, self.perceptual)
            reconstruction = torch.stack(list(terms.values())).sum()
            loss = reconstruction + sum(quantized.losses.values())
            logged = {**terms, **quantized.losses, "psnr": psnr(decoded.detach(), pixels).mean()}
            if self.adversary is not None and self.adversary.weight(step):
                with self._autocast(on_cpu=False):
                    term, more = self.adversary.generator_loss(decoded, step, reconstruction, self.model.last_layer)
                loss = loss + term
                logged |= more
            with _reduce(self.parallel, last):
                (loss / len(passes)).backward()
            if adversary:
                with _reduce(adversary.discriminator, last):
                    with self._autocast(on_cpu=False):
                        judged, more = adversary.discriminator_loss(pixels, decoded)
                    (judged / len(passes)).backward()
                logged |= more
            for name, value in {"loss": loss, **logged}.items():
                figures[name] = figures[name] + value.detach() / len(passes)
            codes.append(quantized.codes)
        figures["gradient"] = nn.utils.clip_grad_norm_(self.model.parameters(), recipe.optimizer.clip or float("inf"))
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
            "adversary": self.adversary and self.adversary.state_dict(),
            "discriminator_optimizer": self.adversary and self.discriminator_optimizer.state_dict(),
        }  # fmt: skip

    def load_state(self, state: dict[str, Any]) -> None:
        """Take back what `state` gave."""
        self.model.load_state_dict(state["model"])
        self.average.load_state_dict(state["average"])
        self.model.quantizer.load_training_state(state["quantizer"])
        self.optimizer.load_state_dict(state["optimizer"])
        if self.adversary is not None:
            self.adversary.load_state_dict(state["adversary"])
            self.discriminator_optimizer.load_state_dict(state["discriminator_optimizer"])

    def _autocast(self, on_cpu: bool = True) -> torch.autocast:
        # Not of the discriminator on CPUs: PyTorch's padded bfloat16 Conv3d makes NaN of single frames there.
        enabled = self.recipe.precision == "bfloat16" and (on_cpu or self.device.type != "cpu")
        return torch.autocast(self.device.type, torch.bfloat16, enabled=enabled)

    def _by_codebook(self, codes: Tensor) -> list[Tensor]:
        return [codes] if len(self.use) == 1 else list(codes.unbind(-1))


def reconstruction_losses(
    decoded: Tensor, pixels: Tensor, recipe: VisualTokenizerRecipe, step: int, perceptual: nn.Module | None
) -> dict[str, Tensor]:
    """The weighted terms of a step's reconstruction loss, scalars by name."""
    weights = recipe.loss
    terms = {
        name: weight * term(decoded, pixels)
        for name, term in PIXEL_LOSSES.items()
        if (weight := getattr(weights, name))
    }
    if perceptual is not None and step % weights.perceptual_every == 0:
        frames = [x if x.ndim == 4 else rearrange(x, "b c t h w -> (b t) c h w") for x in (decoded, pixels)]
        terms["perceptual"] = weights.perceptual * weights.perceptual_every * perceptual(*frames).mean()
    return terms or {"nothing": decoded.sum() * 0}


def to_float(pixels: Tensor) -> Tensor:
    """uint8 → float32 in ``[-1, 1]``."""
    return pixels.float() / 127.5 - 1


@torch.no_grad()
def update_average(average: nn.Module, model: nn.Module, decay: float) -> None:
    """Move the averaged weights ``1 − decay`` of the way to the trained ones; buffers (codebooks) are copied."""
    for a, p in zip(average.parameters(), model.parameters(), strict=True):
        a.lerp_(p, 1 - decay)
    for copied, buffer in zip(average.buffers(), model.buffers(), strict=True):
        copied.copy_(buffer)


def initialise(model: VisualTokenizer, name: str) -> None:
    """Start from another tokenizer's weights.

    Raises:
        PlaitError: it cannot be loaded, or is of another architecture; only an image tokenizer may have another
            temporal factor.
    """
    source = load_tokenizer(name, "image")
    if not isinstance(source, VisualTokenizer):
        raise PlaitError(f"init: {name} is a {source.architecture} tokenizer, expected one of plait's own")
    # By name, as the tensors fit between some that differ: stems and levels have none.
    its, ours = architecture_of(source.config), architecture_of(model.config)
    if source.config.temporal_factor > 1:
        its["temporal_factor"], ours["temporal_factor"] = source.config.temporal_factor, model.config.temporal_factor
    for key in its:
        if its[key] != ours[key]:
            raise PlaitError(
                f"init: {name} has {key} {its[key]!r}, the recipe's model {ours[key]!r}; make them the same"
            )
    if source.config.temporal_factor == model.config.temporal_factor:
        model.load_state_dict(source.state_dict())
    else:
        model.inflate(source)


@torch.no_grad()
def evaluate(
    tokenizer: VisualTokenizer, heldout: dict[str, Tensor], batch: int = 32
) -> tuple[dict[str, float], dict[str, Image.Image]]:
    """Reconstruct uint8 ``"images"`` ``[N, 3, H, W]`` and ``"clips"`` ``[N, 3, T, H, W]``.

    Returns:
        PSNR in dB and SSIM (means over items; SSIM not of pictures below its window), codebook use and perplexity over
        all of it, PSNR of an unquantized thumbnail with one colour per code as the yardstick; and contact sheets by
        name, originals beside reconstructions.
    """
    tokenizer.__dict__.pop("fingerprint", None)  # of the weights before
    use = [CodebookUse(size) for size in tokenizer.codebook_sizes]
    figures: dict[str, float] = {}
    sheets: dict[str, Image.Image] = {}
    for name, items in heldout.items():
        scores: dict[str, list[Tensor]] = defaultdict(list)
        shown: list[tuple[Tensor, Tensor]] = []
        for chunk in items.split(batch if items.ndim == 4 else max(1, batch // items.shape[2])):
            pixels = to_float(chunk).to(tokenizer.device)
            codes = tokenizer.encode(pixels)
            decoded = tokenizer.decode(codes)
            grid = tuple(codes.codes.shape[-2 if name == "images" else -3 :])
            for counter, part in zip(use, codes.codes.unbind(1) if len(use) > 1 else [codes.codes], strict=True):
                counter.update(part)
            scores["psnr"].append(psnr(decoded, pixels))
            if min(pixels.shape[-2:]) >= 11:
                scores["ssim"].append(ssim(decoded, pixels))
            scores["thumbnail_psnr"].append(psnr(thumbnail(pixels, grid), pixels))
            shown += zip(pixels.cpu(), decoded.cpu(), strict=True)
            shown = shown[: 32 if name == "images" else 6]
        kind = name.removesuffix("s")
        figures |= {f"{kind}_{score}": float(torch.cat(values).mean()) for score, values in scores.items()}
        originals, copies = zip(*shown, strict=True)
        sheets[name] = (reconstruction_sheet if name == "images" else clip_sheet)(originals, copies)
    for i, counter in enumerate(use):
        suffix = f"_{i}" if len(use) > 1 else ""
        figures |= {f"codebook_use{suffix}": counter.used, f"codebook_perplexity{suffix}": counter.perplexity}
    return figures, sheets


def check_same_codebooks(model: VisualTokenizer) -> None:
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


def save(path: Path, step: int, trainer: Trainer, data: Data) -> None:
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


def restore(path: Path, trainer: Trainer, data: Data, world_size: int) -> int:
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


def _parallel(module: nn.Module) -> nn.Module:
    """The module as its processes train it together; buffers are kept alike by the quantizer itself."""
    if not dist.is_initialized():
        return module
    devices = [next(module.parameters()).device.index] if torch.cuda.is_available() else None
    return DistributedDataParallel(module, device_ids=devices, broadcast_buffers=False)


def _reduce(module: nn.Module, last: bool) -> Any:
    """Average gradients over the processes in a step's last pass only."""
    return module.no_sync() if isinstance(module, DistributedDataParallel) and not last else contextlib.nullcontext()
