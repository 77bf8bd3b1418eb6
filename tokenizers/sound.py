"""Sound in and out as streams of samples: WAV, FLAC, MP3, Ogg, AIFF, AU and the sound of films, through PyAV.

Only the samples at hand are in memory, however long a sound is. They are float32 and nominally within ±1; what a float
file or a lossy codec has beyond that stays as it is. Rates and channels are changed by libswresample:

- n samples at one rate become ``ceil(n · new / old)`` at another, with no shift: sample k lies at the time k / new.
- One channel is FFmpeg's down-mix of all there are, with weights that add up to at most 1, so that it is never louder
  than the loudest of them: of stereo the mean.
- Two channels are the down-mix to stereo by the same rule, or the one channel that there is on both sides.
"""

import io
import os
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from fractions import Fraction
from itertools import chain
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Self

import numpy as np
import torch
from torch import Tensor

from plait.errors import PlaitError
from plait.tokenizers.containers import is_complete, reader_of
from plait.tokenizers.media import Audio
from plait.tokenizers.resampling import Array, Resampler, frame_of, layout_of, resample
from plait.tokenizers.video import av_errors

# Samples that come at a time.
CHUNK = 2**17
# Beyond these the filters of a resampler grow without bounds.
RATES = (1000, 384_000)
# Readers whose files say exactly how many samples there are; FFmpeg drops up to a block at the end of a short Vorbis.
_COUNTED = {"flac": 0, "aiff": 0, "au": 0, "ogg": 4096}


@dataclass(frozen=True)
class SoundFacts:
    """What is known of a sound before it is read.

    Attributes:
        sample_rate: Hz.
        channels: how many.
        samples: about how many of each channel, if the file says so.
        bounded: they are stored as whole numbers, so none is beyond ±1.
    """

    sample_rate: int
    channels: int
    samples: int | None
    bounded: bool


@dataclass(frozen=True)
class Level:
    """How loud a sound is.

    Attributes:
        samples: how many of each channel.
        peak: the largest absolute value.
        rms: root mean square over samples and channels.
    """

    samples: int
    peak: float
    rms: float


@dataclass(frozen=True)
class _Format:
    container: str
    codec: str
    sample_format: str
    # The only rates there are, ascending; any if empty.
    rates: tuple[int, ...] = ()
    # Bits per second of a channel.
    bit_rate: int | None = None


FORMATS: dict[str, _Format] = {
    ".wav": _Format("wav", "pcm_s16le", "s16"),
    ".flac": _Format("flac", "flac", "s16"),
    ".mp3": _Format("mp3", "libmp3lame", "fltp", (8000, 11025, 12000, 16000, 22050, 24000, 32000, 44100, 48000), 96000),
    ".ogg": _Format("ogg", "libopus", "flt", (8000, 12000, 16000, 24000, 48000), 96000),
}


# Reading


def is_sound(path: str | Path) -> bool:
    """Whether a file is sound and nothing to look at, by what is in it and not by its name.

    False for what cannot be opened: that is for the readers to judge.
    """
    try:
        with Path(path).open("rb") as file:
            kind = reader_of(file)
            if kind not in ("mov", "matroska"):
                return kind is not None
            with _container(file, kind) as container:
                return bool(container.streams.audio) and not any(map(_is_film, container.streams.video))
    except av_errors():
        return False


def sound_facts(path: str | Path) -> SoundFacts:
    """What is known of a sound file when its first samples are read.

    Raises:
        PlaitError: as `stream_sound`.
    """
    with _opened(path) as file:
        return next(_frames(file, str(path)))[0]


def stream_sound(
    path: str | Path, sample_rate: int | None = None, channels: int | None = None, chunk: int = CHUNK
) -> Iterator[Tensor]:
    """Read a sound, or the first sound track of a film, bit by bit; the module says what becomes of its channels.

    Args:
        path: WAV, FLAC, MP3, Ogg (Vorbis, Opus, FLAC), AIFF, AU, AAC, MP4, MOV, WebM or MKV. The extension does not
            matter. What a lossy encoder added at both ends is left out as far as the file says how much that is.
        sample_rate: Hz, from `RATES`; the file's own by default.
        channels: 1 or 2; the file's own by default.
        chunk: samples that come at a time, at least 1.

    Yields:
        float32 ``[channels, n]`` with n ≤ ``chunk``.

    Raises:
        PlaitError: missing, not a sound, empty, without samples, with a rate out of range; while reading: damaged or
            cut off, values that are not finite, a rate or channels that change.
    """
    _check_target(sample_rate, channels)
    with _opened(path) as file:
        _, arrays = _samples(file, str(path), sample_rate, channels)
        yield from map(torch.from_numpy, _regrouped(arrays, chunk))


