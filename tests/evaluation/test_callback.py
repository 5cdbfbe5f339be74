"""WinRateCallback: the curve it logs is the win rate of the policy against its reference."""

import csv

import pytest
import torch

from lrlhf.errors import UserError
from lrlhf.evaluation import FunctionJudge, WinRateCallback
from lrlhf.evaluation.judges import Judge
from lrlhf.run.metrics_csv import MetricsFile
from tests.modules.helpers import count_vowels, ppo, prompt_data, trainer


def shorter(prompts, responses):
    return torch.tensor([-float(len(r)) for r in responses])


def fit(tiny_llama, data_files, folder, callbacks, lr=5e-2, **settings):
    torch.manual_seed(0)
    module = ppo(tiny_llama, lr=lr)
    data = prompt_data(tiny_llama, data_files, val=data_files["prompts"], val_batch_size=12, val_limit=30)
    options = {"limit_train_batches": 2, "val_check_interval": 1, "logger": MetricsFile(folder), **settings}
    trainer(folder, enable_checkpointing=False, callbacks=callbacks, **options).fit(module, data)
    with (folder / "metrics.csv").open() as file:
        return module, data, list(csv.DictReader(file))


def column(rows, name):
    return [float(row[name]) for row in rows if row.get(name)]


def test_the_curve_ends_at_the_rate_of_the_trained_policy(tiny_llama, data_files, tmp_path):
    callbacks = [WinRateCallback(), WinRateCallback(FunctionJudge(shorter))]
    module, data, rows = fit(tiny_llama, data_files, tmp_path, callbacks)
    wins = {"score": [], "shorter": []}
    for number, batch in enumerate(data.val_dataloader()):
        before, after = (module.decode(*module.sample(batch, r, "validate", number)) for r in ("reference", "policy"))
        for name, function in (("score", count_vowels), ("shorter", shorter)):
            one, two = function([], before), function([], after)
            wins[name] += (0.5 + 0.5 * (two - one).sign()).tolist()
    for name, values in wins.items():
        rates = column(rows, f"val/win_rate/{name}")
        assert len(rates) == 2
        assert rates[-1] == pytest.approx(sum(values) / 30)
        low, high = (column(rows, f"val/win_rate_{end}/{name}")[-1] for end in ("low", "high"))
        assert low <= rates[-1] <= high
        assert column(rows, f"val/model_length/{name}")


def test_a_policy_that_does_not_move_ties_with_its_reference_and_every_counts_validations(
    tiny_llama, data_files, tmp_path
):
    callback = WinRateCallback(every=2)
    _, _, rows = fit(tiny_llama, data_files, tmp_path, [callback], lr=0.0, limit_train_batches=4)
    assert column(rows, "val/win_rate/score") == [0.5, 0.5]
    assert callback.state_dict() == {"validations": 4}


class Broken(Judge):
    name = "broken/judge"

    def prefer(self, pairs):
        raise UserError("the server is gone.")


def test_a_judge_that_fails_stops_no_training(tiny_llama, data_files, tmp_path):
    with pytest.warns(UserWarning, match="the server is gone"):
        module, _, rows = fit(tiny_llama, data_files, tmp_path, [WinRateCallback(Broken())])
    assert module.iteration == 2
    assert [row["val/win_rate/broken_judge"] for row in rows if row.get("val/win_rate/broken_judge")] == ["nan"] * 2


def test_the_callback_changes_no_training(tiny_llama, data_files, tmp_path):
    weights = []
    for name, callbacks in (("with", [WinRateCallback()]), ("without", [])):
        module, *_ = fit(tiny_llama, data_files, tmp_path / name, callbacks)
        weights.append([p.detach().clone() for p in module.backbone.trainable()])
    assert all(torch.equal(a, b) for a, b in zip(*weights, strict=True))
