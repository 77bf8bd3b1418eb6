import math
from collections.abc import Iterator
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
import soundfile
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torch import Tensor

from plait.errors import PlaitError
from plait.tokenizers.audio import AudioConfig, AudioTokenizer, HalfConfig
from plait.tokenizers.base import Codes
from plait.tokenizers.files import SUFFIX, decode_files, encode_files
from plait.tokenizers.loading import describe_tokenizers
from plait.tokenizers.quantizer import QuantizerConfig
from plait.tokenizers.sound import read_sound
from plait.tokenizers.visual import VisualTokenizer

SMALL = AudioConfig(
    sample_rate=8000,
    encoder=HalfConfig(widths=(4, 8, 8), strides=(4, 10), blocks=(0, 1, 1)),
    decoder=HalfConfig(20, 80, (16, 16), (2,), (1, 1), causal=False),
    quantizer=QuantizerConfig(kind="rvq", levels=(), codebook_size=16, dim=4, codebooks=3),
)


def made(config: AudioConfig, folder: Path) -> AudioTokenizer:
    """Untrained, with weights that make use of all codes and now and then decode to something beyond ±1."""
    torch.manual_seed(0)
    tokenizer = AudioTokenizer(config).eval().requires_grad_(False)
    for name, parameter in tokenizer.encoder.named_parameters():
        if name.endswith("bias"):
            parameter.zero_()
    tokenizer.encoder[-1].weight.mul_(50)
    tokenizer.last_layer.mul_(2.5)
    tokenizer.save_pretrained(folder)
    return tokenizer


@pytest.fixture(scope="module")
def residual(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, AudioTokenizer]:
    """Three codebooks, mono, 8 kHz, 200 steps a second."""
    folder = tmp_path_factory.mktemp("residual")
    return folder, made(SMALL, folder)


@pytest.fixture(scope="module")
def single(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, AudioTokenizer]:
    """One codebook, stereo."""
    folder = tmp_path_factory.mktemp("single")
    return folder, made(replace(SMALL, channels=2, quantizer=QuantizerConfig(levels=(4, 4))), folder)


def noise(count: int, channels: int = 1, loudness: float = 0.1, seed: int = 0) -> Tensor:
    return torch.randn(channels, count, generator=torch.Generator().manual_seed(seed)) * loudness


def recording(path: Path, samples: Tensor, rate: int = 8000, **options: Any) -> Path:
    soundfile.write(path, samples.numpy().T, rate, **options)
    return path


@pytest.fixture
def voice(tmp_path: Path) -> Path:
    """10 seconds: two chunks."""
    return recording(tmp_path / "voice.wav", noise(80005))


def film(path: Path, rate: int = 44100) -> Path:
    with av.open(str(path), "w") as container:
        pictures, track = container.add_stream("libx264", 10), container.add_stream("aac", rate, layout="stereo")
        pictures.width, pictures.height, pictures.pix_fmt = 16, 16, "yuv420p"
        for t in range(10):
            frame = av.VideoFrame.from_ndarray(np.full((16, 16, 3), 20 * t, np.uint8), format="rgb24")
            container.mux(pictures.encode(frame))
        container.mux(pictures.encode(None))
        sound = av.AudioFrame.from_ndarray(noise(rate, 2).numpy(), "fltp", "stereo")
        sound.sample_rate, sound.pts, sound.time_base = rate, 0, Fraction(1, rate)
        container.mux(track.encode(sound))
        container.mux(track.encode(None))
    return path


def refused(call: Any, *arguments: Any, **options: Any) -> str:
    with pytest.raises(PlaitError) as raised:
        call(*arguments, **options)
    assert "\n" not in str(raised.value)
    return str(raised.value)


# --- the same as the Python API


