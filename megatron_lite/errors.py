"""User-facing exceptions: each message states the problem with its values, the rule and a fix."""

from __future__ import annotations

from collections.abc import Sequence


class MegatronLiteError(Exception):
    """Base of every error that is the user's to fix; the command line prints it without a traceback.

    Args:
        problem: what happened, with the values, flags and files concerned; a sentence without a full stop.
        fix: what to do about it: the flag, file or command to change.
        rule: what must hold, where the problem does not imply it; a sentence without a full stop.

    Attributes:
        shared: whether all ranks of the job raise it, so that it is printed once.
        silent: whether this rank leaves it to another one to print it.
    """

    shared = False
    silent = False

    def __init__(self, problem: str, *, fix: str, rule: str = "", found: str = "") -> None:
        if found:
            problem = f"{problem}:{found}" if found.startswith("\n") else f"{problem}: {found}"
        self.problem = problem
        self.rule = rule
        self.fix = fix
        # A problem may end with a list that has lines of its own.
        super().__init__(f"{self.description}{'' if self.description.endswith(chr(10)) else '. '}{fix}")

    @property
    def description(self) -> str:
        """The message without the fix."""
        return f"{self.problem}. {self.rule}" if self.rule else self.problem


class ConfigError(MegatronLiteError):
    """The command line, a DeepSpeed JSON or an environment variable asks for something impossible."""


class ConfigErrors(ConfigError):
    """Several ConfigErrors at once, so that a three-day queue is not spent finding them one by one."""

    def __init__(self, errors: Sequence[ConfigError]) -> None:
        self.errors = tuple(errors)
        super().__init__(
            f"{len(self.errors)} errors:\n"
            + "\n".join(f"  {number}. {error}" for number, error in enumerate(self.errors, 1)),
            fix="Change the flags named above",
        )

    def __str__(self) -> str:
        return self.problem


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
