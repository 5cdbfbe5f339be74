"""How far the policy has moved from the reference: one-sample estimators and exact forms.

Notation: p is the policy, q the reference, delta = log p - log q, r = q / p, m = (p + q) / 2. Samples come from the
policy, so an estimator d is unbiased for D when E_p[d] = D.

One-sample estimators take the log-probabilities of the SAMPLED tokens, any equal shapes, and return that shape.
Exact forms (`exact_*`, marked by `@over_vocabulary`) take log-probabilities over the vocabulary, [..., V], and return
[...]: no sampling noise, one more pass of the head.

All enter as a reward, never as a gradient: reward_t = -coefficient * d_t (arXiv 2309.09055, section 3). Equal
coefficients are NOT equal strengths: near the reference js is about kl / 4, and js_paper far above js.

To add one: write a function of two tensors, name it in YAML by import path. For DPO mark it by `@f_divergence`.
"""

import math
from collections.abc import Callable
from typing import TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

Divergence = Callable[[Tensor, Tensor], Tensor]
Estimator = TypeVar("Estimator", bound=Callable[..., Tensor])


def f_divergence(derivative: Callable[..., Tensor]) -> Callable[[Estimator], Estimator]:
    """Mark a one-sample estimator of D_f(p||q) = E_q[f(p / q)] with f' as a function of delta, up to a constant.

    f' must rise with delta everywhere. It is what DPO needs: the policy that maximises reward - beta D_f
    has reward = beta f'(p / q) + constant (Wang et al., "Beyond reverse KL", arXiv 2309.16240, theorem 1). An estimator
    d with E_p[d] = D_f has f' = d + d', its own derivative by delta.

    Args:
        derivative: from delta to f'(exp(delta)), any shape.
    """

    def mark(divergence: Estimator) -> Estimator:
        divergence.f_derivative = derivative  # type: ignore[attr-defined]
        return divergence

    return mark


def over_vocabulary(divergence: Divergence) -> Divergence:
    """Mark a divergence as one that needs the whole distribution [..., V], not the sampled token's."""
    divergence.over_vocabulary = True  # type: ignore[attr-defined]
    return divergence


# One-sample estimators: log p and log q of the sampled token.


@f_divergence(lambda delta: delta)
def kl(logprobs: Tensor, ref_logprobs: Tensor) -> Tensor:
    """d = delta. E_p[d] = KL(p||q) exactly; unbounded, single values and even sums may be negative.

    "k1" in Schulman, "Approximating KL divergence" (2020); `kl` in arXiv 2309.09055.
    """
    return logprobs - ref_logprobs


def clamped_kl(logprobs: Tensor, ref_logprobs: Tensor) -> Tensor:
    """d = max(delta, 0) >= 0. Biased upwards: E_p[d] >= KL(p||q). AlpacaFarm's only form."""
    return kl(logprobs, ref_logprobs).clamp(min=0)


def negative_kl(logprobs: Tensor, ref_logprobs: Tensor) -> Tensor:
    """d = -delta. E_p[d] = -KL(p||q): a bonus for moving away, the control in arXiv 2309.09055. No regulariser."""
    return ref_logprobs - logprobs


def squared_error(logprobs: Tensor, ref_logprobs: Tensor) -> Tensor:
    """d = delta^2 / 2 >= 0. Biased, agrees with KL(p||q) to second order; low variance.

    "k2" in Schulman (2020); `squared_error` in arXiv 2309.09055.
    """
    return 0.5 * kl(logprobs, ref_logprobs) ** 2


@f_divergence(lambda delta: delta)
def bregman(logprobs: Tensor, ref_logprobs: Tensor) -> Tensor:
    """d = (r - 1) + delta >= 0. E_p[d] = KL(p||q) exactly; unbounded above as q/p grows.

    "k3" in Schulman (2020); `bregman` in arXiv 2309.09055.
    """
    delta = kl(logprobs, ref_logprobs)
    return torch.expm1(-delta) + delta


@f_divergence(lambda delta: 0.5 * (math.log(2) + F.logsigmoid(delta)))
def js(logprobs: Tensor, ref_logprobs: Tensor) -> Tensor:
    """d = log(p/m) / 2 + (q/p) log(q/m) / 2. E_p[d] = JS(p, q) exactly, JS <= ln 2; d >= 0, unbounded above.

    Lin, "Divergence measures based on the Shannon entropy" (1991); the unbiased counterpart of `js_paper`.
    """
    delta = kl(logprobs, ref_logprobs)
    log_p_m = math.log(2) - F.softplus(-delta)
    return 0.5 * (log_p_m + torch.exp(-delta) * (log_p_m - delta)).clamp(min=0)


