"""Attention whose heads can be removed: one linear layer for queries, keys and values, one for what comes out."""

from collections.abc import Iterator
from typing import NamedTuple

from torch import nn

_HEADS = ("num_heads", "heads")


class Attention(NamedTuple):
    """The parts of an attention module.

    Args:
        module: it.
        qkv: makes queries, keys and values, in this order, each with one head after the other.
        proj: reads one head after the other.
        size: of a head.
    """

    module: nn.Module
    qkv: nn.Linear
    proj: nn.Linear
    size: int

    def refit(self) -> None:
        """Tell the module how many heads its layers have left."""
        width: int = self.proj.weight.shape[1]
        for name, value in (*((name, width // self.size) for name in _HEADS), ("attn_dim", width)):
            if hasattr(self.module, name):
                setattr(self.module, name, value)


def attentions(model: nn.Module) -> Iterator[tuple[str, Attention]]:
    """Each attention with its name; only those of which nothing but `qkv` and `proj` depends on the number of heads."""
    for name, module in model.named_modules():
        qkv, proj = getattr(module, "qkv", None), getattr(module, "proj", None)
        heads = next((getattr(module, name) for name in _HEADS if hasattr(module, name)), None)
        if not isinstance(qkv, nn.Linear) or not isinstance(proj, nn.Linear) or not isinstance(heads, int):
            continue
        width = proj.in_features
        if qkv.out_features != 3 * width or heads < 1 or width % heads:
            continue
        own = {*qkv.parameters(), *proj.parameters()}
        if all(parameter.numel() == width // heads for parameter in module.parameters() if parameter not in own):
            yield name, Attention(module, qkv, proj, width // heads)
