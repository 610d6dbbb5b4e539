"""Preprocessing options: inputs, output, tokenizer, filters, workers, and their validation."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from megatron_lite.config.tokenizer import TokenizerConfig
from megatron_lite.errors import ConfigError

MIN_UNIT = 2 << 20
MAX_UNIT = 256 << 20
MAX_LINE = 256 << 20
"""Default maximum of bytes of a line: a document takes 7 to 13 times the size of its line in memory."""
PlainText = Literal["file", "line"]
"""Form of the documents of plain text files: each file, or each line of a file."""

UNITS = 256
"""Number of units that the input is divided into, within the bounds MIN_UNIT and MAX_UNIT of a unit's bytes."""


@dataclass(frozen=True, kw_only=True)
class PreprocessOptions:
    """Options of one preprocessing run."""

    inputs: tuple[str, ...]
    """Paths and globs, read in this order: JSON lines (plain, gzip, bz2, xz, zstd), Parquet, folders and archives of
    .txt files."""
    output_prefix: str
    """Files are `{output_prefix}_{key}_{document|sentence}.bin`, `.idx` and `.manifest.json`."""
    tokenizer: TokenizerConfig
    json_keys: tuple[str, ...] = ("text",)
    plain_text: PlainText | None = None
    """Form of the documents of files that are plain text instead of JSON lines."""
    append_eod: bool = False
    prepend_eod: bool = False
    prepend_bos: bool = False
    empty_documents: Literal["skip", "keep"] = "skip"
    """Documents without tokens: skip (Megatron-DeepSpeed), or keep as a document without sequences (Megatron-LM)."""
    split_sentences: bool = False
    keep_newlines: bool = False
    language: str = "english"
    skip_bad_lines: bool = False
    min_tokens: int = 0
    join_short: bool = False
    """Join documents below `min_tokens` with those after them instead of dropping them."""
    max_tokens: int | None = None
    min_chars: int = 0
    sample: float | None = None
    """Share of the documents to keep, drawn at random."""
    shuffle: bool = False
    """Write the documents in random order."""
    seed: int = 1234
    workers: int = 1
    overwrite: bool = False
    unit_bytes: int | None = None
    """Bytes of input of one unit; None: a 256th of the input, between 2 and 256 MiB."""
    max_line_bytes: int = MAX_LINE
    """Maximum length of a line; a longer one is a bad line."""
    limit_bytes: int | None = None
    """Bytes of input to read (for the benchmark of worker counts); None: all."""

    def __post_init__(self) -> None:
        rules = (
            (self.workers >= 1, "--workers", self.workers, "a number of at least 1"),
            (
                self.sample is None or 0 < self.sample <= 1,
                "--sample-documents",
                self.sample,
                "a number above 0 and at most 1",
            ),
            (self.min_tokens >= 0, "--min-tokens", self.min_tokens, "a number of at least 0"),
            (self.min_chars >= 0, "--min-chars", self.min_chars, "a number of at least 0"),
            (
                self.max_tokens is None or self.max_tokens >= max(1, self.min_tokens),
                "--max-tokens",
                self.max_tokens,
                f"a number of at least {max(1, self.min_tokens)}" + (" (--min-tokens)" if self.min_tokens > 1 else ""),
            ),
            (
                len(set(self.json_keys)) == len(self.json_keys) > 0,
                "--json-keys",
                self.json_keys,
                "one or more names, each once",
            ),
            (self.max_line_bytes >= 1, "--max-line-mb", self.max_line_bytes >> 20, "a number of at least 1"),
            (
                self.unit_bytes is None or self.unit_bytes >= 1,
                "--unit-bytes",
                self.unit_bytes,
                "a number of at least 1",
            ),
            (self.seed >= 0, "--seed", self.seed, "a number of at least 0"),
        )
        for holds, flag, value, rule in rules:
            if not holds:
                given = " ".join(value) if isinstance(value, (list, tuple)) else value
                raise ConfigError(f"{flag} {given} is invalid", fix=f"Give {flag} {rule}")
        self._check_combinations()

    def _check_combinations(self) -> None:
        if self.prepend_eod and self.prepend_bos:
            raise ConfigError(
                "--prepend-eod and --prepend-bos both choose the token that begins every document",
                fix="Remove one of them",
            )
        if self.join_short and not self.min_tokens:
            raise ConfigError("--join-short has no length below which documents are joined", fix="Add --min-tokens N")
        if self.join_short and len(self.json_keys) > 1:
            raise ConfigError(
                f"--join-short joins documents of one key; --json-keys {' '.join(self.json_keys)} has "
                f"{len(self.json_keys)}",
                fix="Preprocess each key in a command of its own",
            )

    def prefix(self, key: str) -> str:
        """Return the path of the dataset of one key."""
        return f"{self.output_prefix}_{key}_{'sentence' if self.split_sentences else 'document'}"

    def identity(self) -> dict[str, Any]:
        """Return the options that determine the bytes of the output, in addition to input and tokenizer.

        The number of workers has no influence. `skip_bad_lines` and `max_line_bytes` are left out so that a run which
        stopped at a bad line can be continued with other values: its finished units have no bad lines.
        """
        added = {"plain_text": self.plain_text, "prepend_eod": self.prepend_eod, "join_short": self.join_short}
        # Options of later versions are left out unless they are given: the plans of older datasets stay the same.
        return {name: value for name, value in added.items() if value} | {
            "json_keys": list(self.json_keys),
            "append_eod": self.append_eod,
            "prepend_bos": self.prepend_bos,
            "empty_documents": self.empty_documents,
            "split_sentences": self.split_sentences,
            "keep_newlines": self.keep_newlines,
            "language": self.language if self.split_sentences else None,
            "min_tokens": self.min_tokens,
            "max_tokens": self.max_tokens,
            "min_chars": self.min_chars,
            "sample": self.sample,
            "shuffle": self.shuffle,
            "seed": self.seed if self.shuffle or self.sample is not None else None,
            "unit_bytes": self.unit_bytes,
            "limit_bytes": self.limit_bytes,
            "max_line_bytes": self.max_line_bytes if self.skip_bad_lines and self.max_line_bytes != MAX_LINE else None,
        }
