"""A run's folder: its resolved recipe, what it ran on, and one line of JSON per logged step."""

import fcntl
import json
import platform
import subprocess
import time
from importlib.metadata import version
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
from PIL import Image

from plait.errors import PlaitError
from plait.tokenizers.base import make_folder, write_file, write_json
from plait.tokenizers.media import Audio
from plait.tokenizers.sound import write_sound
from plait.train.recipe import Recipe
from plait.train.recipe_file import save_recipe

# What a run shows besides figures.
Exhibit = Image.Image | Audio


def keep(exhibit: Exhibit, path: Path) -> None:
    """Write a PNG or WAV beside the figures; the suffix is added."""
    if isinstance(exhibit, Audio):
        write_sound(exhibit, path.with_suffix(".wav"))
    else:
        exhibit.save(path.with_suffix(".png"))


class Journal:
    """Writes ``recipe.yaml``, ``run.json`` and ``metrics.jsonl`` into ``out``, and keeps other runs out of it.

    Args:
        out: the run's folder.
        recipe: what runs.
        active: False makes every call do nothing, for all ranks but the first.
        facts: further entries of ``run.json``, the vocabulary's fingerprint for instance.

    Raises:
        PlaitError: the folder cannot be made, or another run writes to it.
    """

    def __init__(self, out: Path, recipe: Recipe, active: bool = True, **facts: Any) -> None:
        self.path = out / "metrics.jsonl"
        self.active = active
        self.started = time.monotonic()
        self._writer: Any = None
        self._first = 1
        if not active:
            return
        make_folder(out)
        self._lock = _lock(out)
        save_recipe(recipe, out / "recipe.yaml")
        versions = {"python": platform.python_version(), "torch": torch.__version__, "plait": version("plait")}
        write_json(out / "run.json", {"commit": _commit(), "versions": versions, **facts})

    def log(self, step: int, **metrics: float) -> None:
        """Append one line to ``metrics.jsonl``, print it, and send it to TensorBoard."""
        if not self.active:
            return
        seconds = round(time.monotonic() - self.started, 1)
        rounded = {k: float(f"{v:.6g}") for k, v in metrics.items()}
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"step": step, "seconds": seconds} | rounded, allow_nan=False) + "\n")
        print(f"step {step:6d}  {seconds:8.1f} s  " + "  ".join(f"{k} {v:.4g}" for k, v in rounded.items()), flush=True)
        for name, value in rounded.items():
            self._tensorboard().add_scalar(name, value, step)
        self._tensorboard().flush()  # by itself it waits two minutes, and a killed run would lose them

    def show(self, step: int, name: str, exhibit: Exhibit) -> None:
        """Send an image or sound to TensorBoard; of sound the channels are mixed."""
        if not self.active:
            return
        if isinstance(exhibit, Audio):
            mixed = exhibit.samples.mean(0, keepdim=True).clamp(-1, 1)
            self._tensorboard().add_audio(name, mixed, step, sample_rate=exhibit.sample_rate)
        else:
            self._tensorboard().add_image(name, np.array(exhibit), step, dataformats="HWC")
        self._tensorboard().flush()

    def _tensorboard(self) -> Any:
        from torch.utils.tensorboard import SummaryWriter

        if self._writer is None:
            self._writer = SummaryWriter(str(self.path.parent / "tensorboard"), purge_step=self._first)
        return self._writer

    def rewind(self, step: int) -> None:
        """Drop the lines after ``step``, which a resumed run writes again, and a last line that a crash cut short."""
        if self.active and self.path.is_file():
            lines = [line for line in self.path.read_text("utf-8").splitlines(keepends=True) if line.endswith("\n")]
            kept = [line for line in lines if json.loads(line)["step"] <= step]
            write_file(self.path, "".join(kept).encode())
            self._first = step + 1
            if kept:
                self.started -= json.loads(kept[-1])["seconds"]


def _lock(out: Path) -> IO[str]:
    """Hold the folder for as long as this process lives; its children do not hold it."""
    file = (out / ".lock").open("w")
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        raise PlaitError(
            f"{out}: another run is writing to this folder; stop it first, or choose another out"
        ) from None
    return file


def _commit() -> str | None:
    """The source tree's git commit, None when it is not a checkout."""
    try:
        here = Path(__file__).resolve().parent
        command = ["git", "-C", str(here), "rev-parse", "HEAD"]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None
