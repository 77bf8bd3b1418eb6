"""`plait tokenizer encode` and `decode`: exit codes, streams, JSON, and the memory of whole processes."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from plait.tokenizers.base import Codes
from plait.tokenizers.media import Video
from plait.tokenizers.video import read_video, write_video

Run = Callable[..., Any]


@pytest.fixture
def folder(tokenizers: Path) -> Path:
    return tokenizers / "visual"


@pytest.fixture
def film(tmp_path: Path) -> Path:
    return clip(tmp_path / "film.mp4", 18, 24)


def clip(path: Path, frames: int, side: int) -> Path:
    """A bright bar that wanders over black."""
    shown = torch.zeros(frames, side, side, 3, dtype=torch.uint8)
    for t in range(frames):
        shown[t, :, t % side : t % side + 8] = 200
    write_video(Video(shown, 10), path)
    return path


def failed(ran: Any, *words: str) -> None:
    """Exit code 2, one line on stderr, nothing on stdout."""
    assert (ran.code, ran.out) == (2, "")
    assert ran.err.startswith("plait: ")
    assert ran.err.count("\n") == 1
    assert all(word in ran.err for word in words), ran.err


def test_there_and_back(main: Run, folder: Path, film: Path, picture: Image.Image, tmp_path: Path) -> None:
    picture.save(tmp_path / "photo.png")
    ran = main("tokenizer", "encode", film, tmp_path / "photo.png", "-o", tmp_path / "codes", "--tokenizer", folder)
    assert (ran.code, ran.err) == (0, "")
    codes = [tmp_path / "codes" / f"{name}.codes.safetensors" for name in ("film", "photo")]
    for line, path, size in zip(ran.out.splitlines(), codes, ("18×24×24", "16×24"), strict=True):
        assert line.startswith(f"wrote {path} ({size}, ")
    ran = main("tokenizer", "decode", *codes, "-o", tmp_path / "back", "--tokenizer", folder, "--json")
    facts = json.loads(ran.out.splitlines()[-1])
    assert facts["tokenizer"] == str(folder)
    assert [(f["modality"], f["size"], f["grid"], f["fps"]) for f in facts["files"]] == [
        ("video", [18, 24, 24], [18, 3, 3], 10.0),
        ("image", [16, 24], [2, 3], None),
    ]
    assert [f["file"] for f in facts["files"]] == [str(tmp_path / "back" / n) for n in ("film.mp4", "photo.png")]
    assert all(f["seconds"] > 0 for f in facts["files"])
    assert read_video(tmp_path / "back" / "film.mp4").frames.shape == (18, 24, 24, 3)
    with Image.open(tmp_path / "back" / "photo.png") as image:
        assert image.size == picture.size


def test_options_reach_the_work(main: Run, folder: Path, film: Path, tmp_path: Path) -> None:
    options = ["-o", tmp_path / "codes", "--tokenizer", folder]
    more = ["--size", 64, "--fps", 5, "--tile", 64, "--device", "cpu"]
    assert main("tokenizer", "encode", film, *options, *more).code == 0
    path = tmp_path / "codes" / "film.codes.safetensors"
    codes = Codes.load(path)
    assert (codes.size, codes.fps) == ((9, 64, 64), 5)
    failed(main("tokenizer", "encode", film, *options), "is there already", "--overwrite")
    assert main("tokenizer", "encode", film, *options, "--overwrite").code == 0
    assert Codes.load(path).size == (18, 24, 24)
    ran = main("tokenizer", "decode", path, "-o", tmp_path, "--tokenizer", folder, "--format", "webm", "--json")
    assert json.loads(ran.out)["files"][0]["file"] == str(tmp_path / "film.webm")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["encode", "gone.png", "-o", "out"], ["gone.png: no such file"]),
        (["decode", "gone.safetensors", "-o", "out"], ["gone.safetensors: no such file"]),
        (["encode", ".", "-o", "out"], [".: is a folder"]),
        (["encode", "words.png", "-o", "out"], ["words.png: neither a picture nor a video"]),
        (["encode", "empty.mp4", "-o", "out"], ["empty.mp4: neither a picture nor a video"]),
        (["decode", "words.png", "-o", "out"], ["words.png: not a readable codes file"]),
        (["decode", "audio.safetensors", "-o", "out"], ["audio.safetensors: holds audio codes"]),
        (["decode", "other.safetensors", "-o", "out"], ["other.safetensors: made by another tokenizer", "--tokenizer"]),
        (["decode", "wild.safetensors", "-o", "out"], ["wild.safetensors: codes: found 0..999"]),
        (["decode", "audio.safetensors", "-o", "out", "--format", "bmp"], ["format: 'bmp' is none of"]),
        (["encode", "words.png", "-o", "words.png"], ["words.png: cannot make this folder"]),
        (["encode", "words.png", "-o", "out", "--device", "gpu"], ["device: 'gpu' cannot be used"]),
        (["encode", "words.png", "-o", "out", "--fps", "0"], ["fps: is 0.0"]),
        (["encode", "words.png", "-o", "out", "--size", "0"], ["--size"]),
        (["encode", "words.png"], ["-o"]),
        (["encode", "-o", "out"], ["FILE"]),
    ],
)
def test_bad_input_is_one_line(
    main: Run, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str], words: list[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("words.png").write_bytes(b"words, not pixels\n" * 20)
    Path("empty.mp4").touch()
    Codes(torch.zeros(1, 50, dtype=torch.int64), "audio", sample_rate=24000).save("audio.safetensors")
    Codes(torch.zeros(1, 2, 2, dtype=torch.int64), "image", fingerprint="0" * 64).save("other.safetensors")
    Codes(torch.tensor([[[0, 999]]]), "image").save("wild.safetensors")
    before = sorted(tmp_path.iterdir())
    failed(main("tokenizer", *arguments, "--tokenizer", folder), *words)
    assert sorted(p for p in tmp_path.rglob("*") if p.name != "out") == before


def test_one_error_in_a_process_of_its_own(plait: Run, folder: Path, film: Path, tmp_path: Path) -> None:
    # FFmpeg has a voice of its own; it stays silent.
    film.write_bytes(film.read_bytes()[:-300])
    done = plait("tokenizer", "encode", film, "-o", tmp_path / "out", "--tokenizer", folder)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == f"plait: {film}: cut off before its end; copy or download it again\n"
    assert list((tmp_path / "out").iterdir()) == []


PEAK = """
import sys
from plait.__main__ import main
try:
    main()
finally:
    with open("/proc/self/status") as status:
        print(*(line.split()[1] for line in status if line.startswith("VmHWM:")), file=sys.stderr)
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads the peak memory of Linux")
def test_memory_does_not_grow_with_the_length(folder: Path, tmp_path: Path) -> None:
    def peak(*arguments: object) -> float:
        command = [sys.executable, "-c", PEAK, "tokenizer", *map(str, arguments), "--tokenizer", str(folder)]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300)
        assert done.returncode == 0, done.stderr
        return int(done.stderr) / 1024

    encoding, decoding = [], []
    for frames in (33, 257):
        path = clip(tmp_path / f"{frames}.mp4", frames, 128)
        encoding.append(peak("encode", path, "-o", tmp_path))
        codes = tmp_path / f"{frames}.codes.safetensors"
        decoding.append(peak("decode", codes, "-o", tmp_path / "back"))
        assert Codes.load(codes).size == (frames, 128, 128)
    for short, long in (encoding, decoding):
        assert long < 1.5 * short
        # Most of both is Python and torch; the 224 frames more would be 42 MiB as floats alone.
        assert long - short < 30
