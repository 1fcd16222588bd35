"""What the user raises in a closure arrives as it was raised, and everything is put back."""

import math

import pytest
import torch

from autolr_fast import FACTORS_5, AutoLR, Rule

from .helpers import NAMED, assert_same, everything, mlp, random_states, sgd


@pytest.mark.parametrize("error", [StopIteration, KeyboardInterrupt, SystemExit, GeneratorExit])
@pytest.mark.parametrize("evaluator", ["auto", *NAMED])
@pytest.mark.parametrize("way", ["loss", "step"])
def test_what_the_user_raises_arrives_as_itself(way, evaluator, error):
    """In any run of a probe, as of a loader that runs dry; everything is put back."""
    raised = error("the user's own")
    for calls in range(12):
        torch.manual_seed(0)
        model = mlp()
        optimizer = sgd(model, lr=0.05, momentum=0.9)
        options = {"rule": Rule(FACTORS_5, window_steps=1), "calibration_steps": 0, "probe_every_steps": 1}
        scheduler = AutoLR(optimizer, model, evaluator=evaluator, **options)
        x, left = torch.randn(12, 5), [math.inf]

        def closure(model=model, x=x, left=left):
            if not left[0]:
                raise raised
            left[0] -= 1
            return model(x).square().mean()

        (scheduler.loss(closure) if way == "loss" else closure()).backward()
        optimizer.step()
        left[0] = calls
        before, streams = everything(model, optimizer), str(random_states())
        try:
            scheduler.step(*([closure] if way == "step" else []))
        except BaseException as arrived:
            assert arrived is raised  # noqa: PT017, pytest.raises would not take all of these
        else:
            assert left[0] >= 0
            assert calls > len(FACTORS_5) or evaluator in ("stacked", "graphed")
            break
        assert_same(before, everything(model, optimizer))
        assert str(random_states()) == streams
    assert calls >= 3


@pytest.mark.parametrize("error", [StopIteration, KeyboardInterrupt, SystemExit, GeneratorExit])
def test_what_the_user_raises_in_training_arrives_as_itself_and_the_closure_is_forgotten(error):
    model = mlp()
    optimizer = sgd(model, lr=0.05)
    scheduler = AutoLR(optimizer, model, calibration_steps=1)
    raised = error("the user's own")

    def closure():
        raise raised

    with pytest.raises(error) as caught:
        scheduler.loss(closure)
    assert caught.value is raised
    x = torch.randn(12, 5)
    scheduler.loss(lambda: model(x).square().mean()).backward()
    optimizer.step()
    scheduler.step()
    assert scheduler.last_probe.step == 1
