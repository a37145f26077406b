import math
from collections.abc import Mapping

import pytest
import torch
from torch import Tensor

from sparsetrain.polarization import Consensus, Operation, budget_error, disagreement, expected_cost, mean_gates

OPERATIONS = (
    Operation(12.0, ("a",)),
    Operation(30.0, ("a", "b")),
    Operation(8.0, ("b", "skip")),
    Operation(5.0),
)


def draw(batch: int = 6, seed: int = 0) -> dict[str, Tensor]:
    stream = torch.Generator().manual_seed(seed)
    return {
        name: torch.randn(batch, count, generator=stream, dtype=torch.float64).requires_grad_()
        for name, count in {"a": 3, "b": 5, "skip": 1}.items()
    }


def slow_means(logits: Mapping[str, Tensor]) -> dict[str, list[float]]:
    return {
        name: [sum(1.0 for value in column if value >= 0) / len(column) for column in rows.detach().T.tolist()]
        for name, rows in logits.items()
    }


def slope(logit: float) -> float:
    """The derivative of the sigmoid."""
    return math.exp(-logit) / (1 + math.exp(-logit)) ** 2


def gradients(logits: Mapping[str, Tensor], loss: Tensor) -> dict[str, Tensor]:
    return dict(zip(logits, torch.autograd.grad(loss, tuple(logits.values()), allow_unused=True), strict=True))


def test_disagreement_and_its_gradient_are_those_of_the_formula_with_straight_through_before_the_mean():
    logits = draw()
    means = slow_means(logits)
    every = [g for values in means.values() for g in values]
    loss = disagreement(mean_gates(logits))
    assert loss.item() == pytest.approx(sum(g * (1 - g) for g in every) / len(every))
    found = gradients(logits, loss)
    for name, rows in logits.items():
        expected = [
            [(1 - 2 * g) / len(every) / len(rows) * slope(z) for z, g in zip(row, means[name], strict=True)]
            for row in rows.tolist()
        ]
        torch.testing.assert_close(found[name], torch.tensor(expected, dtype=torch.float64))
    # The wrong orders: a hard gate before the mean has no gradient, one after it sees agreement where there is none.
    assert not torch.cat([(rows >= 0).double().mean(0) for rows in logits.values()]).requires_grad
    late = {name: (torch.sigmoid(rows).mean(0) >= 0.5).double() for name, rows in logits.items()}
    assert float(disagreement(late)) == 0 < loss.item()


def test_descending_the_disagreement_pushes_every_mean_away_from_a_half():
    logits = {name: (0.3 * rows).detach().requires_grad_() for name, rows in draw(batch=9).items()}
    before = mean_gates(logits)
    found = gradients(logits, disagreement(before))
    for name, mean in before.items():
        direction = -found[name].sum(0)
        assert torch.equal(torch.sign(direction), torch.sign(mean - 0.5))
    for _ in range(100):
        steps = gradients(logits, disagreement(mean_gates(logits)))
        logits = {name: (rows - 20 * steps[name]).detach().requires_grad_() for name, rows in logits.items()}
    for name, mean in mean_gates(logits).items():
        assert torch.equal(mean, (before[name] > 0.5).double())


def slow_cost(means: Mapping[str, list[float]]) -> float:
    """Every pair of an input and an output channel by itself, as OPERATIONS describe them."""
    a, b, skip = means["a"], means["b"], means["skip"]
    cost = 5.0 + sum(12.0 / len(a) * g for g in a)
    cost += sum(30.0 / (len(a) * len(b)) * g * h for g in a for h in b)
    return cost + sum(8.0 / len(b) * g * skip[0] for g in b)


def test_the_expected_cost_counts_pairs_of_open_gates_and_the_budget_error_is_the_square_of_what_is_over():
    logits = draw()
    means = slow_means(logits)
    gates = mean_gates(logits)
    assert expected_cost(gates, OPERATIONS).item() == pytest.approx(slow_cost(means))
    loss = budget_error(gates, OPERATIONS, 0.3)
    excess = slow_cost(means) / 55.0 - 0.7
    assert loss.item() == pytest.approx(excess**2)
    found = gradients(logits, loss)
    for name, values in means.items():
        for index, value in enumerate(values):
            up, down = (
                slow_cost(means | {name: [*values[:index], value + by, *values[index + 1 :]]}) for by in (0.5, -0.5)
            )  # the cost is linear in each gate
            for sample, row in enumerate(logits[name].tolist()):
                expected = 2 * excess * (up - down) / 55.0 / len(logits[name]) * slope(row[index])
                assert float(found[name][sample, index]) == pytest.approx(expected)


