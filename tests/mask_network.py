import torch
from torch import nn

from sparsetrain.masks import Masks, Pruning


def net(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(3, 4, 3).to(memory_format=torch.channels_last), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(7, 5)
    )


NAMES, TOTAL = ["0.weight", "3.weight"], 3 * 4 * 9 + 7 * 5


def bound(module, pruning=Pruning()):
    masks = Masks(pruning)
    masks.bind(module)
    return masks


def jiggle(module, seed=0):
    stream = torch.Generator().manual_seed(seed)
    for parameter in module.parameters():
        parameter.data.add_(torch.randn(parameter.shape, generator=stream), alpha=0.1)


def set_grads(module, seed=0):
    stream = torch.Generator().manual_seed(seed)
    for parameter in module.parameters():
        parameter.grad = torch.randn(parameter.shape, generator=stream).to(
            memory_format=torch.channels_last if parameter.dim() == 4 else torch.contiguous_format
        )


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def copies(masks):
    return {name: mask.clone() for name, mask in masks.items()}