@pytest.mark.parametrize("kind", ["residual", "single"])
def test_a_sound_there_and_back(tmp_path: Path, voice: Path, kind: str, request: pytest.FixtureRequest) -> None:
    name, tokenizer = request.getfixturevalue(kind)
    (written,) = encode_files([voice], tmp_path / "a", name)
    assert (written.source, written.file) == (str(voice), str(tmp_path / "a" / f"voice{SUFFIX}"))
    assert (written.modality, written.size, written.fps, written.sample_rate) == ("audio", (80005,), None, 8000)
    assert written.clipped is None
    assert written.real_time_factor == pytest.approx(written.seconds / (80005 / 8000), rel=0.02)
    samples = read_sound(voice, channels=tokenizer.channels).samples[None]
    codes, expected = Codes.load(written.file), tokenizer.encode(samples)
    assert torch.equal(codes.codes, expected.codes)
    assert written.grid == tuple(expected.codes.shape[1:])
    assert codes.codes.dtype == torch.int64
    assert (codes.size, codes.sample_rate, codes.scale) == ((80005,), 8000, None)
    assert codes.fingerprint == tokenizer.fingerprint
    (back,) = decode_files([Path(written.file)], tmp_path / "b", name)
    assert back.file == str(tmp_path / "b" / "voice.wav")
    expected_samples = tokenizer.decode(expected)[0]
    assert back.clipped == int((expected_samples.abs() > 1).sum()) > 0
    found = read_sound(back.file)
    assert (found.sample_rate, found.samples.shape) == (8000, (tokenizer.channels, 80005))
    assert (found.samples - expected_samples.clamp(-1, 1)).abs().max() < 1e-4


@pytest.mark.parametrize("count", [1, 39, 40, 41, 64000, 64001])
def test_every_length(tmp_path: Path, residual: tuple[Path, AudioTokenizer], count: int) -> None:
    path = recording(tmp_path / "a.wav", noise(count))
    (written,) = encode_files([path], tmp_path, residual[0])
    assert (written.size, written.grid) == ((count,), (3, math.ceil(count / 40)))
    (back,) = decode_files([Path(written.file)], tmp_path / "b", residual[0], format="flac")
    assert read_sound(back.file).samples.shape == (1, count)


@pytest.mark.parametrize("format", ["wav", "flac", "mp3", "ogg"])
def test_every_format_is_written(tmp_path: Path, voice: Path, residual: tuple[Path, Any], format: str) -> None:
    (written,) = encode_files([voice], tmp_path, residual[0])
    (back,) = decode_files([Path(written.file)], tmp_path / "b", residual[0], format=format)
    assert back.file == str(tmp_path / "b" / f"voice.{format}")
    assert len(read_sound(back.file, sample_rate=8000).samples[0]) == pytest.approx(80005, abs=1500)


def test_other_rates_and_channels_are_brought_to_the_tokenizers(
    tmp_path: Path, residual: tuple[Path, AudioTokenizer]
) -> None:
    path = recording(tmp_path / "a.flac", noise(30011, 2), 22050)
    (written,) = encode_files([path], tmp_path, residual[0])
    assert written.size == (math.ceil(30011 * 8000 / 22050),)
    samples = read_sound(path, sample_rate=8000, channels=1).samples[None]
    assert torch.equal(Codes.load(written.file).codes, residual[1].encode(samples).codes)


# --- codebooks and loudness


def test_fewer_codebooks(tmp_path: Path, voice: Path, residual: tuple[Path, AudioTokenizer]) -> None:
    every = residual[1].encode(read_sound(voice).samples[None]).codes
    # 200 steps of 4 bits a second.
    for i, (options, count) in enumerate(
        [({"n_codebooks": 2}, 2), ({"bandwidth": 0.8}, 1), ({"bandwidth": 2.3}, 2), ({"bandwidth": 99}, 3)]
    ):
        (written,) = encode_files([voice], tmp_path / str(i), residual[0], **options)
        assert torch.equal(Codes.load(written.file).codes, every[:, :count])
        (back,) = decode_files([Path(written.file)], tmp_path / str(i), residual[0])
        assert back.size == (80005,)