def test_the_expected_cost_is_the_exact_mean_cost_where_gates_agree_or_do_not_depend_on_one_another():
    a, b = torch.tensor([[1.0, -1.0], [1.0, -1.0]]), torch.tensor([[-1.0, 1.0, 1.0], [1.0, 1.0, -1.0]])
    samples = [float(((x >= 0).double().mean() * (y >= 0).double().mean()) * 6) for x, y in zip(a, b, strict=True)]
    cost = expected_cost(mean_gates({"a": a, "b": b}), [Operation(6.0, ("a", "b"))])
    assert float(cost) == pytest.approx(sum(samples) / 2)


def test_ranks_see_the_mean_over_all_and_their_averaged_gradients_are_those_of_one_process_with_all_samples():
    whole = draw(batch=8)

    def loss(gates: Mapping[str, Tensor]) -> Tensor:
        return disagreement(gates) + 3 * budget_error(gates, OPERATIONS, 0.5)

    expected = gradients(whole, loss(mean_gates(whole)))
    shares = [{name: rows.detach()[rank::2].requires_grad_() for name, rows in whole.items()} for rank in range(2)]
    locals_: list[Tensor] = []
    for share in shares:
        mean_gates(share, mean_over_ranks=lambda mean: locals_.append(mean) or mean)
    together = torch.stack(locals_).mean(0)
    for rank, share in enumerate(shares):
        means = mean_gates(share, mean_over_ranks=lambda mean: together)
        assert all(torch.equal(mean, mean_gates(whole)[name]) for name, mean in means.items())
        found = gradients(share, loss(means))
        for name, gradient in found.items():
            # A weight shared by all samples gets the mean over ranks of the sums over a rank's samples.
            torch.testing.assert_close(gradient / 2, expected[name][rank::2])


def test_means_are_not_rounded_to_the_precision_of_a_step():
    gates = mean_gates({"a": torch.tensor([[1.0]] * 511 + [[-1.0]])})["a"]
    assert gates.dtype == torch.float32
    assert float(gates[0]) == 511 / 512


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda g: budget_error(g, OPERATIONS, 1.0), r"sparsity=1\.0 is the share of the cost to remove"),
        (lambda g: budget_error(g, [Operation(0.0, ("a",))], 0.5), r"The dense network costs 0\.0; it must be above 0"),
        (lambda g: expected_cost(g, [Operation(1.0, ("c",))]), r"depends on the gates 'c'; there are only \['a', 'b'"),
        (lambda g: Consensus().undecided(), r"No batch of gates has been observed\. Call observe"),
        (lambda g: observed({"a": [1.0]}).fill_to_budget(OPERATIONS[:1], 0.0), r"budget=0\.0 is a share of the dense"),
        (
            lambda g: observed({"a": [0.0, 0.0]}).fill_to_budget([Operation(6, ("a",))], 0.4),
            r"budget=0\.4 cannot be met: with all gates closed that may be, 0\.5000 of the cost",
        ),
    ],
)
def test_bad_input_is_refused_with_the_limit(call, message):
    with pytest.raises(ValueError, match=message):
        call(mean_gates(draw()))


def observed(shares: Mapping[str, list[float]], *, samples: int = 20, size: float = 1.0) -> Consensus:
    """A consensus of the given means, from two batches of unequal size."""
    rows = {
        name: torch.tensor(
            [[size if row < round(share * samples) else -size for share in values] for row in range(samples)]
        )
        for name, values in shares.items()
    }
    consensus = Consensus()
    consensus.observe({name: value[:3] for name, value in rows.items()})
    consensus.observe({name: value[3:] for name, value in rows.items()})
    return consensus


def test_means_are_over_all_samples_and_those_strictly_between_the_limits_are_undecided():
    consensus = observed({"a": [0.0, 0.05, 0.1, 0.9], "skip": [0.95]})
    assert consensus.means["a"].tolist() == [0.0, 0.05, 0.1, 0.9]
    assert consensus.undecided() == pytest.approx(2 / 5)


