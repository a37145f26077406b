"""A sparse model soup whose ingredients are trained by runs of their own, side by side, and then averaged."""

import argparse
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning as L
import torch

from sparsetrain import soups
from sparsetrain.callbacks import SparseModelSoup
from sparsetrain.cli import rounds, shrunk
from sparsetrain.cli.artifacts import (
    CONFIG,
    MASKS,
    MODEL,
    SUMMARY,
    made_on,
    of_stage,
    read_summary,
    write_json,
    write_model,
)
from sparsetrain.cli.checkpoints import AtomicCheckpointIO
from sparsetrain.cli.instantiate import instantiate
from sparsetrain.cli.resume import CHECKPOINT, check_same, is_complete, write_config
from sparsetrain.cli.train import BAD_INPUT, compose, known_warnings, make_evaluator, make_parts, message
from sparsetrain.cli.weights import load_weights
from sparsetrain.mask_files import load_masks
from sparsetrain.report import measure, report_table, training_flops


def main() -> None:
    """The program `sparsetrain-soup`."""
    parser = argparse.ArgumentParser(
        description="Train the ingredients of each round of a soup as jobs of a multirun, average them, and go on with "
        "the soup. The command may be stopped and given again: what is finished is not made again, and what is not "
        "goes on where it was."
    )
    parser.add_argument("folder", type=Path, help="of the soup")
    parser.add_argument("overrides", nargs="*", help="as of train.py: +experiment=resnet20_soup launcher=joblib ...")
    parser.add_argument("--retries", type=int, default=1, help="how often a job that has failed is begun again")
    parser.add_argument("--without-dead", action="store_true", help="average those that are left, if some fail")
    arguments = parser.parse_args()
    try:
        soup(arguments.folder, arguments.overrides, retries=arguments.retries, without_dead=arguments.without_dead)
    except (*BAD_INPUT, RuntimeError) as error:
        if os.environ.get("HYDRA_FULL_ERROR") == "1":
            raise
        sys.exit(message(error))


@known_warnings()
def soup(folder: Path, overrides: Sequence[str], *, retries: int = 1, without_dead: bool = False) -> None:
    """Make a soup in `folder`, or go on with it.

    The folder is that of a run with the same settings, less what is logged while it trains (metrics.csv, sparsity.csv,
    sparsity.png, checkpoints/): rounds/<r>/ingredients/<j>/, the run of ingredient j of round r, has its part. In
    summary.json wall_time_s is that of the command that finished the soup, and examples_per_s is null.

    On one device, and with loaders that have `reseed`, the soup is that of the one run, bit for bit. Averages are made
    by this process, which recalibrates batch norm on the device that `trainer` names.

    Args:
        folder: is made.
        overrides: Hydra overrides of the jobs; `method` is a `SparseModelSoup`.
        retries: how often a job that has failed is begun again, from its last checkpoint.
        without_dead: average the ingredients that are left, at least one, if some fail to the end.

    Raises:
        ValueError: another method, one with `only`, or a folder that holds something else.
        RuntimeError: an ingredient is dead.
    """
    started, folder = time.perf_counter(), folder.absolute()
    cfg = compose(*overrides, "trainer.max_epochs=-1", output_dir=folder)
    method = instantiate(cfg.method)
    if not rounds.makes_soups(method):
        raise ValueError(
            f"method={type(method).__name__} makes no soup, or one leg of one. Use method=soup with method.only=null, "
            "or an experiment such as +experiment=digits_soup."
        )
    folder.mkdir(parents=True, exist_ok=True)
    module, datamodule, example_input = make_parts(cfg)
    if (folder / CONFIG).exists():
        check_same(cfg, folder)
    write_config(cfg, folder)
    for number in method.numbers:
        if not (folder / rounds.FOLDER / str(number) / rounds.FACTS).exists():
            members = _train(folder, number, method, overrides, retries=retries, without_dead=without_dead)
            trainer = make_evaluator(cfg, folder, datamodule, soups=number > 0, limit_test_batches=1)
            _merge(members, number, trainer, module, datamodule)
            print(f"Round {number}: {folder / rounds.FOLDER / str(number)}")
    phases = [folder / rounds.FOLDER / str(number) for number in method.numbers]
    for name in (MODEL, MASKS):
        shutil.copyfile(phases[-1] / name, folder / name)
    load_weights(module, folder / MODEL)
    masks = load_masks(folder / MASKS)
    report = measure(module, masks, example_input)
    print(report_table(report))
    facts: dict[str, Any] = {}
    if shrunk.cuts_off(method):
        evaluator = make_evaluator(cfg, folder, datamodule, soups=False)
        facts |= shrunk.write_and_test(folder, evaluator, module, datamodule, example_input, method, masks)
    evaluator = make_evaluator(cfg, folder, datamodule, soups=True)
    facts |= rounds.evaluate(folder, evaluator, module, datamodule, example_input)
    trained = [json.loads((phase / rounds.FACTS).read_text()) for phase in phases]
    examples, last = sum(one["examples"] for one in trained), facts["rounds"][-1]
    summary = {
        "name": cfg.name,
        "command": shlex.join(sys.argv),
        "overrides": list(overrides),
        "resumed_from": None,
        "seed": cfg.seed,
        "steps": trained[-1]["first_step"] + trained[-1]["steps"],
        "epochs": int(trained[-1]["epochs_seen"]),
        **report.to_dict(),
        "training_flops": None if report.dense_flops is None else training_flops(report.dense_flops, examples),
        "examples_per_s": None,
        **made_on(evaluator),
        "split_hash": getattr(datamodule, "split_hash", None),
        "val": of_stage(last, "val"),
        "test": of_stage(last, "test"),
        **facts,
        "optimized": {name: value for name, value in last.items() if name == cfg.optimized_metric},
        "wall_time_s": round(time.perf_counter() - started, 3),
    }
    write_json(folder / SUMMARY, summary)


