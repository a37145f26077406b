import csv

import pytest
import torch

from sparsetrain.masks import Update
from sparsetrain.models import LeNet300100
from sparsetrain.report import markdown_table, measure, plan_table, report_table, write_between, write_sparsity_csv
from sparsetrain.selection import PlanRow

PLAN = (
    PlanRow("fc1.weight", (30, 40), True, "pruned"),
    PlanRow("fc1.bias", (30,), False, "bias"),
    PlanRow("fc2.weight", (10, 30), True, "pruned"),
    PlanRow("head.weight", (2, 10), False, "excluded by 'head.*'"),
)


def test_the_plan_names_every_parameter_its_shape_and_the_reason_for_leaving_it():
    lines = plan_table(PLAN).splitlines()
    cells = [line.split(maxsplit=3) for line in lines[2:-1]]
    assert cells == [
        ["fc1.weight", "30x40", "1,200", "yes"],
        ["fc1.bias", "30", "30", "no: bias"],
        ["fc2.weight", "10x30", "300", "yes"],
        ["head.weight", "2x10", "20", "no: excluded by 'head.*'"],
    ]
    assert lines[-1] == "2 of 4 parameters are pruned: 1,500 of 1,550 weights (96.8%)."


def test_columns_line_up():
    lines = plan_table(PLAN).splitlines()
    end_of_shape = lines[0].index("shape") + len("shape")
    assert all(line[end_of_shape - 1] != " " and line[end_of_shape] == " " for line in lines[:-1])


def report(example=None):
    network = LeNet300100(input_shape=(1, 8, 8))
    masks = {"fc2.weight": torch.zeros(100, 300, dtype=torch.bool)}
    masks["fc2.weight"][:25] = True
    return measure(network, masks, example), network


def test_the_report_gives_sparsity_over_masked_and_over_all_parameters():
    measured, network = report()
    parameters = sum(p.numel() for p in network.parameters())
    header, _, layer, masked, everything, warning = report_table(measured).splitlines()
    assert header.split() == ["tensor", "shape", "weights", "kept", "sparsity"]
    assert layer.split() == ["fc2.weight", "100x300", "30,000", "7,500", "75.00%"]
    assert masked.split() == ["all", "with", "a", "mask", "30,000", "7,500", "75.00%"]
    assert everything.split()[2:] == [f"{parameters:,}", f"{parameters - 22_500:,}", f"{22_500 / parameters:.2%}"]
    assert warning == "22,500 masked weights are not 0."


def test_flops_are_shown_only_when_they_were_counted():
    measured, _ = report(torch.zeros(1, 1, 8, 8))
    lines = report_table(measured).splitlines()
    assert lines[2].split()[-2:] == ["0.060", "0.015"]
    assert lines[4].split()[-2:] == [f"{2 * (64 * 300 + 30_000 + 1_000) / 1e6:.3f}", "0.055"]
    assert "FLOP" not in report_table(report()[0])


def test_a_markdown_cell_may_hold_a_bar():
    assert markdown_table(("a", "b"), [("x|y", 0.5), (None, "")]).splitlines() == [
        "| a | b |",
        "| --- | --- |",
        "| x\\|y | 0.5 |",
        "| None |  |",
    ]


def test_a_markdown_row_of_another_length_is_refused():
    with pytest.raises(ValueError, match=r"2 columns.*\('x',\) has 1"):
        markdown_table(("a", "b"), [("x",)])


def test_the_csv_has_one_row_per_update_and_pruned_tensor(tmp_path):
    none = {"fc1.weight": 0, "fc2.weight": 0}
    history = [
        Update(10, 0.25, {"fc1.weight": 900, "fc2.weight": 225}, {"fc1.weight": 300, "fc2.weight": 75}, none),
        Update(
            20,
            0.5,
            {"fc1.weight": 600, "fc2.weight": 150},
            {"fc1.weight": 310, "fc2.weight": 75},
            none | {"fc1.weight": 10},
        ),
    ]
    path = tmp_path / "new" / "sparsity.csv"
    write_sparsity_csv(path, PLAN, history)
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0]) == ["step", "layer", "shape", "numel", "kept", "target", "actual", "dropped", "grown"]
    assert [(row["step"], row["layer"]) for row in rows] == [
        (step, layer) for step in ("10", "20") for layer in ("fc1.weight", "fc2.weight")
    ]
    assert list(rows[2].values()) == ["20", "fc1.weight", "30x40", "1200", "600", "0.5", "0.5", "310", "10"]
    for row in rows:
        assert float(row["actual"]) == 1 - int(row["kept"]) / int(row["numel"])


def test_a_run_without_updates_leaves_a_header_only(tmp_path):
    path = tmp_path / "sparsity.csv"
    path.write_text("an older run\n")
    write_sparsity_csv(str(path), PLAN, [])
    assert path.read_text() == "step,layer,shape,numel,kept,target,actual,dropped,grown\n"


def test_what_stands_between_the_markers_of_a_name_is_replaced_and_a_missing_marker_is_an_error(tmp_path):
    readme = tmp_path / "README.md"
    readme.write_text("x\n<!-- a:begin -->\nold\n<!-- a:end -->\ny\n<!-- b:begin -->\n")
    write_between(readme, "a", "new\nlines")
    written = "x\n<!-- a:begin -->\nnew\nlines\n<!-- a:end -->\ny\n<!-- b:begin -->\n"
    assert readme.read_text() == written
    for name in ("b", "c"):
        with pytest.raises(ValueError, match=f"has no <!-- {name}:begin -->.*Add both lines"):
            write_between(readme, name, "new")
    assert readme.read_text() == written
