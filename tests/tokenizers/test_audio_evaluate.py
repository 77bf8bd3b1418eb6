import copy
import json
import math
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from subprocess import CompletedProcess

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from plait.__main__ import main
from plait.errors import PlaitError
from plait.tokenizers import audio_evaluate as module
from plait.tokenizers import sheets
from plait.tokenizers.audio import AudioConfig, AudioTokenizer, HalfConfig
from plait.tokenizers.audio_evaluate import audio_table, evaluate_audio, evaluate_audio_folder, through_opus
from plait.tokenizers.audio_metrics import mel_distance, si_sdr
from plait.tokenizers.base import Codes
from plait.tokenizers.media import Audio
from plait.tokenizers.protocol import AudioProtocol
from plait.tokenizers.quantizer import QuantizerConfig
from plait.tokenizers.sheets import spectrogram_sheet
from plait.tokenizers.sound import read_sound, write_sound

SPEECH = Path(__file__).parents[1] / "data" / "speech"


class Companding(nn.Module):
    """µ-law, 8 bits a sample, and a second book that halves its steps."""

    sample_rate, channels, factor, kind = 16000, 1, 1, "audio"
    codebook_sizes = (256, 2)
    frame_rate, bitrate, fingerprint, device = 16000.0, 144000.0, "f" * 64, torch.device("cpu")

    def encode(self, samples: Tensor, n_codebooks: int | None = None) -> Codes:
        curved = torch.sign(samples) * torch.log1p(255 * samples.abs()) / math.log(256)
        place = (curved[:, 0] + 1) / 2 * 255
        coarse = place.round()
        codes = torch.stack([coarse, (place > coarse).float()], 1).long()[:, :n_codebooks]
        return Codes(codes, "audio", (samples.shape[-1],), sample_rate=16000)

    def decode(self, codes: Codes) -> Tensor:
        place = codes.codes[:, 0].float()
        if codes.codes.shape[1] > 1:
            place = place + (codes.codes[:, 1] - 0.5) / 2
        curved = place / 255 * 2 - 1
        return (torch.sign(curved) * (256 ** curved.abs() - 1) / 255)[:, None]


class Identity(Companding):
    """Every 16-bit sample is a code."""

    codebook_sizes = (65536,)
    bitrate = 256000.0

    def encode(self, samples: Tensor, n_codebooks: int | None = None) -> Codes:
        return Codes((samples[:, 0] * 32768).round().long().clamp(-32768, 32767) + 32768, "audio")

    def decode(self, codes: Codes) -> Tensor:
        return (codes.codes[:, None] - 32768).float() / 32768


@pytest.fixture(scope="module")
def tokenizer() -> AudioTokenizer:
    torch.manual_seed(0)
    encoder = HalfConfig(widths=(4, 8, 8, 16, 16), blocks=(0, 1, 1, 1, 1))
    decoder = HalfConfig(160, 640, (16, 24), (2,), (1, 1), causal=False)
    config = AudioConfig(encoder=encoder, decoder=decoder, quantizer=QuantizerConfig(levels=(5, 4, 3)))
    return AudioTokenizer(config).eval().requires_grad_(False)


@pytest.fixture
def mixed(tmp_path: Path) -> Path:
    """Sounds of two formats and rates, a silent and a broken one, and one of no concern."""
    folder = tmp_path / "mixed"
    (folder / "deep").mkdir(parents=True)
    files = sorted(SPEECH.rglob("*.flac"))
    shutil.copy(files[0], folder / "a.flac")
    shutil.copy(files[1], folder / "deep" / "b.flac")
    tone = torch.sin(torch.arange(24000) * 0.1) * 0.4
    write_sound(Audio(torch.stack([tone, tone * 0.5]), 24000), folder / "c.wav")
    write_sound(Audio(torch.zeros(1, 3000), 16000), folder / "silent.wav")
    (folder / "cut.wav").write_bytes((folder / "c.wav").read_bytes()[:30])
    (folder / "notes.txt").write_text("nothing")
    return folder


