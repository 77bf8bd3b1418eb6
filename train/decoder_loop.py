"""Training of the decoder, top to bottom: token shards → packed batches → DeepSpeed steps → ``out/bundle``.

The loss of a step is the weighted mean over all its tokens on all processes. With the same ``streams``, one process
and several see the same batches, and their losses agree up to rounding.
"""

import hashlib
import math
import os
import shutil
from pathlib import Path
from typing import Any

import torch
import torch.distributed

from plait.errors import PlaitError
from plait.tokenizers.grammar import Grammar
from plait.tokenizers.loading import find_weights
from plait.train.adapt import build_decoder, build_vocabulary, write_bundle
from plait.train.engine import OTHER_CHECKPOINT, UNREADABLE, Engine, divide_batch, start_distributed
from plait.train.journal import Journal
from plait.train.loader import batches, open_loader
from plait.train.optimizer import build_optimizer, learning_rate
from plait.train.recipe import DecoderRecipe
from plait.train.recipe_file import check_resumable
from plait.train.sequences import Batch, SequenceEncoder
from plait.train.shards import MANIFEST


def train_decoder(recipe: DecoderRecipe) -> Path:
    """Run a recipe to its end, from its last checkpoint if it has one.

    Returns:
        the bundle's folder.

    Raises:
        PlaitError: shards or tokenizers are missing or do not belong together, the batch cannot be divided, or what is
            to be adapted is not there or does not fit.
    """
    out = Path(recipe.out)
    vocabulary = build_vocabulary(recipe)
    divide_batch(recipe, int(os.environ.get("WORLD_SIZE", "1")))
    if (out / "checkpoints" / "latest").is_file():
        check_resumable(recipe, out)
    torch.manual_seed(recipe.seed)
    module = build_decoder(recipe, vocabulary)
    rank, world_size = start_distributed()
    engine = Engine(module, build_optimizer(module, recipe.optimizer), recipe, world_size)
    loader = open_loader(
        recipe.shards, SequenceEncoder(Grammar(vocabulary), recipe.sequence, recipe.seed), kind="tokens", scratch=out,
        batch_size=recipe.global_batch // recipe.streams, seed=recipe.seed, streams=recipe.streams, rank=rank,
        world_size=world_size, packing_buffer=128,
    )  # fmt: skip
    journal = Journal(out, recipe, active=rank == 0, vocabulary=vocabulary.fingerprint, processes=world_size)
    checkpoints = Checkpoints(out / "checkpoints", engine, loader, rank, world_size, recipe)
    first = checkpoints.restore()
    journal.rewind(first)

    stream = batches(loader)
    streams = recipe.streams // world_size
    for step in range(first + 1, recipe.steps + 1):
        lr = learning_rate(step - 1, recipe.steps, recipe.optimizer)
        share = Batch.join([next(stream) for _ in range(streams)])
        metrics = train_step(engine, share, recipe, list(vocabulary.modalities), lr)
        if step % recipe.log_every == 0 or step == 1 or step == recipe.steps:
            journal.log(step, **metrics)
        if step % recipe.save_every == 0 or step == recipe.steps:
            checkpoints.save(step)

    trained = engine.weights()
    if rank == 0:
        write_bundle(recipe, vocabulary, module, trained)
    engine.close()
    return out / "bundle"


