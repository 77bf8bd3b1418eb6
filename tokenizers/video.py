"""Clips in and out as streams of frames: MP4 and WebM through PyAV, animated GIF, WebP and PNG.

Only the frames at hand are in memory, however long a clip is. Frames are 8-bit RGB on white and turned upright; sound
is left out. A clip's rate is its average one: where a recording's frame rate varies the frames count, not their times.
"""

import io
import os
from collections.abc import Generator, Iterator
from contextlib import closing, suppress
from dataclasses import dataclass
from fractions import Fraction
from itertools import chain, islice
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Self

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor

from plait.errors import PlaitError
from plait.tokenizers.media import Video, pillow_errors, to_rgb

# What a clip plays at that does not say, or says something out of range.
DEFAULT_FPS = 25.0
FPS_RANGE = (0.001, 1000.0)
# Formats of Pillow whose further frames are later moments, not other pages or views.
_ANIMATED = ("GIF", "WEBP", "PNG", "AVIF")
# How browsers show a GIF's frame that has no duration.
_DEFAULT_MILLISECONDS = 100
_THREADS = min(4, os.cpu_count() or 1)
# Chroma at full resolution and exact rounding (swscale's flags), or colours come out one or two levels darker.
_SCALING = 0x4 | 0x2000 | 0x40000

Frame = np.ndarray[Any, np.dtype[np.uint8]]


@dataclass(frozen=True)
class VideoFacts:
    """What is known of a clip before it is read.

    Attributes:
        height: pixels.
        width: pixels.
        fps: frames per second, on average.
        frames: how many, if the file says so.
    """

    height: int
    width: int
    fps: float
    frames: int | None


_Frames = Generator[tuple[VideoFacts, Frame], None, None]


@dataclass(frozen=True)
class _Format:
    container: str
    codec: str
    pixels: str
    codec_options: dict[str, str]
    container_options: dict[str, str]
    most_fps: float = FPS_RANGE[1]


FORMATS: dict[str, _Format] = {
    ".mp4": _Format("mp4", "libx264", "yuv420p", {"crf": "18"}, {}),
    ".webm": _Format("webm", "libvpx-vp9", "yuv420p", {"crf": "24", "b": "0", "cpu-used": "4", "row-mt": "1"}, {}),
    ".webp": _Format("webp", "libwebp_anim", "bgra", {"quality": "90"}, {"loop": "0"}),
    # Delays are whole hundredths of a second, and players slow down what is below two of them.
    ".gif": _Format("gif", "gif", "pal8", {}, {"loop": "0"}, most_fps=50),
}


def is_clip(path: str | Path) -> bool:
    """Whether a file holds moving pictures, by what is in it and not by its name.

    False for a still picture; true for everything that `stream_video` has to judge.

    Raises:
        PlaitError: it cannot be opened, or is a broken picture.
    """
    with pillow_errors(str(path)):
        try:
            with Image.open(path) as image:
                return _moments(image)[1] > 1
        except UnidentifiedImageError:
            return True


def stream_video(path: str | Path, chunk: int = 16) -> tuple[VideoFacts, Iterator[Tensor]]:
    """Open a clip.

    Args:
        path: MP4, MOV, WebM, MKV, or a picture with one frame or more. The extension does not matter.
        chunk: frames that come at a time, at least 1.

    Returns:
        what is known of it, and its frames as uint8 ``[n, h, w, 3]`` with n ≤ ``chunk``. The file is open until the
        iterator is exhausted or dropped.

    Raises:
        PlaitError: at once: missing, not a clip, no frames, unreasonably large. While reading: damaged or cut off, or
            the size changes.
    """
    frames = _frames(Path(path))
    try:
        facts, first = next(frames)
    except StopIteration:
        raise PlaitError(f"{path}: holds no frames; is the recording complete?") from None
    return facts, _chunks(chain([first], (frame for _, frame in frames)), chunk)


def read_video(path: str | Path) -> Video:
    """Read a whole clip.

    Raises:
        PlaitError: as `stream_video`.
    """
    facts, chunks = stream_video(path)
    return Video(torch.cat(list(chunks)), facts.fps)


def write_video(video: Video, path: str | Path) -> None:
    """Write a whole clip in the format that the extension names: .mp4, .webm, .gif or .webp.

    Raises:
        PlaitError: as `VideoWriter`.
    """
    with VideoWriter(path, video.fps) as writer:
        writer.write(video.frames)


