import errno
import io
import itertools
import os
import random
import struct
import subprocess
import sys
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from plait.errors import PlaitError
from plait.tokenizers.media import Video
from plait.tokenizers.metrics import psnr
from plait.tokenizers.video import (
    DEFAULT_FPS,
    FORMATS,
    VideoWriter,
    is_clip,
    read_video,
    stream_video,
    write_video,
)


def clip(frames: int, height: int, width: int) -> Tensor:
    """A disc that circles over a gradient, with soft edges: most codecs halve the resolution of colour."""
    y, x = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    shown = []
    for t in range(frames):
        angle = torch.tensor(t / 6.0)
        distance = ((x - width * (0.5 + 0.3 * angle.cos())) ** 2 + (y - height * (0.5 + 0.3 * angle.sin())) ** 2).sqrt()
        disc = torch.sigmoid((min(height, width) / 4 - distance) / 3)[..., None]
        ground = torch.stack([60 + 120 * x / width, 40 + 150 * y / height, torch.full(x.shape, 90.0)], -1)
        shown.append(ground * (1 - disc) + torch.tensor([200.0, 170.0, 40.0]) * disc)
    return torch.stack(shown).round().to(torch.uint8)


def images(frames: Tensor) -> list[Image.Image]:
    return [Image.fromarray(frame.numpy()) for frame in frames]


def decibels(found: Tensor, expected: Tensor) -> float:
    a, b = ((v.permute(0, 3, 1, 2).float() / 127.5 - 1) for v in (found, expected))
    return float(psnr(a, b).min())


def recorded(
    path: Path, frames: Any, codec: str = "libx264", pixels: str = "yuv420p", rate: Any = 10, **more: Any
) -> Path:
    """A film written without the code under test; ``times`` are the frames' pts in ticks of 1 / rate."""
    times, source = more.pop("times", itertools.count()), more.pop("source", "rgb24")
    with av.open(str(path), "w", format=more.pop("format", None), options=more.pop("container", {})) as container:
        stream = container.add_stream(codec, rate, more.pop("options", {"qp": "0"} if codec == "libx264" else {}))
        stream.width, stream.height, stream.pix_fmt = frames.shape[2], frames.shape[1], pixels
        if more.pop("sound", False):
            sound = container.add_stream("aac", 16000)
            silence = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
            silence.sample_rate = 16000
            container.mux(sound.encode(silence) + sound.encode(None))
        for frame, time in zip(frames, times, strict=False):
            picture = av.VideoFrame.from_ndarray(np.ascontiguousarray(frame), format=source)
            picture.pts, picture.time_base = time, 1 / Fraction(rate)
            container.mux(stream.encode(picture))
        container.mux(stream.encode(None))
    assert not more
    return path


# --- round trips


@pytest.mark.parametrize("suffix", FORMATS)
@pytest.mark.parametrize("size", [(64, 80), (33, 51)])
def test_what_is_written_is_read(tmp_path: Path, suffix: str, size: tuple[int, int]) -> None:
    height, width = size
    video = Video(clip(21, height, width), 12.5)
    write_video(video, tmp_path / f"a{suffix}")
    found = read_video(tmp_path / f"a{suffix}")
    assert found.fps == pytest.approx(12.5)
    if suffix == ".mp4":  # even sides, the last row and column twice
        assert found.frames.shape == (21, height + height % 2, width + width % 2, 3)
    else:
        assert found.frames.shape == video.frames.shape
    assert decibels(found.frames[:, :height, :width], video.frames) > 34
    assert is_clip(tmp_path / f"a{suffix}")
    assert list(tmp_path.iterdir()) == [tmp_path / f"a{suffix}"]


@pytest.mark.parametrize(("suffix", "room"), [(".mp4", 2), (".webm", 2), (".webp", 3), (".gif", 6)])
def test_flat_colours_come_back(tmp_path: Path, suffix: str, room: int) -> None:
    colours = [(255, 255, 255), (0, 0, 0), (230, 40, 40), (20, 200, 90), (30, 60, 220)]
    frames = torch.tensor(colours, dtype=torch.uint8)[:, None, None].expand(-1, 32, 32, -1)
    write_video(Video(frames, 5), tmp_path / f"a{suffix}")
    found = read_video(tmp_path / f"a{suffix}").frames
    assert (found.float() - frames.float()).abs().max() <= room


