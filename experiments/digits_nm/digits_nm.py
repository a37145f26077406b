"""What do N:M weights cost in accuracy while the network trains? LeNet-300-100 on digits, beside its dense control.

python experiments/digits_nm/digits_nm.py             # goes on where it was stopped
python experiments/digits_nm/digits_nm.py --report    # only the tables of its results
"""

import argparse
import json
import logging
import multiprocessing
from collections.abc import Mapping
from concurrent.futures import ProcessPoolExecutor
from datetime import date
from pathlib import Path
from typing import Any

import torch

from sparsetrain.cli.artifacts import git_state
from sparsetrain.cli.train import compose, train
from sparsetrain.report import markdown_table, paired, t_interval

HERE = Path(__file__).parent
RESULTS, README = HERE / "results" / "digits_nm.json", HERE / "README.md"
BEGIN, END = "<!-- table:begin -->", "<!-- table:end -->"
RUNS = Path("runs/digits_nm")

SEEDS = (1, 2, 3, 4, 5)
STRAIGHT = ("+experiment=digits_dense", "method=straight_through")
ARMS: dict[str, tuple[str, ...]] = {
    "dense": ("+experiment=digits_dense",),
    "BDWP 2:4": ("+experiment=digits_bdwp",),
    "BDWP 1:4": ("+experiment=digits_bdwp", "method.n=1"),
    "STE 2:4": (*STRAIGHT, "method.decay=0.0"),
    "SR-STE 2:4": STRAIGHT,
    "SR-STE 1:4": (*STRAIGHT, "method.n=1"),
    "transposable 2:4": (*STRAIGHT, "method.transposable=true", "method.decay=0.0"),
}
BAR = "> -1.0"


def run(arm: str, seed: int) -> dict[str, Any]:
    """The summary of a run, which is made unless its folder holds it whole."""
    folder = RUNS / f"{arm.replace(' ', '-').replace(':', '')}-{seed}"
    path = folder / "summary.json"
    summary: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
    if "wall_time_s" not in summary:
        quiet = ("trainer=cpu", "trainer.enable_progress_bar=false", f"seed={seed}")
        train(compose(*ARMS[arm], *quiet, output_dir=folder))
        summary = json.loads(path.read_text())
    return summary


def measure(workers: int) -> dict[str, Any]:
    """Test accuracies of every arm and seed, several runs at a time."""
    with ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"), _one_thread) as pool:
        jobs = {arm: [pool.submit(run, arm, seed) for seed in SEEDS] for arm in ARMS}
        summaries = {arm: [job.result() for job in done] for arm, done in jobs.items()}
    facts = summaries["dense"][0]
    return {
        "date": date.today().isoformat(),
        "git": git_state(),
        "versions": facts["versions"],
        "device": facts["device"],
        "seeds": SEEDS,
        "sparsity": {arm: found[0]["sparsity"] for arm, found in summaries.items()},
        "test_accuracy": {arm: [one["test"]["accuracy"] for one in found] for arm, found in summaries.items()},
    }


def _one_thread() -> None:
    torch.set_num_threads(1)
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)


def table(results: Mapping[str, Any]) -> str:
    """Accuracy of each arm, and its difference from dense, paired by seed."""
    accuracy, lines = results["test_accuracy"], []
    for arm, values in accuracy.items():
        every = t_interval(values)
        row = [arm, f"{results['sparsity'][arm]:.1%}", f"{every.mean:.2%} +- {every.std:.2%}", "", "", ""]
        if arm != "dense":
            found = paired([one - dense for one, dense in zip(values, accuracy["dense"], strict=True)])
            row[3:5] = [f"{100 * found.mean:+.2f}", f"[{100 * found.low:+.2f}, {100 * found.high:+.2f}]"]
        if arm == "BDWP 2:4":
            row[5] = BAR
        lines.append(tuple(row))
    header = ("method", "sparsity", "test accuracy", "less dense, points", "95 % interval", "bar")
    return markdown_table(header, lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--report", action="store_true", help="only the tables of results/digits_nm.json")
    parser.add_argument("--workers", type=int, default=2, help="runs at a time")
    arguments = parser.parse_args()
    if not arguments.report:
        results = measure(arguments.workers)
        RESULTS.parent.mkdir(exist_ok=True)
        RESULTS.write_text(json.dumps(results, indent=1) + "\n")
    results = json.loads(RESULTS.read_text())
    commit = results["git"]["commit"][:10] if results["git"] else "none"
    software = ", ".join(f"{name} {version}" for name, version in results["versions"].items())
    facts = f"{len(results['seeds'])} seeds; CPU, 1 thread a run; {software}; {results['date']}, commit {commit}."
    before, _, rest = README.read_text().partition(BEGIN)
    README.write_text(f"{before}{BEGIN}\n{table(results)}\n\n{facts}\n{END}{rest.partition(END)[2]}")


if __name__ == "__main__":
    main()
