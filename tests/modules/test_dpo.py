"""DPO and f-DPO: the losses by hand, the optimum in closed form, and a reference that is computed once."""

import itertools
import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.utils.data import DataLoader

from lrlhf import DPO, AlpacaDataModule, LoRA, TextTemplate, UserError
from lrlhf.functional import (
    alpha_divergence,
    bregman,
    clamped_kl,
    forward_kl,
    hinge_loss,
    ipo_loss,
    js,
    kl,
    sigmoid_loss,
)
from lrlhf.metrics import Means
from lrlhf.types import Preferences
from tests.conftest import write_jsonl
from tests.modules.helpers import SMALL, adamw, train_sft, trainer

F_DIVERGENCES = [kl, bregman, js, forward_kl, alpha_divergence]


def dpo(base, lr=1e-2, **settings) -> DPO:
    return DPO(base_model=base, optimizer=adamw(lr), **{**SMALL, "micro_batch_size": 3, **settings})


def pairs(base, files, **settings) -> AlpacaDataModule:
    return AlpacaDataModule(
        **{"train": files["pairs"], "tokenizer": base, "task": "preference", "batch_size": 8, **settings}
    )


def fit(folder, module, data, **settings):
    runner = trainer(folder, enable_checkpointing=False, **settings)
    runner.fit(module, data)
    return {name: float(value) for name, value in runner.callback_metrics.items()}


def moved(base, files, folder, **settings) -> tuple[DPO, Preferences]:
    """A policy that has left its reference, and a batch of pairs with the reference's log-probs."""
    module = dpo(base, **settings)
    data = pairs(base, files)
    fit(folder, module, data, limit_train_batches=2)
    batch = next(iter(data.train_dataloader()))
    return module, module.with_reference(batch)


@pytest.mark.parametrize("divergence", F_DIVERGENCES)
def test_a_derivative_is_that_of_its_own_estimator(divergence):
    """E_p[d] = E_q[u d] = E_q[f(u)], so f' = d(u d)/du = d + d', by delta; up to a constant."""
    delta = torch.linspace(-3, 3, 61, dtype=torch.float64, requires_grad=True)
    value = divergence(delta, torch.zeros_like(delta))
    (slope,) = torch.autograd.grad(value.sum(), delta)
    difference = (value + slope - divergence.f_derivative(delta)).detach()
    torch.testing.assert_close(difference, difference[:1].expand_as(difference), atol=1e-9, rtol=0)
    assert (divergence.f_derivative(delta).diff() > 0).all()


def test_at_the_start_every_pair_is_undecided(tmp_path, tiny_llama, data_files):
    metrics = fit(
        tmp_path, dpo(tiny_llama, lr=0.0, lora=LoRA(r=2, alpha=4, dropout=0.5)), pairs(tiny_llama, data_files)
    )
    assert metrics["train/loss"] == pytest.approx(math.log(2), abs=1e-6)
    # sums of another batch round otherwise
    assert metrics["train/margin"] == pytest.approx(0, abs=1e-5)
    assert metrics["train/chosen_log_ratio"] == pytest.approx(0, abs=1e-4)


@pytest.mark.parametrize("divergence", F_DIVERGENCES)
@pytest.mark.parametrize("length_normalized", [False, True])
def test_the_loss_by_hand(tmp_path, tiny_llama, data_files, divergence, length_normalized):
    module, batch = moved(
        tiny_llama, data_files, tmp_path, divergence=divergence, beta=0.3, label_smoothing=0.1, nll_coefficient=0.7,
        length_normalized=length_normalized,
    )  # fmt: skip
    f = {
        kl: lambda d: d,
        bregman: lambda d: d,
        js: lambda d: 0.5 * math.log(2 / (1 + math.exp(-d))),
        forward_kl: lambda d: 1 - math.exp(-d),
        alpha_divergence: lambda d: (math.exp(-0.5 * d) - 1) / -0.5,
    }[divergence]
    total, nll = 0.0, 0.0
    policy = [module.logprobs(side, "policy").double().sum(1) for side in (batch.chosen, batch.rejected)]
    reference = [module.logprobs(side, "reference").double().sum(1) for side in (batch.chosen, batch.rejected)]
    lengths = batch.chosen.lengths, batch.rejected.lengths
    for row in range(len(batch)):
        rewards = [f(float(policy[i][row] - reference[i][row])) for i in (0, 1)]
        if length_normalized:
            rewards = [rewards[i] / int(lengths[i][row]) for i in (0, 1)]
        h = 0.3 * (rewards[0] - rewards[1])
        total += 0.9 * math.log1p(math.exp(-h)) + 0.1 * math.log1p(math.exp(h))
        nll -= float(policy[0][row])
    expected = total / len(batch) + 0.7 * nll / int(lengths[0].sum())
    with module.backbone.role("policy"):
        found = module.objective(batch, len(batch), lengths[0].sum(), Means())
    assert float(found) == pytest.approx(expected, rel=1e-5)
    assert abs(total / len(batch) - math.log(2)) > 1e-4, "the policy has moved"