@pytest.mark.parametrize("suffix", [".mp4", ".webm"])
@pytest.mark.parametrize("fps", [23.976, 24000 / 1001, 30000 / 1001, 59.94, 7, 0.5, 120])
def test_rates_come_back(tmp_path: Path, suffix: str, fps: float) -> None:
    write_video(Video(clip(13, 16, 16), fps), tmp_path / f"a{suffix}")
    found = read_video(tmp_path / f"a{suffix}")
    assert len(found.frames) == 13
    assert found.fps == pytest.approx(fps, rel=2e-3)


@pytest.mark.parametrize("suffix", FORMATS)
def test_one_pixel_and_one_frame(tmp_path: Path, suffix: str) -> None:
    write_video(Video(torch.full((1, 1, 1, 3), 255, dtype=torch.uint8), 10), tmp_path / f"a{suffix}")
    found = read_video(tmp_path / f"a{suffix}")
    assert len(found.frames) == 1
    assert found.frames.min() > 250


def test_the_mp4_plays_everywhere(tmp_path: Path) -> None:
    write_video(Video(clip(3, 17, 31), 10), tmp_path / "a.mp4")
    with av.open(str(tmp_path / "a.mp4")) as container:
        stream = container.streams.video[0]
        assert (stream.codec_context.name, stream.codec_context.pix_fmt) == ("h264", "yuv420p")
        assert stream.codec_context.colorspace == av.video.reformatter.Colorspace.ITU709
        assert (stream.width, stream.height) == (32, 18)


# --- streams


def test_chunks_are_as_asked_and_come_as_they_are_read(tmp_path: Path) -> None:
    frames = clip(21, 16, 16)
    write_video(Video(frames, 10), tmp_path / "a.mp4")
    whole = read_video(tmp_path / "a.mp4").frames
    for chunk, lengths in ((1, [1] * 21), (8, [8, 8, 5]), (21, [21]), (500, [21])):
        facts, chunks = stream_video(tmp_path / "a.mp4", chunk)
        parts = list(chunks)
        assert [len(part) for part in parts] == lengths
        assert torch.equal(torch.cat(parts), whole)
        assert (facts.height, facts.width, facts.fps, facts.frames) == (16, 16, 10, 21)


