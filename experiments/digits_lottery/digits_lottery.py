"""Does a ticket owe its accuracy to its masks and to its weights? LeNet-300-100 on digits, beside its controls.

    python experiments/digits_lottery/digits_lottery.py             # goes on where it was stopped
    python experiments/digits_lottery/digits_lottery.py --report    # only tables and picture of its results

For each seed and sparsity: a run of `+experiment=digits_imp`, and for the masks of each of its rounds the controls.
"""

import argparse
import json
import logging
import multiprocessing
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from datetime import date
from pathlib import Path
from typing import Any

import torch

from sparsetrain import Ticket, load_masks
from sparsetrain.cli.artifacts import git_state
from sparsetrain.cli.train import compose, train
from sparsetrain.report import Interval, draw_accuracy, markdown_table, paired, t_interval, write_between

HERE = Path(__file__).parent
RESULTS, PICTURE = HERE / "results" / "digits_lottery.json", HERE / "accuracy.png"
READMES = (HERE / "README.md", HERE.parents[1] / "README.md")
RUNS = Path("runs/digits_lottery")

SEEDS = (1, 2, 3, 4, 5)
SPARSITIES = (0.8, 0.9)
CONTROLS = ("random_mask", "reinit", "random_mask_reinit")
OTHER_INIT = 1000  # added to a seed: another initialisation
QUIET = ("trainer=cpu", "trainer.enable_progress_bar=false")


def run(experiment: str, folder: Path, seed: int, *overrides: str) -> dict[str, Any]:
    """The summary of a run, which is made unless its folder holds it whole."""
    path = folder / "summary.json"
    summary: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
    if "wall_time_s" not in summary:
        train(compose(f"+experiment={experiment}", *QUIET, f"seed={seed}", *overrides, output_dir=folder))
        summary = json.loads(path.read_text())
    return summary


def run_control(found: Path, number: int, control: str, folder: Path, seed: int) -> dict[str, Any]:
    """Train the masks of round `number` of the run in folder `found` as `control` says."""
    ticket = found / "rounds" / str(number) / "ticket.safetensors"
    if not ticket.exists():
        whole = Ticket.load(found / "ticket.safetensors")
        Ticket(whole.weights, load_masks(ticket.with_name("masks.safetensors")), whole.origin).save(ticket)
    choices = ("method.rounds=0", "method.sparsity=null", f"method.ticket={ticket}", f"method.control={control}")
    return run("digits_lottery", folder, seed, *choices, f"init_seed={seed + OTHER_INIT}")


def of_seed(seed: int, sparsity: float, folder: Path) -> dict[str, Any]:
    """Test accuracies of one seed: the dense phase, each round, and the controls of each round."""
    found = folder / f"imp-{sparsity}-{seed}"
    rounds = run("digits_imp", found, seed, f"method.sparsity={sparsity}")["rounds"]
    controls = {
        control: [
            run_control(found, number, control, folder / f"{control}-{sparsity}-{seed}-{number}", seed)
            for number in range(1, len(rounds))
        ]
        for control in CONTROLS
    }
    return {
        "seed": seed,
        "sparsity": sparsity,
        "sparsities": [entry["sparsity"] for entry in rounds],
        "dense": rounds[0]["test/accuracy"],
        "ticket": [entry["test/accuracy"] for entry in rounds[1:]],
        **{control: [summary["test"]["accuracy"] for summary in runs] for control, runs in controls.items()},
    }


def measure(workers: int) -> dict[str, Any]:
    """All seeds and sparsities, several at a time."""
    with ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"), _one_thread) as pool:
        equal = {seed: pool.submit(run, "digits_dense_equal", RUNS / f"dense_equal-{seed}", seed) for seed in SEEDS}
        jobs = [pool.submit(of_seed, seed, sparsity, RUNS) for sparsity in SPARSITIES for seed in SEEDS]
        rows = [job.result() for job in jobs]
        rows = [{**row, "dense_equal": equal[row["seed"]].result()["test"]["accuracy"]} for row in rows]
    facts = json.loads((RUNS / f"imp-{SPARSITIES[0]}-{SEEDS[0]}" / "summary.json").read_text())
    return {
        "date": date.today().isoformat(),
        "git": git_state(),
        "versions": facts["versions"],
        "device": facts["device"],
        "command": "python experiments/digits_lottery/digits_lottery.py",
        "rows": rows,
    }


def _one_thread() -> None:
    torch.set_num_threads(1)
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)


