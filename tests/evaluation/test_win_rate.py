"""Win rates against hand values, simulation, other libraries and AlpacaEval's own code."""

import json
import math
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy import stats

from lrlhf.errors import UserError
from lrlhf.evaluation.estimates import Estimate, bootstrap_draws, bootstrap_interval, mean_interval
from lrlhf.evaluation.head_to_head import measure
from lrlhf.evaluation.pairs import Annotation
from lrlhf.evaluation.win_rate import WinRate, bradley_terry, length_controlled_win_rate, paired_difference

SHARED = Path(__file__).parents[2] / ".." / "shared" / "data"


def annotations(preferences, lengths=None, prompts=None, model="m", answers=None):
    lengths = lengths or [(1, 1)] * len(preferences)
    prompts = prompts or [str(i) for i in range(len(preferences))]
    return [
        Annotation(
            prompts[i], "x" * lengths[i][0], "y" * lengths[i][1], "r", model, preference=p,
            answers=tuple(answers[i]) if answers else (),
        )
        for i, p in enumerate(preferences)
    ]  # fmt: skip


def test_ties_are_half_and_pairs_without_an_answer_are_left_out_and_told():
    found = measure(annotations([2, 2, 1, 1.5, None, 1.75]))
    assert found["win_rate"].value == pytest.approx((1 + 1 + 0 + 0.5 + 0.75) / 5)
    assert found["discrete_win_rate"].value == pytest.approx((1 + 1 + 0 + 0.5 + 1) / 5)
    assert found["win_rate"].n == 5
    assert found["ties"].value == pytest.approx(1 / 5)
    assert found["judged"] == Estimate(5 / 6, n=6)
    wins = np.array([1, 1, 0, 0.5, 0.75])
    assert found["standard_error"].value == pytest.approx(stats.sem(wins))


def test_lengths_are_means_of_characters_over_judged_pairs():
    found = measure(annotations([2, 1, None], [(10, 30), (20, 50), (1000, 1000)]))
    assert found["reference_length"].value == 15
    assert found["model_length"].value == 40


def test_swap_consistency_counts_pairs_whose_winner_stays():
    answers = [(2, 2), (2, 1), (1.4, 1.1), (1.5, 1.5), (2, None)]
    found = measure(annotations([2, 1.5, 1.25, 1.5, None], answers=answers))
    assert found["swap_consistency"].value == pytest.approx(3 / 4)
    assert found["swap_consistency"].n == 4


def test_twenty_wins_of_twenty_leave_room_for_a_loss():
    found = measure(annotations([2] * 20))["win_rate"]
    wilson = stats.binomtest(20, 20).proportion_ci(0.95, method="wilson")
    assert (found.low, found.high) == pytest.approx((wilson.low, 1.0))
    assert math.isnan(measure(annotations([2]))["win_rate"].low)


def test_nothing_judged_gives_nan_and_no_crash():
    found = measure(annotations([None, None]))
    assert math.isnan(found["win_rate"].value)
    assert found["win_rate"].n == 0


def test_the_metric_accumulates_over_updates_and_resets():
    metric = WinRate()
    for preference in (2.0, 1.0):
        metric.update(torch.tensor([preference]), torch.ones(1), torch.ones(1), torch.tensor([int(preference)]))
    assert metric.compute()["win_rate"].value == 0.5
    metric.reset()
    assert metric.compute()["win_rate"].n == 0


@pytest.mark.parametrize("rate", [0.5, 0.7])
def test_95_percent_intervals_of_win_rates_cover_93_to_97_percent(rate):
    rng, n, covered, trials = np.random.default_rng(3), 100, 0, 1500
    for _ in range(trials):
        wins = rng.choice([0, 0.5, 1], n, p=[0.9 - rate, 0.2, rate - 0.1])
        draws = bootstrap_draws(lambda rows, wins=wins: wins[rows].mean(), range(n), 200, int(rng.integers(2**31)))
        low, high = np.percentile(draws, (2.5, 97.5))
        covered += low <= rate <= high
    assert 0.93 <= covered / trials <= 0.97


