"""Phases of a rank: nested, named while they are open, and kept by the exception that ends them."""

import pytest

from megatron_lite.backend.phases import Phases, phase_of


def test_nested_phases_are_named_from_the_outermost():
    phases = Phases()
    assert str(phases) == "start-up"
    with phases.enter("iteration 7"), phases.enter("optimizer"):
        assert str(phases) == "iteration 7, optimizer"
    assert str(phases) == "start-up"


def test_an_exception_keeps_the_phase_in_which_it_was_raised():
    phases, actions = Phases(), ["forward", ""]

    class Executor:
        def __str__(self):
            return actions[0]

    with pytest.raises(ValueError) as raised, phases.enter("iteration 7"), phases.enter(Executor()):
        raise ValueError
    actions.pop(0)
    assert phase_of(raised.value) == "iteration 7, forward"
    assert phase_of(ValueError()) == "start-up"


def test_a_caught_exception_leaves_the_phase_to_later_ones():
    phases = Phases()
    with pytest.raises(KeyError) as raised, phases.enter("saving"):
        try:
            with phases.enter("writing"):
                raise OSError
        except OSError as error:
            raise KeyError from error
    assert phase_of(raised.value) == "saving"