def _run(command: Sequence[str]) -> None:
    """Run a program, and let it end with this one if that is told to end."""
    received: list[int] = []
    with subprocess.Popen(command) as process:

        def pass_on(number: int, frame: object) -> None:
            received.append(number)
            process.send_signal(number)

        before = signal.signal(signal.SIGTERM, pass_on)
        try:
            process.wait()
        finally:
            signal.signal(signal.SIGTERM, before)
    if received:
        sys.exit(128 + received[0])


def _train(
    folder: Path, number: int, method: SparseModelSoup, overrides: Sequence[str], *, retries: int, without_dead: bool
) -> list[Path]:
    """The folders of the ingredients of a round, which are trained unless they are there whole."""
    phase, before = folder / rounds.FOLDER / str(number), folder / rounds.FOLDER / str(number - 1) / CHECKPOINT
    folders = {j: phase / rounds.INGREDIENTS / str(j) for j in range(method.ingredients if number else 1)}
    for _ in range(1 + retries):
        pending = [j for j in folders if not is_complete(folders[j])]
        if pending:
            jobs = ",".join(f"[{number},{j}]" for j in pending)
            start = [f"ckpt_path={_quoted(before)}"] if before.exists() else []
            place = [f"hydra.sweep.dir={_quoted(phase / rounds.INGREDIENTS)}", "hydra.sweep.subdir=${method.only.1}"]
            own = [f"method.only={jobs}", "trainer.max_epochs=-1", "resume=true", *start, *place]
            _run([sys.executable, "-m", "sparsetrain.cli.train", "-m", *overrides, *own])
    alive = [path for path in folders.values() if is_complete(path)]
    dead = [str(path) for path in folders.values() if path not in alive]
    if dead and not (alive and without_dead):
        raise RuntimeError(
            f"Round {number} lacks {len(dead)} of {len(folders)} ingredients, tried {1 + retries} times: {dead}. What "
            "went wrong stands above. Give the command again to go on with them, or --without-dead to go on without."
        )
    if dead:
        print(f"Round {number} goes on without {dead}.")
    return alive


def _merge(
    members: Sequence[Path],
    number: int,
    trainer: L.Trainer,
    module: L.LightningModule,
    datamodule: L.LightningDataModule,
) -> None:
    """Write the round: its soup, masks and facts, and a checkpoint from which the ingredients of the next one start."""
    phase = members[0].parent.parent
    of_round = [path / rounds.FOLDER / str(number) for path in members]
    checkpoints = [torch.load(path / CHECKPOINT, map_location="cpu", weights_only=True, mmap=True) for path in members]
    for path, checkpoint in zip(members, checkpoints, strict=True):
        steps = read_summary(path)["steps"]
        if checkpoint["global_step"] != steps:
            raise ValueError(
                f"{path / CHECKPOINT} is of step {checkpoint['global_step']}, and the run has {steps}. Let "
                "callbacks.checkpoint save at the end of each epoch, as it does by default."
            )
    masks = [path / MASKS for path in of_round]
    module.load_state_dict(soups.uniform([checkpoint["state_dict"] for checkpoint in checkpoints], masks))
    if number:
        trainer.test(module, datamodule=datamodule, verbose=False)  # as it starts, batch norm is recalibrated
    state = {name: tensor.cpu().clone() for name, tensor in module.state_dict().items()}
    AtomicCheckpointIO().save_checkpoint({**checkpoints[0], "state_dict": state}, phase / CHECKPOINT)
    shutil.copyfile(masks[0], phase / MASKS)
    write_model(phase, module)
    write_json(phase / rounds.FACTS, _facts(phase, of_round))  # last: a round that has it is whole


def _facts(phase: Path, members: Sequence[Path]) -> dict[str, float]:
    """Of a round that trained each of `members`, as if one after the other."""
    of_members = [json.loads((path / rounds.FACTS).read_text()) for path in members]
    number = int(phase.name)
    before = phase.with_name(str(number - 1)) / rounds.FACTS
    earlier = json.loads(before.read_text()) if before.exists() else {"first_step": 0, "steps": 0}
    one = of_members[0]
    per_epoch = (one["first_step"] + one["steps"]) / one["epochs_seen"]
    first, steps = earlier["first_step"] + earlier["steps"], sum(facts["steps"] for facts in of_members)
    return {
        "number": number,
        "first_step": first,
        "steps": steps,
        "epochs_seen": (first + steps) / per_epoch,
        "examples": sum(facts["examples"] for facts in of_members),
    }


def _quoted(path: Path) -> str:
    """As a value in Hydra's grammar."""
    return "'" + str(path).replace("\\", "\\\\").replace("'", "\\'") + "'"


if __name__ == "__main__":
    main()
