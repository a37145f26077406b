"""What callbacks ask a Trainer: Lightning sets some of its attributes where type checkers do not see them."""

import math
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import GradientAccumulationScheduler, StochasticWeightAveraging
from lightning.pytorch.strategies import DeepSpeedStrategy, FSDPStrategy, ModelParallelStrategy
from lightning.pytorch.utilities.combined_loader import CombinedLoader
from torch import Tensor
from torch.optim import Optimizer

from sparsetrain.steps import RunLength


def callbacks_of(trainer: L.Trainer) -> list[L.Callback]:
    """The Trainer's callbacks, in the order in which it calls them."""
    callbacks: list[L.Callback] = trainer.callbacks  # type: ignore[attr-defined]
    return callbacks


def set_callbacks(trainer: L.Trainer, callbacks: Iterable[L.Callback]) -> None:
    """Give the Trainer other callbacks, in a new list: Lightning may be iterating over the old one."""
    trainer.callbacks = list(callbacks)  # type: ignore[attr-defined]


def is_fast_dev_run(trainer: L.Trainer) -> bool:
    """Whether the run is a trial of a few batches."""
    return bool(trainer.fast_dev_run)  # type: ignore[attr-defined]


def has_scaler(trainer: L.Trainer) -> bool:
    """Whether gradients are scaled, so that steps may be skipped."""
    return getattr(trainer.precision_plugin, "scaler", None) is not None


def gradient_scale(trainer: L.Trainer, optimizer: Optimizer) -> float:
    """The factor of the gradients before a step: 1 but for an optimizer that unscales them itself, as fused ones do."""
    scaled = has_scaler(trainer) and getattr(optimizer, "_step_supports_amp_scaling", False)
    return float(trainer.precision_plugin.scaler.get_scale()) if scaled else 1.0  # type: ignore[attr-defined]


def refuse_sharding(trainer: L.Trainer, callback: L.Callback, does: str) -> None:
    """Raise if no process has the weights whole.

    Args:
        trainer: of the fit.
        callback: that needs them,
        does: and what it does with them, for the error.

    Raises:
        ValueError: FSDP, DeepSpeed or a model-parallel strategy.
    """
    if isinstance(trainer.strategy, FSDPStrategy | ModelParallelStrategy | DeepSpeedStrategy):
        raise ValueError(
            f"{type(callback).__name__} cannot {does} weights that {type(trainer.strategy).__name__} shards. "
            "Use strategy='ddp' or a single device."
        )


def was_skipped(optimizer: Optimizer) -> bool:
    """Whether the step that an optimizer has just ended was skipped within, as fused ones do under a gradient scaler.

    Others are not called for such a step.
    """
    return bool(getattr(optimizer, "found_inf", False))  # which the scaler lends it for the step


def train_loaders(trainer: L.Trainer) -> list[Any]:
    """The training loaders, of which there may be several."""
    if trainer.train_dataloader is None:
        return []
    return list(CombinedLoader(trainer.train_dataloader, "min_size").flattened)


def generators_of(loader: Any) -> list[torch.Generator]:
    """The generators of a loader's own that its order comes from."""
    batches = getattr(loader, "batch_sampler", None)
    parts = (loader, getattr(loader, "sampler", None), batches, getattr(batches, "sampler", None))
    found = (getattr(part, "generator", None) for part in parts)
    return list({id(one): one for one in found if isinstance(one, torch.Generator)}.values())


def run_length(trainer: L.Trainer, *, epochs_before: int = 0, steps_before: int = 0) -> RunLength:
    """Optimizer steps in an epoch and in the run, of an optimizer that steps once per (accumulated) batch.

    Args:
        trainer: of the fit.
        epochs_before: epochs made by former fits of the Trainer, which its `max_epochs` counts, too.
        steps_before: their optimizer steps, which its `max_steps` counts.
    """
    batches, epochs = trainer.num_training_batches, trainer.max_epochs
    accumulated = {trainer.accumulate_grad_batches}
    for callback in callbacks_of(trainer):
        if isinstance(callback, GradientAccumulationScheduler):
            accumulated = set(callback.scheduling.values())  # it sets the Trainer's at the start of each epoch
        if isinstance(callback, StochasticWeightAveraging) and epochs != -1:
            epochs = callback.swa_end + 1  # the one that it may add trains nothing
    known = math.isfinite(batches) and len(accumulated) == 1
    steps_per_epoch = math.ceil(batches / accumulated.pop()) if known else None
    limits = [trainer.max_steps - steps_before] if trainer.max_steps != -1 else []
    if steps_per_epoch is not None and epochs is not None and epochs != -1:
        limits.append((epochs - epochs_before) * steps_per_epoch)
    # `max_steps` counts the steps of all optimizers together: how many of them are the counted one's is not known.
    shared = trainer.max_steps != -1 and len(trainer.optimizers) > 1 and not is_fast_dev_run(trainer)
    return RunLength(steps_per_epoch, None if shared else min(limits, default=None))


def example_of(pl_module: L.LightningModule, input_shape: Sequence[int] | None, *, of: object) -> Tensor:
    """A batch of one example to run a module on, on its device.

    Args:
        pl_module: the module.
        input_shape: of one example without the batch, for zeros; None takes the module's `example_input_array`.
        of: what needs it, for the error.

    Raises:
        ValueError: neither is there.
    """
    weight = next(pl_module.parameters())
    if input_shape is not None:
        return torch.zeros(1, *input_shape, device=weight.device, dtype=weight.dtype)
    example = pl_module.example_input_array
    if not isinstance(example, Tensor):
        raise ValueError(
            f"{type(of).__name__} has no example to trace {type(pl_module).__name__} with. Give input_shape, such as "
            "(3, 32, 32), or set the module's example_input_array to a tensor."
        )
    return example.to(weight.device, weight.dtype if example.is_floating_point() else None)


@contextmanager
def uncompiled(pl_module: L.LightningModule) -> Iterator[None]:
    """Let copies of the module run their own layers: in a compiled one `forward` is an attribute bound to it."""
    compiled = vars(pl_module).pop("forward", None) if getattr(pl_module, "_compiler_ctx", None) else None
    try:
        with torch.compiler.set_stance("force_eager"):
            yield
    finally:
        if compiled is not None:
            vars(pl_module)["forward"] = compiled


def forget_compiled(pl_module: L.LightningModule) -> None:
    """Compile again: compiled code does not notice that hooks come and go."""
    if is_compiled(pl_module):
        torch.compiler.reset()


def has_compiled() -> bool:
    """Whether torch has compiled anything in this process."""
    return bool(torch._dynamo.utils.counters["stats"]["unique_graphs"])


def is_compiled(pl_module: L.LightningModule) -> bool:
    """Whether the module, or a part of it, is compiled."""
    wrapped = torch._dynamo.eval_frame.OptimizedModule
    parts = any(part._compiled_call_impl or isinstance(part, wrapped) for part in pl_module.modules())
    return parts or getattr(pl_module, "_compiler_ctx", None) is not None
