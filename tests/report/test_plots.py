import math
import random
from itertools import pairwise

import pytest

from sparsetrain.masks import Update
from sparsetrain.report import draw_accuracy, draw_sparsity, t_interval
from sparsetrain.report.plots import _accuracy_limits, _density_ticks, _short_names
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


def points(rounds, seeds, level=0.97):
    source = random.Random(rounds)
    return [(1 - 0.8**r, [level - 0.001 * r + source.gauss(0, 0.002) for _ in range(seeds)]) for r in range(rounds)]


@pytest.fixture
def drawn(tmp_path, monkeypatch):
    """Draws, and gives the axes and the legend that were saved."""
    from matplotlib.figure import Figure

    saved, save = [], Figure.savefig

    def savefig(figure, *args, **kwargs):
        saved.append(figure)
        return save(figure, *args, **kwargs)

    monkeypatch.setattr(Figure, "savefig", savefig)

    def draw(*args, **kwargs):
        draw_accuracy(tmp_path / "new" / "accuracy.png", *args, **kwargs)
        assert height(tmp_path / "new" / "accuracy.png")
        return saved[-1].axes[0], saved[-1].legends[0]

    return draw


@pytest.mark.parametrize(("rounds", "seeds", "curves"), [(1, 1, 1), (1, 5, 8), (6, 5, 4), (15, 1, 8), (15, 2, 1)])
def test_one_to_fifteen_points_of_one_to_eight_curves_are_drawn_beside_the_legend(drawn, rounds, seeds, curves):
    names = [f"method {i}" for i in range(curves)]
    axes, legend = drawn({name: points(rounds, seeds) for name in names}, dense=[0.97] * seeds)
    assert [text.get_text() for text in legend.get_texts()] == ["dense control", *names]
    assert legend.get_window_extent().x0 >= axes.get_window_extent().x1


def test_kept_weights_fall_to_the_right_and_means_are_over_seeds(drawn):
    axes, _ = drawn({"IMP": [(0.75, [0.9, 0.92]), (0.0, [0.95, 0.97])]}, dense=())
    (line,) = axes.get_lines()
    assert axes.get_xscale() == "log"
    assert axes.get_xlim()[0] > 100 > 25 > axes.get_xlim()[1]
    assert list(line.get_xdata()) == [100, 25]
    assert list(line.get_ydata()) == pytest.approx([0.96, 0.91])


@pytest.mark.parametrize("sparsest", [0.0, 0.2, 0.8, 0.956, 0.999])
def test_the_upper_axis_says_the_sparsity_of_each_density(drawn, sparsest):
    axes, _ = drawn({"a method with a rather long name": [(0.0, [0.97]), (sparsest, [0.96])]}, dense=())
    below, above = axes.get_xticklabels(), axes.child_axes[0].get_xticklabels()
    densities, sparsities = ([float(label.get_text().rstrip("%")) for label in labels] for labels in (below, above))
    assert sparsities == pytest.approx([100 - density for density in densities])
    for labels in (below, above):
        boxes = [label.get_window_extent() for label in labels]
        assert all(left.x1 < right.x0 for left, right in pairwise(boxes))


def test_a_band_is_the_interval_and_one_seed_has_none(drawn):
    several, single = points(4, 5), points(4, 1)
    axes, legend = drawn({"five": several, "one": single}, dense=[0.97, 0.971, 0.972])
    five, one = axes.collections
    intervals = [t_interval(accuracies) for _, accuracies in several]
    ends = {round(end, 9) for interval in intervals for end in (interval.low, interval.high)}
    assert {round(float(y), 9) for y in five.get_paths()[0].vertices[:, 1]} == ends
    assert not one.get_paths()
    assert [text.get_text() for text in legend.get_texts()] == [
        "dense control (3 seeds)",
        "five (5 seeds)",
        "one (1 seed)",
    ]