def test_what_is_too_loud_is_divided_by_its_peak(tmp_path: Path, residual: tuple[Path, AudioTokenizer]) -> None:
    samples = noise(20000, loudness=1.0)
    peak = samples.abs().max()
    path = recording(tmp_path / "a.wav", samples, subtype="FLOAT")
    (written,) = encode_files([path], tmp_path, residual[0])
    codes = Codes.load(written.file)
    assert torch.equal(codes.scale, peak[None])
    assert torch.equal(codes.codes, residual[1].encode((samples / peak)[None]).codes)
    (back,) = decode_files([Path(written.file)], tmp_path / "b", residual[0])
    decoded = residual[1].decode(codes)[0]
    assert back.clipped == int((decoded.abs() > 1).sum())
    assert (read_sound(back.file).samples - decoded.clamp(-1, 1)).abs().max() < 1e-4


def test_resampling_can_be_too_loud(tmp_path: Path, residual: tuple[Path, AudioTokenizer]) -> None:
    square = torch.where(torch.arange(40000) % 200 < 100, 1.0, -1.0)[None]
    path = recording(tmp_path / "a.flac", square, 44100)
    scale = Codes.load(encode_files([path], tmp_path, residual[0])[0].file).scale
    assert scale is not None
    assert scale.item() == read_sound(path, sample_rate=8000).samples.abs().max() > 1.05


@pytest.mark.parametrize("loudness", [-40.0, -23, -20])
def test_loudness_is_that_of_the_tokenizer(
    tmp_path: Path, voice: Path, residual: tuple[Path, AudioTokenizer], loudness: float
) -> None:
    expected = residual[1].encode(read_sound(voice).samples[None], loudness=loudness)
    codes = Codes.load(encode_files([voice], tmp_path, residual[0], loudness=loudness)[0].file)
    assert torch.allclose(codes.scale, expected.scale, rtol=1e-5)
    assert (codes.codes == expected.codes).float().mean() > 0.99  # another order of sums


def test_loudness_leaves_the_peak_at_one(tmp_path: Path, residual: tuple[Path, AudioTokenizer]) -> None:
    samples = noise(20000, loudness=1e-3)
    samples[0, 777] = 0.5
    path = recording(tmp_path / "a.wav", samples, subtype="FLOAT")
    codes = Codes.load(encode_files([path], tmp_path, residual[0], loudness=-10)[0].file)
    assert codes.scale.item() == 0.5
    assert torch.equal(codes.codes, residual[1].encode(samples[None] / 0.5).codes)


def test_silence_has_no_loudness(tmp_path: Path, residual: tuple[Path, AudioTokenizer]) -> None:
    path = recording(tmp_path / "a.wav", torch.zeros(1, 500))
    assert Codes.load(encode_files([path], tmp_path, residual[0], loudness=-20)[0].file).scale is None


# --- files of all sorts


def test_a_tokenizer_of_sound_takes_the_sound_of_a_film(tmp_path: Path, residual: tuple[Path, AudioTokenizer]) -> None:
    path = film(tmp_path / "film.mp4")
    (written,) = encode_files([path], tmp_path, residual[0])
    assert (written.modality, written.sample_rate) == ("audio", 8000)
    assert written.size[0] == pytest.approx(8000, abs=400)


def test_a_tokenizer_of_pictures_refuses_sound_before_any_work(tmp_path: Path, voice: Path, tokenizers: Path) -> None:
    Image.new("RGB", (16, 16)).save(tmp_path / "a.png")
    message = refused(encode_files, [tmp_path / "a.png", voice], tmp_path / "out", tokenizers / "visual")
    assert message.startswith(f"{voice}: is sound, and {tokenizers / 'visual'} has no audio")
    assert not (tmp_path / "out").exists()


