"""`plait tokenizer eval` of sound: what an audio tokenizer keeps of a folder of files.

`evaluate_audio` measures; `evaluate_audio_folder` writes the report as well. The report says how its figures were taken
(see `AudioProtocol`), has them file by file, and names the versions of the packages that took them.
"""

import io
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from plait.errors import PlaitError
from plait.tokenizers.audio_metrics import MEASURES as SCORES
from plait.tokenizers.audio_metrics import PESQ_SECONDS, visqol_mapper, visqol_mode
from plait.tokenizers.base import FORMAT_VERSION, Codes, make_folder, tensors_fingerprint, write_json
from plait.tokenizers.evaluate import now, spread
from plait.tokenizers.media import Audio, write_image
from plait.tokenizers.metrics import CodebookUse
from plait.tokenizers.protocol import AudioProtocol, find_media
from plait.tokenizers.sheets import spectrogram_sheet
from plait.tokenizers.sound import read_sound, to_samples, write_sound

# How each figure is taken; part of the report.
MEASURES = {
    "means": "over the files that have a value; how many have none is under no_value",
    "si_sdr": "dB, scale-invariant signal-to-distortion ratio without the means (Le Roux et al. 2019), within ±100; no "
    "value where the original is silent",
    "mel_distance": "as DAC's evaluation: over windows of 2048 samples with 150 bands and of 512 with 80 (hop a "
    "quarter, Hann, Slaney's scale) the sum of the mean absolute differences of log10 of squared magnitudes, each at "
    "least 1e-5, and of magnitudes; it compares only at one sample rate",
    "stft_distance": "as mel_distance, of all frequencies",
    "stoi": "short-time objective intelligibility by pystoi, of speech; no value below about 0.4 s of sound",
    "estoi": "extended STOI by pystoi",
    "pesq_wb": f"ITU-T P.862.2 by the package pesq, at 16 kHz, the first {PESQ_SECONDS} s; no value without speech",
    "pesq_nb": "ITU-T P.862.1 by the package pesq, at 16 kHz (8 kHz for sound below that), otherwise as pesq_wb",
    "bits": "log2 of the codebook's size per code; the steps that fill up the end count",
    "speed": "seconds of sound per second of computing, one file at a time, without reading it",
}

# Pairs on the sheet, evenly spread over the data.
SHOWN = 8


