"""Recipes: what a run is, as dataclasses with their defaults. `plait.train.recipe_file` reads them from YAML."""

from dataclasses import dataclass, field
from typing import Any

from omegaconf import MISSING

from plait.model.config import DecoderConfig
from plait.model.lora import LoRAConfig
from plait.tokenizers.audio import AudioConfig
from plait.tokenizers.visual import VisualConfig
from plait.train.adversarial import AdversarialConfig
from plait.train.wave_adversary import WaveAdversarialConfig


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
class LossConfig:
    """What a visual tokenizer's reconstructions are judged by: the weight of each term, 0 turns it off.

    Attributes:
        l1: absolute error.
        l2: squared error.
        log_l2: logarithm of each item's squared error.
        ssim: 1 − SSIM; needs pictures of at least 11×11.
        temporal: absolute error of the change from frame to frame; clips only.
        perceptual: distance of features of a frozen network.
        network: that network: the path of VGG16's or AlexNet's weights (torchvision's), or "stlpips-vgg" or
            "stlpips-alex" with the package stlpips-pytorch installed.
        heads: path of LPIPS's learned weights for that network; "" compares the features as they are.
        perceptual_every: the perceptual term counts in every so many-th step, that many times as much.
    """

    l1: float = 0.2
    l2: float = 1.0
    log_l2: float = 0.0
    ssim: float = 0.0
    temporal: float = 0.0
    perceptual: float = 0.0
    network: str = ""
    heads: str = ""
    perceptual_every: int = 1


@dataclass
class ClipConfig:
    """Clips to train on, besides or instead of images.

    Attributes:
        shards: folders of raw shards with clips (.mp4, .webm, .gif, or animated .webp); none trains on images only.
        heldout: folder of raw shards with clips to evaluate on.
        share: share of the optimizer steps that take clips instead of images.
        batch_size: clips per optimizer step over all processes.
        frames: frames of a clip, 1 + a multiple of the model's temporal factor.
        fps: at which they are taken; a slower clip keeps its own rate.
    """

    shards: list[str] = field(default_factory=list)
    heldout: str = ""
    share: float = 0.5
    batch_size: int = 8
    frames: int = 9
    fps: float = 12.0


