"""What was imported goes back as it was, bit for bit; what was trained here loads elsewhere with the same logits."""

import json
import os
from pathlib import Path
from typing import Any

import foreign_checkpoints as foreign
import pytest
import torch
from foreign_models import chameleon_tokenizer, emu3_tokenizer
from safetensors.torch import load_file, save_file
from torch import Tensor

from plait.errors import PlaitError
from plait.infer import export_checkpoint as export_module
from plait.infer.bundle import load_bundle, save_bundle
from plait.infer.export_checkpoint import export_checkpoint
from plait.infer.import_checkpoint import import_checkpoint
from plait.model.config import DecoderConfig, RopeScaling
from plait.model.decoder import Decoder
from plait.model.foreign_config import from_transformers
from plait.tokenizers.loading import find_weights
from plait.tokenizers.vocabulary import Block, Vocabulary
from plait.tokenizers.vqgan import VQGANConfig, VQGANTokenizer


def load(folder: Path) -> Any:
    """The class that config.json names, with nothing missing, extra or newly made."""
    import transformers as hf

    name = json.loads((folder / "config.json").read_text())["architectures"][0]
    model, info = getattr(hf, name).from_pretrained(folder, output_loading_info=True)
    assert not any(info.values()), info
    return model.eval()


def equal(a: dict[str, Tensor], b: dict[str, Tensor]) -> None:
    assert a.keys() == b.keys()
    assert [name for name in a if a[name].dtype != b[name].dtype or not torch.equal(a[name], b[name])] == []


YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 16}
ROUND: list[tuple[str, dict[str, Any]]] = [
    ("llama", {"tie_word_embeddings": True}),
    ("llama", {"rope_parameters": YARN}),
    ("mistral", {"sliding_window": 9, "head_dim": 6}),
    ("mistral", {"sliding_window": None}),
    ("qwen2", {"num_key_value_heads": 1}),
    ("qwen3", {"head_dim": 16, "use_sliding_window": True, "sliding_window": 7, "max_window_layers": 0}),
    ("emu3-text", {}),
    ("emu3", {}),
    ("emu3", {"tie_word_embeddings": True}),
    ("chameleon", {"num_key_value_heads": 4}),
    ("chameleon", {"swin_norm": True}),
]


