"""Slurm resources of a batch script: options of sbatch from #SBATCH lines, SBATCH_ variables and the command line."""

from __future__ import annotations

import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from megatron_lite.errors import ConfigError

SHORT_OPTIONS = {
    **{"A": "account", "a": "array", "c": "cpus-per-task", "C": "constraint", "d": "dependency", "D": "chdir"},
    **{"e": "error", "G": "gpus", "J": "job-name", "n": "ntasks", "N": "nodes", "o": "output", "p": "partition"},
    **{"q": "qos", "t": "time", "w": "nodelist", "x": "exclude", "M": "clusters"},
}
VARIABLES = {
    "SBATCH_ACCOUNT": "account",
    "SBATCH_ARRAY_INX": "array",
    "SBATCH_CLUSTERS": "clusters",
    "SBATCH_CONSTRAINT": "constraint",
    "SBATCH_ERROR": "error",
    "SBATCH_GPUS": "gpus",
    "SBATCH_GPUS_PER_NODE": "gpus-per-node",
    "SBATCH_GPUS_PER_TASK": "gpus-per-task",
    "SBATCH_GRES": "gres",
    "SBATCH_JOB_NAME": "job-name",
    "SBATCH_OUTPUT": "output",
    "SBATCH_PARTITION": "partition",
    "SBATCH_QOS": "qos",
    "SBATCH_RESERVATION": "reservation",
    "SBATCH_SIGNAL": "signal",
    "SBATCH_TIMELIMIT": "time",
}
"""Environment variables of sbatch that replace an option of the script (sbatch(1), INPUT ENVIRONMENT VARIABLES)."""
UNLIMITED = ("UNLIMITED", "INFINITE", "0")
ARRAY = re.compile(r"(\d+)(?:-(\d+))?")


