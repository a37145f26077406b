"""What does a smaller network cost in accuracy? Gates beside narrower dense networks and magnitude channel pruning.

python experiments/run.py polarization/digits      # LeNet-300-100 on scikit-learn's digits
python experiments/run.py polarization/resnet20    # ResNet-20 of half the width on CIFAR-10 at 8x8
python experiments/run.py polarization/full --device gpu
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from evidence import SMALL_TITLE, Above, Claim, Found, Study, full, small

from sparsetrain.cli.grid import origin
from sparsetrain.report import draw_accuracy, markdown_table, t_interval

DENSE, GATES, CHANNELS, WIDTH, NARROW = "dense", "gates", "magnitude channels", "dense of width", "narrower dense"
SHARES = ("30%", "50%")
BAR = 0.5  # points that gates may be below another network of as many FLOPs


class GatesStudy(Study):
    """Its table has the FLOPs that are left; narrower dense networks are compared at those of the gated ones."""

    def networks(self, results: Mapping[str, Any]) -> Found:
        found = super().networks(results)
        if DENSE not in found:
            return found
        widths = [found[arm] for arm in found if arm.startswith(WIDTH)]
        between = {f"{NARROW} {share}": at_flops(widths, found[DENSE], _left(share)) for share in SHARES}
        return {**found, **{arm: runs for arm, runs in between.items() if len(runs) > 1}}

    def table(self, results: Mapping[str, Any]) -> str:
        found = self.networks(results)
        dense = found[DENSE][0]["flops"]
        lines = []
        for arm, runs in found.items():
            accuracy = t_interval([run["test_accuracy"] for run in runs])
            flops = [run["flops"] / dense for run in runs]
            share = f"{min(flops):.1%}" if max(flops) - min(flops) < 5e-4 else f"{min(flops):.1%} to {max(flops):.1%}"
            lines.append(
                (arm, share, f"{accuracy.mean:.2%} +- {accuracy.std:.2%}", len(runs), *self.less_control(found, arm))
            )
        header = ("network", "FLOPs left", "test accuracy", "seeds", "less dense, points", "95 % interval")
        tables = (markdown_table(header, lines), self.claims_table(results), gates_words(found), origin(results))
        return "\n\n".join(tables)

    def draw(self, results: Mapping[str, Any], path: Path) -> None:
        found = super().networks(results)
        dense = found[DENSE][0]["flops"]
        curves: dict[str, list[tuple[float, list[float]]]] = {}
        for arm, runs in found.items():
            kind = next((kind for kind in (GATES, CHANNELS, WIDTH) if arm.startswith(kind)), None)
            if kind is not None:
                left = sum(run["flops"] for run in runs) / len(runs) / dense
                curves.setdefault(kind, []).append((1 - left, [run["test_accuracy"] for run in runs]))
        if WIDTH in curves:
            curves[NARROW] = curves.pop(WIDTH)
        if curves:
            draw_accuracy(
                path,
                curves,
                dense=[run["test_accuracy"] for run in found[DENSE]],
                xlabels=("FLOPs left", "FLOPs removed"),
            )


def facts(summary: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """What is kept of a run beside its test accuracy: FLOPs of one example, and the gates."""
    left = summary.get("shrunk", {"flops": summary["dense_flops"]})
    return {"flops": left["flops"], **_of_gates(summary)}


def _of_gates(summary: Mapping[str, Any]) -> dict[str, Any]:
    extraction = summary.get("extraction")
    return {} if extraction is None else {name: extraction[name] for name in ("gates", "undecided", "overruled")}


def _left(share: str) -> float:
    return 1 - int(share.removesuffix("%")) / 100


def at_flops(
    widths: Sequence[list[dict[str, Any]]], dense: Sequence[Mapping[str, Any]], left: float
) -> list[dict[str, Any]]:
    """Records of networks with this share of the dense FLOPs, between those of two widths: linear in the FLOPs."""
    flops = left * dense[0]["flops"]
    wider = min((runs for runs in widths if runs[0]["flops"] >= flops), key=lambda runs: runs[0]["flops"], default=[])
    slimmer = max((runs for runs in widths if runs[0]["flops"] < flops), key=lambda runs: runs[0]["flops"], default=[])
    found = []
    for one, other in ((one, other) for one in wider for other in slimmer if one["seed"] == other["seed"]):
        part = (flops - other["flops"]) / (one["flops"] - other["flops"])
        accuracy = part * one["test_accuracy"] + (1 - part) * other["test_accuracy"]
        found.append({"seed": one["seed"], "sparsity": 0.0, "flops": flops, "test_accuracy": accuracy})
    return found


def gates_words(found: Found) -> str:
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


def study(
    name: str,
    title: str,
    recipe: tuple[str, ...],
    *,
    reads: str,
    sparsities: Mapping[str, float],
    widths: Sequence[int] = (),
) -> GatesStudy:
    """One of `STUDIES`.

    Args:
        name: as in `Study`,
        title: this,
        recipe: and this; all runs are equally long.
        reads: globs over the weights that read the gated channels, for magnitude channel pruning.
        sparsities: share of FLOPs removed -> sparsity of these weights that leaves the FLOPs, or a few more.
        widths: of narrower dense networks, with more and fewer FLOPs than those that are left.
    """
    arms: dict[str, tuple[str, ...]] = {
        DENSE: (),
        **{f"{WIDTH} {width}": (f"model.width={width}",) for width in widths},
    }
    claims: list[Claim] = []
    for share in SHARES:
        gates = f"{GATES} {share}"
        arms[gates] = ("method=polarize", f"method.sparsity={round(1 - _left(share), 2)}")
        if widths:
            claims.append(Above(gates, f"{NARROW} {share}", -BAR))
        arms[f"{CHANNELS} {share}"] = (
            *("method=gmp", "pattern=channel", "allocation=uniform", f"method.pruning.where.include={reads}"),
            *("schedule=cubic", f"method.schedule.final={sparsities[share]}"),
            *("method.schedule.begin=0.1run", "method.schedule.end=0.7run", "method.schedule.every=10it"),
        )
        claims.append(Above(gates, f"{CHANNELS} {share}", -BAR))
    return GatesStudy(
        name=name,
        title=title,
        question="What does a smaller network cost in accuracy?",
        published="half of the connections for less than 1 point (Zhi et al. 2023, abstract)",
        headline="polarization",
        recipe=recipe,
        arms=arms,
        control=DENSE,
        claims=claims,
        facts=facts,
    )


STUDIES = (
    study(
        "polarization/digits",
        "LeNet-300-100, digits",
        ("+experiment=digits_dense",),
        reads="[network.fc2.weight,network.fc3.weight]",
        sparsities={"30%": 0.2, "50%": 0.36},
    ),
    study(
        "polarization/resnet20",
        f"{SMALL_TITLE}, 20 epochs",
        small(20),
        reads="['*.conv2.weight']",
        sparsities={"30%": 0.3, "50%": 0.52},
        widths=(7, 6, 5),
    ),
    study(
        "polarization/full",
        "ResNet-20, CIFAR-10, 182 epochs",
        full(182),
        reads="['*.conv2.weight']",
        sparsities={"30%": 0.3, "50%": 0.52},
        widths=(14, 12, 11),
    ),
)
