"""Keeping pruned weights at zero through the steps of whatever optimizers hold them."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from sparsetrain.callbacks.follower import Arguments, OptimizerFollower, after_closure
from sparsetrain.callbacks.probe import Probe, is_elementwise, probe_optimizer
from sparsetrain.masks import Masks

_READ_EVERY = 50  # verdicts of the check that are collected before an accelerator is asked for them


class ZeroFollower(OptimizerFollower):
    """After each step, masks weights where the optimizer moves zeros, and looks at them as `check` says.

    Args:
        masks: bound to the module that is trained.
        optimizers: of the Trainer, in its order.
        check: "off", "cheap" (one tensor a step, in turn) or "full".
        first_step: the number of the step to come.
        on_step: called after each step of `counted`.
        gradients_change: whether something may write gradients after those of pruned weights were zeroed, as hooks of
            a module that run after the callback's: then they are zeroed again before the step.

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
        gradients_change: bool = False,
    ) -> None:
        self._check, self._steps, self._gradients_change = check, first_step, gradients_change
        self._probes: dict[str, Probe] = {}
        self._verdicts: list[tuple[int, str, Tensor]] = []
        super().__init__(masks, optimizers, what="pruned weights", on_step=on_step)

    def pruned(self, optimizer: Optimizer) -> list[str]:
        """The parameters that `optimizer` holds and of which something is pruned."""
        sparse = set(self.masks.sparse_names())
        return [name for name in self.held(optimizer) if name in sparse]

    @torch.no_grad()
    def refresh_state(self) -> None:
        """Give optimizer state at pruned places what a fresh optimizer has there, so that nothing moves them later."""
        for optimizer in self.names:
            for name in self.pruned(optimizer):
                parameter = self.masks.parameter(name)
                pruned = ~self.masks.on(name, parameter)
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

    def follow(self, optimizers: Sequence[Optimizer]) -> None:
        super().follow(optimizers)
        self._probes = {}
        for optimizer, names in self.names.items():
            groups = {id(p): index for index, group in enumerate(optimizer.param_groups) for p in group["params"]}
            probes: dict[tuple[int, int], Probe] = {}
            for name in names:
                parameter = self.masks.parameter(name)
                kind = (groups[id(parameter)], parameter.dim())
                if kind not in probes:
                    probes[kind] = probe_optimizer(optimizer, parameter)
                self._probes[name] = probes[kind]

    def begins(self, optimizer: Optimizer, arguments: tuple[Any, ...], settings: dict[str, Any]) -> Arguments:
        super().begins(optimizer, arguments, settings)
        if not self._gradients_change:
            return None
        return after_closure(arguments, settings, lambda: self.masks.zero_grads_(self.pruned(optimizer)))

    def moved(self, optimizer: Optimizer) -> None:
        names = self.pruned(optimizer)
        self.masks.multiply_([name for name in names if not self._probes[name].preserves_zero])
        if names and self._check != "off":
            for name in names if self._check == "full" else [names[self._steps % len(names)]]:
                self._verdicts.append((self._steps, name, self.masks.revived(name)))
            if self.masks.parameter(names[0]).device.type == "cpu" or len(self._verdicts) >= _READ_EVERY:
                self.read_verdicts()

    def count(self) -> None:
        self._steps += 1
        super().count()
