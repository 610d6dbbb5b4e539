"""CLI command `data pack`: packs whole documents into sequences of exactly --seq-length tokens."""

from __future__ import annotations

import argparse
import time
from typing import TYPE_CHECKING, Any

from megatron_lite.cli.parser import Parser, seed, whole
from megatron_lite.cli.progress import TokenProgress
from megatron_lite.cli.tokenizer_arguments import add_tokenizer_arguments, given_tokenizer, tokenizer_config
from megatron_lite.errors import DataError

if TYPE_CHECKING:
    from megatron_lite.data.preparation.packed_dataset import Packed


def pack(argv: list[str]) -> int:
    """Pack a dataset, and print statistics of the result."""
    parser = Parser(
        prog="megatron-lite data pack",
        description="Pack whole documents into sequences of exactly --seq-length tokens, so that training cuts only "
        "longer documents. Sequences are padded with the end-of-document token: train with --eod-mask-loss, which "
        "removes the padding from the loss, and with the same --seq-length.",
    )
    parser.add_argument("prefix", help="common path of the .bin and .idx")
    parser.add_argument("packed_prefix", help="common path of the files to write")
    parser.add_argument(
        "--seq-length", type=whole(1, 1_000_000_000), required=True, metavar="N", help="the run's --seq-length"
    )
    parser.add_argument("--seed", type=seed, default=1234, help="seed of the order of sequences (1234)")
    parser.add_argument("--overwrite", action="store_true", help="replace a dataset that another command made")
    add_tokenizer_arguments(parser)
    options = parser.parse_args(argv)

    from megatron_lite.data.format.indexed_dataset import IndexedDataset
    from megatron_lite.data.format.loss_mask import has_mask
    from megatron_lite.data.preparation.packed_dataset import pack_dataset

    started = time.monotonic()
    data = IndexedDataset(options.prefix)
    tokenizer = _tokenizer_entry(options)
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
    masked = has_mask(options.packed_prefix)
    if made is None:
        print("Already complete: the same command has made it.")
    else:
        print(
            "\n".join(
                _summary(made, options.seq_length, time.monotonic() - started, "answers" if masked else "documents")
            )
        )
    loss = "--answer-loss" if masked else "--eod-mask-loss"
    print(f"  --data-path {options.packed_prefix} --seq-length {options.seq_length} {loss}")
    return 0


def _tokenizer_entry(options: argparse.Namespace) -> dict[str, Any]:
    """Return the manifest's tokenizer entry: of the given tokenizer, or else from the manifest of the dataset."""
    from megatron_lite.data.format.manifest import check_manifest

    prefix, tokenizer = options.prefix, given_tokenizer(options)
    manifest = check_manifest(prefix, tokenizer.fingerprint() if tokenizer else "")
    if tokenizer is not None:
        return {
            "type": tokenizer_config(options).type,
            "fingerprint": tokenizer.fingerprint(),
            "vocab_size": tokenizer.vocab_size,
            "eod": tokenizer.eod,
            **{
                name: value
                for name, value in (manifest.tokenizer if manifest else {}).items()
                if name == "control_code"
            },
        }
    if manifest is None:
        raise DataError(
            f"The end-of-document token of the dataset {prefix} is unknown: it has no manifest, and no tokenizer is "
            "given",
            fix="Give the tokenizer with which the dataset was made: --tokenizer-model PATH, or --vocab-file and "
            "--merge-file",
        )
    if manifest.tokenizer.get("eod") is None:
        raise DataError(
            f"Cannot pack the dataset {prefix}: it was made without --append-eod, so its documents do not end with an "
            "end-of-document token",
            fix="Preprocess the corpus again with --append-eod",
        )
    return manifest.tokenizer


def _summary(made: Packed, seq_length: int, seconds: float, kind: str) -> list[str]:
    """Return the statistics as lines of at most 80 columns."""
    written = made.bins * seq_length
    lines = [
        ("documents", f"{made.documents:,}, {made.tokens:,} tokens, in {seconds:.1f} s"),
        ("sequences", f"{made.bins:,} of {seq_length:,} tokens"),
        ("padding", f"{made.padding:,} tokens: {made.tokens / written:.3%} of every sequence is text"),
        (
            "cut",
            f"{made.cut:,} {kind} ({made.cut / made.documents:.1%}); unpacked, about "
            f"{made.cut_unpacked:,.0f} ({made.cut_unpacked / made.documents:.1%})",
        ),
    ]
    if made.open_ends:
        share = made.open_ends / written
        lines.append(("last label", f"in {made.open_ends:,} sequences ({share:.3%} of labels) from another document"))
    if made.unmarked:
        lines.append(("warning", f"{made.unmarked:,} documents do not end with the end-of-document token"))
    return [f"  {name:<10} {text}" for name, text in lines]
