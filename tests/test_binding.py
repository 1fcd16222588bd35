"""A closure keeps the variables that it ran with, and leaves those of the loop alone."""

import functools
import gc
import weakref

import pytest

from autolr_fast._isolation.binding import bound


def defined(source, **variables):
    """Return the function ``closure`` of a module that also has these variables, and all its variables."""
    exec(source, variables)
    return variables["closure"], variables


# source -> what the closure returns where x is 1, also once x is 2
READS = {
    "a global": "def closure(): return x",
    "in a lambda": "closure = lambda: x",
    "in a function inside": "def closure():\n    def inside(): return x\n    return inside()",
    "in a comprehension": "def closure(): return sum(x for _ in range(1))",
    "a free variable": "def make(x):\n    def closure(): return x\n    return closure\nclosure = make(x)",
    "a default": "def closure(x=x): return x",
    "a default by keyword": "def closure(*, x=x): return x",
    "with builtins": "def closure(): return max(x, 0)",
    "with an import inside": "def closure():\n    import math\n    return math.floor(x)",
}


@pytest.mark.parametrize("case", sorted(READS))
def test_it_reads_what_was_there(case):
    closure, variables = defined(READS[case], x=1)
    again = bound(closure)
    assert again() == closure() == 1
    variables["x"] = 2
    assert again() == 1
    assert variables["x"] == 2


def test_a_free_variable_that_goes_on_is_read_as_it_was():
    x = 1
    again = bound(lambda: x)
    x = 2
    assert again() == 1


def test_a_free_variable_that_was_not_bound_is_not_bound():
    def closure():
        return x

    again = bound(closure)
    x = 2
    assert closure() == 2
    with pytest.raises(NameError):
        again()


WRITES = """
def closure():
    global seen
    try:
        seen = seen + [x]
    except NameError:
        seen = [x]
    return seen
"""


@pytest.mark.parametrize("before", [[], [[0]]])
@pytest.mark.parametrize("goes_on", [False, True])
def test_a_global_that_it_writes_stays_as_training_wrote_it(before, goes_on):
    """Each run finds it as the first did: also where it was not bound then."""
    closure, variables = defined(WRITES, x=1, **({"seen": before[0]} if before else {}))
    again = bound(closure)
    expected = [*(before[0] if before else []), 1]
    assert closure() == expected  # training
    if goes_on:
        variables["x"] = 2
    for _ in range(3):
        assert again() == expected
        assert variables["seen"] == expected
    assert variables["x"] == (2 if goes_on else 1)


def test_a_global_that_comes_later_is_not_there():
    closure, variables = defined("def closure(): return late")
    again = bound(closure)
    variables["late"] = 3
    assert closure() == 3
    with pytest.raises(NameError, match="'late'"):
        again()
    del variables["late"]
    with pytest.raises(NameError, match="'late'"):
        again()


def test_a_global_that_has_gone_is_there():
    closure, variables = defined("def closure(): return x", x=1)
    again = bound(closure)
    del variables["x"]
    assert again() == 1
    assert "x" not in variables


@pytest.mark.parametrize("before", [{}, {"real": 5}])
def test_attributes_are_no_variables(before):
    """They are read late, also where a global has the name of one."""
    closure, variables = defined("def closure(): return number.real", number=complex(1, 2), **before)
    again = bound(closure)
    for real in (7, 8):
        variables["real"] = real
        assert again() == closure() == 1

    class Holder:
        kept = 1

    closure, _ = defined("def closure(): return holder.kept", holder=Holder)
    again = bound(closure)
    Holder.kept = 2
    assert again() == 2


def test_what_it_calls_reads_its_own_variables():
    """Late: of this AutoLR tells where it matters."""
    closure, variables = defined("def helper(): return x\ndef closure(): return helper()", x=1)
    again = bound(closure)
    variables["x"] = 2
    assert again() == 2
    variables["helper"] = lambda: 3  # but it is this helper
    assert again() == 2


@pytest.mark.parametrize("callable_of", [functools.partial, lambda function: function.__get__(1).__call__])
def test_what_is_no_function_is_returned_as_it_is(callable_of):
    closure = callable_of(lambda *_: 1)
    assert bound(closure) is closure


def test_it_keeps_nothing_alive_once_it_is_gone():
    class Batch:
        pass

    closure, variables = defined("def closure(): return x", x=Batch())
    again = bound(closure)
    variables["x"] = None
    gc.disable()
    try:
        ref = weakref.ref(again())
        assert ref() is not None
        del again
        assert ref() is None
    finally:
        gc.enable()
