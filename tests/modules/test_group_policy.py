"""RLOO, GRPO and expert iteration: what a group of responses teaches, on a model small enough to know the answer."""

import itertools
import math
from dataclasses import replace

import pytest
import torch

from lrlhf import (
    GRPO,
    RLOO,
    DivergenceCallback,
    ExpertIteration,
    PPOPolicy,
    Sampling,
    TextTemplate,
    Updates,
    UserError,
)
from lrlhf.functional import exact_kl, group_normalized, kl, leave_one_out
from lrlhf.metrics import Means
from lrlhf.types import Prompts, Sequences
from tests.modules.helpers import SMALL, adamw, count_vowels, ppo, prompt_data
from tests.modules.test_ppo_policy import Recorder, fit

FAVOURITES = list(range(40, 60))


def group(kind, base, lr=1e-2, **settings):
    updates = {name: settings.pop(name) for name in Updates.__dataclass_fields__ if name in settings}
    if not issubclass(kind, ExpertIteration):
        settings["updates"] = Updates(**{"minibatch_size": 4, "inner_epochs": 1, **updates})
    else:
        settings["minibatch_size"] = updates.get("minibatch_size", 2)
    defaults = {"reward_function": count_vowels, "micro_batch_size": 3, "sampling": Sampling(max_new_tokens=8)}
    return kind(base_model=base, optimizer=adamw(lr), **{**SMALL, **defaults, **settings})


def grouped(base, files, **settings):
    return prompt_data(base, files, **{"responses_per_prompt": 4, **settings})


@pytest.mark.parametrize("kind", [RLOO, GRPO, ExpertIteration])
def test_a_fit_changes_the_policy_s_adapter_and_nothing_else(tmp_path, tiny_llama, data_files, kind):
    module = group(kind, tiny_llama)
    module.configure_model()
    before = {n: p.detach().clone() for n, p in module.named_parameters()}
    recorder = fit(tmp_path, module, grouped(tiny_llama, data_files))
    changed = {n for n, p in module.named_parameters() if not torch.equal(p, before[n])}
    assert changed == {n for n in before if ".policy." in n}
    assert all(math.isfinite(v) for metrics in recorder.metrics for v in metrics.values())


@pytest.mark.parametrize("kind", [PPOPolicy, RLOO, ExpertIteration])
def test_a_group_draws_what_single_prompts_would(tmp_path, tiny_llama, data_files, kind):
    """Four responses to one prompt, prefilled once, are those of four rows that hold the prompt."""
    make = ppo if kind is PPOPolicy else lambda base, **settings: group(kind, base, **settings)
    module = make(tiny_llama, sampling=Sampling(max_new_tokens=12, batch_size=6))
    module.configure_model()
    data = prompt_data(tiny_llama, data_files, batch_size=8)
    data.setup("fit")
    batch = next(iter(data.train_dataloader()))
    rows = batch.repeat(4)
    ids, mask = module.sample(rows, "policy", "here", 1)
    one_by_one = module.sample(replace(rows, group_size=1), "policy", "here", 1)
    assert torch.equal(ids, one_by_one[0])
    assert torch.equal(mask, one_by_one[1])
    assert rows.texts[:4] == (batch.texts[0],) * 4
    assert len({tuple(row) for row in ids[:4].tolist()}) > 1, "the draws of a group differ"


def test_the_log_probs_of_a_group_s_rollout_are_those_of_plain_rows(tmp_path, tiny_llama, data_files):
    module = group(RLOO, tiny_llama, lr=0.0)
    recorder = fit(tmp_path, module, grouped(tiny_llama, data_files))
    rollout = recorder.rollouts[0]
    assert rollout.groups.tolist() == [0, 0, 0, 0, 1, 1, 1, 1]
    plain = Sequences(rollout.prompt_ids, rollout.prompt_mask, rollout.response_ids, rollout.response_mask)
    module.micro_batch_size = 1
    torch.testing.assert_close(rollout.logprobs, module.logprobs(plain, "policy"), atol=1e-5, rtol=0)
    for metrics in recorder.metrics:
        assert abs(metrics["train/update_kl"]) < 1e-6
        assert metrics["train/clip_fraction"] == 0


def trained_weights(tmp_path, kind, base, files, monkeypatch, reads, **settings):
    """The policy's weights after two iterations of 8 responses, and in which roles log-probs were made."""
    monkeypatch.setattr(Recorder, "reads_logprobs", reads)
    torch.manual_seed(1)
    module, roles = group(kind, base, **settings), []
    made = module.logprobs
    module.logprobs = lambda rows, role: (roles.append(role), made(rows, role))[1]
    monkeypatch.setattr(kind, "self_check", lambda *_: [])
    recorder = fit(tmp_path, module, grouped(base, files, batch_size=8))
    missing = [bool(rollout.logprobs.isnan().all()) for rollout in recorder.rollouts]
    return {n: p.detach() for n, p in module.named_parameters() if ".policy." in n}, roles, missing


