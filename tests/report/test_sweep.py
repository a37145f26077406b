import csv
import math

import pytest

from sparsetrain.report import Run, collect, sweep_curves, sweep_table, write_sweep_csv

DENSE = {"experiment": "dense"}


def run(folder, overrides, seed, sparsity=0.8, accuracy=0.9, **facts):
    overrides = {"trainer": "cpu", **overrides, "seed": str(seed)}
    return Run(str(folder), overrides, seed, sparsity, {"val/loss": 0.25, "test/accuracy": accuracy}, **facts)


def cells(table):
    """Column -> cell, of each line."""
    header, _, *lines = ([cell.strip() for cell in line.split("|")[1:-1]] for line in table.splitlines())
    return [dict(zip(header, line, strict=True)) for line in lines]


def test_a_line_is_the_mean_and_the_sample_standard_deviation_over_the_seeds_of_one_setting():
    accuracies = [0.91, 0.94, 0.95]
    runs = [run(seed, {"final": "0.8"}, seed, accuracy=accuracy) for seed, accuracy in enumerate(accuracies)]
    sweep = collect([*runs, run(3, {"final": "0.9"}, 0, 0.9)])
    mean = sum(accuracies) / 3
    std = math.sqrt(sum((accuracy - mean) ** 2 for accuracy in accuracies) / 2)
    assert sweep.common == {"trainer": "cpu"}
    assert cells(sweep_table(sweep, "test/accuracy")) == [
        {
            "final": "0.8",
            "seeds": "3",
            "sparsity": "80.00%",
            "test/accuracy": f"{100 * mean:.2f}% +- {100 * std:.2f}%",
            "val/loss": "0.25 +- 0",
        },
        {"final": "0.9", "seeds": "1", "sparsity": "90.00%", "test/accuracy": "90.00%", "val/loss": "0.25"},
    ]


def test_a_resumed_job_is_one_sample_and_a_failed_attempt_beside_a_whole_one_is_no_loss():
    first, failed = run("0", {}, 1, accuracy=0.5), Run("1", {"trainer": "cpu", "seed": "2"}, 2, problem="it was killed")
    lost = Run("2", {"trainer": "cpu", "seed": "3"}, 3, problem="it was killed")
    again = [run("3", {"ckpt_path": "0/last.ckpt"}, 1, accuracy=0.7), run("4", {"ckpt_path": "1/last.ckpt"}, 2)]
    sweep = collect([first, failed, lost, *again])
    (setting,) = sweep.settings
    assert setting.values("test/accuracy") == {1: 0.7, 2: 0.9}
    assert [(left.folder, why.split()[0], "it was killed" in why) for left, why in sweep.left_out] == [
        ("0", "3", False),
        ("1", "4", False),
        ("2", "it", True),
    ]


def test_the_difference_from_dense_is_paired_by_seed_in_whatever_order_the_jobs_ran():
    dense, sparse = {1: 0.90, 2: 0.95, 3: 0.99, 4: 0.10}, {3: 0.97, 5: 0.20, 1: 0.89, 2: 0.92}
    runs = [run(f"d{seed}", DENSE, seed, 0.0, value) for seed, value in dense.items()]
    runs += [run(f"s{seed}", {"experiment": "gmp"}, seed, 0.8, value) for seed, value in sparse.items()]
    control, line = cells(sweep_table(collect(runs), "test/accuracy"))
    differences = [100 * (sparse[seed] - dense[seed]) for seed in (1, 2, 3)]
    mean = sum(differences) / 3
    std = math.sqrt(sum((difference - mean) ** 2 for difference in differences) / 2)
    half = 4.302653 * std / math.sqrt(3)  # the 97.5 % quantile of Student's t with 2 degrees of freedom
    assert line["test/accuracy less dense, points"] == f"{mean:+.2f}"
    assert line["95 % interval"] == f"[{mean - half:+.2f}, {mean + half:+.2f}]"
    assert control["test/accuracy less dense, points"] == control["95 % interval"] == ""


