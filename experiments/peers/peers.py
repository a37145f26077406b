"""Lightning's own ModelPruning beside this package, on one task: tickets, the asked sparsity, resume, costs.

    python experiments/peers/peers.py             # 11 minutes on 2 busy cores; writes results/peers.json, then
    python experiments/peers/peers.py --report    # the tables of this folder's README.md

A resumed run is a process of its own.
"""

import argparse
import copy
import json
import logging
import math
import multiprocessing
import os
import statistics
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from datetime import date
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import ModelCheckpoint, ModelPruning
from torch import Tensor, nn

from sparsetrain import (
    Cubic,
    ExactResume,
    GradualMagnitudePruning,
    IterativeMagnitudePruning,
    LotteryTicketRewinding,
    OneShot,
)
from sparsetrain.cli.artifacts import git_state
from sparsetrain.data import Digits
from sparsetrain.models import Classifier, LeNet300100
from sparsetrain.report import markdown_table, paired, write_between

HERE = Path(__file__).parent
RESULTS, README = HERE / "results" / "peers.json", HERE / "README.md"
OVERHEAD = HERE.parent / "overhead" / "results" / "overhead.json"

SEEDS = (1, 2, 3, 4, 5)
PER_ROUND, ROUNDS, ROUND_EPOCHS = 0.2, 10, 8
ASKED, RESUMED_EPOCHS, PRUNED_EPOCHS, SAVED_AFTER = 0.8, 16, 12, (6, 13)
PRELOADED = ("lightning", "sparsetrain.models", "sparsetrain.data", "sklearn.datasets", "sparsetrain.cli.artifacts")

MakeCallbacks = Callable[[Classifier], list[L.Callback]]


@dataclass(frozen=True)
class Variant:
    """One row: a way to train.

    Args:
        title: what the table calls it.
        epochs: how long it trains.
        callbacks: makes what prunes.
        asked: the sparsity that was asked for; 0 for none.
    """

    title: str
    epochs: int
    callbacks: MakeCallbacks
    asked: float


class MendedModelPruning(ModelPruning):
    """Goes back to the initial weights each time, on every device.

    ModelPruning makes the parameter share the memory of its copy of the initial weights (`dst.data = src.data.to(...)`
    copies between devices only), so that on the device of the copy, the CPU, training goes on to overwrite it.
    """

    @staticmethod
    def _copy_param(new: nn.Module, old: nn.Module, name: str) -> None:
        ModelPruning._copy_param(new, copy.deepcopy(old), name)


def peer(module: Classifier, kind: type[ModelPruning] = ModelPruning, **settings: Any) -> ModelPruning:
    """ModelPruning over the weights that this package prunes; all else is its default unless given."""
    return kind("l1_unstructured", [(layer, "weight") for layer in layers(module)], **settings)


def none(module: Classifier) -> list[L.Callback]:
    return []


def _peer_after_rounds(module: Classifier, **settings: Any) -> list[L.Callback]:
    """Prune and go back to the initial weights at the end of each round, and not any more after the last."""

    def due(epoch: int) -> bool:
        return (epoch + 1) % ROUND_EPOCHS == 0 and epoch < ROUNDS * ROUND_EPOCHS

    return [peer(module, amount=PER_ROUND, apply_pruning=due, **settings)]


def _ours_with_rounds(module: Classifier) -> list[L.Callback]:
    return [LotteryTicketRewinding(ROUNDS, f"{ROUND_EPOCHS}ep", rewind_to="0it", per_round=PER_ROUND)]


