"""What is averaged and how: per-token and per-response means over all micro-batches of an iteration."""

import torch
from torch import Tensor

from lrlhf.distributed import device, total
from lrlhf.functional import masked_sum, masked_variance


class Means:
    """Weighted means of named quantities, each token or response counting once however the batch was cut.

    Every process adds the same names in the same order; one that may have nothing to add is told the names.

    Args:
        names: of quantities that a process may never add to.
    """

    def __init__(self, *names: str) -> None:
        self._sums: dict[str, float] = dict.fromkeys(names, 0.0)
        self._counts: dict[str, float] = dict.fromkeys(names, 0.0)

    def add(self, name: str, values: Tensor, mask: Tensor | None = None) -> None:
        """Add the values of `name` where `mask` is true (everywhere without one).

        Args:
            name: of the quantity.
            values: any shape.
            mask: bool of the same shape.
        """
        mask = torch.ones_like(values, dtype=torch.bool) if mask is None else mask
        self._sums[name] = self._sums.get(name, 0.0) + float(masked_sum(values.detach().float(), mask))
        self._counts[name] = self._counts.get(name, 0.0) + int(mask.sum())

    def compute(self) -> dict[str, float]:
        """The means so far, over all processes; 0 for a quantity that was only ever added with empty masks."""
        if not self._sums:
            return {}
        both = torch.tensor([list(self._sums.values()), list(self._counts.values())], dtype=torch.float64)
        sums, counts = total(both.to(device())).cpu()
        return dict(zip(self._sums, (sums / counts.clamp(min=1)).tolist(), strict=True))


def explained_variance(values: Tensor, returns: Tensor, mask: Tensor) -> float:
    """1 - Var(returns - values) / Var(returns) over the mask: 1 is a perfect critic, 0 no better than a constant.

    Args:
        values: [B, R] of the critic.
        returns: [B, R].
        mask: [B, R] bool.
    """
    variance = masked_variance(returns, mask, total)
    return float(1 - masked_variance(returns - values, mask, total) / variance) if variance > 0 else 0.0