@dataclass(frozen=True)
class Resources:
    """Options of sbatch for one component of a job, by long name."""

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
        """Number of GPUs of a node; None if the job requests none."""
        for name in ("gpus-per-node", "gres"):
            for part in self.options.get(name, "").split(","):
                pieces = part.split(":")
                if name == "gpus-per-node" and part:
                    return _count("--gpus-per-node", pieces[-1]) or None
                if pieces[0] in ("gpu", "gres/gpu"):
                    count = re.sub(r"\(.*", "", pieces[-1])
                    return (int(count) if count.isdigit() else 1) or None
        if total := self.options.get("gpus"):
            return -(-_count("--gpus", total.split(":")[-1]) // self.nodes) or None
        if per_task := self.options.get("gpus-per-task"):
            tasks = self._number("ntasks-per-node") or -(-(self._number("ntasks") or 1) // self.nodes)
            return _count("--gpus-per-task", per_task.split(":")[-1]) * tasks or None
        return None

    @property
    def time_limit(self) -> int | None:
        """Time limit in seconds; None: the partition's."""
        given = self.options.get("time")
        return None if given is None or given.upper() in UNLIMITED else parse_time(given)

    @property
    def signal(self) -> tuple[str, int] | None:
        """Name of the signal of --signal and the seconds before the time limit; None: no signal is requested."""
        match = re.fullmatch(r"(?:[BR]+:)?(?:SIG)?(\w+)(?:@(\d+))?", self.options.get("signal", ""))
        return (match[1], int(match[2] or 60)) if match else None

    @property
    def array(self) -> tuple[int, ...]:
        """Indices of the tasks of a job array, ascending; empty: the job is no array."""
        indices: set[int] = set()
        for part in self.options.get("array", "").partition("%")[0].split(","):
            span, _, step = part.partition(":")
            if match := ARRAY.fullmatch(span.strip()):
                indices.update(range(int(match[1]), int(match[2] or match[1]) + 1, max(1, int(step or 1))))
            elif part:
                raise ConfigError(
                    f"--array {self.options['array']} is not a list of indices",
                    fix="Give --array as indices and ranges, for example --array=0-31 or --array=1,3,5-9%4",
                )
        return tuple(sorted(indices))

    def _number(self, name: str) -> int | None:
        given = self.options.get(name)
        return None if given is None else _integer(f"--{name}", given)


def read_resources(
    text: str, options: Sequence[str] = (), *, variables: Mapping[str, str] | None = None
) -> tuple[Resources, ...]:
    """Read the options of sbatch, one Resources for each component of the job.

    Args:
        text: the script, with its #SBATCH lines.
        options: options on sbatch's command line, which override the others.
        variables: SBATCH_ variables, which override the #SBATCH lines.
    """
    components: list[dict[str, str]] = [{}]
    for line in text.splitlines():
        if line.strip() and not line.startswith("#"):
            break
        if not line.startswith("#SBATCH"):
            continue
        arguments = shlex.split(line.removeprefix("#SBATCH"), comments=True)
        if arguments[:1] in (["hetjob"], ["packjob"]):
            components.append({})
        components[-1] |= _read_options(arguments)
    components[0] |= variable_options(variables or {}) | _read_options(options)
    return tuple(Resources(component) for component in components)


def variable_options(variables: Mapping[str, str]) -> dict[str, str]:
    """Return the options of sbatch that SBATCH_ variables set, by long name."""
    return {VARIABLES[name]: value for name, value in variables.items() if name in VARIABLES and value}


def _read_options(arguments: Sequence[str]) -> dict[str, str]:
    options: dict[str, str] = {}
    name = None
    for argument in arguments:
        if argument.startswith("--"):
            name, _, value = argument[2:].partition("=")
            options[name] = value
        elif re.match(r"-[a-zA-Z]", argument):
            name = SHORT_OPTIONS.get(argument[1], argument[1])
            options[name] = argument[2:].removeprefix("=")
        elif name is not None and not options[name]:
            options[name] = argument
    return options


def without_option(options: Sequence[str], name: str) -> list[str]:
    """Return options of sbatch without one of them, in either spelling and with its value."""
    kept: list[str] = []
    skips_value = False
    for argument in options:
        is_long, is_option = argument.startswith("--"), argument.startswith("-")
        found = argument[2:].partition("=")[0] if is_long else SHORT_OPTIONS.get(argument[1:2], "")
        if is_option and found == name:
            skips_value = "=" not in argument if is_long else len(argument) == 2
        elif is_option or not skips_value:
            skips_value = False
            kept.append(argument)
        else:
            skips_value = False
    return kept


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
    """Return the variables that Slurm sets in a job; those of the job's number and nodes have their own name as value.

    Of a job array they are those of its first task.
    """
    first = components[0]
    nodes = sum(component.nodes for component in components)
    values = {name: name for name in ("SLURM_JOB_ID", "SLURM_JOBID", "SLURM_JOB_NODELIST", "SLURM_NODELIST")}
    if array := first.array:
        values |= {
            "SLURM_ARRAY_JOB_ID": "SLURM_ARRAY_JOB_ID",
            "SLURM_ARRAY_TASK_ID": str(array[0]),
            "SLURM_ARRAY_TASK_MIN": str(array[0]),
            "SLURM_ARRAY_TASK_MAX": str(array[-1]),
            "SLURM_ARRAY_TASK_COUNT": str(len(array)),
        }
    tasks = sum(component.nodes * component.tasks_per_node for component in components)
    values |= {name: str(nodes) for name in ("SLURM_NNODES", "SLURM_JOB_NUM_NODES")}
    values |= {name: str(tasks) for name in ("SLURM_NTASKS", "SLURM_NPROCS")}
    values |= {
        "SLURM_NTASKS_PER_NODE": str(first.tasks_per_node),
        "SLURM_CPUS_PER_TASK": first.options.get("cpus-per-task", "1"),
        "SLURM_SUBMIT_DIR": str(Path.cwd()),
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


def _count(name: str, text: str) -> int:
    return 0 if text == "0" else _integer(name, text)


def _integer(name: str, text: str) -> int:
    if not re.fullmatch(r"\d+[kK]?", text) or not int(text.rstrip("kK")):
        raise ConfigError(f"{name} {text} is no positive number", fix=f"Give {name} as a number, for example {name}=4")
    return int(text.rstrip("kK")) * (1024 if text[-1] in "kK" else 1)
