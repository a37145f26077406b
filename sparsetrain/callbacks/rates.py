"""The learning rates of pruned rounds: the module's schedulers set back, or resting while a policy sets the rates."""

import copy
import warnings
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from typing import Any, Self

import lightning as L
import torch
from torch import Tensor
from torch.optim import LBFGS, Optimizer
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau
from torch.utils.hooks import RemovableHandle

from sparsetrain.callbacks.follower import Arguments, after_closure, patch_step
from sparsetrain.callbacks.trainer import is_fast_dev_run
from sparsetrain.retrain import DenseRates, PruningStep, ReplayLR, Retrain
from sparsetrain.rounds import Rounds

_AT_A_PLACE = 1 << 16  # more steps than an optimizer makes in a batch


class RoundRates:
    """Follows the learning rates of the dense phase and makes those of the rounds, as a policy says.

    It reads and writes them at the last moment before each step: a module may set them in any of its hooks.

    Args:
        retrain: the policy.
    """

    def __init__(self, retrain: Retrain) -> None:
        self.retrain = retrain
        # Parameter groups and schedulers at the place to go back to.
        self._remembered: dict[str, list[Any]] | None = None
        # What the dense phase has had so far, by optimizer and group.
        self._seen: list[list[_Seen]] = []
        self._seen_length = 0
        self._dense: list[list[DenseRates]] | None = None  # the same as a policy is told, once one asks
        self._pruned = PruningStep(0.0, 0.0)
        # Of the step to come: its place in the schedule, and its rates by optimizer and group, None to see them.
        self._place = 0
        self._rates: Sequence[Sequence[float | None]] | None = None
        self._made: dict[Optimizer, int] = {}  # steps since; a batch may have several under manual optimization
        self._followed: list[Optimizer] = []
        self._handles: list[RemovableHandle] = []
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
            ValueError: schedulers that cannot be brought to where rounds begin, or do not step as one begins and ends;
                an optimizer without a learning rate, where the policy sets them.
        """
        if not self.replays and any(_rate(group) is None for o in trainer.optimizers for group in o.param_groups):
            raise ValueError(
                f"{type(self.retrain).__name__} sets learning rates, and an optimizer of this module has none (lr is "
                "missing or None). Give it one, or use ReplayLR()."
            )
        if not self.replays and not pl_module.automatic_optimization:
            raise ValueError(
                f"{type(self.retrain).__name__} sets the learning rate itself, and under manual optimization the "
                "module does. Use ReplayLR(), or automatic optimization."
            )
        # Without a dense phase the run begins at this step of the schedule.
        first = 0 if rounds.dense else rounds.replay_from
        for config in trainer.lr_scheduler_configs:
            name = type(config.scheduler).__name__
            is_torchs = isinstance(config.scheduler, LRScheduler)
            if not is_torchs:
                if first:
                    raise ValueError(
                        f"{name} is no scheduler of torch.optim: what it would do before step {first}, at which the "
                        "rounds begin, is not known. Begin with a dense phase, with rewind_to='0it', or use one of "
                        "torch.optim.lr_scheduler."
                    )
                continue
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

    def observe_pruning(self, pruned: PruningStep) -> None:
        """Note what the pruning took away with which a round begins."""
        self._pruned = pruned

    def remember(self, trainer: L.Trainer) -> None:
        """Keep the state of the schedulers, and what they have written to the optimizers, to go back to."""
        if self.replays:
            self._remembered = {
                "optimizers": [type(o).__name__ for o in trainer.optimizers],
                "groups": [[_settings(group) for group in o.param_groups] for o in trainer.optimizers],
                "schedulers": [copy.deepcopy(config.scheduler.state_dict()) for config in trainer.lr_scheduler_configs],
            }

    def begin_round(self, trainer: L.Trainer) -> None:
        """Set the schedulers back, or let them rest."""
        if self._remembered is None:
            self._rest(trainer)
            return
        remembered = zip(self._remembered["optimizers"], self._remembered["groups"], strict=True)
        for optimizer, (kind, groups) in zip(trainer.optimizers, remembered, strict=False):
            if type(optimizer).__name__ == kind:  # else another one has taken its place, with settings of its own
                for group, settings in zip(optimizer.param_groups, groups, strict=False):  # later ones keep theirs
                    _set(group, settings)
        for config, state in zip(trainer.lr_scheduler_configs, self._remembered["schedulers"], strict=True):
            config.scheduler.load_state_dict(copy.deepcopy(state))

    def begin_step(self, trainer: L.Trainer, rounds: Rounds, leg: int, step: int, *, peak: float | None = None) -> None:
        """See the rates of the step to come, or set them.

        Args:
            trainer: whose optimizers have them.
            rounds: in optimizer steps.
            leg: to which the step belongs.
            step: of the leg, 0-based.
            peak: stands for the highest rate of the dense phase; others, also of other groups, keep their ratio to it.
        """
        self._follow(trainer.optimizers)
        self._made = {}
        # Without a dense phase the first round has the schedule's own rates.
        sees = leg == 0 or (self.replays and leg == 1 and not rounds.dense)
        self._place = step + (rounds.replay_from if leg and self.replays else 0)
        if sees:
            self._rates, self._dense = None, None
        elif not self.replays:
            self._rates = self._policy(step, rounds.trained, peak)
        elif any(isinstance(config.scheduler, ReduceLROnPlateau) for config in trainer.lr_scheduler_configs):
            self._rates = ()  # these follow the round
        else:
            self._rates = self._replayed(0)
        for optimizer in trainer.optimizers:
            self._settle(optimizer, 0)  # for who reads them before the step, and for steps that a scaler skips

    @property
    def has_begun(self) -> bool:
        """Whether there was a `begin_step` since the start of the fit."""
        return bool(self._followed)

    def state_dict(self) -> dict[str, Any]:
        """All of it; the Trainer does not save schedulers that rest."""
        resting = None if self._resting is None else [config.scheduler.state_dict() for config in self._resting]
        return {
            "remembered": self._remembered,
            "seen": [[seen.state() for seen in groups] for groups in self._seen],
            "seen_length": self._seen_length,
            "pruned": (self._pruned.share, self._pruned.norm_drop),
            "resting": resting,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over what `state_dict` returned; schedulers follow in `resume`."""
        self._remembered, self._rested = state["remembered"], state["resting"]
        self._seen = [[_Seen.from_state(*seen) for seen in groups] for groups in state["seen"]]
        self._seen_length, self._pruned = state["seen_length"], PruningStep(*state["pruned"])

    def resume(self, trainer: L.Trainer, *, in_round: bool) -> None:
        """Go on after `load_state_dict`, in a round or not."""
        for config, state in zip(trainer.lr_scheduler_configs, self._rested or [], strict=False):
            config.scheduler.load_state_dict(state)
        self._rested = None
        if in_round:
            self._rest(trainer)

    def release(self, trainer: L.Trainer) -> None:
        """Give the Trainer its schedulers back, and leave the optimizers; may be called again."""
        self._follow([])
        if self._resting is not None:
            trainer.strategy.lr_scheduler_configs = self._resting
            self._resting = None

    def _rest(self, trainer: L.Trainer) -> None:
        if not self.replays and self._resting is None:
            if not self._seen:
                self._follow(trainer.optimizers)
                for optimizer in trainer.optimizers:
                    self._see(optimizer, 0, 0, [_made_with(group) for group in optimizer.param_groups])
            self._resting = trainer.lr_scheduler_configs
            trainer.strategy.lr_scheduler_configs = []

    def _follow(self, optimizers: Sequence[Optimizer]) -> None:
        """Have the last word before each step of these optimizers, and of no others."""
        if self._followed != list(optimizers):
            for handle in self._handles:
                handle.remove()
            self._followed = list(optimizers)
            for optimizer in optimizers:
                patch_step(optimizer)
            self._handles = [optimizer.register_step_pre_hook(self._before_step) for optimizer in optimizers]

    def _before_step(self, optimizer: Optimizer, arguments: tuple[Any, ...], settings: dict[str, Any]) -> Arguments:
        number = self._made.get(optimizer, 0)
        self._made[optimizer] = number + 1
        self._settle(optimizer, number)
        if isinstance(optimizer, LBFGS):  # has read its rate when it calls its closure
            return None
        return after_closure(arguments, settings, lambda: self._settle(optimizer, number))

    def _settle(self, optimizer: Optimizer, number: int) -> None:
        """See the rates of a step to come, the one of that number since `begin_step`, or set them."""
        if self._rates is None:
            self._see(optimizer, self._place, number, [_rate(group) for group in optimizer.param_groups])
            return
        rates = self._replayed(number) if number and self.replays and self._rates else self._rates
        for group, rate in zip(optimizer.param_groups, _of(rates, self._followed.index(optimizer)), strict=False):
            if rate is not None:
                _set(group, {"lr": rate})

    def _see(self, optimizer: Optimizer, place: int, number: int, rates: Sequence[float | None]) -> None:
        index = self._followed.index(optimizer)
        self._seen += [[] for _ in range(index + 1 - len(self._seen))]
        self._seen_length = place + 1
        groups = self._seen[index]
        groups += [_Seen() for _ in rates[len(groups) :]]  # groups may be added in training
        for seen, rate in zip(groups, rates, strict=False):  # and go
            if rate is not None:
                seen.add(place, number, rate)

    def _replayed(self, number: int) -> list[list[float | None]]:
        """The rates of the dense phase, for the step of that number since `begin_step`."""
        return [[seen.at(self._place, number) for seen in groups] for groups in self._seen]

    def _policy(self, step: int, length: int, peak: float | None) -> list[list[float | None]]:
        """The policy's rates for a round's step; None leaves the rate as it is."""
        if self._dense is None:
            self._dense = [[seen.dense(self._seen_length) for seen in groups] for groups in self._seen]
        scale = 1.0 if peak is None else peak / max(rates.highest for groups in self._dense for rates in groups)
        policy = [[self.retrain.rate(rates, self._pruned, step, length) for rates in groups] for groups in self._dense]
        return [[None if rate is None else scale * rate for rate in groups] for groups in policy]


