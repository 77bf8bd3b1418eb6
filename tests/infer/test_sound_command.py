"""`plait tokenizer encode`, `decode` and `info` of sound: exit codes, streams, JSON, and the memory of processes."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from plait.tokenizers.audio import AudioConfig, AudioTokenizer, HalfConfig
from plait.tokenizers.base import Codes
from plait.tokenizers.media import Audio
from plait.tokenizers.quantizer import QuantizerConfig
from plait.tokenizers.sound import SoundWriter, read_sound, write_sound

Run = Callable[..., Any]

SMALL = AudioConfig(
    encoder=HalfConfig(widths=(4, 8, 8), strides=(8, 20), blocks=(0, 1, 1)),
    decoder=HalfConfig(80, 320, (16, 16), (2,), (1, 1), causal=False),
    quantizer=QuantizerConfig(kind="rvq", levels=(), codebook_size=16, dim=4, codebooks=3),
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Untrained: three codebooks, 16 kHz, 100 steps a second."""
    folder = tmp_path_factory.mktemp("audio")
    torch.manual_seed(0)
    AudioTokenizer(SMALL).save_pretrained(folder)
    return folder


@pytest.fixture
def voice(tmp_path: Path) -> Path:
    """Two seconds of stereo at 22.05 kHz."""
    samples = torch.randn(2, 44100, generator=torch.Generator().manual_seed(0)) * 0.1
    write_sound(Audio(samples, 22050), tmp_path / "voice.wav")
    return tmp_path / "voice.wav"


def failed(ran: Any, *words: str) -> None:
    """Exit code 2, one line on stderr, nothing on stdout."""
    assert (ran.code, ran.out) == (2, "")
    assert ran.err.startswith("plait: ")
    assert ran.err.count("\n") == 1
    assert all(word in ran.err for word in words), ran.err


def test_there_and_back(main: Run, folder: Path, voice: Path, tmp_path: Path) -> None:
    ran = main("tokenizer", "encode", voice, "-o", tmp_path / "codes", "--tokenizer", folder)
    assert (ran.code, ran.err) == (0, "")
    codes = tmp_path / "codes" / "voice.codes.safetensors"
    assert ran.out.startswith(f"wrote {codes} (2.00 s of sound, ")
    ran = main("tokenizer", "decode", codes, "-o", tmp_path / "back", "--tokenizer", folder, "--json")
    facts = json.loads(ran.out)
    assert facts["tokenizer"] == str(folder)
    (row,) = facts["files"]
    assert (row["modality"], row["size"], row["grid"], row["sample_rate"]) == ("audio", [32000], [3, 200], 16000)
    assert row["file"] == str(tmp_path / "back" / "voice.wav")
    assert row["seconds"] > 0
    assert row["real_time_factor"] == pytest.approx(row["seconds"] / 2, abs=1e-3)
    assert row["clipped"] == 0
    assert read_sound(row["file"]).samples.shape == (1, 32000)


def test_options_reach_the_work(main: Run, folder: Path, voice: Path, tmp_path: Path) -> None:
    options = ["-o", tmp_path, "--tokenizer", folder, "--overwrite"]
    path = tmp_path / "voice.codes.safetensors"
    for more, codebooks in ((["--n-codebooks", 2], 2), (["--bandwidth", 0.4], 1), ([], 3)):
        assert main("tokenizer", "encode", voice, *options, *more).code == 0
        assert Codes.load(path).codes.shape == (1, codebooks, 200)
    assert Codes.load(path).scale is None
    assert main("tokenizer", "encode", voice, *options, "--loudness", -40).code == 0
    codes = Codes.load(path)
    samples = read_sound(voice, sample_rate=16000, channels=1).samples
    assert codes.scale is not None
    assert codes.scale.item() == pytest.approx(samples.square().mean().sqrt().item() * 100, rel=1e-4)
    codes.scale *= 1000
    codes.save(path)
    ran = main("tokenizer", "decode", path, *options, "--format", "flac")
    assert ran.code == 0
    assert ran.out.startswith(f"wrote {tmp_path / 'voice.flac'} (2.00 s of sound, ")
    assert ran.out.endswith(" samples clipped)\n")


