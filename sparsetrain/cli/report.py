"""Collect the runs of a sweep: `python -m sparsetrain.cli.report FOLDER`."""

import argparse
import json
import math
import sys
from collections.abc import Iterator, Mapping, Sequence
from itertools import product
from pathlib import Path
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override, ValueType
from omegaconf import OmegaConf

from sparsetrain.cli import rounds
from sparsetrain.cli.artifacts import CONFIG, SUMMARY
from sparsetrain.cli.resume import CHECKPOINT
from sparsetrain.report import (
    Run,
    Sweep,
    collect,
    draw_accuracy,
    is_accuracy,
    sweep_curves,
    sweep_table,
    write_sweep_csv,
)

TABLE, PICTURE = "sweep.csv", "sweep.png"
_OVERRIDES, _BEGUN_WITH, _SWEEP = ".hydra/overrides.yaml", ".hydra/config.yaml", "multirun.yaml"  # Hydra writes them
_TARGETS = ("sparsity", "initial", "final")  # of a schedule


def main() -> None:
    """The program: print the table of a folder of runs, and leave its data and a picture there."""
    parser = argparse.ArgumentParser(
        prog="python -m sparsetrain.cli.report",
        description="Collect the runs below a folder, such as one that `train.py -m` left: print a Markdown table, "
        f"mean +- std over seeds with one row per setting, and write {TABLE} (every run) and {PICTURE} there.",
    )
    parser.add_argument("folder", type=Path, help="multirun/<name>/<time>, or any folder of run folders")
    parser.add_argument(
        "--metric", help="what is drawn and compared with dense, such as test/accuracy; by default the table's first"
    )
    arguments = parser.parse_args()
    try:
        print(report(arguments.folder, arguments.metric))
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")


def report(folder: Path, metric: str | None = None) -> str:
    """The runs below `folder` as Markdown; sweep.csv, and of accuracies sweep.png, are written there.

    Args:
        folder: searched at any depth for what `train` leaves.
        metric: what is drawn and compared with the dense control; None for the first of the table, which has those of
            the test first, by name: test/accuracy of a classifier, test/loss of a language model.

    Raises:
        ValueError: no run, no whole run, or a metric that none has.
        OSError: a file that cannot be read or written.
    """
    runs = find_runs(folder)
    if not runs:
        raise ValueError(f"There is no run in {folder}. Give a folder below which `train` left {SUMMARY}.")
    sweep = collect(runs)
    left_out = "\n".join(f"- {_described(run, sweep)}: {why}" for run, why in sweep.left_out)
    if not sweep.settings:
        raise ValueError(f"None of the {len(runs)} runs in {folder} is whole. Finish one of them.\n{left_out}")
    metric = metric or next(iter(sweep.metrics), "test/accuracy")
    if metric not in sweep.metrics:
        raise ValueError(f"No run has the metric {metric!r}. There are: {', '.join(sweep.metrics)}.")

    write_sweep_csv(folder / TABLE, sweep)
    common = " ".join(f"{name}={value}" for name, value in sweep.common.items())
    parts = [f"All with `{common}`."] if common else []
    parts.append(sweep_table(sweep, metric))
    if left_out:
        parts.append(f"{len(sweep.left_out)} of {len(runs)} runs are not in the table:\n\n{left_out}")
    parts.append(f"Each run: {folder / TABLE}")
    if is_accuracy(metric):
        curves, dense = sweep_curves(sweep, metric)
        draw_accuracy(folder / PICTURE, curves, dense=dense, ylabel=metric.replace("/", " "))
        parts[-1] += f"\nPicture: {folder / PICTURE}"
    else:
        parts[-1] += f"\nNo picture: it shows accuracies, and {metric} is none."
    return "\n\n".join(parts)


def find_runs(folder: Path) -> list[Run]:
    """What was begun below `folder`, and what Hydra's own sweeper was to begin, in the order of the jobs.

    A soup of `sparsetrain-soup` is one run: those that trained its ingredients are part of it.
    """
    places = folder.rglob(f"{rounds.FOLDER}/*/{rounds.INGREDIENTS}")
    ingredients = {path for path in places if (path.parents[2] / CONFIG).exists()}
    begun = {path.parent for path in folder.rglob(SUMMARY)} | {path.parents[1] for path in folder.rglob(_OVERRIDES)}
    begun |= {path.parents[2] for path in ingredients}
    runs = [_read(path, folder) for path in begun if ingredients.isdisjoint(path.parents)]
    known = {run.sample for run in runs}
    sweeps = [path for path in folder.rglob(_SWEEP) if ingredients.isdisjoint(path.parents)]
    runs += [run for path in sweeps for run in _planned(path, folder) if run.sample not in known]
    return sorted(runs, key=lambda run: [(part.isdigit(), part.zfill(20), part) for part in Path(run.folder).parts])


