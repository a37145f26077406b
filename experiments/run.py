"""Make the runs of a study, or go on with them, and write its tables.

    python experiments/run.py                                    # which studies there are, and how far they are
    python experiments/run.py nm_accuracy/digits                 # to its end
    python experiments/run.py nm_accuracy/digits --budget 60    # for an hour: runs save checkpoints and go on later
    python experiments/run.py --report                           # all tables and pictures, from */results/*.json

Run it in the folder of the project: runs lie below runs/<study>, results below experiments/. Runs are processes with
one thread each; on a GPU they share it.
"""

import argparse
import math
import signal
import sys

import pareto
from collapse import collapse
from evidence import HERE, Study, all_claims, headline
from gradual import gradual
from language import language
from nm_accuracy import nm_accuracy
from polarization import defaults, gates_accuracy
from rewinding import rewinding
from soup import accuracy
from tickets import tickets

from sparsetrain.report import markdown_table, write_between

MODULES = (rewinding, gradual, collapse, accuracy, nm_accuracy, gates_accuracy, defaults, tickets, language)
STUDIES: dict[str, Study] = {study.name: study for module in MODULES for study in module.STUDIES}
ON_ONE_TASK = ("gradual/resnet20", "polarization/resnet20", "rewinding/resnet20", "soup/resnet20")
FLOPS_OF_EPOCH = 3 * 1_289_856 * 45_000  # of ResNet-20 of half the width on images of 8x8


def overview() -> str:
    """Each study and how many of its runs have ended."""
    lines = []
    for name, study in STUDIES.items():
        made = {(run["arm"], run["seed"]) for run in study.results["runs"]}
        wanted = study.jobs
        lines.append((name, study.title, f"{sum(job in made for job in wanted)} of {len(wanted)}", study.question))
    return markdown_table(("study", "task", "runs", "question"), lines)


def headlines() -> dict[str, str]:
    """Marker in the project's README.md -> the claims that stand there."""
    markers = {study.headline for study in STUDIES.values() if study.headline}
    return {
        marker: headline(study for study in STUDIES.values() if study.headline == marker) for marker in sorted(markers)
    }


def index() -> str:
    """All claims."""
    return all_claims(STUDIES.values())


def costs() -> list[pareto.Point]:
    """Cost and accuracy of what was trained on one task."""
    return pareto.points((STUDIES[name] for name in ON_ONE_TASK), FLOPS_OF_EPOCH)


def report() -> None:
    """Write all tables and pictures; a study is in them as soon as two seeds have its control."""
    for study in STUDIES.values():
        results = study.results
        if study.control in study.networks(results):
            study.report(results)
    for marker, body in headlines().items():
        write_between(HERE.parent / "README.md", marker, body)
    write_between(HERE / "README.md", "claims", index())
    write_between(HERE / "README.md", "costs", pareto.table(costs()))
    pareto.draw(HERE / "costs.png", costs())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("study", nargs="?", choices=sorted(STUDIES), help="whose runs are made", metavar="STUDY")
    parser.add_argument("--report", action="store_true", help="only the tables and pictures")
    parser.add_argument(
        "--budget",
        type=float,
        default=math.inf,
        help="minutes for which runs are made; no limit by default",
        metavar="MINUTES",
    )
    parser.add_argument("--workers", type=int, default=2, help="runs at a time")
    parser.add_argument("--device", choices=("cpu", "gpu"), default="cpu", help="of all runs")
    arguments = parser.parse_args()
    if arguments.study is None and not arguments.report:
        print(overview())
        return
    if arguments.study is not None:
        signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))  # so that the runs are told to end
        study = STUDIES[arguments.study]
        study.grid.measure(study.jobs, arguments.workers, minutes=arguments.budget, device=arguments.device)
    report()


if __name__ == "__main__":
    main()
