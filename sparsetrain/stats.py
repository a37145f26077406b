"""Running statistics that criteria need, streamed over optimizer steps."""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

_ACCUMULATE: Mapping[str, Callable[[Tensor, Tensor, Tensor], object]] = {
    "movement": lambda total, weight, grad: total.addcmul_(weight, grad, value=-1),
}


class Stats:
    """One accumulator per statistic and parameter, float32, on the parameter's device.

    They are sums over synchronised gradients, so they are equal on all ranks.

    Args:
        names: which statistics; "movement" = - sum of w * dL/dw.
    """

    def __init__(self, names: frozenset[str] = frozenset()) -> None:
        unknown = names - _ACCUMULATE.keys()
        if unknown:
            raise ValueError(f"No such statistics: {sorted(unknown)}. Known are {sorted(_ACCUMULATE)}.")
        self.names = names
        self._totals: dict[str, dict[str, Tensor]] = {}

    @torch.no_grad()
    def observe_step(self, name: str, weight: Tensor, grad: Tensor) -> None:
        """Take in one optimizer step of the parameter `name`; `grad` final and unscaled, both of any one shape."""
        totals = self._totals[name] = dict(self.get(name, weight))
        for statistic, total in totals.items():
            _ACCUMULATE[statistic](total, weight, grad)

    def observed(self, name: str) -> bool:
        """Whether a step of the parameter `name` has been taken in; without one its statistics say nothing."""
        return self.names <= self._totals.get(name, {}).keys()

    def get(self, name: str, weight: Tensor) -> Mapping[str, Tensor]:
        """The accumulators of the parameter `name` by statistic, zero before the first step."""
        held = self._totals.get(name, {})
        return {
            statistic: held[statistic].to(weight.device)
            if statistic in held
            else torch.zeros_like(weight, dtype=torch.float32)
            for statistic in self.names
        }

    def state_dict(self) -> dict[str, dict[str, Tensor]]:
        """Accumulators by parameter and statistic, of the parameters of which a step was observed."""
        return {name: dict(totals) for name, totals in self._totals.items()}

    def load_state_dict(self, state: Mapping[str, Mapping[str, Tensor]]) -> None:
        """Take over what `state_dict` returned; tensors are copied."""
        self._totals = {
            name: {statistic: total.clone() for statistic, total in totals.items()} for name, totals in state.items()
        }
