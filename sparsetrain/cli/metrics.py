"""metrics.csv: every logged metric of a run, complete and without repeats also when the run was resumed."""

import csv
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers.logger import Logger
from lightning.pytorch.utilities import rank_zero_only

FILE = "metrics.csv"


class MetricsCSV(Logger):
    """Appends one row to metrics.csv for every call that logs: the optimizer step (0-based), then a column per metric.

    A row is on the disk when the call returns, so every checkpoint has the rows of its past beside it. (Lightning's
    CSVLogger buffers rows, and deletes the file of a run that is resumed in its folder.)

    Args:
        folder: where the file is written; an older one is replaced.
    """

    def __init__(self, folder: str | Path) -> None:
        super().__init__()
        self.path = Path(folder) / FILE
        self._columns: list[str] = []

    @rank_zero_only
    def take_over(self, earlier: Path, steps: int) -> None:
        """Begin with the rows that the run had logged when it had taken `steps` optimizer steps.

        Args:
            earlier: metrics.csv of the run that is resumed; it may be this file. None of its rows if it is not there.
            steps: rows of step `steps` and later are left out: this run logs them again. Rows of another count, such
                as the epoch, or of none belong to those around them; of none, just before those left out, to these.
        """
        if earlier.exists():
            columns, rows = _read(earlier)
            self._write(columns, rows[: _count_before(steps, rows)])

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Append a row."""
        row = {"step": "" if step is None else str(step), **{name: repr(float(v)) for name, v in metrics.items()}}
        new = [name for name in row if name not in self._columns]
        if new:
            rows = _read(self.path)[1] if self._columns else []
            self._write([*self._columns, *new], [*rows, row])
        else:
            with self.path.open("a", newline="") as file:
                _writer(file, self._columns).writerow(row)

    @rank_zero_only
    def log_hyperparams(self, *args: Any, **kwargs: Any) -> None:
        """Nothing: the configuration lies beside the file."""

    @property
    def name(self) -> str:
        """No name: the folder is the run's."""
        return ""

    @property
    def version(self) -> str:
        """No version: the folder is the run's."""
        return ""

    @property
    def save_dir(self) -> str:
        """The folder."""
        return str(self.path.parent)

    def _write(self, columns: list[str], rows: list[dict[str, str]]) -> None:
        """Replace the file as a whole: a kill leaves the old one or the new one."""
        temporary = self.path.with_suffix(".tmp")
        with temporary.open("w", newline="") as file:
            writer = _writer(file, columns)
            writer.writeheader()
            writer.writerows(rows)
        temporary.replace(self.path)
        self._columns = columns


def _count_before(steps: int, rows: Sequence[Mapping[str, str]]) -> int:
    """How many rows, which are in the order of time, were logged in the first `steps` optimizer steps."""
    numbered = [(float(row["step"]), place) for place, row in enumerate(rows) if row["step"]]
    # Of the steps before, the highest is the optimizer's; those that are epochs are lower, and may be of a later time.
    last = max((one for one in numbered if one[0] < steps), key=lambda one: one[0], default=(0.0, -1))[1]
    end = next((place for step, place in numbered if step >= steps and place > last), len(rows))
    return max((place + 1 for _, place in numbered if place < end), default=0)


def _writer(file: Any, columns: list[str]) -> "csv.DictWriter[str]":
    return csv.DictWriter(file, columns, restval="", lineterminator="\n")


def _read(path: Path) -> tuple[list[str], list[dict[str, str]]]:
    text = path.read_text()
    reader = csv.DictReader(text[: text.rfind("\n") + 1].splitlines())  # a kill may have cut the last row short
    return list(reader.fieldnames or ()), list(reader)
