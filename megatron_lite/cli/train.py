"""megatron-lite train (pretrain_gpt.py): Megatron's command line in, a trained model out."""

from __future__ import annotations

import sys

from megatron_lite.backend.environment import read_launch
from megatron_lite.config.arguments import parse_run, raise_all

SUMMARY = "train a GPT; takes Megatron's command line"


def run(argv: list[str]) -> int:
    """Trains, or with --dry-run only says what the command means."""
    launch = read_launch()
    world_size = None if launch.launcher == "python" else launch.world_size
    parsed = parse_run(argv, world_size=world_size)
    if launch.rank == 0:
        for line in (*parsed.notes, *parsed.warnings):
            print(line, file=sys.stderr)
    if parsed.config.runtime.dry_run:
        from megatron_lite.cli import explain

        return explain.run(argv)
    raise_all(parsed.missing)

    from megatron_lite.train.assemble import assembled
    from megatron_lite.train.loop import evaluate, train

    with assembled(parsed.config) as run:
        if parsed.config.training.skip_train:
            evaluate(run, "validation", at_end=True)
            evaluate(run, "test", at_end=True)
        else:
            stop = train(run)
            run.reporter.message(stop.message)
    return 0
