"""CLI command `explain`: parameters, schedule, batch sizes and data of a training command line, as text or JSON."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict

from megatron_lite.cli.explain_data import data_lines, data_record
from megatron_lite.config.arguments import ParsedRun, asks_for_help, parse_command, to_argv
from megatron_lite.config.files import missing_files
from megatron_lite.config.run import RunConfig
from megatron_lite.config.sharing import describe_sharing
from megatron_lite.data.serving.epochs import with_epochs
from megatron_lite.errors import DataError
from megatron_lite.formatting import format_count, format_size
from megatron_lite.planner.summary import BatchStage, RunSummary, summarize
from megatron_lite.tokenizer.vocabulary import fill_vocabulary

SUMMARY = "explain a training command: sizes, iterations, ramp-up, saves, flags without effect"
USAGE = """usage: megatron-lite explain [--json] FLAG [VALUE] …
       megatron-lite explain [--json] torchrun --nproc-per-node 8 pretrain_gpt.py FLAG [VALUE] …
       megatron-lite explain [--json] 'srun … bash -c "…" 2>&1 | tee log'
       megatron-lite explain [--json] @FILE

The flags are those of pretrain_gpt.py. Arguments before the training script are read for the number of ranks only; a
command that contains quotes, pipes or redirections goes in quotes, or in a FILE."""
STAGES_SHOWN = 12


def run(argv: list[str]) -> int:
    """Explain the training command `argv`; --json prints one JSON object instead of text."""
    if asks_for_help(argv):
        print(USAGE)
        return 0
    as_json = "--json" in argv
    print(explain_text(parse_command([word for word in argv if word != "--json"]), as_json=as_json))
    return 0


def explain_text(parsed: ParsedRun, *, as_json: bool = False) -> str:
    """Return the explanation of a parsed command, as text or as JSON."""
    counted = _with_epochs(parsed.config)
    config, vocabulary = fill_vocabulary(counted)
    summary = summarize(config)
    if as_json:
        return json.dumps(_record(parsed, counted, summary, vocabulary), indent=2)
    return "\n".join(_lines(parsed, counted, summary, vocabulary))


def _with_epochs(config: RunConfig) -> RunConfig:
    """Return the config with --epochs as samples, if the data can be opened on this machine."""
    try:
        return with_epochs(config)
    except DataError:
        return config  # the lines about the data say why


def _record(parsed: ParsedRun, counted: RunConfig, summary: RunSummary, vocabulary: str) -> dict[str, object]:
    return {
        "config": asdict(parsed.config),
        "argv": to_argv(parsed.config),
        "derived": {**asdict(summary), "vocabulary_from": vocabulary, "data": data_record(counted)},
        "notes": list(parsed.notes),
        "warnings": list(parsed.warnings),
        "missing": _missing(parsed),
    }


def _missing(parsed: ParsedRun) -> list[str]:
    return [str(error) for error in missing_files(parsed.config, parsed.missing, parsed.spellings)]


def _lines(parsed: ParsedRun, config: RunConfig, summary: RunSummary, vocabulary: str) -> Iterator[str]:
    model, layout, length = summary.model, summary.layout, summary.length
    yield f"Model       {model.name}: {model.exact:,} parameters, {model.without_embedding:,} without the embedding"
    if (sharing := describe_sharing(config.model)) or config.model.embedding_size:
        size = config.model.embedding_size
        yield f"            {config.model.num_layers} layers{sharing}" + (f", embedding {size:,}" if size else "")
    yield f"            vocabulary {model.vocab_size:,} padded to {model.padded_vocab_size:,} ({vocabulary})"
    yield f"            {model.flops_per_token / 1e9:,.1f} GFLOP a token, forward and backward"
    sharding = ", optimizer state split over replicas" if layout.distributed_optimizer else ""
    yield f"Layout      {format_count(layout.world_size, 'rank')} = {layout.axes}{sharding}"
    if len(layout.stage_layers) > 1:
        yield "            layers by stage: " + " ".join(str(count) for _, count in layout.stage_layers)
    yield (
        f"Precision   {config.precision.dtype}, recomputation {config.recompute.granularity}, "
        f"seed {config.runtime.seed}, device {config.runtime.device}"
    )
    yield (
        f"Optimizer   {config.optimizer.kind}, {summary.memory.moment_bytes:.3g} bytes of moments a parameter; "
        f"weights, gradients and optimizer state take {format_size(summary.memory.model_state)} on the fullest rank, "
        f"all tensors {format_size(summary.memory.total)}"
    )
    yield (
        f"Length      {length.iterations:,} iterations, {length.samples:,} samples, {length.tokens:,} tokens, "
        f"{length.total_flops:.3g} FLOP"
    )
    if formula := config.optimizer.relative_step:
        yield f"            learning rate {formula}"
    else:
        yield (
            f"            learning rate {config.lr.lr:g} to {config.lr.min_lr:g}, {config.lr.style}; warm-up "
            f"{length.warmup:,.0f}, decay {length.decay:,} {length.lr_unit}"
        )
    yield from data_lines(config)
    yield f"Saves       {_saves(config, summary)}"
    yield from _stage_lines(summary.stages)
    for title, entries in (
        ("Notes", parsed.notes),
        ("Warnings", parsed.warnings),
        ("Not found here (a run would stop)", _missing(parsed)),
    ):
        if entries:
            yield from ("", title, *(f"  {entry}" for entry in entries))
    yield from ("", "The same command, as parsed:", "  " + _wrapped(to_argv(config)))


def _saves(config: RunConfig, summary: RunSummary) -> str:
    saves, end = summary.saves, summary.length.iterations
    if not config.checkpoint.save:
        return "none without --save"
    if not saves.count:
        return f"one checkpoint, iteration {end:,} at the end"
    scheduled = f"{saves.count:,} checkpoints, iterations {saves.first:,} to {saves.last:,}"
    return scheduled if saves.last == end else f"{scheduled}, and iteration {end:,} at the end"


def _stage_lines(stages: tuple[BatchStage, ...]) -> Iterator[str]:
    yield ""
    yield "   iterations              batch  micro-batches  per replica  replicas without  idle"
    hidden = len(stages) - STAGES_SHOWN
    for number, stage in enumerate(stages):
        if hidden > 0 and STAGES_SHOWN // 2 <= number < STAGES_SHOWN // 2 + hidden:
            if number == STAGES_SHOWN // 2:
                yield f"   … {hidden} more stages (--json has them all)"
            continue
        fewest, most = stage.per_replica
        per_replica = str(most) if fewest == most else f"{fewest}-{most}"
        iterations = f"{stage.first_iteration:,}-{stage.last_iteration:,}"
        yield (
            f"   {iterations:<20} {stage.global_batch:>8,}  {stage.micro_batches:>13,}  {per_replica:>11}  "
            f"{stage.replicas_without:>16,}  {stage.idle:>4.0%}"
        )


def _wrapped(args: list[str]) -> str:
    """Return a command line on several lines, one flag each."""
    text = ""
    for word in args:
        quoted = word if word.isascii() and not set(word) & set(" |&;<>()$`\\\"'*?[]#~%{}") and word else f"'{word}'"
        text += (" \\\n  " if word.startswith("--") and text else " " if text else "") + quoted
    return text
