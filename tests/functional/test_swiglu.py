import pytest
import torch

from lrlhf.functional.swiglu import swiglu


def exact(x, gate, up):
    between = x.double() @ gate.double().T
    return between / (1 + (-between).exp()) * (x.double() @ up.double().T)


@pytest.mark.parametrize(("dtype", "step"), [(torch.float32, 2e-6), (torch.bfloat16, 2**-7), (torch.float64, 1e-12)])
def test_it_is_the_formula(dtype, step):
    torch.manual_seed(0)
    x, gate, up = (torch.randn(*shape, dtype=dtype) for shape in ((3, 5, 40), (24, 40), (24, 40)))
    truth = exact(x, gate, up)
    result = swiglu(x, gate, up)
    assert result.shape == (3, 5, 24)
    assert result.dtype == dtype
    assert ((result - truth).abs() <= 2 * step * (truth.abs() + 1)).all()


def test_one_row_rows_that_are_not_contiguous_and_no_rows():
    torch.manual_seed(0)
    x, gate, up = torch.randn(4, 3, 40), torch.randn(24, 40), torch.randn(24, 40)
    torch.testing.assert_close(swiglu(x[:1, 0], gate, up).double(), exact(x[:1, 0], gate, up), atol=1e-4, rtol=1e-4)
    turned = x.transpose(0, 1)
    torch.testing.assert_close(swiglu(turned, gate, up).double(), exact(turned, gate, up), atol=1e-4, rtol=1e-4)
    assert swiglu(x[:0], gate, up).shape == (0, 3, 24)
