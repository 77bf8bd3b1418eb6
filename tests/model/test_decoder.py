"""The decoder is the Llama (and, with QK norm, the Qwen3) of transformers, on documents packed in any way."""

from typing import Any

import pytest
import torch
from torch import Tensor

from plait.errors import PlaitError
from plait.model.attention import Packing
from plait.model.config import DecoderConfig
from plait.model.decoder import Decoder

VOCABULARY = 97


def random_decoder(seed: int = 0, **fields: Any) -> Decoder:
    """Every weight is random, the norms' too, and large enough that every part shows in the logits."""
    torch.manual_seed(seed)
    decoder = Decoder(DecoderConfig(vocabulary_size=VOCABULARY, **fields)).eval()
    with torch.no_grad():
        for parameter in decoder.parameters():
            if parameter.ndim == 1:
                parameter.uniform_(0.5, 1.5)
            else:
                parameter.normal_(std=0.2)
    return decoder


def hugging_face(decoder: Decoder) -> torch.nn.Module:
    """The same model in transformers, with the same weights under the prefix "model."."""
    from transformers import LlamaConfig, LlamaForCausalLM, Qwen3Config, Qwen3ForCausalLM

    config = decoder.config
    model_class, config_class = (Qwen3ForCausalLM, Qwen3Config) if config.qk_norm else (LlamaForCausalLM, LlamaConfig)
    theirs = model_class(
        config_class(
            vocab_size=config.vocabulary_size,
            hidden_size=config.width,
            intermediate_size=config.ffn_width,
            num_hidden_layers=config.layers,
            num_attention_heads=config.heads,
            num_key_value_heads=config.kv_heads,
            head_dim=config.head_size,
            rms_norm_eps=config.norm_eps,
            rope_parameters={"rope_type": "default", "rope_theta": config.rope_theta},
            tie_word_embeddings=config.tie_embeddings,
            attention_bias=False,
            max_position_embeddings=512,
        )
    )
    weights = {k if k.startswith("lm_head.") else f"model.{k}": v for k, v in decoder.state_dict().items()}
    found = theirs.load_state_dict(weights, strict=True)
    assert not found.missing_keys
    assert not found.unexpected_keys
    return theirs.eval()


def along(*lengths: int) -> Tensor:
    """Positions of one row that holds documents of these lengths."""
    return torch.cat([torch.arange(n) for n in lengths])[None]


CONFIGS = [
    {"width": 32, "layers": 1, "heads": 4, "kv_heads": 4},
    {"width": 32, "layers": 3, "heads": 4, "kv_heads": 1, "tie_embeddings": False},
    {"width": 48, "layers": 2, "heads": 6, "kv_heads": 3, "rope_theta": 100.0},
    {"width": 64, "layers": 2, "heads": 8, "kv_heads": 2, "norm_eps": 1e-2, "ffn_width": 40},
    {"width": 16, "layers": 2, "heads": 1, "kv_heads": 1, "rope_theta": 1e6, "tie_embeddings": False},
]


