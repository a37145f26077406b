"""Which backend each N:M layer of a fit runs on: decided once, from what the first step shows."""

from functools import partial
from pathlib import Path
from typing import Any, Literal

import lightning as L
import torch
from lightning.pytorch.utilities import rank_zero_info
from torch import nn
from torch.utils.hooks import RemovableHandle

from sparsetrain import ops
from sparsetrain.ops import policy
from sparsetrain.ops.layers import EffectiveLayer
from sparsetrain.ops.policy import Decision
from sparsetrain.ops.search import Cache


class BackendChoice:
    """Decides for the layers of a module at once if nothing has to be timed, else in `after_step`.

    Timing needs each layer's tokens: until the first optimizer step has been made, hooks on the layers that could run
    on sparse kernels note them, while these compute the same on the reference backend. All ranks take rank 0's
    decision, and it alone searches algorithms. Where a device has no such kernels there are neither hooks nor timings.

    Args:
        trainer: knows the other ranks.
        module: after `ops.convert`.
        backend: "auto", "reference" or "cusparselt".
        dtype: in which the layers compute.
        algorithms: the file of those found before; None searches none.

    Attributes:
        decisions: one per layer; empty until it is decided.

    Raises:
        ValueError: "cusparselt" where no layer can run on it, or a file that holds no algorithms.
    """

    def __init__(
        self,
        trainer: L.Trainer,
        module: nn.Module,
        backend: Literal["auto", "reference", "cusparselt"],
        dtype: torch.dtype,
        algorithms: Path | str | None = None,
    ) -> None:
        self._cache = None if algorithms is None else Cache(algorithms)
        self.decisions: tuple[Decision, ...] = ()
        self._backend, self._dtype = backend, dtype
        self._tokens: dict[str, int] = {}
        self._handles: list[RemovableHandle] = []
        layers = dict(ops.effective_layers(module))
        for name in trainer.strategy.broadcast(self._to_time(module)):
            note = partial(_note_tokens, self._tokens, name)
            self._handles.append(layers[name].register_forward_pre_hook(note, with_kwargs=True))
        if not self._handles:
            self._decide(trainer, module)

    def after_step(self, trainer: L.Trainer, module: nn.Module) -> None:
        """Decide, if that waited for the tokens; every layer's `refresh_` has to follow."""
        if self._handles:
            self.detach()
            self._decide(trainer, module)

    def detach(self) -> None:
        """Remove the hooks."""
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def _to_time(self, module: nn.Module) -> tuple[str, ...]:
        return policy.to_time(module, self._backend, self._dtype, searches=self._cache is not None)

    def _decide(self, trainer: L.Trainer, module: nn.Module) -> None:
        cache = self._cache if trainer.is_global_zero else None
        mine = policy.choose(module, self._backend, tokens=self._tokens, dtype=self._dtype, cache=cache)
        self.decisions = trainer.strategy.broadcast(mine)
        policy.assign(module, self.decisions)
        rank_zero_info(f"Backends of the N:M layers:\n{policy.describe(self.decisions)}")


def _note_tokens(
    tokens: dict[str, int], name: str, layer: EffectiveLayer, arguments: tuple[Any, ...], named: dict[str, Any]
) -> None:
    """Remember the largest call, which is what a kernel sees: validation passes by, without gradients."""
    if torch.is_grad_enabled():
        x = arguments[0] if arguments else named["input"]
        tokens[name] = max(tokens.get(name, 0), policy.tokens_of(layer, x))
