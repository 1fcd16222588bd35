import json
import math

import pytest
import torch

from benchmarks.games import __main__ as games
from benchmarks.games import cartpole, report
from benchmarks.games.adapters import Chain, insert_adapters
from benchmarks.games.cartpole import LONGEST, play, step
from benchmarks.games.players import AUTO, COSINE, METHODS, UNCALIBRATED
from benchmarks.games.report import STARTS, page
from benchmarks.games.ring import centers, figures, real
from benchmarks.games.tasks import ADAPTERS, TASKS, Cell, run, without_numbers
from benchmarks.models import CharacterTransformer

# Trainings


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("method", METHODS)
def test_every_method_trains_every_task(task, method):
    steps = {"PPO": 1, "REINFORCE": 3}.get(task, 6)
    row = run(Cell(task, method, TASKS[task].lr, seed=0), steps)
    assert row["error"] is None
    assert row["figures"]
    json.dumps(row, allow_nan=False)
    for player in row["players"]:
        assert ("median" in player) == (method in (AUTO, UNCALIBRATED))
        assert player["retaken"] == 0 or method == AUTO


def test_a_run_is_repeated_by_its_seed():
    one, same, other = (run(Cell("bandit", AUTO, 3e-3, seed), 12) for seed in (0, 0, 1))
    assert one["figures"] == same["figures"] != other["figures"]


def test_adapters_of_a_seed_start_from_the_same_network_whatever_ran_before():
    cells = [Cell(ADAPTERS, COSINE, lr, seed=0) for lr in (1e-2, 1.0, 1e-2)]
    first, _, again = (run(cell, 3)["figures"] for cell in cells)
    assert first == again


def test_a_training_that_raises_has_no_figures(monkeypatch):
    def play(_):
        raise ValueError("no such game")

    monkeypatch.setitem(TASKS, "GAN", TASKS["GAN"]._replace(play=play))
    row = run(Cell("GAN", AUTO, 0.1, seed=0))
    assert row["figures"] == {}
    assert row["error"] == "ValueError: no such game"


# The tasks


def test_samples_of_the_ring_are_its_modes():
    found = figures(real(4000))
    assert found["modes of 8"] == 8
    assert found["near a mode, %"] == pytest.approx(100 * (1 - math.exp(-4.5)), abs=1)
    assert found["sliced distance"] < 0.05
    collapsed = figures(centers()[3] + 0.01 * torch.randn(4000, 2))
    assert collapsed["modes of 8"] == 1
    assert collapsed["sliced distance"] > 0.5


def test_a_pole_falls_as_newton_has_it(monkeypatch):
    """The energy of a cart that is not pushed stays, up to the error of small steps."""
    monkeypatch.setattr(cartpole, "_SECONDS", 0.001)

    def energy(state):
        _, speed, angle, turning = state.double().unbind(dim=1)
        along, up = speed + 0.5 * turning * angle.cos(), -0.5 * turning * angle.sin()
        rod = 0.5 * 0.1 * (along**2 + up**2) + 0.5 * (0.1 / 3 * 0.5**2) * turning**2
        return 0.5 * speed**2 + rod + 0.1 * 9.8 * 0.5 * angle.cos()

    state = torch.tensor([[0.0, 0.0, 0.2, 0.0]], dtype=torch.float64)
    before = energy(state)
    for _ in range(500):
        state = step(state, torch.tensor([0.5]))  # neither left nor right
    assert state[0, 2] > 0.5
    assert energy(state).item() == pytest.approx(before.item(), rel=2e-3)


def test_episodes_end_where_the_pole_falls():
    episodes = play(lambda observed: torch.ones(len(observed), dtype=torch.long), count=5)
    assert 5 < episodes.mean_length < 15
    assert len(episodes.left) == len(episodes.actions) == len(episodes.observed) == 5 * episodes.mean_length
    assert (episodes.left == 1).sum() == 5
    assert (episodes.observed[:, 2].abs() < math.radians(12)).all()
    balanced = play(lambda observed: (observed @ torch.tensor([0.1, 0.5, 5.0, 1.0]) > 0).long(), count=5)
    assert balanced.mean_length == LONGEST


