"""Physically smaller networks: units are cut out of every tensor, and the outputs stay what they were."""

import copy
import random
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd
from torch.utils._pytree import tree_leaves

from sparsetrain.export.architecture import (
    add_biases_,
    cut_,
    is_inside,
    note_cut,
    out_dim,
    outermost,
    remove_,
)
from sparsetrain.export.graph import Slice
from sparsetrain.export.units import Unit

_TOLERANCE = 1e-9  # of outputs in float64, relative to the largest if that exceeds 1
_ROUNDING = 1e-12  # what a constant may vary by, and a layer's output by what is dropped


def silence(model: nn.Module, units: Sequence[Unit]) -> None:
    """Zero in place the weights that read `units`: the model then computes what it would if these emitted zeros.

    Of a block, what closes it is zeroed: the model then computes what it would without the block. This changes what the
    model computes, unless nothing read the units before. It is how a gate is closed for good.

    Raises:
        ValueError: units of another model.
    """
    kept_places(model, units)
    with torch.no_grad():
        for unit in units:
            for piece in unit.part("reads"):
                weight = model.get_parameter(piece.tensor)
                weight.index_fill_(piece.dim, torch.tensor(piece.index, device=weight.device), 0)


def shrink(model: nn.Module, units: Sequence[Unit], example_input: Tensor) -> nn.Module:
    """A smaller copy of `model`, without `units`, that computes the same.

    A unit must be cut off already, so that its removal is no change. Either

    - nothing reads it: the weights that read it are all 0, as `Channel(axis=1)` and `silence` leave them; or
    - nothing writes it: the weights that write it are all 0, as `Channel()` leaves them. It may still emit a constant,
      for biases and batch norm are not masked: after zeros, a batch norm emits shift - scale * mean / deviation. The
      constant moves into the bias of the layers that read it, which get one if they had none. A convolution that pads
      with zeros would read another value at the borders: there it must be 0.

    A block must be closed already: the parameters that close it are all 0, as `silence` leaves them. In its place comes
    an `nn.Identity`; what other units have in it goes with it.

    The original is left alone: until the copy is verified it is the only good network. Verified is, in float64 and
    evaluation mode, on the example and on random values of its shape, that all outputs keep their shapes and none
    differs by more than 1e-9 (relative to the largest, if that is above 1). In training mode, where dropout and batch
    norm let values differ, it is the shapes, if the model runs on the example alone there and in a single process.

    Args:
        model: a plain one, without gates or effective layers.
        units: of `units` and `blocks` for this model, or those of them that `pruned_units` found; not all channels of
            one layer.
        example_input: a batch, shape (batch, ...), on the model's device.

    Returns:
        A module of the same class, training mode and dtypes with fewer channels or blocks, which trains, compiles and
        exports as any other; `save_shrunk` saves it.

    Raises:
        ValueError: units of another model; all of one layer; a unit in use, or that emits what cannot be folded; a
            model that cannot run the example in float64.
        RuntimeError: the smaller model computes something else, cannot run, or has an output of another shape; the
            message names the first layer that does.
    """
    closed = [unit for unit in units if unit.is_block]
    removed = outermost(unit.name for unit in closed)
    units = _outside(units, removed)
    kept = kept_places(model, [*closed, *units])
    _check_closed(model, closed)
    exact, examples = exact_copy(model, example_input)
    shifts = _shifts(exact, units, examples)
    biases = [name for name in shifts if model.get_submodule(name).bias is None]
    for name in biases:
        rows = kept.get(f"{name}.weight", {}).get(out_dim(model.get_submodule(name)))
        if rows is not None:
            kept[f"{name}.bias"] = {0: rows}

    def cut(copied: nn.Module) -> nn.Module:
        remove_(copied, removed)
        add_biases_(copied, biases)
        with torch.no_grad():
            for name, shift in shifts.items():
                bias = copied.get_parameter(f"{name}.bias")
                bias.copy_(bias.double() + shift)
        cut_(copied, kept)
        return copied

    _check_same(exact, cut(copy.deepcopy(exact)), examples)
    small = copy.deepcopy(model)
    note_cut(small, kept, biases, removed)
    return cut(small)