def test_figures_are_those_of_each_alone(mixed: Path) -> None:
    told: list[tuple[int, int]] = []
    report, _ = evaluate_audio(
        Companding(), mixed, visqol=0, advance=lambda done, total: told.append((done, total))
    )  # fmt: skip
    names = ["a.flac", "c.wav", "deep/b.flac", "silent.wav"]
    assert [file["path"] for file in report["files"]] == names
    ratios, distances, seen, seconds = [], [], set(), 0.0
    for name, file in zip(names, report["files"], strict=True):
        samples = read_sound(mixed / name, sample_rate=16000, channels=1).samples[None]
        codes = Companding().encode(samples)
        seen |= set(codes.codes[:, 0].flatten().tolist())
        back = Companding().decode(codes)
        ratios.append(si_sdr(samples, back).item())
        distances.append(mel_distance(samples, back, 16000).item())
        seconds += samples.shape[-1] / 16000
        assert file["seconds"] == samples.shape[-1] / 16000
        assert file["mel_distance"] == pytest.approx(distances[-1], rel=1e-4)
    found = report["audio"]
    assert report["files"][3]["si_sdr"] is None
    assert (found["items"], found["seconds"]) == (4, pytest.approx(seconds))
    assert found["si_sdr"] == pytest.approx(sum(ratios[:3]) / 3, abs=1e-3)
    assert found["mel_distance"] == pytest.approx(sum(distances) / 4, rel=1e-4)
    assert found["no_value"]["si_sdr"] == 1
    assert found["bits_per_second"] == pytest.approx(16000 * 9)
    assert found["nominal_bits_per_second"] == 144000
    assert found["codes_per_second"] == pytest.approx(32000)
    assert [book["codes"] for book in found["codebooks"]] == [256, 2]
    assert found["codebooks"][0]["used"] == pytest.approx(len(seen) / 256)
    assert found["encode_speed"] == pytest.approx(seconds / found["encode_seconds"])
    assert [line.partition(": ")[0] for line in report["data"]["skipped"]] == [str(mixed / "cut.wav")]
    assert [done for done, _ in told] == sorted(done for done, _ in told)
    assert told[-1] == (5, 5)


def test_equal_sound_has_the_best_figures_and_coarser_sound_worse_ones(mixed: Path) -> None:
    best, fine, coarse = (
        evaluate_audio(tokenizer, mixed, visqol=1, limit=1, codebooks=codebooks)[0]["audio"]
        for tokenizer, codebooks in ((Identity(), None), (Companding(), None), (Companding(), 1))
    )
    assert (best["si_sdr"], best["mel_distance"], best["stft_distance"]) == (100, 0, 0)
    assert best["stoi"] == pytest.approx(1)
    assert best["pesq_wb"] == pytest.approx(4.644, abs=1e-3)
    assert best["visqol"] == 5
    for name in ("si_sdr", "pesq_wb"):
        assert best[name] > fine[name] > coarse[name]
    assert best["mel_distance"] < fine["mel_distance"] < coarse["mel_distance"]
    assert 35 < coarse["si_sdr"] < 40  # what µ-law is known for
    assert coarse["bits_per_second"] == pytest.approx(coarse["nominal_bits_per_second"])
    assert coarse["nominal_bits_per_second"] == 16000 * 8
    assert len(coarse["codebooks"]) == 1


