"""What of a module may be gated, its channels or its blocks, and what each operation costs, depending on the gates."""

import math
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Literal

import torch
from lightning.pytorch.utilities.seed import isolate_rng
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from sparsetrain.export import Unit
from sparsetrain.export.architecture import is_inside, out_dim
from sparsetrain.export.attention import attentions
from sparsetrain.export.blocks import reasons, removable
from sparsetrain.gates import Gates
from sparsetrain.modes import undisturbed
from sparsetrain.polarization import Operation
from sparsetrain.report.measure import cost
from sparsetrain.selection import Selection


@dataclass(frozen=True)
class Gated(ABC):
    """What one vector of gates is for.

    Args:
        name: of the layer or block, whose input the gates look at.
        units: one for each gate, in their order.
        features: channels of its input.
        axis: their axis, counted from the end.
    """

    name: str
    units: tuple[Unit, ...]
    features: int
    axis: int

    @abstractmethod
    def attach(self, module: nn.Module, gates: Gates) -> None:
        """Let `gates` multiply in `module`."""


@dataclass(frozen=True)
class GatedLayer(Gated):
    """A layer whose channels are gated where the one layer that reads them does so; or the heads of an attention.

    It is called as the layer, or as that which makes the attention's queries, keys and values.

    Args:
        reader: name of the layer that reads it.
        size: how many features of the reader, one after the other, belong to each unit.
    """

    reader: str
    size: int

    def attach(self, module: nn.Module, gates: Gates) -> None:
        layer, reader = module.get_submodule(self.name), module.get_submodule(self.reader)
        gates.attach_channels(layer, reader, size=self.size)


@dataclass(frozen=True)
class GatedBlock(Gated):
    """A residual block with an identity shortcut, of one gate."""

    def attach(self, module: nn.Module, gates: Gates) -> None:
        gates.attach_block(module.get_submodule(self.name))


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
    for weight in chosen:
        name, _, attribute = weight.rpartition(".")
        if attribute != "weight":
            obstacles.append(f"{weight!r}: it is not the weight of a layer")
            continue
        group = groups.get(heads.get(name, name), [])
        obstacle = _obstacle(module, name, group, is_attention=name in heads)
        if obstacle:
            obstacles.append(f"{name!r}: {obstacle}")
            continue
        (read,) = group[0].part("reads")
        layer = module.get_submodule(name)
        layers.append(
            GatedLayer(
                name,
                tuple(group),
                features=layer.get_parameter("weight").shape[1 - out_dim(layer)],
                axis=_channel_axis(layer),
                reader=read.tensor.removesuffix(".weight"),
                size=len(read.index),
            )
        )
    if not layers:
        raise ValueError(
            f"{type(module).__name__} has no layer that can be gated with {where}: {'; '.join(obstacles)}. Gated are "
            "linear layers and convolutions whose channels one other layer reads, such as the inner ones of a block."
        )
    return tuple(layers)


def gated_blocks(module: nn.Module, example_input: Tensor, where: Selection) -> tuple[GatedBlock, ...]:
    """The blocks that can be removed and hold a weight chosen by `where`.

    Args:
        module: any module.
        example_input: a batch, shape (batch, ...), on the module's device.
        where: globs over the names of weights.

    Raises:
        ValueError: a glob that matches nothing, or no such block, with the reasons.
    """
    chosen = [row.name for row in where.plan(module) if row.pruned]
    holders = {name for name, _ in module.named_modules() if name and any(w.startswith(f"{name}.") for w in chosen)}
    found, obstacles = removable(module, example_input, holders)
    if not found:
        raise ValueError(
            f"{type(module).__name__} has no block that can be gated with {where}: {reasons(obstacles)}. Gated are "
            "residual blocks whose shortcut is the identity."
        )
    blocks = []
    for name, block in found.items():
        parts = module.get_submodule(name).modules()
        axis = _channel_axis(next(part for part in parts if isinstance(part, nn.Linear | _ConvNd)))
        axis = axis if len(block.given) > -axis else -1  # a convolution may lie behind a change of shape
        blocks.append(GatedBlock(name, (block.unit,), features=block.given[axis], axis=axis))
    return tuple(blocks)


