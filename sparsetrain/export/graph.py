"""Which channels of which tensors belong together: the one file that knows torch-pruning."""

import copy
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd
from torch.nn.modules.instancenorm import _InstanceNorm
from torch.utils._pytree import tree_leaves

from sparsetrain.export.architecture import out_dim
from sparsetrain.export.attention import Attention, attentions

Role = Literal["writes", "carries", "reads"]
_Place = tuple[str, int, Role]  # tensor, dimension, role
_SPARE, _FEW = 4, 1 << 16  # of indices


@dataclass(frozen=True)
class Slice:
    """A part of one tensor that belongs to a unit.

    Args:
        tensor: its name in the state dict.
        dim: the dimension that is cut.
        index: the places along it, rising.
        role: "writes": makes the unit's values from others (output channels of a layer, with its bias); "carries": acts
            on the unit alone (batch norm, depthwise convolution); "reads": makes other values from the unit's.
    """

    tensor: str
    dim: int
    index: tuple[int, ...]
    role: Role


def coupled(model: nn.Module, example_input: Tensor) -> tuple[dict[str, tuple[Slice, ...]], set[str]]:
    """Unit name -> its slices, in the order of `named_modules`, and why other channels are no units.

    Raises:
        ImportError, ValueError: as `units`.
    """
    traced = copy.deepcopy(model).requires_grad_(True)
    graph, operations = _trace(traced, example_input)
    network = _Network(traced, operations)
    heads = {f"{name}.qkv".removeprefix("."): (name, attention) for name, attention in attentions(traced)}
    found: dict[str, tuple[Slice, ...]] = {}
    reasons: set[str] = set()
    seen: set[tuple[str, int]] = set()  # channels, also under the layers that share them
    for layer, name in network.names.items():
        if name in heads:
            found.update(_heads(*heads[name], network.shared))
        elif layer in graph.module2node and _mixes(layer):
            channels = [(f"{name}.weight".removeprefix("."), i) for i in range(layer.weight.shape[out_dim(layer)])]
            if seen.issuperset(channels):
                continue
            for channel, (slices, obstacle) in zip(channels, _channels(graph, layer, network), strict=True):
                if channel in seen:
                    continue
                seen.update((s.tensor, place) for s in slices if s.role == "writes" for place in s.index)
                if obstacle:
                    reasons.add(obstacle)
                else:
                    found[f"{name}[{channel[1]}]"] = slices
    return found, reasons


class _Network:
    """The tensors and layers of a module, by name."""

    def __init__(self, module: nn.Module, operations: tuple[type, ...]) -> None:
        self.names = {layer: name for name, layer in module.named_modules()}
        self.tensors = {
            **dict(module.named_parameters(remove_duplicate=False)),
            **dict(module.named_buffers(remove_duplicate=False)),
        }
        uses = Counter(id(tensor) for tensor in self.tensors.values())
        self.shared = {name for name, tensor in self.tensors.items() if uses[id(tensor)] > 1}
        self.operations = operations
        self._reads_weight: dict[nn.Module, bool] = {}

    def reads_weight(self, layer: Any) -> bool:
        """See the function of this name; each layer is tried once."""
        if layer not in self._reads_weight:
            self._reads_weight[layer] = reads_weight(layer)
        return self._reads_weight[layer]


