"""The runs of a sweep as one row per setting: mean and spread over seeds, and the difference from the dense control."""

import csv
import math
import re
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import combinations
from pathlib import Path

from sparsetrain.report.plots import Points
from sparsetrain.report.statistics import paired
from sparsetrain.report.tables import is_accuracy, markdown_table, metric_text

# With all that is below them, they do not change what a seed leads to.
_NO_SETTING = frozenset(
    {"seed", "ckpt_path", "resume", "name", "output_dir", "launcher", "hydra", "logger", "optimized_metric"}
)


@dataclass(frozen=True)
class Run:
    """One job of a sweep.

    Args:
        folder: where it is, for messages.
        overrides: of the configuration, name -> value, each written in one way.
        seed: its seed; None, with a problem, if it is not known.
        sparsity: over the weights that may be pruned, in [0, 1); NaN if it is not known.
        metrics: evaluated after the last step, by name, such as "test/accuracy"; finite.
        problem: why it does not count; None of a whole run.
        pruned: whether weights were, or may have been, pruned in training, even if none of them is masked in the end.
    """

    folder: str
    overrides: Mapping[str, str]
    seed: int | None
    sparsity: float = math.nan
    metrics: Mapping[str, float] = field(default_factory=dict)
    problem: str | None = None
    pruned: bool = False

    @property
    def setting(self) -> frozenset[tuple[str, str]]:
        """The overrides but those that name, place, seed, resume, launch or log it."""
        return frozenset((name, value) for name, value in self.overrides.items() if _first(name) not in _NO_SETTING)

    @property
    def sample(self) -> tuple[frozenset[tuple[str, str]], int | None]:
        """Setting and seed: runs that share both are one sample."""
        return self.setting, self.seed


@dataclass(frozen=True)
class Setting:
    """The runs that differ in their seed only.

    Args:
        overrides: those that are not the same in all settings, name -> value.
        runs: by seed; at least one.
    """

    overrides: Mapping[str, str]
    runs: Mapping[int | None, Run]

    @property
    def sparsity(self) -> float:
        """Mean over seeds, in [0, 1)."""
        return statistics.fmean(run.sparsity for run in self.runs.values())

    @property
    def is_dense(self) -> bool:
        """Whether no run has pruned anything, at any time."""
        return all(run.sparsity == 0 and not run.pruned for run in self.runs.values())

    def values(self, metric: str) -> dict[int | None, float]:
        """The metric by seed, of the runs that have it."""
        return {seed: run.metrics[metric] for seed, run in self.runs.items() if metric in run.metrics}


@dataclass(frozen=True)
class Sweep:
    """What the jobs of a sweep came to; made by `collect`.

    Args:
        common: the overrides that all settings share, name -> value.
        settings: in the order of their first runs.
        left_out: the runs that do not count, each with the reason.
    """

    common: Mapping[str, str]
    settings: Sequence[Setting]
    left_out: Sequence[tuple[Run, str]]

    @property
    def columns(self) -> list[str]:
        """The overrides that differ between settings."""
        return list(dict.fromkeys(name for setting in self.settings for name in setting.overrides))

    @property
    def metrics(self) -> list[str]:
        """The metrics of all runs: those of the test first, then by name."""
        names = {name for setting in self.settings for run in setting.runs.values() for name in run.metrics}
        return sorted(names, key=lambda name: (not name.startswith("test/"), name))

    @property
    def dense(self) -> Setting | None:
        """The control of all others: the only setting that prunes nothing; None if there is none, or several."""
        dense = [setting for setting in self.settings if setting.is_dense]
        return dense[0] if len(dense) == 1 and len(self.settings) > 1 else None


def collect(runs: Sequence[Run]) -> Sweep:
    """Sort runs by setting and seed.

    Of several whole runs of one setting and seed the last counts: a resumed job is not a second sample.

    Args:
        runs: in order; may hold runs that failed.
    """
    whole = {run.sample: run for run in runs if run.problem is None}
    left_out = []
    for run in runs:
        counted = whole.get(run.sample)
        if counted is None:
            left_out.append((run, run.problem or ""))
        elif counted is not run:
            left_out.append((run, f"{counted.folder} is of the same setting and seed, and counts instead"))

    by_setting: dict[frozenset[tuple[str, str]], list[Run]] = {}
    for run in whole.values():
        by_setting.setdefault(run.setting, []).append(run)
    shared = frozenset.intersection(*by_setting) if by_setting else frozenset()
    settings = [
        Setting(
            {name: value for name, value in group[0].overrides.items() if (name, value) in setting - shared},
            {run.seed: run for run in group},
        )
        for setting, group in by_setting.items()
    ]
    # In the order of a command line, which sets do not keep.
    common = {name: value for run in runs for name, value in run.overrides.items() if (name, value) in shared}
    return Sweep(common, settings, left_out)


