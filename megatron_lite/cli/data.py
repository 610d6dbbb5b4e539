"""CLI command `data`: dispatch of its subcommands, and those on one dataset (inspect, verify, convert)."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_lite.cli.data_pack import pack
from megatron_lite.cli.data_samples import build_indices, show_samples
from megatron_lite.cli.output_file import write_output
from megatron_lite.cli.parser import Parser, file_path, whole
from megatron_lite.cli.progress import TokenProgress
from megatron_lite.cli.tokenizer_arguments import add_tokenizer_arguments, given_tokenizer
from megatron_lite.errors import DataError

if TYPE_CHECKING:
    from megatron_lite.data.format.indexed_dataset import IndexedDataset
    from megatron_lite.tokenizer.base import Tokenizer

SUMMARY = "inspect, verify, pack and convert datasets; print the text of an iteration"
EXIT_FAILURE = 1
EXIT_USAGE = 2

USAGE = """\
usage: megatron-lite data inspect PREFIX [--documents N] [--tokens N]
                                  [--picture FILE.svg] [tokenizer flags]
       megatron-lite data verify PREFIX [PREFIX ...] [tokenizer flags]
       megatron-lite data samples --iteration N [--tokens N] JOB_FLAGS
       megatron-lite data index JOB_FLAGS
       megatron-lite data pack PREFIX PACKED_PREFIX --seq-length N
                               [tokenizer flags]
       megatron-lite data convert OLD_PREFIX NEW_PREFIX

  inspect   print header, counts, length histogram and first documents (as text
            with a tokenizer)
  verify    check all lengths and pointers, all token ids (with a tokenizer or a
            manifest) and all checksums (with a manifest)
  samples   print the documents and the text that iteration N trains on
  index     build the sample indices of a job and write them to the cache, so
            that the job starts without a delay
  pack      pack whole documents into sequences of exactly N tokens; training
            then cuts only longer documents
  convert   convert a dataset of the older lazy/cached format