def operations(
    module: nn.Module, gated: Sequence[Gated], example_input: Tensor, measure: Literal["flops", "params"]
) -> tuple[Operation, ...]:
    """What all of `module` costs, for `expected_cost` with gates called as what they are for.

    Args:
        module: any module.
        gated: what has gates.
        example_input: a batch, shape (batch, ...).
        measure: FLOPs of one example, as `report.cost` counts them, or parameters, of what `forward` runs.
    """
    shapes = {name: parameter.shape for name, parameter in module.named_parameters()}
    held: dict[str, dict[int, dict[str | None, int]]] = {}  # tensor -> dimension -> gates -> places along it
    for layer in gated:
        places: Counter[tuple[str, int]] = Counter()
        for unit in layer.units:
            for piece in () if unit.is_block else unit.slices:
                places[piece.tensor, piece.dim] += len(piece.index)
        for (tensor, dim), count in places.items():
            held.setdefault(tensor, {}).setdefault(dim, {})[layer.name] = count
    blocks = [layer.name for layer in gated if isinstance(layer, GatedBlock)]
    owners = {layer.units[0].name.partition("[")[0]: layer.name for layer in gated}
    products = {f"{owner}.weight": name for owner, name in owners.items() if owner != name}  # of attention
    if measure == "params":
        used = _used(module, example_input)
        costs = {name: shape.numel() for name, shape in shapes.items() if name in used}
    else:
        costs = {f"{name}.weight": flops for name, flops in cost(module, example_input).items()}
    made = []
    for tensor, whole in costs.items():
        around = [name for name in blocks if is_inside(tensor, (name,))]
        around += [products[tensor]] if tensor in products else []
        dims = []
        for dim, counts in held.get(tensor, {}).items():
            counts[None] = shapes[tensor][dim] - sum(counts.values())
            dims.append([(count / shapes[tensor][dim], name) for name, count in counts.items() if count])
        for parts in product(*dims):
            share = math.prod(part for part, _ in parts)
            made.append(Operation(whole * share, (*around, *(name for _, name in parts if name is not None))))
    return tuple(made)


def _used(module: nn.Module, example_input: Tensor) -> set[str]:
    """The parameters of what a forward pass calls, and of the children of that, which it may use without a call.

    What else `module` holds, such as a teacher, is no part of its cost.
    """
    called: set[nn.Module] = set()
    handles = [part.register_forward_pre_hook(lambda part, _: called.add(part)) for part in module.modules()]
    try:
        with isolate_rng(), undisturbed(module):
            module(example_input)
    finally:
        for handle in handles:
            handle.remove()
    parts = {name: part for name, part in module.named_modules() if part in called}
    inner = {f"{name}.{child}" for name, part in parts.items() if name for child, _ in part.named_children()}
    owners = parts.keys() | inner
    return {name for name, _ in module.named_parameters() if name.rpartition(".")[0] in owners}


def masked(module: nn.Module, gated: Sequence[Gated]) -> tuple[str, ...]:
    """The names of parameters that are masked where gates are closed.

    Those are the weights that read gated channels; of gated blocks, all weights of linear layers and convolutions, and
    what closes them.
    """
    read = dict.fromkeys(piece.tensor for layer in gated for unit in layer.units for piece in unit.part("reads"))
    blocks = [layer.name for layer in gated if isinstance(layer, GatedBlock)]
    inside = [row.name for row in Selection().plan(module) if row.pruned and is_inside(row.name, blocks)]
    return tuple(dict.fromkeys((*inside, *read)))


def closed_units(gated: Sequence[Gated], masks: Mapping[str, Tensor]) -> tuple[Unit, ...]:
    """The units that no weight reads any more, and the blocks that are closed.

    Args:
        gated: what had gates.
        masks: of the parameters that `masked` names, True = kept.
    """
    closed: list[Unit] = []
    for layer in gated:
        mask, dim = masks[layer.units[0].part("reads")[0].tensor], layer.units[0].part("reads")[0].dim
        if isinstance(layer, GatedBlock):
            closed += () if mask.any() else layer.units
        else:
            kept = mask.movedim(dim, 0).flatten(1).any(1).tolist()
            closed += [unit for unit in layer.units if not kept[unit.part("reads")[0].index[0]]]
    return tuple(closed)


@torch.no_grad()
def close_(gated: Sequence[Gated], opened: Mapping[str, Tensor], masks: Mapping[str, Tensor]) -> None:
    """Set to False, in `masks` of the parameters that `masked` names, what belongs to units that are not `opened`."""
    for layer in gated:
        for unit, is_open in zip(layer.units, opened[layer.name].tolist(), strict=True):
            if is_open:
                continue
            for piece in unit.part("reads"):
                mask = masks[piece.tensor]
                mask.index_fill_(piece.dim, torch.tensor(piece.index, device=mask.device), False)
            for name in masks if unit.is_block else ():
                if is_inside(name, (unit.name,)):
                    masks[name].fill_(False)


def _channel_axis(layer: nn.Module) -> int:
    """Where the channels of a linear layer's or convolution's input lie, counted from the end."""
    return -1 - len(layer.kernel_size) if isinstance(layer, _ConvNd) else -1


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