def kept_places(model: nn.Module, units: Sequence[Unit]) -> dict[str, dict[int, tuple[int, ...]]]:
    """What is left of each tensor without `units`; blocks take none.

    Raises:
        ValueError: units of another model, or all of a layer.
    """
    shapes = {name: tensor.shape for name, tensor in model.state_dict().items() if isinstance(tensor, Tensor)}
    removed: dict[tuple[str, int], set[int]] = {}
    for unit in units:
        for piece in unit.slices:
            shape = shapes.get(piece.tensor)
            length = 0 if shape is None else (*shape, 1)[piece.dim]  # a scalar has one place
            if max(piece.index) >= length or (unit.is_block and len(piece.index) != length):
                size = "no such tensor" if shape is None else f"shape {tuple(shape)}"
                raise ValueError(
                    f"Unit {unit.name!r} belongs to another model: it lies in {piece.tensor!r} at "
                    f"{max(piece.index)} of dimension {piece.dim}, and this one has {size}. List the units anew."
                )
            if not unit.is_block:
                removed.setdefault((piece.tensor, piece.dim), set()).update(piece.index)
    kept: dict[str, dict[int, tuple[int, ...]]] = {}
    for (name, dim), places in removed.items():
        left = tuple(place for place in range(shapes[name][dim]) if place not in places)
        if not left:
            raise ValueError(f"Nothing would be left of {name!r} along dimension {dim}. Keep one of its units.")
        kept.setdefault(name, {})[dim] = left
    return kept


def _outside(units: Sequence[Unit], blocks: Sequence[str]) -> list[Unit]:
    """The units that are no blocks, as far as they lie in none of `blocks`."""
    left = [
        replace(unit, slices=tuple(piece for piece in unit.slices if not is_inside(piece.tensor, blocks)))
        for unit in units
        if not unit.is_block
    ]
    return [unit for unit in left if unit.slices]


def _check_closed(model: nn.Module, blocks: Sequence[Unit]) -> None:
    """Raise if one of `blocks` computes something.

    Raises:
        ValueError: it does; with the parameter that should be 0.
    """
    for unit in blocks:
        for piece in unit.slices:
            if _part(model, piece).any():
                raise ValueError(
                    f"The block {unit.name!r} is still in use: {piece.tensor!r} is not 0. Call silence(model, units) "
                    "first, which changes what the model computes."
                )


def _shifts(exact: nn.Module, units: Sequence[Unit], examples: Sequence[Tensor]) -> dict[str, Tensor]:
    """Layer -> what its output loses with constant units, by output channel.

    Raises:
        ValueError: a unit whose removal cannot be made good.
    """
    reading: dict[str, dict[int, Unit]] = {}
    for unit in units:
        read = [piece for piece in unit.part("reads") if _part(exact, piece).any()]
        written = [
            piece for piece in unit.part("writes") if piece.tensor.endswith("weight") and _part(exact, piece).any()
        ]
        if read and written:
            raise ValueError(
                f"Unit {unit.name!r} is still in use: {written[0].tensor!r} writes it and {read[0].tensor!r} reads it. "
                "Prune it, or call silence(model, units) first, which changes what the model computes."
            )
        for piece in read:
            reading.setdefault(piece.tensor.rpartition(".")[0], {}).update(dict.fromkeys(piece.index, unit))
    ranges = _ranges(exact, reading, examples)
    shifts = {}
    for name, places in reading.items():
        layer = exact.get_submodule(name)
        low, high = ranges[name]
        weight = layer.get_parameter("weight").detach().movedim(out_dim(layer), 0)  # [out, in, ...]
        weight = weight.index_select(1, torch.tensor(list(places), device=weight.device))
        size = weight.abs().sum((0, *range(2, weight.dim())))
        matters = size * torch.maximum(low.abs(), high.abs()) > _ROUNDING
        for unit, is_read, spread in zip(places.values(), matters.tolist(), (high - low).tolist(), strict=True):
            if is_read and spread > _ROUNDING * max(1.0, float(high.abs().max())):
                raise ValueError(
                    f"Unit {unit.name!r} is written by zeros, but {name!r} reads values of it that vary by "
                    f"{spread:.2g}: it is multiplied by another signal, or padded on its way. Call "
                    "silence(model, units) first, which changes what the model computes."
                )
            if is_read and _pads_zeros(layer):
                raise ValueError(
                    f"Unit {unit.name!r} is written by zeros, but emits a constant through its bias or batch norm, and "
                    f"{name!r} pads it with zeros, so no bias can replace it. Prune with Channel(axis=1), which masks "
                    "what reads a channel (in a transposed convolution what writes it: exclude those), or call "
                    "silence(model, units) first, which changes what the model computes."
                )
        if matters.any():
            constant = torch.where(matters, (low + high) / 2, 0.0)
            shifts[name] = (weight.flatten(2).sum(2) if weight.dim() > 2 else weight) @ constant
    return shifts


