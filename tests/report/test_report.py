"""The report: interval arithmetic against hand values and scipy, and pages of whole and of bare run folders."""

import base64
import json
import math
import re
import subprocess
import sys
from pathlib import Path

import pytest
from scipy import stats

from lrlhf.errors import UserError
from lrlhf.evaluation.estimates import mean_interval, wilson_interval
from lrlhf.report.curves import read_curves
from lrlhf.report.plots import make_plots, penalised_divergence
from lrlhf.report.report import main, write_report
from lrlhf.report.runs import Run
from lrlhf.report.tables import choose_samples, make_table, printable
from lrlhf.report.verdict import difference, verdict

HOSTILE = '<script>alert("1")</script> & [red]two[/red]\n  indented'


def side(response="text", learned=0.0, gold=None, length=10, ended=True):
    return {"response": response, "learned": learned, "gold": gold, "length": length, "ended": ended}


def make_rows(gains, **gold_before):
    """One row per gain of learned (and, doubled, of gold where a start is given)."""
    start = gold_before.get("gold")
    gold = [None if start is None else start + 2 * gain for gain in gains]
    return [
        {"instruction": f"prompt {i}", "before": side(gold=start), "after": side(learned=gain, gold=g, length=12)}
        for i, (gain, g) in enumerate(zip(gains, gold, strict=True))
    ]


def make_run(folder: Path, **changes) -> Path:
    comparison = {
        "gold": "vader_sentiment",
        "base_model": "tiny",
        "seed": 3,
        "reward_model": {"accuracy": 0.75, "longer_accuracy": 0.5, "pairs": 64},
        "divergences": {"kl": 0.04, "exact_js": 0.01},
        "seconds": {"sft": 60.0, "rl": 120.0},
        "rows": make_rows([1.0, 2.0, 3.0], gold=0.0),
    }
    folder.mkdir(exist_ok=True)
    (folder / "comparison.json").write_text(json.dumps(comparison | changes))
    return folder


def write_metrics(run: Path, stage: str, text: str) -> None:
    (run / stage).mkdir()
    (run / stage / "metrics.csv").write_text(text)


def write_all_metrics(run: Path) -> None:
    write_metrics(run, "sft", "epoch,step,train/loss,val/loss\n0,0,3.0,\n0,1,2.0,\n0,1,,2.5\n")
    write_metrics(run, "reward", "epoch,step,train/loss,val/accuracy\n0,0,0.7,\n0,1,0.6,0.75\n")
    names = ("score", "length", "update_kl", "clip_fraction", "explained_variance", "entropy", "divergence/kl")
    lines = [f"{step}," + ",".join(str(0.1 * step + i) for i in range(len(names))) for step in range(3)]
    write_metrics(run, "rl", "step," + ",".join(f"train/{name}" for name in names) + "\n" + "\n".join(lines) + "\n")


# Intervals


def test_mean_interval_by_hand():
    # 1, 2, 3: mean 2, s = 1, standard error 1 / sqrt(3) = 0.57735; times 1.959964 = 1.131586
    assert mean_interval([1, 2, 3]) == pytest.approx((2.0, 2 - 1.131586, 2 + 1.131586, 3), abs=1e-6)


def test_mean_interval_is_the_normal_interval_of_scipy():
    values = [0.3, -1.2, 0.8, 2.5, 0.0, -0.4]
    expected = stats.norm.interval(0.95, loc=sum(values) / 6, scale=stats.sem(values))
    assert mean_interval(values)[1:3] == pytest.approx(expected, rel=1e-12)


def test_one_value_has_a_mean_and_no_interval():
    value, low, high, n = mean_interval([4.0])
    assert (value, n) == (4.0, 1)
    assert math.isnan(low)
    assert math.isnan(high)


def test_wilson_interval_by_hand():
    # p = 1/2, n = 4: centre 0.5; the reach is z / (2 sqrt(n + z^2)) = 1.959964 / (2 * 2.800261) = 0.349961
    assert wilson_interval(0.5, 4)[1:3] == pytest.approx((0.150039, 0.849961), abs=1e-6)


