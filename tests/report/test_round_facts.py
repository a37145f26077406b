import csv
import dataclasses

import pytest
import torch

from sparsetrain import Global, Magnitude, Pruning, prune
from sparsetrain.models import LeNet300100
from sparsetrain.report import Round, measure, overlap, rounds_table, training_flops, write_rounds_csv
from sparsetrain.report.rounds import _COLUMNS


def random_masks(density, seed, shapes=((300, 200), (100,))):
    generator = torch.Generator().manual_seed(seed)
    return {f"{i}.weight": torch.rand(shape, generator=generator) < density for i, shape in enumerate(shapes)}


def kept(masks):
    return sum(int(mask.sum()) for mask in masks.values())


def test_overlap_is_jaccards_index_of_the_sets_of_kept_weights():
    one, other = random_masks(0.4, 0), random_masks(0.3, 1)
    sets = [{(name, *at) for name, mask in masks.items() for at in mask.nonzero().tolist()} for masks in (one, other)]
    assert overlap(one, other) == overlap(other, one) == len(sets[0] & sets[1]) / len(sets[0] | sets[1])


def test_overlap_of_nested_masks_is_the_quotient_of_what_they_keep():
    network = LeNet300100(input_shape=(1, 8, 8))
    pruning = Pruning(criterion=Magnitude(), allocation=Global())
    before = prune(network, 0.36, pruning)
    after = prune(network, 0.488, pruning)
    assert overlap(before, after) == kept(after) / kept(before) == pytest.approx(0.8, abs=1e-4)


@pytest.mark.parametrize(("a", "b"), [(0.2, 0.2), (0.5, 0.1)])
def test_overlap_of_independent_masks_is_near_its_expectation(a, b):
    expected = a * b / (a + b - a * b)
    assert overlap(random_masks(a, 2), random_masks(b, 3)) == pytest.approx(expected, abs=0.01)


def test_overlap_is_1_for_equal_masks_and_0_for_disjoint_ones():
    masks = random_masks(0.3, 0)
    nothing = {name: torch.zeros_like(mask) for name, mask in masks.items()}
    assert overlap(masks, masks) == overlap(nothing, nothing) == 1
    assert overlap(masks, nothing) == overlap(masks, {name: ~mask for name, mask in masks.items()}) == 0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda masks: masks | {"2.weight": torch.ones(3).bool()}, r"\['2.weight'\].*same selection"),
        (lambda masks: {"0.weight": masks["0.weight"]}, r"\['1.weight'\]"),
        (lambda masks: masks | {"1.weight": torch.ones(99).bool()}, r"'1.weight'.*\(100,\) and \(99,\)"),
        (lambda masks: masks | {"1.weight": torch.ones(100)}, r"'1.weight' is torch.float32. Use `mask != 0`"),
    ],
)
def test_masks_that_cannot_be_compared_are_refused(change, message):
    masks = random_masks(0.5, 0)
    with pytest.raises(ValueError, match=message):
        overlap(masks, change(masks))


def test_no_masks_are_refused():
    with pytest.raises(ValueError, match="no masks to compare"):
        overlap({}, {})


def test_training_takes_the_matrix_products_of_three_forward_passes():
    # Of one hidden layer, by torch's own count of a forward and a backward pass with a gradient of the input.
    from torch.utils.flop_counter import FlopCounterMode

    network = torch.nn.Sequential(torch.nn.Linear(12, 7), torch.nn.ReLU(), torch.nn.Linear(7, 3))
    examples = torch.randn(5, 12, requires_grad=True)
    with FlopCounterMode(display=False) as counter:
        network(examples).sum().backward()
    forward = measure(network, {}, examples.detach()).dense_flops
    assert training_flops(forward, 5) == counter.get_total_flops() == 3 * 5 * 2 * (12 * 7 + 7 * 3)


ROUNDS = (
    Round(0, 0, 400, 20.0, 51_200, 1_000, 1_000, None, 2_000, 2_000, {"val/accuracy": 0.9375, "val/loss": 0.25}),
    Round(1, 400, 380, 39.0, 48_640, 800, 1_000, 0.8, 2_000, 1_700, {"val/accuracy": 1 / 3, "test/accuracy": 0.9}),
    Round(2, 780, 380, 58.0, 48_640, 640, 1_000, 0.8, 2_000, 1_500, {}),
)