SPARSITY = 1 - (1 - PER_ROUND) ** ROUNDS
FOUND, TRAINED = ROUNDS * ROUND_EPOCHS, (ROUNDS + 1) * ROUND_EPOCHS
EVERY = f"after every {ROUND_EPOCHS} epochs"
TICKETS = {
    "dense": Variant("no pruning, the length of a round", ROUND_EPOCHS, none, 0.0),
    "dense_long": Variant("no pruning, the length of all rounds", TRAINED, none, 0.0),
    "peer_once": Variant(
        "`ModelPruning`, once at the end",
        ROUND_EPOCHS,
        lambda module: [peer(module, amount=SPARSITY, apply_pruning=lambda epoch: epoch == ROUND_EPOCHS - 1)],
        SPARSITY,
    ),
    "peer_default": Variant(
        "`ModelPruning`, after every epoch (default)", ROUNDS, lambda module: [peer(module, amount=PER_ROUND)], SPARSITY
    ),
    "peer_rounds": Variant(f"`ModelPruning`, {EVERY}", FOUND, _peer_after_rounds, SPARSITY),
    "peer_rounds_not_permanent": Variant(
        "the same, `make_pruning_permanent=False`",
        FOUND,
        partial(_peer_after_rounds, make_pruning_permanent=False),
        SPARSITY,
    ),
    "peer_trained": Variant(
        f"`ModelPruning`, {EVERY}, then trained {ROUND_EPOCHS} more", TRAINED, _peer_after_rounds, SPARSITY
    ),
    "mended_rounds": Variant(
        f"`ModelPruning` mended, {EVERY}", FOUND, partial(_peer_after_rounds, kind=MendedModelPruning), SPARSITY
    ),
    "mended_trained": Variant(
        f"`ModelPruning` mended, {EVERY}, then trained {ROUND_EPOCHS} more",
        TRAINED,
        partial(_peer_after_rounds, kind=MendedModelPruning),
        SPARSITY,
    ),
    "ours": Variant(f"`LotteryTicketRewinding`, {EVERY}", TRAINED, _ours_with_rounds, SPARSITY),
    "ours_keep": Variant(
        f"`IterativeMagnitudePruning`, {EVERY}",
        TRAINED,
        lambda module: [IterativeMagnitudePruning(ROUNDS, f"{ROUND_EPOCHS}ep", per_round=PER_ROUND)],
        SPARSITY,
    ),
}
PAIRS = (("ours", "dense"), ("ours", "mended_trained"), ("ours_keep", "peer_trained"), ("ours_keep", "dense_long"))
IN_PARTS = {1: 0.5, 2: 0.25, 3: 0.05}
AMOUNTS = {
    "peer_once": Variant(
        "`ModelPruning(amount=0.8)`, default: after each of 4 epochs",
        4,
        lambda module: [peer(module, amount=ASKED)],
        ASKED,
    ),
    "peer_sum": Variant(
        "`ModelPruning(amount=...)`, after three epochs 0.5, 0.25 and 0.05",
        4,
        lambda module: [peer(module, amount=lambda epoch: IN_PARTS.get(epoch, 0.0))],
        sum(IN_PARTS.values()),
    ),
    "ours_once": Variant(
        "`GradualMagnitudePruning(OneShot(0.8))`",
        4,
        lambda module: [GradualMagnitudePruning(OneShot(ASKED, at="1ep"))],
        ASKED,
    ),
    "ours_rounds": Variant(
        "`IterativeMagnitudePruning(3, '1ep', sparsity=0.8)`",
        4,
        lambda module: [IterativeMagnitudePruning(3, "1ep", sparsity=ASKED)],
        ASKED,
    ),
}


def _peer_gradual(module: Classifier, **settings: Any) -> list[L.Callback]:
    """At the end of each of the first epochs, as much of what remains as leads to the asked sparsity."""
    amount = 1 - (1 - ASKED) ** (1 / PRUNED_EPOCHS)
    return [
        peer(
            module,
            amount=amount,
            apply_pruning=lambda epoch: epoch < PRUNED_EPOCHS,
            use_lottery_ticket_hypothesis=False,
            **settings,
        )
    ]


RESUMED = {
    "dense": Variant("no pruning", RESUMED_EPOCHS, none, 0.0),
    "peer": Variant("`ModelPruning`, default", RESUMED_EPOCHS, _peer_gradual, ASKED),
    "peer_not_permanent": Variant(
        "`ModelPruning(make_pruning_permanent=False)`",
        RESUMED_EPOCHS,
        partial(_peer_gradual, make_pruning_permanent=False),
        ASKED,
    ),
    "ours_gradual": Variant(
        "`GradualMagnitudePruning`",
        RESUMED_EPOCHS,
        lambda module: [GradualMagnitudePruning(Cubic(ASKED, begin="1ep", end=f"{PRUNED_EPOCHS}ep", every="1ep"))],
        ASKED,
    ),
    "ours_lottery": Variant(
        "`LotteryTicketRewinding`, 3 rounds",
        RESUMED_EPOCHS,
        lambda module: [LotteryTicketRewinding(3, f"{RESUMED_EPOCHS // 4}ep", rewind_to="0it", sparsity=ASKED)],
        ASKED,
    ),
}