def _read(path: Path, root: Path) -> Run:
    """A run from its folder."""
    name = str(path.relative_to(root))
    if not (path / SUMMARY).exists():
        resume = f"; ckpt_path={path / CHECKPOINT} resumes it" if (path / CHECKPOINT).exists() else ""
        by_hydra = (path / _OVERRIDES).exists()  # not by sparsetrain-soup, which writes its overrides at its end
        return Run(
            name,
            _values([str(override) for override in OmegaConf.load(path / _OVERRIDES)] if by_hydra else []),
            OmegaConf.load(path / (_BEGUN_WITH if by_hydra else CONFIG)).seed,
            problem=f"its training has not ended: it failed, was killed or still runs{resume}",
        )
    try:
        summary = json.loads((path / SUMMARY).read_text())
        overrides, seed, sparsity = summary["overrides"], summary["seed"], summary["sparsity"]
    except (ValueError, KeyError, TypeError):
        return Run(name, {}, None, problem=f"its {SUMMARY} is damaged, or not of `train`")
    if overrides is None:
        return Run(name, {}, None, problem="it was started by Python code, which leaves no overrides to sort it by")
    return Run(name, _values(overrides), seed, sparsity, _metrics(summary), _problem(summary), _prunes(path / CONFIG))


def _metrics(summary: Mapping[str, Any]) -> dict[str, float]:
    return {f"{of}/{name}": value for of in ("test", "val") for name, value in summary.get(of, {}).items()}


def _problem(summary: Mapping[str, Any]) -> str | None:
    if "wall_time_s" not in summary:  # train() adds it last
        return "it was trained, but its test has not ended: it failed, was killed or still runs"
    bad = [f"{name} is {value}" for name, value in _metrics(summary).items() if not math.isfinite(value)]
    return f"it diverged: {', '.join(bad)}" if bad else None


def _prunes(config: Path) -> bool:
    """Whether a run's method aims at zeros at any time; so does one that names no sparsity, such as of N:M layers.

    True if there is no configuration to tell it by.
    """
    if not config.exists():
        return True
    cfg: Any = OmegaConf.to_container(OmegaConf.load(config))
    method = cfg.get("method", {})
    if method is None:
        return False
    schedule = method.get("schedule") or {}
    named = [method.get("sparsity"), method.get("per_round"), *(schedule.get(name) for name in _TARGETS)]
    targets = [target for target in named if target is not None]
    return not targets or any(targets)


def _planned(path: Path, root: Path) -> Iterator[Run]:
    """The jobs of a sweep from its multirun.yaml; none of a sweeper that samples them, or has a list of its own."""
    cfg = OmegaConf.load(path)
    parsed = OverridesParser.create().parse_overrides([str(override) for override in cfg.hydra.overrides.task])
    sweeper, kinds = cfg.hydra.sweeper, {override.value_type for override in parsed}
    if not sweeper._target_.endswith(".BasicSweeper") or sweeper.params or ValueType.GLOB_CHOICE_SWEEP in kinds:
        return
    choices = {
        _name(override): [*override.sweep_string_iterator()]
        if override.is_sweep_override()
        else [override.get_value_element_as_str()]
        for override in parsed
    }
    for number, values in enumerate(product(*choices.values())):
        overrides = dict(zip(choices, values, strict=True))
        seed = overrides.get("seed", str(cfg.seed))
        folder = (path.parent / str(number)).relative_to(root)
        yield Run(str(folder), overrides, int(seed) if seed.isdigit() else None, problem="it has not begun")


def _values(overrides: Sequence[str]) -> dict[str, str]:
    """Name -> value; a command line and a sweep write the same value differently: false and False."""
    parsed = OverridesParser.create().parse_overrides(list(overrides))
    return {_name(override): override.get_value_element_as_str() for override in parsed}


def _name(override: Override) -> str:
    return override.get_key_element().lstrip("+")


def _described(run: Run, sweep: Sweep) -> str:
    """The run's folder, and how it differs from others."""
    differing = {name for name, value in run.setting if sweep.common.get(name) != value} | {"seed"}
    own = [f"{name}={value}" for name, value in run.overrides.items() if name in differing]
    return f"{run.folder} ({' '.join(own)})" if own else run.folder


if __name__ == "__main__":
    main()
