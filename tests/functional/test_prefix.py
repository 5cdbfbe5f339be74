import torch
import torch.nn.functional as F

from lrlhf.functional.prefix import attend_joined, is_joined, join, prefix_mask, split


def test_a_line_is_the_prefix_and_then_the_rows():
    line = join(torch.tensor([1, 2]), torch.tensor([[3, 4], [5, 6], [7, 8]]))
    assert line.tolist() == [[1, 2, 3, 4, 5, 6, 7, 8]]
    assert split(line, 2, 3).tolist() == [[3, 4], [5, 6], [7, 8]]


def test_a_token_looks_at_the_prefix_and_at_what_its_row_has_up_to_itself():
    mask = prefix_mask(torch.tensor([[True, True, True], [False, True, True]]), 2)
    assert mask.long().tolist() == [
        [[[1, 1, 1, 0, 0], [1, 1, 1, 1, 0], [1, 1, 1, 1, 1]]],
        [[[1, 1, 0, 0, 0], [1, 1, 0, 1, 0], [1, 1, 0, 1, 1]]],
    ]


def attend(query, key, value, mask):
    causal = mask is None and query.shape[2] > 1
    result = F.scaled_dot_product_attention(query, key, value, mask, is_causal=causal, enable_gqa=True)
    return result.transpose(1, 2)


def test_attention_of_a_line_is_that_of_each_row_with_its_own_copy_of_the_prefix():
    torch.manual_seed(0)
    rows, prefix, length = 3, 4, 5
    line = [
        torch.randn(1, heads, prefix + rows * length, 6, dtype=torch.float64, requires_grad=True) for heads in (4, 2, 2)
    ]
    mask = prefix_mask(torch.ones(rows, length, dtype=torch.bool), prefix)
    joined = attend_joined(attend, *line, mask)
    whole = []
    for row in range(rows):
        start = prefix + row * length
        places = torch.cat([torch.arange(prefix), torch.arange(start, start + length)])
        whole.append(attend(*(x[:, :, places] for x in line), None))
    apart = torch.cat([whole[0][:, :prefix], *(x[:, prefix:] for x in whole)], dim=1)
    torch.testing.assert_close(joined, apart)
    direction = torch.randn_like(joined)
    for mine, plain in zip(*(torch.autograd.grad(y, line, direction) for y in (joined, apart)), strict=True):
        torch.testing.assert_close(mine, plain)


def test_a_line_is_known_by_its_mask():
    query = torch.zeros(1, 2, 14, 4)
    assert is_joined(query, prefix_mask(torch.ones(2, 5, dtype=torch.bool), 4))
    assert not is_joined(query, torch.ones(1, 1, 14, 14, dtype=torch.bool))
    assert not is_joined(query, None)
