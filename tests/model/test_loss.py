"""The loss in chunks is the plain formula, in value and in gradient."""

import os
import subprocess
import sys
from importlib.util import find_spec
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from plait.model import loss as module
from plait.model.config import DecoderConfig
from plait.model.decoder import Decoder
from plait.model.loss import Head, LossSums, Targets, differentiate

VOCABULARY, WIDTH, GROUPS = 23, 8, 4


@pytest.fixture
def head() -> Head:
    torch.manual_seed(0)
    return Head(WIDTH, VOCABULARY)


@pytest.fixture
def hidden() -> Tensor:
    torch.manual_seed(1)
    return (3 * torch.randn(3, 11, WIDTH)).requires_grad_()


@pytest.fixture
def targets() -> Targets:
    return random_targets(2, 3, 11, VOCABULARY)


def random_targets(seed: int, rows: int, length: int, vocabulary: int) -> Targets:
    """About a third of the positions have no weight, and the last group has no positions."""
    generator = torch.Generator().manual_seed(seed)

    def draw(limit: int) -> Tensor:
        return torch.randint(limit, (rows, length), generator=generator)

    weights = torch.rand(rows, length, generator=generator) * torch.tensor([0.0, 1.0, 3.0])[draw(3)]
    return Targets(draw(vocabulary), weights, draw(GROUPS - 1), GROUPS)


def plain(weight: Tensor, hidden: Tensor, targets: Targets, z_loss: float) -> Tensor:
    """The formula over all positions at once."""
    logits = (hidden @ weight.T).double()
    entropy = F.cross_entropy(logits.flatten(0, 1), targets.tokens.flatten(), reduction="none").view(hidden.shape[:2])
    return (targets.weights * (entropy + z_loss * torch.logsumexp(logits, -1) ** 2)).sum()


def gradients(loss: Tensor, *inputs: Tensor) -> tuple[Tensor, ...]:
    return torch.autograd.grad(loss, inputs)


def in_chunks(monkeypatch: pytest.MonkeyPatch, size: int) -> None:
    monkeypatch.setattr(module, "chunk_positions", lambda positions, row_bytes: size)


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 2**31),
    rows=st.integers(1, 3),
    length=st.integers(1, 40),
    vocabulary=st.integers(1, 300),
    width=st.integers(1, 40),
    z_loss=st.sampled_from([0.0, 1e-4, 1e-1]),
    chunk=st.sampled_from([1, 3, 16, 1000]),
    scale=st.sampled_from([0.1, 1.0, 30.0]),
)
def test_equals_the_plain_formula(
    seed: int, rows: int, length: int, vocabulary: int, width: int, z_loss: float, chunk: int, scale: float
) -> None:
    torch.manual_seed(seed)
    head = Head(width, vocabulary).double()
    hidden = (scale * torch.randn(rows, length, width, dtype=torch.float64)).requires_grad_()
    targets = random_targets(seed, rows, length, vocabulary)
    with pytest.MonkeyPatch.context() as monkeypatch:
        in_chunks(monkeypatch, chunk)
        found = head(hidden, targets, z_loss).loss
    expected = plain(head.weight, hidden, targets, z_loss)
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(gradients(found, hidden, head.weight), gradients(expected, hidden, head.weight))


def test_chunks_have_fast_matrix_products_and_bounded_memory() -> None:
    assert module.chunk_positions(4096, 184_622 * 4) == 256
    assert module.chunk_positions(10**6, 184_622 * 4) == 1024
    assert module.chunk_positions(4096, 1000) * 1000 <= 2**26


def test_float32_with_large_logits(head: Head, hidden: Tensor, targets: Targets) -> None:
    found = head(100 * hidden, targets, 1e-4).loss
    expected = plain(head.weight, 100 * hidden, targets, 1e-4)
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-4)
    found, expected = gradients(found, hidden, head.weight), gradients(expected, hidden, head.weight)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("chunk", [1000, 5])
