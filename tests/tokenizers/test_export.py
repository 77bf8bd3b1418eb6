import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from typer.testing import CliRunner

from plait.__main__ import app
from plait.errors import PlaitError
from plait.tokenizers.emu3 import Emu3Config, Emu3Tokenizer
from plait.tokenizers.export import export_onnx, parse_size
from plait.tokenizers.pixels import PixelTokenizer
from plait.tokenizers.quantizer import QuantizerConfig
from plait.tokenizers.vidtok import VidTokConfig, VidTokTokenizer
from plait.tokenizers.visual import VisualConfig, VisualTokenizer
from plait.tokenizers.vqgan import VQGANConfig, VQGANTokenizer

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxscript")
runtime = pytest.importorskip("onnxruntime")

VQ = QuantizerConfig(kind="vq_ema", codebook_size=4096, dim=4)
RVQ = QuantizerConfig(kind="rvq", codebook_size=16, dim=4, codebooks=3)


def network(**config: Any) -> VisualTokenizer:
    """Untrained, but with no weight at its quiet start; spread codebooks."""
    torch.manual_seed(0)
    tokenizer = VisualTokenizer(VisualConfig(**config)).eval().requires_grad_(False)
    for name, tensor in tokenizer.state_dict().items():
        if name.startswith("quantizer."):
            tensor.normal_(std=0.5)
        elif tensor.ndim > 1:
            tensor.add_(torch.randn_like(tensor), alpha=0.1)
    return tokenizer


def noise(*shape: int) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(0)) * 2 - 1


class Models:
    """The two models of a folder, run by onnxruntime."""

    def __init__(self, folder: Path) -> None:
        self.encoder, self.decoder = (
            runtime.InferenceSession(folder / f"{name}.onnx", providers=["CPUExecutionProvider"])
            for name in ("encoder", "decoder")
        )

    def encode(self, pixels: Tensor) -> Tensor:
        return torch.from_numpy(self.encoder.run(["codes"], {"pixels": pixels.numpy()})[0])

    def decode(self, codes: Tensor) -> Tensor:
        return torch.from_numpy(self.decoder.run(["pixels"], {"codes": codes.numpy()})[0])

    def agree_with(self, tokenizer: PixelTokenizer, pixels: Tensor) -> None:
        codes = self.encode(pixels)
        expected = tokenizer.encode(pixels).codes
        assert codes.dtype == torch.int64
        assert codes.shape == expected.shape
        z = tokenizer.to_latents(pixels if pixels.ndim == 5 else pixels[:, :, None]).movedim(1, -1)
        sure = tokenizer.quantizer.margin(z) > 1e-5
        sure = sure if pixels.ndim == 5 else sure[:, 0]
        assert sure.float().mean() > 0.99
        if len(tokenizer.codebook_sizes) > 1:
            codes, expected = codes.movedim(1, -1), expected.movedim(1, -1)
        assert torch.equal(codes[sure], expected[sure])
        assert codes.numel() < 9 or len(codes.unique()) > 2
        made = self.decode(tokenizer.encode(pixels).codes)
        assert made.dtype == torch.float32
        assert made.shape == pixels.shape
        assert made.abs().max() <= 1
        torch.testing.assert_close(made, tokenizer.decode(tokenizer.encode(pixels)), atol=1e-4, rtol=0)


def test_a_model_of_images_takes_any_batch_and_size(tmp_path: Path) -> None:
    tokenizer = network(
        patch=4, widths=(32,), encoder_blocks=1, decoder_blocks=1, attention=(0,), stem="haar", decoder_norm="spatial",
        quantizer=VQ,
    )  # fmt: skip
    assert tokenizer.train() is tokenizer
    facts = export_onnx(tokenizer, tmp_path / "new" / "folder")
    assert tokenizer.training
    tokenizer.eval()
    folder = tmp_path / "new" / "folder"
    assert json.loads((folder / "export.json").read_text()) == facts
    assert facts == {
        "format_version": 1,
        "architecture": "plait",
        "fingerprint": tokenizer.fingerprint,
        "pixels": {"dtype": "float32", "shape": ["batch", 3, "height", "width"], "range": [-1, 1], "colours": "RGB"},
        "codes": {"dtype": "int64", "shape": ["batch", "height / 4", "width / 4"]},
        "codebook_sizes": [4096],
        "factor": 4,
        "temporal_factor": 1,
    }
    assert sorted(path.name for path in folder.iterdir()) == ["decoder.onnx", "encoder.onnx", "export.json"]
    models = Models(folder)
    # The last one has more codes than are looked up at once in torch.
    for batch, height, width in (
        (1, 20, 12),
        (2, 20, 12),
        (3, 12, 32),
        (1, 4, 4),
        (5, 4, 12),
        (2, 8, 8),
        (2, 200, 200),
    ):
        models.agree_with(tokenizer, noise(batch, 3, height, width))


