"""The learning rates of pruned rounds: the module's schedulers set back, or resting while a policy sets the rates."""

import copy
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import lightning as L
import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau
from torch.utils.hooks import RemovableHandle

from sparsetrain.callbacks.follower import Arguments, after_closure
from sparsetrain.callbacks.trainer import is_fast_dev_run
from sparsetrain.retrain import DenseRates, PruningStep, ReplayLR, Retrain
from sparsetrain.rounds import Rounds


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
        # What the dense phase has had so far, by optimizer and group: the steps at which a rate began, and the rates.
        self._seen: list[list[tuple[list[int], list[float]]]] = []
        self._seen_length = 0
        # What the policy is told; the rates are made of those seen when a round needs them.
        self._dense: list[list[DenseRates]] | None = None
        self._pruned = PruningStep(0.0, 0.0)
        # The step to come: its place in the schedule if its rates are to be seen, else those that it is to have.
        self._place: int | None = None
        self._rates: list[list[float | None]] = []
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
            ValueError: schedulers that cannot be brought to where rounds begin, or do not step as one begins and ends.
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
        # Without a dense phase the first round has the schedule's own rates.
        if leg == 0 or (self.replays and leg == 1 and not rounds.dense):
            self._place, self._dense = step + (rounds.replay_from if leg else 0), None
        else:
            self._place, self._rates = None, self._wanted(trainer, rounds, step, peak)
        for optimizer in trainer.optimizers:
            self._settle(optimizer)  # for who reads them before the step, and for steps that a gradient scaler skips

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
                    self._see(optimizer, 0, [_made_with(group) for group in optimizer.param_groups])
            self._resting = trainer.lr_scheduler_configs
            trainer.strategy.lr_scheduler_configs = []

    def _follow(self, optimizers: Sequence[Optimizer]) -> None:
        """Have the last word before each step of these optimizers, and of no others."""
        if self._followed != list(optimizers):
            for handle in self._handles:
                handle.remove()
            self._followed = list(optimizers)
            self._handles = [optimizer.register_step_pre_hook(self._before_step) for optimizer in optimizers]

    def _before_step(self, optimizer: Optimizer, arguments: tuple[Any, ...], settings: dict[str, Any]) -> Arguments:
        return after_closure(arguments, settings, lambda: self._settle(optimizer))

    def _settle(self, optimizer: Optimizer) -> None:
        """See the rates of the step to come, or set them."""
        if self._place is not None:
            self._see(optimizer, self._place, [group["lr"] for group in optimizer.param_groups])
            return
        rates = dict(zip(self._followed, self._rates, strict=False)).get(optimizer, [])
        for group, rate in zip(optimizer.param_groups, rates, strict=False):
            if rate is not None:
                _set(group, {"lr": rate})

    def _see(self, optimizer: Optimizer, place: int, rates: Sequence[float | Tensor]) -> None:
        index = self._followed.index(optimizer)
        self._seen += [[] for _ in range(index + 1 - len(self._seen))]
        self._seen_length = place + 1
        groups = self._seen[index]
        groups += [([], []) for _ in rates[len(groups) :]]  # groups may be added in training
        for (starts, seen), rate in zip(groups, rates, strict=True):
            if starts and starts[-1] == place:  # what was there earlier before the same step
                starts.pop()
                seen.pop()
            if not seen or seen[-1] != float(rate):
                starts.append(place if starts else 0)
                seen.append(float(rate))

    def _wanted(self, trainer: L.Trainer, rounds: Rounds, step: int, peak: float | None) -> list[list[float | None]]:
        """The rates of a round's step, by optimizer and group; None leaves the rate as it is."""
        if self._dense is None:
            self._dense = [
                [DenseRates(tuple(starts), tuple(rates), self._seen_length) for starts, rates in groups]
                for groups in self._seen
            ]
        if not self.replays:
            scale = 1.0 if peak is None else peak / max(dense.highest for groups in self._dense for dense in groups)
            policy = [
                [self.retrain.rate(dense, self._pruned, step, rounds.trained) for dense in groups]
                for groups in self._dense
            ]
            return [[None if rate is None else scale * rate for rate in groups] for groups in policy]
        if any(isinstance(config.scheduler, ReduceLROnPlateau) for config in trainer.lr_scheduler_configs):
            return []  # these follow the round
        return [[dense.at(rounds.replay_from + step) for dense in groups] for groups in self._dense]


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


def _made_with(group: Mapping[str, Any]) -> float:
    """The rate that stands for a dense phase: that with which the optimizer was made, or a cycle's highest."""
    return float(group.get("max_lr", group.get("initial_lr", group["lr"])))


def _settings(group: Mapping[str, Any]) -> dict[str, Any]:
    """A parameter group's numbers: learning rate, momentum, what schedulers have written there."""
    return {key: copy.deepcopy(value) for key, value in group.items() if key != "params"}


def _set(group: dict[str, Any], settings: Mapping[str, Any]) -> None:
    for key, value in settings.items():
        if isinstance(group.get(key), Tensor):
            group[key].fill_(value)  # a compiled or captured step reads this tensor
        else:
            group[key] = copy.deepcopy(value)
