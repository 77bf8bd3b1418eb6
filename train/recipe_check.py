"""What a recipe's values may be: ranges of its numbers, known names, settings that fit together."""

from collections.abc import Iterator
from typing import Any

from plait.errors import PlaitError
from plait.infer.sampling import Sampling
from plait.model.config import DecoderConfig, RopeScaling
from plait.tokenizers.audio import AudioConfig, HalfConfig
from plait.tokenizers.modalities import MODALITIES
from plait.tokenizers.quantizer import QuantizerConfig
from plait.tokenizers.visual import VisualConfig
from plait.train.adversarial import AdversarialConfig
from plait.train.discriminator import DiscriminatorConfig
from plait.train.wave_adversary import WaveAdversarialConfig
from plait.train.wave_discriminators import WaveDiscriminatorConfig

# Every number of a recipe, by its dotted key: the interval that it, or each number of its list or mapping, must lie in.
RANGES = {
    "vocabulary_size": "[1, inf)",
    "image_size": "[1, inf)",
    "batch_size": "[1, inf)",
    "global_batch": "[1, inf)",
    "micro_batch": "[1, inf)",
    "streams": "[1, inf)",
    "steps": "[1, inf)",
    "eval_every": "[1, inf)",
    "save_every": "[1, inf)",
    "log_every": "[1, inf)",
    "keep": "[1, inf)",
    "seed": "[0, 4294967296)",
    "accumulate": "[1, inf)",
    "shift": "[0, inf)",
    "discriminator_lr": "(0, inf)",
    "loss.l1": "[0, inf)",
    "loss.l2": "[0, inf)",
    "loss.log_l2": "[0, inf)",
    "loss.ssim": "[0, inf)",
    "loss.temporal": "[0, inf)",
    "loss.perceptual": "[0, inf)",
    "loss.perceptual_every": "[1, inf)",
    "loss.wave": "[0, inf)",
    "loss.mel": "[0, inf)",
    "loss.stft": "[0, inf)",
    "loss.windows": "[16, inf)",
    "loss.mels": "[1, inf)",
    "loss.stft_windows": "[16, inf)",
    "loss.floor": "(0, 1)",
    "distill.weight": "[0, inf)",
    "distill.dim": "[0, inf)",
    "seconds": "(0, inf)",
    "gain_db": "[-60, 60]",
    "speed": "[0.25, 4]",
    "eval_items": "[1, inf)",
    "clips.share": "[0, 1]",
    "clips.batch_size": "[1, inf)",
    "clips.frames": "[1, inf)",
    "clips.fps": "(0, inf)",
    "adversarial.weight": "[0, inf)",
    "adversarial.lecam": "[0, inf)",
    "adversarial.start_discriminator": "[0, inf)",
    "adversarial.start_generator": "[0, inf)",
    "adversarial.ramp": "[0, inf)",
    "adversarial.features": "[0, inf)",
    "adversarial.discriminator.periods": "[2, inf)",
    "adversarial.discriminator.stft_windows": "[64, inf)",
    "adversarial.discriminator.band_windows": "[64, inf)",
    "adversarial.discriminator.width": "[1, inf)",
    "adversarial.discriminator.layers": "[1, inf)",
    "z_loss": "[0, inf)",
    "ema": "[0, 1)",
    "optimizer.lr": "(0, inf)",
    "optimizer.min_lr": "[0, inf)",
    "optimizer.warmup_steps": "[0, inf)",
    "optimizer.betas": "[0, 1)",
    "optimizer.weight_decay": "[0, inf)",
    "optimizer.clip": "[0, inf)",
    "parallel.zero": "[0, 3]",
    "lora.rank": "[0, inf)",
    "lora.alpha": "(0, inf)",
    "lora.dropout": "[0, 1)",
    "sequence.length": "[1, inf)",
    "sequence.media_first": "[0, 1]",
    "sequence.drop_text": "[0, 1]",
    "sequence.context_loss": "[0, inf)",
    "sequence.loss_weights": "[0, inf)",
    "model.vocabulary_size": "[0, inf)",
    "model.width": "[1, inf)",
    "model.layers": "[1, inf)",
    "model.heads": "[1, inf)",
    "model.kv_heads": "[1, inf)",
    "model.head_size": "[0, inf)",
    "model.ffn_width": "[0, inf)",
    "model.rope_theta": "(0, inf)",
    "model.rope_scaling.factor": "(0, inf)",
    "model.rope_scaling.original_context": "[0, inf)",
    "model.rope_scaling.low_freq_factor": "(0, inf)",
    "model.rope_scaling.high_freq_factor": "(0, inf)",
    "model.rope_scaling.beta_fast": "(0, inf)",
    "model.rope_scaling.beta_slow": "(0, inf)",
    "model.rope_scaling.attention_factor": "[0, inf)",
    "model.norm_eps": "(0, inf)",
    "model.sliding_window": "[0, inf)",
    "model.dropout": "[0, 1)",
    "model.attention_dropout": "[0, 1)",
    "model.patch": "[1, inf)",
    "model.widths": "[1, inf)",
    "model.encoder_blocks": "[0, inf)",
    "model.decoder_blocks": "[0, inf)",
    "model.attention": "[0, inf)",
    "model.temporal_factor": "[1, 8]",
    "model.sample_rate": "[1000, 384000]",
    "model.channels": "[1, 2]",
    **{
        f"model.{half}.{name}": interval
        for half in ("encoder", "decoder")
        for name, interval in {
            "hop": "[1, inf)",
            "window": "[0, inf)",
            "widths": "[1, inf)",
            "strides": "[2, inf)",
            "blocks": "[0, inf)",
        }.items()
    },
    "model.quantizer.levels": "[3, inf)",
    "model.quantizer.codebook_size": "[0, 2147483648)",
    "model.quantizer.dim": "[0, inf)",
    "model.quantizer.code_dim": "[0, inf)",
    "model.quantizer.codebooks": "[1, inf)",
    "model.quantizer.decay": "[0, 1]",
    "model.quantizer.dead_code": "[0, 1]",
    "model.quantizer.commitment": "[0, inf)",
    "model.quantizer.entropy": "[0, inf)",
    "model.quantizer.entropy_gamma": "[0, inf)",
    "model.quantizer.entropy_temperature": "(0, inf)",
    "model.quantizer.dropout": "[0, 1]",
}
_DTYPES = ("float32", "bfloat16")


