"""Emulated shell commands: the builtins and programs that job scripts use to compute values (echo, test, date)."""

from __future__ import annotations

import codecs
import re
import socket
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_lite.ops.shell.state import LeaveError
from megatron_lite.ops.shell.text import unknown_sources, unknown_text

if TYPE_CHECKING:
    from megatron_lite.ops.shell.evaluate import Shell

PURE_TOOLS = frozenset({"basename", "cut", "dirname", "expr", "head", "nproc", "rev", "seq", "tac", "tail", "tr", "wc"})
"""Programs that read text and print text, whatever their arguments."""
IGNORED = frozenset(
    {
        "clear",
        "module",
        "conda",
        "sleep",
        "trap",
        "ulimit",
        "umask",
        "wait",
        "mkdir",
        "touch",
        "rm",
        "ln",
    }
    | {"cp", "mv", "chmod", "tee", "kill", "popd", "pushd", "spack", "ml", "nvidia-smi", "sync", "times", "hash"}
)
"""Programs and builtins without effect on later commands of a job script."""
CONVERSION = re.compile(r"%([-+0 #]*\d*(?:\.\d+)?)([sdiuxXofegbq%])")


def _echo(shell: Shell, arguments: list[str], _: str) -> None:
    options = ""
    while arguments and re.fullmatch(r"-[neE]+", arguments[0]):
        options += arguments.pop(0)[1:]
    text = " ".join(arguments)
    shell.write((codecs.decode(text, "unicode_escape") if "e" in options else text) + ("" if "n" in options else "\n"))


def _printf(shell: Shell, arguments: list[str], _: str) -> None:
    if arguments[:1] == ["-v"]:
        name, (form, *values) = arguments[1], arguments[2:]
        shell.variables.values[name] = _formatted(form, values)
    elif arguments:
        shell.write(_formatted(arguments[0], arguments[1:]))


def _formatted(form: str, values: list[str]) -> str:
    """Format as printf does: the format is repeated until all values are used."""
    form = re.sub(r"\\(n|t|\\)", lambda match: {"n": "\n", "t": "\t", "\\": "\\"}[match[1]], form)
    remaining, text = list(values), ""

    def convert(match: re.Match[str]) -> str:
        flags, kind = match[1], match[2]
        if kind == "%":
            return "%"
        value = remaining.pop(0) if remaining else ""
        if kind in "sbq":
            return f"%{flags}s" % value
        try:
            number = float(value or 0) if kind in "feg" else int(value or "0", 0)
            return f"%{flags}{'d' if kind in 'iu' else kind}" % number
        except ValueError:
            return value

    while True:
        count = len(remaining)
        text += CONVERSION.sub(convert, form)
        if not remaining or len(remaining) == count:
            return text


def _cd(shell: Shell, arguments: list[str], _: str) -> None:
    targets = [argument for argument in arguments if not re.fullmatch(r"-[LPe]+|--", argument)]
    target = targets[0] if targets else shell.variables.text("HOME") or "/"
    old = shell.folder()
    target = shell.variables.text("OLDPWD") or old if target == "-" else target
    shell.variables.values |= {"PWD": shell.path(target), "OLDPWD": old}


def _source(shell: Shell, arguments: list[str], _: str) -> None:
    if not arguments:
        return
    text = shell.content(shell.path(arguments[0]))
    if text is None:
        shell.evaluation.missing_sources[arguments[0]] = None
        shell.status = 1
        return
    try:
        shell.run_statements(text, arguments[0])
    except LeaveError as leave:
        if leave.kind != "return":
            raise


def _eval(shell: Shell, arguments: list[str], _: str) -> None:
    text = " ".join(arguments)
    if not unknown_sources(text):
        shell.run_statements(text, "eval")


def _read(shell: Shell, arguments: list[str], stdin: str) -> None:
    names = []
    array = False
    while arguments:
        argument = arguments.pop(0)
        if re.fullmatch(r"-[dnNptu]", argument):
            arguments = arguments[1:]
        elif argument.startswith("-"):
            array = array or "a" in argument
        else:
            names.append(argument)
    line = stdin.split("\n")[0] if stdin else ""
    separators = shell.variables.text("IFS")
    fields = (
        line.split() if separators is None else re.split(f"[{re.escape(separators)}]", line) if separators else [line]
    )
    shell.status = int(not stdin)
    if array and names:
        shell.variables.values[names[0]] = {str(place): text for place, text in enumerate(fields)}
        return
    for place, name in enumerate(names or ["REPLY"]):
        last = place + 1 == len(names or [""])
        shell.variables.values[name] = (
            " ".join(fields[place:]) if last else (fields[place] if place < len(fields) else "")
        )


