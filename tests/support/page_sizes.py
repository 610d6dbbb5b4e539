"""Toy sizes for the documentation's commands: smaller model, fewer iterations and ranks, a shorter node check.

A flag of training that asks for no more than LIMITS keeps its value.
"""

import itertools
from dataclasses import replace
from unittest import mock

from support.toy_files import SIZES

from megatron_lite.lifecycle import node_check
from megatron_lite.ops.doctor.verdict import Thresholds

SHORT = (
    *("--train-iters", "4", "--lr-warmup-iters", "0", "--save-interval", "2", "--log-interval", "1"),
    *("--eval-interval", "2", "--eval-iters", "1"),
)
XLA = ("--micro-batch-size", "1", "--global-batch-size", "8")  # whole micro-batches of 8 devices
TOY = {"generate": ("--max-new-tokens", "4")}
LIMITS = {"--num-layers": 6, "--train-iters": 8}
LARGEST_HIDDEN, LONGEST = 64, 2048
AXES = ("--tensor-model-parallel-size", "--pipeline-model-parallel-size", "--context-parallel-size")
LARGEST_AXIS, FEWEST_RANKS = 2, 2


def toy_flags(config, args):
    """Return the flags to append to a training command whose model is too large for a test; the last flag counts.

    Args:
        config: what they mean.
        args: its flags.
    """
    if config.model.hidden_size <= LARGEST_HIDDEN and config.batch.seq_length <= LONGEST:
        return []
    toy = [*SIZES, *SHORT]
    if config.runtime.device == "xla":
        toy += XLA
    for name, limit in LIMITS.items():
        given = [value for flag, value in itertools.pairwise(args) if flag == name]
        if given and int(given[-1]) <= limit:
            toy[toy.index(name) + 1] = given[-1]
    return toy


def on_few_ranks(args):
    """Return the flags with parallel sizes of at most 2, and the number of ranks: one replica, or two of one rank."""
    args, ranks = list(args), 1
    for place, name in enumerate(args):
        if name in AXES:
            args[place + 1] = str(min(int(args[place + 1]), LARGEST_AXIS))
            ranks *= int(args[place + 1])
    ranks = max(ranks, FEWEST_RANKS)
    for place, name in enumerate(args):
        if name == "--ranks-per-task":
            args[place + 1] = str(ranks)
    return args, ranks


def short_node_check():
    """Make `doctor` measure for a moment, and ignore what is short on this machine."""
    plan_of = node_check.plan_of
    loose = Thresholds(shm=0, free_space=0, inodes=0, rename=60.0)

    def plan(*args, **kwargs):
        return replace(plan_of(*args, **kwargs), speed_seconds=0.02, written_bytes=2**16, thresholds=loose)

    return mock.patch.object(node_check, "plan_of", plan)
