"""Training of the audio tokenizer: what `plait.train.tokenizer_loop` needs to know of sound."""

import math
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from plait.errors import PlaitError
from plait.tokenizers.audio import AudioTokenizer
from plait.tokenizers.audio_metrics import mel_distance, si_sdr, stoi
from plait.tokenizers.averages import straight_through
from plait.tokenizers.loading import load_tokenizer
from plait.tokenizers.media import Audio
from plait.tokenizers.metrics import CodebookUse
from plait.tokenizers.quantizer import Quantized, Quantizer
from plait.tokenizers.sheets import spectrogram_sheet
from plait.train.audio_losses import WaveLosses
from plait.train.balancer import Balancer
from plait.train.journal import Exhibit
from plait.train.recipe import AudioTokenizerRecipe
from plait.train.sounds import SoundEncoder, load_heldout
from plait.train.tokenizer_loop import (
    Batch,
    Source,
    TokenizerData,
    TokenizerTrainer,
    codebook_figures,
    parallel,
    reduced,
    train_tokenizer,
)
from plait.train.wave_adversary import WaveAdversary
from plait.train.wave_discriminators import WaveDiscriminators

# Held-out sounds to see, and to hear.
_SEEN, _HEARD = 6, 3


def train_audio(recipe: AudioTokenizerRecipe) -> Path:
    """Run a recipe to its end; see `train_tokenizer`."""
    return train_tokenizer(recipe, load_heldout, Data, Trainer, evaluate)


class Data(TokenizerData):
    """Crops, float32 ``[B, C, N]``; when the recipe distills, with the teacher's latents ``[B, t, D]``.

    Args:
        recipe: the run.
        rank: of this process.
        world_size: number of processes.
    """

    def __init__(self, recipe: AudioTokenizerRecipe, rank: int, world_size: int) -> None:
        # The buffer holds whole files.
        sources = {"sounds": Source(recipe.shards, SoundEncoder(recipe), recipe.batch_size, 300)}
        super().__init__(recipe, sources, rank, world_size)


