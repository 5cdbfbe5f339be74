import torch

from lrlhf.kernels.low_rank import add_low_rank


def tensors(dtype=torch.float64):
    torch.manual_seed(0)
    shapes = (2, 5, 7), (2, 5, 4), (3, 4), (7, 3)
    return [torch.randn(*shape, dtype=dtype, requires_grad=True) for shape in shapes]


def test_it_is_the_sum_of_two_layers_with_its_gradients():
    inputs = result, x, down, up = tensors()
    pair = add_low_rank(*inputs), result + x @ down.T @ up.T
    torch.testing.assert_close(*pair)
    direction = torch.randn(2, 5, 7, dtype=torch.float64)
    for mine, plain in zip(*(torch.autograd.grad(y, inputs, direction) for y in pair), strict=True):
        torch.testing.assert_close(mine, plain)


def test_an_adapter_that_has_learnt_nothing_changes_no_bit():
    for dtype in (torch.float32, torch.bfloat16):
        result, x, down, up = tensors(dtype)
        assert torch.equal(add_low_rank(result, x, down, torch.zeros_like(up)), result)


def test_what_is_frozen_gets_no_gradient_and_the_input_may_be_read_again():
    result, x, down, up = (t.detach() for t in tensors())
    up.requires_grad_()
    before = result.clone()
    add_low_rank(result, x, down, up).sum().backward()
    assert torch.equal(result, before)
    torch.testing.assert_close(up.grad, (x @ down.T).sum((0, 1)).expand(7, 3))
