"""Results of a generation as JSON lines, in the order of the prompts; an interrupted file can be continued."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, Any

from megatron_lite.errors import DataError
from megatron_lite.generation.prompts import Prompt
from megatron_lite.generation.requests import Generated
from megatron_lite.system_errors import reason, remedy

_COMPARED = ("id", "sample", "prompt", "settings", "checkpoint")


@dataclass(frozen=True)
class Result:
    """One text of a prompt.

    Attributes:
        sample: number of the text among those of the prompt, from 0.
        seed: of its random generator.
        text: continuation, without the prompt.
        generated: its tokens.
    """

    sample: int
    seed: int
    text: str
    generated: Generated


class ResultFile:
    """Output file of JSON lines: all texts of a prompt are written at once, in the order of the prompts.

    Args:
        path: the file; "-": standard output.
        prompts: all prompts.
        checkpoint: of the model, stored in each line.
        resume: continue the file, of which complete prompts are kept; otherwise it must not exist.
        log_probs: write the tokens and their log-probabilities.

    Attributes:
        done: prompts whose texts the file contains.

    Raises:
        DataError: the file exists, holds the texts of other prompts, settings or models, or cannot be written.
    """

    def __init__(
        self, path: str, prompts: Sequence[Prompt], checkpoint: Path, *, resume: bool = False, log_probs: bool = False
    ) -> None:
        self._path = path
        self._prompts = prompts
        self._checkpoint = checkpoint.name
        self._log_probs = log_probs
        self._file: IO[str] = sys.stdout
        self.done = 0
        if path == "-":
            return
        refuse_existing(path, resume)
        try:
            end = self._complete() if resume and Path(path).exists() else 0
            self._file = Path(path).open("a", encoding="utf-8")  # noqa: SIM115  (closed by close)
            os.truncate(path, end)
        except OSError as error:
            raise self._unwritable(error) from error

    def close(self) -> None:
        """Close the file."""
        if self._path != "-":
            self._file.close()

    def add(self, results: Sequence[Result]) -> None:
        """Write the texts of the next prompt.

        Raises:
            DataError: the file cannot be written.
            BrokenPipeError: nobody reads standard output any more.
        """
        prompt = self._prompts[self.done]
        lines = [json.dumps(self._record(prompt, result), ensure_ascii=False) for result in results]
        try:
            self._file.write("".join(f"{line}\n" for line in lines))
            self._file.flush()
        except BrokenPipeError:
            raise
        except OSError as error:
            raise self._unwritable(error) from error
        self.done += 1

    def _record(self, prompt: Prompt, result: Result) -> dict[str, Any]:
        generated = result.generated
        record = {
            **self._origin(prompt, result.sample),
            "seed": result.seed,
            "text": result.text,
            "finish_reason": generated.reason,
            "num_tokens": len(generated.tokens),
            "log_prob": _rounded(generated.log_prob),
        }
        if self._log_probs:
            record |= {"tokens": generated.tokens, "log_probs": [_rounded(one) for one in generated.log_probs]}
        return record if prompt.meta is None else record | {"meta": prompt.meta}

    def _origin(self, prompt: Prompt, sample: int) -> dict[str, Any]:
        """Return the keys by which a line is recognized when a file is continued."""
        settings = asdict(prompt.settings)
        settings = {**settings.pop("sampling"), **settings, "stop": list(prompt.settings.stop)}
        if not prompt.settings.best_of:
            del settings["best_of"]
        return {
            "id": prompt.id,
            "sample": sample,
            "prompt": prompt.text,
            "settings": settings,
            "checkpoint": self._checkpoint,
        }

    def _complete(self) -> int:
        """Count the prompts whose texts the file contains; return the bytes up to their end.

        Raises:
            DataError: a line has another origin than the prompts and settings of now.
            OSError: the file cannot be read.
        """
        content = Path(self._path).read_bytes()
        lines = content.split(b"\n")[:-1]
        size = end = 0
        expected = self._expected()
        for number, line in enumerate(lines, 1):
            wanted, last = next(expected, ({}, False))
            try:
                found = json.loads(line)
                found = {name: found[name] for name in _COMPARED}
            except (ValueError, KeyError, TypeError):
                found = {}
            if not wanted or found != wanted:
                different = ", ".join(name for name in _COMPARED if found.get(name) != wanted.get(name))
                raise DataError(
                    f"Line {number} of {self._path} does not belong to the prompts, settings and checkpoint of this "
                    f"command: different {different}",
                    fix="Give the flags with which the file was begun, or another --output",
                )
            size += len(line) + 1
            if last:
                self.done, end = self.done + 1, size
        return end

    def _expected(self) -> Iterator[tuple[Mapping[str, Any], bool]]:
        """Yield the origin of every line, and whether it is the last of its prompt."""
        for prompt in self._prompts:
            for sample in range(prompt.settings.num_samples):
                yield self._origin(prompt, sample), sample == prompt.settings.num_samples - 1

    def _unwritable(self, error: OSError) -> DataError:
        return DataError(
            f"Cannot write --output {self._path}: {reason(error)}",
            fix=remedy(error, self._path, instead="give another --output", writing=True),
        )


def _rounded(log_prob: float) -> float:
    """Round a log-probability to the digits that do not depend on the batch in which a text was generated."""
    return round(log_prob, 6) + 0.0  # 0.0, not -0.0


def refuse_existing(path: str, resume: bool) -> None:
    """Refuse an --output that exists, unless it is continued.

    Raises:
        DataError: see above.
    """
    if path != "-" and not resume and Path(path).exists():
        raise DataError(
            f"--output {path} exists already",
            fix="Add --resume to continue the file, or give another --output",
        )