def train_step(engine: Engine, share: Batch, recipe: DecoderRecipe, groups: list[str], lr: float) -> dict[str, float]:
    """One optimizer step over this process's share of the batch.

    Returns:
        its loss, the loss per modality and the gradient's norm, over all processes.
    """
    # The whole step's weight must be known before the first backward pass.
    total = float(engine.total(share.targets.weights.sum().double().reshape(1)))
    if total == 0:
        raise PlaitError(
            "sequence: no token of this step carries loss; check loss_weights, context_loss and the data's loss flags"
        )
    # Weighted loss, then per group: sum of losses and count.
    sums = torch.zeros(1 + 2 * len(groups), dtype=torch.float64, device=engine.device)
    for batch in share.split(engine.micro_batch):
        batch = batch.to(engine.device)
        losses = engine.forward(batch.tokens, batch.positions, targets=batch.targets, z_loss=recipe.z_loss)
        engine.backward(losses.loss, total)
        engine.step(lr)
        sums += torch.cat([losses.loss.detach().reshape(1), losses.group_loss, losses.group_count]).double()
    sums = engine.total(sums)
    metrics = {"loss": float(sums[0]) / total, "lr": lr, "gradient": engine.gradient_norm, "tokens": total}
    for i, name in enumerate(groups):
        count = float(sums[1 + len(groups) + i])
        if count:
            metrics[f"loss_{name}"] = float(sums[1 + i]) / count
    for name, value in metrics.items():
        if not math.isfinite(value):
            raise PlaitError(f"{name} is {value}; go on from the last checkpoint with a lower optimizer.lr")
    return metrics


class Checkpoints:
    """Checkpoints of engine and loader, ``step-N`` folders; complete once ``latest`` names them.

    A run goes on with the number of processes that it began with: each one's loader state is its own.
    """

    def __init__(
        self, folder: Path, engine: Engine, loader: Any, rank: int, world_size: int, recipe: DecoderRecipe
    ) -> None:
        self.folder, self.engine, self.loader = folder, engine, loader
        self.rank, self.world_size, self.keep = rank, world_size, recipe.keep
        begun_with = [Path(shards) / MANIFEST for shards in recipe.shards]
        if recipe.init:
            begun_with.append(find_weights(recipe.init) / "config.json")  # has the weights' checksums
        self.data = hashlib.sha256(b"".join(path.read_bytes() for path in begun_with)).hexdigest()

    def save(self, step: int) -> None:
        """Write a checkpoint, then drop the oldest beyond ``keep``."""
        tag = f"step-{step}"
        (self.folder / tag).mkdir(parents=True, exist_ok=True)
        state = {
            "world_size": self.world_size, "data": self.data, "loader": self.loader.save_state_rank(),
            "random": torch.get_rng_state(),
        }  # fmt: skip
        torch.save(state, self.folder / tag / f"loader-{self.rank}.pt")
        torch.distributed.barrier()
        self.engine.save(self.folder, tag)
        torch.distributed.barrier()
        if self.rank == 0:
            steps = sorted(int(name) for path in self.folder.glob("step-*") if (name := path.name[5:]).isdigit())
            for old in steps[: -self.keep]:
                shutil.rmtree(self.folder / f"step-{old}")

    def restore(self) -> int:
        """Load the latest checkpoint; returns its step, 0 if there is none.

        Raises:
            PlaitError: it is broken, or was made by another number of processes.
        """
        latest = self.folder / "latest"
        if not latest.is_file():
            return 0
        tag = latest.read_text().strip()
        if not (self.folder / tag).is_dir() or not tag.startswith("step-"):
            raise PlaitError(f"{latest}: names {tag!r}, which is no checkpoint; {OTHER_CHECKPOINT}")
        path = self.folder / tag / f"loader-{self.rank}.pt"
        if not path.is_file():
            raise PlaitError(f"{path}: missing; resume with the number of processes that the run began with")
        # The run's own file, and the loader's state is a Python object: this is not for files from elsewhere.
        try:
            state = torch.load(path, weights_only=False)
        except UNREADABLE as error:
            reason = str(error).partition("\n")[0] or "empty file"
            raise PlaitError(f"{path}: checkpoint cannot be read ({reason}); {OTHER_CHECKPOINT}") from None
        if state["world_size"] != self.world_size:
            raise PlaitError(
                f"{self.folder}: the run began with {state['world_size']} processes, this is {self.world_size}; "
                "resume with as many, or start in another folder"
            )
        if state["data"] != self.data:
            raise PlaitError(f"{self.folder}: the run began with other shards or another init; start in another folder")
        self.engine.load(self.folder, tag)
        torch.set_rng_state(state["random"])
        self.loader.restore_state_rank(state["loader"])
        return int(tag[5:])
