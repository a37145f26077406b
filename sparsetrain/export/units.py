"""The units of a network: what can be removed whole, from every tensor that it lies in."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from sparsetrain.export.graph import Role, Slice, coupled
from sparsetrain.ops.layers import effective_layers
from sparsetrain.report.measure import cost


@dataclass(frozen=True)
class Unit:
    """What is removed together: a channel of all layers that share it, a hidden unit, an attention head, or a block.

    Args:
        name: the layer that writes it, or the attention that holds it, and its number: "layer1.0.conv1[3]"; that of a
            block's module: "layer1.1".
        slices: its parts; of a block, the parameters that close it when they are 0.
        parameters: parameters in them.
        flops: FLOPs of one example that go if this unit alone is removed. The costs of two units do not add up where
            one layer writes the one and reads the other; count those of the smaller network with `report.cost`.
        is_block: whether it is a whole block, as `blocks` finds them.
    """

    name: str
    slices: tuple[Slice, ...]
    parameters: int
    flops: int
    is_block: bool = False

    def part(self, role: Role) -> tuple[Slice, ...]:
        """The slices of one role."""
        return tuple(piece for piece in self.slices if piece.role == role)


def units(model: nn.Module, example_input: Tensor) -> tuple[Unit, ...]:
    """List what can be removed from `model` without touching its inputs and outputs.

    Layers that add or multiply their outputs share channels: those of a residual stage are removed from all its blocks
    together. These are found by the dependency graph of torch-pruning, from one run on the example (Fang et al. 2023,
    arXiv:2301.12900). Heads are those of attention with one linear layer `qkv` for queries, keys and values and one
    called `proj`, as in timm's and this package's transformers.

    Not removable are channels that a layer norm or group norm mixes (such as the stream of a transformer), that pass
    through a grouped convolution, a recurrent layer, a bare parameter or a tensor that is used twice, and the outputs.

    Seen is what `forward` does with the example. Layers that only `training_step` calls, such as an auxiliary head or a
    probe, are not: leave out units that they read, or call these layers in `forward`.

    Args:
        model: a plain module, without gates, that torch can differentiate; left as it is.
        example_input: a batch, shape (batch, ...), on the model's device.

    Returns:
        Units in the order of `named_modules`; no two share a place that they write.

    Raises:
        ImportError: torch-pruning is missing.
        ValueError: the model cannot be traced, has nothing removable (with the reasons), or still computes with
            effective weights.
    """
    check_folded(model)
    found, reasons = coupled(model, example_input)
    if not found:
        raise ValueError(
            f"{type(model).__name__} has no removable channel: {'; '.join(sorted(reasons)) or 'no layer has weights'}. "
            "Give a network in which one linear or convolution layer reads what another one writes."
        )
    shapes = {name: tensor.shape for name, tensor in model.state_dict().items()}
    trained = dict(model.named_parameters(remove_duplicate=False))
    flops = cost(model, example_input)
    made = []
    for name, slices in found.items():
        shares = {tensor: _share(slices, tensor, shapes[tensor]) for tensor in dict.fromkeys(s.tensor for s in slices)}
        saved = {tensor.rpartition(".")[0]: share for tensor, share in shares.items() if tensor.endswith(".weight")}
        owner = name.partition("[")[0]
        if owner not in saved:  # an attention: the products of queries, keys and values
            saved[owner] = saved[f"{owner}.proj".removeprefix(".")]
        made.append(
            Unit(
                name,
                slices,
                parameters=sum(round(share * shapes[t].numel()) for t, share in shares.items() if t in trained),
                flops=sum(round(share * flops.get(layer, 0)) for layer, share in saved.items()),
            )
        )
    return tuple(made)


def pruned_units(found: Sequence[Unit], masks: Mapping[str, Tensor]) -> tuple[Unit, ...]:
    """Those of `found` that masks have cut off: nothing writes them, or nothing reads them.

    A unit of coupled layers is cut off when *all* weights that write it are pruned, or all that read it are; a block is
    when all parameters that close it are, norms and biases too.

    Args:
        found: by `units` or `blocks`, of the module to which the masks belong.
        masks: parameter name -> bool tensor, True = kept, such as those of `GradualMagnitudePruning` with `Channel()`.

    Returns:
        Units in their order, for `shrink`; none may be left.
    """
    masks = {name: mask.cpu() for name, mask in masks.items()}

    def pruned(pieces: Iterable[Slice]) -> bool:
        return all(
            piece.tensor in masks and not masks[piece.tensor].index_select(piece.dim, torch.tensor(piece.index)).any()
            for piece in pieces
        )

    def is_cut_off(unit: Unit) -> bool:
        if unit.is_block:
            return pruned(unit.slices)
        sides = (unit.part("writes"), unit.part("reads"))
        return any(pruned(piece for piece in side if piece.tensor.endswith("weight")) for side in sides)

    return tuple(unit for unit in found if is_cut_off(unit))


def check_folded(model: nn.Module) -> None:
    """Raise if `model` does not compute with its own parameters.

    Raises:
        ValueError: it holds the dense master of effective weights.
    """
    if any(True for _ in effective_layers(model)):
        raise ValueError(f"{type(model).__name__} holds the dense master of effective weights; call ops.fold first.")


def _share(slices: Sequence[Slice], tensor: str, shape: Sequence[int]) -> float:
    """The share of `tensor` that lies in one of the slices, in [0, 1]."""
    cut: dict[int, set[int]] = {}
    for piece in slices:
        if piece.tensor == tensor:
            cut.setdefault(piece.dim, set()).update(piece.index)
    return 1.0 - math.prod(1 - len(index) / shape[dim] for dim, index in cut.items())