class VideoWriter:
    """Write a clip frame by frame: ``with VideoWriter("a.mp4", 24) as writer: writer.write(frames)``.

    The extension names the format. The file appears when all went well, and no part of it is left if not. H.264 needs
    even sides in the pixel format that plays everywhere: in an .mp4 the last row or column of an odd size is doubled.

    Args:
        path: ends in .mp4 (H.264), .webm (VP9), .gif or .webp.
        fps: frames per second, 0.001 to 1000, of a GIF at most 50.

    Raises:
        PlaitError: another extension, a rate out of range, frames of no or a changing size, no frames at all, no such
            encoder in this PyAV, or a file that cannot be written.
    """

    def __init__(self, path: str | Path, fps: float) -> None:
        self._path = Path(path)
        self._temporary = self._path.with_name(f".{self._path.name}.{os.getpid()}.tmp")
        suffix = self._path.suffix.lower()
        if suffix not in FORMATS:
            raise PlaitError(f"{path}: a clip is written as {', '.join(FORMATS)}; give a name that ends so")
        self._format = FORMATS[suffix]
        self._rate = _rate(fps, self._format.most_fps, f"{path}: fps")
        self._size: tuple[int, int] | None = None
        self._count = 0
        self._file: IO[bytes] | None = None
        self._container: Any = None
        self._stream: Any = None

    def __enter__(self) -> Self:
        try:
            self._file = self._temporary.open("wb")
        except OSError as error:
            raise self._failed(error) from None
        return self

    def write(self, frames: Tensor) -> None:
        """Append frames, uint8 ``[n, h, w, 3]``.

        Raises:
            PlaitError: another shape or dtype than that or than the frames before, or the file cannot be written.
        """
        if frames.ndim != 4 or frames.shape[3] != 3 or frames.dtype != torch.uint8 or 0 in frames.shape[1:]:
            raise PlaitError(f"frames: are {frames.dtype} {list(frames.shape)}, expected torch.uint8 [n, h, w, 3]")
        size = frames.shape[1], frames.shape[2]
        if self._size not in (None, size):
            raise PlaitError(f"frames: are {size[0]}×{size[1]}, the frames before were another size")
        self._size = size
        for frame in frames.cpu().numpy():
            try:
                self._write(frame)
            except av_errors() as error:
                raise self._failed(error) from None

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if error is None:
                self._finish()
        finally:
            if self._container is not None:
                with suppress(Exception):  # what made the write fail makes the trailer fail too
                    self._container.close()
            if self._file is not None:
                with suppress(OSError):
                    self._file.close()
            with suppress(OSError):
                self._temporary.unlink(missing_ok=True)

    def _finish(self) -> None:
        if not self._count:
            raise PlaitError(f"{self._path}: a clip needs frames, there are none")
        assert self._file is not None
        try:
            self._container.mux(self._stream.encode(None))
            self._container.close()
            self._file.close()
            self._temporary.replace(self._path)
        except av_errors() as error:
            raise self._failed(error) from None

    def _write(self, array: Frame) -> None:
        from av import VideoFrame
        from av.video.reformatter import ColorRange, Colorspace

        if self._format.container == "mp4":
            array = np.pad(array, ((0, array.shape[0] % 2), (0, array.shape[1] % 2), (0, 0)), mode="edge")
        if self._container is None:
            self._open(*array.shape[:2])
        if self._format.pixels == "pal8":
            frame = VideoFrame.from_ndarray(_with_palette(array), format="pal8")
        else:
            frame = VideoFrame.from_ndarray(np.ascontiguousarray(array), format="rgb24")
        if self._format.pixels == "yuv420p":
            frame = frame.reformat(
                format="yuv420p", dst_colorspace=Colorspace.ITU709, dst_color_range=ColorRange.MPEG,
                interpolation=_SCALING,
            )  # fmt: skip
        frame.pts, frame.time_base = self._count, 1 / self._rate
        self._count += 1
        self._container.mux(self._stream.encode(frame))

    def _open(self, height: int, width: int) -> None:
        import av

        self._container = av.open(
            self._file, "w", format=self._format.container, container_options=self._format.container_options
        )
        try:
            stream = self._container.add_stream(self._format.codec, self._rate, dict(self._format.codec_options))
        except av.codec.codec.UnknownCodecError:
            raise PlaitError(
                f"{self._path}: this PyAV has no {self._format.codec} encoder; "
                f"write {' or '.join(s for s, f in FORMATS.items() if f != self._format)}, or run: pip install -U av"
            ) from None
        stream.width, stream.height, stream.pix_fmt = width, height, self._format.pixels
        context = stream.codec_context
        context.thread_count = _THREADS
        if self._format.pixels == "yuv420p":
            # BT.709, limited range; players guess by size where nothing is said.
            context.colorspace = context.color_primaries = context.color_trc = context.color_range = 1
        self._stream = stream

    def _failed(self, error: Exception) -> PlaitError:
        if isinstance(error, PlaitError):
            return error
        reason = getattr(error, "strerror", None) or error
        size = f" at {self._size[0]}×{self._size[1]}" if self._size else ""
        return PlaitError(f"{self._path}: cannot be written{size} ({reason}); choose another place or format")


