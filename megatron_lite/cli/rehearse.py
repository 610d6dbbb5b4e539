"""CLI command `rehearse`: simulates ranks of a job on this machine; memory, traffic and errors per rank."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from megatron_lite.cli.explain import fill_vocabulary
from megatron_lite.config.arguments import asks_for_help, parse_command
from megatron_lite.config.run import RunConfig
from megatron_lite.errors import ConfigError
from megatron_lite.formatting import format_parameters, format_size, size_unit

if TYPE_CHECKING:
    from megatron_lite.rehearsal.dry_run import RankReport

SUMMARY = "play ranks of a big job on this machine: what each holds, sends, and would fail at"
USAGE = """usage: megatron-lite rehearse FLAG [VALUE] … --world-size N
                              [--rank RANK …] [--json]

The flags are those of pretrain_gpt.py; put the job's own command line here, with
its launcher (torchrun …, srun …) or without, in quotes if it has any of its own.
Chosen ranks of it (by default the first replica's pipeline stages and the last
rank) build their part of the model and step it once for every stage of the
batch's ramp-up, on tensors that have shapes and no values. Data, tokenizer and
checkpoints are not read.

  --world-size N   ranks of the job, where the launcher's words do not say them
  --rank RANK …    ranks to play instead of the default ones
  --json           one JSON object instead of tables

Exit code 1: a rank failed, or two would have waited for each other forever."""
STAGES_SHOWN = 12
MAX_DIGITS = 18
"""Digits of a rank that are read: more is outside of any job all the same."""


def run(argv: list[str]) -> int:
    """Rehearses the training command `argv`."""
    if asks_for_help(argv):
        print(USAGE)
        return 0
    as_json = "--json" in argv
    words, ranks = _take_ranks([word for word in argv if word != "--json"])
    config, vocabulary = fill_vocabulary(parse_command(words).config)
    outside = [rank for rank in ranks if not 0 <= rank < config.parallel.world_size]
    if outside:
        raise ConfigError(
            "Ranks to play are ranks of the job",
            found=f"--rank {outside[0]}, --world-size {config.parallel.world_size}",
            fix=f"Give --rank 0 to {config.parallel.world_size - 1}, or the job's --world-size",
        )
    # Only here: it imports torch.
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
    """Splits --rank and the numbers behind it from the training flags."""
    words, ranks, taking = list[str](), list[int](), False
    for word in argv:
        if word == "--rank" or word.startswith("--rank="):
            taking = True
            word = word.partition("=")[2]
            if not word:
                continue
        if taking and word.isascii() and word.isdigit():
            ranks.append(int(word[:MAX_DIGITS]))
        else:
            taking = False
            words.append(word)
    return words, list(dict.fromkeys(ranks))


def _record(
    config: RunConfig, vocabulary: str, reports: Sequence[RankReport], differences: list[str], seconds: float
) -> dict[str, Any]:
    parallel = config.parallel
    return {
        "layout": {"world_size": parallel.world_size, "tp": parallel.tp, "pp": parallel.pp, "dp": parallel.dp},
        "vocabulary": {"size": config.model.vocab_size, "from": vocabulary},
        "seconds": seconds,
        "ranks": [_rank_record(report) for report in reports],
        "disagreements": differences,
    }


def _rank_record(report: RankReport) -> dict[str, Any]:
    from megatron_lite.backend.accounting import totals

    stages = []
    for plan, played in zip(report.plans, report.played, strict=False):
        stage: dict[str, Any] = {
            "iteration": plan.iteration,
            "global_batch": plan.global_batch,
            "seq_length": plan.seq_length,
            "microbatches": plan.microbatches,
            "played": played is not None,
        }
        if played is not None:
            stage["working_bytes"] = played.working_bytes
            stage["traffic"] = [
                {"axis": axis, "kind": kind, "calls": total.calls, "bytes": total.size, "sent": total.sent}
                for (axis, kind), total in totals(played.transfers).items()
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
    from rich.console import Console

    console = Console()
    layout = record["layout"]
    world = layout["world_size"]
    console.print(
        f"{world} rank{'s' * (world > 1)} = tensor {layout['tp']} x pipeline {layout['pp']} x data {layout['dp']}; "
        f"vocabulary {record['vocabulary']['size']:,} ({record['vocabulary']['from']})"
    )
    console.print(_memory_table(record["ranks"]))
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


def _memory_table(ranks: list[dict[str, Any]]) -> Any:
    kinds = list(dict.fromkeys(kind for rank in ranks for kind in rank["buffer_bytes"]))
    short = {"parameters": "weights", "gradients": "grads", "main parameters": "mains"}
    rows = []
    for rank in ranks:
        held = [rank["buffer_bytes"].get(kind, 0) for kind in kinds]
        rows.append([*held, rank["working_bytes"], sum(held) + rank["working_bytes"]])
    # One unit for the whole table, so that its numbers compare at a glance.
    unit, name = size_unit(max(row[-1] for row in rows))
    columns = [short.get(kind, kind) for kind in kinds]
    table = _table(f"What a rank holds ({name})", "rank", "dp.pp.tp", "params", *columns, "working", "sum")
    for rank, row in zip(ranks, rows, strict=True):
        at = f"{rank['dp']}.{rank['pp']}.{rank['tp']}"
        table.add_row(
            str(rank["rank"]), at, format_parameters(rank["parameters"]), *[f"{size / unit:,.2f}" for size in row]
        )
    return table


def _traffic_table(ranks: list[dict[str, Any]]) -> Any:

    table = _table("What it sends in an iteration of the last batch", "rank", "axis", "kind", "calls", "sent")
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