def read_sound(
    source: str | Path | bytes, name: str | None = None, sample_rate: int | None = None, channels: int | None = None
) -> Audio:
    """Read a whole sound.

    Args:
        source: a path, or a file's bytes.
        name: what to call it in errors when ``source`` is not a path.
        sample_rate: as in `stream_sound`.
        channels: as in `stream_sound`.

    Raises:
        PlaitError: as `stream_sound`.
    """
    _check_target(sample_rate, channels)
    name = name or ("sound" if isinstance(source, bytes) else str(source))
    with io.BytesIO(source) if isinstance(source, bytes) else _opened(source) as file:
        rate, parts = _samples(file, name, sample_rate, channels)
        return Audio(torch.from_numpy(np.concatenate(list(parts), 1)), rate)


def to_samples(audio: Audio, sample_rate: int, channels: int) -> Tensor:
    """Sound as a tokenizer takes it.

    Args:
        audio: samples ``[c, n]``, floating point.
        sample_rate: Hz to bring it to.
        channels: 1 or 2.

    Returns:
        float32 ``[1, channels, ceil(n · new / old)]``.

    Raises:
        PlaitError: no such samples, values that are not finite, or a rate out of range.
    """
    _check_target(sample_rate, channels)
    _check_rate(audio.sample_rate, "audio")
    parts = _checked(audio.samples).cpu().split(CHUNK, -1)
    frames = (frame_of(part.numpy(), audio.sample_rate) for part in parts)
    return torch.from_numpy(np.concatenate(list(resample(frames, sample_rate, channels)), 1))[None]


def measure(chunks: Iterable[Tensor]) -> Level:
    """How loud a sound is that comes in chunks ``[channels, n]``."""
    count, peak, energy = 0, 0.0, 0.0
    for chunk in chunks:
        count += chunk.shape[-1]
        peak = max(peak, float(chunk.abs().max()))
        energy += float(chunk.double().square().mean(0).sum())
    return Level(count, peak, (energy / max(1, count)) ** 0.5)


# Writing


def write_sound(audio: Audio, path: str | Path) -> int:
    """Write a whole sound in the format that the extension names: .wav, .flac, .mp3 or .ogg.

    Returns:
        the number of samples that were beyond ±1 and are clipped.

    Raises:
        PlaitError: as `SoundWriter`.
    """
    with SoundWriter(path, audio.sample_rate, len(audio.samples)) as writer:
        writer.write(audio.samples)
    return writer.clipped


def write_sound_bytes(audio: Audio) -> bytes:
    """A sound as the bytes of a WAV file with 16 bits per sample; samples beyond ±1 are clipped.

    Raises:
        PlaitError: no such samples, or none at all.
    """
    buffer = io.BytesIO()
    encoder = _Encoder(buffer, FORMATS[".wav"], audio.sample_rate, len(audio.samples))
    encoder.write(_checked(audio.samples))
    encoder.finish()
    return buffer.getvalue()


class SoundWriter:
    """Write a sound bit by bit: ``with SoundWriter("a.wav", 24000, 1) as writer: writer.write(samples)``.

    The extension names the format. The file appears when all went well, and no part of it is left if not. Samples
    beyond ±1 are clipped. MP3 and Opus know a few rates only; sound of another one is brought to the next higher.

    Args:
        path: ends in .wav (16 bits), .flac (16 bits), .mp3 or .ogg (Opus).
        sample_rate: Hz, from `RATES`.
        channels: 1 or 2.

    Attributes:
        clipped: samples that were beyond ±1, of all channels.

    Raises:
        PlaitError: another extension, a rate or channels out of range, no samples at all, values that are not finite,
            no such encoder in this PyAV, or a file that cannot be written.
    """

    def __init__(self, path: str | Path, sample_rate: int, channels: int) -> None:
        self._path = Path(path)
        self._temporary = self._path.with_name(f".{self._path.name}.{os.getpid()}.tmp")
        suffix = self._path.suffix.lower()
        if suffix not in FORMATS:
            raise PlaitError(f"{path}: a sound is written as {', '.join(FORMATS)}; give a name that ends so")
        _check_target(sample_rate, channels)
        self._format, self._rate, self._channels = FORMATS[suffix], sample_rate, channels
        self._file: IO[bytes] | None = None
        self._encoder: _Encoder | None = None
        self.clipped = 0

    def __enter__(self) -> Self:
        try:
            self._file = self._temporary.open("wb")
        except OSError as error:
            raise self._failed(error) from None
        return self

    def write(self, samples: Tensor) -> None:
        """Append samples ``[channels, n]``, floating point.

        Raises:
            PlaitError: another shape or dtype, values that are not finite, or the file cannot be written.
        """
        assert self._file is not None
        samples = _checked(samples)
        if len(samples) != self._channels:
            raise PlaitError(f"samples: have {len(samples)} channels, the file has {self._channels}")
        self.clipped += int((samples.abs() > 1).sum())
        try:
            if self._encoder is None:
                self._encoder = _Encoder(self._file, self._format, self._rate, self._channels)
            self._encoder.write(samples)
        except av_errors() as error:
            raise self._failed(error) from None

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if error is None:
                self._finish()
        finally:
            if self._encoder is not None:
                with suppress(Exception):  # what made the write fail makes the trailer fail too
                    self._encoder.container.close()
            if self._file is not None:
                with suppress(OSError):
                    self._file.close()
            with suppress(OSError):
                self._temporary.unlink(missing_ok=True)

    def _finish(self) -> None:
        assert self._file is not None
        if self._encoder is None:
            raise PlaitError(f"{self._path}: a sound needs samples, there are none")
        try:
            self._encoder.finish()
            self._file.close()
            self._temporary.replace(self._path)
        except av_errors() as error:
            raise self._failed(error) from None

    def _failed(self, error: Exception) -> PlaitError:
        if isinstance(error, PlaitError):
            return error
        reason = getattr(error, "strerror", None) or error
        return PlaitError(f"{self._path}: cannot be written ({reason}); choose another place or format")