@pytest.mark.parametrize("kind", [RLOO, GRPO, ExpertIteration])
def test_log_probs_that_nothing_reads_are_not_made_and_change_nothing(
    tmp_path, tiny_llama, data_files, monkeypatch, kind
):
    """Where one step uses a whole rollout, the policy that learns is the one that sampled."""
    whole = 2 if kind is ExpertIteration else 8
    runs = [
        trained_weights(tmp_path / str(reads), kind, tiny_llama, data_files, monkeypatch, reads, minibatch_size=whole)
        for reads in (True, False)
    ]
    (asked, roles, missing), (own, own_roles, own_missing) = runs
    assert (roles, missing) == (["policy"] * 2, [False] * 2)
    assert (own_roles, own_missing) == ([], [True] * 2)
    for name in asked:
        torch.testing.assert_close(own[name], asked[name], atol=2e-5, rtol=0)


@pytest.mark.parametrize("settings", [{"minibatch_size": 4}, {"minibatch_size": 8, "inner_epochs": 2}])
def test_a_rollout_that_serves_two_steps_keeps_its_log_probs(tmp_path, tiny_llama, data_files, monkeypatch, settings):
    _, roles, missing = trained_weights(tmp_path, GRPO, tiny_llama, data_files, monkeypatch, False, **settings)
    assert (roles, missing) == (["policy"] * 2, [False] * 2)


@pytest.mark.parametrize(("divergence", "passes"), [(kl, ["policy", "reference"]), (exact_kl, [])])
def test_a_divergence_of_sampled_tokens_has_the_policy_s_log_probs(
    tmp_path, tiny_llama, data_files, monkeypatch, divergence, passes
):
    monkeypatch.setattr(Recorder, "reads_logprobs", False)
    monkeypatch.setattr(GRPO, "self_check", lambda *_: [])
    module, roles = group(GRPO, tiny_llama, minibatch_size=8), []
    made = module.logprobs
    module.logprobs = lambda rows, role: (roles.append(role), made(rows, role))[1]
    recorder = fit(tmp_path, module, grouped(tiny_llama, data_files), DivergenceCallback(divergence), batches=1)
    assert roles == passes
    assert recorder.rewards[0].isfinite().all()


class Enumerable:
    """One token a response, worth 1 if it is one of FAVOURITES."""

    def score(self, sequences: Sequences, batch: Prompts) -> torch.Tensor:
        return torch.tensor([float(int(t) in FAVOURITES) for t in sequences.response_ids[:, 0]])


def distributions(module, data) -> dict[str, torch.Tensor]:
    """Of the first token, under policy and reference."""
    data.setup("fit")
    batch = next(iter(data.train_dataloader()))
    ids, mask = batch.prompt_ids[:1], batch.prompt_mask[:1]
    one, found = Sequences(ids, mask, ids[:, :1], mask[:, :1]), {}
    for role in ("policy", "reference"):
        with torch.no_grad(), module.backbone.role(role):
            found[role] = module.backbone.lm_head(module.backbone.encode(one)[0, 0]).softmax(-1)
    return found


def bandit(tmp_path, base, kind, beta, callbacks=True, **settings):
    """Train on one prompt; the mass on FAVOURITES and the total variation from the optimum.

    With the divergence as a reward that is PPO's, pi_ref exp(r / beta) / Z. k3 as a term of the loss has, on
    its own samples, the gradient of KL(reference || policy): sum p (1 - q / p) grad log p = -sum q grad log p. Then
    the optimum of E[r] - beta KL(q || p) has r - level + beta q / p = 0, where a mean that counts the response itself
    leaves (n - 1) / n of r.
    """

    class Bandit(Enumerable, kind):
        pass

    (tmp_path / "one.jsonl").write_text('{"instruction": "go"}\n' * 256)
    module = group(
        Bandit,
        base,
        **{"lora": None, "lr": 3e-3, "minibatch_size": 128, "inner_epochs": 2, **settings},
        micro_batch_size=256,
        sampling=Sampling(max_new_tokens=1),
    )
    data = prompt_data(
        base,
        {"prompts": str(tmp_path / "one.jsonl")},
        batch_size=256,
        responses_per_prompt=8,
        template=TextTemplate("{instruction}"),
    )
    fit(tmp_path, module, data, *([DivergenceCallback(kl, beta)] if callbacks else []), batches=1, max_epochs=120)
    found = distributions(module, data)
    reward = torch.tensor([float(t in FAVOURITES) for t in range(len(found["reference"]))])
    optimum = found["reference"] * torch.exp(reward / beta)
    optimum /= optimum.sum()
    if not callbacks:
        low, high = 7 / 8 + 1e-6, 2.0 + beta
        for _ in range(100):
            level = (low + high) / 2
            optimum = beta * found["reference"] / (level - 7 / 8 * reward)
            low, high = (level, high) if optimum.sum() > 1 else (low, level)
    mass = {name: float(p[FAVOURITES].sum()) for name, p in (*found.items(), ("optimum", optimum))}
    return mass, 0.5 * float((found["policy"] - optimum).abs().sum())