def read(path):
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def test_a_round_knows_its_sparsity_and_what_training_it_takes():
    _, one, two = ROUNDS
    assert (one.sparsity, two.sparsity) == (0.2, 0.36)
    assert one.dense_training_flops == 3 * 2_000 * 48_640
    assert one.theoretical_training_flops == 3 * 1_700 * 48_640
    uncounted = dataclasses.replace(one, dense_flops=None, theoretical_flops=None)
    assert (uncounted.dense_training_flops, uncounted.theoretical_training_flops) == (None, None)


def test_the_csv_has_one_row_per_round_in_full_precision(tmp_path):
    path = tmp_path / "new" / "rounds.csv"
    write_rounds_csv(path, ROUNDS)
    rows = read(path)
    assert list(rows[0]) == [*_COLUMNS, "test/accuracy", "val/accuracy", "val/loss"]
    for row, given in zip(rows, ROUNDS, strict=True):
        assert int(row["round"]) == given.number
        for name in _COLUMNS[1:]:
            value = getattr(given, name)
            assert row[name] == "" if value is None else type(value)(row[name]) == value
        assert {n: float(row[n]) for n in list(row)[len(_COLUMNS) :] if row[n]} == given.metrics


def test_the_csv_is_replaced_and_its_first_columns_stay_whatever_is_known(tmp_path):
    path = tmp_path / "rounds.csv"
    write_rounds_csv(path, ROUNDS)
    write_rounds_csv(str(path), [])
    assert path.read_text() == ",".join(_COLUMNS) + "\n"


def test_the_table_is_in_percent_thousands_and_one_unit():
    header, _, zero, one, two = (line.strip("| ").split(" | ") for line in rounds_table(ROUNDS).splitlines())
    assert header == [
        "round",
        "first step",
        "steps",
        "epochs seen",
        "sparsity",
        "weights kept",
        "overlap",
        "dense training MFLOPs",
        "theoretical training MFLOPs",
        "test/accuracy",
        "val/accuracy",
        "val/loss",
    ]
    assert zero == ["0", "0", "400", "20", "0.00%", "1,000", "", "307.200", "307.200", "", "93.75%", "0.25"]
    assert one[:9] == ["1", "400", "380", "39", "20.00%", "800", "80.00%", "291.840", "248.064"]
    assert one[9:11] == ["90.00%", "33.33%"]
    assert two[7:9] == ["291.840", "218.880"]


def test_the_table_shows_flops_only_when_they_were_counted():
    plain = [dataclasses.replace(row, dense_flops=None, theoretical_flops=None) for row in ROUNDS]
    assert "FLOPs" not in rounds_table(plain)
    large = dataclasses.replace(ROUNDS[0], dense_flops=8 * 10**9, examples=90 * 1_281_167)
    assert "EFLOPs | theoretical training EFLOPs" in rounds_table([large])
    assert "| 2.767 |" in rounds_table([large])
    assert rounds_table([]).startswith("| round |")


@pytest.mark.parametrize("numbers", [(1, 0), (0, 1, 1)])
@pytest.mark.parametrize("write", [rounds_table, lambda rounds: write_rounds_csv("never/written.csv", rounds)])
def test_rounds_that_come_twice_or_out_of_order_are_refused(write, numbers):
    with pytest.raises(ValueError, match="ascending order"):
        write([dataclasses.replace(ROUNDS[0], number=number) for number in numbers])


def test_a_metric_with_the_name_of_a_column_is_refused():
    with pytest.raises(ValueError, match=r"\['sparsity'\].*'val/sparsity'"):
        rounds_table([dataclasses.replace(ROUNDS[0], metrics={"sparsity": 0.5, "val/loss": 1.0})])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"steps": -1}, "`steps`.*at least 0; it is -1"),
        ({"kept": 1_001}, "Round 1 keeps 1,001 of 1,000"),
        ({"overlap": 1.5}, r"\[0, 1\]; that of round 1 is 1.5"),
        ({"overlap": float("nan")}, "is nan"),
    ],
)
def test_counts_that_cannot_be_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(ROUNDS[1], **change)
