"""Bash statement evaluator: records the commands that a job script would start, fully expanded.

shfmt (pip package shfmt-py) parses the script; assignments, arrays, conditions, loops, functions and here-documents are
evaluated here as bash does. Other programs are recorded, and their output is replaced by a marker of an unknown value.
Text tools without side effects (`cut`, `head`, `basename`, …) are run. Files that the script writes are kept in memory.
"""

from __future__ import annotations

import os
import re
import shutil
import socket
import subprocess
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from megatron_lite.errors import ConfigError
from megatron_lite.ops.shell.assignments import assign, declare
from megatron_lite.ops.shell.builtins import BUILTINS, IGNORED, PURE_TOOLS
from megatron_lite.ops.shell.parse import parse_script
from megatron_lite.ops.shell.state import Evaluation, LeaveError, ShellState, StartedCommand
from megatron_lite.ops.shell.text import UnknownValueError, matches, unknown_sources, unknown_text
from megatron_lite.ops.shell.words import Node, Variables, WordExpander

MAX_STEPS = 100_000
MAX_NESTING = 50
SHELL_VARIABLES = {
    **{"$": "1", "!": "1", "PPID": "1", "UID": str(os.getuid()), "EUID": str(os.geteuid())},
    **{
        "HOSTNAME": socket.gethostname(),
        "RANDOM": "1",
        "SECONDS": "0",
        "LINENO": "1",
        "-": "hB",
        "OSTYPE": "linux-gnu",
    },
}
"""Variables that every bash sets; those of processes and times have fixed values."""


def evaluate_script(
    text: str, *, environment: Mapping[str, str], arguments: Sequence[str] = (), folder: Path | None = None, name: str
) -> Evaluation:
    """Evaluate a job script.

    Args:
        text: the script.
        environment: variables that the script inherits.
        arguments: of the script.
        folder: in which it starts; the current one by default.
        name: of the script, for errors.

    Raises:
        ConfigError: the script is no valid bash, runs forever, or shfmt is not installed.
    """
    evaluation = Evaluation()
    variables = Variables(dict(environment), set(environment), arguments=list(arguments), missing=evaluation.missing)
    variables.values |= {"PWD": str(folder or Path.cwd()), "0": name, "BASH_SOURCE": name, **SHELL_VARIABLES}
    shell = Shell(variables, evaluation)
    shell.run_text(text, name)
    evaluation.folder = shell.folder()
    evaluation.exported = shell.environment()
    return evaluation


