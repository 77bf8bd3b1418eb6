"""`plait generate`, mostly in this process; a few runs in one of their own show the real exit codes and streams."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from plait.errors import PlaitError
from plait.infer.command import output_paths, parse_part
from plait.infer.pipeline import load

Run = Callable[..., Any]


@pytest.fixture
def png(tmp_path: Path, picture: Image.Image) -> Path:
    picture.save(tmp_path / "photo.png")
    return tmp_path / "photo.png"


def failed(ran: Any, *words: str) -> None:
    """Exit code 2, one line on stderr, nothing on stdout."""
    assert ran.code == 2
    assert ran.out == ""
    assert ran.err.startswith("plait: ")
    assert ran.err.count("\n") == 1
    assert all(word in ran.err for word in words), ran.err


# --- in a process of its own


@pytest.mark.slow
def test_text_to_images_in_its_own_process(plait: Run, bundle: Path, tmp_path: Path) -> None:
    options = ["--to", "image", "--model", bundle, "--seed", 4, "--max-tokens", 30]
    done = plait("generate", "a red", "apple", *options, "-n", 2, "-o", "made.png", "--json", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1]) == {"files": ["made-1.png", "made-2.png"]}
    expected = load(bundle).generate("a red", "apple", to="image", seed=4, max_tokens=30)
    with Image.open(tmp_path / "made-1.png") as image:
        assert image.format == "PNG"
        assert image.size == expected.size
    assert not (tmp_path / "made.png").exists()


@pytest.mark.slow
def test_image_to_text_in_its_own_process(plait: Run, bundle: Path, emoji: Path, tmp_path: Path) -> None:
    path = sorted(emoji.glob("noto/*.png"))[0]
    done = plait("generate", path, "what is it?", "--to", "text", "--model", bundle, "--seed", 1, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    expected = load(bundle).generate(path, "what is it?", to="text", seed=1)
    assert done.stdout.replace("\r", "\n") == expected.replace("\r\n", "\n").replace("\r", "\n") + "\n"
    assert list(tmp_path.glob("*.txt")) == []


@pytest.mark.slow
def test_a_missing_file_in_its_own_process(plait: Run, bundle: Path) -> None:
    done = plait("generate", "gone.png", "--to", "text", "--model", bundle)
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr == "plait: gone.png: no such file (a part that ends in .png is a file)\n"


# --- in this process


def test_text_goes_to_stdout_or_a_file(main: Run, bundle: Path, tmp_path: Path) -> None:
    options = ["generate", "moon", "--to", "text", "--model", bundle, "--seed", 3, "--max-tokens", 20]
    text = load(bundle).generate("moon", to="text", seed=3, max_tokens=20)
    assert main(*options) == (0, text + "\n", "")
    ran = main(*options, "-o", tmp_path / "a.txt")
    assert ran == (0, f"wrote {tmp_path / 'a.txt'}\n", "")
    assert (tmp_path / "a.txt").read_bytes().decode() == text


@pytest.mark.parametrize("to", ["text", "interleaved"])
def test_streaming_prints_the_same_text(
    main: Run, bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, to: str
) -> None:
    monkeypatch.chdir(tmp_path)
    options = ["generate", "moon", "--to", to, "--model", bundle, "--seed", 3, "--max-tokens", 40, "--json"]
    plain, streamed = main(*options), main(*options, "--stream")
    assert plain.code == streamed.code == 0
    if to == "text":
        text = json.loads(plain.out)["text"][0]
        assert streamed.out == f"{text}\n{plain.out}"
    else:
        assert streamed.out.endswith("\n" + plain.out)
        assert (tmp_path / "out" / "document.md").is_file()


def test_streaming_several_still_prints_them(main: Run, bundle: Path) -> None:
    options = ["generate", "moon", "--to", "text", "--model", bundle, "--seed", 3, "--max-tokens", 20, "-n", 2]
    plain = main(*options)
    assert len(plain.out) > 2
    assert main(*options, "--stream") == plain


def test_json_is_the_last_line_whatever_the_text_holds(main: Run, bundle: Path) -> None:
    options = ["generate", "a", "--to", "text", "--model", bundle, "--temperature", 9, "--json"]
    for seed in range(4):
        ran = main(*options, "--seed", seed, "-n", 2)
        texts = json.loads(ran.out)["text"]
        assert ran.out.count("\n") == 1
        assert texts == load(bundle).generate("a", to="text", seed=seed, n=2, temperature=9.0)


def test_files_are_numbered_with_n_only(main: Run, bundle: Path, tmp_path: Path) -> None:
    options = ["generate", "a", "--to", "image", "--model", bundle, "--seed", 0, "--max-tokens", 12]
    assert main(*options, "-o", tmp_path / "x.png").code == 0
    assert main(*options, "-o", tmp_path / "y.png", "-n", 1).code == 0
    assert main(*options, "-o", tmp_path / "z.PNG", "-n", 2).code == 0
    assert sorted(p.name for p in tmp_path.iterdir() if p.is_file()) == ["x.png", "y-1.png", "z-1.png", "z-2.png"]


def test_settings_reach_the_model(main: Run, bundle: Path, png: Path) -> None:
    settings = {"temperature": 3.0, "top_k": 40, "top_p": 0.8, "guidance": 2.0, "max_tokens": 15}
    flags = [f"--{name.replace('_', '-')}={value}" for name, value in settings.items()]
    ran = main("generate", "what", png, "--to", "text", "--model", bundle, "--seed", 5, "--json", *flags)
    expected = load(bundle).generate("what", png, to="text", seed=5, **settings)
    assert json.loads(ran.out) == {"text": [expected]}


def test_interleaved_is_a_folder(main: Run, bundle: Path, tmp_path: Path) -> None:
    options = ["generate", "a", "--to", "interleaved", "--model", bundle, "--max-tokens", 60, "--seed", 2]
    ran = main(*options, "-o", tmp_path / "doc", "-n", 2)
    assert ran.code == 0
    assert all((tmp_path / name / "document.md").is_file() for name in ("doc-1", "doc-2"))
    failed(main(*options, "-o", tmp_path / "doc.md"), "doc.md", "folder")
    (tmp_path / "taken").write_text("")
    failed(main(*options, "-o", tmp_path / "taken"), "taken", "cannot make this folder")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["a", "--to", "image", "-o", "x.jpg"], ["x.jpg", "image is written as .png"]),
        (["a", "--to", "image", "-o", "x"], ["image is written as .png"]),
        (["a", "--to", "text", "-o", "x.png"], ["x.png", "text is written as .txt"]),
        (["a", "--to", "image", "-o", "no/where/x.png"], ["no/where", "does not exist"]),
        (["a", "--to", "sound"], ["--to sound", "expected text, image, audio, video or interleaved"]),
        (["a", "--to", "audio"], ["--to audio", "has no audio; it has text, image"]),
        (["gone.webp", "--to", "text"], ["gone.webp: no such file"]),
        (["gone.mp3", "--to", "text"], ["gone.mp3: no such file"]),
        ([".", "--to", "text"], [".: is a folder"]),
        (["", "--to", "text"], ["PART: is empty"]),
        (["a", "--to", "text", "-n", "0"], ["n: 0"]),
        (["a", "--to", "image", "-n", "-2"], ["n: -2"]),
        (["a", "--to", "text", "--temperature", "-1"], ["temperature: -1"]),
        (["a", "--to", "text", "--top-p", "nan"], ["top_p: nan"]),
        (["a", "--to", "text", "--max-tokens", "0"], ["max_tokens"]),
        (["a" * 400, "--to", "text"], ["shorten the prompt"]),
        ([b"\xff".decode(errors="surrogateescape"), "--to", "text"], ["surrogate"]),
        (["a", "--to", "text", "--model", "plait-huge"], ["plait-huge: no such path"]),
    ],
)
def test_bad_input_is_one_line(
    main: Run, bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str], words: list[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    model = [] if "--model" in arguments else ["--model", bundle]
    failed(main("generate", *arguments, *model), *words)
    assert [p.name for p in tmp_path.iterdir() if p != bundle] in ([], ["tokenizers"])


def test_a_damaged_bundle_is_one_line(main: Run, bundle: Path) -> None:
    (bundle / "config.json").write_text("{")
    failed(main("generate", "a", "--to", "text", "--model", bundle), "config.json")


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        (["generate", "a", "--to", "text", "--colour", "red"], "--colour"),
        (["generate", "a"], "--to"),
        (["generate", "--to", "text"], "PART"),
        (["generate", "a", "--to", "text", "-n", "many"], "-n"),
        (["eval", "bundle", "data", "--items", "0"], "--items"),
        (["no-such-command"], "no-such-command"),
        (["data", "no-such-command"], "no-such-command"),
        (["demo", "extra"], "extra"),
    ],
)
def test_wrong_usage_is_one_line(main: Run, arguments: list[str], word: str) -> None:
    failed(main(*arguments), word)


def test_the_output_is_checked_before_anything_is_generated(
    main: Run, bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(*_: Any, **__: Any) -> None:
        raise AssertionError("generated")

    monkeypatch.setattr("plait.infer.pipeline.generate", never)
    failed(main("generate", "a", "--to", "image", "--model", bundle, "-o", "x.gif"), "x.gif")


def test_the_launchers_argument_is_ignored(main: Run, bundle: Path) -> None:
    options = ["generate", "a", "--to", "text", "--model", bundle, "--seed", 0, "--max-tokens", 5]
    assert main("--local_rank=0", *options) == main(*options)


def test_parts(tmp_path: Path, png: Path) -> None:
    assert parse_part(str(png)) == png
    for text in ("a red apple", "what.is it", "x" * 5000, "nul\0", "Mr. Bean", ".png"):
        assert parse_part(text) == text
    for name in ("gone.png", "folder/gone.JPG", "gone.txt", "gone.mp4", "two words.png"):
        with pytest.raises(PlaitError, match="no such file"):
            parse_part(name)
    for name, message in ((str(tmp_path), "is a folder; name a file"), ("", "is empty")):
        with pytest.raises(PlaitError, match=message):
            parse_part(name)


def test_output_paths(tmp_path: Path) -> None:
    assert output_paths(None, "text", None) is None
    assert output_paths(None, "text", 3) is None
    assert output_paths(None, "image", None) == [Path("out.png")]
    assert output_paths(None, "interleaved", 2) == [Path("out-1"), Path("out-2")]
    assert output_paths(tmp_path / "a.b.png", "image", 2) == [tmp_path / "a.b-1.png", tmp_path / "a.b-2.png"]
    assert output_paths(Path("x.TXT"), "text", None) == [Path("x.TXT")]
