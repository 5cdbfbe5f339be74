"""DivergenceCallback: the penalty by hand on a small rollout, and on a policy that has moved by scipy."""

import pytest
import torch
from scipy.spatial.distance import jensenshannon
from scipy.stats import entropy

from lrlhf import SFT, AdaptiveCoefficient, AlpacaDataModule, DivergenceCallback, PPOPolicy, UserError
from lrlhf.functional import absolute, exact_js, exact_kl, js, kl, squared_error
from lrlhf.types import Rollout
from tests.modules.helpers import SMALL, ppo, prompt_data, trainer

MASK = torch.tensor([[True, True, True], [True, False, False]])
LOGPROBS = torch.tensor([[-1.0, -2.0, -3.0], [-0.5, 0.0, 0.0]])
REFERENCE = torch.tensor([[-1.5, -1.75, -3.0], [-2.5, 9.0, 9.0]])
REWARDS = torch.tensor([[0.0, 0.0, 7.0], [3.0, 0.0, 0.0]])
"""Log-ratios 1/2, -1/4, 0 and 2: 2.25 in all, on four tokens of two responses. The 9 lies in the padding."""


def rollout() -> Rollout:
    ids, prompt = torch.ones(2, 3, dtype=torch.long), torch.ones(2, 1, dtype=torch.long)
    more = {"scores": torch.zeros(2), "parts": torch.zeros(2, 0), "groups": torch.arange(2)}
    return Rollout(prompt, prompt.bool(), ids, MASK, logprobs=LOGPROBS, **more)


class Policy:
    """A policy as far as the callback asks it: the reference's log-probs, sums over the vocabulary, and a log."""

    def __init__(self):
        self.asked, self.logged = [], {}

    def logprobs(self, sequences, role):
        self.asked.append(role)
        return REFERENCE

    def divergences(self, sequences, functions):
        self.asked.append("vocabulary")
        return [torch.tensor([[0.25, 0.5, 0.75], [1.0, 0.0, 0.0]]) for _ in functions]

    def log_dict(self, metrics, batch_size):
        self.logged |= metrics
        self.batch_size = batch_size


class Stage:
    """A trainer as far as the callback looks at it."""

    testing = False

    def __init__(self, training: bool = True):
        self.training = training


def shape(callback: DivergenceCallback, training: bool = True) -> tuple[list, Policy]:
    policy = Policy()
    return callback.shape_rewards(Stage(training), policy, rollout(), REWARDS).tolist(), policy


def test_the_penalty_is_the_coefficient_times_the_divergence_at_every_response_token():
    shaped, policy = shape(DivergenceCallback(kl, 0.25))
    assert shaped == [[-0.125, 0.0625, 7.0], [2.5, 0.0, 0.0]]
    assert policy.logged == {
        "train/divergence/kl": 2.25 / 4,
        "train/coefficient": 0.25,
        "train/penalty": 0.25 * 2.25 / 2,
    }
    assert policy.batch_size == 2


def test_a_divergence_over_the_vocabulary_is_paid_without_log_probs_of_the_reference():
    shaped, policy = shape(DivergenceCallback(exact_kl, 0.5))
    assert shaped == [[-0.125, -0.25, 6.625], [2.5, 0.0, 0.0]]
    assert policy.asked == ["vocabulary"]
    assert policy.logged["train/divergence/exact_kl"] == 2.5 / 4


def test_a_coefficient_of_zero_measures_and_leaves_the_rewards_alone():
    shaped, policy = shape(DivergenceCallback(kl, 0))
    assert shaped == REWARDS.tolist()
    assert policy.logged == {"train/divergence/kl": 2.25 / 4, "train/coefficient": 0.0, "train/penalty": 0.0}


class Doubled:
    """A user's divergence that is an object: it is called by the name of its class."""

    def __call__(self, logprobs, ref_logprobs):
        return 2 * (logprobs - ref_logprobs)


