"""NormalizeScores against NumPy over all scores that training saw."""

import numpy as np
import pytest
import torch

from lrlhf import NormalizeScores
from tests.modules.helpers import ppo, prompt_data, trainer
from tests.modules.test_ppo_policy import Recorder


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
