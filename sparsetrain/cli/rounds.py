"""What a run of many rounds leaves of each, and how good each was."""

import json
from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch.utilities import rank_zero_only
from safetensors.torch import load_file
from torch import Tensor

from sparsetrain.callbacks import IterativeMagnitudePruning
from sparsetrain.cli.artifacts import MASKS, MODEL, network_of, write_model
from sparsetrain.masks import load_masks, save_masks
from sparsetrain.report import Round, draw_accuracy, measure, overlap, rounds_table, write_rounds_csv

FOLDER, FACTS = "rounds", "round.json"
TABLE, PICTURE, TICKET = "rounds.csv", "accuracy.png", "ticket.safetensors"


class RoundArtifacts(L.Callback):
    """Writes rounds/<r>/ as round r ends: its masks, its network and what it trained; at the end, the ticket.

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
        first, end = (method.rounds.start(number) for number in (method.round, method.round + 1))
        facts = {
            "number": method.round,
            "first_step": first,
            "steps": end - first,
            "epochs_seen": end / (method.run.steps_per_epoch or 1),
            "examples": self.examples,
        }
        save_masks(method.masks, folder / MASKS)
        write_model(folder, pl_module)
        (folder / FACTS).write_text(json.dumps(facts))  # last: a round that has it is whole


def evaluate_rounds(
    folder: Path,
    evaluator: L.Trainer,
    module: L.LightningModule,
    datamodule: L.LightningDataModule,
    example_input: Tensor,
) -> list[Round]:
    """Validate and test the network of each round in `folder`; on rank 0, write rounds.csv and accuracy.png.

    Args:
        folder: the run's.
        evaluator: a Trainer without callbacks and loggers, of as many processes as the run had.
        module: of the run; holds the network of the last round afterwards.
        datamodule: of the run.
        example_input: a batch of one example, to count FLOPs with.
    """
    rounds: list[Round] = []
    masks = None
    for number in sorted(int(path.parent.name) for path in (folder / FOLDER).glob(f"*/{FACTS}")):
        of_round = folder / FOLDER / str(number)
        facts, before, masks = json.loads((of_round / FACTS).read_text()), masks, load_masks(of_round / MASKS)
        network_of(module).load_state_dict(load_file(of_round / MODEL))
        report = measure(module, masks, example_input)
        metrics: dict[str, float] = {}
        for evaluate in (evaluator.validate, evaluator.test):
            metrics |= dict(next(iter(evaluate(module, datamodule=datamodule, verbose=False)), {}))
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
        points = [(r.sparsity, [r.metrics["test/accuracy"]]) for r in rounds if r.number]
        dense = [r.metrics["test/accuracy"] for r in rounds if not r.number]
        draw_accuracy(folder / PICTURE, {"each round": points}, dense=dense)
    return rounds
