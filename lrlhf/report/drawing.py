"""Plots drawn twice: as images by matplotlib, and for a browser by plotly."""

import math
from collections.abc import Iterable
from html import escape
from typing import Any

import numpy as np

from lrlhf.errors import UserError
from lrlhf.report.plots import Plot
from lrlhf.report.tables import printable

try:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
except ImportError as error:
    raise UserError(f"lrlhf report needs {error.name}: pip install 'lrlhf[demo]'.") from None


def image(plot: Plot) -> Figure:
    """For a file."""
    many = len(plot.curves) > 4 and plot.legend
    figure = Figure(figsize=(6.8 if many else 5, 3.4), layout="constrained")
    axes: Axes = figure.subplots()
    axes.set_title(_no_math(plot.title), loc="left", fontweight="bold", fontsize=11)
    axes.set(xlabel=_no_math(plot.x), ylabel=plot.y)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(color="#e2e8f0", lw=0.8)
    for curve in plot.curves:
        line = {"line": "-", "dashed": "--", "points": ""}[curve.style]
        marker = "o" if len(curve.x) <= 40 or curve.style == "points" else ""
        axes.plot(curve.x, curve.y, ls=line, marker=marker, ms=3.5, lw=1.4, color=curve.color)
        if curve.error:
            axes.vlines(curve.x, *curve.error, color=curve.color, lw=1.4)
        if curve.band:
            axes.fill_between(curve.x, *curve.band, color=curve.color, alpha=0.15, lw=0)
    if any(isinstance(x, str) for curve in plot.curves for x in curve.x):
        axes.tick_params("x", rotation=45)
    if len(plot.curves) > 1 and plot.legend:
        labels = [_no_math(curve.label) for curve in plot.curves]
        if many:  # beside the points, of which some would lie under it
            figure.legend(axes.lines, labels, frameon=False, loc="outside right upper")
        else:
            axes.legend(axes.lines, labels, frameon=False).set_in_layout(False)
    if plot.guide is not None:
        axes.axhline(plot.guide, color="#475569", lw=1.2, ls=":")
    if plot.diagonal:
        axes.axline((0.5, 0.5), slope=1, color="#475569", lw=1.2, ls=":")
    return figure


def interactive(plot: Plot) -> dict[str, Any]:
    """For plotly in a browser: {data, layout}, JSON values."""
    data: list[dict[str, Any]] = []
    for curve in plot.curves:
        if curve.band:
            edge = {"x": list(curve.x), "mode": "lines", "line": {"width": 0}, "hoverinfo": "skip", "showlegend": False}
            data.append({**edge, "y": _json(curve.band[0])})
            data.append({**edge, "y": _json(curve.band[1]), "fill": "tonexty", "fillcolor": f"{curve.color}26"})
        joined = {"width": 2, "color": curve.color, "dash": "dash" if curve.style == "dashed" else "solid"}
        mode = "markers" if curve.style == "points" else "lines+markers" if len(curve.x) <= 40 else "lines"
        trace = {"x": _json(curve.x), "y": _json(curve.y), "name": _no_tags(curve.label), "mode": mode, "line": joined}
        if curve.error:
            away = [_json(np.abs(np.subtract(curve.y, ends))) for ends in curve.error]
            trace["error_y"] = {"type": "data", "symmetric": False, "arrayminus": away[0], "array": away[1]}
        data.append(trace | {"marker": {"size": 5, "color": curve.color}, "text": [*map(_no_tags, curve.hover or ())]})
    dotted = {"type": "line", "line": {"dash": "dot", "color": "#475569", "width": 1.5}}
    across = {**dotted, "xref": "paper", "x0": 0, "x1": 1, "y0": plot.guide, "y1": plot.guide}
    diagonal = {**dotted, "x0": 0.5, "x1": 1, "y0": 0.5, "y1": 1}
    axis = {"gridcolor": "#e2e8f0", "zeroline": False, "automargin": True}
    layout = {
        "title": {"text": _no_tags(plot.title), "x": 0, "xref": "paper", "font": {"size": 15}},
        "xaxis": {**axis, "title": {"text": _no_tags(plot.x), "standoff": 8}},
        "yaxis": {**axis, "title": {"text": plot.y, "standoff": 8}},
        "margin": {"l": 50, "r": 10, "t": 40, "b": 45},
        "height": 300 + 20 * len(plot.curves),
        "plot_bgcolor": "white",
        "legend": {
            "orientation": "h",
            "traceorder": "normal",
            "yref": "container",
            "y": 0,
            "yanchor": "bottom",
            "x": 0,
        },
        "showlegend": len(plot.curves) > 1 and plot.legend,
        "shapes": [across] * (plot.guide is not None) + [diagonal] * plot.diagonal,
    }
    return {"data": data, "layout": layout}


def _no_math(text: str) -> str:
    """For matplotlib, to which dollars are formulas."""
    return _short(text).replace("$", r"\$")


def _no_tags(text: str) -> str:
    """For plotly, which makes links of some tags, and formulas of what stands between dollars."""
    return escape(_short(text), quote=False).replace("$", "&#36;")


def _short(text: str) -> str:
    """With its middle left out where it would push the axes out of the picture."""
    text = printable(text)
    return text if len(text) <= 50 else f"{text[:24]}…{text[-25:]}"


def _json(values: Iterable[float | str]) -> list[float | str | None]:
    """JSON knows no nan and no infinity."""
    return [_no_tags(v) if isinstance(v, str) else float(v) if math.isfinite(v) else None for v in values]
