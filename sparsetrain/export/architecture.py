"""Which channels and blocks of a base model a smaller one has kept, and how tensors are cut to them."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Self

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd
from torch.nn.modules.instancenorm import _InstanceNorm

from sparsetrain.export.attention import attentions
from sparsetrain.masks import take

Kept = Mapping[str, Mapping[int, tuple[int, ...]]]
"""Tensor name -> dimension -> the places kept along it; what is not named is kept whole."""

_ATTRIBUTE = "shrunk_architecture"


@dataclass(frozen=True)
class Architecture:
    """What is left of a base model.

    Args:
        shapes: of the base model's tensors, by their names in its state dict.
        kept: what is left of them.
        biases: layers that got a bias that they do not have in the base model.
        blocks: modules in whose place is an identity.
    """

    shapes: Mapping[str, tuple[int, ...]]
    kept: Kept = field(default_factory=dict)
    biases: tuple[str, ...] = ()
    blocks: tuple[str, ...] = ()

    @classmethod
    def of(cls, model: nn.Module) -> Self:
        """That of a model made by `shrink` or `load_shrunk`; any other one is a base model."""
        noted = getattr(model, _ATTRIBUTE, None)
        return noted if isinstance(noted, cls) else cls(base_shapes(model))

    def then(self, kept: Kept, biases: Iterable[str], blocks: Iterable[str] = ()) -> Self:
        """The architecture after another cut, whose places count what is left by this one."""
        removed = outermost((*self.blocks, *blocks))
        merged = {name: dict(dims) for name, dims in self.kept.items()}
        for name, dims in kept.items():
            for dim, places in dims.items():
                before = merged.setdefault(name, {}).get(dim)
                merged[name][dim] = places if before is None else tuple(before[place] for place in places)
        left = {name: dims for name, dims in merged.items() if not is_inside(name, removed)}
        added = tuple(name for name in (*self.biases, *biases) if not is_inside(f"{name}.bias", removed))
        return type(self)(self.shapes, left, added, removed)

    def apply_(self, model: nn.Module) -> None:
        """Bring a base model to this architecture, in place; its tensors keep their values in what is left."""
        note_cut(model, self.kept, self.biases, self.blocks)
        remove_(model, self.blocks)
        add_biases_(model, self.biases)
        cut_(model, self.kept)

    def state(self) -> dict[str, Any]:
        """All of it in primitives, for JSON and checkpoints."""
        return {
            "shapes": {name: list(shape) for name, shape in self.shapes.items()},
            "kept": {name: {str(dim): list(p) for dim, p in dims.items()} for name, dims in self.kept.items()},
            "biases": list(self.biases),
            "blocks": list(self.blocks),
        }

    @classmethod
    def from_state(cls, state: Mapping[str, Any]) -> Self:
        """The architecture of a `state`."""
        kept = {name: {int(dim): tuple(p) for dim, p in dims.items()} for name, dims in state["kept"].items()}
        shapes = {name: tuple(shape) for name, shape in state["shapes"].items()}
        return cls(shapes, kept, tuple(state["biases"]), tuple(state["blocks"]))

    def shapes_left(self) -> dict[str, tuple[int, ...]]:
        """Tensor name -> shape in the smaller model, without the biases that were added."""
        left = {name: list(shape) for name, shape in self.shapes.items() if not is_inside(name, self.blocks)}
        for name in left.keys() & self.kept.keys():
            for dim, places in self.kept[name].items():
                left[name][dim] = len(places)
        return {name: tuple(shape) for name, shape in left.items()}

    @property
    def is_whole(self) -> bool:
        """Whether nothing was removed."""
        return not (self.kept or self.blocks)

    def note(self, model: nn.Module) -> None:
        """Leave it with `model`, whose state dict and copies are otherwise as those of the base model."""
        setattr(model, _ATTRIBUTE, self)


def note_cut(model: nn.Module, kept: Kept, biases: Iterable[str] = (), blocks: Iterable[str] = ()) -> None:
    """Leave what is about to be cut with `model` and with each of its parts, which may be saved by itself."""
    Architecture.of(model).then(kept, biases, blocks).note(model)
    for name, child in model.named_children():
        prefix = f"{name}."
        inner = {tensor.removeprefix(prefix): dims for tensor, dims in kept.items() if tensor.startswith(prefix)}
        added = [layer.removeprefix(name).removeprefix(".") for layer in biases if is_inside(f"{layer}.bias", [name])]
        removed = [block.removeprefix(prefix) for block in blocks if is_inside(block, [name])]
        if inner or added or removed:
            note_cut(child, inner, added, removed)


def base_shapes(model: nn.Module) -> dict[str, tuple[int, ...]]:
    """Tensor name -> shape, of a whole state dict."""
    return {name: tuple(value.shape) for name, value in model.state_dict().items() if isinstance(value, Tensor)}


def is_inside(name: str, modules: Iterable[str]) -> bool:
    """Whether a module or tensor called `name` belongs to one of `modules`."""
    return any(name.startswith(f"{module}.") for module in modules)


def outermost(modules: Iterable[str]) -> tuple[str, ...]:
    """Those of `modules` that lie in none of the others."""
    names = tuple(modules)
    return tuple(name for name in names if not is_inside(name, names))


def remove_(model: nn.Module, blocks: Iterable[str]) -> None:
    """Put an identity in the place of each of `blocks`."""
    for name in blocks:
        identity = nn.Identity().train(model.get_submodule(name).training)
        model.set_submodule(name, identity)


def add_biases_(model: nn.Module, layers: Iterable[str]) -> None:
    """Give each of `layers`, linear layers and convolutions without one, a bias of zeros."""
    for name in layers:
        layer = model.get_submodule(name)
        weight = layer.get_parameter("weight")
        zeros = weight.new_zeros(weight.shape[out_dim(layer)])
        layer.register_parameter("bias", nn.Parameter(zeros, requires_grad=weight.requires_grad))


def out_dim(layer: nn.Module) -> int:
    """The dimension of the weight of a linear layer or convolution along which its output channels lie."""
    return int(isinstance(layer, _ConvNd) and layer.transposed)


def cut_(model: nn.Module, kept: Kept) -> None:
    """Keep only the named places of tensors, in place, and tell the layers their new sizes."""
    heads = [attention for _, attention in attentions(model)]
    owners = set()
    for name, dims in kept.items():
        path, _, attribute = name.rpartition(".")
        owner = model.get_submodule(path)
        tensor = getattr(owner, attribute)
        small = take(tensor.detach(), dims)
        if isinstance(tensor, nn.Parameter):
            small = nn.Parameter(small, requires_grad=tensor.requires_grad)
        setattr(owner, attribute, small)
        owners.add(owner)
    for owner in owners:
        _refit(owner)
    for attention in heads:
        if attention.qkv in owners:
            attention.refit()


def _refit(layer: nn.Module) -> None:
    """Set the sizes that `layer` keeps beside its tensors."""
    if isinstance(layer, nn.Linear):
        layer.out_features, layer.in_features = layer.weight.shape
    elif isinstance(layer, _ConvNd):
        if layer.groups > 1:  # depthwise: others are not cut
            layer.groups = layer.in_channels = layer.out_channels = layer.weight.shape[0]
        else:
            layer.out_channels, layer.in_channels = layer.weight.shape[:2]
            if layer.transposed:
                layer.out_channels, layer.in_channels = layer.in_channels, layer.out_channels
    elif isinstance(layer, _BatchNorm | _InstanceNorm):
        sized = layer.weight if layer.weight is not None else layer.running_mean
        if sized is not None:
            layer.num_features = len(sized)
    elif isinstance(layer, nn.PReLU):
        layer.num_parameters = len(layer.weight)
