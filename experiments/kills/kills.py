"""Kill a training run with SIGKILL at random moments, resume it, and compare its end with the uninterrupted run's.

    python experiments/kills/kills.py             # 30 kills; writes results/kills.json and the table in README.md
    python experiments/kills/kills.py --report    # the table only, from results/kills.json

Each run is a process of its own, forked from one that has imported everything.
"""

import argparse
import json
import logging
import multiprocessing
import os
import pickle
import random
import signal
import tempfile
import time
import warnings
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import date
from functools import partial
from importlib import metadata
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.plugins.io import TorchCheckpointIO
from torch import Tensor, nn

from sparsetrain import Cubic, ExactResume, GradualMagnitudePruning
from sparsetrain.cli.artifacts import git_state
from sparsetrain.cli.checkpoints import AtomicCheckpointIO
from sparsetrain.data import Digits
from sparsetrain.models import Classifier, Cosine, LeNet300100
from sparsetrain.report import markdown_table

HERE = Path(__file__).parent
RESULTS, README = HERE / "results" / "kills.json", HERE / "README.md"
BEGIN, END = "<!-- table:begin -->", "<!-- table:end -->"

RUN_SEED, EPOCHS, STEPS_PER_EPOCH, SAVE_EVERY = 11, 5, 16, 3
STEPS = EPOCHS * STEPS_PER_EPOCH
PATIENCE_S = 120.0  # a run takes about 2 s
EPOCH_MEANS = ("train/accuracy", "train/top5")
WRITERS = ("atomic", "lightning")
PRELOADED = ("lightning", "sparsetrain.models", "sparsetrain.data", "sklearn.datasets", "sparsetrain.cli.checkpoints")

JOURNAL, CHECKPOINTS, FINAL = "journal.jsonl", "checkpoints", "final.pt"


@dataclass(frozen=True)
class Kill:
    """When a run is to be killed.

    Args:
        seed: of the three that follow; see `draw`.
        writer: how checkpoints are written: "atomic" as `train.py` does it, one file that is replaced; "lightning" as
            a Trainer does it by itself, a new file each time and a copy called last.ckpt.
        in_write: whether to wait for the next write of a checkpoint.
        after_step: the number of steps after which the clock starts, in [1, STEPS).
        delay_s: seconds from then, or from the beginning of the write, to the signal.
    """

    seed: int
    writer: str
    in_write: bool
    after_step: int
    delay_s: float


@dataclass(frozen=True)
class Outcome:
    """What a kill did and how the resumed run ended.

    Args:
        kill: the plan.
        wall_s: seconds from the first step to the signal.
        step_reached: optimizer steps in the journal of the killed run.
        unfinished: files that the kill left half written.
        checkpoint: the newest complete checkpoint; None if there was none yet, and the run began anew.
        checkpoint_step: the step it was saved at.
        differences: where the resumed run differs from the uninterrupted one; empty if they are identical.
    """

    kill: Kill
    wall_s: float
    step_reached: int
    unfinished: list[str]
    checkpoint: str | None
    checkpoint_step: int
    differences: list[str]


class Journal(L.Callback):
    """Appends to a file what each step and validation came to, a line for each."""

    def __init__(self, path: Path, pruning: GradualMagnitudePruning) -> None:
        self.file, self.pruning = path.open("ab", buffering=0), pruning

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, *_: Any) -> None:
        self._write(
            kind="step",
            step=trainer.global_step,
            loss=float(outputs["loss"]),
            lr=trainer.optimizers[0].param_groups[0]["lr"],
            sparsity=self.pruning.masks.sparsity(),
        )

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        metrics = {name: float(trainer.callback_metrics[name]) for name in ("val/loss", "val/accuracy")}
        self._write(kind="validation", step=trainer.global_step, **metrics)

    def _write(self, **entry: Any) -> None:
        self.file.write(json.dumps(entry).encode() + b"\n")


