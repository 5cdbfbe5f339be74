"""PredictionWriter: every predicted row, in the order of the data, in one file."""

import json

import lightning as L
import torch

from lrlhf import PredictionWriter
from tests.modules.helpers import trainer

ROWS = [{"instruction": f"{i}?", "output": text} for i, text in enumerate(["yes", "té 👍", "", "a\nb", "no"])]


class Echo(L.LightningModule):
    """Predicts the row whose number it is given."""

    def predict_step(self, batch, batch_idx):
        return [ROWS[i] for i in batch.tolist()]


def predict(folder, *callbacks) -> None:
    rows = torch.utils.data.DataLoader(range(len(ROWS)), batch_size=2)
    trainer(folder, callbacks=list(callbacks), enable_checkpointing=False).predict(Echo(), rows)


def test_rows_are_written_in_the_order_of_the_data_as_one_json_list(tmp_path, capsys):
    predict(tmp_path, PredictionWriter())
    assert json.loads((tmp_path / "model_outputs.json").read_text()) == ROWS
    assert f"Wrote 5 rows to {tmp_path / 'model_outputs.json'}" in capsys.readouterr().out


def test_the_file_is_for_people_too(tmp_path):
    predict(tmp_path, PredictionWriter())
    text = (tmp_path / "model_outputs.json").read_text()
    assert text.splitlines()[:4] == ["[", "  {", '    "instruction": "0?",', '    "output": "yes"']
    assert "té 👍" in text
    assert text.endswith("]\n")


def test_a_path_lies_in_the_run_folder_and_what_was_there_is_replaced(tmp_path):
    file = tmp_path / "run/eval/rows.json"
    for _ in range(2):
        predict(tmp_path / "run", PredictionWriter("eval/rows.json"))
        assert json.loads(file.read_text()) == ROWS
    absolute = tmp_path / "elsewhere.json"
    predict(tmp_path / "run", PredictionWriter(str(absolute)))
    assert json.loads(absolute.read_text()) == ROWS
