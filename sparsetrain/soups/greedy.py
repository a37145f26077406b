"""The greedy soup: members that harm it stay out."""

import math
from collections.abc import Callable, Sequence

from torch import Tensor

from sparsetrain.soups.mean import uniform
from sparsetrain.soups.members import Member, MemberMasks, common_kinds, common_masks, opened


def greedy(
    members: Sequence[Member],
    masks: Sequence[MemberMasks] | None = None,
    *,
    evaluate: Callable[[dict[str, Tensor]], float],
) -> tuple[dict[str, Tensor], list[int]]:
    """The soup of the members that do not harm it.

    Members are tried in the order of their own metric, best first, equal ones as given; one stays if the metric of the
    soup with it is not below that of the soup without it. So the soup is never worse than the best member, on the data
    of `evaluate`.

    Args:
        members: see `uniform`.
        masks: see `uniform`.
        evaluate: a state dict -> its metric, larger is better. To recalibrate batch norm is its task, alike for every
            state dict that it is given. It should look at validation data, never at test data.

    Returns:
        The soup, not recalibrated, and the positions in `members` of those in it, in the order in which they came.

    Raises:
        ValueError: as `uniform`; a metric that is NaN.

    Source: Wortsman et al. 2022, arXiv:2203.05482, recipe 1.
    """

    def soup_of(chosen: list[int]) -> dict[str, Tensor]:
        return uniform([members[i] for i in chosen], None if masks is None else [masks[i] for i in chosen])

    def metric_of(chosen: list[int]) -> float:
        metric = float(evaluate(soup_of(chosen)))
        if math.isnan(metric):
            raise ValueError(f"The metric of the soup of members {chosen} is NaN. Return a number; larger is better.")
        return metric

    with opened(members) as sources:  # nothing is evaluated in vain
        kinds = common_kinds(sources)
        if masks is not None:
            common_masks(masks, kinds, [source.label for source in sources])
    own = [metric_of([i]) for i in range(len(members))]
    first, *others = sorted(range(len(members)), key=lambda i: -own[i])
    chosen, best = [first], own[first]
    for i in others:
        metric = metric_of([*chosen, i])
        if metric >= best:
            chosen, best = [*chosen, i], metric
    return soup_of(chosen), chosen
