"""What stands in for a private operator of PyTorch says what the operator says."""

import pytest
import torch

from lrlhf.kernels import operators


def both(monkeypatch, name, function, *inputs):
    """By the operator, and without it."""
    assert getattr(operators, name) is not None
    there = function(*inputs)
    monkeypatch.setattr(operators, name, None)
    return there, function(*inputs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_gradient_of_softmax(monkeypatch, dtype):
    gradient, weights = torch.randn(2, 3, 7).to(dtype), torch.randn(2, 3, 7).softmax(-1).to(dtype)
    there, instead = both(monkeypatch, "_SOFTMAX_BACKWARD", operators.softmax_backward, gradient, weights)
    assert instead.dtype == there.dtype == dtype
    torch.testing.assert_close(
        instead, there, rtol=1e-5 if dtype is torch.float32 else 0.02, atol=1e-6 if dtype is torch.float32 else 5e-3
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_gradient_of_silu(monkeypatch, dtype):
    gradient, x = torch.randn(2, 9).to(dtype), torch.randn(2, 9).to(dtype)
    there, instead = both(monkeypatch, "_SILU_BACKWARD", operators.silu_backward, gradient, x)
    assert instead.dtype == there.dtype == dtype
    torch.testing.assert_close(
        instead, there, rtol=1e-5 if dtype is torch.float32 else 0.02, atol=1e-6 if dtype is torch.float32 else 5e-3
    )


def test_an_operator_that_a_version_has_not_is_none():
    assert operators._found(torch, "no_such_operator") is None
    assert operators._found(torch.ops.aten, "no_such_operator") is None
