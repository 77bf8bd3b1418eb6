import json
import os
import tarfile
from pathlib import Path
from typing import Any

import pytest

from plait.errors import PlaitError
from plait.train.pack import pack
from plait.train.shards import MANIFEST, read_manifest, read_samples, read_shard, shard_writer

SHARD = "shard-000001.tar"


@pytest.fixture
def folder(emoji: Path, tmp_path: Path) -> Path:
    pack(emoji, tmp_path / "shards", 20)
    return tmp_path / "shards"


def edit(folder: Path, **entries: Any) -> None:
    path = folder / MANIFEST
    path.write_text(json.dumps(json.loads(path.read_text()) | entries))


def test_whole_folder_reads(folder: Path) -> None:
    manifest = read_manifest(folder, "raw")
    assert [row["samples"] for row in manifest["shards"]] == [20, 20, 20]
    assert len({sample["__key__"] for sample in read_samples(folder)}) == 60


def test_missing_shard_is_named(folder: Path) -> None:
    (folder / SHARD).unlink()
    with pytest.raises(PlaitError, match=f"{SHARD}: shard is missing"):
        read_manifest(folder)
    with pytest.raises(PlaitError, match=f"{SHARD}: no such shard"):
        list(read_shard(folder / SHARD))


@pytest.mark.parametrize("change", [-1, 1, 10240])
def test_shard_of_another_size_is_named(folder: Path, change: int) -> None:
    data = (folder / SHARD).read_bytes()
    (folder / SHARD).write_bytes(data[:change] if change < 0 else data + bytes(change))
    with pytest.raises(PlaitError, match=f"{SHARD}: shard has {len(data) + change} bytes"):
        read_manifest(folder)


@pytest.mark.parametrize("member", [0, 10, -1])
def test_truncated_tar_is_named(folder: Path, member: int) -> None:
    with tarfile.open(folder / SHARD) as tar:
        inside = [row for row in tar if row.size > 600][member].offset_data + 520
    (folder / SHARD).write_bytes((folder / SHARD).read_bytes()[:inside])
    with pytest.raises(PlaitError) as caught:
        list(read_shard(folder / SHARD))
    assert SHARD in str(caught.value)
    assert "broken shard" in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("size", [0, 100])
def test_tar_cut_to_almost_nothing_is_named(folder: Path, size: int) -> None:
    (folder / SHARD).write_bytes((folder / SHARD).read_bytes()[:size])
    with pytest.raises(PlaitError, match=f"{SHARD}: broken shard"):
        list(read_shard(folder / SHARD))


def test_what_is_no_tar_is_named(folder: Path) -> None:
    (folder / SHARD).write_bytes(b"no tar at all " * 1000)
    with pytest.raises(PlaitError, match=f"{SHARD}: broken shard"):
        list(read_shard(folder / SHARD))


def test_folder_or_manifest_missing(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(PlaitError, match="nowhere: no such folder"):
        read_manifest(tmp_path / "nowhere")
    (folder / MANIFEST).unlink()
    with pytest.raises(PlaitError, match=f"{folder}: has no {MANIFEST}"):
        read_manifest(folder)


def test_other_kind_says_which_command_to_use(folder: Path) -> None:
    with pytest.raises(PlaitError, match=r"holds raw shards, expected tokens shards.*plait data tokenize"):
        read_manifest(folder, "tokens")


@pytest.mark.parametrize("version", [99, None, "x"])
def test_other_format_version(folder: Path, version: object) -> None:
    edit(folder, format_version=version)
    with pytest.raises(PlaitError, match=rf"{MANIFEST}: format_version is {version!r}"):
        read_manifest(folder)


@pytest.mark.parametrize("shards", [None, 5, [1], [{"name": SHARD}], [{"bytes": 3}]])
def test_manifest_without_rows(folder: Path, shards: object) -> None:
    edit(folder, shards=shards)
    with pytest.raises(PlaitError, match=f"{MANIFEST}: lists no shards"):
        read_manifest(folder)


@pytest.mark.parametrize("text", ["", "{", "[]", '"x"'])
def test_manifest_that_is_no_object(folder: Path, text: str) -> None:
    (folder / MANIFEST).write_text(text)
    with pytest.raises(PlaitError, match=MANIFEST):
        read_manifest(folder)


def fail(path: Path, error: BaseException) -> None:
    with shard_writer(path) as write:
        write({"__key__": "a", "txt": b"hello"})
        raise error


def write_one(path: Path, size: int) -> None:
    with shard_writer(path) as write:
        write({"__key__": "a", "bin": bytes(size)})


@pytest.mark.parametrize("error", [RuntimeError("stop"), PlaitError("stop"), KeyboardInterrupt()])
def test_failing_writer_leaves_nothing(tmp_path: Path, error: BaseException) -> None:
    with pytest.raises(type(error)):
        fail(tmp_path / SHARD, error)
    assert list(tmp_path.iterdir()) == []


def test_failing_writer_keeps_the_old_shard(tmp_path: Path) -> None:
    (tmp_path / SHARD).write_bytes(b"old")
    with pytest.raises(RuntimeError):
        fail(tmp_path / SHARD, RuntimeError())
    assert (tmp_path / SHARD).read_bytes() == b"old"


@pytest.mark.parametrize("size", [10, 1 << 20])
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_full_disk(tmp_path: Path, size: int) -> None:
    if not Path("/dev/full").exists():
        pytest.skip("needs /dev/full")
    # The writer's temporary file leads to a device that is always full.
    (tmp_path / f".{SHARD}.{os.getpid()}.tmp").symlink_to("/dev/full")
    with pytest.raises(PlaitError, match=rf"{SHARD}: cannot write \(No space left on device\)"):
        write_one(tmp_path / SHARD, size)
    assert list(tmp_path.iterdir()) == []


def test_bytes_depend_on_the_samples_alone(tmp_path: Path) -> None:
    contents = []
    for name in ("a.tar", "b.tar"):
        with shard_writer(tmp_path / name) as write:
            write({"__key__": "x/ü", "txt": b"hello", "json": b"{}"})
        contents.append((tmp_path / name).read_bytes())
    assert contents[0] == contents[1]
    (sample,) = read_shard(tmp_path / "a.tar")
    assert (sample["__key__"], sample["txt"], sample["json"]) == ("x/ü", b"hello", b"{}")


@pytest.mark.parametrize("name", ["sp ace", "ha#sh", "q?x", "br{a,b}", "a:b", "x::y", "ü", "per%20"])
def test_any_folder_name_works(emoji: Path, tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    pack(emoji, Path(name), 60)
    assert sum(1 for _ in read_samples(Path(name))) == 60
