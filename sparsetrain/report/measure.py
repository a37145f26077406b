"""What is sparse in a network, counted from its masks, and what that could save."""

import contextlib
import difflib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from sparsetrain.modes import undisturbed


@dataclass(frozen=True)
class LayerReport:
    """The facts about one masked tensor.

    Args:
        name: the parameter's name.
        shape: the parameter's shape.
        total: its weights.
        kept: weights whose mask is True.
        revived: weights that are not 0 although their mask is False; NaN counts. 0 in a sound network.
        itemsize_bytes: bytes of one weight.
        dense_flops: FLOPs of one example in the operations that read this tensor; None if they were not counted.
    """

    name: str
    shape: tuple[int, ...]
    total: int
    kept: int
    revived: int
    itemsize_bytes: int
    dense_flops: int | None

    @property
    def sparsity(self) -> float:
        """Share of the weights whose mask is False, in [0, 1]."""
        return _share(self.total - self.kept, self.total)

    @property
    def theoretical_flops(self) -> int | None:
        """dense_flops * kept / total, rounded down: what is left if every masked multiplication were skipped."""
        return None if self.dense_flops is None else self.dense_flops * self.kept // max(self.total, 1)

    def to_dict(self) -> dict[str, Any]:
        """All of it as numbers, strings and lists, for JSON."""
        return {
            "name": self.name,
            "shape": list(self.shape),
            "total": self.total,
            "kept": self.kept,
            "sparsity": self.sparsity,
            "revived": self.revived,
            "dense_flops": self.dense_flops,
            "theoretical_flops": self.theoretical_flops,
        }


