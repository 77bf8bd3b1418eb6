from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from plait.errors import PlaitError
from plait.tokenizers.base import Codes, check_codes, make_folder, read_json, tensors_fingerprint, write_json

FULL = Codes(
    codes=torch.arange(24).reshape(2, 12),
    modality="audio",
    size=(12000,),
    lengths=torch.tensor([12, 7]),
    sample_rate=24000,
    fps=12.5,
    scale=torch.tensor([0.25, 1.5]),
    fingerprint="abc",
)


def same(a: Codes, b: Codes) -> bool:
    left, right = vars(a), vars(b)
    return left.keys() == right.keys() and all(
        torch.equal(x, right[k]) and x.dtype == right[k].dtype if isinstance(x, torch.Tensor) else x == right[k]
        for k, x in left.items()
    )


@pytest.mark.parametrize(
    "codes",
    [
        FULL,
        Codes(torch.tensor([[[3]]]), "image"),
        Codes(torch.arange(60).reshape(3, 4, 5).transpose(1, 2), "image", size=(33, 40), fingerprint="é"),
        Codes(torch.zeros(1, 2, 3, 4, dtype=torch.int64), "video", size=(2, 17, 30), fps=23.976),
    ],
    ids=["audio", "bare", "transposed", "video"],
)
def test_codes_saved_and_loaded_are_the_same(tmp_path: Path, codes: Codes) -> None:
    codes.save(tmp_path / "codes.safetensors")
    loaded = Codes.load(tmp_path / "codes.safetensors")
    assert same(loaded, codes)
    assert isinstance(loaded.size, tuple) or loaded.size is None


@pytest.mark.parametrize("damage", ["missing", "empty", "truncated", "text", "folder"])
def test_a_broken_codes_file_is_refused(tmp_path: Path, damage: str) -> None:
    path = tmp_path / "codes.safetensors"
    FULL.save(path)
    content = path.read_bytes()
    path.unlink()
    if damage == "folder":
        path.mkdir()
    elif damage != "missing":
        path.write_bytes({"empty": b"", "truncated": content[:-9], "text": b"not a tensor" * 9}[damage])
    with pytest.raises(PlaitError, match=r"codes\.safetensors: not a readable codes file") as raised:
        Codes.load(path)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        (None, "holds no plait codes"),
        ({"format": "pt"}, "holds no plait codes"),
        ({"plait": '{"modality": "image"}'}, "format_version is None"),
        ({"plait": '{"modality": "image"}', "format_version": "2"}, "format_version is '2'"),
        ({"plait": "{", "format_version": "1"}, "broken metadata"),
        ({"plait": "[]", "format_version": "1"}, "broken metadata"),
        ({"plait": "[" * 100_000, "format_version": "1"}, "broken metadata"),
        ({"plait": "{}", "format_version": "1"}, "broken metadata"),
        ({"plait": '{"modality": "image", "x": 1}', "format_version": "1"}, "broken metadata"),
        ({"plait": '{"modality": "image", "size": 3}', "format_version": "1"}, "broken metadata"),
    ],
)
def test_foreign_safetensors_are_refused(tmp_path: Path, metadata: dict[str, str] | None, message: str) -> None:
    save_file({"codes": torch.zeros(1, 2, 2, dtype=torch.int64)}, tmp_path / "codes", metadata=metadata)
    with pytest.raises(PlaitError, match=message):
        Codes.load(tmp_path / "codes")


def test_codes_files_hold_codes_and_nothing_unknown(tmp_path: Path) -> None:
    metadata = {"plait": '{"modality": "image"}', "format_version": "1"}
    for tensors in ({"weights": torch.zeros(2)}, {"codes": torch.zeros(1, 2, 2), "weights": torch.zeros(2)}):
        save_file(tensors, tmp_path / "codes", metadata=metadata)
        with pytest.raises(PlaitError):
            Codes.load(tmp_path / "codes")