def test_a_model_of_clips_sees_frames_before(tmp_path: Path) -> None:
    tokenizer = network(patch=4, widths=(32,), encoder_blocks=1, decoder_blocks=1, attention=(0,), temporal_factor=2)
    facts = export_onnx(tokenizer, tmp_path, size=(12, 8), frames=5)
    assert facts["pixels"]["shape"] == ["batch", 3, 5, 12, 8]
    assert facts["codes"]["shape"] == ["batch", 3, 3, 2]
    models = Models(tmp_path)
    for batch in (1, 2, 4):
        models.agree_with(tokenizer, noise(batch, 3, 5, 12, 8))
    with pytest.raises(Exception, match="invalid dimensions"):
        models.encode(noise(1, 3, 5, 16, 8))
    for file in tmp_path.glob("*.onnx"):
        model = onnx.load(file)
        onnx.checker.check_model(model, full_check=True)
        # The exporter would have noted paths of this machine.
        assert str(Path(__file__).parents[2]).encode() not in file.read_bytes()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("tokenizer", "frames"),
    [
        (lambda: VidTokTokenizer(VidTokConfig(8, (1, 1), 1, (5, 4, 3), (0,), (1,))), 3),
        (lambda: VQGANTokenizer(VQGANConfig(32, (1, 1), 1, (1,), 8, 64, 4)), None),
        (lambda: Emu3Tokenizer(Emu3Config(64, 4, 32, (1, 1), 1, (1,), 2)), None),
    ],
    ids=["vidtok", "vqgan", "emu3"],
)
def test_other_networks(tmp_path: Path, tokenizer: Callable[[], PixelTokenizer], frames: int | None) -> None:
    torch.manual_seed(0)
    built = tokenizer().eval().requires_grad_(False)
    clip = [frames] if frames else []
    export_onnx(built, tmp_path, size=(8, 12), frames=frames)
    models = Models(tmp_path)
    for batch in (1, 3):
        pixels = noise(batch, 3, *clip, 8, 12)
        codes = built.encode(pixels).codes
        assert (models.encode(pixels) == codes).float().mean() > 0.99
        torch.testing.assert_close(models.decode(codes), built.decode(codes), atol=1e-4, rtol=0)


def test_the_command(tmp_path: Path) -> None:
    tokenizer = network(patch=4, widths=(8,), encoder_blocks=0, decoder_blocks=0, quantizer=RVQ)
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    arguments = ["tokenizer", "export", str(tmp_path / "tokenizer"), "-o", str(tmp_path / "out"), "--json"]
    done = CliRunner().invoke(app, [*arguments, "--size", "8x16"], catch_exceptions=False)
    facts = json.loads(done.stdout.splitlines()[-1])
    assert facts == json.loads((tmp_path / "out" / "export.json").read_text())
    assert facts["codes"]["shape"] == ["batch", 3, 2, 4]
    assert facts["codebook_sizes"] == [16, 16, 16]
    Models(tmp_path / "out").agree_with(tokenizer, noise(3, 3, 8, 16))


def test_nothing_is_written_when_a_network_cannot_be_exported(tmp_path: Path) -> None:
    tokenizer = network(patch=4, widths=(8,), encoder_blocks=0, decoder_blocks=0)
    to_latents = tokenizer.to_latents

    def looks_at_values(pixels: Tensor) -> Tensor:
        return to_latents(pixels) if pixels.sum() > 0 else to_latents(-pixels)

    tokenizer.to_latents = looks_at_values  # type: ignore[method-assign, assignment]
    with pytest.raises(
        PlaitError, match=r"^export: torch cannot export this network from pixels to codes \(.*"
    ) as raised:
        export_onnx(tokenizer, tmp_path)
    assert "\n" not in str(raised.value)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"size": (8, 15)}, "size: is 8×15, must be height and width in multiples of 4"),
        ({"size": (0, 8)}, "size: is 0×8, must be"),
        ({"size": (8,)}, "size: is 8, must be"),
        ({"frames": 4}, "frames: is 4, this tokenizer takes whole groups: 1, 3, 5, …"),
        ({"frames": 0}, "frames: is 0"),
        ({"frames": 3.0}, "frames: is 3.0"),
    ],
)
def test_what_no_model_can_take_is_refused(tmp_path: Path, settings: dict[str, Any], message: str) -> None:
    tokenizer = network(patch=4, widths=(8,), encoder_blocks=0, decoder_blocks=0, temporal_factor=2)
    with pytest.raises(PlaitError, match=f"^{message}"):
        export_onnx(tokenizer, tmp_path / "out", **settings)
    assert not (tmp_path / "out").exists()


def test_sizes_are_read() -> None:
    assert parse_size("256") == (256, 256)
    assert parse_size("480x640") == parse_size("480X640") == parse_size("480×640") == (480, 640)
    for text in ("", "x", "480x", "1x2x3", "-4", "a", "1.5", "4 x 4"):
        with pytest.raises(PlaitError, match="^size: is .* must be like 480x640"):
            parse_size(text)
