import pytest
import torch
from mask_network import bound
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from sparsetrain.criteria import Magnitude, Random
from sparsetrain.masks import Pruning


class PeakBytes(TorchDispatchMode):
    """Most bytes that were alive at once in storages made under this mode, seen after each operation."""

    def __init__(self) -> None:
        super().__init__()
        self.alive: dict[int, tuple[StorageWeakRef, int]] = {}
        self.peak = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        given = {t.untyped_storage()._cdata for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)}
        result = func(*args, **(kwargs or {}))
        self.alive = {key: held for key, held in self.alive.items() if not held[0].expired()}
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor) and tensor.untyped_storage()._cdata not in given:
                storage = tensor.untyped_storage()
                self.alive[storage._cdata] = (StorageWeakRef(storage), storage.nbytes())
        self.peak = max(self.peak, sum(size for _, size in self.alive.values()))
        return result


def test_the_peak_is_measured_right():
    with PeakBytes() as memory:
        kept = torch.zeros(1000)
        for _ in range(5):
            torch.ones(2000) + 1
        kept.add_(1)
    assert memory.peak == 4 * (1000 + 2000 + 2000)


@pytest.mark.parametrize("criterion", [Magnitude(), Random()], ids=repr)
def test_an_update_of_four_million_weights_takes_little_memory(criterion):
    torch.manual_seed(0)
    module = nn.ModuleList([nn.Linear(512, 512, bias=False) for _ in range(16)])
    masks = bound(module, Pruning(criterion=criterion))
    for sparsity in (0.5, 0.9):
        with PeakBytes() as memory:
            masks.update(sparsity)
        assert memory.peak / masks.total <= 1.3
