"""Sound the whole way, small: files → shards → codes → decoder → sound, in one codebook and in two.

The audio tokenizers are untrained: what is tested is that everything fits together.
"""

import json
import math
from collections.abc import Callable
from pathlib import Path
from subprocess import CompletedProcess
from typing import Any

import pytest
import torch

import plait as package
from plait.errors import PlaitError
from plait.infer.bundle import save_bundle
from plait.infer.command import generate_files
from plait.infer.document import Document
from plait.infer.pipeline import AudioChunk, Finished, Model, load
from plait.model.config import DecoderConfig
from plait.model.decoder import Decoder
from plait.tokenizers.audio import AudioConfig, AudioTokenizer, HalfConfig
from plait.tokenizers.grammar import Grammar, Span
from plait.tokenizers.loading import load_tokenizers
from plait.tokenizers.media import Audio
from plait.tokenizers.quantizer import QuantizerConfig
from plait.tokenizers.snac import SNACConfig, SNACTokenizer
from plait.tokenizers.sound import read_sound, to_samples, write_sound
from plait.tokenizers.text import TextTokenizer
from plait.tokenizers.vocabulary import Vocabulary
from plait.train.decoder_loop import build_vocabulary
from plait.train.documents import unpack_document
from plait.train.inspect import inspect
from plait.train.pack import pack
from plait.train.recipe import DecoderRecipe
from plait.train.shards import read_manifest, read_samples
from plait.train.tokenize import tokenize

RATE, FACTOR = 8000, 80
HALF = HalfConfig(widths=(4, 8, 8), strides=(8, 10), blocks=(0, 1, 0))
QUANTIZERS = {
    "fsq": QuantizerConfig(levels=(5, 5)),
    "rvq": QuantizerConfig(kind="rvq", codebook_size=16, dim=4, codebooks=2),
}
# How a run is called: its tokenizer and its layout.
RUNS = {"fsq": ("fsq", "flatten"), "rvq": ("rvq", "delay")}
TONES = {"low.wav": 200, "middle.flac": 400, "high.mp3": 800, "deep/higher.ogg": 1600}


def tone(pitch: float, seconds: float, rate: int = RATE) -> Audio:
    times = torch.arange(round(seconds * rate)) / rate
    return Audio(0.5 * torch.sin(2 * math.pi * pitch * times)[None], rate)


def audio_tokenizer(name: str) -> AudioTokenizer:
    torch.manual_seed(0)
    config = AudioConfig(sample_rate=RATE, encoder=HALF, decoder=HALF, quantizer=QUANTIZERS[name])
    tokenizer = AudioTokenizer(config).eval().requires_grad_(False)
    tokenizer.encoder[-1].weight *= 30  # else nearly all latents of random weights have one code
    return tokenizer


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four captioned sounds of four formats, at rates that are not the tokenizer's, and one that is broken."""
    folder = tmp_path_factory.mktemp("files")
    for i, (name, pitch) in enumerate(TONES.items()):
        path = folder / name
        path.parent.mkdir(exist_ok=True)
        write_sound(tone(pitch, 0.3 + 0.1 * i, 16000), path)
        path.with_suffix(".txt").write_text(f"a {path.stem} tone")
    (folder / "broken.wav").write_bytes((folder / "low.wav").read_bytes()[:100])
    return folder


