from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from plait.errors import PlaitError
from plait.infer.document import Document, read_file, read_parts
from plait.tokenizers.base import write_file
from plait.tokenizers.media import Audio, Video


@pytest.fixture
def png(tmp_path: Path, picture: Image.Image) -> Path:
    picture.save(tmp_path / "photo.PNG")
    return tmp_path / "photo.PNG"


def test_parts_of_every_kind(tmp_path: Path, png: Path, picture: Image.Image) -> None:
    note = tmp_path / "note.txt"
    note.write_text("näh", "utf-8")
    sound, film = Audio(torch.zeros(1, 4), 8000), Video(torch.zeros(1, 2, 2, 3, dtype=torch.uint8), 4.0)
    nested = Document([note, Document([png, "inner"]), Document()])
    found = list(read_parts(["photo.PNG", nested, picture, sound, film]))
    assert [modality for modality, _ in found] == ["text", "text", "image", "text", "image", "audio", "video"]
    assert found[0][1] == "photo.PNG"  # a str is text, whatever it looks like
    assert found[1][1] == "näh"
    assert np.array_equal(np.asarray(found[2][1]), np.asarray(picture))
    assert found[5][1] is sound
    assert found[6][1] is film


def test_documents_iterate_over_their_parts() -> None:
    assert list(Document(["a", 1])) == ["a", 1]
    assert Document().parts is not Document().parts


def test_an_image_is_the_same_from_memory_and_from_its_file(emoji: Path) -> None:
    path = next(emoji.glob("noto/*.png"))
    with Image.open(path) as image:
        assert image.mode == "RGBA"
        (_, memory), (_, file) = read_parts([image, path])
    assert memory.mode == file.mode == "RGB"
    assert np.array_equal(np.asarray(memory), np.asarray(file))
    assert np.asarray(memory)[0, 0].tolist() == [255, 255, 255]


def test_transparent_pictures_lie_on_white() -> None:
    ((_, image),) = read_parts([Image.new("RGBA", (2, 2), (0, 0, 0, 0))])
    assert np.asarray(image).min() == 255


@pytest.mark.parametrize("part", [b"bytes", 3, None, ["a"]])
def test_unknown_parts(part: object) -> None:
    with pytest.raises(PlaitError, match=f"^part: {type(part).__name__} is no str"):
        list(read_parts([part]))


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("gone.png", None, "no such file"),
        ("gone.txt", None, "no such file"),
        ("gone.wav", None, "no such file"),
        ("sound.wav", b"RIFF", "no sound|cut off|broken sound"),
        ("sound.flac", b"", "is empty"),
        ("film.mp4", b"", "video is not supported; supported are text, image, audio"),
        ("table.csv", b"", "names no known medium"),
        ("README", b"", "names no known medium"),
        ("broken.png", b"\x89PNG\r\n\x1a\n", "not an image|broken image"),
        ("empty.jpg", b"", "not an image|broken image"),
        ("latin.txt", b"\xe4", "not UTF-8"),
    ],
)
def test_files_that_cannot_be_read_are_named(tmp_path: Path, name: str, data: bytes | None, message: str) -> None:
    if data is not None:
        (tmp_path / name).write_bytes(data)
    with pytest.raises(PlaitError, match=message) as raised:
        read_file(tmp_path / name)
    assert str(tmp_path / name) in str(raised.value)
    assert "\n" not in str(raised.value)


def test_a_folder_is_no_file(tmp_path: Path) -> None:
    (tmp_path / "x.png").mkdir()
    with pytest.raises(PlaitError, match=r"x\.png: cannot be read"):
        read_file(tmp_path / "x.png")


def test_save_writes_markdown_and_media(tmp_path: Path, picture: Image.Image, png: Path) -> None:
    document = Document(["a *red* apple", picture, Document([png, "the end\n"])])
    written = document.save(str(tmp_path / "deep" / "out"))
    assert written == tmp_path / "deep" / "out" / "document.md"
    assert written.read_text("utf-8") == "a *red* apple\n\n![image](002.png)\n\n![image](003.png)\n\nthe end\n\n"
    assert sorted(p.name for p in written.parent.iterdir()) == ["002.png", "003.png", "document.md"]
    with Image.open(written.parent / "002.png") as image:
        assert np.array_equal(np.asarray(image), np.asarray(picture))


def test_an_empty_document_is_an_empty_file(tmp_path: Path) -> None:
    assert Document().save(tmp_path / "out").read_text() == "\n"


def test_save_where_a_file_is(tmp_path: Path) -> None:
    (tmp_path / "out").write_text("mine")
    with pytest.raises(PlaitError, match=r"out: cannot make this folder \(File exists\)"):
        Document(["a"]).save(tmp_path / "out")
    assert (tmp_path / "out").read_text() == "mine"


def test_write_file_replaces_and_leaves_nothing_else(tmp_path: Path) -> None:
    write_file(tmp_path / "a.txt", b"one")
    write_file(tmp_path / "a.txt", b"two")
    assert [(p.name, p.read_bytes()) for p in tmp_path.iterdir()] == [("a.txt", b"two")]


@pytest.mark.parametrize("name", ["missing/a.txt", "file/a.txt", "x" * 250 + ".txt", "folder"])
def test_what_cannot_be_written_is_named(tmp_path: Path, name: str) -> None:
    (tmp_path / "file").write_text("")
    (tmp_path / "folder").mkdir()
    with pytest.raises(PlaitError, match="cannot be written") as raised:
        write_file(tmp_path / name, b"data")
    assert str(raised.value).startswith(str(tmp_path / name))
    assert not list(tmp_path.rglob("*.tmp"))