def evaluate_audio(
    tokenizer: Any,
    folder: Path,
    protocol: AudioProtocol | None = None,
    *,
    codebooks: int | None = None,
    visqol: int = SHOWN,
    opus: float | None = None,
    limit: int | None = None,
    keep: Path | None = None,
    advance: Callable[[int, int], None] = lambda done, total: None,
) -> tuple[dict[str, Any], Image.Image]:
    """Reconstruct the sounds of a folder, and measure.

    Args:
        tokenizer: a `WaveTokenizer`.
        folder: sounds, searched recursively, or with a ``manifest.jsonl`` whose rows name them (``path``).
        protocol: how files become samples.
        codebooks: the first so many codebooks only.
        visqol: on so many files, evenly spread, ViSQOL is taken, which is slow; 0 leaves it out.
        opus: measure Opus at so many kilobits per second, too, as a yardstick.
        limit: the first so many files only.
        keep: folder for the reconstructions as WAV.
        advance: called with (files done, files in all).

    Returns:
        the report's ``data``, ``protocol``, ``audio``, ``opus`` (None unless asked for) and ``files``, and a sheet of
        spectrograms of originals and reconstructions.

    Raises:
        PlaitError: an option out of range, the folder is missing or holds nothing that can be read, or the manifest is
            broken.
    """
    protocol = protocol or AudioProtocol()
    if limit is not None and limit < 1:
        raise PlaitError(f"limit: is {limit}, must be at least 1")
    if visqol < 0:
        raise PlaitError(f"visqol: is {visqol}, must be a number of files")
    if codebooks is not None and hasattr(tokenizer, "levels"):
        raise PlaitError("codebooks: this tokenizer always has all its levels; leave the option out")
    if opus is not None and not 2 <= opus <= 256:
        raise PlaitError(f"opus: is {opus!r}, must be 2 to 256 kilobits per second")
    paths, skipped = find_media(folder, ("audio",))
    paths = paths[:limit]
    listened, shown = spread(len(paths), visqol), spread(len(paths), SHOWN)
    rate, channels = tokenizer.sample_rate, tokenizer.channels
    measurement, yardstick = _Coding(tokenizer, codebooks), _Scores()
    files: list[dict[str, Any]] = []
    examples: list[tuple[Tensor, Tensor, str, str]] = []
    for index, path in enumerate(paths):
        name = str(path.relative_to(folder))
        try:
            original = protocol.read(path, rate, channels)
        except PlaitError as error:
            skipped.append(str(error))
            continue
        reconstruction = measurement.reconstruct(original)
        slow = index in listened
        scores = measurement.scores.add(original, reconstruction, rate, slow)
        files.append({"path": name, "seconds": original.shape[1] / rate} | scores)
        if opus is not None:
            decoded, bits = through_opus(original, rate, opus)
            files[-1]["opus"] = yardstick.add(original, decoded, rate, slow) | {"bits": bits}
        if keep is not None:
            _keep(reconstruction, rate, keep / name)
        if index in shown or not examples:  # the first one, should all others be broken
            examples.append((original, reconstruction, name, _note(scores)))
        advance(index + 1, len(paths))
    advance(len(paths), len(paths))  # broken files are done with, too
    if not files:
        raise PlaitError(
            f"{folder}: holds no sound that can be read" + (f"; the first: {skipped[0]}" if skipped else "")
        )
    report: dict[str, Any] = {
        "data": {"folder": str(folder), "limit": limit, "skipped": skipped},
        "protocol": protocol.in_words(rate, channels) | MEASURES | _listeners(rate),
        "audio": measurement.figures(files),
        "opus": None,
        "files": files,
    }
    if opus is not None:
        bits = sum(file["opus"]["bits"] for file in files) / report["audio"]["seconds"]
        report["opus"] = {"asked": opus * 1000, "bits_per_second": bits} | yardstick.figures()
    originals, reconstructions, names, notes = zip(*examples, strict=True)
    return report, spectrogram_sheet(originals, reconstructions, rate, names=names, notes=notes)


def through_opus(samples: Tensor, sample_rate: int, kilobits: float) -> tuple[Tensor, int]:
    """Sound as the Opus codec (RFC 6716) gives it back, by libopus with its own defaults: a yardstick.

    Args:
        samples: ``[C, N]`` in ``[-1, 1]``.
        sample_rate: Hz.
        kilobits: per second.

    Returns:
        ``[C, N]``, aligned with what went in, and the bits of all packets.
    """
    import av

    wide = to_samples(Audio(samples, sample_rate), 48000, len(samples))[0]
    file, bits = io.BytesIO(), 0
    with av.open(file, "w", format="ogg") as container:
        layout = "mono" if len(samples) == 1 else "stereo"
        stream = container.add_stream("libopus", 48000, layout=layout, options={"b": str(round(kilobits * 1000))})
        interleaved = wide.T.reshape(1, -1).contiguous().numpy()
        frame = av.AudioFrame.from_ndarray(interleaved, "flt", layout)
        frame.sample_rate, frame.pts = 48000, 0
        for packet in [*stream.encode(frame), *stream.encode(None)]:
            bits += 8 * packet.size
            container.mux(packet)
    decoded = read_sound(file.getvalue(), "Opus", sample_rate, len(samples)).samples[:, : samples.shape[1]]
    return F.pad(decoded, (0, samples.shape[1] - decoded.shape[1])).clamp(-1, 1), bits


