import math

import pytest

from autolr_fast.plotting import Curve, plot_runs

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