def test_other_divergences_are_logged_on_the_same_tokens_and_cost_nothing_and_one_pass():
    alone, _ = shape(DivergenceCallback(kl, 0.25))
    shaped, policy = shape(DivergenceCallback(kl, 0.25, also_log=[absolute, squared_error, Doubled()]))
    assert shaped == alone
    assert policy.asked == ["reference"]
    found = {k.removeprefix("train/divergence/"): v for k, v in policy.logged.items() if "/divergence/" in k}
    squares = (0.5**2 + 0.25**2 + 2**2) / 2
    assert found == {"kl": 2.25 / 4, "absolute": 2.75 / 4, "squared_error": squares / 4, "Doubled": 4.5 / 4}


def test_a_divergence_of_another_shape_is_refused_and_told_what_it_needs():
    def over_all(logprobs, ref_logprobs):
        return (logprobs - ref_logprobs).sum()

    with pytest.raises(UserError, match=r"over_all returned shape \(\) for \(4,\) tokens; .* needs @over_vocabulary"):
        shape(DivergenceCallback(over_all))


# A coefficient that adapts


def test_the_adaptive_coefficient_follows_ziegler_s_rule():
    rule = AdaptiveCoefficient(target=6.0, initial=0.02, rate=0.1, limit=0.2)
    assert rule.next(0.02, 6.0) == 0.02
    assert rule.next(0.02, 6.6) == pytest.approx(0.02 * (1 + 0.1 * 0.1))
    assert rule.next(0.02, 60.0) == pytest.approx(0.02 * 1.02)
    assert rule.next(0.02, 0.0) == pytest.approx(0.02 * 0.98)
    assert rule.next(0.02, float("nan")) == 0.02


def adaptive(**settings) -> DivergenceCallback:
    """The rollout's 1.125 per response are 12.5 % above this target; at rate 1/2 that is 1/16 more."""
    return DivergenceCallback(kl, AdaptiveCoefficient(**{"target": 1.0, "initial": 0.25, "rate": 0.5, **settings}))


def test_an_adaptive_coefficient_pays_first_and_then_moves_by_the_divergence_per_response():
    callback = adaptive()
    for expected in (0.25, 0.25 * 17 / 16, 0.25 * (17 / 16) ** 2):
        _, policy = shape(callback)
        assert policy.logged["train/coefficient"] == expected
        assert policy.logged["train/penalty"] == expected * 1.125
    assert callback.coefficient == 0.25 * (17 / 16) ** 3


def test_validation_is_shaped_by_the_coefficient_and_does_not_move_it():
    callback = adaptive()
    shaped, policy = shape(callback, training=False)
    assert shaped[1] == [2.5, 0.0, 0.0]
    assert policy.logged.keys() == {"val/divergence/kl", "val/coefficient", "val/penalty"}
    assert callback.coefficient == 0.25


def test_a_resumed_run_takes_an_adaptive_coefficient_up_and_a_fixed_one_from_its_config():
    callback = adaptive()
    shape(callback)
    saved = callback.state_dict()
    assert saved == {"coefficient": 0.25 * 17 / 16}
    again, fixed = adaptive(initial=9.0), DivergenceCallback(kl, 0.125)
    for other in (again, fixed):
        other.load_state_dict(saved)
    assert (again.coefficient, fixed.coefficient) == (0.25 * 17 / 16, 0.125)


def test_in_a_run_it_moves_once_an_iteration_and_not_in_validation(tmp_path, tiny_llama, data_files):
    """The target is out of reach: 0.98 an iteration."""
    callback = DivergenceCallback(kl, AdaptiveCoefficient(target=1e9, initial=0.02))
    data = prompt_data(tiny_llama, data_files, val=data_files["prompts"], val_limit=8)
    runner = trainer(tmp_path, callbacks=[callback], limit_train_batches=3, enable_checkpointing=False)
    runner.fit(ppo(tiny_llama, inner_epochs=1), data)
    assert float(runner.callback_metrics["val/coefficient"]) == pytest.approx(0.02 * 0.98**3)
    assert callback.coefficient == pytest.approx(0.02 * 0.98**3)


# In a run


def test_two_of_them_are_refused_in_one_sentence(tmp_path, tiny_llama, data_files):
    runner = trainer(tmp_path, callbacks=[DivergenceCallback(kl), DivergenceCallback(js)])
    with pytest.raises(UserError, match="two DivergenceCallbacks would penalise twice; keep one, with also_log"):
        runner.fit(ppo(tiny_llama), prompt_data(tiny_llama, data_files))


