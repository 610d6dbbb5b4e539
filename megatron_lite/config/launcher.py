"""Launcher command lines: extracts training flags and world size from `torchrun … pretrain_gpt.py …` and the like.

A command line copied from a shell history, a job script or a log has launchers, then the training script, its flags,
and shell operators: `srun -l bash -c "torchrun --nproc_per_node 8 pretrain_gpt.py --bf16" 2>&1 | tee log`. Arguments
before the script are read for the number of ranks only, whatever launcher it is.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from megatron_lite.config.command_line import read_argument_file, read_command_line, require_utf8, split_fault
from megatron_lite.config.given import Given
from megatron_lite.config.table import flags_by_spelling, spelling
from megatron_lite.errors import ConfigError

OPERATORS = frozenset({"|", "||", "|&", "&", "&&", ";"})
REDIRECTION = re.compile(r"(\d*|&)(>>?|<)(&\d|.*)")
UNEXPANDED = re.compile(r"\$\{[^}]*\}|\$\(.*|\$[\w@*#?]+|`.*")
OWN_COMMANDS = frozenset({"train", "explain", "rehearse", "doctor"})
LAUNCHER_MODULES = ("torch.distributed.", "deepspeed", "accelerate", "cProfile")
"""Beginnings of modules that `python -m` starts before the training script."""


@dataclass(frozen=True)
class TrainingCommand:
    """Training flags of a command line, and the ranks that its launcher starts.

    Attributes:
        flags: the arguments after the training script, without those of the shell.
        world_size: ranks that the launcher starts; None: unknown, or --world-size is among the flags.
        tasks: tasks that srun starts, each of which may start several ranks (ranks_per_task); 0: srun without their
            number; None: another launcher, or none.
        script: the training script, module or command; empty: flags alone.
    """

    flags: tuple[str, ...]
    world_size: int | None
    tasks: int | None = None
    script: str = ""


class NoScriptError(ConfigError):
    """A command line names no training script."""


def read_command(argv: Sequence[str], *, gpus_per_node: int | None = None) -> TrainingCommand:
    """Find the training flags in a command line: flags alone, or the whole command that starts a job.

    Args:
        argv: arguments, of which the first may hold a whole command in quotes, or be @FILE for the command in a file.
        gpus_per_node: GPUs of a node, for each of which `torchrun --nproc-per-node gpu` starts a rank; None: unknown.

    Raises:
        NoScriptError: there is no training script.
        ConfigError: quotes are not closed, shell variables are left among the flags, or the launcher's number of ranks
            is no number and there is no --world-size.
    """
    # Of `cd … && python tools/x.py … && torchrun pretrain_gpt.py …`, take the command with the most training flags.
    return _training_command(*max(_scripts(argv), key=lambda command: _flag_count(*command)), gpus_per_node)


def read_commands(argv: Sequence[str], *, gpus_per_node: int | None = None) -> list[TrainingCommand]:
    """Find all commands in a command line that start the same script as read_command's, in order, each once.

    Args:
        argv: as for read_command.
        gpus_per_node: as for read_command.

    Raises:
        NoScriptError, ConfigError: as read_command.
    """
    found = list(_scripts(argv))
    tokens, script = max(found, key=lambda command: _flag_count(*command))
    program = PurePosixPath(tokens[script - 1]).name
    training = [
        (own, place)
        for own, place in found
        if (own is tokens and place == script)
        or (PurePosixPath(own[place - 1]).name == program and _flag_count(own, place))
    ]
    return list(dict.fromkeys(_training_command(own, place, gpus_per_node) for own, place in training))


def _scripts(argv: Sequence[str]) -> list[tuple[list[str], int]]:
    """Return the commands that start a script, each with the index of the first token after it."""
    found = [(tokens, script) for tokens in _commands(_opened(argv)) if (script := _script(tokens)) is not None]
    if not found:
        raise _no_script(argv)
    return found


def _flag_count(tokens: Sequence[str], script: int) -> int:
    return sum(map(_is_training_flag, tokens[script:]))


def _training_command(tokens: list[str], script: int, gpus_per_node: int | None) -> TrainingCommand:
    flags = tokens[script:]
    if unexpanded := _unexpanded(flags):
        raise ConfigError(
            f"The command line contains shell variables or substitutions, which are not expanded here: "
            f"{', '.join(unexpanded)}",
            fix="Write their values instead, or put `megatron-lite explain` before the command in the job script and "
            "run "
            "the script",
        )
    given = any(spelling(token) == "--world-size" for token in flags)
    try:
        world_size, by_srun, gpus = _started(tokens[:script], gpus_per_node)
    except ConfigError:
        if not given:
            raise
        world_size, by_srun, gpus = None, False, 0
    ranks = ranks_per_task(flags, tasks_per_node=1 if gpus else 0, num_gpus=gpus)
    tasks = (world_size or 0) if by_srun else None
    started = None if given or world_size is None else world_size * ranks
    return TrainingCommand(tuple(flags), started, tasks, script=tokens[script - 1] if script else "")


def ranks_per_task(flags: Sequence[str], *, tasks_per_node: int, num_gpus: int) -> int:
    """Return the number of ranks that each task of a launcher starts itself.

    Args:
        flags: training flags; mistakes in them are ignored.
        tasks_per_node: tasks that srun starts on a node; 0: srun does not start this one.
        num_gpus: GPUs that the task sees.
    """
    given = Given()
    read_command_line(flags, given)
    asked = given.run.command.ranks_per_task
    if asked or tasks_per_node != 1 or given.run.runtime.device in ("cpu", "xla"):
        return asked or 1
    return max(1, num_gpus)


def _opened(argv: Sequence[str]) -> list[str]:
    """Return the arguments; the first is split if it is a command in quotes or an argument file."""
    require_utf8(argv)
    tokens = [token for token in argv if token.strip(" \t\r\n\\")]
    if tokens and tokens[0].startswith("@") and Path(tokens[0][1:]).is_file():
        text = read_argument_file(tokens[0])
        return [*_split(text, comments=True), *tokens[1:]]
    if tokens and re.search(r"\s", tokens[0]):
        return [*_split(tokens[0]), *tokens[1:]]
    return tokens


def _split(text: str, *, comments: bool = False) -> list[str]:
    """Split as a shell does, continued lines joined; other line ends and a closing ; become separate tokens."""
    text = re.sub(r"\\[ \t]*(\r?\n|$)", " ", text)
    tokens: list[str] = []
    try:
        for line in _lines(text, comments=comments):
            for token in line:
                tokens += [token[:-1], ";"] if token.endswith(";") and len(token) > 1 else [token]
            tokens.append(";")
    except ValueError as error:
        fault, fix = split_fault(text, error)
        raise ConfigError(f"Cannot split the command line {text[:80]!r}: {fault}", fix=fix) from error
    return [token for token in tokens[:-1] if token.strip(" \t\\")]


def _lines(text: str, *, comments: bool) -> list[list[str]]:
    """Return the tokens of each line; a line break within quotes or before a flag does not end a line."""
    lines: list[list[str]] = []
    waiting = ""
    for number, line in enumerate(text.splitlines()):
        waiting = f"{waiting}\n{line}" if waiting else line
        try:
            tokens = shlex.split(waiting, comments=comments)
        except ValueError:
            if number + 1 == len(text.splitlines()):
                raise
            continue
        waiting = ""
        if lines and tokens and tokens[0].startswith("-"):
            lines[-1] += tokens
        elif tokens:
            lines.append(tokens)
    return lines


def _commands(tokens: list[str]) -> Iterator[list[str]]:
    """Yield the commands between the shell's operators.

    Those inside `bash -c "…"`, `ssh host "…"` and the like begin with the tokens before it, which may be a launcher.
    """
    for command in _simple_commands(tokens):
        inner = None
        if command and not command[0].startswith("-") and not any(map(_is_script, command)):
            quoted = (place for place, token in enumerate(command) if re.search(r"\s", token) and ".py" in token)
            inner = next(quoted, None)
        if inner is None:
            yield command
            continue
        for nested in _commands(_split(command[inner])):
            yield [*command[:inner], *nested, *command[inner + 1 :]]


def _simple_commands(tokens: list[str]) -> list[list[str]]:
    """Return the commands between the shell's operators, without redirections."""
    commands: list[list[str]] = [[]]
    dropping = False
    for token in tokens:
        redirection = REDIRECTION.fullmatch(token)
        if token in OPERATORS:
            commands.append([])
        elif redirection:
            dropping = not redirection[3]
            continue
        elif not dropping:
            commands[-1].append(token)
        dropping = False
    return [command for command in commands if command] or [[]]


