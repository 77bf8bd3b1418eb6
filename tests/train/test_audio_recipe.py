from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

import plait.launch
from plait.errors import PlaitError
from plait.tokenizers.audio import AudioTokenizer
from plait.train.audio_losses import WaveLosses
from plait.train.recipe import AudioTokenizerRecipe
from plait.train.recipe_file import load_recipe
from plait.train.wave_discriminators import WaveDiscriminators

AUDIO = "kind: audio-tokenizer\nshards: [a]\nheldout: h\nout: o\n"
SHIPPED = sorted(
    str(path.relative_to(folder).with_suffix(""))
    for folder in (Path(root) / "recipes" for root in plait.launch.__path__)
    for path in folder.rglob("*.yaml")
    if "kind: audio-tokenizer" in path.read_text()
)


def load(tmp_path: Path, text: str, *overrides: str) -> Any:
    (tmp_path / "recipe.yaml").write_text(text, "utf-8")
    return load_recipe(str(tmp_path / "recipe.yaml"), overrides, ("audio-tokenizer",))


def test_recipes_are_shipped() -> None:
    assert {"tiny/audio", "audio/speech-16k", "audio/general-24k", "audio/dac-44k"} <= set(SHIPPED)


@pytest.mark.parametrize("name", SHIPPED)
def test_shipped_recipes_make_tokenizers(name: str) -> None:
    recipe = load_recipe(name)
    assert isinstance(recipe, AudioTokenizerRecipe)
    samples = round(recipe.seconds * recipe.model.sample_rate)
    with torch.device("meta"):
        parts = [AudioTokenizer(recipe.model), WaveDiscriminators(recipe.adversarial.discriminator)]
    counts = [sum(p.numel() for p in part.parameters()) / 1e6 for part in parts]
    rate = parts[0].frame_rate, parts[0].bitrate
    sizes, rates = {
        "tiny/audio": ((0, 10), (50, 1100)),
        "audio/speech-16k": ((20, 80), (50, 798)),
        "audio/general-24k": ((5, 20), (75, 6000)),
        "audio/dac-44k": ((70, 80), (86.13, 7752)),
    }.get(name, ((0, 1000), rate))
    assert sizes[0] < counts[0] < sizes[1], counts
    assert rate == pytest.approx(rates, rel=1e-3)
    assert WaveLosses(recipe.loss, recipe.model.sample_rate).windows
    if recipe.adversarial.weight:
        assert samples >= recipe.adversarial.discriminator.least_samples