@dataclass(frozen=True)
class Report:
    """The facts about a network and its masks; made by `measure`.

    Args:
        layers: one entry per masked tensor, in the masks' order.
        parameters: parameters of the whole network, shared ones once.
        dense_bytes: bytes of all parameters, stored densely.
        dense_flops: FLOPs of one example in the whole network; None if they were not counted.
    """

    layers: tuple[LayerReport, ...]
    parameters: int
    dense_bytes: int
    dense_flops: int | None

    @property
    def maskable(self) -> int:
        """Weights that have a mask."""
        return sum(layer.total for layer in self.layers)

    @property
    def kept(self) -> int:
        """Weights whose mask is True."""
        return sum(layer.kept for layer in self.layers)

    @property
    def revived(self) -> int:
        """Weights that are not 0 although their mask is False; 0 in a sound network."""
        return sum(layer.revived for layer in self.layers)

    @property
    def sparsity(self) -> float:
        """Share of the maskable weights whose mask is False, in [0, 1]."""
        return _share(self.maskable - self.kept, self.maskable)

    @property
    def sparsity_of_all(self) -> float:
        """Share of all parameters whose mask is False, in [0, 1]."""
        return _share(self.maskable - self.kept, self.parameters)

    @property
    def theoretical_flops(self) -> int | None:
        """dense_flops less what masked multiplications take; nothing skips them by itself."""
        if self.dense_flops is None:
            return None
        return self.dense_flops - sum(
            (layer.dense_flops or 0) - (layer.theoretical_flops or 0) for layer in self.layers
        )

    @property
    def kept_bytes(self) -> int:
        """Bytes of the parameters without the masked ones: values only, no indices."""
        return self.dense_bytes - sum((layer.total - layer.kept) * layer.itemsize_bytes for layer in self.layers)

    @property
    def mask_bytes(self) -> int:
        """Bytes of the masks at 1 bit a weight, each tensor filled up to a whole byte."""
        return sum((layer.total + 7) // 8 for layer in self.layers)

    def to_dict(self) -> dict[str, Any]:
        """All of it as numbers, strings and lists, for JSON."""
        return {
            "parameters": self.parameters,
            "maskable": self.maskable,
            "kept": self.kept,
            "revived": self.revived,
            "sparsity": self.sparsity,
            "sparsity_of_all": self.sparsity_of_all,
            "dense_flops": self.dense_flops,
            "theoretical_flops": self.theoretical_flops,
            "dense_bytes": self.dense_bytes,
            "kept_bytes": self.kept_bytes,
            "mask_bytes": self.mask_bytes,
            "layers": [layer.to_dict() for layer in self.layers],
        }


def measure(module: nn.Module, masks: Mapping[str, Tensor], example_input: Tensor | None = None) -> Report:
    """Count what is kept, what came back to life, and the FLOPs and bytes before and after.

    Counts come from the masks, never from weights that happen to be 0. FLOPs are 2 x multiply-accumulates of
    convolutions, matrix products and attention, as torch's FlopCounterMode counts them (padding and the masked half of
    causal attention included; biases, norms and activations not; an operation that torch has no formula for, such as a
    fused recurrent cell, counts 0). A tensor's share is what the operations take that read its memory, so projections
    inside `nn.MultiheadAttention` and weights used through `torch.nn.functional` count; a tensor that is computed
    from a parameter (a parametrization, a cast to another dtype) is not that parameter.

    The module is left as it was: training flags, buffers and the random state of its devices are restored, no
    gradient is made, and a compiled module runs uncompiled here.

    Args:
        module: the network; live weights are counted, so fold shadow storage first.
        masks: parameter name -> bool tensor of the parameter's shape, True = kept. May be empty.
        example_input: a batch, shape (batch, ...), on any device, of any floating dtype or of integers; its first
            example is run once in evaluation mode. None leaves the FLOPs out.

    Raises:
        ValueError: a mask that is not bool, names no parameter or has another shape.

    >>> report = measure(nn.Linear(4, 2), {"weight": torch.eye(2, 4).bool()}, torch.ones(1, 4))
    >>> report.sparsity, report.sparsity_of_all, report.dense_flops, report.theoretical_flops
    (0.75, 0.6, 16, 4)
    """
    named = dict(module.named_parameters(remove_duplicate=False))
    masked = {name: _masked_parameter(name, mask, named) for name, mask in masks.items()}
    total_flops, flops = None, dict.fromkeys(masked)
    if example_input is not None:
        total_flops, flops = _count_flops_by_parameter(module, masked, example_input)
    layers = []
    for name, parameter in masked.items():
        weight, mask = parameter.detach(), masks[name].to(parameter.device)
        layers.append(
            LayerReport(
                name=name,
                shape=tuple(weight.shape),
                total=weight.numel(),
                kept=int(mask.count_nonzero()),
                revived=int(((weight != 0) & ~mask).count_nonzero()),
                itemsize_bytes=weight.element_size(),
                dense_flops=flops[name],
            )
        )
    parameters = list(module.parameters())
    return Report(
        layers=tuple(layers),
        parameters=sum(parameter.numel() for parameter in parameters),
        dense_bytes=sum(parameter.numel() * parameter.element_size() for parameter in parameters),
        dense_flops=total_flops,
    )


def cost(module: nn.Module, example_input: Tensor) -> dict[str, int]:
    """Count the FLOPs of one example, layer by layer, as `measure` counts them.

    What `measure` leaves out counts 0 here too: biases, norms, activations, pooling, softmax, elementwise products and
    additions. The module is left as it was.

    Args:
        module: the network.
        example_input: a batch, shape (batch, ...), on any device, of any floating dtype or of integers; its first
            example is run once in evaluation mode.

    Returns:
        Module name -> FLOPs of the operations that run in that module itself and in none of its children; modules in
        which nothing counts are left out. They add up to `Report.dense_flops`.

    >>> cost(nn.Sequential(nn.Linear(4, 2), nn.ReLU(), nn.Linear(2, 1)), torch.ones(1, 4))
    {'0': 16, '2': 4}
    """
    flops: dict[str, int] = {}
    running: list[str] = []

    def book(args: tuple[Any, ...], count: int) -> None:
        flops[running[-1]] = flops.get(running[-1], 0) + count

    def enter(name: str) -> Callable[..., None]:
        return lambda *_: running.append(name)

    def leave(*_: Any) -> None:
        running.pop()

    handles = []
    try:
        for name, child in module.named_modules():
            handles.append(child.register_forward_pre_hook(enter(name)))
            handles.append(child.register_forward_hook(leave, always_call=True))
        _count_flops(module, example_input, book)
    finally:
        for handle in handles:
            handle.remove()
    return flops


def example_for(module: nn.Module, example_input: Tensor) -> Tensor:
    """The first example of a batch, on the device of the module's first floating parameter; floats in its dtype."""
    weight = next((parameter for parameter in module.parameters() if parameter.is_floating_point()), example_input)
    return example_input[:1].to(weight.device, weight.dtype if example_input.is_floating_point() else None)


_Book = Callable[[tuple[Any, ...], int], None]
"""Is told the arguments of an operation and its FLOPs."""


class _Bookkeeper(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Tells `book` what `counter`, entered just before, counts for each operation."""

    def __init__(self, counter: FlopCounterMode, book: _Book) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.counter = counter
        self.book = book

    def __torch_dispatch__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        before = self.counter.get_total_flops()
        result = func(*args, **(kwargs or {}))
        flops = self.counter.get_total_flops() - before
        if flops:
            self.book(args, flops)
        return result


def _count_flops(module: nn.Module, example_input: Tensor, book: _Book) -> int:
    example = example_for(module, example_input)
    counter = FlopCounterMode(display=False)
    with _countable(module), counter, _Bookkeeper(counter, book):
        module(example)
    return counter.get_total_flops()


def _count_flops_by_parameter(
    module: nn.Module, masked: Mapping[str, Tensor], example_input: Tensor
) -> tuple[int, dict[str, int | None]]:
    """FLOPs of the whole network, and of the operations that read each of `masked`."""
    spans = {name: _span(parameter) for name, parameter in masked.items()}
    flops: dict[str, int | None] = dict.fromkeys(masked, 0)

    def owner(value: Any) -> str | None:
        # By address: the operand is mostly a view (a transpose, a third of in_proj_weight), not the parameter itself.
        if not isinstance(value, Tensor):
            return None
        address = value.data_ptr()
        return next((name for name, (start, end) in spans.items() if start <= address < end), None)

    def book(args: tuple[Any, ...], count: int) -> None:
        name = next(filter(None, map(owner, args)), None)
        if name is not None:
            flops[name] = (flops[name] or 0) + count

    return _count_flops(module, example_input, book), flops


@contextlib.contextmanager
def _countable(module: nn.Module) -> Iterator[None]:
    """`modes.undisturbed`, without fused attention, which is one operation that the counter has no formula for.

    No parameter requires a gradient meanwhile: the counter hooks inputs that do, and a view of a parameter that is made
    without gradients says so and has no graph.
    """
    trainable = [parameter for parameter in module.parameters() if parameter.requires_grad]
    fast_attention = torch.backends.mha.get_fastpath_enabled()
    with undisturbed(module):
        try:
            torch.backends.mha.set_fastpath_enabled(False)
            for parameter in trainable:
                parameter.requires_grad_(False)
            yield
        finally:
            for parameter in trainable:
                parameter.requires_grad_(True)
            torch.backends.mha.set_fastpath_enabled(fast_attention)


def _masked_parameter(name: str, mask: Tensor, named: Mapping[str, Tensor]) -> Tensor:
    if name not in named:
        near = difflib.get_close_matches(name, named, n=3)
        hint = f"Near names: {', '.join(near)}." if near else f"It has {len(named)} parameters."
        raise ValueError(f"There is a mask for {name!r}, but the module has no such parameter. {hint}")
    if mask.dtype != torch.bool:
        raise ValueError(f"A mask is a bool tensor, True = kept; that of {name!r} is {mask.dtype}. Use `mask != 0`.")
    if mask.shape != named[name].shape:
        raise ValueError(
            f"The mask of {name!r} has shape {tuple(mask.shape)}, its parameter {tuple(named[name].shape)}. "
            "Give the masks that were made for this module."
        )
    return named[name]


def _span(parameter: Tensor) -> tuple[int, int]:
    start = parameter.data_ptr()
    return start, start + parameter.numel() * parameter.element_size()


def _share(part: int, whole: int) -> float:
    return part / whole if whole else 0.0
