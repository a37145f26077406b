"""Modules in evaluation for a while, and left as they were."""

import contextlib
from collections.abc import Iterator

import torch
from torch import nn


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
    """Let `module` be called in evaluation mode, without gradients or compiled code, and leave no trace of it.

    Buffers and torch's random streams are as they were afterwards.
    """
    buffers = {name: buffer.clone() for name, buffer in module.named_buffers()}
    devices = sorted({p.device.index for p in module.parameters() if p.device.type == "cuda"})
    with (
        torch.random.fork_rng(devices),
        torch.no_grad(),
        torch.compiler.set_stance("force_eager"),
        evaluating(module),
    ):
        try:
            yield
        finally:
            for name, buffer in module.named_buffers():
                if name in buffers and not torch.equal(buffer, buffers[name]):
                    buffer.copy_(buffers[name])
