"""Retraining after each round of pruning: with the learning rate rewound, with the weights, or with neither.

python experiments/run.py rewinding/resnet20                # small, on a CPU
python experiments/run.py rewinding/full --device gpu       # the published recipe
"""

import csv
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from evidence import HERE, SMALL, SMALL_TITLE, Above, Alike, Claim, Found, Reaches, Study, full, of_rounds

from sparsetrain.cli.grid import origin
from sparsetrain.report import draw_accuracy, markdown_table, t_interval

DENSE, RATES, WEIGHTS, TUNED, START = "dense", "LR rewinding", "weight rewinding", "fine-tuning", "rewinding to init"
ROUNDS = (RATES, WEIGHTS, TUNED, START)
PUBLISHED = HERE / "rewinding" / "published.csv"
TRIALS = 3  # of each published median
SPAN = 1.693  # standard deviations that 3 values of a normal distribution are apart on average, the highest and lowest


@dataclass(frozen=True)
class RewindingStudy(Study):
    """What it compares are the networks at the end of each round, by the share of weights that is left.

    Args:
        medians: what was published of the same recipe, as `published` gives it; the picture has it as crosses.
    """

    medians: Sequence[Mapping[str, Any]] = ()

    def networks(self, results: Mapping[str, Any]) -> Found:
        found = super().networks(results)
        by_density: dict[str, list[dict[str, Any]]] = {}
        for arm, runs in found.items():
            for run in runs:
                for one in run["rounds"][1:]:  # after the dense phase
                    by_density.setdefault(at(arm, 1 - one["sparsity"]), []).append({**run, **one})
        return {**({DENSE: found[DENSE]} if DENSE in found else {}), **by_density}

    def table(self, results: Mapping[str, Any]) -> str:
        found = self.networks(results)
        densities = {f"{1 - runs[0]['sparsity']:.1%}": runs[0]["sparsity"] for runs in found.values()}
        lines = []
        for density in sorted(densities, key=densities.__getitem__):
            dense = densities[density] == 0
            of_arms = [found.get(DENSE if dense else f"{arm}, {density}", []) for arm in ROUNDS]
            lines.append((density, *map(_accuracy, of_arms), max(map(len, of_arms))))
        header = ("weights left", *ROUNDS, "seeds")
        return "\n\n".join((markdown_table(header, lines), self.claims_table(results), origin(results)))

    def draw(self, results: Mapping[str, Any], path: Path) -> None:
        found = self.networks(results)
        curves: dict[str, list[tuple[float, list[float]]]] = {}
        for name, runs in found.items():
            if name != DENSE:
                accuracies = [run["test_accuracy"] for run in runs]
                curves.setdefault(name.rpartition(",")[0], []).append((runs[0]["sparsity"], accuracies))
        if curves:
            dense = [run["test_accuracy"] for run in found[DENSE]]
            crosses: dict[str, list[tuple[float, float]]] = {}
            for one in (one for one in self.medians if one["retraining"] in curves):
                crosses.setdefault(one["retraining"], []).append((1 - one["density"], one["median"] / 100))
            draw_accuracy(path, curves, dense=dense, published=crosses)


def _accuracy(runs: Sequence[Mapping[str, Any]]) -> str:
    if len(runs) < 2:
        return ""
    every = t_interval([run["test_accuracy"] for run in runs])
    return f"{every.mean:.2%} +- {every.std:.2%}"


def at(arm: str, density: float) -> str:
    """Name of the networks of an arm that have this share of their weights."""
    return f"{arm}, {density:.1%}"


def published() -> list[dict[str, Any]]:
    """Test accuracies of ResNet-20 on CIFAR-10 in per cent: median, lowest and highest of 3 trials.

    Iterative pruning of a fifth of the weights, all layers in one ranking, 182 epochs of retraining (170 after weight
    rewinding to epoch 12). Taken from the results that Renda et al. 2020, arXiv:2003.02389, released with their code.
    """
    with PUBLISHED.open(newline="") as file:
        rows = list(csv.DictReader(file))
    return [{key: row[key] if key == "retraining" else float(row[key]) for key in row} for row in rows]


def reached(densities: Sequence[float]) -> list[Claim]:
    """Whether the published medians at these densities are reached."""
    return [
        Reaches(
            at(row["retraining"], row["density"]),
            row["median"],
            (row["highest"] - row["lowest"]) / SPAN,
            TRIALS,
            of="median",
        )
        for row in published()
        if round(row["density"], 3) in densities
    ]


def facts(summary: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """What is kept of a run beside its test accuracy: its rounds."""
    return {"rounds": of_rounds(summary)}


def arms(rounds: tuple[str, ...], rewind_to: int) -> dict[str, tuple[str, ...]]:
    """Name -> overrides; weights are rewound to the end of an epoch."""
    rounds = ("method=imp", "method.sparsity=null", *rounds, "trainer.max_epochs=-1")
    rewound = (*rounds, "method.weights=rewind")
    return {
        DENSE: (),
        RATES: rounds,
        WEIGHTS: (*rewound, f"method.rewind_to={rewind_to}ep", "method.optimizer_state=snapshot"),
        TUNED: (*rounds, "retrain=last"),
        START: (*rewound, "method.rewind_to=0it", "method.optimizer_state=reset"),
    }


SPARSEST = 0.1074  # of all weights
ORDER = (
    Alike(at(RATES, SPARSEST), at(WEIGHTS, SPARSEST), 0.5),
    Above(at(RATES, SPARSEST), at(TUNED, SPARSEST)),
    Above(at(WEIGHTS, SPARSEST), at(TUNED, SPARSEST)),
    Above(at(TUNED, SPARSEST), at(START, SPARSEST)),
)
QUESTION = "Which way of retraining is best after pruning?"

STUDIES = (
    RewindingStudy(
        name="rewinding/resnet20",
        title=f"{SMALL_TITLE}, 12 epochs a round, 3 rounds to 10.7 % of the weights",
        question=QUESTION,
        published="ResNet-20 at 10.74 %: LR 91.01, weights 91.00, fine-tuning 89.33, init 86.67 (Renda et al. 2020)",
        recipe=(*SMALL, "trainer.max_epochs=12", "lr_policy.milestones=[6ep,9ep]", "module.channels_last=true"),
        arms=arms(("method.rounds=3", "method.per_round=0.525", "method.round_length=12ep"), rewind_to=1),
        control=DENSE,
        claims=ORDER,
        facts=facts,
    ),
    RewindingStudy(
        name="rewinding/full",
        title="ResNet-20, CIFAR-10, 182 epochs a round, 10 rounds to 10.7 % of the weights",
        question=QUESTION,
        published="each bar of the first kind (Renda et al. 2020)",
        recipe=full(182),
        arms=arms(("method.rounds=10", "method.per_round=0.2", "method.round_length=182ep"), rewind_to=12),
        control=DENSE,
        claims=(Reaches(DENSE, 91.71, 0.23, TRIALS), *reached((0.21, 0.107)), *ORDER),
        seeds=(1, 2, 3),
        facts=facts,
        medians=published(),
    ),
)
