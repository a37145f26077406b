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


def left(folder: Path, steps: int, *rows: tuple[int | float | None, str]) -> str:
    """What a run that is resumed after so many steps takes over of rows with a step and a name."""
    first = MetricsCSV(folder)
    for value, (step, _) in enumerate(rows):
        first.log_metrics({"row": value}, step=step)  # type: ignore[arg-type]  # Lightning gives floats, too
    MetricsCSV(folder).take_over(folder / "metrics.csv", steps)
    with (folder / "metrics.csv").open(newline="") as file:
        return "".join(rows[int(float(row["row"]))][1] for row in csv.DictReader(file))


def test_a_row_without_a_step_is_kept_with_the_next_that_has_one_so_that_none_is_doubled(tmp_path: Path) -> None:
    rows = ((None, "a"), (0, "b"), (None, "c"), (1, "d"), (None, "e"), (2, "f"), (None, "g"), (3, "h"))
    assert left(tmp_path, 2, *rows) == "abcd"


def test_rows_without_a_step_at_the_end_of_the_file_are_left_out_since_they_may_follow_the_checkpoint(
    tmp_path: Path,
) -> None:
    assert left(tmp_path, 2, (0, "a"), (None, "b"), (1, "c"), (None, "d")) == "abc"
    assert left(tmp_path, 2, (None, "a"), (None, "b")) == ""


def test_steps_that_are_floats_are_read_as_numbers(tmp_path: Path) -> None:
    assert left(tmp_path, 2, (0.0, "a"), (1.0, "b"), (2.0, "c"), (3.0, "d")) == "ab"


def test_rows_with_the_epoch_as_their_step_are_kept_as_those_around_them(tmp_path: Path) -> None:
    # Epochs of 3 steps; resumed after the second one.
    rows = [(step, "abcdefghi"[step]) for step in range(9)]
    of_epoch = [*rows[:3], (0.0, "0"), *rows[3:6], (None, "-"), (1.0, "1"), *rows[6:9], (2.0, "2")]
    assert left(tmp_path, 6, *of_epoch) == "abc0def-1"


def test_rows_with_a_count_above_the_optimizer_step_do_not_end_the_past(tmp_path: Path) -> None:
    # Examples, 64 a step.
    rows = ((0, "a"), (64.0, "A"), (1, "b"), (128.0, "B"), (2, "c"), (192.0, "C"))
    assert left(tmp_path, 2, *rows) == "aAb"


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
