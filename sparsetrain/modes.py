"""Modules in evaluation for a while, and left as they were."""

import contextlib
import copy
from collections.abc import Iterator

import torch
from torch import Tensor, nn

_HELD = ("_parameters", "_buffers", "_modules", "_non_persistent_buffers_set")  # where a module keeps its parts


@contextlib.contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """Have every layer of `module` in evaluation mode; afterwards, or after an error, each is as it was.

    By attribute, layer by layer: overrides of `train` and `eval` may do more, and `train` would also wake what the
    user keeps in evaluation, such as frozen batch norm.
    """
    training = {part: part.training for part in module.modules()}
    try:
        for part in training:
            part.training = False
        yield
    finally:
        for part, was in training.items():
            part.training = was


@contextlib.contextmanager
def undisturbed(module: nn.Module) -> Iterator[None]:
    """Let `module` be called in evaluation mode, without gradients or compiled code.

    Its layers have copies of their buffers meanwhile. Afterwards they have their own again, and the parts and
    attributes that they had, and torch's random streams, and generators that are attributes, are as they were. What
    else an attribute holds may have changed within.
    """
    devices = sorted({p.device.index for p in module.parameters() if p.device.type == "cuda"})
    with (
        torch.random.fork_rng(devices),
        torch.no_grad(),
        torch.compiler.set_stance("force_eager"),
        evaluating(module),
    ):
        parts = [part for part in module.modules() if not isinstance(part, torch.jit.ScriptModule)]
        before = [(part, dict(vars(part)), [copy.copy(vars(part)[name]) for name in _HELD]) for part in parts]
        own = (value for _, attributes, _ in before for value in attributes.values())
        streams = [(value, value.get_state()) for value in own if isinstance(value, torch.Generator)]
        buffers = {buffer for part in parts for buffer in part._buffers.values()}
        own_buffers = (buffer for buffer in buffers if buffer is not None and not isinstance(buffer, nn.Parameter))
        copies: dict[Tensor | None, Tensor | None] = {buffer: buffer.clone() for buffer in own_buffers}
        try:
            for part in parts:
                part._buffers.update({name: copies.get(buffer, buffer) for name, buffer in part._buffers.items()})
            yield
        finally:
            for part, attributes, contents in before:
                vars(part).clear()
                vars(part).update(attributes)
                for name, content in zip(_HELD, contents, strict=True):  # in place: others refer to them
                    held = vars(part)[name]
                    held.clear()
                    held.update(content)
            for stream, state in streams:
                stream.set_state(state)