def test_info(main: Run, folder: Path) -> None:
    ran = main("tokenizer", "info", folder)
    assert ran.code == 0
    for words in ("kind audio", "sample rate 16000", "codes per second 300.0", "codebooks 3", "kbit/s 1.2"):
        assert words in ran.out


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["encode", "gone.wav", "-o", "out"], ["gone.wav: no such file"]),
        (["encode", ".", "-o", "out"], [".: is a folder"]),
        (["encode", "empty.mp3", "-o", "out"], ["empty.mp3: is empty"]),
        (["encode", "words.wav", "-o", "out"], ["words.wav: no sound that can be read"]),
        (["encode", "cut.wav", "-o", "out"], ["cut.wav: cut off before its end"]),
        (["encode", "voice.wav", "-o", "out", "--loudness", "9"], ["loudness: is 9.0"]),
        (["encode", "voice.wav", "-o", "out", "--n-codebooks", "9"], ["n_codebooks: is 9, this tokenizer has 3"]),
        (["encode", "voice.wav", "-o", "out", "--n-codebooks", "0"], ["--n-codebooks"]),
        (["encode", "voice.wav", "-o", "out", "--bandwidth", "0"], ["bandwidth: is 0.0"]),
        (["decode", "voice.wav", "-o", "out"], ["voice.wav: not a readable codes file"]),
        (["decode", "wild.safetensors", "-o", "out"], ["wild.safetensors: codes of codebook 0: found 0..99"]),
        (["decode", "image.safetensors", "-o", "out"], ["image.safetensors: holds image codes; this decodes audio"]),
        (["decode", "wild.safetensors", "-o", "out", "--format", "aac"], ["format: 'aac' is none of", "ogg"]),
    ],
)
def test_bad_input_is_one_line(
    main: Run,
    folder: Path,
    voice: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    arguments: list[str],
    words: list[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("words.wav").write_bytes(b"words, not samples\n" * 20)
    Path("empty.mp3").touch()
    Path("cut.wav").write_bytes(voice.read_bytes()[:-9])
    Codes(torch.zeros(1, 2, 2, dtype=torch.int64), "image").save("image.safetensors")
    Codes(torch.tensor([[[0, 99]]]), "audio").save("wild.safetensors")
    before = sorted(tmp_path.iterdir())
    failed(main("tokenizer", *arguments, "--tokenizer", folder), *words)
    assert sorted(p for p in tmp_path.rglob("*") if p.name != "out") == before


def test_one_error_in_a_process_of_its_own(plait: Run, folder: Path, voice: Path, tmp_path: Path) -> None:
    # FFmpeg has a voice of its own; it stays silent.
    data = bytearray(voice.read_bytes())
    data[data.index(b"fmt ") + 8] = 0x77  # the codec
    voice.write_bytes(data)
    done = plait("tokenizer", "encode", voice, "-o", tmp_path / "out", "--tokenizer", folder)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith(f"plait: {voice}: ")
    assert done.stderr.count("\n") == 1
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
    for minutes in (1, 12):
        path = tmp_path / f"{minutes}.flac"
        second = torch.randn(2, 22050, generator=torch.Generator().manual_seed(0)) * 0.1
        with SoundWriter(path, 22050, 2) as writer:
            for _ in range(60 * minutes):
                writer.write(second)
        encoding.append(peak("encode", path, "-o", tmp_path, "--loudness", -30))
        codes = tmp_path / f"{minutes}.codes.safetensors"
        decoding.append(peak("decode", codes, "-o", tmp_path / "back"))
        assert Codes.load(codes).size == (60 * minutes * 16000,)
    for short, long in (encoding, decoding):
        assert long < 1.5 * short
        # Most of both is Python and torch; 11 minutes more would be 42 MiB at the tokenizer's rate alone.
        assert long - short < 25
