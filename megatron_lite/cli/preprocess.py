"""CLI command `preprocess` (tools/preprocess_data.py): tokenizes text files into .bin/.idx datasets."""

from __future__ import annotations

import argparse
import os
import shlex
import sys
from typing import TYPE_CHECKING

from megatron_lite.cli.input_arguments import INPUT_HELP, add_plain_text_argument
from megatron_lite.cli.parser import Parser, real, seed, whole
from megatron_lite.cli.tokenizer_arguments import add_tokenizer_arguments, tokenizer_config
from megatron_lite.errors import ConfigError

if TYPE_CHECKING:
    from megatron_lite.data.preparation.options import PreprocessOptions
    from megatron_lite.data.preparation.progress import ProgressDisplay

SUMMARY = "tokenize text (jsonl, parquet, folders and archives of .txt files) into a .bin/.idx dataset"
INTERRUPTED = 130
_ABBREVIATED = (
    *("--input", "--json-keys", "--split-sentences", "--keep-newlines", "--lang", "--output-prefix", "--dataset-impl"),
    *("--tokenizer-type", "--tokenizer-model", "--vocab-file", "--vocab-size", "--merge-file", "--append-eod"),
    *("--workers", "--partitions", "--log-interval", "--keep-sequential-samples", "--tensor-model-parallel-size"),
    *("--make-vocab-size-divisible-by", "--find-optimal-num-workers", "--workers-to-check", "--max-documents"),
)
"""Flags of Megatron's preprocess_data.py, whose command lines abbreviate them (--vocab, --json-key)."""


def run(argv: list[str]) -> int:
    """Run preprocessing; after Ctrl-C, the same command continues."""
    args = build_parser().parse_args(argv)
    if args.dataset_impl not in ("mmap", "infer"):
        raise ConfigError(
            f"Datasets of --dataset-impl {args.dataset_impl} cannot be written, only those of mmap",
            fix="Remove --dataset-impl: every Megatron since 2021 reads mmap",
        )
    # Threads of the tokenizer library would compete with the worker processes.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    from megatron_lite.data.preparation.run import measure_worker_counts, preprocess

    options = _options(args)
    if args.find_optimal_num_workers:
        times = []
        for workers, num_bytes, seconds in measure_worker_counts(options, args.workers_to_check, args.max_documents):
            times.append((seconds, workers))
            print(f"  {workers:4d} workers: {num_bytes / seconds / 1e6:8.2f} MB/s ({seconds:.1f} s)")
        print(f"Fastest on this machine: --workers {min(times)[1]}")
        return 0
    progress = _progress(args)
    if args.partitions > 1 and not args.keep_sequential_samples:
        progress.say(
            f"--partitions {args.partitions} has no effect: documents stay in the order of the input (Megatron-LM "
            "distributes them in turn, unless --keep-sequential-samples is given)."
        )
    if options.joins_without_separator:
        progress.say(
            "--join-short joins documents without a token between them: add --append-eod or --prepend-eod to separate "
            "them."
        )
    try:
        result = preprocess(options, progress)
    except KeyboardInterrupt:
        print(f"Stopped. The same command continues from {options.output_prefix}.partial", file=sys.stderr)
        return INTERRUPTED
    if not result.summary:
        print("Already complete: the same command has made it.")
    else:
        print(result.summary)
    for prefix in result.prefixes:
        print(f"  --data-path {shlex.quote(prefix)}")
    return 0


def build_parser() -> Parser:
    """Return the parser, which accepts abbreviations of Megatron's flags, as Megatron does."""
    parser = Parser(
        abbreviated=_ABBREVIATED,
        prog="preprocess_data.py",
        usage="%(prog)s --input FILE … --output-prefix PATH (--vocab-file PATH --merge-file PATH | "
        "--tokenizer-model PATH) [--append-eod] [--workers N] …",
        description="Tokenize text files into the .bin/.idx dataset that training reads. Output files get their names "
        "when they are complete; after an interruption, the same command continues.",
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
        help=INPUT_HELP,
    )
    add_plain_text_argument(group)
    group.add_argument(
        "--json-keys",
        nargs="+",
        default=["text"],
        metavar="KEY",
        help="JSON keys to tokenize, one dataset each (text); of prompt and completion, or of messages",
    )
    group.add_argument(
        "--input-format",
        choices=("text", "prompt-completion", "chat"),
        default="text",
        help="content of a line: texts (default), a prompt with its completion, or a chat; the latter two with a loss "
        "mask, for --answer-loss",
    )
    group.add_argument(
        "--chat-template", default="", metavar="FILE", help="Jinja template of chats (default: the tokenizer's)"
    )
    group.add_argument("--split-sentences", action="store_true", help="store each sentence as a sequence (uses nltk)")
    group.add_argument("--keep-newlines", action="store_true", help="keep the line breaks between sentences")
    group.add_argument("--lang", default="english", help="language of --split-sentences (english)")
    group.add_argument(
        "--skip-bad-lines", action="store_true", help="leave out and count lines and files without a document"
    )
    group.add_argument(
        "--max-line-mb",
        type=whole(1, 1 << 20),
        default=256,
        metavar="N",
        help="longer lines or .txt files are bad; limits memory (256)",
    )


