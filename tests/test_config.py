"""Ranges of settings hold however the settings are made, and what is kept is plain."""

import io

import pytest
import torch
from jsonargparse.typing import PositiveFloat, PositiveInt

from lrlhf import (
    PPO,
    SFT,
    AdaptiveCoefficient,
    AlpacaDataModule,
    Checkpoints,
    DivergenceCallback,
    LoRA,
    MissingEOSPenalty,
    PPOPolicy,
    RewardLimit,
    RewardModel,
    Sampling,
    Schedule,
    UserError,
)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: LoRA(r=0), "LoRA: r=0 must be >0"),
        (lambda: LoRA(dropout=1), "LoRA: dropout=1 must be >=0 and <1"),
        (lambda: LoRA(alpha=float("nan")), "LoRA: alpha=nan must be >0"),
        (lambda: LoRA(alpha=float("inf")), "alpha=inf must be finite"),
        (lambda: Sampling(top_p=0), "Sampling: top_p=0 must be >0 and <=1"),
        (lambda: Sampling(temperature=-0.1), "Sampling: temperature=-0.1 must be >=0"),
        (lambda: Schedule(warmup=-1), "Schedule: warmup=-1 must be >=0"),
        (lambda: PPO(clip_range=-0.2), "PPO: clip_range=-0.2 must be >0"),
        (lambda: PPO(trace_decay=1.01), "PPO: trace_decay=1.01 must be >=0 and <=1"),
        (lambda: PPO(target_update_kl=0), "PPO: target_update_kl=0 must be >0"),
        (lambda: SFT(micro_batch_size=0), "SFT: micro_batch_size=0 must be >0"),
        (lambda: SFT(max_grad_norm=-1), "SFT: max_grad_norm=-1 must be >0"),
        (lambda: RewardModel(centering=-1), "RewardModel: centering=-1 must be >=0"),
        (lambda: AlpacaDataModule(limit=0), "AlpacaDataModule: limit=0 must be >0"),
        (lambda: Checkpoints(keep=1), "Checkpoints: keep=1 must be >=2"),
        (lambda: DivergenceCallback(coefficient=-1), "DivergenceCallback: coefficient=-1.0 must be >=0"),
        (lambda: AdaptiveCoefficient(rate=0), "AdaptiveCoefficient: rate=0 must be >0"),
        (lambda: RewardLimit(0), "RewardLimit: limit=0 must be >0"),
        (lambda: MissingEOSPenalty(-1), "MissingEOSPenalty: penalty=-1 must be >=0"),
    ],
)
def test_a_value_out_of_its_range_is_refused_in_code_too(make, words):
    with pytest.raises(UserError, match=words):
        make()


def test_what_may_be_null_may_be_null_and_the_ends_of_a_range_belong_to_it():
    assert PPO(target_update_kl=None, trace_decay=1, discount=0, entropy_coefficient=0).discount == 0
    assert Sampling(top_p=1, temperature=0, max_new_tokens=1).truncates
    assert AlpacaDataModule(limit=None).limit is None
    assert LoRA(dropout=0.0, r=1).r == 1


def test_numbers_of_a_config_become_plain_so_that_a_checkpoint_may_hold_them():
    lora = LoRA(r=PositiveInt(4), alpha=PositiveFloat(8))
    assert (type(lora.r), type(lora.alpha)) == (int, float)
    file = io.BytesIO()
    torch.save({"r": lora.r, "alpha": lora.alpha}, file)
    file.seek(0)
    assert torch.load(file, weights_only=True) == {"r": 4, "alpha": 8.0}


def test_a_subclass_whose_annotations_are_not_known_when_it_runs_is_no_fault():
    class Mine(PPOPolicy):
        def __init__(self, other: "NotImported" = None, **kwargs):  # noqa: F821
            self.other = other
            super().__init__(**kwargs)

    assert Mine(reward_function=lambda prompts, responses: None, micro_batch_size=3).micro_batch_size == 3
    with pytest.raises(UserError, match="Mine: micro_batch_size=0 must be >0"):
        Mine(reward_function=lambda prompts, responses: None, micro_batch_size=0)
