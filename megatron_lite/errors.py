"""User-facing exceptions: each message states the rule, the values found and a fix."""

from __future__ import annotations

from collections.abc import Sequence


class MegatronLiteError(Exception):
    """Base of every error that is the user's to fix; the command line prints it without a traceback.

    Args:
        rule: what must hold, as a sentence without a full stop.
        found: the values that break it, both sides of the comparison, with the names they came under.
        fix: what to do about it: the flag, file or command to change.

    Attributes:
        shared: whether all ranks of the job raise it, so that it is printed once.
        silent: whether this rank leaves it to another one to print it.
    """

    shared = False
    silent = False

    def __init__(self, rule: str, *, found: str, fix: str) -> None:
        self.rule = rule
        self.found = found
        self.fix = fix
        # What was found may be a list with lines of its own.
        before, after = "" if found.startswith("\n") else " ", "" if found.endswith("\n") else ". "
        super().__init__(f"{rule}:{before}{found}{after}{fix}")


class ConfigError(MegatronLiteError):
    """The command line, a DeepSpeed JSON or an environment variable asks for something impossible."""


class ConfigErrors(ConfigError):
    """Several ConfigErrors at once, so that a three-day queue is not spent finding them one by one."""

    def __init__(self, errors: Sequence[ConfigError]) -> None:
        self.errors = tuple(errors)
        super().__init__(
            f"{len(self.errors)} rules are broken",
            found="\n".join(f"  {number}. {error}" for number, error in enumerate(self.errors, 1)),
            fix="Change the flags named above",
        )

    def __str__(self) -> str:
        return f"{self.rule}:\n{self.found}"


class FailedRank(Exception):
    """The cause of an error that several ranks raise: the rank on which it occurred first."""

    def __init__(self, host: str, rank: int) -> None:
        self.host = host
        self.rank = rank
        super().__init__(f"{host}, rank {rank}")


def failed_rank(error: BaseException | None) -> FailedRank | None:
    """Return the rank on which an error occurred first, by its chain of causes; None: this rank."""
    while error is not None and not isinstance(error, FailedRank):
        error = error.__cause__
    return error


class RankDifferenceError(ConfigError):
    """Ranks of one job differ in what all must have in common: configuration, code, files, environment."""


class DataError(MegatronLiteError):
    """A dataset, a tokenizer's file or a corpus is missing, damaged or does not belong to the run."""


class CheckpointError(MegatronLiteError):
    """A checkpoint is missing, incomplete, damaged or does not belong to the run."""


class TrainingError(MegatronLiteError):
    """Training cannot go on: a loss or gradient that is not finite, a failed rank, a full disk."""


def install_extra(name: str) -> str:
    """How to install an extra of setup.py, as the fix of an error."""
    return f"Install the extra {name}: pip install -e '.[{name}]' in the folder of the clone"
