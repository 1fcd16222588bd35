import dataclasses
import math

import pytest
import torch
from torch import nn

from autolr_fast import AutoLR, Probe
from autolr_fast._tree import Branch, Epoch
from autolr_fast.plotting import Curve, plot, plot_runs, plot_tree

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


def trained(steps, rates=(1e-3,), **options):
    """A run of a param group for each rate, and the rates of each after each step, as the optimizer had them."""
    model = nn.ModuleList(nn.Linear(5, 1) for _ in rates)
    groups = [{"params": each.parameters(), "lr": lr} for each, lr in zip(model, rates, strict=True)]
    optimizer = torch.optim.SGD(groups, lr=1.0, momentum=0.9)
    scheduler = AutoLR(optimizer, model, evaluator="inplace", **options)
    had = [[float(group["lr"])] for group in optimizer.param_groups]
    for _ in range(steps):
        x = torch.randn(16, 5)
        optimizer.zero_grad()
        scheduler.loss(
            lambda x=x: sum((each(x) - x.sin().sum(1, True)).square().mean() for each in model)
        ).backward()
        optimizer.step()
        scheduler.step()
        for rates_had, group in zip(had, optimizer.param_groups, strict=True):
            rates_had.append(float(group["lr"]))
    return scheduler, had


def drawn(axes):
    """Line artists and bands by label; those in the legend."""
    return {artist.get_label(): artist for artist in (*axes.lines, *axes.patches)}


def points(line):
    return list(zip(line.get_xdata(), line.get_ydata(), strict=True))


