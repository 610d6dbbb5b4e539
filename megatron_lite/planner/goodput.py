"""Goodput under node failures: expected run time, and the save interval that minimizes it (Young 1974, Daly 2006).

Symbols: M mean time between failures of the job, d time that a save blocks training, R time from a failure to the
first iteration of the next job, t training time between two saves.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import exp, expm1, inf, sqrt

LLAMA3_NODE_HOURS = 6000.0
"""Hours between unexpected interruptions per node of 8 GPUs: 419 in 54 days on 2,048 nodes (arXiv:2407.21783, section
3.3.4)."""
MOST_LOST = 50.0


@dataclass(frozen=True)
class Goodput:
    """Expected effect of failures.

    Attributes:
        failure_seconds: M.
        failures: expected number over the run.
        share: useful part of the expected run time, 0 to 1.
        lost_seconds: expected run time beyond training and saves: repeated iterations and restarts.
        best_seconds: training time between saves with the largest share (Daly's optimum).
        best_share: share with that interval.
        can_finish: whether the failures leave the run a chance: they take at most MOST_LOST times as long as the rest.
    """

    failure_seconds: float
    failures: float
    share: float
    lost_seconds: float
    best_seconds: float
    best_share: float
    can_finish: bool


def goodput(*, useful: float, between: float, save: float, restart: float, node_hours: float, nodes: int) -> Goodput:
    """Return the expected effect of failures that are independent of time and node.

    Args:
        useful: seconds of training in all.
        between: t; inf: nothing is saved, so that a failure loses everything since the start.
        save: d.
        restart: R.
        node_hours: mean time between failures of one node.
        nodes: of the job.
    """
    mean = 3600.0 * node_hours / nodes
    total = expected_seconds(useful, min(between, useful), save, restart, mean)
    best = best_interval(save, mean)
    least = expected_seconds(useful, min(best, useful), save, restart, mean)
    without = useful * (1.0 + save / min(between, useful)) if useful else 0.0
    lost = max(0.0, total - without)
    return Goodput(
        failure_seconds=mean,
        failures=total / mean,
        share=useful / total if total else 1.0,
        lost_seconds=lost,
        best_seconds=best,
        best_share=useful / least if least else 1.0,
        can_finish=lost <= MOST_LOST * without,
    )


def expected_seconds(useful: float, between: float, save: float, restart: float, mean: float) -> float:
    """Return Daly's expected run time M exp(R/M) (exp((t + d)/M) - 1) useful / t (2006, eq. 13)."""
    if not useful:
        return 0.0
    if max(between + save, restart) / mean > 300.0:
        return inf
    return mean * exp(restart / mean) * expm1((between + save) / mean) * useful / between


def best_interval(save: float, mean: float) -> float:
    """Return Daly's optimal training time between saves (2006, eq. 37); for d << M it is Young's sqrt(2 d M)."""
    if save >= 2.0 * mean:
        return mean
    ratio = sqrt(save / (2.0 * mean))
    return max(1e-9, sqrt(2.0 * save * mean) * (1.0 + ratio / 3.0 + ratio * ratio / 9.0) - save)
