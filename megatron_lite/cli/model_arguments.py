"""Command-line arguments that select a trained model, shared by `generate` and `evaluate`."""

from __future__ import annotations

import argparse
import sys

from megatron_lite.cli.parser import whole
from megatron_lite.cli.tokenizer_arguments import FILE_FIELDS, add_tokenizer_arguments
from megatron_lite.config.runtime import DEVICE_SPELLINGS


def add_model_arguments(parser: argparse.ArgumentParser) -> None:
    """Add --load, the device, and the flags for moved tokenizer files."""
    source = parser.add_argument_group("model")
    source.add_argument("--load", required=True, metavar="DIR", help="a run's --save folder, or one checkpoint in it")
    source.add_argument(
        "--load-iteration", type=whole(), default=0, metavar="N", help="iteration of the checkpoint (default: latest)"
    )
    source.add_argument(
        "--ema", action="store_true", help="use the moving average of the weights, from a run with --ema-decay"
    )
    source.add_argument(
        "--device",
        type=_device,
        default="auto",
        metavar="{auto,cpu,cuda,xpu}",
        help="default: a GPU if there is one. Also accepted: gpu and rocm for cuda",
    )
    source.add_argument("--context-parallel-size", type=_one_rank, default=1, help=argparse.SUPPRESS)
    add_tokenizer_arguments(parser, *FILE_FIELDS, note="if the tokenizer's files have moved")


def _one_rank(word: str) -> int:
    """Return 1; refuse other context-parallel sizes, of which commands copied from a training may have one."""
    if word != "1":
        raise argparse.ArgumentTypeError(
            "only training has context parallelism; the checkpoint can be read without it. Remove the flag, and if "
            "memory is short use --tensor-model-parallel-size or --pipeline-model-parallel-size"
        )
    return 1


def _device(word: str) -> str:
    """Return the kind of device; training's further spellings are accepted, and its further devices refused."""
    kind = DEVICE_SPELLINGS.get(word.lower(), word.lower())
    if kind in ("mps", "xla"):
        raise argparse.ArgumentTypeError(
            f"only training runs on {kind}. Remove the flag: on a host without other GPUs, this command runs on the CPU"
        )
    if kind not in ("auto", "cpu", "cuda", "xpu"):
        raise argparse.ArgumentTypeError(f"unknown device {word!r} (choose from auto, cpu, cuda, xpu)")
    return kind


def note(text: str) -> None:
    """Print a message on stderr, apart from the result of the command."""
    print(text, file=sys.stderr)