@pytest.mark.slow
@pytest.mark.parametrize("name", SHIPPED)
def test_shipped_recipes_run_dry(name: str) -> None:
    """One training pass and its losses, with everything narrower."""
    narrow = [f"model.{half}.widths" for half in ("encoder", "decoder")]
    plain = load_recipe(name)
    assert isinstance(plain, AudioTokenizerRecipe)
    widths = [[max(2, w // 64) for w in half.widths] for half in (plain.model.encoder, plain.model.decoder)]
    overrides = [f"{key}={value}" for key, value in zip(narrow, widths, strict=True)]
    if plain.model.quantizer.kind != "fsq":
        overrides += ["model.quantizer.dim=16", "model.quantizer.codebook_size=16"]
    recipe = load_recipe(name, [*overrides, "adversarial.discriminator.width=1", "seconds=0.13"])
    assert isinstance(recipe, AudioTokenizerRecipe)
    torch.manual_seed(0)
    samples = torch.randn(1, recipe.model.channels, round(0.13 * recipe.model.sample_rate)) * 0.1
    with torch.autocast("cpu", torch.bfloat16, enabled=recipe.precision == "bfloat16"):
        decoded, quantized = AudioTokenizer(recipe.model)(samples)
    decoded = decoded.float()
    terms = WaveLosses(recipe.loss, recipe.model.sample_rate)(decoded, samples)
    loss = torch.stack([*terms.values(), *quantized.losses.values()]).sum()
    if recipe.adversarial.weight:
        loss = loss + sum(j.logits.mean() for j in WaveDiscriminators(recipe.adversarial.discriminator)(decoded))
    loss.backward()
    assert loss.isfinite()


def test_nested_values_take_their_types(tmp_path: Path) -> None:
    encoder = "model: {encoder: {hop: 320, window: 640, widths: [8], strides: [], blocks: [1]}}\n"
    overrides = "speed=[0.8, 1.2]", "model.decoder.widths=[8, 16]", "adversarial.discriminator.kinds=[stft]"
    recipe = load(tmp_path, AUDIO + encoder, *overrides)
    assert recipe.model.encoder.strides == ()
    assert recipe.model.encoder.widths == (8,)
    assert recipe.model.decoder.widths == (8, 16)
    assert recipe.model.decoder.causal is False
    assert recipe.speed == (0.8, 1.2)
    assert recipe.adversarial.discriminator.kinds == ("stft",)


@pytest.mark.parametrize(
    ("override", "reason"),
    [
        ("seconds=0", "seconds is 0.0, expected a number in (0, inf)"),
        ("seconds=0.01", "seconds is 160 samples, expected more than half the largest of loss.windows, 2048"),
        ("speed=[1.2, 0.9]", "speed is (1.2, 0.9), expected the smaller number first"),
        ("speed=[0.1, 1]", "speed is (0.1, 1.0), expected numbers in [0.25, 4]"),
        ("gain_db=[3, 2]", "gain_db is (3.0, 2.0), expected the smaller number first"),
        ("gain_db=[-99, 0]", "gain_db is (-99.0, 0.0), expected numbers in [-60, 60]"),
        ("eval_items=0", "eval_items is 0"),
        ("loss.mel=-1", "loss.mel is -1.0"),
        ("loss.floor=0", "loss.floor is 0.0"),
        ("loss.mels=[5, 10]", "loss.mels has 2 numbers, expected one for each of loss.windows"),
        ("loss.windows=[30, 64, 128, 256, 512, 1024, 2048]", "loss.windows is"),
        ("loss.stft_windows=[8]", "loss.stft_windows is (8,), expected numbers in [16, inf)"),
        ("{loss: {stft: 1, stft_windows: []}}", "loss.stft_windows is empty, but loss.stft is 1.0"),
        ("loss={mel: 0}", "loss has no weight above 0; there is nothing to learn"),
        ("distill.weight=1", "distill.dim and distill.weight need each other"),
        ("distill.dim=7", "distill.dim and distill.weight need each other"),
        ("batch_size=9", "batch_size is 9, expected a multiple of streams × accumulate, 2"),
        ("model.sample_rate=10", "model.sample_rate is 10"),
        ("model.channels=3", "model.channels is 3"),
        ("model.encoder.strides=[2]", "model is wrong: audio tokenizer: 5 widths, 1 strides"),
        ("model.encoder.strides=[2, 4, 5, 4]", "model is wrong: audio tokenizer: the encoder has 160 samples per code"),
        ("model.decoder.window=100", "model is wrong: audio tokenizer: window is 100"),
        ("model.quantizer.kind=rvq_l2", "model.quantizer is wrong: quantizer: codebook_size"),
        ("model.quantizer.code_dim=-1", "model.quantizer.code_dim is -1"),
        ("adversarial.features=-1", "adversarial.features is -1.0"),
        ("adversarial.loss=wgan", "adversarial is wrong: adversarial: loss is 'wgan'"),
        ("adversarial.discriminator.kinds=[scale]", "adversarial is wrong: discriminator: kinds is ['scale']"),
        ("adversarial.discriminator.periods=[1]", "adversarial.discriminator.periods is (1,)"),
        ("adversarial.discriminator.stft_windows=[66]", "adversarial is wrong: discriminator: stft_windows"),
        (
            "{seconds: 0.1, adversarial: {weight: 1}, loss: {windows: [64], mels: [8], stft_windows: [64]}}",
            "seconds is 1600 samples, expected at least 2048 for the discriminator",
        ),
        ("shards=[]", "shards is empty"),
        ("precision=float16", "precision is 'float16'"),
    ],
)
def test_values_are_checked(override: str, reason: str, tmp_path: Path) -> None:
    load(tmp_path, AUDIO)
    # Several keys at once as a file, one key both ways.
    overrides = [] if override.startswith("{") else [override]
    text = yaml.safe_dump({**yaml.safe_load(AUDIO), **({} if overrides else yaml.safe_load(override))})
    with pytest.raises(PlaitError) as caught:
        load(tmp_path, text, *overrides)
    assert str(caught.value).startswith(f"{'command line' if overrides else tmp_path / 'recipe.yaml'}: {reason}")
    assert "\n" not in str(caught.value)
