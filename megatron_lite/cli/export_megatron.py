"""Options of `export --to megatron` and `--to deepspeed`, and the call of their writers."""

from __future__ import annotations

import argparse

from megatron_lite.cli.parser import whole
from megatron_lite.formatting import format_size

NAMINGS = ("legacy", "local", "transformer-engine")


def add_layout_arguments(group: argparse._ArgumentGroup) -> None:
    """Add the flags of both formats."""
    group.add_argument("--target-tensor-parallel", type=whole(1), metavar="N", help="tensor-parallel size (default: 1)")
    group.add_argument("--target-pipeline-parallel", type=whole(1), metavar="M", help="pipeline size (default: 1)")
    group.add_argument(
        "--naming",
        choices=NAMINGS,
        help="names of --to megatron: Megatron-LM's legacy ones, or megatron-core's with --transformer-impl local or "
        "transformer_engine (default: local; legacy for ALiBi, --embed-layernorm and --glu-activation)",
    )


def check(options: argparse.Namespace, parser: argparse.ArgumentParser) -> None:
    """Refuse flags that do not go together."""
    layout = ("target_tensor_parallel", "target_pipeline_parallel", "naming")
    hugging_face = (
        *("architecture", "push_to", "evaluation", "revisions_from_run", "private", "dry_run"),
        *("tokenizer_type", "tokenizer_vocab_file", "tokenizer_merge_file", "tokenizer_model"),
    )
    for name in layout if options.to == "hf" else hugging_face:
        if getattr(options, name):
            needed = "--to megatron or deepspeed" if options.to == "hf" else "--to hf"
            flag = name.removeprefix("tokenizer_") if name.endswith("_file") else name
            parser.error(f"--{flag.replace('_', '-')} goes with {needed}")
    if options.to == "deepspeed" and options.naming:
        parser.error("--naming goes with --to megatron")
    if options.to != "hf" and not options.output:
        parser.error("say where to: --output DIR")


def run(options: argparse.Namespace) -> int:
    """Export the checkpoint that the options name."""
    import torch

    from megatron_lite.cli.progress import stage_progress
    from megatron_lite.interop.megatron.export import MegatronExportOptions, export_megatron, plan_megatron_export

    chosen = MegatronExportOptions(
        to=options.to,
        tp=options.target_tensor_parallel or 1,
        pp=options.target_pipeline_parallel or 1,
        naming=options.naming or "",
        dtype=getattr(torch, options.dtype) if options.dtype else None,
        averaged=options.ema,
    )
    plan = plan_megatron_export(options.load, options.load_iteration, chosen)
    with stage_progress() as advance:
        files, size = export_megatron(plan, options.output, advance)
    print(
        f"exported {plan.path} as {options.output}: {plan.scheme.title}, tensor-parallel size {chosen.tp}, "
        f"pipeline size {chosen.pp}, {len(files)} files, {format_size(size)}"
    )
    print("read again, every weight is the same bit for bit; the optimizer's state is not exported")
    if options.to == "megatron":
        print(f"to continue in Megatron-LM: --load {options.output} --no-load-optim --no-load-rng, or --finetune")
    return 0