@pytest.mark.parametrize(
    ("kind", "callbacks", "settings"),
    [
        (RLOO, True, {}),
        pytest.param(GRPO, True, {"scale_advantages": False, "average": "constant"}, marks=pytest.mark.slow),
        (
            GRPO,
            False,
            {
                "scale_advantages": False,
                "average": "tokens",
                "divergence_coefficient": 0.5,
                "minibatch_size": 256,
                "inner_epochs": 1,
            },
        ),  # fmt: skip
    ],
)
def test_on_an_enumerable_task_groups_find_the_optimum_in_closed_form(tmp_path, tiny_llama, kind, callbacks, settings):
    """With the divergence as a reward PPO's own; as a term of the loss, as in GRPO's paper, another."""
    mass, distance = bandit(tmp_path, tiny_llama, kind, 0.5, callbacks, **settings)
    assert mass["optimum"] - mass["reference"] > 0.15
    assert mass["policy"] == pytest.approx(mass["optimum"], abs=0.06)
    assert distance < 0.12


def test_expert_iteration_s_round_moves_towards_the_best_of_n(tmp_path, tiny_llama):
    """Imitating the best of n tends to best-of-n's own distribution: mass 1 - (1 - p)^n on what is best."""

    class Bandit(Enumerable, ExpertIteration):
        def sample(self, prompts, role, *place):
            return super().sample(prompts, "reference", *place)  # every round from the reference: one target

    (tmp_path / "one.jsonl").write_text('{"instruction": "go"}\n' * 256)
    module = group(
        Bandit, tiny_llama, lora=None, lr=3e-3, minibatch_size=64, micro_batch_size=256,
        sampling=Sampling(max_new_tokens=1),
    )  # fmt: skip
    data = prompt_data(
        tiny_llama, {"prompts": str(tmp_path / "one.jsonl")}, batch_size=256, responses_per_prompt=4,
        template=TextTemplate("{instruction}"),
    )  # fmt: skip
    fit(tmp_path, module, data, batches=1, max_epochs=100)
    found = distributions(module, data)
    before, after = (float(found[role][FAVOURITES].sum()) for role in ("reference", "policy"))
    assert after == pytest.approx(1 - (1 - before) ** 4, abs=0.08)
    assert after - before > 0.2


def test_leave_one_out_is_unbiased_by_enumeration():
    """The exact expectation, over every pair of draws from three responses, of the estimated policy gradient."""
    theta = torch.tensor([0.3, -0.5, 0.1], dtype=torch.float64, requires_grad=True)
    rewards = torch.tensor([1.0, -2.0, 0.7], dtype=torch.float64)

    def expected(advantages) -> torch.Tensor:
        p = theta.softmax(0).detach()
        total = torch.zeros(3, dtype=torch.float64)
        for draws in itertools.product(range(3), repeat=2):
            index = torch.tensor(draws)
            objective = (advantages(rewards[index]) * theta.log_softmax(0)[index]).mean()
            total += p[index].prod() * torch.autograd.grad(objective, theta)[0]
        return total

    (truth,) = torch.autograd.grad((theta.softmax(0) * rewards).sum(), theta)
    torch.testing.assert_close(expected(lambda r: leave_one_out(r, 2)), truth)
    biased = expected(lambda r: group_normalized(r, 2, scale=False))
    torch.testing.assert_close(biased, 0.5 * truth), "GRPO's own mean in the baseline shrinks it by (n - 1) / n"
    assert not torch.allclose(expected(lambda r: group_normalized(r, 2)), truth, atol=0.05)


def test_a_prompt_that_runs_once_for_its_group_leaves_the_gradients_as_they_are(tmp_path, tiny_llama, data_files):
    module = group(GRPO, tiny_llama, micro_batch_size=8)
    fit(tmp_path, module, grouped(tiny_llama, data_files), batches=1)
    data = grouped(tiny_llama, data_files)
    data.setup("fit")
    rollout = module.rollout(next(iter(data.train_dataloader())), "gradients")
    experience = module.estimate_advantages(rollout, torch.randn(rollout.response_mask.shape) * rollout.response_mask)
    found, tokens = [], []
    for size in (8, 1):
        module.micro_batch_size = size
        with TokenCount(module) as count, module.backbone.training_pass(dropout=False):
            for loss in module.losses(experience, Means()):
                loss.backward()
        tokens.append(count.tokens)
        found.append([p.grad.clone() for p in module.backbone.trainable()])
        for p in module.backbone.trainable():
            p.grad = None
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-3)
    assert max(float(g.abs().max()) for g in found[0]) > 1e-3
    assert tokens[0] < 0.5 * tokens[1], "a prompt of a group ran once"