@pytest.mark.parametrize(
    ("loss", "by_hand"),
    [
        (sigmoid_loss, lambda h: math.log1p(math.exp(-0.2 * h))),
        (ipo_loss, lambda h: (h - 1 / 0.4) ** 2),
        (hinge_loss, lambda h: max(0.0, 1 - 0.2 * h)),
    ],
)
def test_the_losses_of_a_difference_by_hand(loss, by_hand):
    differences = [-30.0, -1.0, 0.0, 2.5, 4.0, 40.0]
    found = loss(torch.tensor(differences, dtype=torch.float64), beta=0.2)
    assert found.tolist() == pytest.approx([by_hand(h) for h in differences])


def enumerable_pairs(folder, rewards: dict[str, float], times: int = 40) -> str:
    """Every pair of answers, as often as Bradley-Terry prefers it."""
    rows = []
    for a, b in itertools.combinations(rewards, 2):
        share = round(times / (1 + math.exp(rewards[b] - rewards[a])))
        rows += [{"instruction": "go", "chosen": a, "rejected": b}] * share
        rows += [{"instruction": "go", "chosen": b, "rejected": a}] * (times - share)
    path = folder / "all.json"
    path.write_text(json.dumps(rows))
    return str(path)


@pytest.mark.parametrize(
    "divergence", [kl, *(pytest.param(d, marks=pytest.mark.slow) for d in (js, forward_kl, alpha_divergence))]
)
def test_on_all_pairs_f_dpo_finds_its_optimum_in_closed_form(tmp_path, tiny_llama, divergence):
    """r = beta f'(p / q) + constant: the implicit rewards of all answers differ as their rewards do.

    With the KL that is p = q exp(r / beta) / Z. A full model, since the optimum must lie in the family.
    """
    rewards, beta = {"a": 0.0, "b": 0.5, "c": 1.0, "d": -0.5}, 1.0
    module = dpo(tiny_llama, lr=2e-3, lora=None, beta=beta, divergence=divergence, micro_batch_size=240)
    template = TextTemplate("{instruction}")
    data = AlpacaDataModule(
        enumerable_pairs(tmp_path, rewards), tokenizer=tiny_llama, task="preference", batch_size=240, template=template
    )
    fit(tmp_path, module, data, max_epochs=120)
    batch = next(iter(data.train_dataloader()))
    answers = {}
    for side in (batch.chosen, batch.rejected):
        log_ratios = (module.logprobs(side, "policy") - module.logprobs(side, "reference")).sum(1)
        texts = module.decode(side.response_ids, side.response_mask)
        answers |= dict(zip(texts, log_ratios.tolist(), strict=True))
    implicit = {a: beta * float(divergence.f_derivative(torch.tensor(answers[a]))) for a in rewards}
    for a, b in itertools.combinations(rewards, 2):
        assert implicit[a] - implicit[b] == pytest.approx(rewards[a] - rewards[b], abs=0.1), (a, b)


def test_the_reference_is_computed_once_and_kept(tmp_path, tiny_llama, data_files, monkeypatch):
    calls = []
    ours = DPO.reference_sums

    def counted(self, batch):
        calls.append(len(batch))
        return ours(self, batch)

    monkeypatch.setattr(DPO, "reference_sums", counted)
    train_sft(tiny_llama, data_files, tmp_path / "sft")
    sft = str(tmp_path / "sft/handover")
    first = dpo(tiny_llama, sft=sft)
    fit(tmp_path / "run", first, pairs(tiny_llama, data_files), max_epochs=3)
    assert sum(calls) == 40, "once for three epochs"
    fit(tmp_path / "run", dpo(tiny_llama, sft=sft), pairs(tiny_llama, data_files))
    assert sum(calls) == 40, "a second start takes them from the run folder"
    fit(tmp_path / "run", dpo(tiny_llama), pairs(tiny_llama, data_files))
    assert sum(calls) == 80, "another reference has its own"
    data = pairs(tiny_llama, data_files)
    data.setup("fit")
    for batch in data.train_dataloader():
        expected = [first.logprobs(side, "reference").sum(1) for side in (batch.chosen, batch.rejected)]
        torch.testing.assert_close(first.reference[batch.numbers], torch.stack(expected, 1), atol=1e-4, rtol=0)


