"""The smaller network that a run leaves whose channels were cut off whole."""

import copy
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn

from sparsetrain import export
from sparsetrain.callbacks import PolarizationGating, SparsityCallback
from sparsetrain.cli.artifacts import network_of, of_stage
from sparsetrain.export.architecture import Architecture
from sparsetrain.patterns import Channel
from sparsetrain.report import cost
from sparsetrain.report.measure import example_for

FOLDER = "shrunk"


def cuts_off(method: SparsityCallback | None) -> bool:
    """Whether the method leaves channels that nothing writes or nothing reads."""
    return isinstance(method, PolarizationGating) or (
        method is not None and isinstance(method.pruning.pattern, Channel)
    )


def write_and_test(
    folder: Path,
    evaluator: L.Trainer,
    module: L.LightningModule,
    datamodule: L.LightningDataModule,
    example_input: Tensor,
    method: SparsityCallback,
    masks: Mapping[str, Tensor] | None = None,
) -> dict[str, Any]:
    """Write <folder>/shrunk: the network without what was cut off, for `load_shrunk` with the plain dense one.

    Where that cannot be, the reason is a warning. The module keeps its weights.

    Args:
        folder: the run's.
        evaluator: a Trainer without loggers, of as many processes as the run had.
        module: of the run, with the network that the run leaves.
        datamodule: of the run.
        example_input: a batch of one example.
        method: of the run, after the fit.
        masks: of the network; None takes those of `method`.

    Returns:
        Entries of summary.json: parameters, FLOPs of one example, and test metrics of the smaller network.
    """
    network = network_of(module)
    example = example_for(network, example_input)
    try:
        small = _small(module, network, example, method, method.masks if masks is None else masks)
    except (ImportError, ValueError, RuntimeError) as error:  # the training is done, and what it left is written
        rank_zero_warn(f"No smaller network was written. {error}")
        return {}
    if evaluator.is_global_zero:
        export.save_shrunk(folder / FOLDER, small)
    metrics = dict(next(iter(evaluator.test(_holding(small, module), datamodule=datamodule, verbose=False)), {}))
    return {
        "shrunk": {
            "parameters": sum(parameter.numel() for parameter in small.parameters()),
            "flops": sum(cost(small, example).values()),
            "test": of_stage(metrics, "test"),
        }
    }


def _holding(small: nn.Module, module: L.LightningModule) -> L.LightningModule:
    """A module like `module` with the smaller network."""
    if isinstance(small, L.LightningModule):
        return small
    holder = copy.copy(module)
    holder._modules = {**module._modules, "network": small}
    return holder


def _small(
    module: L.LightningModule,
    network: nn.Module,
    example: Tensor,
    method: SparsityCallback,
    masks: Mapping[str, Tensor],
) -> nn.Module:
    """`network` without what was cut off from it; after `Shrinking` it is so already."""
    if not Architecture.of(network).is_whole:
        return network
    prefix = next(f"{name}.".removeprefix(".") for name, part in module.named_modules() if part is network)
    if isinstance(method, PolarizationGating):
        units = tuple(_without(prefix, unit) for unit in method.units)
    else:
        own = {name.removeprefix(prefix): mask for name, mask in masks.items()}
        units = export.pruned_units(export.units(network, example), own)
    if not units:
        raise ValueError("Nothing was cut off whole.")
    return export.shrink(network, units, example)


def _without(prefix: str, unit: export.Unit) -> export.Unit:
    """The unit by the names that its tensors have in a part of the module."""
    slices = tuple(replace(piece, tensor=piece.tensor.removeprefix(prefix)) for piece in unit.slices)
    return replace(unit, name=unit.name.removeprefix(prefix), slices=slices)
