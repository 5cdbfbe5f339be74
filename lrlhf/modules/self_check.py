"""Before PPO trains a step: is everything what it claims to be? Seconds, and one sentence when it is not."""

from typing import TYPE_CHECKING

import torch

from lrlhf.errors import UserError
from lrlhf.functional import exact_js, exact_kl, exact_total_variation
from lrlhf.handover import score_probe
from lrlhf.types import Prompts, Sequences

if TYPE_CHECKING:
    from lrlhf.modules.ppo_policy import PPOPolicy

ROWS = 4
"""Prompts that the checks look at."""

TOLERANCE = {"float32": 1e-4, "bfloat16": 5e-2, "float16": 5e-3}
"""How far the probe's score may be from its manifest, relative: other machines round differently."""


@torch.no_grad()
def self_check(policy: "PPOPolicy", batch: Prompts) -> None:
    """Run all checks on the first prompts of a batch.

    1. At step 0 the policy equals the reference: the largest absolute log-ratio is 0, and every divergence is 0.
    2. With the adapters off the base gives the logits it gave when it was loaded, bit for bit.
    3. The reward model scores the probe text as its manifest says.
    4. Inside each role exactly its own parameters train; no parameter of the base does.

    Raises:
        UserError: the first check that fails.
    """
    _check_trainable(policy)
    drift = policy.backbone.drift_of_base()
    if drift != 0:
        raise UserError(
            f"self-check: the base model changed (adapters-off logits moved by {drift:.3g}); load it again."
        )
    _check_reward(policy)
    if policy.iteration == 0:
        _check_policy_is_reference(policy, batch)


def _check_policy_is_reference(policy: "PPOPolicy", batch: Prompts) -> None:
    ids, mask = batch.prompt_ids[:ROWS], batch.prompt_mask[:ROWS]
    half = max(1, ids.shape[1] // 2)
    text = Sequences(ids[:, :half], mask[:, :half] | True, ids[:, half:], mask[:, half:] | True)
    log_ratio = policy.logprobs(text, "policy") - policy.logprobs(text, "reference")
    worst = float(log_ratio.abs().max()) if log_ratio.numel() else 0.0
    if worst != 0:
        raise UserError(f"self-check: the policy is not its reference at step 0 (largest log-ratio {worst:.3g}).")
    exact = (exact_kl, exact_js, exact_total_variation)
    for divergence, values in zip(exact, policy.divergences(text, exact), strict=True):
        value = float(values.abs().max()) if log_ratio.numel() else 0.0
        if value > 1e-6:
            raise UserError(f"self-check: {divergence.__name__} is {value:.3g} at step 0, not 0.")


def _check_reward(policy: "PPOPolicy") -> None:
    manifest = next((parent for parent in policy.parents.values() if parent.head), None)
    if manifest is None or manifest.probe_score is None:
        return
    score = score_probe(policy.backbone, "reward", policy.tokenizer)
    tolerance = max(TOLERANCE[manifest.dtype], TOLERANCE[policy.dtype_name])
    if abs(score - manifest.probe_score) > tolerance * max(1.0, abs(manifest.probe_score)):
        raise UserError(
            f"self-check: the reward model scores the probe text {score:.6g}, its manifest says "
            f"{manifest.probe_score:.6g}; {manifest.folder} is not the model that was trained."
        )


def _check_trainable(policy: "PPOPolicy") -> None:
    backbone = policy.backbone
    for role in backbone.stacks:
        with backbone.role(role):
            ours = {id(p) for p in backbone.trainable(role)} if role in ("policy", "critic") else set()
            found = {id(p) for p in backbone.parameters() if p.requires_grad}
        if ours != found:
            raise UserError(f"self-check: {len(ours ^ found)} parameters train wrongly in the role {role}.")
