"""What a run logged: its metrics.csv as curves."""

import csv
from pathlib import Path

import pandas as pd

Curves = dict[str, pd.Series]
"""Metrics by name: the value at each step that logged it."""


def read_curves(path: Path) -> Curves:
    """The columns of a metrics.csv over its steps; none without the file.

    Empty cells and lines that were torn by a kill are left out; what is no finite number stays, as a gap in the line.
    """
    if not path.is_file() or not path.read_bytes().strip():
        return {}
    table = pd.read_csv(
        path, dtype=str, keep_default_na=False, encoding_errors="replace", on_bad_lines="skip", quoting=csv.QUOTE_NONE
    )
    if "step" not in table:
        return {}
    table.index = pd.to_numeric(table["step"], errors="coerce")
    curves = {}
    for name, cells in table[table.index.notna()].items():
        numbers = pd.to_numeric(cells[cells.notna() & (cells != "")], errors="coerce")
        if len(numbers):
            curves[str(name)] = numbers[~numbers.index.duplicated(keep="last")]
    return curves
