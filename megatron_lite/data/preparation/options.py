"""Preprocessing options: inputs, output, tokenizer, filters, workers, and their validation."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from megatron_lite.config.tokenizer import TokenizerConfig
from megatron_lite.data.format.loss_mask import mask_prefix
from megatron_lite.errors import ConfigError

MIN_UNIT = 2 << 20
MAX_UNIT = 256 << 20
MAX_LINE = 256 << 20
"""Default maximum of bytes of a line: a document takes 7 to 13 times the size of its line in memory."""
PlainText = Literal["file", "line"]
"""Form of the documents of plain text files: each file, or each line of a file."""

_ANSWER_KEYS = {"prompt-completion": ("prompt", "completion"), "chat": ("messages",)}
"""JSON keys of prompts with answers, by --input-format."""
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
    input_format: Literal["text", "prompt-completion", "chat"] = "text"
    """Content of a line: texts, a prompt with its completion, or the messages of a chat."""
    chat_template: str = ""
    """Path of a Jinja template; empty: that of the tokenizer."""
    control_code: str = ""
    """Text before every document, in its own tokens."""
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
                problem = f"{flag} {given} is invalid" if given or given == 0 else f"{flag} has no value"
                raise ConfigError(problem, fix=f"Give {flag} {rule}")
        self._check_combinations()
        self._check_answers()

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

    def _check_answers(self) -> None:
        if self.chat_template and self.input_format != "chat":
            raise ConfigError(
                f"--chat-template {self.chat_template} has no effect without --input-format chat",
                fix="Add --input-format chat, or remove --chat-template",
            )
        if not self.has_answers:
            return
        expected = _ANSWER_KEYS[self.input_format]
        if len(self.keys) != len(expected):
            raise ConfigError(
                f"--json-keys {' '.join(self.keys)} names {len(self.keys)} keys, and --input-format "
                f"{self.input_format} reads {len(expected)}",
                fix=f"Give --json-keys the names of {' and '.join(expected)}, or leave it out",
            )
        others = {
            "--split-sentences": self.split_sentences,
            "--join-short": self.join_short,
            f"--plain-text {self.plain_text}": self.plain_text,
        }
        for flag in [flag for flag, given in others.items() if given]:
            raise ConfigError(
                f"{flag} cannot be combined with --input-format {self.input_format}",
                rule="A document is a prompt with its answer",
                fix=f"Remove {flag}",
            )

    @property
    def joins_without_separator(self) -> bool:
        """True if --join-short joins documents that no token or control code begins or ends."""
        return self.join_short and not (self.append_eod or self.prepend_eod or self.prepend_bos or self.control_code)

    @property
    def has_answers(self) -> bool:
        """True if documents are prompts with answers, whose loss mask is written."""
        return self.input_format != "text"

    @property
    def keys(self) -> tuple[str, ...]:
        """JSON keys that are read: --json-keys, or those of prompts and completions, or of messages."""
        if self.json_keys != ("text",):
            return self.json_keys
        return _ANSWER_KEYS.get(self.input_format, self.json_keys)

    @property
    def prefixes(self) -> tuple[str, ...]:
        """Paths of the datasets: one for each JSON key; of prompts with answers, one and its loss mask."""
        unit = "sentence" if self.split_sentences else "document"
        if not self.has_answers:
            return tuple(f"{self.output_prefix}_{key}_{unit}" for key in self.keys)
        prefix = f"{self.output_prefix}_{self.keys[-1]}_{unit}"
        return prefix, mask_prefix(prefix)

    @property
    def data_prefixes(self) -> tuple[str, ...]:
        """Paths of the datasets without loss masks."""
        return self.prefixes[:1] if self.has_answers else self.prefixes

    def identity(self) -> dict[str, Any]:
        """Return the options that determine the bytes of the output, in addition to input and tokenizer.

        The number of workers has no influence. `skip_bad_lines` and `max_line_bytes` are left out so that a run which
        stopped at a bad line can be continued with other values: its finished units have no bad lines.
        """
        added: dict[str, Any] = {
            "plain_text": self.plain_text,
            "prepend_eod": self.prepend_eod,
            "join_short": self.join_short,
            "input_format": self.input_format if self.has_answers else "",
            "control_code": self.control_code,
        }
        # Options of later versions are left out unless they are given: the plans of older datasets stay the same.
        return {name: value for name, value in added.items() if value} | {
            "json_keys": list(self.keys),
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