def _channels(graph: Any, root: nn.Module, network: _Network) -> list[tuple[tuple[Slice, ...], str]]:
    """For each output channel of `root` its slices, and why it cannot be removed, or an empty text."""
    pruner = graph.get_pruner_of_module(root)
    count = pruner.get_out_channels(root)
    parts: list[dict[_Place, set[int]]] = [{} for _ in range(count)]
    obstacles = [""] * count
    try:
        with _exact_indices(max(size for tensor in network.tensors.values() for size in tensor.shape)):
            group = graph.get_pruning_group(root, pruner.prune_out_channels, list(range(count)))
    except OverflowError:
        return [((), "reshaped in a way that torch-pruning cannot follow")] * count
    for item in group:
        node = item.dep.target
        reads = _mixes(node.module) and item.dep.handler == graph.get_pruner_of_module(node.module).prune_in_channels
        places, obstacle = _places(node.module, reads, network)
        if not (node.outputs or reads):
            obstacle = "an output of the network"
        for index, channel in zip(item.idxs, item.root_idxs, strict=True):
            obstacles[channel] = obstacles[channel] or obstacle
            for place in places:
                parts[channel].setdefault(place, set()).add(index)
                if index >= network.tensors[place[0]].shape[place[1]]:
                    obstacles[channel] = f"{place[0]!r} is added to wider layers, which have a channel {index}"
    holders = Counter((place, index) for found in parts for place, indices in found.items() for index in indices)
    for channel, found in enumerate(parts):
        if not any(role == "reads" for _, _, role in found):
            obstacles[channel] = obstacles[channel] or "nothing reads it"
        for place, indices in found.items():
            if any(holders[place, index] > 1 for index in indices):
                obstacles[channel] = obstacles[channel] or f"{place[0]!r} takes several channels together"
            if len(indices) == network.tensors[place[0]].shape[place[1]]:
                obstacles[channel] = obstacles[channel] or f"{place[0]!r} has no other channel"
    slices = [tuple(Slice(*place[:2], tuple(sorted(index)), place[2]) for place, index in p.items()) for p in parts]
    return list(zip(slices, obstacles, strict=True))