def test_codebooks_of_several_rates_are_told_apart(mixed: Path) -> None:
    class Levels(Identity):
        """A coarse code and two fine ones in one stream."""

        codebook_sizes = (8, 4)  # type: ignore[assignment]

        def levels(self, codes: Codes) -> list[Tensor]:
            return [torch.zeros(1, 10, dtype=torch.long), torch.ones(1, 20, dtype=torch.long)]

    report, _ = evaluate_audio(Levels(), mixed, visqol=0, limit=1)
    seconds = report["audio"]["seconds"]
    assert [book["used"] for book in report["audio"]["codebooks"]] == [1 / 8, 1 / 4]
    assert report["audio"]["codes_per_second"] == pytest.approx(30 / seconds)
    assert report["audio"]["bits_per_second"] == pytest.approx((10 * 3 + 20 * 2) / seconds)
    with pytest.raises(PlaitError, match="codebooks: this tokenizer always has all"):
        evaluate_audio(Levels(), mixed, codebooks=1)


def test_the_protocol_cuts_mixes_and_resamples(mixed: Path) -> None:
    short = AudioProtocol(seconds=0.25).read(mixed / "c.wav", 12000, 1)
    whole = AudioProtocol().read(mixed / "c.wav", 12000, 1)
    assert (short.shape, whole.shape) == ((1, 3000), (1, 12000))
    assert torch.equal(short, whole[:, :3000])
    assert float(whole[:, 500:-500].abs().max()) == pytest.approx(0.3, abs=0.01)  # the mean of both channels
    assert AudioProtocol().read(mixed / "c.wav", 12000, 2).shape == (2, 12000)
    words = AudioProtocol(seconds=3).in_words(24000, 1)
    assert "first 3 seconds" in words["length"]
    assert "24000 Hz" in words["rate"]
    assert "above 12 kHz" in words["rate"]
    for seconds in (0, -1, math.nan, math.inf, True):
        with pytest.raises(PlaitError, match="seconds"):
            AudioProtocol(seconds=seconds)


def test_a_manifest_names_the_files(mixed: Path) -> None:
    rows = [{"path": "deep/b.flac"}, {"path": "a.flac", "text": "x"}, {"path": "notes.txt"}, {"path": "gone.wav"}]
    (mixed / "manifest.jsonl").write_text("\n".join(map(json.dumps, rows)))
    report, _ = evaluate_audio(Companding(), mixed, visqol=0)
    assert [file["path"] for file in report["files"]] == ["deep/b.flac", "a.flac"]
    assert "ends in none of .wav, .flac" in report["data"]["skipped"][0]
    assert "gone.wav: no such file" in report["data"]["skipped"][1]


def test_nothing_to_measure_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(PlaitError, match="no such folder"):
        evaluate_audio(Companding(), tmp_path / "gone")
    with pytest.raises(PlaitError, match="holds no sound that can be read$"):
        evaluate_audio(Companding(), tmp_path)
    (tmp_path / "a.wav").write_bytes(b"nothing")
    with pytest.raises(PlaitError, match="can be read; the first: .*a.wav"):
        evaluate_audio(Companding(), tmp_path)
    for options, problem in (({"limit": 0}, "limit"), ({"visqol": -1}, "visqol"), ({"opus": 1}, "opus")):
        with pytest.raises(PlaitError, match=problem):
            evaluate_audio(Companding(), tmp_path, **options)  # type: ignore[arg-type]


