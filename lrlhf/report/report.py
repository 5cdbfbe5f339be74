"""The report of an align run: a table in the terminal, and the same with plots and samples in one HTML page.

How to read it: every row of comparison.json is one held-out prompt, answered before and after PPO with the same random
draws, so differences are paired. The 95 % intervals say how far another choice of prompts would move a mean; they say
nothing about another training seed. What a run folder lacks is left out; only comparison.json is required.
"""

import base64
import json
import math
import unicodedata
from pathlib import Path
from statistics import fmean
from typing import Any

from jinja2 import Environment, PackageLoader

from lrlhf.cli.messages import CommandParser
from lrlhf.errors import UserError
from lrlhf.evaluation.estimates import Estimate, mean_interval, wilson_interval
from lrlhf.report.plots import Plot, make_plots

try:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text
except ImportError as error:
    raise UserError(f"lrlhf report needs {error.name}: pip install 'lrlhf[demo]'.") from None

SIDES = ("before", "after")
HEADINGS = ("", "Value", "95 % interval", "n")
CAVEAT = "Intervals cover the choice of prompts, not another training seed."
Line = tuple[str, str, str, str]
"""Label, value, interval, n."""
Row = dict[str, Any]
"""One prompt of comparison.json."""


def main(arguments: list[str]) -> None:
    """`lrlhf report RUN_FOLDER`.

    Raises:
        UserError: that is no folder with a comparison.
    """
    parser = CommandParser("report", "Tables, plots and an HTML page of an align run, before and after PPO.")
    parser.add_argument("run", type=str, help="run folder of lrlhf align; report.html and plots/ are written into it")
    write_report(Path(parser.parse_args(arguments).run).expanduser())


def write_report(run: Path) -> Path:
    """Write run/plots/*.png and run/report.html, and print the table; the path of the page."""
    comparison = read_comparison(run)
    plots = make_plots(run)
    folder, page = run / "plots", run / "report.html"
    folder.mkdir(exist_ok=True)
    for plot in plots:
        plot.figure.savefig(folder / f"{plot.name}.png", dpi=160)
    page.write_text(render_page(comparison, plots, folder), encoding="utf-8")
    print_report(comparison)
    print(f"Page: {page}")
    return page


# Read


def read_comparison(run: Path) -> dict[str, Any]:
    """The contents of run/comparison.json, or a UserError."""
    path = run / "comparison.json"
    if not run.is_dir():
        raise UserError(f"report: there is no folder {run}; give the run folder of lrlhf align.")
    if not path.is_file():
        raise UserError(f"report: {run} has no comparison.json; let lrlhf align finish this run first.")
    try:
        comparison = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"report: {path} is not valid JSON ({error}); run lrlhf align again.") from None
    if not isinstance(comparison, dict) or not isinstance(comparison.get("rows"), list):
        raise UserError(f"report: {path} has no list named rows; run lrlhf align again.")
    return comparison


# Measure


def paired(rows: list[Row], key: str) -> list[tuple[float, float]]:
    """(before, after) of the rows that have both."""
    pairs = [(row["before"].get(key), row["after"].get(key)) for row in rows]
    return [(before, after) for before, after in pairs if before is not None and after is not None]


def difference(rows: list[Row], key: str) -> Estimate:
    """Of after - before, paired by prompt.

    Args:
        rows: of comparison.json.
        key: of a number of each response.
    """
    return mean_interval([after - before for before, after in paired(rows, key)])


def verdict(comparison: dict[str, Any]) -> str:
    """In words, whether the gold difference excludes 0."""
    name, rows = comparison.get("gold"), comparison["rows"]
    if name is None or not paired(rows, "gold"):
        return "No gold reward was measured: a higher learned reward alone does not show better responses."
    value, low, high, n = difference(rows, "gold")
    if not math.isfinite(high - low):
        return f"Too few finite gold rewards (n = {n}) to say whether {name} changed."
    numbers = f"{value:+.3f}, 95 % interval {low:+.3f} to {high:+.3f}, n = {n}"
    if low <= 0 <= high:
        return f"The gold reward {name} did not change measurably ({numbers}): the interval includes 0."
    return f"The gold reward {name} {'rose' if value > 0 else 'fell'} ({numbers}): the interval excludes 0."


def make_table(comparison: dict[str, Any]) -> dict[str, list[Line]]:
    """The lines under each heading, without what was not measured."""
    rows, table = comparison["rows"], {}
    if model := comparison.get("reward_model"):
        accuracy = _line("accuracy", wilson_interval(model["accuracy"], int(model.get("pairs") or 0)), ".1%")
        longer = model.get("longer_accuracy")
        baseline = [] if longer is None else [("baseline: the longer wins", f"{longer:.1%}", "", "")]
        table["Reward model, held-out pairs"] = [accuracy, *baseline]
    for title, key, style, estimate in (
        ("Learned reward", "learned", ".3f", mean_interval),
        (f"Gold reward: {comparison.get('gold')}", "gold", ".3f", mean_interval),
        ("Response length, tokens", "length", ".1f", mean_interval),
        ("Ended by itself (difference in points)", "ended", ".1%", lambda v: wilson_interval(fmean(v), len(v))),
    ):
        if pairs := paired(rows, key):
            before, after = ([pair[side] for pair in pairs] for side in (0, 1))
            table[title] = [
                _line("before PPO", estimate(before), style),
                _line("after PPO", estimate(after), style),
                _line("difference, paired", difference(rows, key), f"+{style}"),
            ]
    if divergences := comparison.get("divergences"):
        lines = [(name, f"{value:.4f}", "", "") for name, value in divergences.items()]
        table["Divergence per token after PPO (0 before)"] = lines
    return table


