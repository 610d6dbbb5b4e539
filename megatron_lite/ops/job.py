"""Reader of a Slurm batch script: the resources that it requests and the training command that it starts."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from megatron_lite.config.launcher import OWN_COMMANDS, NoScriptError, TrainingCommand, ranks_per_task, read_commands
from megatron_lite.errors import ConfigError
from megatron_lite.ops.resources import Resources, job_environment, read_resources, variable_options
from megatron_lite.ops.shell.evaluate import evaluate_script
from megatron_lite.ops.shell.state import Evaluation
from megatron_lite.ops.shell.text import unknown_sources

TOOLS = frozenset({"preprocess_data.py", "merge_datasets.py", "merge_preprocessed_data.py", "train_tokenizer.py"})
"""Scripts of this project that do not train."""


@dataclass(frozen=True)
class Job:
    """A batch script, read without running its programs.

    Attributes:
        path: of the script.
        components: resources of the job; several of a heterogeneous job.
        evaluation: the commands of the script.
        command: the training command; None: the script runs other commands of megatron_lite.
        programs: those commands, as text, if there is no training command; none if the script ends with an error.
        folder: the current folder at the script's end, to which its relative paths refer.
        sbatch_options: options of sbatch that SBATCH_ variables in the script ask for.
        further: other training commands with the same program, in order: those of a loop, for example.
    """

    path: Path
    components: tuple[Resources, ...]
    evaluation: Evaluation
    command: TrainingCommand | None
    programs: tuple[str, ...]
    folder: Path
    sbatch_options: tuple[str, ...]
    further: tuple[TrainingCommand, ...] = ()

    @property
    def is_started_once(self) -> bool:
        """Whether the batch script itself starts the training command, without srun or another launcher."""
        if self.command is None or self.command.tasks is not None or self.command.world_size is not None:
            return False
        flags = self.command.flags
        programs = [c.arguments[0] for c in self.evaluation.commands if c.arguments[-len(flags) :] == flags]
        return bool(programs) and PurePosixPath(programs[0]).name.startswith("python")

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
        """Number of GPUs of all components; None if the job requests none."""
        counts = [(component.gpus_per_node, component.nodes) for component in self.components]
        return sum(gpus * nodes for gpus, nodes in counts if gpus) or None

    @property
    def world_size(self) -> int | None:
        """Number of ranks: of the launcher, or of all tasks; None: --world-size is among the flags."""
        command = self.command
        if command is None:
            return None
        # Unequal where srun's own options determine the ranks of a task.
        if command.world_size not in (None, command.tasks) or "--world-size" in command.flags:
            return command.world_size
        tasks = command.tasks or sum(component.tasks_per_node * component.nodes for component in self.components)
        # The only task that srun starts on a node starts a rank for each GPU.
        per_node = 0 if command.tasks is None else -(-tasks // self.num_nodes)
        gpus = self.resources.gpus_per_node or 0
        return tasks * ranks_per_task(command.flags, tasks_per_node=per_node, num_gpus=gpus)


def read_job(
    path: Path, *, environment: Mapping[str, str], options: Sequence[str] = (), arguments: Sequence[str] = ()
) -> Job:
    """Read a batch script.

    An option of sbatch is taken from `options`, else from an SBATCH_ variable of the environment, else from one that
    the script exports (site settings in a sourced file), else from an #SBATCH line.

    Args:
        path: of the script.
        environment: variables that the job inherits.
        options: options given on sbatch's command line.
        arguments: of the script.

    Raises:
        ConfigError: the script cannot be read, is no valid bash, has an invalid option, starts neither training nor
            another command of megatron_lite, or its training flags depend on values that exist in the job only.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or "not UTF-8 text"
        raise ConfigError(
            f"Cannot read the job script {path}: {reason}", fix="Give the path of a batch script"
        ) from error

    def evaluate(components: tuple[Resources, ...]) -> Evaluation:
        return evaluate_script(
            text,
            environment={**environment, **job_environment(components)},
            arguments=arguments,
            folder=Path.cwd() / components[0].options.get("chdir", ""),
            name=str(path),
        )

    components = read_resources(text, options, variables=environment)
    evaluation = evaluate(components)
    from_script = variable_options(evaluation.exported)
    given = variable_options(environment)
    sbatch_options = tuple(f"--{name}={value}" for name, value in from_script.items() if given.get(name) != value)
    if sbatch_options:
        components = read_resources(text, [*sbatch_options, *options], variables=environment)
        evaluation = evaluate(components)
    commands, programs = _commands(path, evaluation, components[0].gpus_per_node)
    command, folder = (commands[0] if commands else None), Path(evaluation.folder)
    return Job(path, components, evaluation, command, programs, folder, sbatch_options, tuple(commands[1:]))


def _commands(
    path: Path, evaluation: Evaluation, gpus_per_node: int | None
) -> tuple[list[TrainingCommand], tuple[str, ...]]:
    """Return the training commands, or none and the other commands of megatron_lite."""
    arguments: list[str] = []
    others: list[str] = []
    for started in evaluation.commands:
        if _is_other_program(started.arguments):
            others.append(shlex.join(started.arguments))
        else:
            arguments += [*started.arguments, ";"]
    reasons = [f"{name}, which the script sources, does not exist" for name in evaluation.missing_sources]
    reasons += evaluation.notes
    notes = f" ({'; '.join(reasons)})" if reasons else ""
    try:
        # An argument before the first command keeps an empty list, or flags alone, from being taken for training flags.
        commands = read_commands(["script", ";", *arguments[:-1]], gpus_per_node=gpus_per_node)
    except NoScriptError as error:
        if others or evaluation.failure:
            return [], tuple(others)
        names = ", ".join(dict.fromkeys(started.arguments[0] for started in evaluation.commands)) or "no program"
        raise ConfigError(
            f"{path} starts no training command: it starts {names}{notes}",
            fix="Name pretrain_gpt.py with its flags in the script, for example `srun python pretrain_gpt.py FLAGS`",
        ) from error
    flag, found = "", dict[str, list[str]]()
    for argument in (argument for command in commands for argument in command.flags):
        flag = argument.partition("=")[0] if argument.startswith("--") else flag
        if unknown := unknown_sources(argument):
            found.setdefault(flag or "the training flags", []).extend(unknown)
    if found:
        values = "; ".join(f"{flag}: {', '.join(dict.fromkeys(sources))}" for flag, sources in found.items())
        raise ConfigError(
            f"Training flags in {path} depend on the output of programs ({values}){notes}",
            rule="The script is read without running its programs",
            fix=f"Write the value of {next(iter(found))} in the script",
        )
    return commands, ()


def _is_other_program(arguments: Sequence[str]) -> bool:
    """Return whether a command is one of megatron_lite that does not train."""
    for place, argument in enumerate(arguments):
        name = PurePosixPath(argument).name
        if name in TOOLS:
            return True
        if name == "megatron-lite" or (name == "megatron_lite" and arguments[place - 1] == "-m"):
            following = arguments[place + 1] if place + 1 < len(arguments) else ""
            return following not in OWN_COMMANDS
    return False
