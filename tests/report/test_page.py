"""The page of one run and of several: what it says, and that nothing in it runs but plotly."""

import json
import math
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import quote

import numpy as np
import pandas as pd
import pytest
import yaml

from lrlhf.errors import UserError
from lrlhf.report.drawing import image, interactive
from lrlhf.report.plots import make_plots
from lrlhf.report.report import main, write_report
from lrlhf.report.runs import Run, differences, read_run, read_runs
from lrlhf.report.verdict import over_optimisation, verdicts

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
HOSTILE = (
    '</pre></script><script>parent.hacked = 1</script><img src=x onerror="parent.hacked = 1">'
    '<img src="http://elsewhere.invalid/x"><iframe src="http://elsewhere.invalid"></iframe>{{ 7 * 7 }}'
)
GOOGLE = (".google.com", ".googleapis.com", ".gvt1.com", ".gstatic.com")
"""Chromium asks its maker for the time and for updates."""


def curve(values, start=0) -> pd.Series:
    return pd.Series(values, index=range(start, start + len(values)), dtype=float)


def write_stage(folder: Path, metrics: dict[str, list[float]], kind="PPOPolicy", **config) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    pd.DataFrame(metrics).rename_axis("step").to_csv(folder / "metrics.csv", na_rep="nan")
    values = {"model": {"class_path": f"lrlhf.{kind}", "init_args": config}, "seed_everything": 1}
    (folder / "config.yaml").write_text(yaml.safe_dump(values))
    return folder


def ppo_metrics(n=8, shift=0.0) -> dict[str, list[float]]:
    return {
        "train/score": [shift + i / n for i in range(n)],
        "train/divergence/kl": [0.02 * i for i in range(n)],
        "train/length": [20.0 + i for i in range(n)],
        "val/win_rate/gold": [0.5 + 0.03 * i for i in range(n)],
        "val/win_rate_low/gold": [0.4 + 0.03 * i for i in range(n)],
        "val/win_rate_high/gold": [0.6 + 0.03 * i for i in range(n)],
        "val/length_controlled_win_rate/gold": [0.5] * n,
    }


def write_evaluation(folder: Path, text="fine", plots=None) -> None:
    (folder / "evaluations/e").mkdir(parents=True)
    line = {"label": f"rate {text}", "value": 0.5, "low": None, "high": None, "n": 3, "style": ".1%"}
    pair = {"instruction": text, "output_1": text, "generator_1": text, "output_2": text, "generator_2": text}
    sample = {**pair, "annotator": text, "preference": 1.0, "word": f"prefers {text}"}
    result = {
        "evaluation": "X",
        "title": f"title {text}",
        "lines": [line],
        "notes": [f"note {text}"],
        "samples": [sample],
    }
    (folder / "evaluations/e/evaluation.json").write_text(json.dumps({**result, "plots": plots or {}}))


# One stage, several runs


def test_the_folder_of_one_stage_is_a_run(tmp_path):
    run = read_run(write_stage(tmp_path / "mine", ppo_metrics()), "mine")
    assert set(run.curves) == {"rl"}
    names = {plot.name for plot in make_plots([run])}
    assert names == {"reward_against_divergence", "win_rate_gold", "rl_score", "rl_length"}


def test_runs_share_plots_and_their_configs_are_compared(tmp_path):
    one = write_stage(tmp_path / "one", ppo_metrics(), lora={"r": 8}, dtype="float32", sft="a/handover")
    two = write_stage(tmp_path / "two", ppo_metrics(shift=1), lora={"r": 16}, dtype="float32", sft="b/handover")
    runs = read_runs([str(one), str(two)])
    assert differences(runs) == [("rl: model.init_args.lora.r", ["8", "16"])]
    score = next(plot for plot in make_plots(runs) if plot.name == "rl_score")
    assert [c.label for c in score.curves] == ["one: training", "two: training"]
    assert score.curves[0].color != score.curves[1].color
    page = write_report([one, two], tmp_path / "both.html")
    text = page.read_text()
    assert "What differs in the configs" in text
    assert "model.init_args.lora.r" in text.replace("<wbr>", "")
    assert (tmp_path / "plots/rl_score.png").is_file()


