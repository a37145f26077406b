"""Binary gates on output channels of layers and on residual blocks, put on a network in place and taken off exactly.

A gate is 1 where its logit is at least 0, else 0; backwards it is the sigmoid of the logit (straight-through). Gates
are Parameters of the network, so that any optimizer trains them and DDP synchronises them, but they are not in its
`state_dict`: this has the names of the plain network and loads into it, and the other way round.

Source: Zhi et al. 2023, arXiv:2302.10798, train binary gating modules with straight-through gradients along with the
    network. Only the abstract was at hand: the form of the modules here is a reconstruction, after Veit & Belongie
    2018, arXiv:1711.11503 (pooled input, small bottleneck, open-biased start). Differs from the latter: no sampling.
"""

import difflib
from abc import ABC, abstractmethod
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd
from torch.utils.hooks import RemovableHandle


def binarize(logits: Tensor) -> Tensor:
    """Gates of exactly 0 and 1, with the gradient of the sigmoid.

    Args:
        logits: any shape; a gate is 1 where its logit is at least 0.

    Returns:
        The same shape and dtype.

    Source: straight-through estimator, Bengio et al. 2013, arXiv:1308.3432, section 4, with the derivative of the
        sigmoid.
    """
    soft = torch.sigmoid(logits)
    return (logits >= 0).to(soft.dtype) + (soft - soft.detach())  # in this order nothing is rounded


