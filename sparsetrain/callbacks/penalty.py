"""Penalties: scalars that are added to the loss of any LightningModule."""

import inspect
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

import lightning as L
import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvTransposeNd

from sparsetrain.callbacks.trainer import is_fast_dev_run, refuse_sharding, run_length
from sparsetrain.choices import check_choice
from sparsetrain.selection import Selection
from sparsetrain.steps import RunLength, check_steps, parse_steps

Terms = Callable[[L.LightningModule, Any, Any], Mapping[str, Tensor]]


class AddedTerms:
    """Terms added to the loss that a module's `training_step` returns, from construction to `remove`.

    Each term is logged as "penalty/<name>". A loss may be a tensor or the "loss" of a dict; nothing is added to a batch
    that is skipped with None. As Lightning divides what `training_step` returns by the number of accumulated batches,
    and scales it under mixed precision, terms count as the loss does: once per optimizer step, with their own gradient.
    Under DDP gradients are averaged over ranks, so a term of weights alone counts once, too.

    Construct it at `on_train_start` or later: copies of the module that are made meanwhile train without the terms.

    Args:
        pl_module: the module that is trained.
        terms: (module, batch, what `training_step` returned) -> scalars by name, in the unit of the loss; called under
            the Trainer's autocast.

    Raises:
        ValueError: the module optimizes manually; at the first batch, a name that is taken or a value that is no
            scalar.
    """

    def __init__(self, pl_module: L.LightningModule, terms: Terms) -> None:
        if not pl_module.automatic_optimization:
            raise ValueError(
                f"{type(pl_module).__name__} optimizes manually, where Lightning does not use the loss that "
                "training_step returns, so that a penalty would be lost. Use automatic optimization, or add the "
                "penalty to the loss within training_step."
            )
        self.pl_module, self.terms = pl_module, terms
        previous = vars(pl_module).get("training_step")
        if not isinstance(previous, _PenalizedStep):
            previous = _PenalizedStep(pl_module.training_step, previous)
            pl_module.training_step = previous  # type: ignore[method-assign]
        self._step = previous
        self._step.added.append(self)

    def remove(self) -> None:
        """Add nothing any longer; the last of a module's terms to go gives it its `training_step` back.

        It may be called again, and is to be at `teardown`: at the end of training, another wrapper may still lie above.
        """
        if self in self._step.added:
            self._step.added.remove(self)
        if self._step.added or vars(self.pl_module).get("training_step") is not self._step:
            return
        if self._step.previous is None:
            del self.pl_module.training_step
        else:
            self.pl_module.training_step = self._step.previous  # type: ignore[method-assign]


class _PenalizedStep:
    """Stands in for a module's `training_step`. There is one for all of its terms: they may end in any order.

    Args:
        step: what to call.
        previous: the module's own attribute of that name, if it had one, as a compiled module has.
    """

    def __init__(self, step: Callable[..., Any], previous: Callable[..., Any] | None) -> None:
        self.step, self.previous = step, previous
        self.added: list[AddedTerms] = []
        self.__wrapped__ = inspect.unwrap(step)  # Lightning reads there which arguments to pass

    def __call__(self, batch: Any, *arguments: Any, **settings: Any) -> Any:
        outputs = self.step(batch, *arguments, **settings)
        loss = outputs.get("loss") if isinstance(outputs, Mapping) else outputs
        if not self.added or not isinstance(loss, Tensor):
            return outputs  # a skipped batch, or what Lightning refuses
        values: dict[str, Tensor] = {}
        for added in self.added:
            for name, value in added.terms(added.pl_module, batch, outputs).items():
                if name in values:
                    raise ValueError(f"Two penalties are called {name!r}. Give one of them another `name`.")
                if value.numel() != 1:
                    raise ValueError(f"The penalty {name!r} has shape {tuple(value.shape)}; it must be a scalar.")
                values[name] = value.reshape(())
                loss = loss + values[name]
        logged = {f"penalty/{name}": value.detach() for name, value in values.items()}
        self.added[0].pl_module.log_dict(logged, batch_size=1)
        return {**outputs, "loss": loss} if isinstance(outputs, Mapping) else loss

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "added": []}


