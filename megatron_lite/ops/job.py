"""Slurm batch script: requested resources (#SBATCH lines) and the training command that the script starts."""

from __future__ import annotations

import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from megatron_lite.config.launcher import TrainingCommand, read_command
from megatron_lite.errors import ConfigError
from megatron_lite.ops.shell.evaluate import evaluate_script
from megatron_lite.ops.shell.state import Evaluation
from megatron_lite.ops.shell.text import unknown_sources

SHORT_OPTIONS = {
    **{"A": "account", "a": "array", "c": "cpus-per-task", "C": "constraint", "d": "dependency", "D": "chdir"},
    **{"e": "error", "G": "gpus", "J": "job-name", "n": "ntasks", "N": "nodes", "o": "output", "p": "partition"},
    **{"q": "qos", "t": "time", "w": "nodelist", "x": "exclude"},
}
UNLIMITED = ("UNLIMITED", "INFINITE", "0")


@dataclass(frozen=True)
class Resources:
    """Options of one component of a job, by long name, as sbatch reads them."""

    options: Mapping[str, str] = field(default_factory=dict)

    @property
    def nodes(self) -> int:
        """Number of nodes; of a range, the smallest."""
        given = self.options.get("nodes")
        if given is None:
            tasks, per_node = self._number("ntasks"), self._number("ntasks-per-node")
            return -(-tasks // per_node) if tasks and per_node else 1
        return _integer("--nodes", given.split("-")[0])

    @property
    def tasks_per_node(self) -> int:
        """Number of tasks that srun starts on a node."""
        if per_node := self._number("ntasks-per-node"):
            return per_node
        if (per_gpu := self._number("ntasks-per-gpu")) and self.gpus_per_node:
            return per_gpu * self.gpus_per_node
        return -(-(self._number("ntasks") or 1) // self.nodes)

    @property
    def gpus_per_node(self) -> int | None:
        """Number of GPUs of a node; None if the script asks for none."""
        for name in ("gpus-per-node", "gres"):
            for part in self.options.get(name, "").split(","):
                pieces = part.split(":")
                if name == "gpus-per-node" and part:
                    return _integer("--gpus-per-node", pieces[-1])
                if pieces[0] in ("gpu", "gres/gpu"):
                    count = re.sub(r"\(.*", "", pieces[-1])
                    return int(count) if count.isdigit() else 1
        if total := self.options.get("gpus"):
            return -(-_integer("--gpus", total.split(":")[-1]) // self.nodes)
        if per_task := self.options.get("gpus-per-task"):
            tasks = self._number("ntasks-per-node") or -(-(self._number("ntasks") or 1) // self.nodes)
            return _integer("--gpus-per-task", per_task.split(":")[-1]) * tasks
        return None

    @property
    def time_limit(self) -> int | None:
        """Time limit in seconds; None: the partition's."""
        given = self.options.get("time")
        return None if given is None or given.upper() in UNLIMITED else parse_time(given)

    @property
    def signal(self) -> tuple[str, int] | None:
        """Name of the signal of --signal and the seconds before the time limit; None: none is asked for."""
        match = re.fullmatch(r"(?:[BR]+:)?(?:SIG)?(\w+)(?:@(\d+))?", self.options.get("signal", ""))
        return (match[1], int(match[2] or 60)) if match else None

    def _number(self, name: str) -> int | None:
        given = self.options.get(name)
        return None if given is None else _integer(f"--{name}", given)


@dataclass(frozen=True)
class Job:
    """A batch script, read without running it.

    Attributes:
        path: of the script.
        components: resources of the job; several of a heterogeneous job.
        evaluation: the commands of the script.
        command: the training command among them.
        folder: the current folder at the script's end, to which its relative paths refer.
    """

    path: Path
    components: tuple[Resources, ...]
    evaluation: Evaluation
    command: TrainingCommand
    folder: Path

    @property
    def resources(self) -> Resources:
        """Resources of the first component."""
        return self.components[0]

    @property
    def num_nodes(self) -> int:
        """Number of nodes of all components."""
        return sum(component.nodes for component in self.components)

    @property
    def num_gpus(self) -> int | None:
        """Number of GPUs of all components; None if none are asked for."""
        counts = [(component.gpus_per_node, component.nodes) for component in self.components]
        return sum(gpus * nodes for gpus, nodes in counts if gpus) or None

    @property
    def world_size(self) -> int | None:
        """Number of ranks: as the launcher says, else one for each task; None: --world-size is among the flags."""
        if self.command.world_size is not None or "--world-size" in self.command.flags:
            return self.command.world_size
        return sum(component.tasks_per_node * component.nodes for component in self.components)


def read_job(
    path: Path, *, environment: Mapping[str, str], options: Sequence[str] = (), arguments: Sequence[str] = ()
) -> Job:
    """Read a batch script.

    Args:
        path: of the script.
        environment: variables that the job inherits.
        options: options of sbatch given on the command line, which override those of the script.
        arguments: of the script.

    Raises:
        ConfigError: the script cannot be read, is no valid bash, has an option that cannot be understood, starts no
            training command, or one whose flags depend on values that only the job can have.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or "not UTF-8 text"
        raise ConfigError(
            f"Cannot read the job script {path}: {reason}", fix="Give the path of a batch script"
        ) from error
    components = read_resources(text, options)
    evaluation = evaluate_script(
        text, environment={**environment, **job_environment(components)}, arguments=arguments, name=str(path)
    )
    folder = Path(evaluation.folder)
    return Job(path, components, evaluation, _training_command(path, evaluation), folder)


def read_resources(text: str, options: Sequence[str] = ()) -> tuple[Resources, ...]:
    """Read the #SBATCH lines of a script, one Resources for each component of the job."""
    components: list[dict[str, str]] = [{}]
    for line in text.splitlines():
        if line.strip() and not line.startswith("#"):
            break
        if not line.startswith("#SBATCH"):
            continue
        words = shlex.split(line.removeprefix("#SBATCH"), comments=True)
        if words[:1] in (["hetjob"], ["packjob"]):
            components.append({})
        components[-1] |= _read_options(words)
    components[0] |= _read_options(options)
    return tuple(Resources(component) for component in components)


def _read_options(words: Sequence[str]) -> dict[str, str]:
    options: dict[str, str] = {}
    name = None
    for word in words:
        if word.startswith("--"):
            name, _, value = word[2:].partition("=")
            options[name] = value
        elif re.match(r"-[a-zA-Z]", word):
            name = SHORT_OPTIONS.get(word[1], word[1])
            options[name] = word[2:].removeprefix("=")
        elif name is not None and not options[name]:
            options[name] = word
    return options


def parse_time(text: str) -> int:
    """Return the seconds of a Slurm time: MIN, MIN:SEC, H:MIN:SEC, D-H, D-H:MIN or D-H:MIN:SEC.

    Raises:
        ConfigError: the text has none of these forms.
    """
    match = re.fullmatch(r"(?:(\d+)-)?(\d+)(?::(\d+))?(?::(\d+))?", text.strip())
    if match is None:
        raise ConfigError(
            f"--time {text} is no time limit", fix="Give for example 20:00:00 (hours, minutes, seconds) or 2-12"
        )
    days, *parts = match.groups()
    first, second, third = (int(part or 0) for part in parts)
    if days is not None:
        return ((int(days) * 24 + first) * 60 + second) * 60 + third
    if parts[2] is not None:
        return (first * 60 + second) * 60 + third
    return first * 60 + second


def job_environment(components: Sequence[Resources]) -> dict[str, str]:
    """Return the variables that Slurm sets in a job; those of the job's number hold their own name."""
    first = components[0]
    nodes = sum(component.nodes for component in components)
    values = {name: name for name in ("SLURM_JOB_ID", "SLURM_JOBID", "SLURM_ARRAY_JOB_ID", "SLURM_ARRAY_TASK_ID")}
    tasks = sum(component.nodes * component.tasks_per_node for component in components)
    values |= {name: str(nodes) for name in ("SLURM_NNODES", "SLURM_JOB_NUM_NODES")}
    values |= {name: str(tasks) for name in ("SLURM_NTASKS", "SLURM_NPROCS")}
    values |= {
        "SLURM_NTASKS_PER_NODE": str(first.tasks_per_node),
        "SLURM_CPUS_PER_TASK": first.options.get("cpus-per-task", "1"),
        "SLURM_JOB_NAME": first.options.get("job-name", "job"),
        "SLURM_JOB_PARTITION": first.options.get("partition", ""),
        "SLURM_RESTART_COUNT": "0",
        "SLURM_PROCID": "0",
        "SLURM_NODEID": "0",
        "SLURM_LOCALID": "0",
    }
    if gpus := first.gpus_per_node:
        values |= {"SLURM_GPUS_ON_NODE": str(gpus), "SLURM_GPUS_PER_NODE": str(gpus)}
    return values


def _training_command(path: Path, evaluation: Evaluation) -> TrainingCommand:
    words: list[str] = []
    for started in evaluation.commands:
        words += [*started.arguments, ";"]
    notes = f" ({'; '.join(evaluation.notes)})" if evaluation.notes else ""
    try:
        # A word before the first command keeps an empty list, or flags alone, from being taken for training flags.
        command = read_command(["script", ";", *words[:-1]])
    except ConfigError as error:
        names = ", ".join(dict.fromkeys(started.arguments[0] for started in evaluation.commands)) or "no program"
        raise ConfigError(
            f"{path} starts no training command: it starts {names}{notes}",
            fix="Name pretrain_gpt.py with its flags in the script, for example `srun python pretrain_gpt.py FLAGS`",
        ) from error
    if unknown := [source for word in command.flags for source in unknown_sources(word)]:
        raise ConfigError(
            f"Training flags in {path} depend on the output of {', '.join(dict.fromkeys(unknown))}{notes}",
            rule="The script is read without running its programs",
            fix="Set the value in the script, or in the environment of this command",
        )
    return command


def _integer(name: str, text: str) -> int:
    if not re.fullmatch(r"\d+[kK]?", text) or not int(text.rstrip("kK")):
        raise ConfigError(f"{name} {text} is no positive number", fix=f"Give {name} as a number, for example {name}=4")
    return int(text.rstrip("kK")) * (1024 if text[-1] in "kK" else 1)
