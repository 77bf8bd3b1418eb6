import argparse
import io
import json
import math
import os
import pickle
import shutil
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from types import ModuleType
from typing import Any, ClassVar

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save, save_file
from torch import Tensor, nn

from plait.errors import PlaitError
from plait.tokenizers import foreign
from plait.tokenizers.foreign import Layout, convert, load_foreign, read_checkpoint, weight_files
from plait.tokenizers.network import NetworkTokenizer
from plait.tokenizers.pixels import Cache, PixelTokenizer
from plait.tokenizers.quantizer import FiniteScalarQuantizer

pytestmark = [
    pytest.mark.filterwarnings("ignore:Detected pickle protocol:UserWarning"),
    pytest.mark.filterwarnings("ignore:Validating sparse tensor:UserWarning"),
]


@dataclass(frozen=True)
class TinyConfig:
    width: int = 2
    name: str = ""


class Tiny(PixelTokenizer):
    """One matrix each way, and a counter."""

    architecture: ClassVar[str] = "tiny"
    config_class: ClassVar[type] = TinyConfig
    counter: Tensor

    def __init__(self, config: TinyConfig) -> None:
        super().__init__()
        self.config = config
        self.encoder = nn.Linear(3, config.width)
        self.decoder = nn.Linear(config.width, 3)
        self.quantizer = FiniteScalarQuantizer((5,) * config.width)
        self.register_buffer("counter", torch.zeros((), dtype=torch.int64))

    @property
    def factor(self) -> int:
        return 1

    def to_latents(self, pixels: Tensor, cache: Cache | None = None) -> Tensor:
        return self.encoder(pixels.movedim(1, -1)).movedim(-1, 1)

    def from_latents(self, z: Tensor, cache: Cache | None = None, frames: int | None = None) -> Tensor:
        return self.decoder(z.movedim(1, -1)).movedim(-1, 1)


def configure(tensors: Mapping[str, Tensor], config: dict[str, Any]) -> TinyConfig:
    width = tensors["enc.weight"].shape[0]
    if width > 5:
        raise PlaitError("is too wide")
    return TinyConfig(width, config.get("name", config["_name_or_path"]))


def rename(tensors: dict[str, Tensor], config: TinyConfig) -> dict[str, Tensor]:
    kept = {name: tensor for name, tensor in tensors.items() if not name.startswith("loss.")}
    return {name.replace("enc.", "encoder.").replace("dec.", "decoder."): tensor for name, tensor in kept.items()}


TINY = Layout("tiny", f"{__name__}:Tiny", lambda tensors, config: "enc.weight" in tensors, configure, rename)