@pytest.mark.parametrize(
    ("steps", "options"),
    [
        (60, {"total_steps": 60}),
        (60, {"total_steps": 100, "anneal": "linear", "lr_limits": (1e-4, 0.02)}),
        (1100, {"total_steps": 1100, "probe_every_steps": 1, "anneal": lambda fraction: 0.1 + fraction}),
        (120, {}),
        (120, {"max_heat": 0.01}),
        (60, {"total_steps": 60, "calibration_steps": 0}),
        (7, {"total_steps": 60}),
    ],
)
@pytest.mark.parametrize("group", [0, 1])
def test_rate_and_level_are_those_of_the_run(steps, options, group, tmp_path):
    scheduler, had = trained(steps, rates=(1e-3, 5e-3), **options)
    figure = plot(scheduler, group=group, title="title", footer="footer")
    axes = figure.axes[0]
    lines = drawn(axes)

    rate = points(lines["learning rate"])
    assert [lr for _, lr in rate] == pytest.approx([had[group][step] for step, _ in rate], rel=1e-12)
    seen = {step for step, _ in rate}
    probed = [probe.step for probe in scheduler.history]
    assert seen >= {0, steps, *probed}
    assert seen == set(range(steps + 1)) or len(seen) > 1000

    levels = [float(probe.level_after[group]) for probe in scheduler.history]
    start = (1e-3, 5e-3)[group]
    level = lines["level, before annealing"]
    assert points(level) == [(0, start), *zip(probed, levels, strict=True), (steps, levels[-1])]
    assert {line.get_drawstyle() for line in (lines["learning rate"], level)} == {"steps-post"}
    assert points(lines["probe"]) == list(zip(probed, levels, strict=True))

    again = [
        (probe.step, float(probe.level_after[group])) for probe in scheduler.history if probe.retaken is not None
    ]
    assert bool(again) == ("steps taken again" in lines) == (options.get("calibration_steps") != 0)
    assert not again or points(lines["steps taken again"]) == again

    assert axes.get_yscale() == "log"
    low, high = axes.get_ylim()
    assert low < max(min(lr for _, lr in rate), min(start, *levels) / 100)
    assert high > max(*levels, *(lr for _, lr in rate))
    assert axes.get_ylabel() == f"learning rate of param group {group}"
    shown = [text.get_text() for text in figure.axes[1].get_legend().get_texts()]
    assert shown == [label for label in lines if label[0] != "_"]
    figure.savefig(tmp_path / "run.png")
    assert (tmp_path / "run.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.usefixtures("every_probe")
@pytest.mark.parametrize(
    ("steps", "options", "bands"),
    [
        (60, {"total_steps": 60}, {"calibration": (0, 20), "annealing alone": (30, 60)}),
        (25, {"total_steps": 60}, {"calibration": (0, 20)}),
        (7, {"total_steps": 60}, {"calibration": (0, 7)}),
        (60, {"total_steps": 60, "probe_every_steps": None}, {"calibration": (0, 20), "annealing alone": (20, 60)}),
        (60, {"total_steps": 60, "probe_until_fraction": 1.0, "calibration_steps": 0}, {}),
        (60, {"probe_every_steps": None}, {"calibration": (0, 20)}),
    ],
)
def test_bands(steps, options, bands):
    axes = plot(trained(steps, **options)[0]).axes[0]
    found = {patch.get_label(): (patch.get_x(), patch.get_x() + patch.get_width()) for patch in axes.patches}
    assert found == bands
    assert axes.get_ylabel() == "learning rate"


@pytest.mark.parametrize(
    ("index", "scale", "shown"),
    [(None, "log", [2 / 3, 1.0]), (-2, "log", [2 / 3, 1.0]), (3, "linear", [0.0, 1.0]), (0, "log", None)],
)
def test_the_small_panel_shows_one_probe(index, scale, shown):
    """The later ones over ten steps, a close one over the last step, and a search, which spans decades."""
    scheduler, _ = trained(60, total_steps=60, probe_until_fraction=1.0)
    axes, _, small = plot(scheduler, probe=index).axes
    probe = scheduler.history[-1 if index is None else index]
    chosen, losses, _ = small.lines
    seen = dict(zip(probe.factors, probe.losses.tolist(), strict=True))
    shown = shown or sorted(set(seen) - {0.0})  # where a search began has no place there
    assert len(shown) >= 2
    assert points(losses) == [(factor, seen[factor]) for factor in shown]
    assert list(chosen.get_xdata()) == [float(probe.factor)] * 2
    assert small.get_xscale() == scale
    assert small.get_title("right") == f"probe at step {probe.step}: factor {float(probe.factor):.3g}"
    assert points(drawn(axes)["probe shown below"]) == [(probe.step, float(probe.level_after[0]))]


@pytest.mark.parametrize(
    ("losses", "scale"),
    [
        ([math.inf, 2.0, math.nan, 1.0], "linear"),
        ([math.nan] * 4, "linear"),
        ([1e30, 2.0, 1e3, 1.0], "log"),
        ([1e30, 2.0, -1e3, 1.0], "linear"),
    ],
)
def test_losses_that_are_not_finite_are_crosses(losses, scale, tmp_path):
    scheduler, _ = trained(30)
    factors = (4.0, 0.5, 2.0, 0.25)
    seen = torch.tensor(losses, dtype=torch.float64)
    scheduler.history[-1] = dataclasses.replace(scheduler.history[-1], factors=factors, losses=seen)
    figure = plot(scheduler)
    small = figure.axes[2]
    pairs = sorted(zip(factors, losses, strict=True))
    assert points(small.lines[1]) == [(factor, loss) for factor, loss in pairs if math.isfinite(loss)]
    assert list(small.lines[2].get_xdata()) == [factor for factor, loss in pairs if not math.isfinite(loss)]
    assert small.get_yscale() == scale
    figure.savefig(tmp_path / "run.png")


def test_a_group_that_was_added_is_drawn_from_its_first_probe():
    scheduler, _ = trained(30, total_steps=60, probe_until_fraction=1.0)
    model = scheduler._prober.model
    model.append(nn.Linear(5, 1))
    optimizer = scheduler.optimizer
    optimizer.add_param_group({"params": model[1].parameters(), "lr": 0.01})
    had = []
    for step in range(31, 46):
        model[1].requires_grad_(step > 32)
        scheduler.loss(lambda: sum(each(torch.ones(1, 5)).square().mean() for each in model)).backward()
        optimizer.step()
        scheduler.step()
        had.append(optimizer.param_groups[1]["lr"])
        if step == 31:
            with pytest.raises(ValueError, match="group=1 was added after the last probe: draw it when"):
                plot(scheduler, group=1)
    lines = drawn(plot(scheduler, group=1).axes[0])
    assert list(lines["learning rate"].get_xdata()) == list(range(33, 46))
    assert list(lines["learning rate"].get_ydata()) == pytest.approx(had[2:], rel=1e-12)
    assert "probe shown below" not in drawn(plot(scheduler, group=1, probe=0).axes[0])


@pytest.mark.usefixtures("every_probe")
def test_what_cannot_be_drawn():
    scheduler, _ = trained(30, rates=(1e-3, 2e-3))
    for group in (-1, 2):
        with pytest.raises(
            ValueError, match=f"group={group} is not the index of one of 2 param groups: give 0 to 1"
        ):
            plot(scheduler, group=group)
    for probe in (21, -22):
        with pytest.raises(ValueError, match=f"probe={probe} is not in the history, which has 21: give -21 to 20"):
            plot(scheduler, probe=probe)
    with pytest.raises(ValueError, match="the history is empty: train a step first"):
        plot(trained(0)[0])
    for run in (None, [probe.to_dict() for probe in scheduler.history]):
        with pytest.raises(TypeError, match="is neither an AutoLR nor its history: give the scheduler"):
            plot(run)
    with pytest.raises(ValueError, match="has a probe of step 1 after one of step 30: give the probes of one run"):
        plot([*scheduler.history, *scheduler.history])
    with pytest.raises(ValueError, match="group=1 has a level of 0, which no logarithmic axis shows"):
        plot(trained(30, rates=(1e-3, 0.0))[0], group=1)


@pytest.mark.parametrize("options", [{"total_steps": 60}, {}, {"total_steps": 60, "calibration_steps": 0}])
@pytest.mark.parametrize("group", [0, 1])
def test_a_history_is_drawn_as_far_as_it_goes(options, group, tmp_path):
    """As read from a file: its rates are those that the optimizer had, just before and after each probe."""
    scheduler, had = trained(60, rates=(1e-3, 5e-3), **options)
    history = [Probe.from_dict(probe.to_dict()) for probe in scheduler.history]
    figure = plot(history, group=group)
    axes = figure.axes[0]
    lines = drawn(axes)
    probed = [probe.step for probe in history]
    known = [step for probe in probed for step in (probe - 1, probe)]
    assert points(lines["learning rate"]) == [(step, pytest.approx(had[group][step], rel=1e-12)) for step in known]
    assert lines["learning rate"].get_drawstyle() == "default"
    levels = points(drawn(plot(scheduler, group=group).axes[0])["level, before annealing"])[1:-1]
    assert points(lines["level, before annealing"]) == levels
    assert points(lines["probe"]) == levels
    assert not axes.patches
    assert axes.get_ylabel() == f"learning rate of param group {group}"
    assert figure.axes[2].get_title("right").startswith(f"probe at step {probed[-1]}")
    figure.savefig(tmp_path / "run.png")
