import pytest
import torch
import torch.nn.functional as F

from plait.model.norm import RMSNorm


@pytest.mark.parametrize("shape", [(7,), (3, 8), (2, 3, 5), (2, 3, 4, 6), (0, 4)])
@pytest.mark.parametrize("eps", [1e-5, 0.1])
def test_equals_torch_in_value_and_gradient(shape: tuple[int, ...], eps: float) -> None:
    torch.manual_seed(0)
    norm = RMSNorm(shape[-1], eps=eps).double()
    torch.nn.init.uniform_(norm.weight, -1, 2)
    x = (3 * torch.randn(shape, dtype=torch.float64)).requires_grad_()
    probe = torch.randn(shape, dtype=torch.float64)
    found, expected = norm(x), F.rms_norm(x, shape[-1:], norm.weight, eps)
    torch.testing.assert_close(found, expected)
    inputs = (x, norm.weight)
    torch.testing.assert_close(torch.autograd.grad(found, inputs, probe), torch.autograd.grad(expected, inputs, probe))


def test_gradient_is_that_of_finite_differences() -> None:
    torch.manual_seed(0)
    norm = RMSNorm(5, eps=1e-5).double()
    x = torch.randn(2, 3, 5, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(
        lambda x, w: torch.func.functional_call(norm, {"weight": w}, (x,)), (x, norm.weight)
    )


@pytest.mark.parametrize("frozen", ["x", "weight"])
def test_frozen_input(frozen: str) -> None:
    norm, x = RMSNorm(6, eps=1e-5), torch.randn(2, 6, requires_grad=True)
    trained, expected = (norm.weight, None) if frozen == "x" else (x, None)
    expected = torch.autograd.grad(F.rms_norm(x, (6,), norm.weight, 1e-5).square().sum(), trained)[0]
    (x if frozen == "x" else norm.weight).requires_grad_(False)
    norm(x).square().sum().backward()
    torch.testing.assert_close(trained.grad, expected)
    assert (x if frozen == "x" else norm.weight).grad is None


def test_a_strided_input_and_its_gradient() -> None:
    torch.manual_seed(0)
    norm = RMSNorm(4, eps=1e-5)
    x = torch.randn(4, 3, 2, requires_grad=True)
    probe = torch.randn(2, 4, 3).permute(0, 2, 1)
    found = torch.autograd.grad(norm(x.permute(2, 1, 0)), x, probe)
    expected = torch.autograd.grad(F.rms_norm(x.permute(2, 1, 0), (4,), norm.weight, 1e-5), x, probe)
    torch.testing.assert_close(found, expected)


def test_bfloat16_and_no_grad_are_left_to_torch() -> None:
    x = torch.randn(3, 16)
    norm = RMSNorm(16, eps=1e-5)
    with torch.no_grad():
        assert torch.equal(norm(x), F.rms_norm(x, (16,), norm.weight, 1e-5))
    low = norm.bfloat16()
    assert torch.equal(low(x.bfloat16()), F.rms_norm(x.bfloat16(), (16,), low.weight, 1e-5))


def test_compiles_without_a_graph_break() -> None:
    norm, x = RMSNorm(8, eps=1e-5), torch.randn(2, 8)
    compiled = torch.compile(norm, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), norm(x))