def test_what_differs_in_a_list_is_named_by_the_class_that_has_it(tmp_path):
    def write(name, coefficient, judges, stage="rl"):
        callbacks = [{"class_path": "lrlhf.WinRateCallback", "init_args": {"judge": judge}} for judge in judges]
        callbacks.append({"class_path": "lrlhf.DivergenceCallback", "init_args": {"coefficient": coefficient}})
        folder = write_stage(tmp_path / name / stage, ppo_metrics())
        (folder / "config.yaml").write_text(yaml.safe_dump({"trainer": {"callbacks": callbacks}}))
        return tmp_path / name

    runs = [write("one", 0.05, ["a", "b"]), write("two", 0.1, ["a", "c"]), write("bare", 1, [], stage="sft")]
    assert differences(read_runs([str(run) for run in runs])) == [
        ("rl: trainer.callbacks.WinRateCallback#2.init_args.judge", ["b", "c", ""]),
        ("rl: trainer.callbacks.DivergenceCallback.init_args.coefficient", ["0.05", "0.1", ""]),
    ]


def test_two_runs_of_one_name_are_told_apart_by_their_paths(tmp_path):
    paths = [str(write_stage(tmp_path / side / "rl", ppo_metrics())) for side in ("a", "b")]
    assert [run.name for run in read_runs(paths)] == paths
    with pytest.raises(UserError, match="is named twice"):
        read_runs([paths[0], paths[0] + "/"])


def test_an_evaluation_is_shown_with_its_notes_samples_and_plots(tmp_path):
    run = write_stage(tmp_path / "run", ppo_metrics())
    reliability = {"confidence": [0.6, 0.9], "accuracy": [0.5, 1.0], "n": [3, 4]}
    write_evaluation(
        run, plots={"reliability": reliability, "score_against_length": {"length": [1, 2], "score": [0, 1]}}
    )
    text = write_report([run]).read_text()
    for said in ("title fine", "rate fine", "note fine", "prefers fine", "50.0%"):
        assert said in text
    assert {"reliability_0.png", "score_length_0.png"} <= {path.name for path in (run / "plots").iterdir()}


@pytest.mark.parametrize(
    "changes", [{"lines": 3}, {"lines": [{}]}, {"style": "zz"}, {"value": "x"}, {"n": ...}, {"label": ...}]
)
def test_a_result_of_another_shape_is_one_sentence(tmp_path, changes):
    write_evaluation(tmp_path)
    path = tmp_path / "evaluations/e/evaluation.json"
    result = json.loads(path.read_text())
    if "lines" not in changes:
        line = {**result["lines"][0], **changes}
        changes = {"lines": [{key: value for key, value in line.items() if value is not ...}]}
    path.write_text(json.dumps(result | changes))
    with pytest.raises(UserError, match="is no result of lrlhf evaluate"):
        write_report([tmp_path])


@pytest.mark.parametrize(
    "row", [1, {"instruction": "x"}, {"instruction": "x", "before": {}, "after": {"response": ""}}]
)
def test_a_row_of_another_shape_is_one_sentence(tmp_path, row):
    (tmp_path / "comparison.json").write_text(json.dumps({"rows": [row]}))
    with pytest.raises(UserError, match="row 0 of .* is no prompt answered before and after"):
        write_report([tmp_path])


def test_configs_plans_and_self_checks_are_on_the_page(tmp_path):
    run = write_stage(tmp_path / "run", ppo_metrics(), lora={"r": 4321})
    (run / "plan.json").write_text("Peak: 1.72 GiB")
    (run / "self_checks.txt").write_text("log-probs agree")
    text = write_report([run]).read_text()
    for said in ("rl: resolved config", "4321", "rl: memory plan", "Peak: 1.72 GiB", "log-probs agree"):
        assert said in text


