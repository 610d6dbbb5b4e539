"""lm-evaluation-harness tasks: loading without network, requests answered by a checkpoint, metrics.

lm_eval is imported where it is used: importing it takes seconds, and it is an extra.
"""

from __future__ import annotations

import difflib
import hashlib
import importlib.util
import io
import json
import logging
import random
from collections.abc import Callable, Mapping, Sequence
from contextlib import redirect_stdout
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from megatron_lite.errors import ConfigError, DataError, MegatronLiteError, install_extra
from megatron_lite.evaluation.jobs import Job, Measured, ScoreSpans, Windows
from megatron_lite.tokenizer.base import Tokenizer

BOOTSTRAP_ITERATIONS = 1000
"""Resamplings for the standard errors of metrics that have no formula, such as perplexity."""
SEED, OTHER_SEED = 0, 1234
"""lm-evaluation-harness's seeds of Python's generator, and of numpy, torch and few-shot samples."""
_LOCAL_FORMATS = ("json", "csv", "text", "parquet", "arrow", "pandas")


@dataclass(frozen=True)
class Generation:
    """Greedy decoding (temperature 0) or sampling of continuations, up to the first stop string."""

    seq_length: int
    max_new_tokens: int
    temperature: float
    top_k: int
    top_p: float
    stop: tuple[str, ...]


Generate = Callable[[Sequence[Sequence[int]], Generation], list[str]]
"""Continues prompts, given as token ids, and returns the new texts, cut at the first stop string."""


def require_lm_eval() -> None:
    """Raise an error if lm-evaluation-harness is not installed.

    Raises:
        ConfigError: it is not; the message names the extra.
    """
    if importlib.util.find_spec("lm_eval") is None:
        raise ConfigError(
            "--tasks needs lm-evaluation-harness (the Python package lm_eval), which is not installed",
            fix=install_extra("eval"),
        )


@dataclass(frozen=True)
class HarnessTask:
    """Task, or group of tasks, with its data.

    Attributes:
        name: as given.
        loaded: lm_eval's TaskDict.
        fingerprint: hash of the configurations and the numbers of samples.
    """

    name: str
    loaded: Any
    fingerprint: str


def load_tasks(
    names: Sequence[str], include_paths: Sequence[str], num_fewshot: int | None, notify: Callable[[str], None]
) -> list[HarnessTask]:
    """Return the tasks that names or patterns stand for, with their data, from this machine only.

    Args:
        names: tasks, groups or tags, or patterns such as `arc_*`.
        include_paths: folders with YAML files of further tasks.
        num_fewshot: examples in the prompt; None: as each task has it.
        notify: called with messages about tasks.

    Raises:
        ConfigError: a name is unknown, a folder is missing, or a task executes code or needs images.
        DataError: the data of a task are not on this machine.
    """
    require_lm_eval()
    for path in include_paths:
        if not Path(path).is_dir():
            raise ConfigError(
                f"--include-path {path} is not a folder",
                fix="Give the folder that holds the YAML files of the tasks",
            )
    logging.getLogger("lm_eval").setLevel(logging.ERROR)  # it repeats the settings of each task
    manager = _manager(names, include_paths)
    _require_known(names, manager)
    found: dict[str, HarnessTask] = {}
    for name in dict.fromkeys(match for given in names for match in _matches(given, manager)):
        loaded = _load(name, manager)
        for task_name, task in loaded["tasks"].items():
            _require_supported(task_name, task)
            _set_fewshot(task_name, task, num_fewshot, notify)
        # A tag stands for its tasks; a group has metrics of its own.
        for part in [loaded] if name in loaded["groups"] or name in loaded["tasks"] else _one_by_one(loaded):
            own = name if part is loaded else next(iter(part["tasks"]))
            found[own] = HarnessTask(own, part, _fingerprint(part))
    return list(found.values())


def harness_job(task: HarnessTask, generate: Generate, windows: Windows) -> Job:
    """Return the job of a task; `generate` continues prompts, which tasks of the kind generate_until need."""
    shots = {name: one.get_config("num_fewshot") for name, one in task.loaded["tasks"].items()}
    settings = windows.settings(fingerprint=task.fingerprint, num_fewshot=max(shots.values(), default=0))
    return Job(task.name, task.name, settings, partial(_measure, task, windows, generate))


def _measure(
    task: HarnessTask, windows: Windows, generate: Generate, tokenizer: Tokenizer, score: ScoreSpans
) -> Measured:
    from lm_eval.evaluator import evaluate

    from megatron_lite.evaluation.harness_model import HarnessModel

    random.seed(SEED)
    np.random.seed(OTHER_SEED)
    torch.manual_seed(OTHER_SEED)
    for one in task.loaded["tasks"].values():
        one.set_fewshot_seed(seed=OTHER_SEED)
    model = HarnessModel(tokenizer, windows, score, generate)
    try:
        with redirect_stdout(io.StringIO()):  # lm_eval announces its bootstrapping there
            results = evaluate(
                model, task.loaded, limit=windows.limit, bootstrap_iters=BOOTSTRAP_ITERATIONS, log_samples=False
            )
    except (MegatronLiteError, MemoryError, OSError, RuntimeError):  # of the model and its ranks
        raise
    except Exception as error:  # of templates, functions and metrics of the task
        raise DataError(
            f"lm-evaluation-harness failed in the task {task.name}: {type(error).__name__}: {error}",
            fix=f"Remove {task.name} from --tasks, or change its YAML file or data to match",
        ) from error
    found = {**results["results"], **results.get("groups", {})}
    samples = sum(count["effective"] for count in results["n-samples"].values())
    parts = {name: _metrics(values) for name, values in found.items() if name != task.name}
    return Measured({**_metrics(found.get(task.name, {})), "samples": samples}, parts)


