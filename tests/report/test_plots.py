import pytest

from sparsetrain.masks import Update
from sparsetrain.report import draw_sparsity
from sparsetrain.report.plots import _short_names
from sparsetrain.selection import PlanRow

PNG = b"\x89PNG\r\n\x1a\n"


def run(layers):
    plan = [PlanRow(f"network.{i}.weight", (10, 10), True, "pruned") for i in range(layers)]
    plan.append(PlanRow("network.0.bias", (10,), False, "bias"))
    updates = [
        Update(step, 0.1 * step, {row.name: 100 - 10 * step for row in plan[:-1]}, {}, {}) for step in range(1, 6)
    ]
    return plan, updates


def height(path):
    data = path.read_bytes()
    assert data.startswith(PNG)
    return int.from_bytes(data[20:24], "big")


def test_one_picture_is_written_and_grows_with_the_number_of_layers(tmp_path):
    heights = []
    for layers in (3, 54):
        plan, history = run(layers)
        path = tmp_path / "new" / f"{layers}.png"
        draw_sparsity(path, plan=plan, history=history, target=[(step, 0.1 * step) for step in range(8)])
        heights.append(height(path))
    assert heights[1] > 1.5 * heights[0]


@pytest.mark.parametrize(("updates", "target"), [([], []), ([], [(0, 0.5)]), (run(2)[1], [])])
def test_a_run_without_updates_or_schedule_is_drawn_too(tmp_path, updates, target):
    draw_sparsity(str(tmp_path / "x.png"), plan=run(2)[0], history=updates, target=target)
    assert height(tmp_path / "x.png")


def test_a_plan_that_prunes_nothing_is_refused(tmp_path):
    with pytest.raises(ValueError, match="prunes no tensor"):
        draw_sparsity(tmp_path / "x.png", plan=run(2)[0][-1:], history=[], target=[])


def test_names_lose_the_parts_that_all_share():
    assert _short_names(["net.a.0.weight", "net.b.1.weight"]) == ("net.", ".weight", ["a.0", "b.1"])
    assert _short_names(["net.a.weight", "net.a.in_proj_weight"]) == ("net.a.", "", ["weight", "in_proj_weight"])
    assert _short_names(["net.fc.weight"]) == ("net.fc.", "", ["weight"])
    assert _short_names(["weight", "a.weight"]) == ("", "", ["weight", "a.weight"])