def flat(plain: dict[Any, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted keys and their values."""
    for key, value in plain.items():
        if isinstance(value, dict) and value:
            yield from flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def problems(plain: Any) -> Iterator[tuple[list[str], str]]:
    """What would fail late or silently do nothing: the keys that are to blame, the first of them wrong, and why."""
    for name in ("shards", "tokenizers", "heldout", "out"):
        spare = {"shards": plain["kind"] == "visual-tokenizer", "tokenizers": bool(plain.get("init"))}
        if not plain.get(name, name) and not spare.get(name):
            yield [name], "is not set; name a folder" if name == "tokenizers" else "is empty; name a folder"
    generation, weights = plain.get("generation", {}), plain.get("sequence", {}).get("loss_weights", {})
    for name, modalities in (("generation", generation), ("sequence.loss_weights", weights)):
        for modality in modalities:
            if modality not in MODALITIES:
                yield [f"{name}.{modality}"], f"is of no known modality; there are {', '.join(MODALITIES)}"
    yield from _number_problems(plain)
    yield from _generation_problems(generation)
    match plain["kind"]:
        case "decoder":
            yield from _decoder_problems(plain)
        case "visual-tokenizer" | "audio-tokenizer":
            yield from _tokenizer_problems(plain)


def _decoder_problems(plain: Any) -> Iterator[tuple[list[str], str]]:
    try:
        DecoderConfig(**plain["model"] | {"rope_scaling": RopeScaling(**plain["model"]["rope_scaling"])})
    except PlaitError as error:
        yield ["model"], f"is wrong: {error}"
    for key, value in (("train", plain["train"]), ("rows", plain["rows"]), ("lora.rank", plain["lora"]["rank"])):
        if value and not plain["init"]:
            yield [key, "init"], "needs init, a trained model of which the rest is kept; leave it out"
    if plain["lora"]["quantize"] and not plain["lora"]["rank"]:
        yield ["lora.quantize", "lora.rank"], "quantizes what LoRA learns beside; it needs a lora.rank above 0"


def _tokenizer_problems(plain: Any) -> Iterator[tuple[list[str], str]]:
    try:
        quantizer = QuantizerConfig(**plain["model"]["quantizer"])
    except PlaitError as error:
        yield ["model.quantizer"], f"is wrong: {error}"
        return
    parts: dict[str, Any] = {"quantizer": quantizer}
    try:
        if plain["kind"] == "visual-tokenizer":
            yield from _visual_problems(plain, VisualConfig(**plain["model"] | parts))
        else:
            parts |= {half: HalfConfig(**plain["model"][half]) for half in ("encoder", "decoder")}
            yield from _audio_problems(plain, AudioConfig(**plain["model"] | parts))
    except PlaitError as error:
        yield ["model"], f"is wrong: {error}"
        return
    if plain["batch_size"] % (divisor := plain["streams"] * plain["accumulate"]):
        reason = f"is {plain['batch_size']}, expected a multiple of streams × accumulate, {divisor}"
        yield ["batch_size", "streams", "accumulate"], reason


def _visual_problems(plain: Any, model: VisualConfig) -> Iterator[tuple[list[str], str]]:
    try:
        discriminator = DiscriminatorConfig(**plain["adversarial"]["discriminator"])
        AdversarialConfig(**plain["adversarial"] | {"discriminator": discriminator})
    except PlaitError as error:
        yield ["adversarial"], f"is wrong: {error}"
    else:
        least = discriminator.least_side
        if plain["adversarial"]["weight"] and plain["image_size"] < least:
            reason = f"is {plain['image_size']}, expected at least {least} for the discriminator's layers"
            yield ["image_size", "adversarial"], reason
    if plain["image_size"] % model.factor:
        reason = f"is {plain['image_size']}, expected a multiple of the model's factor, {model.factor}"
        yield ["image_size", "model"], reason
    clips, loss = plain["clips"], plain["loss"]
    if clips["shards"] and (clips["frames"] - 1) % model.temporal_factor:
        reason = f"is {clips['frames']}, expected 1 + a multiple of the temporal factor, {model.temporal_factor}"
        yield ["clips.frames", "model"], reason
    if bool(clips["shards"]) and not clips["heldout"]:
        yield ["clips.heldout", "clips.shards"], "is empty; name a folder of clips to evaluate on"
    if not plain["shards"] and not (clips["shards"] and clips["share"] == 1):
        yield ["shards"], "is empty; name folders of images, or train on clips alone with clips.share=1"
    if clips["shards"] and clips["batch_size"] % (parts := plain["streams"] * plain["accumulate"]):
        reason = f"is {clips['batch_size']}, expected a multiple of streams × accumulate, {parts}"
        yield ["clips.batch_size", "streams", "accumulate"], reason
    if bool(loss["perceptual"]) != bool(loss["network"]):
        yield ["loss.network", "loss.perceptual"], "and loss.perceptual need each other: a network and its weight"
    if loss["ssim"] and plain["image_size"] < 11:
        yield ["image_size", "loss.ssim"], "is below 11, the window of loss.ssim"


def _audio_problems(plain: Any, model: AudioConfig) -> Iterator[tuple[list[str], str]]:
    samples, loss = round(plain["seconds"] * model.sample_rate), plain["loss"]
    try:
        discriminator = WaveDiscriminatorConfig(**plain["adversarial"]["discriminator"])
        WaveAdversarialConfig(**plain["adversarial"] | {"discriminator": discriminator})
    except PlaitError as error:
        yield ["adversarial"], f"is wrong: {error}"
    else:
        if plain["adversarial"]["weight"] and samples < discriminator.least_samples:
            reason = f"is {samples} samples, expected at least {discriminator.least_samples} for the discriminator"
            yield ["seconds", "adversarial", "model"], reason
    if len(loss["windows"]) != len(loss["mels"]):
        yield ["loss.mels", "loss.windows"], f"has {len(loss['mels'])} numbers, expected one for each of loss.windows"
    for key in ("windows", "stft_windows"):
        if any(window % 4 for window in loss[key]):
            yield [f"loss.{key}"], f"is {loss[key]}, expected multiples of 4"
        elif loss[key] and max(loss[key]) >= 2 * samples:
            reason = f"is {samples} samples, expected more than half the largest of loss.{key}, {max(loss[key])}"
            yield ["seconds", f"loss.{key}", "model"], reason
    for name, key in (("mel", "windows"), ("stft", "stft_windows")):
        if loss[name] and not loss[key]:
            yield [f"loss.{key}", f"loss.{name}"], f"is empty, but loss.{name} is {loss[name]}"
    if not any(loss[name] for name in ("wave", "mel", "stft")) and not plain["adversarial"]["weight"]:
        yield ["loss"], "has no weight above 0; there is nothing to learn"
    for key in ("gain_db", "speed"):
        if plain[key][0] > plain[key][1]:
            yield [key], f"is {plain[key]}, expected the smaller number first"
    if bool(plain["distill"]["weight"]) != bool(plain["distill"]["dim"]):
        yield ["distill.dim", "distill.weight"], "and distill.weight need each other: the teacher's channels"


def _number_problems(plain: Any) -> Iterator[tuple[list[str], str]]:
    for key, value in flat(plain):
        as_in_init = key == "store" and not value and plain["kind"] == "decoder"
        if key in ("store", "precision", "parallel.dtype") and value not in _DTYPES and not as_in_init:
            yield [key], f"is {value!r}, expected {' or '.join(map(repr, _DTYPES))}"
        interval = RANGES.get(key) or RANGES.get(key.rpartition(".")[0], "(-inf, inf)")
        for number in value if isinstance(value, (list, tuple)) else [value]:
            if isinstance(number, (int, float)) and not _lies_in(number, interval):
                yield [key], f"is {value}, expected {'a number' if number is value else 'numbers'} in {interval}"
    optimizer = plain.get("optimizer", {"lr": 0, "min_lr": 0})
    if optimizer["min_lr"] > optimizer["lr"]:
        reason = f"is {optimizer['min_lr']}, expected no more than optimizer.lr, {optimizer['lr']}"
        yield ["optimizer.min_lr", "optimizer.lr"], reason


def _generation_problems(generation: dict[str, Any]) -> Iterator[tuple[list[str], str]]:
    for modality, settings in generation.items():
        if not isinstance(settings, dict):
            yield [f"generation.{modality}"], f"is {settings!r}, expected settings such as {{temperature: 0.5}}"
        for name, value in settings.items():
            is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
            if not is_number and name != "guidance_domain":
                yield [f"generation.{modality}.{name}"], f"is {value!r}, expected a number"
            try:
                Sampling.of({name: value})
            except PlaitError as error:
                yield [f"generation.{modality}.{name}"], f"is wrong: {error}"


def _lies_in(number: float, interval: str) -> bool:
    """Whether a number is in an interval such as "[0, 1)"; NaN is in none."""
    low, high = map(float, interval[1:-1].split(","))
    return low < number < high or (number == low and interval[0] == "[") or (number == high and interval[-1] == "]")
