import io
import math
import os
import struct
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
import soundfile
import soxr
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from plait.errors import PlaitError
from plait.tokenizers.media import Audio, Video
from plait.tokenizers.sound import (
    FORMATS,
    SoundWriter,
    is_sound,
    measure,
    read_sound,
    sound_facts,
    stream_sound,
    to_samples,
    write_sound,
    write_sound_bytes,
)
from plait.tokenizers.video import write_video

# What libsndfile writes, as (format, subtype).
EXACT = [
    ("WAV", "PCM_U8"),
    ("WAV", "PCM_16"),
    ("WAV", "PCM_24"),
    ("WAV", "PCM_32"),
    ("WAV", "FLOAT"),
    ("WAV", "DOUBLE"),
    ("WAV", "ALAW"),
    ("WAV", "ULAW"),
    ("WAVEX", "PCM_24"),
    ("RF64", "PCM_16"),
    ("FLAC", "PCM_S8"),
    ("FLAC", "PCM_16"),
    ("FLAC", "PCM_24"),
    ("AIFF", "PCM_16"),
    ("AIFF", "FLOAT"),
    ("AU", "PCM_16"),
    ("AU", "ULAW"),
]
LOSSY = [("MP3", "MPEG_LAYER_III"), ("OGG", "VORBIS"), ("OGG", "OPUS")]
ALL = [*EXACT, *LOSSY]
LAYOUTS = {1: "mono", 2: "stereo"}


def noise(channels: int, count: int, seed: int = 0) -> Tensor:
    """Noise that lossy codecs keep: little of it is high."""
    white = torch.randn(channels, 1, count + 32, generator=torch.Generator().manual_seed(seed))
    return torch.nn.functional.conv1d(white, torch.hann_window(33)[None, None] / 16)[:, 0, :count] * 0.3


def tone(frequency: float, rate: int, count: int, channels: int = 1) -> Tensor:
    return (
        (0.5 * torch.sin(2 * math.pi * frequency * torch.arange(count, dtype=torch.float64) / rate))
        .float()[None]
        .repeat(channels, 1)
    )


def encoded(samples: Tensor, rate: int = 16000, format: str = "WAV", subtype: str = "PCM_16") -> bytes:
    """A file by libsndfile."""
    buffer = io.BytesIO()
    soundfile.write(buffer, samples.numpy().T, rate, format=format, subtype=subtype)
    return buffer.getvalue()


def decoded(data: bytes) -> Tensor:
    return torch.from_numpy(soundfile.read(io.BytesIO(data), dtype="float32", always_2d=True)[0].T.copy())


def refused(call: Callable[..., Any], *arguments: Any, **options: Any) -> str:
    with pytest.raises(PlaitError) as raised:
        call(*arguments, **options)
    assert "\n" not in str(raised.value)
    return str(raised.value)


def shift(found: Tensor, expected: Tensor) -> int:
    """Samples by which one signal lies behind the other."""
    count = min(len(found), len(expected))
    both = (np.fft.rfft(v[:count].numpy(), 2 * count) for v in (found, expected))
    a, b = both
    return int((np.fft.irfft(a * b.conj()).argmax() + count) % (2 * count) - count)


# --- the same as libsndfile


@pytest.mark.parametrize("kind", EXACT, ids="-".join)
@pytest.mark.parametrize("channels", [1, 2])
def test_every_subtype_is_read_exactly(tmp_path: Path, kind: tuple[str, str], channels: int) -> None:
    data = encoded(noise(channels, 5000), 22050, *kind)
    found = read_sound(data, "a")
    assert (found.sample_rate, found.samples.dtype) == (22050, torch.float32)
    assert torch.equal(found.samples, decoded(data))
    (tmp_path / "a").write_bytes(data)
    facts = sound_facts(tmp_path / "a")
    assert (facts.sample_rate, facts.channels, facts.samples) == (22050, channels, 5000)
    assert facts.bounded == (kind[1] not in ("FLOAT", "DOUBLE"))


@pytest.mark.parametrize("kind", LOSSY, ids="-".join)
@pytest.mark.parametrize("rate", [16000, 24000, 48000])
def test_lossy_formats_are_where_libsndfile_has_them(kind: tuple[str, str], rate: int) -> None:
    # FFmpeg gives Opus at 48 kHz, whatever its rate was.
    rate = 48000 if kind[1] == "OPUS" else rate
    data = encoded(noise(1, 3 * rate), rate, *kind)
    found, expected = read_sound(data), decoded(data)
    assert found.sample_rate == rate
    assert found.samples.shape == expected.shape
    assert shift(found.samples[0], expected[0]) == 0
    assert (found.samples - expected)[:, 500:-500].square().mean() < 1e-6 * expected.square().mean()


