"""What does a smaller network cost in accuracy? Gates beside narrower dense networks and magnitude channel pruning.

python experiments/polarization/gates_accuracy.py digits      # LeNet-300-100 on scikit-learn's digits
python experiments/polarization/gates_accuracy.py resnet20    # ResNet-20 of half the width on CIFAR-10 at 8x8
python experiments/polarization/gates_accuracy.py --report    # only the tables of results/*.json

Stopped, it goes on where it was.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sparsetrain.cli.grid import Grid, by_arm, command_line, difference, in_points, origin, write_between
from sparsetrain.report import markdown_table, t_interval

HERE = Path(__file__).parent
RESULTS = HERE / "results"
SEEDS = (1, 2, 3, 4, 5)
DENSE, GATES, CHANNELS, NARROW = "dense", "gates", "magnitude channels", "narrower dense"
SHARES = ("30%", "50%")
BAR = 0.5  # points that gates may be below another network of as many FLOPs


@dataclass(frozen=True)
class Task:
    """A network and its data.

    Args:
        title: what tables call it.
        recipe: Hydra overrides of every run, which are equally long.
        reads: globs over the weights that read the gated channels, for magnitude channel pruning.
        sparsities: share of FLOPs removed -> sparsity of these weights that leaves the FLOPs, or a few more.
        narrow: share of FLOPs removed -> overrides of a narrower dense network that has the FLOPs left, or more.
    """

    title: str
    recipe: tuple[str, ...]
    reads: str
    sparsities: Mapping[str, float]
    narrow: Mapping[str, tuple[str, ...]]

    @property
    def arms(self) -> dict[str, tuple[str, ...]]:
        """Name -> overrides."""
        arms: dict[str, tuple[str, ...]] = {DENSE: ()}
        for share in SHARES:
            removed = int(share.removesuffix("%")) / 100
            arms[f"{GATES} {share}"] = ("method=polarize", f"method.sparsity={removed}")
            if share in self.narrow:
                arms[f"{NARROW} {share}"] = self.narrow[share]
            arms[f"{CHANNELS} {share}"] = (
                *("method=gmp", "pattern=channel", "allocation=uniform", f"method.pruning.where.include={self.reads}"),
                *("schedule=cubic", f"method.schedule.final={self.sparsities[share]}"),
                *("method.schedule.begin=0.1run", "method.schedule.end=0.7run", "method.schedule.every=10it"),
            )
        return arms

    def grid(self, name: str) -> Grid:
        """All of its runs."""
        return Grid(name, self.recipe, self.arms, Path("runs/polarization") / name, RESULTS / f"{name}.json", facts)


TASKS = {
    "digits": Task(
        "LeNet-300-100, digits",
        ("+experiment=digits_dense",),
        "[network.fc2.weight,network.fc3.weight]",
        {"30%": 0.2, "50%": 0.36},
        {},
    ),
    "resnet20": Task(
        "ResNet-20 of half the width, CIFAR-10 at 8x8",
        (
            *("+experiment=resnet20_dense", "model.width=8", "dataset.size=8", "dataset.shift=1"),
            *("dataset.batch_size=512", "optim.lr=0.4", "lr_policy=cosine", "lr_policy.warmup=1ep"),
            *("trainer.max_epochs=20", "module.channels_last=true"),
        ),
        "['*.conv2.weight']",
        {"30%": 0.3, "50%": 0.52},
        {"30%": ("model.width=7",), "50%": ("model.width=6",)},
    ),
}


def facts(summary: Mapping[str, Any]) -> dict[str, Any]:
    """What is kept of a run beside its test accuracy: FLOPs of one example and of the training, and the gates."""
    left = summary.get("shrunk", {"flops": summary["dense_flops"]})
    return {"flops": left["flops"], "training_flops": summary["training_flops"], **_of_gates(summary)}


def _of_gates(summary: Mapping[str, Any]) -> dict[str, Any]:
    extraction = summary.get("extraction")
    return {} if extraction is None else {name: extraction[name] for name in ("gates", "undecided", "overruled")}


def table(results: Mapping[str, Any]) -> str:
    """FLOPs and accuracy of each network, and what gates are above those of as many FLOPs."""
    found = by_arm(results, [*TASKS[results["task"]].arms])
    dense = found[DENSE][0]["flops"]
    lines = []
    for arm, runs in found.items():
        accuracy = t_interval([run["test_accuracy"] for run in runs])
        gates = found.get(f"{GATES} {arm.rpartition(' ')[2]}")
        less = in_points(difference(gates, runs)) if gates and gates is not runs else ("", "")
        drop = in_points(difference(runs, found[DENSE])) if arm != DENSE else ()
        flops = [run["flops"] / dense for run in runs]
        share = f"{min(flops):.1%}" if max(flops) - min(flops) < 5e-4 else f"{min(flops):.1%} to {max(flops):.1%}"
        lines.append((arm, share, f"{accuracy.mean:.2%} +- {accuracy.std:.2%}", len(runs), " ".join(drop), *less))
    header = (
        "network",
        "FLOPs left",
        "test accuracy",
        "seeds",
        "less dense, points",
        "gates less this",
        "95 % interval",
    )
    return f"{markdown_table(header, lines)}\n\n{gates_words(found)}\n\n{origin(results)}"


def gates_words(found: Mapping[str, list[dict[str, Any]]]) -> str:
    """How gates fared against networks of as many FLOPs, seed by seed, and how far they agreed."""
    words = []
    for share in SHARES:
        gated = {run["seed"]: run for run in found.get(f"{GATES} {share}", [])}
        for arm in (NARROW, CHANNELS):
            others = [run for run in found.get(f"{arm} {share}", []) if run["seed"] in gated]
            above = [gated[run["seed"]]["test_accuracy"] - run["test_accuracy"] for run in others]
            if above:
                wins, losses = sum(value > 0 for value in above), sum(value < 0 for value in above)
                words.append(f"Gates at {share} against {arm}: wins {wins}, losses {losses}.")
        if gated:
            undecided = max(run["undecided"] for run in gated.values())
            overruled = max(run["overruled"] for run in gated.values())
            words.append(f"At {share} at most {undecided:.1%} of the gates were undecided, and {overruled} overruled.")
    return " ".join(words)


def measure(name: str, workers: int) -> None:
    """Make the runs that results/NAME.json does not hold, seed by seed."""
    grid = TASKS[name].grid(name)
    grid.measure([(arm, seed) for seed in SEEDS for arm in grid.arms], workers)


def report() -> None:
    """Write the tables of each task that has results."""
    for path in (RESULTS / f"{name}.json" for name in TASKS):
        if path.exists():
            write_between(HERE / "README.md", path.stem, table(json.loads(path.read_text())))


if __name__ == "__main__":
    command_line(__doc__, TASKS, measure, report)