def _metrics(values: Mapping[str, Any]) -> dict[str, float]:
    """Return lm_eval's metrics, named `acc,none` or `exact_match,strict-match`, by plain names."""
    found = {}
    for key, value in values.items():
        name, comma, of_filter = key.partition(",")
        if comma and isinstance(value, (int, float)):
            stem, error = (name.removesuffix("_stderr"), "_stderr") if name.endswith("_stderr") else (name, "")
            found[f"{stem}{'' if of_filter == 'none' else f' ({of_filter})'}{error}"] = float(value)
    return found


def _manager(names: Sequence[str], include_paths: Sequence[str]) -> Any:
    """Return lm_eval's TaskManager: of the folders alone if these have all tasks, since its own index is large."""
    from lm_eval.tasks import TaskManager

    if include_paths:
        own = TaskManager(include_path=list(include_paths), include_defaults=False)
        if all(name in own.task_index for name in names):
            return own
    return TaskManager(include_path=list(include_paths) or None)


def _matches(name: str, manager: Any) -> list[str]:
    return manager.match_tasks([name]) if "*" in name or "?" in name else [name]


def _require_known(names: Sequence[str], manager: Any) -> None:
    unknown = [name for name in names if not any(match in manager.task_index for match in _matches(name, manager))]
    if not unknown:
        return
    near = [match for name in unknown for match in difflib.get_close_matches(name, manager.all_tasks, n=2, cutoff=0.5)]
    nearest = f"Did you mean {', '.join(dict.fromkeys(near))}? " if near else ""
    raise ConfigError(
        f"lm-evaluation-harness has no task {', '.join(unknown)} (--tasks)",
        fix=f"{nearest}`lm_eval ls tasks` lists all names; a folder of own tasks is given with --include-path",
    )


def _load(name: str, manager: Any) -> Any:
    try:
        return manager.load([name])
    except OSError as error:
        raise _missing_data(name, manager, error) from error
    except Exception as error:  # of templates, functions and splits of the task
        raise DataError(
            f"Cannot load the task {name} (--tasks): {type(error).__name__}: {error}",
            fix=f"Change the task's file {manager.task_index[name].yaml_path}, or remove {name} from --tasks",
        ) from error


def _missing_data(name: str, manager: Any, error: Exception) -> DataError:
    entry = manager.task_index[name]
    config = entry.cfg or {}
    source, subset = config.get("dataset_path"), config.get("dataset_name")
    detail = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
    problem = f"Cannot load the data of the task {name} (--tasks): {detail.rstrip('.')}"
    if source in _LOCAL_FORMATS or (source and Path(source).exists()):
        return DataError(
            problem,
            fix=f"Put the files where dataset_kwargs of {entry.yaml_path} names them (relative to the current folder), "
            "or change the paths there",
        )
    arguments = ", ".join(repr(word) for word in (source, subset) if word) or "…"
    return DataError(
        problem,
        rule="Data are not downloaded while a checkpoint is evaluated",
        fix="On a machine with network access, run HF_HOME=hf python -c "
        f'"import datasets; datasets.load_dataset({arguments})", copy the folder hf, and set HF_HOME to it here; or '
        "give a YAML file of the task with local data_files by --include-path",
    )


def _require_supported(name: str, task: Any) -> None:
    if getattr(task, "UNSAFE_CODE", False):
        raise ConfigError(
            f"The task {name} executes code that the model writes, which megatron-lite does not do",
            fix=f"Remove {name} from --tasks, or export the checkpoint and run lm_eval on it",
        )
    if getattr(task, "MULTIMODAL", False):
        raise ConfigError(
            f"The task {name} has images or sound, which a text model cannot read", fix=f"Remove {name} from --tasks"
        )


def _set_fewshot(name: str, task: Any, num_fewshot: int | None, notify: Callable[[str], None]) -> None:
    """Set the number of examples as lm_eval's command does: a task that has 0 in its configuration keeps it."""
    configured = task.get_config("num_fewshot")
    if num_fewshot is None or (configured == 0 and num_fewshot):
        task.set_config(key="num_fewshot", value=configured or 0)
        if num_fewshot:
            notify(f"the task {name} is defined without examples: --num-fewshot {num_fewshot} does not apply to it")
    else:
        task.set_config(key="num_fewshot", value=num_fewshot)


def _one_by_one(loaded: Any) -> list[Any]:
    return [{"tasks": {name: task}, "groups": {}, "group_map": {}} for name, task in loaded["tasks"].items()]


def _fingerprint(loaded: Any) -> str:
    """Return a hash of the configurations of tasks and of their numbers of samples."""
    described = {
        name: [len(task.eval_docs), json.dumps(task.dump_config(), sort_keys=True, default=repr)]
        for name, task in sorted(loaded["tasks"].items())
    }
    return hashlib.sha256(json.dumps(described).encode()).hexdigest()[:16]
