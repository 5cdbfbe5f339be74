"""A loss, gradient or reward that is not finite stops the run, or is skipped and counted; it poisons nothing."""

import pytest
import torch

from lrlhf import (
    SFT,
    AdaptiveCoefficient,
    AlpacaDataModule,
    Checkpoints,
    DivergenceCallback,
    NormalizeScores,
    RewardModel,
    UserError,
)
from lrlhf.functional import kl
from lrlhf.run.checkpoints import load, newest_checkpoint
from tests.modules.helpers import SMALL, adamw, ppo, prompt_data, trainer

POISONED = 1


class PoisonedSFT(SFT):
    """Its loss is NaN in one iteration."""

    def negative_log_likelihood(self, batch):
        return super().negative_log_likelihood(batch) * (float("nan") if self.iteration == POISONED else 1)


class PoisonedReward(RewardModel):
    """Its loss is finite and its gradient infinite in one iteration."""

    def pair_loss(self, batch):
        loss = super().pair_loss(batch)
        if self.iteration == POISONED and loss.requires_grad:
            loss.register_hook(lambda gradient: gradient * float("inf"))
        return loss


class Judge:
    """A reward function whose second answer has a NaN in one row."""

    def __init__(self):
        self.calls = 0

    def __call__(self, prompts: list[str], responses: list[str]) -> torch.Tensor:
        scores = torch.arange(float(len(responses)))
        if self.calls == POISONED:
            scores[3] = float("nan")
        self.calls += 1
        return scores


class Weights(Checkpoints):
    """Also keeps the weights after every iteration."""

    def __init__(self):
        super().__init__()
        self.after = []

    def on_train_batch_end(self, trainer, module, *_):
        self.after.append([p.detach().clone() for p in module.backbone.trainable()])


def module_and_data(stage, base, files, **settings):
    if stage == "sft":
        data = AlpacaDataModule(train=files["sft"], tokenizer=base, batch_size=8)
        return PoisonedSFT(base_model=base, optimizer=adamw(1e-2), **SMALL, **settings), data
    if stage == "reward":
        data = AlpacaDataModule(train=files["pairs"], tokenizer=base, task="preference", batch_size=8)
        return PoisonedReward(base_model=base, optimizer=adamw(1e-2), **SMALL, **settings), data
    return ppo(base, reward_function=Judge(), **settings), prompt_data(base, files)


def same(one, other):
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


@pytest.mark.parametrize("stage", ["sft", "reward", "ppo"])
def test_a_skipped_step_changes_no_weight_and_is_counted(stage, tmp_path, tiny_llama, data_files):
    module, data = module_and_data(stage, tiny_llama, data_files, on_nonfinite="skip")
    weights = Weights()
    with pytest.warns(UserWarning, match="step skipped"):
        trainer(tmp_path, callbacks=[weights], limit_train_batches=3).fit(module, data)
    first, poisoned, last = weights.after
    assert same(first, poisoned)
    assert not same(poisoned, last)
    steps = 4 if stage == "ppo" else 1  # two inner epochs of two minibatches, one count each
    saved = load(newest_checkpoint(tmp_path))
    assert module.skipped == saved["lrlhf"]["skipped"] == steps
    tensors = [*saved["state_dict"].values()]
    tensors += [t for moments in saved["optimizer_states"][0]["state"].values() for t in moments.values()]
    assert all(tensor.isfinite().all() for tensor in tensors)


@pytest.mark.parametrize("stage", ["sft", "reward", "ppo"])
def test_a_stop_keeps_the_checkpoint_before(stage, tmp_path, tiny_llama, data_files):
    module, data = module_and_data(stage, tiny_llama, data_files)
    with pytest.raises(UserError, match=r"in iteration 1: training stopped before the weights changed"):
        trainer(tmp_path, callbacks=[Checkpoints()], limit_train_batches=3).fit(module, data)
    saved = load(newest_checkpoint(tmp_path))
    assert saved["lrlhf"]["iteration"] == 1
    assert all(tensor.isfinite().all() for tensor in saved["state_dict"].values())


def test_a_poisoned_rollout_moves_neither_the_coefficient_nor_the_moments(tmp_path, tiny_llama, data_files):
    """The reference gives NaN in one iteration, and so does the judge."""
    seen = []

    class Spy(DivergenceCallback):
        def shape_rewards(self, trainer, policy, rollout, rewards):
            if policy.iteration == POISONED:
                policy.logprobs = lambda *_: torch.full_like(rollout.logprobs, float("nan"))
            before = self.coefficient
            shaped = super().shape_rewards(trainer, policy, rollout, rewards)
            vars(policy).pop("logprobs", None)
            seen.append(self.coefficient / before)
            return shaped

    moments = NormalizeScores()
    callbacks = [moments, Spy(kl, AdaptiveCoefficient(target=1e9, initial=0.1))]
    module = ppo(tiny_llama, reward_function=Judge(), on_nonfinite="skip")
    runner = trainer(tmp_path, callbacks=callbacks, limit_train_batches=3, enable_checkpointing=False)
    with pytest.warns(UserWarning, match="step skipped"):
        runner.fit(module, prompt_data(tiny_llama, data_files))
    assert seen == pytest.approx([0.98, 1.0, 0.98])
    assert moments.count == 16