@pytest.fixture(autouse=True)
def only_tiny(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.function is not test_every_network_lists_its_layouts:
        monkeypatch.setattr(foreign, "known_layouts", lambda: [TINY])


@pytest.fixture
def tensors() -> dict[str, Tensor]:
    return make_tensors()


def make_tensors() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {
        "enc.weight": torch.randn(2, 3, generator=generator),
        "enc.bias": torch.randn(2, generator=generator),
        "dec.weight": torch.randn(3, 2, generator=generator),
        "dec.bias": torch.randn(3, generator=generator),
        "counter": torch.tensor(7),
    }


def assert_one_line(error: pytest.ExceptionInfo[PlaitError], path: Path) -> None:
    assert str(error.value).startswith(str(path))
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < len(str(path)) + 450


# One file


@pytest.mark.parametrize("suffix", [".safetensors", ".pt", ".pth", ".ckpt", ".bin"])
@pytest.mark.parametrize("as_safetensors", [True, False])
def test_a_file_is_read_whatever_its_suffix(
    tensors: dict[str, Tensor], tmp_path: Path, suffix: str, as_safetensors: bool
) -> None:
    path = tmp_path / f"weights{suffix}"
    save_file(tensors, path) if as_safetensors else torch.save(tensors, path)
    loaded = load_foreign(path)
    assert isinstance(loaded, Tiny)
    assert loaded.config == TinyConfig(2, "weights")
    assert not loaded.training
    assert not any(weight.requires_grad for weight in loaded.parameters())
    assert torch.equal(loaded.encoder.weight, tensors["enc.weight"])
    assert torch.equal(loaded.decoder.bias, tensors["dec.bias"])
    assert loaded.counter == 7
    assert loaded.encode(torch.zeros(1, 3, 2, 2)).codes.shape == (1, 2, 2)


def test_other_files_are_not_checkpoints(tensors: dict[str, Tensor], tmp_path: Path) -> None:
    save_file(tensors, tmp_path / "weights.gguf")
    for path in (tmp_path / "weights.gguf", tmp_path / "missing.pt", tmp_path / "missing", tmp_path):
        assert load_foreign(path) is None


@pytest.mark.parametrize(
    "wrap",
    [
        lambda t, other: t,
        lambda t, other: {"state_dict": t, "epoch": 3, "lr": [0.1]},
        lambda t, other: {"model": t, "optimizer": {"state": {0: other}}},
        lambda t, other: {"model": other, "ema": t, "steps": 3},
        lambda t, other: {"model": t, "ema": {}},
        lambda t, other: {"model": t, "ema": None},
        lambda t, other: {"model": {"state_dict": t}},
        lambda t, other: {"state_dict": nn.ParameterDict({}).state_dict() | t},
        lambda t, other: {"model": t, "args": argparse.Namespace(lr=1e-4, betas=(0.9, 0.95), name="vq")},
    ],
)
def test_a_training_checkpoint_is_unwrapped(
    tensors: dict[str, Tensor], tmp_path: Path, wrap: Callable[[dict[str, Tensor], dict[str, Tensor]], Any]
) -> None:
    torch.save(wrap(tensors, {name: tensor + 1 for name, tensor in tensors.items()}), tmp_path / "last.ckpt")
    read = read_checkpoint(tmp_path / "last.ckpt")
    assert read.keys() == tensors.keys()
    assert all(torch.equal(read[name], tensor) for name, tensor in tensors.items())


def circular() -> dict[str, Any]:
    content: dict[str, Any] = {}
    content["model"] = content
    return content


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([torch.zeros(1)], "holds a list, expected a dictionary of tensors"),
        (torch.zeros(1), "holds a Tensor, expected"),
        (argparse.Namespace(model={}), "holds a Namespace, expected"),
        ({}, "holds no tensors"),
        ({"state_dict": {"epoch": 3}}, "holds no tensors"),
        (circular(), "holds no tensors"),
    ],
)
def test_a_file_without_tensors_is_refused(tmp_path: Path, content: Any, message: str) -> None:
    path = tmp_path / "weights.pt"
    torch.save(content, path)
    with pytest.raises(PlaitError, match=message) as raised:
        read_checkpoint(path)
    assert_one_line(raised, path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "not a readable checkpoint"),
        (b"{}", "not a readable checkpoint"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "is a Git LFS pointer, .* `git lfs pull`"),
        (b"<html>404 Not Found</html>", "not a readable checkpoint"),
        (b"PK\3\4" + bytes(60), "not a readable checkpoint"),
        (b"\xff" * 7 + b"\x7f{}", "not a readable checkpoint .*header too large"),
        (save({"a": torch.zeros(3)})[:-1], "not a readable checkpoint"),
        (save({"a": torch.zeros(3)}).replace(b"[3]", b"[9]"), "not a readable checkpoint"),
        (save({}), "holds no tensors"),
        (pickle.dumps({"a": 1}, 2), "not a readable checkpoint"),
    ],
)
@pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
def test_a_broken_file_is_refused(tmp_path: Path, content: bytes, message: str, suffix: str) -> None:
    path = tmp_path / f"weights{suffix}"
    path.write_bytes(content)
    with pytest.raises(PlaitError, match=message) as raised:
        load_foreign(path)
    assert_one_line(raised, path)


def as_torch_file(content: Any) -> bytes:
    buffer = io.BytesIO()
    torch.save(content, buffer)
    return buffer.getvalue()