@dataclass
class _Scores:
    """Figures of pairs of sounds, file by file."""

    values: dict[str, list[float | None]] = field(default_factory=lambda: {name: [] for name in SCORES})
    left_out: dict[str, str] = field(default_factory=dict)

    def add(self, original: Tensor, reconstruction: Tensor, rate: int, slow: bool) -> dict[str, float | None]:
        """Measure one pair ``[C, N]``; ``slow`` asks for ViSQOL, too."""
        found: dict[str, float | None] = {}
        for name, measure in SCORES.items():
            if name in self.left_out or (name == "visqol" and not slow):
                continue
            try:
                found[name] = measure(original, reconstruction, rate)
            except PlaitError as error:
                self.left_out[name] = str(error)
            else:
                self.values[name].append(found[name])
        return found

    def figures(self) -> dict[str, Any]:
        """Means over the files that have a value, and of how many there is none."""
        means: dict[str, Any] = {}
        for name, values in self.values.items():
            there = [value for value in values if value is not None]
            means[name] = sum(there) / len(there) if there else None
        without = {name: values.count(None) for name, values in self.values.items() if None in values}
        listened = {"visqol_items": len(self.values["visqol"])}
        return means | listened | {"no_value": without, "left_out": self.left_out}


class _Coding:
    """A tokenizer's codes and speed over all files, with the figures of what it gives back."""

    def __init__(self, tokenizer: Any, codebooks: int | None) -> None:
        self.tokenizer, self.codebooks = tokenizer, codebooks
        self.scores = _Scores()
        self.use = [CodebookUse(size) for size in tokenizer.codebook_sizes[:codebooks]]
        self.codes, self.bits, self.encoding, self.decoding, self.warm = 0, 0.0, 0.0, 0.0, False

    def reconstruct(self, original: Tensor) -> Tensor:
        """``[C, N]`` → the same shape, in ``[-1, 1]``."""
        samples = original[None].to(self.tokenizer.device)
        if not self.warm:  # what is set up on first use is no speed of the tokenizer
            self.tokenizer.decode(self.tokenizer.encode(samples, n_codebooks=self.codebooks))
            self.warm = True
        start = now(samples)
        encoded = self.tokenizer.encode(samples, n_codebooks=self.codebooks)
        middle = now(samples)
        decoded = self.tokenizer.decode(encoded)
        self.decoding += now(samples) - middle
        self.encoding += middle - start
        for use, of_book in zip(self.use, self._books(encoded), strict=True):
            use.update(of_book)
            self.bits += of_book.numel() * math.log2(len(use.counts))
            self.codes += of_book.numel()
        return decoded[0].float().cpu().clamp(-1, 1)

    def _books(self, encoded: Codes) -> Sequence[Tensor]:
        """The codes of each codebook."""
        if hasattr(self.tokenizer, "levels"):  # of different rates
            levels: list[Tensor] = self.tokenizer.levels(encoded)
            return levels
        return encoded.codes.unbind(1) if encoded.codes.ndim == 3 else [encoded.codes]

    def figures(self, files: list[dict[str, Any]]) -> dict[str, Any]:
        """The report's part on the tokenizer."""
        lengths = [file["seconds"] for file in files]
        seconds = sum(lengths)
        sizes = [len(use.counts) for use in self.use]
        nominal = self.tokenizer.frame_rate * sum(map(math.log2, sizes))
        return {
            "items": len(files),
            "seconds": seconds,
            "shortest": min(lengths),
            "longest": max(lengths),
            **self.scores.figures(),
            "bits_per_second": self.bits / seconds,
            "nominal_bits_per_second": self.tokenizer.bitrate if self.codebooks is None else nominal,
            "codes_per_second": self.codes / seconds,
            "codebooks": [
                {"codes": len(use.counts), "used": use.used, "perplexity": use.perplexity, "dead": len(use.dead)}
                for use in self.use
            ],
            "encode_seconds": self.encoding,
            "decode_seconds": self.decoding,
            "encode_speed": seconds / self.encoding,
            "decode_speed": seconds / self.decoding,
        }


