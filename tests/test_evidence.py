"""What a study claims is checked against its records: shown, refuted, or neither."""

import importlib
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from sparsetrain.models import resnet20
from sparsetrain.report import cost

MADE = {  # with what a run was made
    "date": "2026-01-01",
    "device": {"type": "cpu", "name": "a CPU", "threads": 1},
    "git": None,
    "versions": {"torch": "2"},
}


@pytest.fixture
def evidence(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(Path(__file__).parent.parent / "experiments")
    return importlib.import_module("evidence")


def found(*accuracies: float, of_control: float = 0.5) -> dict[str, list[dict[str, Any]]]:
    arm = [{"seed": seed, "test_accuracy": accuracy} for seed, accuracy in enumerate(accuracies)]
    return {"a": arm, "b": [{"seed": seed, "test_accuracy": of_control} for seed in range(len(accuracies))]}


# Student's quantile at 97.5 % with one degree of freedom is 12.706: two values that are 0.2 points apart have an
# interval of +- 1.27 points about their mean.
@pytest.mark.parametrize(
    ("accuracies", "points", "of", "holds"),
    [
        ((0.52, 0.522), 0.0, "lower end", "yes"),
        ((0.52, 0.522), 1.0, "lower end", "not shown"),
        ((0.52, 0.522), 4.0, "lower end", "no"),
        ((0.49, 0.492), -1.0, "mean", "yes"),
        ((0.49, 0.492), -0.5, "mean", "no"),
    ],
)
def test_one_is_above_the_other(evidence, accuracies, points, of, holds):
    line = evidence.Above("a", "b", points, of=of).check(found(*accuracies))
    assert (line.holds, line.seeds, line.words) == (holds, 2, "a, less b")


@pytest.mark.parametrize(
    ("accuracies", "holds"),
    [((0.499, 0.501), "yes"), ((0.51, 0.512), "not shown"), ((0.55, 0.552), "no"), ((0.45, 0.452), "no")],
)
def test_both_are_alike(evidence, accuracies, holds):
    assert evidence.Alike("a", "b", 2.0).check(found(*accuracies)).holds == holds


def test_runs_are_made_stage_by_stage_and_in_each_seed_by_seed(evidence):
    study = evidence.Study("x/y", "", "", (), dict.fromkeys("abc", ()), "a", (), seeds=(1, 2))
    assert study.jobs == [("a", 1), ("b", 1), ("c", 1), ("a", 2), ("b", 2), ("c", 2)]
    staged = replace(study, stages=("ab", "c"), seeds_of={"a": (1, 2, 3)})
    assert staged.jobs == [("a", 1), ("b", 1), ("a", 2), ("b", 2), ("a", 3), ("c", 1), ("c", 2)]


def test_a_study_is_named_beside_its_first_claim(evidence):
    class Recorded(evidence.Study):
        @property
        def results(self) -> dict[str, Any]:
            return {"runs": [run | MADE | {"arm": arm} for arm, runs in found(0.52, 0.522).items() for run in runs]}

    claims = (evidence.Above("a", "b"), evidence.Alike("a", "b", 4.0))
    study = Recorded("x/y", "the task", "Why?", (), dict.fromkeys("ab"), "b", claims, "so (they)")
    _, _, first, second = evidence.all_claims([study]).splitlines()
    ours = "a, less b | 52.10 +- 0.14, 50.00 +- 0.00 | +2.10 [+0.83, +3.37] | 2"
    made = "`python experiments/run.py x/y` | a CPU | 2026-01-01 | none"
    assert first == f"| [Why?](x/README.md) | the task | so (they) | {ours} | lower end > 0 | yes | {made} |"
    assert second == f"|  |  |  | {ours} | within 4 of 0 | yes |  |  |  |  |"


def test_a_published_figure_is_reached_within_twice_the_standard_error_and_at_least_four_tenths(evidence):
    claim = evidence.Reaches("a", 91.71, 0.23, 3)
    assert claim.check(found(0.921, 0.921)).holds == "yes"
    assert claim.check(found(0.9212, 0.9212)).holds == "no"
    # Here 2 sqrt(1 / 2 + 0.23^2 / 3) = 1.44 points.
    spread = 0.005 * 2**0.5
    assert claim.check(found(0.9314 + spread, 0.9314 - spread)).holds == "yes"
    assert claim.check(found(0.9316 + spread, 0.9316 - spread)).holds == "no"
    # The margin of these is 1.05 points; their mean is 1.18 from the published accuracy, their median 0.68.
    of_three = found(0.9238, 0.9239, 0.939)
    assert claim.check(of_three).holds == "no"
    assert evidence.Reaches("a", 91.71, 0.23, 3, of="median").check(of_three).holds == "yes"


def test_nothing_is_said_before_two_seeds_have_both_arms(evidence):
    records = found(0.5, 0.6)
    records["b"][0]["seed"] = 7
    for claim in (evidence.Above("a", "b"), evidence.Alike("a", "b", 1.0), evidence.Above("a", "c")):
        assert claim.check(records) is None
    assert evidence.Reaches("c", 90.0, 0.1, 3).check(records) is None


def test_narrower_networks_are_compared_at_the_flops_of_the_gated_ones(evidence):
    gates_accuracy = importlib.import_module("polarization.gates_accuracy")

    def of(flops: int, *accuracies: float) -> list[dict[str, Any]]:
        return [{"seed": seed, "flops": flops, "test_accuracy": one} for seed, one in enumerate(accuracies)]

    widths = [of(80, 0.8, 0.82), of(60, 0.6), of(20, 0.2, 0.3)]
    at_70 = gates_accuracy.at_flops(widths, of(100, 0.9), 0.7)
    assert [(one["seed"], one["flops"]) for one in at_70] == [(0, 70.0)]
    assert at_70[0]["test_accuracy"] == pytest.approx(0.7)
    at_30 = gates_accuracy.at_flops([widths[0], widths[2]], of(100, 0.9), 0.3)
    assert [one["test_accuracy"] for one in at_30] == [pytest.approx(0.3), pytest.approx(0.3 + 0.52 / 6)]
    assert gates_accuracy.at_flops(widths, of(100, 0.9), 0.9) == []


@pytest.fixture
def rewinding(evidence) -> Any:
    return importlib.import_module("rewinding.rewinding")


def test_retraining_is_compared_at_the_end_of_each_round(rewinding):
    study = next(one for one in rewinding.STUDIES if one.key == "full")

    def of(arm: str, *accuracies: float) -> list[dict[str, Any]]:
        def rounds(last: float) -> list[dict[str, float]]:
            sparsities = [1 - 0.8**number for number in range(11)]
            return [{"sparsity": one, "test_accuracy": last + (1 - one) / 100} for one in sparsities]

        return [
            {"arm": arm, "seed": seed, "sparsity": 0.0, "test_accuracy": one, "rounds": rounds(one)}
            for seed, one in enumerate(accuracies, 1)
        ]

    runs = [*of("dense", 0.91, 0.92), *of("LR rewinding", 0.905, 0.907), *of("fine-tuning", 0.85, 0.95)]
    for run in runs[:2]:
        run["rounds"] = []
    results = {"runs": [run | MADE for run in runs]}
    found = study.networks(results)
    assert sorted(name for name in found if name.endswith("10.7%")) == ["LR rewinding, 10.7%", "fine-tuning, 10.7%"]
    assert len(found) == 1 + 2 * 10
    row = next(line for line in study.table(results).splitlines() if line.startswith("| 21.0%"))
    assert row == "| 21.0% | 90.81% +- 0.14% |  | 90.21% +- 7.07% |  | 2 |"
    held = {line.words: line.holds for line in study.lines(results)}
    assert held["median of LR rewinding, 10.7%, in per cent"] == "yes"
    assert held["LR rewinding, 10.7%, less fine-tuning, 10.7%"] == "not shown"


def test_published_medians_are_of_ten_densities_and_four_ways(rewinding):
    rows = rewinding.published()
    assert {row["retraining"] for row in rows} == set(rewinding.ROUNDS)
    assert len(rows) == 40
    assert all(row["lowest"] <= row["median"] <= row["highest"] for row in rows)
    assert len(rewinding.reached((0.21, 0.107))) == 8


def test_an_arm_is_best_for_its_cost_if_none_as_dense_is_better_and_cheaper(evidence, tmp_path):
    pareto = importlib.import_module("pareto")

    def of(arm: str, sparsity: float, flops: int, *accuracies: float) -> list[dict[str, Any]]:
        run = {"arm": arm, "sparsity": sparsity, "training_flops": flops} | MADE
        return [run | {"seed": seed, "test_accuracy": one} for seed, one in enumerate(accuracies)]

    runs = [
        *of("dense", 0.0, 200, 0.80, 0.82),
        *of("half", 0.5, 200, 0.80, 0.82),
        *of("cheap", 0.9, 200, 0.70, 0.72),
        *of("dear", 0.893, 400, 0.60, 0.62),
        *of("long", 0.9, 400, 0.74, 0.76),
    ]

    class Recorded(evidence.Study):
        @property
        def results(self) -> dict[str, Any]:
            return {"runs": runs}

    arms = dict.fromkeys(run["arm"] for run in runs)
    study = Recorded("a/b", title="", question="", recipe=(), arms=arms, control="dense", claims=())
    found = pareto.points([study], 100)
    assert [(one.arm, one.epochs) for one in found] == [("cheap", 2), ("dense", 2), ("dear", 4), ("long", 4)]
    assert [one.arm for one in found if pareto.beaten(one, found)] == ["dear"]
    pareto.draw(tmp_path / "x.png", found)
    assert (tmp_path / "x.png").read_bytes().startswith(b"\x89PNG")


def test_a_study_draws_the_differences_of_seeds_that_both_arms_have(evidence, monkeypatch, tmp_path):
    accuracies = {"dense": {1: 0.5, 2: 0.6, 3: 0.7}, "a": {2: 0.5, 3: 0.72, 4: 0.9}, "b": {3: 0.7, 4: 0.7}}
    runs = [
        {"arm": arm, "seed": seed, "test_accuracy": accuracy}
        for arm, every in accuracies.items()
        for seed, accuracy in every.items()
    ]
    arms = {"dense": (), "a": (), "b": ()}
    study = evidence.Study("a/b", title="", question="", recipe=(), arms=arms, control="dense", claims=())
    drawn = []
    with monkeypatch.context() as patch:
        patch.setattr(evidence.forest, "draw", lambda path, differences, control: drawn.append((differences, control)))
        study.draw({"runs": runs}, tmp_path / "x.png")
    assert drawn == [({"a": pytest.approx([-10.0, 2.0])}, "dense")]  # of b one seed only
    study.draw({"runs": runs}, tmp_path / "x.png")
    assert (tmp_path / "x.png").read_bytes().startswith(b"\x89PNG")


def test_a_soup_counts_the_network_that_it_began_with(evidence):
    soup = importlib.import_module("soup.accuracy").STUDIES[0]
    found = {"dense": [{"seed": 2, "arm": "dense", "training_flops": 30}]}
    assert soup.training_flops({"seed": 2, "arm": "soup of 3", "training_flops": 45}, found) == 75
    assert soup.training_flops(found["dense"][0], found) == 30


def test_flops_of_an_epoch_are_those_of_the_small_network(evidence):
    flops = sum(cost(resnet20(width=8), torch.zeros(1, 3, 8, 8)).values())
    assert 3 * 45_000 * flops == importlib.import_module("run").FLOPS_OF_EPOCH
