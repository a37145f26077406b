"""What the ingredients of a soup are varied by."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import lightning as L
from torch import nn
from torch.optim import Optimizer

_RANGES = {"weight_decay": (0.0, math.inf), "lr": (0.0, math.inf), "label_smoothing": (0.0, 1.0)}


@dataclass(frozen=True)
class Vary:
    """How the ingredients of a soup differ. Values are given one an ingredient, as many as there are ingredients.

    Args:
        seed: each ingredient has its own order of data, augmentation and dropout; else all have the same.
        weight_decay: of each ingredient, at least 0: the highest of all parameter groups. Others keep their ratio to
            it, so biases without decay stay so.
        lr: the highest learning rate of each ingredient, at least 0; other groups keep their ratio to it.
        label_smoothing: of each ingredient, in [0, 1): every attribute `label_smoothing` of the LightningModule and of
            its submodules, such as `torch.nn.CrossEntropyLoss`.

    Raises:
        ValueError: a value outside of its range.

    Source: Zimmer et al. 2024, arXiv:2306.16788, which varies one of them at a time.
    """

    seed: bool = True
    weight_decay: tuple[float, ...] | None = None
    lr: tuple[float, ...] | None = None
    label_smoothing: tuple[float, ...] | None = None

    def __post_init__(self) -> None:
        for name, (least, below) in _RANGES.items():
            values = getattr(self, name)
            if values is None:
                continue
            if not isinstance(values, Sequence) or isinstance(values, str):
                raise ValueError(f"Vary({name}={values!r}) is no list. Give one value for each ingredient.")
            if not all(least <= value < below for value in values):
                raise ValueError(f"Vary({name}={tuple(values)}): each has to be in [{least}, {below}).")
            object.__setattr__(self, name, tuple(values))

    def check(self, ingredients: int) -> None:
        """Compare the values with the number of ingredients.

        Raises:
            ValueError: another number of values, or nothing that varies.
        """
        varied = {name: values for name, values in vars(self).items() if isinstance(values, tuple)}
        for name, values in varied.items():
            if len(values) != ingredients:
                raise ValueError(
                    f"Vary({name}={values}) has {len(values)} values, and a soup of {ingredients} ingredients needs as "
                    "many."
                )
        if ingredients > 1 and not self.seed and not varied:
            raise ValueError(f"The {ingredients} ingredients would be equal. Vary the seed or another setting.")


class VariedSettings:
    """Gives the settings of an ingredient to the optimizers and the module, and the module its own ones back.

    Args:
        vary: the values; of learning rates, `RoundRates` takes care.
    """

    def __init__(self, vary: Vary) -> None:
        self._vary = vary
        self._decays: list[list[float]] = []
        self._smoothings: dict[Any, float] = {}

    def check(self, optimizers: Sequence[Optimizer], module: nn.Module) -> None:
        """Look for what is to be varied.

        Raises:
            ValueError: it is not there.
        """
        groups = [group for optimizer in optimizers for group in optimizer.param_groups]
        if self._vary.weight_decay is not None and not any(group.get("weight_decay", 0) for group in groups):
            raise ValueError(
                "Vary(weight_decay=...) changes the weight decay of the parameter groups that have one, and none has. "
                "Give the optimizer one above 0."
            )
        if self._vary.label_smoothing is not None and not any(map(_has_smoothing, module.modules())):
            raise ValueError(
                "Vary(label_smoothing=...) sets the attribute `label_smoothing`, and neither the module nor a part of "
                "it has one. Let training_step read self.label_smoothing, or use torch.nn.CrossEntropyLoss."
            )

    def remember(self, optimizers: Sequence[Optimizer]) -> None:
        """Keep the weight decay of the dense phase, whose ratios stay."""
        self._decays = [[group.get("weight_decay", 0.0) for group in o.param_groups] for o in optimizers]

    def begin(self, trainer: L.Trainer, pl_module: L.LightningModule, ingredient: int) -> None:
        """Give `ingredient` (0-based) its weight decay and label smoothing."""
        if self._vary.weight_decay is not None:
            highest = max(decay for decays in self._decays for decay in decays)
            for optimizer, decays in zip(trainer.optimizers, self._decays, strict=True):
                for group, decay in zip(optimizer.param_groups, decays, strict=False):  # later groups are not varied
                    if decay:
                        group["weight_decay"] = self._vary.weight_decay[ingredient] * (decay / highest)
        self.smooth(pl_module, ingredient)

    def smooth(self, module: nn.Module, ingredient: int) -> None:
        """Give `ingredient` its label smoothing, which is in no checkpoint."""
        if self._vary.label_smoothing is None:
            return
        parts: list[Any] = [part for part in module.modules() if _has_smoothing(part)]
        for part in parts:
            self._smoothings.setdefault(part, part.label_smoothing)
            part.label_smoothing = self._vary.label_smoothing[ingredient]

    def release(self) -> None:
        """Give the module its label smoothing back; may be called again."""
        for part, value in self._smoothings.items():
            part.label_smoothing = value
        self._smoothings = {}

    def state_dict(self) -> dict[str, Any]:
        """The weight decays remembered."""
        return {"decays": self._decays}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over what `state_dict` returned."""
        self._decays = state["decays"]


def _has_smoothing(module: nn.Module) -> bool:
    return isinstance(getattr(module, "label_smoothing", None), float | int)
