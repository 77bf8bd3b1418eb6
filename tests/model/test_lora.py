from collections.abc import Callable
from copy import deepcopy

import pytest
import torch
from torch import Tensor

from plait.errors import PlaitError
from plait.infer.adapter import adapter_tensors, attach, load_adapter, merge, save_adapter
from plait.model.config import DecoderConfig
from plait.model.decoder import Decoder
from plait.model.lora import LoRAConfig, LoRALinear, add_lora, matching, merge_lora
from plait.model.loss import Targets
from plait.model.quantize import quantize_linear
from plait.model.rows import split_rows

TOKENS = torch.arange(24).reshape(2, 12) * 7 % 60
POSITIONS = torch.arange(12).expand(2, -1)
TARGETS = Targets(TOKENS.roll(-1, 1), torch.ones(2, 12), torch.zeros(2, 12, dtype=torch.int64), 1)


def random_decoder(**fields: object) -> Decoder:
    torch.manual_seed(0)
    config = DecoderConfig(vocabulary_size=60, width=32, layers=2, **fields)  # type: ignore[arg-type]
    decoder = Decoder(config)
    with torch.no_grad():
        for p in decoder.parameters():
            p.uniform_(0.5, 1.5) if p.ndim == 1 else p.normal_(std=0.2)
    return decoder.eval()


@torch.no_grad()
def logits(decoder: Decoder) -> Tensor:
    return decoder(TOKENS, POSITIONS)


def train(decoder: Decoder, steps: int = 3) -> None:
    optimizer = torch.optim.AdamW([p for p in decoder.parameters() if p.requires_grad], lr=0.02, weight_decay=0.5)
    for _ in range(steps):
        optimizer.zero_grad()
        decoder(TOKENS, POSITIONS, targets=TARGETS, z_loss=1e-3).loss.backward()
        optimizer.step()


@pytest.mark.parametrize("fields", [{}, {"qkv_bias": True, "tie_embeddings": False, "norm_placement": "post"}], ids=str)
def test_step_zero_equals_the_base_and_merging_keeps_what_was_learnt(fields: dict[str, object]) -> None:
    decoder = random_decoder(**fields)
    before = {name: p.clone() for name, p in decoder.named_parameters()}
    plain = logits(decoder)
    names = add_lora(decoder, LoRAConfig(rank=4, alpha=8))
    assert len(names) == 14
    assert torch.equal(logits(decoder), plain)
    train(decoder)
    adapted = logits(decoder)
    assert (adapted - plain).abs().max() > 0.1
    merge_lora(decoder)
    torch.testing.assert_close(logits(decoder), adapted, atol=1e-5, rtol=0)
    assert {n for n, p in decoder.named_parameters() if not torch.equal(p, before[n])} == {f"{n}.weight" for n in names}
    assert [n for n, _ in decoder.named_parameters()] == list(before)


def test_layer_is_the_formula() -> None:
    torch.manual_seed(0)
    base = torch.nn.Linear(6, 5)
    layer = LoRALinear(base, LoRAConfig(rank=2, alpha=3))
    torch.nn.init.normal_(layer.lora_b)
    x = torch.randn(4, 6)
    expected = x @ (base.weight + 3 / 2 * layer.lora_b @ layer.lora_a).T + base.bias
    torch.testing.assert_close(layer(x), expected)
    torch.testing.assert_close(layer.merged()(x), expected)


def test_dropout_is_on_what_goes_into_the_adapter() -> None:
    layer = LoRALinear(torch.nn.Linear(6, 5), LoRAConfig(rank=2, dropout=0.5))
    x = torch.randn(3, 6)
    assert torch.equal(layer(x), layer.base(x))
    torch.nn.init.normal_(layer.lora_b)
    assert not torch.equal(layer(x), layer(x))
    assert torch.equal(layer.eval()(x), layer(x))


def test_only_targets_learn() -> None:
    decoder = random_decoder()
    assert add_lora(decoder, LoRAConfig(rank=2, targets=["*.q_proj", "layers.1.mlp.up_proj"])) == [
        "layers.0.self_attn.q_proj", "layers.1.self_attn.q_proj", "layers.1.mlp.up_proj",
    ]  # fmt: skip
    assert len([p for p in decoder.parameters() if p.requires_grad]) == 6


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_base_of_few_bits_keeps_its_dtype(dtype: torch.dtype) -> None:
    layer = LoRALinear(torch.nn.Linear(6, 5).to(dtype), LoRAConfig(rank=2))
    assert layer(torch.randn(3, 6).to(dtype)).dtype == dtype
    assert layer.merged().weight.dtype == dtype


@pytest.mark.parametrize(
    ("pattern", "near"),
    [("*.q_porj", "*.q_proj"), ("layers.*.self_attn.q_prj", "layers.*.self_attn.q_proj"), ("lm_head", "")],
)
def test_pattern_without_a_match_suggests_one(pattern: str, near: str) -> None:
    with pytest.raises(PlaitError, match=r"lora\.targets: .* matches none of the 14 names") as caught:
        add_lora(random_decoder(), LoRAConfig(rank=2, targets=["*.k_proj", pattern]))
    assert near in str(caught.value)


def test_matching_keeps_the_order_of_the_names() -> None:
    assert matching(["c", "a", "b"], ["b", "[ca]"], "f") == ["c", "a", "b"]


@pytest.mark.parametrize(
    "wrong",
    [{"rank": -1}, {"alpha": 0}, {"dropout": 1.0}, {"quantize": "int3"}, {"targets": []}],
    ids=lambda w: next(iter(w)),
)
def test_settings_are_checked(wrong: dict[str, object]) -> None:
    with pytest.raises(PlaitError, match=f"lora: {next(iter(wrong))} is"):
        LoRAConfig(**wrong)  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", ["int8", "int4"])
