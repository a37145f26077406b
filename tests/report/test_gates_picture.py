import pytest
from matplotlib.figure import Figure

from sparsetrain.report import draw_gates

HISTORY = {"layer1.conv1": [(0, 1.0), (10, 0.5), (30, 0.25)], "layer2.conv1": [(0, 1.0), (10, 1.0), (30, 0.75)]}
COST = [(0, 1.0), (10, 0.8), (30, 0.5)]


@pytest.fixture
def drawn(tmp_path, monkeypatch):
    """Draws, and gives the figure that was saved."""
    saved, save = [], Figure.savefig

    def savefig(figure, *args, **kwargs):
        saved.append(figure)
        save(figure, *args, **kwargs)

    monkeypatch.setattr(Figure, "savefig", savefig)

    def draw(*args, **kwargs):
        draw_gates(tmp_path / "new" / "gates.png", *args, **kwargs)
        assert (tmp_path / "new" / "gates.png").read_bytes().startswith(b"\x89PNG")
        return saved[-1]

    return draw


def test_each_layer_has_a_row_from_the_top_and_each_step_a_cell_as_wide_as_it_lasts(drawn):
    overall, by_layer, _ = drawn(HISTORY, cost=COST, budget=0.5).axes
    lines = {line.get_label(): list(line.get_ydata()) for line in overall.lines}
    assert lines == {
        "open, mean over layers": [1.0, 0.75, 0.5],
        "expected cost": [1.0, 0.8, 0.5],
        "budget": [0.5, 0.5],
    }
    (mesh,) = by_layer.collections
    assert mesh.get_array().tolist() == [[1.0, 0.5, 0.25], [1.0, 1.0, 0.75]]
    assert mesh.get_coordinates()[0, :, 0].tolist() == [0, 10, 30, 50]
    assert mesh.get_clim() == (0, 1)
    assert [label.get_text() for label in by_layer.get_yticklabels()] == list(HISTORY)
    top, bottom = (by_layer.transData.transform((0, row))[1] for row in by_layer.get_yticks())
    assert top > bottom


def test_gates_of_one_step_and_of_many_layers_are_drawn(drawn):
    assert len(drawn({"conv": [(5, 0.5)]}).axes[0].lines) == 1
    few, many = (drawn({f"{i}": [(0, 1.0), (1, 0.5)] for i in range(count)}) for count in (4, 54))
    assert many.get_figheight() > 1.5 * few.get_figheight()


@pytest.mark.parametrize(
    ("history", "cost", "message"),
    [
        ({}, [], "no gated layer"),
        ({"a": []}, [], "no step to draw of the gates of 'a'"),
        ({"a": [(1, 1.0), (1, 0.5)]}, [], r"'a' do not rise: \[1, 1\]"),
        ({"a": [(1, 1.0)], "b": [(2, 1.0)]}, [], "gates of 'b' were noted at other steps than those of 'a'"),
        ({"a": [(1, 1.5)]}, [], r"\[0, 1\]; that of 'a' is 1.5 at step 1"),
        ({"a": [(1, 1.0)]}, [(1, float("nan"))], "that of 'the cost' is nan"),
    ],
)
def test_what_cannot_be_drawn_is_refused(tmp_path, history, cost, message):
    with pytest.raises(ValueError, match=message):
        draw_gates(tmp_path / "x.png", history, cost=cost)