def _add_output_arguments(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("output")
    group.add_argument("--output-prefix", required=True, metavar="PATH", help="files are PATH_KEY_document.bin, .idx")
    group.add_argument("--append-eod", action="store_true", help="end every document with the end-of-document token")
    group.add_argument("--prepend-eod", action="store_true", help="begin every document with the end-of-document token")
    group.add_argument(
        "--control-code", default="", metavar="CODE", help="begin every document with this special token or text"
    )
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
    group = parser.add_argument_group("filtering and order")
    group.add_argument(
        "--min-tokens",
        "--min-document-tokens",
        type=whole(),
        default=0,
        metavar="N",
        help="drop shorter documents, or join them with --join-short",
    )
    group.add_argument(
        "--join-short",
        action="store_true",
        help="join documents shorter than --min-tokens with the following ones instead of dropping them",
    )
    group.add_argument("--max-tokens", type=whole(1), metavar="N", help="drop longer documents")
    group.add_argument("--min-chars", type=whole(), default=0, metavar="N", help="drop documents of fewer characters")
    group.add_argument(
        "--sample-documents",
        type=real(0.0, 1.0, above=True),
        metavar="SHARE",
        help="keep a random share of the documents",
    )
    group.add_argument("--shuffle", action="store_true", help="write the documents in random order")
    group.add_argument("--seed", type=seed, default=1234, help="seed of --shuffle and --sample-documents (1234)")


def _add_running_arguments(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("running")
    group.add_argument(
        "--workers",
        type=whole(1, 65_536),
        default=1,
        metavar="N",
        help="worker processes; the output does not depend on it",
    )
    group.add_argument(
        "--log-interval",
        type=whole(1),
        metavar="N",
        help="documents between progress lines (default: every few seconds)",
    )
    group.add_argument(
        "--find-optimal-num-workers", action="store_true", help="only measure the speed with each of --workers-to-check"
    )
    group.add_argument(
        "--workers-to-check", nargs="+", type=whole(1, 65_536), default=[1, 2, 4, 8, 16, 32, 64], metavar="N"
    )
    group.add_argument(
        "--max-documents", type=whole(1), default=100_000, metavar="N", help="documents of that measurement (100000)"
    )


def _add_compatibility_arguments(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("accepted for compatibility")
    group.add_argument("--dataset-impl", default="mmap", metavar="mmap", help="only mmap is written")
    group.add_argument(
        "--partitions", type=whole(1), default=1, metavar="N", help="no effect: workers share every input"
    )
    group.add_argument(
        "--keep-sequential-samples",
        action="store_true",
        help="no effect: documents are always in the order of the input",
    )
    group.add_argument("--make-vocab-size-divisible-by", type=whole(1), metavar="N", help="no effect on the data")
    group.add_argument(
        "--pad-vocab-size-to", "--padded-vocab-size", type=whole(), metavar="N", help="no effect on the data"
    )
    group.add_argument("--tensor-model-parallel-size", type=whole(1), metavar="N", help="no effect on the data")


def _options(args: argparse.Namespace) -> PreprocessOptions:
    from megatron_lite.data.preparation.options import PreprocessOptions

    return PreprocessOptions(
        inputs=tuple(args.input),
        output_prefix=args.output_prefix,
        tokenizer=tokenizer_config(args),
        json_keys=tuple(args.json_keys),
        input_format=args.input_format,
        chat_template=args.chat_template,
        control_code=args.control_code,
        plain_text=args.plain_text,
        append_eod=args.append_eod,
        prepend_eod=args.prepend_eod,
        prepend_bos=args.prepend_bos,
        empty_documents=args.empty_documents,
        split_sentences=args.split_sentences,
        keep_newlines=args.keep_newlines,
        language=args.lang,
        skip_bad_lines=args.skip_bad_lines,
        max_line_bytes=args.max_line_mb << 20,
        min_tokens=args.min_tokens,
        join_short=args.join_short,
        max_tokens=args.max_tokens,
        min_chars=args.min_chars,
        sample=args.sample_documents,
        shuffle=args.shuffle,
        seed=args.seed,
        workers=args.workers,
        overwrite=args.overwrite,
    )


def _progress(args: argparse.Namespace) -> ProgressDisplay:
    from megatron_lite.data.preparation.progress import BarProgress, LineProgress

    if sys.stderr.isatty() and args.log_interval is None:
        return BarProgress(sys.stderr)
    return LineProgress(sys.stderr, args.log_interval)
