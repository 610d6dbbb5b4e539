"""CLI command `preprocess` (tools/preprocess_data.py): tokenizes text files into .bin/.idx datasets."""

from __future__ import annotations

import argparse
import os
import shlex
import sys
from typing import TYPE_CHECKING

from megatron_lite.cli.parser import Parser, real, seed, whole
from megatron_lite.cli.tokenizer_arguments import add_tokenizer_arguments, tokenizer_config
from megatron_lite.errors import ConfigError

if TYPE_CHECKING:
    from megatron_lite.data.preparation.options import PreprocessOptions
    from megatron_lite.data.preparation.progress import Progress

SUMMARY = "turn text (jsonl, compressed or not, .parquet) into a .bin/.idx dataset"
INTERRUPTED = 130


def run(argv: list[str]) -> int:
    """Preprocess; Ctrl-C leaves work that the same command continues."""
    args = build_parser().parse_args(argv)
    _refuse(args)
    # Workers are processes: a tokenizer library that starts threads in each would only make them wait for each other.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    from megatron_lite.data.preparation.run import preprocess

    options = _options(args)
    if args.find_optimal_num_workers:
        from megatron_lite.data.preparation.trial import compare_worker_counts

        compare_worker_counts(options, args.workers_to_check, args.max_documents, print)
        return 0
    progress = _progress(args)
    for note in _notes(args):
        progress.say(note)
    try:
        result = preprocess(options, progress)
    except KeyboardInterrupt:
        print(f"Stopped. The same command continues from {options.output_prefix}.partial", file=sys.stderr)
        return INTERRUPTED
    if not result.summary:
        print("Already complete; --overwrite is for a changed command, and there is nothing to do for this one.")
    else:
        print(result.summary)
    for prefix in result.prefixes:
        print(f"  --data-path {shlex.quote(prefix)}")
    return 0


def build_parser() -> Parser:
    """The parser; it takes abbreviations as Megatron's does."""
    parser = Parser(
        prog="preprocess_data.py",
        usage="%(prog)s --input FILE … --output-prefix PATH (--vocab-file PATH --merge-file PATH | "
        "--tokenizer-model PATH) [--append-eod] [--workers N] …",
        description="Tokenise text files into the .bin/.idx dataset that training reads. Output appears under its "
        "name only when it is complete; a run that was stopped is continued by the same command.",
    )
    _add_input_arguments(parser)
    add_tokenizer_arguments(parser)
    _add_output_arguments(parser)
    _add_filter_arguments(parser)
    _add_running_arguments(parser)
    _add_compatibility_arguments(parser)
    return parser


