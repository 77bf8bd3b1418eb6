"""`plait tokenizer encode` and `decode`: picture, video and sound files to files of codes, and back.

One file after the other, and of a long one only a little at a time: what stays in memory is its codes. What is done
with one file is in `visual_files.py` and `sound_files.py`.
"""

import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from plait.errors import PlaitError
from plait.tokenizers.base import Codes, make_folder
from plait.tokenizers.counter import Advance, Counter
from plait.tokenizers.loading import find_weights, load_tokenizer
from plait.tokenizers.sound import is_sound
from plait.tokenizers.sound_files import SOUND_FORMATS, SoundOptions, check_sound, decode_sound, encode_sound
from plait.tokenizers.visual_files import (
    IMAGE_FORMATS,
    VIDEO_FORMATS,
    check_fps,
    check_visual,
    decode_visual,
    encode_visual,
)
from plait.tokenizers.vocabulary import Vocabulary

SUFFIX = ".codes.safetensors"
# What each modality is written as, the default first.
FORMATS = {"image": IMAGE_FORMATS, "video": VIDEO_FORMATS, "audio": SOUND_FORMATS}
DEFAULTS = {"image": "tiny-vision", "video": "tiny-vision", "audio": "tiny-audio"}


@dataclass
class Written:
    """One file's way.

    Attributes:
        source: what was read.
        file: what was written.
        modality: "image", "video" or "audio".
        size: (H, W) or (T, H, W) in pixels, or (N,) samples.
        grid: the codes' shape.
        fps: frames per second, of a video.
        sample_rate: Hz, of sound.
        clipped: samples that were beyond ±1 when sound was written, of all channels.
        seconds: what it took.
        real_time_factor: what a second of sound took, in seconds.
    """

    source: str
    file: str
    modality: str
    size: tuple[int, ...]
    grid: tuple[int, ...]
    fps: float | None
    sample_rate: int | None
    clipped: int | None
    seconds: float
    real_time_factor: float | None


def encode_files(
    paths: Sequence[Path],
    out: Path,
    tokenizer: str | Path | None = None,
    *,
    size: int | None = None,
    fps: float | None = None,
    tile: int | None = None,
    n_codebooks: int | None = None,
    bandwidth: float | None = None,
    loudness: float | None = None,
    device: str = "cpu",
    overwrite: bool = False,
    advance: Advance = lambda done, total: None,
) -> list[Written]:
    """Encode pictures, videos and sounds, each into ``out/<stem>.codes.safetensors``.

    Args:
        paths: PNG, JPEG, WebP, GIF, MP4, WebM, WAV, FLAC, MP3, Ogg, told apart by content. Animations and videos give
            video codes; of a video a tokenizer of sound takes the sound track.
        out: folder, made if missing.
        tokenizer: its folder, a bundle's, or a shipped name; by default ``tiny-audio`` for sound files and
            ``tiny-vision`` for all others.
        size: scale pictures so that the short side is this many pixels; the file's own size by default.
        fps: bring videos to this frame rate by leaving out or repeating frames; the file's own rate by default.
        tile: larger pictures go through in overlapping squares of this side, `TILE` by default. Their codes are close
            to those of one pass, but not the same.
        n_codebooks: of sound the first so many codebooks; all by default.
        bandwidth: of sound as many codebooks as fit into this many kilobits per second.
        loudness: bring each sound to this level, in dB of full scale, root mean square over all of it, or as near to it
            as leaves its peak at 1; decoding takes it back. By default only what would be beyond ±1 is made softer.
        device: what torch calls it, such as "cuda".
        overwrite: replace files that are there.
        advance: told of the progress.

    Raises:
        PlaitError: before any work: two files of one stem, a missing file, an option out of range, a file of a modality
            that the tokenizer does not have. Then at the first file that is not readable; those before it are done.
    """
    targets = _targets(paths, out, lambda path: f"{_stem(path)}{SUFFIX}")
    _check_positive(size=size, tile=tile)
    check_fps(fps)
    options = SoundOptions(n_codebooks, bandwidth, loudness)
    models = _Models(tokenizer, device)
    modalities = [models.modality_of(path) for path in paths]
    make_folder(out)
    count = Counter(len(paths), advance)
    written = []
    for (path, target), modality in zip(targets, modalities, strict=True):
        start = time.perf_counter()
        _check_free(target, overwrite)
        with _named(path):
            if modality == "audio":
                codes = encode_sound(models[modality], path, options, count)
            else:
                codes = encode_visual(models[modality], path, size, fps, tile, count)
            codes.codes = codes.codes.cpu()
        codes.save(target)
        written.append(_written(path, target, codes, start))
    return written


