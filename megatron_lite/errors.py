"""User-facing exceptions: each message states the problem with its values, the rule and a fix."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path


class MegatronLiteError(Exception):
    """Base class of errors that the user can fix; the command line prints them without traceback.

    Args:
        problem: what happened, with the values, flags and files concerned; a sentence without a full stop.
        fix: what to do about it: the flag, file or command to change.
        rule: what must hold, where the problem does not imply it; a sentence without a full stop.

    Attributes:
        shared: True if all ranks of the job raise the error, so that it is printed once.
        silent: True if another rank prints the error.
    """

    shared = False
    silent = False

    def __init__(self, problem: str, *, fix: str, rule: str = "") -> None:
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
    """Invalid command line, DeepSpeed JSON or environment variable."""


class ConfigErrors(ConfigError):
    """All ConfigErrors of a command line, reported together."""

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
    """Cause of an error that several ranks raise: the rank on which it occurred first."""

    def __init__(self, host: str, rank: int) -> None:
        self.host = host
        self.rank = rank
        super().__init__(f"{host}, rank {rank}")


def failed_rank(error: BaseException | None) -> FailedRank | None:
    """Return the rank on which an error occurred first, from its chain of causes; None: this rank."""
    while error is not None and not isinstance(error, FailedRank):
        error = error.__cause__
    return error


class RankDifferenceError(ConfigError):
    """Ranks of a job differ in configuration, code, files or environment."""


class DataError(MegatronLiteError):
    """Missing, damaged or mismatched dataset, tokenizer file or corpus."""


class CheckpointError(MegatronLiteError):
    """Missing, incomplete, damaged or mismatched checkpoint."""


class TrainingError(MegatronLiteError):
    """Failure during training: a non-finite loss or gradient, a failed rank, a full disk."""


class NotFiniteError(TrainingError):
    """NaN or infinity, computed by a trained model."""


def install_extra(name: str) -> str:
    """Return the instruction to install an extra of setup.py, for the fix of an error."""
    root = Path(__file__).resolve().parents[1]
    package = f"-e '{root}[{name}]'" if (root / "setup.py").is_file() else f"'megatron_lite[{name}]'"
    return f"Install it with `pip install {package}`"


def report_bug(left: str = "") -> str:
    """Return the instruction to report a fault of the program itself, for the fix of an error.

    Args:
        left: sentence about what the failure leaves on the disk, without a full stop.
    """
    report = "Report this to the developers of megatron_lite, with this message and the command line"
    return f"{report}. {left}" if left else report
