"""Train LeNet-300-100 on real digits to 80 % sparsity, beside its dense control, and print the two in one table.

    python experiments/demo.py              # run folders below runs/demo

The dense run is the same code with the same seed, data order and learning rate; only the callback is missing.
"""

import json
import shutil
from pathlib import Path
from typing import Any

from sparsetrain.cli.train import compose, train
from sparsetrain.report import markdown_table

FOLDER = Path("runs/demo")
RUNS = {"dense": "digits_dense", "sparse": "digits_gmp"}


def run(experiment: str, folder: Path) -> dict[str, Any]:
    """Train as the experiment's file says, on the CPU, and return its summary."""
    shutil.rmtree(folder, ignore_errors=True)  # that of an earlier demo
    train(compose(f"+experiment={experiment}", "trainer=cpu", "trainer.enable_progress_bar=false", output_dir=folder))
    summary: dict[str, Any] = json.loads((folder / "summary.json").read_text())
    return summary


def main() -> None:
    summaries = {label: run(experiment, FOLDER / label) for label, experiment in RUNS.items()}
    weights = summaries["sparse"]["maskable"]
    rows = [
        (
            label,
            f"{summary['val']['accuracy']:.2%}",
            f"{summary['test']['accuracy']:.2%}",
            f"{summary['sparsity']:.2%}",
            f"{summary['kept'] or weights:,} / {weights:,}",
            f"{summary['wall_time_s']:.1f}",
            str(FOLDER / label),
        )
        for label, summary in summaries.items()
    ]
    print()
    print(
        markdown_table(("run", "val accuracy", "test accuracy", "sparsity", "weights kept", "seconds", "folder"), rows)
    )


if __name__ == "__main__":
    main()
