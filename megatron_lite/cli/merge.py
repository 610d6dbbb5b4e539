"""CLI command `merge` (tools/merge_datasets.py, tools/merge_preprocessed_data.py): concatenates datasets."""

from __future__ import annotations

import shlex
from pathlib import Path

from megatron_lite.cli.parser import Parser
from megatron_lite.cli.progress import TokenProgress
from megatron_lite.errors import ConfigError

SUMMARY = "put several .bin/.idx datasets end to end"


def run(argv: list[str]) -> int:
    """Merge, and say what came out."""
    args = build_parser().parse_args(argv)
    from megatron_lite.data.format.indexed_dataset import IndexedDataset
    from megatron_lite.data.preparation.merge import find_prefixes, merge_datasets

    if args.multimodal:
        raise ConfigError(
            "Datasets hold text", found="--multimodal is given", fix="Leave --multimodal out; images are not supported"
        )
    prefixes = [*args.datasets, *(find_prefixes(Path(args.input)) if args.input else [])]
    if not prefixes:
        raise ConfigError(
            "Merging needs datasets", found="neither --datasets nor --input names any", fix="Give --datasets PREFIX …"
        )
    with TokenProgress("merge", sum(IndexedDataset(prefix).num_tokens for prefix in prefixes)) as progress:
        documents, tokens = merge_datasets(
            prefixes, args.output_prefix, overwrite=args.overwrite, advance=progress.advance
        )
    print(f"  {len(prefixes)} datasets, {documents:,} documents, {tokens:,} tokens")
    print(f"  --data-path {shlex.quote(args.output_prefix)}")
    return 0


def build_parser() -> Parser:
    """The flags of both Megatrons' merge tools."""
    parser = Parser(
        prog="merge_datasets.py",
        description="Put datasets of one token type end to end. Memory does not grow with their size, and where the "
        "file system can share blocks nothing is copied.",
    )
    parser.add_argument("--datasets", nargs="+", default=[], metavar="PREFIX", help="datasets, in this order")
    parser.add_argument("--input", metavar="FOLDER", help="or a folder: all its datasets, sorted by name")
    parser.add_argument("--output-prefix", required=True, metavar="PREFIX", help="where the merged dataset goes")
    parser.add_argument("--overwrite", action="store_true", help="replace an existing dataset")
    old = parser.add_argument_group("accepted for old command lines")
    old.add_argument("--merge", choices=("serial", "distributed"), help="no effect: the disk is the limit, not the CPU")
    old.add_argument("--torch-backend", choices=("gloo", "mpi"), help="no effect")
    old.add_argument("--multimodal", action="store_true", help="refused")
    return parser