def train(folder: Path, writer: str, scratch: Path, checkpoint: Path | None) -> None:
    """LeNet-300-100 with dropout on shifted digits, to 90 % sparsity; the same run in whichever process.

    Args:
        folder: where the journal, the checkpoints and the final state go.
        writer: see `Kill`.
        scratch: the system's temporary folder, as far as this process knows.
        checkpoint: to resume from.
    """
    torch.set_num_threads(1)
    tempfile.tempdir = str(scratch)
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.simplefilter("ignore")
    L.seed_everything(RUN_SEED, verbose=False)
    module = Classifier(
        nn.Sequential(nn.Dropout(0.1), LeNet300100((1, 8, 8))),
        optimizer=partial(torch.optim.SGD, lr=0.1, momentum=0.9, weight_decay=1e-4),
        lr_policy=Cosine(warmup="8it"),
        num_classes=Digits.num_classes,
    )
    pruning = GradualMagnitudePruning(Cubic(0.9, begin="0.5ep", end="4ep", every="7it"))
    trainer = L.Trainer(
        max_epochs=EPOCHS,
        accelerator="cpu",
        callbacks=[pruning, ExactResume(), Journal(folder / JOURNAL, pruning), *_checkpoint_callbacks(folder, writer)],
        plugins=[AtomicCheckpointIO() if writer == "atomic" else TorchCheckpointIO()],
        default_root_dir=folder,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
    )
    trainer.fit(module, datamodule=Digits(batch_size=64, seed=RUN_SEED), ckpt_path=checkpoint)
    history = [asdict(update) for update in pruning.history]
    torch.save({"weights": module.state_dict(), "masks": dict(pruning.masks), "history": history}, folder / FINAL)


def _checkpoint_callbacks(folder: Path, writer: str) -> list[L.Callback]:
    settings: dict[str, Any] = {"dirpath": folder / CHECKPOINTS, "save_top_k": -1, "save_last": True}
    if writer == "atomic":  # as in sparsetrain/conf/config.yaml
        settings = {"dirpath": folder / CHECKPOINTS, "filename": "last", "enable_version_counter": False}
    return [
        ModelCheckpoint(every_n_train_steps=SAVE_EVERY, **settings),
        ModelCheckpoint(every_n_epochs=1, save_on_train_epoch_end=True, **settings),
    ]


def draw(seed: int, writer: str, *, in_write: bool, step_s: float) -> Kill:
    """A random moment; `step_s` is how long a step takes, in seconds."""
    stream = random.Random(seed)
    after_step = stream.randrange(1, STEPS)
    return Kill(seed, writer, in_write, after_step, stream.uniform(0.0, 0.002 if in_write else step_s))


def kill_and_resume(kill: Kill, reference: Path, root: Path) -> Outcome | None:
    """Train, kill, resume and compare; None if the run was over before the signal.

    Args:
        kill: the moment.
        reference: folder of the uninterrupted run with the same writer.
        root: where the run's folder is made.
    """
    folder = _new_folder(root, f"kill-{kill.seed}")
    with _scratch() as scratch:
        wall_s = _run_until(kill, folder, scratch)
        if wall_s is None:
            return None
        unfinished = [path.name for path in scratch.iterdir()]
    killed = _read_journal(folder)
    unfinished += [path.name for path in (folder / CHECKPOINTS).glob(".*.tmp")]
    unfinished += [path.name for path in (folder / CHECKPOINTS).glob("*.ckpt") if _load(path) is None]
    checkpoint = newest_complete(folder)
    saved = None if checkpoint is None else _load(checkpoint)
    step = 0 if saved is None else saved["global_step"]
    (folder / JOURNAL).rename(folder / f"killed-{JOURNAL}")
    run(folder, kill.writer, checkpoint)
    differences = [
        *_journal_differences(_read_journal(reference), killed, _read_journal(folder), step),
        *state_differences(_end(reference), _end(folder)),
    ]
    name = None if checkpoint is None else checkpoint.name
    return Outcome(kill, wall_s, _steps(killed), unfinished, name, step, differences)


def run(folder: Path, writer: str, checkpoint: Path | None = None) -> None:
    """Train to the end in a new process."""
    with _scratch() as scratch:
        process = _start(folder, writer, scratch, checkpoint)
        process.join(PATIENCE_S)
        if process.exitcode != 0:
            process.kill()
            raise RuntimeError(f"The run in {folder} ended with exit code {process.exitcode}; its traceback is above.")


def uninterrupted(root: Path, writer: str) -> Path:
    """The folder of a run that nothing disturbed."""
    folder = _new_folder(root, f"whole-{writer}")
    run(folder, writer)
    return folder


def newest_complete(folder: Path) -> Path | None:
    """The checkpoint that a user would resume from: the newest file that loads."""
    files = sorted((folder / CHECKPOINTS).glob("*.ckpt"), key=lambda path: path.stat().st_mtime_ns, reverse=True)
    return next((path for path in files if _load(path) is not None), None)


def state_differences(one: Any, other: Any, path: str = "") -> list[str]:
    """The paths at which two nested states are not equal, tensors bit for bit."""
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        same = one.dtype == other.dtype and one.shape == other.shape and _bytes(one) == _bytes(other)
        return [] if same else [path]
    if isinstance(one, dict) and isinstance(other, dict) and one.keys() == other.keys():
        return [found for key in one for found in state_differences(one[key], other[key], f"{path}/{key}")]
    if isinstance(one, list | tuple) and isinstance(other, list | tuple) and len(one) == len(other):
        pairs = zip(one, other, strict=True)
        return [found for i, (a, b) in enumerate(pairs) for found in state_differences(a, b, f"{path}/{i}")]
    return [] if type(one) is type(other) and one == other else [path]


