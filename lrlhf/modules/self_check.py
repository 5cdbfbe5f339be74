"""Before a stage trains a step: is everything what it claims to be? Seconds, and one sentence when it is not."""

from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from lrlhf.backbone import Backbone
from lrlhf.distributed import any_process
from lrlhf.errors import UserError
from lrlhf.functional import exact_js, exact_kl, exact_total_variation, token_statistics
from lrlhf.generation import Sampling, sample_responses
from lrlhf.handover import score_probe
from lrlhf.types import Prompts, Sequences

if TYPE_CHECKING:
    from lrlhf.modules.base import AlignmentModule
    from lrlhf.modules.ppo_policy import PPOPolicy

ROWS = 4
"""Rows that the checks look at."""

LONGEST = 48
"""Tokens of the longest of them at most; the others have three quarters, a half and a quarter of them."""

SAMPLED = 4
"""Tokens sampled behind each."""

ROUNDING = {"float32": 1e-4, "bfloat16": 0.1, "float16": 0.02, "int8": 0.5}
"""By how many nats the engine's log-probs may differ from the plain model's, on average over the tokens.

Both add the same numbers in other orders. A logit of 20 is known to 1e-6 in fp32, to 0.04 in bf16 and to 0.005 in fp16,
and layers add to that (30 layers of SmolLM2: 3e-7 in fp32, 0.014 in bf16); an int8 base rounds activations too, by what
else is in the batch (0.12). What is wrong, such as padding or a neighbour that is seen, is mostly off by more."""

TOLERANCE = {"float32": 1e-4, "bfloat16": 5e-2, "float16": 5e-3}
"""How far the probe's score may be from its manifest, relative: other machines round differently."""


@torch.no_grad()
def check_passes(module: "AlignmentModule", batch: Sequences | Prompts) -> None:
    """Four rows of unequal length through the engine, and one by one, unpadded, through the model's own forward pass.

    1. Log-probs of their second halves agree, in the role that the stage trains.
    2. What is sampled behind the first halves at temperature 0 is what the model finds likeliest.

    Raises:
        UserError: they differ by more than the dtype rounds off.
    """
    text, backbone = _unequal_rows(batch), module.backbone
    with backbone.role(module.role):
        ours = token_statistics(backbone.encode(text), backbone.lm_head, text.response_ids, text.response_mask).logprobs
        expected, _ = _plain_logprobs(backbone, text)
        _refuse_difference(module, "log-probs", ours[text.response_mask] - expected)
        sampled = sample_responses(
            backbone,
            text.prompt_ids,
            text.prompt_mask,
            sampling=Sampling(max_new_tokens=SAMPLED, temperature=0),
            stop_ids=module.stop_ids.to(text.prompt_ids.device),
            uniforms=text.prompt_ids.new_zeros(ROWS, SAMPLED),
            go_on=any_process if backbone.lockstep else bool,
        )
        taken, likeliest = _plain_logprobs(backbone, Sequences(text.prompt_ids, text.prompt_mask, *sampled))
        _refuse_difference(module, "samples", taken - likeliest)


def _refuse_difference(module: "AlignmentModule", what: str, difference: Tensor) -> None:
    off, allowed = float(difference.abs().mean()), _rounding(module)
    if not off <= allowed:
        raise UserError(
            f"self-check: {what} of {module.base_model} are {off:.2g} nats a token from its own forward pass, more "
            f"than rounding gives ({allowed}): this architecture does not run rightly here; report it."
        )


def _rounding(module: "AlignmentModule") -> float:
    return ROUNDING["int8" if module.quantize and module.quantize.kind == "int8" else module.dtype_name]


def _unequal_rows(batch: Sequences | Prompts) -> Sequences:
    """ROWS pieces of the batch's rows, each of another length: halves as prompt and response."""
    ids, mask = (batch.prompt_ids, batch.prompt_mask) if isinstance(batch, Prompts) else (batch.ids, batch.mask)
    found = [row[keep] for row, keep in zip(ids[:ROWS], mask[:ROWS], strict=True)]
    rows = [(found * ROWS)[i] if found else torch.arange(2, device=ids.device) for i in range(ROWS)]
    rows = [torch.cat([row, row])[: max(2, min(len(row), LONGEST) * (ROWS - i) // ROWS)] for i, row in enumerate(rows)]
    prompts, responses = [row[: len(row) // 2] for row in rows], [row[len(row) // 2 :] for row in rows]

    def pad(pieces: list[Tensor], side: str) -> tuple[Tensor, Tensor]:
        counts = [torch.ones_like(piece, dtype=torch.bool) for piece in pieces]
        ids, mask = (pad_sequence(x, batch_first=True, padding_side=side) for x in (pieces, counts))
        return ids, mask

    return Sequences(*pad(prompts, "left"), *pad(responses, "right"))


def _plain_logprobs(backbone: Backbone, text: Sequences) -> tuple[Tensor, Tensor]:
    """Of each response token [N], row after row, by the model's own forward pass; and of the likeliest in its place."""
    taken, likeliest = [], []
    for prompt, first, response, second in zip(
        text.prompt_ids, text.prompt_mask, text.response_ids, text.response_mask, strict=True
    ):
        prompt, response = prompt[first], response[second]
        logits = backbone.plain_logits(torch.cat([prompt, response]))[len(prompt) - 1 : -1]
        logprobs = torch.log_softmax(logits.float(), dim=-1)
        taken.append(logprobs.gather(-1, response[:, None])[:, 0])
        likeliest.append(logprobs.amax(-1))
    return torch.cat(taken), torch.cat(likeliest)


@torch.no_grad()
def self_check(policy: "PPOPolicy", batch: Prompts) -> None:
    """Run all checks on the first prompts of a batch.

    1. At step 0 the policy equals the reference: the largest absolute log-ratio is 0, and every divergence is 0.
    2. With the adapters off the base gives the logits it gave when it was loaded, bit for bit.
    3. The reward model scores the probe text as its manifest says.
    4. Inside each role exactly its own parameters train; no parameter of the base does.
    5. The engine's passes say what the model says (`check_passes`), also as an update makes them, where nothing drops.

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
    check_passes(policy, batch)
    _check_update(policy, _unequal_rows(batch))
    if policy.iteration == 0:
        _check_policy_is_reference(policy, batch)


def _check_update(policy: "PPOPolicy", text: Sequences) -> None:
    """PPO's first ratio is 1: an update's log-probs are those of the rollout."""
    with policy.backbone.role("policy"), policy.backbone.training_pass(dropout=False), torch.enable_grad():
        new = policy.statistics(text).logprobs.detach()
    off = float((new - policy.logprobs(text, "policy")).abs().mean())
    if not off <= _rounding(policy):
        raise UserError(
            f"self-check: in an update the log-probs are {off:.2g} nats a token from those of the rollout, so PPO's "
            f"first ratio is not 1: {policy.base_model} drops or changes something while it trains."
        )


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
