"""Studies: arms trained with the same seeds, what is claimed of their differences, and one table of all claims.

`run.py` makes their runs; a study is declared in a folder beside this file.
"""

import json
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import mean, median, stdev, variance
from typing import Any, Literal

import forest

from sparsetrain.cli.grid import Grid, by_arm, difference, in_points, origin
from sparsetrain.report import Interval, markdown_table, t_interval, write_between

HERE = Path(__file__).parent
SEEDS = (1, 2, 3, 4, 5)
SMALL = ("+experiment=resnet20_dense", "model.width=8", "dataset.size=8", "dataset.shift=1")
SMALL_TITLE = "ResNet-20 of half the width, CIFAR-10 at 8x8"
Found = Mapping[str, list[dict[str, Any]]]
"""Arm -> the records of its runs, of two or more."""


def small(epochs: int) -> tuple[str, ...]:
    """Overrides of a recipe for a core of a CPU, about 10 seconds an epoch; `SMALL_TITLE` is what it trains."""
    return (
        *SMALL,
        *("dataset.batch_size=512", "optim.lr=0.4", "lr_policy=cosine", "lr_policy.warmup=1ep"),
        *(f"trainer.max_epochs={epochs}", "module.channels_last=true"),
    )


def full(epochs: int) -> tuple[str, ...]:
    """Overrides of the published recipe of ResNet-20 on CIFAR-10, on all training images, for a GPU.

    Renda et al. 2020, arXiv:2003.02389: 182 epochs, learning rates divided by 10 at half and at three quarters of them.
    """
    return (
        *("+experiment=resnet20_dense", "dataset.val_size=0", "optimized_metric=null", "module.channels_last=true"),
        *(f"trainer.max_epochs={epochs}", f"lr_policy.milestones=[{epochs // 2}ep,{epochs * 3 // 4}ep]"),
    )


def cubic(final: float) -> tuple[str, ...]:
    """Overrides of gradual pruning from a tenth to 70 % of a run."""
    return (
        *("method=gmp", "schedule=cubic", f"method.schedule.final={final}"),
        *("method.schedule.begin=0.1run", "method.schedule.end=0.7run", "method.schedule.every=10it"),
    )


@dataclass(frozen=True)
class Line:
    """What was found of a claim.

    Args:
        words: the claim.
        measured: with its interval or deviation.
        seeds: how many.
        bar: what `measured` has to be.
        holds: "yes", "no", or "not shown": the interval has the bar in it.
        accuracies: of the arms it is about, in per cent, mean and deviation over their seeds; "" if of none.
    """

    words: str
    measured: str
    seeds: int
    bar: str
    holds: Literal["yes", "no", "not shown"]
    accuracies: str = ""


class Claim(ABC):
    """What a study says of its arms."""

    @abstractmethod
    def check(self, found: Found) -> Line | None:
        """What was found, or None before two seeds have what it is about."""


@dataclass(frozen=True)
class Above(Claim):
    """The accuracy of an arm is that of another one and so many points more; the difference is paired by seed.

    Args:
        arm: the one,
        control: and the other.
        points: what the difference has to be above.
        of: its mean, or the lower end of its 95 % interval.
    """

    arm: str
    control: str
    points: float = 0.0
    of: Literal["mean", "lower end"] = "lower end"

    def check(self, found: Found) -> Line | None:
        less = _difference(found, self.arm, self.control)
        if less is None:
            return None
        least, most = (less.mean, less.mean) if self.of == "mean" else (less.low, less.high)
        bar = f"{self.of} > {self.points:+g}" if self.points else f"{self.of} > 0"
        words = f"{self.arm}, less {self.control}"
        holds = _holds(100 * least > self.points, 100 * most <= self.points)
        accuracies = _accuracies(found, self.arm, self.control)
        return Line(words, " ".join(in_points(less)), less.n, bar, holds, accuracies)


@dataclass(frozen=True)
class Alike(Claim):
    """The accuracies of two arms differ by less than so many points: the whole 95 % interval does.

    Args:
        arm: the one,
        control: and the other.
        points: the margin of equivalence, above 0.
    """

    arm: str
    control: str
    points: float

    def check(self, found: Found) -> Line | None:
        less = _difference(found, self.arm, self.control)
        if less is None:
            return None
        apart = 100 * max(less.low, -less.high) >= self.points
        holds = _holds(100 * max(-less.low, less.high) < self.points, apart)
        words, bar = f"{self.arm}, less {self.control}", f"within {self.points:g} of 0"
        accuracies = _accuracies(found, self.arm, self.control)
        return Line(words, " ".join(in_points(less)), less.n, bar, holds, accuracies)


