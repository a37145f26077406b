"""Which backend each N:M layer of a fit runs on: decided once, from what the first step shows."""

from functools import partial
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


class BackendChoice:
    """Decides for the layers of a module at once if nothing has to be timed, else in `after_step`.

    Timing needs each layer's tokens: until the first optimizer step has been made, hooks on the layers that could run
    on sparse kernels note them, while these compute the same on the reference backend. All ranks take rank 0's
    decision. Where a device has no such kernels there are neither hooks nor timings.

    Args:
        trainer: knows the other ranks.
        module: after `ops.convert`.
        backend: "auto", "reference" or "cusparselt".
        dtype: in which the layers compute.

    Attributes:
        decisions: one per layer; empty until it is decided.

    Raises:
        ValueError: "cusparselt" where no layer can run on it.
    """

    def __init__(
        self,
        trainer: L.Trainer,
        module: nn.Module,
        backend: Literal["auto", "reference", "cusparselt"],
        dtype: torch.dtype,
    ) -> None:
        self.decisions: tuple[Decision, ...] = ()
        self._backend, self._dtype = backend, dtype
        self._tokens: dict[str, int] = {}
        self._handles: list[RemovableHandle] = []
        layers = dict(ops.effective_layers(module))
        for name in trainer.strategy.broadcast(policy.to_time(module, backend, dtype)):
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

    def _decide(self, trainer: L.Trainer, module: nn.Module) -> None:
        mine = policy.choose(module, self._backend, tokens=self._tokens, dtype=self._dtype)
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
