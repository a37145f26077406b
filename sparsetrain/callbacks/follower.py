"""Keeping pruned weights at zero through the steps of whatever optimizers hold them."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from sparsetrain.callbacks.probe import Probe, is_elementwise, probe_optimizer
from sparsetrain.callbacks.trainer import was_skipped
from sparsetrain.masks import Masks

_READ_EVERY = 50  # verdicts of the check that are collected before an accelerator is asked for them


class OptimizerFollower:
    """Follows the steps of the optimizers that hold pruned weights, until `detach`.

    After each step, weights are masked where the optimizer moves zeros, and looked at as `check` says. Steps that a
    gradient scaler skips do not count.

    Args:
        masks: bound to the module that is trained.
        optimizers: of the Trainer, in its order.
        check: "off", "cheap" (one tensor a step, in turn) or "full".
        first_step: the number of the step to come.
        on_step: called after each step of `counted`.

    Attributes:
        counted: the first optimizer that holds a pruned weight, or the first of those that came in its place; its
            steps are the run's.

    Raises:
        ValueError: no optimizer holds a pruned weight.
    """

    def __init__(
        self,
        masks: Masks,
        optimizers: Sequence[Optimizer],
        *,
        check: str,
        first_step: int,
        on_step: Callable[[], None],
    ) -> None:
        self._masks, self._check, self._steps, self._on_step = masks, check, first_step, on_step
        self._to_count = False  # hooks run twice in a step that calls that of the class above
        self._parameters: dict[Optimizer, list[int]] = {}
        self._names: dict[Optimizer, list[str]] = {}
        self._probes: dict[str, Probe] = {}
        self._verdicts: list[tuple[int, str, Tensor]] = []
        self._handles: list[RemovableHandle] = []
        self._follow(optimizers)
        if not self._names:
            raise ValueError("No optimizer holds any of the pruned weights. Return one from configure_optimizers.")
        self.counted = next(iter(self._names))

    def before_step(self, optimizer: Optimizer, optimizers: Sequence[Optimizer]) -> bool:
        """Follow what has come into the optimizers since the last step.

        Args:
            optimizer: is about to step.
            optimizers: of the Trainer, which may have been replaced; `optimizer` may be another one.

        Returns:
            Whether there was anything new.
        """
        if optimizer not in optimizers:
            optimizers = [*optimizers, optimizer]
        is_new = self.counted not in optimizers or self._parameters.get(optimizer) != _identities(optimizer)
        if is_new:
            self._follow(optimizers)
            if self.counted not in self._names:
                self.counted = next(iter(self._names), self.counted)
            self._to_count = optimizer is self.counted  # whose step has begun
        return is_new

    def held(self, optimizer: Optimizer) -> list[str]:
        """The maskable parameters that `optimizer` holds."""
        return self._names.get(optimizer, [])

    def pruned(self, optimizer: Optimizer) -> list[str]:
        """Those of them of which something is pruned."""
        sparse = set(self._masks.sparse_names())
        return [name for name in self.held(optimizer) if name in sparse]

    @torch.no_grad()
    def refresh_state(self) -> None:
        """Give optimizer state at pruned places what a fresh optimizer has there, so that nothing moves them later."""
        for optimizer in self._names:
            for name in self.pruned(optimizer):
                parameter = self._masks.parameter(name)
                pruned = ~self._masks.on(name, parameter)
                for key, value in optimizer.state.get(parameter, {}).items():
                    if is_elementwise(value, parameter):
                        value.masked_fill_(pruned, self._probes[name].fresh.get(key, 0.0))

    def read_verdicts(self) -> None:
        """Raise if the check has found a revived weight.

        Raises:
            RuntimeError: it has; with the tensor, the step and likely causes.
        """
        verdicts, self._verdicts = self._verdicts, []
        for step, name, revived in verdicts:
            if bool(revived):
                raise RuntimeError(
                    f"A pruned weight of {name!r} was not zero after step {step}. Something wrote to it after its "
                    "gradient was masked: another callback, a hook of the optimizer, or a gradient that is not finite; "
                    "or its optimizer stepped behind Lightning's back (use_pl_optimizer=False). Let that skip pruned "
                    "weights, or list its callback before this one."
                )

    def detach(self) -> None:
        """Leave the optimizers as they were."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def _follow(self, optimizers: Sequence[Optimizer]) -> None:
        self.detach()
        self._parameters = {optimizer: _identities(optimizer) for optimizer in optimizers}
        self._names, self._probes = {}, {}
        for optimizer in optimizers:
            groups = {id(p): index for index, group in enumerate(optimizer.param_groups) for p in group["params"]}
            probes: dict[tuple[int, int], Probe] = {}
            for name in self._masks:
                parameter = self._masks.parameter(name)
                if id(parameter) in groups:
                    kind = (groups[id(parameter)], parameter.dim())
                    if kind not in probes:
                        probes[kind] = probe_optimizer(optimizer, parameter)
                    self._probes[name] = probes[kind]
                    self._names.setdefault(optimizer, []).append(name)
            if optimizer in self._names:
                self._handles.append(optimizer.register_step_pre_hook(self._before_step))
                self._handles.append(optimizer.register_step_post_hook(self._after_step))

    def _before_step(self, optimizer: Optimizer, *_: object) -> None:
        self._to_count = self._to_count or optimizer is self.counted

    def _after_step(self, optimizer: Optimizer, *_: object) -> None:
        if was_skipped(optimizer):
            return
        names = self.pruned(optimizer)
        self._masks.multiply_([name for name in names if not self._probes[name].preserves_zero])
        if names and self._check != "off":
            for name in names if self._check == "full" else [names[self._steps % len(names)]]:
                self._verdicts.append((self._steps, name, self._masks.revived(name)))
            if self._masks.parameter(names[0]).device.type == "cpu" or len(self._verdicts) >= _READ_EVERY:
                self.read_verdicts()
        if optimizer is self.counted and self._to_count:
            self._to_count = False
            self._steps += 1
            self._on_step()


def _identities(optimizer: Optimizer) -> list[int]:
    return [id(parameter) for group in optimizer.param_groups for parameter in group["params"]]
