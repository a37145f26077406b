"""Whole residual blocks as units: with some of its own parameters at 0, a block returns what it is given."""

import difflib
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from sparsetrain.export.graph import Slice
from sparsetrain.export.shrink import exact_copy
from sparsetrain.export.units import Unit, check_folded
from sparsetrain.report.measure import cost

_TOLERANCE = 1e-9  # of what a closed block returns, relative to the largest value if that exceeds 1
_DRAWS = 3  # random inputs on which a closed block must return them
_SHOWN = 4  # reasons in an error


def blocks(model: nn.Module, example_input: Tensor, *, names: Sequence[str] = ("*",)) -> tuple[Unit, ...]:
    """List the blocks that can be removed whole from `model`: those with an identity shortcut.

    Such a block maps a tensor to one of the same shape and, with some of its own parameters at 0, returns its input,
    whatever the others are: x + f(x), and relu(x + f(x)) where it is never given negative values. The parameters are
    found by trial, on random ones in float64: the block's layers are closed one by one, the last first, until it
    returns its input, and those without which it still does are left out. These are the slices of the unit, which all
    "read": the last batch norm of each branch, or the last linear layer or convolution where no norm follows.

    Args:
        model: a plain module, without gates; left as it is.
        example_input: a batch, shape (batch, ...), on the model's device.
        names: globs over module names, as `named_modules` gives them. Of those that match a glob with a wildcard, the
            innermost that can be removed are taken, and that hold a linear layer or convolution; one that is named in
            full must be removable.

    Returns:
        Units in the order of `named_modules`, called as their modules; `shrink` and `silence` take them beside those of
        `units`.

    Raises:
        ValueError: a glob that matches no module (with near names); a module named in full that cannot be removed (with
            the reason), nothing that can be, one block inside another, a model that cannot run the example, or one that
            still computes with effective weights.
    """
    if isinstance(names, str):
        raise ValueError(f"names={names!r} is one string where a list of globs is meant. Write [{names!r}].")
    check_folded(model)
    parts = [name for name, _ in model.named_modules() if name]
    chosen: set[str] = set()
    for glob in names:
        matching = [name for name in parts if fnmatchcase(name, glob)]
        if not matching:
            near = difflib.get_close_matches(glob, parts, n=3, cutoff=0.4) or parts[:3]
            raise ValueError(f"{glob!r} matches no module. Near names: {', '.join(map(repr, near))}.")
        chosen.update(matching)
    named = chosen.intersection(names)
    found, obstacles = removable(model, example_input, chosen, named)
    for name in parts:
        if name in named and name in obstacles:
            raise ValueError(f"{name!r} cannot be removed whole: {obstacles[name]}. Leave it out.")
        outer = next((other for other in found if name in found and name.startswith(f"{other}.")), None)
        if outer is not None:
            raise ValueError(f"The block {name!r} lies inside the block {outer!r}. Name one of them.")
    if not found:
        raise ValueError(
            f"{type(model).__name__} has no block that can be removed with names={tuple(names)}: {reasons(obstacles)}. "
            "Give a network of residual blocks with identity shortcuts."
        )
    return tuple(block.unit for block in found.values())


@dataclass(frozen=True)
class Block:
    """A removable block.

    Args:
        unit: it.
        given: the shape of its input.
    """

    unit: Unit
    given: tuple[int, ...]


def removable(
    model: nn.Module, example_input: Tensor, among: Collection[str], named: Collection[str] = ()
) -> tuple[dict[str, Block], dict[str, str]]:
    """Which modules can be removed whole, in the order of `named_modules`, and why others cannot.

    Args:
        model: a plain module.
        example_input: a batch, shape (batch, ...), on the model's device.
        among: names of modules; the innermost are taken, and that hold a linear layer or convolution.
        named: those of them that are looked at in any case.
    """
    exact, examples = exact_copy(model, example_input)
    parts = {name: part for name, part in exact.named_modules() if name}
    calls = _calls(exact, {part: name for name, part in parts.items()}, examples)
    stream = torch.Generator().manual_seed(0)
    flops = cost(model, example_input)
    found: dict[str, Block] = {}
    obstacles: dict[str, str] = {}
    with torch.no_grad():
        for parameter in exact.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=stream, dtype=torch.float64))
        for name, part in reversed(parts.items()):  # what lies inside first
            inside = f"{name}."
            if name not in named:
                if name not in among or any(other.startswith(inside) for other in found):
                    continue
                if not any(isinstance(p, nn.Linear | _ConvNd) for p in part.modules() if p is not part):
                    continue
            obstacle = _obstacle(exact, name, calls.get(name, []))
            closing = [] if obstacle else _closing(part, calls[name][0])
            if not closing:
                obstacles[name] = obstacle or (
                    f"it does not return its input of shape {calls[name][0].given} with any of its parameters at 0: "
                    "it has no identity shortcut, or computes nothing"
                )
                continue
            first = {id(parameter): key for key, parameter in exact.named_parameters()}
            tensors = dict.fromkeys(first[id(p)] for layer in closing for p in layer.parameters(recurse=False))
            shapes = {tensor: exact.get_parameter(tensor).shape for tensor in tensors}
            unit = Unit(
                name,
                tuple(Slice(t, 0, tuple(range(shape[0] if shape else 1)), "reads") for t, shape in shapes.items()),
                parameters=sum(parameter.numel() for parameter in part.parameters()),
                flops=sum(count for layer, count in flops.items() if f"{layer}.".startswith(inside)),
                is_block=True,
            )
            found[name] = Block(unit, calls[name][0].given)
    return {name: found[name] for name in parts if name in found}, obstacles


