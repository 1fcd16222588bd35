"""What a model holds is found once, and again where anything came, went or was replaced."""

import gc
import weakref

import pytest
import torch
from torch import nn

from autolr_fast import InPlace
from autolr_fast._evaluators import Prober
from autolr_fast._isolation import Isolation, probed
from autolr_fast._isolation.inventory import Inventory, inventory_of
from autolr_fast._steps import StepLine


def network():
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Sequential(nn.ReLU()), nn.Linear(4, 1))
    model[0].scale, model[0].seen = 1.0, [torch.zeros(2)]
    return model


CHANGES = {
    "a module is added": lambda model: model.append(nn.BatchNorm1d(1)),
    "a module is added inside": lambda model: model[2].append(nn.BatchNorm1d(4)),
    "a module is removed": lambda model: model.pop(0),
    "a module is replaced": lambda model: model.__setitem__(2, nn.BatchNorm1d(4)),
    "a module without a name in Sequential": lambda model: model[2].add_module("more", nn.BatchNorm1d(4)),
    "a parameter is added": lambda model: model[2].register_parameter("bias", nn.Parameter(torch.zeros(4))),
    "a parameter is replaced": lambda model: setattr(model[0], "bias", nn.Parameter(torch.zeros(4))),
    "a buffer is added": lambda model: model[2].register_buffer("count", torch.zeros(())),
    "a buffer is replaced": lambda model: setattr(model[1], "running_mean", torch.zeros(4)),
    "an attribute is added": lambda model: setattr(model[2], "calls", 0),
    "an attribute is replaced": lambda model: setattr(model[0], "scale", 2.0),
    "an attribute is renamed": lambda model: setattr(model[0], "again", model[0].__dict__.pop("seen")),
    "a list grows": lambda model: model[0].seen.append(torch.zeros(2)),
    "a list has another tensor": lambda model: model[0].seen.__setitem__(0, torch.zeros(2)),
    "the mode": lambda model: model.eval(),
}


def held(model):
    return {(id(module), name): value for module in model.modules() for name, value in vars(module).items()}


@pytest.mark.parametrize("change", CHANGES)
def test_what_was_found_is_not_used_after(change):
    model = network()
    known = Inventory(list(model.modules()))
    assert inventory_of(model, known) is known
    CHANGES[change](model)
    again = inventory_of(model, known)
    assert again is not known
    assert again.modules == list(model.modules())
    assert set(map(id, again.parameters)) == set(map(id, model.parameters()))
    assert {id(buffer) for buffer in model.buffers()} <= set(map(id, again.tensors))


def test_values_may_change_and_another_model_has_its_own():
    model, other = network(), network()
    known = Inventory(list(model.modules()))
    with torch.no_grad():
        for tensor in [*model.parameters(), *model.buffers(), *model[0].seen]:
            tensor.add_(1)
    model[0].weight.requires_grad_(False)
    assert inventory_of(model, known) is known
    assert inventory_of(other, known).modules == list(other.modules())


@pytest.mark.parametrize("change", CHANGES)
def test_isolation_puts_back_what_changed_since_it_was_known(change):
    model = network()
    closure = probed(lambda: sum(parameter.sum() for parameter in model.parameters()))
    with Isolation(model, closure) as isolation:
        isolation.run(closure)
    CHANGES[change](model)
    names = held(model)
    values = [tensor.clone() for tensor in model.buffers()]

    def write():
        for tensor in model.buffers():
            tensor.add_(1)
        for module in model.modules():
            module.was_here = True
        model.train(not model.training)
        return torch.zeros(())

    with Isolation(model, closure) as isolation:
        isolation.run(write)
    assert held(model).keys() == names.keys()
    assert all(held(model)[name] is value for name, value in names.items())
    assert all(map(torch.equal, model.buffers(), values))


@pytest.mark.parametrize("with_attribute", [False, True])
def test_probes_keep_what_they_found_unless_that_may_be_large(with_attribute):
    model = nn.Sequential(nn.Linear(3, 1), nn.BatchNorm1d(1))
    if with_attribute:
        model[0].activations = torch.zeros(1000)
    x = torch.randn(4, 3)
    line = StepLine({each: each.detach().clone() for each in model.parameters()}, {}, window=1)
    prober = Prober(model, InPlace(), None, False, torch.device("cpu"))
    found = []
    for _ in range(2):
        prober.look(line, lambda: model(x).square().mean(), [0.5, 2.0])
        found.append(prober._inventory)
    if with_attribute:
        alive = weakref.ref(model[0].activations)
        model[0].activations = None
        gc.collect()
        assert found == [None, None]
        assert alive() is None
    else:
        assert found[0] is found[1] is not None


@pytest.mark.filterwarnings("ignore")
def test_what_scripted_modules_hold_is_found_each_time():
    model = nn.Sequential(nn.Linear(3, 2), torch.jit.script(nn.BatchNorm1d(2)))
    known = Inventory(list(model.modules()))
    assert not known.is_plain
    assert inventory_of(model, known) is not known