@pytest.mark.parametrize(("right", "n"), [(0, 5), (5, 5), (52, 64), (1, 300)])
def test_wilson_interval_is_that_of_scipy_and_stays_within_0_and_1(right, n):
    interval = stats.binomtest(right, n).proportion_ci(0.95, method="wilson")
    _, low, high, _ = wilson_interval(right / n, n)
    assert (low, high) == pytest.approx((interval.low, interval.high), abs=1e-12)
    assert -1e-12 <= low <= high <= 1 + 1e-12


def test_the_difference_is_paired():
    # Before and after spread widely, yet every prompt gains exactly 1: no spread is left.
    rows = [{"before": side(learned=x), "after": side(learned=x + 1)} for x in (-100.0, 0.0, 100.0)]
    assert difference(rows, "learned") == (1.0, 1.0, 1.0, 3)


def test_the_difference_leaves_out_rows_without_gold():
    rows = [*make_rows([1.0, 2.0], gold=0.0), *make_rows([9.0])]
    assert difference(rows, "gold")[0::3] == (3.0, 2)


# Words and table


@pytest.mark.parametrize(
    ("gains", "words"),
    [
        ([1.0, 1.1, 0.9], "rose (+2.000, 95 % interval +1.774 to +2.226, n = 3): the interval excludes 0"),
        ([-1.0, -1.1, -0.9], "fell"),
        ([1.0, -1.0, 0.5], "the interval includes 0"),
        ([0.0, 0.0, 0.0], "the interval includes 0"),
        ([1.0], "Too few"),
        ([1.0, math.nan], "Too few finite"),
        ([1.0, math.inf], "Too few finite"),
    ],
)
def test_the_verdict_says_whether_the_gold_difference_excludes_0(gains, words):
    assert words in verdict({"gold": "vader_sentiment", "rows": make_rows(gains, gold=0.0)})


def test_without_gold_the_verdict_says_so():
    assert "No gold reward" in verdict({"gold": None, "rows": make_rows([1.0, 2.0])})


def test_the_table_holds_value_interval_and_n(tmp_path):
    comparison = json.loads((make_run(tmp_path) / "comparison.json").read_text())
    table = make_table(comparison)
    wilson = stats.binomtest(48, 64).proportion_ci(0.95, method="wilson")
    assert table["Reward model, held-out pairs"] == [
        ("accuracy", "75.0%", f"{wilson.low:.1%} to {wilson.high:.1%}", "64"),
        ("baseline: the longer wins", "50.0%", "", ""),
    ]
    assert table["Learned reward"] == [
        ("before", "0.000", "0.000 to 0.000", "3"),
        ("after", "2.000", "0.868 to 3.132", "3"),
        ("difference, paired", "+2.000", "+0.868 to +3.132", "3"),
    ]
    assert table["Gold reward: vader_sentiment"][2] == ("difference, paired", "+4.000", "+1.737 to +6.263", "3")
    assert table["Response length, tokens"][2] == ("difference, paired", "+2.0", "+2.0 to +2.0", "3")


def test_samples_lie_at_evenly_spaced_ranks():
    note, samples = choose_samples(make_rows([5.0, 3.0, 8.0, 1.0, 7.0, 2.0, 9.0, 4.0, 6.0]))
    assert [(rank, row["after"]["learned"]) for rank, row in samples] == [(1, 1), (3, 3), (5, 5), (7, 7), (9, 9)]
    assert "learned reward's difference among 9 prompts" in note


def test_fewer_rows_than_samples_show_each_row_once():
    _, samples = choose_samples(make_rows([1.0, 2.0], gold=0.0))
    assert [rank for rank, _ in samples] == [1, 2]


# Metrics and plots


def test_curves_skip_empty_cells_and_a_line_cut_off(tmp_path):
    file = tmp_path / "metrics.csv"
    file.write_text("epoch,step,train/loss,val/loss\n0,0,3.0,\n0,1,,2.5\n0,1,2.0,\n0,2,1.\n0,")
    curves = read_curves(file)
    assert curves["train/loss"].to_dict() == {0: 3.0, 1: 2.0, 2: 1.0}
    assert curves["val/loss"].to_dict() == {1: 2.5}
    assert read_curves(tmp_path / "none.csv") == {}