@settings(deadline=None, max_examples=80)
@given(data=st.data())
def test_damage_anywhere_is_an_error_of_ours_or_harmless(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    whole = data.draw(st.sampled_from([save(make_tensors()), as_torch_file(make_tensors())]))
    cut = data.draw(st.integers(0, len(whole)))
    content = bytearray(whole[:cut] if data.draw(st.booleans()) else whole)
    for _ in range(data.draw(st.integers(0, 3)) if content else 0):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    path = tmp_path_factory.mktemp("damaged") / "weights.pt"
    path.write_bytes(content)
    message = f"{path}: loaded"
    try:
        assert isinstance(load_foreign(path), Tiny)
    except PlaitError as error:
        message = str(error)
    assert message.startswith(f"{path}: ")
    assert "\n" not in message


# Pickled objects


class Attack:
    """Makes a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("protocol", [0, 1, 2, 3, 4, 5])
@pytest.mark.parametrize("wrap", [lambda attack: attack, lambda attack: argparse.Namespace(x=attack)])
def test_no_pickle_runs(tmp_path: Path, protocol: int, wrap: Callable[[Attack], Any]) -> None:
    made = tmp_path / "made"
    content = {"state_dict": make_tensors(), "extra": wrap(Attack(made))}
    files = {
        "zip.pt": as_torch_file(content),
        "plain.pt": pickle.dumps(wrap(Attack(made)), protocol),
        "named.safetensors": pickle.dumps(wrap(Attack(made)), protocol),
    }
    old = io.BytesIO()
    torch.save(content, old, _use_new_zipfile_serialization=False, pickle_protocol=min(protocol, 2))
    files["old.ckpt"] = old.getvalue()
    for name, written in files.items():
        (tmp_path / name).write_bytes(written)
        with pytest.raises(
            PlaitError, match=r"holds Python objects besides tensors \((posix.mkdir|copyreg\S+)\)|not a readable"
        ):
            read_checkpoint(tmp_path / name)
    assert not made.exists()
    pickle.loads(files["plain.pt"])  # the attack is real
    assert made.exists()


def test_a_lightning_checkpoint_says_how_to_convert_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module = ModuleType("pytorch_lightning.callbacks.model_checkpoint")
    callback = type("ModelCheckpoint", (), {"__module__": module.__name__})
    module.ModelCheckpoint = callback  # type: ignore[attr-defined]
    for name in ("pytorch_lightning", "pytorch_lightning.callbacks"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    monkeypatch.setitem(sys.modules, module.__name__, module)
    path = tmp_path / "last.ckpt"
    torch.save({"state_dict": make_tensors(), "callbacks": {callback: {"best": 1.0}}}, path)
    with pytest.raises(
        PlaitError, match=r"\(pytorch_lightning\.callbacks\.model_checkpoint\.ModelCheckpoint\)"
    ) as raised:
        load_foreign(path)
    assert_one_line(raised, path)
    # What the message says to do, done.
    mend = str(raised.value).split("convert it: ")[1]
    monkeypatch.chdir(tmp_path)
    import safetensors.torch

    exec(mend, {"torch": torch, "safetensors": safetensors, "path": path})
    assert isinstance(load_foreign(tmp_path / "model.safetensors"), Tiny)


# Tensors


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64, torch.float8_e4m3fn])
def test_other_float_types_become_float32(tensors: dict[str, Tensor], tmp_path: Path, dtype: torch.dtype) -> None:
    stored = {name: tensor.to(dtype) if tensor.is_floating_point() else tensor for name, tensor in tensors.items()}
    save_file(stored, tmp_path / "model.safetensors")
    loaded = load_foreign(tmp_path)
    assert isinstance(loaded, Tiny)
    assert torch.equal(loaded.encoder.weight, stored["enc.weight"].float())
    assert loaded.counter.dtype == torch.int64


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda t: t.pop("dec.bias"), "tensor 'decoder.bias' is missing; not a whole tiny checkpoint"),
        (lambda t: t.update(more=torch.zeros(1)), "tensor 'more' is extra; not a whole tiny checkpoint"),
        (lambda t: t.update({"loss.x": torch.tensor(math.nan)}), ""),
        (lambda t: t.update({"dec.bias": torch.zeros(4)}), r"'decoder.bias' has shape \(4,\), expected \(3,\)"),
        (lambda t: t.update({"dec.bias": torch.zeros(())}), r"'decoder.bias' has shape \(\)"),
        (lambda t: t.update({"enc.weight": torch.zeros(())}), "not a tiny checkpoint after all"),
        (lambda t: t.update({"enc.weight": torch.zeros(6, 3)}), "is too wide"),
        (lambda t: t["dec.bias"].fill_(math.nan), "'decoder.bias' holds values that are not finite"),
        (lambda t: t["dec.bias"].fill_(-math.inf), "'decoder.bias' holds values that are not finite"),
        (lambda t: t.update({"dec.bias": torch.full((3,), 1e300, dtype=torch.float64)}), "not finite"),
        (lambda t: t.update({"dec.bias": torch.zeros(3, dtype=torch.int32)}), "'decoder.bias' is torch.int32"),
        (lambda t: t.update({"dec.bias": torch.zeros(3, dtype=torch.complex64)}), "'decoder.bias' is torch.complex64"),
        (lambda t: t.update(counter=torch.tensor(1.5)), "'counter' is torch.float32, expected torch.int64"),
        (lambda t: t.update({"dec.bias": torch.zeros(3).to_sparse()}), "'decoder.bias' is not a plain tensor"),
        (lambda t: t.update({"dec.bias": torch.zeros(3, device="meta")}), "'decoder.bias' is not a plain tensor"),
        (lambda t: t.update({"dec.bias": torch.zeros(1).expand(3)}), ""),
        (lambda t: t.update({"dec.bias": nn.Parameter(torch.zeros(3))}), ""),
    ],
)
def test_tensors_are_checked(tmp_path: Path, edit: Callable[[dict[str, Tensor]], Any], message: str) -> None:
    tensors = make_tensors()
    edit(tensors)
    path = tmp_path / "weights.pt"
    torch.save(tensors, path)
    if not message:
        assert isinstance(load_foreign(path), Tiny)
        return
    with pytest.raises(PlaitError, match=message) as raised:
        load_foreign(path)
    assert_one_line(raised, path)


def test_a_tensor_that_configure_needs_is_named(tensors: dict[str, Tensor]) -> None:
    del tensors["enc.weight"]
    with pytest.raises(PlaitError, match=r"^here: tensor 'enc\.weight' is missing; not a whole tiny checkpoint$"):
        convert(tensors, {"_name_or_path": ""}, TINY, "here")


def test_the_weights_are_free_of_the_file(tensors: dict[str, Tensor], tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    save_file(tensors, path)
    loaded = load_foreign(path)
    assert loaded is not None
    with path.open("r+b") as file:
        file.write(bytes(path.stat().st_size))
    assert torch.equal(loaded.state_dict()["encoder.weight"], tensors["enc.weight"])


# Folders


def write_shards(folder: Path, **shards: list[str]) -> None:
    tensors = make_tensors()
    for shard, names in shards.items():
        save_file({name: tensors[name] for name in names}, folder / f"{shard}.safetensors")
    weight_map = {name: f"{shard}.safetensors" for shard, names in shards.items() for name in names}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


def test_a_folder_is_read_with_its_configuration(tensors: dict[str, Tensor], tmp_path: Path) -> None:
    save_file(tensors, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text('{"name": "given", "_name_or_path": "elsewhere"}')
    for path in (tmp_path, tmp_path / "model.safetensors"):
        loaded = load_foreign(path)
        assert loaded is not None
        assert loaded.config.name == "given"
    (tmp_path / "config.json").write_text('{"_name_or_path": "elsewhere"}')
    loaded = load_foreign(tmp_path)
    assert loaded is not None
    assert loaded.config.name == "model"
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(PlaitError, match=r"config\.json: not readable as JSON"):
        load_foreign(tmp_path)


def test_safetensors_go_before_pickles(tensors: dict[str, Tensor], tmp_path: Path) -> None:
    save_file(tensors, tmp_path / "model.safetensors")
    torch.save({"x": Attack(tmp_path / "made")}, tmp_path / "pytorch_model.bin")
    assert weight_files(tmp_path) == [tmp_path / "model.safetensors"]
    assert isinstance(load_foreign(tmp_path), Tiny)


@pytest.mark.parametrize(
    "names", [("a.safetensors", "b.safetensors"), ("a.pt", "b.pt"), ("x.index.json", "y.index.json")]
)
def test_a_folder_with_two_candidates_asks_which(
    tensors: dict[str, Tensor], tmp_path: Path, names: tuple[str, str]
) -> None:
    write_shards(tmp_path, all=list(tensors))
    for name in names:
        if name.endswith(".json"):
            shutil.copy(
                tmp_path / "model.safetensors.index.json", tmp_path / name.replace("index", "safetensors.index")
            )
        else:
            shutil.copy(tmp_path / "all.safetensors", tmp_path / name)
    (tmp_path / "model.safetensors.index.json").unlink()
    if not names[0].endswith("safetensors"):
        (tmp_path / "all.safetensors").unlink()
    with pytest.raises(PlaitError, match=r"holds .* and .*; name the file to load") as raised:
        load_foreign(tmp_path)
    assert_one_line(raised, tmp_path)


def test_shards_are_joined(tmp_path: Path) -> None:
    write_shards(tmp_path, one=["enc.weight", "enc.bias"], two=["dec.weight", "dec.bias", "counter"])
    loaded = load_foreign(tmp_path)
    assert isinstance(loaded, Tiny)
    assert torch.equal(loaded.decoder.weight, make_tensors()["dec.weight"])
    (tmp_path / "two.safetensors").unlink()
    with pytest.raises(PlaitError, match=r"index\.json: names 'two\.safetensors', which is not in its folder"):
        load_foreign(tmp_path)


@pytest.mark.parametrize(
    "name",
    ["../outside.safetensors", "sub/inside.safetensors", "{root}/outside.safetensors", "..", ".", "", "a\0b", 3, None],
)
def test_an_index_reaches_no_other_folder(tensors: dict[str, Tensor], tmp_path: Path, name: Any) -> None:
    folder = tmp_path / "model"
    (folder / "sub").mkdir(parents=True)
    for file in (tmp_path / "outside.safetensors", folder / "sub" / "inside.safetensors"):
        save_file(tensors, file)
    name = name.replace("{root}", str(tmp_path)) if isinstance(name, str) else name
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"enc.weight": name}}))
    with pytest.raises(PlaitError, match=r"index\.json: names .*, which is not in its folder") as raised:
        load_foreign(folder)
    assert_one_line(raised, folder)


@pytest.mark.parametrize(
    "content", ["", "[]", "{}", '{"weight_map": {}}', '{"weight_map": ["a.safetensors"]}', '{"weight_map": "a"}']
)
def test_a_broken_index_is_refused(tmp_path: Path, content: str) -> None:
    (tmp_path / "model.safetensors.index.json").write_text(content)
    with pytest.raises(PlaitError, match=r"model\.safetensors\.index\.json: ") as raised:
        load_foreign(tmp_path)
    assert_one_line(raised, tmp_path)


# Layouts


def test_unknown_tensors_are_named_with_what_is_known(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    other = replace(TINY, name="other", recognise=lambda tensors, config: False)
    monkeypatch.setattr(foreign, "known_layouts", lambda: [TINY, other])
    path = tmp_path / "weights.pt"
    torch.save({"b": torch.zeros(1), "a\nb": torch.zeros(1), "c": torch.zeros(1)}, path)
    with pytest.raises(PlaitError, match=r"\('a\\nb', 'b', …\) are of no tokenizer .*; known: tiny, other$") as raised:
        load_foreign(path)
    assert_one_line(raised, path)


def test_the_first_layout_that_recognises_is_taken(
    tensors: dict[str, Tensor], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def always(tensors: Mapping[str, Tensor], config: dict[str, Any]) -> bool:
        return True

    second = replace(TINY, recognise=always, configure=lambda tensors, config: TinyConfig(2, "second"))
    monkeypatch.setattr(foreign, "known_layouts", lambda: [TINY, second])
    save_file(tensors, tmp_path / "model.safetensors")
    loaded = load_foreign(tmp_path)
    assert loaded is not None
    assert loaded.config.name == "model"


def test_every_network_lists_its_layouts() -> None:
    layouts = foreign.known_layouts()
    assert len({layout.name for layout in layouts}) == len(layouts) > 3
    for layout in layouts:
        module, name = layout.tokenizer.split(":")
        assert module in foreign._MODULES
        assert issubclass(getattr(sys.modules[module], name), NetworkTokenizer)
        assert not layout.recognise({}, {})
        assert not layout.recognise(make_tensors(), {"_name_or_path": "model"})
