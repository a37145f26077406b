"""Iterative magnitude pruning: many rounds of pruning and retraining in one fit."""

import math
import random
from collections.abc import Mapping
from typing import Any

import lightning as L
import numpy as np
import torch
from lightning.pytorch.callbacks import EarlyStopping, StochasticWeightAveraging, WeightAveraging
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn

from sparsetrain.callbacks.base import SparsityCallback
from sparsetrain.callbacks.length import ShownLength
from sparsetrain.callbacks.optimizer_snapshot import OptimizerSnapshot
from sparsetrain.callbacks.rates import RoundRates, fast_forward
from sparsetrain.callbacks.trainer import callbacks_of, is_fast_dev_run, train_loaders
from sparsetrain.choices import check_choice
from sparsetrain.masks import Masks, Pruning
from sparsetrain.retrain import PruningStep, ReplayLR, Retrain
from sparsetrain.rng import derive_seed
from sparsetrain.rounds import Rounds, sparsities, whole_lengths
from sparsetrain.snapshot import Snapshot
from sparsetrain.tickets import Ticket


class IterativeMagnitudePruning(SparsityCallback):
    """Train dense, then prune and train again, round by round, within one `Trainer.fit`.

    A round begins at its first batch: the smallest weights of the network as trained so far are pruned, and weights,
    learning rate and optimizer state are set back as chosen. So validation and checkpoints always see a trained
    network. Lengths are whole epochs, or whole steps in a Trainer that counts steps; the Trainer has to be
    `dense_length + rounds * (round_length - rewind_to)` long, or has `max_epochs=-1` and takes this length. While the
    module configures its optimizers it sees the length of its schedule alone: that of the dense phase or, without one,
    of a round. In epochs, the order and augmentation of data (of loaders that have `reseed`) and the random
    numbers of each round are functions of the run's seed and the round. Learning rates are those that
    the policy says, also where the module sets its own, in whatever hook.

    ======================================  ==========  ==========  ===============
    the literature's name                   `weights`   `retrain`   `optimizer_state`
    ======================================  ==========  ==========  ===============
    learning-rate rewinding (Renda et al.)  "keep"      ReplayLR()  "keep"
    weight rewinding (Renda et al.)         "rewind"    ReplayLR()  "snapshot"
    weight rewinding (open_lth)             "rewind"    ReplayLR()  "reset"
    fine-tuning                             "keep"      LastLR()    "keep"
    ======================================  ==========  ==========  ===============

    With `sparsity=0.0` nothing is pruned: the dense control of the same steps and learning rates.

    Args:
        rounds: prunings, at least 1.
        round_length: of a round that begins at the start of the schedule, such as "40ep".
        sparsity: after the last round, in [0, 1).
        per_round: instead of it, the share of the remaining weights that each round prunes, in [0, 1).
        dense_length: of the dense phase; None takes `round_length`, "0it" starts from the module's weights as given.
        weights: "keep" trains on with what the last round has made, "rewind" goes back to the weights and buffers of
            step `rewind_to` of the dense phase.
        rewind_to: the place at which each round begins, below `round_length`: of a schedule as long as a round; of a
            longer one a round runs as many last places.
        retrain: the learning rate after pruning; see `sparsetrain.retrain`.
        optimizer_state: "keep", "reset" to none, or "snapshot": that of the place at which rounds begin.
        pruning: what is pruned, scored and allocated how.
        check: see `SparsityCallback`.

    Attributes:
        leg: the leg that has begun last, 0 for the dense phase; here a leg is a round.
        rounds: the arithmetic, in optimizer steps, once training has started; it counts legs.

    Raises:
        ValueError: arguments out of range or that do not go together; at the start of the fit, a Trainer of another
            length, or callbacks that mix weights of different rounds.

    Source: Han et al. 2015, arXiv:1506.02626; Frankle & Carbin 2019, arXiv:1803.03635; Renda et al. 2020,
        arXiv:2003.02389.
    Differs: what stays after round r is n - floor(s * n + 0.5) of n weights with s = 1 - (1 - p)**r, exactly; open_lth
        rounds up what it prunes and drops ties, each time of what the round before left.
    """

    leg: int
    rounds: Rounds
    _seed: int
    _origin: str
    _snapshot: Snapshot | None
    _optimizers: OptimizerSnapshot | None
    _rates: RoundRates
    _scaler: dict[str, Any]
    _plan: dict[str, Any]
    _shown: ShownLength | None

    def __init__(
        self,
        rounds: int,
        round_length: int | str,
        *,
        sparsity: float | None = None,
        per_round: float | None = None,
        dense_length: int | str | None = None,
        weights: str = "keep",
        rewind_to: int | str = "0it",
        retrain: Retrain = ReplayLR(),
        optimizer_state: str = "keep",
        pruning: Pruning = Pruning(),
        check: str = "cheap",
    ) -> None:
        dense_length = round_length if dense_length is None else dense_length
        lengths, self._unit = whole_lengths(round_length=round_length, dense_length=dense_length, rewind_to=rewind_to)
        self._lengths = Rounds(rounds, *lengths)
        self.sparsities = (0.0, *sparsities(rounds, sparsity=sparsity, per_round=per_round))
        check_choice(weights, "weights", ("keep", "rewind"))
        check_choice(optimizer_state, "optimizer_state", ("keep", "reset", "snapshot"))
        if not isinstance(retrain, Retrain):
            raise ValueError(f"retrain={retrain!r} is no policy. Give one such as ReplayLR() or LastLR().")
        self.weights, self.retrain, self.optimizer_state = weights, retrain, optimizer_state
        self._check_lengths()
        if "grad" in pruning.criterion.needs:
            raise ValueError(
                f"{type(pruning.criterion).__name__} needs gradients, and there are none between two rounds. Use "
                "Magnitude(), Movement() or Random(), or GradualMagnitudePruning."
            )
        super().__init__(pruning, check=check)

    @property
    def round(self) -> int:
        """The round that has begun last; 0 in the dense phase."""
        return self.leg

    @property
    def length(self) -> str:
        """How long the Trainer has to be, such as "240ep"."""
        return f"{self._total}{self._unit}"

    @property
    def ticket(self) -> Ticket:
        """The weights rewound to and the present masks, of a run with `weights="rewind"`.

        Raises:
            RuntimeError: the weights are not rewound, or the fit has not come to the step `rewind_to`.
        """
        if self._snapshot is None or self.weights != "rewind":
            raise RuntimeError("There is no ticket before a run with weights='rewind' has come to the step rewound to.")
        return Ticket(self._snapshot, {name: mask.cpu().clone() for name, mask in self.masks.items()}, self._origin)

    def target(self, step: int) -> float | None:
        return None  # masks change between steps

    def final_step(self) -> int:
        return self.rounds.start(self.rounds.count)

    @property
    def at_target(self) -> bool:
        """Whether the last round has begun: by its place, as steps that a gradient scaler skips are not made."""
        return self.round == self.rounds.count

    @property
    def span(self) -> tuple[int, int]:
        """The first optimizer step of the present round, and the one after its last."""
        return self.rounds.start(self.leg), self.rounds.start(self.leg + 1)

    def ends_leg(self, trainer: L.Trainer, batch_idx: int) -> bool:
        """Whether batch `batch_idx` of the epoch, just trained, is the last one of a leg."""
        place = self._place(trainer, batch_idx + 1, epoch_ends=trainer.is_last_batch)
        return place is not None and place == self.rounds.start(self.leg + 1)

    def ends_round(self, trainer: L.Trainer, batch_idx: int) -> bool:
        """Whether batch `batch_idx` of the epoch, just trained, is the last one of a round."""
        return self.ends_leg(trainer, batch_idx)

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        if stage != "fit":
            return
        for callback in callbacks_of(trainer):
            if isinstance(callback, EarlyStopping | WeightAveraging | StochasticWeightAveraging):
                raise ValueError(
                    f"{type(callback).__name__} does not go with {type(self).__name__}: it would end the run or mix "
                    "weights across rounds. Remove it; for a single phase use GradualMagnitudePruning."
                )
        lengths = self._lengths
        kind = "rounds" if lengths.count == len(self.sparsities) - 1 else "legs"
        self._shown = ShownLength(trainer, lengths, self._total, self._unit, kind)
        self._shown.show(lengths.schedule)  # what `configure_optimizers` sees

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        assert self._shown is not None
        self._shown.show(self._total)

    def prepare(self, trainer: L.Trainer) -> None:
        if is_fast_dev_run(trainer):
            self.rounds = Rounds(1, max(self.run.total_steps or 1, 1), 0)
            rank_zero_info(f"fast_dev_run: pruning to {self.sparsities[-1]} at the first step.")
        elif made := self._before[0 if self._unit == "ep" else 1]:
            raise ValueError(
                f"This Trainer has made {made}{self._unit} in a fit before, and rounds are counted from its start. Use "
                "a new Trainer, or give the checkpoint of a run to resume as ckpt_path."
            )
        elif self._unit == "it" and len(trainer.optimizers) > 1:
            raise ValueError(
                f"A Trainer counts the steps of all {len(trainer.optimizers)} optimizers together, so that rounds in "
                f"steps would be cut short at {self.length}. Give all lengths in epochs."
            )
        elif self.run.steps_per_epoch is None:
            raise ValueError(
                f"{type(self).__name__} has to know how many optimizer steps an epoch has. Use a loader with a length "
                "and one accumulate_grad_batches for the whole run."
            )
        else:
            self.rounds = self._lengths.in_steps(self.run.steps_per_epoch if self._unit == "ep" else 1)

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        resumed = self._restored is not None
        super().on_train_start(trainer, pl_module)
        plan = self._make_plan()
        if resumed and self._plan != plan:
            raise ValueError(
                f"The run was saved with {self._plan}, and cannot go on with {plan}. Resume a run with its own "
                "settings."
            )
        self._plan = plan
        self._check_sparsity(self.sparsities[-1])
        self._rates.check(trainer, pl_module, self.rounds, self.run.steps_per_epoch or 1)
        if not resumed:
            self._seed = trainer.strategy.broadcast(torch.initial_seed())
            self._scaler = trainer.precision_plugin.state_dict()
            if self.weights == "rewind":
                self._origin = trainer.strategy.broadcast(Snapshot.of(pl_module).digest)
        if self.leg:
            self._reseed_loaders(trainer, self.leg)
        self._rates.resume(trainer, in_round=self.leg > 0)

    def on_train_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        super().on_train_epoch_start(trainer, pl_module)
        steps = math.ceil(trainer.num_training_batches / trainer.accumulate_grad_batches)
        if steps != self.run.steps_per_epoch and not is_fast_dev_run(trainer):
            raise ValueError(
                f"Epoch {trainer.current_epoch} has {steps} optimizer steps, and the first one has had "
                f"{self.run.steps_per_epoch}: rounds are counted in epochs of one length. Set limit_train_batches."
            )
        leg = self.rounds.at(trainer.current_epoch * (self.run.steps_per_epoch or 0))
        if leg:
            self._reseed_loaders(trainer, leg)  # each epoch: the Trainer may have made new loaders
        if leg > self.leg:
            _seed_all(derive_seed(self._seed, *self.stream(leg), trainer.global_rank))  # before an iterator draws
            if trainer.fit_loop.is_resuming:
                assert trainer.fit_loop._data_fetcher is not None
                iter(trainer.fit_loop._data_fetcher)  # its iterator has been made, and Lightning makes no other one

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        place = self._place(trainer, batch_idx)
        if place is None:
            if not self._rates.has_begun:  # resumed within an accumulation
                begun = self._place(trainer, batch_idx - batch_idx % trainer.accumulate_grad_batches)
                assert begun is not None
                self._begin_step(trainer, begun)
            return
        if self._unit == "it" and place != trainer.global_step and not is_fast_dev_run(trainer):
            raise ValueError(
                f"The module has made {trainer.global_step} optimizer steps in {place} batches, and rounds in steps "
                "are counted by batches. Give all lengths in epochs."
            )
        if self.leg == 0:
            self._prepare_rounds(trainer, pl_module, place)
        if self.rounds.at(place) > self.leg:
            if batch_idx > 0:
                _seed_all(derive_seed(self._seed, *self.stream(self.leg + 1), trainer.global_rank))
            self._begin_leg(trainer, pl_module)
        self._begin_step(trainer, place)

    def facts(self) -> dict[str, float]:
        return {**super().facts(), "sparsity/round": float(self.round)}

    def state_dict(self) -> dict[str, Any]:
        return {
            **super().state_dict(),
            "leg": self.leg,
            "seed": self._seed,
            "scaler": self._scaler,
            "origin": self._origin,
            "snapshot": None if self._snapshot is None else dict(self._snapshot.tensors),
            "optimizers": None if self._optimizers is None else self._optimizers.packed(self.masks),
            "rates": self._rates.state_dict(),
            "plan": self._plan,
        }

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        super().on_train_end(trainer, pl_module)
        steps = self._total * ((self.run.steps_per_epoch or 1) if self._unit == "ep" else 1)
        if self.leg < self.rounds.at(steps - 1) and not is_fast_dev_run(trainer):
            rank_zero_warn(
                f"The run ended at step {self.step} of {steps}, in round {self.round} of {len(self.sparsities) - 1}, "
                f"with sparsity {self.masks.sparsity():.4f}. Resume it from its last checkpoint to go on."
            )

    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        super().on_fit_end(trainer, pl_module)
        self._rates.resume(trainer, in_round=False)  # if it was resumed from its end

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        super().teardown(trainer, pl_module, stage)
        self._release(trainer)

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        super().on_exception(trainer, pl_module, exception)
        self._release(trainer)

    def stream(self, leg: int) -> tuple[int | str, ...]:
        """The name of the random stream of `leg`, at least 1: of its order, augmentation and dropout."""
        return "round", leg

    def change_masks(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Prune the network that the last round has trained; `self.round` is the new one."""
        self._update(trainer, self.sparsities[-1 if is_fast_dev_run(trainer) else self.round])

    def _begin(self) -> None:
        super()._begin()
        self.leg, self._seed, self._scaler, self._plan = 0, 0, {}, {}
        self.rounds = self._lengths
        self._snapshot, self._optimizers, self._origin = None, None, ""
        self._rates = RoundRates(self.retrain)
        self._shown = None

    def _restore(self, state: Mapping[str, Any]) -> None:
        super()._restore(state)
        self.leg, self._seed, self._scaler = state["leg"], state["seed"], state["scaler"]
        self._origin, self._plan = state["origin"], state["plan"]
        self._snapshot = None if state["snapshot"] is None else Snapshot(state["snapshot"])
        optimizers = state["optimizers"]
        self._optimizers = None if optimizers is None else OptimizerSnapshot.unpacked(optimizers, self.masks)
        self._rates.load_state_dict(state["rates"])

    def _make_plan(self) -> dict[str, Any]:
        """What a resumed run has to share."""
        rounds = self.rounds
        return {
            "rounds": rounds.count,
            "steps": [rounds.dense, rounds.length, rounds.rewind_to],
            "sparsities": list(self.sparsities),
            "weights": self.weights,
            "optimizer_state": self.optimizer_state,
            "retrain": repr(self.retrain),
        }

    def _check_lengths(self) -> None:
        lengths = self._lengths
        if self.weights == "rewind" and lengths.dense not in (0, lengths.length):
            raise ValueError(
                f"weights='rewind' trains each round as the dense phase was trained, but dense_length is "
                f"{lengths.dense} and round_length {lengths.length}. Make them equal, or dense_length='0it'."
            )
        if isinstance(self.retrain, ReplayLR) and lengths.replay_from < 0:
            raise ValueError(
                f"ReplayLR() runs the last {lengths.trained} of the schedule's {lengths.schedule} again. Make "
                "dense_length at least round_length - rewind_to, or '0it'."
            )
        if self.retrain.needs_dense_phase and lengths.dense == 0:
            raise ValueError(
                f"{type(self.retrain).__name__}() needs the learning rates of a dense phase, and dense_length=0 leaves "
                "none. Use LinearLR(), LastLR() or ReplayLR() and give the module the learning rate of the rounds."
            )

    @property
    def _peak(self) -> float | None:
        """The highest learning rate of this leg; None: that of the dense phase."""
        return None

    @property
    def _total(self) -> int:
        """The length of the run, in the unit of the lengths."""
        return self._lengths.total

    def _place(self, trainer: L.Trainer, batch_idx: int, *, epoch_ends: bool = False) -> int | None:
        """Optimizer steps due before batch `batch_idx` of the epoch; None within an accumulation.

        Counted from batches, not as made: a step that a gradient scaler skips has its place in the schedule.
        """
        steps, within = divmod(batch_idx, trainer.accumulate_grad_batches)
        if within and not epoch_ends:
            return None
        return trainer.current_epoch * (self.run.steps_per_epoch or 0) + steps + bool(within)

    def _begin_step(self, trainer: L.Trainer, place: int) -> None:
        """Let the step at `place` of the run have its rates."""
        self._rates.begin_step(trainer, self.rounds, self.leg, place - self.rounds.start(self.leg), peak=self._peak)

    def _prepare_rounds(self, trainer: L.Trainer, pl_module: L.LightningModule, place: int) -> None:
        """Take from the dense phase what the rounds need of it."""
        first, dense = max(self.rounds.replay_from, 0), self.rounds.dense
        if place == (first if dense else 0):
            if not dense:
                fast_forward(trainer, first, self.run.steps_per_epoch or 1)
            self._remember(trainer, pl_module)

    def _remember(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Keep what the rounds will go back to."""
        if self.weights == "rewind":
            self._snapshot = of_first_rank(trainer, Snapshot.of(pl_module))
        if self.optimizer_state == "snapshot":
            self._optimizers = OptimizerSnapshot.of(trainer.optimizers, pl_module)
        self._rates.remember(trainer)

    def _begin_leg(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.leg += 1
        self._prune(trainer, pl_module)
        if self._snapshot is not None:
            self._snapshot.restore_(pl_module)
        self._set_optimizers_back(trainer)
        for callback in callbacks_of(trainer):
            if isinstance(callback, SparsityCallback):
                callback.hold_zeros()  # also of weights that another one prunes
        self._rates.begin_round(trainer)

    def _prune(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        kept, square = sum(self.masks.kept.values()), _square(self.masks)
        self.change_masks(trainer, pl_module)
        share = 1 - sum(self.masks.kept.values()) / kept
        norm_drop = math.sqrt(max(1 - _square(self.masks) / square, 0.0)) if square else 0.0
        self._rates.observe_pruning(PruningStep(share, norm_drop))
        rank_zero_info(f"Round {self.round} of {len(self.sparsities) - 1}: sparsity {self.masks.sparsity():.4%}.")

    def _set_optimizers_back(self, trainer: L.Trainer) -> None:
        if self.optimizer_state == "keep":
            return
        empty = OptimizerSnapshot([{"names": (), "state": {}}] * len(trainer.optimizers))
        (self._optimizers or empty).restore_(trainer.optimizers)  # by loading: an optimizer may wrap another one
        trainer.precision_plugin.load_state_dict(self._scaler)  # gradients are scaled as for a fresh optimizer

    def _reseed_loaders(self, trainer: L.Trainer, leg: int) -> None:
        """Give the loaders the order and augmentation of `leg`, whose first epoch is that of the schedule."""
        if self._unit != "ep" or is_fast_dev_run(trainer):
            return  # counted in steps, a round may begin within an epoch
        per_epoch = self.run.steps_per_epoch or 1
        epoch0 = (self.rounds.start(leg) - max(self.rounds.replay_from, 0)) // per_epoch
        for loader in train_loaders(trainer):
            if hasattr(loader, "reseed"):
                loader.reseed(derive_seed(self._seed, *self.stream(leg)), epoch0)

    def _release(self, trainer: L.Trainer) -> None:
        """Give the Trainer its length and its schedulers back."""
        if self._shown is not None:
            self._shown.release()
            self._shown = None
        self._rates.release(trainer)


def of_first_rank(trainer: L.Trainer, snapshot: Snapshot) -> Snapshot:
    """The first rank's: batch norm's statistics differ among ranks, and a checkpoint holds those of the first."""
    return trainer.strategy.broadcast(snapshot) if trainer.world_size > 1 else snapshot


def _square(masks: Masks) -> float:
    """The squared Euclidean norm of the maskable weights."""
    # On the CPU: not every device has float64.
    weights = (masks.parameter(name).detach().cpu() for name in masks)
    return sum(float(torch.linalg.vector_norm(weight, dtype=torch.float64)) ** 2 for weight in weights)


def _seed_all(seed: int) -> None:
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)