@dataclass(frozen=True)
class Reaches(Claim):
    """The accuracy of an arm is the published one: |difference| <= max(0.4, 2 sqrt(s1^2/n1 + s2^2/n2)) points.

    Args:
        arm: the one.
        accuracy: the published one in per cent, over seeds,
        std: its standard deviation over seeds, in points,
        seeds: and how many these were.
        of: what is published and compared.
    """

    arm: str
    accuracy: float
    std: float
    seeds: int
    of: Literal["mean", "median"] = "mean"

    def check(self, found: Found) -> Line | None:
        if self.arm not in found:
            return None
        accuracies = [100 * run["test_accuracy"] for run in found[self.arm]]
        ours = mean(accuracies) if self.of == "mean" else median(accuracies)
        margin = max(0.4, 2 * math.sqrt(variance(accuracies) / len(accuracies) + self.std**2 / self.seeds))
        bar = f"within {margin:.2f} of {self.accuracy:.2f} +- {self.std:.2f}"
        measured = f"{ours:.2f} +- {stdev(accuracies):.2f}"
        near = abs(ours - self.accuracy) <= margin
        return Line(f"{self.of} of {self.arm}, in per cent", measured, len(accuracies), bar, _holds(near, not near))


def _holds(yes: bool, no: bool) -> Literal["yes", "no", "not shown"]:
    return "yes" if yes else "no" if no else "not shown"


def _accuracies(found: Found, *arms: str) -> str:
    every = [[100 * run["test_accuracy"] for run in found[arm]] for arm in arms]
    return ", ".join(f"{mean(values):.2f} +- {stdev(values):.2f}" for values in every)


def _difference(found: Found, arm: str, control: str) -> Interval | None:
    if arm not in found or control not in found:
        return None
    shared = {run["seed"] for run in found[arm]} & {run["seed"] for run in found[control]}
    return difference(found[arm], found[control]) if len(shared) > 1 else None


@dataclass(frozen=True)
class Study:
    """A network, its data and recipe, the arms trained so, and what is claimed of them.

    Args:
        name: folder/key: of the folder that holds its README.md, and of results/<key>.json in it.
        title: network, data and length.
        question: what it answers.
        published: what others found, and who; "" if nobody asked.
        headline: marker in the project's README.md between which the claims stand; "" for none.
        recipe: Hydra overrides of every run.
        arms: name -> its own overrides.
        control: the arm that the table compares the others with.
        claims: what it says, most important first.
        stages: arms whose runs are made, seed by seed, before those of the next stage; all arms at once by default.
        seeds: of each arm that is not in `seeds_of`.
        seeds_of: arm -> its seeds, where it has others.
        facts: summary of a run, and its folder -> what is kept of it beside what `Grid` keeps.
    """

    name: str
    title: str
    question: str
    recipe: tuple[str, ...]
    arms: Mapping[str, tuple[str, ...]]
    control: str
    claims: Sequence[Claim]
    published: str = ""
    headline: str = ""
    stages: Sequence[Sequence[str]] = ()
    seeds: Sequence[int] = SEEDS
    seeds_of: Mapping[str, Sequence[int]] = field(default_factory=dict)
    facts: Callable[[Mapping[str, Any], Path], Mapping[str, Any]] = field(default=lambda summary, folder: {})

    @property
    def folder(self) -> Path:
        """Of its README.md."""
        return HERE / self.name.partition("/")[0]

    @property
    def key(self) -> str:
        """Of its results, and of the markers in its README.md."""
        return self.name.partition("/")[2]

    @property
    def grid(self) -> Grid:
        """All of its runs."""
        results = self.folder / "results" / f"{self.key}.json"
        return Grid(self.key, self.recipe, self.arms, Path("runs") / self.name, results, self.facts)

    @property
    def jobs(self) -> list[tuple[str, int]]:
        """All runs, in the order in which they are made."""
        jobs = []
        for stage in self.stages or [[*self.arms]]:
            seeds = {arm: self.seeds_of.get(arm, self.seeds) for arm in stage}
            jobs += [
                (arm, seed) for seed in sorted(set().union(*seeds.values())) for arm in stage if seed in seeds[arm]
            ]
        return jobs

    @property
    def results(self) -> dict[str, Any]:
        """The records of those that have ended."""
        path = self.grid.results
        found: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {"runs": []}
        return found

    def networks(self, results: Mapping[str, Any]) -> Found:
        """What is compared: the runs of each arm."""
        return by_arm(results, [*self.arms])

    def training_flops(self, run: Mapping[str, Any], found: Found) -> int:
        """FLOPs of a run's training, and of that of the network that it began with."""
        flops: int = run["training_flops"]
        return flops

    def table(self, results: Mapping[str, Any]) -> str:
        """Accuracy of each arm over its seeds, and its difference from the control over those that both have."""
        found, lines = self.networks(results), []
        for arm, runs in found.items():
            every = t_interval([one["test_accuracy"] for one in runs])
            sparsity, accuracy = f"{runs[0]['sparsity']:.1%}", f"{every.mean:.2%} +- {every.std:.2%}"
            lines.append((arm, sparsity, accuracy, len(runs), *self.less_control(found, arm)))
        header = ("network", "sparsity", "test accuracy", "seeds", f"less {self.control}, points", "95 % interval")
        parts = [markdown_table(header, lines), self.claims_table(results), origin(results)]
        return "\n\n".join(part for part in parts if part)

    def less_control(self, found: Found, arm: str) -> tuple[str, str]:
        """The accuracy of an arm less the control's in points, and its interval; "" before two seeds have both."""
        less = None if arm == self.control else _difference(found, arm, self.control)
        return ("", "") if less is None else in_points(less)

    def claims_table(self, results: Mapping[str, Any]) -> str:
        """What was found of each claim; "" if nothing is claimed."""
        lines = [_cells(line) for line in self.lines(results)]
        return markdown_table(("claim", "measured", "seeds", "bar", "holds"), lines) if lines else ""

    def lines(self, results: Mapping[str, Any]) -> list[Line]:
        """The claims of which something was found."""
        found = self.networks(results)
        return [line for claim in self.claims if (line := claim.check(found)) is not None]

    def report(self, results: Mapping[str, Any]) -> None:
        """Write the table between its markers, and the picture."""
        write_between(self.folder / "README.md", self.key, self.table(results))
        self.draw(results, self.folder / f"{self.key}.png")

    def draw(self, results: Mapping[str, Any], path: Path) -> None:
        """Draw what it is about: the difference of each arm from the control, if two seeds have both."""
        found, differences = self.networks(results), {}
        of_control = {run["seed"]: run["test_accuracy"] for run in found[self.control]}
        for arm, runs in found.items():
            shared = [run for run in runs if run["seed"] in of_control]
            if arm != self.control and len(shared) > 1:
                differences[arm] = [100 * (run["test_accuracy"] - of_control[run["seed"]]) for run in shared]
        if differences:
            forest.draw(path, differences, control=self.control)


