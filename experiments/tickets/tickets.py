"""Tickets of LeNet-300-100 on MNIST beside the dense network, random masks and another initialisation.

python experiments/run.py tickets/mnist
python experiments/run.py tickets/full     # longer rounds, and more of them
"""

import csv
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from evidence import Above, Found, Study, of_rounds

from sparsetrain.cli.grid import origin
from sparsetrain.cli.metrics import FILE
from sparsetrain.report import draw_accuracy, markdown_table, t_interval

DENSE, TICKET, RANDOM, REINIT = "dense", "ticket, 3.1%", "random mask, 3.1%", "other initialisation, 3.1%"


class TicketStudy(Study):
    """Its networks are compared after the first epoch, too, on val; the picture has all rounds."""

    def networks(self, results: Mapping[str, Any]) -> Found:
        found = super().networks(results)
        early = {first(arm): [run | {"test_accuracy": run["first_epoch"]} for run in found[arm]] for arm in found}
        return {**found, **early}

    def table(self, results: Mapping[str, Any]) -> str:
        found, lines = self.networks(results), []
        for arm in (arm for arm in self.arms if arm in found):
            whole, early = (t_interval([run["test_accuracy"] for run in found[name]]) for name in (arm, first(arm)))
            accuracies = (f"{early.mean:.2%} +- {early.std:.2%}", f"{whole.mean:.2%} +- {whole.std:.2%}")
            sparsity = f"{found[arm][0]['sparsity']:.1%}"
            lines.append((arm, sparsity, *accuracies, len(found[arm]), *self.less_control(found, arm)))
        header = (
            *("network", "sparsity", "val accuracy after the first epoch", "test accuracy", "seeds"),
            *(f"less {self.control}, points", "95 % interval"),
        )
        return "\n\n".join((markdown_table(header, lines), self.claims_table(results), origin(results)))

    def draw(self, results: Mapping[str, Any], path: Path) -> None:
        found = self.networks(results)
        if TICKET not in found:
            return
        rounds: dict[float, list[float]] = {}
        for run in found[TICKET]:
            for one in run["rounds"]:
                rounds.setdefault(one["sparsity"], []).append(one["test_accuracy"])
        controls = {
            arm: [(runs[0]["sparsity"], [run["test_accuracy"] for run in runs])]
            for arm, runs in found.items()
            if arm in (RANDOM, REINIT)
        }
        dense = [run["test_accuracy"] for run in found[DENSE]]
        draw_accuracy(path, {"tickets": [*rounds.items()]}, dense=dense, controls=controls)


def first(arm: str) -> str:
    """Name of an arm after the first epoch of its last round."""
    return f"{arm}, first epoch"


def study(name: str, epochs: int, rounds: int, *pruned: str) -> TicketStudy:
    """One of `STUDIES`.

    Args:
        name: of the study.
        epochs: of a round,
        rounds: how many there are,
        pruned: and overrides of what each of them prunes, to 3.1 % of the weights.
    """

    def facts(summary: Mapping[str, Any], folder: Path) -> dict[str, Any]:
        with (folder / FILE).open(newline="") as file:
            of_epochs = [float(row["val/accuracy"]) for row in csv.DictReader(file) if row["val/accuracy"]]
        return {"first_epoch": of_epochs[-epochs], "rounds": of_rounds(summary)}

    lottery = (
        *("method=lottery", "method.sparsity=null", f"method.round_length={epochs}ep", "method.rewind_to=0it"),
        "trainer.max_epochs=-1",
    )

    def control(kind: str) -> tuple[str, ...]:
        ticket = "method.ticket='{runs}/ticket,-3.1%-{seed}/ticket.safetensors'"
        return (*lottery, "method.rounds=0", ticket, f"method.control={kind}", "init_seed=100{seed}")

    return TicketStudy(
        name=name,
        title=f"LeNet-300-100, MNIST, {epochs} epochs a round, {rounds} rounds",
        question="Do tickets owe their accuracy to masks and initialisation?",
        published=(
            "tickets of a few per cent train faster than dense and are as good, reinitialised ones not "
            "(Frankle & Carbin 2019)"
        ),
        recipe=(
            *("+experiment=digits_dense", "dataset=mnist", "dataset.batch_size=128"),
            *(f"trainer.max_epochs={epochs}", "lr_policy.warmup=200it"),
        ),
        arms={
            DENSE: (),
            TICKET: (*lottery, f"method.rounds={rounds}", *pruned),
            RANDOM: control("random_mask"),
            REINIT: control("reinit"),
        },
        control=DENSE,
        claims=(
            *(Above(TICKET, DENSE, -0.3), Above(TICKET, REINIT), Above(TICKET, RANDOM)),
            *(Above(first(TICKET), first(other)) for other in (DENSE, REINIT, RANDOM)),
        ),
        stages=((DENSE, TICKET), (RANDOM, REINIT)),
        facts=facts,
    )


STUDIES = (
    study("tickets/mnist", 10, 5, "method.per_round=0.5"),
    study("tickets/full", 50, 15, "method.sparsity=0.96875"),
)