def test_what_the_judges_said_stands_at_the_samples(tmp_path):
    side = {"learned": 0.0, "gold": None, "length": 3, "ended": True}
    row = {"instruction": "ask", "before": {**side, "response": "b"}, "after": {**side, "response": "a"}}
    (tmp_path / "comparison.json").write_text(json.dumps({"rows": [row], "gold": None}))
    (tmp_path / "evaluations/gold").mkdir(parents=True)
    texts = {"instruction": "ask", "output_1": "b", "output_2": "a"}
    said = {**texts, "generator_1": "before", "generator_2": "after", "annotator": "Judy"}
    rows = [{**said, "preference": p} for p in (2.0, 1.5, None)]
    (tmp_path / "evaluations/gold/annotations.json").write_text(json.dumps(rows))
    text = write_report([tmp_path]).read_text()
    assert "Judy prefers after (2.00); Judy sees a tie; Judy gave no answer" in text


# Over-optimisation


def with_curves(rate, reach, learned) -> Run:
    """A run whose win rates are known up to +-reach."""
    rate = curve(rate)
    ends = {"val/win_rate_low/gold": rate - reach, "val/win_rate_high/gold": rate + reach}
    return Run(Path("x"), "x", {"rl": {"val/win_rate/gold": rate, "train/score": curve(learned), **ends}})


def test_the_turning_point_is_where_the_judged_curve_was_best():
    told = over_optimisation(with_curves([0.5, 0.6, 0.7, 0.6, 0.5, 0.45], 0.1, [0, 1, 2, 3, 4, 5]))
    assert told.startswith("Over-optimised from iteration 3 on: the learned score went on rising (2.00 to 5.00)")
    assert "the win rate by gold fell from 70.0% to 45.0%" in told


@pytest.mark.parametrize(
    ("rate", "learned"),
    [
        ([0.5, 0.6, 0.7, 0.75], [0, 1, 2, 3]),  # still rising
        ([0.5, 0.7, 0.65, 0.62], [0, 1, 2, 3]),  # fell within its interval
        ([0.5, 0.7, 0.6, 0.55], [0, 1, 2, 3]),  # below the best one's interval, which overlaps the last one's
        ([0.5, 0.9, 0.5, 0.4], [0, 3, 2, 1]),  # the learned score fell too
        ([0.5, 0.9, 0.5, 0.85], [0, 1, 2, 3]),  # fell, and came back
    ],
)
def test_no_over_optimisation_is_claimed_where_none_is_shown(rate, learned):
    assert over_optimisation(with_curves(rate, 0.1, learned)).startswith("No over-optimisation")


def test_noise_alone_is_seldom_called_over_optimisation():
    """The best of 24 values of a flat curve is high by luck; 5 % is what one would allow a single comparison."""
    generator, deviation = np.random.default_rng(0), 0.05
    runs = [with_curves(0.6 + deviation * generator.normal(size=24), 1.96 * deviation, range(24)) for _ in range(300)]
    assert sum(over_optimisation(run).startswith("Over-optimised") for run in runs) / len(runs) < 0.05


def test_a_judge_that_always_failed_or_judged_once_tells_nothing():
    for rates in ([math.nan] * 3, [0.5, math.nan, math.nan]):
        assert "cannot be told" in over_optimisation(with_curves(rates, 0.1, [0, 1, 2]))


def test_of_a_run_without_ppo_nothing_is_said(tmp_path):
    run = read_run(write_stage(tmp_path / "mine", {"train/loss": [2.0, 1.0]}, kind="SFT"), "mine")
    assert (set(run.curves), verdicts(run)) == ({"sft"}, [])


def test_without_a_judge_it_cannot_be_told_unless_gold_fell():
    assert "cannot be told" in over_optimisation(Run(Path("x"), "x", {"rl": {"train/score": curve([1, 2])}}))

    def rows(gold):
        sides = ({"learned": 0.0, "gold": 0.0}, {"learned": 1.0, "gold": gold})
        return [{"before": sides[0], "after": {**sides[1], "learned": 1 + i / 10}} for i in range(5)]

    assert over_optimisation(Run(Path("x"), "x", comparison={"rows": rows(-1.0)})).startswith(
        "Over-optimised: the learned"
    )
    assert "cannot be told" in over_optimisation(Run(Path("x"), "x", comparison={"rows": rows(1.0)}))


# Plots for browsers