@dataclass(frozen=True)
class LinearWeight:
    """The weight of a penalty that grows evenly from 0 at `begin` to `final` at `end`, and then stays.

    Args:
        final: the weight from `end` on, at least 0.
        begin: the optimizer step up to which it is 0.
        end: the optimizer step from which it is `final`, not before `begin`.

    Raises:
        ValueError: a weight below 0 or not finite, or a length that is none.

    >>> [LinearWeight(0.8, begin=10, end=20).at(step) for step in (0, 10, 15, 20, 30)]
    [0.0, 0.0, 0.4, 0.8, 0.8]
    """

    final: float
    begin: int | str = 0
    end: int | str = 0

    def __post_init__(self) -> None:
        if not (math.isfinite(self.final) and self.final >= 0):
            raise ValueError(f"The weight of a penalty is {self.final}; it must be a finite number, at least 0.")
        check_steps(self.begin, "begin")
        check_steps(self.end, "end")

    def resolve(self, run: RunLength) -> "LinearWeight":
        """The same with both steps as whole numbers.

        Raises:
            ValueError: a length that `run` cannot resolve, `end` before `begin`, or beyond the run.
        """
        begin, end = parse_steps(self.begin, run), parse_steps(self.end, run)
        if begin > end:
            raise ValueError(f"{self} ends at step {end}, before it begins at {begin}. Let `end` be `begin` or later.")
        if run.total_steps is not None and end >= run.total_steps:
            raise ValueError(
                f"{self} reaches its final value at step {end}, but the run has {run.total_steps} optimizer steps. "
                f"The largest legal end is '{run.total_steps - 1}it'."
            )
        return replace(self, begin=begin, end=end)

    def at(self, step: int) -> float:
        """The weight at an optimizer step; `begin` and `end` must be whole numbers, as `resolve` makes them."""
        assert isinstance(self.begin, int)
        assert isinstance(self.end, int)
        if step >= self.end:
            return self.final
        return self.final * (step - self.begin) / (self.end - self.begin) if step > self.begin else 0.0


