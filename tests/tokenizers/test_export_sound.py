import json
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from plait.__main__ import app
from plait.errors import PlaitError
from plait.tokenizers.audio import AudioConfig, AudioTokenizer, HalfConfig
from plait.tokenizers.export import export_sound
from plait.tokenizers.quantizer import QuantizerConfig
from plait.tokenizers.snac import SNACConfig, SNACTokenizer
from plait.tokenizers.streaming import whole

pytest.importorskip("onnx")
pytest.importorskip("onnxscript")
runtime = pytest.importorskip("onnxruntime")

SPECTRA = HalfConfig(hop=40, window=160, widths=(12, 16), strides=(2,), blocks=(1, 1))
SAMPLES = HalfConfig(hop=1, window=0, widths=(4, 8, 8), strides=(8, 10), blocks=(1, 2, 0))
RVQ = QuantizerConfig(kind="rvq", codebook_size=16, dim=4, codebooks=3)
CONFIGS = {
    "fsq": AudioConfig(encoder=SAMPLES, decoder=HalfConfig(40, 160, (12, 16), (2,), (1, 1), causal=False)),
    "rvq": AudioConfig(encoder=SPECTRA, decoder=SAMPLES, quantizer=RVQ),
    "stereo": AudioConfig(channels=2, encoder=SAMPLES, decoder=SAMPLES),
}


def build(name: str) -> AudioTokenizer:
    torch.manual_seed(0)
    tokenizer = AudioTokenizer(CONFIGS[name]).eval().requires_grad_(False)
    tokenizer.encoder[-1].weight *= 30
    return tokenizer


@pytest.mark.parametrize("name", CONFIGS)
def test_models_take_any_batch_and_length(name: str, tmp_path: Path) -> None:
    tokenizer = build(name)
    facts = export_sound(tokenizer.train(), tmp_path)
    assert tokenizer.training
    tokenizer.eval()
    assert facts == json.loads((tmp_path / "export.json").read_text())
    assert facts["samples"]["shape"] == ["batch", tokenizer.channels, "samples"]
    assert facts["codes"]["shape"] == ["batch", *([3] if name == "rvq" else []), "samples / 80"]
    encoder, decoder = (
        runtime.InferenceSession(tmp_path / f"{part}.onnx", providers=["CPUExecutionProvider"])
        for part in ("encoder", "decoder")
    )
    for batch, steps in ((1, 1), (3, 23)):
        samples = torch.randn(batch, tokenizer.channels, steps * 80) * 0.2
        expected = tokenizer.encode(samples).codes
        codes = torch.from_numpy(encoder.run(["codes"], {"samples": samples.numpy()})[0])
        assert (codes.dtype, codes.shape) == (torch.int64, expected.shape)
        sure = tokenizer.quantizer.margin(tokenizer.to_latents(samples, whole()).mT) > 1e-5
        same = codes == expected if codes.ndim == 2 else (codes == expected).all(1)
        assert same[sure].all()
        made = torch.from_numpy(decoder.run(["samples"], {"codes": expected.numpy()})[0])
        torch.testing.assert_close(made, tokenizer.decode(expected), atol=1e-5, rtol=0)


def test_networks_that_cannot_be_exported_say_so(tmp_path: Path) -> None:
    tokenizer = SNACTokenizer(
        SNACConfig(width=4, strides=(2, 4), decoder_width=16, codebook_size=16, code_dim=4)
    ).eval()
    with pytest.raises(PlaitError, match="export: torch cannot export this network from samples to codes"):
        export_sound(tokenizer, tmp_path)
    assert not list(tmp_path.iterdir())


def test_the_command(tmp_path: Path) -> None:
    build("fsq").save_pretrained(tmp_path / "tok")
    result = CliRunner().invoke(
        app, ["tokenizer", "export", str(tmp_path / "tok"), "-o", str(tmp_path / "out"), "--json"]
    )
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout.splitlines()[-1])["sample_rate"] == 16000
    result = CliRunner().invoke(
        app, ["tokenizer", "export", str(tmp_path / "tok"), "-o", str(tmp_path), "--size", "64"]
    )
    assert result.exit_code != 0