def test_returns_are_discounted_sums():
    episodes = play(lambda observed: torch.ones(len(observed), dtype=torch.long), count=3)
    expected = [sum(0.9**t for t in range(int(left))) for left in episodes.left]
    assert episodes.returns(0.9).tolist() == pytest.approx(expected)


def test_adapters_change_nothing_at_first_and_are_all_that_trains():
    model = CharacterTransformer(64, width=16, layers=1, heads=2, context=32)
    text = Chain().draw(3)[:, :-1]
    before = model(text)
    adapters = insert_adapters(model)
    assert torch.equal(model(text), before)
    assert [tuple(each.shape) for each in adapters[:2]] == [(4, 16), (48, 4)]
    assert len(adapters) == 2 * 4
    names = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert all(".up." in name or ".down." in name for name in names)


def test_a_shifted_chain_has_other_names():
    chain = Chain()
    text = chain.draw(50, shift=1) - 1
    for now, following in zip(text[:, :-1].flatten() % 64, text[:, 1:].flatten() % 64, strict=True):
        assert following in chain.following[now]


# The page


def row(task, method, lr, seed, *, error=None, warnings=(), **found):
    players = [{"name": "G", "retaken": seed, "median": 1.0 + seed, "highest": 9.0, "last": 2.0}]
    return {
        **Cell(task, method, lr, seed)._asdict(),
        "figures": {} if error else found,
        "players": [] if error else players,
        "warnings": list(warnings),
        "error": error,
        "seconds": 1.0,
    }


def test_a_page_has_means_errors_levels_and_warnings():
    usual = TASKS["GAN"].lr
    rows = [row("GAN", AUTO, usual, seed, modes=6.0 + seed, distance=None) for seed in range(3)]
    rows += [row("GAN", COSINE, usual, seed, error="ValueError: no", modes=1.0) for seed in range(3)]
    rows[0]["warnings"] = ["rate 0.1 is lost"]
    rows[2]["warnings"] = ["rate 2e-3 is lost"]
    rows += [row(ADAPTERS, AUTO, lr, 0, loss=2.0) for lr in STARTS]
    text = page({"seeds": "0 to 2"}, rows)
    for line in (
        "| GAN | modes |  | 3 of 3 raised | 7.00 ± 0.58 |  |",
        "| AutoLR | 7.00 ± 0.58 | 3 of 3 lost |",
        "| GAN | 0.003 | AutoLR | G | 2 (1 .. 3) | 9 | 2 | 1.0 |",
        "- GAN, AutoLR, 2 of 3 runs: rate 0.1 is lost",
        "- GAN, cosine, 3 of 3 runs: raised ValueError: no",
        "| AutoLR | 2.00 | 2.00 |  |  |  | 2.00 |  |  |  | 2.00 | 2.00 |",
    ):
        assert line in text.splitlines()


def test_warnings_are_the_same_if_only_numbers_differ():
    assert without_numbers("lr 1e-3 rose by 4") == without_numbers("lr nan rose by -5.5")
    assert without_numbers("lr 1 rose") != without_numbers("lr 1 fell")


def test_only_a_whole_run_is_written(tmp_path, monkeypatch, capsys):
    ran = []

    def note(cell):
        ran.append(cell)
        return row(*cell, found=1.0)

    monkeypatch.setattr(games, "run", note)
    monkeypatch.setattr(report, "RESULTS", tmp_path)
    games.main(["--quick"])
    assert {cell.seed for cell in ran} == {0}
    assert "## GAN" in capsys.readouterr().out
    assert not list(tmp_path.iterdir())
    games.main([])
    assert {path.name for path in tmp_path.iterdir()} == {"games.json", "games.md"}
    assert json.loads((tmp_path / "games.json").read_text())["seeds"] == "0 to 4"
    assert len(set(ran)) == 5 * (len(TASKS) * len(METHODS) + len(STARTS) - 1 + len(report.GRID) - 1)
