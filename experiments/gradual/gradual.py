"""Gradual pruning beside pruning at once, and large sparse networks beside a small dense one.

python experiments/run.py gradual/resnet20            # small, on a CPU
python experiments/run.py gradual/full --device gpu
"""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from evidence import SMALL_TITLE, Above, Study, cubic, full, small

from sparsetrain.report import draw_accuracy

DENSE = "dense"
SHARES = ("80%", "90%", "95%")


def gradual(share: str) -> str:
    """Name of an arm."""
    return f"gradual, {share}"


def at_once(share: str) -> str:
    """Name of an arm."""
    return f"at once, {share}"


class GradualStudy(Study):
    """Its picture shows gradual pruning and pruning at once over their sparsities."""

    def draw(self, results: Mapping[str, Any], path: Path) -> None:
        accuracies = {arm: [run["test_accuracy"] for run in runs] for arm, runs in self.networks(results).items()}

        def curve(name: Callable[[str], str]) -> list[tuple[float, list[float]]]:
            return [(_sparsity(share), accuracies[name(share)]) for share in SHARES if name(share) in accuracies]

        curves = {"gradual": curve(gradual), "at once": curve(at_once)}
        drawn = {name: points for name, points in curves.items() if points}
        if drawn:
            draw_accuracy(path, drawn, dense=accuracies[DENSE])


def _sparsity(share: str) -> float:
    return int(share.removesuffix("%")) / 100


def _one_shot(share: str) -> tuple[str, ...]:
    return (
        "method=gmp",
        "schedule=one_shot",
        f"method.schedule.sparsity={_sparsity(share)}",
        "method.schedule.at=0.7run",
    )


def study(name: str, title: str, recipe: tuple[str, ...], width: int, of_dense: int) -> GradualStudy:
    """One of `STUDIES`.

    Args:
        name: as in `Study`,
        title: this,
        recipe: and this.
        width: of the small dense network, with at least as many weights as the dense one has at 90 %,
        of_dense: and that of the dense one.
    """
    smaller = f"dense, {width} of {of_dense} channels"
    return GradualStudy(
        name=name,
        title=title,
        question="Gradual pruning or at once? Large and sparse, or small and dense?",
        published=(
            "large and sparse beats small and dense, MobileNet at 90 % 61.8 (Zhu & Gupta 2017); ResNet-50, gradual "
            "less at once: -0.7 at 80 %, -0.5 at 90 %, +0.6 at 95.3 % (Gupta et al. 2022)"
        ),
        recipe=recipe,
        arms={
            DENSE: (),
            smaller: (f"model.width={width}",),
            **{gradual(share): cubic(_sparsity(share)) for share in SHARES},
            **{at_once(share): _one_shot(share) for share in SHARES},
            "gradual, 90%, uniform": (*cubic(0.9), "allocation=uniform"),
            "gradual, 90%, ERK": (*cubic(0.9), "allocation=erk"),
        },
        control=DENSE,
        claims=(
            Above(gradual("90%"), smaller),
            *(Above(gradual(share), at_once(share)) for share in reversed(SHARES)),
            Above(gradual("90%"), "gradual, 90%, uniform"),
        ),
        stages=(
            (DENSE, smaller, gradual("90%"), at_once("90%")),
            (gradual("95%"), at_once("95%"), gradual("80%"), at_once("80%")),
            ("gradual, 90%, uniform", "gradual, 90%, ERK"),
        ),
    )


STUDIES = (
    study("gradual/resnet20", f"{SMALL_TITLE}, 10 epochs", small(10), width=3, of_dense=8),
    study("gradual/full", "ResNet-20, CIFAR-10, 182 epochs", full(182), width=6, of_dense=16),
)