def test_a_tokenizer_of_sound_refuses_pictures(tmp_path: Path, residual: tuple[Path, Any]) -> None:
    Image.new("RGB", (16, 16)).save(tmp_path / "a.png")
    assert "a.png: no sound that can be read" in refused(encode_files, [tmp_path / "a.png"], tmp_path, residual[0])
    assert "has no image" in refused(encode_files, [tmp_path / "a.png"], tmp_path, text_only(tmp_path))


def text_only(folder: Path) -> Path:
    from plait.tokenizers.text import TextTokenizer

    TextTokenizer.train(["a few words to learn from, and a few more"] * 20, 290).save_pretrained(folder / "text")
    return folder / "text"


def test_pictures_films_and_sounds_in_one_go(
    tmp_path: Path, voice: Path, residual: tuple[Path, Any], tokenizers: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The default tokenizers are told apart by the files.
    defaults = {"image": tokenizers / "visual", "video": tokenizers / "visual", "audio": residual[0]}
    monkeypatch.setattr("plait.tokenizers.files.DEFAULTS", defaults)
    Image.new("RGB", (16, 16)).save(tmp_path / "a.png")
    ticks: list[tuple[int, int]] = []
    written = encode_files(
        [tmp_path / "a.png", film(tmp_path / "film.mp4"), voice],
        tmp_path / "codes",
        advance=lambda done, total: ticks.append((done, total)),
    )
    assert [w.modality for w in written] == ["image", "video", "audio"]
    assert ticks[-1] == (1 + 10 + 2001, 1 + 10 + 2001)
    assert ticks == sorted(ticks)
    back = decode_files([Path(w.file) for w in written], tmp_path / "back")
    assert [Path(w.file).name for w in back] == ["a.png", "film.mp4", "voice.wav"]
    for format, words in (("mp3", "is image"), ("webm", "is image"), ("png", "is video")):
        message = refused(decode_files, [Path(w.file) for w in written], tmp_path / format, format=format)
        assert words in message
        assert f"and not {format}" in message


def test_the_default_tokenizers_are_loaded_when_needed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("plait.tokenizers.files.DEFAULTS", {"image": "no-such", "video": "no-such", "audio": "none"})
    path = recording(tmp_path / "a.wav", noise(100))
    assert refused(encode_files, [path], tmp_path).startswith("none: no such path")
    Image.new("RGB", (16, 16)).save(tmp_path / "a.png")
    assert refused(encode_files, [tmp_path / "a.png"], tmp_path).startswith("no-such: no such path")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"n_codebooks": 0}, "n_codebooks: is 0, must be at least 1"),
        ({"n_codebooks": 4}, "voice.wav: n_codebooks: is 4, this tokenizer has 3"),
        ({"n_codebooks": 1, "bandwidth": 2.0}, "bandwidth: n_codebooks is given too"),
        ({"bandwidth": 0.0}, "bandwidth: is 0.0"),
        ({"bandwidth": math.nan}, "bandwidth: is nan"),
        ({"loudness": 3.0}, "loudness: is 3.0, must be -100 to 0 dB"),
        ({"loudness": math.nan}, "loudness: is nan"),
    ],
)
def test_bad_options(tmp_path: Path, voice: Path, residual: tuple[Path, Any], options: Any, words: str) -> None:
    assert words in refused(encode_files, [voice], tmp_path / "out", residual[0], **options)


def test_files_that_are_not_readable(tmp_path: Path, voice: Path, residual: tuple[Path, Any]) -> None:
    data = voice.read_bytes()
    for name, content in (("cut.wav", data[:-9]), ("empty.wav", b""), ("words.mp3", b"words " * 99)):
        (tmp_path / name).write_bytes(content)
        assert name in refused(encode_files, [tmp_path / name], tmp_path / "out", residual[0])
    recording(tmp_path / "nan.wav", noise(50000) / 0, subtype="FLOAT")
    assert "not finite" in refused(encode_files, [tmp_path / "nan.wav"], tmp_path / "out", residual[0])
    assert list((tmp_path / "out").iterdir()) == []