def _note(scores: dict[str, float | None]) -> str:
    """What the sheet says of a pair."""
    named = (
        ("si_sdr", "SI-SDR", ".1f"), ("mel_distance", "mel", ".2f"), ("stoi", "STOI", ".2f"), ("pesq_wb", "PESQ", ".2f")
    )  # fmt: skip
    parts = [f"{label} {scores[key]:{form}}" for key, label, form in named if scores.get(key) is not None]
    return " · ".join(["below: reconstruction", *parts])


def _keep(samples: Tensor, rate: int, path: Path) -> None:
    """Write a reconstruction as WAV under the original's name; of another format, ``a.mp3`` becomes ``a.mp3.wav``."""
    make_folder(path.parent)
    write_sound(Audio(samples, rate), path if path.suffix.lower() == ".wav" else path.with_name(f"{path.name}.wav"))


def _listeners(rate: int) -> dict[str, str]:
    """What ViSQOL ran as, and the versions of the packages that are there."""
    mode = visqol_mode(rate)
    words = {
        "visqol": f"by visqol-python in {mode} mode at {48 if mode == 'audio' else 16} kHz, mapper: "
        f"{visqol_mapper(rate)}; on visqol_items files, evenly spread"
    }
    found = []
    for package in ("pystoi", "pesq", "visqol-python"):
        try:
            found.append(f"{package} {version(package)}")
        except PackageNotFoundError:
            continue
    return words | {"packages": ", ".join(found) or "none"}


# The command


def evaluate_audio_folder(
    tokenizer: Any,
    name: str,
    folder: Path,
    out: Path,
    protocol: AudioProtocol,
    *,
    codebooks: int | None = None,
    visqol: int = SHOWN,
    opus: float | None = None,
    limit: int | None = None,
    keep: bool = False,
    device: str = "cpu",
    advance: Callable[[int, int], None] = lambda done, total: None,
) -> tuple[dict[str, Any], str]:
    """Evaluate a tokenizer and write ``report.json``, ``sounds.png`` and, if asked, the reconstructions.

    Args:
        tokenizer: as in `evaluate_audio`.
        name: what the report calls it.
        folder: as in `evaluate_audio`.
        out: folder for the report.
        protocol: as in `evaluate_audio`.
        codebooks: as in `evaluate_audio`.
        visqol: as in `evaluate_audio`.
        opus: as in `evaluate_audio`.
        limit: as in `evaluate_audio`.
        keep: write the reconstructions into ``out/reconstructions``, under their originals' names.
        device: to compute on, "cuda" for instance.
        advance: as in `evaluate_audio`.

    Returns:
        the report, and a table of it.

    Raises:
        PlaitError: as `evaluate_audio`, the device cannot be used, or ``out`` cannot be written to.
    """
    try:
        tokenizer.to(device)
    except (RuntimeError, AssertionError) as error:  # PyTorch's ways to say that there is none
        raise PlaitError(f"device: {device} cannot be used ({str(error).splitlines()[0]}); use cpu") from None
    make_folder(out)
    measured, sheet = evaluate_audio(
        tokenizer, folder, protocol, codebooks=codebooks, visqol=visqol, opus=opus, limit=limit,
        keep=out / "reconstructions" if keep else None, advance=advance,
    )  # fmt: skip
    report = {
        "format_version": FORMAT_VERSION,
        "tokenizer": {
            "name": name,
            "fingerprint": tokenizer.fingerprint,
            # The fingerprint is of what makes the codes; the decoder moves the figures too.
            "weights": tensors_fingerprint({}, tokenizer.state_dict()),
            "codebook_sizes": tokenizer.codebook_sizes[:codebooks],
            "sample_rate": tokenizer.sample_rate,
            "channels": tokenizer.channels,
            "samples_per_code": tokenizer.factor,
        },
        "computed_on": f"{device} with PyTorch {torch.__version__}, threads: {torch.get_num_threads()}",
        **measured,
    }
    write_json(out / "report.json", report)
    write_image(sheet, out / "sounds.png")
    written = [str(out / file) for file in ("report.json", "sounds.png", *(["reconstructions/"] if keep else []))]
    return report, f"{audio_table(report)}\n\nwrote {', '.join(written)}"