def _start(folder: Path, writer: str, scratch: Path, checkpoint: Path | None) -> BaseProcess:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(list(PRELOADED))
    process = context.Process(target=train, args=(folder, writer, scratch, checkpoint), daemon=True)
    process.start()
    return process


def _run_until(kill: Kill, folder: Path, scratch: Path) -> float | None:
    """Start a run and kill it; returns the seconds from its first step to the signal."""
    process = _start(folder, kill.writer, scratch, None)
    try:
        return _kill_when_due(process, kill, folder, scratch)
    finally:
        process.kill()
        process.join()


def _kill_when_due(process: BaseProcess, kill: Kill, folder: Path, scratch: Path) -> float | None:
    assert process.pid is not None
    journal, checkpoints = folder / JOURNAL, folder / CHECKPOINTS
    alive = process.is_alive
    if not _wait(lambda: journal.exists() and journal.stat().st_size > 0, alive, pause_s=0.0005):
        raise RuntimeError(f"The run in {folder} made no step; its traceback is above.")
    began = time.perf_counter()
    if not _wait(lambda: _steps(_read_journal(folder)) >= kill.after_step, alive, pause_s=0.0005):
        return None
    if kill.in_write:
        # Without a pause: a write takes a few milliseconds.
        temporary = checkpoints / ".last.ckpt.tmp"
        writing = temporary.exists if kill.writer == "atomic" else lambda: any(os.scandir(scratch))
        if not _wait(writing, alive, pause_s=0.0):
            return None
    until = time.perf_counter() + kill.delay_s
    while time.perf_counter() < until:
        pass
    os.kill(process.pid, signal.SIGKILL)
    wall_s = time.perf_counter() - began
    process.join()
    return wall_s if process.exitcode == -signal.SIGKILL else None


def _wait(condition: Callable[[], bool], alive: Callable[[], bool], *, pause_s: float) -> bool:
    """Whether `condition` came true before the process ended."""
    deadline = time.perf_counter() + PATIENCE_S
    while not condition():
        if not alive():
            return False
        if time.perf_counter() > deadline:
            raise TimeoutError(f"A run did not come on in {PATIENCE_S:.0f} s.")
        time.sleep(pause_s)
    return True


def _load(path: Path) -> dict[str, Any] | None:
    """A checkpoint, or None if it is not whole."""
    try:
        checkpoint: dict[str, Any] = torch.load(path, weights_only=True)
    except (RuntimeError, EOFError, OSError, pickle.UnpicklingError, zipfile.BadZipFile):
        return None
    return checkpoint


def _end(folder: Path) -> dict[str, Any]:
    """All that a run leaves: its final state, and its last checkpoint but for what is exempt.

    That is the paths of other checkpoints, and the training metrics averaged over the (interrupted) epoch.
    """
    path = newest_complete(folder)
    assert path is not None
    checkpoint = _load(path)
    assert checkpoint is not None
    callbacks = {name: s for name, s in checkpoint["callbacks"].items() if not name.startswith("ModelCheckpoint")}
    for name in EPOCH_MEANS:
        del callbacks["ExactResume"]["metrics"][name]
    final: dict[str, Any] = torch.load(folder / FINAL, weights_only=True)
    return {"final": final, "checkpoint": {**checkpoint, "callbacks": callbacks}}


Entries = dict[tuple[str, int], dict[str, Any]]


def _read_journal(folder: Path) -> Entries:
    """(kind, step) -> what was logged."""
    text = (folder / JOURNAL).read_text() if (folder / JOURNAL).exists() else ""
    entries = map(json.loads, text.split("\n")[:-1])  # what follows the last line end is half written
    return {(entry["kind"], entry["step"]): entry for entry in entries}


def _journal_differences(whole: Entries, killed: Entries, resumed: Entries, step: int) -> list[str]:
    """Lines that either part logged differently, and lines after the checkpoint that the resumed run did not log."""
    wrong = [key for part in (killed, resumed) for key, entry in part.items() if whole.get(key) != entry]
    missing = [key for key in whole if key not in resumed and (key[1] > step or key not in killed)]
    return [f"journal: {kind} {number}" for kind, number in (*wrong, *missing)]


def _steps(entries: Entries) -> int:
    return max((step for _, step in entries), default=0)


