"""Binary gates on output channels of layers and on residual blocks, put on a network by hooks and taken off exactly.

A gate is 1 where its logit is at least 0, else 0; backwards it is the sigmoid of the logit (straight-through). Gates
are modules of their own, no parts of the network, whose parameters and `state_dict` stay those of the plain one.

Source: Zhi et al. 2023, arXiv:2302.10798, train binary gating modules with straight-through gradients along with the
    network. Only the abstract was at hand: the form of the modules here is a reconstruction, after Veit & Belongie
    2018, arXiv:1711.11503 (pooled input, small bottleneck, open-biased start). Differs from the latter: no sampling.
"""

from abc import ABC, abstractmethod
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd
from torch.utils.hooks import RemovableHandle

_OPEN = 2.0  # all logits at the start


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

    def attach_channels(self, layer: nn.Module, reader: nn.Module, *, size: int = 1) -> None:
        """Multiply the output channels of `layer` where `reader` reads them; the gates look at the input of `layer`.

        A closed channel is 0 there, so it may be removed only if the rest makes 0 of 0: no BatchNorm may lie between
        there and the reader. Right behind `layer`, before a ReLU, a closed gate would get no gradient of the task's
        loss: the ReLU has none at 0.

        Args:
            layer: the gated one.
            reader: the linear layer or convolution that reads its channels, where its own kind has them, and runs once
                after each run of `layer`.
            size: how many features of `reader`, one after the other, each gate multiplies: a convolution's channels
                may be read flattened, and a head is several features.
        """
        self._size = size
        self._handles.append(layer.register_forward_pre_hook(self._look))
        self._handles.append(reader.register_forward_pre_hook(self._multiply_input))

    def attach_block(self, block: nn.Module) -> None:
        """Let `block` return its input for those samples whose gate is 0.

        For a block x + f(x), and for relu(x + f(x)) where x >= 0, this is a gate on the branch f. The block must leave
        its input as it was: an in-place operation on it would show in what a closed block returns.
        """
        self._handles.append(block.register_forward_hook(self._select))

    def _look(self, module: nn.Module, inputs: tuple[Any, ...]) -> None:
        x = inputs[0] if inputs else None
        if not isinstance(x, Tensor) or x.dim() < 1 - self.axis:
            found = tuple(x.shape) if isinstance(x, Tensor) else type(x).__name__
            raise ValueError(
                f"The gates of {self.name!r} need a batch of tensors as the first argument; got {found}. Leave it out."
            )
        logits = self.logits(x)
        if module.training and not torch.is_grad_enabled():  # such as for a metric: the step's own run is what counts
            self._open = binarize(logits)
            return
        self.last_logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        self._open = binarize(self.last_logits)

    def _multiply_input(self, module: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
        axis = -1 - len(module.kernel_size) if isinstance(module, _ConvNd) else -1
        channels, size = inputs[0] if inputs else None, self._size
        gates, self._open = self._open, None
        if gates is None:
            raise ValueError(
                f"What reads the channels of {self.name!r} has run without {self.name!r} before it, or twice after it, "
                "so that its gates cannot multiply. Leave it out."
            )
        if not isinstance(channels, Tensor) or channels.dim() < -axis + 1 or channels.shape[axis] != self.count * size:
            found = tuple(channels.shape) if isinstance(channels, Tensor) else type(channels).__name__
            raise ValueError(
                f"{self.count} gates of {self.name!r} do not fit {found}, whose channels should be at {axis}. Leave it "
                "out."
            )
        if size > 1:
            gates = gates.repeat_interleave(size, dim=1)
        view = [1] * channels.dim()
        view[0], view[axis] = -1, channels.shape[axis]
        return (channels * gates.view(view).to(channels.dtype), *inputs[1:])

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

    def __getstate__(self) -> dict[str, Any]:
        # Tensors with a graph can be neither copied nor pickled.
        return {**self.__dict__, "last_logits": None, "_open": None}


class StaticGates(Gates):
    """One free logit for each gate, `free` of shape (count,); the same gates for all inputs."""

    def __init__(self, count: int, *, name: str, axis: int) -> None:
        super().__init__(count, name=name, axis=axis)
        self.free = nn.Parameter(torch.full((count,), _OPEN))

    def logits(self, x: Tensor) -> Tensor:
        return self.free.unsqueeze(0)


class InputGates(Gates):
    """Gates that look at their input: its mean over all positions, a hidden layer with ReLU, one logit for each gate.

    They are computed without autocast, so that mixed precision decides as full precision does.

    Args:
        features: channels of the input.
        hidden: units of the hidden layer, at least 1.
        generator: for the weights of the hidden layer; those of the output layer begin at 0.
    """

    def __init__(
        self,
        count: int,
        *,
        name: str,
        axis: int,
        features: int,
        hidden: int,
        generator: torch.Generator | None,
    ) -> None:
        super().__init__(count, name=name, axis=axis)
        self.down = nn.Parameter(torch.empty(hidden, features))
        self.down_bias = nn.Parameter(torch.zeros(hidden))
        self.up = nn.Parameter(torch.zeros(count, hidden))
        self.up_bias = nn.Parameter(torch.full((count,), _OPEN))
        nn.init.kaiming_uniform_(self.down, nonlinearity="relu", generator=generator)

    def logits(self, x: Tensor) -> Tensor:
        axis = self.axis % x.dim()
        if x.shape[axis] != self.down.shape[1]:
            raise ValueError(
                f"The gates of {self.name!r} look at {self.down.shape[1]} features, but its input of shape "
                f"{tuple(x.shape)} has {x.shape[axis]} at {self.axis}. Leave it out."
            )
        positions = [dim for dim in range(1, x.dim()) if dim != axis]
        with torch.autocast(x.device.type, enabled=False):
            pooled = x.to(self.down.dtype)
            if positions:  # a mean over no axes would be one over all
                pooled = pooled.mean(positions)
            return F.linear(F.relu(F.linear(pooled, self.down, self.down_bias)), self.up, self.up_bias)


def make_gates(
    count: int,
    *,
    name: str,
    axis: int,
    features: int,
    hidden: int | None,
    generator: torch.Generator | None = None,
) -> Gates:
    """Gates that begin open, whatever the input.

    Args:
        count: number of gates, at least 1.
        name: of the gated layer or block.
        axis: of the channels in its input, counted from the end: -3 for images (batch, channels, height, width), -1 for
            tokens.
        features: channels of its input, which the gates look at.
        hidden: hidden units of the gates' network, at least 1; None: static gates, one free logit each.
        generator: for initial weights; None: torch's global one.
    """
    if hidden is None:
        return StaticGates(count, name=name, axis=axis)
    return InputGates(count, name=name, axis=axis, features=features, hidden=hidden, generator=generator)
