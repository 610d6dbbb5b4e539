"""Predicted iteration times of a run (by planner/step_time.py), shown beside the measured ones in its report."""

from __future__ import annotations

from collections import Counter

import numpy as np

from megatron_lite.config.run import RunConfig
from megatron_lite.errors import MegatronLiteError
from megatron_lite.planner.hardware import Hardware, device_of
from megatron_lite.planner.step_time import StepTime, step_time_of
from megatron_lite.report.run_log import Column, RunLog
from megatron_lite.report.timeline import COMMUNICATION, COMPUTE, OPTIMIZER

SHAPES = 200
"""Pairs of batch size and sequence length that are predicted; a longer ramp is sampled."""


class RunPlan:
    """Predictions for the last start of a run, on the data sheet of its devices.

    Args:
        config: of the run.
        machine: its devices.
        log: the run.
    """

    def __init__(self, config: RunConfig, machine: Hardware, log: RunLog) -> None:
        self.machine = machine
        pairs = np.stack((log.columns["global_batch_size"], log.columns["seq_length"]), axis=1)
        pairs = np.where(np.isfinite(pairs), pairs, 0.0)
        shapes, numbers = np.unique(pairs, axis=0, return_inverse=True)
        numbers = numbers.reshape(-1)
        every = -(-len(shapes) // SHAPES)
        steps = {
            number: step_time_of(config, machine, int(shapes[number, 0]), int(shapes[number, 1]))
            for number in range(0, len(shapes), max(1, every))
            if shapes[number].all()
        }
        seconds = np.full(len(shapes), np.nan)
        for number, step in steps.items():
            seconds[number] = step.total
        self.seconds: Column = seconds[numbers]
        """Of each iteration; NaN: not predicted."""
        common = Counter(numbers[len(numbers) // 2 :].tolist()).most_common(1)[0][0]
        self.step: StepTime | None = steps.get(common)
        """The most frequent iteration of the second half."""


def make_plan(log: RunLog, config: RunConfig | None) -> RunPlan | None:
    """Return the predictions for a run; None: the planner does not know its device, or another version wrote it."""
    device = device_of(str(log.start.get("device", "")))
    if config is None or device is None or device.name == "cpu" or not len(log.columns["iteration"]):
        return None
    hosts = log.start.get("hosts", ())
    per_node = max(Counter(hosts).values(), default=0) or device.per_node
    try:
        plan = RunPlan(config, Hardware(device, per_node), log)
    except MegatronLiteError:
        return None
    return plan if np.isfinite(plan.seconds).any() else None


def planned_parts(step: StepTime) -> dict[str, float]:
    """Return the predicted seconds by the measured parts of an iteration (metrics/compute_time.py)."""
    return {
        COMPUTE: step.matmul + step.attention + step.elementwise + step.recompute + step.tensor_parallel,
        COMMUNICATION: step.context_parallel + step.pipeline + step.bubble + step.data_parallel,
        OPTIMIZER: step.optimizer,
    }
