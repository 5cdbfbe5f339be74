"""What `predict` writes: AlpacaEval's model_outputs.json, or the scores of a reward model."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import BasePredictionWriter


class PredictionWriter(BasePredictionWriter):
    """Write all predicted rows as one JSON list, e.g. {instruction, output, generator, dataset}.

    Args:
        path: the file, relative to the run folder.
    """

    def __init__(self, path: str = "model_outputs.json"):
        super().__init__(write_interval="epoch")
        self.path = path

    def write_on_epoch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, predictions: Sequence[Any], batch_indices: Sequence[Any]
    ) -> None:
        """Rows in the order of the data."""
        rows = [row for batch in predictions for row in batch]
        path = Path(trainer.default_root_dir) / self.path
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(rows, indent=2, ensure_ascii=False) + "\n")
        print(f"Wrote {len(rows)} rows to {path}")
