"""The state of optimizers at one step, to go back to; saved without the places that have been pruned since."""

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self

from torch import Tensor, nn
from torch.optim import Optimizer

from sparsetrain.snapshot import spread


@dataclass(frozen=True)
class OptimizerSnapshot:
    """What optimizers held for each parameter; learning rates and other settings of groups are not part of it.

    Args:
        optimizers: of each, "names", the parameters in its order, and "state", number -> entries, on the CPU.
    """

    optimizers: Sequence[Mapping[str, Any]]

    @classmethod
    def of(cls, optimizers: Sequence[Optimizer], module: nn.Module) -> Self:
        """A copy of the present state."""
        names = {id(parameter): name for name, parameter in module.named_parameters()}
        return cls(
            [
                {
                    "names": [names.get(id(p), "") for group in optimizer.param_groups for p in group["params"]],
                    "state": _to_cpu(optimizer.state_dict()["state"]),
                }
                for optimizer in optimizers
            ]
        )

    def restore_(self, optimizers: Sequence[Optimizer]) -> None:
        """Give `optimizers` that state again; their groups stay."""
        for optimizer, saved in zip(optimizers, self.optimizers, strict=True):
            groups, numbers = optimizer.param_groups, optimizer.state_dict()["param_groups"]
            optimizer.load_state_dict({"state": copy.deepcopy(saved["state"]), "param_groups": numbers})
            optimizer.param_groups = groups  # loading has put copies there, also of tensors

    def packed(self, masks: Mapping[str, Tensor]) -> list[dict[str, Any]]:
        """For a checkpoint: without the pruned places, which do not come back."""

        def pack(value: Any, mask: Tensor) -> Any:
            elementwise = isinstance(value, Tensor) and value.shape == mask.shape
            return {"kept": value[mask]} if elementwise and not mask.all() else value

        return [_each(saved, masks, pack) for saved in self.optimizers]

    @classmethod
    def unpacked(cls, optimizers: Sequence[Mapping[str, Any]], masks: Mapping[str, Tensor]) -> Self:
        """What `packed` returned under the same masks, with zeros at the pruned places."""

        def unpack(value: Any, mask: Tensor) -> Any:
            return spread(value["kept"], mask) if isinstance(value, Mapping) else value

        return cls([_each(saved, masks, unpack) for saved in optimizers])


def _each(
    saved: Mapping[str, Any], masks: Mapping[str, Tensor], change: Callable[[Any, Tensor], Any]
) -> dict[str, Any]:
    names, state = saved["names"], dict(saved["state"])
    for index, entries in state.items():
        if names[index] in masks:
            mask = masks[names[index]].cpu()
            state[index] = {key: change(value, mask) for key, value in entries.items()}
    return {"names": names, "state": state}


def _to_cpu(state: Any) -> Any:
    """A copy, with every tensor on the CPU."""
    if isinstance(state, Tensor):
        return state.detach().to("cpu", copy=True)
    if isinstance(state, Mapping):
        return {key: _to_cpu(value) for key, value in state.items()}
    return copy.deepcopy(state)