class _Encoder:
    """Samples ``[channels, n]`` → an open file of one format."""

    def __init__(self, file: IO[bytes], format: _Format, sample_rate: int, channels: int) -> None:
        import av

        above = [rate for rate in format.rates if rate >= sample_rate]
        self._rate = min(above) if above else max(format.rates, default=sample_rate)
        self._old_rate, self._count = sample_rate, 0
        # Without the flag the encoder's version and a random serial number are in the file. A WAV beyond 4 GiB is RF64.
        options = {"fflags": "+bitexact"} | ({"rf64": "auto"} if format.container == "wav" else {})
        self.container = av.open(file, "w", format=format.container, container_options=options)
        try:
            self._stream = self.container.add_stream(format.codec, self._rate, layout=layout_of(channels))
        except av.codec.codec.UnknownCodecError:
            raise PlaitError(
                f"this PyAV has no {format.codec} encoder; write .wav, or run: pip install -U av"
            ) from None
        self._stream.codec_context.format = format.sample_format
        if format.bit_rate:
            self._stream.bit_rate = format.bit_rate * channels
        self._resampler = None if self._rate == sample_rate else Resampler(self._rate, channels)

    def write(self, samples: Tensor) -> None:
        for part in samples.cpu().split(CHUNK, -1):
            frame = frame_of(part.clamp(-1, 1).numpy(), self._old_rate)
            if self._resampler is None:
                self._encode(frame)
            else:
                self._encode_arrays(self._resampler.push(frame))

    def finish(self) -> None:
        if self._resampler is not None:
            self._encode_arrays(self._resampler.finish())
        self.container.mux(self._stream.encode(None))
        self.container.close()

    def _encode_arrays(self, arrays: Iterable[Array]) -> None:
        for array in arrays:
            self._encode(frame_of(array.clip(-1, 1), self._rate))

    def _encode(self, frame: Any) -> None:
        frame.pts, frame.time_base = self._count, Fraction(1, self._rate)
        self._count += frame.samples
        self.container.mux(self._stream.encode(frame))


# Files


def _opened(path: str | Path) -> IO[bytes]:
    try:
        return Path(path).open("rb")
    except FileNotFoundError:
        raise PlaitError(f"{path}: no such file") from None
    except OSError as error:
        raise PlaitError(f"{path}: cannot be read ({error.strerror})") from None


def _samples(file: IO[bytes], name: str, sample_rate: int | None, channels: int | None) -> tuple[int, Iterator[Array]]:
    """The rate of the samples, and the samples ``[channels, n]`` as they come.

    Raises:
        PlaitError: as `stream_sound`.
    """
    frames = _frames(file, name)
    facts, first = next(frames)
    rest = (frame for _, frame in frames)

    def arrays() -> Iterator[Array]:
        try:
            for array in resample(chain([first], rest), sample_rate, channels):
                if not np.isfinite(array).all():
                    raise PlaitError("has samples that are not finite; replace NaN and infinity")
                yield array
        except PlaitError as error:
            raise PlaitError(str(error) if str(error).startswith(f"{name}: ") else f"{name}: {error}") from None

    return sample_rate or facts.sample_rate, arrays()


