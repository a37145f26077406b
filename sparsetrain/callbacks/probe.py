"""What an optimizer does to a weight whose gradient, value and state are zero, found out on a toy tensor."""

import inspect
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.optim import Optimizer

_STEPS = 4
_SIDE = 6


@dataclass(frozen=True)
class Probe:
    """How an optimizer treats pruned weights.

    Args:
        preserves_zero: zero weight, gradient and state stay zero, so that masked gradients are enough.
        fresh: the value of each state entry of the weight's shape where nothing ever happened, such as Adagrad's
            initial accumulator; entries that are not named are 0 there.
    """

    preserves_zero: bool
    fresh: dict[str, float]


def probe_optimizer(optimizer: Optimizer, parameter: Tensor) -> Probe:
    """Try `optimizer` on a toy tensor of the rank, type and device of `parameter` and with its hyperparameters.

    The optimizer, its state and the global random streams are left as they are. One that cannot be built or stepped
    like that (it wraps another, or needs a closure) is taken not to preserve zeros, which is always safe.
    """
    group = next(g for g in optimizer.param_groups if any(p is parameter for p in g["params"]))
    shape = [_SIDE] * parameter.dim()
    devices = [parameter.device] if parameter.device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(0)
        toy = torch.nn.Parameter(torch.randn(shape).to(parameter))
        pruned = (torch.rand(shape) < 0.5).to(parameter.device)  # no whole rows: Muon would keep those at zero
        toy.data.masked_fill_(pruned, 0)
        fresh: dict[str, float] = {}
        try:
            trial = _fresh_like(optimizer, group, toy)
            for step in range(_STEPS):
                toy.grad = torch.randn(shape).to(parameter).masked_fill_(pruned, 0)
                trial.step()
                if step == 0:
                    state = {key: value for key, value in trial.state[toy].items() if is_elementwise(value, toy)}
                    fresh = {key: float(value[pruned][0]) for key, value in state.items()}
        except Exception:  # any optimizer may come here, and each fails in its own way
            return Probe(preserves_zero=False, fresh={})
        preserves_zero = bool((toy[pruned] == 0).all())
        return Probe(preserves_zero, fresh if preserves_zero else {})


def is_elementwise(value: object, weight: Tensor) -> bool:
    """Whether a state entry holds one number for each weight."""
    return isinstance(value, Tensor) and value.shape == weight.shape and value.is_floating_point()


def _fresh_like(optimizer: Optimizer, group: dict[str, object], toy: torch.nn.Parameter) -> Optimizer:
    """A new optimizer of the same class that holds only `toy`, with the hyperparameters of `group`."""
    known = inspect.signature(type(optimizer)).parameters
    defaults = {name: value for name, value in optimizer.defaults.items() if name in known}
    settings = {name: value for name, value in group.items() if name != "initial_lr"}  # left there by a scheduler
    if settings.get("lr") == 0:
        settings["lr"] = 0.1  # a warm-up begins at 0, where everything is preserved
    return type(optimizer)([{**settings, "params": [toy]}], **defaults)
