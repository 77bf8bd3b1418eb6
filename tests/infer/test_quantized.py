"""Bundles with quantized weights: made at load, kept in the folder, on the command line."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from plait.errors import PlaitError
from plait.infer.bundle import load_bundle, save_bundle
from plait.infer.pipeline import load
from plait.model.quantize import Quantization, quantize_


def kept(bundle: Path, folder: Path, settings: Quantization) -> Path:
    """The bundle, quantized in its folder."""
    floats = load_bundle(bundle)
    quantize_(floats.decoder, settings)
    save_bundle(
        folder,
        floats.decoder.config,
        floats.decoder.state_dict(),
        floats.vocabulary,
        bundle / "tokenizers",
        floats.generation,
        floats.context,
        torch.float32,
        settings,
    )
    return folder


@pytest.mark.parametrize("name", ["int8", "int4"])
def test_kept_is_as_made_at_load(bundle: Path, tmp_path: Path, name: str, kind: str) -> None:
    folder = kept(bundle, tmp_path / "kept", Quantization.named(name))
    codes = load_file(folder / "model.safetensors")["layers.0.self_attn.q_proj.weight"]
    assert codes.dtype == (torch.int8 if name == "int8" else torch.uint8)
    made, stored = load(bundle, quantize=name), load(folder)
    for seed in range(2):
        settings: dict[str, Any] = {"to": "text", "seed": seed, "temperature": 2.0, "max_tokens": 20}
        assert made.generate("a red apple", **settings) == stored.generate("a red apple", **settings)
    assert made.score("a", target="red").total == pytest.approx(load(bundle).score("a", target="red").total, rel=0.05)


def test_several_prompts_together_are_as_alone(bundle: Path, kind: str) -> None:
    model = load(bundle, quantize="int8")
    prompts = [["a red apple"], ["moon"], ["sun", "rise"]]
    together = model.generate_batch(prompts, to="text", temperature=0.0, max_tokens=8)
    alone = [model.generate(*parts, to="text", temperature=0.0, max_tokens=8) for parts in prompts]
    assert together == alone


def test_command(bundle: Path, main: Callable[..., Any]) -> None:
    arguments = ("generate", "moon", "--to", "text", "--model", bundle, "--seed", 3, "--max-tokens", 9)
    ran = main(*arguments, "--quantize", "int8")
    assert ran.code == 0
    assert ran.out.rstrip("\n") == load(bundle, quantize="int8").generate("moon", to="text", seed=3, max_tokens=9)
    ran = main(*arguments, "--quantize", "int2")
    assert ran.code == 2
    assert ran.err == "plait: quantize: is 'int2', must be int8 or int4\n"


def test_what_is_quantized_is_not_quantized_again(bundle: Path, tmp_path: Path) -> None:
    folder = kept(bundle, tmp_path / "kept", Quantization(8))
    with pytest.raises(PlaitError, match="stored in 8 bits already"):
        load(folder, quantize="int4")


def test_unknown_settings_in_the_folder(bundle: Path, tmp_path: Path) -> None:
    folder = tmp_path / "copy"
    shutil.copytree(bundle, folder)
    config = folder / "config.json"
    config.write_text(config.read_text().replace('"context"', '"quantization": {"bits": 3}, "context"'))
    with pytest.raises(PlaitError, match="bits is 3, must be 8 or 4"):
        load(folder)
