import numpy as np
import pytest
import scipy.special
import scipy.stats
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from lrlhf.functional import exact_alpha_divergence, exact_js, exact_kl, token_statistics, vocabulary_divergence

B, R, H, V = 4, 6, 3, 50
CHUNKS = [1, 3, B * R]
ROUNDING = {"rtol": 1e-5, "atol": 1e-6}
"""fp32 sums over 50 tokens in another order."""


@pytest.fixture
def case():
    """Hidden states with NaN in the padding, a head, tokens and a ragged mask."""
    torch.manual_seed(0)
    mask = torch.arange(R) < torch.tensor([[6], [1], [0], [4]])
    hidden = torch.randn(B, R, H).masked_fill(~mask[..., None], float("nan"))
    return hidden, nn.Linear(H, V), torch.randint(V, (B, R)), mask


class Largest(TorchDispatchMode):
    """Elements of the largest tensor that any operation returns, backward and recomputation included."""

    numel = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        tensors = [x for x in torch.utils._pytree.tree_leaves(result) if isinstance(x, torch.Tensor)]
        self.numel = max([self.numel, *(x.numel() for x in tensors)])
        return result


@pytest.mark.parametrize("temperature", [1.0, 0.7, 2.0])
@pytest.mark.parametrize("chunk", CHUNKS)
def test_statistics_equal_those_of_the_full_logits(case, chunk, temperature):
    hidden, head, tokens, mask = case
    statistics = token_statistics(hidden, head, tokens, mask, temperature=temperature, chunk=chunk)
    logprobs = torch.log_softmax(head(hidden) / temperature, -1)
    expected = logprobs.gather(-1, tokens[..., None]).squeeze(-1)
    entropy = scipy.stats.entropy(scipy.special.softmax(head(hidden).detach().numpy() / temperature, axis=-1), axis=-1)
    torch.testing.assert_close(statistics.logprobs[mask], expected[mask], **ROUNDING)
    np.testing.assert_allclose(statistics.entropy[mask].detach().numpy(), entropy[mask], **ROUNDING)


@pytest.mark.parametrize("head_trains", [True, False])
@pytest.mark.parametrize("entropy_trains", [True, False])
@pytest.mark.parametrize("chunk", CHUNKS)
def test_gradients_equal_those_of_the_full_logits(case, chunk, entropy_trains, head_trains):
    hidden, head, tokens, mask = case
    weights = torch.randn(2, B, R)[:, mask]
    head.requires_grad_(head_trains)
    inputs = hidden.requires_grad_(), *(head.parameters() if head_trains else ())

    options = {"temperature": 0.7, "chunk": chunk, "entropy_trains": entropy_trains}
    statistics = token_statistics(hidden, head, tokens, mask, **options)
    assert statistics.entropy.requires_grad == entropy_trains
    weights[1] *= entropy_trains
    chunked = (weights * torch.stack(statistics)[:, mask]).sum()

    distribution = torch.distributions.Categorical(logits=head(hidden[mask]) / 0.7)
    full = (weights * torch.stack([distribution.log_prob(tokens[mask]), distribution.entropy()])).sum()

    for got, expected in zip(torch.autograd.grad(chunked, inputs), torch.autograd.grad(full, inputs), strict=True):
        torch.testing.assert_close(got, expected, **ROUNDING)


def test_a_frozen_head_under_frozen_states_makes_no_gradient(case):
    hidden, head, tokens, mask = case
    statistics = token_statistics(hidden, head.requires_grad_(False), tokens, mask)
    assert not statistics.logprobs.requires_grad


@pytest.mark.parametrize("gradients", [True, False])
def test_masked_positions_come_back_as_zero_in_fp32(case, gradients):
    hidden, head, tokens, mask = case
    with torch.set_grad_enabled(gradients):
        statistics = token_statistics(hidden.bfloat16(), head.bfloat16(), tokens, mask, chunk=4)
    for field in statistics:
        assert field.dtype == torch.float32
        assert torch.equal(field != 0, mask)


def test_an_empty_mask_gives_zeros_and_zero_gradients(case):
    hidden, head, tokens, mask = case
    statistics = token_statistics(hidden, head, tokens, torch.zeros_like(mask))
    assert (torch.stack(statistics) == 0).all()
    torch.stack(statistics).sum().backward()
    assert (head.weight.grad == 0).all()


def test_no_tensor_is_ever_larger_than_one_chunk_of_logits(case):
    hidden, head, tokens, mask = case
    chunk = 4

    def largest(chunk: int) -> int:
        with Largest() as seen:
            logprobs, entropy = token_statistics(hidden.requires_grad_(), head, tokens, mask, chunk=chunk)
            forward = seen.numel
            (logprobs + entropy).sum().backward()
        assert seen.numel == forward
        return seen.numel

    assert max(head.weight.numel(), hidden.numel()) < chunk * V, "the bound below must be about logits"
    assert largest(chunk) == chunk * V
    assert largest(B * R) == mask.sum() * V, "response positions alone, not the padding"


def test_no_logits_wait_for_the_backward_pass(case):
    hidden, head, tokens, mask = case
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x.numel()) or x, lambda x: x):
        token_statistics(hidden.requires_grad_(), head, tokens, mask, chunk=4).logprobs.sum()
    assert max(kept) < 4 * V


@pytest.mark.parametrize("divergence", [exact_kl, exact_js, exact_alpha_divergence])
@pytest.mark.parametrize("chunk", CHUNKS)
def test_a_vocabulary_divergence_equals_that_of_the_full_logits(case, chunk, divergence):
    hidden, head, _, mask = case
    torch.manual_seed(1)
    ref_hidden, ref_head = torch.randn(B, R, H), nn.Linear(H, V)
    got = vocabulary_divergence(hidden, ref_hidden, head, ref_head, mask, divergence, temperature=0.7, chunk=chunk)
    p, q = (torch.log_softmax(logits / 0.7, -1) for logits in (head(hidden), ref_head(ref_hidden)))
    torch.testing.assert_close(got[mask], divergence(p, q)[mask], **ROUNDING)
    assert (got[~mask] == 0).all()


def test_a_vocabulary_divergence_never_holds_more_than_one_chunk_of_logits(case):
    hidden, head, _, mask = case
    with Largest() as seen, torch.no_grad():
        vocabulary_divergence(hidden, hidden + 1, head, head, mask, exact_kl, chunk=4)
    assert seen.numel == 4 * V