@contextmanager
def _exact_indices(largest: int) -> Iterator[None]:
    """Let torch-pruning follow channels through reshapes as they are.

    It multiplies a channel's indices at each reshape without end in a Swin transformer, and forgets all but one of the
    channels that a reshape makes one.

    Args:
        largest: dimension of any tensor.

    Raises:
        OverflowError: within, where there are far more indices.
    """
    from torch_pruning.dependency.index_mapping import _FlattenIndexMapping  # type: ignore[import-untyped]

    limit, whole = max(_SPARE * largest, _FEW), _FlattenIndexMapping.__call__

    def exact(self: Any, indices: Any) -> Any:
        if self.reverse:
            pairs = dict.fromkeys((index.idx // self._stride, index.root_idx) for index in indices)
            return [type(indices[0])(idx=idx, root_idx=root) for idx, root in pairs]
        if len(indices) * self._stride > limit:
            raise OverflowError
        return whole(self, indices)

    _FlattenIndexMapping.__call__ = exact
    try:
        yield
    finally:
        _FlattenIndexMapping.__call__ = whole


def _trace(model: nn.Module, example_input: Tensor) -> tuple[Any, tuple[type, ...]]:
    """torch-pruning's graph of `model`, and the types of its nodes that are no layers and keep channels apart."""
    try:
        import torch_pruning  # type: ignore[import-untyped]
    except ImportError as error:
        raise ImportError(
            "Finding removable channels needs torch-pruning: pip install 'sparsetrain[shrink]'."
        ) from error
    ops = torch_pruning.ops
    operations = (
        *(ops._ConcatOp, ops._SplitOp, ops._UnbindOp, ops._ReshapeOp),
        *(ops._SliceOp, ops._ElementWiseOp, ops._ExpandOp),
    )
    try:
        with torch.enable_grad():
            graph = torch_pruning.DependencyGraph().build_dependency(
                model, example_input, forward_fn=_outputs, verbose=False
            )
    except Exception as error:
        raise ValueError(
            f"torch-pruning cannot trace {type(model).__name__} on an input of shape {tuple(example_input.shape)}: "
            f"{type(error).__name__}: {error}. Give an example that the model takes, or remove no channels from it."
        ) from error
    return graph, operations


def _outputs(module: nn.Module, batch: Tensor) -> list[Tensor]:
    """What `module` returns, each tensor as the end of its own: the network may read it, too."""
    return [leaf * 1 for leaf in tree_leaves(module(batch)) if isinstance(leaf, Tensor)]


def _places(layer: Any, reads: bool, network: _Network) -> tuple[list[_Place], str]:
    """Where a channel lies in the tensors of one layer, and why it cannot be removed from it, or an empty text."""
    if isinstance(layer, network.operations):
        return [], ""
    if isinstance(layer, nn.Parameter):
        return [], "a parameter outside of any known layer"
    if layer not in network.names:
        return [], "an output of the network"
    kind, prefix = type(layer).__name__, f"{network.names[layer]}.".removeprefix(".")
    held = [name for name, _ in layer.named_parameters(recurse=False)]
    held += [name for name in ("running_mean", "running_var") if f"{prefix}{name}" in network.tensors]
    for name in held:
        if f"{prefix}{name}" in network.shared:
            return [], f"{prefix + name!r} is used twice"
    if isinstance(layer, nn.Linear | _ConvNd) and "weight" not in held:
        return [], f"a {kind} that computes its weight"
    if not _mixes(layer):
        if isinstance(layer, nn.PReLU) and layer.num_parameters == 1:
            return [], ""
        if isinstance(layer, _BatchNorm | _InstanceNorm) and not held:
            return [], f"a {kind} without tensors, whose width cannot be told from them"
        if isinstance(layer, _ConvNd | _BatchNorm | _InstanceNorm | nn.PReLU):
            return [(prefix + name, 0, "carries") for name in held], ""
        return [], f"a {kind}, which is not known to keep channels apart"
    if getattr(layer, "groups", 1) > 1:
        return [], f"a {kind} with groups={layer.groups}"
    out = out_dim(layer)
    if reads and not network.reads_weight(layer):
        return [], f"a {kind} that does not multiply by its weight as it is"
    if reads:
        return [(f"{prefix}weight", 1 - out, "reads")], ""
    return [(prefix + name, out if name == "weight" else 0, "writes") for name in held], ""


@torch.no_grad()
def reads_weight(layer: Any) -> bool:
    """Whether a linear layer or convolution leaves out an input channel whose weights are 0.

    One that standardizes its weights does not (NFNet, BiT). A layer that is not torch's is tried, with random weights;
    if it cannot be run by itself, it is taken to be like others.
    """
    if type(layer).__module__.startswith("torch.nn.modules."):
        return True
    trial, dim, stream = copy.deepcopy(layer).float().cpu().eval(), 1 - out_dim(layer), torch.Generator().manual_seed(0)
    for parameter in trial.parameters():
        parameter.normal_(generator=stream)
    sizes = zip(layer.kernel_size, layer.dilation, strict=True) if isinstance(layer, _ConvNd) else ()
    covered = [1 + (size - 1) * dilation for size, dilation in sizes]
    x = torch.randn(2, trial.weight.shape[dim], *covered, generator=stream)
    without = x.index_fill(1, torch.tensor([0]), 0)
    try:
        expected = trial(without)
        trial.weight.select(dim, 0).zero_()
        return torch.allclose(trial(x), expected, rtol=1e-3, atol=1e-3 * float(expected.abs().max()))
    except (RuntimeError, TypeError, ValueError):
        return True


def _heads(name: str, attention: Attention, shared: set[str]) -> Iterator[tuple[str, tuple[Slice, ...]]]:
    """The heads of an attention: rows of queries, keys and values, and what is read of the head."""
    prefix = f"{name}.".removeprefix(".")
    width = attention.proj.in_features
    writes = [f"{prefix}qkv.{held}" for held, _ in attention.qkv.named_parameters()]
    if shared & {*writes, f"{prefix}proj.weight"}:
        return
    for head in range(width // attention.size):
        own = tuple(range(head * attention.size, (head + 1) * attention.size))
        rows = tuple(part * width + place for part in range(3) for place in own)
        slices = [Slice(tensor, 0, rows, "writes") for tensor in writes]
        yield f"{name}[{head}]", (*slices, Slice(f"{prefix}proj.weight", 1, own, "reads"))


def _mixes(layer: Any) -> bool:
    """Whether it is a linear layer or a convolution, but not a depthwise one."""
    if isinstance(layer, _ConvNd):
        return not 1 < layer.groups == layer.in_channels == layer.out_channels
    return isinstance(layer, nn.Linear)