# What the table calls a figure, and what to make of it.
_ROWS = {
    "si_sdr": ("SI-SDR, dB", "higher is better; of waveforms, which a decoder need not keep"),
    "mel_distance": ("mel distance", "lower is better"),
    "stft_distance": ("STFT distance", "lower is better"),
    "stoi": ("STOI", "higher is better, at most 1; intelligibility of speech"),
    "estoi": ("ESTOI", "the same, stricter"),
    "pesq_wb": ("PESQ, wide band", "1 to 4.64, of speech"),
    "pesq_nb": ("PESQ, narrow band", "1 to 4.55, of speech"),
    "visqol": ("ViSQOL", "1 to 5"),
    "bits_per_second": ("bits per second", "what the codes cost"),
    "codes_per_second": ("codes per second", ""),
    "codebook_use": ("codebook use", "share of the codes that occur"),
    "perplexity": ("perplexity", "as many codes, were they used equally"),
    "dead": ("dead codes", "that never occur"),
    "encode_speed": ("encoding speed", "seconds of sound per second"),
    "decode_speed": ("decoding speed", "seconds of sound per second"),
}


def audio_table(report: dict[str, Any]) -> str:
    """A report as text, a figure per line, then what was left out and why."""
    tokenizer, figures, opus = report["tokenizer"], report["audio"], report["opus"]
    sizes = tokenizer["codebook_sizes"]
    books = {
        label: _extent([book[key] for book in figures["codebooks"]])
        for label, key in (("codebook_use", "used"), ("perplexity", "perplexity"), ("dead", "dead"))
    }
    columns = {"codes": figures | books} | ({f"Opus at {opus['asked'] / 1000:g}k": opus} if opus else {})
    width = max(len(label) for label, _ in _ROWS.values())
    lines = [
        f"{tokenizer['name']}: {len(sizes)} codebook{'s' * (len(sizes) > 1)} of {_extent(sizes)} codes, "
        f"{tokenizer['sample_rate']} Hz, {tokenizer['samples_per_code']} samples per step, "
        f"fingerprint {tokenizer['fingerprint'][:16]}",
        f"{figures['items']} sounds of {_extent([figures['shortest'], figures['longest']])} seconds",
        "",
        " " * width + "".join(f"{name:>16}" for name in columns),
    ]
    for key, (label, note) in _ROWS.items():
        cells = "".join(f"{_cell(column[key]) if key in column else '':>16}" for column in columns.values())
        lines.append(f"{label:{width}}{cells}   {note}".rstrip())
    lines += ["", f"sound: {report['protocol']['length']}; {report['protocol']['rate']}"]
    if figures["visqol"] is not None:
        lines.append(f"ViSQOL: {figures['visqol_items']} of the sounds, {report['protocol']['visqol'].split('; ')[0]}")
    for name, count in figures["no_value"].items():
        lines.append(f"no value: {_ROWS[name][0]} of {count} sound{'s' * (count > 1)}")
    lines.append(f"computed on {report['computed_on']}; how each figure is taken: see report.json")
    lines += [f"left out: {reason}" for reason in dict.fromkeys(figures["left_out"].values())]
    skipped = report["data"]["skipped"]
    return "\n".join([*lines, *([f"skipped: {len(skipped)} files"] if skipped else [])])


def _extent(values: list[float]) -> str:
    """One value, or the smallest and the largest."""
    least, most = _cell(min(values)), _cell(max(values))
    return least if least == most else f"{least} to {most}"


def _cell(value: Any) -> str:
    if isinstance(value, str):
        return value
    return "–" if value is None else f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"