def _add_input_arguments(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("input")
    group.add_argument(
        "--input",
        nargs="+",
        required=True,
        metavar="FILE",
        help="files or globs: .jsonl, .gz, .bz2, .xz, .zst, .parquet",
    )
    group.add_argument(
        "--json-keys", nargs="+", default=["text"], metavar="KEY", help="keys to tokenise, a dataset each (text)"
    )
    group.add_argument("--split-sentences", action="store_true", help="store each sentence as a sequence (nltk)")
    group.add_argument("--keep-newlines", action="store_true", help="keep line breaks between sentences")
    group.add_argument("--lang", default="english", help="language of --split-sentences (english)")
    group.add_argument("--skip-bad-lines", action="store_true", help="leave out and count lines that hold no document")
    group.add_argument(
        "--max-line-mb",
        type=whole(1, 1 << 20),
        default=256,
        metavar="N",
        help="a longer line is a bad one: it would take memory (256)",
    )


def _add_output_arguments(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("output")
    group.add_argument("--output-prefix", required=True, metavar="PATH", help="files are PATH_KEY_document.bin, .idx")
    group.add_argument("--append-eod", action="store_true", help="end every document with the end-of-document token")
    group.add_argument(
        "--prepend-bos", action="store_true", help="begin every document with the beginning-of-text token (LLaMA)"
    )
    group.add_argument(
        "--empty-documents",
        choices=("skip", "keep"),
        default="skip",
        help="documents without tokens: skip (Megatron-DeepSpeed) or keep as empty (Megatron-LM); default skip",
    )
    group.add_argument("--overwrite", action="store_true", help="replace a dataset that another command made")


def _add_filter_arguments(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("which documents, in which order")
    group.add_argument("--min-tokens", type=whole(), default=0, metavar="N", help="drop shorter documents")
    group.add_argument("--max-tokens", type=whole(1), metavar="N", help="drop longer documents")
    group.add_argument("--min-chars", type=whole(), default=0, metavar="N", help="drop documents of fewer characters")
    group.add_argument(
        "--sample-documents",
        type=real(0.0, 1.0, above=True),
        metavar="SHARE",
        help="keep this share of the documents, drawn at random",
    )
    group.add_argument("--shuffle", action="store_true", help="put documents in a random order")
    group.add_argument("--seed", type=seed, default=1234, help="of --shuffle and --sample-documents (1234)")


def _add_running_arguments(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("running")
    group.add_argument(
        "--workers", type=whole(1, 65_536), default=1, metavar="N", help="processes; the output is the same for any"
    )
    group.add_argument(
        "--log-interval",
        type=whole(1),
        metavar="N",
        help="documents between progress lines (default: every few seconds)",
    )
    group.add_argument(
        "--find-optimal-num-workers", action="store_true", help="only measure the --workers-to-check on some documents"
    )
    group.add_argument(
        "--workers-to-check", nargs="+", type=whole(1, 65_536), default=[1, 2, 4, 8, 16, 32, 64], metavar="N"
    )
    group.add_argument("--max-documents", type=whole(1), default=100_000, metavar="N", help="for that measurement")


def _add_compatibility_arguments(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("accepted for old command lines")
    group.add_argument("--dataset-impl", default="mmap", metavar="mmap", help="mmap is the only kind written")
    group.add_argument("--partitions", type=whole(1), default=1, metavar="N", help="no effect: workers share any input")
    group.add_argument("--keep-sequential-samples", action="store_true", help="no effect: order is always the input's")
    group.add_argument("--make-vocab-size-divisible-by", type=whole(1), metavar="N", help="no effect on the data")
    group.add_argument(
        "--pad-vocab-size-to", "--padded-vocab-size", type=whole(), metavar="N", help="no effect on the data"
    )
    group.add_argument("--tensor-model-parallel-size", type=whole(1), metavar="N", help="no effect on the data")


def _refuse(args: argparse.Namespace) -> None:
    if args.dataset_impl not in ("mmap", "infer"):
        raise ConfigError(
            "Datasets are written memory-mapped",
            found=f"--dataset-impl is {args.dataset_impl}",
            fix="Leave --dataset-impl out; every Megatron since 2021 reads mmap",
        )


def _notes(args: argparse.Namespace) -> list[str]:
    if args.partitions > 1 and not args.keep_sequential_samples:
        return [
            f"--partitions {args.partitions} has no effect: documents stay in the input's order (Megatron-LM deals "
            "them out in turn, unless --keep-sequential-samples)."
        ]
    return []


def _options(args: argparse.Namespace) -> PreprocessOptions:
    from megatron_lite.data.preparation.options import PreprocessOptions

    return PreprocessOptions(
        inputs=tuple(args.input),
        output_prefix=args.output_prefix,
        tokenizer=tokenizer_config(args),
        json_keys=tuple(args.json_keys),
        append_eod=args.append_eod,
        prepend_bos=args.prepend_bos,
        empty_documents=args.empty_documents,
        split_sentences=args.split_sentences,
        keep_newlines=args.keep_newlines,
        language=args.lang,
        skip_bad_lines=args.skip_bad_lines,
        max_line_bytes=args.max_line_mb << 20,
        min_tokens=args.min_tokens,
        max_tokens=args.max_tokens,
        min_chars=args.min_chars,
        sample=args.sample_documents,
        shuffle=args.shuffle,
        seed=args.seed,
        workers=args.workers,
        overwrite=args.overwrite,
    )


def _progress(args: argparse.Namespace) -> Progress:
    from megatron_lite.data.preparation.progress import BarProgress, LineProgress

    if sys.stderr.isatty() and args.log_interval is None:
        return BarProgress(sys.stderr)
    return LineProgress(sys.stderr, args.log_interval)
