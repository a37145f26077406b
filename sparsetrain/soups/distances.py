"""How far the members of a soup are from each other."""

from collections.abc import Sequence

import torch
from torch import Tensor

from sparsetrain.soups.members import STATISTICS, Member, common_kinds, opened, parts


def distances(members: Sequence[Member]) -> Tensor:
    """The Euclidean distance of each member to each other one, over all floating tensors but batch norm's statistics.

    Args:
        members: see `uniform`.

    Returns:
        float64 [members, members]; symmetric, with zeros on the diagonal.

    Raises:
        ValueError: as `uniform`.
    """
    with opened(members) as sources:
        squares = torch.zeros(len(sources), len(sources), dtype=torch.float64)
        for name, (shape, dtype) in common_kinds(sources).items():
            if not (dtype.is_floating_point or dtype.is_complex) or name.rpartition(".")[2] in STATISTICS:
                continue
            for part in parts(shape.numel()):
                read = (source.read(name, part) for source in sources)
                pieces = [(torch.view_as_real(x) if dtype.is_complex else x).to(torch.float64, copy=True) for x in read]
                for i, one in enumerate(pieces):
                    for j, other in enumerate(pieces[:i]):
                        # Where both are the same infinity, their difference is NaN.
                        squares[i, j] += (one - other).masked_fill_(one == other, 0).square().sum()
    return (squares + squares.T).sqrt()
