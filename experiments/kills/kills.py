"""Kill training runs with SIGKILL at random moments, resume them, and compare their ends with uninterrupted runs'.

    python experiments/kills/kills.py             # all subjects; writes results/*.json and the tables in README.md
    python experiments/kills/kills.py gradual     # 30 kills of a run of gradual pruning
    python experiments/kills/kills.py rounds      # 20 kills of a run of many rounds, some while a round begins
    python experiments/kills/kills.py soup        # 20 kills of a run of a sparse soup, some while one is formed
    python experiments/kills/kills.py --report    # the tables only, from results/*.json

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
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
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

from sparsetrain import (
    Cubic,
    ExactResume,
    GradualMagnitudePruning,
    IterativeMagnitudePruning,
    SparseModelSoup,
    SparsityCallback,
)
from sparsetrain.cli.artifacts import git_state
from sparsetrain.cli.checkpoints import AtomicCheckpointIO
from sparsetrain.data import Digits
from sparsetrain.models import CifarResNet, Classifier, Cosine, LeNet300100
from sparsetrain.report import markdown_table, write_between

HERE = Path(__file__).parent
README = HERE / "README.md"

RUN_SEED, STEPS_PER_EPOCH, SAVE_EVERY = 11, 16, 3
PATIENCE_S = 120.0  # a run takes a few seconds
# About how long these moments last.
LASTS_S = {"between": 0.03, "pruning": 0.008, "averaging": 0.005, "recalibration": 0.012, "write": 0.002}
EPOCH_MEANS = ("train/accuracy", "train/top5")
WRITERS = ("atomic", "lightning")
PRELOADED = ("lightning", "sparsetrain.models", "sparsetrain.data", "sklearn.datasets", "sparsetrain.cli.checkpoints")

JOURNAL, CHECKPOINTS, FINAL = "journal.jsonl", "checkpoints", "final.pt"


@dataclass(frozen=True)
class Subject:
    """A run that is to be killed.

    Args:
        method: makes the callback that prunes.
        network: makes the network, of images of `Digits`.
        epochs: how long it is.
        moments: when runs are killed, in turn for a pair of runs, one with each writer; see `Kill`.
        count: how many runs are killed.
        results: the file that the outcomes are written to.
        changes: the numbers of steps after which the next round begins or, of a soup, the next ingredient of a round.
        soups: those after which a soup is formed.
        words: the changes of `Outcome` -> where such kills fell, as the report says it.
    """

    method: Callable[[], SparsityCallback]
    network: Callable[[], nn.Module]
    epochs: int
    moments: tuple[str, ...]
    count: int
    results: Path
    changes: tuple[int, ...] = ()
    soups: tuple[int, ...] = ()
    words: Mapping[str, str] = field(default_factory=dict)

    @property
    def steps(self) -> int:
        """Of the whole run."""
        return self.epochs * STEPS_PER_EPOCH


def _gradual() -> SparsityCallback:
    return GradualMagnitudePruning(Cubic(0.9, begin="0.5ep", end="4ep", every="7it"))


def _rounds() -> SparsityCallback:
    return IterativeMagnitudePruning(
        3, "3ep", sparsity=0.9, weights="rewind", rewind_to="1ep", optimizer_state="snapshot"
    )


def _soup() -> SparsityCallback:
    return SparseModelSoup(3, "1ep", sparsity=0.9, ingredients=3)


_lenet = partial(LeNet300100, Digits.input_shape)
_resnet = partial(CifarResNet, 8, in_channels=1, width=4)  # it has batch norm

SUBJECTS = {
    "gradual": Subject(_gradual, _lenet, 5, ("any", "write"), 30, HERE / "results" / "kills.json"),
    # A dense phase of 3 epochs, then 3 rounds of 2.
    "rounds": Subject(
        _rounds,
        _lenet,
        9,
        ("any", "write", "between", "pruning"),
        20,
        HERE / "results" / "rounds.json",
        changes=(48, 80, 112),
        words={"between": "between two rounds", "pruning": "into the pruning and rewinding of a round"},
    ),
    # A dense phase of an epoch, then 3 rounds of 3 ingredients, each an epoch.
    "soup": Subject(
        _soup,
        _resnet,
        10,
        ("any", "write", "between", "averaging", "recalibration"),
        20,
        HERE / "results" / "soup.json",
        changes=(32, 48, 80, 96, 128, 144),
        soups=(64, 112, 160),
        words={
            "between": "between two ingredients",
            "pruning": "into the way back from an ingredient to the pruned network",
            "averaging": "into the averaging of a soup",
            "recalibration": "into the recalibration of its batch norm",
        },
    ),
}


@dataclass(frozen=True)
class Kill:
    """When a run is to be killed.

    Args:
        seed: of the two last; see `draw`.
        writer: how checkpoints are written: "atomic" as `train.py` does it, one file that is replaced; "lightning" as
            a Trainer does it by itself, a new file each time and a copy called last.ckpt.
        moment: "any"; "write", as the next checkpoint is written; "between", after the last step of a round or of an
            ingredient that another one follows; "pruning", as the next round prunes and rewinds, before its first
            step; "averaging", after the last step before a soup; "recalibration", as its batch norm is recalibrated.
        after_step: the number of steps after which the clock starts, in [1, steps of the run].
        delay_s: seconds from then, or from the beginning of the write, round or recalibration, to the signal.
    """

    seed: int
    writer: str
    moment: str
    after_step: int
    delay_s: float


@dataclass(frozen=True)
class Outcome:
    """What a kill did and how the resumed run ended.

    Args:
        kill: the plan.
        wall_s: seconds from the first step to the signal.
        step_reached: optimizer steps in the journal of the killed run.
        change: where it fell at a change of rounds or ingredients: "between" the last step of one and the pruning for
            the next, or in the "pruning" and rewinding; where it fell as a soup was formed: in the "averaging" or the
            "recalibration"; None elsewhere.
        unfinished: files that the kill left half written.
        checkpoint: the newest complete checkpoint; None if there was none yet, and the run began anew.
        checkpoint_step: the step it was saved at.
        differences: where the resumed run differs from the uninterrupted one; empty if they are identical.
    """

    kill: Kill
    wall_s: float
    step_reached: int
    change: str | None
    unfinished: list[str]
    checkpoint: str | None
    checkpoint_step: int
    differences: list[str]


class Journal(L.Callback):
    """Appends to a file a line for each step and validation with what it came to, and one where each change begins."""

    def __init__(self, path: Path, pruning: SparsityCallback, subject: Subject) -> None:
        self.file, self.pruning, self.subject = path.open("ab", buffering=0), pruning, subject
        self.forms_soup = False

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        def note_recalibration(*_: Any) -> None:
            if self.forms_soup:
                self._write_change(trainer, "recalibration")

        pl_module.register_forward_pre_hook(note_recalibration)

    def on_train_batch_start(self, trainer: L.Trainer, *_: Any) -> None:
        if trainer.global_step in self.subject.changes:
            self._write_change(trainer, "pruning")  # the method's turn is after this callback's

    def on_before_zero_grad(self, trainer: L.Trainer, *_: Any) -> None:
        if trainer.global_step in self.subject.changes:
            self._write_change(trainer, "begun")

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, *_: Any) -> None:
        self._write(
            kind="step",
            step=trainer.global_step,
            loss=float(outputs["loss"]),
            lr=trainer.optimizers[0].param_groups[0]["lr"],
            sparsity=self.pruning.masks.sparsity(),
        )
        self.forms_soup = trainer.global_step in self.subject.soups  # the method's turn is next

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if self.forms_soup:
            self._write_change(trainer, "soup")
        self.forms_soup = False

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        metrics = {name: float(trainer.callback_metrics[name]) for name in ("val/loss", "val/accuracy")}
        self._write(kind="validation", step=trainer.global_step, **metrics)

    def _write_change(self, trainer: L.Trainer, kind: str) -> None:
        self._write(kind=kind, step=trainer.global_step, sparsity=self.pruning.masks.sparsity())

    def _write(self, **entry: Any) -> None:
        self.file.write(json.dumps(entry).encode() + b"\n")


def train(name: str, folder: Path, writer: str, scratch: Path, checkpoint: Path | None) -> None:
    """The subject's network with dropout on shifted digits, to 90 % sparsity; the same run in whichever process.

    Args:
        name: of the subject.
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
    subject = SUBJECTS[name]
    module = Classifier(
        nn.Sequential(nn.Dropout(0.1), subject.network()),
        optimizer=partial(torch.optim.SGD, lr=0.1, momentum=0.9, weight_decay=1e-4),
        lr_policy=Cosine(warmup="8it"),
        num_classes=Digits.num_classes,
    )
    pruning = subject.method()
    journal = Journal(folder / JOURNAL, pruning, subject)
    trainer = L.Trainer(
        max_epochs=subject.epochs,
        accelerator="cpu",
        callbacks=[pruning, ExactResume(), journal, *_checkpoint_callbacks(folder, writer)],
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


def draw(name: str, seed: int, writer: str, moment: str, *, step_s: float) -> Kill:
    """A random time at `moment` of subject `name`; `step_s` is how long a step takes, in seconds."""
    stream, subject = random.Random(seed), SUBJECTS[name]
    if moment in ("any", "write"):
        after_step = stream.randrange(1, subject.steps)
    else:
        steps = subject.changes if moment in ("between", "pruning") else subject.soups
        after_step = steps[seed % len(steps)]
    return Kill(seed, writer, moment, after_step, stream.uniform(0.0, LASTS_S.get(moment, step_s)))


def kill_and_resume(name: str, kill: Kill, reference: Path, root: Path) -> Outcome | None:
    """Train, kill, resume and compare; None if the run was over before the signal.

    Args:
        name: of the subject.
        kill: the moment.
        reference: folder of the uninterrupted run with the same writer.
        root: where the run's folder is made.
    """
    folder = _new_folder(root, f"kill-{kill.seed}")
    with _scratch() as scratch:
        wall_s = _run_until(name, kill, folder, scratch)
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
    run(name, folder, kill.writer, checkpoint)
    epochs = SUBJECTS[name].epochs
    differences = [
        *_journal_differences(_read_journal(reference), killed, _read_journal(folder), step),
        *state_differences(_end(reference, epochs), _end(folder, epochs)),
    ]
    resumed_from = None if checkpoint is None else checkpoint.name
    change = _change(killed, SUBJECTS[name])
    return Outcome(kill, wall_s, _steps(killed), change, unfinished, resumed_from, step, differences)


def run(name: str, folder: Path, writer: str, checkpoint: Path | None = None) -> None:
    """Train to the end in a new process."""
    with _scratch() as scratch:
        process = _start(name, folder, writer, scratch, checkpoint)
        process.join(PATIENCE_S)
        if process.exitcode != 0:
            process.kill()
            raise RuntimeError(f"The run in {folder} ended with exit code {process.exitcode}; its traceback is above.")


def uninterrupted(name: str, root: Path, writer: str) -> Path:
    """The folder of a run of subject `name` that nothing disturbed."""
    folder = _new_folder(root, f"whole-{writer}")
    run(name, folder, writer)
    return folder


def newest_complete(folder: Path) -> Path | None:
    """The checkpoint that a user would resume from: the newest file that loads."""
    return next((path for path in _newest_first(folder) if _load(path) is not None), None)


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


def _start(name: str, folder: Path, writer: str, scratch: Path, checkpoint: Path | None) -> BaseProcess:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(list(PRELOADED))
    process = context.Process(target=train, args=(name, folder, writer, scratch, checkpoint), daemon=True)
    process.start()
    return process


def _run_until(name: str, kill: Kill, folder: Path, scratch: Path) -> float | None:
    """Start a run and kill it; returns the seconds from its first step to the signal."""
    process = _start(name, folder, kill.writer, scratch, None)
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
    # Without a pause: what is waited for takes a few milliseconds.
    if kill.moment in ("pruning", "recalibration"):
        if not _wait(lambda: (kill.moment, kill.after_step) in _read_journal(folder), alive, pause_s=0.0):
            return None
    elif kill.moment == "write":
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


def _newest_first(folder: Path) -> list[Path]:
    """The checkpoints, whole or not."""
    return sorted((folder / CHECKPOINTS).glob("*.ckpt"), key=lambda path: path.stat().st_mtime_ns, reverse=True)


def _end(folder: Path, epochs: int) -> dict[str, Any]:
    """All that a run leaves: its final state, and its last checkpoint but for what is exempt.

    That is the paths of other checkpoints, and the training metrics averaged over the (interrupted) epoch. Where
    `save_last` is set, a ModelCheckpoint that has saved nothing in its process saves once more as training ends, with
    all `epochs` counted, which is a moment that the uninterrupted run does not save at; such a file is passed over.
    """
    states = (_load(path) for path in _newest_first(folder))
    checkpoint = next(state for state in states if state is not None and state["epoch"] < epochs)
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


def _change(killed: Entries, subject: Subject) -> str | None:
    """See `Outcome`."""
    step = _steps(killed)
    if step in subject.soups and ("soup", step) not in killed:
        return "recalibration" if ("recalibration", step) in killed else "averaging"
    if step in subject.changes and ("begun", step) not in killed:
        return "pruning" if ("pruning", step) in killed else "between"
    return None


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


def measure(name: str, count: int) -> dict[str, Any]:
    """Kill `count` runs of subject `name`; every other one with each writer, every pair at the next of its moments."""
    subject = SUBJECTS[name]
    outcomes: list[Outcome] = []
    too_late = 0
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        began = time.perf_counter()
        references = {writer: uninterrupted(name, root, writer) for writer in WRITERS}
        step_s = _seconds_per_step(references["atomic"], subject.steps)
        while len(outcomes) < count:
            number = len(outcomes)
            writer, moment = WRITERS[number % 2], subject.moments[number // 2 % len(subject.moments)]
            kill = draw(name, 1000 + number + too_late * count, writer, moment, step_s=step_s)
            outcome = kill_and_resume(name, kill, references[writer], root)
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
        "steps": subject.steps,
        "redrawn": too_late,  # runs that were over before the signal came
        "total_s": round(total_s, 1),
        "kills": [
            {
                **asdict(outcome.kill),
                "wall_s": round(outcome.wall_s, 4),
                "step_reached": outcome.step_reached,
                "during_write": bool(outcome.unfinished),
                "change": outcome.change,
                "unfinished": outcome.unfinished,
                "checkpoint": outcome.checkpoint,
                "checkpoint_step": outcome.checkpoint_step,
                "identical": not outcome.differences,
                "differences": outcome.differences,
            }
            for outcome in outcomes
        ],
    }


def _seconds_per_step(folder: Path, steps: int) -> float:
    """About how long a step takes, checkpoints included."""
    born = (folder / JOURNAL).stat()
    first = min(path.stat().st_mtime for path in (folder / CHECKPOINTS).iterdir())
    return max((born.st_mtime - first) / steps, 0.01)


def table(results: dict[str, Any]) -> str:
    """A row for each kill; those of a run of rounds or of a soup say where they fell at a change."""
    kills = results["kills"]
    header = ["seed", "writer", "killed after s", "at step", "half-written files left", "resumed from", "identical"]
    rows = [
        [
            str(kill["seed"]),
            kill["writer"],
            f"{kill['wall_s']:.3f}",
            str(kill["step_reached"]),
            ", ".join(f"`{name}`" for name in kill["unfinished"]) or "-",
            f"`{kill['checkpoint']}`, step {kill['checkpoint_step']}" if kill["checkpoint"] else "none yet",
            "yes" if kill["identical"] else "NO: " + ", ".join(kill["differences"][:3]),
        ]
        for kill in kills
    ]
    changes = [kill.get("change") for kill in kills]
    if any(changes):
        header.insert(4, "change")
        for row, change in zip(rows, changes, strict=True):
            row.insert(4, change or "-")
    return markdown_table(header, rows)


def write_report(name: str) -> bool:
    """Put the table of a subject's results into README.md; returns whether all runs ended identical."""
    results = json.loads(SUBJECTS[name].results.read_text())
    kills = results["kills"]
    identical, in_write = (sum(kill[key] for kill in kills) for key in ("identical", "during_write"))
    where = [f"{in_write} of the kills fell into the writing of a checkpoint"]
    for change, words in SUBJECTS[name].words.items():
        fell = sum(kill.get("change") == change for kill in kills)
        where += [f"{fell} {words}"] if fell else []
    facts = ", ".join(f"{package} {version}" for package, version in results["versions"].items())
    commit = results["git"]["commit"] if results["git"] else "none"
    text = (
        f"**{identical} of {len(kills)} identical**; {', '.join(where)}.\n\n"
        f"{table(results)}\n\n"
        f"{results['date']}, commit {commit}; {results['device']}; {facts}; {results['total_s']:.0f} s in all."
    )
    write_between(README, name, text)
    return bool(identical == len(kills))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("subject", nargs="?", choices=list(SUBJECTS), help="which run to kill; all of them by default")
    parser.add_argument("--count", type=int, help="how many runs to kill")
    parser.add_argument("--report", action="store_true", help="only write the tables of results/*.json")
    arguments = parser.parse_args()
    names = [arguments.subject] if arguments.subject else list(SUBJECTS)
    if not arguments.report:
        for name in names:
            results = measure(name, arguments.count or SUBJECTS[name].count)
            SUBJECTS[name].results.parent.mkdir(exist_ok=True)
            SUBJECTS[name].results.write_text(json.dumps(results, indent=1) + "\n")
    different = [name for name in names if not write_report(name)]
    if different:
        raise SystemExit(f"A resumed run differs from the uninterrupted one; see the results of {different}.")


if __name__ == "__main__":
    main()
