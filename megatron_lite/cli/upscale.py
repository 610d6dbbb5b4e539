"""CLI command `upscale`: warm start of a deeper model by duplicating the layers of a checkpoint."""

from __future__ import annotations

import argparse
import textwrap
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_lite.cli.checkpoint import add_output_arguments, file_size
from megatron_lite.cli.parser import Parser, whole
from megatron_lite.formatting import format_size

if TYPE_CHECKING:
    from megatron_lite.checkpoint.upscaling import UpscaleReport

SUMMARY = "make a deeper model from a checkpoint by duplicating its layers (warm start)"


def run(argv: list[str]) -> int:
    """Write the deeper model and print how to train it."""
    options = _parser().parse_args(argv)

    from megatron_lite.checkpoint.upscaling import UpscaleOptions, upscale
    from megatron_lite.cli.checkpoint_inspect import one_checkpoint
    from megatron_lite.cli.folder_lock import holding
    from megatron_lite.cli.progress import byte_progress

    path = one_checkpoint(options.folder)
    chosen = UpscaleOptions(
        num_layers=options.layers,
        order=options.order,
        carry_optimizer=options.optimizer == "carry",
        preserve_function=options.preserve_function,
        averaged=options.ema,
        scale_residual=options.scale_residual,
    )
    with holding(options.output, "upscale"), byte_progress("upscaling") as progress:
        report = upscale(path, options.output, chosen, file_size=file_size(options), progress=progress)
    print(f"wrote {report.save.path}: {path} with more layers, {format_size(report.save.size)}")
    print("\n".join(_description(report, options)))
    return 0


def _description(report: UpscaleReport, options: argparse.Namespace) -> list[str]:
    """Return the lines about the new model: factors, map of layers, training command."""
    from megatron_lite.checkpoint.upscaling import added_layers
    from megatron_lite.cli.import_ import one_flag_a_line
    from megatron_lite.config.arguments import to_argv
    from megatron_lite.config.batch import BatchConfig
    from megatron_lite.config.counts import parameter_count
    from megatron_lite.config.run import RunConfig

    before, after = report.before, report.after.model
    counts = parameter_count(before), parameter_count(after)
    zero = added_layers(report.sources) if options.preserve_function else frozenset()
    layers = " ".join(f"{source}{'*' * (number in zero)}" for number, source in enumerate(report.sources))
    lines = [
        f"layers      {before.num_layers} -> {after.num_layers} (x {after.num_layers / before.num_layers:.3g})",
        f"parameters  {counts[0]:,} -> {counts[1]:,} (x {counts[1] / counts[0]:.3g})",
        *textwrap.wrap(layers, 96, initial_indent="copies of   ", subsequent_indent=" " * 12),
    ]
    if zero:
        lines.append("* output projections are zero: the model computes the same function as before")
    # The tokenizer gives the size of the vocabulary, and the layout its padding.
    config = RunConfig(
        model=replace(after, vocab_size=0, padded_vocab_size=0),
        batch=BatchConfig(seq_length=report.after.seq_length, micro_batch_size=1, global_batch_size=1),
        tokenizer=report.after.tokenizer,
        precision=report.after.precision,
        optimizer=report.optimizer,
    )
    fresh = "" if options.optimizer == "carry" else " --finetune"
    lines.append(
        f"to train it: pretrain_gpt.py --load {options.output}{fresh} --save … \\\n  {one_flag_a_line(to_argv(config))}"
    )
    lines.append(f"to try it:   megatron-lite generate --load {options.output}")
    return lines


def _parser() -> Parser:
    parser = Parser(
        prog="megatron-lite upscale",
        description="Write a checkpoint of a deeper model, whose layers are copies of those of a trained one. Width, "
        "embedding and head stay. Training starts at iteration 0. Memory does not depend on the size; the checkpoint "
        "appears under its name once it is complete.",
    )
    parser.add_argument("folder", type=Path, metavar="CKPT", help="iter_…, or a --save folder: its latest")
    parser.add_argument("--layers", type=whole(1, 100_000), required=True, metavar="N", help="layers of the new model")
    parser.add_argument(
        "--order",
        choices=("interleave", "stack"),
        default="interleave",
        help="interleave: new layer i copies layer floor(i x old / new), so that copies follow each other (default); "
        "stack: all layers, then again from the first",
    )
    parser.add_argument(
        "--optimizer",
        choices=("fresh", "carry"),
        default="fresh",
        help="fresh: weights only, to be loaded with --finetune (default); carry: copy each layer's optimizer state as "
        "well, to be loaded without --finetune",
    )
    parser.add_argument(
        "--preserve-function",
        action="store_true",
        help="set the output projections (attention and MLP) of every copy but the first of a layer to zero, so that "
        "the logits stay the same",
    )
    parser.add_argument(
        "--scale-residual",
        action="store_true",
        help="multiply all output projections by sqrt(old / new layers), the ratio of GPT-2's initializations "
        "1 / sqrt(2 x layers)",
    )
    parser.add_argument(
        "--ema", action="store_true", help="copy the moving average of the weights, from a run with --ema-decay"
    )
    add_output_arguments(parser)
    return parser