"""


def run(argv: list[str]) -> int:
    """Run the action named by the first argument."""
    if not argv or argv[0] in ("-h", "--help"):
        print(USAGE, end="")
        return 0 if argv else EXIT_USAGE
    actions = {
        "inspect": inspect,
        "verify": verify,
        "samples": show_samples,
        "index": build_indices,
        "pack": pack,
        "convert": convert,
    }
    if argv[0] not in actions:
        print(f"megatron-lite data: unknown action {argv[0]!r}\n\n{USAGE}", end="", file=sys.stderr)
        return EXIT_USAGE
    return actions[argv[0]](argv[1:])


def inspect(argv: list[str]) -> int:
    """Print the properties of a dataset and the beginnings of its first documents."""
    parser = Parser(prog="megatron-lite data inspect")
    parser.add_argument("prefix", help="common path of the .bin and .idx")
    parser.add_argument("--documents", type=whole(), default=3, metavar="N", help="documents to print (default 3)")
    parser.add_argument(
        "--tokens", type=whole(), default=64, metavar="N", help="tokens of each document to print (default 64)"
    )
    parser.add_argument("--picture", type=file_path, metavar="FILE.svg", help="write the length histogram as an image")
    add_tokenizer_arguments(parser)
    options = parser.parse_args(argv)

    from megatron_lite.data.format.indexed_dataset import IndexedDataset
    from megatron_lite.data.preparation.survey import draw_lengths, draw_lengths_svg, survey_lengths

    data = IndexedDataset(options.prefix)
    lengths = survey_lengths(data)
    print(data.prefix)
    for name, value in {
        "documents": f"{data.num_documents:,}",
        "sequences": f"{len(data):,} ({lengths.empty:,} empty)",
        "tokens": f"{data.num_tokens:,} as {data.dtype.name}, {data.num_bytes:,} bytes",
        "lengths": f"{lengths.shortest:,} to {lengths.longest:,}, mean {lengths.mean:,.1f}",
        **_describe_manifest(options.prefix),
    }.items():
        print(f"  {name:<15} {value}")
    print("\n".join(draw_lengths(lengths)))
    if options.picture:
        write_output(options.picture, draw_lengths_svg(lengths, Path(data.prefix).name), "--picture")
        print(f"  image: {options.picture}")
    from megatron_lite.data.format.manifest import check_manifest

    tokenizer = given_tokenizer(options)
    try:
        check_manifest(options.prefix, tokenizer.fingerprint() if tokenizer else "")
    except DataError as error:
        print(f"WARNING: {error}", file=sys.stderr)
    _show_documents(data, tokenizer, options.documents, options.tokens)
    return 0


def verify(argv: list[str]) -> int:
    """Check complete datasets."""
    parser = Parser(prog="megatron-lite data verify")
    parser.add_argument("prefixes", nargs="+", metavar="PREFIX", help="common path of a .bin and .idx, or the .idx")
    add_tokenizer_arguments(parser)
    options = parser.parse_args(argv)
    tokenizer = given_tokenizer(options)
    damaged = 0
    for prefix in (given.removesuffix(".idx") for given in options.prefixes):
        started = time.monotonic()
        try:
            checked = [*_verify_one(prefix, tokenizer), f"{time.monotonic() - started:.1f} s"]
        except DataError as error:
            damaged += 1
            print(f"{prefix}: DAMAGED\n  {error}", file=sys.stderr)
        else:
            print(f"{prefix}: OK\n  " + "\n  ".join(checked))
    return EXIT_FAILURE if damaged else 0


def convert(argv: list[str]) -> int:
    """Convert a dataset of the older lazy/cached format."""
    parser = Parser(prog="megatron-lite data convert")
    parser.add_argument("old_prefix", help="common path of the older .bin and .idx")
    parser.add_argument("new_prefix", help="common path of the files to write")
    options = parser.parse_args(argv)
    from megatron_lite.data.format.older_index import convert_older

    print(f"{options.new_prefix}: {convert_older(options.old_prefix, options.new_prefix):,} documents")
    return 0


def _verify_one(prefix: str, tokenizer: Tokenizer | None) -> list[str]:
    """Check one dataset, and return descriptions of the checks."""
    from megatron_lite.data.format.indexed_dataset import IndexedDataset
    from megatron_lite.data.format.manifest import check_files, check_manifest
    from megatron_lite.data.preparation.survey import check_all_tokens

    data = IndexedDataset(prefix)
    data.check()
    checked = [f"{len(data):,} lengths and pointers", f"{data.num_documents:,} documents"]
    manifest = check_manifest(prefix, tokenizer.fingerprint() if tokenizer else "")
    vocab_size = (
        tokenizer.vocab_size if tokenizer else int((manifest.tokenizer if manifest else {}).get("vocab_size", 0))
    )
    if vocab_size:
        with TokenProgress("verify", data.num_tokens) as progress:
            for done in check_all_tokens(data, vocab_size):
                progress.advance(done - progress.done)
        checked.append(f"{data.num_tokens:,} ids below {vocab_size}")
    else:
        checked.append("token ids not checked: give a tokenizer")
    if manifest is not None:
        check_files(prefix, manifest)
        checked.append("checksums")
    else:
        checked.append("checksums not checked: the dataset has no manifest")
    return checked


def _describe_manifest(prefix: str) -> dict[str, str]:
    """Return the entries of a dataset's manifest by label."""
    from megatron_lite.data.format.manifest import read_manifest

    manifest = read_manifest(prefix)
    if manifest is None:
        return {"tokenizer": "unknown: no manifest (Megatron writes none)"}
    tokenizer, length = manifest.tokenizer, manifest.packed_length
    found = {
        "tokenizer": f"{tokenizer.get('type')} of {tokenizer.get('vocab_size', 0):,} entries",
        "fingerprint": f"{str(tokenizer.get('fingerprint'))[:31]}…",
        "documents end": f"with token {tokenizer.get('eod')}",
    }
    if tokenizer.get("bos") is not None:
        found["documents begin"] = f"with token {tokenizer['bos']}"
    if tokenizer.get("eod") is None:
        found["documents end"] = "without an end-of-document token (no --append-eod)"
    if length:
        found["packed"] = f"for --seq-length {length:,}: each sequence is one training sample"
    return found


def _show_documents(data: IndexedDataset, tokenizer: Tokenizer | None, documents: int, tokens: int) -> None:
    """Print the beginnings of the first documents."""
    for number in range(min(documents, data.num_documents)):
        ids = data.document(number)
        shown = ids[:tokens].tolist()
        text = " ".join(map(str, shown)) if tokenizer is None else repr(tokenizer.decode(shown))
        print(f"\ndocument {number}, {ids.shape[0]:,} tokens\n  {text}{' …' if ids.shape[0] > tokens else ''}")
