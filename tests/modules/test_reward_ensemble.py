"""Reward ensembles: k adapters on one base, each a reward model of its own; what PPO makes of their disagreement."""

import json

import pytest
import torch
from torch.utils.data import DataLoader

from lrlhf import AlpacaDataModule, RewardEnsemble, RewardModel, UserError
from lrlhf.functional import preference_loss
from lrlhf.run.handover import Handover
from tests.modules.helpers import SMALL, adamw, ppo, prompt_data, train_reward, train_sft, trainer
from tests.modules.test_ppo_policy import fit


def pairs(base, files) -> AlpacaDataModule:
    return AlpacaDataModule(
        train=files["pairs"], val=files["pairs"], tokenizer=base, task="preference", batch_size=8, val_limit=8
    )


def train(base, files, folder, **settings) -> RewardEnsemble:
    module = RewardEnsemble(base_model=base, optimizer=adamw(1e-2), **{**SMALL, "members": 3, **settings})
    trainer(folder, enable_checkpointing=False).fit(module, pairs(base, files))
    return module


@pytest.fixture(scope="module")
def trained(tmp_path_factory, tiny_llama, data_files):
    folder = tmp_path_factory.mktemp("ensemble")
    train_sft(tiny_llama, data_files, folder / "sft")
    module = train(tiny_llama, data_files, folder / "reward", sft=str(folder / "sft/handover"))
    return folder, module


def test_members_are_adapters_on_one_base_that_differ(trained):
    _, module = trained
    assert module.backbone.stacks == {
        "reference": ("sft",), **{f"reward_{i}": ("sft", f"reward_{i}") for i in (1, 2, 3)}
    }  # fmt: skip
    assert not module.backbone.copies
    heads = [module.backbone.heads[role].weight for role in module.roles]
    assert not torch.equal(heads[0], heads[1])


def test_without_bootstrap_a_member_trains_as_a_reward_model_alone_would(tmp_path, tiny_llama, data_files):
    """From the same start, on the same batches, without clipping, which looks at all members together."""
    settings = {"optimizer": lambda params: torch.optim.SGD(params, lr=0.1), "max_grad_norm": 1e9}
    ensemble = RewardEnsemble(base_model=tiny_llama, **{**SMALL, "members": 2, "bootstrap": False, **settings})
    ensemble.configure_model()
    alone = RewardModel(base_model=tiny_llama, **{**SMALL, **settings})
    alone.configure_model()
    for theirs, ours in zip(ensemble.backbone.trainable("reward_2"), alone.backbone.trainable(), strict=True):
        ours.data.copy_(theirs.data)
    for name, module in (("one", alone), ("two", ensemble)):
        torch.manual_seed(0)
        trainer(tmp_path / name, enable_checkpointing=False).fit(module, pairs(tiny_llama, data_files))
    for theirs, ours in zip(ensemble.backbone.trainable("reward_2"), alone.backbone.trainable(), strict=True):
        torch.testing.assert_close(theirs, ours, atol=1e-6, rtol=1e-4)


def test_bootstrap_counts_rows_as_drawing_with_replacement_does(trained):
    _, module = trained
    counts = torch.stack([module.counts(role, torch.arange(40)) for role in module.roles])
    assert (counts == counts.round()).all()
    assert not torch.equal(counts[0], counts[1])
    assert torch.equal(counts[0], module.counts("reward_1", torch.arange(40))), "the same in every epoch"
    assert counts.mean() == pytest.approx(1, abs=0.3)
    assert (counts == 0).float().mean() == pytest.approx(0.37, abs=0.12)  # 1 / e of the rows


def test_bootstrap_needs_pairs_that_know_their_place(tmp_path, tiny_llama, data_files):
    data = pairs(tiny_llama, data_files)
    data.setup("fit")
    loader = DataLoader(list(data.train_dataloader()), batch_size=None)
    module = RewardEnsemble(base_model=tiny_llama, members=2, **SMALL)
    with pytest.raises(UserError, match=r"bootstrap needs training pairs that know their place"):
        trainer(tmp_path, enable_checkpointing=False).fit(module, loader)


