import hashlib
import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import webdataset

from plait.errors import PlaitError
from plait.train.pack import PackReport, pack
from plait.train.shards import read_manifest, read_samples


def put(folder: Path, **files: str | bytes) -> Path:
    """Write files; ``__`` in a name stands for a dot, ``_in_`` for a slash."""
    for name, content in files.items():
        path = folder / name.replace("_in_", "/").replace("__", ".")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return folder


def lines(folder: Path, *rows: Any) -> Path:
    folder.mkdir(exist_ok=True, parents=True)
    text = "\n".join(row if isinstance(row, str) else json.dumps(row, ensure_ascii=False) for row in rows)
    (folder / "manifest.jsonl").write_text(text + "\n", "utf-8")
    return folder


def packed(source: Path, per_shard: int = 2000) -> tuple[dict[str, dict[str, bytes]], PackReport]:
    out = source.parent / "out"
    report = pack(source, out, per_shard)
    samples = {
        sample["__key__"]: {k: v for k, v in sample.items() if not k.startswith("__")} for sample in read_samples(out)
    }
    assert len(samples) == report.samples
    return samples, report


def test_files_that_share_a_stem(tmp_path: Path) -> None:
    source = put(
        tmp_path / "in", rabbit__png=b"P", rabbit__txt="hop", rabbit__json="{}", cat_in_rabbit__png=b"Q",
        cat_in_deep_in_x__TXT="far", readme__md="no",
    )  # fmt: skip
    samples, report = packed(source)
    assert samples == {
        "rabbit": {"png": b"P", "txt": b"hop", "json": b"{}"},
        "cat/rabbit": {"png": b"Q"},
        "cat/deep/x": {"txt": b"far"},
    }
    assert (report.samples, report.shards, report.skipped) == (3, 1, [])


def test_one_medium_of_a_kind_counts(tmp_path: Path) -> None:
    source = put(tmp_path / "in", a__webp=b"W", a__jpg=b"J", a__png=b"P", a__wav=b"S", b__PNG=b"1", b__png=b"2")
    samples, report = packed(source)
    assert samples == {"a": {"png": b"P", "wav": b"S"}, "b": {"png": b"1"}}
    assert [line.split(": ") for line in report.skipped] == [
        [str(source / "a.jpg"), "a.png is this sample's image; rename one of them"],
        [str(source / "a.webp"), "a.png is this sample's image; rename one of them"],
        [str(source / "b.png"), "b.PNG is this sample's image; rename one of them"],
    ]


def test_all_media_of_listed_parts_count(tmp_path: Path) -> None:
    parts = json.dumps({"parts": [{"image": "png"}, {"image": "jpg"}]})
    samples, report = packed(put(tmp_path / "in", a__png=b"P", a__jpg=b"J", a__json=parts))
    assert samples["a"] == {"png": b"P", "jpg": b"J", "json": parts.encode()}
    assert report.skipped == []


def test_the_manifest_has_the_hash_of_each_shard(emoji: Path, tmp_path: Path) -> None:
    pack(emoji, tmp_path / "out", 30)
    for row in read_manifest(tmp_path / "out")["shards"]:
        assert row["sha256"] == hashlib.sha256((tmp_path / "out" / row["name"]).read_bytes()).hexdigest()


def test_dots_in_names(tmp_path: Path) -> None:
    source = put(tmp_path / "in", a__b__png=b"1", a__b__txt="one", a_b__png=b"2", v1__0_in_c__png=b"3")
    samples, _ = packed(source)
    assert sorted(samples.values(), key=lambda s: s["png"]) == [
        {"png": b"1", "txt": b"one"},
        {"png": b"2"},
        {"png": b"3"},
    ]
    assert not any("." in key for key in samples)


def test_hidden_files_are_left_out(tmp_path: Path) -> None:
    source = put(tmp_path / "in", a__txt="x", __b__txt="x", __git_in_c__txt="x", d_in___DS__txt="x")
    assert list(packed(source)[0]) == ["a"]


def test_hidden_parent_does_not_hide_all(tmp_path: Path) -> None:
    assert list(packed(put(tmp_path / ".cache" / "in", a__txt="x"))[0]) == ["a"]


