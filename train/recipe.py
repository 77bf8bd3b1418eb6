"""Recipes: what a run is, as dataclasses with their defaults. `plait.train.recipe_file` reads them from YAML."""

from dataclasses import dataclass, field
from typing import Any

from plait.model.config import DecoderConfig
from plait.tokenizers.visual import VisualConfig


@dataclass
class OptimizerConfig:
    """AdamW with linear warm-up and cosine decay.

    Attributes:
        lr: peak learning rate, reached after ``warmup_steps``.
        min_lr: learning rate at the last step.
        warmup_steps: optimizer steps of linear warm-up from 0.
        betas: AdamW's decay of the two moments.
        weight_decay: on matrices only, never on norms or biases.
        clip: largest norm of the whole gradient; 0 turns clipping off.
    """

    lr: float = 5e-4
    min_lr: float = 5e-5
    warmup_steps: int = 100
    betas: tuple[float, float] = (0.9, 0.95)
    weight_decay: float = 0.05
    clip: float = 1.0


@dataclass
class TextTokenizerRecipe:
    """Train a SentencePiece BPE on the text of raw shards.

    Attributes:
        shards: folders of raw shards.
        out: folder that the tokenizer is written to.
        vocabulary_size: pieces, the 256 byte pieces included.
    """

    shards: list[str]
    out: str
    vocabulary_size: int = 1024
    kind: str = "text-tokenizer"


@dataclass
class VisualTokenizerRecipe:
    """Train a visual tokenizer on the images of raw shards.

    Attributes:
        shards: folders of raw shards to train on.
        heldout: folder of raw shards to evaluate on.
        out: run folder; the tokenizer ends in ``out/tokenizer``.
        image_size: images are scaled to cover a square of this side and cropped to it.
        batch_size: images per optimizer step.
        steps: optimizer steps.
        l1: weight of the absolute error.
        l2: weight of the squared error.
        log_l2: weight of the logarithm of each image's squared error.
        flip: mirror half of the images.
        ema: decay of the averaged weights, which are what is evaluated and saved.
        eval_every: steps between evaluations and checkpoints.
        log_every: steps between log lines.
        store: dtype of the saved weights, "float32" or "bfloat16".
    """

    shards: list[str]
    heldout: str
    out: str
    model: VisualConfig = field(default_factory=VisualConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    image_size: int = 64
    batch_size: int = 32
    steps: int = 4000
    l1: float = 0.2
    l2: float = 1.0
    log_l2: float = 0.0
    flip: bool = True
    ema: float = 0.999
    eval_every: int = 500
    log_every: int = 50
    seed: int = 0
    store: str = "bfloat16"
    kind: str = "visual-tokenizer"


@dataclass
class ParallelConfig:
    """How the decoder is spread over processes.

    Attributes:
        zero: DeepSpeed ZeRO stage, 0 to 3.
        dtype: "float32" or "bfloat16" for parameters and activations; bfloat16 keeps float32 masters.
    """

    zero: int = 0
    dtype: str = "float32"


@dataclass
class SequenceConfig:
    """From documents to training sequences.

    Attributes:
        length: tokens per packed sequence.
        media_first: share of text–media documents that are turned round, so the model learns both directions.
        drop_text: share of documents with text before media that lose the text, for classifier-free guidance.
        context_loss: loss weight of media that stand before text: they are what the text is about, not what the
            document teaches.
        loss_weights: weight of each modality's tokens; 1 where not named.
    """

    length: int = 512
    media_first: float = 0.5
    drop_text: float = 0.1
    context_loss: float = 0.0
    loss_weights: dict[str, float] = field(default_factory=dict)


@dataclass
class DecoderRecipe:
    """Train a decoder on token shards, ending in a bundle.

    Attributes:
        shards: folders of token shards.
        tokenizers: folder whose subfolders are the tokenizers that made the shards.
        out: run folder; checkpoints go to ``out/checkpoints``, the bundle to ``out/bundle``.
        global_batch: sequences per optimizer step over all processes and accumulation steps.
        micro_batch: sequences per forward pass of one process at most.
        streams: independent data streams over all processes, each in a worker process of its own; they divide
            ``global_batch``. The same number gives the same batches on any number of processes that divides it.
        steps: optimizer steps.
        z_loss: weight of the squared log-partition term (PaLM, arXiv 2204.02311), 0 turns it off.
        save_every: steps between checkpoints.
        log_every: steps between log lines.
        keep: checkpoints that are kept.
        store: dtype of the bundle's weights, "float32" or "bfloat16".
        generation: settings that `plait generate` takes from the bundle.
    """

    shards: list[str]
    tokenizers: str
    out: str
    model: DecoderConfig = field(default_factory=DecoderConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    sequence: SequenceConfig = field(default_factory=SequenceConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    global_batch: int = 8
    micro_batch: int = 8
    streams: int = 4
    steps: int = 1000
    z_loss: float = 0.0
    save_every: int = 500
    log_every: int = 10
    keep: int = 2
    seed: int = 0
    store: str = "bfloat16"
    generation: dict[str, Any] = field(default_factory=dict)
    kind: str = "decoder"


Recipe = TextTokenizerRecipe | VisualTokenizerRecipe | DecoderRecipe