def test_validation_is_of_the_mean_score_and_tells_the_disagreement(trained, tiny_llama, data_files):
    _, module = trained
    logged = {name: float(value) for name, value in module.trainer.callback_metrics.items()}
    batch = next(iter(pairs_loader(tiny_llama, data_files)))
    scores = module.member_scores(batch)
    chosen, rejected = scores.mean(-1).unbind(1)
    assert logged["val/loss"] == pytest.approx(float(preference_loss(chosen, rejected).mean()), rel=1e-4)
    assert logged["val/accuracy"] == pytest.approx(float((chosen > rejected).float().mean()))
    expected = (scores - scores.mean(-1, keepdim=True)).square().mean(-1).sqrt().mean()
    assert logged["val/disagreement"] == pytest.approx(float(expected), rel=1e-4)


def pairs_loader(base, files):
    data = pairs(base, files)
    data.setup("fit")
    return data.val_dataloader()


def test_each_member_is_handed_over_as_a_reward_model(trained):
    folder, module = trained
    handover = folder / "reward/handover"
    assert json.loads((handover / "manifest.json").read_text()) == {"role": "ensemble", "members": 3}
    assert Handover.members(handover) == [str(handover / "members" / str(i)) for i in (1, 2, 3)]
    for i, member in enumerate(Handover.members(handover), start=1):
        read = Handover.read(member)
        assert (read.role, read.stack, read.head) == (f"reward_{i}", ("sft", f"reward_{i}"), True)
    with pytest.raises(UserError, match="is an ensemble; name one of its reward models, such as .*/members/1"):
        Handover.read(handover)


@pytest.mark.parametrize("aggregate", [None, "mean", "lower_bound", "worst"])
def test_ppo_scores_by_all_members_and_logs_where_they_disagree(trained, tmp_path, tiny_llama, data_files, aggregate):
    folder, module = trained
    parents = {"sft": str(folder / "sft/handover"), "reward_model": str(folder / "reward/handover")}
    policy = ppo(tiny_llama, reward_function=None, aggregate=aggregate, **parents)
    recorder = fit(tmp_path, policy, prompt_data(tiny_llama, data_files), batches=1)
    rollout = recorder.rollouts[0]
    found = []
    for number in (1, 2, 3):
        one = str(folder / f"reward/handover/members/{number}")
        single = ppo(tiny_llama, reward_function=None, sft=parents["sft"], reward_model=one)
        single.configure_model()
        found.append(single.score(rollout, None))
    each = torch.stack(found, 1).double()
    mean = each.mean(1)
    deviation = (each - mean[:, None]).square().mean(1).sqrt()
    expected = {"lower_bound": mean - deviation, "worst": each.min(1).values}.get(aggregate, mean)
    torch.testing.assert_close(rollout.scores.double(), expected, atol=1e-5, rtol=1e-5)
    assert recorder.metrics[0]["train/disagreement"] == pytest.approx(float(deviation.mean()), rel=1e-4)
    assert deviation.min() > 0
    assert policy.backbone.stacks["critic"] == ("sft", "reward_1", "critic")


def test_an_ensemble_of_one_is_refused(tmp_path, tiny_llama, data_files):
    with pytest.raises(UserError, match="RewardEnsemble: members=1 must be >=2"):
        RewardEnsemble(members=1, base_model=tiny_llama)
    train_reward(tiny_llama, data_files, tmp_path / "reward")
    with pytest.raises(UserError, match="model.aggregate=worst is for an ensemble, and .* has one member"):
        ppo(tiny_llama, reward_function=None, reward_model=str(tmp_path / "reward/handover"), aggregate="worst")


def test_predict_gives_the_mean_score_and_the_disagreement(trained, tmp_path, tiny_llama, data_files):
    _, module = trained
    data = AlpacaDataModule(
        predict=data_files["pairs"], tokenizer=tiny_llama, task="preference", val_limit=4, batch_size=8
    )
    (rows,) = trainer(tmp_path).predict(module, data)
    assert rows[0].keys() == {
        "chosen", "rejected", "chosen_score", "rejected_score", "chosen_disagreement", "rejected_disagreement"
    }  # fmt: skip
