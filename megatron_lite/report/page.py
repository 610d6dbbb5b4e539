"""HTML report of one run: key figures, charts, time by part, events, checkpoints, evaluations, configuration."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from html import escape

import numpy as np

from megatron_lite.config.record import from_record
from megatron_lite.config.run import RunConfig
from megatron_lite.errors import MegatronLiteError
from megatron_lite.evaluation.report import metric_texts
from megatron_lite.formatting import format_count, format_parameters, format_short, format_size
from megatron_lite.ops.watch import rank_times
from megatron_lite.report.energy import read_energy
from megatron_lite.report.html import Markup, cards, date, details, document, duration, percent, section, table
from megatron_lite.report.plan import RunPlan, make_plan, planned_parts
from megatron_lite.report.run_charts import final_loss, loss_chart, marks, source_chart, speed_charts, training_charts
from megatron_lite.report.run_log import LOSS, RunLog, loss_of, loss_text, lowest
from megatron_lite.report.settings import all_settings, change_text, command_panel
from megatron_lite.report.timeline import (
    BETWEEN,
    COMMUNICATION,
    COMPUTE,
    DATA,
    EVALUATION,
    LOST,
    OPTIMIZER,
    OTHER,
    SAVES,
    START,
    TRAINING,
    Timeline,
    account,
)
from megatron_lite.runs.catalog import best_iteration, latest_iteration, list_checkpoints
from megatron_lite.runs.evaluations import read_evaluations
from megatron_lite.runs.manifest import read_manifest
from megatron_lite.runs.metrics_file import is_average

SHOWN = 200
"""Rows of a table of events or warnings; the latest ones."""
_PILLS = {"completed": "good", "evaluated": "good", "running": "run", "failed": "bad"}
_PART_COLOURS = {
    COMPUTE: "var(--c3)",
    TRAINING: "var(--c3)",
    COMMUNICATION: "var(--c1)",
    DATA: "var(--c5)",
    OPTIMIZER: "var(--c6)",
    EVALUATION: "var(--c7)",
    SAVES: "var(--c2)",
    START: "var(--c4)",
    LOST: "var(--bad)",
    OTHER: "var(--c8)",
    BETWEEN: "var(--rule)",
}


def run_page(log: RunLog) -> str:
    """Return the report of a run as one HTML page.

    Raises:
        DataError: the recorded evaluations are damaged.
    """
    timeline = account(log)
    config = read_config(log)
    plan = make_plan(log, config)
    sections = [
        ("loss", "Loss", [loss_chart(log)]),
        ("sources", "Data sources", [source_chart(log)]),
        ("training", "Training", [pair(training_charts(log))]),
        ("speed", "Speed", [pair(speed_charts(log, plan)), _planned(log, timeline, plan), slow_ranks(log)]),
        ("time", "Time", [time_bar(timeline)]),
        ("events", "Events", [_events(log), _warnings(log)]),
        ("validation", "Validation", [_validations(log)]),
        ("checkpoints", "Checkpoints", [_checkpoints(log)]),
        ("evaluations", "Evaluations", [_evaluations(log)]),
        (
            "configuration",
            "Configuration",
            [command_panel(log.start.get("command", ()), config), all_settings(log.config)],
        ),
        ("environment", "Environment", [_environment(log)]),
    ]
    shown = [(name, title, content) for name, title, content in sections if any(content)]
    links = "".join(f"<a href='#{name}'>{title}</a>" for name, title, _ in shown)
    body = _header(log) + f"<nav>{links}</nav>" + cards(key_figures(log, timeline))
    body += "".join(section(name, title, *content) for name, title, content in shown)
    return document(f"{log.name} · megatron-lite", body)


def _header(log: RunLog) -> str:
    state = log.state()
    status = log.exit_status()
    reason = status.message if status is not None and state != "completed" else ""
    return (
        f"<header><div class='top'><h1>{escape(log.name)}</h1>"
        f"<span class='pill {_PILLS.get(state, '')}'>{escape(state)}</span></div>"
        f"<p class='sub'>{escape(describe_model(log))}</p>"
        f"<p class='sub'>{escape(describe_machine(log))}</p>"
        + (f"<p class='note'>{escape(reason)}</p>" if reason else "")
        + "</header>"
    )


def describe_model(log: RunLog) -> str:
    """Return the model in one line."""
    model = log.config.get("model", {})
    if not model:
        return ""
    parameters = log.start.get("parameters", 0)
    size = f"GPT with {format_parameters(parameters)} parameters · " if parameters else ""
    return (
        f"{size}{model['num_layers']} layers x {model['hidden_size']:,}, {model['num_attention_heads']} heads · "
        f"sequence length {log.config['batch']['seq_length']:,}"
    )


def describe_machine(log: RunLog) -> str:
    """Return devices, layout and precision in one line."""
    start, parallel = log.start, log.config.get("parallel", {})
    world = int(start.get("world_size", 1))
    sizes = {"tensor": "tp", "context": "cp", "pipeline": "pp"}
    layout = [f"{name} {parallel[key]}" for name, key in sizes.items() if parallel.get(key, 1) > 1]
    layout += [f"data {start['data_parallel']}"] if start.get("data_parallel", 1) > 1 else []
    hosts = len(set(start.get("hosts", ())))
    parts = [
        f"{world} x {start.get('device', 'unknown device')}"
        + (f" on {format_count(hosts, 'host')}" if hosts > 1 else ""),
        " x ".join(layout),
        str(start.get("dtype", "")),
    ]
    return " · ".join(part for part in parts if part)


def key_figures(log: RunLog, timeline: Timeline) -> Iterator[tuple[str, str, str]]:
    """Yield label, value and note of each key figure."""
    wanted = int(log.start.get("train_iterations", 0))
    yield "Iterations", f"{log.iterations:,}", f"of {wanted:,}" if wanted else ""
    if math.isfinite(tokens := log.last("consumed_train_tokens")):
        yield "Tokens", format_short(tokens), f"{int(log.last('consumed_train_samples')):,} samples"
    if np.isfinite(log.losses[LOSS]).any() or log.not_finite:
        loss = final_loss(log)
        note = "mean of the last 2%" if math.isfinite(loss) else f"from iteration {log.not_finite[-1].first:,}"
        yield "Training loss", loss_text(loss), note
    yield from _validation_figures(log)
    if math.isfinite(speed := log.median("tokens_per_second")):
        per_device = speed / max(1, int(log.start.get("world_size", 1)))
        yield "Tokens per second", format_short(speed), f"{format_short(per_device)} per device"
    if math.isfinite(mfu := log.median("mfu")):
        yield "MFU", percent(mfu), f"{log.median('tflops_per_device'):.3g} TFLOP/s per device"
    elif math.isfinite(tflops := log.median("tflops_per_device")):
        yield "TFLOP/s per device", f"{tflops:.3g}", "model FLOPs"
    yield "Time", duration(timeline.wall), format_count(timeline.jobs, "job")
    yield "Goodput", percent(timeline.goodput), "of job time spent in iterations"
    hours = timeline.device_seconds / 3600
    yield "Device hours", f"{hours:,.0f}" if hours >= 100 else f"{hours:.3g}", ""
    if (energy := read_energy(log.config.get("metrics", {}).get("codecarbon_dir", ""))) is not None:
        yield "Energy", f"{energy.kilowatt_hours:.4g} kWh", f"CodeCarbon, {format_count(energy.nodes, 'node')}"
        yield "Emissions", f"{energy.kilograms:.4g} kg", "CO2 equivalents"


def _validation_figures(log: RunLog) -> Iterator[tuple[str, str, str]]:
    curves = log.validation_curves()
    if not curves:
        return
    name = next((name for name in curves if is_average(name)), next(iter(curves)))
    records = curves[name]
    best = lowest(records)
    label = "Validation loss" + (" (average)" if is_average(name) else "")
    note = "" if best is None else f"lowest {loss_of(best):.4f} at {best['iteration']:,}"
    yield label, loss_text(loss_of(records[-1])), note


def pair(figures: Sequence[str]) -> str:
    """Return figures side by side where there is room."""
    return f"<div class='pair'>{''.join(figures)}</div>" if figures else ""


def _planned(log: RunLog, timeline: Timeline, plan: RunPlan | None) -> str:
    """Return the seconds of an iteration by part, measured and predicted; empty: there is no prediction."""
    if plan is None or plan.step is None:
        return ""
    shares = {name: seconds / timeline.iterations for name, seconds in timeline.parts.items()} if log.parts else {}
    median, predicted = log.median("seconds"), planned_parts(plan.step)
    rows = [
        (
            name,
            duration(median * shares[name]) if name in shares else "",
            duration(predicted[name]) if name in predicted else "",
        )
        for name in (COMPUTE, COMMUNICATION, DATA, OPTIMIZER)
        if name in shares or name in predicted
    ]
    rows.append(("iteration", duration(median), duration(plan.step.total)))
    note = (
        "<p class='note'>The plan is that of <code>megatron-lite plan</code> for "
        f"{escape(plan.machine.device.device)} with {plan.machine.per_node} devices a node, without calibration.</p>"
    )
    return note + table(("part of an iteration", "measured", "plan"), rows, numbers=(1, 2))


def slow_ranks(log: RunLog) -> str:
    """Return the ranks with the longest busy times; empty: fewer than two ranks were measured."""
    ranks = rank_times(log.rank_seconds, {**log.start, "config": log.config})
    if len(ranks) < 2:
        return ""
    slowest = sorted(ranks, key=lambda one: (-one.ratio, -one.seconds))[:8]
    rows = [(str(one.rank), one.host, f"{one.seconds:.3f} s", f"{one.ratio:.2f}") for one in slowest]
    header = ("rank", "host", "busy in an iteration", "relative to the other ranks of its pipeline stage")
    return details("Ranks with the longest compute and data time", table(header, rows, numbers=(2, 3)))


def time_bar(timeline: Timeline) -> str:
    """Return the time by part as a bar and a table."""
    parts = {name: seconds for name, seconds in timeline.parts.items() if seconds > 1e-4 * timeline.job_seconds}
    in_jobs = {name: seconds for name, seconds in parts.items() if name != BETWEEN}
    total = sum(in_jobs.values()) or 1.0
    bar = "".join(
        f"<i style='flex:{seconds / total:.5f};background:{_PART_COLOURS[name]}' title='{name}'></i>"
        for name, seconds in in_jobs.items()
    )
    rows = [
        (
            Markup(f"<i class='key' style='background:{_PART_COLOURS[name]}'></i>{name}"),
            duration(seconds),
            percent(seconds / total) if name in in_jobs else "",
        )
        for name, seconds in parts.items()
    ]
    how = (
        f"Iterations are split as measured in {timeline.measured:,} of them, as means over the ranks. Compute includes "
        "the collectives of tensor parallelism; communication and waiting is the rest of an iteration: the exposed "
        "gradient reduction, messages between pipeline stages and waiting for other ranks."
        if timeline.measured
        else "No iteration was measured by part."
    )
    lost = (
        f" Discarded by restarts and rollbacks: {format_count(timeline.lost_iterations, 'iteration')}."
        if timeline.lost_iterations
        else ""
    )
    return (
        f"<div class='panel'><p><b>Goodput {percent(timeline.goodput)}</b>: {duration(timeline.iterations)} in "
        f"iterations that count, of {duration(timeline.job_seconds)} in {format_count(timeline.jobs, 'job')}.{lost}</p>"
        f"<div class='bar'>{bar}</div><p class='note'>{how}</p></div>"
        + "<div style='height:12px'></div>"
        + table(("part", "time", "share"), rows, numbers=(1, 2))
    )


def _events(log: RunLog) -> str:
    """Return starts, discarded iterations, rollbacks and spikes, in the order of time."""
    rows: list[tuple[float, int, str]] = []
    for number, (start, changes) in enumerate(zip(log.starts, log.changes, strict=True)):
        if start.get("after_rollback", False):  # the rollback is an event itself
            continue
        text = "; ".join(map(change_text, changes[:8]))
        text += f" and {len(changes) - 8} more" if len(changes) > 8 else ""
        began = float(start.get("time", 0.0)) - float(start.get("startup_seconds", 0.0))
        kind = "restart" if number else "start"
        rows.append((began, int(start.get("iteration", 0)), f"{kind}: {text}" if text else kind))
    for event in log.events:
        if event.kind == "discarded":
            lost = format_count(int(event.values["iterations"]), "iteration")
            text = f"{lost} discarded ({duration(float(event.values['seconds']))})"
            rows.append((event.time, int(event.values["iteration"]), text))
    rows += [(mark.time, int(mark.x), mark.text) for mark in marks(log) if mark.kind != "restart"]
    if len(rows) < 2:
        return ""
    rows.sort(key=lambda row: row[0])
    shown = [(_date(when), f"{iteration:,}", text) for when, iteration, text in rows[-SHOWN:]]
    return table(("time (UTC)", "iteration", "event"), shown, numbers=(1,))


def _date(seconds: float) -> Markup:
    return Markup(f"<span class='date'>{date(seconds).removesuffix(' UTC')}</span>")


def _warnings(log: RunLog) -> str:
    rows = [(f"{iteration:,}", text) for iteration, text in log.warnings[-SHOWN:]]
    return details(format_count(len(log.warnings), "warning"), table(("iteration", "warning"), rows, numbers=(0,)))


def _validations(log: RunLog) -> str:
    rows = []
    for split in ("validation", "test"):
        for name, records in log.validation_curves(split).items():
            last, best = records[-1], lowest(records)
            row = (
                name,
                loss_text(loss_of(last)),
                f"{last['iteration']:,}",
                "" if best is None else f"{loss_of(best):.4f}",
                "" if best is None else f"{best['iteration']:,}",
            )
            rows.append((*row, str(len(records))))
    header = ("dataset", "last loss", "at iteration", "lowest", "at iteration", "evaluations")
    return table(header, rows, numbers=range(1, 6))


def _checkpoints(log: RunLog) -> str:
    latest, best = latest_iteration(log.folder), best_iteration(log.folder)
    rows = []
    for path in list_checkpoints(log.folder):
        try:
            manifest = read_manifest(path)
        except MegatronLiteError:  # deleted meanwhile
            continue
        names = [name for name, iteration in (("latest", latest), ("best", best)) if iteration == manifest.iteration]
        saved = manifest.writer.get("time")
        when = _date(float(saved)) if isinstance(saved, (int, float)) else ""
        rows.append((f"{manifest.iteration:,}", format_size(manifest.size), when, ", ".join(names)))
    saves = [event.values for event in log.events if event.kind == "save"]
    note = ""
    if saves:
        longest = max(float(save["seconds"]) for save in saves)
        paused = sum(float(save.get("blocking_seconds", 0.0)) for save in saves)
        note = (
            f"<p class='note'>{format_count(len(saves), 'save')}, the longest in {duration(longest)}; training paused "
            f"for {duration(paused)} in all.</p>"
        )
    return note + table(("iteration", "size", "saved (UTC)", ""), rows, numbers=(0, 1))


def _evaluations(log: RunLog) -> str:
    rows = []
    for one in read_evaluations(log.folder):
        metrics = metric_texts(one)
        main = metrics.pop(one.main_metric, "")
        rest = ", ".join(f"{name} {text}" for name, text in metrics.items())
        rows.append((f"{one.iteration:,}", one.title, f"{one.main_metric} {main}", rest))
    return table(("checkpoint", "task", "result", "further metrics"), rows, numbers=(0,))


def read_config(log: RunLog) -> RunConfig | None:
    """Return the recorded configuration; None: another version wrote it."""
    try:
        return from_record(RunConfig, log.config)
    except MegatronLiteError:
        return None


def _environment(log: RunLog) -> str:
    start = log.start
    rows = [("device", f"{start.get('world_size', 1)} x {start.get('device', 'unknown')}")]
    if (peak := start.get("peak_flops")) is not None:
        rows.append(("peak", f"{float(peak) / 1e12:.4g} TFLOP/s per device in {start.get('dtype', '')}"))
    if hosts := list(dict.fromkeys(start.get("hosts", ()))):
        more = f" and {len(hosts) - 16:,} more" if len(hosts) > 16 else ""
        rows.append(("hosts", ", ".join(hosts[:16]) + more))
    rows += list(start.get("environment", {}).items())
    return table(("", ""), rows)
