"""The checks before step 0 see what they are there to see."""

from contextlib import nullcontext

import pytest
import torch

from lrlhf import Sampling, UserError
from lrlhf.model.decoding import StaticStep
from tests.modules.helpers import ppo, ppo_after_both_stages, prompt_data, train_sft, trainer


@pytest.fixture
def ready(tmp_path, tiny_llama, data_files):
    module = ppo_after_both_stages(tiny_llama, data_files, tmp_path)
    data = prompt_data(tiny_llama, data_files)
    data.setup("fit")
    return module, next(iter(data.train_dataloader()))


def test_a_sound_start_passes_and_says_what_it_found(ready):
    module, batch = ready
    found = module.self_check(batch)
    assert len(found) == 6
    assert all("None" not in sentence and sentence.endswith(".") for sentence in found)
    score = module.parents[module.source.folders[0]].probe_score
    assert f"scores the probe text {score:.6g}, its manifest says {score:.6g}" in found[2]


def test_what_was_found_is_kept_in_the_run_folder(tmp_path, tiny_llama, data_files):
    train_sft(tiny_llama, data_files, tmp_path / "run", limit_train_batches=1)
    assert "nats a token from the base's own forward pass" in (tmp_path / "run/self_checks.txt").read_text()


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
    module.backbone._trainable["reward"] = [(head, "weight")]
    with pytest.raises(UserError, match="train wrongly in the role reward"):
        module.self_check(batch)


def test_the_engine_that_the_run_samples_with_is_the_one_that_is_checked(tmp_path, tiny_llama, data_files, monkeypatch):
    monkeypatch.setattr(StaticStep, "_run", lambda self: torch.randn(len(self.ids), 259))
    for engine, wrong in (("dynamic", False), ("static", True)):
        module = ppo(tiny_llama, sampling=Sampling(max_new_tokens=4, engine=engine))
        batches = trainer(tmp_path, limit_train_batches=1, enable_checkpointing=False)
        with pytest.raises(UserError, match="self-check: samples") if wrong else nullcontext():
            batches.fit(module, prompt_data(tiny_llama, data_files))
