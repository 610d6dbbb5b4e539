import json
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_lite.config.optimizer import PrecisionConfig
from megatron_lite.errors import TrainingError
from megatron_lite.optim.loss_scaler import MAX_OVERFLOWS, build_loss_scaler

CONSTANTS = st.tuples(st.integers(1, 20), st.sampled_from([0.25, 1.0]), st.integers(1, 5), st.integers(1, 4))
HISTORY = st.lists(st.booleans(), max_size=60)


def scaler(rule, power, minimum, window, hysteresis):
    return build_loss_scaler(
        PrecisionConfig(
            dtype="fp16",
            scaler=rule,
            initial_loss_scale=2.0**power,
            min_loss_scale=minimum,
            loss_scale_window=window,
            hysteresis=hysteresis,
        )
    )


def megatron(power, minimum, window, hysteresis, history):
    """Return the scale after each iteration, computed from the complete history each time, without counters.

    None where it is given up, which Megatron never does.
    """
    scale, since_doubling, used = 2.0**power, [], []
    for overflow in history:
        used.append(scale if overflow else math.inf)
        if len(used) >= MAX_OVERFLOWS and max(used[-MAX_OVERFLOWS:]) <= minimum:
            yield None
            return
        since_doubling.append(overflow)
        good = next((i for i, bad in enumerate(reversed(since_doubling)) if bad), len(since_doubling))
        if overflow and sum(since_doubling) >= hysteresis:
            scale = max(scale / 2, minimum)
        elif good and good % window == 0:
            scale, since_doubling = scale * 2, []
        yield scale


def deepspeed(power, minimum, window, hysteresis, history):
    """Return the scale after each iteration; None: DeepSpeed ends the run."""
    scale, last, spent = 2.0**power, -1, 0
    for iteration, overflow in enumerate(history):
        if overflow:
            last = iteration
            if spent < hysteresis - 1:
                spent += 1
            elif scale == minimum:
                yield None
                return
            else:
                scale = max(scale / 2, minimum)
        elif (iteration - last) % window == 0:
            scale, spent = scale * 2, 0
        yield scale


@given(CONSTANTS, HISTORY)
def test_megatrons_rule(constants, history):
    follows(scaler("megatron", *constants), history, megatron(*constants, history))


@given(CONSTANTS, HISTORY)
def test_deepspeeds_rule(constants, history):
    follows(scaler("deepspeed", *constants), history, deepspeed(*constants, history))


def follows(ours, history, scales):
    for overflow, expected in zip(history, scales, strict=False):
        if expected is None:
            with pytest.raises(TrainingError, match="min-loss-scale"):
                ours.update(overflow)
            return
        ours.update(overflow)
        assert ours.scale == expected


@given(st.sampled_from(["megatron", "deepspeed"]), HISTORY, HISTORY)
def test_a_restored_scaler_continues_exactly(rule, before, after):
    constants = (30, 2.0**-40, 3, 2)
    straight, resumed = scaler(rule, *constants), scaler(rule, *constants)
    for overflow in before:
        straight.update(overflow)
    resumed.load(json.loads(json.dumps(straight.state())))
    for overflow in after:
        straight.update(overflow)
        resumed.update(overflow)
        assert resumed.scale == straight.scale
    assert resumed.state() == straight.state()


def test_megatrons_scaler_ends_a_run_of_skipped_steps():
    ours = scaler("megatron", 1, 1.0, 1000, 2)
    history = [True] * (2 + MAX_OVERFLOWS - 1) + [False] + [True] * (MAX_OVERFLOWS - 1)
    for overflow in history:  # two reach the minimum; one without overflow resets the count
        ours.update(overflow)
    with pytest.raises(TrainingError, match=rf"{MAX_OVERFLOWS} iterations in a row .*--min-loss-scale.*--bf16"):
        ours.update(True)


def test_hysteresis_is_reset_by_doubling_only():
    ours = scaler("megatron", 10, 1.0, 3, 2)
    scales = []
    for overflow in (1, 0, 1, 1, 0, 0, 0, 1, 1):
        ours.update(bool(overflow))
        scales.append(ours.scale)
    assert scales == [1024, 1024, 512, 256, 256, 256, 512, 512, 256]


def test_tr1s_scaler_doubles_after_500_iterations():
    ours = scaler("deepspeed", 12, 1.0, 500, 2)
    for _ in range(499):
        ours.update(False)
    assert ours.scale == 4096
    ours.update(False)
    assert ours.scale == 8192


@pytest.mark.parametrize(
    ("precision", "scale"),
    [
        (PrecisionConfig(), 1.0),
        (PrecisionConfig(dtype="bf16", loss_scale=64.0), 1.0),
        (PrecisionConfig(dtype="fp16", loss_scale=64.0), 64.0),
        (PrecisionConfig(dtype="fp16"), 2.0**32),
    ],
)
def test_initial_scale(precision, scale):
    ours = build_loss_scaler(precision)
    assert ours.scale == scale
    if precision.loss_scale or precision.dtype != "fp16":
        ours.update(True)
        assert ours.scale == scale and ours.state() == {}
