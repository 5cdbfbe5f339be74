import pytest
import torch
import torch.nn.functional as F

from lrlhf.kernels.packing import attend_packed, is_packed, pack, packed_mask, unpack


def test_a_line_is_the_prefix_and_then_the_rows_without_padding():
    mask = torch.tensor([[True, True], [False, True], [False, False]])
    line = pack(torch.tensor([1, 2]), torch.tensor([[3, 4], [5, 6], [7, 8]]), mask)
    assert line.tolist() == [[1, 2, 3, 4, 6]]
    assert unpack(line, 2, mask).tolist() == [[3, 4], [0, 6], [0, 0]]
    assert unpack(line[..., None].float(), 3, mask[1:]).tolist() == [[[0], [4]], [[0], [0]]]


def test_a_token_looks_at_the_prefix_and_at_what_its_row_has_up_to_itself():
    mask = packed_mask(torch.tensor([[True, True, True], [False, True, True]]), 2)
    assert mask.long().tolist() == [
        [[[1, 1, 1, 0, 0], [1, 1, 1, 1, 0], [1, 1, 1, 1, 1]]],
        [[[1, 1, 0, 0, 0], [1, 1, 0, 1, 0], [1, 1, 0, 1, 1]]],
    ]


def attend(query, key, value, mask):
    causal = mask is None and query.shape[2] > 1
    result = F.scaled_dot_product_attention(query, key, value, mask, is_causal=causal, enable_gqa=True)
    return result.transpose(1, 2)


@pytest.mark.parametrize("prefix", [0, 4])
@pytest.mark.parametrize("left", [[0, 0, 0], [0, 3, 1]])
def test_attention_of_a_line_is_that_of_each_row_with_its_own_copy_of_the_prefix(prefix, left):
    torch.manual_seed(0)
    counts = [5 - n for n in left]
    line = [
        torch.randn(1, heads, prefix + sum(counts), 6, dtype=torch.float64, requires_grad=True) for heads in (4, 2, 2)
    ]
    mask = packed_mask(torch.arange(5) >= torch.tensor(left)[:, None], prefix)
    assert is_packed(line[0], mask)
    packed = attend_packed(attend, *line, mask)
    whole, start = [], prefix
    for count in counts:
        places = torch.cat([torch.arange(prefix), torch.arange(start, start + count)])
        whole.append(attend(*(x[:, :, places] for x in line), None))
        start += count
    apart = torch.cat([whole[0][:, :prefix], *(x[:, prefix:] for x in whole)], dim=1)
    torch.testing.assert_close(packed, apart)
    direction = torch.randn_like(packed)
    for mine, plain in zip(*(torch.autograd.grad(y, line, direction) for y in (packed, apart)), strict=True):
        torch.testing.assert_close(mine, plain)


def test_a_line_is_known_by_its_mask():
    query = torch.zeros(1, 2, 14, 4)
    assert is_packed(query, packed_mask(torch.ones(2, 5, dtype=torch.bool), 4))
    assert is_packed(query, packed_mask(torch.tensor([[True] * 14, [False] * 14]), 0))
    assert not is_packed(query, torch.ones(1, 1, 14, 14, dtype=torch.bool))
