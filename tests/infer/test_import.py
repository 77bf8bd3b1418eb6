"""Released layouts of decoders become bundles with the same logits."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import foreign_checkpoints as foreign
import pytest
import torch
from foreign_checkpoints import chameleon, save_meta, to_meta
from foreign_models import emu3_tokenizer
from safetensors.torch import load_file, save_file
from torch import Tensor

from plait.errors import PlaitError
from plait.infer import import_checkpoint as module
from plait.infer import shards
from plait.infer.bundle import load_bundle
from plait.infer.foreign_checkpoint import open_checkpoint
from plait.infer.import_checkpoint import import_checkpoint

YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 16}
LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 16,
    "low_freq_factor": 1.0, "high_freq_factor": 4.0,
}  # fmt: skip
DYNAMIC = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 4.0}
CASES: list[tuple[str, dict[str, Any]]] = [
    ("llama", {}),
    ("llama", {"num_key_value_heads": 4, "tie_word_embeddings": True}),
    ("llama", {"num_key_value_heads": 1, "rope_parameters": LLAMA3, "head_dim": 12}),
    ("llama", {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e6, "factor": 3.0}}),
    ("mistral", {"sliding_window": 9, "head_dim": 6}),
    ("qwen2", {"rope_parameters": YARN}),
    ("qwen2", {"tie_word_embeddings": True, "use_sliding_window": True, "sliding_window": 7, "max_window_layers": 0}),
    ("qwen3", {"head_dim": 16, "rope_parameters": YARN | {"attention_factor": 1.3, "beta_fast": 8.0}}),
    ("qwen3", {"head_dim": 4, "tie_word_embeddings": True, "num_key_value_heads": 4}),
    ("emu3-text", {"rms_norm_eps": 1e-2}),
    ("emu3", {"rope_parameters": DYNAMIC, "max_position_embeddings": 20}),
    ("chameleon", {"num_key_value_heads": 4}),
    ("chameleon", {"swin_norm": True, "rope_parameters": DYNAMIC, "max_position_embeddings": 20}),
]


def tokens() -> Tensor:
    return torch.randint(61, (2, 40))


@torch.no_grad()
def ours(bundle: Path, tokens: Tensor) -> Tensor:
    return load_bundle(bundle).decoder(tokens, torch.arange(tokens.shape[1]).expand_as(tokens))


def agree(model: Any, bundle: Path) -> None:
    ids = tokens()
    expected = foreign.logits(model, ids)
    assert expected.std() > 0.5  # a comparison of near-zero logits would prove nothing
    torch.testing.assert_close(ours(bundle, ids), expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize(("kind", "fields"), CASES, ids=str)
def test_logits_are_transformers(kind: str, fields: dict[str, Any], tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = foreign.build(kind, **fields)
    facts = import_checkpoint(foreign.save(model, tmp_path / "src"), tmp_path / "bundle")
    assert facts["family"] == {"emu3-text": "emu3"}.get(kind, kind if kind in ("emu3", "chameleon") else "text")
    agree(model, tmp_path / "bundle")
    assert not list(tmp_path.glob(".*"))


@pytest.fixture
def llama(tmp_path: Path) -> Path:
    """A sharded Llama."""
    torch.manual_seed(0)
    return foreign.save(foreign.build("llama"), tmp_path / "src", shard="20KB")


@pytest.mark.parametrize("suffix", ["safetensors", "bin", "one.bin"])
def test_sharded_sources(tmp_path: Path, suffix: str) -> None:
    torch.manual_seed(0)
    model = foreign.build("llama")
    source = foreign.save(model, tmp_path / "src", shard="20KB")
    assert len(list(source.glob("*.safetensors"))) > 2
    if suffix != "safetensors":
        index = json.loads((source / "model.safetensors.index.json").read_text())
        (source / "model.safetensors.index.json").unlink()
        files = {p.name: load_file(p) for p in source.glob("*.safetensors")}
        for name in files:
            (source / name).unlink()
        if suffix == "bin":
            for name, tensors in files.items():
                torch.save(tensors, source / name.replace(".safetensors", ".bin"))
            where = {k: v.replace(".safetensors", ".bin") for k, v in index["weight_map"].items()}
            (source / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": where}))
        else:
            torch.save({k: t for tensors in files.values() for k, t in tensors.items()}, source / "pytorch_model.bin")
    import_checkpoint(source, tmp_path / "bundle")
    agree(model, tmp_path / "bundle")
    assert (len(list((tmp_path / "bundle").glob("model-*-of-*.safetensors"))) > 2) == (suffix != "one.bin")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_dtype_stays_unless_another_is_asked_for(tmp_path: Path, dtype: torch.dtype) -> None:
    source = foreign.save(foreign.build("llama").to(dtype), tmp_path / "src")
    import_checkpoint(source, tmp_path / "same")
    import_checkpoint(source, tmp_path / "wide", dtype="float32")
    narrow, wide = (load_file(tmp_path / name / "model.safetensors") for name in ("same", "wide"))
    assert {t.dtype for t in narrow.values()} == {dtype}
    assert {t.dtype for t in wide.values()} == {torch.float32}
    for name, tensor in load_file(source / "model.safetensors").items():
        assert torch.equal(narrow[name.removeprefix("model.")], tensor)
        assert torch.equal(wide[name.removeprefix("model.")], tensor.float())
    with pytest.raises(PlaitError, match="--dtype: is 'int8'"):
        import_checkpoint(source, tmp_path / "other", dtype="int8")


def test_the_original_emu3_layouts(tmp_path: Path) -> None:
    """Llama's names and a config.json of its own; Emu3.5 has RMSNorm on queries and heads wider than the width."""
    for name, kind, heads in (("emu3", "llama", {}), ("emu3.5", "qwen3", {"head_dim": 16})):
        torch.manual_seed(0)
        model = foreign.build(kind, rms_norm_eps=1e-5, **heads)
        source = foreign.save(model, tmp_path / name)
        fields = json.loads((source / "config.json").read_text())
        theta = fields.pop("rope_parameters")["rope_theta"]
        fields |= {
            "model_type": "Emu3",
            "architectures": ["Emu3ForCausalLM"],
            "rope_theta": theta,
            "rope_scaling": None,
        }
        fields |= {"attention_dropout": 0.1, "pretraining_tp": 1, "image_area": 518400, "boi_token_id": 9}
        for surplus in ("layer_types", "max_window_layers", "use_sliding_window", "sliding_window"):
            fields.pop(surplus, None)
        (source / "config.json").write_text(json.dumps(fields))
        assert import_checkpoint(source, tmp_path / f"{name}-bundle", kind=name)["family"] == name
        agree(model, tmp_path / f"{name}-bundle")
        other = "emu3" if name == "emu3.5" else "emu3.5"
        with pytest.raises(PlaitError, match=f"--from: is {other}"):
            import_checkpoint(source, tmp_path / "never", kind=other)