@pytest.fixture(scope="module")
def raw(files: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("raw") / "shards"
    report = pack(files, folder)
    assert (report.samples, report.skipped) == (5, [])
    return folder


@pytest.fixture(scope="module", params=RUNS)
def run(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def folders(run: str, text_tokenizer: TextTokenizer, raw: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with ``toks`` (tokenizers) and ``tokens`` (shards)."""
    folder = tmp_path_factory.mktemp(run)
    text_tokenizer.save_pretrained(folder / "toks" / "text")
    audio_tokenizer(RUNS[run][0]).save_pretrained(folder / "toks" / "audio")
    report = tokenize(raw, folder / "tokens", str(folder / "toks"), workers=1)
    assert report.samples == 4
    (line,) = report.skipped
    assert "broken (audio)" in line
    return folder


def recipe(folders: Path, run: str) -> DecoderRecipe:
    return DecoderRecipe([str(folders / "tokens")], str(folders / "toks"), "nowhere", layouts={"audio": RUNS[run][1]})


def test_codes_in_shards_are_those_of_direct_encoding(run: str, folders: Path, files: Path) -> None:
    tokenizer = load_tokenizers(folders / "toks")["audio"]
    assert read_manifest(folders / "tokens")["tokenizers"]["audio"] == tokenizer.fingerprint
    found = {}
    for sample in read_samples(folders / "tokens"):
        text, sound = unpack_document(sample).spans
        assert (text.modality, sound.modality) == ("text", "audio")
        found[sample["__key__"]] = sound.codes
    assert found.keys() == {name.rpartition(".")[0] for name in TONES}
    for name in TONES:
        codes = found[name.rpartition(".")[0]]
        samples = to_samples(read_sound(files / name), RATE, 1)
        assert torch.equal(codes, tokenizer.encode(samples).codes[0])
        assert codes.shape[-1] == -(-samples.shape[-1] // FACTOR)
        assert codes.ndim == (1 if run == "fsq" else 2)


def test_inspect_says_how_much_sound_there_is(run: str, folders: Path, raw: Path, tmp_path: Path) -> None:
    before, text = inspect(raw, tmp_path / "sheet.png", None)
    assert before["media"] == {"text": 4, "audio": 4}
    assert before["sizes"] == {"16000 Hz, 1 channel": 3, "48000 Hz, 1 channel": 1}  # Opus is always of 48 kHz
    assert before["seconds"]["total"] == pytest.approx(0.3 + 0.4 + 0.5 + 0.6, abs=0.1)  # MP3 is padded
    assert len(before["broken"]) == 1
    assert "sound     0.0 minutes, median 0." in text
    after, _ = inspect(folders / "tokens", tmp_path / "sheet.png", str(folders / "toks"))
    assert after["media"] == {"text": 4, "audio": 4}
    assert after["sizes"] == {f"{1 if run == 'fsq' else 2} × … codes": 4}
    assert after["seconds"]["total"] == pytest.approx(before["seconds"]["total"], abs=4 * FACTOR / RATE)
    blind, _ = inspect(folders / "tokens", tmp_path / "sheet.png", None)
    assert "seconds" not in blind


def test_documents_of_the_shards_come_back_from_their_ids(run: str, folders: Path) -> None:
    vocabulary = build_vocabulary(recipe(folders, run))
    assert vocabulary.modalities["audio"].layout == {"fsq": "flatten", "rvq": "delay:0,1"}[run]
    grammar = Grammar(vocabulary)
    for sample in read_samples(folders / "tokens"):
        spans = unpack_document(sample).spans
        found = grammar.parse(grammar.document(spans))
        assert all(torch.equal(a.codes, b.codes) for a, b in zip(spans, found, strict=True))


def test_all_codebooks_at_once_are_refused(run: str, folders: Path) -> None:
    wanted = recipe(folders, run)
    wanted.layouts = {"audio": "parallel"}
    if run == "fsq":  # one codebook is one stream, whatever it is called
        assert build_vocabulary(wanted).modalities["audio"].layout == "flatten"
        return
    with pytest.raises(PlaitError, match=r"^layout: parallel predicts 2 codes at once, plait's decoder one") as raised:
        build_vocabulary(wanted)
    assert "\n" not in str(raised.value)


@pytest.fixture(scope="module")
def bundle(run: str, folders: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An untrained bundle of text and sound."""
    folder = tmp_path_factory.mktemp("bundle") / "bundle"
    vocabulary = build_vocabulary(recipe(folders, run))
    torch.manual_seed(0)
    config = DecoderConfig(vocabulary_size=vocabulary.size, width=32, layers=2, heads=4, kv_heads=2)
    weights = Decoder(config).state_dict()
    save_bundle(folder, config, weights, vocabulary, folders / "toks", {}, 256, torch.float32)
    return folder


@pytest.fixture(scope="module")
def model(bundle: Path) -> Model:
    return load(bundle)


def header(model: Model, request: Any) -> int:
    """Steps of the sound that a request's tokens claim."""
    form = model.grammar.form("audio")
    (at,) = [i for i, token in enumerate(request.prompt + request.tokens) if token == form.begin]
    high, low = (token - form.numbers.start for token in (request.prompt + request.tokens)[at + 1 : at + 3])
    return 1024 * high + low


@pytest.mark.parametrize("limit", [8, 60, None])
def test_generated_sound_is_as_long_as_its_header_says(
    model: Model, monkeypatch: pytest.MonkeyPatch, limit: int | None
) -> None:
    from plait.infer import pipeline

    seen: list[Any] = []
    generate = pipeline.generate
    monkeypatch.setattr(
        pipeline, "generate", lambda decoder, requests: (seen.extend(requests), generate(decoder, requests))[1]
    )
    for sound in model.generate("a low tone", to="audio", n=5, seed=1, max_tokens=limit):
        request = seen.pop(0)
        assert isinstance(sound, Audio)
        assert sound.sample_rate == RATE
        assert sound.samples.dtype == torch.float32
        assert sound.samples.shape == (1, header(model, request) * FACTOR)
        assert sound.samples.abs().max() <= 1
        assert limit is None or len(request.tokens) <= limit


def test_prompts_hold_sound_from_memory_and_from_files(model: Model, tmp_path: Path) -> None:
    sound = tone(300, 0.4, 11025)
    write_sound(sound, tmp_path / "a.wav")
    stereo = Audio(sound.samples.repeat(2, 1), sound.sample_rate)
    settings: dict[str, Any] = {"to": "text", "seed": 0, "max_tokens": 20}
    piece, of_stereo = model.prompter.read([sound, stereo])
    assert torch.equal(of_stereo.content, piece.content)
    assert model.generate(stereo, "what is it?", **settings) == model.generate(sound, "what is it?", **settings)
    assert isinstance(model.generate(tmp_path / "a.wav", "what is it?", **settings), str)
    score = model.score("a tone", target=sound)
    assert len(score.per_token) == model.grammar.length(Span("audio", piece.content)) - 1
    assert score.total < 0


def test_streamed_sound_adds_up(model: Model) -> None:
    lengths = []
    for seed in range(6):
        *chunks, last = model.stream("a low tone", to="audio", seed=seed, max_tokens=200)
        assert isinstance(last, Finished)
        assert all(isinstance(chunk, AudioChunk) and chunk.audio.sample_rate == RATE for chunk in chunks)
        (sound,) = last.document.parts
        joined = torch.cat([chunk.audio.samples for chunk in chunks], -1)
        assert joined.shape == sound.samples.shape
        assert torch.allclose(joined, sound.samples, atol=1e-5)
        assert torch.equal(model.generate("a low tone", to="audio", seed=seed, max_tokens=200).samples, sound.samples)
        lengths.append(len(chunks))
    assert max(lengths) > 1


def test_streamed_documents_hold_their_sounds(model: Model) -> None:
    sounds = 0
    for seed in range(6):
        *events, last = model.stream("hello", to="interleaved", seed=seed, max_tokens=150)
        assert isinstance(last, Finished)
        parts = [part.samples for part in last.document if isinstance(part, Audio)]
        chunks = [event.audio.samples for event in events if isinstance(event, AudioChunk)]
        assert sum(p.shape[-1] for p in parts) == sum(c.shape[-1] for c in chunks)
        assert not parts or torch.allclose(torch.cat(parts, -1), torch.cat(chunks, -1), atol=1e-5)
        text = "".join(event.text for event in events if hasattr(event, "text"))
        assert text == "".join(part for part in last.document if isinstance(part, str))
        sounds += len(parts)
    assert sounds > 1


def test_files_are_written(bundle: Path, files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    settings: dict[str, Any] = {"max_tokens": 60}
    arguments = [str(files / "middle.flac"), "higher"]
    assert generate_files(arguments, "audio", None, str(bundle), 0, None, False, settings) == ["out.wav"]
    sound = read_sound(tmp_path / "out.wav")
    expected = load(bundle).generate(files / "middle.flac", "higher", to="audio", seed=0, n=1, **settings)[0]
    assert sound.sample_rate == RATE
    assert (sound.samples - expected.samples).abs().max() < 1e-4
    with pytest.raises(PlaitError, match=r"x\.mp3: audio is written as \.wav"):
        generate_files(arguments, "audio", Path("x.mp3"), str(bundle), 0, None, False, settings)


def test_documents_are_saved_with_their_sounds(tmp_path: Path) -> None:
    written = Document(["a tone", tone(300, 0.1)]).save(tmp_path / "out")
    assert written.read_text() == "a tone\n\n![audio](002.wav)\n"
    assert (read_sound(tmp_path / "out" / "002.wav").samples - tone(300, 0.1).samples).abs().max() < 1e-4


@pytest.mark.slow
def test_a_decoder_learns_from_sound(
    run: str, folders: Path, plait: Callable[..., CompletedProcess[str]], tmp_path: Path
) -> None:
    done = plait(
        "train", "tiny/decoder", f"shards=[{folders / 'tokens'}]", f"tokenizers={folders / 'toks'}", "out=run",
        f"layouts.audio={RUNS[run][1]}", "model.width=32", "model.layers=2", "steps=12", "save_every=12", "log_every=1",
        "streams=1",
        "optimizer.warmup_steps=2", "optimizer.lr=1e-2", "sequence.length=256", cwd=tmp_path, DS_ACCELERATOR="cpu",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert rows[-1]["loss"] < rows[0]["loss"] - 0.5
    assert any("audio" in name for name in rows[-1])
    model = package.load(tmp_path / "run" / "bundle")
    assert model.modalities == ["text", "audio"]
    sound = model.generate("a low tone", to="audio", seed=0)
    assert sound.samples.shape[-1] % FACTOR == 0
    assert isinstance(model.generate(sound, to="text", seed=0, max_tokens=10), str)


def test_levels_of_different_rates_go_the_same_way(text_tokenizer: TextTokenizer, tmp_path: Path) -> None:
    """SNAC's codes are a stream already, whose order the vocabulary takes from the tokenizer."""
    torch.manual_seed(0)
    config = SNACConfig(
        sample_rate=RATE, width=4, strides=(2, 4), decoder_width=16, codebook_size=16, code_dim=4, window=0
    )
    snac = SNACTokenizer(config).eval().requires_grad_(False)
    text_tokenizer.save_pretrained(tmp_path / "toks" / "text")
    snac.save_pretrained(tmp_path / "toks" / "audio")
    vocabulary = Vocabulary.build(load_tokenizers(tmp_path / "toks"), ["text", "audio"])
    assert vocabulary.modalities["audio"].layout == "interleave:4,2,1"
    decoder = DecoderConfig(vocabulary_size=vocabulary.size, width=32, layers=2, heads=4, kv_heads=2)
    folder = tmp_path / "bundle"
    save_bundle(folder, decoder, Decoder(decoder).state_dict(), vocabulary, tmp_path / "toks", {}, 256, torch.float32)
    model = load(folder)
    *chunks, last = model.stream(tone(300, 0.1), to="audio", seed=0, max_tokens=100)
    assert isinstance(last, Finished)
    (sound,) = last.document.parts
    assert sound.samples.shape[-1] % snac.factor == 0
    joined = torch.cat([chunk.audio.samples for chunk in chunks if isinstance(chunk, AudioChunk)], -1)
    assert torch.allclose(joined, sound.samples, atol=1e-5)