def test_floats_beyond_one_stay_as_they_are() -> None:
    samples = noise(1, 1000) * 20
    assert torch.equal(read_sound(encoded(samples, subtype="FLOAT")).samples, samples)
    assert samples.abs().max() > 2


@pytest.mark.parametrize("kind", EXACT, ids="-".join)
def test_one_sample(kind: tuple[str, str]) -> None:
    found = read_sound(encoded(torch.full((1, 1), 0.5), 16000, *kind)).samples
    assert found.shape == (1, 1)
    assert found.item() == pytest.approx(0.5, abs=0.02)
    for rate in (8000, 16000, 24000, 44100):
        assert read_sound(encoded(torch.full((1, 1), 0.5)), sample_rate=rate).samples.shape == (1, -(-rate // 16000))


@pytest.mark.parametrize("rate", [1000, 8000, 11025, 96000, 192000, 384000])
def test_rates_from_telephone_to_studio(rate: int) -> None:
    found = read_sound(encoded(noise(2, 4000), rate))
    assert (found.sample_rate, found.samples.shape) == (rate, (2, 4000))
    assert read_sound(encoded(noise(2, 4000), rate), sample_rate=24000).samples.shape == (2, -(-4000 * 24000 // rate))


# --- channels


def test_the_middle_of_stereo_is_as_loud_as_its_sides() -> None:
    left, right = noise(2, 3000)
    data = encoded(torch.stack([left, right]), subtype="FLOAT")
    assert torch.allclose(read_sound(data, channels=1).samples, ((left + right) / 2)[None], atol=1e-6)
    same = encoded(torch.stack([left, left]), subtype="FLOAT")
    assert torch.allclose(read_sound(same, channels=1).samples, left[None], atol=1e-6)


def test_mono_is_on_both_sides_of_stereo() -> None:
    samples = noise(1, 3000)
    found = read_sound(encoded(samples, subtype="FLOAT"), channels=2).samples
    assert torch.equal(found, samples.repeat(2, 1))


def test_six_channels_are_mixed_as_ffmpeg_has_it() -> None:
    # Left, right, middle, low, and two at the back; the sums of the weights are scaled to 1.
    half = math.sqrt(0.5)
    mono = torch.tensor([half, half, 1, 0, 0.5, 0.5])
    stereo = torch.tensor([[1, 0, half, 0, half, 0], [0, 1, half, 0, 0, half]])
    samples = noise(6, 2000)
    data = encoded(samples, subtype="FLOAT")
    for channels, weights in ((1, mono[None]), (2, stereo)):
        weights = weights / weights.sum(1, keepdim=True)
        assert torch.allclose(read_sound(data, channels=channels).samples, weights @ samples, atol=1e-5)
    assert read_sound(data).samples.shape == (6, 2000)
    loudest = read_sound(encoded(torch.ones(6, 500), subtype="FLOAT"), channels=1).samples
    assert loudest.max() == pytest.approx(1)


def test_channels_without_a_place_are_refused() -> None:
    assert "a: its 9 channels have no places that are known" in refused(read_sound, encoded(noise(9, 50)), "a", None, 1)


# --- resampling

RATIOS = [(44100, 16000), (48000, 16000), (96000, 24000), (16000, 24000), (22050, 44100), (44100, 48000), (8000, 7999)]


@settings(deadline=None, max_examples=150)
@given(st.sampled_from([*RATIOS, (384000, 1000), (16000, 16000)]), st.integers(1, 3000), st.integers(1, 2))
def test_lengths_are_exact(ratio: tuple[int, int], count: int, channels: int) -> None:
    old, new = ratio
    found = to_samples(Audio(torch.full((1, count), 0.25), old), new, channels)
    assert found.shape == (1, channels, math.ceil(count * new / old))
    assert found.isfinite().all()
    assert found.abs().max() < 0.5


@pytest.mark.parametrize(("old", "new"), RATIOS)
def test_a_tone_stays_where_it_is(old: int, new: int) -> None:
    found = to_samples(Audio(tone(440, old, old), old), new, 1)[0]
    expected = tone(440, new, new)
    assert found.shape == expected.shape
    # The filters reach over the ends.
    assert (found - expected)[:, 200:-200].abs().max() < 2e-4


@pytest.mark.parametrize(("old", "new"), RATIOS)
def test_noise_agrees_with_another_resampler(old: int, new: int) -> None:
    samples = noise(1, 2 * old)
    samples = torch.nn.functional.avg_pool1d(samples[None], 9, 1, 4)[0]
    found = to_samples(Audio(samples, old), new, 1)[0, 0]
    expected = torch.from_numpy(soxr.resample(samples[0].numpy(), old, new, "VHQ"))
    assert abs(len(found) - len(expected)) <= 1
    assert shift(found, expected) == 0
    error = (found[: len(expected)] - expected[: len(found)])[300:-300]
    assert error.square().mean() < 1e-4 * expected.square().mean()


def test_what_is_too_high_is_gone() -> None:
    found = to_samples(Audio(tone(9500, 48000, 48000), 48000), 16000, 1)
    assert found[..., 200:-200].abs().max() < 1e-3


def test_files_and_samples_are_resampled_alike(tmp_path: Path) -> None:
    data = encoded(noise(2, 30000), 44100, subtype="FLOAT")
    whole = to_samples(read_sound(data), 16000, 1)
    (tmp_path / "a.wav").write_bytes(data)
    assert torch.equal(read_sound(data, sample_rate=16000, channels=1).samples, whole[0])
    for chunk, parts in ((1000, 11), (10885, 1), (10884, 2), (10**6, 1)):
        found = list(stream_sound(tmp_path / "a.wav", 16000, 1, chunk))
        assert torch.equal(torch.cat(found, -1), whole[0])
        assert len(found) == parts
        assert {part.shape[-1] for part in found[:-1]} <= {chunk}


def test_bad_samples_and_targets_are_refused() -> None:
    good = Audio(noise(1, 100), 16000)
    assert "sample rate is 999" in refused(to_samples, good, 999, 1)
    assert "sample rate is 16000.0" in refused(to_samples, good, 16000.0, 1)
    assert "sample rate is 0" in refused(to_samples, Audio(good.samples, 0), 16000, 1)
    assert "channels is 3" in refused(to_samples, good, 16000, 3)
    assert "expected floats [channels, n]" in refused(to_samples, Audio(good.samples[0], 16000), 16000, 1)
    assert "expected floats [channels, n]" in refused(to_samples, Audio(good.samples.int(), 16000), 16000, 1)
    assert "expected floats [channels, n]" in refused(to_samples, Audio(good.samples[:, :0], 16000), 16000, 1)
    for value in (math.nan, math.inf):
        assert "not finite" in refused(to_samples, Audio(torch.tensor([[0.0, value]]), 16000), 16000, 1)


def test_the_level_is_that_of_a_plain_formula() -> None:
    samples = noise(2, 5000)
    level = measure(samples.split(700, -1))
    assert level.samples == 5000
    assert level.peak == samples.abs().max()
    assert level.rms == pytest.approx(float(samples.square().mean().sqrt()), rel=1e-6)


# --- files


def test_the_content_counts_and_not_the_name(tmp_path: Path) -> None:
    for kind in ALL:
        (tmp_path / "a.png").write_bytes(encoded(noise(1, 40000), 16000, *kind))
        assert read_sound(tmp_path / "a.png", sample_rate=16000).samples.shape == (1, 40000)
        assert is_sound(tmp_path / "a.png")


def film(path: Path, codec: str = "aac", rate: int = 44100, sound: Tensor | None = None, seen: bool = True) -> Path:
    """A film of grey pictures with sound, written without the code under test."""
    with av.open(str(path), "w") as container:
        pictures = container.add_stream("libvpx" if path.suffix == ".webm" else "libx264", 10) if seen else None
        track = None if sound is None else container.add_stream(codec, rate, layout=LAYOUTS[len(sound)])
        if pictures is not None:
            pictures.width, pictures.height, pictures.pix_fmt = 32, 32, "yuv420p"
            for t in range(20):
                frame = av.VideoFrame.from_ndarray(np.full((32, 32, 3), 10 * t, np.uint8), format="rgb24")
                container.mux(pictures.encode(frame))
            container.mux(pictures.encode(None))
        if track is not None and sound is not None:
            frame = av.AudioFrame.from_ndarray(sound.numpy(), "fltp", LAYOUTS[len(sound)])
            frame.sample_rate, frame.pts, frame.time_base = rate, 0, Fraction(1, rate)
            container.mux(track.encode(frame))
            container.mux(track.encode(None))
    return path


@pytest.mark.parametrize(
    ("name", "codec", "rate"),
    [("a.mp4", "aac", 44100), ("a.webm", "libopus", 48000), ("a.mkv", "flac", 16000), ("a.mov", "pcm_s16le", 16000)],
)
def test_the_sound_of_a_film(tmp_path: Path, name: str, codec: str, rate: int) -> None:
    sound = noise(2, 2 * rate)
    path = film(tmp_path / name, codec, rate, sound)
    found = read_sound(path)
    assert found.sample_rate == rate
    # Codecs fill up their last block.
    assert 0 <= found.samples.shape[1] - sound.shape[1] < 2048
    assert shift(found.samples[0], sound[0]) == 0
    assert not is_sound(path)


def test_a_film_without_pictures_is_sound(tmp_path: Path) -> None:
    path = film(tmp_path / "a.mp4", sound=noise(1, 44100), seen=False)
    assert is_sound(path)
    assert read_sound(path).samples.shape[0] == 1


def test_a_film_without_sound_is_refused(tmp_path: Path) -> None:
    assert "a.mp4: has no sound" in refused(read_sound, film(tmp_path / "a.mp4"))


def test_what_is_no_sound(tmp_path: Path) -> None:
    write_video(Video(torch.zeros(2, 16, 16, 3, dtype=torch.uint8), 10), tmp_path / "a.gif")
    (tmp_path / "words.wav").write_text("words, not samples " * 40)
    (tmp_path / "empty.wav").touch()
    assert not any(map(is_sound, [tmp_path / n for n in ("a.gif", "words.wav", "empty.wav", "gone.wav")] + [tmp_path]))
    assert "words.wav: no sound that can be read" in refused(read_sound, tmp_path / "words.wav")
    assert "a.gif: no sound that can be read" in refused(read_sound, tmp_path / "a.gif")
    assert "empty.wav: is empty" in refused(read_sound, tmp_path / "empty.wav")
    assert "gone.wav: no such file" in refused(read_sound, tmp_path / "gone.wav")
    assert "cannot be read" in refused(read_sound, tmp_path)
    assert refused(read_sound, b"") == "sound: is empty"
    for call in (lambda p: next(stream_sound(p)), sound_facts):
        assert "gone.wav: no such file" in refused(call, tmp_path / "gone.wav")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_a_file_that_may_not_be_read(tmp_path: Path) -> None:
    (tmp_path / "a.wav").touch(mode=0o000)
    assert "a.wav: cannot be read" in refused(read_sound, tmp_path / "a.wav")


def test_tags_before_and_after_the_sound_are_no_matter() -> None:
    tag = b"ID3\x04\x00\x00" + bytes([0, 0, 1, 0]) + b"\0" * 128
    samples = noise(1, 8000)
    for kind in (("FLAC", "PCM_16"), LOSSY[0]):
        data = encoded(samples, 16000, *kind)
        assert torch.equal(read_sound(tag + data).samples, read_sound(data).samples)
    data = encoded(samples)
    assert torch.equal(read_sound(data + b"LIST\x04\0\0\0INFO").samples, read_sound(data).samples)
    assert torch.equal(read_sound(data[:12] + b"LIST\x05\0\0\0INFOx\0" + data[12:]).samples, read_sound(data).samples)
    latin = b"LIST\x10\0\0\0INFOINAM\x04\0\0\0" + "Böse".encode("latin-1")
    assert torch.equal(read_sound(data[:12] + latin + data[12:]).samples, read_sound(data).samples)


@pytest.mark.parametrize("size", [0xFFFFFFFF, 0x7FFFF000])
def test_a_wav_from_a_pipe_does_not_know_its_length(size: int) -> None:
    data = bytearray(encoded(noise(1, 8000)))
    data[40:44] = struct.pack("<I", size)
    assert read_sound(bytes(data)).samples.shape == (1, 8000)


@pytest.mark.parametrize("format", ["WAV", "WAVEX", "RF64", "FLAC", "AIFF", "AU"])
@pytest.mark.parametrize("share", [0.3, 0.6, 0.99, 1])
def test_exact_formats_that_are_cut_off(tmp_path: Path, format: str, share: float) -> None:
    data = encoded(noise(2, 20000), 16000, format)
    (tmp_path / "a").write_bytes(data[: min(len(data) - 1, int(share * len(data)))])
    for call in (read_sound, lambda p: list(stream_sound(p, 8000, 1))):
        message = refused(call, tmp_path / "a")
        assert message.startswith(f"{tmp_path / 'a'}: ")
        assert "again" in message or "replace the file" in message


@pytest.mark.parametrize("kind", LOSSY, ids="-".join)
@pytest.mark.parametrize("share", [0.4, 0.7, 0.97])
def test_lossy_formats_that_are_cut_off(kind: tuple[str, str], share: float) -> None:
    data = encoded(noise(1, 60000), 16000, *kind)
    assert "cut off" in refused(read_sound, data[: int(share * len(data))])


@pytest.mark.parametrize("name", ["a.mp4", "a.mkv"])
def test_films_that_are_cut_off(tmp_path: Path, name: str) -> None:
    path = film(tmp_path / name, "aac", 44100, noise(1, 44100))
    path.write_bytes(path.read_bytes()[:-300])
    assert f"{name}: cut off before its end" in refused(read_sound, path)


def test_a_page_that_is_missing_is_noticed() -> None:
    data = bytearray(encoded(noise(1, 200000), 16000, "OGG", "VORBIS"))
    data[len(data) // 2] ^= 0x55  # FFmpeg leaves out a page with a wrong checksum
    assert "samples are there" in refused(read_sound, bytes(data))


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("subtype", ["FLOAT", "DOUBLE"])
def test_values_that_are_not_finite(value: float, subtype: str) -> None:
    for place in (0, 2500, 4999):
        samples = noise(1, 5000)
        samples[0, place] = value
        data = encoded(samples, 16000, "WAV", subtype)
        for rate in (None, 8000, 44100):
            assert "a: has samples that are not finite" in refused(read_sound, data, "a", rate)


def test_no_samples(tmp_path: Path) -> None:
    for format in ("WAV", "AIFF", "AU", "FLAC"):
        message = refused(read_sound, encoded(torch.zeros(1, 0), 16000, format), "a")
        assert message.startswith("a: ")


def header(channels: int = 1, rate: int = 16000, bits: int = 16, tag: int = 1, size: int | None = None) -> bytes:
    block = channels * bits // 8 % 65536
    body = b"\1\2" * 500
    head = struct.pack("<HHIIHH", tag, channels, rate, rate * block % 2**32, block, bits)
    data = b"WAVEfmt " + struct.pack("<I", 16) + head + b"data" + struct.pack("<I", len(body) if size is None else size)
    return b"RIFF" + struct.pack("<I", len(data + body)) + data + body


ABSURD: dict[str, bytes] = {
    "no channels": header(channels=0),
    "65535 channels": header(channels=65535),
    "no rate": header(rate=0),
    "a rate of 1": header(rate=1),
    "a huge rate": header(rate=2**32 - 1),
    "no bits": header(bits=0),
    "7 bits": header(bits=7),
    "65535 bits": header(bits=65535),
    "an unknown codec": header(tag=0x1234),
    "too much promised": header(size=2**30),
    "only a head": header()[:36],
}


@pytest.mark.parametrize("kind", ABSURD)
def test_absurd_headers(kind: str) -> None:
    assert read_sound(header()).samples.shape == (1, 500)
    if kind == "7 bits":  # FFmpeg takes whole bytes
        assert read_sound(ABSURD[kind]).samples.shape[0] == 1
        return
    assert refused(read_sound, ABSURD[kind], "a", 24000, 1).startswith("a: ")


def test_a_rate_that_changes_is_refused() -> None:
    for format in ("OGG", "MP3"):
        both = b"".join(encoded(noise(1, 30000), rate, format, None) for rate in (16000, 24000))
        assert "a: " in refused(read_sound, both, "a")


FUZZED = {
    kind: encoded(noise(1, 3000), 16000, *kind)
    for kind in [("WAV", "PCM_16"), ("WAV", "FLOAT"), ("FLAC", "PCM_16"), ("AIFF", "PCM_16"), *LOSSY]
}


@settings(deadline=None, max_examples=300)
@given(st.sampled_from(list(FUZZED)), st.data())
def test_damaged_files_never_raise_anything_else(kind: tuple[str, str], data: st.DataObject) -> None:
    content = bytearray(FUZZED[kind])
    if data.draw(st.booleans()):
        del content[data.draw(st.integers(0, len(content) - 1)) :]
    else:
        for _ in range(data.draw(st.integers(1, 3))):
            # Heads more often than the rest.
            most = data.draw(st.sampled_from([60, len(content) - 1]))
            content[data.draw(st.integers(0, most))] = data.draw(st.integers(0, 255))
    try:
        found = read_sound(bytes(content), "a", 8000, 2)
    except PlaitError as error:
        refusal = str(error)
    else:
        refusal = "a: "
        assert found.samples.shape[0] == 2
        assert found.samples.shape[1] > 0
        assert found.samples.isfinite().all()
    assert refusal.startswith("a: ")
    assert "\n" not in refusal


@pytest.mark.parametrize("format", ["WAV", "FLAC", "MP3"])
def test_a_chunk_comes_before_the_rest_is_read(tmp_path: Path, format: str, monkeypatch: Any) -> None:
    (tmp_path / "a").write_bytes(encoded(noise(2, 400000), 16000, format, None))
    read = 0
    original = Path.open

    def counting(self: Path, *arguments: Any) -> Any:
        file = original(self, *arguments)

        class Counted(io.RawIOBase):
            def read(self, size: int = -1) -> bytes:
                nonlocal read
                data = file.read(size)
                read += len(data)
                return data

            def seek(self, *where: int) -> int:
                return int(file.seek(*where))

            def tell(self) -> int:
                return int(file.tell())

            def readable(self) -> bool:
                return True

            def seekable(self) -> bool:
                return True

        return Counted()

    monkeypatch.setattr(Path, "open", counting)
    next(stream_sound(tmp_path / "a", 8000, 1, 2000))
    assert read < (tmp_path / "a").stat().st_size / 2


def test_a_dropped_stream_closes_its_file(tmp_path: Path) -> None:
    (tmp_path / "a.wav").write_bytes(encoded(noise(2, 400000)))
    before = set(os.listdir("/proc/self/fd")) if Path("/proc/self/fd").exists() else set()
    chunks = stream_sound(tmp_path / "a.wav", 8000, 1, 100)
    next(chunks)
    del chunks
    assert len(set(os.listdir("/proc/self/fd")) if before else set()) == len(before)


# --- writing


@pytest.mark.parametrize("suffix", FORMATS)
@pytest.mark.parametrize(("rate", "channels"), [(16000, 1), (24000, 2), (44100, 1), (48000, 2)])
def test_what_is_written_is_read(tmp_path: Path, suffix: str, rate: int, channels: int) -> None:
    samples = noise(channels, 2 * rate)
    assert write_sound(Audio(samples, rate), tmp_path / f"a{suffix}") == 0
    assert list(tmp_path.iterdir()) == [tmp_path / f"a{suffix}"]
    found = read_sound(tmp_path / f"a{suffix}", sample_rate=rate)
    reference, reference_rate = soundfile.read(tmp_path / f"a{suffix}", dtype="float32", always_2d=True)
    assert reference.shape[1] == channels
    if suffix in (".wav", ".flac"):
        assert found.samples.shape == samples.shape
        assert (found.samples - samples).abs().max() <= 0.5 / 2**15
        assert np.array_equal(reference.T, found.samples.numpy())
        assert reference_rate == rate
    else:
        assert abs(found.samples.shape[1] - samples.shape[1]) < 1500
        assert shift(found.samples[0], samples[0]) == 0
        count = min(found.samples.shape[1], samples.shape[1])
        error = (found.samples[:, :count] - samples[:, :count])[:, 2000:-2000].square().mean()
        assert error < 0.1 * samples.square().mean()


def test_whole_numbers_come_back_bit_by_bit(tmp_path: Path) -> None:
    levels = torch.arange(-(2**15), 2**15)[None] / 2**15
    for suffix in (".wav", ".flac"):
        assert write_sound(Audio(levels, 16000), tmp_path / f"a{suffix}") == 0
        assert torch.equal(read_sound(tmp_path / f"a{suffix}").samples, levels)
    assert torch.equal(read_sound(write_sound_bytes(Audio(levels, 16000))).samples, levels)


def test_too_loud_samples_are_clipped_and_counted(tmp_path: Path) -> None:
    samples = torch.tensor([[0.5, 1.0, 1.5, -1.0, -7.0, 0.0], [0.0, 0.0, 0.0, 0.0, 0.0, 1.01]])
    expected = samples.clamp(-1, 1 - 2**-15)
    assert write_sound(Audio(samples, 16000), tmp_path / "a.wav") == 3
    assert torch.equal(read_sound(tmp_path / "a.wav").samples, expected)
    assert torch.equal(read_sound(write_sound_bytes(Audio(samples, 16000))).samples, expected)
    with SoundWriter(tmp_path / "b.wav", 16000, 2) as writer:
        for part in samples.split(2, -1):
            writer.write(part)
    assert writer.clipped == 3
    assert (tmp_path / "b.wav").read_bytes() == (tmp_path / "a.wav").read_bytes()


@pytest.mark.parametrize("suffix", FORMATS)
def test_the_parts_make_no_difference(tmp_path: Path, suffix: str) -> None:
    samples = noise(1, 30000)
    write_sound(Audio(samples, 22050), tmp_path / f"a{suffix}")
    with SoundWriter(tmp_path / f"b{suffix}", 22050, 1) as writer:
        for part in samples.split(777, -1):
            writer.write(part)
    first, second = (read_sound(tmp_path / f"{name}{suffix}").samples for name in "ab")
    assert first.shape == second.shape
    assert (first - second).abs().max() < 1e-3


@pytest.mark.parametrize("suffix", FORMATS)
@pytest.mark.parametrize("rate", [1000, 7999, 96000, 384000])
def test_rates_that_a_format_lacks(tmp_path: Path, suffix: str, rate: int) -> None:
    write_sound(Audio(noise(1, 2 * rate), rate), tmp_path / f"a{suffix}")
    found = read_sound(tmp_path / f"a{suffix}")
    assert found.samples.shape[1] / found.sample_rate == pytest.approx(2, abs=0.04)
    assert found.sample_rate == rate or suffix in (".mp3", ".ogg")


@pytest.mark.parametrize("suffix", FORMATS)
def test_the_shortest_sound_is_written(tmp_path: Path, suffix: str) -> None:
    write_sound(Audio(torch.full((1, 1), 0.5), 22050), tmp_path / f"a{suffix}")
    assert read_sound(tmp_path / f"a{suffix}").samples.shape[1] >= 1


def test_writers_refuse(tmp_path: Path) -> None:
    good = Audio(noise(1, 100), 16000)
    assert "a sound is written as .wav, .flac, .mp3, .ogg" in refused(write_sound, good, tmp_path / "a.aac")
    assert "sample rate is 5" in refused(write_sound, Audio(good.samples, 5), tmp_path / "a.wav")
    assert "channels is 3" in refused(write_sound, Audio(noise(3, 9), 16000), tmp_path / "a.wav")
    assert "not finite" in refused(write_sound, Audio(good.samples * math.nan, 16000), tmp_path / "a.wav")
    assert "expected floats" in refused(write_sound, Audio(good.samples.int(), 16000), tmp_path / "a.wav")
    assert "expected floats" in refused(write_sound_bytes, Audio(good.samples[:, :0], 16000))
    assert "cannot be written" in refused(write_sound, good, tmp_path / "no" / "a.wav")

    def other_channels() -> None:
        with SoundWriter(tmp_path / "a.wav", 16000, 2) as writer:
            writer.write(good.samples)

    def nothing() -> None:
        with SoundWriter(tmp_path / "a.wav", 16000, 2):
            pass

    assert "have 1 channels, the file has 2" in refused(other_channels)
    assert "a sound needs samples" in refused(nothing)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("suffix", FORMATS)
def test_an_old_file_stays_until_the_new_one_is_whole(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"a{suffix}"
    path.write_bytes(b"old")
    with pytest.raises(KeyboardInterrupt), SoundWriter(path, 16000, 1) as writer:
        writer.write(noise(1, 5000))
        raise KeyboardInterrupt
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("suffix", FORMATS)
def test_a_full_disk_is_one_line(suffix: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if not Path("/dev/full").exists():
        pytest.skip("needs /dev/full")
    original = Path.open

    def full(self: Path, *arguments: Any) -> Any:
        return original(Path("/dev/full"), "wb", 0) if arguments == ("wb",) else original(self, *arguments)

    monkeypatch.setattr(Path, "open", full)
    assert "cannot be written" in refused(write_sound, Audio(noise(1, 50000), 16000), tmp_path / f"a{suffix}")
