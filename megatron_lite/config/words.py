"""Command-line tokenizer: argument files, spellings, prefixes and `=`, matched to the flag table."""

from __future__ import annotations

import difflib
import shlex
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from megatron_lite.config.flags.flag import Flag
from megatron_lite.config.flags.refused import FAMILIES
from megatron_lite.config.flags.table import flags_by_spelling, spelling
from megatron_lite.config.given import Given
from megatron_lite.config.paths import suggest_path
from megatron_lite.config.presets import PRESETS, preset_words
from megatron_lite.config.text_file import TextFileError, read_failure, read_text
from megatron_lite.config.values import is_utf8, shown_bytes
from megatron_lite.errors import ConfigError

MAX_NESTING = 10
"""Argument files within argument files; more is a circle."""


@dataclass(frozen=True)
class Occurrence:
    """One flag of a command line.

    Attributes:
        flag: its row of the table.
        spelled: as written, for messages.
        words: what follows it.
        preset: the preset that stands for it; empty: it was written.
    """

    flag: Flag
    spelled: str
    words: tuple[str, ...]
    preset: str = ""

    @property
    def text(self) -> str:
        """As written, with its words."""
        return " ".join([self.spelled, *self.words])


def read_words(argv: Sequence[str], given: Given) -> list[Occurrence]:
    """Split a command line into flags, in order.

    Unknown and ambiguous flags are noted as errors in `given`, expanded prefixes as notes.

    Raises:
        ConfigError: a word is not UTF-8.
    """
    require_utf8(argv)
    occurrences: list[Occurrence] = []
    for spelled, words in _group(_expand(argv, given), given):
        flag = _find(spelled, words, given)
        if flag is None:
            continue
        occurrences.append(Occurrence(flag, spelled, words))
        if flag.field == "command.preset" and len(words) == 1:
            # First, so that what is written wins, wherever it stands.
            occurrences[:0] = _of_preset(spelled, words[0].lower(), given)
    return occurrences


def require_utf8(words: Iterable[str]) -> None:
    """Refuse words that no output could show and no tokenizer encode.

    Raises:
        ConfigError: one is not UTF-8.
    """
    for word in words:
        if not is_utf8(word):
            raise ConfigError("Arguments are UTF-8 text", found=shown_bytes(word), fix="Convert it, or rename the file")


def read_argument_file(word: str) -> str:
    """Return the content of an argument file @FILE.

    Raises:
        ConfigError: it cannot be read.
    """
    path = word[1:]
    try:
        return read_text(path)
    except (OSError, TextFileError) as error:
        fix = f"Make {path} readable text, or write the flags on the command line"
        if isinstance(error, FileNotFoundError):
            fix = suggest_path("@", path).replace("@ ", "@")
        raise ConfigError("An argument file must be readable", found=read_failure(word, error), fix=fix) from error


def _of_preset(spelled: str, name: str, given: Given) -> list[Occurrence]:
    """Return the flags that a preset stands for."""
    expanded = preset_words(name)
    if expanded is None:
        nearest = difflib.get_close_matches(name, PRESETS, n=1)
        given.refuse(
            "--preset takes the name of a preset",
            found=f"{spelled} {name}",
            fix=(f"Did you mean {nearest[0]}? " if nearest else "") + f"There are {', '.join(PRESETS)}",
        )
        given.unknown = True
        return []
    given.notes.append(f"--preset {name} stands for {' '.join(expanded)}")
    rows = flags_by_spelling()
    return [Occurrence(rows[spelling(flag)], flag, values, name) for flag, values in _group(expanded, given)]


def _expand(argv: Sequence[str], given: Given, nesting: int = 0) -> Iterator[str]:
    """Yield the words, those of argument files (@file) in their place. A file may have quotes and # comments."""
    for word in argv:
        if not word.startswith("@") or len(word) == 1:
            yield word
            continue
        try:
            words = shlex.split(read_argument_file(word), comments=True)
        except ConfigError as error:
            given.errors.append(error)
            continue
        except ValueError as error:  # of shlex
            given.refuse(
                "An argument file must be readable",
                found=f"{word}: {error}",
                fix=f"Close the quotes in {word[1:]}: it is split into words as a shell does",
            )
            continue
        if nesting == MAX_NESTING:
            given.refuse(
                "Argument files must not name each other in a circle",
                found=f"{word}, {nesting} files deep",
                fix="Remove the @ word that leads back",
            )
            return
        yield from _expand(words, given, nesting + 1)


def _group(words: Iterable[str], given: Given) -> list[tuple[str, tuple[str, ...]]]:
    """Flags as spelled, each with the words up to the next."""
    groups: list[tuple[str, list[str]]] = []
    for word in words:
        if word.startswith("--") and len(word) > 2:
            name, equals, value = word.partition("=")
            groups.append((name, [value] if equals else []))
        elif groups:
            groups[-1][1].append(word)
        else:
            given.refuse(
                "A command line starts with a flag", found=f"the word {word!r}", fix="Name the flag that it belongs to"
            )
    return [(name, tuple(following)) for name, following in groups]


def _find(spelled: str, words: tuple[str, ...], given: Given) -> Flag | None:
    """The row of a flag, by its name, an alias or a unique prefix; None, with an error noted, if there is none."""
    name, rows = spelling(spelled), flags_by_spelling()
    if name in rows:
        flag = rows[name]
        if name != spelling(flag.name):
            given.notes.append(f"{spelled} is read as {flag.name}")
        return flag
    for prefix, because in FAMILIES.items():
        if name.startswith(prefix):
            given.errors.append(refusal(because, " ".join([spelled, *words])))
            return None
    matches = {row.name: row for full, row in rows.items() if full.startswith(name)}
    if len(matches) == 1:
        ((full, flag),) = matches.items()
        given.notes.append(f"{spelled} is read as {full}, the only flag that starts so")
        return flag
    if matches:
        given.refuse(
            "A shortened flag must have one meaning",
            found=f"{spelled} could be {', '.join(sorted(matches))}",
            fix="Write the flag in full",
        )
        given.unknown = True
        return None
    nearest = difflib.get_close_matches(name, rows, n=1, cutoff=0.75)
    given.refuse(
        "Every flag must be known",
        found=spelled,
        fix=f"Did you mean {rows[nearest[0]].name}?" if nearest else "See --help and docs/arguments.md",
    )
    given.unknown = True
    return None


def refusal(because: str, text: str) -> ConfigError:
    """Return the error for a refused flag. Its row's text says why, and in the last sentence what to do."""
    rule, _, fix = because.rpartition(". ")
    return ConfigError(rule, found=text, fix=fix)
