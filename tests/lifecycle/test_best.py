"""Best validation: lowest loss, patience, saved state."""

import json
import math

from megatron_lite.lifecycle.best import BestValidation


def observe(best, losses, first=1):
    return [best.observe(iteration, loss) for iteration, loss in enumerate(losses, first)]


def test_the_lowest_loss_is_the_best():
    best = BestValidation()
    assert observe(best, [5.0, 4.0, math.nan, 4.0, 3.9]) == [True, True, False, False, True]
    assert (best.loss, best.iteration, best.exhausted) == (3.9, 5, False)
    assert best.has_observed(5) and not best.has_observed(4)


def test_patience_ends_after_evaluations_without_improvement():
    best = BestValidation(patience=2)
    observe(best, [5.0, 5.1])
    assert not best.exhausted
    observe(best, [4.0, 4.2, math.nan], first=3)
    assert best.exhausted
    assert "at iteration 5" in best.describe() and "lowest, 4.000000E+00, at iteration 3" in best.describe()


def test_an_improvement_by_less_than_the_threshold_is_the_best_but_ends_the_patience():
    best = BestValidation(patience=2, threshold=0.1)
    assert observe(best, [5.0, 4.95, 4.92]) == [True, True, True]
    assert best.exhausted
    observe(best, [4.8], first=4)
    assert not best.exhausted


def test_a_second_evaluation_of_an_iteration_does_not_count():
    best = BestValidation(patience=1)
    assert best.observe(3, 5.0)
    assert not best.observe(3, 4.0)
    assert (best.loss, best.exhausted) == (5.0, False)


def test_the_state_survives_json():
    for losses in ([], [math.nan], [5.0, 4.0, 4.5]):
        best = BestValidation(patience=2)
        observe(best, losses)
        copy = BestValidation(patience=2)
        copy.load(json.loads(json.dumps(best.state())))
        assert copy == best