@pytest.mark.parametrize("kind", [None, "chameleon", "anole"])
@pytest.mark.parametrize(("count", "swin"), [(1, False), (2, True), (4, True)])
def test_chameleons_own_layout(tmp_path: Path, count: int, swin: bool, kind: str | None) -> None:
    torch.manual_seed(0)
    model = chameleon(count, swin_norm=swin, num_attention_heads=4)
    # As it was downloaded: models/NAME, and tokenizer/ beside.
    save_meta(model, tmp_path / "data" / "models" / "7b", count)
    facts = import_checkpoint(tmp_path / "data", tmp_path / "bundle", kind=kind)
    assert facts["family"] == "chameleon"
    agree(model, tmp_path / "bundle")
    stored = load_bundle(tmp_path / "bundle").decoder.state_dict()
    theirs = {k.removeprefix("model."): v for k, v in model.state_dict().items() if "vqmodel" not in k}
    assert stored.keys() == theirs.keys()
    assert all(torch.equal(stored[name], theirs[name]) for name in theirs)


def test_a_merged_file_with_a_norm_for_each_former_shard(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = chameleon(2)
    parts = to_meta(model.state_dict(), {"q": 4, "k": 4}, 8, 2)
    (whole,) = to_meta(model.state_dict(), {"q": 4, "k": 4}, 8, 1)
    for name in whole:
        if "_normalization" in name:
            whole[name] = torch.stack([part[name] for part in parts])
    source = save_meta(model, tmp_path / "src", 1, "consolidated.pth")
    torch.save(whole, source / "consolidated.pth")
    import_checkpoint(source, tmp_path / "bundle")
    agree(model, tmp_path / "bundle")


@pytest.mark.parametrize("rows", [False, True], ids=["llama2", "llama3"])
def test_llamas_own_layout(tmp_path: Path, rows: bool) -> None:
    """Llama 3 cuts the embedding by rows, those before by columns."""
    torch.manual_seed(0)
    model = foreign.build("llama", vocab_size=64, rms_norm_eps=1e-5)
    files = to_meta(model.state_dict(), {"q": 4, "k": 2}, 8, 2)
    (tmp_path / "src").mkdir()
    for i, file in enumerate(files):
        if rows:
            file["tok_embeddings.weight"] = model.state_dict()["model.embed_tokens.weight"].chunk(2)[i].clone()
        torch.save(file, tmp_path / "src" / f"consolidated.{i:02}.pth")
    params = {"dim": 32, "n_layers": 2, "n_heads": 4, "n_kv_heads": 2, "vocab_size": -1, "norm_eps": 1e-5}
    (tmp_path / "src" / "params.json").write_text(json.dumps(params | {"multiple_of": 16}))
    assert import_checkpoint(tmp_path / "src", tmp_path / "bundle", kind="llama")["family"] == "text"
    agree(model, tmp_path / "bundle")


def test_old_surplus_is_left_out_and_a_head_that_differs_is_untied(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = foreign.build("llama")
    source = foreign.save(model, tmp_path / "src")
    tensors = load_file(source / "model.safetensors")
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(4)
    save_file(tensors, source / "model.safetensors", {"format": "pt"})
    edit(source / "config.json", lambda c: c.update(tie_word_embeddings=True))
    import_checkpoint(source, tmp_path / "untied")
    agree(model, tmp_path / "untied")
    assert not load_bundle(tmp_path / "untied").decoder.config.tie_embeddings
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    save_file(tensors, source / "model.safetensors", {"format": "pt"})
    import_checkpoint(source, tmp_path / "tied")
    assert load_bundle(tmp_path / "tied").decoder.config.tie_embeddings


def edit(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


# What goes wrong


def retensor(source: Path, change: Callable[[dict[str, Tensor]], object], name: str = "norm.weight") -> None:
    where = json.loads((source / "model.safetensors.index.json").read_text())["weight_map"]
    path = source / where[f"model.{name}"]
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, {"format": "pt"})


class Evil:
    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return os.system, ("touch executed",)


def only_pickle(source: Path) -> None:
    for path in source.glob("model*"):
        path.unlink()
    torch.save({"model.embed_tokens.weight": torch.ones(2), "x": Evil()}, source / "pytorch_model.bin")


def first(source: Path) -> Path:
    return sorted(source.glob("*.safetensors"))[0]


def sparse(source: Path) -> None:
    for path in source.glob("model*"):
        path.unlink()
    torch.save({"model.norm.weight": torch.ones(32).to_sparse()}, source / "pytorch_model.bin")


def sums(source: Path, listing: str = "SHA256SUMS", line: str = "{value}  {name}") -> None:
    (source / listing).write_text("\n" + line.format(value="0" * 64, name=first(source).name))


def wide(tensors: dict[str, Tensor]) -> None:
    tensors["model.norm.weight"] = torch.ones(33)


def infinite(tensors: dict[str, Tensor]) -> None:
    tensors["model.norm.weight"][3] = float("nan")


DAMAGES: list[tuple[str, Callable[[Path], object]]] = [
    ("config.json: no such file", lambda s: (s / "config.json").rename(s / "params.json")),
    ("holds neither config.json nor params.json", lambda s: (s / "config.json").unlink()),
    ("not readable as JSON", lambda s: (s / "config.json").write_text("{")),
    (
        "no tensor can be that large",
        lambda s: edit(s / "config.json", lambda c: c.update(hidden_size=10**20, head_dim=8)),
    ),
    ("vq_config is 'x', must be an object", lambda s: edit(s / "config.json", lambda c: c.update(vq_config="x"))),
    ("eos_token_id is 'x'", lambda s: edit(s / "config.json", lambda c: c.update(eos_token_id="x"))),
    ("model_type is None", lambda s: edit(s / "config.json", lambda c: c.pop("model_type"))),
    ("unknown_thing is 3", lambda s: edit(s / "config.json", lambda c: c.update(unknown_thing=3))),
    (
        "says 3 layers, the tensors are those of 2",
        lambda s: edit(s / "config.json", lambda c: c.update(num_hidden_layers=3)),
    ),
    (
        "tensor 'model.embed_tokens.weight' has shape (61, 32)",
        lambda s: edit(s / "config.json", lambda c: c.update(vocab_size=62)),
    ),
    ("tensor 'model.norm.weight' is missing", lambda s: retensor(s, lambda t: t.pop("model.norm.weight"))),
    ("tensor 'spare' is extra", lambda s: retensor(s, lambda t: t.update(spare=torch.ones(1)))),
    ("is in model-", lambda s: retensor(s, lambda t: t.update({"model.embed_tokens.weight": torch.ones(61, 32)}))),
    ("tensor 'model.norm.weight' has shape (33,)", lambda s: retensor(s, wide)),
    (
        "tensor 'model.norm.weight' is torch.int8",
        lambda s: retensor(s, lambda t: t.update({"model.norm.weight": torch.ones(32).to(torch.int8)})),
    ),
    ("tensor 'model.norm.weight' holds values that are not finite", lambda s: retensor(s, infinite)),
    ("not a readable checkpoint", lambda s: first(s).write_bytes(first(s).read_bytes()[:-9])),
    ("is a Git LFS pointer", lambda s: first(s).write_bytes(b"version https://git-lfs.github.com/spec/v1\n")),
    ("no such file, and model.safetensors.index.json names it", lambda s: first(s).unlink()),
    (
        "names '../x.safetensors', which is outside",
        lambda s: edit(s / "model.safetensors.index.json", lambda c: c["weight_map"].update(a="../x.safetensors")),
    ),
    ("has no weight_map", lambda s: edit(s / "model.safetensors.index.json", lambda c: c.pop("weight_map"))),
    ("model.safetensors.index.json: no such file", lambda s: (s / "model.safetensors.index.json").unlink()),
    (
        "tensor 'ghost' is missing, which its index says is here",
        lambda s: edit(s / "model.safetensors.index.json", lambda c: c["weight_map"].update(ghost=first(s).name)),
    ),
    ("holds Python objects besides tensors", only_pickle),
    ("tensor 'model.norm.weight' is not a plain array of numbers", sparse),
    ("its sha256 is not the one in SHA256SUMS", sums),
    ("its sha256 is not the one in sums.sha256", lambda s: sums(s, "sums.sha256", "SHA256 ({name}) = {value}")),
    ("SHA256SUMS: line 1 is not a checksum and a name", lambda s: (s / "SHA256SUMS").write_text("404 not found")),
]


@pytest.mark.parametrize(("message", "damage"), DAMAGES, ids=[m for m, _ in DAMAGES])
def test_damage_is_one_line_that_names_it(
    llama: Path, message: str, damage: Callable[[Path], object], main: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(llama.parent)
    damage(llama)
    ran = main("import", llama, "-o", llama.parent / "bundle")
    assert (ran.code, ran.out) == (2, "")
    assert message in ran.err
    assert ran.err.count("\n") == 1
    assert not (llama.parent / "bundle").exists()
    assert not (llama.parent / "executed").exists()


def half_of_one(source: Path) -> None:
    tensors = torch.load(source / "consolidated.01.pth", weights_only=True)
    tensors["norm.weight"] = tensors["norm.weight"].half()
    torch.save(tensors, source / "consolidated.01.pth")


META_DAMAGES: list[tuple[str, Callable[[Path], object]]] = [
    ("consolidated.00.pth: no such file", lambda s: (s / "consolidated.00.pth").unlink()),
    ("holds 1 of 2 consolidated files", lambda s: (s / "consolidated.01.pth").unlink()),
    ("moe is 2", lambda s: edit(s / "params.json", lambda c: c["model"].update(moe=2))),
    (
        "vocab_size is 65, output.weight has 64",
        lambda s: edit(s / "params.json", lambda c: c["model"].update(vocab_size=65)),
    ),
    (
        "tensor 'tok_embeddings.weight' has shape",
        lambda s: edit(s / "params.json", lambda c: c["model"].update(dim=64, n_heads=8)),
    ),
    ("params.json: model is 3", lambda s: edit(s / "params.json", lambda c: c.update(model=3))),
    ("rope_theta is 'x'", lambda s: edit(s / "params.json", lambda c: c["model"].update(rope_theta="x"))),
    ("max_seq_len is 'x'", lambda s: edit(s / "params.json", lambda c: c["model"].update(max_seq_len="x"))),
    (
        "model_parallel_size is 'x'",
        lambda s: edit(s / "consolidate_params.json", lambda c: c.update(model_parallel_size="x")),
    ),
    ("'norm.weight' is float16 and float32 in different shards", half_of_one),
]


@pytest.mark.parametrize(("message", "damage"), META_DAMAGES, ids=[m for m, _ in META_DAMAGES])
def test_damage_to_metas_layout(tmp_path: Path, message: str, damage: Callable[[Path], object]) -> None:
    source = save_meta(chameleon(2), tmp_path / "src", 2)
    damage(source)
    with pytest.raises(PlaitError) as raised:
        import_checkpoint(source, tmp_path / "bundle")
    assert message in str(raised.value)
    assert not (tmp_path / "bundle").exists()


def test_metas_checksums(tmp_path: Path) -> None:
    source = save_meta(chameleon(1), tmp_path / "src", 1)
    good = shards.file_hash(source / "consolidated.00.pth", kind="md5")
    (source / "checklist.chk").write_text(f"{good}  consolidated.00.pth\n{'0' * 32}  elsewhere.pth\n")
    import_checkpoint(source, tmp_path / "bundle")
    (source / "checklist.chk").write_text(f"{'0' * 32}  consolidated.00.pth\n")
    with pytest.raises(PlaitError, match=r"its md5 is not the one in checklist\.chk"):
        import_checkpoint(source, tmp_path / "other")


def test_checksums_of_other_files(llama: Path, tmp_path: Path) -> None:
    """Those of what is read count: not of weights in another format, nor of a file of that name in another folder."""
    (llama / "pytorch_model.bin").write_bytes(b"other")
    name = first(llama).name
    lines = [f"{'0' * 64}  {other}" for other in ("pytorch_model.bin", f"original/{name}", "gone.safetensors")]
    (llama / "SHA256SUMS").write_text("\n".join(["# made today", *lines]))
    import_checkpoint(llama, tmp_path / "bundle")
    (llama / "SHA256SUMS").write_text(f"{'0' * 64} *./config.json\n")
    with pytest.raises(PlaitError, match=r"config.json: its sha256 is not the one in SHA256SUMS"):
        import_checkpoint(llama, tmp_path / "other")


def test_values_too_large_for_the_dtype(llama: Path, tmp_path: Path) -> None:
    retensor(llama, lambda t: t["model.norm.weight"].fill_(1e5))
    with pytest.raises(PlaitError, match=r"'norm.weight' has values too large for float16; choose another --dtype"):
        import_checkpoint(llama, tmp_path / "bundle", dtype="float16")
    import_checkpoint(llama, tmp_path / "bundle", dtype="bfloat16")


def test_a_source_that_changes_meanwhile(llama: Path, tmp_path: Path) -> None:
    with pytest.raises(PlaitError, match="has changed while it was read"):
        import_checkpoint(llama, tmp_path / "bundle", advance=lambda done, total: os.utime(first(llama)))
    assert not (tmp_path / "bundle").exists()


def test_one_file_is_open_at_a_time(llama: Path) -> None:
    opened = open_checkpoint(llama)
    for name in opened.meta():
        opened.read(name)
        assert sum(file.is_open for file in opened.files) == 1
    assert len(opened.files) > 3


def test_settings_that_cannot_be_are_refused_before_a_bundle_is_made(tmp_path: Path) -> None:
    tokenizer = emu3_tokenizer(16)
    tokens = tokenizer.get_vocab()
    fields = {"vocab_size": len(tokens), "vocabulary_map": tokens, "max_position_embeddings": 600}
    source = foreign.save(foreign.build("emu3", **fields), tmp_path / "src")
    tokenizer.save_pretrained(source)
    (source / "preprocessor_config.json").write_text('{"min_pixels": 5000, "max_pixels": 100}')
    with pytest.raises(PlaitError, match=r"src: its settings for text, .*: pixels: \[5000, 100\]"):
        import_checkpoint(source, tmp_path / "bundle")
    assert not (tmp_path / "bundle").exists()


def test_where_to_write(llama: Path, tmp_path: Path) -> None:
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "letter.txt").write_text("dear")
    (tmp_path / "file").write_text("")
    for out, message in (
        (tmp_path / "home", "not empty"),
        (tmp_path / "file", "is a file"),
        (tmp_path / "file" / "inner", "cannot make"),
        (llama, "holds what is to be read"),
        (tmp_path, "holds what is to be read"),
    ):
        with pytest.raises(PlaitError, match=message):
            import_checkpoint(llama, out)
    assert (tmp_path / "home" / "letter.txt").read_text() == "dear"
    import_checkpoint(llama, tmp_path / "bundle")
    import_checkpoint(llama, tmp_path / "bundle", dtype="bfloat16")  # a bundle is replaced
    assert {t.dtype for t in load_file(first(tmp_path / "bundle")).values()} == {torch.bfloat16}


# Large ones


def test_an_interrupted_import_goes_on(llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import_checkpoint(llama, tmp_path / "whole")
    read: list[str] = []
    original = module.Checkpoint.read

    def stopping(self: Any, name: str) -> Tensor:
        if len(read) == 12:
            raise KeyboardInterrupt
        read.append(name)
        return original(self, name)

    monkeypatch.setattr(module.Checkpoint, "read", stopping)
    out, partial = tmp_path / "bundle", tmp_path / ".bundle.partial"
    with pytest.raises(KeyboardInterrupt):
        import_checkpoint(llama, out)
    assert not out.exists()
    done = sorted(json.loads((partial / "state.json").read_text())["shards"])
    assert 1 < len(done) < len(list((tmp_path / "whole").glob("model-*")))
    assert not list(partial.glob("*.tmp"))
    before = {name: (partial / name).stat().st_mtime_ns for name in done[1:]}
    (partial / done[0]).write_bytes(b"damaged")  # is found out, and written again
    again: list[str] = []
    monkeypatch.setattr(module.Checkpoint, "read", lambda self, name: (again.append(name), original(self, name))[1])
    import_checkpoint(llama, out)
    assert set(again).isdisjoint(load_file(out / done[1]))
    assert set(again) >= set(load_file(out / done[0]))
    assert {name: (out / name).stat().st_mtime_ns for name in done[1:]} == before
    for path in (tmp_path / "whole").iterdir():
        if path.is_file():
            assert (out / path.name).read_bytes() == path.read_bytes(), path.name
    assert not list(tmp_path.glob(".*"))


def test_another_source_does_not_go_on_with_it(llama: Path, tmp_path: Path) -> None:
    import_checkpoint(llama, tmp_path / "bundle")
    state = {"identity": {"source": "another"}, "shards": {p.name: "0" for p in llama.glob("*.safetensors")}}
    (tmp_path / ".new.partial").mkdir()
    (tmp_path / ".new.partial" / "state.json").write_text(json.dumps(state))
    (tmp_path / ".new.partial" / "stray.safetensors").write_text("left by another")
    import_checkpoint(llama, tmp_path / "new")
    assert {p.name for p in (tmp_path / "new").iterdir()} == {p.name for p in (tmp_path / "bundle").iterdir()}


def test_a_full_disk_is_one_line_and_leaves_no_bundle(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(file: Any, data: Any, digest: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(shards, "_put", full)
    with pytest.raises(PlaitError, match=r"cannot be written \(No space left on device\); make room") as raised:
        import_checkpoint(llama, tmp_path / "bundle")
    assert "\n" not in str(raised.value)
    assert not (tmp_path / "bundle").exists()
    assert not list(tmp_path.rglob("*.tmp"))


MEASURE = """
import re, sys
from pathlib import Path
from plait.infer.export_checkpoint import export_checkpoint
from plait.infer.import_checkpoint import import_checkpoint
import plait.tokenizers.families

def memory(kind):  # in bytes: VmHWM is the highest VmRSS since it was reset, mapped files included
    return int(re.search(kind + r":\\s+(\\d+)", Path("/proc/self/status").read_text())[1]) * 1024

for work in (lambda: import_checkpoint(Path(sys.argv[1]), Path(sys.argv[2])),
             lambda: export_checkpoint(sys.argv[2], Path(sys.argv[3])),
             lambda: export_checkpoint(sys.argv[2], Path(sys.argv[4]), "llama")):
    Path("/proc/self/clear_refs").write_text("5")
    before = memory("VmRSS")
    work()
    print(memory("VmHWM") - before)
"""


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="memory is measured through /proc")
@pytest.mark.parametrize("layout", ["transformers", "meta"])
def test_memory_is_less_than_two_shards(tmp_path: Path, layout: str) -> None:
    width, layers = 512, 8
    state = {f"model.{n}": t for n, t in (("embed_tokens.weight", torch.zeros(12000, width)),)}
    for i in range(layers):
        at = f"model.layers.{i}."
        sizes = {"q": (width, width), "k": (width, width), "v": (width, width), "o": (width, width)}
        state |= {f"{at}self_attn.{k}_proj.weight": torch.zeros(size) for k, size in sizes.items()}
        state |= {f"{at}mlp.{k}_proj.weight": torch.zeros(1536, width) for k in ("gate", "up")}
        state |= {f"{at}mlp.down_proj.weight": torch.zeros(width, 1536)}
        state |= {f"{at}{k}_layernorm.weight": torch.zeros(width) for k in ("input", "post_attention")}
    state |= {"model.norm.weight": torch.zeros(width), "lm_head.weight": torch.zeros(12000, width)}
    source = tmp_path / "src"
    source.mkdir()
    if layout == "meta":
        for i, file in enumerate(to_meta(state, {"q": 8, "k": 8}, 64, 4)):
            torch.save(file, source / f"consolidated.{i:02}.pth")
        params = {"dim": width, "n_layers": layers, "n_heads": 8, "vocab_size": 12000}
        (source / "params.json").write_text(json.dumps(params))
    else:
        where, parts = {}, [list(state)[i::6] for i in range(6)]
        for i, names in enumerate(parts):
            where |= dict.fromkeys(names, f"model-{i + 1:05}-of-00006.safetensors")
            save_file({n: state[n] for n in names}, source / where[names[0]])
        (source / "model.safetensors.index.json").write_text(json.dumps({"weight_map": where}))
        fields = {"model_type": "llama", "vocab_size": 12000, "hidden_size": width, "intermediate_size": 1536}
        fields |= {"num_hidden_layers": layers, "num_attention_heads": 8, "num_key_value_heads": 8}
        (source / "config.json").write_text(json.dumps(fields))
    del state
    weights = [p.stat().st_size for p in source.iterdir() if p.suffix in (".safetensors", ".pth")]
    assert sum(weights) > 140e6
    command = [
        sys.executable,
        "-c",
        MEASURE,
        str(source),
        str(tmp_path / "bundle"),
        *(str(tmp_path / n) for n in ("back", "meta")),
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    for used in map(int, done.stdout.split()):
        assert used < 2 * max(weights)
