"""What a run of many rounds leaves of each, and how good each was."""

import json
from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import Checkpoint
from lightning.pytorch.utilities import rank_zero_only
from safetensors.torch import load_file
from torch import Tensor

from sparsetrain import soups
from sparsetrain.callbacks import IterativeMagnitudePruning, SparseModelSoup
from sparsetrain.cli.artifacts import MASKS, MODEL, network_of, write_json, write_model
from sparsetrain.mask_files import load_masks, save_masks
from sparsetrain.report import (
    Round,
    SoupRound,
    draw_accuracy,
    draw_soups,
    measure,
    overlap,
    rounds_table,
    soups_table,
    write_rounds_csv,
    write_soups_csv,
)

FOLDER, FACTS, INGREDIENTS = "rounds", "round.json", "ingredients"
TABLE, PICTURE, TICKET = "rounds.csv", "accuracy.png", "ticket.safetensors"
SOUPS, SOUPS_PICTURE = "soups.csv", "soups.png"
_ACCURACY = "test/accuracy"


class IngredientArtifacts(L.Callback):
    """Writes rounds/<r>/ingredients/<j>/ as ingredient j ends: its network, before the last one becomes the soup.

    Args:
        folder: the run's.
        method: what makes the soups.
    """

    def __init__(self, folder: Path, method: SparseModelSoup) -> None:
        self.folder, self.method = folder, method

    @rank_zero_only
    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Write the network at the ingredient's last batch."""
        if self.method.round and self.method.ends_leg(trainer, batch_idx):
            folder = self.folder / FOLDER / str(self.method.round) / INGREDIENTS / str(self.method.ingredient)
            folder.mkdir(parents=True, exist_ok=True)
            write_model(folder, pl_module)


class RoundArtifacts(Checkpoint):
    """Writes rounds/<r>/ as round r ends: its masks, its network and what it trained; at the end, the ticket.

    It is a `Checkpoint` so that it comes after the method, which may make the network at the end of a round.

    Args:
        folder: the run's.
        method: what makes the rounds.
    """

    def __init__(self, folder: Path, method: IterativeMagnitudePruning) -> None:
        self.folder, self.method = folder, method
        self.examples = 0

    def state_dict(self) -> dict[str, Any]:
        return {"examples": self.examples}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.examples = state_dict["examples"]

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Count the round's examples, and write the round at its last batch."""
        self.examples += len(batch[0]) * trainer.world_size
        if self.method.ends_round(trainer, batch_idx):
            if trainer.is_global_zero:
                self._write(pl_module)
            self.examples = 0

    @rank_zero_only
    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Write the ticket of a run that found one."""
        if self.method.weights == "rewind":
            self.method.ticket.save(self.folder / TICKET)

    def _write(self, pl_module: L.LightningModule) -> None:
        method = self.method
        folder = self.folder / FOLDER / str(method.round)
        folder.mkdir(parents=True, exist_ok=True)
        first, end = method.span
        facts = {
            "number": method.round,
            "first_step": first,
            "steps": end - first,
            "epochs_seen": end / (method.run.steps_per_epoch or 1),
            "examples": self.examples,
        }
        save_masks(method.masks, folder / MASKS)
        write_model(folder, pl_module)
        write_json(folder / FACTS, facts)  # last: a round that has it is whole


def makes_soups(method: object) -> bool:
    """Whether `method` trains all ingredients of its soups in one run."""
    return isinstance(method, SparseModelSoup) and method.only is None


def callbacks(folder: Path, method: IterativeMagnitudePruning) -> list[L.Callback]:
    """What writes the rounds of `method` into the run's folder."""
    own: list[L.Callback] = [RoundArtifacts(folder, method)]
    return [IngredientArtifacts(folder, method), *own] if isinstance(method, SparseModelSoup) else own