def of_rounds(summary: Mapping[str, Any]) -> list[dict[str, float]]:
    """Sparsity and test accuracy at the end of each round of a run; none if it has no rounds."""
    return [{"sparsity": one["sparsity"], "test_accuracy": one["test/accuracy"]} for one in summary.get("rounds", ())]


def headline(studies: Iterable[Study]) -> str:
    """The claims of studies that have results, for the project's README.md; the task stands beside its first one."""
    lines = []
    for study in studies:
        for number, line in enumerate(study.lines(study.results)):
            lines.append((*_once(number, study.title), *_cells(line)))
    return markdown_table(("task", "accuracy of", "points, 95 % interval", "seeds", "bar", "holds"), lines)


def all_claims(studies: Iterable[Study]) -> str:
    """All claims of the studies that have results: question, published, ours, the command that makes it, with what.

    What is the same of all claims of a study stands beside its first one.
    """
    lines = []
    for study in studies:
        results = study.results
        for number, line in enumerate(study.lines(results)):
            link = f"[{study.question}]({study.folder.name}/README.md)"
            command = f"`python experiments/run.py {study.name}`"
            about = _once(number, link, study.title, study.published)
            made = _once(number, command, *_made(results["runs"]))
            words, *rest = _cells(line)
            lines.append((*about, words, line.accuracies, *rest, *made))
    header = ("question", "task", "published", "claim", "ours, per cent", "difference", "seeds", "bar", "holds")
    return markdown_table((*header, "command", "device", "date", "commit"), lines)


def _once(number: int, *cells: str) -> tuple[str, ...]:
    """The cells of the first line of a study, and blank ones in those below."""
    return cells if number == 0 else ("",) * len(cells)


def _cells(line: Line) -> tuple[str, ...]:
    return (
        line.words,
        line.measured,
        str(line.seeds),
        line.bar,
        line.holds if line.holds == "yes" else f"**{line.holds}**",
    )


def _made(runs: Sequence[Mapping[str, Any]]) -> tuple[str, str, str]:
    """On which devices, until when, and at which commit last."""
    last = max(runs, key=lambda run: str(run["date"]))
    devices = sorted({run["device"]["name"] if isinstance(run["device"], dict) else run["device"] for run in runs})
    return ", ".join(devices), last["date"], last["git"]["commit"][:10] if last["git"] else "none"