def decode_files(
    paths: Sequence[Path],
    out: Path,
    tokenizer: str | Path | None = None,
    *,
    format: str | None = None,
    tile: int | None = None,
    device: str = "cpu",
    overwrite: bool = False,
    advance: Advance = lambda done, total: None,
) -> list[Written]:
    """Decode files of codes, each into a picture, video or sound ``out/<stem>.<format>``.

    Args:
        paths: what `encode_files` or `Codes.save` wrote, one item each.
        out: folder, made if missing.
        tokenizer: the one that encoded; by default as in `encode_files`.
        format: png, jpg, webp or gif of pictures, by default png; mp4, webm, gif or webp of videos, by default mp4;
            wav, flac, mp3 or ogg of sounds, by default wav.
        tile: as in `encode_files`; the tiles are blended.
        device: what torch calls it, such as "cuda".
        overwrite: replace files that are there.
        advance: told of the progress.

    Raises:
        PlaitError: before any work: two files of one stem, a missing file, an option out of range. Then at the first
            file that is damaged, of another tokenizer or of another modality; those before it are done.
    """
    targets = _targets(paths, out, _stem)
    _check_positive(tile=tile)
    known = dict.fromkeys(name for names in FORMATS.values() for name in names)
    if format not in (None, *known):
        raise PlaitError(f"format: {format!r} is none of {', '.join(known)}")
    models = _Models(tokenizer, device)
    make_folder(out)
    count = Counter(len(paths), advance)
    written = []
    for path, stem in targets:
        start = time.perf_counter()
        codes = Codes.load(path)
        with _named(path):
            model = models.that_made(codes)
            (check_sound if codes.modality == "audio" else check_visual)(codes, model)
            formats = FORMATS[codes.modality]
            if format not in (None, *formats):
                raise PlaitError(f"is {codes.modality}, which is written as {', '.join(formats)} and not {format}")
            target = stem.with_name(f"{stem.name}.{format or formats[0]}")
            _check_free(target, overwrite)
            clipped = None
            if codes.modality == "audio":
                clipped = decode_sound(model, codes, target, count)
            else:
                decode_visual(model, codes, target, tile, count)
        written.append(_written(path, target, codes, start, clipped))
    return written


