"""Fixtures: 60 real captioned pictures, and small untrained tokenizers and bundles to run the real code on."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch

from plait.infer.bundle import save_bundle
from plait.model import native
from plait.model.config import DecoderConfig
from plait.model.decoder import Decoder
from plait.tokenizers.loading import load_tokenizers
from plait.tokenizers.quantizer import QuantizerConfig
from plait.tokenizers.text import TextTokenizer
from plait.tokenizers.visual import VisualConfig, VisualTokenizer
from plait.tokenizers.vocabulary import Vocabulary

DATA = Path(__file__).parent / "data"
TEXTS = [
    "a red apple on a table, drawn in ink",
    "rabbit face, noto style",
    "two dogs and a cat look at the moon",
    "the quick brown fox jumps over the lazy dog 0123456789",
]


@pytest.fixture(scope="session")
def emoji() -> Path:
    """A folder of 60 pictures (20 concepts, 3 styles) with a manifest.jsonl."""
    return DATA / "emoji"


@pytest.fixture(scope="session")
def text_tokenizer() -> TextTokenizer:
    return TextTokenizer.train(TEXTS * 8, 300)


@pytest.fixture(scope="session")
def visual_tokenizer() -> VisualTokenizer:
    """Untrained, 8× down, 60 codes."""
    torch.manual_seed(0)
    levels = QuantizerConfig(levels=(5, 4, 3))
    config = VisualConfig(patch=4, widths=(8, 16), encoder_blocks=1, decoder_blocks=1, quantizer=levels)
    return VisualTokenizer(config).eval().requires_grad_(False)


@pytest.fixture(scope="session")
def tokenizers(tmp_path_factory: pytest.TempPathFactory, text_tokenizer, visual_tokenizer) -> Path:
    """A folder with text/ and visual/."""
    folder = tmp_path_factory.mktemp("tokenizers")
    text_tokenizer.save_pretrained(folder / "text")
    visual_tokenizer.save_pretrained(folder / "visual")
    return folder


@pytest.fixture(scope="session")
def vocabulary(tokenizers: Path) -> Vocabulary:
    return Vocabulary.build(load_tokenizers(tokenizers), ["text", "image"])


@pytest.fixture
def bundle(tmp_path: Path, tokenizers: Path, vocabulary: Vocabulary) -> Path:
    """An untrained bundle of text and images."""
    torch.manual_seed(0)
    config = DecoderConfig(vocabulary_size=vocabulary.size, width=32, layers=2, heads=4, kv_heads=2)
    weights = Decoder(config).state_dict()
    settings = {"image": {"temperature": 1.0, "guidance": 1.5}, "text": {"temperature": 1.0}}
    save_bundle(tmp_path / "bundle", config, weights, vocabulary, tokenizers, settings, 256, torch.float32)
    return tmp_path / "bundle"


@pytest.fixture
def plait() -> Callable[..., subprocess.CompletedProcess[str]]:
    """Run the command line in a process of its own: ``plait("generate", "hi", "--to", "text")``."""

    def run(*arguments: object, cwd: Path | None = None, **environment: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "plait", *map(str, arguments)]
        env = {**os.environ, "OMP_NUM_THREADS": "1", **environment}
        return subprocess.run(command, capture_output=True, text=True, cwd=cwd, env=env, timeout=600)

    return run


@pytest.fixture(params=["native", "torch"])
def kind(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """With the native code, and as if it had not been built."""
    if request.param == "torch":
        monkeypatch.setattr(native, "library", lambda: None)
    elif native.library() is None:
        pytest.skip("the native code was not built")
    return request.param
