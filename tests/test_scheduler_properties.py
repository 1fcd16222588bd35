"""AutoLR with arguments drawn at random: against the reference, and resumed."""

import io
import math

import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from autolr_fast import FACTORS_2, FACTORS_3, FACTORS_5, FACTORS_7, AutoLR, Rule, reference

from .helpers import assert_same, everything, losses_of_copies, mlp, parameters_of, train_step

FACTORS = st.sampled_from([FACTORS_2, FACTORS_3, FACTORS_5, FACTORS_7, (3.0, 0.9, 1 / 3)])
ANNEALINGS = {
    "cosine": lambda done: (1 + math.cos(math.pi * done)) / 2,
    "linear": lambda done: 1 - done,
    "none": lambda done: 1.0,
}
OPTIMIZERS = {
    "SGD": lambda parameters: torch.optim.SGD(parameters, lr=0.05),
    "momentum": lambda parameters: torch.optim.SGD(parameters, lr=0.02, momentum=0.9, weight_decay=1e-2),
    "AdamW": lambda parameters: torch.optim.AdamW(parameters, lr=0.01),
}
STEPS = 16


def batch_at(step):
    generator = torch.Generator().manual_seed(step)
    x = torch.randn(12, 5, generator=generator, dtype=torch.float64)
    return x, torch.randint(3, (12,), generator=generator)


def loss_at(step):
    x, y = batch_at(step)
    return lambda model: F.cross_entropy(model(x), y)


@settings(max_examples=40)
@given(
    optimizer=st.sampled_from(sorted(OPTIMIZERS)),
    factors=FACTORS,
    every=st.integers(1, 5),
    until=st.floats(0, 1),
    windows=st.lists(st.integers(1, 3), min_size=1, max_size=2),
    total=st.none() | st.integers(8, 40),
    anneal=st.sampled_from(sorted(ANNEALINGS)),
)
def test_uncalibrated_and_at_any_heat_the_rate_is_the_references(
    *, optimizer, factors, every, until, windows, total, anneal
):
    torch.manual_seed(0)
    model = mlp().double()
    optim = OPTIMIZERS[optimizer](model.parameters())
    scheduler = AutoLR(
        optim,
        model,
        total_steps=total,
        anneal=ANNEALINGS["none"] if anneal == "none" else anneal,
        probe_every_steps=every,
        probe_until_fraction=until,
        calibration_steps=0,
        max_heat=math.inf,
        rule=Rule(factors, window_steps=windows),
        evaluator="inplace",
    )
    level, history, turns = optim.param_groups[0]["lr"], [], 0
    for step in range(1, min(STEPS, total or STEPS) + 1):
        history.append(parameters_of(model))
        loss_of = loss_at(step)
        train_step(model, optim, loss_of)
        scheduler.step(lambda loss_of=loss_of: loss_of(model))
        multiplier = 1.0 if total is None else ANNEALINGS[anneal](step / total)
        if step % every == 0:
            turns += 1
            if total is None or step <= until * total:
                window = min(windows[turns % len(windows)], step)
                losses = losses_of_copies(model, history[step - window], factors, loss_of)
                level *= reference.next_lr(losses, 1.0, factors) ** multiplier
        expected = max(level * multiplier, 1e-12)
        assert math.isclose(optim.param_groups[0]["lr"], expected, rel_tol=1e-9)


@settings(max_examples=40)
@given(
    optimizer=st.sampled_from(sorted(OPTIMIZERS)),
    rule=st.none()
    | st.builds(
        Rule,
        factors=FACTORS,
        normalize=st.sampled_from(["minmax", "zscore", "sum", "none"]),
        direction=st.sampled_from(["step", "gradient"]),
        window_steps=st.integers(1, 4) | st.lists(st.integers(1, 4), min_size=1, max_size=3),
    ),
    every=st.none() | st.integers(1, 6),
    until=st.floats(0, 1),
    calibrated=st.integers(0, 8),
    max_heat=st.sampled_from([0.2, 1e-3, 100.0, math.inf]),
    annealing=st.sampled_from([(None, "cosine"), (20, "cosine"), (20, "linear")]),
    limits=st.sampled_from([(1e-12, 1e4), (1e-3, 1.0)]),
    cut=st.integers(1, STEPS - 1),
)
def test_any_run_goes_on_from_its_state_bit_for_bit(
    *, optimizer, rule, every, until, calibrated, max_heat, annealing, limits, cut
):
    total, anneal = annealing
    max_heat = 0.2 if rule is None and math.isinf(max_heat) else max_heat  # which is refused

    def start():
        torch.manual_seed(0)
        model = mlp().double()
        optim = OPTIMIZERS[optimizer](model.parameters())
        return (
            model,
            optim,
            AutoLR(
                optim,
                model,
                total_steps=total,
                anneal=anneal,
                probe_every_steps=every,
                probe_until_fraction=until,
                calibration_steps=calibrated,
                max_heat=max_heat if rule else min(max_heat, 100.0),
                rule=rule,
                lr_limits=limits,
                evaluator="inplace",
            ),
        )

    def train(parts, steps):
        model, optim, scheduler = parts
        for step in steps:
            train_step(model, optim, loss_at(step))
            scheduler.step(lambda step=step: loss_at(step)(model))

    whole, first, resumed = start(), start(), start()
    train(whole, range(STEPS))
    train(first, range(cut))
    file = io.BytesIO()
    torch.save([part.state_dict() for part in first], file)
    file.seek(0)
    for part, state in zip(resumed, torch.load(file, weights_only=True), strict=True):
        part.load_state_dict(state)
    assert resumed[2].get_last_lr() == first[2].get_last_lr()
    assert str(resumed[2].state_dict()) == str(first[2].state_dict())
    train(resumed, range(cut, STEPS))
    assert_same(everything(*whole[:2]), everything(*resumed[:2]))
    assert str(resumed[2].state_dict()) == str(whole[2].state_dict())
