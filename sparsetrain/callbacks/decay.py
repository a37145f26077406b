"""SR-STE's decay enters after gradients are unscaled and clipped, once per optimizer step."""

from collections.abc import Callable
from typing import Any

import lightning as L
from torch.optim import Optimizer

from sparsetrain.callbacks.trainer import has_scaler


def check_decay(decay: float, trainer: L.Trainer, pl_module: L.LightningModule, optimizer: Optimizer) -> None:
    """Raise if a decay could not enter there.

    Raises:
        ValueError: manual optimization, or an optimizer that unscales gradients itself.
    """
    if not pl_module.automatic_optimization:
        raise ValueError(
            f"decay={decay} is added after gradients are clipped, which a module under manual optimization does "
            "itself. Use decay=0.0 there, or automatic optimization."
        )
    if has_scaler(trainer) and getattr(optimizer, "_step_supports_amp_scaling", False):
        raise ValueError(
            f"{type(optimizer).__name__} unscales gradients within its step (fused), so that decay={decay} would be "
            "divided by the scale. Use fused=False, precision='bf16-mixed' or decay=0.0."
        )


class ClipThenDecay:
    """Stands in for `configure_gradient_clipping`; a copy of the module clips alone.

    Args:
        clip: what it stands in for.
        add_decay: to the gradients that an optimizer will use.
    """

    def __init__(self, clip: Callable[..., None], add_decay: Callable[[Optimizer], None] | None) -> None:
        self.clip, self.add_decay = clip, add_decay

    def __call__(self, optimizer: Optimizer, *arguments: Any, **settings: Any) -> None:
        self.clip(optimizer, *arguments, **settings)
        if self.add_decay is not None:
            self.add_decay(optimizer)

    def __getstate__(self) -> dict[str, Any]:
        return {"clip": self.clip, "add_decay": None}
