"""One HTML page that opens offline: no network, no script but plotly's, and every text of a run escaped."""

import base64
import gzip
import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader

from lrlhf.report import BEFORE
from lrlhf.report.plots import Plot, interactive
from lrlhf.report.runs import Run, differences
from lrlhf.report.tables import (
    HEADINGS,
    choose_samples,
    describe,
    describe_seconds,
    evaluation_table,
    make_table,
    printable,
)
from lrlhf.report.verdict import verdicts

LOADER = """
const text = id => document.getElementById(id).textContent;
const bytes = Uint8Array.from(atob(text("plotly")), c => c.charCodeAt(0));
const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"));
new Response(stream).text().then(code => {
  const script = document.createElement("script");
  script.textContent = code;
  document.head.append(script);
  const figures = JSON.parse(text("figures"));
  for (const place of document.querySelectorAll("[data-figure]")) {
    const { data, layout } = figures[place.dataset.figure];
    place.replaceChildren();
    Plotly.newPlot(place, data, layout, { responsive: true, displaylogo: false, displayModeBar: false });
  }
});
"""
"""Unpacks plotly and draws. The page's policy names this script by its hash, so no other script runs."""


def render_page(runs: Sequence[Run], plots: Sequence[Plot], images: Path) -> str:
    """The whole page; with still images where plotly is not installed, or scripts are off.

    Args:
        runs: to show.
        plots: of the runs.
        images: folder that holds each plot as NAME.png.
    """
    pages = Environment(loader=PackageLoader("lrlhf.report", ""), autoescape=True, trim_blocks=True, lstrip_blocks=True)
    pages.filters |= {"printable": lambda value: printable(str(value)), "describe": describe}
    stills = {plot.name: base64.b64encode((images / f"{plot.name}.png").read_bytes()).decode() for plot in plots}
    figures = {plot.name: interactive(plot) for plot in plots}
    digest = base64.b64encode(hashlib.sha256(LOADER.encode()).digest()).decode()
    return pages.get_template("report.html.j2").render(
        title=", ".join(run.name for run in runs),
        runs=[_show(run) for run in runs],
        names=[run.name for run in runs],
        differences=differences(runs) if len(runs) > 1 else [],
        headings=HEADINGS,
        plots=plots,
        stills=stills,
        plotly=_packed_plotly() if plots else None,
        figures=json.dumps(figures).replace("<", "\\u003c"),
        loader=LOADER,
        digest=digest,
        sides=("before", "after"),
    )


def _show(run: Run) -> dict[str, Any]:
    """What the page shows of one run."""
    comparison = run.comparison
    note, samples = choose_samples(comparison["rows"]) if comparison else ("", [])
    return {
        "name": run.name,
        "subject": _subject(comparison) if comparison else "",
        "verdicts": verdicts(run),
        "tables": make_table(comparison) if comparison else {},
        "evaluations": [(result, evaluation_table(result), _judged(result)) for result in run.evaluations],
        "note": note,
        "samples": [(rank, row, run.words.get(row["instruction"], [])) for rank, row in samples],
        "texts": run.texts,
        "seconds": describe_seconds(comparison.get("seconds") or {}) if comparison else "",
    }


def _judged(result: dict[str, Any]) -> list[dict[str, Any]]:
    """Samples of an evaluation; those of before and after PPO are shown with the run's own."""
    return [sample for sample in result.get("samples") or () if sample.get("generator_1") != BEFORE]


def _subject(comparison: dict[str, Any]) -> str:
    model, seed = comparison.get("base_model", "unknown model"), comparison.get("seed")
    return f"{model}, seed {seed}, {len(comparison['rows'])} held-out prompts"


def _packed_plotly() -> str | None:
    """plotly.min.js, compressed; None if the package is not installed."""
    try:
        from plotly.offline import get_plotlyjs
    except ImportError:
        return None
    return base64.b64encode(gzip.compress(get_plotlyjs().encode(), mtime=0)).decode()