def test_clustered_intervals_cover_where_pairs_share_a_prompt_and_plain_ones_do_not():
    rng, prompts, each, trials = np.random.default_rng(1), 60, 5, 400
    clusters = np.repeat(np.arange(prompts), each)
    covered = {"clustered": 0, "plain": 0}
    for _ in range(trials):
        easy = rng.random(prompts)  # the win probability of each prompt: pairs of a prompt are alike
        wins = (rng.random(prompts * each) < np.repeat(np.round(easy), each)).astype(float)
        for name, groups in (("clustered", clusters), ("plain", np.arange(len(clusters)))):
            draws = bootstrap_draws(lambda rows, wins=wins: wins[rows].mean(), groups, 200, int(rng.integers(2**31)))
            low, high = np.percentile(draws, (2.5, 97.5))
            covered[name] += low <= 0.5 <= high
    assert 0.91 <= covered["clustered"] / trials <= 0.97
    assert covered["plain"] / trials < 0.8


def test_a_bootstrap_interval_of_a_mean_is_near_the_normal_one():
    values = np.random.default_rng(0).normal(2, 3, 300)
    ours, normal = bootstrap_interval(lambda rows: values[rows].mean(), range(300)), mean_interval(list(values))
    assert ours.value == pytest.approx(normal.value)
    assert ours.low == pytest.approx(normal.low, abs=0.05)
    assert ours.high == pytest.approx(normal.high, abs=0.05)


def test_length_control_undoes_a_judge_that_likes_length():
    rng, n = np.random.default_rng(0), 4000
    reference, model = rng.integers(100, 300, n), rng.integers(200, 600, n)
    scale = (reference - model).std(ddof=1)
    logit = 0.4 - 1.5 * np.tanh((reference - model) / scale)
    preference = 1 + (rng.random(n) < 1 / (1 + np.exp(-logit))).astype(float)
    raw, controlled = (preference - 1).mean(), length_controlled_win_rate(preference, reference, model)
    truth = 1 / (1 + math.exp(-0.4))
    assert raw > truth + 0.1
    assert controlled.low <= truth <= controlled.high
    assert controlled.high - controlled.low < 0.1


def test_length_control_says_nothing_where_lengths_do_not_differ_or_pairs_are_few():
    assert math.isnan(length_controlled_win_rate(np.array([1.0, 2.0] * 5), np.ones(10), np.ones(10) * 3).value)
    assert math.isnan(length_controlled_win_rate(np.array([1.0, 2.0]), np.ones(2), np.arange(2)).value)


@pytest.fixture(scope="module")
def alpaca_eval(tmp_path_factory):
    """AlpacaEval's own code, without its downloads; it asks an old setuptools for a version and gets none."""
    sys.modules.setdefault("pkg_resources", types.ModuleType("pkg_resources"))
    path = tmp_path_factory.mktemp("alpaca_eval") / "df_gamed.csv"
    path.write_text("index,model,instruction_difficulty\n0,x,0.0\n")
    import alpaca_eval.metrics.glm_winrate as code

    code.hf_hub_download = lambda **options: str(path)
    return code


def theirs(code, rows) -> dict[str, float]:
    import pandas as pd

    table = pd.DataFrame([{**vars(row), "index": 0, "annotator": "j"} for row in rows])
    return code.get_length_controlled_winrate(table, glm_name="length_controlled_minimal", save_weights_dir=None)


@pytest.mark.filterwarnings("ignore")
def test_rates_are_those_of_alpaca_evals_own_code(alpaca_eval):
    rng = np.random.default_rng(0)
    for kind, n in (("binary", 150), ("weighted", 150), ("weighted", 12)):
        lengths = [(int(a), int(b)) for a, b in rng.integers(20, 900, (n, 2))]
        chance = [1 / (1 + math.exp((a - b) / 400 - 0.3)) for a, b in lengths]
        preferences = [1 + (float(rng.random() < p) if kind == "binary" else p) for p in chance]
        rows = annotations(preferences, lengths)
        ours, reference = measure(rows), theirs(alpaca_eval, rows)
        assert 100 * ours["win_rate"].value == pytest.approx(reference["win_rate"])
        assert 100 * ours["standard_error"].value == pytest.approx(reference["standard_error"])
        assert 100 * ours["discrete_win_rate"].value == pytest.approx(reference["discrete_win_rate"])
        controlled = 100 * ours["length_controlled_win_rate"].value
        assert controlled == pytest.approx(reference["length_controlled_winrate"], abs=0.1)


