"""Which layers of a module may be gated by channel, and what each operation costs, depending on their gates."""

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from typing import Literal

import torch
from torch import Tensor, nn

from sparsetrain.export import Unit
from sparsetrain.export.architecture import out_dim
from sparsetrain.export.attention import attentions
from sparsetrain.polarization import Operation
from sparsetrain.report.measure import cost
from sparsetrain.selection import Selection


@dataclass(frozen=True)
class GatedLayer:
    """A layer whose channels are gated where the one layer that reads them does so; or the heads of an attention.

    Args:
        name: of the layer, whose input the gates look at; of an attention, that which makes queries, keys and values.
        reader: name of the layer that reads it.
        units: one for each channel or head, in their order.
        size: how many features of the reader, one after the other, belong to each of them.
    """

    name: str
    reader: str
    units: tuple[Unit, ...]
    size: int


def gated_layers(module: nn.Module, found: Sequence[Unit], where: Selection) -> tuple[GatedLayer, ...]:
    """The layers among those chosen by `where` whose channels or heads can be removed and are read by one layer.

    Args:
        module: any module.
        found: its units.
        where: globs over the names of the layers' weights.

    Raises:
        ValueError: a glob that matches nothing, or no such layer, with the reasons.
    """
    chosen = [row.name for row in where.plan(module) if row.pruned]
    groups: dict[str, list[Unit]] = {}
    for unit in found:
        groups.setdefault(unit.name.rpartition("[")[0], []).append(unit)
    names = {part: name for name, part in module.named_modules()}
    heads = {names[attention.qkv]: name for name, attention in attentions(module)}
    layers, obstacles = [], []
    for name in (weight.removesuffix(".weight") for weight in chosen):
        group = groups.get(heads.get(name, name), [])
        obstacle = _obstacle(module, name, group, is_attention=name in heads)
        if obstacle:
            obstacles.append(f"{name!r}: {obstacle}")
            continue
        (read,) = group[0].part("reads")
        layers.append(GatedLayer(name, read.tensor.removesuffix(".weight"), tuple(group), len(read.index)))
    if not layers:
        raise ValueError(
            f"{type(module).__name__} has no layer that can be gated with {where}: {'; '.join(obstacles)}. Gated are "
            "linear layers and convolutions whose channels one other layer reads, such as the inner ones of a block."
        )
    return tuple(layers)


def operations(
    module: nn.Module, layers: Sequence[GatedLayer], example_input: Tensor, measure: Literal["flops", "params"]
) -> tuple[Operation, ...]:
    """What all of `module` costs, for `expected_cost` with gates called as their layers.

    Args:
        module: any module.
        layers: the gated ones.
        example_input: a batch, shape (batch, ...).
        measure: FLOPs of one example, as `report.cost` counts them, or parameters.
    """
    shapes = {name: parameter.shape for name, parameter in module.named_parameters()}
    held: dict[str, dict[int, dict[str | None, int]]] = {}  # tensor -> dimension -> gates -> places along it
    for layer in layers:
        places: Counter[tuple[str, int]] = Counter()
        for unit in layer.units:
            for piece in unit.slices:
                places[piece.tensor, piece.dim] += len(piece.index)
        for (tensor, dim), count in places.items():
            held.setdefault(tensor, {}).setdefault(dim, {})[layer.name] = count
    if measure == "params":
        costs = {name: shape.numel() for name, shape in shapes.items()}
    else:
        costs = {f"{name}.weight": flops for name, flops in cost(module, example_input).items()}
    made = []
    for tensor, whole in costs.items():
        dims = []
        for dim, counts in held.get(tensor, {}).items():
            counts[None] = shapes[tensor][dim] - sum(counts.values())
            dims.append([(count / shapes[tensor][dim], name) for name, count in counts.items() if count])
        for parts in product(*dims):
            share = math.prod(part for part, _ in parts)
            made.append(Operation(whole * share, tuple(name for _, name in parts if name is not None)))
    return tuple(made)


def closed_units(layers: Sequence[GatedLayer], masks: dict[str, Tensor]) -> tuple[Unit, ...]:
    """The units that no weight reads any more.

    Args:
        layers: the gated ones.
        masks: of the weights that read them, True = kept.
    """
    kept = {}
    for layer in layers:
        weight = f"{layer.reader}.weight"
        dim = layer.units[0].part("reads")[0].dim
        kept[layer.name] = masks[weight].movedim(dim, 0).flatten(1).any(1).tolist()
    return tuple(
        unit for layer in layers for unit in layer.units if not kept[layer.name][unit.part("reads")[0].index[0]]
    )


@torch.no_grad()
def close_(layers: Sequence[GatedLayer], opened: dict[str, Tensor], masks: dict[str, Tensor]) -> None:
    """Set to False, in `masks` of the weights that read `layers`, what belongs to units that are not `opened`."""
    for layer in layers:
        for unit, is_open in zip(layer.units, opened[layer.name].tolist(), strict=True):
            for piece in () if is_open else unit.part("reads"):
                mask = masks[piece.tensor]
                mask.index_fill_(piece.dim, torch.tensor(piece.index, device=mask.device), False)


def _obstacle(module: nn.Module, name: str, units: Sequence[Unit], *, is_attention: bool) -> str:
    """Why the channels of a layer, or the heads of an attention, cannot be gated, or an empty text."""
    layer = module.get_submodule(name)
    if not units:
        return "its heads cannot be removed" if is_attention else "its channels cannot be removed"
    if not is_attention and len(units) != layer.get_parameter("weight").shape[out_dim(layer)]:
        return "not all of its channels can be removed, one by one"
    if len(units) < 2:
        return f"it has one {'head' if is_attention else 'channel'}"
    reads = {piece.tensor for unit in units for piece in unit.part("reads")}
    if {piece.tensor.rpartition(".")[0] for unit in units for piece in unit.part("writes")} != {name}:
        return "other layers write its channels, too"
    if len(reads) != 1:
        return f"{len(reads)} layers read its channels"
    size = len(units[0].part("reads")[0].index)
    for number, unit in enumerate(units):
        if not is_attention and any(piece.index != (number,) for piece in unit.part("writes")):
            return "its channels are not removed one by one"
        if any(p.index != tuple(range(number * size, (number + 1) * size)) for p in unit.part("reads")):
            return f"{next(iter(reads))!r} reads them in another order"
    reader = module.get_submodule(next(iter(reads)).rpartition(".")[0])
    return "" if size == 1 or isinstance(reader, nn.Linear) else "the layer that reads them does so in groups"
