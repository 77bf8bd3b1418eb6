"""The 60 pictures as raw and as token shards, made once."""

from pathlib import Path

import pytest

from plait.train.pack import pack
from plait.train.tokenize import tokenize


@pytest.fixture(scope="session")
def raw(emoji: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """60 samples in 3 raw shards."""
    folder = tmp_path_factory.mktemp("raw") / "shards"
    pack(emoji, folder, 20)
    return folder


@pytest.fixture(scope="session")
def tokens(raw: Path, tokenizers: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """60 documents in 3 token shards."""
    folder = tmp_path_factory.mktemp("tokens") / "shards"
    tokenize(raw, folder, str(tokenizers), workers=1)
    return folder