def _is_script(token: str) -> bool:
    return token.endswith(".py") and not re.search(r"\s", token)


def _is_training_flag(token: str) -> bool:
    """Return True for a flag that only a training script has."""
    flag = flags_by_spelling().get(spelling(token)) if token.startswith("--") else None
    return flag is not None and flag.status != "no effect" and flag.name != "--world-size"


def _script(tokens: Sequence[str]) -> int | None:
    """Return the index of the first token after the training script; 0 for flags alone; None without a script.

    Launchers may be scripts, too (`python launch.py -n 8 pretrain_gpt.py`): the training script is the last one that
    only launchers and their options precede.
    """
    if not tokens or tokens[0].startswith(("-", "@")):
        return 0
    found = None
    for place, token in enumerate(tokens):
        if found is not None and _is_training_flag(token):
            break
        before = tokens[place - 1] if place else ""
        own = PurePosixPath(before).name == "megatron-lite" and token in OWN_COMMANDS
        module = before == "-m" and not token.startswith(LAUNCHER_MODULES)
        if own or module or _is_script(token):
            found = place + 1
    return found


def _unexpanded(tokens: Sequence[str]) -> list[str]:
    """Return the shell variables and substitutions among the tokens, each once."""
    return list(dict.fromkeys(match.group() for token in tokens for match in UNEXPANDED.finditer(token)))


