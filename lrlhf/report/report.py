"""`lrlhf report`: what runs did to their models, as a table in the terminal and as one HTML page.

How to read it: every row of comparison.json is one held-out prompt, answered before and after, with the same random
draws, so differences are paired. The 95 % intervals say how far another choice of prompts would move a mean; they say
nothing about another training seed. What a run folder lacks is left out.
"""

from collections.abc import Sequence
from pathlib import Path

from lrlhf.cli.messages import CommandParser
from lrlhf.errors import UserError
from lrlhf.report.drawing import image
from lrlhf.report.page import render_page, render_study
from lrlhf.report.plots import Plot, make_plots
from lrlhf.report.runs import Run, read_runs
from lrlhf.report.study import FILE as STUDY
from lrlhf.report.study import read_study, study_notes, study_plots, study_tables
from lrlhf.report.tables import (
    CAVEAT,
    HEADINGS,
    SIDES,
    Line,
    choose_samples,
    describe,
    describe_seconds,
    evaluation_table,
    make_table,
    printable,
)
from lrlhf.report.verdict import verdicts

try:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text
except ImportError as error:
    raise UserError(f"lrlhf report needs {error.name}: pip install 'lrlhf[demo]'.") from None


def main(arguments: list[str]) -> None:
    """`lrlhf report RUN [RUN ...]`.

    Raises:
        UserError: a folder that holds no run.
    """
    parser = CommandParser("report", "Tables, plots and one HTML page of runs, side by side where there are several.")
    parser.add_argument("runs", type=str, nargs="+", help="folders of lrlhf align, of one stage, or of a study")
    parser.add_argument("--to", type=str | None, help="the page (default: report.html in the first run's folder)")
    parsed = parser.parse_args(arguments)
    studies = [(Path(run).expanduser() / STUDY).is_file() for run in parsed.runs]
    if not any(studies):
        write_report(parsed.runs, parsed.to)
    elif len(studies) > 1:
        raise UserError("report: give a study alone; its conditions are side by side already.")
    else:
        write_study(parsed.runs[0], parsed.to)


def write_report(folders: Sequence[str | Path], to: str | Path | None = None) -> Path:
    """Write the page, and the plots as images in `plots` beside it, and print the tables; the path of the page.

    Args:
        folders: of runs.
        to: the page; None for report.html in the first run's folder.
    """
    runs = read_runs([str(folder) for folder in folders])
    page = Path(to).expanduser() if to else runs[0].folder / "report.html"
    plots, images = make_plots(runs), page.parent / "plots"
    _write_images(plots, images)
    page.write_text(render_page(runs, plots), encoding="utf-8")
    for run in runs:
        print_report(run)
    print(f"Page: {page}")
    return page


def write_study(folder: str | Path, to: str | Path | None = None) -> Path:
    """The same of a study: its tables, its plots, its page.

    Args:
        folder: of the study, or with its tables.
        to: the page; None for report.html in the folder.
    """
    study = read_study(Path(folder).expanduser())
    page = Path(to).expanduser() if to else Path(folder).expanduser() / "report.html"
    plots, images = study_plots(study), page.parent / "plots"
    _write_images(plots, images)
    page.write_text(render_study(study, plots), encoding="utf-8")
    console = Console()
    for heading, *lines in filter(None, study_tables(study)):
        table = Table(title=_text(study.name, "bold"), title_justify="left")
        for place, cell in enumerate(heading):
            table.add_column(_text(cell), justify="right" if place else "left", no_wrap=not place)
        for line in lines:
            table.add_row(*map(_text, line))
        console.print(table)
    console.print(*map(_text, study_notes(study)), sep="\n")
    print(f"Page: {page}")
    return page


def _write_images(plots: Sequence[Plot], folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for plot in plots:
        image(plot).savefig(folder / f"{plot.name}.png", dpi=160)


def print_report(run: Run) -> None:
    """The tables, the verdicts, the samples and the seconds on the terminal."""
    console, comparison = Console(), run.comparison or {"rows": []}
    tables = make_table(comparison) | {result["title"]: evaluation_table(result) for result in run.evaluations}
    if tables:
        console.print(_table(run.name, tables))
    notes = [f"{result['title']}: {note}" for result in run.evaluations for note in result.get("notes") or ()]
    bold = [_text(said, "bold") for said in verdicts(run)]
    console.print(*bold, *map(_text, [*notes, *([CAVEAT] if tables else [])]), sep="\n")
    note, samples = choose_samples(comparison["rows"])
    if samples:
        console.print(_text(f"\nSamples. {note}"))
    for rank, row in samples:
        caption = _text(f"\nRank {rank}: {row['instruction']}", "bold")
        pair = Table(title=caption, title_justify="left", expand=True)
        for side in SIDES:
            pair.add_column(_text(f"{side}: {describe(row[side])}"), ratio=1)
        pair.add_row(*(_text(row[side]["response"]) for side in SIDES))
        console.print(pair)
    console.print(_text(describe_seconds(comparison.get("seconds") or {})))


def _table(name: str, tables: dict[str, list[Line]]) -> Table:
    table = Table(title=_text(name, "bold"), title_justify="left")
    table.add_column(HEADINGS[0])
    for heading in HEADINGS[1:]:
        table.add_column(heading, justify="right")
    for title, lines in tables.items():
        table.add_section()
        table.add_row(_text(title, "bold"))
        for label, *cells in lines:
            table.add_row(_text(f"  {label}"), *cells, style="bold cyan" if label.startswith("difference") else "")
    return table


def _text(text: str, style: str = "") -> Text:
    """Shown as it is: neither markup nor control characters of a run's texts reach the terminal."""
    return Text(printable(text), style)
