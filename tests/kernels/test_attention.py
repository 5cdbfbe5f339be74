import pytest
import torch
import torch.nn.functional as F

from lrlhf.kernels.attention import attention


def case(dtype=torch.float64, heads=6, shared=2, queries=5, keys=7):
    torch.manual_seed(0)
    query = torch.randn(3, heads, queries, 4, dtype=dtype, requires_grad=True)
    key, value = (torch.randn(3, shared, keys, 4, dtype=dtype, requires_grad=True) for _ in range(2))
    return query, key, value


def by_hand(query, key, value, mask, scale):
    """Head by head, row by row."""
    group = query.shape[1] // key.shape[1]
    heads = []
    for h in range(query.shape[1]):
        logits = scale * torch.einsum("btd,bsd->bts", query[:, h], key[:, h // group])
        weights = logits.masked_fill(~mask[:, 0], -torch.inf).softmax(-1)
        heads.append(torch.einsum("bts,bsd->btd", weights, value[:, h // group]))
    return torch.stack(heads, dim=1)


def random_mask(queries=5, keys=7):
    mask = torch.rand(3, 1, queries, keys) < 0.6
    mask[..., 0] = True
    return mask


@pytest.mark.parametrize("shared", [1, 2, 6])
def test_it_is_the_textbook_formula_with_its_gradients(shared):
    inputs, mask = case(shared=shared), random_mask()
    got, expected = attention(*inputs, mask, 0.3), by_hand(*inputs, mask, 0.3)
    torch.testing.assert_close(got, expected)
    direction = torch.randn_like(got)
    gradients = (torch.autograd.grad(x, inputs, direction) for x in (got, expected))
    for mine, theirs in zip(*gradients, strict=True):
        torch.testing.assert_close(mine, theirs)


def test_without_a_mask_it_is_causal_and_the_last_query_sees_all():
    inputs = case()
    mask = torch.tensor([[s <= t + 2 for s in range(7)] for t in range(5)]).expand(3, 1, 5, 7)
    torch.testing.assert_close(attention(*inputs, None, 0.5), by_hand(*inputs, mask, 0.5))


def test_a_query_that_may_look_at_nothing_is_finite_and_moves_nothing_else():
    inputs, mask = case(), random_mask()
    mask[0, 0, 2] = False
    result = attention(*inputs, mask, 0.3)
    assert result.isfinite().all()
    others = torch.ones(3, 5, dtype=torch.bool)
    others[0, 2] = False
    with_it = by_hand(*inputs, mask, 0.3)
    torch.testing.assert_close(result.transpose(1, 2)[others], with_it.transpose(1, 2)[others])


def test_in_bf16_it_is_as_close_to_the_truth_as_pytorchs_own():
    exact = case()
    inputs = [x.detach().bfloat16().requires_grad_() for x in exact]
    mask = random_mask()
    truth = by_hand(*(x.double() for x in inputs), mask, 0.5)
    repeated = (x.repeat_interleave(3, dim=1) for x in inputs[1:])
    theirs = F.scaled_dot_product_attention(inputs[0], *repeated, attn_mask=mask, scale=0.5)
    mine = attention(*inputs, mask, 0.5)
    assert mine.dtype == torch.bfloat16
    assert (mine - truth).abs().max() <= 2 * (theirs - truth).abs().max()


def test_no_weights_wait_for_the_backward_pass():
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x.numel()) or x, lambda x: x):
        attention(*case(queries=50, keys=50), None, 0.5)
    assert max(kept) < 3 * 6 * 50 * 50
