"""metrics.csv goes on where the checkpoint was, without double rows."""

import csv

import pytest

from lrlhf.errors import UserError
from lrlhf.run.metrics_csv import MetricsFile


def rows(folder):
    with (folder / "metrics.csv").open() as file:
        return list(csv.DictReader(file))


def test_rows_are_on_the_disk_at_once_and_a_new_column_keeps_the_old_rows(tmp_path):
    log = MetricsFile(tmp_path)
    log.log_metrics({"epoch": 0, "loss": 2.5}, 0)
    assert rows(tmp_path) == [{"epoch": "0", "step": "0", "loss": "2.5"}]
    log.log_metrics({"epoch": 0, "loss": 1.5}, 1)
    log.log_metrics({"epoch": 0, "val": 9}, 1)
    assert [row["loss"] for row in rows(tmp_path)] == ["2.5", "1.5", ""]
    assert [row["val"] for row in rows(tmp_path)] == ["", "", "9"]


def test_a_resumed_log_is_the_uninterrupted_one(tmp_path):
    whole, killed = MetricsFile(tmp_path / "whole"), MetricsFile(tmp_path / "killed")
    for step in range(3):
        for log in (whole, killed):
            log.log_metrics({"epoch": 0, "loss": step / 7}, step)
    saved = killed.state_dict()
    killed.log_metrics({"epoch": 0, "lost": 1, "loss": 8}, 3)
    again = MetricsFile(tmp_path / "killed")
    again.load_state_dict(saved)
    for log in (whole, again):
        log.log_metrics({"epoch": 1, "loss": 0.5}, 3)
        log.log_metrics({"epoch": 1, "val": 0.25}, 3)
    assert (tmp_path / "whole/metrics.csv").read_text() == (tmp_path / "killed/metrics.csv").read_text()


def test_a_log_that_lost_rows_is_refused(tmp_path):
    with pytest.raises(UserError, match="0 rows and the checkpoint was written after 4"):
        MetricsFile(tmp_path).load_state_dict({"rows": 4, "columns": []})
