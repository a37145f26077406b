"""Sparse model soups: in each round several networks are retrained from one pruned network, and averaged."""

from collections.abc import Mapping
from typing import Any

import lightning as L
from lightning.pytorch.utilities import rank_zero_info

from sparsetrain.callbacks.forward_trial import ForwardTrial
from sparsetrain.callbacks.iterative import IterativeMagnitudePruning, of_first_rank
from sparsetrain.callbacks.recalibration import recalibrate
from sparsetrain.callbacks.trainer import train_loaders
from sparsetrain.callbacks.vary import VariedSettings, Vary
from sparsetrain.masks import Pruning
from sparsetrain.retrain import LinearLR, ReplayLR, Retrain
from sparsetrain.rounds import Rounds
from sparsetrain.snapshot import Snapshot
from sparsetrain.soups import RunningMean


class SparseModelSoup(IterativeMagnitudePruning):
    """Prune, retrain several times from the same pruned network, average, and go on from the average.

    A round is as many legs as there are ingredients, one after the other. Each leg begins at its first batch: with the
    pruned network of the round, a fresh optimizer, and its own seed or settings, as `vary` says. With the last step of
    the last leg the ingredients become their mean, the soup, and batch norm's statistics are computed anew, on a fixed
    sample of the training data; so the validation, checkpoint and metrics at the end of a round are of the soup, and
    those at the ends of other legs of an ingredient. The next round prunes the soup. All ingredients of a round share
    its masks, and so does the soup. For batch norm `forward` is called with the first part of each batch as the loader
    and the transfer hooks give it: normalize in one of these or in `forward`, not in `training_step`. That is tried
    with the second batch of the fit.

    The Trainer has to be `dense_length + rounds * ingredients * round_length` long, or has `max_epochs=-1`. With one
    ingredient this is iterative magnitude pruning whose batch norm is recalibrated: the control to compare with.

    Args:
        rounds: prunings, at least 1.
        round_length: of the retraining of each ingredient, such as "10ep".
        sparsity, per_round: as in `IterativeMagnitudePruning`.
        ingredients: networks retrained in each round, at least 1.
        vary: how they differ.
        dense_length: of the dense phase; None takes `round_length`, "0it" starts from the module's weights as given.
        retrain: the learning rate of each leg; see `sparsetrain.retrain`.
        only: (round, ingredient) of the one leg to train, rounds from 1 and ingredients from 0, for soups whose
            ingredients are trained by runs of their own (`sparsetrain-soup`); (0, 0) is the dense phase. The network is
            left as trained. Any leg but the first needs a checkpoint of what comes before it as ckpt_path.
        pruning, check: as in `IterativeMagnitudePruning`.

    Attributes:
        ingredient: the ingredient that is trained, 0-based.

    Raises:
        ValueError: as `IterativeMagnitudePruning`; a number of values to vary that is not that of the ingredients.

    Source: Zimmer et al. 2024, arXiv:2306.16788, algorithm 1.
    Differs: batch norm's statistics are means over the sample; the authors' code takes moving averages, with the
        layers' momentum. What stays after each round is exact; see `IterativeMagnitudePruning`.
    """

    _mean: RunningMean | None
    _ends_leg: bool  # whether the batch begun last is the last one of a leg, and the leg has not been ended
    _trial: ForwardTrial | None
    _resumed_in: int  # the epoch; -1 in a run that is not resumed

    def __init__(
        self,
        rounds: int,
        round_length: int | str,
        *,
        sparsity: float | None = None,
        per_round: float | None = None,
        ingredients: int = 3,
        vary: Vary = Vary(),
        dense_length: int | str | None = None,
        retrain: Retrain = LinearLR(),
        only: tuple[int, int] | None = None,
        pruning: Pruning = Pruning(),
        check: str = "cheap",
    ) -> None:
        if ingredients < 1:
            raise ValueError(f"ingredients is {ingredients}; a soup has at least 1.")
        vary.check(ingredients)
        if vary.lr is not None and isinstance(retrain, ReplayLR):
            raise ValueError(
                "Vary(lr=...) scales the rates that a policy sets, and under ReplayLR() the module's schedulers do. "
                "Use LinearLR() or another one."
            )
        self.ingredients, self.vary = ingredients, vary
        self.only = None if only is None else (only[0], only[1])  # Hydra gives a list
        self._varied = VariedSettings(vary)
        super().__init__(
            rounds,
            round_length,
            sparsity=sparsity,
            per_round=per_round,
            dense_length=dense_length,
            retrain=retrain,
            optimizer_state="reset",
            pruning=pruning,
            check=check,
        )
        lengths = self._lengths
        self._lengths = Rounds(rounds * self._legs, lengths.length, lengths.dense)
        if self.only is not None:
            self._check_only(self.only)

    @property
    def round(self) -> int:
        return -(-self.leg // self._legs)

    @property
    def ingredient(self) -> int:
        """The ingredient that is trained, 0-based."""
        return self._ingredient(self.leg)

    @property
    def numbers(self) -> range:
        """Of the rounds to train; 0 is the dense phase."""
        return range(0 if self._lengths.dense else 1, len(self.sparsities))

    @property
    def at_target(self) -> bool:
        return self.round == len(self.sparsities) - 1

    def final_step(self) -> int:
        return self.rounds.start(self.rounds.count - self._legs + 1)

    @property
    def span(self) -> tuple[int, int]:
        last = self.round * self._legs
        return self.rounds.start(last - self._legs + 1 if last else 0), self.rounds.start(last + 1)

    def ends_round(self, trainer: L.Trainer, batch_idx: int) -> bool:
        return self.ends_leg(trainer, batch_idx) and self.leg % self._legs == 0

    def stream(self, leg: int) -> tuple[int | str, ...]:
        number, ingredient = -(-leg // self._legs), self._ingredient(leg) if self.vary.seed else 0
        # The first ingredient is trained as the one network of iterative pruning.
        return ("round", number, "ingredient", ingredient) if ingredient else ("round", number)

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        resumed = self._restored is not None
        if not resumed and self.only is not None and self.only[0] > self.numbers[0]:
            raise ValueError(
                f"only={self.only} goes on with round {self.only[0]}, but there is no checkpoint of what comes before "
                "it. Give it as ckpt_path."
            )
        super().on_train_start(trainer, pl_module)
        self._resumed_in = trainer.current_epoch if resumed else -1
        self._trial = ForwardTrial.of(trainer, pl_module)
        if not resumed:
            self._varied.check(trainer.optimizers, pl_module)
        elif self.leg:
            self._varied.smooth(pl_module, self.ingredient)
        if self._ends_leg:  # the checkpoint was saved between the leg's last step and our own end of the batch
            self._end_leg(trainer, pl_module)

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        super().on_train_batch_start(trainer, pl_module, batch, batch_idx)
        if self._trial is not None:
            self._trial.begin_batch(batch)
        self._ends_leg = self.leg > 0 and self.ends_leg(trainer, batch_idx)

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)
        if self._ends_leg:
            self._end_leg(trainer, pl_module)

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        made = trainer.fit_loop.epoch_loop.batch_progress.current.ready
        is_over = trainer.should_stop or 0 <= trainer.max_steps <= trainer.global_step
        is_whole = trainer.current_epoch != self._resumed_in  # a checkpoint that was saved amid a batch loses this one
        if self._unit == "ep" and made < trainer.num_training_batches and is_whole and not is_over:
            raise ValueError(
                f"Epoch {trainer.current_epoch} had {made} batches, where the loader's length is "
                f"{trainer.num_training_batches}: the last batch of an ingredient would not be known. Set "
                f"limit_train_batches={made}."
            )

    def facts(self) -> dict[str, float]:
        return {**super().facts(), "sparsity/ingredient": float(self.ingredient)}

    def state_dict(self) -> dict[str, Any]:
        state = super().state_dict()
        if self._snapshot is not None:
            state["snapshot"] = self._snapshot.packed(self.masks)
        return {
            **state,
            "mean": None if self._mean is None else (Snapshot(self._mean.tensors).packed(self.masks), self._mean.count),
            "ends_leg": self._ends_leg,
            "varied": self._varied.state_dict(),
        }

    def _check_only(self, only: tuple[int, int]) -> None:
        number, ingredient = only
        if self._unit != "ep":
            raise ValueError(
                f"only={only} trains a leg by itself on the order of data that it has in the whole soup, which is a "
                "function of the seed where lengths are in epochs; here they are in steps. Give them in epochs."
            )
        if number not in self.numbers or not 0 <= ingredient < (self.ingredients if number else 1):
            raise ValueError(
                f"only={only} is no leg of this soup: rounds are {self.numbers[0]} to {self.numbers[-1]}, ingredients "
                f"0 to {self.ingredients - 1}, and (0, 0) is the dense phase."
            )

    @property
    def _legs(self) -> int:
        """Legs of a round."""
        return self.ingredients if self.only is None else 1

    @property
    def _total(self) -> int:
        return self._lengths.total if self.only is None else self._lengths.start(self.only[0] + 1)

    @property
    def _peak(self) -> float | None:
        return None if self.vary.lr is None else self.vary.lr[self.ingredient]

    def _ingredient(self, leg: int) -> int:
        return (leg - 1) % self._legs if self.only is None else self.only[1]

    def _begin_leg(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        super()._begin_leg(trainer, pl_module)
        self._varied.begin(trainer, pl_module, self.ingredient)
        rank_zero_info(f"Ingredient {self.ingredient + 1} of {self.ingredients}.")

    def _prune(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if (self.leg - 1) % self._legs:
            return  # the snapshot is pruned
        super()._prune(trainer, pl_module)
        if self.round == 1:
            self._varied.remember(trainer.optimizers)
        self._snapshot = of_first_rank(trainer, Snapshot.of(pl_module))

    def _end_leg(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Take the network as trained into the mean, and make the last one the soup."""
        self._ends_leg = False
        if self.only is not None:
            self._snapshot = None
            return
        self._mean = RunningMean() if self._mean is None else self._mean
        self._mean.add(Snapshot.of(pl_module).tensors)
        if self.leg % self._legs == 0:
            soup = of_first_rank(trainer, Snapshot(self._mean.tensors))
            soup.cast_like(pl_module).restore_(pl_module)
            self._mean = self._snapshot = None
            self.hold_zeros()
            recalibrate(trainer, pl_module, train_loaders(trainer), self._seed)

    def _begin(self) -> None:
        super()._begin()
        self._mean, self._ends_leg, self._trial, self._resumed_in = None, False, None, -1
        self._varied.release()
        self._varied = VariedSettings(self.vary)

    def _restore(self, state: Mapping[str, Any]) -> None:
        super()._restore(state)
        if self._snapshot is not None:
            self._snapshot = Snapshot.unpacked(self._snapshot.tensors, self.masks)
        if state["mean"] is not None:
            packed, count = state["mean"]
            self._mean = RunningMean(dict(Snapshot.unpacked(packed, self.masks).tensors), count)
        self._ends_leg = state["ends_leg"]
        self._varied.load_state_dict(state["varied"])

    def _release(self, trainer: L.Trainer) -> None:
        super()._release(trainer)
        if self._trial is not None:
            self._trial.release()
            self._trial = None
        self._varied.release()