def tables(results: Mapping[str, Any]) -> str:
    """Accuracies and all differences."""
    return f"{accuracy_table(results['rows'])}\n\n{difference_table(results['rows'], SPARSITIES)}"


def bars_table(results: Mapping[str, Any]) -> str:
    """The differences at the sparsity that has bars."""
    return difference_table(results["rows"], SPARSITIES[:1])


def accuracy_table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Test accuracy of the last round and its controls, mean +- standard deviation over seeds."""
    lines = []
    for sparsity in SPARSITIES:
        of = [row for row in rows if row["sparsity"] == sparsity]
        for name, label in LABELS.items():
            values = [row[name] if name.startswith("dense") else row[name][-1] for row in of]
            every = t_interval(values)
            shown = 0.0 if name.startswith("dense") else sparsity
            lines.append((label, f"{shown:.0%}", f"{every.mean:.2%} +- {every.std:.2%}", str(every.n)))
    return markdown_table(("network", "sparsity", "test accuracy", "seeds"), list(dict.fromkeys(lines)))


LABELS = {
    "dense": "dense, 40 epochs",
    "dense_equal": "dense, 220 epochs, the same restarts",
    "ticket": "ticket (round 5)",
    "random_mask": "its weights, random masks",
    "reinit": "its masks, another initialisation",
    "random_mask_reinit": "random masks, another initialisation",
}


def difference_table(rows: Sequence[Mapping[str, Any]], sparsities: Sequence[float]) -> str:
    """Paired differences in points, with their 95 % intervals and the bars."""
    bars = {"dense": ">= -1.0", "random_mask": ">= +1.0", "reinit": "> 0"}
    lines = []
    for sparsity in sparsities:
        for name, found in differences(rows, sparsity).items():
            bar = bars.get(name, "") if sparsity == SPARSITIES[0] else ""
            interval = f"[{100 * found.low:+.2f}, {100 * found.high:+.2f}]"
            lines.append((f"ticket - {LABELS[name]}", f"{sparsity:.0%}", f"{100 * found.mean:+.2f}", interval, bar))
    return markdown_table(("difference", "sparsity", "points", "95 % interval", "bar"), lines)


def differences(rows: Sequence[Mapping[str, Any]], sparsity: float) -> dict[str, Interval]:
    """Accuracy of the ticket minus that of each other network of the same seed."""
    of = [row for row in rows if row["sparsity"] == sparsity]
    found = {}
    for name in LABELS:
        others = [row[name] if name.startswith("dense") else row[name][-1] for row in of]
        if name != "ticket":
            found[name] = paired([row["ticket"][-1] - other for row, other in zip(of, others, strict=True)])
    return found


def draw(rows: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Test accuracy against sparsity, over the rounds of every sparsity."""

    def points(name: str) -> list[tuple[float, list[float]]]:
        values: dict[float, list[float]] = {}
        for row in rows:
            for sparsity, accuracy in zip(row["sparsities"][1:], row[name], strict=True):
                values.setdefault(sparsity, []).append(accuracy)
        return sorted(values.items())

    dense = [row["dense"] for row in rows if row["sparsity"] == rows[0]["sparsity"]]
    controls = {LABELS[name]: points(name) for name in CONTROLS if name in rows[0]}
    draw_accuracy(path, {"ticket": points("ticket")}, dense=dense, controls=controls)


def write_report(results: Mapping[str, Any]) -> None:
    """Draw the picture and put the tables into the READMEs."""
    rows, versions = results["rows"], results["versions"]
    draw(rows, PICTURE)
    commit = results["git"]["commit"][:10] if results["git"] else "none"
    software = ", ".join(f"{name} {version}" for name, version in versions.items())
    facts = f"CPU, 1 thread a run; {software}; {results['date']}, commit {commit}."
    own, project = READMES
    write_between(own, "lottery", f"{tables(results)}\n\n{facts}")
    source = (
        "Made by `python experiments/digits_lottery/digits_lottery.py` from "
        "[its results](experiments/digits_lottery/results/digits_lottery.json)."
    )
    write_between(project, "lottery", f"{bars_table(results)}\n\n{facts} {source}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--report", action="store_true", help="only tables and picture of results/digits_lottery.json")
    parser.add_argument("--workers", type=int, default=2, help="runs at a time")
    arguments = parser.parse_args()
    if not arguments.report:
        results = measure(arguments.workers)
        RESULTS.parent.mkdir(exist_ok=True)
        RESULTS.write_text(json.dumps(results, indent=1) + "\n")
    write_report(json.loads(RESULTS.read_text()))


if __name__ == "__main__":
    main()