@pytest.mark.parametrize("shard", ["5GB", "20KB"])
@pytest.mark.parametrize(("kind", "fields"), ROUND, ids=str)
def test_a_round_trip_keeps_every_bit(kind: str, fields: dict[str, Any], shard: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = foreign.build(kind, **fields)
    import_checkpoint(foreign.save(model, tmp_path / "src", shard), tmp_path / "bundle")
    export_checkpoint(tmp_path / "bundle", tmp_path / "out")
    back = load(tmp_path / "out")
    assert type(back) is type(model)
    equal(back.state_dict(), model.state_dict())
    tokens = torch.randint(61, (2, 40))
    assert torch.equal(foreign.logits(back, tokens), foreign.logits(model, tokens))
    # The files themselves hold the same tensors under the same names.
    equal(
        *(
            {k: t for f in (tmp_path / at).glob("*.safetensors") for k, t in load_file(f).items()}
            for at in ("src", "out")
        )
    )
    configs = (json.loads((tmp_path / at / "config.json").read_text()) for at in ("src", "out"))
    theirs, ours = (from_transformers(config, ()) for config in configs)
    assert ours == theirs


def test_emu3s_decoder_alone_loads_as_any_language_model(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    model = foreign.build("emu3-text")
    import_checkpoint(foreign.save(model, tmp_path / "src"), tmp_path / "bundle")
    export_checkpoint(tmp_path / "bundle", tmp_path / "out")
    back = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert type(back) is type(model)
    equal(back.state_dict(), model.state_dict())


def test_bfloat16_stays(tmp_path: Path) -> None:
    model = foreign.build("qwen3", head_dim=16).to(torch.bfloat16)
    import_checkpoint(foreign.save(model, tmp_path / "src"), tmp_path / "bundle")
    export_checkpoint(tmp_path / "bundle", tmp_path / "out")
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == "bfloat16"
    equal(load(tmp_path / "out").state_dict(), model.state_dict())


def bundle_of(folder: Path, **fields: Any) -> Decoder:
    """An untrained decoder without tokenizers, as a bundle."""
    torch.manual_seed(0)
    base = {"vocabulary_size": 64, "width": 32, "layers": 2, "heads": 4, "kv_heads": 2, "ffn_width": 48}
    decoder = Decoder(DecoderConfig(**{**base, "qk_norm": "none", **fields})).eval()
    with torch.no_grad():
        for parameter in decoder.parameters():
            parameter.normal_(1.0 if parameter.ndim == 1 else 0.0, 0.25)
    vocabulary = Vocabulary((Block("ids", 0, 64),), grammar="ids")
    save_bundle(folder, decoder.config, decoder.state_dict(), vocabulary, folder, {}, 64, torch.float32)
    return decoder


OWN: list[tuple[dict[str, Any], str]] = [
    ({}, "LlamaForCausalLM"),
    ({"tie_embeddings": False, "rope_scaling": RopeScaling("ntk", 4.0)}, "LlamaForCausalLM"),
    ({"width": 30, "head_size": 8}, "MistralForCausalLM"),
    ({"head_size": 12}, "LlamaForCausalLM"),
    ({"sliding_window": 5}, "MistralForCausalLM"),
    ({"qkv_bias": True, "sliding_window": 5, "head_size": 6}, "Qwen2ForCausalLM"),
    ({"qk_norm": "rms", "sliding_window": 5, "width": 30, "head_size": 8}, "Qwen3ForCausalLM"),
    ({"qk_norm": "rms", "rope_scaling": RopeScaling("llama3", 4.0, 16)}, "Qwen3ForCausalLM"),
    ({"rope_scaling": RopeScaling("dynamic", 4.0, 16)}, "LlamaForCausalLM"),
]


@pytest.mark.parametrize(("fields", "name"), OWN, ids=str)
@torch.no_grad()
def test_every_decoder_finds_its_architecture(fields: dict[str, Any], name: str, tmp_path: Path) -> None:
    decoder = bundle_of(tmp_path / "bundle", **fields)
    facts = export_checkpoint(tmp_path / "bundle", tmp_path / "out")
    assert facts["architecture"] == name
    tokens = torch.randint(64, (2, 40))
    expected = decoder(tokens, torch.arange(40).expand(2, -1))
    assert expected.std() > 0.5
    torch.testing.assert_close(foreign.logits(load(tmp_path / "out"), tokens), expected, atol=1e-4, rtol=0)
    import_checkpoint(tmp_path / "out", tmp_path / "again")
    equal(load_bundle(tmp_path / "again").decoder.state_dict(), decoder.state_dict())


@torch.no_grad()
def test_a_chameleon_without_images_still_computes_text(tmp_path: Path) -> None:
    decoder = bundle_of(tmp_path / "bundle", qk_norm="layer", norm_placement="post")
    facts = export_checkpoint(tmp_path / "bundle", tmp_path / "out")
    assert "without an image tokenizer" in facts["note"]
    from transformers import ChameleonForConditionalGeneration

    model, info = ChameleonForConditionalGeneration.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert {name.split(".")[1] for name in info["missing_keys"]} == {"vqmodel"}
    tokens = torch.randint(64, (2, 40))
    expected = decoder(tokens, torch.arange(40).expand(2, -1))
    torch.testing.assert_close(foreign.logits(model.eval(), tokens), expected, atol=1e-4, rtol=0)


@torch.no_grad()
def test_the_shipped_model_loads_in_transformers(tmp_path: Path, main: Any) -> None:
    ran = main("export", "plait-tiny", "-o", tmp_path / "out", "--dtype", "float32", "--json")
    assert ran.code == 0, ran.err
    assert json.loads(ran.out)["architecture"] == "Qwen3ForCausalLM"
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["config.json", "model.safetensors"]
    tiny = load_bundle(find_weights("plait-tiny"))
    tokens = torch.randint(tiny.vocabulary.size, (2, 60))
    expected = tiny.decoder(tokens, torch.arange(60).expand(2, -1))
    torch.testing.assert_close(foreign.logits(load(tmp_path / "out"), tokens), expected, atol=1e-4, rtol=0)


def test_the_original_layouts_come_back(tmp_path: Path) -> None:
    for to, fields in (
        ("emu3", {"tie_embeddings": False}),
        ("emu3.5", {"qk_norm": "rms", "head_size": 16}),
        ("llama", {"tie_embeddings": False}),
        ("chameleon", {"tie_embeddings": False, "norm_placement": "post"}),
    ):
        decoder = bundle_of(tmp_path / to, **fields)
        export_checkpoint(tmp_path / to, tmp_path / f"{to}-out", to)
        kind = to if to.startswith("emu") else None
        import_checkpoint(tmp_path / f"{to}-out", tmp_path / f"{to}-back", kind)
        back = load_bundle(tmp_path / f"{to}-back").decoder
        assert back.config == decoder.config
        equal(back.state_dict(), decoder.state_dict())
    config = json.loads((tmp_path / "emu3.5-out" / "config.json").read_text())
    assert (config["model_type"], config["head_dim"], config["rope_theta"]) == ("Emu3", 16, 1e4)
    (file,) = (tmp_path / "llama-out").glob("*.pth")
    assert "layers.1.attention.wq.weight" in torch.load(file, weights_only=True)


@pytest.mark.parametrize("shards", [1, 2, 4])
def test_chameleons_own_layout_comes_back_bit_for_bit(tmp_path: Path, shards: int) -> None:
    torch.manual_seed(0)
    model = foreign.chameleon(shards, swin_norm=shards > 1)
    source = foreign.save_meta(model, tmp_path / "src", shards)
    import_checkpoint(source, tmp_path / "bundle")
    assert export_checkpoint(tmp_path / "bundle", tmp_path / "out", "chameleon")["shards"] == shards
    for path in source.glob("*.pth"):
        theirs = torch.load(path, weights_only=True)
        del theirs["rope.freqs"]
        equal(torch.load(tmp_path / "out" / path.name, weights_only=True), theirs)
    import_checkpoint(tmp_path / "out", tmp_path / "again")
    equal(*(load_bundle(tmp_path / at).decoder.state_dict() for at in ("bundle", "again")))


def test_metas_layout_on_a_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its room is taken first: to write into mapped memory that has none would end the process."""

    def full(*_: int) -> None:
        raise OSError(28, "No space left on device")

    bundle_of(tmp_path / "bundle", tie_embeddings=False)
    monkeypatch.setattr(os, "posix_fallocate", full, raising=False)
    with pytest.raises(PlaitError, match="No space left on device.*; make room and run it again"):
        export_checkpoint(tmp_path / "bundle", tmp_path / "out", "llama")
    assert not (tmp_path / "out").exists()


def test_metas_layout_is_written_in_parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    decoder = bundle_of(tmp_path / "bundle", tie_embeddings=False)
    monkeypatch.setattr(export_module, "_PART", 1000)
    export_checkpoint(tmp_path / "bundle", tmp_path / "out", "llama")
    import_checkpoint(tmp_path / "out", tmp_path / "again")
    equal(load_bundle(tmp_path / "again").decoder.state_dict(), decoder.state_dict())


def test_norms_that_no_shard_can_hold(tmp_path: Path) -> None:
    bundle_of(tmp_path / "bundle", qk_norm="layer", heads=6, kv_heads=3, width=36, tie_embeddings=False)
    with pytest.raises(PlaitError, match="the heads' QK-norms differ"):
        export_checkpoint(tmp_path / "bundle", tmp_path / "out", "chameleon")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("fields", "to", "message"),
    [
        ({"norm_placement": "post"}, "hf", "norm_placement 'post'"),
        ({"qk_norm": "rms", "qkv_bias": True}, "hf", "qkv_bias True"),
        ({"qk_norm": "rms"}, "emu3", "emu3 has qk_norm 'none'"),
        ({}, "emu3.5", "emu3.5 has qk_norm 'rms'"),
        ({"qkv_bias": True}, "chameleon", "Meta's layout"),
        ({"qk_norm": "layer"}, "llama", "llama has no QK-norm"),
        ({}, "gguf", "--to: is 'gguf'"),
    ],
)
def test_what_cannot_go_is_one_line(fields: dict[str, Any], to: str, message: str, tmp_path: Path, main: Any) -> None:
    bundle_of(tmp_path / "bundle", **fields)
    ran = main("export", tmp_path / "bundle", "-o", tmp_path / "out", "--to", to)
    assert (ran.code, ran.out) == (2, "")
    assert message in ran.err
    assert ran.err.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_a_changed_byte_is_noticed(tmp_path: Path) -> None:
    bundle_of(tmp_path / "bundle")
    path = tmp_path / "bundle" / "model.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    load_bundle(tmp_path / "bundle")  # loading does not hash
    with pytest.raises(PlaitError, match=r"model.safetensors: its sha256 is not the one in config\.json"):
        export_checkpoint(tmp_path / "bundle", tmp_path / "out")


def test_nothing_is_overwritten(tmp_path: Path) -> None:
    bundle_of(tmp_path / "bundle")
    export_checkpoint(tmp_path / "bundle", tmp_path / "out")
    for out, message in ((tmp_path / "out", "not empty"), (tmp_path / "bundle", "holds what is to be read")):
        with pytest.raises(PlaitError, match=message):
            export_checkpoint(tmp_path / "bundle", out)


def test_damaged_bundles_are_named(tmp_path: Path) -> None:
    bundle_of(tmp_path / "bundle")
    path = tmp_path / "bundle" / "model.safetensors"
    tensors = load_file(path)
    config = tmp_path / "bundle" / "config.json"
    config.write_text(json.dumps({k: v for k, v in json.loads(config.read_text()).items() if k != "sha256"}))
    for change, message in (
        ({"spare": torch.ones(1)}, "tensor 'spare' is extra"),
        ({"norm.weight": torch.ones(3)}, r"tensor 'norm.weight' has shape \(3,\)"),
        ({"norm.weight": torch.full((32,), torch.inf)}, "tensor 'norm.weight' holds values that are not finite"),
    ):
        save_file({**tensors, **change}, path)
        with pytest.raises(PlaitError, match=message):
            export_checkpoint(tmp_path / "bundle", tmp_path / "out")
    for origin in ("x", {"vq_config": [1]}, {"family": 3}):
        content = json.loads(config.read_text())
        config.write_text(json.dumps({**content, "origin": origin}))
        with pytest.raises(PlaitError, match=r"config.json: origin.* must be"):
            export_checkpoint(tmp_path / "bundle", tmp_path / "out")
        config.write_text(json.dumps(content))
    del tensors["norm.weight"]
    save_file(tensors, path)
    with pytest.raises(PlaitError, match=r"tensor 'norm.weight' is missing"):
        export_checkpoint(tmp_path / "bundle", tmp_path / "out")


def whole(kind: str, folder: Path) -> tuple[Any, Any]:
    """A checkpoint with everything: decoder, image tokenizer and text tokenizer."""
    torch.manual_seed(0)
    make = emu3_tokenizer if kind == "emu3" else chameleon_tokenizer
    tokenizer = make(16)
    text = tokenizer.get_vocab()
    fields = {"vocab_size": len(text) + 9, "vocabulary_map": text, "max_position_embeddings": 600}
    model = foreign.build(kind, **fields)
    foreign.save(model, folder)
    tokenizer.save_pretrained(folder)
    return model, tokenizer


@pytest.mark.parametrize("kind", ["emu3", "chameleon"])
def test_a_whole_model_comes_and_goes(kind: str, tmp_path: Path, main: Any) -> None:
    from transformers import AutoTokenizer

    model, tokenizer = whole(kind, tmp_path / "src")
    ran = main("import", tmp_path / "src", "-o", tmp_path / "bundle", "--json")
    assert ran.code == 0, ran.err
    assert json.loads(ran.out)["modalities"] == ["image", "text"]
    # transformers' Chameleon has no decoder of images.
    picture = tmp_path / "red.png"
    to = ["--to", "image", "-o", picture] if kind == "emu3" else ["--to", "text", "-o", tmp_path / "a.txt"]
    ran = main("generate", "a red apple", *to, "--model", tmp_path / "bundle", "--max-tokens", 400, "--seed", 0)
    assert ran.code == 0, ran.err
    ran = main("export", tmp_path / "bundle", "-o", tmp_path / "out", "--to", "hf")
    assert ran.code == 0, ran.err
    back = load(tmp_path / "out")
    equal(back.state_dict(), model.state_dict())
    assert back.config.vocabulary_map == model.config.vocabulary_map
    ours, theirs = (m.config.vq_config.to_dict() for m in (back, model))
    assert {**ours, "dtype": None} == {**theirs, "dtype": None}
    again = AutoTokenizer.from_pretrained(tmp_path / "out")
    for text in ("a red apple", "<|image start|>4*4<|image token|>", "<racm3:break>IMGIMGAZ<eoss>", "Ünï"):
        assert again.encode(text) == tokenizer.encode(text)


def test_parts_that_were_released_by_themselves(tmp_path: Path, main: Any) -> None:
    """Emu3's decoder and vision tokenizer are two downloads; Chameleon's folder has tokenizer/ beside models/."""
    model, tokenizer = whole("emu3", tmp_path / "whole")
    import_checkpoint(tmp_path / "whole", tmp_path / "bundle")
    export_checkpoint(tmp_path / "bundle", tmp_path / "gen", "emu3")
    tokenizer.save_pretrained(tmp_path / "text")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / "gen" / name).unlink(missing_ok=True)
    visual = {k.removeprefix("model.vqmodel."): t for k, t in model.state_dict().items() if "vqmodel" in k}
    (tmp_path / "vision").mkdir()
    save_file(visual, tmp_path / "vision" / "model.safetensors")
    (tmp_path / "vision" / "preprocessor_config.json").write_text('{"min_pixels": 64, "max_pixels": 1024}')
    parts = ("--visual", tmp_path / "vision", "--text", tmp_path / "text")
    ran = main("import", tmp_path / "gen", "-o", tmp_path / "again", "--from", "emu3", *parts, "--json")
    assert ran.code == 0, ran.err
    assert json.loads(ran.out)["modalities"] == ["image", "text"]
    a, b = (load_bundle(tmp_path / name) for name in ("bundle", "again"))
    assert a.vocabulary == b.vocabulary
    assert b.generation["text"]["pixels"] == [64, 1024]
    equal(a.decoder.state_dict(), b.decoder.state_dict())
    ran = main("import", tmp_path / "gen", "-o", tmp_path / "no", "--from", "emu3", "--visual", tmp_path / "nowhere")
    assert (ran.code, ran.err.count("\n")) == (2, 1)


def test_chameleons_download(tmp_path: Path, main: Any) -> None:
    tokenizer = chameleon_tokenizer(16)
    torch.manual_seed(0)
    vq = VQGANTokenizer(VQGANConfig(32, (1, 2), 1, (), 8, 16, 8, normalized=False))
    count = -(-len(tokenizer) // 8) * 8
    model = foreign.chameleon(2, vocab_size=count, max_position_embeddings=600)
    foreign.save_meta(model, tmp_path / "data" / "models" / "7b", 2)
    (tmp_path / "data" / "tokenizer").mkdir()
    tokenizer.backend_tokenizer.save(str(tmp_path / "data" / "tokenizer" / "text_tokenizer.json"))
    taming = {k.replace("quantizer.codebook", "quantize.embedding.weight"): t for k, t in vq.state_dict().items()}
    torch.save({"state_dict": taming}, tmp_path / "data" / "tokenizer" / "vqgan.ckpt")
    ran = main("import", tmp_path / "data", "-o", tmp_path / "bundle", "--from", "anole", "--json")
    assert ran.code == 0, ran.err
    assert json.loads(ran.out)["modalities"] == ["image", "text"]
    export_checkpoint(tmp_path / "bundle", tmp_path / "out")
    back = load(tmp_path / "out").state_dict()
    theirs = model.state_dict()
    assert [k for k in theirs if "vqmodel" not in k and not torch.equal(back[k], theirs[k])] == []
    assert torch.equal(back["model.vqmodel.quantize.embedding.weight"], vq.quantizer.codebook)
    # 1,024 codes, as in the release, unless the file beside the tokenizer says otherwise.
    assert load_bundle(tmp_path / "bundle").vocabulary.modalities["image"].grid == (32, 32)
    (tmp_path / "data" / "tokenizer" / "vqgan.yaml").write_text(
        "model:\n  params:\n    ddconfig:\n      resolution: 8\n"
    )
    import_checkpoint(tmp_path / "data", tmp_path / "bundle")
    assert load_bundle(tmp_path / "bundle").vocabulary.modalities["image"].grid == (4, 4)
