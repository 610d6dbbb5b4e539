"""CLI command `rehearse`: dry run of a job's ranks on this machine; memory, traffic and errors per rank."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from megatron_lite.cli.standard_output import make_console
from megatron_lite.config.arguments import asks_for_help, parse_command
from megatron_lite.config.layout import axis_sizes, describe_sizes, shown_axes
from megatron_lite.config.run import RunConfig
from megatron_lite.data.serving.epochs import with_epochs
from megatron_lite.errors import ConfigError
from megatron_lite.formatting import format_parameters, format_size, size_unit
from megatron_lite.tokenizer.vocabulary import fill_vocabulary

if TYPE_CHECKING:
    from megatron_lite.rehearsal.dry_run import RankReport

SUMMARY = "dry run of a big job's ranks on this machine: memory, communication and errors of each"
USAGE = """usage: megatron-lite rehearse FLAG [VALUE] … --world-size N
                              [--rank RANK …] [--json]

Takes the flags of pretrain_gpt.py, or the job's complete command line with its
launcher (torchrun …, srun …); quote it if it contains quotes itself.
Some ranks (by default the first replica's pipeline stages and the last rank)
build their part of the model and run one iteration of every stage of the batch
size ramp-up, on meta tensors. Data, tokenizer and checkpoints are not read.

  --world-size N   ranks of the job, if the launcher's arguments do not give them
  --rank RANK …    ranks to run instead of the default ones
  --json           print one JSON object instead of tables

Exit code 1: a rank failed, or the communication of two ranks does not match."""
STAGES_SHOWN = 12
MAX_DIGITS = 18
"""Digits of a rank that are read; larger numbers are outside of any job."""


def run(argv: list[str]) -> int:
    """Run the command with `argv`; return the exit code."""
    if asks_for_help(argv):
        print(USAGE)
        return 0
    as_json = "--json" in argv
    tokens, ranks = _take_ranks([token for token in argv if token != "--json"])
    config, vocabulary = fill_vocabulary(with_epochs(parse_command(tokens).config))
    if config.runtime.device == "xla":
        raise ConfigError(
            "Ranks of --device xla cannot be rehearsed",
            rule="Its process runs one graph on all devices of a host, which XLA partitions",
            fix="Instead, run the training command for a few iterations with PJRT_DEVICE=CPU and CPU_NUM_DEVICES set "
            "to the number of devices (docs/tpu.md)",
        )
    if config.runtime.engine == "deepspeed":
        raise ConfigError(
            "Ranks of --engine deepspeed cannot be rehearsed: a rehearsal runs the native engine",
            fix="Replace --engine deepspeed and the flags of DeepSpeed by --use-distributed-optimizer (ZeRO stage 1) "
            "for the rehearsal",
        )
    outside = [rank for rank in ranks if not 0 <= rank < config.parallel.world_size]
    if outside:
        raise ConfigError(
            f"--rank {outside[0]} does not exist in a job of {config.parallel.world_size} ranks (--world-size)",
            fix=f"Give --rank a number from 0 to {config.parallel.world_size - 1}, or the --world-size of the job",
        )
    # Imported here because these modules import torch.
    from megatron_lite.rehearsal.dry_run import rehearse_ranks, representative_ranks
    from megatron_lite.rehearsal.mismatches import call_mismatches

    started = time.perf_counter()
    reports = list(rehearse_ranks(config, dict.fromkeys(ranks, True) or representative_ranks(config)))
    differences = call_mismatches(reports)
    record = _record(config, vocabulary, reports, differences, time.perf_counter() - started)
    if as_json:
        print(json.dumps(record, indent=2))
    else:
        _print_tables(record)
    return 1 if differences or any(report.error for report in reports) else 0


def _take_ranks(argv: Sequence[str]) -> tuple[list[str], list[int]]:
    """Separate --rank and its numbers from the training command; return the command's tokens and the ranks."""
    tokens, ranks, in_ranks = list[str](), list[int](), False
    for token in argv:
        if token == "--rank" or token.startswith("--rank="):
            in_ranks = True
            token = token.partition("=")[2]
            if not token:
                continue
        if in_ranks and token.isascii() and token.isdigit():
            ranks.append(int(token[:MAX_DIGITS]))
        else:
            in_ranks = False
            tokens.append(token)
    return tokens, list(dict.fromkeys(ranks))


def _record(
    config: RunConfig, vocabulary: str, reports: Sequence[RankReport], differences: list[str], seconds: float
) -> dict[str, Any]:
    parallel = config.parallel
    return {
        "layout": {"world_size": parallel.world_size, **axis_sizes(parallel)},
        "vocabulary": {"size": config.model.vocab_size, "from": vocabulary},
        "seconds": seconds,
        "ranks": [_rank_record(report) for report in reports],
        "disagreements": differences,
    }


def _rank_record(report: RankReport) -> dict[str, Any]:
    from megatron_lite.backend.accounting import totals

    stages = []
    for plan, record in zip(report.plans, report.iterations, strict=False):
        stage: dict[str, Any] = {
            "iteration": plan.iteration,
            "global_batch": plan.global_batch,
            "seq_length": plan.seq_length,
            "microbatches": plan.microbatches,
            "played": record is not None,
        }
        if record is not None:
            stage["working_bytes"] = record.working_bytes
            stage["traffic"] = [
                {"axis": axis, "kind": kind, "calls": total.calls, "bytes": total.size, "sent": total.sent}
                for (axis, kind), total in totals(record.transfers).items()
            ]
        stages.append(stage)
    return {
        "rank": report.rank,
        **report.at,
        "parameters": report.parameters,
        "buffer_bytes": report.buffers,
        "working_bytes": max((stage.get("working_bytes", 0) for stage in stages), default=0),
        "ramp_stages": stages,
        "seconds": report.seconds,
        "error": report.error,
    }


def _print_tables(record: dict[str, Any]) -> None:

    console = make_console()
    layout = record["layout"]
    world = layout["world_size"]
    axes = shown_axes(layout["cp"])
    console.print(
        f"{world} rank{'s' * (world > 1)} = {describe_sizes(layout)}; "
        f"vocabulary {record['vocabulary']['size']:,} ({record['vocabulary']['from']})"
    )
    console.print(_memory_table(record["ranks"], axes))
    if world > 1:
        console.print(_traffic_table(record["ranks"]))
    console.print(_ramp_table(record["ranks"]))
    console.print(f"Rehearsed in {record['seconds']:.1f} s.")
    problems = [f"rank {rank['rank']}: {rank['error']}" for rank in record["ranks"] if rank["error"]]
    for problem in [*problems, *record["disagreements"]]:
        console.print(f"WOULD FAIL: {problem}", style="bold red", markup=False, soft_wrap=True)


def _table(title: str, *columns: str) -> Any:
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    table = Table(title=title, title_justify="left", box=SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
    for column in columns:
        table.add_column(column, justify="right", no_wrap=True)
    return table


def _memory_table(ranks: list[dict[str, Any]], axes: Sequence[str]) -> Any:
    kinds = list(dict.fromkeys(kind for rank in ranks for kind in rank["buffer_bytes"]))
    short = {"parameters": "weights", "gradients": "grads", "main parameters": "mains"}
    rows = []
    for rank in ranks:
        held = [rank["buffer_bytes"].get(kind, 0) for kind in kinds]
        rows.append([*held, rank["working_bytes"], sum(held) + rank["working_bytes"]])
    # One unit for the whole table, so that numbers can be compared.
    unit, name = size_unit(max(row[-1] for row in rows))
    columns = [short.get(kind, kind) for kind in kinds]
    table = _table(f"Memory of a rank ({name})", "rank", ".".join(axes), "params", *columns, "working", "sum")
    for rank, row in zip(ranks, rows, strict=True):
        at = ".".join(str(rank[axis]) for axis in axes)
        table.add_row(
            str(rank["rank"]), at, format_parameters(rank["parameters"]), *[f"{size / unit:,.2f}" for size in row]
        )
    return table


def _traffic_table(ranks: list[dict[str, Any]]) -> Any:

    table = _table("Communication per iteration (final batch)", "rank", "axis", "kind", "calls", "sent")
    for rank in ranks:
        last = rank["ramp_stages"][-1] if rank["ramp_stages"] else {}
        for line in last.get("traffic", ()):
            if line["sent"]:
                table.add_row(
                    str(rank["rank"]), line["axis"], line["kind"], f"{line['calls']:,}", format_size(line["sent"])
                )
    return table


def _ramp_table(ranks: list[dict[str, Any]]) -> Any:

    first, last = ranks[0], ranks[-1]
    table = _table(
        "Ramp-up: " + (f"ranks {first['rank']} and {last['rank']}" if first is not last else f"rank {first['rank']}"),
        "iteration",
        "batch",
        "length",
        "micro-batches",
        "sent",
    )
    shown = [first] if first is last else [first, last]
    pairs = list(zip(*(rank["ramp_stages"] for rank in shown), strict=False))
    hidden = max(0, len(pairs) - STAGES_SHOWN)
    for number, pair in enumerate(pairs):
        if hidden and STAGES_SHOWN // 2 <= number < STAGES_SHOWN // 2 + hidden:
            if number == STAGES_SHOWN // 2:
                table.add_row("…", f"{hidden} more", "", "(--json)", "")
            continue
        stage = pair[0]
        table.add_row(
            f"{stage['iteration']:,}",
            f"{stage['global_batch']:,}",
            f"{stage['seq_length']:,}",
            " and ".join(str(one["microbatches"]) for one in pair),
            " and ".join(format_size(sum(line["sent"] for line in one.get("traffic", ()))) for one in pair),
        )
    return table