def layers(module: nn.Module) -> list[nn.Linear]:
    return [part for part in module.modules() if isinstance(part, nn.Linear)]


def weights(module: nn.Module) -> Tensor:
    """The weights that the network computes with, one after the other; also those behind masks of torch's `prune`."""
    effective: list[Tensor] = [
        getattr(layer, "weight_mask", 1) * getattr(layer, "weight_orig", layer.weight) for layer in layers(module)
    ]
    return torch.cat([weight.detach().flatten() for weight in effective])


def sparsity(module: nn.Module) -> float:
    """The share of weights that are exactly zero; `ModelPruning` leaves no masks to count by."""
    values = weights(module)
    return 1 - int(values.count_nonzero()) / values.numel()


def build(seed: int) -> tuple[Classifier, Digits]:
    """The untrained network and its data."""
    L.seed_everything(seed, verbose=False)
    optimizer = partial(torch.optim.SGD, lr=0.1, momentum=0.9, weight_decay=1e-4)
    module = Classifier(LeNet300100((1, 8, 8)), optimizer=optimizer, num_classes=Digits.num_classes)
    return module, Digits(batch_size=64, seed=seed)


def make_trainer(epochs: int, *callbacks: L.Callback) -> L.Trainer:
    return L.Trainer(
        max_epochs=epochs,
        accelerator="cpu",
        callbacks=list(callbacks),
        logger=False,
        enable_checkpointing=any(isinstance(callback, ModelCheckpoint) for callback in callbacks),
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
    )


def quiet() -> None:
    torch.set_num_threads(1)
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.simplefilter("ignore")


class AfterEachPruning(L.Callback):
    """What share of the survivors has its initial value just after each pruning of ModelPruning."""

    def __init__(self, before: Tensor) -> None:
        self.before, self.kept, self.shares = before, before.numel(), list[float]()

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        now = weights(pl_module)
        if int(now.count_nonzero()) < self.kept:
            self.kept = int(now.count_nonzero())
            self.shares.append(at_initialisation(now, self.before))


def at_initialisation(now: Tensor, before: Tensor) -> float:
    """The share of the weights that are not zero that has not changed by a bit."""
    return float((now == before)[now != 0].float().mean())


def train(variant: Variant, seed: int) -> dict[str, Any]:
    """Train once, and say what has come of it."""
    module, data = build(seed)
    before = weights(module).clone()
    callbacks = variant.callbacks(module)
    # Listed after ModelPruning, so its turn is after it; our callbacks prune at the beginning of a batch.
    prunings = AfterEachPruning(before)
    peers = any(isinstance(callback, ModelPruning) for callback in callbacks)
    trainer = make_trainer(variant.epochs, *callbacks, *([prunings] if peers else []))
    trainer.fit(module, datamodule=data)
    validated = float(trainer.callback_metrics["val/accuracy"])
    after = weights(module)
    return {
        "seed": seed,
        "weights": after.numel(),
        "kept": int(after.count_nonzero()),
        "asked_kept": after.numel() - math.floor(variant.asked * after.numel() + 0.5),
        "at_initialisation": at_initialisation(after, before),
        "at_initialisation_after_each_pruning": prunings.shares,
        "val_accuracy": validated,
        # First the Trainer that trained: a forward pass mends what it stumbles over.
        "error_of_trainer_test": error_of(lambda: trainer.test(module, datamodule=data, verbose=False)),
        "test_accuracy": test_accuracy(module, data),
        "dense_names": module.state_dict().keys() == build(seed)[0].state_dict().keys(),
    }


def resume(name: str, seed: int, checkpoint: Path) -> dict[str, Any]:
    """Go on from `checkpoint` to the end in this process; the weights at the end, or the error."""
    quiet()
    variant = RESUMED[name]
    module, data = build(seed)
    began = SparsityAtStart()
    trainer = make_trainer(variant.epochs, *variant.callbacks(module), ExactResume(), began)
    error = error_of(lambda: trainer.fit(module, datamodule=data, ckpt_path=checkpoint))
    if error is not None:
        return {"error": error}
    accuracy = test_accuracy(module, data)
    return {"start_sparsity": began.value, "end": weights(module).numpy(), "test_accuracy": accuracy}