def test_what_is_not_installed_is_left_out(mixed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(*_: object) -> float:
        raise PlaitError("STOI needs pystoi; pip install 'plait[audio]'")

    monkeypatch.setitem(module.SCORES, "stoi", missing)
    report, _ = evaluate_audio(Companding(), mixed, visqol=0, limit=2)
    assert report["audio"]["stoi"] is None
    assert report["audio"]["left_out"] == {"stoi": "STOI needs pystoi; pip install 'plait[audio]'"}
    assert "stoi" not in report["files"][0]


def test_opus_gives_back_aligned_sound(mixed: Path) -> None:
    speech = AudioProtocol().read(mixed / "a.flac", 16000, 1)
    fine, many = through_opus(speech, 16000, 64)
    coarse, few = through_opus(speech, 16000, 8)
    assert fine.shape == coarse.shape == speech.shape
    assert si_sdr(speech[None], fine[None]).item() > 15
    assert si_sdr(speech[None], fine[None]) > si_sdr(speech[None], coarse[None])
    seconds = speech.shape[1] / 16000
    assert few / seconds < 16000 < 40000 < many / seconds < 90000
    stereo = torch.cat([speech, speech.flip(1)])
    assert si_sdr(stereo[None], through_opus(stereo, 16000, 96)[0][None]).item() > 10
    report, _ = evaluate_audio(Companding(), mixed, visqol=0, opus=16, limit=1)
    assert report["opus"]["bits_per_second"] == pytest.approx(report["files"][0]["opus"]["bits"] / seconds)
    assert report["opus"]["pesq_wb"] < report["audio"]["pesq_wb"]


def test_the_report_says_what_it_is_of(tokenizer: AudioTokenizer, mixed: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    report, text = evaluate_audio_folder(
        tokenizer, "mine", mixed, out, AudioProtocol(), visqol=1, opus=6, keep=True
    )  # fmt: skip
    assert json.loads((out / "report.json").read_text()) == json.loads(json.dumps(report))
    assert report["tokenizer"]["fingerprint"] == tokenizer.fingerprint
    assert report["audio"]["visqol_items"] == 1
    assert "speech mode" in report["protocol"]["visqol"]
    assert "pystoi 0." in report["protocol"]["packages"]
    assert {path.name for path in out.iterdir()} == {"report.json", "sounds.png", "reconstructions"}
    for words in ("SI-SDR, dB", "Opus at 6k", "no value: SI-SDR, dB of 1 sound", "skipped: 1 files", "out/report.json"):
        assert words in text
    kept = sorted(str(path.relative_to(out)) for path in (out / "reconstructions").rglob("*.wav"))
    assert kept == [
        f"reconstructions/{name}" for name in ("a.flac.wav", "c.wav", "deep/b.flac.wav", "silent.wav")
    ]  # fmt: skip
    samples = read_sound(mixed / "a.flac", sample_rate=16000, channels=1).samples
    expected = tokenizer.decode(tokenizer.encode(samples[None]))[0].clamp(-1, 1)
    kept_sound = read_sound(out / "reconstructions" / "a.flac.wav")
    assert kept_sound.sample_rate == 16000
    torch.testing.assert_close(kept_sound.samples, expected, atol=1e-4, rtol=0)
    # Another decoder has the same codes, and other figures.
    other = copy.deepcopy(tokenizer)
    next(p for name, p in other.named_parameters() if name.startswith("decoder.")).data += 0.5
    changed, _ = evaluate_audio_folder(other, "other", mixed, tmp_path / "out2", AudioProtocol(), visqol=0)
    assert changed["tokenizer"]["fingerprint"] == report["tokenizer"]["fingerprint"]
    assert changed["tokenizer"]["weights"] != report["tokenizer"]["weights"]
    assert changed["audio"]["codebooks"] == report["audio"]["codebooks"]
    with pytest.raises(PlaitError, match="device: nowhere cannot be used"):
        evaluate_audio_folder(tokenizer, "mine", mixed, tmp_path, AudioProtocol(), device="nowhere")


def test_a_table_shows_ranges_and_what_has_no_value() -> None:
    book = {"codes": 4, "used": 0.5, "perplexity": 2.0, "dead": 2}
    audio = dict.fromkeys(module.SCORES, 0.25) | {
        "items": 3, "seconds": 6.0, "shortest": 1.0, "longest": 3.5, "visqol": None, "visqol_items": 0,
        "bits_per_second": 12345.6, "codes_per_second": 50.0, "codebooks": [book, book | {"dead": 1}],
        "encode_speed": 2.0, "decode_speed": 3.0, "no_value": {"pesq_wb": 2}, "left_out": {"visqol": "not there"},
    }  # fmt: skip
    report = {
        "tokenizer": {"name": "x", "fingerprint": "0" * 64, "codebook_sizes": [4, 4], "sample_rate": 16000,
                      "samples_per_code": 320},
        "protocol": {"length": "l", "rate": "r"}, "computed_on": "cpu", "data": {"skipped": []}, "audio": audio,
        "opus": None,
    }  # fmt: skip
    lines = audio_table(report).splitlines()
    assert any(line.split()[:5] == ["dead", "codes", "1", "to", "2"] for line in lines)
    assert any(line.split()[:2] == ["ViSQOL", "–"] for line in lines)
    assert any("12,346" in line for line in lines)
    assert {"3 sounds of 1 to 3.5 seconds", "no value: PESQ, wide band of 2 sounds", "left out: not there"} < set(lines)


# Sheets


def test_a_spectrogram_shows_tones_where_they_are() -> None:
    time = torch.arange(16000) / 16000
    low, high = (torch.sin(2 * torch.pi * hertz * time)[None] for hertz in (500, 4000))
    sheet = np.asarray(spectrogram_sheet([low], [high], 16000, columns=1, names=["one"], notes=["two"])).astype(int)
    left, top = 18 + 40, 18 + 22
    upper, lower = sheet[top : top + 128, left : left + 560], sheet[top + 132 : top + 260, left : left + 560]
    rows = [int(picture[:, 100:460].sum((1, 2)).argmax()) for picture in (upper, lower)]
    for row, hertz in zip(rows, (500, 4000), strict=True):
        share = dict(sheets._hertz_ticks(16000))[hertz]
        assert abs(row - (1 - share) * 128) < 4
    assert upper[:20, 100:460].mean() < 20  # nothing up there


def test_sheets_take_sounds_of_any_length_and_silence() -> None:
    sounds = [torch.zeros(1, 5), torch.zeros(2, 1000), torch.rand(1, 200_000) - 0.5]
    sheet = spectrogram_sheet(sounds, sounds, 16000)
    assert (sheet.width, sheet.height) == (18 + 2 * 618, 18 + 2 * 324)
    assert sheet.getpixel((300, 100)) == (0, 0, 4)


# The command line


def test_the_command_reports(
    plait: Callable[..., CompletedProcess[str]], tokenizer: AudioTokenizer, tmp_path: Path
) -> None:
    tokenizer.save_pretrained(tmp_path / "tok")
    done = plait(
        "tokenizer", "eval", tmp_path / "tok", SPEECH, "-o", tmp_path / "out", "--limit", 2, "--visqol", 0,
        "--seconds", 0.7, "--json",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert report["audio"]["items"] == 2
    assert report["audio"]["longest"] <= 0.7
    assert Image.open(tmp_path / "out" / "sounds.png").width > 1000


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        (["tok", "gone"], "gone: no such folder"),
        (["tok", "."], "holds no sound that can be read"),
        (["tok", ".", "--size", "64"], "--size: is for images and clips, and tok is of sound"),
        (["tok", ".", "--seconds", "0"], "seconds: is 0"),
        (["tok", ".", "--codebooks", "3"], "n_codebooks: is 3, this tokenizer has 1"),
        (["tok", ".", "--modality", "image"], "is of kind audio, it has no image"),
    ],
)
def test_what_the_user_can_mend_is_one_line(
    tmp_path: Path,
    tokenizer: AudioTokenizer,
    arguments: list[str],
    problem: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    tokenizer.save_pretrained(tmp_path / "tok")
    if "--codebooks" in arguments:
        shutil.copy(next(SPEECH.rglob("*.flac")), tmp_path / "a.flac")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["plait", "tokenizer", "eval", *arguments])
    with pytest.raises(SystemExit) as stop:
        main()
    said = capsys.readouterr()
    assert stop.value.code == 2
    assert problem in said.err
    assert said.err.count("\n") == 1
    assert said.out == ""
