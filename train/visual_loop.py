"""Training of the visual tokenizer: what `plait.train.tokenizer_loop` needs to know of pictures and clips."""

from collections import defaultdict
from pathlib import Path

import torch
from einops import rearrange
from torch import Tensor, nn

from plait.errors import PlaitError
from plait.tokenizers.evaluate import thumbnail
from plait.tokenizers.loading import load_tokenizer
from plait.tokenizers.metrics import CodebookUse, psnr, ssim
from plait.tokenizers.perceptual import load_perceptual
from plait.tokenizers.quantizer import Quantized
from plait.tokenizers.sheets import clip_sheet, reconstruction_sheet
from plait.tokenizers.visual import VisualTokenizer, architecture_of
from plait.train.adversarial import Adversary
from plait.train.crops import ClipEncoder, ImageEncoder, load_heldout
from plait.train.discriminator import build_discriminator
from plait.train.journal import Exhibit
from plait.train.recipe import VisualTokenizerRecipe
from plait.train.reconstruction import PIXEL_LOSSES
from plait.train.tokenizer_loop import (
    Batch,
    Source,
    TokenizerData,
    TokenizerTrainer,
    codebook_figures,
    parallel,
    train_tokenizer,
)


def train_visual(recipe: VisualTokenizerRecipe) -> Path:
    """Run a recipe to its end; see `train_tokenizer`."""
    return train_tokenizer(recipe, load_heldout, Data, Trainer, evaluate)


class Data(TokenizerData):
    """Uint8 pixels ``[B, 3, H, W]`` or, in the share of the steps that the recipe says, ``[B, 3, T, H, W]``.

    Args:
        recipe: the run.
        rank: of this process.
        world_size: number of processes.
    """

    def __init__(self, recipe: VisualTokenizerRecipe, rank: int, world_size: int) -> None:
        clips = recipe.clips
        self.share = clips.share if clips.shards else 0.0
        sources = {}
        if self.share < 1:
            sources["images"] = Source(recipe.shards, ImageEncoder(recipe), recipe.batch_size, 5000)
        if self.share > 0:
            # The buffer holds whole recordings.
            sources["clips"] = Source(clips.shards, ClipEncoder(recipe), clips.batch_size, 100)
        super().__init__(recipe, sources, rank, world_size)

    def source(self, step: int) -> str:
        """Images or clips."""
        return "clips" if int(step * self.share) > int((step - 1) * self.share) else "images"


class Trainer(TokenizerTrainer):
    """Trains a visual tokenizer.

    Args:
        recipe: the run.
        device: where it computes.

    Raises:
        PlaitError: ``init`` or the perceptual network cannot be loaded or do not fit.
    """

    recipe: VisualTokenizerRecipe
    adversary: Adversary | None
    model: VisualTokenizer

    def __init__(self, recipe: VisualTokenizerRecipe, device: torch.device) -> None:
        super().__init__(recipe, device)
        self.perceptual: nn.Module | None = None
        if recipe.loss.perceptual:
            self.perceptual = load_perceptual(recipe.loss.network, recipe.loss.heads or None).to(device)

    def build_model(self) -> VisualTokenizer:
        """The tokenizer, from ``init`` if the recipe has one."""
        model = VisualTokenizer(self.recipe.model)
        if self.recipe.init:
            initialise(model, self.recipe.init)
        return model.to(self.device, memory_format=torch.channels_last)  # type: ignore[call-overload, no-any-return]

    def build_adversary(self) -> Adversary:
        """A patch discriminator."""
        config = self.recipe.adversarial
        return Adversary(parallel(build_discriminator(config.discriminator).to(self.device)), config)

    def inputs(self, batch: Batch) -> Tensor:
        """The pixels."""
        assert isinstance(batch, Tensor)
        return to_float(batch)

    def judge(
        self, decoded: Tensor, original: Tensor, quantized: Quantized, batch: Batch, step: int, last: bool
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """By `reconstruction_losses` and the discriminator."""
        terms = reconstruction_losses(decoded, original, self.recipe, step, self.perceptual)
        loss = reconstruction = torch.stack(list(terms.values())).sum()
        figures = {**terms, "psnr": psnr(decoded.detach(), original).mean()}
        if self.adversary is not None and self.adversary.weight(step):
            with self.autocast(on_cpu=False):
                term, more = self.adversary.generator_loss(decoded, step, reconstruction, self.model.last_layer)
            loss = loss + term
            figures |= more
        return loss, figures


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
) -> tuple[dict[str, float], dict[str, Exhibit]]:
    """Reconstruct uint8 ``"images"`` ``[N, 3, H, W]`` and ``"clips"`` ``[N, 3, T, H, W]``.

    Returns:
        PSNR in dB and SSIM (means over items; SSIM not of pictures below its window), codebook use and perplexity over
        all of it, PSNR of an unquantized thumbnail with one colour per code as the yardstick; and contact sheets by
        name, originals beside reconstructions.
    """
    tokenizer.__dict__.pop("fingerprint", None)  # of the weights before
    use = [CodebookUse(size) for size in tokenizer.codebook_sizes]
    figures: dict[str, float] = {}
    sheets: dict[str, Exhibit] = {}
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
    return figures | codebook_figures(use), sheets