def evaluate(
    folder: Path,
    evaluator: L.Trainer,
    module: L.LightningModule,
    datamodule: L.LightningDataModule,
    example_input: Tensor,
) -> dict[str, Any]:
    """Validate and test what each round has left, and say on rank 0 how good it is: tables and pictures.

    Args:
        folder: the run's.
        evaluator: a Trainer without loggers, of as many processes as the run had; for soups one with `Recalibration`.
        module: of the run; holds one of the networks afterwards.
        datamodule: of the run.
        example_input: a batch of one example, to count FLOPs with.

    Returns:
        Entries of summary.json.
    """
    rounds = _evaluate_rounds(folder, evaluator, module, datamodule, example_input)
    soups_ = _evaluate_ingredients(folder, evaluator, module, datamodule, rounds)
    facts: dict[str, Any] = {"rounds": [{"sparsity": r.sparsity, **r.metrics} for r in rounds]}
    if soups_:
        facts["soups"] = [{"ingredients": s.ingredients, "distance": s.distance} for s in soups_]
    return facts


def _evaluate_rounds(
    folder: Path,
    evaluator: L.Trainer,
    module: L.LightningModule,
    datamodule: L.LightningDataModule,
    example_input: Tensor,
) -> list[Round]:
    """The network of each round, and on rank 0 rounds.csv and accuracy.png; for the arguments see `evaluate`."""
    rounds: list[Round] = []
    masks = None
    for number in sorted(int(path.parent.name) for path in (folder / FOLDER).glob(f"*/{FACTS}")):
        of_round = folder / FOLDER / str(number)
        facts, before, masks = json.loads((of_round / FACTS).read_text()), masks, load_masks(of_round / MASKS)
        metrics = _metrics_of(of_round, evaluator, module, datamodule)
        report = measure(module, masks, example_input)
        rounds.append(
            Round(
                **facts,
                kept=report.kept,
                total=report.maskable,
                overlap=None if before is None else overlap(before, masks),
                dense_flops=report.dense_flops,
                theoretical_flops=report.theoretical_flops,
                metrics=metrics,
            )
        )
    if rounds and evaluator.is_global_zero:
        write_rounds_csv(folder / TABLE, rounds)
        print(rounds_table(rounds))
        if _ACCURACY in rounds[0].metrics:
            points = [(r.sparsity, [r.metrics[_ACCURACY]]) for r in rounds if r.number]
            dense = [r.metrics[_ACCURACY] for r in rounds if not r.number]
            draw_accuracy(folder / PICTURE, {"each round": points}, dense=dense)
    return rounds


def _evaluate_ingredients(
    folder: Path,
    evaluator: L.Trainer,
    module: L.LightningModule,
    datamodule: L.LightningDataModule,
    rounds: list[Round],
) -> list[SoupRound]:
    """The ingredients of the soup of each round, and on rank 0 soups.csv and soups.png."""
    compared: list[SoupRound] = []
    for row in rounds:
        members = (folder / FOLDER / str(row.number) / INGREDIENTS).glob(f"*/{MODEL}")
        files = sorted(members, key=lambda path: int(path.parent.name))
        if not row.number or not files:
            continue
        metrics = [_metrics_of(file.parent, evaluator, module, datamodule) for file in files]
        apart, pairs = soups.distances(files), len(files) * (len(files) - 1)
        distance = float(apart.sum() / pairs) if pairs else None
        compared.append(SoupRound(row.number, row.sparsity, row.metrics, metrics, distance))
    if compared and evaluator.is_global_zero:
        write_soups_csv(folder / SOUPS, compared)
        if _ACCURACY in compared[0].soup:
            print(soups_table(compared))
            dense = next((r.metrics[_ACCURACY] for r in rounds if not r.number), None)
            draw_soups(folder / SOUPS_PICTURE, compared, dense=dense)
    return compared


def _metrics_of(
    network: Path, evaluator: L.Trainer, module: L.LightningModule, datamodule: L.LightningDataModule
) -> dict[str, float]:
    """The metrics of the network in a folder, which `module` holds afterwards."""
    network_of(module).load_state_dict(load_file(network / MODEL))
    metrics: dict[str, float] = {}
    for evaluate in (evaluator.validate, evaluator.test):
        metrics |= dict(next(iter(evaluate(module, datamodule=datamodule, verbose=False)), {}))
    return metrics