def shared_annotations() -> dict[str, list[Annotation]]:
    """GPT-4's annotations of AlpacaEval, by system, against text-davinci-003."""
    import pandas as pd

    prompts = [json.loads(line) for line in (SHARED / "eval/alpaca_eval_805.jsonl").read_text().splitlines()]
    by_id = {row["instruction_id"]: row for row in prompts}
    outputs = pd.read_parquet(SHARED / "preference/alpaca_eval_outputs.parquet")
    text = {(o.instruction_id, o.generator): o.output for o in outputs.itertuples()}
    systems: dict[str, list[Annotation]] = {}
    for row in pd.read_parquet(SHARED / "preference/alpaca_eval_gpt4_prefs.parquet").itertuples():
        turned = row.generator_2 == "text_davinci_003"
        name = row.generator_1 if turned else row.generator_2
        preference = 1.5 if row.preference == 0 else 3 - row.preference if turned else row.preference
        prompt = by_id[row.instruction_id]
        pair = prompt["instruction"], prompt["reference_output"], text[row.instruction_id, name]
        systems.setdefault(name, []).append(Annotation(*pair, "text_davinci_003", name, preference=float(preference)))
    return systems


@pytest.mark.filterwarnings("ignore")
@pytest.mark.skipif(not SHARED.is_dir(), reason="needs the shared data")
@pytest.mark.parametrize("count", [4, pytest.param(20, marks=pytest.mark.slow)])
def test_alpaca_evals_leaderboard_is_reproduced(alpaca_eval, count):
    systems = list(shared_annotations().items())[:count]
    assert len(systems) == count
    for _, rows in systems:
        ours, reference = measure(rows), theirs(alpaca_eval, rows)
        assert 100 * ours["win_rate"].value == pytest.approx(reference["win_rate"])
        controlled = 100 * ours["length_controlled_win_rate"].value
        assert controlled == pytest.approx(reference["length_controlled_winrate"], abs=0.1)


def test_a_paired_difference_is_taken_on_common_prompts_and_is_tighter_than_an_unpaired_one():
    rng = np.random.default_rng(0)
    base = rng.integers(0, 2, 200)
    one, other = annotations(list(1 + base)), annotations(list(np.minimum(2, 1 + base + (rng.random(200) < 0.1))))
    found = paired_difference(one, other[:150])
    assert found.n == 150
    assert found.value == pytest.approx(
        np.mean([o.preference - a.preference for a, o in zip(one[:150], other, strict=False)])
    )
    assert found.low > 0
    with pytest.raises(UserError, match="no judged prompt in common"):
        paired_difference(one, annotations([2], prompts=["elsewhere"]))


def test_elo_of_two_systems_is_the_logit_of_their_win_rate():
    found = bradley_terry(annotations([2] * 75 + [1] * 25))
    assert found["r"].value == 0
    assert found["m"].value == pytest.approx(400 * math.log10(3), abs=0.1)
    assert found["m"].low < found["m"].value < found["m"].high


def test_elo_recovers_the_strengths_that_games_were_drawn_from():
    rng, strength = np.random.default_rng(0), {"r": 0.0, "a": 120.0, "b": -200.0}
    games = []
    for i in range(3000):
        one, two = rng.choice(list(strength), 2, replace=False)
        p = 1 / (1 + 10 ** ((strength[one] - strength[two]) / 400))
        games.append(Annotation(str(i), "x", "y", one, two, preference=1.0 + (rng.random() < p)))
    found = bradley_terry([Annotation("s", "x", "y", "r", "a", preference=1.5), *games])
    for name, value in strength.items():
        assert found[name].low - 1e-9 <= value <= found[name].high + 1e-9


def test_a_system_that_never_lost_has_a_finite_rating():
    assert math.isfinite(bradley_terry(annotations([2] * 20))["m"].value)