def _rate(fps: float, most: float, name: str) -> Fraction:
    """Frames per second as a fraction; 29.97 is 30000/1001.

    Raises:
        PlaitError: not a number, or out of range.
    """
    if isinstance(fps, bool) or not isinstance(fps, (int, float)) or not FPS_RANGE[0] <= fps <= most:
        raise PlaitError(f"{name}: is {fps!r}, must be a number from {FPS_RANGE[0]} to {most:g}")
    return Fraction(fps).limit_denominator(1001)


def _with_palette(array: Frame) -> tuple[Frame, Frame]:
    """``[h, w, 3]`` → indices ``[h, w]`` and 256 colours of this frame ``[256, 4]`` as ARGB."""
    image = Image.fromarray(array).quantize(256)
    assert image.palette is not None
    colours = np.frombuffer(image.palette.tobytes(), np.uint8).reshape(-1, 3)
    palette = np.full((256, 4), 255, np.uint8)
    palette[: len(colours), 1:] = colours
    return np.asarray(image), palette


def av_errors() -> tuple[type[Exception], ...]:
    """What PyAV raises on files that it cannot read or write."""
    from av.error import FFmpegError

    return FFmpegError, OSError, ValueError


def _chunks(frames: Iterator[Frame], chunk: int) -> Iterator[Tensor]:
    while taken := list(islice(frames, chunk)):
        yield torch.from_numpy(np.stack(taken))


def _frames(path: Path) -> _Frames:
    """The frames of a file, each with the facts."""
    name = str(path)
    with pillow_errors(name), path.open("rb") as file:
        head = file.read(12)
        try:
            image = None if container_of(head) else Image.open(path)
        except UnidentifiedImageError:
            raise PlaitError(f"{name}: neither a picture nor a video that can be read (MP4, WebM)") from None
    source = _film(path, head) if image is None else _animation(image, name)
    size = None
    with closing(source):
        for facts, frame in source:
            if size not in (None, frame.shape):
                raise PlaitError(f"{name}: the size of its frames changes; cut it there into two files")
            size = frame.shape
            yield facts, frame


def _moments(image: Image.Image) -> tuple[int, int]:
    """The first frame of an animation and how many there are; a PNG may begin with a still for old readers."""
    if image.format not in _ANIMATED:
        return 0, 1
    first = int(bool(image.info.get("default_image")))
    return first, getattr(image, "n_frames", 1) - first


def _animation(image: Image.Image, name: str) -> _Frames:
    with closing(image):
        with pillow_errors(name):
            first, count = _moments(image)
            milliseconds = 0.0
            for i in range(first, first + count):
                image.seek(i)
                image.load()  # WebP knows the duration only now
                milliseconds += image.info.get("duration") or _DEFAULT_MILLISECONDS
        for i in range(first, first + count):
            with pillow_errors(name):
                image.seek(i)
                frame = np.asarray(to_rgb(image))
            yield _facts(frame, 1000 * count / milliseconds, count), frame


def container_of(head: bytes) -> str | None:
    """FFmpeg's reader for a film that begins so."""
    if head[:4] == b"\x1aE\xdf\xa3":
        return "matroska"
    if head[4:8] == b"ftyp" and head[8:12] in (b"heic", b"heix", b"heim", b"mif1", b"avif", b"avis"):
        return None  # pictures in the same container
    return "mov" if head[4:8] in (b"ftyp", b"moov", b"mdat", b"wide", b"free", b"skip") else None


