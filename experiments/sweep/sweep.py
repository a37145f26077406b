"""Is a sweep quicker side by side, and are its results the same? Eight seeds by each launcher, in turn.

python experiments/sweep/sweep.py             # 3 sweeps by each way; writes results/sweep.json and the table
python experiments/sweep/sweep.py --report    # only the table of results/sweep.json
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any

from sparsetrain.cli.artifacts import MASKS, MODEL, cpu_name, git_state
from sparsetrain.report import markdown_table, write_between

HERE = Path(__file__).parent
RESULTS, README = HERE / "results" / "sweep.json", HERE / "README.md"
RUNS = Path("runs/sweep")
SEEDS = tuple(range(1, 9))
REPETITIONS = 3
RECIPE = ("+experiment=digits_gmp", "trainer=cpu", "trainer.enable_progress_bar=false")
LENGTH = ("trainer.max_epochs=20", "method.schedule.begin=2ep", "method.schedule.end=14ep")


@dataclass(frozen=True)
class Way:
    """How the jobs are run.

    Args:
        title: what the table calls it.
        launcher: Hydra overrides that choose it.
        threads: of each job, set by OMP_NUM_THREADS; None for what it is where nobody sets it.
    """

    title: str
    launcher: tuple[str, ...]
    threads: int | None


WAYS = {
    "serial": Way("one by one, 1 thread", ("launcher=basic",), 1),
    "serial_all": Way("one by one, all threads", ("launcher=basic",), None),
    "joblib": Way("`launcher=joblib`, 2 jobs at a time", ("launcher=joblib", "hydra.launcher.n_jobs=2"), None),
}


def sweep(name: str, folder: Path, length: tuple[str, ...], seeds: tuple[int, ...]) -> float:
    """Run the sweep as from the command line, into `folder`; gives its seconds, from start to end of the program."""
    way = WAYS[name]
    environment = {key: value for key, value in os.environ.items() if key != "OMP_NUM_THREADS"}
    if way.threads is not None:
        environment["OMP_NUM_THREADS"] = str(way.threads)
    jobs = (f"hydra.sweep.dir={folder}", f"seed={','.join(map(str, seeds))}")
    command = [sys.executable, "-m", "sparsetrain.cli.train", "-m", *RECIPE, *length, *way.launcher, *jobs]
    started = time.perf_counter()
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    seconds = time.perf_counter() - started
    if done.returncode:
        raise RuntimeError(f"The sweep in {folder} failed:\n{done.stderr}")
    return seconds


def measure(root: Path, repetitions: int, length: tuple[str, ...], seeds: tuple[int, ...]) -> dict[str, Any]:
    """Repeat the sweep by each way, in turn, and compare every job with that of the first sweep one by one."""
    ways: dict[str, dict[str, Any]] = {name: {"wall_s": [], "identical": True} for name in WAYS}
    folders = {(name, number): root / f"{name}-{number}" for number in range(repetitions) for name in WAYS}
    for (name, number), folder in folders.items():
        ways[name]["wall_s"].append(round(sweep(name, folder, length, seeds), 3))
        ways[name]["identical"] &= _same(folder, folders["serial", 0], len(seeds))
        print(f"{WAYS[name].title}, {number + 1} of {repetitions}: {ways[name]['wall_s'][-1]:.1f} s", flush=True)
    for name, way in ways.items():
        way["median_s"] = statistics.median(way["wall_s"])
        way["threads"] = _summary(folders[name, 0])["device"]["threads"]
    packages = ("joblib", "hydra-core", "hydra-joblib-launcher")
    return {
        "date": date.today().isoformat(),
        "git": git_state(),
        "device": {"name": cpu_name(), "cores": os.cpu_count()},
        "versions": _summary(folders["serial", 0])["versions"] | {name: version(name) for name in packages},
        "recipe": [*RECIPE, *length],
        "seeds": [*seeds],
        "ways": ways,
        "speedup": min(ways[name]["median_s"] for name in ("serial", "serial_all")) / ways["joblib"]["median_s"],
    }


def _same(sweep: Path, other: Path, jobs: int) -> bool:
    """Whether every job left the same weights and masks, byte for byte."""
    files = [Path(str(job), file) for job in range(jobs) for file in (MODEL, MASKS)]
    return all((sweep / file).read_bytes() == (other / file).read_bytes() for file in files)


def _summary(sweep: Path) -> dict[str, Any]:
    """Of the sweep's first job."""
    summary: dict[str, Any] = json.loads((sweep / "0" / "summary.json").read_text())
    return summary


def table(results: Mapping[str, Any]) -> str:
    """Wall time of each way, and of the quicker one by one against joblib's."""
    ways = results["ways"]
    lines = [
        (
            WAYS[name].title,
            way["threads"],
            f"{way['median_s']:.1f}",
            f"{min(way['wall_s']):.1f} to {max(way['wall_s']):.1f}",
            "yes" if way["identical"] else "no",
        )
        for name, way in ways.items()
    ]
    header = ("way", "threads a job", "sweep, s (median)", "range", "weights and masks identical")
    device, git = results["device"], results["git"]
    software = ", ".join(f"{name} {number}" for name, number in results["versions"].items())
    commit = git["commit"][:10] if git and git["commit"] else "none"
    return (
        f"{markdown_table(header, lines)}\n\n"
        f"Side by side the sweep of {len(results['seeds'])} jobs is {results['speedup']:.2f} times as fast as the "
        f"quicker one by one.\n\n{device['name']}, {device['cores']} cores; {software}; {results['date']}, "
        f"commit {commit}."
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--report", action="store_true", help="only the table of results/sweep.json")
    arguments = parser.parse_args()
    if not arguments.report:
        results = measure(RUNS / time.strftime("%Y-%m-%d_%H-%M-%S"), REPETITIONS, LENGTH, SEEDS)
        RESULTS.parent.mkdir(exist_ok=True)
        RESULTS.write_text(json.dumps(results, indent=1) + "\n")
    results = json.loads(RESULTS.read_text())
    write_between(README, "sweep", table(results))
    different = [name for name, way in results["ways"].items() if not way["identical"]]
    if different:
        raise SystemExit(f"Jobs of {different} left other weights or masks than one by one; see {RESULTS}.")


if __name__ == "__main__":
    main()
