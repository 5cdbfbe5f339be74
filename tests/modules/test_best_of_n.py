"""Best of n: what is kept, and how far it is from the reference."""

import itertools
import json
import math

import pytest
import torch

from lrlhf import BestOfN, Sampling, UserError
from lrlhf.functional import best_of_n_kl, best_of_n_kl_bound
from tests.modules.helpers import SMALL, count_vowels, prompt_data, trainer


def best_of(base, n=4, **settings) -> BestOfN:
    defaults = {"reward_function": count_vowels, "micro_batch_size": 3, "sampling": Sampling(max_new_tokens=8)}
    return BestOfN(n=n, base_model=base, **{**SMALL, **defaults, **settings})


def exact_kl(probabilities: list[float], n: int) -> float:
    """KL(best of n || p) where responses are ranked in their order: by enumeration of all n draws."""
    best = [0.0] * len(probabilities)
    for draws in itertools.product(range(len(probabilities)), repeat=n):
        best[max(draws)] += math.prod(probabilities[i] for i in draws)
    return sum(b * math.log(b / p) for b, p in zip(best, probabilities, strict=True))


@pytest.mark.parametrize("n", [2, 4])
@pytest.mark.parametrize("probabilities", [[0.25] * 4, [0.7, 0.1, 0.1, 0.1], [0.1, 0.1, 0.1, 0.7], [0.02, 0.95, 0.03]])
def test_the_bound_holds_and_the_estimate_is_closer_by_enumeration(probabilities, n):
    truth, bound = exact_kl(probabilities, n), best_of_n_kl_bound(n)
    assert truth <= bound + 1e-12
    estimate = 0.0
    for draws in itertools.product(range(len(probabilities)), repeat=n):
        weight = math.prod(probabilities[i] for i in draws)
        estimate += weight * float(best_of_n_kl(torch.tensor([math.log(probabilities[max(draws)])]), n))
    assert abs(estimate - truth) < abs(bound - truth)


def test_the_estimate_tends_to_the_bound_and_to_nothing():
    rare, certain = best_of_n_kl(torch.tensor([-200.0, 0.0]), 16).tolist()
    assert rare == pytest.approx(math.log(16) - 15 / 16)
    assert certain == pytest.approx(0, abs=1e-6)


def test_predict_keeps_the_best_of_the_answers_that_single_rows_would_give(tmp_path, tiny_llama, data_files, capsys):
    module = best_of(tiny_llama)
    data = prompt_data(tiny_llama, data_files, predict=data_files["prompts"], val_limit=6)
    (rows,) = trainer(tmp_path).predict(module, data)
    batch = next(iter(data.predict_dataloader())).repeat(4)
    texts = module.decode(*module.sample(batch, "reference", "predict", 0))
    scores = count_vowels([], texts).view(6, 4)
    for i, row in enumerate(rows):
        best = int(scores[i].argmax())
        assert (row["output"], row["score"]) == (texts[4 * i + best], float(scores[i, best]))
    report = json.loads((tmp_path / "best_of_n.json").read_text())
    assert report["score"] == pytest.approx(float(scores.amax(1).mean()))
    assert report["score_of_all"] == pytest.approx(float(scores.mean()))
    assert report["kl_bound"] == pytest.approx(math.log(4) - 3 / 4)
    assert 0 < report["kl_estimate"] <= report["kl_bound"] + 0.01
    assert "Best of 4 on 6 prompts" in capsys.readouterr().out


def test_it_has_nothing_to_train(tmp_path, tiny_llama, data_files):
    module = best_of(tiny_llama)
    with pytest.raises(UserError, match="BestOfN trains nothing and validates nothing; use lrlhf predict"):
        trainer(tmp_path).fit(module, prompt_data(tiny_llama, data_files))
    module.configure_model()
    assert module.backbone.trainable() == []


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"n": 1}, "BestOfN: n=1 must be >=2"),
        ({"reward_function": None}, "BestOfN needs one source of reward"),
        ({"sampling": Sampling(temperature=0)}, "leave sampling.top_k at 0, top_p at 1, temperature above 0"),
        ({"reward_function": lambda prompts, responses: [math.nan] * len(responses)}, "a score is not finite"),
    ],
)
def test_what_has_no_best_is_refused(tmp_path, tiny_llama, data_files, settings, says):
    with pytest.raises(UserError, match=says):
        trainer(tmp_path).predict(
            best_of(tiny_llama, **settings), prompt_data(tiny_llama, data_files, predict=data_files["prompts"])
        )