def test_qlora_learns_beside_quantized_layers_and_merges_into_floats(kind: str) -> None:
    decoder = random_decoder(qkv_bias=True)
    plain = logits(decoder)
    names = add_lora(decoder, LoRAConfig(rank=4, quantize=kind, targets=["*_proj"]))
    quantized = logits(decoder)
    codes = decoder.layers[0].mlp.up_proj.base.weight
    assert codes.dtype in (torch.int8, torch.uint8)
    before = {name: t.clone() for name, t in decoder.state_dict().items() if "lora" not in name}
    assert 1e-4 < (quantized - plain).abs().mean() < {"int8": 0.03, "int4": 0.3}[kind] * plain.std()
    train(decoder)
    assert all(torch.equal(t, before[name]) for name, t in decoder.state_dict().items() if "lora" not in name)
    adapted = logits(decoder)
    assert (adapted - quantized).abs().max() > 0.1
    merge_lora(decoder)
    torch.testing.assert_close(logits(decoder), adapted, atol=1e-5, rtol=0)
    assert all(type(decoder.get_submodule(name)) is torch.nn.Linear for name in names)


def test_qlora_s_gradient_is_that_of_the_dequantized_layer() -> None:
    base = torch.nn.Linear(64, 48)
    layer = LoRALinear(quantize_linear(base, "int4"), LoRAConfig(rank=2))
    torch.nn.init.normal_(layer.lora_b)
    x = torch.randn(5, 64, requires_grad=True)
    merged = layer.merged()
    (ours,) = torch.autograd.grad(layer(x).square().sum(), x)
    (theirs,) = torch.autograd.grad(merged(x).square().sum(), x)
    torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("part", ["embed_tokens", "lm_head"])
def test_only_the_chosen_rows_learn(part: str, tied: bool) -> None:
    decoder = random_decoder(tie_embeddings=tied)
    before, ids = deepcopy(decoder.state_dict()), [3, 58, 59, 7]
    plain = logits(decoder)
    decoder.requires_grad_(False)
    split_rows(decoder, ids, embedding=part == "embed_tokens", head=part == "lm_head")
    assert torch.equal(logits(decoder), plain)
    train(decoder)
    adapted = logits(decoder)
    merge(decoder)
    torch.testing.assert_close(logits(decoder), adapted, atol=1e-6, rtol=0)
    changed = {
        (name, int(row)) for name, tensor in decoder.state_dict().items()
        for row in (tensor != before[name]).reshape(len(tensor), -1).any(1).nonzero()
    }  # fmt: skip
    parts = ("embed_tokens", "lm_head") if tied else (part,)
    assert changed == {(f"{p}.weight", i) for p in parts for i in ids}
    assert (decoder.lm_head.weight is decoder.embed_tokens.weight) == tied


@pytest.mark.parametrize("tied", [True, False])
def test_rows_get_the_gradient_of_the_whole_matrix(tied: bool) -> None:
    decoder = random_decoder(tie_embeddings=tied)
    decoder(TOKENS, POSITIONS, targets=TARGETS, z_loss=1e-3).loss.backward()
    whole = {name: getattr(decoder, name).weight.grad.clone() for name in ("embed_tokens", "lm_head")}
    ids = torch.tensor([0, 9, 14, 59])
    split_rows(decoder, ids)
    decoder(TOKENS, POSITIONS, targets=TARGETS, z_loss=1e-3).loss.backward()
    for name, gradient in whole.items():
        torch.testing.assert_close(getattr(decoder, name).rows.grad, gradient[ids], atol=1e-6, rtol=1e-5)


def adapted_decoder() -> tuple[Decoder, LoRAConfig]:
    decoder, lora = random_decoder(), LoRAConfig(rank=3, targets=["*.v_proj"])
    add_lora(decoder, lora)
    split_rows(decoder, range(50, 60))
    decoder.norm.requires_grad_(True)
    train(decoder)
    return decoder, lora


def test_adapter_goes_through_a_file(tmp_path) -> None:
    decoder, lora = adapted_decoder()
    save_adapter(tmp_path / "a", adapter_tensors(decoder), lora)
    again = random_decoder()
    load_adapter(tmp_path / "a", again)
    assert torch.equal(logits(again), logits(decoder))
    assert set(adapter_tensors(again)) == set(adapter_tensors(decoder))
    merge(again)
    torch.testing.assert_close(logits(again), logits(decoder), atol=1e-5, rtol=0)
    assert {p.name for p in (tmp_path / "a").iterdir()} == {"adapter.json", "adapter.safetensors"}


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda t: t.pop("layers.1.self_attn.v_proj.lora_a"), r"'layers\.1\.self_attn\.v_proj\.lora_a' is missing"),
        (lambda t: t.update(extra=torch.ones(2)), r"'extra' is \(2,\), the decoder has no such tensor"),
        (lambda t: t.update({"norm.weight": torch.ones(2)}), r"'norm\.weight' is \(2,\), the decoder has \(32,\)"),
        (lambda t: t.update({"embed_tokens.ids": torch.tensor([60])}), "has ids beyond the decoder's 60"),
    ],
)
def test_adapter_of_another_decoder_is_refused(change: Callable[[dict[str, Tensor]], object], reason: str) -> None:
    decoder, lora = adapted_decoder()
    tensors = adapter_tensors(decoder)
    change(tensors)
    with pytest.raises(PlaitError, match=reason):
        attach(random_decoder(), tensors, lora)
