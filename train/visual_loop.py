"""Training of the visual tokenizer, top to bottom: raw shards → crops → steps → ``out/tokenizer``.

`train_visual` is the loop; `ImageEncoder` turns samples into crops; `evaluate` measures on held-out shards. Killed at
any time, a run goes on from its last checkpoint with the same batches.
"""

import copy
import hashlib
import random
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from megatron.energon import SkipSample, stateless
from PIL import Image, ImageOps
from torch import Tensor, nn

from plait.errors import PlaitError
from plait.tokenizers.media import contact_sheet, read_image, to_image, to_pixels
from plait.tokenizers.metrics import CodebookUse, psnr
from plait.tokenizers.visual import VisualTokenizer
from plait.train.documents import member
from plait.train.journal import Journal
from plait.train.loader import SampleEncoder, batches, open_loader
from plait.train.optimizer import build_optimizer, learning_rate, set_learning_rate
from plait.train.recipe import VisualTokenizerRecipe
from plait.train.recipe_file import check_resumable
from plait.train.shards import read_samples


def crop_square(image: Image.Image, side: int) -> Image.Image:
    """Scale to cover a square of ``side`` pixels and crop its middle."""
    return image if image.size == (side, side) else ImageOps.fit(image, (side, side), Image.Resampling.BICUBIC)


class ImageEncoder(SampleEncoder):
    """Raw samples → pixel crops ``[B, 3, side, side]``; samples without a readable image are skipped."""

    def __init__(self, side: int, flip: bool, seed: int) -> None:
        super().__init__()
        self.side, self.flip, self.seed = side, flip, seed
        self.broken: set[str] = set()  # what was named already

    @stateless
    def encode_sample(self, sample: dict[str, Any]) -> Any:
        """Decode, crop, mirror."""
        data = member(sample, "image")
        if data is None:
            raise SkipSample
        try:
            image = crop_square(read_image(data, sample["__key__"]), self.side)
        except PlaitError as error:
            if str(error) not in self.broken:
                self.broken.add(str(error))
                print(f"skipped {error}", flush=True)
            raise SkipSample from None
        draw = hashlib.sha256(f"{self.seed}/{sample['__key__']}/{self.current_sample_index}".encode()).digest()
        if self.flip and random.Random(draw).random() < 0.5:
            image = ImageOps.mirror(image)
        return {**{k: v for k, v in sample.items() if k.startswith("__")}, "pixels": to_pixels(image)}

    @stateless
    def batch(self, samples: list[Any]) -> Tensor:
        """Stack the crops."""
        return torch.stack([sample["pixels"] for sample in samples])


def train_visual(recipe: VisualTokenizerRecipe) -> VisualTokenizer:
    """Run a recipe to its end and return the trained tokenizer, as stored in ``out/tokenizer``.

    Raises:
        PlaitError: the data is missing, the loss is no number, or ``out`` holds a run that began with another recipe.
    """
    out = Path(recipe.out)
    if (out / "checkpoint.pt").is_file():
        check_resumable(recipe, out)
    torch.manual_seed(recipe.seed)
    heldout = load_heldout(recipe)
    encoder = ImageEncoder(recipe.image_size, recipe.flip, recipe.seed)
    loader = open_loader(
        recipe.shards,
        encoder,
        kind="raw",
        scratch=out,
        batch_size=recipe.batch_size,
        seed=recipe.seed,
        shuffle_buffer=5000,
    )
    model = VisualTokenizer(recipe.model).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    average = copy.deepcopy(model).requires_grad_(False)
    optimizer = build_optimizer(model, recipe.optimizer)
    journal = Journal(out, recipe, parameters=sum(p.numel() for p in model.parameters()))
    first = _restore(out / "checkpoint.pt", model, average, optimizer, loader)
    journal.rewind(first)

    stream = batches(loader)
    for step in range(first + 1, recipe.steps + 1):
        set_learning_rate(optimizer, learning_rate(step - 1, recipe.steps, recipe.optimizer))
        pixels = next(stream).contiguous(memory_format=torch.channels_last)
        decoded, codes = model(pixels)
        loss = reconstruction_loss(decoded, pixels, recipe)
        if not loss.isfinite():
            raise PlaitError(f"loss is {loss.item()} at step {step}; lower optimizer.lr or look at the data")
        optimizer.zero_grad()
        loss.backward()
        norm = nn.utils.clip_grad_norm_(model.parameters(), recipe.optimizer.clip or float("inf"))
        optimizer.step()
        update_average(average, model, min(recipe.ema, step / (step + 10)))
        if step % recipe.log_every == 0:
            quality = float(psnr(decoded.detach(), pixels).mean())
            journal.log(step, loss=loss.item(), gradient=float(norm), psnr=quality, batch_codes=codes.unique().numel())
        if step % recipe.eval_every == 0 or step == recipe.steps:
            figures, sheet = evaluate(average, heldout)
            journal.log(step, **figures)
            sheet.save(out / "reconstructions.png")
            _save(out / "checkpoint.pt", step, model, average, optimizer, loader)

    average.save_pretrained(out / "tokenizer", dtype=getattr(torch, recipe.store))
    tokenizer = VisualTokenizer.from_pretrained(out / "tokenizer")
    figures, sheet = evaluate(tokenizer, heldout)
    journal.log(recipe.steps, **{f"stored_{name}": value for name, value in figures.items()})
    sheet.save(out / "reconstructions.png")
    return tokenizer


