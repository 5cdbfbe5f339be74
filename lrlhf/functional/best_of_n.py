"""How far the best of n responses is from the policy that they were drawn from."""

import math

import torch
from torch import Tensor


def best_of_n_kl_bound(n: int) -> float:
    """log n - (n - 1) / n, in nats a response: an upper bound of KL(best of n || policy), whatever the reward.

    Reached where no two responses are equally likely to be drawn twice and no scores tie. Beirami et al., "Theoretical
    guarantees on the best-of-n alignment policy" (arXiv 2401.01879), theorem 1.

    Args:
        n: responses of which the best is taken.
    """
    return math.log(n) - (n - 1) / n


def best_of_n_kl(logprobs: Tensor, n: int) -> Tensor:
    """Estimate of KL(best of n || policy) from the responses that were taken; its mean over prompts is the estimate.

    With e the probability of the response that was taken:
    (1 - e)^n (log n + (n - 1) log(1 - e) - (n - 1) / n) + (1 - (1 - e)^n) log((1 - (1 - e)^n) / e).
    It tends to the bound as e -> 0 and to 0 as e -> 1, where the bound is far too large: short answers that are drawn
    again and again. An approximation, no bound. Beirami et al. (arXiv 2401.01879), section 4.

    Args:
        logprobs: [B] of the responses taken, each summed over its tokens, under the policy that drew them.
        n: responses of which the best was taken.

    Returns:
        [B] float64, nats a response.
    """
    e = logprobs.double().exp().clamp(min=1e-300, max=1 - 1e-15)
    none = torch.exp(n * torch.log1p(-e))
    some = -torch.expm1(n * torch.log1p(-e))
    missed = none * (math.log(n) + (n - 1) * torch.log1p(-e) - (n - 1) / n)
    return missed + some * (some.log() - e.log())
