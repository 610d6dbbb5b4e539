"""CLI command `train-tokenizer` (tools/train_tokenizer.py): trains a BPE or sentencepiece tokenizer."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path

from megatron_lite.cli.input_arguments import INPUT_HELP, add_plain_text_argument
from megatron_lite.cli.parser import Parser, real, seed, whole
from megatron_lite.cli.tokenizer_arguments import MAX_IDS
from megatron_lite.errors import ConfigError, DataError
from megatron_lite.system_errors import reason, remedy

SUMMARY = "train a byte-level BPE or sentencepiece tokenizer on text"


def run(argv: list[str]) -> int:
    """Train a tokenizer, write its files, and print the flags that select it."""
    args = build_parser().parse_args(argv)
    from megatron_lite.data.preparation.documents import Sample, iterate_texts
    from megatron_lite.tokenizer.training import train_byte_level_bpe, train_sentencepiece

    folder = Path(args.output)
    if folder.exists() and not folder.is_dir():
        raise ConfigError(f"--output {folder} is a file, not a folder", fix="Give --output the path of a new folder")
    written = [path for name in ("tokenizer.json", "tokenizer.model", "vocab.json") if (path := folder / name).exists()]
    if written and not args.overwrite:
        raise ConfigError(
            f"--output {folder} contains a tokenizer already ({written[0].name}), with which datasets may have been "
            "made",
            fix="Give another --output, or add --overwrite to replace it",
        )
    texts = iterate_texts(
        args.input,
        args.json_keys,
        plain_text=args.plain_text,
        sample=Sample(args.sample_files, args.sample_documents, args.seed),
        max_bytes=args.max_mb * 1_000_000,
        skip_bad=args.skip_bad_lines,
    )
    try:
        if args.tokenizer_type == "SentencePieceTokenizer":
            path = folder / "tokenizer.model"
            size = train_sentencepiece(
                texts,
                path,
                vocab_size=args.vocab_size,
                kind=args.sentencepiece_model,
                special_tokens=args.special_tokens or (),
                threads=args.workers,
            )
            use = ["--tokenizer-type", "SentencePieceTokenizer", "--tokenizer-model", str(path)]
        else:
            size = train_byte_level_bpe(
                texts,
                folder,
                vocab_size=args.vocab_size,
                special_tokens=args.special_tokens or ("<|endoftext|>",),
                min_frequency=args.min_frequency,
                progress=sys.stderr.isatty(),
            )
            use = ["--vocab-file", str(folder / "vocab.json"), "--merge-file", str(folder / "merges.txt")]
    except OSError as error:
        raise DataError(
            f"Cannot write the tokenizer to {folder}: {reason(error)}",
            fix=remedy(error, folder, instead="give another --output", writing=True),
        ) from error
    print(f"  {size:,} tokens" + (f" (--vocab-size {args.vocab_size:,})" if size != args.vocab_size else ""))
    print(f"  {shlex.join(use)}")
    return 0


def build_parser() -> Parser:
    """Return the parser; its flags have the names of those of preprocessing."""
    parser = Parser(
        prog="train_tokenizer.py",
        description="Train a tokenizer on text files. A byte-level BPE is written as tokenizer.json and as GPT-2's "
        "vocab.json and merges.txt, with the end-of-document token last.",
    )
    parser.add_argument("--input", nargs="+", required=True, metavar="FILE", help=INPUT_HELP)
    add_plain_text_argument(parser)
    parser.add_argument("--json-keys", nargs="+", default=["text"], metavar="KEY", help="JSON keys of the texts (text)")
    parser.add_argument("--output", required=True, metavar="FOLDER", help="folder of the tokenizer's files")
    parser.add_argument("--overwrite", action="store_true", help="replace a tokenizer in --output")
    parser.add_argument(
        "--vocab-size",
        type=whole(1, MAX_IDS),
        required=True,
        metavar="N",
        help="number of tokens, including special tokens",
    )
    parser.add_argument(
        "--tokenizer-type",
        choices=("GPT2BPETokenizer", "SentencePieceTokenizer"),
        default="GPT2BPETokenizer",
        help="byte-level BPE (default) or sentencepiece",
    )
    parser.add_argument(
        "--special-tokens",
        nargs="+",
        metavar="TOKEN",
        help="special tokens; the first is the end-of-document token (BPE: <|endoftext|>)",
    )
    parser.add_argument(
        "--min-frequency", type=whole(0, 1 << 31), default=2, metavar="N", help="minimum count of a merged pair (2)"
    )
    parser.add_argument("--sentencepiece-model", choices=("unigram", "bpe"), default="unigram", help="default unigram")
    parser.add_argument(
        "--max-mb",
        type=whole(1, 1_000_000_000),
        default=1000,
        metavar="N",
        help="maximum amount of text to read (1000)",
    )
    parser.add_argument(
        "--sample-files",
        type=whole(1),
        metavar="N",
        help="read N files, chosen at random from those given and those in folders",
    )
    parser.add_argument(
        "--sample-documents",
        type=real(0.0, 1.0, above=True),
        default=1.0,
        metavar="SHARE",
        help="read a random share of the documents (1)",
    )
    parser.add_argument("--seed", type=seed, default=1234, help="seed of the samples (1234)")
    parser.add_argument("--skip-bad-lines", action="store_true", help="leave out lines and files without a document")
    parser.add_argument(
        "--workers", type=whole(1, 1024), default=1, metavar="N", help="number of threads (sentencepiece)"
    )
    return parser