def test_saving_where_nothing_can_be_written_says_so(tmp_path: Path) -> None:
    with pytest.raises(PlaitError, match="nowhere"):
        FULL.save(tmp_path / "nowhere" / "codes.safetensors")


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8])
def test_codes_of_every_integer_type_pass(dtype: torch.dtype) -> None:
    check_codes(torch.tensor([0, 59], dtype=dtype), 60)
    with pytest.raises(PlaitError, match=r"^here: found 0\.\.60, .* 0\.\.59"):
        check_codes(torch.tensor([0, 60], dtype=dtype), 60, "here")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.bool, torch.complex64, torch.uint16])
def test_codes_of_other_types_are_refused(dtype: torch.dtype) -> None:
    with pytest.raises(PlaitError, match=rf"^codes: dtype is {dtype}"):
        check_codes(torch.tensor([0, 1]).to(dtype), 60)


def test_negative_codes_are_refused_and_no_codes_pass() -> None:
    with pytest.raises(PlaitError, match=r"found -1\.\.3"):
        check_codes(torch.tensor([3, -1]), 60)
    check_codes(torch.tensor([]), 60)


def test_the_fingerprint_sees_names_shapes_values_and_settings() -> None:
    tensors = {"a": torch.arange(6.0).reshape(2, 3), "b": torch.zeros(2)}
    variants: list[tuple[dict[str, Any], dict[str, torch.Tensor]]] = [
        ({"x": 1}, tensors),
        ({"x": 2}, tensors),
        ({"x": 1}, {**tensors, "a": tensors["a"].reshape(3, 2)}),
        ({"x": 1}, {**tensors, "a": tensors["a"] + 1e-6}),
        ({"x": 1}, {"c": tensors["a"], "b": tensors["b"]}),
        ({"x": 1}, {"a": tensors["a"]}),
    ]
    assert len({tensors_fingerprint(*variant) for variant in variants}) == len(variants)


def test_the_fingerprint_ignores_order_layout_and_storage_type() -> None:
    a, b = torch.randn(4, 3).bfloat16(), torch.zeros(2)
    expected = tensors_fingerprint({"x": 1, "y": 2}, {"a": a, "b": b})
    assert tensors_fingerprint({"y": 2, "x": 1}, {"b": b, "a": a.float().T.contiguous().T}) == expected


def test_json_is_written_whole(tmp_path: Path) -> None:
    write_json(tmp_path / "a.json", {"é": [1, 2]})
    with pytest.raises(TypeError):
        write_json(tmp_path / "a.json", {"x": object()})
    assert read_json(tmp_path / "a.json") == {"é": [1, 2]}
    assert [path.name for path in tmp_path.iterdir()] == ["a.json"]


@pytest.mark.parametrize("content", [b"", b"{", b"[1]", b"3", b"\xff\xfe", b"[" * 100_000])
def test_what_is_no_json_object_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "a.json").write_bytes(content)
    with pytest.raises(PlaitError, match=r"a\.json: "):
        read_json(tmp_path / "a.json")


def test_a_missing_json_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(PlaitError, match=r"a\.json: no such file"):
        read_json(tmp_path / "a.json")


def test_file_in_the_way_of_a_folder(tmp_path: Path, text_tokenizer: Any, visual_tokenizer: Any) -> None:
    (tmp_path / "file").write_text("")
    for path in (tmp_path / "file", tmp_path / "file" / "below"):
        for use in (make_folder, text_tokenizer.save_pretrained, visual_tokenizer.save_pretrained):
            with pytest.raises(PlaitError, match=f"{path}: cannot make this folder"):
                use(path)


def test_half_of_a_surrogate_pair_goes_through_json(tmp_path: Path) -> None:
    content = {"a": "\ud800 Ü", "b": "plain"}
    write_json(tmp_path / "a.json", content)
    assert read_json(tmp_path / "a.json") == content
    assert "Ü" in (tmp_path / "a.json").read_text("utf-8")