def test_a_failing_sound_leaves_nothing(tmp_path: Path, voice: Path, residual: Any, monkeypatch: Any) -> None:
    (written,) = encode_files([voice], tmp_path / "codes", residual[0])

    def failing(*_: Any, **__: Any) -> Iterator[Tensor]:
        yield torch.zeros(1, 1, 4000)
        raise KeyboardInterrupt

    monkeypatch.setattr(AudioTokenizer, "decode_stream", failing)
    with pytest.raises(KeyboardInterrupt):
        decode_files([Path(written.file)], tmp_path / "out", residual[0])
    assert list((tmp_path / "out").iterdir()) == []


def test_little_is_held_at_once(tmp_path: Path, residual: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    path = recording(tmp_path / "a.wav", noise(400000))
    lengths: list[int] = []
    to_latents, from_latents = AudioTokenizer.to_latents, AudioTokenizer.from_latents

    def encoding(self: AudioTokenizer, samples: Tensor, stream: Any) -> Tensor:
        lengths.append(samples.shape[-1])
        return to_latents(self, samples, stream)

    def decoding(self: AudioTokenizer, z: Tensor, stream: Any) -> Tensor:
        lengths.append(z.shape[-1] * 40)
        return from_latents(self, z, stream)

    monkeypatch.setattr(AudioTokenizer, "to_latents", encoding)
    monkeypatch.setattr(AudioTokenizer, "from_latents", decoding)
    (written,) = encode_files([path], tmp_path, residual[0])
    decode_files([Path(written.file)], tmp_path / "b", residual[0])
    assert max(lengths) == 64000
    assert sum(lengths) == 800000


# --- refusals of decode

CHANGES: dict[str, tuple[Any, str]] = {
    "out of range": (lambda c: replace(c, codes=c.codes + 16), "this tokenizer has codes 0..15"),
    "negative": (lambda c: replace(c, codes=c.codes - 16), "this tokenizer has codes 0..15"),
    "floats": (lambda c: replace(c, codes=c.codes.float()), "dtype is torch.float32"),
    "another tokenizer": (lambda c: replace(c, fingerprint="f" * 64), "made by another tokenizer"),
    "an image": (lambda c: replace(c, modality="image"), "holds image codes; this decodes audio"),
    "nonsense": (lambda c: replace(c, modality=["audio"]), "holds ['audio'] codes"),
    "one codebook": (lambda c: replace(c, codes=c.codes[:, 0]), "are no audio of this tokenizer"),
    "many codebooks": (lambda c: replace(c, codes=c.codes.repeat(1, 2, 1)), "has 6 codebooks, this tokenizer has 3"),
    "nothing": (lambda c: replace(c, codes=c.codes[..., :0]), "are no audio"),
    "a batch": (lambda c: replace(c, codes=c.codes.repeat(2, 1, 1)), "holds a batch of 2"),
    "too long": (lambda c: replace(c, size=(4001,)), "does not fit 100 steps"),
    "too short": (lambda c: replace(c, size=(3960,)), "does not fit 100 steps"),
    "two sizes": (lambda c: replace(c, size=(4000, 1)), "does not fit"),
    "a size of words": (lambda c: replace(c, size=("4000",)), "does not fit"),
    "a size of parts": (lambda c: replace(c, size=(4000.0,)), "does not fit"),
    "another rate": (lambda c: replace(c, sample_rate=16000), "is at 16000 Hz, this tokenizer at 8000 Hz"),
    "no level": (lambda c: replace(c, scale=torch.zeros(1)), "scale: must hold numbers above 0"),
    "a level of nan": (lambda c: replace(c, scale=torch.full((1,), math.nan)), "scale: must hold"),
    "two levels": (lambda c: replace(c, scale=torch.ones(2)), "scale: must hold"),
    "a whole level": (lambda c: replace(c, scale=torch.ones(1, dtype=torch.int64)), "scale: must hold"),
    "no steps": (lambda c: replace(c, lengths=torch.tensor([0])), "lengths: must be ints"),
    "many steps": (lambda c: replace(c, lengths=torch.tensor([101])), "lengths: must be ints"),
    "two lengths": (lambda c: replace(c, lengths=torch.tensor([9, 9])), "lengths: must be ints"),
}


@pytest.fixture
def codes(residual: tuple[Path, AudioTokenizer]) -> Codes:
    return residual[1].encode(noise(4000)[None])


@pytest.mark.parametrize("change", CHANGES)
def test_broken_codes(tmp_path: Path, change: str, codes: Codes, residual: tuple[Path, Any]) -> None:
    broken, words = CHANGES[change]
    path = tmp_path / f"a{SUFFIX}"
    broken(codes).save(path)
    message = refused(decode_files, [path], tmp_path / "out", residual[0])
    assert message.startswith(f"{path}: ")
    assert words in message, message
    assert list((tmp_path / "out").iterdir()) == []


def test_codes_that_say_little_are_decoded(tmp_path: Path, codes: Codes, residual: tuple[Path, AudioTokenizer]) -> None:
    Codes(codes.codes.to(torch.uint8), "audio").save(tmp_path / "a.safetensors")
    (back,) = decode_files([tmp_path / "a.safetensors"], tmp_path / "out", residual[0])
    assert (back.file, back.size, back.sample_rate) == (str(tmp_path / "out" / "a.wav"), (4000,), 8000)


def test_what_was_filled_up_is_left_out(tmp_path: Path, residual: tuple[Path, AudioTokenizer]) -> None:
    codes = residual[1].encode(noise(4000)[None], lengths=torch.tensor([1234]))
    codes.save(tmp_path / "a.safetensors")
    (back,) = decode_files([tmp_path / "a.safetensors"], tmp_path / "out", residual[0])
    assert back.size == (1240,)
    assert read_sound(back.file).samples.shape == (1, 1240)


@settings(deadline=None, max_examples=25)
@given(st.data())
def test_damaged_codes_files_never_raise_anything_else(
    tmp_path_factory: pytest.TempPathFactory, residual: tuple[Path, AudioTokenizer], data: st.DataObject
) -> None:
    folder = tmp_path_factory.mktemp("damaged")
    path = folder / f"a{SUFFIX}"
    residual[1].encode(noise(400)[None], loudness=-20).save(path)
    content = bytearray(path.read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    path.write_bytes(content)
    try:
        (back,) = decode_files([path], folder, residual[0])
    except PlaitError as error:
        refusal = str(error)
    else:
        refusal = f"{path}: "
        assert read_sound(back.file).samples.shape[-1:] == back.size
    assert refusal.startswith(f"{path}: ")
    assert "\n" not in refusal


# --- info


def test_info_says_what_a_tokenizer_of_sound_is(residual: tuple[Path, AudioTokenizer]) -> None:
    (row,) = describe_tokenizers(residual[0])
    assert (row["kind"], row["architecture"], row["modalities"]) == ("audio", "plait", "audio")
    assert (row["sample rate"], row["channels"], row["samples per step"]) == (8000, 1, 40)
    assert (row["steps per second"], row["codebooks"], row["codes per second"], row["kbit/s"]) == (200, 3, 600, 2.4)
    assert row["parameters"] == sum(p.numel() for p in residual[1].parameters())


def test_a_single_codebook_has_a_code_per_step(single: tuple[Path, Any]) -> None:
    (row,) = describe_tokenizers(single[0])
    assert (row["channels"], row["codebooks"], row["codes per second"], row["kbit/s"]) == (2, 1, 200, 0.8)


def test_pictures_need_no_tokenizer_of_sound(tmp_path: Path, visual_tokenizer: VisualTokenizer) -> None:
    visual_tokenizer.save_pretrained(tmp_path / "visual")
    (row,) = describe_tokenizers(tmp_path / "visual")
    assert "sample rate" not in row