def _part(model: nn.Module, piece: Slice) -> Tensor:
    tensor = model.get_parameter(piece.tensor).detach()
    return tensor.index_select(piece.dim, torch.tensor(piece.index, device=tensor.device))


def _pads_zeros(layer: nn.Module) -> bool:
    """Whether a constant input gives other outputs at the borders."""
    if not isinstance(layer, _ConvNd):
        return False
    if layer.transposed:
        return True
    if layer.padding_mode != "zeros" or layer.padding == "valid":
        return False
    return max(layer.kernel_size) > 1 if layer.padding == "same" else max(int(side) for side in layer.padding) > 0


def _ranges(
    model: nn.Module, reading: Mapping[str, Mapping[int, Unit]], examples: Sequence[Tensor]
) -> dict[str, tuple[Tensor, Tensor]]:
    """Layer -> the least and the largest value that it reads at each of the places."""
    ranges: dict[str, tuple[Tensor, Tensor]] = {}

    def watch(name: str, places: Tensor, dim: int) -> Any:
        def hook(_: nn.Module, arguments: tuple[Tensor, ...]) -> None:
            channels = arguments[0].index_select(dim, places.to(arguments[0].device)).movedim(dim, 0).flatten(1)
            low, high = channels.aminmax(dim=1)
            before = ranges.get(name, (low, high))
            ranges[name] = torch.minimum(before[0], low), torch.maximum(before[1], high)

        return hook

    handles = []
    for name, places in reading.items():
        layer = model.get_submodule(name)
        dim = -1 - len(layer.kernel_size) if isinstance(layer, _ConvNd) else -1
        handles.append(layer.register_forward_pre_hook(watch(name, torch.tensor(list(places)), dim)))
    with torch.no_grad():
        for example in examples if handles else ():
            model(example)
    for handle in handles:
        handle.remove()
    return ranges


def exact_copy(model: nn.Module, example_input: Tensor) -> tuple[nn.Module, list[Tensor]]:
    """A copy in float64 and evaluation mode, and inputs that it takes.

    Raises:
        ValueError: it cannot run them.
    """
    exact = copy.deepcopy(model)
    try:
        examples = _trial_inputs(example_input)
        exact.double().eval()
        with torch.no_grad():
            for example in examples:
                exact(example.clone())
    except Exception as error:
        raise ValueError(
            f"{type(model).__name__} cannot run in float64 on an input of shape {tuple(example_input.shape)}: "
            f"{type(error).__name__}: {error}. Give an example that the model takes; where the model casts to a fixed "
            "dtype, let it cast to that of its weights. Or remove nothing from it."
        ) from error
    return exact, examples


def _trial_inputs(example_input: Tensor) -> list[Tensor]:
    """The example in float64, and others: a value that is constant there by chance is not on both."""
    stream = torch.Generator().manual_seed(0)
    if not example_input.is_floating_point():
        order = torch.randperm(example_input.numel(), generator=stream).to(example_input.device)
        return [example_input, example_input.flatten()[order].view_as(example_input)]
    noise = torch.randn(example_input.shape, generator=stream, dtype=torch.float64)
    return [example_input.double(), noise.to(example_input.device)]


