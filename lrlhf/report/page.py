"""One HTML page that opens offline: no network, no script but plotly's, and every text of a run escaped."""

import base64
import gzip
import hashlib
import io
import json
from collections.abc import Sequence
from typing import Any

from jinja2 import Environment, PackageLoader

from lrlhf.report import BEFORE
from lrlhf.report.drawing import image, interactive
from lrlhf.report.plots import Plot
from lrlhf.report.runs import Run, differences
from lrlhf.report.study import StudyResults, study_notes, study_tables
from lrlhf.report.tables import (
    CAVEAT,
    HEADINGS,
    SIDES,
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
"""Unpacks plotly and draws in place of the stills. The page's policy names both scripts by hash: no other runs."""


def render_page(runs: Sequence[Run], plots: Sequence[Plot]) -> str:
    """The whole page; with still images where plotly is not installed, or does not run.

    Args:
        runs: to show.
        plots: of the runs.
    """
    return _page(
        "report.html.j2",
        plots,
        title=", ".join(run.name for run in runs),
        runs=[_show(run) for run in runs],
        names=[run.name for run in runs],
        differences=differences(runs) if len(runs) > 1 else [],
        headings=HEADINGS,
        sides=SIDES,
        caveat=CAVEAT,
    )


def render_study(study: StudyResults, plots: Sequence[Plot]) -> str:
    """The page of a study.

    Args:
        study: to show.
        plots: of it.
    """
    return _page(
        "study.html.j2",
        plots,
        title=f"Study: {study.name}",
        notes=study_notes(study),
        tables=study_tables(study),
        plan=json.dumps(study.plan, indent=1),
    )


def _page(template: str, plots: Sequence[Plot], **content: Any) -> str:
    pages = Environment(loader=PackageLoader("lrlhf.report", ""), autoescape=True, trim_blocks=True, lstrip_blocks=True)
    pages.filters |= {"printable": lambda value: printable(str(value)), "describe": describe}
    plotly = _plotly() if plots else None
    scripts = [LOADER, plotly] if plotly else []
    figures = {plot.name: interactive(plot) for plot in plots}
    return pages.get_template(template).render(
        plots=plots,
        stills={plot.name: _still(plot, 72 if plotly else 160) for plot in plots},
        plotly=_base64(gzip.compress(plotly.encode(), mtime=0)) if plotly else None,
        figures=json.dumps(figures).replace("<", "\\u003c"),
        loader=LOADER,
        hashes=[_base64(hashlib.sha256(script.encode()).digest()) for script in scripts],
        **content,
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
    """Samples of an evaluation; those of before and after are shown with the run's own."""
    return [sample for sample in result.get("samples") or () if sample.get("generator_1") != BEFORE]


def _subject(comparison: dict[str, Any]) -> str:
    model, seed = comparison.get("base_model", "unknown model"), comparison.get("seed")
    return f"{model}, seed {seed}, {len(comparison['rows'])} held-out prompts"


def _plotly() -> str | None:
    """plotly.min.js; None if the package is not installed."""
    try:
        from plotly.offline import get_plotlyjs
    except ImportError:
        return None
    return get_plotlyjs()


def _still(plot: Plot, resolution: int) -> str:
    file = io.BytesIO()
    image(plot).savefig(file, format="png", dpi=resolution)
    return _base64(file.getvalue())


def _base64(content: bytes) -> str:
    return base64.b64encode(content).decode()
