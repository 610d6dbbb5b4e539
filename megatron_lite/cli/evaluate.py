"""CLI command `evaluate`: scores checkpoints of a run on texts, published corpora and lm-evaluation-harness tasks."""

from __future__ import annotations

import argparse
import sys
from typing import TYPE_CHECKING

from megatron_lite.backend.environment import Launch, read_launch
from megatron_lite.backend.task_ranks import end_with_parent, start_ranks
from megatron_lite.cli.evaluate_arguments import INPUTS, evaluate_parser, flags_without_effect
from megatron_lite.cli.evaluate_checkpoints import EvaluationPlan, evaluate_checkpoints, make_plan
from megatron_lite.cli.tokenizer_arguments import tokenizer_fields
from megatron_lite.config.parallel import ParallelConfig
from megatron_lite.config.runtime import RuntimeConfig
from megatron_lite.errors import ConfigError, MegatronLiteError
from megatron_lite.formatting import format_count

if TYPE_CHECKING:
    from megatron_lite.backend.base import Backend

SUMMARY = "evaluate checkpoints: perplexity of texts, WikiText, LAMBADA, …, tasks of lm-evaluation-harness"
SEVERAL_RANKS = True
"""A rank of several that fails before the rendezvous reports its error to the others (see cli/main.py)."""
DAY = 24 * 60.0
"""Minutes that the other ranks wait for rank 0, which reads texts and builds requests between the model's work."""


def run(argv: list[str]) -> int:
    """Evaluate checkpoints on texts, datasets and tasks."""
    parser = evaluate_parser()
    options = parser.parse_args(argv)
    if not any(getattr(options, name) for name in INPUTS):
        parser.error("nothing to evaluate: give --text FILE, --data-path PREFIX, --lambada FILE or --tasks NAME")
    if not options.all_checkpoints and (options.svg or options.again):
        parser.error(f"{'--svg' if options.svg else '--again'} is an option of --all-checkpoints: add it")
    given = sum(bool(getattr(options, name)) for name in INPUTS)
    for flag, inputs in flags_without_effect(options).items():
        if len(inputs) == given:
            parser.error(f"{flag} has no effect on {' and '.join(inputs)}: remove it")
    launch, count = read_launch(), options.ranks_per_task
    if count > 1 and launch.launcher == "torchrun":
        parser.error(f"torchrun starts all ranks itself: remove --ranks-per-task {count}")
    if count > 1 and launch.launcher != "task":
        return start_ranks([sys.executable, "-m", "megatron_lite", "evaluate", *argv], launch, count)
    if launch.launcher == "task":
        end_with_parent()
    parallel = _layout(options, launch)
    # Rank 0 alone reads the inputs; errors in them appear before the ranks meet and the model is loaded.
    plan = make_plan(options) if launch.rank == 0 else None

    from megatron_lite.train.assemble import machine

    runtime = RuntimeConfig(device=options.device)
    with machine(runtime, parallel) as backend, backend.phases.enter("evaluation"):
        return _on_rank(backend, runtime, parallel, options, plan)


def _on_rank(
    backend: Backend,
    runtime: RuntimeConfig,
    parallel: ParallelConfig,
    options: argparse.Namespace,
    plan: EvaluationPlan | None,
) -> int:
    from megatron_lite.cli.evaluate_ranks import ModelRanks

    ranks = ModelRanks(backend, runtime, parallel, tokenizer_fields(options), options.batch_size, averaged=options.ema)
    if plan is None:
        ranks.serve()
        return 0
    try:
        code = evaluate_checkpoints(plan, ranks, options)
    except MegatronLiteError:
        ranks.close()
        raise
    ranks.close()
    return code


def _layout(options: argparse.Namespace, launch: Launch) -> ParallelConfig:
    tp, pp = options.tensor_model_parallel_size, options.pipeline_model_parallel_size
    if launch.world_size % (tp * pp):
        raise ConfigError(
            f"{format_count(launch.world_size, 'rank')} cannot hold --tensor-model-parallel-size {tp} x "
            f"--pipeline-model-parallel-size {pp}",
            rule="The number of ranks is a multiple of their product",
            fix=f"Start {tp * pp} ranks or a multiple, with torchrun, srun or --ranks-per-task {tp * pp}",
        )
    return ParallelConfig(tp=tp, pp=pp, world_size=launch.world_size, distributed_timeout_minutes=DAY)