@dataclass
class VisualTokenizerRecipe:
    """Train a visual tokenizer on the images and clips of raw shards.

    Attributes:
        shards: folders of raw shards with images to train on.
        heldout: folder of raw shards with images to evaluate on.
        out: run folder; the tokenizer ends in ``out/tokenizer``.
        init: a tokenizer to start from, of the same architecture or an image tokenizer that is inflated to video.
        clips: what is trained on besides images.
        loss: of the reconstructions.
        adversarial: training against a discriminator.
        discriminator_lr: the discriminator's learning rate, constant.
        image_size: images and clips are scaled to cover a square of this side and cropped to it.
        random_crop: crop anywhere instead of in the middle.
        batch_size: images per optimizer step over all processes.
        accumulate: forward passes per optimizer step and process.
        streams: independent data streams over all processes, each in a worker process of its own. The same number
            gives the same batches on any number of processes that divides it.
        steps: optimizer steps.
        flip: mirror half of the images and clips.
        shift: move images and clips by up to this many pixels each way, repeating their edge.
        ema: decay of the averaged weights, which are what is evaluated and saved.
        precision: "float32", or "bfloat16" for autocast; weights, quantizer and losses stay in float32.
        eval_every: steps between evaluations and checkpoints.
        log_every: steps between log lines.
        store: dtype of the saved weights, "float32" or "bfloat16".
    """

    shards: list[str]
    heldout: str
    out: str
    init: str = ""
    model: VisualConfig = field(default_factory=VisualConfig)
    clips: ClipConfig = field(default_factory=ClipConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    adversarial: AdversarialConfig = field(default_factory=AdversarialConfig)
    discriminator_lr: float = 1e-4
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    image_size: int = 64
    random_crop: bool = False
    batch_size: int = 32
    accumulate: int = 1
    streams: int = 2
    steps: int = 4000
    flip: bool = True
    shift: int = 0
    ema: float = 0.999
    precision: str = "float32"
    eval_every: int = 500
    log_every: int = 50
    seed: int = 0
    store: str = "bfloat16"
    kind: str = "visual-tokenizer"


@dataclass
class AudioLossConfig:
    """What an audio tokenizer's reconstructions are judged by: the weight of each term, 0 turns it off.

    Attributes:
        wave: absolute error of the samples.
        mel: absolute error of log10 mel spectra, summed over ``windows``.
        stft: spectral convergence and absolute error of log magnitudes, the mean over ``stft_windows``.
        windows: samples per mel spectrum, multiples of 4.
        mels: mel bands for each of them.
        stft_windows: samples per spectrum, multiples of 4; those that are also in ``windows`` cost little more.
        floor: noise of this magnitude is added before logarithms are taken. 1e-5 is what 16 bits have anyway; a larger
            one has nothing learnt of what is too soft to be heard.
    """

    wave: float = 0.0
    mel: float = 1.0
    stft: float = 0.0
    windows: tuple[int, ...] = (32, 64, 128, 256, 512, 1024, 2048)
    mels: tuple[int, ...] = (5, 10, 20, 40, 80, 160, 320)
    stft_windows: tuple[int, ...] = (512, 1024, 2048)
    floor: float = 1e-5


@dataclass
class DistillConfig:
    """Latents of the first codebook are drawn towards those of a teacher (SpeechTokenizer, arXiv 2308.16692; Mimi).

    The teacher's latents ``[T, D]`` lie beside each sound as ``key.npy``; their T steps span all of it evenly.

    Attributes:
        weight: of one minus the cosine between them and a linear projection of ours; 0 turns it off.
        dim: the teacher's channels, D.
    """

    weight: float = 0.0
    dim: int = 0


@dataclass
class AudioTokenizerRecipe:
    """Train an audio tokenizer on the sounds of raw shards.

    Attributes:
        shards: folders of raw shards with sounds to train on; files of any rate and number of channels. Recordings
            longer than some minutes are best cut before: a file is decoded as a whole, for one crop.
        heldout: folder of raw shards with sounds to evaluate on.
        out: run folder; the tokenizer ends in ``out/tokenizer``.
        init: a tokenizer of the same architecture to start from.
        loss: of the reconstructions.
        balance: weights are shares of the gradient, as in EnCodec, rather than factors; see `plait.train.balancer`.
        adversarial: training against discriminators.
        discriminator_lr: the discriminators' learning rate, constant.
        distill: learning from a teacher.
        seconds: length of a crop; a shorter sound lies somewhere in silence.
        gain_db: least and largest gain in dB, drawn evenly; nothing is amplified beyond full scale.
        speed: slowest and fastest speed, drawn evenly on a logarithmic scale; it changes the voice and the pace.
        batch_size: crops per optimizer step over all processes.
        accumulate: forward passes per optimizer step and process.
        streams: independent data streams over all processes, each in a worker process of its own. The same number
            gives the same batches on any number of processes that divides it.
        steps: optimizer steps.
        ema: decay of the averaged weights, which are what is evaluated and saved.
        precision: "float32", or "bfloat16" for autocast; weights, quantizer and losses stay in float32.
        eval_items: held-out sounds that are evaluated, of each the first 10 seconds.
        eval_every: steps between evaluations and checkpoints.
        log_every: steps between log lines.
        store: dtype of the saved weights, "float32" or "bfloat16".
    """

    shards: list[str]
    heldout: str
    out: str
    init: str = ""
    model: AudioConfig = field(default_factory=AudioConfig)
    loss: AudioLossConfig = field(default_factory=AudioLossConfig)
    balance: bool = False
    adversarial: WaveAdversarialConfig = field(default_factory=WaveAdversarialConfig)
    discriminator_lr: float = 1e-4
    distill: DistillConfig = field(default_factory=DistillConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    seconds: float = 1.0
    gain_db: tuple[float, float] = (0.0, 0.0)
    speed: tuple[float, float] = (1.0, 1.0)
    batch_size: int = 16
    accumulate: int = 1
    streams: int = 2
    steps: int = 4000
    ema: float = 0.999
    precision: str = "float32"
    eval_items: int = 32
    eval_every: int = 500
    log_every: int = 50
    seed: int = 0
    store: str = "bfloat16"
    kind: str = "audio-tokenizer"


@dataclass
class ParallelConfig:
    """How the decoder is spread over processes.

    Attributes:
        zero: DeepSpeed ZeRO stage, 0 to 3.
        dtype: "float32" or "bfloat16" for parameters and activations; bfloat16 keeps float32 masters.
        checkpoint_activations: keep only what goes into a block, and compute the rest again for the backward pass
            (arXiv 1604.06174): about a third more time, for a memory that hardly grows with depth.
        compile: have torch.compile compile the blocks.
    """

    zero: int = 0
    dtype: str = "float32"
    checkpoint_activations: bool = False
    compile: bool = False


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

    With ``init`` it adapts a trained one. Then ``train``, ``rows`` and ``lora`` say what learns, and all else is
    frozen; with none of them everything learns. Anole trains the head's rows of the image codes
    (``train: [lm_head.weight]``, ``rows: [visual.0]``), TEAL the new rows of embedding and head (``rows: [new]``).

    Attributes:
        shards: folders of token shards.
        tokenizers: folder whose subfolders are the tokenizers that made the shards, or a bundle; with ``init``, those
            that it lacks.
        out: run folder; checkpoints go to ``out/checkpoints``, the bundle to ``out/bundle``, what learnt beside frozen
            weights to ``out/adapter`` besides.
        init: bundle to start from, its folder or a shipped name. Architecture, vocabulary, tokenizers and settings are
            its own; the vocabulary grows by the modalities that the shards hold and it lacks.
        model: the architecture; left out with ``init``.
        train: patterns of parameters that learn, such as ``layers.*.mlp.*`` or ``*norm*``.
        rows: of embedding and head (of one of them, if ``train`` matches one of them) only the rows of these blocks of
            the vocabulary learn; patterns, and "new" is all that the vocabulary was grown by.
        lora: adapters that learn beside linear layers, and are merged into them in the bundle.
        global_batch: sequences per optimizer step over all processes and accumulation steps.
        micro_batch: sequences per forward pass of one process at most.
        streams: independent data streams over all processes, each in a worker process of its own; they divide
            ``global_batch``. The same number gives the same batches on any number of processes that divides it.
        steps: optimizer steps.
        z_loss: weight of the squared log-partition term (PaLM, arXiv 2204.02311), 0 turns it off.
        save_every: steps between checkpoints.
        log_every: steps between log lines.
        keep: checkpoints that are kept.
        store: dtype of the bundle's weights, "float32" or "bfloat16"; by default as in ``init``, else bfloat16.
        generation: settings that `plait generate` takes from the bundle; with ``init`` they come on top of its own.
        layouts: how the codes of several codebooks become one stream, by modality: "flatten" (where not named), "delay"
            or "delay:0,1,1" with your own delays.
    """

    shards: list[str]
    tokenizers: str = ""
    out: str = MISSING
    init: str = ""
    model: DecoderConfig = field(default_factory=DecoderConfig)
    train: list[str] = field(default_factory=list)
    rows: list[str] = field(default_factory=list)
    lora: LoRAConfig = field(default_factory=LoRAConfig)
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
    store: str = ""
    generation: dict[str, Any] = field(default_factory=dict)
    layouts: dict[str, str] = field(default_factory=dict)
    kind: str = "decoder"


Recipe = TextTokenizerRecipe | VisualTokenizerRecipe | AudioTokenizerRecipe | DecoderRecipe