def _film(path: Path, head: bytes) -> _Frames:
    import av

    name = str(path)
    # The reader is named, as FFmpeg goes by the extension first; and a file object is no playlist or address to it.
    with path.open("rb") as file:
        if not is_whole(file):
            raise PlaitError(f"{name}: cut off before its end; copy or download it again")
        try:
            with av.open(file, format=container_of(head)) as container:
                yield from _decoded(container, name)
        except av_errors() as error:
            if isinstance(error, PlaitError):
                raise
            reason = getattr(error, "strerror", None) or error
            raise PlaitError(f"{name}: broken video ({reason}); replace the file or leave it out") from None


def _decoded(container: Any, name: str) -> _Frames:
    from av import CodecContext
    from av.stream import Disposition

    # A cover is a video track too.
    streams = [s for s in container.streams.video if not s.disposition & Disposition.attached_pic]
    if not streams:
        raise PlaitError(f"{name}: has no video track")
    stream = streams[0]
    decoder = stream.codec_context
    if decoder is None:
        raise PlaitError(f"{name}: its video is of a kind that this PyAV cannot decode; convert it to H.264")
    limit = Image.MAX_IMAGE_PIXELS
    if limit and decoder.width * decoder.height > limit:
        raise PlaitError(f"{name}: too large ({decoder.width}×{decoder.height} pixels); scale it down first")
    # FFmpeg's own VP8 and VP9 decoders leave out the alpha that WebM stores beside the picture.
    if stream.metadata.get("alpha_mode") == "1" and decoder.name in ("vp8", "vp9"):
        decoder = CodecContext.create({"vp8": "libvpx", "vp9": "libvpx-vp9"}[decoder.name], "r")
    decoder.thread_type, decoder.thread_count = "AUTO", _THREADS
    rate = stream.average_rate or stream.guessed_rate
    for packet in container.demux(stream):
        for frame in decoder.decode(packet if packet.size else None):
            if packet.is_corrupt or frame.is_corrupt:
                raise PlaitError(f"{name}: broken video; replace the file or leave it out")
            array = _to_rgb(frame)
            yield _facts(array, float(rate or 0), stream.frames or None), array


def _facts(frame: Frame, fps: float, frames: int | None) -> VideoFacts:
    fps = fps if FPS_RANGE[0] <= fps <= FPS_RANGE[1] else DEFAULT_FPS
    return VideoFacts(frame.shape[0], frame.shape[1], fps, frames)


def _to_rgb(frame: Any) -> Frame:
    """RGB ``[h, w, 3]`` on white, turned as the file asks."""
    if frame.format.has_palette or any(component.is_alpha for component in frame.format.components):
        rgba = frame.to_ndarray(format="rgba", interpolation=_SCALING).astype(np.uint16)
        rgb, alpha = rgba[..., :3], rgba[..., 3:]
        array = ((rgb * alpha + 255 * (255 - alpha) + 127) // 255).astype(np.uint8)
    else:
        array = frame.to_ndarray(format="rgb24", interpolation=_SCALING)
    return np.ascontiguousarray(np.rot90(array, round(frame.rotation / 90)))


def is_whole(file: IO[bytes]) -> bool:
    """Whether a film's outermost parts end within the file; of a shorter one FFmpeg shows the beginning as if all.

    Formats: boxes of ISO/IEC 14496-12, elements of RFC 8794.
    """
    end = file.seek(0, io.SEEK_END)
    position = 0
    try:
        while position < end:
            file.seek(position)
            head = file.read(16).ljust(16, b"\0")
            if head[:4] == b"\x1aE\xdf\xa3" or head[:4] == b"\x18S\x80g":  # the EBML header, the segment
                length = 9 - head[4].bit_length()
                size = int.from_bytes(head[4 : 4 + length]) & ((1 << 7 * length) - 1)
                if size == (1 << 7 * length) - 1:  # a live recording does not know
                    break
                position += 4 + length + size
            elif head[4:8] in (b"ftyp", b"moov", b"moof", b"mdat", b"free", b"wide", b"skip", b"sidx", b"styp"):
                size = int.from_bytes(head[:4])
                size = int.from_bytes(head[8:16]) if size == 1 else size or end - position
                position += max(size, 8)
            else:
                break
    finally:
        file.seek(0)
    return position <= end
