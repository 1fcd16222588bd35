"""NumPy's stream is read and set where it moves alone, and goes back bit for bit whatever moved it."""

import itertools
import random
from contextlib import nullcontext

import numpy
import pytest
import torch
from torch import nn

from autolr_fast._isolation import Isolation, RandomStreams, Replay, random_streams

DRAWS = {
    "nothing": lambda: None,
    "uniform": numpy.random.random,
    "one normal": numpy.random.standard_normal,
    "two normals": lambda: numpy.random.standard_normal(2),
    "three normals": lambda: numpy.random.standard_normal(3),
    "many": lambda: numpy.random.random(2000),
    "a permutation": lambda: numpy.random.permutation(3),
    "seed": lambda: numpy.random.seed(7),
}


def state():
    """What the stream is, as NumPy itself tells."""
    name, keys, position, has_normal, normal = numpy.random.get_state()
    return name, keys.tolist(), position, has_normal, normal


@pytest.fixture
def fresh(monkeypatch):
    """A stream of which nothing is known."""
    stream = random_streams._NumPyStream()
    monkeypatch.setattr(random_streams, "_NUMPY", stream)
    return stream


@pytest.mark.parametrize("before", DRAWS)
def test_numpys_stream_goes_back_bit_for_bit(fresh, before):
    numpy.random.seed(3)
    for draw, _ in itertools.product(DRAWS.values(), range(2)):
        DRAWS[before]()
        streams, expected = RandomStreams(), state()
        for _ in range(3):
            draw()
            streams.restore()
            assert state() == expected


def test_numpys_stream_is_read_once_while_it_stands_still(fresh, monkeypatch):
    numpy.random.seed(3)
    calls = []
    for name in ("get_state", "set_state"):
        original = getattr(numpy.random, name)

        def counted(*args, name=name, original=original):
            calls.append(name)
            return original(*args)

        monkeypatch.setattr(numpy.random, name, counted)
    for _ in range(3):
        RandomStreams().restore()
    assert calls == ["get_state"]
    numpy.random.random()
    RandomStreams().restore()
    assert calls == ["get_state"] * 2


@pytest.mark.parametrize("draws", ["nothing", "uniform", "one normal"])
def test_numpy_with_another_generator_or_an_older_one(fresh, monkeypatch, draws):
    monkeypatch.delattr(numpy.random, "get_bit_generator")
    streams, expected = RandomStreams(), state()
    DRAWS[draws]()
    streams.restore()
    assert state() == expected


def test_a_stream_that_was_drawn_from_is_read_each_time(fresh):
    """The seed may come again with another number of normals drawn: the memory is the same, the state is not."""
    expected = []
    for normals in (4, 3):
        numpy.random.seed(0)
        numpy.random.standard_normal(normals)
        streams = RandomStreams()
        expected.append(state())
        numpy.random.random()
        streams.restore()
        assert state() == expected[-1]
    assert expected[0][:3] == expected[1][:3]
    assert expected[0] != expected[1]


@pytest.mark.parametrize("fails", [False, True])
def test_streams_are_put_back_after_runs_that_set_them(fresh, fails):
    model = nn.Dropout()
    drawn = []

    def closure():
        drawn.append((torch.rand(()).item(), random.random(), numpy.random.random()))
        if fails and len(drawn) > 1:
            raise KeyError
        return model(torch.ones(8)).sum()

    replay = Replay(model)
    replay.add(closure)
    numpy.random.random()
    random.random()
    torch.rand(())
    before = state(), random.getstate(), torch.get_rng_state().tolist()
    with pytest.raises(KeyError) if fails else nullcontext(), Isolation(model, replay) as isolation:
        for _ in range(3):
            isolation.run(replay)
    assert len(drawn) == (2 if fails else 3)
    assert len(set(drawn)) == 1
    assert (state(), random.getstate(), torch.get_rng_state().tolist()) == before