@pytest.mark.parametrize("text", ["", "\n", "epoch,loss\n0,1\n", "step,train/loss\n"])
def test_a_file_without_a_curve_gives_none(tmp_path, text):
    (tmp_path / "metrics.csv").write_text(text)
    assert read_curves(tmp_path / "metrics.csv").get("train/loss") is None


def test_a_quote_in_the_last_line_and_bytes_that_are_no_text_cost_a_cell(tmp_path):
    (tmp_path / "metrics.csv").write_bytes(b'step,train/loss\n0,1.0\n1,\xff\n2,"3.')
    curve = read_curves(tmp_path / "metrics.csv")["train/loss"]
    assert curve[0] == 1.0
    assert math.isnan(curve[1])


def test_a_step_that_diverged_is_a_gap_and_not_a_straight_line(tmp_path):
    (tmp_path / "metrics.csv").write_text("step,train/loss\n0,1.0\n1,nan\n2,3.0\n")
    curve = read_curves(tmp_path / "metrics.csv")["train/loss"]
    assert list(curve.index) == [0, 1, 2]
    assert math.isnan(curve[1])


def test_the_penalised_divergence_is_the_one_of_the_config():
    logged = {"train/divergence/kl": None, "train/divergence/js": None}
    callback = {"class_path": "lrlhf.DivergenceCallback", "init_args": {"divergence": "lrlhf.functional.js"}}
    for callbacks in ([{"class_path": "lrlhf.SampleLog"}, callback], callback):
        assert penalised_divergence({"trainer": {"callbacks": callbacks}}, logged) == "js"
    assert penalised_divergence({"trainer": {"callbacks": None}}, logged) is None
    assert penalised_divergence({"trainer": {"callbacks": None}}, {"train/divergence/kl": None}) == "kl"
    for config in ({}, {"trainer": []}, {"trainer": {"callbacks": ["lrlhf.SampleLog"]}}):
        assert penalised_divergence(config, logged) is None
    callback["init_args"]["divergence"] = {"class_path": "mine.Squared"}
    assert penalised_divergence({"trainer": {"callbacks": callback}}, logged) == "Squared"
    assert penalised_divergence({}, {"train/divergence/kl": None, "train/score": None}) == "kl"
    assert penalised_divergence({}, {}) is None


@pytest.mark.parametrize(
    "text", ["trainer: [", *(pytest.param(text, marks=pytest.mark.slow) for text in ("", "3", "\x00"))]
)
def test_a_config_that_cannot_be_read_costs_no_report(tmp_path, text):
    run = make_run(tmp_path / "run")
    write_all_metrics(run)
    (run / "rl/config.yaml").write_text(text)
    assert "reward_against_divergence" in write_report([run]).read_text()


def test_no_metrics_make_no_plots(tmp_path):
    assert make_plots([Run(tmp_path, "run")]) == []


# The page


def test_the_page_stands_alone(tmp_path, capsys):
    run = make_run(tmp_path / "run")
    write_all_metrics(run)
    page = write_report([run])
    text = page.read_text(encoding="utf-8")
    images = re.findall(r'src="data:image/png;base64,([^"]+)"', text)
    files = sorted(path.name for path in (run / "plots").iterdir())
    health = [f"rl_{name}.png" for name in ("clip_fraction", "entropy", "explained_variance", "update_kl")]
    others = ["reward_against_divergence.png", "reward_loss.png", "rl_length.png", "rl_score.png", "sft_loss.png"]
    assert files == sorted(health + others)
    assert len(images) == len(files)
    assert all(base64.b64decode(image).startswith(b"\x89PNG") for image in images)
    outside = re.sub(r"<script type=.*?</script>", "", text, flags=re.S)
    assert not re.search(r"https?://|@import", outside)
    assert outside.count("<script>") == 1
    terminal = capsys.readouterr().out
    for words in ("vader_sentiment", "+1.737 to +6.263", "excludes 0", "75.0%", "exact_js", "sft 60 s, rl 120 s"):
        assert words in " ".join(terminal.split()), words
        assert words in text, words
    assert str(page) in terminal


