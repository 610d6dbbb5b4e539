"""CLI command `merge` (tools/merge_datasets.py, tools/merge_preprocessed_data.py): concatenates datasets."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path

from megatron_lite.cli.parser import Parser
from megatron_lite.cli.progress import TokenProgress
from megatron_lite.errors import ConfigError

SUMMARY = "concatenate .bin/.idx datasets"


def run(argv: list[str]) -> int:
    """Merge datasets, and print the result."""
    args = build_parser().parse_args(argv)
    from megatron_lite.data.format.indexed_dataset import IndexedDataset
    from megatron_lite.data.preparation.merge import find_prefixes, merge_datasets

    if args.multimodal:
        raise ConfigError(
            "--multimodal datasets cannot be merged: only text datasets are supported", fix="Remove --multimodal"
        )
    prefixes = [*args.datasets, *(find_prefixes(Path(args.input)) if args.input else [])]
    if not prefixes:
        raise ConfigError(
            "There are no datasets to merge: neither --datasets nor --input is given",
            fix="Give --datasets PREFIX PREFIX, or --input FOLDER",
        )
    with TokenProgress("merge", sum(IndexedDataset(prefix).num_tokens for prefix in prefixes)) as progress:
        merged = merge_datasets(prefixes, args.output_prefix, overwrite=args.overwrite, advance=progress.advance)
    for text in merged.warnings:
        print(f"WARNING: {text}", file=sys.stderr)
    print(f"  {len(prefixes)} datasets, {merged.documents:,} documents, {merged.tokens:,} tokens")
    print(f"  --data-path {shlex.quote(args.output_prefix)}")
    return 0


def build_parser() -> Parser:
    """Return the parser with the flags of both Megatrons' merge tools."""
    parser = Parser(
        prog="merge_datasets.py",
        description="Concatenate datasets of one token type, with constant memory. On file systems with reflinks, no "
        "data are copied.",
    )
    parser.add_argument("--datasets", nargs="+", default=[], metavar="PREFIX", help="datasets to merge, in this order")
    parser.add_argument("--input", metavar="FOLDER", help="folder, all of whose datasets are merged, sorted by name")
    parser.add_argument("--output-prefix", required=True, metavar="PREFIX", help="path of the merged dataset")
    parser.add_argument("--overwrite", action="store_true", help="replace an existing dataset")
    old = parser.add_argument_group("accepted for compatibility")
    old.add_argument("--merge", choices=("serial", "distributed"), help="no effect: the disk is the bottleneck")
    old.add_argument("--torch-backend", choices=("gloo", "mpi"), help="no effect")
    old.add_argument("--multimodal", action="store_true", help="not supported")
    return parser
