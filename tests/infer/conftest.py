"""Fixtures for generation: a decided model, and the command line in this process."""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest
from PIL import Image

from plait.infer.pipeline import Model, load


@pytest.fixture
def model(bundle: Path) -> Model:
    """The untrained bundle with larger weights: what comes before changes what comes next, and nothing is a tie."""
    model = load(bundle)
    for parameter in model.bundle.decoder.parameters():
        if parameter.ndim == 2:
            parameter *= 6
    return model


@pytest.fixture
def picture() -> Image.Image:
    """24 × 16 pixels: a grid of 2 × 3 codes."""
    return Image.radial_gradient("L").resize((24, 16)).convert("RGB")


class Ran(NamedTuple):
    code: int
    out: str
    err: str


@pytest.fixture
def main(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., Ran]:
    """Run the command line in this process, which saves the seconds that torch takes to import."""
    from plait.__main__ import main

    def run(*arguments: object) -> Ran:
        monkeypatch.setattr(sys, "argv", ["plait", *map(str, arguments)])
        capsys.readouterr()
        code = 0
        try:
            main()
        except SystemExit as stop:
            code = int(stop.code or 0)
        return Ran(code, *capsys.readouterr())

    return run