def test_two_settings_without_sparsity_leave_no_one_control_and_are_drawn_as_points():
    runs = [run(0, DENSE, 1, 0.0), run(1, {"experiment": "dense_long"}, 1, 0.0), run(2, {"experiment": "gmp"}, 1)]
    sweep = collect(runs)
    assert not any("less dense" in column for column in cells(sweep_table(sweep, "test/accuracy"))[0])
    curves, dense = sweep_curves(sweep, "test/accuracy")
    assert dense == []
    assert [(label, points[0][0]) for label, points in curves.items()] == [
        ("experiment=dense", 0.0),
        ("experiment=dense_long", 0.0),
        ("experiment=gmp", 0.8),
    ]


def test_a_setting_that_was_pruned_for_a_while_is_no_control_though_it_has_no_zeros_in_the_end():
    pruned = [run(seed, {"final": "dense"}, seed, 0.0, pruned=True) for seed in (1, 2)]
    runs = [*pruned, *(run(f"s{seed}", {"final": "sparse"}, seed) for seed in (1, 2))]
    assert collect(runs).dense is None
    runs += [run(f"d{seed}", DENSE, seed, 0.0) for seed in (1, 2)]
    control = collect(runs).dense
    assert control is not None
    assert control.overrides == DENSE


@pytest.mark.parametrize(
    "override", ["resume", "launcher", "logger", "logger.wandb.offline", "hydra.launcher.n_jobs", "optimized_metric"]
)
def test_seeds_of_runs_that_were_resumed_launched_or_logged_otherwise_are_of_one_setting(override):
    sweep = collect([run(0, {"final": "0.8"}, 1), run(1, {"final": "0.8", override: "other"}, 2)])
    (setting,) = sweep.settings
    assert list(setting.runs) == [1, 2]
    assert sweep.left_out == []


def test_a_curve_follows_the_numbers_that_change_the_sparsity_and_only_those():
    grid = [(lr, final, seed) for lr in (0.1, 0.2) for final in (0.9, 0.8) for seed in (1, 2)]
    runs = [
        run(f"{lr} {final} {seed}", {"optim.lr": str(lr), "method.final": str(final)}, seed, final, lr + seed / 10)
        for lr, final, seed in grid
    ]
    dense = [run(f"dense {seed}", DENSE, seed, 0.0, 0.5) for seed in (1, 2)]
    curves, control = sweep_curves(collect([*dense, *runs]), "test/accuracy")
    assert control == [0.5, 0.5]
    assert curves == {
        "lr=0.1": [(0.9, pytest.approx([0.2, 0.3])), (0.8, pytest.approx([0.2, 0.3]))],
        "lr=0.2": [(0.9, pytest.approx([0.3, 0.4])), (0.8, pytest.approx([0.3, 0.4]))],
    }


def test_methods_of_different_sparsity_are_not_joined_by_a_line_and_one_curve_needs_no_name():
    methods = [run(0, {"method": "gmp"}, 1, 0.8), run(1, {"method": "imp"}, 1, 0.9)]
    assert list(sweep_curves(collect(methods), "test/accuracy")[0]) == ["method=gmp", "method=imp"]
    finals = [run(0, {"final": "0.8"}, 1, 0.8), run(1, {"final": "0.9"}, 1, 0.9)]
    assert list(sweep_curves(collect(finals), "test/accuracy")[0]) == ["each setting"]


def test_the_csv_has_every_counted_run_in_full_precision(tmp_path):
    third = 1 / 3
    failed = Run("2", {}, 3, problem="it was killed")
    runs = [run(0, {"final": "0.8"}, 1, accuracy=third), run(1, DENSE, 2, 0.0), failed]
    write_sweep_csv(tmp_path / "new" / "sweep.csv", collect(runs))
    with (tmp_path / "new" / "sweep.csv").open(newline="") as file:
        first, second = csv.DictReader(file)
    assert (first["final"], first["experiment"], second["final"], second["experiment"]) == ("0.8", "", "", "dense")
    assert (first["seed"], first["folder"], float(first["sparsity"])) == ("1", "0", 0.8)
    assert float(first["test/accuracy"]) == third