class _Seen:
    """The rates that one parameter group has had, and the steps at which each began."""

    def __init__(self) -> None:
        self.starts: list[int] = []  # place * _AT_A_PLACE + number of the step there
        self.rates: list[float] = []

    def add(self, place: int, number: int, rate: float) -> None:
        """The rate of a step is this one; what was seen of the same step before is forgotten."""
        start = place * _AT_A_PLACE + number
        if self.starts and self.starts[-1] == start:
            self.starts.pop()
            self.rates.pop()
        if not self.rates or self.rates[-1] != rate:
            self.starts.append(start if self.starts else 0)
            self.rates.append(rate)

    def at(self, place: int, number: int) -> float | None:
        """The rate of a step; None if none was seen."""
        return self.rates[bisect_right(self.starts, place * _AT_A_PLACE + number) - 1] if self.rates else None

    def dense(self, length: int) -> DenseRates:
        """What a policy is told: of several steps at one place the last one's rate."""
        return DenseRates(tuple(start // _AT_A_PLACE for start in self.starts), tuple(self.rates), length)

    def state(self) -> tuple[Tensor, Tensor]:
        """All of it as tensors."""
        return torch.tensor(self.starts, dtype=torch.int64), torch.tensor(self.rates, dtype=torch.float64)

    @classmethod
    def from_state(cls, starts: Tensor, rates: Tensor) -> Self:
        """That of a `state`."""
        seen = cls()
        seen.starts, seen.rates = starts.tolist(), rates.tolist()
        return seen


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


def _of(rates: Sequence[Sequence[float | None]], index: int) -> Sequence[float | None]:
    return rates[index] if index < len(rates) else ()


def _rate(group: Mapping[str, Any]) -> float | None:
    rate = group.get("lr")
    return None if rate is None else float(rate)


def _made_with(group: Mapping[str, Any]) -> float:
    """The rate that stands for a dense phase: that with which the optimizer was made, or a cycle's highest."""
    return float(group.get("max_lr", group.get("initial_lr", group["lr"])))


def _settings(group: Mapping[str, Any]) -> dict[str, Any]:
    """A parameter group's numbers: learning rate, momentum, what schedulers have written there."""
    return {key: copy.deepcopy(value) for key, value in group.items() if key != "params"}


def _set(group: dict[str, Any], settings: Mapping[str, Any]) -> None:
    for key, value in settings.items():
        if isinstance(group.get(key), Tensor) and value is not None:
            group[key].fill_(value)  # a compiled or captured step reads this tensor
        else:
            group[key] = copy.deepcopy(value)
