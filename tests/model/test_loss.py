import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from plait.model import loss as module
from plait.model.config import DecoderConfig
from plait.model.decoder import Decoder
from plait.model.loss import LossSums, Targets, next_token_loss

VOCABULARY, WIDTH, GROUPS = 23, 8, 4


@pytest.fixture
def head() -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(WIDTH, VOCABULARY, bias=False)


@pytest.fixture
def hidden() -> Tensor:
    torch.manual_seed(1)
    return (3 * torch.randn(3, 11, WIDTH)).requires_grad_()


@pytest.fixture
def targets() -> Targets:
    torch.manual_seed(2)
    weights = torch.rand(3, 11) * torch.tensor([0.0, 1.0, 3.0])[torch.randint(3, (3, 11))]
    return Targets(torch.randint(VOCABULARY, (3, 11)), weights, torch.randint(GROUPS - 1, (3, 11)), GROUPS)


def plain(head: nn.Linear, hidden: Tensor, targets: Targets, z_loss: float) -> Tensor:
    """The formula over all positions at once."""
    logits = head(hidden)
    entropy = F.cross_entropy(logits.flatten(0, 1), targets.tokens.flatten(), reduction="none").view(hidden.shape[:2])
    return (targets.weights * (entropy + z_loss * torch.logsumexp(logits, -1) ** 2)).sum()


@pytest.mark.parametrize("chunk", [4096, 1, 5])
@pytest.mark.parametrize("z_loss", [0.0, 1e-2])
def test_value_and_gradients_are_those_of_the_plain_formula(
    head: nn.Linear, hidden: Tensor, targets: Targets, z_loss: float, chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_CHUNK", chunk)
    sums = next_token_loss(head, hidden, targets, z_loss)
    expected = plain(head, hidden, targets, z_loss)
    torch.testing.assert_close(sums.loss, expected, atol=1e-4, rtol=1e-5)
    found = torch.autograd.grad(sums.loss, [hidden, head.weight])
    wanted = torch.autograd.grad(expected, [hidden, head.weight])
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("chunk", [4096, 5])
def test_group_sums(
    head: nn.Linear, hidden: Tensor, targets: Targets, chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_CHUNK", chunk)
    sums = next_token_loss(head, hidden, targets, z_loss=0.1)
    entropy = F.cross_entropy(head(hidden).flatten(0, 1), targets.tokens.flatten(), reduction="none")
    for group in range(GROUPS):
        of_group = (targets.groups.flatten() == group) & (targets.weights.flatten() > 0)
        # Neither weights nor z-loss enter the figures that are reported.
        torch.testing.assert_close(sums.group_loss[group], entropy[of_group].sum().detach(), atol=1e-3, rtol=1e-5)
        assert sums.group_count[group] == of_group.sum()
    assert sums.group_count[GROUPS - 1] == 0
    assert not sums.group_loss.requires_grad


def test_positions_without_weight_are_left_out(head: nn.Linear, hidden: Tensor, targets: Targets) -> None:
    """Even a broken hidden state or a meaningless target there changes nothing."""
    out = targets.weights == 0
    assert out.any()
    broken = torch.where(out[..., None], torch.nan, hidden.detach()).requires_grad_()
    elsewhere = Targets(torch.where(out, -7, targets.tokens), targets.weights, targets.groups, GROUPS)
    seen = []

    def watched(states: Tensor) -> Tensor:
        seen.append(len(states))
        return head(states)

    sums = next_token_loss(watched, broken, elsewhere, 1e-2)
    assert sum(seen) == int((~out).sum())
    torch.testing.assert_close(sums.loss, next_token_loss(head, hidden, targets, 1e-2).loss)
    gradient = torch.autograd.grad(sums.loss, broken)[0]
    assert torch.equal(gradient[out], torch.zeros_like(gradient[out]))
    assert gradient[~out].abs().sum() > 0


def test_no_position_at_all_is_a_loss_of_zero(head: nn.Linear, hidden: Tensor, targets: Targets) -> None:
    nothing = Targets(targets.tokens, torch.zeros(3, 11), targets.groups, GROUPS)
    sums = next_token_loss(head, hidden, nothing, 1e-2)
    # Every rank must run its backward pass, also one whose batch has nothing to predict.
    sums.loss.backward()
    assert sums.loss == 0
    assert sums.group_count.sum() == 0
    assert hidden.grad is not None
    assert hidden.grad.abs().sum() == 0


def test_at_most_a_chunk_of_logits_exists(
    head: nn.Linear, hidden: Tensor, targets: Targets, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_CHUNK", 4)
    sizes = []

    def watched(states: Tensor) -> Tensor:
        sizes.append(len(states))
        return head(states)

    next_token_loss(watched, hidden, targets, 0.0).loss.backward()
    assert max(sizes) == 4
    # Each chunk runs once forward and once more for its gradient, so no logits are kept.
    assert sum(sizes) == 2 * int((targets.weights > 0).sum())


def test_decoder_returns_the_sums_of_its_logits(targets: Targets) -> None:
    torch.manual_seed(0)
    decoder = Decoder(DecoderConfig(vocabulary_size=VOCABULARY, width=16, layers=1))
    tokens = torch.randint(VOCABULARY, (3, 11))
    positions = torch.arange(11).repeat(3, 1)
    sums = decoder(tokens, positions, targets=targets, z_loss=1e-2)
    assert isinstance(sums, LossSums)
    logits = decoder(tokens, positions)
    entropy = F.cross_entropy(logits.flatten(0, 1), targets.tokens.flatten(), reduction="none").view(3, 11)
    expected = (targets.weights * (entropy + 1e-2 * logits.logsumexp(-1) ** 2)).sum()
    torch.testing.assert_close(sums.loss, expected)
