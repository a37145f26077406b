"""A small GPT on tiny Shakespeare: gradual pruning and 2:4 training beside the dense network, at equal steps.

python experiments/run.py language/shakespeare
python experiments/run.py language/full --device gpu
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from evidence import Above, Study, cubic

from sparsetrain.cli.grid import origin
from sparsetrain.report import markdown_table, t_interval

DENSE, GRADUAL, BDWP, STRAIGHT = "dense", "gradual, 80%", "BDWP 2:4", "SR-STE 2:4"
DECAYED, UNDECAYED = "BDWP 2:4, decay 0.0002", "STE 2:4"


class LanguageStudy(Study):
    """Its table has the loss, in nats a byte."""

    def table(self, results: Mapping[str, Any]) -> str:
        found, lines = self.networks(results), []
        for arm, runs in found.items():
            loss, every = (t_interval([run[of] for run in runs]) for of in ("test_loss", "test_accuracy"))
            lines.append(
                (
                    *(arm, f"{runs[0]['sparsity']:.1%}", f"{loss.mean:.3f} +- {loss.std:.3f}"),
                    *(f"{every.mean:.2%} +- {every.std:.2%}", len(runs), *self.less_control(found, arm)),
                )
            )
        header = (
            *("network", "sparsity", "test loss, nats a byte", "test accuracy, next byte", "seeds"),
            *(f"less {self.control}, points", "95 % interval"),
        )
        return "\n\n".join((markdown_table(header, lines), self.claims_table(results), origin(results)))


def facts(summary: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """What is kept of a run beside its test accuracy: the test loss."""
    return {"test_loss": summary["test"]["loss"]}


def study(name: str, title: str, recipe: tuple[str, ...]) -> LanguageStudy:
    """One of `STUDIES`."""
    return LanguageStudy(
        name=name,
        title=title,
        question="What does sparsity cost a small GPT?",
        recipe=("+experiment=gpt_small_dense", *recipe),
        arms={
            DENSE: (),
            GRADUAL: (*cubic(0.8), "method.pruning.where.include=['*blocks*']"),
            BDWP: ("method=bdwp",),
            STRAIGHT: ("method=straight_through",),
            DECAYED: ("method=bdwp", "method.decay=2.0e-4"),
            UNDECAYED: ("method=straight_through", "method.decay=0.0"),
        },
        control=DENSE,
        claims=(
            *(Above(BDWP, DENSE, -1.0), Above(STRAIGHT, DENSE, -1.0), Above(GRADUAL, DENSE, -1.0)),
            *(Above(UNDECAYED, BDWP), Above(STRAIGHT, DECAYED), Above(STRAIGHT, UNDECAYED), Above(DECAYED, BDWP)),
        ),
        stages=((DENSE, GRADUAL, BDWP, STRAIGHT), (DECAYED, UNDECAYED)),
        facts=facts,
    )


STUDIES = (
    study(
        "language/shakespeare",
        "GPT of 4 layers and width 64, tiny Shakespeare, 2,940 steps",
        (
            *("model.layers=4", "model.width=64", "model.heads=4", "model.dropout=0.0"),
            *("dataset.context=64", "optim.lr=3.0e-3", "trainer.max_epochs=12"),
        ),
    ),
    study("language/full", "GPT-2 small, tiny Shakespeare, 4,960 steps", ()),
)
