"""CLI command `data`: inspect, verify, pack and convert datasets, show the samples of an iteration."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_lite.cli.data_pack import pack
from megatron_lite.cli.data_samples import build_indices, show_samples
from megatron_lite.cli.data_tokenizer import given_tokenizer
from megatron_lite.cli.parser import Parser, whole
from megatron_lite.cli.progress import TokenProgress
from megatron_lite.cli.tokenizer_arguments import add_tokenizer_arguments
from megatron_lite.errors import DataError

if TYPE_CHECKING:
    from megatron_lite.data.format.indexed_dataset import IndexedDataset
    from megatron_lite.tokenizer.base import Tokenizer

SUMMARY = "inspect, verify, pack and convert datasets; show the text of an iteration"
EXIT_FAILURE = 1
EXIT_USAGE = 2

USAGE = """\
usage: megatron-lite data inspect PREFIX [--documents N] [--picture FILE.svg] [tokenizer flags]
       megatron-lite data verify PREFIX [PREFIX ...] [tokenizer flags]
       megatron-lite data samples --iteration N [--tokens N] THE JOB'S FLAGS
       megatron-lite data index THE JOB'S FLAGS
       megatron-lite data pack PREFIX PACKED_PREFIX --seq-length N [tokenizer flags]
       megatron-lite data convert OLD_PREFIX NEW_PREFIX

  inspect   header, counts, lengths as a histogram, the first documents (as text, given a tokenizer)
  verify    every length and pointer, every id (given a tokenizer or a manifest), every checksum (given a manifest)
  samples   which documents and text iteration N trains on
  index     build and keep the sample index ahead of a job, so that it starts at once
  pack      whole documents into sequences of exactly N tokens: training cuts no document that fits in one
  convert   a dataset of the older lazy/cached kind to the one that is read here
"""


def run(argv: list[str]) -> int:
    """Do what `argv` asks for; a damaged dataset is an error."""
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
        print(f"megatron-lite data: there is no action {argv[0]!r}\n\n{USAGE}", end="", file=sys.stderr)
        return EXIT_USAGE
    return actions[argv[0]](argv[1:])


def inspect(argv: list[str]) -> int:
    """Print what a dataset is."""
    parser = Parser(prog="megatron-lite data inspect")
    parser.add_argument("prefix", help="common path of the .bin and the .idx")
    parser.add_argument("--documents", type=whole(), default=3, metavar="N", help="documents to show (default 3)")
    parser.add_argument("--tokens", type=whole(), default=64, metavar="N", help="tokens of each to show (default 64)")
    parser.add_argument("--picture", type=Path, metavar="FILE.svg", help="draw the histogram of lengths")
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
        **_papers(options.prefix),
    }.items():
        print(f"  {name:<15} {value}")
    print("\n".join(draw_lengths(lengths)))
    if options.picture:
        try:
            options.picture.write_text(draw_lengths_svg(lengths, Path(data.prefix).name), encoding="utf-8")
        except OSError as error:
            raise DataError(
                "A picture can be written where it is asked for",
                found=f"{options.picture}: {error.strerror}",
                fix="Give another path after --picture",
            ) from error
        print(f"  drawn to {options.picture}")
    _show_documents(data, given_tokenizer(options), options.documents, options.tokens)
    return 0


def verify(argv: list[str]) -> int:
    """Check whole datasets."""
    parser = Parser(prog="megatron-lite data verify")
    parser.add_argument("prefixes", nargs="+", metavar="PREFIX", help="common path of a .bin and an .idx, or the .idx")
    add_tokenizer_arguments(parser)
    options = parser.parse_args(argv)
    tokenizer = given_tokenizer(options)
    damaged = 0
    for prefix in (given.removesuffix(".idx") for given in options.prefixes):
        began = time.monotonic()
        try:
            checked = [*_verify_one(prefix, tokenizer), f"{time.monotonic() - began:.1f} s"]
        except DataError as error:
            damaged += 1
            print(f"{prefix}: NOT WHOLE\n  {error}", file=sys.stderr)
        else:
            print(f"{prefix}: whole\n  " + "\n  ".join(checked))
    return EXIT_FAILURE if damaged else 0


def convert(argv: list[str]) -> int:
    """Convert a dataset of the older kind."""
    parser = Parser(prog="megatron-lite data convert")
    parser.add_argument("old_prefix", help="common path of the older .bin and .idx")
    parser.add_argument("new_prefix", help="common path of the files to write")
    options = parser.parse_args(argv)
    from megatron_lite.data.format.older_index import convert_older

    print(f"{options.new_prefix}: {convert_older(options.old_prefix, options.new_prefix):,} documents")
    return 0


def _verify_one(prefix: str, tokenizer: Tokenizer | None) -> list[str]:
    """Check one dataset; what was checked, in words."""
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
        checked.append("no ids: give a tokenizer to check them")
    if manifest is not None:
        check_files(prefix, manifest)
        checked.append("checksums")
    else:
        checked.append("no checksums: it has no manifest")
    return checked


def _papers(prefix: str) -> dict[str, str]:
    """What the manifest says, if there is one."""
    from megatron_lite.data.format.manifest import read_manifest

    manifest = read_manifest(prefix)
    if manifest is None:
        return {"made with": "unknown: no manifest (Megatron writes none)"}
    tokenizer, length = manifest.tokenizer, manifest.packed_length
    found = {
        "made with": f"{tokenizer.get('type')} of {tokenizer.get('vocab_size', 0):,} entries",
        "fingerprint": f"{str(tokenizer.get('fingerprint'))[:31]}…",
        "documents end": f"with token {tokenizer.get('eod')}",
    }
    if tokenizer.get("bos") is not None:
        found["documents begin"] = f"with token {tokenizer['bos']}"
    if tokenizer.get("eod") is None:
        found["documents end"] = "without an end-of-document token (no --append-eod)"
    if length:
        found["packed"] = f"for --seq-length {length:,}: each sequence is one sample of training"
    return found


def _show_documents(data: IndexedDataset, tokenizer: Tokenizer | None, documents: int, tokens: int) -> None:
    """Print the beginnings of the first documents."""
    for number in range(min(documents, data.num_documents)):
        ids = data.document(number)
        shown = ids[:tokens].tolist()
        text = " ".join(map(str, shown)) if tokenizer is None else repr(tokenizer.decode(shown))
        print(f"\ndocument {number}, {ids.shape[0]:,} tokens\n  {text}{' …' if ids.shape[0] > tokens else ''}")