class Trainer(TokenizerTrainer):
    """Trains an audio tokenizer.

    Args:
        recipe: the run.
        device: where it computes.

    Raises:
        PlaitError: ``init`` cannot be loaded or does not fit.
    """

    recipe: AudioTokenizerRecipe
    adversary: WaveAdversary | None
    model: AudioTokenizer

    def __init__(self, recipe: AudioTokenizerRecipe, device: torch.device) -> None:
        super().__init__(recipe, device)
        self.losses = WaveLosses(recipe.loss, recipe.model.sample_rate).to(device)
        self.balancer = Balancer() if recipe.balance else None

    def build_model(self) -> AudioTokenizer:
        """The tokenizer, from ``init`` if the recipe has one."""
        model = AudioTokenizer(self.recipe.model)
        if self.recipe.init:
            initialise(model, self.recipe.init)
        return model.to(self.device)

    def build_head(self) -> nn.Module | None:
        """The projection to the teacher's channels."""
        distill = self.recipe.distill
        if not distill.weight:
            return None
        return parallel(nn.Linear(self.model.quantizer.dim, distill.dim).to(self.device))

    def build_adversary(self) -> WaveAdversary:
        """The recipe's discriminators."""
        config = self.recipe.adversarial
        return WaveAdversary(parallel(WaveDiscriminators(config.discriminator).to(self.device)), config)

    def inputs(self, batch: Batch) -> Tensor:
        """The samples."""
        return batch if isinstance(batch, Tensor) else batch[0]

    def judge(
        self, decoded: Tensor, original: Tensor, quantized: Quantized, batch: Batch, step: int, last: bool
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """By `WaveLosses`, the discriminators and the teacher; logged without their weights."""
        terms = self.losses(decoded, original)
        weights = {name: float(getattr(self.recipe.loss, name)) for name in terms}
        if self.adversary is not None and self.adversary.weight(step):
            with self.autocast(on_cpu=False):
                terms |= self.adversary.generator_losses(decoded, original)
            weights |= self.adversary.weights(step)
        if not terms:  # the discriminators are alone and not yet to be listened to
            loss = decoded.sum() * 0
        elif self.balancer is not None:
            loss = self.balancer.combine(terms, weights, decoded)
        else:
            loss = torch.stack([weights[name] * term for name, term in terms.items()]).sum()
        if self.head is not None:
            latents = first_latents(self.model.quantizer, quantized)
            with reduced(self.head, last):
                terms["distill"] = teacher_distance(self.head(latents), batch[1])
            loss = loss + self.recipe.distill.weight * terms["distill"]
        return loss, terms

    def state(self) -> dict[str, Any]:
        """As of all trainers, and the balancer."""
        return super().state() | {"balancer": self.balancer and self.balancer.state_dict()}

    def load_state(self, state: dict[str, Any]) -> None:
        """Take back what `state` gave."""
        super().load_state(state)
        if self.balancer is not None:
            self.balancer.load_state_dict(state["balancer"])


def first_latents(quantizer: Quantizer, quantized: Quantized) -> Tensor:
    """What the first codebook alone says, ``[B, t, dim]``; gradients reach the encoder as those of the latents do."""
    if len(quantizer.codebook_sizes) == 1:
        return quantized.latents
    return straight_through(quantized.latents, quantizer.latents(quantized.codes[..., :1]))


def teacher_distance(ours: Tensor, teacher: Tensor) -> Tensor:
    """One minus the cosine between two ``[B, t, D]``, the mean over all steps; those whose teacher is 0 count as 0."""
    there = teacher.any(-1)
    return ((1 - F.cosine_similarity(ours.float(), teacher, dim=-1)) * there).mean()


def initialise(model: AudioTokenizer, name: str) -> None:
    """Start from another tokenizer's weights.

    Raises:
        PlaitError: it cannot be loaded, or is of another architecture.
    """
    source = load_tokenizer(name, "audio")
    if not isinstance(source, AudioTokenizer):
        raise PlaitError(f"init: {name} is a {source.architecture} tokenizer, expected one of plait's own")
    its, ours = ({n: tuple(t.shape) for n, t in m.state_dict().items()} for m in (source, model))
    for tensor in {**its, **ours}:
        if its.get(tensor) != ours.get(tensor):
            shapes = " and ".join(str(shape) if shape else "missing" for shape in (its.get(tensor), ours.get(tensor)))
            raise PlaitError(f"init: {name} and the recipe's model differ: {tensor} is {shapes}; make them the same")
    model.load_state_dict(source.state_dict())


@torch.no_grad()
def evaluate(tokenizer: AudioTokenizer, heldout: list[Tensor]) -> tuple[dict[str, float], dict[str, Exhibit]]:
    """Reconstruct sounds ``[C, n]``, each by itself.

    Returns:
        means over the sounds of mel distance, SI-SDR in dB and, with pystoi installed, STOI; codebook use and
        perplexity over all of them. And spectrograms of some, and some to hear.
    """
    tokenizer.__dict__.pop("fingerprint", None)  # of the weights before
    rate, device = tokenizer.sample_rate, tokenizer.device
    use = [CodebookUse(size) for size in tokenizer.codebook_sizes]
    scores: dict[str, list[float]] = {"mel_distance": [], "si_sdr": [], "stoi": []}
    pairs: list[tuple[Tensor, Tensor]] = []
    for sound in heldout:
        codes = tokenizer.encode(sound[None].to(device))
        decoded = tokenizer.decode(codes)[0].cpu()
        for counter, part in zip(use, codes.codes.unbind(1) if len(use) > 1 else [codes.codes], strict=True):
            counter.update(part)
        scores["mel_distance"].append(float(mel_distance(sound[None], decoded[None], rate)))
        if not math.isnan(ratio := float(si_sdr(sound[None], decoded[None]))):  # silence has none
            scores["si_sdr"].append(ratio)
        if find_spec("pystoi") and (score := stoi(sound, decoded, rate)) is not None:
            scores["stoi"].append(score)
        if len(pairs) < _SEEN:
            pairs.append((sound, decoded))
    figures = {name: sum(values) / len(values) for name, values in scores.items() if values}
    originals, copies = zip(*pairs, strict=True)
    exhibits: dict[str, Exhibit] = {"spectrograms": spectrogram_sheet(originals, copies, rate)}
    for i, (original, copy) in enumerate(pairs[:_HEARD]):
        exhibits |= {f"sound-{i}": Audio(original, rate), f"sound-{i}-decoded": Audio(copy, rate)}
    return figures | codebook_figures(use), exhibits
