"""Tables of `megatron-lite plan`: the answer and its warnings first, then time, memory, disk, cost and node counts."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text

from megatron_lite.cli.standard_output import make_console
from megatron_lite.formatting import (
    format_count,
    format_parameters,
    format_short,
    format_size,
    format_time,
    size_unit,
)
from megatron_lite.planner.step_time import PARTS

STAGES_SHOWN, NODES_SHOWN, RANKS_SHOWN = 10, 12, 8
MEMORY = {
    "weights": "weights",
    "gradients": "grads",
    "optimizer": "optim",
    "activations": "acts",
    "loss": "loss",
    "communication": "comm",
    "slack": "slack",
}
"""Columns of the memory table."""
DAY = 86400.0


def print_plan(record: dict[str, Any], console: Console | None = None) -> None:
    """Print a plan."""
    console = console or make_console(highlight=False)
    console.print(_answer(record), soft_wrap=True)
    for warning in record["warnings"]:
        console.print(Text(f"! {warning}", style="yellow"), soft_wrap=True)
    console.print()
    for line in _facts(record):
        console.print(line, markup=False, soft_wrap=True)
    for table in (make(record) for make in TABLES):
        if table is not None:
            console.print()
            console.print(table)
    for line in _notes(record):
        console.print(line, markup=False, soft_wrap=True)


def _answer(record: dict[str, Any]) -> Text:
    answer, machine = record["answer"], record["machine"]
    device, devices = machine["device"]["name"], record["layout"]["world_size"]
    text = Text()
    text.append(
        f"{format_days(answer['days'])}, {_hours(answer['device_hours'])}: "
        f"{format_parameters(record['model']['exact'])} on {devices:,} x {device} ({_nodes(machine, devices)})",
        style="bold",
    )
    if done := answer["done_iterations"]:
        text.append(f"\n{format_days(answer['remaining_days'])} of them left after iteration {done:,}", style="bold")
    text.append("\n")
    if not answer["can_finish"]:
        text.append("CANNOT FINISH, ", style="bold red")
    if not answer["fits"]:
        text.append("DOES NOT FIT", style="bold red")
    else:
        text.append("fits", style="bold green")
        text.append(f" ({_memory_line(record['memory'])})")
    if answer["within_budget"] is not None:
        within = answer["within_budget"]
        text.append(", ")
        text.append("within the budget" if within else "OVER THE BUDGET", style="bold green" if within else "bold red")
    count = len(record["warnings"])
    text.append(f", {format_count(count, 'warning')}" if count else ", no warnings")
    return text


def _nodes(machine: dict[str, Any], devices: int) -> str:
    if devices < machine["per_node"]:
        return f"{devices} of {machine['per_node']} in a node"
    return f"{format_count(machine['nodes'], 'node')} of {machine['per_node']}"


def format_days(days: float) -> str:
    """Return a number of days, or hours below two days.

    >>> format_days(28.44), format_days(0.5), format_days(0.01)
    ('28.4 days', '12.0 hours', '00:14:24')
    """
    if days >= 2:
        return f"{days:,.1f} days"
    return f"{days * 24:.1f} hours" if days * 24 >= 2 else format_time(days * DAY)


def _hours(hours: float) -> str:
    return f"{hours:,.0f} GPU hours" if hours >= 10 else f"{hours:.2f} GPU hours"


def _mass(tons: float) -> str:
    return f"{tons:,.1f} t" if tons >= 1 else f"{1000 * tons:,.3g} kg"


def _digits(number: float) -> str:
    return f"{number:,.0f}" if number >= 100 else f"{number:.1f}" if number >= 1 else f"{number:.2g}"


def _memory_line(memory: dict[str, Any]) -> str:
    device = memory["device_bytes"]
    fullest = format_size(memory["fullest_bytes"])
    return f"{fullest} of {format_size(device)} on the fullest rank" if device else f"{fullest} on the fullest rank"


def _facts(record: dict[str, Any]) -> Iterator[str]:
    model, time, disk, cost = record["model"], record["time"], record["disk"], record["cost"]
    yield (
        f"Model       {model['exact']:,} parameters, vocabulary {model['vocab_size']:,} padded to "
        f"{model['padded_vocab_size']:,} ({model['vocabulary_from']})"
    )
    yield f"Layout      {format_count(record['layout']['world_size'], 'rank')} = {record['layout']['text']}"
    yield f"Length      {time['iterations']:,} iterations, {time['samples']:,} samples, {time['tokens']:,} tokens"
    yield (
        f"Speed       {format_short(time['tokens_per_second'])} tokens/s; per GPU "
        f"{_digits(time['model_tflops_per_device'])} TFLOP/s of the model ({time['mfu']:.1%} MFU), "
        f"{_digits(time['hardware_tflops_per_device'])} with recomputation ({time['hfu']:.1%} HFU), of "
        f"{_digits(time['peak_tflops'])} in {time['peak_dtype']}"
    )
    yield (
        f"Rule        {format_days(time['classic_seconds'] / DAY)} by 8 B P / (n T) at that speed "
        "(Narayanan et al. 2021)"
    )
    yield from _disk_facts(disk)
    yield from _goodput_facts(record)
    power = cost["megawatt_hours"]
    energy = f"{power:,.1f} MWh" if power >= 1 else f"{1000 * power:,.1f} kWh"
    carbon = "" if cost["tons_of_co2"] is None else f", {_mass(cost['tons_of_co2'])} of CO2"
    price = "" if cost["price"] is None else f", {cost['price']:,.0f} at the given price"
    more = "" if carbon else " (CO2: --carbon-intensity)"
    yield f"Cost        {_hours(cost['device_hours'])}, {energy}{carbon}{price}{more}"
    if (calibration := record["calibration"]) is not None:
        yield (
            f"Calibrated  on {format_count(calibration['iterations'], 'iteration')} of "
            f"{calibration['measured_seconds']:.4g} s: predicted {calibration['predicted_before']:.4g} s before, "
            f"{calibration['predicted_after']:.4g} s after"
        )
    if (even := record["nodes_without_idle_replicas"]) and len(record["time"]["stages"]) > 1:
        shown = ", ".join(map(str, even[:NODES_SHOWN])) + (", …" if len(even) > NODES_SHOWN else "")
        yield f"Nodes       {shown}: every batch of the ramp-up is equal for all replicas"


def _disk_facts(disk: dict[str, Any]) -> Iterator[str]:
    if not disk["saves"]:
        yield "Disk        no checkpoint without --save"
        return
    kept = disk["kept"]
    yield (
        f"Disk        {format_count(disk['saves'], 'checkpoint')} of {format_size(disk['checkpoint'])}, at most "
        f"{kept:,} at a time: {format_size(disk['total'])}; {format_size(disk['written'])} written, "
        f"{format_size(disk['written_bytes_per_day'])} a day"
    )
    share = disk["share_of_interval"]
    waits = f"training waits {format_time(disk['blocking_seconds'])}" + (f" ({share:.1%})" if 0 < share < 1 else "")
    yield (
        f"            a save is written in {format_time(disk['save_seconds'])} at "
        f"{disk['write_rate'] / 1e9:.3g} GB/s (--write-gbytes), {waits}"
    )


def _goodput_facts(record: dict[str, Any]) -> Iterator[str]:
    found, hours = record["goodput"], record["assumptions"]["node_hours"]
    every = format_time(found["failure_seconds"])
    rate = f"a node fails every {hours:,.4g} h (--node-mttf-hours), the job every {every}"
    if not found["can_finish"]:
        yield f"Failures    {rate}: not in the total, since the run cannot finish"
        return
    best = f"best time between saves {format_time(found['best_seconds'])} (Daly 2006), goodput"
    if found["between_saves_seconds"] is None:
        yield f"Failures    {rate}: not in the total, since nothing is saved"
        yield f"            {best} {found['best_share']:.1%}"
        return
    yield f"Failures    {_digits(found['failures'])} expected ({rate}): goodput {found['share']:.1%}"
    yield f"            {best} {found['best_share']:.1%}; yours: {format_time(found['between_saves_seconds'])}"


def _table(title: str, *columns: str) -> Table:
    table = Table(title=title, title_justify="left", box=SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
    table.add_column(columns[0], no_wrap=True)
    for column in columns[1:]:
        table.add_column(column, justify="right", no_wrap=True)
    return table


def _time_table(record: dict[str, Any]) -> Table:
    time = record["time"]
    table = _table("Time", "part", "time", "share")
    for name, seconds in time["seconds"].items():
        if seconds:
            label = f"{name} ({time['jobs']:,})" if name == "job starts" else name
            table.add_row(label, format_time(seconds), f"{seconds / time['total_seconds']:.1%}")
    table.add_row("total", format_time(time["total_seconds"]), "100.0%", style="bold")
    return table


def _step_table(record: dict[str, Any]) -> Table:
    stage = record["time"]["stages"][-1]
    table = _table(
        f"A step: batch {stage['global_batch']:,} x {stage['seq_length']:,}",
        "part",
        "seconds",
        "share",
    )
    for name, seconds in stage["parts"].items():
        if seconds:
            table.add_row(PARTS[name], f"{seconds:.4g}", f"{seconds / stage['step_seconds']:.1%}")
    table.add_row("total", f"{stage['step_seconds']:.4g}", "100.0%", style="bold")
    return table


def _stage_table(record: dict[str, Any]) -> Table | None:
    stages = record["time"]["stages"]
    if len(stages) < 2:
        return None
    has_lengths = len({stage["seq_length"] for stage in stages}) > 1
    columns = ["batch", *(["length"] if has_lengths else []), "micro", "s/step", "tok/s", "TFLOP/s", "idle", "time"]
    table = _table("Ramp-up", "iterations", *columns)
    for row in shortened(stages, STAGES_SHOWN):
        if row is None:
            table.add_row(f"… {len(stages) - STAGES_SHOWN} more")
            continue
        table.add_row(
            f"{row['first_iteration']:,}-{row['last_iteration']:,}",
            f"{row['global_batch']:,}",
            *([f"{row['seq_length']:,}"] if has_lengths else []),
            f"{row['microbatches']:,}",
            f"{row['step_seconds']:.3g}",
            format_short(row["tokens_per_second"]),
            f"{row['model_tflops_per_device']:.1f}",
            f"{row['idle']:.0%}",
            format_time(row["seconds"]),
        )
    return table


def shortened(rows: list[dict[str, Any]], most: int) -> Iterable[dict[str, Any] | None]:
    """Return the first and last of more than `most` rows, with None for those between them."""
    return rows if len(rows) <= most else [*rows[: most // 2], None, *rows[-(most - most // 2) :]]


def _node_table(record: dict[str, Any]) -> Table | None:
    if len(record["nodes"]) < 2:
        return None
    available = record["memory"]["available_bytes"]
    table = _table(
        "Node counts (training alone)", "nodes", "GPUs", "replicas", "time", "GPU hours", "idle", "even", "fits"
    )
    for row in record["nodes"]:
        table.add_row(
            f"{row['nodes']:,}",
            f"{row['devices']:,}",
            f"{row['dp']:,}",
            format_time(row["seconds"]),
            f"{row['device_hours']:,.0f}",
            f"{row['idle']:.0%}",
            "yes" if row["even"] else "no",
            "" if row["memory"] is None else "yes" if not available or row["memory"] <= available else "NO",
            style="bold" if row["nodes"] == record["machine"]["nodes"] else "",
        )
    return table


def _memory_table(record: dict[str, Any]) -> Table:
    memory = record["memory"]
    unit, name = size_unit(memory["fullest_bytes"])
    kinds = [kind for kind in MEMORY if any(rank[kind] for rank in memory["ranks"])]
    table = _table(f"Memory of a pipeline rank ({name})", "rank", "layers", *(MEMORY[kind] for kind in kinds), "total")
    for rank in shortened(memory["ranks"], RANKS_SHOWN):
        if rank is None:
            table.add_row("…")
            continue
        layers = " ".join(str(count) for _, count in rank["stages"])
        sizes = [f"{rank[kind] / unit:.2f}" for kind in [*kinds, "total"]]
        table.add_row(
            str(rank["pp_rank"]), layers, *sizes, style="bold" if rank["total"] == memory["fullest_bytes"] else ""
        )
    return table


TABLES = (_time_table, _step_table, _stage_table, _memory_table, _node_table)


def _notes(record: dict[str, Any]) -> Iterator[str]:
    if record["notes"]:
        yield from ("", "Notes", *(f"  {note}" for note in record["notes"]))