def test_plots_of_evaluations_name_their_run_where_there_are_several(tmp_path):
    for name in ("one", "two"):
        write_evaluation(tmp_path / name, plots={"score_against_length": {"length": [1, 2], "score": [0, 1]}})
    runs = read_runs([str(tmp_path / name) for name in ("one", "two")])
    assert [p.title for p in make_plots(runs)] == ["Score against length: one", "Score against length: two"]
    assert [p.title for p in make_plots(runs[:1])] == ["Score against length"]


def test_a_figure_is_json_without_nan_and_has_its_band(tmp_path):
    metrics = ppo_metrics()
    metrics["train/score"][3] = math.nan
    plots = {p.name: interactive(p) for p in make_plots([read_run(write_stage(tmp_path / "r", metrics), "r")])}
    json.loads(json.dumps(plots, allow_nan=False))
    assert plots["rl_score"]["data"][0]["y"][3] is None
    assert plots["rl_score"]["data"][0]["x"] == [1, 2, 3, 4, 5, 6, 7, 8]
    low, high, rate, controlled = plots["win_rate_gold"]["data"]
    assert high["fill"] == "tonexty"
    assert (low["y"][0], high["y"][0], rate["y"][0], controlled["line"]["dash"]) == (0.4, 0.6, 0.5, "dash")
    assert plots["win_rate_gold"]["layout"]["shapes"][0]["y0"] == 0.5


def test_labels_are_text_to_plotly_and_to_matplotlib(tmp_path):
    names = ('<a href="x">a', "_$\\foo$")
    rate = {"val/win_rate/a/b": [0.5] * 8}
    runs = read_runs([str(write_stage(tmp_path / name, ppo_metrics() | rate)) for name in names])
    plots = {plot.name: plot for plot in make_plots(runs)}
    assert "win_rate_a_b" in plots
    labels = [trace["name"] for trace in interactive(plots["rl_score"])["data"]]
    assert labels == ['&lt;a href="x"&gt;a: training', "_&#36;\\foo&#36;: training"]
    page = write_report([run.folder for run in runs])
    assert (page.parent / "plots/win_rate_a_b.png").is_file()
    legend = image(plots["rl_score"]).axes[0].get_legend().get_texts()
    assert [text.get_text() for text in legend] == ['<a href="x">a: training', "_\\$\\foo\\$: training"]


def hostile_runs(tmp_path) -> list[Path]:
    """Two runs in which every text that a user's data can hold attacks the page."""
    runs = [tmp_path / name for name in ("<b onclick=parent.hacked=1>$x$", "W" * 80)]
    for number, run in enumerate(runs):
        write_stage(run / "rl", ppo_metrics() | {f"val/win_rate/{HOSTILE}": [0.5] * 8}, note=f"{HOSTILE}{number}")
        for file in ("plan.txt", "self_checks.txt"):
            (run / "rl" / file).write_text(HOSTILE)
        row = {side: {"response": HOSTILE, "learned": i, "gold": 0.0, "length": 3, "ended": True}
               for i, side in enumerate(("before", "after"))}  # fmt: skip
        comparison = {"rows": [{"instruction": HOSTILE, **row}] * 3, "gold": HOSTILE, "base_model": HOSTILE}
        comparison |= {"divergences": {HOSTILE: 0.1}, "seconds": {HOSTILE: 1.0}}
        (run / "comparison.json").write_text(json.dumps(comparison))
        write_evaluation(run, HOSTILE, {"score_against_length": {"length": [1, 2], "score": [0, 1]}})
    return runs


def test_attacks_stay_text(tmp_path, capsys):
    page = Page()
    page.feed(write_report(hostile_runs(tmp_path)).read_text())
    assert page.tags.count("script") == 3  # data, plotly, loader
    assert "iframe" not in page.tags
    assert {key for key, _ in page.attributes if key.startswith("on")} == set()
    assert {value[:5] for key, value in page.attributes if key in ("src", "href")} == {"data:"}
    assert "unsafe-inline" not in page.policy["script-src"]
    assert page.policy["default-src"] == "'none'"


