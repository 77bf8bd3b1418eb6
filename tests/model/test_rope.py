import torch

from plait.model.rope import rotary_table, rotate


def test_scores_depend_on_the_distance_only() -> None:
    torch.manual_seed(0)
    q, k = torch.randn(2, 1, 1, 3, 8).double()

    def score(at_q: int, at_k: int) -> torch.Tensor:
        tables = [rotary_table(torch.tensor([[p]]), 8, 10_000.0) for p in (at_q, at_k)]
        return (rotate(q, tables[0]) * rotate(k, tables[1])).sum(-1)

    torch.testing.assert_close(score(7, 2), score(25, 20), atol=1e-5, rtol=0)
    assert not torch.allclose(score(7, 2), score(7, 3), atol=1e-3)


def test_position_zero_is_the_identity_and_lengths_are_kept() -> None:
    x = torch.randn(1, 5, 2, 6)
    turned = rotate(x, rotary_table(torch.arange(5)[None], 6, 100.0))
    assert torch.equal(turned[:, 0], x[:, 0])
    torch.testing.assert_close(turned.norm(dim=-1), x.norm(dim=-1))


def test_table_stays_float32_and_rotation_keeps_the_dtype() -> None:
    # In bfloat16 the angles of high positions would be wrong by whole turns.
    table = rotary_table(torch.tensor([[1000]]), 8, 10_000.0)
    assert table[0].dtype == torch.float32
    torch.testing.assert_close(table[0][0, 0, 0], torch.tensor(1000.0).cos())
    assert rotate(torch.randn(1, 1, 2, 8).bfloat16(), table).dtype == torch.bfloat16
