"""Sums, means and whitening over the positions that a bool mask allows.

The mask is the truth about what counts; padding never enters a statistic. `total` sums a tensor over the processes
that share a batch (`lrlhf.distributed.total`); alone, a process has the whole batch.
"""

from collections.abc import Callable

import torch
from torch import Tensor

Total = Callable[[Tensor], Tensor]


def alone(values: Tensor) -> Tensor:
    """The total of one process."""
    return values


def masked_sum(values: Tensor, mask: Tensor) -> Tensor:
    """Sum of `values` where `mask` is true; a scalar. Padding may hold anything, even NaN."""
    return values.masked_fill(~mask, 0).sum()


def masked_mean(values: Tensor, mask: Tensor, total: Total = alone) -> Tensor:
    """Mean of `values` where `mask` is true; a scalar, 0 when nothing is true."""
    return total(masked_sum(values, mask)) / total(mask.sum()).clamp(min=1)


def masked_variance(values: Tensor, mask: Tensor, total: Total = alone) -> Tensor:
    """Population variance of `values` where `mask` is true; a scalar."""
    return masked_mean((values - masked_mean(values, mask, total)) ** 2, mask, total)


def whiten(values: Tensor, mask: Tensor, *, center: bool = True, epsilon: float = 1e-8, total: Total = alone) -> Tensor:
    """Scale to unit variance, and to mean zero when `center`; 0 off the mask.

    y = (x - mean) / sqrt(var + epsilon), plus the mean again when not `center`. The paper whitens rewards with
    center=False (a reward of constant sign keeps it) and advantages with center=True.

    Args:
        values: any shape, float.
        mask: same shape, bool.
        center: remove the mean.
        epsilon: guards a constant input, which whitens to 0 (center) or to itself (no center).
        total: sums over the processes that share the batch.
    """
    mean = masked_mean(values, mask, total)
    scaled = (values - mean) * torch.rsqrt(masked_variance(values, mask, total) + epsilon)
    return (scaled if center else scaled + mean).masked_fill(~mask, 0)
