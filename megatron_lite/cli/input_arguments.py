"""Input flags shared by preprocess and train-tokenizer."""

from __future__ import annotations

import argparse

INPUT_HELP = (
    "files, folders or globs: .jsonl, .parquet, compressed files (.gz, .bz2, .xz, .zst); of folders and tar archives, "
    "each .txt file is a document"
)


def add_plain_text_argument(group: argparse._ActionsContainer) -> None:
    """Add --plain-text."""
    group.add_argument(
        "--plain-text",
        choices=("file", "line"),
        help="input files are plain text, each file or each line a document (default: JSON lines)",
    )
