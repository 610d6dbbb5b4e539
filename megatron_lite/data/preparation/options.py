"""Options of a preprocessing run."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from megatron_lite.config.data import TokenizerConfig
from megatron_lite.errors import ConfigError

MIN_UNIT = 2 << 20
MAX_UNIT = 256 << 20
MAX_LINE = 256 << 20
"""Bytes of a line: a document takes 7 to 13 times its line in memory."""
UNITS = 256
"""A plain text file is read in units of a 256th of the input, within these bounds of bytes."""


@dataclass(frozen=True, kw_only=True)
class PreprocessOptions:
    """Input, output, and what happens in between. Sizes are in bytes, tokens or characters as their names say."""

    inputs: tuple[str, ...]
    """Paths and globs of JSON lines (plain, gzip, bz2, xz, zstd) and Parquet files, read in this order."""
    output_prefix: str
    """Files are `{output_prefix}_{key}_{document|sentence}.bin`, `.idx` and `.manifest.json`."""
    tokenizer: TokenizerConfig
    json_keys: tuple[str, ...] = ("text",)
    append_eod: bool = False
    prepend_bos: bool = False
    empty_documents: Literal["skip", "keep"] = "skip"
    """A document without tokens: skip (Megatron-DeepSpeed), or keep as a document of no sequence (Megatron-LM)."""
    split_sentences: bool = False
    keep_newlines: bool = False
    language: str = "english"
    skip_bad_lines: bool = False
    min_tokens: int = 0
    max_tokens: int | None = None
    min_chars: int = 0
    sample: float | None = None
    """Share of the documents to keep, drawn by `seed`."""
    shuffle: bool = False
    """Put documents in a random order, drawn by `seed`."""
    seed: int = 1234
    workers: int = 1
    overwrite: bool = False
    unit_bytes: int | None = None
    """Input that one shard holds; None: a 256th of the input, between 2 and 256 MiB."""
    max_line_bytes: int = MAX_LINE
    """A longer line is a bad one."""
    limit_bytes: int | None = None
    """Read no further than this into the input (trials of speed)."""

    def __post_init__(self) -> None:
        rules = (
            (self.workers >= 1, "--workers", self.workers, "at least 1"),
            (self.sample is None or 0 < self.sample <= 1, "--sample-documents", self.sample, "above 0, at most 1"),
            (self.min_tokens >= 0, "--min-tokens", self.min_tokens, "not negative"),
            (self.min_chars >= 0, "--min-chars", self.min_chars, "not negative"),
            (
                self.max_tokens is None or self.max_tokens >= max(1, self.min_tokens),
                "--max-tokens",
                self.max_tokens,
                "at least 1 and at least --min-tokens",
            ),
            (len(set(self.json_keys)) == len(self.json_keys) > 0, "--json-keys", self.json_keys, "names, each once"),
            (self.max_line_bytes >= 1, "--max-line-mb", self.max_line_bytes >> 20, "at least 1"),
            (self.unit_bytes is None or self.unit_bytes >= 1, "--unit-bytes", self.unit_bytes, "at least 1"),
            (self.seed >= 0, "--seed", self.seed, "not negative"),
        )
        for holds, flag, value, rule in rules:
            if not holds:
                raise ConfigError(f"{flag} is {rule}", found=f"{flag} is {value}", fix=f"Give a {flag} that is {rule}")

    def prefix(self, key: str) -> str:
        """Where the dataset of one key goes."""
        return f"{self.output_prefix}_{key}_{'sentence' if self.split_sentences else 'document'}"

    def identity(self) -> dict[str, Any]:
        """What the output's bytes depend on besides the input and the tokenizer.

        Not the number of workers, and not `skip_bad_lines`: what is already done had no bad line without it, so a
        run that met one may be continued with it, or with a larger `max_line_bytes`.
        """
        return {
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
