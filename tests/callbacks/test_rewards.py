"""Scores normalized as NumPy does it over all that training saw, a penalty for a missing end, and a limit."""

import lightning as L
import numpy as np
import pytest
import torch

from lrlhf import MissingEOSPenalty, NormalizeScores, RewardLimit
from tests.modules.helpers import ppo, prompt_data, trainer
from tests.modules.test_ppo_policy import Recorder, ending_often, fit


class State:
    """A trainer as far as a reward callback looks at it."""

    def __init__(self, training: bool):
        self.training = training


class Scores:
    """A rollout as far as NormalizeScores looks at it: three tokens a response."""

    def __init__(self, scores: list[float]):
        self.scores = torch.tensor(scores)
        self.response_mask = torch.ones(len(scores), 3, dtype=torch.bool)


def normalize(callback: NormalizeScores, scores: list[float], training: bool = True) -> torch.Tensor:
    """What the callback makes of scores at the last token and of 0.5 that another callback put at the first."""
    rollout = Scores(scores)
    rewards = torch.zeros(len(scores), 3)
    rewards[:, 0], rewards[:, -1] = 0.5, rollout.scores
    shaped = callback.shape_rewards(State(training), None, rollout, rewards)
    assert torch.equal(shaped[:, :2], rewards[:, :2])
    return shaped[:, -1]


BATCHES = [[1.0, 4.0, 2.5], [100.0, 101.0], [-7.0], [3.0, 3.0, 3.0, 3.0]]


@pytest.mark.parametrize("center", [True, False])
def test_scores_are_normalized_by_all_scores_up_to_now(center):
    callback, seen = NormalizeScores(center), []
    for batch in BATCHES:
        seen += batch
        expected = (np.array(batch) - (np.mean(seen) if center else 0)) / np.std(seen)
        np.testing.assert_allclose(normalize(callback, batch), expected, rtol=1e-5, atol=1e-6)


def test_large_offsets_cost_no_digits():
    callback = NormalizeScores()
    for batch in ([16000.0, 16001.0], [16002.0, 16003.0]):
        last = normalize(callback, batch)
    np.testing.assert_allclose(last, [0.5 / np.std([0, 1, 2, 3]), 1.5 / np.std([0, 1, 2, 3])], rtol=1e-3)


def test_equal_scores_are_centred_and_not_divided_by_zero():
    assert normalize(NormalizeScores(), [2.0, 2.0]).tolist() == [0.0, 0.0]


def test_validation_and_scores_that_are_not_finite_leave_the_moments_alone():
    callback = NormalizeScores()
    normalize(callback, [1.0, 3.0])
    before = callback.state_dict()
    normalize(callback, [50.0], training=False)
    normalize(callback, [1.0, float("nan")])
    assert callback.state_dict() == before == {"count": 2, "mean": 2.0, "squares": 2.0}


def test_training_on_normalized_scores_sees_them(tmp_path, tiny_llama, data_files):
    recorder = Recorder()
    runner = trainer(
        tmp_path, callbacks=[NormalizeScores(), recorder], limit_train_batches=3, enable_checkpointing=False
    )
    runner.fit(ppo(tiny_llama), prompt_data(tiny_llama, data_files))
    seen = np.concatenate([rollout.scores for rollout in recorder.rollouts])
    last = recorder.rollouts[-1]
    expected = (last.scores.numpy() - seen.mean()) / seen.std()
    np.testing.assert_allclose(recorder.rewards[-1].sum(-1), expected, rtol=1e-4, atol=1e-5)


def test_a_missing_end_costs_the_penalty_at_the_last_token(tmp_path, tiny_llama, data_files):
    rewards = []
    for callbacks in ([], [MissingEOSPenalty(2.5)]):
        L.seed_everything(3)
        module = ending_often(tiny_llama, lr=0.0)
        recorder = fit(tmp_path, module, prompt_data(tiny_llama, data_files), *callbacks, batches=1)
        rewards.append(recorder.rewards[0])
    rollout, seen = recorder.rollouts[0], set()
    for row in range(len(rollout)):
        length = int(rollout.response_mask[row].sum())
        ended = 2 <= int(rollout.response_ids[row, length - 1]) < 80
        expected = rewards[0][row].clone()
        expected[length - 1] -= 0.0 if ended else 2.5
        assert torch.equal(rewards[1][row], expected)
        seen.add(ended)
    assert seen == {True, False}


def test_a_limit_clips_every_reward_on_both_sides_and_leaves_the_rest():
    rewards = torch.tensor([[-9.0, -2.0, 0.5], [2.5, 2.0, float("inf")]])
    limited = RewardLimit(2.0).shape_rewards(State(True), None, None, rewards)
    assert limited.tolist() == [[-2.0, -2.0, 0.5], [2.0, 2.0, 2.0]]
    assert rewards[0, 0] == -9


def test_a_limit_bounds_what_stands_before_it_in_the_list_and_not_what_comes_after(tmp_path, tiny_llama, data_files):
    def shaped(*callbacks) -> torch.Tensor:
        recorder = Recorder()
        runner = trainer(tmp_path, callbacks=[*callbacks, recorder], limit_train_batches=1, enable_checkpointing=False)
        module = ppo(tiny_llama, reward_function=lambda prompts, responses: torch.full((len(responses),), 7.0))
        runner.fit(module, prompt_data(tiny_llama, data_files))
        assert {int(n) for n in recorder.rollouts[0].lengths} == {8}, "none ends, so all pay the penalty"
        return recorder.rewards[0].sum(-1).unique()

    assert shaped(RewardLimit(1.0), MissingEOSPenalty(2.5)).tolist() == [1.0 - 2.5]
    assert shaped(MissingEOSPenalty(2.5), RewardLimit(1.0)).tolist() == [1.0]
