"""CLI command `data pack`: packs whole documents into sequences of exactly --seq-length tokens."""

from __future__ import annotations

import argparse
import time
from typing import TYPE_CHECKING, Any

from megatron_lite.cli.data_tokenizer import given_tokenizer
from megatron_lite.cli.parser import Parser, seed, whole
from megatron_lite.cli.progress import TokenProgress
from megatron_lite.cli.tokenizer_arguments import add_tokenizer_arguments, tokenizer_config
from megatron_lite.errors import DataError

if TYPE_CHECKING:
    from megatron_lite.data.preparation.packed_dataset import Packed


def pack(argv: list[str]) -> int:
    """Pack a dataset, and say what it gained and cost."""
    parser = Parser(
        prog="megatron-lite data pack",
        description="Put whole documents together into sequences of exactly --seq-length tokens, so that training cuts "
        "only documents that are longer. Ends of sequences are filled up with the end-of-document token: train with "
        "--eod-mask-loss, which leaves them out of the loss, and with the same --seq-length.",
    )
    parser.add_argument("prefix", help="common path of the .bin and the .idx")
    parser.add_argument("packed_prefix", help="common path of the files to write")
    parser.add_argument(
        "--seq-length", type=whole(1, 1_000_000_000), required=True, metavar="N", help="the run's --seq-length"
    )
    parser.add_argument("--seed", type=seed, default=1234, help="of the order of neighbouring sequences (1234)")
    parser.add_argument("--overwrite", action="store_true", help="replace a dataset that another command made")
    add_tokenizer_arguments(parser)
    options = parser.parse_args(argv)

    from megatron_lite.data.format.indexed_dataset import IndexedDataset
    from megatron_lite.data.preparation.packed_dataset import pack_dataset

    began = time.monotonic()
    data = IndexedDataset(options.prefix)
    tokenizer = _about_tokenizer(options)
    with TokenProgress("pack", data.num_tokens) as progress:
        made = pack_dataset(
            data,
            options.packed_prefix,
            options.seq_length,
            tokenizer,
            seed=options.seed,
            overwrite=options.overwrite,
            advance=progress.advance,
        )
    if made is None:
        print("Already complete: the same command made it.")
    else:
        print("\n".join(_summary(made, options.seq_length, time.monotonic() - began)))
    print(f"  --data-path {options.packed_prefix} --seq-length {options.seq_length} --eod-mask-loss")
    return 0


def _about_tokenizer(options: argparse.Namespace) -> dict[str, Any]:
    """The tokenizer for the manifest: the given one, which must be the dataset's, else what its manifest says."""
    from megatron_lite.data.format.manifest import check_manifest

    prefix, tokenizer = options.prefix, given_tokenizer(options)
    manifest = check_manifest(prefix, tokenizer.fingerprint() if tokenizer else "")
    if tokenizer is not None:
        return {
            "type": tokenizer_config(options).type,
            "fingerprint": tokenizer.fingerprint(),
            "vocab_size": tokenizer.vocab_size,
            "eod": tokenizer.eod,
        }
    if manifest is None:
        raise DataError(
            "Packing needs the end-of-document token",
            found=f"{prefix} has no manifest that names it",
            fix="Give the tokenizer, for example --vocab-file and --merge-file",
        )
    if manifest.tokenizer.get("eod") is None:
        raise DataError(
            "Documents that are packed end with the end-of-document token",
            found=f"{prefix} was made without --append-eod",
            fix="Preprocess again with --append-eod",
        )
    return manifest.tokenizer


def _summary(made: Packed, seq_length: int, seconds: float) -> list[str]:
    """The result in a few lines of at most 80 columns."""
    written = made.bins * seq_length
    lines = [
        ("documents", f"{made.documents:,}, {made.tokens:,} tokens, in {seconds:.1f} s"),
        ("sequences", f"{made.bins:,} of {seq_length:,} tokens"),
        ("padding", f"{made.padding:,} tokens: {made.tokens / written:.3%} of every sequence is text"),
        (
            "cut",
            f"{made.cut:,} documents ({made.cut / made.documents:.1%}); unpacked, about "
            f"{made.cut_unpacked:,.0f} ({made.cut_unpacked / made.documents:.1%})",
        ),
    ]
    if made.open_ends:
        share = made.open_ends / written
        lines.append(("last label", f"of {made.open_ends:,} sequences, {share:.3%} of all, is another document's"))
    if made.unmarked:
        lines.append(("warning", f"{made.unmarked:,} documents do not end with the end-of-document token"))
    return [f"  {name:<10} {text}" for name, text in lines]
