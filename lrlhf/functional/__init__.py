"""Pure tensor functions: tensors in, tensors out; torch and nothing else."""

from lrlhf.functional.advantages import generalized_advantages
from lrlhf.functional.divergence import (
    absolute,
    alpha_divergence,
    bregman,
    clamped_kl,
    exact_alpha_divergence,
    exact_forward_kl,
    exact_js,
    exact_kl,
    exact_total_variation,
    forward_kl,
    js,
    js_paper,
    kl,
    over_vocabulary,
    squared_error,
    total_variation,
)
from lrlhf.functional.logprobs import log_softmax, token_statistics, vocabulary_divergence
from lrlhf.functional.losses import policy_loss, preference_loss, value_loss
from lrlhf.functional.masked import masked_mean, masked_sum, masked_variance, whiten
from lrlhf.functional.sequences import append_end, equally_long, last_true, position_ids, response_mask, shared_prefix

__all__ = [
    "absolute",
    "alpha_divergence",
    "append_end",
    "bregman",
    "clamped_kl",
    "equally_long",
    "exact_alpha_divergence",
    "exact_forward_kl",
    "exact_js",
    "exact_kl",
    "exact_total_variation",
    "forward_kl",
    "generalized_advantages",
    "js",
    "js_paper",
    "kl",
    "last_true",
    "log_softmax",
    "masked_mean",
    "masked_sum",
    "masked_variance",
    "over_vocabulary",
    "policy_loss",
    "position_ids",
    "preference_loss",
    "response_mask",
    "shared_prefix",
    "squared_error",
    "token_statistics",
    "total_variation",
    "value_loss",
    "vocabulary_divergence",
    "whiten",
]
