"""Our methods' losses and gradients are those of TRL's own code, on tensors that bench/peer_losses.py made with it."""

import json
from pathlib import Path

import pytest
import torch

from lrlhf import DPO, GRPO, RLOO, Sampling, Updates
from lrlhf.functional import (
    alpha_divergence,
    forward_kl,
    hinge_loss,
    ipo_loss,
    js,
    kl,
    sigmoid_loss,
)
from lrlhf.functional.logprobs import TokenStatistics
from lrlhf.types import Experience, ReferenceExperience, ReferencePreferences, Sequences

PEER = json.loads(Path(__file__).with_name("peer_losses.json").read_text())


def tensors(part: str) -> dict[str, torch.Tensor]:
    return {name: torch.tensor(values) for name, values in PEER[part]["tensors"].items()}


def assert_same(loss: torch.Tensor, leaf: torch.Tensor, peer: dict) -> None:
    loss.backward()
    assert float(loss) == pytest.approx(peer["loss"], rel=1e-5, abs=1e-7)
    expected = torch.tensor(peer["gradient"])
    assert expected.abs().max() > 1e-3
    torch.testing.assert_close(leaf.grad, expected, atol=1e-6, rtol=1e-4)


GROUPS = {
    "grpo": (GRPO, {"divergence_coefficient": 0.04}),
    "dapo": (GRPO, {"average": "tokens", "clip_range_high": 0.28}),
    "dr_grpo": (GRPO, {"average": "constant"}),
    "rloo": (RLOO, {}),
}


@pytest.mark.parametrize("name", GROUPS)
def test_group_losses(name):
    kind, settings = GROUPS[name]
    given = tensors("groups")
    new, mask = given["new"].requires_grad_(), given["mask"].bool()

    class Given(kind):
        """Its log-probs are the peer's."""

        def statistics(self, piece):
            return TokenStatistics(new * piece.response_mask, torch.zeros_like(new))

    module = Given(
        base_model="none", reward_function=lambda prompts, responses: [0.0], updates=Updates(clip_range=0.2),
        sampling=Sampling(max_new_tokens=8), **settings,
    )  # fmt: skip
    text = Sequences(mask.long()[:, :1], mask[:, :1], mask.long(), mask)
    rows = len(mask)
    experience = Experience(
        *(getattr(text, name) for name in ("prompt_ids", "prompt_mask", "response_ids", "response_mask")),
        logprobs=given["old"] * mask, scores=torch.zeros(rows), parts=torch.zeros(rows, 0),
        groups=torch.zeros(rows).long(), advantages=given["advantages"][:, None] * mask,
    )  # fmt: skip
    if settings.get("divergence_coefficient"):
        experience = ReferenceExperience.of(experience, ref_logprobs=given["ref"] * mask)
    loss = module.policy_objective(experience).sum() / module.count(experience)
    assert_same(loss, new, PEER["groups"]["losses"][name])


LOSSES = {
    "sigmoid": (sigmoid_loss, False),
    "ipo": (ipo_loss, True),
    "hinge": (hinge_loss, False),
    "sigmoid_norm": (sigmoid_loss, True),
}
DIVERGENCES = {
    "reverse_kl": kl,
    "forward_kl": forward_kl,
    "js_divergence": js,
    "alpha_divergence": alpha_divergence,
}


@pytest.mark.parametrize("name", [name for name in PEER["pairs"]["losses"] if name != "ipo js_divergence"])
def test_pair_losses(name):
    loss_name, divergence_name = name.split()
    loss, length_normalized = LOSSES[loss_name]
    divergence = DIVERGENCES[divergence_name]
    given = tensors("pairs")
    logits, mask = given["logits"].requires_grad_(), given["mask"].bool()[:, 1:]
    tokens = logits[:, :-1].log_softmax(-1).gather(-1, given["ids"].long()[:, 1:, None])[..., 0] * mask
    rows = len(mask) // 2
    sides = [Sequences(m.long()[:, :1], m[:, :1], m.long(), m) for m in mask.split(rows)]

    class Given(DPO):
        """Its log-probs are the peer's."""

        def statistics(self, piece):
            values = tokens[:rows] if piece is sides[0] else tokens[rows:]
            return TokenStatistics(values, torch.zeros_like(values))

    # the peer's Jensen-Shannon leaves out the factor 1/2 of each KL
    beta = 0.6 if divergence is js else 0.3
    module = Given(base_model="none", beta=beta, divergence=divergence, loss=loss, length_normalized=length_normalized)
    pairs = ReferencePreferences(*sides, torch.zeros(rows), torch.arange(rows), given["ref"].T)
    assert_same(module.objective(pairs, rows, torch.tensor(1)), logits, PEER["pairs"]["losses"][name])