def test_manifest_lines(tmp_path: Path) -> None:
    source = put(tmp_path / "in", a_in_x__png=b"P", y__JPG=b"J")
    lines(
        source,
        {"path": "a/x.png", "caption": "a cat, «é»", "license": "CC0", "source": "ü"},
        {"text": "only text"},
        "",
        {"path": "y.JPG"},
        {"path": "a/x.png", "caption": "again"},
    )
    samples, report = packed(source)
    assert samples["a/x"]["png"] == b"P"
    assert samples["a/x"]["txt"] == "a cat, «é»".encode()
    assert json.loads(samples["a/x"]["json"]) == {"license": "CC0", "source": "ü"}
    assert samples["line-00000002"] == {"txt": b"only text"}
    assert samples["y"] == {"jpg": b"J"}
    assert samples["a/x-2"] == {"png": b"P", "txt": b"again"}
    assert report.skipped == []


def test_manifest_skips_and_names(tmp_path: Path) -> None:
    (tmp_path / "secret.txt").write_text("secret")
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "link.txt").symlink_to(tmp_path / "secret.txt")
    source = put(tmp_path / "in", ok__txt="ok", notes__md="x")
    lines(
        source, {"path": "ok.txt"}, {"path": "gone.png", "caption": "c"}, {"path": "../secret.txt"},
        {"path": str(tmp_path / "secret.txt")}, {"path": "link.txt"}, {"path": "notes.md"}, {"license": "CC0"},
        {"path": ""}, {"path": "."}, {"caption": ""},
    )  # fmt: skip
    samples, report = packed(source)
    assert samples == {"ok": {"txt": b"ok"}}
    assert [line.split(": ")[0].rsplit(":", 1)[1] for line in report.skipped] == [str(n) for n in range(2, 11)]
    assert "gone.png does not exist" in report.skipped[0]
    assert all("lies outside" in line for line in report.skipped[1:4])
    assert "notes.md is not a known media file" in report.skipped[4]