@pytest.mark.parametrize("suffix", [".mp4", ".webm"])
def test_a_chunk_comes_before_the_rest_is_read(tmp_path: Path, suffix: str, monkeypatch: pytest.MonkeyPatch) -> None:
    noise = torch.randint(0, 256, (80, 64, 64, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    codec, fast = (
        ("libx264", {"preset": "ultrafast"})
        if suffix == ".mp4"
        else ("libvpx", {"deadline": "realtime", "cpu-used": "8", "b": "9M"})
    )
    recorded(tmp_path / f"a{suffix}", noise.numpy(), codec, options=fast)
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
    _, chunks = stream_video(tmp_path / f"a{suffix}", 4)
    next(chunks)
    assert read < (tmp_path / f"a{suffix}").stat().st_size / 2


@pytest.mark.parametrize("suffix", [".mp4", ".gif"])
def test_a_dropped_stream_closes_its_file(tmp_path: Path, suffix: str) -> None:
    write_video(Video(clip(9, 16, 16), 10), tmp_path / f"a{suffix}")
    before = set(os.listdir("/proc/self/fd")) if Path("/proc/self/fd").exists() else set()
    _, chunks = stream_video(tmp_path / f"a{suffix}", 2)
    next(chunks)
    del chunks
    assert len(set(os.listdir("/proc/self/fd")) if before else set()) == len(before)


# --- what files hold


@pytest.mark.parametrize("pixels", ["yuv444p", "yuv422p", "yuv420p10le", "yuvj420p"])
def test_every_pixel_format_becomes_rgb(tmp_path: Path, pixels: str) -> None:
    frames = clip(4, 32, 48)
    found = read_video(recorded(tmp_path / "a.mp4", frames.numpy(), pixels=pixels))
    assert decibels(found.frames, frames) > 38


def test_alpha_is_laid_over_white(tmp_path: Path) -> None:
    frames = np.zeros((3, 16, 32, 4), np.uint8)
    frames[..., 0], frames[:, :, :8, 3], frames[:, :, 8:16, 3] = 200, 255, 128
    films = [recorded(tmp_path / "a.mov", frames, "qtrle", "argb", source="rgba", format="mov")]
    alpha = {"options": {"crf": "4", "b": "0", "auto-alt-ref": "0"}, "source": "rgba"}
    films += [recorded(tmp_path / f"{c}.webm", frames, f"libvpx{c}", "yuva420p", **alpha) for c in ("", "-vp9")]
    for film in films:
        found = read_video(film).frames.float()
        for x, colour in ((3, (200, 0, 0)), (12, (227, 127, 127)), (24, (255, 255, 255))):
            assert (found[:, 4:12, x] - torch.tensor(colour)).abs().max() < 6, film


@pytest.mark.parametrize("turns", [1, 2, 3])
def test_rotation_is_applied(tmp_path: Path, turns: int) -> None:
    frames = clip(2, 32, 48)
    data = bytearray(recorded(tmp_path / "a.mp4", frames.numpy()).read_bytes())
    a, b = ((0, 1), (-1, 0), (0, -1))[turns - 1]
    matrix = data.index(b"tkhd") + 44  # ISO/IEC 14496-12, 8.3.2
    data[matrix : matrix + 36] = struct.pack(">9i", a << 16, b << 16, 0, -b * 65536, a << 16, 0, 0, 0, 1 << 30)
    (tmp_path / "b.mp4").write_bytes(data)
    plain = read_video(tmp_path / "a.mp4").frames
    # The matrix turns clockwise.
    expected = torch.rot90(plain, -turns, (1, 2))
    facts, chunks = stream_video(tmp_path / "b.mp4")
    assert (facts.height, facts.width) == tuple(expected.shape[1:3])
    assert torch.equal(torch.cat(list(chunks)), expected)


def test_a_varying_rate_is_averaged(tmp_path: Path) -> None:
    times = [0, 1, 2, 3, 10, 20, 21, 22, 29, 30]
    found = read_video(recorded(tmp_path / "a.mp4", clip(10, 16, 16).numpy(), rate=30, times=times))
    assert len(found.frames) == 10
    assert found.fps == pytest.approx(10, rel=0.1)


def test_sound_is_left_out(tmp_path: Path) -> None:
    found = read_video(recorded(tmp_path / "a.mp4", clip(5, 16, 16).numpy(), sound=True))
    assert found.frames.shape == (5, 16, 16, 3)
    with av.open(str(tmp_path / "b.mp4"), "w") as container:
        sound = container.add_stream("aac", 16000)
        silence = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
        silence.sample_rate = 16000
        container.mux(sound.encode(silence) + sound.encode(None))
    with pytest.raises(PlaitError, match=r"b\.mp4: has no video track"):
        stream_video(tmp_path / "b.mp4")


@pytest.mark.parametrize("format", ["GIF", "WEBP", "PNG"])
def test_animations_are_read(tmp_path: Path, format: str) -> None:
    frames = clip(12, 20, 30)
    exact = {"lossless": True} if format == "WEBP" else {}
    first, *rest = images(frames)
    first.save(tmp_path / "a", format, save_all=True, append_images=rest, duration=[40, 80] * 6, **exact)
    facts, chunks = stream_video(tmp_path / "a", 5)
    found = torch.cat(list(chunks))
    assert (facts.height, facts.width, facts.frames) == (20, 30, 12)
    assert facts.fps == pytest.approx(1000 / 60)
    if format == "GIF":
        assert decibels(found, frames) > 30
    else:
        assert torch.equal(found, frames)


def test_transparent_animations_lie_on_white(tmp_path: Path) -> None:
    shown = [Image.new("RGBA", (8, 8), (200, 0, 0, 255)) for _ in range(2)]
    for image, clear in zip(shown, ((0, 0, 4, 4), (4, 4, 8, 8)), strict=True):
        image.paste((0, 0, 0, 0), clear)
    for format in ("WEBP", "PNG", "GIF"):
        options = {"lossless": True, "exact": True} if format == "WEBP" else {"disposal": 2}
        shown[0].save(tmp_path / format, format, save_all=True, append_images=shown[1:], duration=100, **options)
        found = read_video(tmp_path / format).frames
        red, white = [200, 0, 0], [255, 255, 255]
        assert [found[t, x, x].tolist() for t in (0, 1) for x in (1, 6)] == [white, red, red, white], format


def test_the_still_before_an_animated_png_is_no_frame(tmp_path: Path) -> None:
    still, *moving = (Image.new("RGB", (4, 4), colour) for colour in ("black", "red", "lime"))
    still.save(tmp_path / "a.png", save_all=True, append_images=moving, default_image=True, duration=50)
    assert is_clip(tmp_path / "a.png")
    found = read_video(tmp_path / "a.png").frames
    assert found[:, 0, 0].tolist() == [[255, 0, 0], [0, 255, 0]]


def test_a_turned_animation_says_its_turned_size(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    first, *rest = (Image.new("RGB", (20, 8), colour) for colour in ("red", "lime", "blue"))
    first.save(tmp_path / "a.webp", save_all=True, append_images=rest, exif=exif)
    facts, chunks = stream_video(tmp_path / "a.webp")
    assert (facts.height, facts.width) == (20, 8)
    assert next(chunks).shape == (3, 20, 8, 3)


def test_slow_and_fast_animations_keep_their_rates(tmp_path: Path) -> None:
    first, *rest = (Image.new("RGB", (8, 8), colour) for colour in ("red", "lime", "blue"))
    for milliseconds, fps in ((600_000, 1 / 600), (1, 1000), (5_000_000, DEFAULT_FPS)):
        first.save(tmp_path / "a.webp", save_all=True, append_images=rest, duration=milliseconds)
        assert read_video(tmp_path / "a.webp").fps == pytest.approx(fps)


def test_stills_are_no_clips_but_one_frame(tmp_path: Path) -> None:
    picture = images(clip(1, 9, 7))[0]
    for format in ("PNG", "JPEG", "GIF", "WEBP", "TIFF"):
        extra = {"save_all": True, "append_images": [picture]} if format == "TIFF" else {}  # two pages
        picture.save(tmp_path / format, format, **extra)
        assert not is_clip(tmp_path / format)
        assert read_video(tmp_path / format).frames.shape == (1, 9, 7, 3)


def test_a_gif_without_durations_has_those_of_browsers(tmp_path: Path) -> None:
    first, *rest = images(clip(4, 8, 8))
    first.save(tmp_path / "a.gif", save_all=True, append_images=rest, duration=0)
    assert read_video(tmp_path / "a.gif").fps == 10


def test_the_content_counts_and_not_the_name(tmp_path: Path) -> None:
    write_video(Video(clip(3, 16, 16), 10), tmp_path / "a.mp4")
    write_video(Video(clip(3, 16, 16), 10), tmp_path / "a.webm")
    for name in ("a.mp4", "a.webm"):
        for wrong in ("b.png", "b.txt", "b%03d.jpg", "concat:b", "b"):
            (tmp_path / wrong).write_bytes((tmp_path / name).read_bytes())
            assert is_clip(tmp_path / wrong)
            assert len(read_video(tmp_path / wrong).frames) == 3
    images(clip(1, 8, 8))[0].save(tmp_path / "still.mp4", "PNG")
    assert not is_clip(tmp_path / "still.mp4")


# --- broken files


def refused(path: Path, *words: str) -> None:
    with pytest.raises(PlaitError) as raised:
        read_video(path)
    message = str(raised.value)
    assert message.startswith(f"{path}: ")
    assert "\n" not in message
    assert all(word in message for word in words), message


def test_what_is_no_video_is_refused(tmp_path: Path) -> None:
    contents = {
        "empty.mp4": b"",
        "text.mp4": b"words\n" * 99,
        "text.txt": b"\x1b[31mwords\n" * 99,
        "list.mp4": b"ffconcat version 1.0\nfile a.mp4\n",
        "play.mp4": b"#EXTM3U\n#EXTINF:1,\na.ts\n",
        "zeros.webm": bytes(5000),
        "box.mp4": b"\0\0\0\x18ftypisom" + bytes(12),
        "ebml.webm": b"\x1aE\xdf\xa3",
        "photo.heic": b"\0\0\0\x18ftypheic" + bytes(512),
    }
    for name, content in contents.items():
        (tmp_path / name).write_bytes(content)
        refused(tmp_path / name)
    refused(tmp_path / "gone.mp4", "no such file")
    refused(tmp_path, "cannot be read")
    refused(tmp_path / ("n" * 5000), "cannot be read")
    with pytest.raises(PlaitError, match="no such file"):
        is_clip(tmp_path / "gone.mp4")


@pytest.mark.parametrize("suffix", [".mp4", ".mkv", ".mov"])
def test_a_film_without_frames_is_refused(tmp_path: Path, suffix: str) -> None:
    path = recorded(tmp_path / f"a{suffix}", np.zeros((0, 16, 16, 3), np.uint8))
    refused(path)


@pytest.mark.parametrize("name", ["a.mp4", "fast.mp4", "pieces.mp4", "a.webm", "a.mkv"])
def test_every_cut_is_refused(tmp_path: Path, name: str) -> None:
    flags = {"fast.mp4": "+faststart", "pieces.mp4": "frag_keyframe+empty_moov"}.get(name)
    codec = "libvpx" if name == "a.webm" else "libx264"
    path = recorded(tmp_path / name, clip(12, 16, 16).numpy(), codec, container={"movflags": flags} if flags else {})
    data = path.read_bytes()
    # The index at the end of a film in pieces serves jumping only.
    end = data.index(b"mfra") - 4 if name == "pieces.mp4" else len(data)
    for length in range(1, end, end // 30):
        path.write_bytes(data[:length])
        refused(path)


@pytest.mark.parametrize("format", ["GIF", "WEBP", "PNG"])
def test_cut_animations_are_refused(tmp_path: Path, format: str) -> None:
    first, *rest = images(clip(10, 24, 24))
    first.save(tmp_path / "a", format, save_all=True, append_images=rest, duration=40)
    data = (tmp_path / "a").read_bytes()
    for length in range(1, len(data) - 30, len(data) // 30):
        (tmp_path / "a").write_bytes(data[:length])
        refused(tmp_path / "a")


@pytest.mark.parametrize("name", ["a.mp4", "a.webm", "a.gif", "a.webp", "a.png"])
def test_damaged_bytes_never_raise_anything_else(tmp_path: Path, name: str) -> None:
    if name == "a.png":
        first, *rest = images(clip(5, 24, 24))
        first.save(tmp_path / name, save_all=True, append_images=rest)
    else:
        write_video(Video(clip(5, 24, 24), 10), tmp_path / name)
    data, draw = (tmp_path / name).read_bytes(), random.Random(0)
    refusals: list[str] = []
    for _ in range(40):
        damaged = bytearray(data)
        for _ in range(draw.choice([1, 3, 10])):
            damaged[draw.randrange(min(len(data), draw.choice([100, 1000, 10**6])))] = draw.randrange(256)
        (tmp_path / name).write_bytes(damaged)
        try:
            facts, chunks = stream_video(tmp_path / name)
            for chunk in chunks:
                assert chunk.shape[1:] == (facts.height, facts.width, 3)
        except PlaitError as error:
            refusals.append(str(error))
    assert len(refusals) > 3
    assert all(line.startswith(str(tmp_path)) and "\n" not in line for line in refusals), refusals


def test_a_gigantic_film_is_refused_before_it_is_decoded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_video(Video(clip(2, 32, 32), 10), tmp_path / "a.mp4")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    refused(tmp_path / "a.mp4", "too large", "32×32")


def test_a_changing_size_is_refused(tmp_path: Path) -> None:
    parts = [recorded(tmp_path / f"{side}.h264", clip(3, side, side).numpy(), format="h264") for side in (32, 64)]
    with av.open(str(tmp_path / "a.mkv"), "w") as container:
        stream = None
        time = 0
        for part in parts:
            with av.open(str(part)) as source:
                stream = stream or container.add_stream_from_template(source.streams.video[0])
                for packet in source.demux(video=0):
                    if packet.size:
                        packet.stream, packet.pts, packet.dts, packet.time_base = stream, time, time, Fraction(1, 10)
                        container.mux(packet)
                        time += 1
    refused(tmp_path / "a.mkv", "size of its frames changes")


# --- writing that fails


def test_a_failure_leaves_no_file(tmp_path: Path) -> None:
    for suffix in FORMATS:
        for error in (RuntimeError("a bug"), KeyboardInterrupt()):
            with pytest.raises(type(error)), VideoWriter(tmp_path / f"a{suffix}", 10) as writer:
                writer.write(clip(5, 16, 16))
                raise error
        with pytest.raises(PlaitError, match="there are none"), VideoWriter(tmp_path / f"a{suffix}", 10):
            pass
        with pytest.raises(PlaitError, match="another size"), VideoWriter(tmp_path / f"a{suffix}", 10) as writer:
            writer.write(clip(5, 16, 16))
            writer.write(clip(5, 18, 16))
    assert list(tmp_path.iterdir()) == []


def test_an_old_file_stays_until_the_new_one_is_whole(tmp_path: Path) -> None:
    (tmp_path / "a.mp4").write_text("old")
    with pytest.raises(RuntimeError), VideoWriter(tmp_path / "a.mp4", 10) as writer:
        writer.write(clip(5, 16, 16))
        raise RuntimeError
    assert (tmp_path / "a.mp4").read_text() == "old"
    write_video(Video(clip(5, 16, 16), 10), tmp_path / "a.mp4")
    assert len(read_video(tmp_path / "a.mp4").frames) == 5


FULL = """
import resource, signal, sys, torch
from plait.errors import PlaitError
from plait.tokenizers.media import Video
from plait.tokenizers.video import write_video
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (5000, 5000))
noise = torch.randint(0, 256, (9, 64, 64, 3), dtype=torch.uint8)
for path in sys.argv[1:]:
    try:
        write_video(Video(noise, 10), path)
    except PlaitError as error:
        print(error)
"""


def test_a_full_disk_is_one_line(tmp_path: Path) -> None:
    # A limit on the size of files fails a write as a full disk does.
    paths = [str(tmp_path / f"a{suffix}") for suffix in FORMATS]
    done = subprocess.run([sys.executable, "-c", FULL, *paths], capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    lines = done.stdout.splitlines()
    assert [line.partition(": ")[0] for line in lines] == paths
    assert all(f"cannot be written at 64×64 ({os.strerror(errno.EFBIG)})" in line for line in lines), lines
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("name", "fps", "words"),
    [
        ("a.avi", 10, ["a.avi", "written as .mp4, .webm, .webp, .gif"]),
        ("a.mp4", 0, ["fps: is 0"]),
        ("a.mp4", float("nan"), ["fps: is nan"]),
        ("a.mp4", -1, ["fps"]),
        ("a.mp4", 1e9, ["fps"]),
        ("a.mp4", "10", ["fps: is '10'"]),
        ("a.gif", 60, ["fps: is 60", "to 50"]),
        ("gone/a.mp4", 10, ["gone/a.mp4: cannot be written (No such file or directory)"]),
        ("n" * 300 + ".mp4", 10, ["cannot be written (File name too long)"]),
    ],
)
def test_bad_targets_are_refused(tmp_path: Path, name: str, fps: Any, words: list[str]) -> None:
    with pytest.raises(PlaitError) as raised:
        write_video(Video(clip(2, 8, 8), fps), tmp_path / name)
    assert all(word in str(raised.value) for word in words), raised.value
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("suffix", FORMATS)
def test_sides_that_a_format_cannot_hold_are_refused(tmp_path: Path, suffix: str) -> None:
    with pytest.raises(PlaitError, match="cannot be written at 1×70000"):
        write_video(Video(torch.zeros(1, 1, 70000, 3, dtype=torch.uint8), 10), tmp_path / f"a{suffix}")
    assert list(tmp_path.iterdir()) == []


def test_frames_are_checked(tmp_path: Path) -> None:
    for frames in (clip(2, 8, 8).float(), clip(2, 8, 8)[0], clip(2, 8, 8).permute(0, 3, 1, 2), clip(2, 8, 8)[:, :0]):
        with pytest.raises(PlaitError, match=r"expected torch\.uint8 \[n, h, w, 3\]"):
            write_video(Video(frames, 10), tmp_path / "a.mp4")


def test_a_missing_encoder_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from dataclasses import replace

    monkeypatch.setitem(FORMATS, ".webm", replace(FORMATS[".webm"], codec="no-such-codec"))
    with pytest.raises(PlaitError, match=r"a\.webm: this PyAV has no no-such-codec encoder; write \.mp4"):
        write_video(Video(clip(2, 8, 8), 10), tmp_path / "a.webm")
    assert list(tmp_path.iterdir()) == []


def test_a_film_that_does_not_say_its_rate_has_the_default(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    class Silent:
        """A stream that knows everything but its rate."""

        average_rate = guessed_rate = None

        def __init__(self, stream: Any) -> None:
            self._stream = stream

        def __getattr__(self, name: str) -> Any:
            return getattr(self._stream, name)

    class Container:
        def __init__(self, container: Any) -> None:
            self.streams = type("Streams", (), {"video": [Silent(container.streams.video[0])]})
            self._container = container

        def demux(self, stream: Any) -> Iterator[Any]:
            return iter(self._container.demux(video=0))

        def __enter__(self) -> "Container":
            return self

        def __exit__(self, *_: object) -> None:
            self._container.close()

    write_video(Video(clip(2, 8, 8), 10), tmp_path / "a.mp4")
    original = av.open
    monkeypatch.setattr(av, "open", lambda *a, **k: Container(original(*a, **k)))
    assert read_video(tmp_path / "a.mp4").fps == DEFAULT_FPS