class Penalty(L.Callback, ABC):
    """One term that is added to the loss: weight * `value`. Logged as "penalty/<name>", with its weight.

    It holds no state: a resumed run goes on exactly. Steps are those of `trainer.global_step`.

    Args:
        weight: of `value` in the loss, at least 0; or one that grows.
        name: in the log; penalties of one fit have different names.

    Raises:
        ValueError: a weight that is none; at the start of the fit, see `AddedTerms` and `LinearWeight.resolve`.
    """

    def __init__(self, weight: float | LinearWeight, *, name: str) -> None:
        self.weight = weight if isinstance(weight, LinearWeight) else LinearWeight(weight)
        self.name = name
        self._resolved = self.weight
        self._added: AddedTerms | None = None

    @abstractmethod
    def value(self, pl_module: L.LightningModule, batch: Any, outputs: Any) -> Tensor:
        """The penalty without its weight, a scalar with a gradient.

        Args:
            pl_module: the module that is trained.
            batch: the first argument of `training_step`.
            outputs: what `training_step` returned, without penalties.
        """

    def prepare(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Look up what `value` needs; called once, before the first step.

        Raises:
            ValueError: settings that do not fit this module or Trainer.
        """

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        # fast_dev_run is too short for any growth: it tries the final weight.
        whole = LinearWeight(self.weight.final)
        self._resolved = whole if is_fast_dev_run(trainer) else self.weight.resolve(run_length(trainer))
        self.prepare(trainer, pl_module)
        self._added = AddedTerms(pl_module, self._terms)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if self._added is not None:
            self._added.remove()

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        self._detach()

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        self._detach()

    def _terms(self, pl_module: L.LightningModule, batch: Any, outputs: Any) -> dict[str, Tensor]:
        return {self.name: self._resolved.at(pl_module.global_step) * self.value(pl_module, batch, outputs)}

    def _detach(self) -> None:
        if self._added is not None:
            self._added.remove()
            self._added = None


class _WeightPenalty(Penalty):
    """A penalty that is a sum over parameters."""

    def __init__(self, weight: float | LinearWeight, *, where: Selection, name: str) -> None:
        super().__init__(weight, name=name)
        self.where = where
        self._names: tuple[str, ...] = ()

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        refuse_sharding(trainer, self, "sum over")

    def prepare(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._names = tuple(row.name for row in self.where.plan(pl_module) if row.pruned)

    def value(self, pl_module: L.LightningModule, batch: Any, outputs: Any) -> Tensor:
        return torch.stack([self.of(pl_module, name) for name in self._names]).sum()

    @abstractmethod
    def of(self, pl_module: L.LightningModule, name: str) -> Tensor:
        """The summand of one parameter."""


class L1Penalty(_WeightPenalty):
    """weight * sum of |w| over the selected weights, in at least float32.

    Gradient descent alone makes few weights exactly 0: prune the small ones, as with `GradualMagnitudePruning`.

    Args:
        weight: of the sum in the loss, at least 0; or one that grows.
        where: the parameters.
        name: in the log.

    Raises:
        ValueError: a weight that is none; at the start of the fit, a glob that matches nothing, weights that the
            strategy shards, or what `Penalty` refuses.

    Source: Tibshirani 1996, J. R. Stat. Soc. B 58 (the lasso).
    """

    def __init__(self, weight: float | LinearWeight, *, where: Selection = Selection(), name: str = "l1") -> None:
        super().__init__(weight, where=where, name=name)

    def of(self, pl_module: L.LightningModule, name: str) -> Tensor:
        parameter = pl_module.get_parameter(name)
        norm: Tensor = torch.linalg.vector_norm(parameter, 1, dtype=_at_least_float32(parameter))
        return norm


class GroupLasso(_WeightPenalty):
    """weight * sum over groups of sqrt(size of the group) * its Euclidean norm, in at least float32.

    It drives whole groups to 0; the gradient of a group that is 0 is 0.

    Args:
        weight: of the sum in the loss, at least 0; or one that grows.
        group: what goes together in each tensor: "channel" (all weights that make one output channel or unit),
            "input_channel" (all that read one input channel or unit), "shape" (all at one place of the filters, one for
            each output channel), or "layer" (the tensor).
        where: the parameters.
        name: in the log.

    Raises:
        ValueError: an unknown group, or what `L1Penalty` refuses; at the start of the fit, groups in a convolution with
            `groups` that do not share one channel.

    Source: Yuan & Lin 2006, J. R. Stat. Soc. B 68, eq. 2.1, with K_j = p_j * I. Groups: Wen et al. 2016,
        arXiv:1608.03665, section 3 (filter-, channel-, shape- and depth-wise).
    Differs: Wen et al. leave the factor sqrt(size) out.
    """

    def __init__(
        self,
        weight: float | LinearWeight,
        *,
        group: Literal["channel", "input_channel", "shape", "layer"] = "channel",
        where: Selection = Selection(),
        name: str = "group_lasso",
    ) -> None:
        check_choice(group, "group", ("channel", "input_channel", "shape", "layer"))
        super().__init__(weight, where=where, name=name)
        self.group = group

    def prepare(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        super().prepare(trainer, pl_module)
        for name in self._names:
            owner = pl_module.get_submodule(name.rpartition(".")[0])
            # Axis 1 of such a weight counts the channels of one group: each index stands for several channels.
            if getattr(owner, "groups", 1) > 1 and 1 not in self._summed(owner, pl_module.get_parameter(name)):
                raise ValueError(
                    f"{name!r} belongs to a convolution with groups={owner.groups}, where group={self.group!r} would "
                    "join weights of different channels. Add it to `exclude`."
                )

    def of(self, pl_module: L.LightningModule, name: str) -> Tensor:
        parameter = pl_module.get_parameter(name)
        axes = self._summed(pl_module.get_submodule(name.rpartition(".")[0]), parameter)
        norms: Tensor = torch.linalg.vector_norm(parameter, dim=axes, dtype=_at_least_float32(parameter))
        return norms.sum() * math.sqrt(parameter.numel() / norms.numel())

    def _summed(self, owner: nn.Module, parameter: Tensor) -> tuple[int, ...]:
        """The axes along which the weights of one group lie."""
        output, given = (1, 0) if isinstance(owner, _ConvTransposeNd) else (0, 1)
        every = tuple(range(parameter.dim()))
        if self.group == "shape":
            return (output,)
        apart = {"channel": output, "input_channel": given, "layer": None}[self.group]
        return tuple(axis for axis in every if axis != apart)


def _at_least_float32(parameter: Tensor) -> torch.dtype:
    return torch.promote_types(parameter.dtype, torch.float32)