def test_the_terminal_shows_control_characters_as_replacements(tmp_path, capsys):
    write_evaluation(tmp_path, "\x1b[2J")
    side = {"learned": 0.0, "gold": 0.0, "length": 3, "ended": True, "response": "\x1b[2J"}
    rows = [{"instruction": "\x1b[2J", "before": side, "after": side}]
    comparison = {"rows": rows, "gold": "\x1b[2J", "base_model": "\x1b[2J", "divergences": {"\x1b[2J": 0.1}}
    (tmp_path / "comparison.json").write_text(json.dumps(comparison))
    write_report([tmp_path])
    assert "\x1b[2J" not in (told := capsys.readouterr().out)
    assert "title \ufffd[2J" in told


class Page(HTMLParser):
    """A page's tags, their attributes and its policy."""

    def __init__(self):
        super().__init__()
        self.tags, self.attributes, self.policy = [], [], {}

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs
        if (values := dict(attrs)).get("http-equiv") == "Content-Security-Policy":
            self.policy = dict(part.strip().split(" ", 1) for part in values["content"].split(";"))


def browse(tmp_path: Path, page: Path, widths) -> tuple[dict, str, str]:
    """What frames of these widths told of the page, Chromium's messages, and its record of requests."""
    wrapper, requests = tmp_path / "wrapper.html", tmp_path / "requests.json"
    frames = "".join(f'<iframe src="{quote(str(page))}" width={width} height=900></iframe>' for width in widths)
    wrapper.write_text(f"""<body>{frames}<p id=told></p><script>
        const look = frame => {{
          const page = frame.contentDocument;
          return [page.documentElement.scrollWidth - frame.clientWidth, page.querySelectorAll("svg.main-svg").length];
        }};
        setTimeout(() => {{
          const frames = [...document.querySelectorAll("iframe")].map(look);
          document.getElementById("told").textContent = JSON.stringify({{ frames, hacked: window.hacked || 0 }});
        }}, 8000);
        </script>""")
    ran = subprocess.run(
        [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
         "--disable-background-networking", "--disable-component-update", "--disable-sync",
         "--allow-file-access-from-files", f"--user-data-dir={tmp_path / 'profile'}", "--enable-logging=stderr",
         f"--log-net-log={requests}", "--virtual-time-budget=12000", "--dump-dom", f"file://{wrapper}"],
        capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    return json.loads(re.search(r'<p id="told">(.*?)</p>', ran.stdout)[1]), ran.stderr, requests.read_text()


@pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium")
def test_the_page_in_a_browser(tmp_path):
    """Plots drawn, no script of others, no request, no message on the console, no scrolling sideways."""
    page = write_report(hostile_runs(tmp_path), tmp_path / "page.html")
    assert page.stat().st_size < 5_000_000
    told, messages, requests = browse(tmp_path, page, (390, 420, 1280))
    assert all(overflow <= 0 for overflow, _ in told["frames"])
    assert all(drawn >= 4 for _, drawn in told["frames"])
    assert told["hacked"] == 0
    assert "CONSOLE" not in messages
    hosts = set(re.findall(r'"url":\s*"(?:https?|wss?)://([^/"]*)', requests))
    assert {host for host in hosts if not host.endswith(GOOGLE)} == set()


@pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium")
def test_a_script_that_got_into_the_page_would_not_run(tmp_path):
    page = write_report([write_stage(tmp_path / "run", ppo_metrics())])
    attack = "<h1><script>parent.hacked = 1</script><img src=x onerror='parent.hacked = 1'>"
    page.write_text(page.read_text().replace("<h1>", attack, 1))
    told, messages, _ = browse(tmp_path, page, [800])
    assert told["hacked"] == 0
    assert told["frames"][0][1] >= 4
    assert messages.count("Content Security Policy") >= 2


def test_the_page_without_plotly_has_images(tmp_path, monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "plotly.offline", None)
    text = write_report([write_stage(tmp_path / "run", ppo_metrics())]).read_text()
    assert text.count("<img src=") == 4
    assert "<script" not in text


def test_the_command_takes_several_runs_and_a_place(tmp_path, capsys):
    paths = [str(write_stage(tmp_path / name, ppo_metrics())) for name in ("one", "two")]
    main([*paths, "--to", str(tmp_path / "pages/both.html")])
    assert (tmp_path / "pages/both.html").is_file()
    assert "No over-optimisation is visible" in " ".join(capsys.readouterr().out.split())