def test_controls_are_dotted_and_a_single_point_is_a_marker_with_its_interval(drawn):
    accuracies = [0.93, 0.94, 0.95]
    axes, _ = drawn({"IMP": points(4, 3)}, dense=(), controls={"random": points(4, 3), "reinit": [(0.5, accuracies)]})
    curve, random_mask, reinit = (container.lines for container in axes.containers)
    assert (curve[0].get_linestyle(), random_mask[0].get_linestyle(), reinit[0].get_linestyle()) == ("-", ":", "None")
    (bar,) = reinit[2][0].get_segments()
    interval = t_interval(accuracies)
    assert bar.tolist() == [pytest.approx([50, interval.low]), pytest.approx([50, interval.high])]


def test_published_points_are_crosses_in_the_colour_of_their_curve_and_inside_the_limits(drawn):
    curves = {"IMP": points(3, 3), "GMP": points(3, 3)}
    axes, legend = drawn(curves, dense=(), published={"GMP": [(0.5, 0.99), (0.98, 0.7)]})
    _, line, crosses, _ = axes.get_lines()
    assert crosses.get_color() == line.get_color()
    assert list(crosses.get_xdata()) == pytest.approx([50, 2])
    assert list(crosses.get_ydata()) == [0.99, 0.7]
    assert axes.get_xlim()[1] < 2 < axes.get_xlim()[0]
    assert axes.get_ylim()[0] < 0.7 < 0.99 < axes.get_ylim()[1]
    assert sorted(text.get_text() for text in legend.get_texts()) == ["GMP", "IMP", "published"]
    with pytest.raises(ValueError, match="'RigL' has published points and no curve"):
        drawn(curves, dense=(), published={"RigL": [(0.5, 0.9)]})


def test_every_accuracy_is_inside_the_limits_though_intervals_of_two_seeds_are_not():
    low, high = _accuracy_limits([[0.90, 0.94], [0.95]])
    assert 0.86 < low < 0.90
    assert 0.95 < high < 0.99
    low, high = _accuracy_limits([[0.5]])
    assert (low, high) == pytest.approx((0.495, 0.505))
    interval = t_interval([0.90, 0.91, 0.905, 0.902, 0.908])
    low, high = _accuracy_limits([[0.90, 0.91, 0.905, 0.902, 0.908], [0.95]])
    assert low < min(0.90, interval.low)


@pytest.mark.parametrize("lowest", [90, 80, 60, 50, 25, 10, 4, 1, 0.1, 0.01])
def test_ticks_are_round_few_and_begin_at_100(lowest):
    ticks = _density_ticks(lowest)
    assert ticks[0] == 100
    assert 2 <= len(ticks) <= 12
    assert all(left > right >= lowest for left, right in pairwise(ticks))
    assert all(math.isclose(float(f"{tick:.2g}"), tick) for tick in ticks)


@pytest.mark.parametrize(
    ("curves", "dense", "message"),
    [
        ({}, [0.9], "no curve"),
        ({"IMP": []}, [0.9], "'IMP' has no point"),
        ({"IMP": [(0.5, [])]}, [0.9], "'IMP' has no accuracy at sparsity 0.5"),
        ({"IMP": [(1.0, [0.9])]}, [0.9], "sparsity of 'IMP'=1.0"),
        ({"IMP": [(-0.1, [0.9])]}, [0.9], "sparsity of 'IMP'=-0.1"),
        ({"IMP": [(0.5, [0.9, math.nan])]}, [0.9], "'IMP' at sparsity 0.5 is nan"),
        ({"IMP": [(0.5, [97.1])]}, [0.9], "not percent.*97.1"),
        ({"IMP": [(0.5, [0.9])]}, [math.inf], "the dense control is inf"),
    ],
)
def test_what_cannot_be_drawn_is_refused_by_name(tmp_path, curves, dense, message):
    with pytest.raises(ValueError, match=message):
        draw_accuracy(tmp_path / "x.png", curves, dense=dense)
    assert not (tmp_path / "x.png").exists()
