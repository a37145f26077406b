"""The learning rates of pruned rounds: the module's schedulers set back, or resting while a policy sets the rates."""

import copy
import warnings
from collections.abc import Mapping
from typing import Any

import lightning as L
import torch
from torch import Tensor
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau

from sparsetrain.callbacks.trainer import is_fast_dev_run
from sparsetrain.retrain import DenseRates, PruningStep, ReplayLR, Retrain
from sparsetrain.rounds import Rounds


class RoundRates:
    """Follows the learning rates of the dense phase and makes those of the rounds, as a policy says.

    Args:
        retrain: the policy.
    """

    def __init__(self, retrain: Retrain) -> None:
        self.retrain = retrain
        # Parameter groups and schedulers at the place to go back to.
        self._remembered: dict[str, list[Any]] | None = None
        # What the dense phase has had so far, by optimizer and group: the steps at which a rate began, and the rates.
        self._seen: list[list[tuple[list[int], list[float]]]] = []
        self._seen_length = 0
        # What the policy is told.
        self._dense: list[list[DenseRates]] = []
        self._pruned = PruningStep(0.0, 0.0)
        # The Trainer's schedulers while the policy sets the rates, and their restored states until they are there.
        self._resting: list[Any] | None = None
        self._rested: list[dict[str, Any]] | None = None

    @property
    def replays(self) -> bool:
        """Whether the module's own schedulers run again."""
        return isinstance(self.retrain, ReplayLR)

    def check(self, trainer: L.Trainer, pl_module: L.LightningModule, rounds: Rounds, steps_per_epoch: int) -> None:
        """Compare the module's schedulers with rounds in optimizer steps.

        Raises:
            ValueError: schedulers that cannot be run again, or do not step as a round begins and ends.
        """
        if not self.replays and not pl_module.automatic_optimization:
            raise ValueError(
                f"{type(self.retrain).__name__} sets the learning rate itself, and under manual optimization the "
                "module does. Use ReplayLR(), or automatic optimization."
            )
        # Without a dense phase the run begins at this step of the schedule.
        first = 0 if rounds.dense else rounds.replay_from
        for config in trainer.lr_scheduler_configs:
            name = type(config.scheduler).__name__
            if not isinstance(config.scheduler, LRScheduler):
                raise ValueError(
                    f"{name} is no scheduler of torch.optim: what it did in the dense phase cannot be run again. Use "
                    "one of torch.optim.lr_scheduler."
                )
            if not pl_module.automatic_optimization:
                if first:
                    raise ValueError(
                        f"How often the module would have stepped {name} before step {first}, at which the rounds "
                        "begin, is not known under manual optimization. Begin with a dense phase, with "
                        "rewind_to='0it', or use automatic optimization."
                    )
                continue
            # Lightning counts epochs over the run, and steps within an epoch.
            by_epoch = config.interval == "epoch" or config.frequency > 1
            period = steps_per_epoch * (config.frequency if config.interval == "epoch" else 1) if by_epoch else 1
            replayed = self.replays and not is_fast_dev_run(trainer)
            if replayed and (rounds.trained % period or first % period):
                raise ValueError(
                    f"{name} steps every {config.frequency} {config.interval}(s), and a round of {rounds.trained} "
                    f"steps, from step {rounds.replay_from} of the schedule on, does not begin and end with one. Make "
                    f"both multiples of {period} steps, or let it step at each step."
                )

    def observe(self, trainer: L.Trainer, place: int, *, dense: bool) -> None:
        """Note the rates of the step at `place`.

        Without a dense phase those with which the optimizers were made stand for it, or the highest of a cycle.
        """
        if self.replays or not (dense or not self._seen):
            return
        self._seen_length = place + 1
        self._seen += [[] for _ in trainer.optimizers[len(self._seen) :]]
        for optimizer, groups in zip(trainer.optimizers, self._seen, strict=True):
            groups += [([], []) for _ in optimizer.param_groups[len(groups) :]]  # groups may be added in training
            for group, (starts, rates) in zip(optimizer.param_groups, groups, strict=True):
                made = group.get("max_lr", group.get("initial_lr", group["lr"]))
                rate = float(group["lr"] if dense else made)
                if not rates or rates[-1] != rate:
                    starts.append(place if starts else 0)
                    rates.append(rate)

    def observe_pruning(self, pruned: PruningStep) -> None:
        """Note what the pruning took away with which a round begins."""
        self._pruned = pruned

    def remember(self, trainer: L.Trainer) -> None:
        """Keep the state of the schedulers, and what they have written to the optimizers, to go back to."""
        if self.replays:
            self._remembered = {
                "groups": [[_settings(group) for group in o.param_groups] for o in trainer.optimizers],
                "schedulers": [copy.deepcopy(config.scheduler.state_dict()) for config in trainer.lr_scheduler_configs],
            }

    def begin_round(self, trainer: L.Trainer) -> None:
        """Set the schedulers back, or let them rest."""
        if self._remembered is None:
            self._rest(trainer)
            return
        for optimizer, groups in zip(trainer.optimizers, self._remembered["groups"], strict=True):
            for group, settings in zip(optimizer.param_groups, groups, strict=False):  # later ones keep theirs
                _set(group, settings)
        for config, state in zip(trainer.lr_scheduler_configs, self._remembered["schedulers"], strict=True):
            config.scheduler.load_state_dict(copy.deepcopy(state))

    def set_step(self, trainer: L.Trainer, step: int, length: int, *, peak: float | None = None) -> None:
        """Set the rates of `step` of a round of `length` steps, where the policy does.

        Args:
            trainer: whose optimizers have them.
            step: of the round, 0-based.
            length: of the round.
            peak: stands for the highest rate of the dense phase; others, also of other groups, keep their ratio to it.
        """
        if self._resting is None:
            return
        highest = max(dense.highest for groups in self._dense for dense in groups)
        scale = 1.0 if peak is None else peak / highest
        for optimizer, groups in zip(trainer.optimizers, self._dense, strict=True):
            for group, dense in zip(optimizer.param_groups, groups, strict=True):
                rate = self.retrain.rate(dense, self._pruned, step, length)
                _set(group, {"lr": rate if rate is None else scale * rate})

    def state_dict(self) -> dict[str, Any]:
        """All of it; the Trainer does not save schedulers that rest."""
        resting = None if self._resting is None else [config.scheduler.state_dict() for config in self._resting]
        return {
            "remembered": self._remembered,
            "seen": [
                [(torch.tensor(starts), torch.tensor(rates, dtype=torch.float64)) for starts, rates in groups]
                for groups in self._seen
            ],
            "seen_length": self._seen_length,
            "pruned": (self._pruned.share, self._pruned.norm_drop),
            "resting": resting,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over what `state_dict` returned; schedulers follow in `resume`."""
        self._remembered, self._rested = state["remembered"], state["resting"]
        self._seen = [[(starts.tolist(), rates.tolist()) for starts, rates in groups] for groups in state["seen"]]
        self._seen_length, self._pruned = state["seen_length"], PruningStep(*state["pruned"])

    def resume(self, trainer: L.Trainer, *, in_round: bool) -> None:
        """Go on after `load_state_dict`, in a round or not."""
        for config, state in zip(trainer.lr_scheduler_configs, self._rested or [], strict=False):
            config.scheduler.load_state_dict(state)
        self._rested = None
        if in_round:
            self._rest(trainer)

    def release(self, trainer: L.Trainer) -> None:
        """Give the Trainer its schedulers back; may be called again."""
        if self._resting is not None:
            trainer.strategy.lr_scheduler_configs = self._resting
            self._resting = None

    def _rest(self, trainer: L.Trainer) -> None:
        if not self.replays and self._resting is None:
            self._dense = [
                [DenseRates(tuple(starts), tuple(rates), self._seen_length) for starts, rates in groups]
                for groups in self._seen
            ]
            self._resting = trainer.lr_scheduler_configs
            trainer.strategy.lr_scheduler_configs = []


def fast_forward(trainer: L.Trainer, place: int, steps_per_epoch: int) -> None:
    """Bring the schedulers to `place` of their schedule, as if so many optimizer steps had been made."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Detected call of .lr_scheduler.step", UserWarning)
        for config in trainer.lr_scheduler_configs:
            scheduler = config.scheduler
            if not isinstance(scheduler, ReduceLROnPlateau):
                for _ in range(_calls(trainer, config, place, steps_per_epoch)):
                    scheduler.step()


def _calls(trainer: L.Trainer, config: Any, place: int, steps_per_epoch: int) -> int:
    """How often Lightning calls a scheduler in the first `place` optimizer steps of a run."""
    if config.interval == "epoch":
        return int(place // steps_per_epoch // config.frequency)
    if config.frequency == 1:
        return place
    # Lightning counts the batches of each epoch; `place` is a whole number of these.
    batches, every = int(trainer.num_training_batches), trainer.accumulate_grad_batches
    stepped = [number for number in range(1, batches + 1) if number % every == 0 or number == batches]
    return place // steps_per_epoch * len([number for number in stepped if number % config.frequency == 0])


def _settings(group: Mapping[str, Any]) -> dict[str, Any]:
    """A parameter group's numbers: learning rate, momentum, what schedulers have written there."""
    return {key: copy.deepcopy(value) for key, value in group.items() if key != "params"}


def _set(group: dict[str, Any], settings: Mapping[str, Any]) -> None:
    for key, value in settings.items():
        if isinstance(group.get(key), Tensor):
            group[key].fill_(value)  # a compiled or captured step reads this tensor
        else:
            group[key] = copy.deepcopy(value)
