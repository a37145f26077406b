"""One mask that is N:M in both directions: the best one for every m x m tile, by enumeration."""

from functools import cache
from itertools import combinations, product

import torch
from torch import Tensor

_TILES = 1 << 14  # scored at a time: with 90 patterns about 12 MB
_LARGEST = 1e300  # stands for infinity and NaN, so that sums stay finite


def best_tiles(score: Tensor, n: int, m: int) -> Tensor:
    """The mask with `n` of `m` in every row and column of every m x m tile that keeps the largest sum of scores.

    Sums are float64 in one fixed order (a row from left to right, then the rows from top to bottom), so every device
    finds the same mask; among equal sums the pattern that comes first in `tile_patterns` wins.

    Args:
        score: [out, in, ...], out and in divisible by m; larger = keep. NaN counts as the largest.
        n: kept in each row and column of a tile.
        m: size of a tile, at most 5: 2:4 has 90 patterns, 2:5 has 2040, and 4:8 would have 10^11.

    Returns:
        Bool mask of the score's shape; tiles lie at fixed places of the dimensions after the first two.
    """
    choices, patterns = (table.to(score.device) for table in tile_patterns(n, m))
    out, inner, *rest = score.shape
    values = torch.nan_to_num(score.detach().double(), nan=_LARGEST, posinf=_LARGEST, neginf=-_LARGEST)
    # [out/m, m, in/m, m, rest] -> [tiles, m rows, m columns]
    tiles = values.reshape(out // m, m, inner // m, m, -1).permute(0, 2, 4, 1, 3).reshape(-1, m, m)
    best = torch.cat([patterns[_best_pattern(part, choices, n)] for part in torch.split(tiles, _TILES)])
    mask = best.view(out // m, inner // m, -1, m, m).permute(0, 3, 1, 4, 2).reshape(out, inner, *rest)
    return torch.empty_like(score, dtype=torch.bool).copy_(mask)


@cache
def tile_patterns(n: int, m: int) -> tuple[Tensor, Tensor]:
    """Every m x m tile with n True in each row and column, in lexicographic order of the places kept in its rows.

    Returns:
        For each pattern and row, the index of the row among `combinations(range(m), n)`, [patterns, m]; and the
        patterns, bool [patterns, m, m].
    """
    rows = list(combinations(range(m), n))
    one_hot = torch.zeros(len(rows), m, dtype=torch.bool)
    for index, places in enumerate(rows):
        one_hot[index, list(places)] = True
    found = [chosen for chosen in product(range(len(rows)), repeat=m) if _columns_hold(chosen, rows, n, m)]
    choices = torch.tensor(found)
    return choices, one_hot[choices]


def _columns_hold(chosen: tuple[int, ...], rows: list[tuple[int, ...]], n: int, m: int) -> bool:
    counts = [0] * m
    for index in chosen:
        for place in rows[index]:
            counts[place] += 1
    return all(count == n for count in counts)


def _best_pattern(tiles: Tensor, choices: Tensor, n: int) -> Tensor:
    """The index of the best pattern for each tile; tiles: [t, m, m], choices: [patterns, m]."""
    m = tiles.shape[1]
    places = torch.tensor(list(combinations(range(m), n)), device=tiles.device)
    rows = tiles[:, :, places[:, 0]]
    for k in range(1, n):
        rows = rows + tiles[:, :, places[:, k]]  # [t, m, choices of a row]
    sums = rows[:, 0, choices[:, 0]]
    for row in range(1, m):
        sums = sums + rows[:, row, choices[:, row]]  # [t, patterns]
    return sums.argmax(1)  # the first of equal ones
