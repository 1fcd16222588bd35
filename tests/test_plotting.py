import math

import pytest

from autolr_fast._tree import Branch, Epoch
from autolr_fast.plotting import Curve, plot_runs, plot_tree

pytest.importorskip("matplotlib")

CURVES = [
    Curve("cosine", [0, 10, 20], [0.1, 0.05, 0.0], [2.0, math.nan, math.inf]),
    Curve("AutoLR", [0, 10, 20], [1e-3, 0.2, 1e-12], [2.0, 1.0, 0.5]),
    Curve("AutoLR", [0, 10, 20], [1e-1, 0.2, 1e-12], [2.5, 1.0, 0.25]),
]


def test_a_line_for_each_run_and_a_legend_entry_for_each_label(tmp_path):
    figure = plot_runs(CURVES, title="title", footer="python -m something")
    left, right = figure.axes
    for axes, values in ((left, "lrs"), (right, "losses")):
        assert axes.get_yscale() == "log"
        assert len(axes.lines) == len(CURVES)
        for line, curve in zip(axes.lines, CURVES, strict=True):
            finite = [value if math.isfinite(value) else 7.5e6 for value in getattr(curve, values)]
            assert list(line.get_ydata()) == finite
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["cosine", "AutoLR"]
    assert left.lines[1].get_color() == left.lines[2].get_color() == right.lines[2].get_color()
    assert left.lines[0].get_color() != left.lines[1].get_color()
    assert left.get_ylim()[0] == pytest.approx(1e-5)
    assert right.get_ylim() == pytest.approx((0.7 * 0.25, 7.5))
    figure.savefig(tmp_path / "runs.png")
    assert (tmp_path / "runs.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("curves", "says"),
    [
        ([], "is empty"),
        ([Curve("cosine", [0, 1], [0.1], [1.0, 2.0])], "'cosine' has 2 steps, 1 lrs and 2 losses"),
        ([Curve("cosine", [], [], [])], "0 steps"),
    ],
)
def test_bad_curves(curves, says):
    with pytest.raises(ValueError, match=says):
        plot_runs(curves, title="")


HISTORY = [
    Epoch(1, (Branch(0, 0.2, 0.9), Branch(0, 0.1, 0.8), Branch(0, 0.05, math.nan)), survivors=(1, 0)),
    Epoch(
        2, (Branch(0, 0.2, 0.5), Branch(0, 0.05, 0.7), Branch(1, 0.4, 0.3), Branch(1, 0.1, 0.6)), survivors=(2, 0)
    ),
]


def test_branches_start_from_their_parents(tmp_path):
    figure = plot_tree(HISTORY, title="title", footer="python -m something")
    left, right = figure.axes
    drawn = {
        (tuple(line.get_xdata()), tuple(line.get_ydata())): line for line in left.lines if len(line.get_xdata())
    }
    assert set(drawn) == {
        ((1,), (0.2,)), ((1,), (0.1,)), ((1,), (0.05,)),
        ((1, 2), (0.1, 0.2)), ((1, 2), (0.1, 0.05)), ((1, 2), (0.2, 0.4)), ((1, 2), (0.2, 0.1)),
    }  # fmt: skip
    best = [drawn[(1,), (0.2,)], drawn[(1, 2), (0.2, 0.4)]]  # the second beam's branch won
    pruned = [drawn[(1, 2), (0.1, 0.05)], drawn[(1, 2), (0.2, 0.1)]]
    went_on = [drawn[(1,), (0.1,)], drawn[(1, 2), (0.1, 0.2)]]
    assert len({line.get_color() for line in best + pruned + went_on}) == 3
    for alike in (best, pruned, went_on):
        assert len({(line.get_color(), line.get_alpha()) for line in alike}) == 1
    assert pruned[0].get_alpha() < 1
    assert [list(line.get_ydata()) for line in right.lines] == [
        [0.9], [0.8], [0.8, 0.5], [0.8, 0.7], [0.9, 0.3], [0.9, 0.6],
    ]  # fmt: skip
    assert [line.get_marker() for line in left.lines].count("x") == 1
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["best", "went on", "pruned"]
    figure.savefig(tmp_path / "tree.png")


def test_losses_below_zero():
    right = plot_tree([Epoch(1, (Branch(0, 0.2, -4.0), Branch(0, 0.1, -5.0)), survivors=(1, 0))], title="").axes[1]
    assert right.get_yscale() == "linear"


def test_no_history():
    with pytest.raises(ValueError, match="train an epoch first"):
        plot_tree([], title="")
