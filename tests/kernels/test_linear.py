import pytest
import torch

from lrlhf.kernels import linear as module
from lrlhf.kernels.linear import linear

SUMS_OF_40 = 1e-5
"""Sums of 40 fp32 products of unit size differ by a few units in the last place."""


def exact(x, weight, bias):
    return x.double() @ weight.double().T + (0 if bias is None else bias.double())


@pytest.fixture
def tensors():
    torch.manual_seed(0)
    return torch.randn(3, 5, 40), torch.randn(7, 40), torch.randn(7)


@pytest.mark.parametrize("with_bias", [True, False])
def test_equals_the_product_in_double_precision(tensors, with_bias):
    x, weight, bias = tensors
    bias = bias if with_bias else None
    result = linear(x, weight, bias)
    assert result.shape == (3, 5, 7)
    assert result.dtype == torch.float32
    assert torch.allclose(result.double(), exact(x, weight, bias), atol=SUMS_OF_40)


def test_reads_inputs_that_are_not_contiguous(tensors):
    x, weight, _ = tensors
    turned = x.transpose(0, 1)
    assert torch.allclose(linear(turned, weight).double(), exact(turned, weight, None), atol=SUMS_OF_40)
    assert torch.allclose(linear(x[:, :1], weight).double(), exact(x[:, :1], weight, None), atol=SUMS_OF_40)


def test_gradients_equal_those_in_double_precision(tensors):
    singles = [t.clone().requires_grad_() for t in tensors]
    doubles = [t.double().requires_grad_() for t in tensors]
    direction = torch.randn(3, 5, 7)
    linear(*singles).backward(direction)
    exact(*doubles).backward(direction.double())
    for single, double in zip(singles, doubles, strict=True):
        assert torch.allclose(single.grad.double(), double.grad, atol=SUMS_OF_40)


def test_a_frozen_weight_keeps_no_input_and_gets_no_gradient(tensors):
    x, weight, _ = tensors
    x.requires_grad_()
    held = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: held.append(t.data_ptr()) or t, lambda t: t):
        linear(x, weight).sum().backward()
    assert weight.grad is None
    assert x.data_ptr() not in held


def test_another_type_and_no_rows_at_all_are_left_to_pytorch(tensors):
    x, weight, bias = tensors
    for dtype in (torch.float64, torch.bfloat16):
        inputs = x.to(dtype), weight.to(dtype), bias.to(dtype)
        result, expected = linear(*inputs), torch.nn.functional.linear(*inputs)
        assert result.dtype == dtype
        assert torch.equal(result, expected)
    assert linear(x[:0], weight, bias).shape == (0, 5, 7)


@pytest.mark.skipif(not module.AVAILABLE, reason="this build of PyTorch has no oneDNN")
def test_without_avx512_large_weights_alone_take_onednn(monkeypatch):
    monkeypatch.setattr(module, "EVERYWHERE", False)
    monkeypatch.setattr(module, "LARGE", 300)
    torch.manual_seed(0)
    for rows, used in ((7, 0), (8, 1)):
        x, weight = torch.randn(3, 40, requires_grad=True), torch.randn(rows, 40, requires_grad=True)
        with torch.profiler.profile() as record:
            result = linear(x, weight)
            result.square().sum().backward()
        assert sum(e.count for e in record.key_averages() if e.key == "mkldnn::_linear_pointwise") == used
        twice = [t.detach().double().requires_grad_() for t in (x, weight)]
        (twice[0] @ twice[1].T).square().sum().backward()
        for single, double in zip((x, weight), twice, strict=True):
            torch.testing.assert_close(single.grad.double(), double.grad, atol=1e-3, rtol=1e-5)