class SparsityAtStart(L.Callback):
    """Looks at the first batch's weights before it is trained on."""

    value: float | None = None

    def on_train_batch_start(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: Any) -> None:
        if self.value is None:
            self.value = sparsity(pl_module)


def test_accuracy(module: Classifier, data: Digits) -> float:
    """By a new Trainer without callbacks: with one of ModelPruning's settings the one that trained cannot test."""
    metrics = make_trainer(1).test(module, datamodule=data, verbose=False)
    return float(metrics[0]["test/accuracy"])


def error_of(work: Callable[[], object]) -> str | None:
    """What `work` raises, in words."""
    try:
        work()
    except RuntimeError as error:
        return "".join(traceback.format_exception_only(error)).strip()
    return None


def measure_resume(name: str, seed: int, folder: Path, pool: ProcessPoolExecutor) -> list[dict[str, Any]]:
    """Train once without interruption, then go on from its checkpoints in new processes."""
    variant = RESUMED[name]
    module, data = build(seed)
    saver = ModelCheckpoint(
        folder / f"{name}-{seed}", "{epoch}", save_top_k=-1, every_n_epochs=1, save_on_train_epoch_end=True
    )
    trainer = make_trainer(variant.epochs, *variant.callbacks(module), ExactResume(), saver)
    trainer.fit(module, datamodule=data)
    whole, accuracy = weights(module), test_accuracy(module, data)
    outcomes = []
    for epochs in SAVED_AFTER:
        path = folder / f"{name}-{seed}" / f"epoch={epochs - 1}.ckpt"
        outcome = {
            "seed": seed,
            "saved_after_epochs": epochs,
            "saved_sparsity": _saved_sparsity(path),
            "whole_sparsity": 1 - int(whole.count_nonzero()) / whole.numel(),
            "whole_test_accuracy": accuracy,
            **pool.submit(resume, name, seed, path).result(),
        }
        end = outcome.pop("end", None)
        if end is not None:
            resumed = torch.from_numpy(end)
            outcome["end_sparsity"] = 1 - int(resumed.count_nonzero()) / resumed.numel()
            outcome["identical"] = torch.equal(resumed.view(torch.int32), whole.view(torch.int32))
        outcomes.append(outcome)
    return outcomes


def _saved_sparsity(path: Path) -> float:
    """Of the weights in a checkpoint, with torch's masks if it holds them."""
    state: dict[str, Tensor] = torch.load(path, weights_only=True)["state_dict"]
    if any(name.endswith("weight_mask") for name in state):
        kept = [mask * state[name.replace("_mask", "_orig")] for name, mask in state.items() if name.endswith("_mask")]
    else:
        kept = [tensor for name, tensor in state.items() if name.endswith("weight")]
    return 1 - sum(int(tensor.count_nonzero()) for tensor in kept) / sum(tensor.numel() for tensor in kept)


def measure(seeds: Sequence[int]) -> dict[str, Any]:
    """Everything, for each of the seeds."""
    quiet()
    began = time.perf_counter()
    tickets = {name: [train(variant, seed) for seed in seeds] for name, variant in TICKETS.items()}
    amounts = {name: [train(variant, seed) for seed in seeds] for name, variant in AMOUNTS.items()}
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(list(PRELOADED))
    with (
        tempfile.TemporaryDirectory() as folder,
        ProcessPoolExecutor(1, mp_context=context, max_tasks_per_child=1) as pool,
    ):
        resumed = {
            name: [outcome for seed in seeds for outcome in measure_resume(name, seed, Path(folder), pool)]
            for name in RESUMED
        }
    return {
        "date": date.today().isoformat(),
        "git": git_state(),
        "versions": {name: metadata.version(name) for name in ("sparsetrain", "torch", "lightning")},
        "device": f"CPU, 1 thread of {os.cpu_count()}",
        "total_s": round(time.perf_counter() - began, 1),
        "tickets": tickets,
        "amounts": amounts,
        "resumed": resumed,
    }


