"""Write a tokenizer as two ONNX models, which any ONNX runtime runs without Python or torch.

Each model is the whole way, quantizer included: pixels or samples → codes, and back. A clip or sound goes through in
one pass, so that a model needs no memory of what came before. Padding and cropping to whole codes are left to the
caller.

The exporter is torch's newer one (``torch.export``): the older tracing one writes down the sizes of its example
wherever the network reads a shape, and gives wrong models for other sizes without a word.
"""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.export import Dim

from plait.errors import PlaitError
from plait.tokenizers.base import FORMAT_VERSION, make_folder, write_file, write_json
from plait.tokenizers.network import NetworkTokenizer
from plait.tokenizers.pixels import PixelTokenizer
from plait.tokenizers.streaming import whole
from plait.tokenizers.waves import WaveTokenizer

# Codes per side of the example that the networks are traced with where sizes stay open. They differ from each other
# and from 1 and the batch, or the tracer takes them for one number.
_EXAMPLE = (5, 3)
_BATCH = 2


class PixelsToCodes(nn.Module):
    """Pixels ``[B, 3, H, W]`` or ``[B, 3, T, H, W]``, float32 → codes int64, without checks and padding."""

    def __init__(self, tokenizer: PixelTokenizer) -> None:
        super().__init__()
        self.tokenizer = tokenizer

    def forward(self, pixels: Tensor) -> Tensor:
        """Images ``[B, h, w]``, clips ``[B, t, h, w]``, with the codebook axis at dim 1 if there are several."""
        still = pixels.ndim == 4
        # A still is a group of equal frames where the first frame is not coded by itself.
        video = pixels.unsqueeze(2).expand(-1, -1, self.tokenizer.frames_of(1), -1, -1) if still else pixels
        codes = self.tokenizer.quantizer.codes(rearrange(self.tokenizer.to_latents(video), "b d t h w -> b t h w d"))
        codes = codes.movedim(-1, 1) if len(self.tokenizer.codebook_sizes) > 1 else codes
        return codes.select(-3, 0) if still else codes


class CodesToPixels(nn.Module):
    """Codes → pixels in ``[-1, 1]``: the other way, likewise without checks."""

    def __init__(self, tokenizer: PixelTokenizer) -> None:
        super().__init__()
        self.tokenizer = tokenizer

    def forward(self, codes: Tensor) -> Tensor:
        """``[B, h, w]`` → ``[B, 3, H, W]``, ``[B, t, h, w]`` → ``[B, 3, T, H, W]``."""
        several = len(self.tokenizer.codebook_sizes) > 1
        still = codes.ndim == 3 + several
        video = codes.unsqueeze(-3) if still else codes
        z = self.tokenizer.quantizer.latents(video.movedim(1, -1) if several else video)
        pixels = self.tokenizer.from_latents(rearrange(z, "b t h w d -> b d t h w")).clamp(-1, 1)
        return pixels.select(2, 0) if still else pixels


class SamplesToCodes(nn.Module):
    """Samples ``[B, C, N]``, float32, N whole codes → codes int64, without checks and padding."""

    def __init__(self, tokenizer: WaveTokenizer) -> None:
        super().__init__()
        self.tokenizer = tokenizer

    def forward(self, samples: Tensor) -> Tensor:
        """``[B, t]``, with the codebook axis at dim 1 if there are several."""
        codes: Tensor = self.tokenizer.quantizer.codes(self.tokenizer.to_latents(samples, whole()).mT)
        return codes.mT if codes.ndim == 3 else codes


class CodesToSamples(nn.Module):
    """Codes → samples ``[B, C, N]``: the other way, likewise without checks."""

    def __init__(self, tokenizer: WaveTokenizer) -> None:
        super().__init__()
        self.tokenizer = tokenizer

    def forward(self, codes: Tensor) -> Tensor:
        """Codes ``[B, t]`` or ``[B, q, t]`` → samples, not clamped."""
        z = self.tokenizer.quantizer.latents(codes.mT if codes.ndim == 3 else codes)
        return self.tokenizer.from_latents(z.mT, whole())