def _no_script(argv: Sequence[str]) -> NoScriptError:
    text = " ".join(argv)
    unexpanded = _unexpanded(argv)
    fix = "Give the flags alone, or a full command, for example `torchrun --nproc-per-node 8 pretrain_gpt.py …`"
    if unexpanded:
        fix = f"Shell variables are not expanded here: write the value of {' and '.join(unexpanded)}. {fix}"
    return NoScriptError(
        f"Cannot find the training flags in {text[:100]!r}{' …' if len(text) > 100 else ''}: it names no Python "
        "script, "
        "and does not begin with a flag",
        fix=fix,
    )


def _started(launchers: Sequence[str], gpus_per_node: int | None) -> tuple[int | None, bool, int]:
    """Return the processes that the launcher nearest to the script starts, and whether it is srun.

    Returns:
        Number of processes (None: the options do not set it), whether srun starts them, and the GPUs of each task
        that srun starts alone on a node (0: other tasks, or no such option).
    """
    for place in reversed(range(len(launchers))):
        name = PurePosixPath(launchers[place]).name
        options = launchers[place + 1 :]
        if name == "torchrun" or name.startswith("torch.distributed."):
            per_node = _torchrun_ranks(options, gpus_per_node)
            return _product(per_node, _number(options, "--nnodes", default=1)), False, 0
        if name in ("deepspeed", "deepspeed.launcher.runner"):
            return _deepspeed_ranks(options), False, 0
        if name == "accelerate" or name.startswith("accelerate."):
            return _number(options, "--num-processes", "-n"), False, 0
        if name in ("mpirun", "mpiexec", "mpiexec.hydra", "orterun", "aprun", "jsrun", "ibrun"):
            return _number(options, "-np", "--np", "-n"), False, 0
        if name == "srun":
            nodes, each = _number(options, "--nodes", "-N"), _number(options, "--ntasks-per-node")
            tasks = _number(options, "--ntasks", "-n") or _product(nodes, each)
            alone = each == 1 or (tasks is not None and tasks == (nodes or 1))
            return tasks, True, _gpus_of_node(options) if alone else 0
    return None, False, 0


def _gpus_of_node(options: Sequence[str]) -> int:
    """Return the GPUs of a node by srun's `--gpus-per-node a100:8` or `--gres=gpu:8`; 0: neither is given."""
    for name in ("--gpus-per-node", "--gpus-per-task", "--gres"):
        given = (_option(options, name) or "").split(":")
        if given[-1].isdigit() and (name != "--gres" or given[0] == "gpu"):
            return int(given[-1])
    return 0


def _torchrun_ranks(options: Sequence[str], gpus_per_node: int | None) -> int | None:
    """Return the ranks of a node: `gpu` is one for each GPU, `auto` the same, or one for each core without GPUs."""
    value = _option(options, "--nproc-per-node")
    if value in ("gpu", "auto") and gpus_per_node:
        return gpus_per_node
    if value in ("gpu", "auto", "cpu"):
        kind = "core" if value == "cpu" else "GPU"
        raise ConfigError(
            f"--nproc-per-node {value} starts a rank for each {kind} of a node, and their number is unknown here",
            fix="Write a number (for example --nproc-per-node 8), add --world-size N to the training flags"
            + ("" if value == "cpu" else ", or, in a job script, request GPUs with #SBATCH --gpus-per-node"),
        )
    return _number(options, "--nproc-per-node", default=1)


def _deepspeed_ranks(options: Sequence[str]) -> int | None:
    included = _option(options, "--include", "-i")
    if included is not None:
        hosts = [host.partition(":")[2] for host in included.split("@")]
        return sum(len(slots.split(",")) for slots in hosts) if all(hosts) else None
    # With a hostfile the number of nodes is that of its lines, unless a flag limits it.
    several = _option(options, "--hostfile", "-H") is not None
    nodes = _number(options, "--num-nodes", default=None if several else 1)
    return _product(_number(options, "--num-gpus"), nodes)


def _option(tokens: Sequence[str], *names: str) -> str | None:
    """Return the value of an option: `--name V`, `--name=V`, `-n V` or `-nV`; None if it is not there."""
    for place, token in enumerate(tokens):
        name = spelling(token) if token.startswith("--") else token
        if name in names:
            return token.partition("=")[2] or (tokens[place + 1] if place + 1 < len(tokens) else "")
        for short in names:
            if len(short) == 2 and token.startswith(short) and token[2:].isdigit():
                return token[2:]
    return None


def _number(tokens: Sequence[str], *names: str, default: int | None = None) -> int | None:
    value = _option(tokens, *names)
    if value is None:
        return default
    if not value.isdigit() or not int(value):
        raise ConfigError(
            f"Cannot read the launcher's number of ranks from {names[0]} {value or 'without a value'}",
            fix=f"Write a number (for example {names[0]} 8), or add --world-size N to the training flags",
        )
    return int(value)


def _product(*numbers: int | None) -> int | None:
    product = 1
    for number in numbers:
        if number is None:
            return None
        product *= number
    return product
