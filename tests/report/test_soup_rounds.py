import csv

import pytest

from sparsetrain.report import SoupRound, draw_soups, soups_table, write_soups_csv


def network(test: float, val: float | None = None) -> dict[str, float]:
    return {"test/accuracy": test} | ({} if val is None else {"val/accuracy": val})


ROUNDS = [
    SoupRound(1, 0.5, network(0.92, 0.9), [network(0.9, 0.8), network(0.8, 0.85)], 1.5),
    SoupRound(2, 0.75, network(0.91, 0.9), [network(0.85, 0.8), network(0.86, 0.7)], 2.5),
]


def test_the_best_ingredient_is_chosen_by_validation_and_reported_on_test():
    assert ROUNDS[0].best("test/accuracy", chosen_by="val/accuracy") == 0.8
    assert ROUNDS[0].mean("test/accuracy") == pytest.approx(0.85)


def test_the_table_has_a_line_a_round_and_no_best_without_validation():
    lines = soups_table(ROUNDS).splitlines()
    assert lines[2:] == [
        "| 1 | 50.00% | 92.00% | 85.00% | 80.00% | 90.00%, 80.00% | 1.5 |",
        "| 2 | 75.00% | 91.00% | 85.50% | 85.00% | 85.00%, 86.00% | 2.5 |",
    ]
    alone = soups_table([SoupRound(1, 0.5, network(0.9), [network(0.9)], None)]).splitlines()
    assert alone[2] == "| 1 | 50.00% | 90.00% | 90.00% |  | 90.00% |  |"


def test_the_csv_has_a_row_for_each_network(tmp_path):
    write_soups_csv(tmp_path / "soups.csv", ROUNDS)
    with (tmp_path / "soups.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [(row["round"], row["network"], float(row["test/accuracy"])) for row in rows] == [
        ("1", "soup", 0.92),
        ("1", "0", 0.9),
        ("1", "1", 0.8),
        ("2", "soup", 0.91),
        ("2", "0", 0.85),
        ("2", "1", 0.86),
    ]
    assert {row["distance"] for row in rows} == {"1.5", "2.5"}


def test_the_picture_is_drawn_and_needs_a_round(tmp_path):
    draw_soups(tmp_path / "soups.png", ROUNDS, dense=0.93)
    assert (tmp_path / "soups.png").stat().st_size > 10_000
    with pytest.raises(ValueError, match="no round to draw"):
        draw_soups(tmp_path / "none.png", [])