def export_sound(tokenizer: WaveTokenizer, folder: str | Path) -> dict[str, Any]:
    """Write ``encoder.onnx``, ``decoder.onnx`` and, last, ``export.json``, for sound of any length and batch.

    Args:
        tokenizer: it is left as it is.
        folder: where to; made if missing.

    Returns:
        what ``export.json`` holds; an axis is a number, or a name if it is open.

    Raises:
        PlaitError: a network that cannot be exported, or a folder that cannot be written to.
        ModuleNotFoundError: onnx or onnxscript is not installed.
    """
    import onnxscript  # noqa: F401 (torch's exporter would fail late without it)

    factor, steps = tokenizer.factor, 5
    grid = [len(tokenizer.codebook_sizes)] * (len(tokenizer.codebook_sizes) > 1)
    samples = torch.zeros(_BATCH, tokenizer.channels, steps * factor, device=tokenizer.device)
    codes = torch.zeros(_BATCH, *grid, steps, dtype=torch.int64, device=tokenizer.device)
    batch, t = Dim("batch"), Dim("t")
    facts = {
        "sample_rate": tokenizer.sample_rate,
        "samples": {"dtype": "float32", "shape": ["batch", tokenizer.channels, "samples"], "range": [-1, 1]},
        "codes": {"dtype": "int64", "shape": ["batch", *grid, f"samples / {factor}"]},
        "factor": factor,
    }
    with _evaluating(tokenizer):
        encoder = _onnx(SamplesToCodes(tokenizer), samples, {0: batch, 2: factor * t}, "samples", "codes")
        decoder = _onnx(CodesToSamples(tokenizer), codes, {0: batch, codes.ndim - 1: t}, "codes", "samples")
    return _write(Path(folder), tokenizer, encoder, decoder, facts)