@pytest.mark.parametrize("broken", ["{", "[1]", "5", '{"path": "a.png"} x', "nope"])
def test_broken_manifest_line_is_named_with_its_number(tmp_path: Path, broken: str) -> None:
    source = lines(tmp_path / "in", {"text": "fine"}, "", broken)
    with pytest.raises(PlaitError, match=r"manifest\.jsonl:3: "):
        pack(source, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_manifest_that_is_not_utf_8(tmp_path: Path) -> None:
    source = lines(tmp_path / "in", {"text": "fine"})
    with (source / "manifest.jsonl").open("ab") as file:
        file.write('{"text": "é"}\n'.encode("latin-1"))
    with pytest.raises(PlaitError, match=r"manifest\.jsonl:2: "):
        pack(source, tmp_path / "out")


def test_captions_may_hold_unicode_line_separators(tmp_path: Path) -> None:
    text = "one\u2028two\u2029three\x85four"
    samples, _ = packed(lines(tmp_path / "in", {"text": text}, {"text": "last"}))
    assert samples["line-00000001"]["txt"].decode() == text
    assert len(samples) == 2


def test_windows_line_ends(tmp_path: Path) -> None:
    source = tmp_path / "in"
    source.mkdir()
    (source / "manifest.jsonl").write_bytes(b'{"text": "a"}\r\n\r\n{"text": "b"}\r\n')
    assert {s["txt"] for s in packed(source)[0].values()} == {b"a", b"b"}


def test_same_bytes_every_time(emoji: Path, tmp_path: Path) -> None:
    digests = []
    for name in ("a", "b"):
        pack(emoji, tmp_path / name, 25)
        files = sorted(p for p in (tmp_path / name).glob("*") if p.is_file())
        digests.append({p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in files})
    assert digests[0] == digests[1]
    assert {"shard-000000.tar", "shard-000001.tar", "shard-000002.tar", "manifest.json"} <= set(digests[0])
    assert "shard-000003.tar" not in digests[0]


def test_order_mixes_folders(emoji: Path, tmp_path: Path) -> None:
    pack(emoji, tmp_path / "out", 60)
    styles = [sample["__key__"].split("/")[0] for sample in read_samples(tmp_path / "out")]
    changes = sum(a != b for a, b in pairwise(styles))
    assert changes > 20


def test_plain_webdataset_reads_the_shards(emoji: Path, tmp_path: Path) -> None:
    pack(emoji, tmp_path / "out", 30)
    rows = {json.loads(line)["path"]: json.loads(line) for line in (emoji / "manifest.jsonl").read_text().splitlines()}
    dataset = webdataset.WebDataset(str(tmp_path / "out" / "shard-{000000..000001}.tar"), shardshuffle=False)
    seen = 0
    for sample in dataset.decode("pil"):
        row = rows[sample["__key__"] + ".png"]
        assert sample["txt"] == row["caption"]
        assert sample["json"]["license"] == row["license"]
        assert sample["png"].size[0] > 0
        seen += 1
    assert seen == 60


def test_refuses_a_folder_that_has_shards(emoji: Path, tmp_path: Path) -> None:
    pack(emoji, tmp_path / "out", 30)
    before = (tmp_path / "out" / "shard-000000.tar").read_bytes()
    with pytest.raises(PlaitError, match="holds shards already"):
        pack(emoji, tmp_path / "out", 60)
    assert (tmp_path / "out" / "shard-000000.tar").read_bytes() == before


def test_nothing_to_pack(tmp_path: Path) -> None:
    with pytest.raises(PlaitError, match="nowhere: no such folder"):
        pack(tmp_path / "nowhere", tmp_path / "out")
    (tmp_path / "in").mkdir()
    with pytest.raises(PlaitError, match="in: nothing to pack"):
        pack(tmp_path / "in", tmp_path / "out")
    lines(tmp_path / "in", {"path": "gone.png"})
    with pytest.raises(PlaitError, match="in: nothing to pack"):
        pack(tmp_path / "in", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_unreadable_file_is_named_not_the_shard(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = put(tmp_path / "in", a__txt="x", b__txt="y")
    read = Path.read_bytes

    def deny(path: Path) -> bytes:
        if path.name == "b.txt":
            raise PermissionError(13, "Permission denied", str(path))
        return read(path)

    monkeypatch.setattr(Path, "read_bytes", deny)
    with pytest.raises(PlaitError, match=r"b\.txt: cannot be read \(Permission denied\)"):
        pack(source, tmp_path / "out")
    assert not list((tmp_path / "out").glob("*.tar"))


def test_command_counts_and_names(plait: Any, tmp_path: Path) -> None:
    source = lines(tmp_path / "in", {"text": "fine"}, {"path": "gone.png"})
    done = plait("data", "pack", source, "-o", tmp_path / "out", "--json")
    assert done.returncode == 0, done.stderr
    facts = json.loads(done.stdout.splitlines()[-1])
    assert (facts["samples"], facts["shards"]) == (1, 1)
    assert "manifest.jsonl:2: gone.png does not exist" in done.stderr
    (tmp_path / "file").write_text("")
    done = plait("data", "pack", source, "-o", tmp_path / "file")
    assert done.returncode == 2
    assert done.stderr.splitlines() == [done.stderr.strip()]
    assert "cannot make this folder" in done.stderr


def test_a_teachers_latents_go_with_their_sound(tmp_path: Path) -> None:
    for folder in ("stems", "listed"):
        (tmp_path / folder).mkdir()
        for name in ("a.wav", "a.npy"):
            (tmp_path / folder / name).write_bytes(name.encode())
    (tmp_path / "stems" / "b.npy").write_bytes(b"of nothing")
    (tmp_path / "listed" / "manifest.jsonl").write_text('{"path": "a.wav", "text": "hello"}\n')
    report = pack(tmp_path / "stems", tmp_path / "1")
    assert report.samples == 1
    assert len(report.skipped) == 1
    assert "b.npy" in report.skipped[0]
    assert pack(tmp_path / "listed", tmp_path / "2").samples == 1
    for out in ("1", "2"):
        (sample,) = read_samples(tmp_path / out)
        assert sample["npy"] == b"a.npy"
