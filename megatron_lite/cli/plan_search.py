"""Search results of `megatron-lite plan --search`: JSON record and table of the best layouts, or why none fits."""

from __future__ import annotations

import shlex
from typing import Any

from megatron_lite.cli.progress import stage_progress
from megatron_lite.cli.standard_output import make_console
from megatron_lite.config.arguments import ParsedRun
from megatron_lite.config.layout import axis_sizes
from megatron_lite.config.run import RunConfig
from megatron_lite.errors import ConfigError
from megatron_lite.formatting import format_count, format_size, size_unit
from megatron_lite.planner.advice import device_advice
from megatron_lite.planner.compute import peak_of
from megatron_lite.planner.hardware import Hardware
from megatron_lite.planner.memory import fullest_bytes, rank_memory
from megatron_lite.planner.search import FoundLayout, SearchResult, fewest_devices, layout_flags, search
from megatron_lite.planner.step_time import step_time_of
from megatron_lite.planner.summary import model_size
from megatron_lite.schedules.batch_size import final_batch_size
from megatron_lite.tokenizer.vocabulary import fill_vocabulary

SHOWN, LISTED = 10, 100
"""Layouts of the table, and of --json."""
MAX_DEVICES = 1 << 17
"""Devices up to which an error names the number that would do."""


def search_record(parsed: ParsedRun, machine: Hardware, *, is_calibrated: bool) -> dict[str, Any]:
    """Return the best layouts as a JSON record.

    Args:
        parsed: the training command.
        machine: device, node size and efficiencies.
        is_calibrated: the machine is fitted to a measured run.

    Raises:
        ConfigError: no layout fits, or none is valid.
    """
    config, vocabulary = fill_vocabulary(parsed.config)
    with stage_progress() as show:
        found = search(
            parsed.config, config.model.vocab_size, machine, lambda done, total: show("layouts", done, total)
        )
    if not found.layouts:
        raise _nothing_fits(parsed.config, config, machine, found)
    batch = final_batch_size(config.batch, config.parallel.dp)
    own = FoundLayout(
        config,
        fullest_bytes(config),
        step_time_of(config, machine, batch, config.batch.seq_length),
    )
    fits = not machine.device.available or own.memory <= machine.device.available
    return {
        "model": model_size(config).name,
        "warnings": [str(advice) for advice in device_advice(config, machine, is_calibrated=is_calibrated)],
        "vocabulary_from": vocabulary,
        "devices": config.parallel.world_size,
        "device": machine.device.name,
        "available_bytes": machine.device.available,
        "global_batch": batch,
        "seq_length": config.batch.seq_length,
        "tried": found.tried,
        "fitting": len(found.layouts),
        "best": layout_flags(found.layouts[0].config),
        "given": {**_layout(own, machine), "fits": fits},
        "layouts": [_layout(layout, machine) for layout in found.layouts[:LISTED]],
    }


def print_search(record: dict[str, Any]) -> None:
    """Print the best layouts, and the flags of the first."""
    from rich.table import Table
    from rich.text import Text

    console = make_console(highlight=False)
    console.print(
        f"{record['model']} on {record['devices']:,} x {record['device']}, batch {record['global_batch']:,} x "
        f"{record['seq_length']:,} tokens: {format_count(record['fitting'], 'layout')} fit, of {record['tried']:,}",
        style="bold",
    )
    for warning in record["warnings"]:
        console.print(Text(f"! {warning}", style="yellow"), soft_wrap=True)
    given = record["given"]
    shown = [(str(number), layout) for number, layout in enumerate(record["layouts"][:SHOWN], 1)] + [("given", given)]
    axes = [axis for axis in ("tp", "cp", "pp", "dp") if axis != "cp" or any(layout["cp"] > 1 for _, layout in shown)]
    # One unit for the whole table, so that numbers can be compared.
    unit, unit_name = size_unit(max(layout["memory_bytes"] for _, layout in shown))
    table = Table(box=None, padding=(0, 1, 0, 0), pad_edge=False, header_style="bold")
    for column in ("", *axes, "schedule", "micro", "recompute", "ZeRO-1", "s/step", "MFU", unit_name):
        is_text = column in ("", "schedule", "recompute")
        table.add_column(column, justify="left" if is_text else "right", no_wrap=True)
    for name, layout in shown:
        chunks = f" x {layout['chunks']}" if layout["schedule"] == "interleaved" else ""
        table.add_row(
            name,
            *(str(layout[axis]) for axis in axes),
            layout["schedule"] + chunks if layout["pp"] > 1 else "",
            str(layout["micro_batch"]),
            layout["recompute"],
            "yes" if layout["distributed_optimizer"] else "no",
            f"{layout['step_seconds']:.3g}",
            f"{layout['mfu']:.1%}",
            f"{layout['memory_bytes'] / unit:.1f}",
        )
    console.print()
    console.print(table)
    console.print()
    if not given["fits"]:
        available = format_size(record["available_bytes"])
        console.print(f"! The layout of the command (given) does not fit: {available} are available", style="yellow")
    console.print("The best layout, in place of the command's flags:", markup=False)
    console.print("  " + shlex.join(record["best"]), markup=False, soft_wrap=True)


def _layout(found: FoundLayout, machine: Hardware) -> dict[str, Any]:
    config, step = found.config, found.step
    parallel, recompute = config.parallel, config.recompute
    is_block = recompute.granularity == "full" and recompute.method == "block"
    again = f"block {recompute.num_layers}" if is_block else recompute.granularity
    chunk = parallel.num_layers_per_virtual_stage
    _, peak = peak_of(config, machine)
    return {
        **axis_sizes(parallel),
        "schedule": parallel.pipeline_schedule,
        "chunks": config.model.num_layers // (parallel.pp * chunk) if chunk else 1,
        "micro_batch": config.batch.micro_batch_size,
        "recompute": again,
        "distributed_optimizer": parallel.distributed_optimizer,
        "step_seconds": step.total,
        "tokens_per_second": step.tokens / step.total,
        "mfu": step.model_flops_per_second / peak,
        "parts_seconds": step.parts,
        "memory_bytes": found.memory,
        "flags": layout_flags(config),
    }


def _nothing_fits(given: RunConfig, config: RunConfig, machine: Hardware, found: SearchResult) -> ConfigError:
    world, device = config.parallel.world_size, machine.device
    name = model_size(config).name
    if found.closest is None:
        return ConfigError(
            f"No layout of {world:,} ranks is possible (--world-size {world}, --global-batch-size "
            f"{final_batch_size(config.batch, config.parallel.dp)})",
            rule="A pipeline stage has at least one layer, a tensor-parallel rank one attention head, and a "
            "data-parallel replica one sample of the batch",
            fix="Use a larger --global-batch-size, or a smaller --world-size",
        )
    closest, memory = found.closest, found.closest_memory
    fullest = max(rank_memory(closest), key=lambda rank: rank.total)
    devices = fewest_devices(given, config.model.vocab_size, machine, MAX_DEVICES)
    more = f"Use --world-size {devices}, on which a layout fits" if devices else "Use a model with fewer parameters"
    return ConfigError(
        f"The model ({name} parameters) fits with no layout of {world:,} x {device.name}. The closest of "
        f"{found.tried:,} layouts ({shlex.join(layout_flags(closest))}) needs {format_size(memory)} on a device "
        f"({format_size(fullest.model_state)} for weights, gradients and optimizer state), but only "
        f"{format_size(device.available)} are available ({format_size(memory - device.available)} too little)",
        fix=f"{more}, or name a device with more memory (--gpu)",
    )
