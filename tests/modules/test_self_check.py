"""The checks before step 0 see what they are there to see."""

import pytest
import torch

from lrlhf import UserError
from tests.modules.helpers import ppo_after_both_stages, prompt_data


@pytest.fixture
def ready(tmp_path, tiny_llama, data_files):
    module = ppo_after_both_stages(tiny_llama, data_files, tmp_path)
    data = prompt_data(tiny_llama, data_files)
    data.setup("fit")
    return module, next(iter(data.train_dataloader()))


def test_a_sound_start_passes(ready):
    module, batch = ready
    module.self_check(batch)


def nudge(parameter):
    with torch.no_grad():
        parameter.add_(0.05)


def test_a_policy_that_is_not_its_reference_is_refused(ready):
    module, batch = ready
    nudge(module.backbone.model.model.layers[0].self_attn.q_proj.lora_B.policy.weight)
    with pytest.raises(UserError, match="policy is not its reference"):
        module.self_check(batch)
    module.iteration = 3  # a resumed run may have moved
    module.self_check(batch)


def test_a_base_that_was_written_to_is_refused(ready):
    module, batch = ready
    nudge(module.backbone.model.model.norm.weight)
    with pytest.raises(UserError, match="the base model changed"):
        module.self_check(batch)


def test_a_reward_model_with_another_head_is_refused(ready):
    module, batch = ready
    nudge(module.backbone.heads["reward"].weight)
    with pytest.raises(UserError, match="its manifest says"):
        module.self_check(batch)


def test_a_parameter_that_trains_in_a_role_that_is_frozen_is_refused(ready):
    module, batch = ready
    head = module.backbone.heads["reward"]
    module.backbone._trainable["reward"] = [(head, "weight"), (head, "bias")]
    with pytest.raises(UserError, match="train wrongly in the role reward"):
        module.self_check(batch)
