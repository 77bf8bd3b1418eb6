import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from plait.errors import PlaitError
from plait.infer.bundle import load_bundle, save_bundle
from plait.infer.export_checkpoint import export_checkpoint
from plait.model.config import DecoderConfig
from plait.model.decoder import Decoder
from plait.model.quantize import Quantization
from plait.tokenizers.text import TextTokenizer
from plait.tokenizers.vocabulary import Vocabulary


def edit(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    content = json.loads(path.read_text("utf-8"))
    change(content)
    path.write_text(json.dumps(content), "utf-8")


def retensor(path: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_round_trip(tmp_path: Path, tokenizers: Path, vocabulary: Vocabulary, tied: bool, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    config = DecoderConfig(vocabulary_size=vocabulary.size, width=32, layers=1, rope_theta=500.0, tie_embeddings=tied)
    decoder = Decoder(config).to(dtype)
    settings = {"image": {"temperature": 0.5, "top_k": 9}}
    folder = tmp_path / "deep" / "bundle"
    save_bundle(folder, config, decoder.state_dict(), vocabulary, tokenizers, settings, 99, dtype)
    loaded = load_bundle(folder, dtype=dtype)
    assert loaded.decoder.config == config
    assert loaded.vocabulary == vocabulary
    assert loaded.generation == settings
    assert loaded.context == 99
    assert {name: t.fingerprint for name, t in loaded.tokenizers.items()} == vocabulary.tokenizers
    for name, tensor in decoder.state_dict().items():
        assert torch.equal(loaded.decoder.state_dict()[name], tensor), name
    assert not loaded.decoder.training
    assert not any(p.requires_grad for p in loaded.decoder.parameters())
    assert (loaded.decoder.lm_head.weight is loaded.decoder.embed_tokens.weight) == tied
    with safe_open(folder / "model.safetensors", "pt") as file:
        names = set(file.keys())
        assert file.get_tensor("embed_tokens.weight").dtype == dtype
    assert names == set(decoder.state_dict()) - ({"lm_head.weight"} if tied else set())


def test_weights_are_cast_on_loading(bundle: Path) -> None:
    loaded = load_bundle(bundle, dtype=torch.bfloat16)
    assert {p.dtype for p in loaded.decoder.parameters()} == {torch.bfloat16}
    assert {p.dtype for p in loaded.tokenizers["visual"].parameters()} == {torch.float32}


def test_nothing_is_pickled_and_nothing_else_is_there(bundle: Path) -> None:
    names = {str(p.relative_to(bundle)) for p in bundle.rglob("*") if p.is_file()}
    assert names == {
        "config.json",
        "generation.json",
        "model.safetensors",
        "vocabulary.json",
        "tokenizers/text/config.json",
        "tokenizers/text/tokenizer.model",
        "tokenizers/visual/config.json",
        "tokenizers/visual/model.safetensors",
    }
    assert not list(bundle.parent.glob(".*"))
    for path in bundle.rglob("*.safetensors"):
        assert path.read_bytes()[:2] != b"PK"
        load_file(path)


def test_saving_again_replaces_the_whole_folder(bundle: Path, tokenizers: Path, vocabulary: Vocabulary) -> None:
    (bundle / "stray.txt").write_text("old")
    config = DecoderConfig(vocabulary_size=vocabulary.size, width=16, layers=1)
    weights = Decoder(config).state_dict()
    # The tokenizers come from the very folder that is replaced.
    save_bundle(bundle, config, weights, vocabulary, bundle / "tokenizers", {}, 12, torch.float32)
    assert load_bundle(bundle).context == 12
    assert not (bundle / "stray.txt").exists()


def test_a_failed_save_keeps_the_old_bundle(bundle: Path, vocabulary: Vocabulary, tmp_path: Path) -> None:
    config = DecoderConfig(vocabulary_size=vocabulary.size, width=16, layers=1)
    with pytest.raises(OSError, match="nowhere"):
        save_bundle(
            bundle, config, Decoder(config).state_dict(), vocabulary, tmp_path / "nowhere", {}, 1, torch.float32
        )
    assert load_bundle(bundle).context == 256


def test_a_bundle_is_there_whatever_fails(
    bundle: Path, vocabulary: Vocabulary, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The old folder is deleted only after the new one has its name."""
    config = DecoderConfig(vocabulary_size=vocabulary.size, width=16, layers=1)
    contexts, rmtree = [], shutil.rmtree

    def watched(path: Path, **options: Any) -> None:
        contexts.append(json.loads((bundle / "config.json").read_text())["context"])
        rmtree(path, **options)

    monkeypatch.setattr(shutil, "rmtree", watched)
    weights = Decoder(config).state_dict()
    save_bundle(bundle, config, weights, vocabulary, bundle / "tokenizers", {}, 12, torch.float32)
    assert (contexts[0], contexts[-1]) == (256, 12)
    assert not list(tmp_path.glob(".*"))


def test_a_bundle_where_no_folder_can_be(tokenizers: Path, vocabulary: Vocabulary, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    config = DecoderConfig(vocabulary_size=vocabulary.size, width=16, layers=1)
    weights, folder = Decoder(config).state_dict(), tmp_path / "file" / "bundle"
    with pytest.raises(PlaitError, match="cannot make this folder"):
        save_bundle(folder, config, weights, vocabulary, tokenizers, {}, 1, torch.float32)


def test_loaded_weights_do_not_hang_on_the_file(bundle: Path) -> None:
    decoder = load_bundle(bundle).decoder
    before = {name: tensor.clone() for name, tensor in decoder.state_dict().items()}
    content = (bundle / "model.safetensors").read_bytes()
    (bundle / "model.safetensors").write_bytes(bytes(len(content)))
    assert all(torch.equal(tensor, before[name]) for name, tensor in decoder.state_dict().items())


def swap_tokenizer(folder: Path) -> None:
    TextTokenizer.train(["other words entirely, again and again"] * 9, 280).save_pretrained(folder)


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


DAMAGES: list[tuple[str, Callable[[Path], object], str]] = [
    ("config.json", lambda p: p.unlink(), "no such file"),
    ("config.json", lambda p: p.write_text("{"), "not readable as JSON"),
    ("config.json", lambda p: p.write_text("[]"), "expected a JSON object"),
    ("config.json", lambda p: edit(p, lambda c: c.update(format_version=2)), "format_version is 2"),
    ("config.json", lambda p: edit(p, lambda c: c.pop("format_version")), "format_version is None"),
    ("config.json", lambda p: edit(p, lambda c: c.pop("decoder")), "'decoder' is missing"),
    ("config.json", lambda p: edit(p, lambda c: c.pop("context")), "'context' is missing"),
    ("config.json", lambda p: edit(p, lambda c: c.update(decoder=[])), "decoder must be an object"),
    ("config.json", lambda p: edit(p, lambda c: c.update(context="many")), "context a whole number"),
    ("config.json", lambda p: edit(p, lambda c: c.update(context=0)), "context a whole number"),
    ("config.json", lambda p: edit(p, lambda c: c["decoder"].update(width=10**20, head_size=8)), "can be that large"),
    ("config.json", lambda p: edit(p, lambda c: c["decoder"].update(experts=8)), "unknown field 'experts'"),
    ("config.json", lambda p: edit(p, lambda c: c["decoder"].update(vocabulary_size=7)), "vocabulary_size is 7"),
    (
        "config.json",
        lambda p: edit(p, lambda c: c["decoder"].update(width=1 << 40, ffn_width=1 << 40)),
        "no tensor can be that large",
    ),
    ("vocabulary.json", lambda p: p.unlink(), "no such file"),
    ("vocabulary.json", lambda p: edit(p, lambda c: c["blocks"][-1].update(name="x")), "vocabulary.json"),
    ("vocabulary.json", lambda p: edit(p, lambda c: c["blocks"][0]["tokens"].reverse()), "not the vocabulary"),
    ("vocabulary.json", lambda p: edit(p, lambda c: c.update(format_version=0)), "format_version is 0"),
    ("generation.json", lambda p: p.unlink(), "no such file"),
    ("generation.json", lambda p: edit(p, lambda c: c.update(format_version="x")), "format_version is 'x'"),
    ("generation.json", lambda p: edit(p, lambda c: c.update(text=[])), "must be an object"),
    ("generation.json", lambda p: edit(p, lambda c: c["text"].update(heat=1)), "text: unknown setting 'heat'"),
    ("generation.json", lambda p: edit(p, lambda c: c["text"].update(top_p=3)), "text: top_p: 3"),
    ("generation.json", lambda p: edit(p, lambda c: c["text"].update(temperature="hot")), "text: temperature: 'hot'"),
    ("generation.json", lambda p: edit(p, lambda c: c.update(image=1.5)), "image: "),
    ("model.safetensors", lambda p: p.unlink(), "no such file"),
    ("model.safetensors", truncate, "not a readable safetensors file"),
    ("model.safetensors", lambda p: p.write_bytes(b""), "not a readable safetensors file"),
    ("model.safetensors", lambda p: retensor(p, lambda t: t.pop("norm.weight")), "'norm.weight' is missing"),
    ("model.safetensors", lambda p: retensor(p, lambda t: t.update(spare=torch.ones(1))), "'spare' is extra"),
    ("model.safetensors", lambda p: retensor(p, lambda t: t.update({"norm.weight": torch.ones(3)})), "has shape"),
    ("tokenizers/text", swap_tokenizer, "is not the tokenizer that the model was trained with"),
    ("tokenizers/visual", shutil.rmtree, "tokenizer is missing"),
    ("tokenizers", shutil.rmtree, "holds no tokenizers"),
    ("tokenizers/text/tokenizer.model", lambda p: p.unlink(), "no such file"),
    ("tokenizers/visual/model.safetensors", truncate, "not a readable safetensors file"),
]


@pytest.mark.parametrize(("file", "damage", "message"), DAMAGES, ids=[f"{f}-{m}" for f, _, m in DAMAGES])
def test_damage_is_one_line_that_names_the_file(
    bundle: Path, file: str, damage: Callable[[Path], object], message: str
) -> None:
    load_bundle(bundle)
    damage(bundle / file)
    with pytest.raises(PlaitError, match=message) as raised:
        load_bundle(bundle)
    assert str(bundle if file == "tokenizers" else bundle / file) in str(raised.value)
    assert "\n" not in str(raised.value)


def test_an_absurd_width_takes_no_memory(bundle: Path) -> None:
    edit(bundle / "config.json", lambda c: c["decoder"].update(width=1 << 20, ffn_width=64))
    with pytest.raises(PlaitError, match=r"tensor '\S+' has shape \(.*\), config\.json says \(.*1048576"):
        load_bundle(bundle)  # a width of 2²⁰ is terabytes


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("name", ["int8", "int4"])
@torch.no_grad()
def test_quantized_weights_are_stored_as_they_are(
    tmp_path: Path, tokenizers: Path, vocabulary: Vocabulary, name: str, tied: bool
) -> None:
    torch.manual_seed(0)
    config = DecoderConfig(vocabulary_size=vocabulary.size, width=64, layers=1, tie_embeddings=tied)
    weights = Decoder(config).state_dict()
    plain, quantized = tmp_path / "plain", tmp_path / "quantized"
    save_bundle(plain, config, weights, vocabulary, tokenizers, {}, 99, torch.float32)
    made = load_bundle(plain, quantize=name).decoder
    settings = Quantization.named(name)
    save_bundle(quantized, config, made.state_dict(), vocabulary, tokenizers, {}, 99, torch.float32, settings)
    loaded = load_bundle(quantized).decoder
    assert loaded.state_dict().keys() == made.state_dict().keys()
    for key, tensor in made.state_dict().items():
        assert torch.equal(loaded.state_dict()[key], tensor), key
        assert loaded.state_dict()[key].dtype == tensor.dtype, key
    tokens = torch.randint(vocabulary.size, (1, 9))
    assert torch.equal(loaded(tokens, torch.arange(9)[None]), made(tokens, torch.arange(9)[None]))
    with pytest.raises(PlaitError, match="are stored in"):
        load_bundle(quantized, quantize="int8")
    with pytest.raises(PlaitError, match="the weights are quantized"):
        export_checkpoint(quantized, tmp_path / "out")
    edit(quantized / "config.json", lambda c: c["quantization"].update(bits=3))
    with pytest.raises(PlaitError, match="bits is 3"):
        load_bundle(quantized)


def test_a_sharded_bundle(
    tmp_path: Path, tokenizers: Path, vocabulary: Vocabulary, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("plait.infer.shards.SHARD_BYTES", 50_000)
    config = DecoderConfig(vocabulary_size=vocabulary.size, width=32, layers=2)
    decoder, folder = Decoder(config), tmp_path / "bundle"
    save_bundle(folder, config, decoder.state_dict(), vocabulary, tokenizers, {}, 99, torch.float32)
    shards = sorted(folder.glob("model-*-of-*.safetensors"))
    assert len(shards) > 2
    assert not (folder / "model.safetensors").exists()
    for name, tensor in load_bundle(folder).decoder.state_dict().items():
        assert torch.equal(tensor, decoder.state_dict()[name]), name
    index = folder / "model.safetensors.index.json"
    whole = index.read_text()
    edit(index, lambda c: c["weight_map"].update(spare="../other.safetensors"))
    with pytest.raises(PlaitError, match=r"names '\.\./other\.safetensors'"):
        load_bundle(folder)
    index.write_text(whole)
    shards[1].unlink()
    with pytest.raises(PlaitError, match=f"names '{shards[1].name}', which is not in its folder"):
        load_bundle(folder)


def test_unknown_rope_settings_are_named(bundle: Path) -> None:
    edit(bundle / "config.json", lambda c: c["decoder"]["rope_scaling"].update(speed=3))
    with pytest.raises(PlaitError, match="unknown field 'speed'"):
        load_bundle(bundle)


def test_more_layers_than_there_are(bundle: Path) -> None:
    edit(bundle / "config.json", lambda c: c["decoder"].update(layers=10**9))
    with pytest.raises(PlaitError, match="says 1000000000 layers, the tensors are those of 2"):
        load_bundle(bundle)