def test_ranks_join_their_sums_so_that_unequal_shares_count_by_their_samples():
    one, other = observed({"a": [0.5, 1.0]}, samples=10), observed({"a": [0.0, 0.5]}, samples=30)
    sent: list[Tensor] = []
    other.sum_over_ranks(lambda total: sent.append(total) or total)
    one.sum_over_ranks(lambda total: total + sent[0])
    assert one.means["a"].tolist() == [5 / 40, 25 / 40]


def slow_fill(shares: Mapping[str, list[float]], budget: float) -> dict[str, list[bool]]:
    """One gate after the other closed, then opened where it fits; the cost is counted anew each time."""
    kept = {name: [True] * len(values) for name, values in shares.items()}
    best = {name: max(range(len(values)), key=lambda i: (values[i], -i)) for name, values in shares.items()}
    order = sorted(
        (value, -place, -index, name)
        for place, (name, values) in enumerate(shares.items())
        for index, value in enumerate(values)
        if len(values) == 1 or index != best[name]
    )

    def cost() -> float:
        return slow_cost({n: [float(k) for k in mask] for n, mask in kept.items()}) / 55.0

    closed = []
    for _, _, index, name in order:
        if cost() <= budget:
            break
        kept[name][-index] = False
        closed.append((name, -index))
    for name, index in reversed(closed):
        kept[name][index] = True
        if cost() > budget:
            kept[name][index] = False
    return kept


@pytest.mark.parametrize("budget", [1.0, 0.8, 0.5, 0.25])
def test_gates_are_closed_from_the_lowest_consensus_until_the_cost_meets_the_budget_and_opened_where_they_fit(budget):
    shares = {"a": [0.95, 0.0, 0.5], "b": [1.0, 0.3, 0.0, 1.0, 0.95], "skip": [0.4]}
    decision = observed(shares).fill_to_budget(OPERATIONS, budget)
    expected = slow_fill(shares, budget)
    assert {name: mask.tolist() for name, mask in decision.open.items()} == expected
    assert decision.cost == pytest.approx(slow_cost({n: [float(k) for k in m] for n, m in expected.items()}) / 55.0)
    assert decision.cost <= budget
    overruled = [
        (value <= 0.05 and kept) or (value >= 0.95 and not kept)
        for name, values in shares.items()
        for value, kept in zip(values, expected[name], strict=True)
    ]
    assert decision.overruled == sum(overruled)
    assert budget != 1.0 or decision.overruled == 2  # two closed gates are left open


def test_a_layer_keeps_one_gate_and_a_block_may_lose_its_only_one():
    consensus = observed({"skip": [0.0], "a": [0.0, 0.0, 0.0]})
    decision = consensus.fill_to_budget([Operation(9.0, ("a",)), Operation(1.0, ("skip",))], 0.3)
    assert decision.open["a"].tolist() == [True, False, False]
    assert decision.open["skip"].tolist() == [False]
    assert decision.cost == pytest.approx(0.3)
    assert decision.overruled == 1


def test_what_was_closed_before_the_last_gate_opens_again_where_it_fits():
    consensus = observed({"a": [0.0] * 3 + [1.0] * 7, "skip": [0.1]})
    decision = consensus.fill_to_budget([Operation(10.0, ("a",)), Operation(10.0, ("skip",))], 0.6)
    assert decision.open["a"].tolist() == [True] * 10
    assert decision.open["skip"].tolist() == [False]
    assert decision.cost == pytest.approx(0.5)  # 0.35 with the three closed


def test_a_budget_is_met_though_one_less_the_sparsity_is_rounded():
    budget = 1 - 0.9
    assert budget < 1 / 10
    decision = observed({"a": [0.5] * 10}).fill_to_budget([Operation(10.0, ("a",))], budget)
    assert decision.open["a"].sum() == 1


def test_among_gates_that_agree_the_less_probable_are_closed_first():
    consensus = Consensus()
    consensus.observe({"a": torch.tensor([[5.0, 0.1, 4.0, 3.0]] * 2)})
    decision = consensus.fill_to_budget([Operation(4.0, ("a",))], 0.5)
    assert decision.open["a"].tolist() == [True, False, True, False]
    assert decision.overruled == 2