class _Models:
    """The tokenizer of each modality: one for all, a bundle's, or the default ones. They are loaded when needed.

    Raises:
        PlaitError: not found, or no such device.
    """

    def __init__(self, name: str | Path | None, device: str) -> None:
        self._name, self._device = name, device
        self._loaded: dict[str, Any] = {}
        if name is None:
            self.modalities: tuple[str, ...] = tuple(DEFAULTS)
        elif (vocabulary := find_weights(name) / "vocabulary.json").is_file():
            self.modalities = tuple(Vocabulary.load(vocabulary).modalities)
        else:
            one = self._on_device(load_tokenizer(name))
            self.modalities = one.modalities
            self._loaded = dict.fromkeys(one.modalities, one)

    def __getitem__(self, modality: str) -> Any:
        """The tokenizer of a modality that there is, on its device."""
        if modality not in self._loaded:
            name = DEFAULTS[modality] if self._name is None else self._name
            self._loaded[modality] = self._on_device(load_tokenizer(name, modality))
        return self._loaded[modality]

    def modality_of(self, path: Path) -> str:
        """As what a file is encoded, "image" being a picture or a clip; its tokenizer is then loaded.

        Raises:
            PlaitError: there is no tokenizer for it.
        """
        sound, there = is_sound(path), self.modalities
        modality = "audio" if sound or ("image" not in there and "audio" in there) else "image"
        if modality not in there:
            kind = "sound" if sound else "to be seen"
            raise PlaitError(f"{path}: is {kind}, and {self._name} has no {modality}; name another with --tokenizer")
        _ = self[modality]
        return modality

    def that_made(self, codes: Codes) -> Any:
        """The tokenizer that decodes these codes.

        Raises:
            PlaitError: there is none, or another one made them.
        """
        if codes.modality not in tuple(FORMATS) or codes.modality not in self.modalities:
            there = ", ".join(modality for modality in FORMATS if modality in self.modalities)
            raise PlaitError(f"holds {codes.modality} codes; this decodes {there or 'none'}")
        model = self[codes.modality]
        if codes.fingerprint not in (None, model.fingerprint):
            raise PlaitError(
                "made by another tokenizer (fingerprints differ); name the one that encoded with --tokenizer"
            )
        return model

    def _on_device(self, model: Any) -> Any:
        if not hasattr(model, "to"):  # one of text
            return model
        try:
            return model.to(self._device)
        except (RuntimeError, AssertionError) as error:  # the second from a torch without CUDA
            raise PlaitError(
                f"device: {self._device!r} cannot be used ({str(error).splitlines()[0]}); try cpu"
            ) from None


def _written(path: Path, target: Path, codes: Codes, start: float, clipped: int | None = None) -> Written:
    assert codes.size is not None
    seconds, sound, rate = time.perf_counter() - start, codes.modality == "audio", codes.sample_rate
    return Written(
        source=str(path),
        file=str(target),
        modality=codes.modality,
        size=codes.size,
        grid=tuple(codes.codes.shape[1:]),
        fps=codes.fps,
        sample_rate=rate,
        clipped=clipped,
        seconds=round(seconds, 3),
        real_time_factor=round(seconds * rate / codes.size[0], 4) if sound and rate else None,
    )


# Checks


def _stem(path: Path) -> str:
    return path.name.removesuffix(SUFFIX) if path.name.endswith(SUFFIX) else path.stem


def _targets(paths: Sequence[Path], out: Path, name: Callable[[Path], str]) -> list[tuple[Path, Path]]:
    """What each file becomes.

    Raises:
        PlaitError: no file, a folder, or two that would be written to one place.
    """
    found: dict[str, Path] = {}
    for path in paths:
        try:
            if path.is_dir():
                raise PlaitError(f"{path}: is a folder; name its files")
            if not path.is_file():
                raise PlaitError(f"{path}: no such file")
        except OSError as error:  # a name that is too long, for instance
            raise PlaitError(f"{path}: cannot be read ({error.strerror})") from None
        key = name(path).casefold()  # some file systems take A and a for one name
        if key in found:
            raise PlaitError(f"{found[key]} and {path}: have one stem and would overwrite each other; use two folders")
        found[key] = path
    if out.is_dir() and not os.access(out, os.W_OK):
        raise PlaitError(f"{out}: may not be written to; choose another folder")
    return [(path, out / name(path)) for path in paths]


def _check_free(target: Path, overwrite: bool) -> None:
    try:
        taken = target.exists()
    except OSError as error:
        raise PlaitError(f"{target}: cannot be written ({error.strerror}); rename the original") from None
    if taken and not overwrite:
        raise PlaitError(f"{target}: is there already; choose another folder or give --overwrite")


def _check_positive(**options: int | None) -> None:
    for name, value in options.items():
        if value is not None and value < 1:
            raise PlaitError(f"{name}: is {value!r}, must be at least 1")


@contextmanager
def _named(path: Path) -> Iterator[None]:
    """Begin every error with the file's name.

    Raises:
        PlaitError: the block's own error, or memory ran out.
    """
    try:
        yield
    except PlaitError as error:
        if str(error).startswith(f"{path}: "):
            raise
        raise PlaitError(f"{path}: {error}") from None
    except torch.OutOfMemoryError:
        raise PlaitError(
            f"{path}: does not fit into the device's memory; give --tile 512 or --size, or --device cpu"
        ) from None