def _line(label: str, estimate: Estimate, style: str) -> Line:
    value, low, high, n = estimate
    interval = f"{low:{style}} to {high:{style}}" if math.isfinite(high - low) else ""
    return label, f"{value:{style}}", interval, str(n or "")


def choose_samples(rows: list[Row], count: int = 5) -> tuple[str, list[tuple[int, Row]]]:
    """How they were chosen, and (rank, row) at evenly spaced ranks of the difference, from the largest fall up.

    Args:
        rows: of comparison.json.
        count: samples at most.
    """
    key = "gold" if len(paired(rows, "gold")) == len(rows) else "learned"
    ranked = sorted(rows, key=lambda row: row["after"][key] - row["before"][key])
    places = dict.fromkeys(round(i * (len(ranked) - 1) / (count - 1)) for i in range(count)) if ranked else {}
    note = (
        f"Not picked by hand: evenly spaced ranks of the {key} reward's difference among {len(rows)} prompts, "
        "from the largest fall to the largest rise."
    )
    return note, [(place + 1, ranked[place]) for place in places]


def describe(side: dict[str, Any]) -> str:
    """The numbers of one response."""
    gold = "" if side.get("gold") is None else f"gold {side['gold']:.2f}, "
    return f"{gold}learned {side['learned']:.2f}, {side['length']} tokens{'' if side['ended'] else ', cut off'}"


def describe_seconds(seconds: dict[str, float]) -> str:
    """Time per stage and together."""
    parts = [f"{stage} {value:.0f} s" for stage, value in seconds.items()]
    return f"Time: {', '.join(parts)}; together {sum(seconds.values()) / 60:.1f} minutes." if parts else ""


# Show


def printable(text: str) -> str:
    """Without control characters, which a terminal obeys, and halves of surrogate pairs, which no file can hold."""
    return "".join(c if c in "\n\t" or unicodedata.category(c) not in ("Cc", "Cs") else "\ufffd" for c in text)


def print_report(comparison: dict[str, Any]) -> None:
    """The table, the samples and the seconds on the terminal."""
    console = Console()
    table = Table(title=Text(_subject(comparison), "bold"), title_justify="left")
    table.add_column(HEADINGS[0])
    for heading in HEADINGS[1:]:
        table.add_column(heading, justify="right")
    for title, lines in make_table(comparison).items():
        table.add_section()
        table.add_row(Text(title, "bold"))
        for label, *cells in lines:
            table.add_row(f"  {label}", *cells, style="bold cyan" if label.startswith("difference") else "")
    console.print(table, Text(verdict(comparison), "bold"), Text(CAVEAT), sep="\n")
    note, samples = choose_samples(comparison["rows"])
    if samples:
        console.print(Text(f"\nSamples. {note}"))
    for rank, row in samples:
        caption = Text(f"\nRank {rank}: {printable(row['instruction'])}", "bold")
        pair = Table(title=caption, title_justify="left", expand=True)
        for side in SIDES:
            pair.add_column(Text(f"{side} PPO: {describe(row[side])}"), ratio=1)
        pair.add_row(*(Text(printable(row[side]["response"])) for side in SIDES))
        console.print(pair)
    console.print(Text(describe_seconds(comparison.get("seconds") or {})))


def render_page(comparison: dict[str, Any], plots: list[Plot], folder: Path) -> str:
    """The whole page: no script, no network, images inside, and every text of the run escaped.

    Args:
        comparison: the contents of comparison.json.
        plots: to show.
        folder: that holds their images.
    """
    pages = Environment(loader=PackageLoader("lrlhf.report", ""), autoescape=True, trim_blocks=True, lstrip_blocks=True)
    pages.filters |= {"printable": printable, "describe": describe}
    note, samples = choose_samples(comparison["rows"])
    images = {plot.name: base64.b64encode((folder / f"{plot.name}.png").read_bytes()).decode() for plot in plots}
    return pages.get_template("report.html.j2").render(
        subject=_subject(comparison),
        verdict=verdict(comparison),
        headings=HEADINGS,
        table=make_table(comparison),
        caveat=CAVEAT,
        plots=plots,
        images=images,
        note=note,
        samples=samples,
        sides=SIDES,
        seconds=describe_seconds(comparison.get("seconds") or {}),
    )


def _subject(comparison: dict[str, Any]) -> str:
    model, seed = comparison.get("base_model", "unknown model"), comparison.get("seed")
    return f"{model}, seed {seed}, {len(comparison['rows'])} held-out prompts"