def js_paper(logprobs: Tensor, ref_logprobs: Tensor) -> Tensor:
    """d = (log max(p, q) - log m) / 2, in [0, ln(2)/2]. NOT Jensen-Shannon: about |delta| / 4 for small drift.

    `jensen_shannon` in the code of arXiv 2309.09055; kept under its own name for replicas of the paper.
    """
    delta = kl(logprobs, ref_logprobs).abs()
    return 0.5 * (math.log(2) - F.softplus(-delta))


def absolute(logprobs: Tensor, ref_logprobs: Tensor) -> Tensor:
    """d = |delta| >= 0. Not an estimate of a divergence: E_p[d] >= KL(p||q). NeMo-Aligner's default."""
    return kl(logprobs, ref_logprobs).abs()


@f_divergence(lambda delta: -torch.expm1(-delta))
def forward_kl(logprobs: Tensor, ref_logprobs: Tensor) -> Tensor:
    """d = r log r - (r - 1) >= 0. E_p[d] = KL(q||p) exactly; heavy-tailed where the policy dropped mass.

    The importance-weighted log-ratio with the control variate r - 1, as in Schulman (2020).
    """
    delta = kl(logprobs, ref_logprobs)
    return -delta * torch.exp(-delta) - torch.expm1(-delta)


def total_variation(logprobs: Tensor, ref_logprobs: Tensor) -> Tensor:
    """d = |1 - r| / 2 >= 0. E_p[d] = TV(p, q) = sum |p - q| / 2 exactly, TV <= 1; d unbounded above."""
    return 0.5 * torch.expm1(ref_logprobs - logprobs).abs()


@f_divergence(lambda delta, alpha=0.5: torch.expm1((alpha - 1) * delta) / (alpha - 1))
def alpha_divergence(logprobs: Tensor, ref_logprobs: Tensor, *, alpha: float = 0.5) -> Tensor:
    """d = (r^(1-a) - 1 - (1-a)(r - 1)) / (a (a - 1)) >= 0. E_p[d] = D_a(p||q) exactly, for a not 0 or 1.

    D_a = (sum p^a q^(1-a) - 1) / (a (a - 1)): KL(p||q) as a -> 1, KL(q||p) as a -> 0, four times the squared Hellinger
    distance at 1/2. Cressie and Read (1984), Amari (1985).
    """
    log_r = ref_logprobs - logprobs
    return (torch.expm1((1 - alpha) * log_r) - (1 - alpha) * torch.expm1(log_r)) / (alpha * (alpha - 1))


# Exact forms: log p and log q over the vocabulary.


@over_vocabulary
def exact_kl(logprobs: Tensor, ref_logprobs: Tensor) -> Tensor:
    """KL(p||q) = sum p (log p - log q) >= 0, the reverse KL of RLHF; [..., V] to [...]."""
    return F.kl_div(ref_logprobs, logprobs, reduction="none", log_target=True).sum(-1)


@over_vocabulary
def exact_forward_kl(logprobs: Tensor, ref_logprobs: Tensor) -> Tensor:
    """KL(q||p) = sum q (log q - log p) >= 0; [..., V] to [...]."""
    return exact_kl(ref_logprobs, logprobs)


@over_vocabulary
def exact_js(logprobs: Tensor, ref_logprobs: Tensor) -> Tensor:
    """JS(p, q) = KL(p||m) / 2 + KL(q||m) / 2, in [0, ln 2]; [..., V] to [...]. Lin (1991)."""
    log_m = torch.logaddexp(logprobs, ref_logprobs) - math.log(2)
    return 0.5 * (exact_kl(logprobs, log_m) + exact_kl(ref_logprobs, log_m))


@over_vocabulary
def exact_total_variation(logprobs: Tensor, ref_logprobs: Tensor) -> Tensor:
    """TV(p, q) = sum |p - q| / 2, in [0, 1]; [..., V] to [...]."""
    return 0.5 * (logprobs.exp() - ref_logprobs.exp()).abs().sum(-1)


@over_vocabulary
def exact_alpha_divergence(logprobs: Tensor, ref_logprobs: Tensor, *, alpha: float = 0.5) -> Tensor:
    """D_a(p||q) = (sum p^a q^(1-a) - 1) / (a (a - 1)) >= 0, for a not 0 or 1; [..., V] to [...].

    Summed as the expectation of `alpha_divergence`, whose terms are never negative: no cancellation near 0.
    """
    return (logprobs.exp() * alpha_divergence(logprobs, ref_logprobs, alpha=alpha)).sum(-1)