@torch.no_grad()
def _check_same(exact: nn.Module, small: nn.Module, examples: Sequence[Tensor]) -> None:
    """Raise if the smaller model computes something else, or would in training; both may be left in training mode.

    Raises:
        RuntimeError: it does; with the layer.
    """
    for example in examples:
        expected: dict[str, list[Tensor]] = {}
        _run(exact, example, expected)
        _check_run(small, example, expected, in_training=False)
    if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
        return  # other processes may not call this: layers that wait for them in training would do so for ever
    exact.train()
    small.train()
    example = torch.cat([examples[0]] * 2)  # batch norm refuses a single value
    again: dict[str, list[Tensor]] = {}
    expected = {}
    with _streams_kept(example.device):
        try:
            _run(exact, example, expected)
            _run(exact, example, again)
        except Exception:  # in training it may want more than the example, such as targets
            return
    if _shapes(expected) != _shapes(again):
        del expected[""]  # drawn at random, as tokens are that are dropped
    with _streams_kept(example.device):
        _check_run(small, example, expected, in_training=True)


def _check_run(small: nn.Module, example: Tensor, expected: Mapping[str, list[Tensor]], *, in_training: bool) -> None:
    """Compare the outputs of each layer with those expected; in training the shapes of the model's alone."""
    made: dict[str, list[Tensor]] = {}
    failure: Exception | None = None
    try:
        _run(small, example, made)
    except Exception as error:  # whatever a layer of another size raises
        failure = error
    compared = [] if in_training else [name for name in expected if name in made]
    distances = {name: _distance(expected[name], made[name]) for name in compared}
    were, are = _shapes(expected), _shapes(made)
    same_shapes = "" not in expected or were == are
    if failure is None and same_shapes and distances.get("", 0.0) <= _TOLERANCE:
        return
    left = {name for name, _ in small.named_modules()}
    missing = next((name for name in expected if name in left and name not in made), "")
    broken = missing or next((name for name, distance in distances.items() if not distance <= _TOLERANCE), "")
    mode = " in training mode" if in_training else ""
    if failure is None and not broken and not same_shapes:
        raise RuntimeError(
            f"Without the units, {type(small).__name__}{mode} has outputs of shapes {are} in place of {were}: their "
            "channels reach an output in a way that the dependency graph does not see, such as through `detach`. Leave "
            "out the units of this output"
            + (", or let the model return it no more once training is over." if in_training else ".")
        )
    how = failure or (f"by {distances[broken]:.2g}" if broken in distances else "it does not run")
    raise RuntimeError(
        f"Without the units, layer {broken!r} of {type(small).__name__} is the first to compute something else{mode} "
        f"({how}). The model uses a channel in a way that the dependency graph does not see, such as a fixed number of "
        "channels. Leave out the units that this layer reads"
        + (", or delete it once training is over." if in_training else ".")
    ) from failure


def _shapes(made: Mapping[str, list[Tensor]]) -> list[tuple[int, ...]]:
    """Those of the model's own outputs."""
    return [tuple(output.shape) for output in made.get("", [])]


@contextmanager
def _streams_kept(device: torch.device) -> Iterator[None]:
    """Leave torch's, NumPy's and Python's random streams as they are."""
    state, numbers = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            yield
    finally:
        random.setstate(state)
        np.random.set_state(numbers)


def _run(model: nn.Module, example: Tensor, made: dict[str, list[Tensor]]) -> None:
    """Note the outputs of each layer by its name, in the order in which they end."""

    def note(name: str) -> Any:
        def hook(_: nn.Module, __: Any, output: Any) -> None:
            made.setdefault(name, []).extend(leaf for leaf in tree_leaves(output) if isinstance(leaf, Tensor))

        return hook

    handles = [layer.register_forward_hook(note(name)) for name, layer in model.named_modules()]
    try:
        model(example)
    finally:
        for handle in handles:
            handle.remove()


def _distance(expected: Sequence[Tensor], made: Sequence[Tensor]) -> float:
    """The largest difference; layers that were cut have other shapes, and say nothing."""
    if len(expected) != len(made):
        return float("inf")
    pairs = [(one.double(), two.double()) for one, two in zip(expected, made, strict=True) if one.shape == two.shape]
    return max((float((one - two).abs().max() / max(1.0, float(one.abs().max()))) for one, two in pairs), default=0.0)
