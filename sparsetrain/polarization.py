"""Polarization: what makes gates agree over all inputs and meet a budget, and the static network that they agree on.

Source: Zhi et al. 2023, arXiv:2302.10798: a polarization loss beside the task's, a sparsity that the user sets, one
    static network in the end. Only the abstract was at hand: the formulas here are a reconstruction.
"""

from bisect import bisect_left
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from sparsetrain.gates import binarize

_CLOSED, _OPEN = 0.05, 0.95  # a gate is undecided if its mean lies between


@dataclass(frozen=True)
class Operation:
    """What one operation of the dense network costs, and which gates that depends on.

    Its cost is in proportion to the open gates of each vector named. A convolution between gated inputs and gated
    outputs names both vectors, a depthwise one, whose inputs are its outputs, that one once; all in a gated block name
    the block's gate, too. An operation that reads gated channels beside others counts as two.

    Args:
        cost: FLOPs or parameters of the dense operation, at least 0.
        gates: names of vectors of gates; none: the cost is fixed.
    """

    cost: float
    gates: tuple[str, ...] = ()


def mean_gates(
    logits: Mapping[str, Tensor], *, mean_over_ranks: Callable[[Tensor], Tensor] | None = None
) -> dict[str, Tensor]:
    """The share of the batch for which each gate is open, with a gradient.

    Gates are made binary before the mean is taken, so that each sample's gradient passes straight through its own gate;
    a threshold after the mean would see no sample, and a hard one before it would have no gradient.

    Args:
        logits: by name, shape (batch, count), in at least float32; as `gates.last_logits` gives them.
        mean_over_ranks: the mean of a tensor over all processes, each with as many samples. It needs no gradient: that
            of a term in the local mean is right under DDP, which takes the mean of gradients over ranks.

    Returns:
        By the same names, shape (count,), values in [0, 1], the same on all ranks.
    """
    means = {name: binarize(value).mean(0) for name, value in logits.items()}
    if mean_over_ranks is None or not means:
        return means
    local = torch.cat(list(means.values()))
    overall = mean_over_ranks(local.detach().clone()) + (local - local.detach())
    parts = torch.split(overall, [mean.numel() for mean in means.values()])
    return dict(zip(means, parts, strict=True))


def disagreement(gates: Mapping[str, Tensor]) -> Tensor:
    """mean_i g_i * (1 - g_i) over all gates i of all vectors: 0 if each is the same for all inputs, at most 0.25.

    Its gradient pushes every mean away from 0.5.

    Args:
        gates: means by name, shape (count,), in [0, 1], as `mean_gates` gives them.
    """
    means = torch.cat(list(gates.values()))
    return (means * (1 - means)).mean()


def budget_error(gates: Mapping[str, Tensor], operations: Sequence[Operation], sparsity: float) -> Tensor:
    """(C(g) / C_dense - (1 - sparsity))^2, with C of `expected_cost`.

    The whole loss is: task + a * `disagreement` + b * `budget_error`, with a and b chosen by the caller.

    Args:
        gates: means by name, shape (count,), in [0, 1], as `mean_gates` gives them.
        operations: all of the network's, those without gates too.
        sparsity: the share of the dense cost to remove, in [0, 1).

    Raises:
        ValueError: a sparsity outside its range, no cost, or an operation whose gates are not there.
    """
    if not 0 <= sparsity < 1:
        raise ValueError(f"sparsity={sparsity} is the share of the cost to remove, which lies in [0, 1).")
    return (expected_cost(gates, operations) / _dense_cost(operations) - (1 - sparsity)) ** 2


def expected_cost(gates: Mapping[str, Tensor], operations: Sequence[Operation]) -> Tensor:
    """C(g), the expected cost of one sample, a scalar: the sum over operations of cost * product of mean_i g_i.

    A convolution from I to O channels costs k for each pair of an input and an output, k = cost / (I * O), and needs
    a pair only if both gates are open: k * sum_i sum_j E[g_i h_j]. Taking the gates of two vectors for independent,
    this is k * (sum_i E[g_i]) * (sum_j E[h_j]) = cost * mean_i E[g_i] * mean_j E[h_j]. Where gates depend on the input
    that is an approximation; where they agree over all inputs, it is exact.

    Args:
        gates: means by name, shape (count,), in [0, 1].
        operations: see `Operation`.

    Raises:
        ValueError: an operation names gates that are not there.
    """
    shares = {name: mean.mean() for name, mean in gates.items()}
    total = next(iter(shares.values())).new_zeros(())
    for operation in operations:
        cost: float | Tensor = operation.cost
        for name in operation.gates:
            if name not in shares:
                raise ValueError(f"An operation depends on the gates {name!r}; there are only {sorted(shares)}.")
            cost = cost * shares[name]
        total = total + cost
    return total


@dataclass(frozen=True)
class Decision:
    """The static network that gates were brought to.

    Args:
        open: by name, bool tensor of shape (count,); True = kept.
        cost: its share of the dense cost, in [0, 1].
        overruled: gates that were decided otherwise over the data: open ones that were closed for the budget, and
            closed ones that were left open.
    """

    open: Mapping[str, Tensor]
    cost: float
    overruled: int


