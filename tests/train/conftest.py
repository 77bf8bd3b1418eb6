"""The 60 pictures as raw and as token shards, and a few clips of them, made once."""

from pathlib import Path

import numpy as np
import pytest
import torch

from plait.tokenizers.media import Video, read_image
from plait.tokenizers.video import write_video
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


@pytest.fixture(scope="session")
def clips(emoji: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """9 clips in 3 raw shards: pictures that move to the right, GIF, MP4 and animated WebP in turn, 40×32."""
    source = tmp_path_factory.mktemp("clips")
    for i, path in enumerate(sorted(emoji.glob("*/*.png"))[:9]):
        picture = torch.from_numpy(np.array(read_image(path).resize((40, 32))))
        frames = torch.stack([picture.roll(2 * t, 1) for t in range(6 + i)])
        write_video(Video(frames, 12.5), source / f"clip{i}{('.gif', '.mp4', '.webp')[i % 3]}")
    folder = tmp_path_factory.mktemp("clip-shards") / "shards"
    pack(source, folder, 3)
    return folder
