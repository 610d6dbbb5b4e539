"""megatron-lite schedule: prints a pipeline schedule as the simulator runs it, and draws it."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import get_args

SUMMARY = "show a pipeline schedule: who computes what when, the bubble, the activations held"


def run(argv: list[str]) -> int:
    """Show the schedule that `argv` asks for."""
    options = _parser().parse_args(argv)
    options.chunks = options.chunks or (2 if options.kind == "interleaved" else 1)

    from megatron_lite.schedules.lowering import lower
    from megatron_lite.schedules.pipeline import num_chunks, pipeline_schedule
    from megatron_lite.schedules.render import save_picture, text_grid
    from megatron_lite.schedules.simulate import Costs, simulate

    costs = Costs(forward=options.forward, backward=options.backward, weight=options.weight, comm=options.comm)
    schedule = pipeline_schedule(options.kind, options.pp, options.microbatches, options.chunks)
    program = lower(schedule, options.kind, options.chunks, costs)
    timeline = simulate(program, costs, blocking=options.blocking)

    chunks = num_chunks(options.kind, options.chunks)
    title = f"{options.kind}: {options.pp} ranks, {options.microbatches} micro-batches"
    title += f", {chunks} chunks a rank" if chunks > 1 else ""
    print(f"{title}\n\n{text_grid(timeline)}\n")
    if options.actions:
        for rank, actions in enumerate(program):
            print(f"rank {rank}: {' '.join(map(str, actions))}")
        print()
    print(f"time {timeline.makespan:g}, bubble {timeline.bubble:.2%}")
    print(f"most activations held at once, by rank: {', '.join(map(str, timeline.peak_activations))}", end="")
    print(f" (each 1/{chunks} of a rank's layers)" if chunks > 1 else "")
    if options.png:
        save_picture(timeline, options.png, f"{title}; bubble {timeline.bubble:.2%}")
        print(f"picture written to {options.png}")
    return 0


def _parser() -> argparse.ArgumentParser:
    from megatron_lite.config.parallel import PipelineKind

    parser = argparse.ArgumentParser(prog="megatron-lite schedule", description=SUMMARY[0].upper() + SUMMARY[1:] + ".")
    parser.add_argument("--kind", choices=get_args(PipelineKind), default="1f1b", help="the schedule (default: 1f1b)")
    parser.add_argument("--pp", type=int, default=4, help="pipeline ranks (default: 4)")
    parser.add_argument("--microbatches", type=int, default=8, help="micro-batches of one iteration (default: 8)")
    parser.add_argument(
        "--chunks", type=int, default=0, help="model chunks a rank (default: 2 for interleaved, else 1)"
    )
    parser.add_argument(
        "--png", type=Path, nargs="?", const="schedule.png", metavar="FILE", help="draw it, too (schedule.png)"
    )
    parser.add_argument("--actions", action="store_true", help="list every rank's actions with sends and receives")
    parser.add_argument(
        "--blocking", action="store_true", help="sends wait for their receives (default: they overlap computation)"
    )
    times = parser.add_argument_group("times", "in any unit; without a split, a backward takes backward + weight")
    times.add_argument("--forward", type=_positive, default=1.0, help="of a stage's forward (default: 1)")
    times.add_argument("--backward", type=_positive, default=1.0, help="of the gradient of its input (default: 1)")
    times.add_argument("--weight", type=_positive, default=1.0, help="of the gradient of its weights (default: 1)")
    times.add_argument("--comm", type=_not_negative, default=0.0, help="of a message between ranks (default: 0)")
    return parser


def _positive(text: str) -> float:
    value = float(text)
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text} is not a time above 0")
    return value


def _not_negative(text: str) -> float:
    return 0.0 if float(text) == 0 else _positive(text)
