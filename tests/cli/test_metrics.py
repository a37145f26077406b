import csv
from pathlib import Path

from sparsetrain.cli.metrics import MetricsCSV


def rows(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def test_a_row_is_on_the_disk_when_the_call_returns(tmp_path: Path) -> None:
    logger = MetricsCSV(tmp_path)
    logger.log_metrics({"loss": 0.1}, step=0)
    assert rows(tmp_path / "metrics.csv") == [{"step": "0", "loss": "0.1"}]


def test_a_new_metric_becomes_a_column_that_earlier_rows_leave_empty(tmp_path: Path) -> None:
    logger = MetricsCSV(tmp_path)
    logger.log_metrics({"loss": 0.5}, step=0)
    logger.log_metrics({"accuracy": 1.0}, step=0)
    logger.log_metrics({"loss": 0.25}, step=1)
    assert rows(tmp_path / "metrics.csv") == [
        {"step": "0", "loss": "0.5", "accuracy": ""},
        {"step": "0", "loss": "", "accuracy": "1.0"},
        {"step": "1", "loss": "0.25", "accuracy": ""},
    ]


def test_values_are_written_so_that_they_read_back_equal(tmp_path: Path) -> None:
    MetricsCSV(tmp_path).log_metrics({"third": 1 / 3}, step=0)
    assert float(rows(tmp_path / "metrics.csv")[0]["third"]) == 1 / 3


def test_a_resumed_run_keeps_the_rows_of_its_past_and_no_others(tmp_path: Path) -> None:
    first = MetricsCSV(tmp_path)
    for step in range(4):
        first.log_metrics({"loss": step}, step=step)
    again = MetricsCSV(tmp_path)
    again.take_over(tmp_path / "metrics.csv", steps=2)
    again.log_metrics({"loss": 20.0}, step=2)
    assert [(row["step"], float(row["loss"])) for row in rows(tmp_path / "metrics.csv")] == [
        ("0", 0.0),
        ("1", 1.0),
        ("2", 20.0),
    ]


def test_a_row_that_a_kill_cut_short_is_left_out(tmp_path: Path) -> None:
    path = tmp_path / "metrics.csv"
    path.write_text("step,loss\n0,0.5\n1")
    logger = MetricsCSV(tmp_path)
    logger.take_over(path, steps=30)
    assert path.read_text() == "step,loss\n0,0.5\n"


def test_a_past_that_is_not_there_is_empty(tmp_path: Path) -> None:
    logger = MetricsCSV(tmp_path)
    logger.take_over(tmp_path / "elsewhere" / "metrics.csv", steps=2)
    logger.log_metrics({"loss": 1.0}, step=2)
    assert len(rows(tmp_path / "metrics.csv")) == 1


def test_a_run_that_is_not_resumed_replaces_the_file(tmp_path: Path) -> None:
    MetricsCSV(tmp_path).log_metrics({"old": 1.0}, step=0)
    MetricsCSV(tmp_path).log_metrics({"new": 2.0}, step=0)
    assert rows(tmp_path / "metrics.csv") == [{"step": "0", "new": "2.0"}]