def test_a_module_without_rollouts_is_refused_by_name(tmp_path, tiny_llama, data_files):
    data = AlpacaDataModule(train=data_files["sft"], tokenizer=tiny_llama, batch_size=8)
    with pytest.raises(UserError, match="works with modules that make rollouts, .* SFT makes none"):
        trainer(tmp_path, callbacks=[DivergenceCallback()]).fit(SFT(base_model=tiny_llama, **SMALL), data)


def test_without_one_no_reference_pass_is_paid_and_with_several_divergences_one(tmp_path, tiny_llama, data_files):
    passes = []

    class Counting(PPOPolicy):
        def logprobs(self, sequences, role):
            passes.append(role)
            return super().logprobs(sequences, role)

        def self_check(self, batch):
            """Has passes of its own."""

    def count(*callbacks):
        passes.clear()
        runner = trainer(tmp_path, callbacks=list(callbacks), limit_train_batches=1, enable_checkpointing=False)
        runner.fit(ppo(tiny_llama, kind=Counting), prompt_data(tiny_llama, data_files))
        return passes.count("reference")

    assert count() == 0
    assert count(DivergenceCallback(kl, also_log=[js])) == 1


class LoggingOff:
    """The policy, outside a Lightning hook: everything but its log."""

    def __init__(self, module):
        self.module = module

    def __getattr__(self, name):
        return getattr(self.module, name)

    def log_dict(self, *_, **__):
        pass


@pytest.fixture(scope="module")
def moved(tmp_path_factory, tiny_llama, data_files):
    """A policy that has left its reference, a rollout of it, and the distributions of both at every token."""
    data = prompt_data(tiny_llama, data_files)
    torch.manual_seed(0)
    module = ppo(tiny_llama, lr=0.05)
    trainer(tmp_path_factory.mktemp("ppo"), limit_train_batches=1, enable_checkpointing=False).fit(module, data)
    sampled = module.rollout(next(iter(data.train_dataloader())), "test", 0)
    logprobs = {}
    for role in ("policy", "reference"):
        with torch.no_grad(), module.backbone.role(role):
            logprobs[role] = module.backbone.lm_head(module.backbone.encode(sampled)).double().log_softmax(-1)
    return module, sampled, logprobs["policy"], logprobs["reference"]


def log_ratio(p, q, ids):
    return (p - q).gather(-1, ids[..., None]).squeeze(-1)


@pytest.mark.parametrize(
    ("function", "oracle"),
    [
        (kl, log_ratio),
        (squared_error, lambda p, q, ids: log_ratio(p, q, ids).square() / 2),
        (exact_kl, lambda p, q, ids: torch.as_tensor(entropy(p.exp(), q.exp(), axis=-1))),
        (exact_js, lambda p, q, ids: torch.as_tensor(jensenshannon(p.exp(), q.exp(), axis=-1) ** 2)),
    ],
    ids=["kl", "squared_error", "exact_kl", "exact_js"],
)
def test_of_a_policy_that_moved_it_is_the_divergence_between_both_at_every_token(moved, function, oracle):
    module, sampled, p, q = moved
    rewards = torch.zeros_like(sampled.logprobs)
    shaped = DivergenceCallback(function, 0.3).shape_rewards(module.trainer, LoggingOff(module), sampled, rewards)
    expected = -0.3 * oracle(p, q, sampled.response_ids) * sampled.response_mask
    assert expected.abs().max() > 1e-3
    torch.testing.assert_close(shaped.double(), expected, atol=1e-6, rtol=1e-4)  # fp32 log-probs


@pytest.mark.parametrize("target", [2e-6, 0.5, 6.0, 400.0])
def test_the_paper_s_clamp_of_the_kl_moves_no_coefficient(target):
    """Its controller gets a KL clamped to 1e-6 .. 500; the clip of the relative error hides that."""
    controller = AdaptiveCoefficient(target=target)
    for divergence in (-3.0, 0.0, 1e-9, 1e-6, 0.3, 6.0, 499.0, 501.0, 1e6):
        clamped = min(max(divergence, 1e-6), 500.0)
        assert controller.next(0.02, divergence) == controller.next(0.02, clamped)
