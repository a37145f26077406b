"""Which weights, ramps and learning rate should gates have by default? One setting is changed at a time.

python experiments/polarization/defaults.py             # LeNet-300-100 on digits, half of the FLOPs; about 10 minutes
python experiments/polarization/defaults.py --report    # only the table of results/defaults.json

Stopped, it goes on where it was.
"""

import argparse
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sparsetrain.cli.grid import Grid, by_arm, difference, in_points, origin, write_between
from sparsetrain.report import markdown_table, t_interval

HERE = Path(__file__).parent
RESULTS = HERE / "results" / "defaults.json"
SEEDS = (1, 2, 3, 4, 5)
BASE = "gate_lr=0.01, a=10, b=100"
RECIPE = (
    *("+experiment=digits_polarize", "method.gate_lr=0.01"),
    *("method.polarization.final=10.0", "method.budget.final=100.0"),
)
ARMS = {
    BASE: (),
    "gate_lr=0.001": ("method.gate_lr=0.001",),
    "gate_lr=0.1": ("method.gate_lr=0.1",),
    "a=0": ("method.polarization.final=0.0",),
    "a=1": ("method.polarization.final=1.0",),
    "a=100": ("method.polarization.final=100.0",),
    "b=10": ("method.budget.final=10.0",),
    "b=1000": ("method.budget.final=1000.0",),
    "static gates": ("method.hidden=null",),
}


def facts(summary: Mapping[str, Any]) -> dict[str, Any]:
    """What is kept of a run beside its test accuracy: what the gates agreed on."""
    return {name: summary["extraction"][name] for name in ("cost", "gates", "undecided", "overruled")}


def table(results: Mapping[str, Any]) -> str:
    """Accuracy and agreement of each setting, beside the one that the others differ from."""
    found = by_arm(results, [*ARMS])
    lines = []
    for arm, runs in found.items():
        accuracy = t_interval([run["test_accuracy"] for run in runs])
        less = in_points(difference(runs, found[BASE])) if arm != BASE else ()
        gates = runs[0]["gates"]
        undecided = sum(run["undecided"] for run in runs) / len(runs)
        overruled = sum(run["overruled"] for run in runs) / len(runs) / gates
        measured = f"{accuracy.mean:.2%} +- {accuracy.std:.2%}"
        lines.append((arm, measured, len(runs), " ".join(less), f"{undecided:.1%}", f"{overruled:.1%}"))
    header = ("setting", "test accuracy", "seeds", "less the first, points", "gates undecided", "overruled")
    return f"{markdown_table(header, lines)}\n\n{origin(results)}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--report", action="store_true", help="only the table of results/defaults.json")
    parser.add_argument("--workers", type=int, default=2, help="runs at a time")
    arguments = parser.parse_args()
    if not arguments.report:
        grid = Grid("defaults", RECIPE, ARMS, Path("runs/polarization/defaults"), RESULTS, facts)
        grid.measure([(arm, seed) for arm in ARMS for seed in SEEDS], arguments.workers)
    write_between(HERE / "README.md", "defaults", table(json.loads(RESULTS.read_text())))


if __name__ == "__main__":
    main()