class TokenCount:
    """How many tokens the first layer's projection sees."""

    def __init__(self, module):
        self.layer, self.tokens = module.backbone.model.model.layers[0].mlp, 0

    def __enter__(self):
        def count(_, inputs):
            self.tokens += inputs[0].shape[:-1].numel()

        self.handle = self.layer.register_forward_pre_hook(count)
        return self

    def __exit__(self, *_):
        self.handle.remove()


def objective(module, experience) -> float:
    with module.backbone.training_pass(dropout=False):
        return float(sum(loss.detach() for loss in module.losses(experience, Means())))


@pytest.mark.parametrize("average", ["responses", "tokens", "constant"])
def test_grpo_s_loss_by_hand(tmp_path, tiny_llama, data_files, average):
    module = group(GRPO, tiny_llama, average=average, divergence_coefficient=0.3, clip_range_high=0.4)
    fit(tmp_path, module, grouped(tiny_llama, data_files), batches=1)
    module.stop_ids = torch.arange(2, 80)
    data = grouped(tiny_llama, data_files)
    data.setup("fit")
    batch = next(iter(data.train_dataloader()))
    rollout = module.rollout(batch, "by hand")
    rewards = torch.randn(rollout.response_mask.shape) * rollout.response_mask
    experience = module.estimate_advantages(rollout, rewards)
    experience = replace(experience, logprobs=experience.logprobs + 0.4 * torch.randn(rewards.shape))
    new, old = module.logprobs(rollout, "policy").double(), experience.logprobs.double()
    ref, scores = module.logprobs(rollout, "reference").double(), rewards.double().sum(1)
    total, by_row = 0.0, []
    for b in range(len(rollout)):
        of_group = scores[b // 4 * 4 : b // 4 * 4 + 4]
        advantage = float((scores[b] - of_group.mean()) / (of_group.std() + 1e-4))
        losses = []
        for t in range(int(rollout.lengths[b])):
            ratio, gap = math.exp(new[b, t] - old[b, t]), float(ref[b, t] - new[b, t])
            surrogate = max(-advantage * ratio, -advantage * min(max(ratio, 0.8), 1.4))
            losses.append(surrogate + 0.3 * (math.exp(gap) - gap - 1))
        by_row.append(sum(losses) / len(losses))
        total += sum(losses)
    expected = {
        "responses": sum(by_row) / 8,
        "tokens": total / int(rollout.response_mask.sum()),
        "constant": total / (8 * 8),
    }[average]
    assert len(set(rollout.lengths.tolist())) > 1
    assert objective(module, experience) == pytest.approx(expected, rel=1e-4, abs=1e-6)


def test_groups_of_equal_scores_teach_nothing_and_are_counted(tmp_path, tiny_llama, data_files):
    module = group(GRPO, tiny_llama, reward_function=lambda prompts, responses: [1.0] * len(responses))
    module.configure_model()
    before = [p.clone() for p in module.backbone.trainable()]
    recorder = fit(tmp_path, module, grouped(tiny_llama, data_files))
    assert [metrics["train/groups_with_signal"] for metrics in recorder.metrics] == [0, 0]
    assert all(torch.equal(a, b) for a, b in zip(before, module.backbone.trainable(), strict=True))


@pytest.mark.parametrize(
    ("kind", "settings", "data", "says"),
    [
        (RLOO, {}, {"responses_per_prompt": 1}, "RLOO compares the responses to one prompt: set data.responses_per_"),
        (GRPO, {}, {"responses_per_prompt": 3}, "responses_per_prompt=3 does not divide data.batch_size=8"),
        (GRPO, {"minibatch_size": 3}, {}, "model.updates.minibatch_size=3 does not divide data.batch_size=8"),
        (ExpertIteration, {"minibatch_size": 3}, {}, "minibatch_size=3 does not divide the 2 prompts of a round"),
        (GRPO, {}, {"batch_size": 160 * 4}, "more than the 40 prompts of data.train times"),
    ],
)
def test_groups_that_do_not_fit_are_refused(tmp_path, tiny_llama, data_files, kind, settings, data, says):
    with pytest.raises(UserError, match=says):
        fit(tmp_path, group(kind, tiny_llama, **settings), grouped(tiny_llama, data_files, **data))


def test_responses_per_prompt_is_for_rollouts(tiny_llama, data_files):
    with pytest.raises(UserError, match="is for rollouts, and sft has none"):
        prompt_data(tiny_llama, data_files, task="sft", responses_per_prompt=2)
