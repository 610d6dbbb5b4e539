"""evaluations.jsonl file format: results of `megatron-lite evaluate`, one line per checkpoint, task and settings."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from megatron_lite.errors import DataError
from megatron_lite.runs.manifest import MANIFEST_NAME
from megatron_lite.runs.metrics_file import encode, read_records

EVALUATIONS_NAME = "evaluations.jsonl"
_MAIN = {
    "dataset": "loss",
    "documents": "bits_per_byte",
    "enwik8": "bits_per_character",
    "lambada": "accuracy",
    "ptb": "word_perplexity",
    "text": "perplexity",
    "text8": "bits_per_character",
    "wikitext": "word_perplexity",
}


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """Result of one task on one checkpoint.

    Attributes:
        task: kind of corpus (text, dataset, wikitext, …), or name of a task of lm-evaluation-harness.
        name: file as given, or name of the task.
        settings: everything else that determines the metrics, such as the windows and the fingerprint of the text.
        metrics: values by name. The standard error of a metric is named with the suffix _stderr.
        parts: metrics of subsets or subtasks by name.
        iteration: of the checkpoint.
        checkpoint: identity of the checkpoint, see checkpoint_identity.
    """

    task: str
    name: str
    settings: Mapping[str, Any]
    metrics: Mapping[str, float]
    parts: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    iteration: int = 0
    checkpoint: str = ""

    @property
    def key(self) -> tuple[str, str, str]:
        """Return what identifies the evaluation: checkpoint, task and settings."""
        return self.checkpoint, *job_key(self.task, self.settings)

    @property
    def main_metric(self) -> str:
        """Return the name of the metric that represents the task: the published one, or the first."""
        name = _MAIN.get(self.task, "")
        return name if name in self.metrics else next(iter(self.metrics), "")

    @property
    def title(self) -> str:
        """Return task, name and the settings that a reader needs, for tables."""
        name = self.name if self.name == self.task or self.task in ("text", "dataset") else f"{self.task} {self.name}"
        length, stride = self.settings.get("seq_length"), self.settings.get("stride")
        notes = [f"window {length}"] if length else []
        notes += [f"stride {stride}"] if stride not in (None, length) else []
        notes += [f"{shots}-shot"] if (shots := self.settings.get("num_fewshot")) else []
        notes += [self.settings["weights"]] if "weights" in self.settings else []
        notes += [f"limit {self.settings['limit']}"] if "limit" in self.settings else []
        notes += [self.settings["weights"]] if "weights" in self.settings else []
        return f"{name} ({', '.join(notes)})" if notes else name


def job_key(task: str, settings: Mapping[str, Any]) -> tuple[str, str]:
    """Return what identifies a task on any checkpoint."""
    return task, repr(sorted(settings.items()))


def checkpoint_identity(checkpoint: Path) -> str:
    """Return the hash of a checkpoint's manifest, which holds checksums of all of its files.

    A checkpoint of the same iteration that was saved again after a rollback has another one.
    """
    return hashlib.sha256((checkpoint / MANIFEST_NAME).read_bytes()).hexdigest()[:16]


def append_evaluations(folder: Path, evaluations: Sequence[Evaluation]) -> Path:
    """Append results to a run's evaluations.jsonl, after removing a last line that a kill left incomplete.

    Raises:
        OSError: no room, no permission; the complete lines of the file are unchanged.
    """
    path = folder / EVALUATIONS_NAME
    with path.open("a+b", buffering=0) as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(0)
        content = file.read(size)
        if (end := content.rfind(b"\n") + 1) < len(content):
            file.truncate(end)
        for one in evaluations:
            file.write(encode({"kind": "evaluation", **asdict(one)}))
    return path


def read_evaluations(folder: Path) -> list[Evaluation]:
    """Return the results recorded in a folder, the latest of each key, in the order of iterations; [] without a file.

    Raises:
        DataError: the file is damaged.
    """
    path = folder / EVALUATIONS_NAME
    if not path.exists():
        return []
    names = {entry.name for entry in fields(Evaluation)}
    found: dict[tuple[str, str, str], Evaluation] = {}
    try:
        records = read_records(path)
    except DataError as error:
        raise DataError(
            f"Cannot read the recorded evaluations: {error.problem}",
            fix=f"Delete that line of {path}, or move the file away to evaluate again",
        ) from error
    for record in records:
        if record["kind"] == "evaluation" and names <= record.keys():
            one = Evaluation(**{name: record[name] for name in names})
            found[one.key] = one
    return sorted(found.values(), key=lambda one: one.iteration)