def sweep_table(sweep: Sweep, metric: str) -> str:
    """A Markdown table with one line per setting: mean +- sample standard deviation of each metric over the seeds.

    Accuracies, which are metrics called "accuracy" or "top...", are written in percent. If the sweep has a dense
    control, each other setting has its difference from it in `metric`, with the 95 % interval, over the seeds that
    both have, if there are at least 2.
    """
    unit = ", points" if is_accuracy(metric) else ""
    difference = (f"{metric} less dense{unit}", "95 % interval") if sweep.dense else ()
    lines = [
        (
            *(setting.overrides.get(name, "") for name in sweep.columns),
            len(setting.runs),
            f"{setting.sparsity:.2%}",
            *(_mean_and_std(name, list(setting.values(name).values())) for name in sweep.metrics),
            *(_difference(metric, setting, sweep.dense) if sweep.dense else ()),
        )
        for setting in sweep.settings
    ]
    return markdown_table((*sweep.columns, "seeds", "sparsity", *sweep.metrics, *difference), lines)


def write_sweep_csv(path: Path | str, sweep: Sweep) -> None:
    """Write one row per counted run, in full precision.

    Columns: the overrides that differ between settings, seed, folder, sparsity, then every metric. What is not set, or
    was not evaluated, stays empty.

    Args:
        path: the file; its folder is made, and an older file replaced.
        sweep: may be without settings: then only the header is written.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow((*sweep.columns, "seed", "folder", "sparsity", *sweep.metrics))
        for setting in sweep.settings:
            set_to = [setting.overrides.get(name, "") for name in sweep.columns]
            for seed, run in setting.runs.items():
                measured = [run.metrics.get(name, "") for name in sweep.metrics]
                writer.writerow((*set_to, seed, run.folder, run.sparsity, *measured))


def sweep_curves(sweep: Sweep, metric: str) -> tuple[dict[str, Points], list[float]]:
    """The curves of `metric` over sparsity, and its values for the dense control, as `draw_accuracy` takes them.

    Settings are on one curve if they differ only in overrides that are numbers and change the sparsity by themselves.
    A label holds what is not the same on all curves.
    """
    drawn = [setting for setting in sweep.settings if setting is not sweep.dense and setting.values(metric)]
    along = _sparsity_overrides(sweep.settings)
    alike = set.intersection(*(set(setting.overrides.items()) for setting in drawn)) if drawn else set()
    ends = [name.rpartition(".")[2] for name in sweep.columns]
    short = {name: end if ends.count(end) == 1 else name for name, end in zip(sweep.columns, ends, strict=True)}
    curves: dict[str, list[tuple[float, Sequence[float]]]] = {}
    for setting in drawn:
        own = [item for item in setting.overrides.items() if item[0] not in along and item not in alike]
        label = ", ".join(f"{short[name]}={value}" for name, value in own)
        point = (setting.sparsity, list(setting.values(metric).values()))
        curves.setdefault(label or "each setting", []).append(point)
    return dict(curves), list(sweep.dense.values(metric).values()) if sweep.dense else []


def _first(name: str) -> str:
    """The part of the configuration that an override is about.

    >>> _first("logger.wandb.offline"), _first("hydra/launcher"), _first("seed")
    ('logger', 'hydra', 'seed')
    """
    return re.split(r"[./]", name, maxsplit=1)[0]


def _sparsity_overrides(settings: Sequence[Setting]) -> set[str]:
    """The overrides in which two settings differ, in numbers and in nothing else, that do not have one sparsity."""
    found: set[str] = set()
    for one, other in combinations(settings, 2):
        differing = {name for name, _ in one.overrides.items() ^ other.overrides.items()}
        if len(differing) == 1 and one.sparsity != other.sparsity:
            found |= {name for name in differing if all(_is_number(s.overrides.get(name, "")) for s in (one, other))}
    return found


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def _mean_and_std(metric: str, values: Sequence[float]) -> str:
    shown = [statistics.fmean(values)] if values else []
    if len(values) > 1:
        shown.append(statistics.stdev(values))
    return " +- ".join(metric_text(metric, value) for value in shown)


def _difference(metric: str, setting: Setting, dense: Setting) -> tuple[str, str]:
    """Mean difference from the dense control over the seeds that both have, and its interval; empty if it has none."""
    values, control = setting.values(metric), dense.values(metric)
    differences = [value - control[seed] for seed, value in values.items() if seed in control]
    if setting is dense or len(differences) < 2:
        return "", ""
    found = paired(differences)
    mean, low, high = (
        f"{100 * value:+.2f}" if is_accuracy(metric) else f"{value:+.4g}"
        for value in (found.mean, found.low, found.high)
    )
    return mean, f"[{low}, {high}]"
