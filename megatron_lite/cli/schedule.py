"""CLI command `schedule`: prints and draws a simulated pipeline schedule."""

from __future__ import annotations

from pathlib import Path
from typing import get_args

from megatron_lite.cli.parser import Parser, real, whole

SUMMARY = "show a pipeline schedule: timeline, bubble, activations held"

MAX_UNITS = 1_000_000
"""Largest number of simulated forwards: about a minute."""


def run(argv: list[str]) -> int:
    """Show the schedule that `argv` asks for."""
    parser = _parser()
    options = parser.parse_args(argv)
    options.chunks = options.chunks or (2 if options.kind == "interleaved" else 1)
    if options.pp * options.microbatches * options.chunks > MAX_UNITS:
        parser.error(f"--pp times --microbatches times --chunks is at most {MAX_UNITS:,}")

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
    title += f", {chunks} chunks per rank" if chunks > 1 else ""
    print(f"{title}\n\n{text_grid(timeline)}\n")
    if options.actions:
        for rank, actions in enumerate(program):
            print(f"rank {rank}: {' '.join(map(str, actions))}")
        print()
    print(f"time {timeline.makespan:g}, bubble {timeline.bubble:.2%}")
    waits = ", ".join(f"{time:g}" for time in timeline.blocked)
    print(f"time waiting for inputs after the first action, by rank: {waits}")
    print(f"most activations held at once, by rank: {', '.join(map(str, timeline.peak_activations))}", end="")
    print(f" (each 1/{chunks} of a rank's layers)" if chunks > 1 else "")
    if options.png:
        save_picture(timeline, options.png, f"{title}; bubble {timeline.bubble:.2%}")
        print(f"picture written to {options.png}")
    return 0


def _parser() -> Parser:
    from megatron_lite.config.parallel import PipelineKind

    parser = Parser(prog="megatron-lite schedule", description=SUMMARY[0].upper() + SUMMARY[1:] + ".")
    parser.add_argument("--kind", choices=get_args(PipelineKind), default="1f1b", help="the schedule (default: 1f1b)")
    parser.add_argument("--pp", type=whole(1, 4096), default=4, help="pipeline ranks (default: 4)")
    parser.add_argument(
        "--microbatches", type=whole(1, 65_536), default=8, help="micro-batches of one iteration (default: 8)"
    )
    parser.add_argument(
        "--chunks", type=whole(0, 1024), default=0, help="model chunks per rank (default: 2 for interleaved, else 1)"
    )
    parser.add_argument(
        "--png", type=Path, nargs="?", const="schedule.png", metavar="FILE", help="also draw it (default: schedule.png)"
    )
    parser.add_argument("--actions", action="store_true", help="list every rank's actions with sends and receives")
    parser.add_argument(
        "--blocking", action="store_true", help="sends wait for their receives (default: they overlap computation)"
    )
    times = parser.add_argument_group("times", "in any unit; a backward that is not split takes backward + weight")
    times.add_argument("--forward", type=real(1e-6, 1e6), default=1.0, help="forward of a stage (default: 1)")
    times.add_argument("--backward", type=real(1e-6, 1e6), default=1.0, help="input gradient of a stage (default: 1)")
    times.add_argument("--weight", type=real(1e-6, 1e6), default=1.0, help="weight gradients of a stage (default: 1)")
    times.add_argument("--comm", type=real(0.0, 1e6), default=0.0, help="a message between ranks (default: 0)")
    return parser