def reasons(obstacles: dict[str, str]) -> str:
    """Some of the reasons why modules cannot be removed."""
    shown = [f"{name!r}: {why}" for name, why in reversed(obstacles.items())]
    more = f"; and {len(shown) - _SHOWN} more" if len(shown) > _SHOWN else ""
    return ("; ".join(shown[:_SHOWN]) or "no module holds a linear layer or convolution") + more


@dataclass(frozen=True)
class _Call:
    """One run of a module.

    Args:
        given: the shape of its input; empty if that is anything else than one tensor of floating-point numbers.
        made: the shape of its output; None if that is no tensor.
        is_positive: whether no value of its input is below 0.
    """

    given: tuple[int, ...]
    made: tuple[int, ...] | None
    is_positive: bool


def _calls(model: nn.Module, names: dict[nn.Module, str], examples: Sequence[Tensor]) -> dict[str, list[_Call]]:
    """Each module's runs on the first example; an input is positive only if those on all examples are."""
    runs: list[dict[str, list[_Call]]] = []

    def before(module: nn.Module, inputs: tuple[Any, ...], named: dict[str, Any]) -> None:
        call = _Call((), None, False)
        if len(inputs) == 1 and not named and isinstance(inputs[0], Tensor) and inputs[0].is_floating_point():
            # Its sign is looked at now: the module may write to it.
            call = _Call(tuple(inputs[0].shape), None, bool((inputs[0] >= 0).all()))
        runs[-1].setdefault(names[module], []).append(call)

    def after(module: nn.Module, _: tuple[Any, ...], output: Any) -> None:
        if isinstance(output, Tensor):
            calls = runs[-1][names[module]]
            calls[-1] = replace(calls[-1], made=tuple(output.shape))

    handles = [part.register_forward_pre_hook(before, with_kwargs=True) for part in names]
    handles += [part.register_forward_hook(after) for part in names]
    with torch.no_grad():
        for example in examples:
            runs.append({})
            model(example)
    for handle in handles:
        handle.remove()
    return {
        name: [
            replace(call, is_positive=all(c.is_positive for run in runs for c in run.get(name, []))) for call in seen
        ]
        for name, seen in runs[0].items()
    }


def _obstacle(model: nn.Module, name: str, calls: Sequence[_Call]) -> str:
    """Why a module can be no block, without a look at what it computes, or an empty text."""
    if len(calls) != 1:
        return f"it runs {len(calls)} times in a forward pass"
    (call,) = calls
    if not call.given:
        return "it is given something else than one tensor of floating-point numbers"
    if call.made != call.given:
        made = "no tensor" if call.made is None else f"a tensor of shape {call.made}"
        return f"it makes {made} from one of shape {call.given}, so that its shortcut is no identity"
    everywhere = list(model.named_parameters(remove_duplicate=False))
    outside = {id(parameter): other for other, parameter in everywhere if not other.startswith(f"{name}.")}
    shared = next((key for key, p in everywhere if key.startswith(f"{name}.") and id(p) in outside), None)
    return "" if shared is None else f"{shared!r} is used outside of it, too"


def _closing(block: nn.Module, call: _Call) -> list[nn.Module]:
    """Its layers whose parameters must be 0 for the block to return its input; none if there are no such layers."""
    stream = torch.Generator().manual_seed(1)
    device = next((parameter.device for parameter in block.parameters()), None)
    drawn = [torch.randn(call.given, generator=stream, dtype=torch.float64).to(device) for _ in range(_DRAWS)]
    inputs = [x.abs() if call.is_positive else x for x in drawn]

    def returns_its_input() -> bool:
        return all(_returns(block, x) for x in inputs)

    layers = _in_order(block, lambda: block(inputs[0].clone()))
    values = {p: p.detach().clone() for p in block.parameters()}
    closed: list[nn.Module] = []
    try:
        if returns_its_input():
            return []  # nothing of it matters
        for layer in reversed(layers):
            _fill(layer, None)
            closed.append(layer)
            if returns_its_input():
                break
        else:
            return []
        for layer in closed[::-1]:
            _fill(layer, values)
            if returns_its_input():
                closed.remove(layer)
            else:
                _fill(layer, None)
    finally:
        for parameter, value in values.items():
            parameter.copy_(value)
    return closed[::-1]


def _returns(block: nn.Module, x: Tensor) -> bool:
    """Whether the block returns x and leaves it as it is."""
    given = x.clone()
    made = block(given)
    return (
        isinstance(made, Tensor)
        and made.shape == x.shape
        and torch.equal(given, x)
        and float((made - x).abs().max()) <= _TOLERANCE * max(1.0, float(x.abs().max()))
    )


def _fill(layer: nn.Module, values: dict[nn.Parameter, Tensor] | None) -> None:
    """Set the layer's own parameters to these values, or to 0."""
    for parameter in layer.parameters(recurse=False):
        parameter.copy_(torch.zeros_like(parameter) if values is None else values[parameter])


def _in_order(block: nn.Module, run: Callable[[], Any]) -> list[nn.Module]:
    """The parts of `block` with parameters of their own, as they end in `run`.

    A part that is not called, as those of `nn.MultiheadAttention`, ends with what holds it.
    """
    ends: dict[nn.Module, int] = {}

    def note(module: nn.Module, *_: Any) -> None:
        ends[module] = len(ends) + 1

    handles = [part.register_forward_hook(note) for part in block.modules()]
    run()
    for handle in handles:
        handle.remove()
    placed: list[tuple[int, nn.Module]] = []

    def visit(part: nn.Module, end: int) -> None:
        end = ends.get(part, end)
        placed.append((end, part))
        for child in part.children():
            visit(child, end)

    visit(block, 0)
    ordered = [part for _, part in sorted(placed, key=lambda pair: pair[0])]
    return [part for part in dict.fromkeys(ordered) if next(part.parameters(recurse=False), None) is not None]
