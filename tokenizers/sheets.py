"""Contact sheets of originals and their reconstructions: what figures cannot say."""

import math
from collections.abc import Sequence

import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from plait.tokenizers.media import contact_sheet, to_image
from plait.tokenizers.mel import FLOOR, log_mel, mel_filters
from plait.tokenizers.metrics import psnr

# Spectrograms: their size in pixels, mel bands, seconds at most, and how far below the loudest they go.
_WIDE, _HIGH, _BANDS, _SECONDS, _RANGE = 560, 128, 64, 6.0, 80.0
# From silence to the loudest: black, violet, red, orange, pale yellow.
_HEAT = ((0, 0, 4), (66, 10, 104), (147, 38, 103), (221, 81, 58), (252, 165, 10), (252, 255, 200))


def reconstruction_sheet(
    originals: Sequence[Tensor] | Tensor,
    reconstructions: Sequence[Tensor] | Tensor,
    columns: int = 4,
    names: Sequence[str] | None = None,
) -> Image.Image:
    """Each original with its reconstruction to the right of it, and the PSNR below.

    Args:
        originals: pictures ``[3, H, W]`` in ``[-1, 1]``, of any sizes, or a batch of them.
        reconstructions: as many, of the same sizes.
        columns: pairs per row.
        names: captions of the originals.
    """
    images, captions = [], []
    for i, (original, reconstruction) in enumerate(zip(originals, reconstructions, strict=True)):
        images += [to_image(original), to_image(reconstruction)]
        captions += [names[i] if names else "original", _decibels(original, reconstruction)]
    return contact_sheet(images, 2 * columns, captions, _cell(originals))


def clip_sheet(
    originals: Sequence[Tensor] | Tensor,
    reconstructions: Sequence[Tensor] | Tensor,
    columns: int = 9,
    names: Sequence[str] | None = None,
) -> Image.Image:
    """For each clip a row of its frames over time and below it a row of the same frames reconstructed, with their PSNR.

    Args:
        originals: clips ``[3, T, H, W]`` in ``[-1, 1]``, of any sizes, or a batch of them.
        reconstructions: as many, of the same sizes.
        columns: frames per row, evenly spread from the first to the last; a shorter clip leaves the rest white.
        names: captions of the clips.
    """
    images, captions = [], []
    for i, (original, reconstruction) in enumerate(zip(originals, reconstructions, strict=True)):
        length = original.shape[1]
        shown = torch.linspace(0, length - 1, min(columns, length)).round().long().tolist()
        blank = columns - len(shown)
        images += [to_image(original[:, t]) for t in shown] + [Image.new("RGB", (1, 1), "white")] * blank
        images += [to_image(reconstruction[:, t]) for t in shown] + [Image.new("RGB", (1, 1), "white")] * blank
        captions += [f"frame {t + 1}" if k else names[i] if names else "original" for k, t in enumerate(shown)]
        captions += [""] * blank
        captions += [_decibels(original[:, t], reconstruction[:, t]) for t in shown] + [""] * blank
    return contact_sheet(images, columns, captions, _cell(originals))