def tables(results: dict[str, Any], costs: dict[str, Any]) -> str:
    """All of them; `costs` are the results of experiments/overhead."""
    return "\n\n".join(
        [
            "### Lottery tickets",
            _tickets_table(results),
            "### The sparsity that was asked for",
            _amounts_table(results),
            "### Resume",
            _resume_table(results),
            "### Costs",
            _costs_table(costs),
        ]
    )


def _tickets_table(results: dict[str, Any]) -> str:
    rows = [
        (
            variant.title,
            str(variant.epochs),
            _percent(_sparsities(runs)),
            _after_each([run["at_initialisation_after_each_pruning"] for run in runs]),
            _percent([run["at_initialisation"] for run in runs]),
            _accuracy([run["val_accuracy"] for run in runs]),
            _accuracy([run["test_accuracy"] for run in runs]),
            "yes" if all(run["dense_names"] for run in runs) else "no",
            "no" if any(run["error_of_trainer_test"] for run in runs) else "yes",
        )
        for variant, runs in ((variant, results["tickets"][name]) for name, variant in TICKETS.items())
    ]
    header = (
        "run",
        "epochs",
        "sparsity",
        "survivors at their initial value after each pruning",
        "in what is returned",
        "val accuracy last logged",
        "test accuracy of what is returned",
        "names of the dense model",
        "`trainer.test` works",
    )
    errors = [run["error_of_trainer_test"] for runs in results["tickets"].values() for run in runs]
    return f"{markdown_table(header, rows)}{_told('What `trainer.test` raises', errors)}\n\n{_pairs_table(results)}"


def _after_each(runs: list[list[float]]) -> str:
    if not runs[0]:
        return "-"
    first = _percent([shares[0] for shares in runs])
    later = [share for shares in runs for share in shares[1:]]
    return f"{first}, then {_percent(later)}" if later else first


def _pairs_table(results: dict[str, Any]) -> str:
    rows = []
    for one, other in PAIRS:
        runs = zip(results["tickets"][one], results["tickets"][other], strict=True)
        effect = paired([100 * (a["test_accuracy"] - b["test_accuracy"]) for a, b in runs])
        interval = f"{effect.low:+.2f} to {effect.high:+.2f}"
        rows.append((TICKETS[one].title, TICKETS[other].title, f"{effect.mean:+.2f}", interval))
    header = ("paired by seed", "less", "points of test accuracy", "95 % interval")
    return markdown_table(header, rows)


def _amounts_table(results: dict[str, Any]) -> str:
    rows = [
        (
            variant.title,
            _percent([variant.asked], places=3),
            _percent(_sparsities(runs), places=3),
            _counts([run["kept"] for run in runs]),
            _counts([run["asked_kept"] for run in runs]),
        )
        for variant, runs in ((variant, results["amounts"][name]) for name, variant in AMOUNTS.items())
    ]
    header = ("run", "asked", "sparsity", f"weights kept of {results['tickets']['ours'][0]['weights']:,}", "to be kept")
    return markdown_table(header, rows)


def _resume_table(results: dict[str, Any]) -> str:
    rows = []
    for epochs in SAVED_AFTER:
        for name, variant in RESUMED.items():
            runs = [run for run in results["resumed"][name] if run["saved_after_epochs"] == epochs]
            failed = [run for run in runs if "error" in run]
            whole = [_percent([run[key] for run in runs]) for key in ("saved_sparsity", "whole_sparsity")]
            if failed:
                rest = [f"does not load: {len(failed)} of {len(runs)}", "-", "-", "-"]
            else:
                rest = [
                    _percent([run["start_sparsity"] for run in runs]),
                    _percent([run["end_sparsity"] for run in runs]),
                    f"{sum(run['identical'] for run in runs)} of {len(runs)}",
                    _accuracy([run["test_accuracy"] for run in runs]),
                ]
            rows.append(
                (str(epochs), variant.title, *whole, *rest, _accuracy([r["whole_test_accuracy"] for r in runs]))
            )
    header = (
        "saved after epoch",
        "run",
        "in the checkpoint",
        "uninterrupted, end",
        "resumed, first batch",
        "resumed, end",
        "identical weights",
        "test accuracy resumed",
        "test accuracy uninterrupted",
    )
    errors = [run.get("error") for runs in results["resumed"].values() for run in runs]
    return markdown_table(header, rows) + _told("What the resume raises", errors)


