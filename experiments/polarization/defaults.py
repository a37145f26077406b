"""Which weights, ramps and learning rate should gates have by default? One setting is changed at a time.

python experiments/run.py polarization/defaults    # LeNet-300-100 on digits, half of the FLOPs; about 10 minutes
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from evidence import Study

from sparsetrain.cli.grid import origin
from sparsetrain.report import markdown_table, t_interval

BASE = "gate_lr=0.01, a=10, b=100"
RECIPE = (
    *("+experiment=digits_polarize", "method.gate_lr=0.01", "method.end=0.5run"),
    *("method.polarization.final=10.0", "method.budget=100.0"),
)
ARMS = {
    BASE: (),
    "gate_lr=0.001": ("method.gate_lr=0.001",),
    "gate_lr=0.1": ("method.gate_lr=0.1",),
    "a=0": ("method.polarization.final=0.0",),
    "a=1": ("method.polarization.final=1.0",),
    "a=100": ("method.polarization.final=100.0",),
    "b=10": ("method.budget=10.0",),
    "b=1000": ("method.budget=1000.0",),
    "the whole budget at once": ("method.end=0.06run", "method.polarization.begin=0.1run"),
    "static gates": ("method.hidden=null",),
}


def facts(summary: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """What is kept of a run beside its test accuracy: what the gates agreed on."""
    return {name: summary["extraction"][name] for name in ("cost", "gates", "undecided", "overruled")}


class SettingsStudy(Study):
    """Its table has what the gates agreed on."""

    def table(self, results: Mapping[str, Any]) -> str:
        found, lines = self.networks(results), []
        for arm, runs in found.items():
            accuracy = t_interval([run["test_accuracy"] for run in runs])
            gates = runs[0]["gates"]
            undecided = sum(run["undecided"] for run in runs) / len(runs)
            overruled = sum(run["overruled"] for run in runs) / len(runs) / gates
            measured = f"{accuracy.mean:.2%} +- {accuracy.std:.2%}"
            lines.append(
                (
                    arm,
                    measured,
                    len(runs),
                    " ".join(self.less_control(found, arm)).strip(),
                    f"{undecided:.1%}",
                    f"{overruled:.1%}",
                )
            )
        header = ("setting", "test accuracy", "seeds", "less the first, points", "gates undecided", "overruled")
        return f"{markdown_table(header, lines)}\n\n{origin(results)}"


STUDIES = (
    SettingsStudy(
        name="polarization/defaults",
        title="LeNet-300-100, digits, half of the FLOPs",
        question="Which settings should gates have by default?",
        recipe=RECIPE,
        arms=ARMS,
        control=BASE,
        claims=(),
        stages=[[arm] for arm in ARMS],
        facts=facts,
    ),
)