def spectrogram_sheet(
    originals: Sequence[Tensor],
    reconstructions: Sequence[Tensor],
    sample_rate: int,
    columns: int = 2,
    names: Sequence[str] | None = None,
    notes: Sequence[str] | None = None,
) -> Image.Image:
    """For each sound its mel spectrogram and below it that of its reconstruction, with axes in seconds and hertz.

    Both of a pair have one scale of colours: 80 dB down from the loudest point of the original.

    Args:
        originals: sounds ``[C, N]`` of any lengths, of which the first 6 seconds are shown.
        reconstructions: as many, of the same lengths.
        sample_rate: Hz.
        columns: pairs beside each other.
        names: captions of the originals.
        notes: captions of the reconstructions.
    """
    font, title = ImageFont.load_default(11), ImageFont.load_default(13)
    left, top, below, gap = 40, 22, 24, 18
    width, height = left + _WIDE + gap, top + 2 * _HIGH + 4 + below + gap
    rows = math.ceil(len(originals) / columns)
    sheet = Image.new("RGB", (gap + columns * width, gap + rows * height), "white")
    draw = ImageDraw.Draw(sheet)
    for i, pair in enumerate(zip(originals, reconstructions, strict=True)):
        x, y = gap + left + i % columns * width, gap + top + i // columns * height
        shown = [sound[:, : round(_SECONDS * sample_rate)] for sound in pair]
        for k, picture in enumerate(_spectrograms(shown, sample_rate)):
            sheet.paste(picture, (x, y + k * (_HIGH + 4)))
            for hertz, share in _hertz_ticks(sample_rate):
                at = y + k * (_HIGH + 4) + (1 - share) * _HIGH
                draw.line((x - 4, at, x - 1, at), fill="black")
                draw.text((x - 6, at), _short(hertz), fill="black", font=font, anchor="rm")
        draw.text((x, y - 4), names[i] if names else "original", fill="black", font=title, anchor="ls")
        draw.text(
            (x + _WIDE, y - 4), notes[i] if notes else "below: reconstruction", fill="black", font=font, anchor="rs"
        )
        seconds, bottom = shown[0].shape[-1] / sample_rate, y + 2 * _HIGH + 4
        for tick in _second_ticks(seconds):
            at = x + tick / seconds * (_WIDE - 1)
            draw.line((at, bottom, at, bottom + 3), fill="black")
            draw.text((at, bottom + 5), f"{tick:g}", fill="black", font=font, anchor="mt")
        draw.text((x + _WIDE, bottom + 5), "s", fill="black", font=font, anchor="lt")
    return sheet


def _spectrograms(sounds: Sequence[Tensor], sample_rate: int) -> list[Image.Image]:
    """Sounds ``[C, N]`` of one length as pictures of their mel spectra on one scale, low frequencies at the bottom."""
    n_fft = 2 ** round(math.log2(sample_rate * 0.04))
    hop = max(1, math.ceil(sounds[0].shape[-1] / _WIDE))
    levels = [20 * log_mel(sound.float().mean(0), sample_rate, n_fft, hop, _BANDS) for sound in sounds]
    loudest = max(float(levels[0].max()), 20 * math.log10(FLOOR) + _RANGE)  # or silence would shine
    heat = torch.tensor(_HEAT, dtype=torch.float32)
    pictures = []
    for level in levels:
        place = (1 + (level.flip(0) - loudest) / _RANGE).clamp(0, 1) * (len(heat) - 1)
        step = place.long().clamp_max(len(heat) - 2)
        colours = heat[step].lerp(heat[step + 1], (place - step).unsqueeze(-1))
        pixels = Image.fromarray(colours.round().to(torch.uint8).numpy())
        pictures.append(pixels.resize((_WIDE, _HIGH), Image.Resampling.BILINEAR))
    return pictures


def _hertz_ticks(sample_rate: int) -> list[tuple[int, float]]:
    """Frequencies to name, and the share of the height at which each lies: where its mel band is."""
    bins = 4096
    bands = mel_filters(sample_rate, 2 * bins, _BANDS)
    ticks = []
    for hertz in (250, 500, 1000, 2000, 4000, 8000, 16000):
        at = round(hertz / (sample_rate / 2) * bins)
        if at < bins and bands[at].sum() > 0:
            weights = bands[at] / bands[at].sum()
            ticks.append((hertz, float((weights * (torch.arange(_BANDS) + 0.5)).sum()) / _BANDS))
    return ticks


def _second_ticks(seconds: float) -> list[float]:
    """Four to ten round numbers from 0."""
    step = next(step for step in (0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, math.inf) if seconds / step < 8)
    return [round(i * step, 2) for i in range(int(seconds / step) + 1)] if step < math.inf else [0.0]


def _short(hertz: int) -> str:
    return f"{hertz // 1000}k" if hertz >= 1000 else str(hertz)


def _decibels(original: Tensor, reconstruction: Tensor) -> str:
    return f"{float(psnr(original[None], reconstruction[None])):.1f} dB"


def _cell(pictures: Sequence[Tensor] | Tensor) -> int:
    """A cell as large as the largest picture, within reason."""
    return min(256, max([128, *(max(picture.shape[-2:]) for picture in pictures)]))