def test_responses_are_shown_as_they_are_and_never_run(tmp_path, capsys):
    rows = make_rows([1.0], gold=0.0)
    rows[0]["after"]["response"] = rows[0]["instruction"] = HOSTILE + "\x1b[2J\x00\ud800"
    text = write_report([make_run(tmp_path, rows=rows)]).read_text(encoding="utf-8")
    assert "<script" not in text.partition("</style>")[2].partition("<script type")[0]
    assert "&lt;script&gt;alert(&#34;1&#34;)&lt;/script&gt; &amp; [red]two[/red]\n  indented" in text
    terminal = capsys.readouterr().out
    assert terminal.count("[red]two[/red]") == 2  # instruction and response
    assert "\x1b[2J" not in terminal
    assert "\x00" not in text + terminal


def test_printable_keeps_lines_and_emoji():
    assert printable("a\n\tb 👩‍🚀 é") == "a\n\tb 👩‍🚀 é"
    assert printable("a\rb") == "a\ufffdb"


@pytest.mark.parametrize(
    "changes",
    [
        {"gold": None, "rows": make_rows([1.0, 2.0])},
        {"reward_model": None},
        {"reward_model": {"accuracy": 0.5}},
        {"divergences": {}},
        {"seconds": {}},
        {"rows": []},
        {"rows": make_rows([1.0], gold=0.0)},
        {"rows": make_rows([math.nan, 1.0], gold=0.0)},
    ],
)
def test_what_was_not_measured_is_left_out(tmp_path, changes):
    text = write_report([make_run(tmp_path, **changes)]).read_text()
    assert "<img" not in text
    assert "None" not in text
    assert ("Reward model, held-out" in text) == bool(changes.get("reward_model", True))
    assert ("Gold reward" in text) == ("gold" not in changes and changes.get("rows") != [])
    assert ("Divergence per token" in text) == ("divergences" not in changes)


def test_a_single_iteration_is_plotted(tmp_path):
    run = make_run(tmp_path)
    write_metrics(run, "rl", "step,train/score,train/divergence/kl\n0,1.0,0.0\n")
    write_report([run])
    assert sorted(p.name for p in (run / "plots").iterdir()) == ["reward_against_divergence.png", "rl_score.png"]


# The command


def test_help_prints_the_usage(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["--help"])
    assert stop.value.code == 0
    assert "usage: lrlhf report" in (told := capsys.readouterr().out)
    assert "folders of lrlhf align" in told


@pytest.mark.parametrize(
    ("arguments", "words"),
    [([], "runs must be given"), (["--runs"], "unknown option --runs"), (["a", "--tu", "b"], "unknown option --tu")],
)
def test_wrong_usage_is_a_user_error(arguments, words):
    with pytest.raises(UserError, match=words):
        main(arguments)


def test_a_missing_folder_or_comparison_is_a_user_error(tmp_path):
    with pytest.raises(UserError, match="there is no folder"):
        main([str(tmp_path / "nowhere")])
    with pytest.raises(UserError, match=r"holds no metrics\.csv, no comparison\.json and no evaluation"):
        main([str(tmp_path)])


@pytest.mark.parametrize(("text", "words"), [("{", "not valid JSON"), ("[]", "no list named rows"), ("{}", "rows")])
def test_a_broken_comparison_is_a_user_error(tmp_path, text, words):
    (tmp_path / "comparison.json").write_text(text)
    with pytest.raises(UserError, match=words):
        main([str(tmp_path)])


def test_the_command_line_prints_the_error_without_a_traceback(tmp_path):
    command = [sys.executable, "-m", "lrlhf", "report", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr.startswith("lrlhf: error: report:")
    assert "Traceback" not in done.stderr
