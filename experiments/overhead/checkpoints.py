"""How large the checkpoints of many rounds are, beside that of the same run without a method.

python experiments/overhead/checkpoints.py             # writes results/checkpoints.json, then
python experiments/overhead/checkpoints.py --report    # the table of this folder's README.md
"""

import argparse
import json
import logging
import tempfile
import warnings
from datetime import date
from importlib import metadata
from pathlib import Path
from typing import Any

import lightning as L
import torch
from overhead import SIDE, Task, sgd
from torch.utils.data import DataLoader

from sparsetrain import IterativeMagnitudePruning
from sparsetrain.cli.artifacts import git_state
from sparsetrain.report import markdown_table, write_between

HERE = Path(__file__).parent
RESULTS, README = HERE / "results" / "checkpoints.json", HERE / "README.md"

BAR = 2.0
RECIPES: dict[str, dict[str, str]] = {
    "learning-rate rewinding (the default)": {},
    "weight rewinding, optimizer reset (`LotteryTicketRewinding`)": {"weights": "rewind", "optimizer_state": "reset"},
    "weight rewinding, optimizer rewound": {"weights": "rewind", "optimizer_state": "snapshot"},
}


class Sizes(L.Callback):
    """Saves after each step and keeps the sizes of the files."""

    def __init__(self) -> None:
        self.bytes: list[int] = []

    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        with tempfile.TemporaryDirectory() as folder:
            trainer.save_checkpoint(f"{folder}/checkpoint.ckpt")
            self.bytes.append(Path(folder, "checkpoint.ckpt").stat().st_size)


def sizes(*callbacks: L.Callback) -> list[int]:
    """Bytes of the checkpoint after each of 5 steps of ResNet-50: 3 of a dense phase, 2 of a round from step 1."""
    batch = (torch.randn(2, 3, SIDE, SIDE), torch.randint(0, 10, (2,)))
    saved = Sizes()
    trainer = L.Trainer(
        max_steps=5,
        accelerator="cpu",
        callbacks=[*callbacks, saved],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(Task(sgd), DataLoader([batch] * 5, batch_size=None))
    return saved.bytes


def measure() -> dict[str, Any]:
    """The sizes of each recipe."""
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.simplefilter("ignore")
    plain = sizes()
    recipes = {
        name: sizes(IterativeMagnitudePruning(1, "3it", sparsity=0.8, rewind_to="1it", **choices))
        for name, choices in RECIPES.items()
    }
    return {
        "date": date.today().isoformat(),
        "git": git_state(),
        "versions": {name: metadata.version(name) for name in ("sparsetrain", "torch", "lightning", "timm")},
        "plain_bytes": plain,
        "recipe_bytes": recipes,
    }


def table(results: dict[str, Any]) -> str:
    """The largest checkpoint of each recipe."""
    plain = max(results["plain_bytes"])
    lines = [("no method", f"{plain:,}", "1.000", "")]
    for name, measured in results["recipe_bytes"].items():
        lines.append((name, f"{max(measured):,}", f"{max(measured) / plain:.3f}", f"<= {BAR:g}"))
    return markdown_table(("run", "bytes of its largest checkpoint", "ratio", "bar"), lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--report", action="store_true", help="only write the table of results/checkpoints.json")
    if not parser.parse_args().report:
        RESULTS.write_text(json.dumps(measure(), indent=1) + "\n")
    results = json.loads(RESULTS.read_text())
    write_between(README, "rounds", table(results))


if __name__ == "__main__":
    main()