def _frames(file: IO[bytes], name: str) -> Iterator[tuple[SoundFacts, Any]]:
    """The decoder's frames, each with the facts.

    Raises:
        PlaitError: as `stream_sound`.
    """
    kind = reader_of(file)
    if kind is None:
        if not file.read(1):
            raise PlaitError(f"{name}: is empty")
        raise PlaitError(f"{name}: no sound that can be read (WAV, FLAC, MP3, Ogg, or a film with sound)")
    if not is_complete(file, kind):
        raise PlaitError(f"{name}: cut off before its end; copy or download it again")
    try:
        with _container(file, kind) as container:
            yield from _decoded(container, kind, name)
    except av_errors() as error:
        if isinstance(error, PlaitError):
            raise
        reason = getattr(error, "strerror", None) or error
        raise PlaitError(f"{name}: broken sound ({reason}); replace the file or leave it out") from None


def _container(file: IO[bytes], kind: str) -> Any:
    import av

    # Tags may be in any encoding; from version 19 on PyAV takes them as they are.
    tags = {"metadata_errors": "replace"} if int(av.__version__.partition(".")[0]) < 19 else {}
    # The reader is named, as FFmpeg goes by the extension first; and a file object is no playlist or address to it.
    return av.open(file, format=kind, **tags)


def _decoded(container: Any, kind: str, name: str) -> Iterator[tuple[SoundFacts, Any]]:
    if not container.streams.audio:
        raise PlaitError(f"{name}: has no sound")
    stream = container.streams.audio[0]
    if stream.codec_context is None:
        raise PlaitError(f"{name}: its sound is of a kind that this PyAV cannot decode; convert it to FLAC")
    if stream.codec_context.name == "flac":
        stream.codec_context.options = {"err_detect": "crccheck+explode"}
    count, facts, first = 0, None, None
    for packet in container.demux(stream):
        for frame in packet.decode():
            # In a WAV this means a header that does not know the length.
            if frame.is_corrupt or (packet.is_corrupt and kind != "wav"):
                raise PlaitError(f"{name}: broken sound; replace the file or leave it out")
            if facts is None:
                facts, first = _facts(stream, frame, name), _kind_of(frame)
            elif _kind_of(frame) != first:
                raise PlaitError(f"{name}: its sample rate or its channels change; cut it there into two files")
            count += frame.samples
            if frame.samples:
                yield facts, frame
    if not count or facts is None:
        raise PlaitError(f"{name}: holds no samples")
    if kind in _COUNTED and facts.samples is not None and count < facts.samples - _COUNTED[kind]:
        raise PlaitError(f"{name}: {count} of {facts.samples} samples are there; copy or download it again")


def _facts(stream: Any, frame: Any, name: str) -> SoundFacts:
    _check_rate(frame.sample_rate, name)
    samples = round(stream.duration * stream.time_base * frame.sample_rate) if stream.duration else None
    # MP3, Vorbis, Opus and AAC are decoded to floats.
    bounded = not frame.format.name.startswith(("flt", "dbl"))
    return SoundFacts(frame.sample_rate, frame.layout.nb_channels, samples, bounded)


def _kind_of(frame: Any) -> tuple[str, str, int]:
    return frame.format.name, frame.layout.name, frame.sample_rate


def _is_film(stream: Any) -> bool:
    from av.stream import Disposition

    return not stream.disposition & Disposition.attached_pic  # a cover is a video track too


def _regrouped(arrays: Iterable[Array], size: int) -> Iterator[Array]:
    held: list[Array] = []
    count = 0
    for array in arrays:
        held.append(array)
        count += array.shape[1]
        if count >= size:
            joined = np.concatenate(held, 1)
            whole = count // size * size
            yield from (joined[:, i : i + size].copy() for i in range(0, whole, size))
            held, count = [joined[:, whole:].copy()], count - whole
    if count:
        yield np.concatenate(held, 1)


# Checks


def _check_rate(sample_rate: int, name: str) -> None:
    if type(sample_rate) is not int or not RATES[0] <= sample_rate <= RATES[1]:
        raise PlaitError(f"{name}: sample rate is {sample_rate!r}, must be {RATES[0]} to {RATES[1]} Hz")


def _check_target(sample_rate: int | None, channels: int | None) -> None:
    if sample_rate is not None:
        _check_rate(sample_rate, "sound")
    if channels not in (None, 1, 2):
        raise PlaitError(f"sound: channels is {channels!r}, must be 1 or 2")


def _checked(samples: Tensor) -> Tensor:
    """Samples ``[channels, n]`` as float32.

    Raises:
        PlaitError: another shape or dtype, or values that are not finite.
    """
    if samples.ndim != 2 or 0 in samples.shape or not samples.is_floating_point():
        raise PlaitError(f"samples: are {samples.dtype} {list(samples.shape)}, expected floats [channels, n], n ≥ 1")
    samples = samples.detach().float()
    if not samples.isfinite().all():
        raise PlaitError("samples: values are not finite; replace NaN and infinity, say with torch.nan_to_num")
    return samples
