import pytest
import torch

from lrlhf.kernels.norm import rms_norm


def by_hand(x, weight, eps):
    return x / (x.square().mean(-1, keepdim=True) + eps).sqrt() * weight


def test_it_is_the_formula_with_its_gradients():
    torch.manual_seed(0)
    x = torch.randn(3, 5, 8, dtype=torch.float64, requires_grad=True)
    weight = (torch.rand(8, dtype=torch.float64) + 0.5).requires_grad_()
    direction = torch.randn(3, 5, 8, dtype=torch.float64)
    results = [f(x, weight, 0.1) for f in (rms_norm, by_hand)]
    torch.testing.assert_close(*results)
    torch.testing.assert_close(*(torch.autograd.grad(y, (x, weight), direction) for y in results))


def test_a_row_of_zeros_is_finite_by_eps():
    x = torch.zeros(1, 4, requires_grad=True)
    result = rms_norm(x, torch.full((4,), 2.0), 1e-6)
    assert torch.equal(result, torch.zeros(1, 4))
    (gradient,) = torch.autograd.grad(result.sum(), x)
    torch.testing.assert_close(gradient, torch.full((1, 4), 2000.0))  # weight / sqrt(eps)


@pytest.mark.parametrize("size", [1e-3, 1.0, 1e3])
def test_in_bf16_only_the_result_is_rounded(size):
    torch.manual_seed(0)
    x = (size * torch.randn(20, 64)).bfloat16().requires_grad_()
    weight, direction = (torch.rand(64) + 0.5).bfloat16(), torch.randn(20, 64).bfloat16()
    exact = x.detach().double().requires_grad_()
    mine, truth = rms_norm(x, weight, 1e-5), by_hand(exact, weight.double(), 1e-5)
    assert mine.dtype == torch.bfloat16
    half_a_step = 2**-8
    assert ((mine - truth).abs() <= 1.01 * half_a_step * truth.abs()).all()
    (got,), (expected,) = (torch.autograd.grad(y, z, direction.to(y.dtype)) for y, z in ((mine, x), (truth, exact)))
    assert ((got - expected).abs() <= 1.01 * half_a_step * expected.abs() + 1e-6 * expected.abs().max()).all()