@pytest.mark.parametrize("qk_norm", [False, True], ids=["llama", "qwen3"])
@pytest.mark.parametrize("fields", CONFIGS, ids=str)
@torch.no_grad()
def test_logits_equal_transformers(fields: dict[str, Any], qk_norm: bool) -> None:
    decoder = random_decoder(qk_norm=qk_norm, **fields)
    tokens = torch.randint(VOCABULARY, (2, 70))
    positions = torch.arange(70).expand(2, -1)
    expected = hugging_face(decoder)(tokens).logits
    assert expected.std() > 0.5  # a comparison of near-zero logits would prove nothing
    torch.testing.assert_close(decoder(tokens, positions), expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("qk_norm", [False, True])
def test_packed_document_is_as_alone_in_logits_and_gradients(qk_norm: bool) -> None:
    decoder = random_decoder(width=32, layers=2, heads=4, kv_heads=2, qk_norm=qk_norm)
    tokens = torch.randint(VOCABULARY, (2, 20))
    positions = torch.cat([along(5, 9, 6), along(20)])
    probe = torch.randn(9, VOCABULARY)

    def run(tokens: Tensor, positions: Tensor, row: int, part: slice) -> tuple[Tensor, list[Tensor]]:
        logits = decoder(tokens, positions)[row, part]
        return logits, list(torch.autograd.grad((logits * probe).sum(), list(decoder.parameters())))

    packed, packed_gradients = run(tokens, positions, 0, slice(5, 14))
    alone, alone_gradients = run(tokens[:1, 5:14], along(9), 0, slice(0, 9))
    torch.testing.assert_close(packed, alone, atol=1e-5, rtol=1e-5)
    for a, b in zip(packed_gradients, alone_gradients, strict=True):
        torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_neighbours_do_not_matter() -> None:
    decoder = random_decoder(width=32, layers=2)
    tokens = torch.randint(VOCABULARY, (2, 20))
    positions = torch.cat([along(5, 9, 6), along(12, 8)])
    other = torch.randint(VOCABULARY, (2, 20))
    other[0, 5:14] = tokens[0, 5:14]
    a, b = decoder(tokens, positions), decoder(other, positions)
    torch.testing.assert_close(a[0, 5:14], b[0, 5:14], atol=1e-5, rtol=0)
    assert (a[0, 14:] - b[0, 14:]).abs().max() > 0.1


@pytest.mark.parametrize("tail", [along(7), torch.zeros(1, 7, dtype=torch.int64), 11 + along(7)])
@torch.no_grad()
def test_padding_tail_does_not_matter(tail: Tensor) -> None:
    decoder = random_decoder(width=32, layers=2)
    tokens = torch.randint(VOCABULARY, (1, 18))
    padded = decoder(tokens, torch.cat([along(11), tail], dim=1))[:, :11]
    torch.testing.assert_close(padded, decoder(tokens[:, :11], along(11)), atol=1e-5, rtol=0)


@torch.no_grad()
def test_positions_restart_and_later_tokens_are_not_seen() -> None:
    decoder = random_decoder(width=32, layers=2)
    document = torch.randint(VOCABULARY, (1, 8))
    logits = decoder(document.repeat(1, 2), along(8, 8))
    torch.testing.assert_close(logits[:, :8], logits[:, 8:], atol=1e-5, rtol=0)
    changed = document.clone()
    changed[0, 5] = (changed[0, 5] + 1) % VOCABULARY
    again = decoder(changed, along(8))
    torch.testing.assert_close(again[:, :5], logits[:, :5], atol=1e-5, rtol=0)
    assert (again[:, 5:] - logits[:, 5:8]).abs().amax(-1).min() > 1e-3


def test_packing_restarts_on_every_row() -> None:
    # The second row continues a document's numbering, and still must not see the first row.
    packing = Packing.of(torch.tensor([[0, 1, 0, 1], [2, 3, 4, 0]]))
    assert packing.valid.sum(1).tolist() == [2, 2, 3, 1]
    assert packing.gather[packing.valid].tolist() == list(range(8))


def test_packing_leaves_the_positions_alone() -> None:
    positions = torch.tensor([[3, 4, 0, 1]])
    Packing.of(positions)
    assert positions.tolist() == [[3, 4, 0, 1]]


def test_tied_head_shares_the_embedding() -> None:
    tied = Decoder(DecoderConfig(vocabulary_size=9, width=16))
    untied = Decoder(DecoderConfig(vocabulary_size=9, width=16, tie_embeddings=False))
    assert tied.lm_head.weight is tied.embed_tokens.weight
    assert untied.lm_head.weight is not untied.embed_tokens.weight
    assert not torch.equal(untied.lm_head.weight, untied.embed_tokens.weight)


def test_initial_weights_scale_with_depth() -> None:
    torch.manual_seed(0)
    decoder = Decoder(DecoderConfig(vocabulary_size=400, width=128, layers=8))
    weights = dict(decoder.named_parameters())
    for name, std in (
        ("embed_tokens.weight", 0.02),
        ("layers.3.self_attn.q_proj.weight", 0.02),
        ("layers.3.self_attn.o_proj.weight", 0.02 / 4),
        ("layers.3.mlp.down_proj.weight", 0.02 / 4),
    ):
        assert weights[name].std().item() == pytest.approx(std, rel=0.05)
    assert all(torch.equal(w, torch.ones_like(w)) for w in weights.values() if w.ndim == 1)


def test_dropout_is_on_in_training_only() -> None:
    decoder = random_decoder(width=32, layers=1, dropout=0.5)
    tokens = torch.randint(VOCABULARY, (1, 6))
    assert torch.equal(decoder(tokens, along(6)), decoder(tokens, along(6)))
    decoder.train()
    assert not torch.equal(decoder(tokens, along(6)), decoder(tokens, along(6)))


def test_vocabulary_size_must_be_set() -> None:
    with pytest.raises(PlaitError, match="vocabulary_size is not set"):
        Decoder(DecoderConfig())