def reconstruction_loss(decoded: Tensor, pixels: Tensor, recipe: VisualTokenizerRecipe) -> Tensor:
    """``l1 · |d − p| + l2 · (d − p)² + log_l2 · log(mean over the image of (d − p)²)``, averaged over the batch.

    The last term is the negative mean PSNR up to scale: it counts a halved error the same on easy and on hard images.
    """
    squared = F.mse_loss(decoded, pixels, reduction="none").flatten(1).mean(1)
    return (
        recipe.l1 * F.l1_loss(decoded, pixels)
        + recipe.l2 * squared.mean()
        + recipe.log_l2 * squared.clamp_min(1e-5).log().mean()
    )


@torch.no_grad()
def update_average(average: nn.Module, model: nn.Module, decay: float) -> None:
    """Move the averaged weights ``1 − decay`` of the way to the trained ones."""
    for a, p in zip(average.parameters(), model.parameters(), strict=True):
        a.lerp_(p, 1 - decay)


def load_heldout(recipe: VisualTokenizerRecipe) -> Tensor:
    """The held-out images as uint8 ``[N, 3, side, side]``; one that cannot be read is named and left out."""
    crops = []
    for sample in read_samples(Path(recipe.heldout)):
        if (data := member(sample, "image")) is None:
            continue
        try:
            pixels = to_pixels(crop_square(read_image(data, sample["__key__"]), recipe.image_size))
        except PlaitError as error:
            print(f"skipped {error}", flush=True)
            continue
        crops.append(((pixels + 1) * 127.5).round().to(torch.uint8))
    if not crops:
        raise PlaitError(f"{recipe.heldout}: holds no images that can be read; heldout needs some to evaluate on")
    return torch.stack(crops)


@torch.no_grad()
def evaluate(tokenizer: VisualTokenizer, images: Tensor, batch: int = 64) -> tuple[dict[str, float], Image.Image]:
    """Reconstruct uint8 images ``[N, 3, H, W]``.

    Returns:
        PSNR (mean over images, dB), codebook use and perplexity, PSNR of an unquantized thumbnail with one colour per
        code as the yardstick, and a contact sheet of originals, each followed by its reconstruction.
    """
    use = CodebookUse(tokenizer.codebook_sizes[0])
    scores, thumbnails = [], []
    rows: list[Image.Image] = []
    for chunk in images.split(batch):
        pixels = chunk.float() / 127.5 - 1
        codes = tokenizer.encode(pixels)
        decoded = tokenizer.decode(codes)
        use.update(codes.codes)
        scores.append(psnr(decoded, pixels))
        small = F.interpolate(pixels, scale_factor=1 / tokenizer.factor, mode="area")
        thumbnails.append(psnr(F.interpolate(small, size=pixels.shape[-2:], mode="bicubic"), pixels))
        if len(rows) < 64:
            rows += [to_image(x) for pair in zip(pixels, decoded, strict=True) for x in pair]
    figures = {
        "heldout_psnr": float(torch.cat(scores).mean()),
        "thumbnail_psnr": float(torch.cat(thumbnails).mean()),
        "codebook_use": use.used,
        "codebook_perplexity": use.perplexity,
    }
    return figures, contact_sheet(rows[:64], columns=8)


def _save(path: Path, step: int, *parts: Any) -> None:
    model, average, optimizer, loader = parts
    state = {
        "step": step, "model": model.state_dict(), "average": average.state_dict(),
        "optimizer": optimizer.state_dict(), "loader": loader.save_state_rank(),
    }  # fmt: skip
    torch.save(state, path.with_suffix(".tmp"))
    path.with_suffix(".tmp").replace(path)


def _restore(path: Path, *parts: Any) -> int:
    """Load a checkpoint of this run, if there is one; returns its step.

    Raises:
        PlaitError: it cannot be read, or is of another architecture.
    """
    if not path.is_file():
        return 0
    # The run's own file, and the loader's state is a Python object: this is not for files from elsewhere.
    model, average, optimizer, loader = parts
    try:
        state = torch.load(path, map_location="cpu", weights_only=False)
        model.load_state_dict(state["model"])
        average.load_state_dict(state["average"])
        optimizer.load_state_dict(state["optimizer"])
    except Exception as error:  # unpickling and loading raise whatever they meet
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise PlaitError(
            f"{path.parent}: its checkpoint is not of this recipe's model ({reason}); choose another out"
        ) from None
    loader.restore_state_rank(state["loader"])
    return int(state["step"])