def test_group_sums(head: Head, hidden: Tensor, targets: Targets, chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    in_chunks(monkeypatch, chunk)
    sums = head(hidden, targets, z_loss=0.1)
    entropy = F.cross_entropy(head(hidden).flatten(0, 1), targets.tokens.flatten(), reduction="none")
    for group in range(GROUPS):
        of_group = (targets.groups.flatten() == group) & (targets.weights.flatten() > 0)
        # Neither weights nor z-loss enter the figures that are reported.
        torch.testing.assert_close(sums.group_loss[group], entropy[of_group].sum().detach(), atol=1e-3, rtol=1e-5)
        assert sums.group_count[group] == of_group.sum()
    assert sums.group_count[GROUPS - 1] == 0
    assert not sums.group_loss.requires_grad


def test_positions_without_weight_are_left_out(head: Head, hidden: Tensor, targets: Targets) -> None:
    """Even a broken hidden state, a meaningless target or an unknown group there changes nothing."""
    out = targets.weights == 0
    assert out.any()
    broken = torch.where(out[..., None], torch.nan, hidden.detach()).requires_grad_()
    elsewhere = Targets(
        torch.where(out, -7, targets.tokens), targets.weights, torch.where(out, 99, targets.groups), GROUPS
    )
    found, expected = head(broken, elsewhere, 1e-2), head(hidden, targets, 1e-2)
    torch.testing.assert_close(tuple(found), tuple(expected))
    gradient, to_weight = gradients(found.loss, broken, head.weight)
    assert torch.equal(gradient[out], torch.zeros_like(gradient[out]))
    assert gradient[~out].abs().sum() > 0
    torch.testing.assert_close((gradient, to_weight), gradients(expected.loss, hidden, head.weight))


def test_no_position_at_all_is_a_loss_of_zero(head: Head, hidden: Tensor, targets: Targets) -> None:
    nothing = Targets(targets.tokens, torch.zeros(3, 11), targets.groups, GROUPS)
    sums = head(hidden, nothing, 1e-2)
    # Every rank must run its backward pass, also one whose batch has nothing to predict.
    sums.loss.backward()
    assert sums.loss == 0
    assert sums.group_count.sum() == 0
    for gradient in (hidden.grad, head.weight.grad):
        assert gradient is not None
        assert gradient.abs().sum() == 0


def test_at_most_a_chunk_of_logits_exists(
    head: Head, hidden: Tensor, targets: Targets, monkeypatch: pytest.MonkeyPatch
) -> None:
    in_chunks(monkeypatch, 4)
    sizes = []

    def watched(logits: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
        sizes.append(logits.numel())
        return differentiate(logits, *rest)

    monkeypatch.setattr(module, "differentiate", watched)
    head(hidden, targets, 0.0).loss.backward()
    assert max(sizes) == 4 * VOCABULARY
    # Each position's logits are computed once; the backward pass needs none.
    assert sum(sizes) == int((targets.weights > 0).sum()) * VOCABULARY


@pytest.mark.parametrize("frozen", ["head", "hidden", "both"])
def test_frozen_inputs_get_no_gradient(head: Head, hidden: Tensor, targets: Targets, frozen: str) -> None:
    expected = gradients(plain(head.weight, hidden, targets, 1e-2), hidden, head.weight)
    head.requires_grad_(frozen == "hidden")
    hidden.requires_grad_(frozen == "head")
    loss = head(hidden, targets, 1e-2).loss
    if frozen == "both":
        assert not loss.requires_grad
        return
    loss.backward()
    assert (hidden.grad is None) == (frozen == "hidden")
    assert (head.weight.grad is None) == (frozen == "head")
    found, wanted = (hidden.grad, expected[0]) if frozen == "head" else (head.weight.grad, expected[1])
    torch.testing.assert_close(found, wanted, atol=1e-4, rtol=1e-4)


def test_without_grad_mode_it_is_the_same_value(head: Head, hidden: Tensor, targets: Targets) -> None:
    with torch.no_grad():
        sums = head(hidden, targets, 1e-2)
    assert not sums.loss.requires_grad
    torch.testing.assert_close(tuple(sums), tuple(head(hidden, targets, 1e-2)))


def test_gradient_is_scaled_and_accumulated(head: Head, hidden: Tensor, targets: Targets) -> None:
    once = gradients(plain(head.weight, hidden, targets, 1e-2), hidden, head.weight)
    for factor in (0.25, 3.0):
        (factor * head(hidden, targets, 1e-2).loss).backward()
    found = (hidden.grad, head.weight.grad)
    torch.testing.assert_close(found, tuple(3.25 * x for x in once), atol=1e-4, rtol=1e-4)


def test_gradient_can_be_asked_for_again(head: Head, hidden: Tensor, targets: Targets) -> None:
    loss = head(hidden, targets, 1e-2).loss
    kept = torch.autograd.grad(5 * loss, [hidden, head.weight], retain_graph=True)
    expected = gradients(5 * plain(head.weight, hidden, targets, 1e-2), hidden, head.weight)
    torch.testing.assert_close(kept, expected, atol=1e-3, rtol=1e-4)
    torch.testing.assert_close(gradients(5 * loss, hidden, head.weight), kept)


def test_bfloat16_gradients_are_summed_in_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    head = Head(16, 50).bfloat16()
    hidden = (torch.randn(1, 2000, 16)).bfloat16().requires_grad_()
    targets = Targets(torch.randint(50, (1, 2000)), torch.ones(1, 2000), torch.zeros(1, 2000, dtype=torch.int64), 1)
    in_chunks(monkeypatch, 2)
    loss = head(hidden, targets, 1e-4).loss
    exact = plain(head.weight.double(), hidden.double(), targets, 1e-4)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss.double(), exact, rtol=1e-3, atol=0)
    found, wanted = gradients(loss, hidden, head.weight), gradients(exact, hidden, head.weight)
    assert [x.dtype for x in found] == [torch.bfloat16] * 2
    for a, b in zip(found, wanted, strict=True):
        # A sum of a thousand chunks in bfloat16 would be off by more than ten times this.
        assert (a.double() - b.double()).norm() < 5e-3 * b.double().norm()


def test_autocast_multiplies_in_bfloat16_and_keeps_float32_gradients(
    head: Head, hidden: Tensor, targets: Targets
) -> None:
    with torch.autocast("cpu", torch.bfloat16):
        found = head(hidden, targets, 1e-2).loss
    low = head(hidden.bfloat16(), targets, 1e-2).loss
    torch.testing.assert_close(found, low)
    assert found != head(hidden, targets, 1e-2).loss
    to_hidden, to_weight = gradients(found, hidden, head.weight)
    assert to_hidden.dtype == to_weight.dtype == torch.float32
    exact = gradients(plain(head.weight, hidden, targets, 1e-2), hidden, head.weight)
    torch.testing.assert_close((to_hidden, to_weight), exact, atol=0.1, rtol=0.05)


@pytest.mark.parametrize("tied", [True, False])
def test_decoder_returns_the_sums_of_its_logits(targets: Targets, tied: bool) -> None:
    torch.manual_seed(0)
    decoder = Decoder(DecoderConfig(vocabulary_size=VOCABULARY, width=16, layers=1, tie_embeddings=tied))
    tokens = torch.randint(VOCABULARY, (3, 11))
    positions = torch.arange(11).repeat(3, 1)
    sums = decoder(tokens, positions, targets=targets, z_loss=1e-2)
    assert isinstance(sums, LossSums)
    logits = decoder(tokens, positions)
    entropy = F.cross_entropy(logits.flatten(0, 1), targets.tokens.flatten(), reduction="none").view(3, 11)
    expected = (targets.weights * (entropy + 1e-2 * logits.logsumexp(-1) ** 2)).sum()
    torch.testing.assert_close(sums.loss, expected)
    # A tied weight's gradient is that of the head and that of the embedding.
    parameters = tuple(decoder.parameters())
    found, wanted = gradients(sums.loss, *parameters), gradients(expected, *parameters)
    torch.testing.assert_close(found, wanted, atol=1e-4, rtol=1e-4)


def test_compiles_without_a_graph_break(head: Head, hidden: Tensor, targets: Targets) -> None:
    compiled = torch.compile(lambda h: head(2 * h, targets, 1e-2), backend="aot_eager", fullgraph=True)
    found, expected = compiled(hidden), head(2 * hidden, targets, 1e-2)
    torch.testing.assert_close(tuple(found), tuple(expected))
    found, expected = gradients(found.loss, hidden, head.weight), gradients(expected.loss, hidden, head.weight)
    torch.testing.assert_close(found, expected)


def test_operator_is_registered_as_torch_expects(head: Head, hidden: Tensor, targets: Targets) -> None:
    arguments = (hidden.flatten(0, 1), head.weight, targets.tokens.flatten(), targets.weights.flatten(), 1e-2)
    for wanted in ((True, True), (False, True), (True, False)):
        torch.library.opcheck(
            torch.ops.plait.linear_cross_entropy.default,
            (*arguments, *wanted),
            test_utils=("test_schema", "test_autograd_registration", "test_faketensor"),
        )


@pytest.mark.skipif(find_spec("liger_kernel") is None, reason="liger-kernel is not installed")
def test_liger_kernel_does_the_same() -> None:
    script = """
import torch
from plait.model.loss import differentiate, differentiate_with_liger
torch.manual_seed(0)
logits, weights, tokens = 3 * torch.randn(6, 37), torch.rand(6), torch.randint(37, (6,))
ours, theirs = logits.clone(), logits.clone()
expected = differentiate(ours, tokens, weights, 1e-2)
found = tuple(x.detach() for x in differentiate_with_liger(theirs, tokens, weights, 1e-2))
torch.testing.assert_close((*found, theirs), (*expected, ours), atol=1e-5, rtol=1e-5)
"""
    # Triton reads when it is imported whether it is to interpret its kernels.
    subprocess.run([sys.executable, "-c", script], env=os.environ | {"TRITON_INTERPRET": "1"}, check=True)