def test_the_same_module_fitted_to_other_pairs_has_their_reference(tmp_path, tiny_llama, data_files):
    module = dpo(tiny_llama)
    fit(tmp_path / "first", module, pairs(tiny_llama, data_files))
    rows = [json.loads(line) for line in Path(data_files["pairs"]).read_text().splitlines()][20:]
    data = pairs(tiny_llama, {"pairs": write_jsonl(tmp_path / "others.jsonl", rows)})
    fit(tmp_path / "second", module, data)
    assert len(module.reference) == 20
    batch = next(iter(data.train_dataloader()))
    wanted = [module.logprobs(side, "reference").sum(1) for side in (batch.chosen, batch.rejected)]
    torch.testing.assert_close(module.reference[batch.numbers], torch.stack(wanted, 1), atol=1e-4, rtol=0)


def test_pairs_that_do_not_know_their_place_are_refused(tmp_path, tiny_llama, data_files):
    data = pairs(tiny_llama, data_files)
    data.setup("fit")
    batches = [replace(batch, numbers=torch.zeros_like(batch.numbers)) for batch in data.train_dataloader()]
    loader = DataLoader(batches, batch_size=None)
    with pytest.raises(UserError, match=r"precompute_reference needs training pairs that know their place"):
        fit(tmp_path, dpo(tiny_llama), loader)


@pytest.mark.parametrize("size", [1, 3, 8])
def test_neither_the_micro_batch_nor_precomputing_changes_what_is_learned(tmp_path, tiny_llama, data_files, size):
    torch.manual_seed(0)
    one = dpo(tiny_llama, micro_batch_size=8)
    fit(tmp_path / "one", one, pairs(tiny_llama, data_files))
    torch.manual_seed(0)
    other = dpo(tiny_llama, micro_batch_size=size, precompute_reference=False)
    fit(tmp_path / "other", other, pairs(tiny_llama, data_files))
    for a, b in zip(one.backbone.trainable(), other.backbone.trainable(), strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-3)


def test_validation_tells_the_divergence_on_the_pairs_tokens(tmp_path, tiny_llama, data_files):
    module = dpo(tiny_llama, lr=3e-2)
    data = pairs(tiny_llama, data_files, val=data_files["pairs"])
    metrics = fit(tmp_path, module, data)
    assert metrics["val/accuracy"] > 0.6
    assert metrics["val/pairs"] == 40
    sums, tokens = 0.0, 0
    for batch in data.val_dataloader():
        for side in (batch.chosen, batch.rejected):
            for row in range(len(side)):
                ids = side.ids[row][side.mask[row]]
                begin = len(ids) - int(side.lengths[row])
                both = []
                for role in ("policy", "reference"):
                    with module.backbone.role(role):
                        both.append(module.backbone.plain_logits(ids)[begin - 1 : -1].double().log_softmax(-1))
                sums += float((both[0].exp() * (both[0] - both[1])).sum())
                tokens += int(side.lengths[row])
    assert metrics["val/divergence/exact_kl"] == pytest.approx(sums / tokens, rel=1e-3)


def test_predict_answers_the_prompts(tmp_path, tiny_llama, data_files):
    module = dpo(tiny_llama)
    data = pairs(tiny_llama, data_files, predict=data_files["prompts"])
    (rows, *_) = trainer(tmp_path).predict(module, data)
    assert rows[0].keys() == {"instruction", "dataset", "output", "generator"}


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"divergence": clamped_kl}, "model.divergence: clamped_kl gives no implicit reward; take kl, js"),
        ({"label_smoothing": 0.5}, "label_smoothing=0.5 must be below 0.5"),
        ({"label_smoothing": 0.1, "loss": ipo_loss}, "label_smoothing is a setting of lrlhf.functional.sigmoid_loss"),
        ({"beta": 0.0}, "DPO: beta=0.0 must be >0"),
    ],
)
def test_settings_without_meaning_are_refused(tiny_llama, settings, says):
    with pytest.raises(UserError, match=says):
        dpo(tiny_llama, **settings)