def _costs_table(costs: dict[str, Any]) -> str:
    step, update, checkpoint = costs["step"], costs["update"]["rows"], costs["checkpoint"]
    plain = checkpoint["plain"]["size_bytes"]
    rows = [
        (
            "training step, against one without masks",
            f"{step['model_pruning']['ratio_of_minima']:.3f}",
            f"{step['gmp']['ratio_of_minima']:.3f}",
        ),
        (
            f"one global update, {costs['update']['weights'] / 1e6:.1f} M weights",
            f"{update['global_unstructured']['min_s']:.2f} s",
            f"{update['first']['min_s']:.3f} s",
        ),
        (
            "its extra memory beside the masks, a weight",
            f"{update['global_unstructured']['extra_bytes_per_weight']:.1f} bytes",
            f"{update['first']['extra_bytes_per_weight']:.2f} bytes",
        ),
        (
            "masks in a checkpoint that keeps them, a weight",
            f"{checkpoint['model_pruning']['mask_bits_per_weight']:.0f} bits",
            f"{checkpoint['gmp']['mask_bits_per_weight']:.2f} bits",
        ),
        (
            "checkpoint that keeps them, against a plain one",
            f"{checkpoint['model_pruning']['size_bytes'] / plain:.3f}",
            f"{checkpoint['gmp']['size_bytes'] / plain:.3f}",
        ),
    ]
    commit = costs["git"]["commit"][:10] if costs["git"] else "none"
    source = (
        f"From [experiments/overhead](../overhead/README.md), `overhead.json` of {costs['date']}, commit {commit}; "
        f"{costs['device']['name']}; torch {costs['versions']['torch']}, lightning {costs['versions']['lightning']}. "
        "The update of `ModelPruning` is `torch.nn.utils.prune.global_unstructured`, which it calls."
    )
    table = markdown_table(("figure", "`ModelPruning`", "`GradualMagnitudePruning`"), rows)
    return f"{table}\n\n{source}"


def _told(what: str, errors: Sequence[str | None]) -> str:
    """The first of them."""
    error = next(filter(None, errors), None)
    return "" if error is None else f"\n\n{what}:\n\n```\n{error}\n```"


def _sparsities(runs: Sequence[dict[str, Any]]) -> list[float]:
    return [1 - run["kept"] / run["weights"] for run in runs]


def _counts(values: Sequence[int]) -> str:
    return " or ".join(f"{value:,}" for value in sorted(set(values)))


def _percent(values: Sequence[float], *, places: int = 2) -> str:
    """One value if all print the same, else the least and the most."""
    printed = [f"{100 * value:.{places}f} %" for value in (min(values), max(values))]
    return printed[0] if printed[0] == printed[1] else f"{printed[0][:-2]} to {printed[1]}"


def _accuracy(values: Sequence[float]) -> str:
    return f"{100 * statistics.fmean(values):.2f} +- {100 * statistics.stdev(values):.2f} %"


def write_report(results: dict[str, Any], costs: dict[str, Any]) -> None:
    """Put the tables into README.md."""
    versions = ", ".join(f"{name} {version}" for name, version in results["versions"].items())
    commit = results["git"]["commit"] if results["git"] else "none"
    facts = f"{results['date']}, commit {commit}; {results['device']}; {versions}; {results['total_s']:.0f} s in all."
    write_between(README, "peers", f"{tables(results, costs)}\n\n{facts}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--quick", action="store_true", help="two seeds, to try whether it runs; prints, writes nothing"
    )
    parser.add_argument("--report", action="store_true", help="only write the tables of results/peers.json")
    arguments = parser.parse_args()
    costs = json.loads(OVERHEAD.read_text())
    if arguments.quick:
        print(tables(measure(SEEDS[:2]), costs))
        return
    if not arguments.report:
        results = measure(SEEDS)
        RESULTS.parent.mkdir(exist_ok=True)
        RESULTS.write_text(json.dumps(results, indent=1) + "\n")
    write_report(json.loads(RESULTS.read_text()), costs)


if __name__ == "__main__":
    main()