class Consensus:
    """For which share of the samples each gate is open, streamed over batches."""

    def __init__(self) -> None:
        self._sums: dict[str, Tensor] = {}  # float64, (2, count): open gates, and their probabilities
        self._samples: dict[str, int] = {}

    @torch.no_grad()
    def observe(self, logits: Mapping[str, Tensor]) -> None:
        """Take in a batch.

        Args:
            logits: by name, shape (batch, count), as `gates.last_logits` gives them; the same names in each batch.
        """
        for name, value in logits.items():
            seen = torch.stack([(value >= 0).double().sum(0), torch.sigmoid(value.double()).sum(0)])
            self._sums[name] = self._sums[name] + seen if name in self._sums else seen
            self._samples[name] = self._samples.get(name, 0) + value.shape[0]

    def sum_over_ranks(self, reduce: Callable[[Tensor], Tensor]) -> None:
        """Join what all processes have observed; each calls it once, when all batches are in.

        Args:
            reduce: the sum of a float64 tensor over all processes.
        """
        for name in self._sums:
            total = reduce(torch.cat([self._sums[name], torch.full_like(self._sums[name][:1], self._samples[name])]))
            self._sums[name], self._samples[name] = total[:2], int(total[2, 0])

    @property
    def means(self) -> dict[str, Tensor]:
        """By name: the share of samples for which each gate is open, float64 of shape (count,)."""
        return {name: sums[0] / self._samples[name] for name, sums in self._sums.items()}

    def undecided(self) -> float:
        """The share of gates, in [0, 1], that are open for more than 5 % and fewer than 95 % of the samples.

        Raises:
            ValueError: nothing was observed.
        """
        means = torch.cat(list(self._observed().values()))
        return float(((means > _CLOSED) & (means < _OPEN)).double().mean())

    def fill_to_budget(self, operations: Sequence[Operation], budget: float) -> Decision:
        """Close gates until the cost is at most the budget, as near to it as it goes.

        Those with the least consensus are closed first. The last one may cost more than was left to remove; so those
        that fit are opened again, those with the most consensus first. Gates of equal mean are ranked by their mean
        probability, then by place: a later one is closed first. The last gate of a vector stays open, for a layer needs
        an output; a vector of one gate is a block, which may be closed.

        Args:
            operations: all of the network's, those without gates too.
            budget: share of the dense cost, in (0, 1].

        Raises:
            ValueError: a budget outside its range or below what is left with all these gates closed; nothing was
                observed; no cost, or an operation whose gates are not there.
        """
        if not 0 < budget <= 1:
            raise ValueError(f"budget={budget} is a share of the dense cost, which lies in (0, 1].")
        means, dense = self._observed(), _dense_cost(operations)
        order = self._closing_order()

        def cost(kept: Mapping[str, Tensor]) -> float:
            return float(expected_cost({name: mask.double() for name, mask in kept.items()}, operations)) / dense

        def after(closed: int) -> dict[str, Tensor]:
            kept = {name: torch.ones_like(mean, dtype=torch.bool) for name, mean in means.items()}
            for name, index in order[:closed]:
                kept[name][index] = False
            return kept

        enough = budget * (1 + 1e-9)  # shares such as 1 - 0.3 are rounded
        closed = bisect_left(range(len(order) + 1), True, key=lambda count: cost(after(count)) <= enough)
        if closed > len(order):
            raise ValueError(
                f"budget={budget} cannot be met: with all gates closed that may be, {cost(after(len(order))):.4f} of "
                "the cost is left. Ask for less sparsity, or gate more layers."
            )
        kept = after(closed)
        full: set[str] = set()  # another gate of the same vector costs as much
        for name, index in reversed(order[:closed]):
            if name not in full:
                kept[name][index] = True
                if cost(kept) > enough:
                    kept[name][index] = False
                    full.add(name)
        overruled = sum(
            int(((kept[name] & (mean <= _CLOSED)) | (~kept[name] & (mean >= _OPEN))).sum())
            for name, mean in means.items()
        )
        return Decision(kept, cost(kept), overruled)

    def _closing_order(self) -> list[tuple[str, int]]:
        """The gates that may be closed, by name and index; the first is closed first."""
        names = list(self._sums)
        order: list[tuple[float, float, int, int]] = []
        for place, name in enumerate(names):
            shares = (self._sums[name] / self._samples[name]).T.tolist()
            ranks = [(mean, probability, -place, -index) for index, (mean, probability) in enumerate(shares)]
            if len(ranks) > 1:
                ranks.remove(max(ranks))
            order += ranks
        return [(names[-place], -index) for _, _, place, index in sorted(order)]

    def _observed(self) -> dict[str, Tensor]:
        if not self._sums:
            raise ValueError("No batch of gates has been observed. Call observe with the logits of each first.")
        return self.means


def _dense_cost(operations: Sequence[Operation]) -> float:
    total = sum(operation.cost for operation in operations)
    if not total > 0:
        raise ValueError(f"The dense network costs {total}; it must be above 0. Give all operations with their costs.")
    return total
