import pytest
import torch

from lrlhf.kernels.gate import gated_silu


def by_torch(gate, up):
    return torch.nn.functional.silu(gate) * up


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_result_and_gradients_are_those_of_the_two_operations_to_the_bit(dtype):
    torch.manual_seed(0)
    gate, up, direction = (3 * torch.randn(5, 7, 33).to(dtype) for _ in range(3))
    before = gate.clone(), up.clone()
    inputs = gate.requires_grad_(), up.requires_grad_()
    results = [f(*inputs) for f in (gated_silu, by_torch)]
    assert torch.equal(*results)
    gradients = [torch.autograd.grad(y, inputs, direction) for y in results]
    for mine, plain in zip(*gradients, strict=True):
        assert torch.equal(mine, plain)
    with torch.no_grad():
        assert torch.equal(gated_silu(*inputs), results[0])
    assert all(torch.equal(*pair) for pair in zip(inputs, before, strict=True))


def test_its_derivative_is_that_of_the_formula():
    torch.manual_seed(0)
    gate, up = (torch.randn(4, 3, dtype=torch.float64, requires_grad=True) for _ in range(2))
    of_gate, of_up = torch.autograd.grad(gated_silu(gate, up).sum(), (gate, up))
    sigmoid = 1 / (1 + (-gate).exp())
    torch.testing.assert_close(of_up, gate * sigmoid)
    torch.testing.assert_close(of_gate, up * sigmoid * (1 + gate * (1 - sigmoid)))


def test_only_its_two_inputs_are_kept():
    gate, up = (torch.randn(4, 8, requires_grad=True) for _ in range(2))
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.data_ptr()) or t, lambda t: t):
        gated_silu(gate * 1, up * 1)
    assert len(set(kept)) == 2
    kept.clear()
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.data_ptr()) or t, lambda t: t):
        by_torch(gate * 1, up * 1)
    assert len(set(kept)) == 3