class Gates(nn.Module, ABC):
    """The gates of one module.

    Args:
        count: number of gates, at least 1.
        name: of the gated layer or block.
        axis: of the channels in its input, counted from the end.

    Attributes:
        last_logits: of the last batch, shape (batch, count), or (1, count) if they do not depend on the input; in at
            least float32, with their graph; None before the first batch and in a copy.
    """

    def __init__(self, count: int, *, name: str, axis: int) -> None:
        super().__init__()
        self.count, self.name, self.axis = count, name, axis
        self.last_logits: Tensor | None = None
        self._open: Tensor | None = None
        self._size = 1
        self._handles: list[RemovableHandle] = []

    @abstractmethod
    def logits(self, x: Tensor) -> Tensor:
        """Logits for an input of the gated module, shape (batch, count) or (1, count)."""

    def detach(self) -> None:
        """Let the gated module compute without gates."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def attach_channels(
        self, layer: nn.Module, *, after: nn.Module | None, before: nn.Module | None, size: int = 1
    ) -> None:
        """Multiply what `after` returns or `before` is given, by channel; the gates look at the input of `layer`.

        Args:
            layer: the gated one.
            after: the output of this one is multiplied,
            before: or the input of this one.
            size: how many features of `before`, one after the other, each gate multiplies: a convolution's channels
                may be read flattened, and a head is several features.
        """
        self._size = size
        self._handles.append(layer.register_forward_pre_hook(self._look))
        if after is not None:
            self._handles.append(after.register_forward_hook(self._multiply_output))
        if before is not None:
            self._handles.append(before.register_forward_pre_hook(self._multiply_input))

    def attach_block(self, block: nn.Module) -> None:
        """Let `block` return its input for those samples whose gate is 0."""
        self._handles.append(block.register_forward_hook(self._select))

    def _look(self, module: nn.Module, inputs: tuple[Any, ...]) -> None:
        x = inputs[0] if inputs else None
        if not isinstance(x, Tensor) or x.dim() < 1 - self.axis:
            found = tuple(x.shape) if isinstance(x, Tensor) else type(x).__name__
            raise ValueError(
                f"The gates of {self.name!r} need a batch of tensors as the first argument; got {found}. Leave it out."
            )
        logits = self.logits(x)
        self.last_logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        self._open = binarize(self.last_logits)

    def _multiply_output(self, module: nn.Module, inputs: tuple[Any, ...], output: Any) -> Tensor:
        return self._gated(output, self.axis)

    def _multiply_input(self, module: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
        axis = -1 if isinstance(module, nn.Linear) else self.axis
        return (self._gated(inputs[0] if inputs else None, axis, self._size), *inputs[1:])

    def _gated(self, channels: Any, axis: int, size: int = 1) -> Tensor:
        gates, self._open = self._open, None
        if gates is None:
            raise ValueError(
                f"The module where the gates of {self.name!r} multiply has run without {self.name!r} before it. Name "
                "one that runs once, after that layer, in `after` or `before`."
            )
        shape = tuple(channels.shape) if isinstance(channels, Tensor) else ()
        if len(shape) < 1 - axis or shape[axis] != self.count * size:
            raise ValueError(
                f"{self.count} gates of {self.name!r} do not fit a tensor of shape {shape}, whose channels should be "
                f"at {axis}. Name another module in `after` or `before`."
            )
        if size > 1:
            gates = gates.repeat_interleave(size, dim=1)
        view = [1] * len(shape)
        view[0], view[axis] = -1, shape[axis]
        gated: Tensor = channels * gates.view(view).to(channels.dtype)
        return gated

    def _select(self, block: nn.Module, inputs: tuple[Any, ...], output: Any) -> Tensor:
        self._look(block, inputs)
        assert self._open is not None
        (x, gates), self._open = (inputs[0], self._open), None
        if not isinstance(output, Tensor) or output.shape != x.shape:
            found = tuple(output.shape) if isinstance(output, Tensor) else type(output).__name__
            raise ValueError(
                f"The block {self.name!r} makes {found} of {tuple(x.shape)}: it cannot be skipped, as its shortcut is "
                "no identity. Leave it out."
            )
        dtype = torch.promote_types(x.dtype, output.dtype)
        gates = gates.view(-1, *[1] * (x.dim() - 1))
        return torch.lerp(x.to(dtype), output.to(dtype), gates.to(dtype))  # exactly one of them at 0 and 1

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        """Save nothing."""

    def _load_from_state_dict(self, *arguments: Any, **settings: Any) -> None:
        """Load nothing, and miss nothing."""

    def __getstate__(self) -> dict[str, Any]:
        # Tensors with a graph can be neither copied nor pickled.
        return {**self.__dict__, "last_logits": None, "_open": None}


class StaticGates(Gates):
    """One free logit for each gate, `free` of shape (count,); the same gates for all inputs.

    Args:
        open_logit: all logits at the start.
    """

    def __init__(self, count: int, *, name: str, axis: int, open_logit: float) -> None:
        super().__init__(count, name=name, axis=axis)
        self.free = nn.Parameter(torch.full((count,), open_logit))

    def logits(self, x: Tensor) -> Tensor:
        return self.free.unsqueeze(0)


class InputGates(Gates):
    """Gates that look at their input: its mean over all positions, a hidden layer with ReLU, one logit for each gate.

    They are computed without autocast, so that mixed precision decides as full precision does.

    Args:
        features: channels of the input.
        hidden: units of the hidden layer, at least 1.
        open_logit: all logits at the start, whatever the input: the output layer's weights begin at 0.
        generator: for the weights of the hidden layer.
    """

    def __init__(
        self,
        count: int,
        *,
        name: str,
        axis: int,
        features: int,
        hidden: int,
        open_logit: float,
        generator: torch.Generator | None,
    ) -> None:
        super().__init__(count, name=name, axis=axis)
        # No nn.Linear: its weight would be one that selections prune.
        self.down = nn.Parameter(torch.empty(hidden, features))
        self.down_bias = nn.Parameter(torch.zeros(hidden))
        self.up = nn.Parameter(torch.zeros(count, hidden))
        self.up_bias = nn.Parameter(torch.full((count,), open_logit))
        nn.init.kaiming_uniform_(self.down, nonlinearity="relu", generator=generator)

    def logits(self, x: Tensor) -> Tensor:
        axis = self.axis % x.dim()
        if x.shape[axis] != self.down.shape[1]:
            raise ValueError(
                f"The gates of {self.name!r} look at {self.down.shape[1]} features, but its input of shape "
                f"{tuple(x.shape)} has {x.shape[axis]} at {self.axis}. Give the right features and axis."
            )
        positions = [dim for dim in range(1, x.dim()) if dim != axis]
        with torch.autocast(x.device.type, enabled=False):
            pooled = x.to(self.down.dtype)
            if positions:  # a mean over no axes would be one over all
                pooled = pooled.mean(positions)
            return F.linear(F.relu(F.linear(pooled, self.down, self.down_bias)), self.up, self.up_bias)


def wrap_channels(
    module: nn.Module,
    layer: str,
    *,
    after: str | None = None,
    before: str | None = None,
    hidden: int | None = 16,
    open_logit: float = 2.0,
    generator: torch.Generator | None = None,
) -> Gates:
    """Put a gate on each output channel of a convolution, or output unit of a linear layer, of `module`, in place.

    Gate the channels where they are used: `before` the layer that reads them, or `after` the activation. A closed
    channel is 0 there, so it may be removed only if the rest makes 0 of 0: no BatchNorm may lie between there and the
    layer that reads it. Before a ReLU a closed gate would get no gradient of the task's loss: the ReLU has none at 0.

    Args:
        module: any module.
        layer: name of the gated layer, whose input the gates look at.
        after: name of the module whose output is multiplied; None: the layer itself, unless `before` is given.
        before: name of the module whose input is multiplied instead. Either has as many channels as the layer, on the
            same axis, and runs once after each run of the layer. A linear layer may read a convolution's channels
            flattened, one after the other.
        hidden: hidden units of the gates' network, at least 1; None: static gates, one free logit each.
        open_logit: the logits at the start, above 0: all gates begin open.
        generator: for initial weights; None: torch's global one.

    Returns:
        The gates, on the layer's device and in its dtype.

    Raises:
        ValueError: no such layer, one that is neither a convolution nor linear, has one output or has gates already,
            both `after` and `before`, or a number out of range; in the forward pass, shapes that do not fit.
    """
    owner = _find(module, layer)
    if isinstance(owner, _ConvNd):
        count, features, axis = owner.out_channels, owner.in_channels, -1 - len(owner.kernel_size)
    elif isinstance(owner, nn.Linear):
        count, features, axis = owner.out_features, owner.in_features, -1
    else:
        raise ValueError(f"{layer!r} is {type(owner).__name__}; gated are channels of convolutions and linear layers.")
    if count < 2:
        raise ValueError(f"{layer!r} has one output, which cannot be left out. Gate another layer.")
    if after is not None and before is not None:
        raise ValueError(f"The gates of {layer!r} multiply once: give after={after!r} or before={before!r}, not both.")
    reader = None if before is None else _find(module, before)
    maker = None if reader is not None else owner if after is None else _find(module, after)
    gates = _add(owner, count, layer, axis, features, hidden, open_logit, generator)
    size = reader.in_features // count if isinstance(owner, _ConvNd) and isinstance(reader, nn.Linear) else 1
    gates.attach_channels(owner, after=maker, before=reader, size=size)
    return gates


def wrap_block(
    module: nn.Module,
    block: str,
    *,
    features: int,
    axis: int,
    hidden: int | None = 16,
    open_logit: float = 2.0,
    generator: torch.Generator | None = None,
) -> Gates:
    """Put one gate on a residual block of `module` with an identity shortcut, in place: closed, it returns its input.

    For a block x + f(x), and for relu(x + f(x)) where x >= 0, this is a gate on the branch f.

    Args:
        module: any module.
        block: name of the gated block; it maps a batch of tensors to one of the same shape, and leaves its input as it
            was: an in-place operation on it would show in what a closed block returns.
        features: channels of its input, which the gate looks at.
        axis: their axis, counted from the end: -3 for images (batch, channels, height, width), -1 for tokens.
        hidden: hidden units of the gate's network, at least 1; None: a static gate, one free logit.
        open_logit: the logit at the start, above 0: the gate begins open.
        generator: for initial weights; None: torch's global one.

    Returns:
        The gate, on the device and in the dtype of the block's first parameter, whose owner holds it.

    Raises:
        ValueError: no such block, one without parameters or with gates already, or a number out of range; in the
            forward pass, an output of another shape than the input's.
    """
    if axis >= 0:
        raise ValueError(f"axis={axis} is not counted from the end. Give -3 for images, -1 for tokens.")
    whole = _find(module, block)
    # Not in the block itself: an nn.Sequential would call them, and count them among its parts.
    owner = next((part for part in whole.modules() if next(part.parameters(recurse=False), None) is not None), None)
    if owner is None:
        raise ValueError(f"{block!r} has no parameters, so that nothing is gained without it. Leave it out.")
    gates = _add(owner, 1, block, axis, features, hidden, open_logit, generator)
    gates.attach_block(whole)
    return gates


def gates_of(module: nn.Module) -> dict[str, Gates]:
    """The gates in `module`, by the name that the gated layer or block had when it was wrapped."""
    return {part.name: part for part in module.modules() if isinstance(part, Gates)}


def last_logits(module: nn.Module) -> dict[str, Tensor]:
    """The logits of the last batch of all gates in `module`, named as in `gates_of`.

    Raises:
        ValueError: gates that have seen no batch.
    """
    logits: dict[str, Tensor] = {}
    for name, gates in gates_of(module).items():
        if gates.last_logits is None:
            raise ValueError(f"The gates of {name!r} have seen no batch: it is not called as a module. Leave it out.")
        logits[name] = gates.last_logits
    return logits


def unwrap(module: nn.Module) -> dict[str, Gates]:
    """Take all gates off `module`, and return them as `gates_of` does."""
    found = gates_of(module)
    for owner in tuple(module.modules()):
        for attribute, part in tuple(owner.named_children()):
            if isinstance(part, Gates):
                part.detach()
                delattr(owner, attribute)
    return found


def _add(
    owner: nn.Module,
    count: int,
    name: str,
    axis: int,
    features: int,
    hidden: int | None,
    open_logit: float,
    generator: torch.Generator | None,
) -> Gates:
    attribute = f"gates_of_{name.replace('.', '_')}"
    if hasattr(owner, attribute):
        raise ValueError(f"{name!r} has gates already. Call unwrap(module) first.")
    if not open_logit > 0:
        raise ValueError(f"open_logit={open_logit} would let the gates begin closed; it must be above 0, such as 2.0.")
    if hidden is not None and hidden < 1:
        raise ValueError(f"hidden={hidden} must be at least 1, or None for static gates.")
    gates: Gates
    if hidden is None:
        gates = StaticGates(count, name=name, axis=axis, open_logit=open_logit)
    else:
        gates = InputGates(
            count,
            name=name,
            axis=axis,
            features=features,
            hidden=hidden,
            open_logit=open_logit,
            generator=generator,
        )
    weight = next(owner.parameters(recurse=False))
    gates.to(device=weight.device, dtype=weight.dtype)
    owner.add_module(attribute, gates)
    return gates


def _find(module: nn.Module, name: str) -> nn.Module:
    parts: dict[str, nn.Module] = dict(module.named_modules())
    if name not in parts or not name:
        near = difflib.get_close_matches(name, parts, n=3, cutoff=0.4) or [part for part in parts if part][:3]
        raise ValueError(f"No module is called {name!r}. Near names: {', '.join(map(repr, near))}.")
    return parts[name]
