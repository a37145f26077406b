"""Finds layers whose weight a module multiplies by itself, so that what the layer would compute never happens."""

from collections.abc import Mapping
from functools import partial
from typing import Any

import lightning as L
from torch import nn
from torch.utils.hooks import RemovableHandle

from sparsetrain import ops
from sparsetrain.ops.layers import EffectiveLayer


class Calls:
    """Notes which converted layers of a module are called, by hooks, until `detach`.

    Args:
        module: after `ops.convert`.
    """

    def __init__(self, module: nn.Module) -> None:
        self._called: dict[str, bool] = {}
        self._handles: list[RemovableHandle] = [
            layer.register_forward_pre_hook(partial(_note, self._called, f"{name}.weight"))
            for name, layer in ops.effective_layers(module)
        ]

    def check(self, trainer: L.Trainer, layers: Mapping[str, EffectiveLayer]) -> None:
        """Raise if a layer has a gradient, and has been called on no rank.

        Args:
            trainer: knows the other ranks.
            layers: by the name of the weight.

        Raises:
            ValueError: the name of such a weight, and the remedy.
        """
        if not self._handles:
            return
        passed_by = [
            name for name, layer in layers.items() if layer.weight.grad is not None and name not in self._called
        ]
        if trainer.strategy.reduce_boolean_decision(bool(passed_by), all=True):
            raise ValueError(
                f"{passed_by[0]!r} has a gradient, but its layer has not been called: the module multiplies the weight "
                "itself, which would train it dense. Add it to `exclude` of `where`."
            )

    def detach(self) -> None:
        """Remove the hooks."""
        for handle in self._handles:
            handle.remove()
        self._handles = []


def _note(called: dict[str, bool], name: str, *_: Any) -> None:
    called[name] = True