def _mapfile(shell: Shell, arguments: list[str], stdin: str) -> None:
    names = [argument for argument in arguments if not argument.startswith("-")]
    lines = stdin.split("\n")[: -1 if stdin.endswith("\n") else None] if stdin else []
    shell.variables.values[names[-1] if names else "MAPFILE"] = {str(place): line for place, line in enumerate(lines)}


def _unset(shell: Shell, arguments: list[str], _: str) -> None:
    for name in arguments:
        shell.variables.values.pop(name, None)
        shell.functions.pop(name, None)


def _set(shell: Shell, arguments: list[str], _: str) -> None:
    options = "".join(argument for argument in arguments if re.fullmatch(r"[-+][a-z]+", argument))
    if "nounset" in arguments or re.search(r"-[a-z]*u", options):
        shell.evaluation.stops_at_missing = "+o" not in arguments and "+u" not in arguments
    if "--" in arguments:
        shell.variables.arguments = arguments[arguments.index("--") + 1 :]


def _shopt(shell: Shell, arguments: list[str], _: str) -> None:
    if "nullglob" in arguments:
        shell.variables.nullglob = "-s" in arguments


def _shift(shell: Shell, arguments: list[str], _: str) -> None:
    count = int(arguments[0]) if arguments and arguments[0].isdigit() else 1
    shell.status = int(count > len(shell.variables.arguments))
    shell.variables.arguments = shell.variables.arguments[count:]


def _cat(shell: Shell, arguments: list[str], stdin: str) -> None:
    names = [argument for argument in arguments if not argument.startswith("-")]
    shell.write("".join(shell.read(name) for name in names) if names else stdin)


def _test(shell: Shell, arguments: list[str], _: str) -> None:
    shell.status = int(not shell.test_arguments(arguments[:-1] if arguments[-1:] == ["]"] else arguments))


def _date(shell: Shell, arguments: list[str], _: str) -> None:
    form = next((argument[1:] for argument in arguments if argument.startswith("+")), None)
    known = form is not None and all(argument.startswith("+") for argument in arguments)
    shell.write(
        time.strftime(form.replace("%s", str(int(time.time())))) + "\n" if form and known else unknown_text("date")
    )


def _command(shell: Shell, arguments: list[str], stdin: str) -> None:
    if arguments and not arguments[0].startswith("-"):
        shell.execute(arguments, stdin)


def _leave(kind: str) -> Callable[[Shell, list[str], str], None]:
    def leave(shell: Shell, arguments: list[str], _: str) -> None:
        number = int(arguments[0]) if arguments and arguments[0].isdigit() else None
        if kind in ("return", "exit") and number is not None:
            shell.status = number
        raise LeaveError(kind, number or 1)

    return leave


def _status(value: int) -> Callable[[Shell, list[str], str], None]:
    def run(shell: Shell, _: list[str], __: str) -> None:
        shell.status = value

    return run


def _prints(text: Callable[[Shell, list[str]], str]) -> Callable[[Shell, list[str], str], None]:
    return lambda shell, arguments, _: shell.write(text(shell, arguments) + "\n")


_realpath = _prints(lambda shell, arguments: shell.path(arguments[-1] if arguments else "."))

BUILTINS: dict[str, Callable[[Shell, list[str], str], None]] = {
    "echo": _echo,
    "printf": _printf,
    "cd": _cd,
    "pwd": _prints(lambda shell, _: shell.folder()),
    "source": _source,
    ".": _source,
    "eval": _eval,
    "exec": _command,
    "command": _command,
    "builtin": _command,
    "read": _read,
    "mapfile": _mapfile,
    "readarray": _mapfile,
    "unset": _unset,
    "set": _set,
    "shift": _shift,
    "shopt": _shopt,
    "cat": _cat,
    "test": _test,
    "[": _test,
    "date": _date,
    "hostname": _prints(lambda _, __: socket.gethostname()),
    "realpath": _realpath,
    "readlink": _realpath,
    "whoami": _prints(lambda shell, _: shell.variables.text("USER") or Path.home().name),
    "true": _status(0),
    ":": _status(0),
    "false": _status(1),
    "break": _leave("break"),
    "continue": _leave("continue"),
    "return": _leave("return"),
    "exit": _leave("exit"),
}
"""Implementations by name; each takes the shell, the command's arguments and its standard input."""
