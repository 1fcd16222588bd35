import pytest

from autolr_fast import __version__
from autolr_fast._state import HEADER, complete

EXPECTED = {**HEADER, "level": {"value": 1.0, "heat": {"step": 2}}, "steps": 3}


def test_a_state_says_which_version_saved_it():
    assert {"version": 2, "saved_by": f"autolr_fast {__version__}"} == HEADER


def test_a_key_that_is_new_gets_its_default():
    """As a later version will read the states of this one."""
    filled = complete(EXPECTED, {**EXPECTED, "history": []}, {"history": []}, "AutoLR")
    assert filled == {**EXPECTED, "history": []}
    kept = complete({**EXPECTED, "history": [1]}, {**EXPECTED, "history": []}, {"history": []}, "AutoLR")
    assert kept["history"] == [1]


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"steps": ...}, "has no 'steps'"),
        ({"level": {"value": 1.0}}, "has no 'level.heat'"),
        ({"level": {"value": 1.0, "heat": {"mean": 2.0}}}, "has no 'level.heat.step'"),
        ({"more": 1}, "has 'more', which is not known here"),
        ({"level": 3.0}, "has 3.0 as 'level'"),
    ],
)
def test_a_key_that_does_not_fit_is_told_with_who_wrote_it(change, says):
    state = {**EXPECTED, "version": 7, "saved_by": "autolr_fast 9.0", **change}
    state = {key: value for key, value in state.items() if value is not ...}
    with pytest.raises(ValueError, match=f"{says}: it was saved by autolr_fast 9.0, version 7, and this is"):
        complete(state, EXPECTED, {}, "AutoLR")


@pytest.mark.parametrize("state", [None, [], "state"])
def test_what_is_no_state_is_told(state):
    with pytest.raises(TypeError, match="state_dict=.*pass what ALRTree.state_dict"):
        complete(state, EXPECTED, {}, "ALRTree")


def test_of_a_dict_that_is_empty_here_the_keys_are_not_known():
    """As of the state of an evaluator that is not chosen yet."""
    state = {**EXPECTED, "evaluator": {"state": {"chunk": 2}}}
    assert complete(state, {**EXPECTED, "evaluator": {"state": {}}}, {}, "AutoLR") == state


def test_a_state_of_before_another_rule_is_refused_with_the_remedy():
    """Also one that has all the keys; one of later is judged by its keys."""
    state = {**EXPECTED, "saved_by": "autolr_fast 0.9"}
    for version in (0, 1):
        with pytest.raises(ValueError, match="by autolr_fast 0.9, version .*another since version 2.*new AutoLR"):
            complete({**state, "version": version}, EXPECTED, {}, "AutoLR", since=2)
    for version in (2, 3):
        assert complete({**state, "version": version}, EXPECTED, {}, "AutoLR", since=2)["version"] == version
    assert complete({**state, "version": 1}, EXPECTED, {}, "ALRTree")["version"] == 1
