"""One ranking over all layers: does it cut the network, and does a minimum for each help? Beside the dense network.

python experiments/run.py collapse/resnet20
python experiments/run.py collapse/plain20     # without shortcuts
python experiments/run.py collapse/full --device gpu
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from evidence import SMALL_TITLE, Above, Claim, Found, Line, Study, cubic, full, small

from sparsetrain.cli.grid import origin
from sparsetrain.report import markdown_table, t_interval

DENSE = "dense"
SHARES = ("98%", "99%", "99.5%")
MINIMUM = 0.0002  # of all weights, in every layer


@dataclass(frozen=True)
class Empties(Claim):
    """Whether layers of an arm are left without any weight.

    Args:
        arm: the one.
        some: True: in each run there is one; False: in none.
    """

    arm: str
    some: bool

    def check(self, found: Found) -> Line | None:
        if self.arm not in found:
            return None
        empty = [run["empty"] for run in found[self.arm]]
        holds = all((count > 0) == self.some for count in empty)
        bar = "at least 1 in each run" if self.some else "0 in each run"
        words = f"empty layers of {self.arm}"
        return Line(words, f"{min(empty)} to {max(empty)}", len(empty), bar, "yes" if holds else "no")


class CollapseStudy(Study):
    """Its table says how many layers are empty, and how many weights the emptiest keeps."""

    def table(self, results: Mapping[str, Any]) -> str:
        found, lines = self.networks(results), []
        for arm, runs in found.items():
            every = t_interval([run["test_accuracy"] for run in runs])
            spread = [f"{min(run[of] for run in runs)} to {max(run[of] for run in runs)}" for of in ("empty", "least")]
            accuracy, of_layers = f"{every.mean:.2%} +- {every.std:.2%}", ("", "") if arm == self.control else spread
            lines.append((arm, f"{runs[0]['sparsity']:.1%}", accuracy, len(runs), *of_layers))
        header = ("network", "sparsity", "test accuracy", "seeds", "empty layers", "weights of the emptiest")
        return "\n\n".join((markdown_table(header, lines), self.claims_table(results), origin(results)))


def facts(summary: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """What is kept of a run beside its test accuracy: how many layers are empty, and what the emptiest keeps."""
    kept = [layer["kept"] for layer in summary["layers"]]
    return {"empty": sum(count == 0 for count in kept), "least": min(kept, default=0)}


def without(share: str) -> str:
    """Name of an arm."""
    return f"no minimum, {share}"


def within(share: str) -> str:
    """Name of an arm."""
    return f"minimum, {share}"


def _global(share: str, floor_share: float) -> tuple[str, ...]:
    return (
        *cubic(round(float(share.removesuffix("%")) / 100, 4)),
        *("method.pruning.allocation.floor=0", f"method.pruning.allocation.floor_share={floor_share}"),
    )


def study(name: str, title: str, recipe: tuple[str, ...], claims: Sequence[Claim]) -> CollapseStudy:
    """One of `STUDIES`."""
    return CollapseStudy(
        name=name,
        title=title,
        question="Does one ranking over all layers cut the network?",
        published="MobileNetV2 at 98 %: 10.0 without a minimum, 83.0 with 0.02 % (Gupta et al. 2022)",
        recipe=recipe,
        arms={
            DENSE: (),
            **{without(share): _global(share, 0.0) for share in SHARES},
            **{within(share): _global(share, MINIMUM) for share in SHARES},
        },
        control=DENSE,
        claims=(
            *claims,
            *(Empties(within(share), False) for share in SHARES),
            *(Above(within(share), without(share)) for share in SHARES),
        ),
        stages=[
            (DENSE, without("99.5%"), within("99.5%")),
            *([without(share), within(share)] for share in ("98%", "99%")),
        ],
        facts=facts,
    )


STUDIES = (
    study(
        "collapse/resnet20",
        f"{SMALL_TITLE}, 10 epochs",
        small(10),
        claims=[Empties(without(share), True) for share in SHARES],
    ),
    study(
        "collapse/plain20",
        f"{SMALL_TITLE}, without shortcuts, 10 epochs",
        (*small(10), "model.shortcut=none"),
        claims=[],
    ),
    study(
        "collapse/full",
        "ResNet-20, CIFAR-10, 182 epochs",
        full(182),
        claims=[Empties(without(share), True) for share in SHARES],
    ),
)