def export_onnx(
    tokenizer: PixelTokenizer, folder: str | Path, size: tuple[int, int] | None = None, frames: int | None = None
) -> dict[str, Any]:
    """Write ``encoder.onnx``, ``decoder.onnx`` and, last, ``export.json``, which says what they take and give.

    Args:
        tokenizer: it is left as it is.
        folder: where to; made if missing.
        size: (H, W) that the models shall be fixed to; by default any multiples of the factor go in.
        frames: frames of a clip; None for models of images. The batch is open in any case.

    Returns:
        what ``export.json`` holds; an axis is a number, or a name if it is open.

    Raises:
        PlaitError: a size or number of frames that is not whole codes, a network that cannot be exported, or a folder
            that cannot be written to.
        ModuleNotFoundError: onnx or onnxscript is not installed.
    """
    import onnxscript  # noqa: F401 (torch's exporter would fail late without it)

    factor, several = tokenizer.factor, len(tokenizer.codebook_sizes) > 1
    if size is not None and (len(size) != 2 or any(type(n) is not int or n < 1 or n % factor for n in size)):
        raise PlaitError(f"size: is {'×'.join(map(str, size))}, must be height and width in multiples of {factor}")
    if frames is not None and (
        type(frames) is not int or frames < 1 or tokenizer.frames_of(tokenizer.grid_frames_of(frames)) != frames
    ):
        fit = ", ".join(str(tokenizer.frames_of(t)) for t in (1, 2, 3))
        raise PlaitError(f"frames: is {frames!r}, this tokenizer takes whole groups: {fit}, …")
    h, w = (n // factor for n in size) if size else _EXAMPLE
    clip = [] if frames is None else [frames]
    grid = [len(tokenizer.codebook_sizes)] * several + [tokenizer.grid_frames_of(n) for n in clip]
    pixels = torch.zeros(_BATCH, 3, *clip, h * factor, w * factor, device=tokenizer.device)
    codes = torch.zeros(_BATCH, *grid, h, w, dtype=torch.int64, device=tokenizer.device)
    batch, rows, columns = Dim("batch"), Dim("h"), Dim("w")
    open_pixels: dict[int, Any] = {0: batch}
    open_codes: dict[int, Any] = {0: batch}
    if size is None:
        open_pixels |= {pixels.ndim - 2: factor * rows, pixels.ndim - 1: factor * columns}
        open_codes |= {codes.ndim - 2: rows, codes.ndim - 1: columns}

    with _evaluating(tokenizer):
        encoder = _onnx(PixelsToCodes(tokenizer), pixels, open_pixels, "pixels", "codes")
        decoder = _onnx(CodesToPixels(tokenizer), codes, open_codes, "codes", "pixels")
    sides = [*size] if size else ["height", "width"]
    facts = {
        "pixels": {"dtype": "float32", "shape": ["batch", 3, *clip, *sides], "range": [-1, 1], "colours": "RGB"},
        "codes": {
            "dtype": "int64",
            "shape": ["batch", *grid, *([h, w] if size else [f"height / {factor}", f"width / {factor}"])],
        },
        "factor": factor,
        "temporal_factor": tokenizer.temporal_factor,
    }
    return _write(Path(folder), tokenizer, encoder, decoder, facts)


def _write(
    folder: Path, tokenizer: NetworkTokenizer, encoder: bytes, decoder: bytes, facts: dict[str, Any]
) -> dict[str, Any]:
    """Write the three files, export.json last: whoever finds it finds the models it speaks of."""
    header = {
        "format_version": FORMAT_VERSION,
        "architecture": tokenizer.architecture,
        "fingerprint": tokenizer.fingerprint,
        "codebook_sizes": tokenizer.codebook_sizes,
    }
    make_folder(folder)
    with suppress(OSError):  # writing will say it
        (folder / "export.json").unlink()
    write_file(folder / "encoder.onnx", encoder)
    write_file(folder / "decoder.onnx", decoder)
    write_json(folder / "export.json", header | facts)
    return header | facts


@contextmanager
def _evaluating(tokenizer: NetworkTokenizer) -> Iterator[None]:
    was_training = tokenizer.training
    tokenizer.eval()
    try:
        yield
    finally:
        tokenizer.train(was_training)


def parse_size(text: str) -> tuple[int, int]:
    """Read a height and width, ``480x640``, or the side of a square, ``256``.

    Raises:
        PlaitError: neither a number nor two.
    """
    sides = text.lower().replace("×", "x").split("x")
    if len(sides) > 2 or not all(side.isdecimal() for side in sides):
        raise PlaitError(f"size: is {text!r}, must be like 480x640 (height x width) or 256 (a square)")
    return int(sides[0]), int(sides[-1])


def _onnx(network: nn.Module, example: Tensor, dynamic: dict[int, Any], takes: str, gives: str) -> bytes:
    """One network as an ONNX model.

    Raises:
        PlaitError: torch cannot follow the network, or the network ties an open axis to the example's size.
    """
    from onnx_ir.passes.common import ClearMetadataAndDocStringPass

    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")  # the exporter's notes to its own developers
        try:
            program = torch.export.export(
                network,
                (example,),
                dynamic_shapes=(dynamic,),
                strict=False,
                # Else it refuses what it cannot prove, such as that 8.0 · h is a whole number.
                prefer_deferred_runtime_asserts_over_guards=True,
            )
        except (RuntimeError, TypeError) as error:  # all that torch's exporter raises
            reason = str(error).strip().splitlines()[0]
            hint = "name one size with --size HxW" if len(dynamic) > 1 else "report it"
            if "samples" in (takes, gives):
                hint = "of sound, plait's own networks and DAC can be exported"
            raise PlaitError(
                f"export: torch cannot export this network from {takes} to {gives} ({reason}); {hint}"
            ) from None
        exported = torch.onnx.export(program, dynamo=True, verbose=False, input_names=[takes], output_names=[gives])
    assert exported is not None
    # The exporter notes for every operation where in which file it was called.
    ClearMetadataAndDocStringPass()(exported.model)
    return bytes(exported.model_proto.SerializeToString())