def _bytes(tensor: Tensor) -> bytes:
    return tensor.detach().contiguous().flatten().view(torch.uint8).numpy().tobytes()


def _new_folder(root: Path, name: str) -> Path:
    folder = root / name
    folder.mkdir()
    return folder


@contextmanager
def _scratch() -> Iterator[Path]:
    """A temporary folder, on another file system where there is one: Lightning's writer then copies from it."""
    memory = Path("/dev/shm")
    with tempfile.TemporaryDirectory(dir=memory if os.access(memory, os.W_OK) else None) as folder:
        yield Path(folder)


def measure(count: int) -> dict[str, Any]:
    """Kill `count` runs; every other one with each writer, every other pair while a checkpoint is written."""
    outcomes: list[Outcome] = []
    too_late = 0
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        began = time.perf_counter()
        references = {writer: uninterrupted(root, writer) for writer in WRITERS}
        step_s = _seconds_per_step(references["atomic"])
        while len(outcomes) < count:
            number = len(outcomes)
            writer, in_write = WRITERS[number % 2], number // 2 % 2 == 1
            kill = draw(1000 + number + too_late * count, writer, in_write=in_write, step_s=step_s)
            outcome = kill_and_resume(kill, references[writer], root)
            if outcome is None:
                too_late += 1
                continue
            outcomes.append(outcome)
            print(f"{number + 1:3d}  {outcome}", flush=True)
        total_s = time.perf_counter() - began
    return {
        "date": date.today().isoformat(),
        "git": git_state(),
        "versions": {name: metadata.version(name) for name in ("sparsetrain", "torch", "lightning")},
        "device": f"CPU, 1 thread of {os.cpu_count()}",
        "steps": STEPS,
        "redrawn": too_late,  # runs that were over before the signal came
        "total_s": round(total_s, 1),
        "kills": [
            {
                **asdict(outcome.kill),
                "wall_s": round(outcome.wall_s, 4),
                "step_reached": outcome.step_reached,
                "during_write": bool(outcome.unfinished),
                "unfinished": outcome.unfinished,
                "checkpoint": outcome.checkpoint,
                "checkpoint_step": outcome.checkpoint_step,
                "identical": not outcome.differences,
                "differences": outcome.differences,
            }
            for outcome in outcomes
        ],
    }


def _seconds_per_step(folder: Path) -> float:
    """About how long a step takes, checkpoints included."""
    born = (folder / JOURNAL).stat()
    first = min(path.stat().st_mtime for path in (folder / CHECKPOINTS).iterdir())
    return max((born.st_mtime - first) / STEPS, 0.01)


def write_report(results: dict[str, Any]) -> None:
    """Put the table of `results` into README.md."""
    kills = results["kills"]
    rows = [
        (
            str(kill["seed"]),
            kill["writer"],
            f"{kill['wall_s']:.3f}",
            str(kill["step_reached"]),
            ", ".join(f"`{name}`" for name in kill["unfinished"]) or "-",
            f"`{kill['checkpoint']}`, step {kill['checkpoint_step']}" if kill["checkpoint"] else "none yet",
            "yes" if kill["identical"] else "NO: " + ", ".join(kill["differences"][:3]),
        )
        for kill in kills
    ]
    header = ("seed", "writer", "killed after s", "at step", "half-written files left", "resumed from", "identical")
    identical, in_write = (sum(kill[key] for kill in kills) for key in ("identical", "during_write"))
    facts = ", ".join(f"{name} {version}" for name, version in results["versions"].items())
    commit = results["git"]["commit"] if results["git"] else "none"
    text = (
        f"**{identical} of {len(kills)} identical**; {in_write} of the kills fell into the writing of a checkpoint.\n\n"
        f"{markdown_table(header, rows)}\n\n"
        f"{results['date']}, commit {commit}; {results['device']}; {facts}; {results['total_s']:.0f} s in all."
    )
    before, _, rest = README.read_text().partition(BEGIN)
    README.write_text(f"{before}{BEGIN}\n{text}\n{END}{rest.partition(END)[2]}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=30, help="how many runs to kill")
    parser.add_argument("--report", action="store_true", help="only write the table of results/kills.json")
    arguments = parser.parse_args()
    if not arguments.report:
        results = measure(arguments.count)
        RESULTS.parent.mkdir(exist_ok=True)
        RESULTS.write_text(json.dumps(results, indent=1) + "\n")
    results = json.loads(RESULTS.read_text())
    write_report(results)
    if not all(kill["identical"] for kill in results["kills"]):
        raise SystemExit("A resumed run differs from the uninterrupted one; see results/kills.json.")


if __name__ == "__main__":
    main()
