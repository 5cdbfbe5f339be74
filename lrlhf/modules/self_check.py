"""Before a stage trains a step: is everything what it claims to be? Seconds, and one sentence when it is not.

Each check returns a sentence with what it measured, for self_checks.txt.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from lrlhf.config import Engine, Quantization, Sampling
from lrlhf.errors import UserError
from lrlhf.functional import token_statistics
from lrlhf.model.backbone import Backbone
from lrlhf.model.generation import sample_responses
from lrlhf.run.handover import Handover, score_probe
from lrlhf.types import Prompts, Sequences

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


def rounding(dtype: str, quantize: Quantization | None) -> float:
    """What a base may round off, in nats a token (ROUNDING).

    Args:
        dtype: of the base.
        quantize: how it is quantised, if it is.
    """
    return ROUNDING["int8" if quantize and quantize.kind == "int8" else dtype]


@torch.no_grad()
def check_passes(
    backbone: Backbone, role: str, text: Sequences, stop_ids: Tensor, allowed: float, engine: Engine = "dynamic"
) -> str:
    """Rows of unequal length through the engine, and one by one, unpadded, through the model's own forward pass.

    1. Log-probs of the responses agree, in the role that the stage trains.
    2. What is sampled behind the prompts at temperature 0 is what the model finds likeliest.

    Args:
        backbone: with the role.
        role: that the stage trains.
        text: of `unequal_rows`.
        stop_ids: [S] int64, the tokens that end a response.
        allowed: `rounding` of the base.
        engine: that samples.

    Raises:
        UserError: they differ by more than `allowed`.
    """
    with backbone.role(role):
        ours = token_statistics(backbone.encode(text), backbone.lm_head, text.response_ids, text.response_mask).logprobs
        expected, _ = _plain_logprobs(backbone, text)
        off = _refuse_difference(backbone, "log-probs", ours[text.response_mask] - expected, allowed)
        sampled = sample_responses(
            backbone,
            text.prompt_ids,
            text.prompt_mask,
            sampling=Sampling(max_new_tokens=SAMPLED, temperature=0, engine=engine),
            stop_ids=stop_ids.to(text.prompt_ids.device),
            uniforms=text.prompt_ids.new_zeros(ROWS, SAMPLED),
        )
        taken, likeliest = _plain_logprobs(backbone, Sequences(text.prompt_ids, text.prompt_mask, *sampled))
        sampled_off = _refuse_difference(backbone, "samples", taken - likeliest, allowed)
    return (
        f"Log-probs are {off:.2g} and samples {sampled_off:.2g} nats a token from the base's own forward pass; "
        f"rounding may give {allowed}."
    )


def _refuse_difference(backbone: Backbone, what: str, difference: Tensor, allowed: float) -> float:
    off = float(difference.abs().mean())
    if not off <= allowed:
        raise UserError(
            f"self-check: {what} of {backbone.base_model} are {off:.2g} nats a token from its own forward pass, more "
            f"than rounding gives ({allowed}): this architecture does not run rightly here; report it."
        )
    return off


def unequal_rows(batch: Sequences | Prompts) -> Sequences:
    """Text for the checks: ROWS pieces of the batch's rows, all of different lengths, so that padding occurs.

    The first half of each piece stands for the prompt, the second for the response. Short batches are repeated.
    """
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
    """Log-probabilities by the model's own forward pass, one unpadded row at a time.

    Returns:
        Of each response token, and of the likeliest token in its place; both [N], row after row.
    """
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


def check_base(backbone: Backbone) -> str:
    """With the adapters off the base gives the logits it gave when it was loaded, bit for bit.

    Raises:
        UserError: it was written to.
    """
    if drift := backbone.drift_of_base():
        raise UserError(
            f"self-check: the base model changed (adapters-off logits moved by {drift:.3g}); load it again."
        )
    return "The base gives the logits that it gave when it was loaded, bit for bit."


def check_trainable(backbone: Backbone, trained: Sequence[str]) -> str:
    """Inside each role that trains exactly its own parameters require gradients; inside the others none does.

    Args:
        backbone: with its roles.
        trained: names of the roles that train.

    Raises:
        UserError: one trains that should not, or the other way round.
    """
    if backbone.sharded and backbone.lora is None:
        return f"{', '.join(trained)} are sharded models of their own: none gets another's gradient."
    for role in backbone.stacks:
        with backbone.role(role):
            ours = {id(p) for p in backbone.trainable(role)} if role in trained else set()
            found = {id(p) for p in backbone.parameters() if p.requires_grad}
        if ours != found:
            raise UserError(f"self-check: {len(ours ^ found)} parameters train wrongly in the role {role}.")
    return f"In each of {', '.join(trained)} exactly its own parameters train, in other roles none."


def check_reward_model(
    backbone: Backbone, tokenizer: Any, handover: Handover, dtype: str, role: str = "reward"
) -> str | None:
    """The reward model scores the probe text as its manifest says.

    Args:
        backbone: with the role.
        tokenizer: of the base.
        handover: that the reward model came from.
        dtype: of the base here.
        role: of the reward model.

    Raises:
        UserError: it does not.
    """
    if handover.probe_score is None:
        return None
    score = score_probe(backbone, role, tokenizer)
    tolerance = max(TOLERANCE[handover.dtype], TOLERANCE[dtype])
    if abs(score - handover.probe_score) > tolerance * max(1.0, abs(handover.probe_score)):
        raise UserError(
            f"self-check: the reward model scores the probe text {score:.6g}, its manifest says "
            f"{handover.probe_score:.6g}; {handover.folder} is not the model that was trained."
        )
    return f"The reward model scores the probe text {score:.6g}, its manifest says {handover.probe_score:.6g}."


def check_update(backbone: Backbone, logprobs: Callable[[Sequences], Tensor], text: Sequences, allowed: float) -> str:
    """PPO's first ratio is 1: an update's log-probs are those of the rollout.

    Args:
        backbone: with the role `policy`.
        logprobs: of sequences in the current role, [B, R].
        text: of `unequal_rows`.
        allowed: `rounding` of the base.

    Raises:
        UserError: they differ by more than `allowed`.
    """
    with backbone.role("policy"), backbone.training_pass(dropout=False), torch.enable_grad():
        new = logprobs(text).detach()
    with torch.no_grad(), backbone.role("policy"):
        old = logprobs(text)
    off = float((new - old).abs().mean())
    if not off <= allowed:
        raise UserError(
            f"self-check: in an update the log-probs are {off:.2g} nats a token from those of the rollout, so PPO's "
            f"first ratio is not 1: {backbone.base_model} drops or changes something while it trains."
        )
    return (
        f"In an update the log-probs are {off:.2g} nats a token from those of the rollout; rounding may give {allowed}."
    )


def check_policy_is_reference(log_ratio: Tensor, divergences: dict[str, Tensor]) -> str:
    """At step 0 the largest absolute log-ratio is 0, and so is every divergence.

    Args:
        log_ratio: [B, R] of policy and reference.
        divergences: by name, each [B, R], exact.

    Raises:
        UserError: the policy is not its reference.
    """
    if worst := float(log_ratio.abs().max()):
        raise UserError(f"self-check: the policy is not its reference at step 0 (largest log-ratio {worst:.3g}).")
    for name, values in divergences.items():
        if not (value := float(values.abs().max())) <= 1e-6:
            raise UserError(f"self-check: {name} is {value:.3g} at step 0, not 0.")
    return f"At step 0 the policy is its reference: log-ratio 0, {', '.join(divergences)} at most 1e-6."
