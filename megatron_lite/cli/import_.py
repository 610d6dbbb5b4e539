"""CLI command `import`: converts a Hugging Face, Megatron-LM or DeepSpeed checkpoint for --load."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_lite.cli.parser import Parser, real, whole
from megatron_lite.formatting import format_size

if TYPE_CHECKING:
    from megatron_lite.interop.importing import ImportOptions

SUMMARY = "import a checkpoint of Hugging Face, Megatron-LM or DeepSpeed as one that --load takes"
DTYPES = ("float32", "bfloat16", "float16")


def run(argv: list[str]) -> int:
    """Import the folder that `argv` names."""
    options, flags = _parser().parse_known_args(argv)

    import torch

    from megatron_lite.cli.progress import stage_progress
    from megatron_lite.config.arguments import to_argv
    from megatron_lite.interop.importing import import_checkpoint
    from megatron_lite.runs.foreign import Kind

    chosen = replace(
        foreign_options(options, flags, weights_only=options.weights_only),
        kind=Kind(options.source_kind) if options.source_kind else None,
        dtype=getattr(torch, options.dtype) if options.dtype else None,
        seq_length=options.seq_length or 0,
        verify=options.verify,
        tolerance=options.tolerance,
    )
    with stage_progress() as advance:
        report = import_checkpoint(options.folder, options.output, chosen, advance)
    for text in report.notes:
        print(f"note: {text}")
    print(f"imported {options.folder} into {report.path}, {format_size(report.size)}")
    print(str(report.verification) if report.verification else "the logits were not compared with transformers'")
    # The tokenizer says the vocabulary's size, and the layout how far it is padded.
    model = replace(report.config.model, vocab_size=0, padded_vocab_size=0)
    words = to_argv(replace(report.config, model=model))
    if report.goes_on:
        print("the optimizer's state was imported: give the run its own flags, and it continues where it was saved")
    anew = "" if report.goes_on else " --finetune"
    print(f"to train on: pretrain_gpt.py --load {report.path}{anew} \\\n  {one_flag_a_line(words)}")
    print(f"to try it:   megatron-lite generate --load {report.path}")
    return 0


def one_flag_a_line(words: list[str]) -> str:
    """Return a command line with one flag a line."""
    text = ""
    for word in words:
        text += (" \\\n  " if word.startswith("--") and text else " " if text else "") + word
    return text


def _parser() -> Parser:
    parser = Parser(
        prog="megatron-lite import",
        description="Import a model as a checkpoint that --load takes, in any layout. Hugging Face folders of GPT-2, "
        "BLOOM, Llama, Mistral, Qwen2, Qwen3 and GPT-NeoX are read, .safetensors or .bin; no code in them is executed. "
        "The logits are compared with those of transformers before the checkpoint gets its name. Checkpoints of "
        "Megatron-LM (classic and torch_dist) and DeepSpeed (layer files, ZeRO-1, universal) are read as well.",
        epilog="What files of Megatron-LM or DeepSpeed do not say of the model, its own flags do: "
        "--num-attention-heads 16 --vocab-size 50257 … (entries of the tokenizer), or the tokenizer's files.",
    )
    parser.add_argument("folder", type=Path, metavar="DIR", help="the model's folder")
    parser.add_argument(
        "--output", type=Path, required=True, metavar="CKPT", help="the new folder, which --load will take"
    )
    parser.add_argument(
        "--from",
        dest="source_kind",
        default="",
        choices=("hf", "megatron", "megatron-dist", "deepspeed", "deepspeed-universal"),
        help="what the folder is (default: recognised by its files)",
    )
    parser.add_argument(
        "--dtype", choices=DTYPES, default="", help="store the weights in this dtype (default: as they are)"
    )
    parser.add_argument(
        "--seq-length",
        type=whole(1),
        metavar="N",
        help="the longest sequence that you will use (default: the model's positions, at most 4096)",
    )
    parser.add_argument(
        "--weights-only",
        action="store_true",
        help="import no optimizer state of Megatron-LM or DeepSpeed; training on it starts at iteration 0",
    )
    add_verification(parser)
    add_foreign_arguments(parser.add_argument_group("what the files leave open"))
    return parser


def add_foreign_arguments(group: argparse._ActionsContainer) -> None:
    """Add the flags that say what foreign files leave open; the model's own flags are read apart."""
    group.add_argument(
        "--ignore-config-keys",
        nargs="+",
        default=[],
        metavar="KEY",
        help="unknown settings (of config.json, Megatron's args, a DeepSpeed config) that do not change what the model "
        "computes",
    )
    group.add_argument(
        "--replicated",
        choices=("average", "first"),
        default="",
        help="where tensor-parallel ranks hold different copies of a tensor: take their mean, or rank 0's "
        "(default: an error that lists them)",
    )
    group.add_argument(
        "--checkpoint-version",
        type=real(0, 3),
        metavar="V",
        help="order of the QKV rows of a Megatron-LM file that does not say it: 0, 1, 2 or 3 (default: 0, as "
        "Megatron-LM reads it)",
    )


def foreign_options(options: argparse.Namespace, flags: Sequence[str], *, weights_only: bool) -> ImportOptions:
    """Return what add_foreign_arguments and the model's flags say.

    Args:
        options: the parsed command line.
        flags: its remaining arguments: flags of the model in Megatron's spelling.
        weights_only: leave the optimizer's state out.
    """
    from megatron_lite.interop.importing import ImportOptions
    from megatron_lite.interop.megatron.opening import MegatronOptions

    return ImportOptions(
        ignored_keys=tuple(options.ignore_config_keys),
        megatron=MegatronOptions(
            weights_only=weights_only,
            replicated=options.replicated,
            checkpoint_version=options.checkpoint_version,
            flags=tuple(flags),
        ),
    )


def add_verification(parser: argparse.ArgumentParser) -> None:
    """Add the flags of the comparison with transformers."""
    parser.add_argument(
        "--no-verify",
        dest="verify",
        action="store_false",
        help="do not compare the logits with transformers (which need not be installed then)",
    )
    parser.add_argument(
        "--tolerance",
        type=real(0, 1, above=True),
        default=2e-5,
        metavar="T",
        help="accepted difference of the logits, as a share of the largest logit (default: %(default)g)",
    )
