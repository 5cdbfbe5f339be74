"""metrics.csv: one row a logged step, on the disk at once, and cut back to the checkpoint that a run goes on from."""

import csv
import io
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers import Logger
from lightning.pytorch.utilities import rank_zero_only

from lrlhf.errors import UserError
from lrlhf.files import whole


class MetricsFile(Logger):
    """Log to folder/metrics.csv. Unlike Lightning's CSVLogger it goes on in an existing file.

    Args:
        folder: of the run.
    """

    def __init__(self, folder: str | Path):
        super().__init__()
        self.path = Path(folder) / "metrics.csv"
        self._columns: list[str] = []
        self._rows: list[dict[str, str]] = []

    @property
    def name(self) -> str:
        """Lightning asks for a name; there is one file a run, so it is empty."""
        return ""

    @property
    def version(self) -> str:
        """Lightning asks for a version; a run that goes on stays in its file, so it is empty."""
        return ""

    @property
    def save_dir(self) -> str:
        """The run folder, in which the file lies."""
        return str(self.path.parent)

    @rank_zero_only
    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        """Append a row; a new column rewrites the file."""
        row = {"epoch": str(metrics.get("epoch", "")), "step": str(step)} | {k: str(v) for k, v in metrics.items()}
        new = [name for name in row if name not in self._columns]
        self._columns += new
        self._rows.append(row)
        if new:
            self._write()
        else:
            with self.path.open("a", newline="") as file:
                csv.DictWriter(file, self._columns).writerow(row)

    @rank_zero_only
    def log_hyperparams(self, *arguments: Any, **options: Any) -> None:
        """Nothing: the run folder's config.yaml holds them."""

    def state_dict(self) -> dict[str, Any]:
        """How much is in the file."""
        return {"rows": len(self._rows), "columns": list(self._columns)}

    @rank_zero_only
    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Drop what was logged after the checkpoint.

        Raises:
            UserError: the file has fewer rows than the checkpoint knows of.
        """
        text = self.path.read_text() if self.path.is_file() else ""
        rows = list(csv.DictReader(io.StringIO(text)))[: state["rows"]]
        if len(rows) < state["rows"]:
            raise UserError(
                f"{self.path} has {len(rows)} rows and the checkpoint was written after {state['rows']}; put the file "
                "back, or start over with --fresh."
            )
        self._columns = state["columns"]
        self._rows = [{name: row[name] for name in self._columns if row.get(name)} for row in rows]
        self._write()

    def _write(self) -> None:
        with whole(self.path) as scratch, scratch.open("w", newline="") as file:
            writer = csv.DictWriter(file, self._columns)
            writer.writeheader()
            writer.writerows(self._rows)