class Shell(ShellState):
    """A shell that evaluates statements."""

    def __init__(
        self, variables: Variables, evaluation: Evaluation, prefix: tuple[str, ...] = (), depth: int = 0
    ) -> None:
        super().__init__(evaluation, WordExpander(variables, self._substituted, self._arithmetic_tree))
        self._prefix = prefix
        self._depth = depth
        self._steps = 0
        self._line = 0

    def run_text(self, text: str, name: str) -> None:
        """Evaluate a script up to its end or `exit`."""
        try:
            self.run_statements(text, name)
        except LeaveError as leave:
            if leave.kind == "exit" and self.status:
                printed = f' with the message "{self.evaluation.last_output}"' if self.evaluation.last_output else ""
                self.evaluation.failure = f"ends itself with status {self.status} in line {self._line}{printed}"
        except UnknownValueError as error:
            self.evaluation.notes.append(
                f"line {self._line}: evaluation stopped, since the value of {error} exists in the job only"
            )

    def run_statements(self, text: str, name: str) -> None:
        """Evaluate the statements of a text in this shell."""
        self._run_all(parse_script(text, name))

    def _run_all(self, statements: Sequence[Node] | None, stdin: str = "") -> int:
        for statement in statements or ():
            self._run(statement, stdin)
        return self.status

    def _run(self, statement: Node, stdin: str = "") -> int:
        self._steps += 1
        if self._steps > MAX_STEPS:
            raise ConfigError(
                f"Reading {self.variables.values['0']} stopped in line {self._line}, after more than "
                f"{MAX_STEPS:,} commands",
                rule="Its loops are evaluated, and none of its programs is started",
                fix="Remove the loop that is endless or very long, or give the training command itself",
            )
        self._line = self.variables.line = statement["Pos"]["Line"]
        command = statement.get("Cmd")
        redirections = statement.get("Redirs") or []
        for redirection in redirections:
            if redirection["Op"] in ("<<", "<<-"):
                stdin = self._heredoc(redirection)
            elif redirection["Op"] == "<<<":
                stdin = self.words.text(redirection["Word"]) + "\n"
            elif redirection["Op"] == "<":
                stdin = self.read(self.words.text(redirection["Word"]))
        written = [r for r in redirections if r["Op"] in (">", ">>", ">|", "&>", "&>>")]
        to_file = [r for r in written if (r.get("N") or {}).get("Value", "1") == "1"]
        if command is None:
            self.status = 0
        elif to_file:
            output = self._captured(lambda: self._command(command, stdin))
            path = self.path(self.words.text(to_file[-1]["Word"]))
            old = self.evaluation.files.get(path, "") if to_file[-1]["Op"] in (">>", "&>>") else ""
            self.evaluation.files[path] = old + output
        else:
            self._command(command, stdin)
        if statement.get("Negated"):
            self.status = int(not self.status)
        self.variables.values["?"] = str(self.status)
        return self.status

    def _heredoc(self, redirection: Node) -> str:
        quoted = any(part["Type"] != "Lit" or "\\" in part["Value"] for part in redirection["Word"]["Parts"])
        text = self.words.heredoc(redirection.get("Hdoc") or {}, quoted)
        return re.sub(r"^\t+", "", text, flags=re.MULTILINE) if redirection["Op"] == "<<-" else text

    def _command(self, command: Node, stdin: str) -> None:
        kind = command["Type"]
        if kind == "CallExpr":
            self._call(command, stdin)
        elif kind == "BinaryCmd":
            self._binary(command, stdin)
        elif kind == "Block":
            self._run_all(command.get("Stmts"), stdin)
        elif kind == "Subshell":
            self._in_subshell(lambda: self._run_all(command.get("Stmts"), stdin))
        elif kind == "IfClause":
            self._if(command)
        elif kind == "ForClause":
            self._for(command)
        elif kind == "WhileClause":
            self._while(command)
        elif kind == "CaseClause":
            self._case(command)
        elif kind == "FuncDecl":
            self.functions[command["Name"]["Value"]] = command["Body"]
        elif kind == "DeclClause":
            self.status = 0
            declare(self.words, command)
        elif kind == "TestClause":
            self.status = int(not self.test_tree(command["X"]))
        elif kind == "ArithmCmd":
            self.status = int(not self.words.arithmetic(command["X"]))
        elif kind == "LetClause":
            self.status = int(not [self.words.arithmetic(exp) for exp in command["Exprs"]][-1])
        elif kind == "TimeClause" and command.get("Stmt"):
            self._run(command["Stmt"], stdin)

    def _binary(self, command: Node, stdin: str) -> None:
        if command["Op"] in ("|", "|&"):
            output = self._captured(lambda: self._in_subshell(lambda: self._run(command["X"], stdin)))
            self._in_subshell(lambda: self._run(command["Y"], output))
            return
        missing = dict(self.evaluation.missing_sources)
        succeeded = self._run(command["X"], stdin) == 0
        if command["Op"] == "||":
            # `source FILE || …` handles a file that does not exist.
            self.evaluation.missing_sources = missing
        if succeeded == (command["Op"] == "&&"):
            self._run(command["Y"], stdin)

    def _in_subshell(self, action: Callable[[], int]) -> int:
        """Run an action as in a subshell: its variables, folder and functions are discarded, and exit ends it only."""
        variables, functions = self.variables, dict(self.functions)
        values, exported = dict(variables.values), set(variables.exported)
        arguments, nullglob = variables.arguments, variables.nullglob
        try:
            action()
        except LeaveError:
            pass
        finally:
            # In place: an assignment whose value contains the subshell holds the dictionary.
            variables.values.clear()
            variables.values |= values
            variables.exported, variables.arguments, variables.nullglob = exported, arguments, nullglob
            self.functions = functions
        self.variables.values["?"] = str(self.status)
        return self.status

    def _if(self, clause: Node) -> None:
        while clause:
            if not clause.get("Cond") or self._run_all(clause["Cond"]) == 0:
                self.status = 0
                self._run_all(clause.get("Then"))
                return
            clause = clause.get("Else") or {}
        self.status = 0

    def _for(self, clause: Node) -> None:
        loop = clause["Loop"]
        if loop["Type"] == "WordIter":
            name = loop["Name"]["Value"]
            items = loop.get("Items")
            values = (
                self.variables.arguments if items is None else [f for word in items for f in self.words.fields(word)]
            )
            for value in values:
                self.variables.values[name] = value
                if not self._body(clause["Do"]):
                    break
            return
        if loop.get("Init"):
            self.words.arithmetic(loop["Init"])
        while not loop.get("Cond") or self.words.arithmetic(loop["Cond"]):
            if not self._body(clause["Do"]):
                break
            if loop.get("Post"):
                self.words.arithmetic(loop["Post"])

    def _while(self, clause: Node) -> None:
        while True:
            started = len(self.evaluation.commands)
            holds = self._run_all(clause["Cond"]) == 0
            # The status of a recorded command is unknown: one pass shows what the loop starts.
            once = len(self.evaluation.commands) > started
            if holds == bool(clause.get("Until")) or not self._body(clause["Do"]) or once:
                return

    def _body(self, statements: Sequence[Node]) -> bool:
        """Run a loop's body; return whether the loop continues."""
        try:
            self._run_all(statements)
        except LeaveError as leave:
            if leave.kind not in ("break", "continue"):
                raise
            if leave.count > 1:
                raise LeaveError(leave.kind, leave.count - 1) from None
            return leave.kind == "continue"
        return True

    def _case(self, clause: Node) -> None:
        text = self.words.text(clause["Word"])
        self.status = 0
        for item in clause.get("Items") or ():
            if any(matches(text, self.words.pattern(pattern)) for pattern in item["Patterns"]):
                self._run_all(item.get("Stmts"))
                return

    def _call(self, command: Node, stdin: str) -> None:
        arguments = [text for word in command.get("Args") or () for text in self.words.fields(word)]
        assignments = command.get("Assigns") or ()
        self.status = 0
        if not arguments:
            for assignment in assignments:
                assign(self.words, assignment)
            return
        saved = {a["Name"]["Value"]: self.variables.values.get(a["Name"]["Value"]) for a in assignments}
        added = set(saved) - self.variables.exported
        for assignment in assignments:
            assign(self.words, assignment)
        self.variables.exported |= added
        try:
            self.execute(arguments, stdin)
        finally:
            self.variables.exported -= added
            for name, value in saved.items():
                if value is None:
                    self.variables.values.pop(name, None)
                else:
                    self.variables.values[name] = value

    def execute(self, arguments: list[str], stdin: str) -> None:
        """Run a function or builtin, or record a program."""
        name, rest = arguments[0], arguments[1:]
        if name in self.functions:
            self._call_function(self.functions[name], rest, stdin)
        elif (builtin := BUILTINS.get(name)) is not None:
            builtin(self, rest, stdin)
        elif name in PURE_TOOLS:
            self.write(self._tool(arguments, stdin))
        elif name not in IGNORED:
            self._start(arguments, stdin)

    def _start(self, arguments: list[str], stdin: str) -> None:
        """Record a command, or those that a shell within it starts."""
        if arguments[0].startswith("--"):
            self.evaluation.notes.append(
                f"line {self._line}: the flag {arguments[0]} is taken for a program, since a line end before it ends "
                'the command; end that line with a backslash (also in the text of bash -c "…")'
            )
        for place, argument in enumerate(arguments):
            if Path(argument).name in ("bash", "sh") and place + 1 < len(arguments):
                if self._nested(arguments, place):
                    return
                break
        self.evaluation.commands.append(StartedCommand((*self._prefix, *arguments), self._line))
        self.write(unknown_text(" ".join(arguments[:2])))

    def _nested(self, arguments: list[str], place: int) -> bool:
        """Evaluate the script of `bash -c TEXT` or `bash FILE`; return False if there is none to read."""
        options = place + 1
        while options < len(arguments) and re.fullmatch(r"-[a-z]+", arguments[options]):
            options += 1
            if arguments[options - 1].endswith("c"):
                break
        if options >= len(arguments) or self._depth >= MAX_NESTING:
            return False
        inline = arguments[options - 1].endswith("c") and options > place + 1
        text = arguments[options] if inline else self.content(self.path(arguments[options]))
        if text is None:
            return False
        given = arguments[options + 2 :] if inline else arguments[options + 1 :]
        variables = Variables(
            {
                **self.environment(),
                "PWD": self.folder(),
                "SLURM_PROCID": "0",
                "SLURM_LOCALID": "0",
                "SLURM_NODEID": "0",
            },
            set(self.variables.exported) | {"SLURM_PROCID", "SLURM_LOCALID", "SLURM_NODEID"},
            arguments=given,
            missing=self.evaluation.missing,
        )
        prefix = (*self._prefix, *arguments[:place])
        line = self._line
        before = len(self.evaluation.commands)
        Shell(variables, self.evaluation, prefix, self._depth + 1).run_text(text, f"the script of line {line}")
        for i in range(before, len(self.evaluation.commands)):
            self.evaluation.commands[i] = StartedCommand(self.evaluation.commands[i].arguments, line)
        return True

    def _call_function(self, body: Node, arguments: list[str], stdin: str) -> None:
        outer, self.variables.arguments = self.variables.arguments, arguments
        self._depth += 1
        try:
            if self._depth > MAX_NESTING:
                raise LeaveError("exit")
            self._run(body, stdin)
        except LeaveError as leave:
            if leave.kind != "return":
                raise
        finally:
            self._depth -= 1
            self.variables.arguments = outer

    def _substituted(self, part: Node) -> str:
        statements = part.get("Stmts") or []
        if len(statements) == 1 and not statements[0].get("Cmd") and statements[0].get("Redirs"):
            return self.read(self.words.text(statements[0]["Redirs"][0]["Word"]))
        return self._captured(lambda: self._in_subshell(lambda: self._run_all(statements)))

    def _captured(self, action: Callable[[], int | None]) -> str:
        outer, self.output = self.output, []
        try:
            action()
            return "".join(self.output)
        finally:
            self.output = outer

    def _tool(self, arguments: list[str], stdin: str) -> str:
        sources = [source for text in (*arguments, stdin) for source in unknown_sources(text)]
        if sources or shutil.which(arguments[0]) is None:
            return unknown_text(sources[0] if sources else " ".join(arguments))
        try:
            done = subprocess.run(
                arguments,
                input=stdin,
                capture_output=True,
                encoding="utf-8",
                check=False,
                timeout=10,
                cwd=self._folder_or_none(),
            )
        except (OSError, subprocess.TimeoutExpired, ValueError):
            return unknown_text(" ".join(arguments))
        self.status = done.returncode
        return done.stdout

    def _arithmetic_tree(self, text: str) -> Node:
        tree: Node = parse_script(f"(({text}))", "an arithmetic expression")[0]["Cmd"]["X"]
        return tree
