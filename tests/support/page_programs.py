"""Stand-ins at toy size for the programs that documented commands call: megatron-lite, python, torchrun, pip.

A command of megatron_lite runs in this process, because it has imported torch; several ranks are forked from it
(support/page_ranks.py). Training, ranks and node checks get toy sizes (support/page_sizes.py). "…" in a command stands
for the flags of a toy run. What cannot run here is parsed by its own parser, and listed in Programs.parsed with its
kind.
"""

import argparse
import contextlib
import importlib.util
import io
import re
import runpy
import sys
import traceback
from contextlib import suppress
from pathlib import Path
from unittest import mock

from support.page_ranks import LAUNCHERS, forked_ranks, run_on_ranks
from support.page_sizes import TOY, on_few_ranks, short_node_check, toy_flags
from support.trainer import Result, command

from megatron_lite.cli.main import COMMANDS
from megatron_lite.cli.parser import Parser
from megatron_lite.config.arguments import parse_command, parse_run
from megatron_lite.config.launcher import read_command
from megatron_lite.config.table import flags_by_spelling, spelling
from megatron_lite.errors import ConfigError

ROOT = Path(__file__).resolve().parents[2]
SCRIPTS = {
    "pretrain_gpt.py": "train",
    "tools/preprocess_data.py": "preprocess",
    "tools/train_tokenizer.py": "train-tokenizer",
    "tools/merge_datasets.py": "merge",
    "tools/merge_preprocessed_data.py": "merge",
}
TRAINING = ("train", "explain", "rehearse")
PLACEHOLDERS = {"…", "MORE", "FLAGS", "JOB_FLAGS"}
# What … stands for in commands that are no training.
REST = {"preprocess": ("--tokenizer-model", "tokenizer"), "evaluate": ("--text", "book.txt")}
LONG = ("--train-iters", "20000")
HERE = ("--device", "cpu", "--num-threads", "1")
# Exit codes that report a finding, not a failure of the command.
FINDINGS = {"watch": 3, "checkpoint diff": 1}
INTERRUPTED = {"watch": 130}
DONE = Result(0, "", "")


class Terminal(io.StringIO):
    """Standard input of a user who types a prompt and then Ctrl-D."""

    def isatty(self):
        return True


class Programs:
    """Programs by name.

    Args:
        files: maker of toy files.
        folder: holds a stand-in for each program.
    """

    def __init__(self, files, folder):
        self.files = files
        self.folder = folder
        self.parsed = []
        self.by_name = {
            "megatron-lite": self.megatron_lite,
            "python": self.python,
            "python3": self.python,
            "pip": self.pip,
            "make": self.make,
            "hf": lambda args, stdin: self.parse_only("hf", args),
            "git": lambda args, stdin: self.parse_only("git", args),
            "flags": self.flags,
            **{name: lambda args, stdin, name=name: self.launch(name, args, stdin) for name in LAUNCHERS},
        }

    def parse_only(self, kind, args):
        """Note that a command is not run."""
        self.parsed.append((kind, " ".join(args)))
        return DONE

    def answer(self, argv, stdin):
        """Return the Result of a program, given its command line and standard input (None: not a pipe)."""
        try:
            with forked_ranks(), short_node_check():
                return self.by_name[argv[0]](argv[1:], stdin)
        except ConfigError as error:
            return Result(1, "", f"{error}\n")
        except Exception:
            return Result(1, "", traceback.format_exc())

    def megatron_lite(self, args, stdin, launcher=None):
        """Run a command, on the ranks of a launcher if there is one."""
        if not args or args[0] not in COMMANDS or "--help" in args:
            return command(*args)
        name, *rest = args
        if name in TRAINING:
            return self.training(name, rest)
        if name == "plan":
            few = ("--num-layers", "2", "--world-size", "4") if "--search" in rest else ()
            rest = [*self.completed(rest, "--global-batch-size", "512"), *few]
        elif PLACEHOLDERS.intersection(rest) and name in ("data", "doctor"):  # data samples JOB_FLAGS
            rest = [*rest[:1], *self.completed(rest[1:], *LONG)]
        elif "…" in rest:
            rest = [word for word in rest if word != "…"] + list(REST.get(name, ()))
        if name == "evaluate" and "--tasks" in rest and "--include-path" not in rest:
            self.parse_only("evaluate --tasks", rest)
            return parse(name, *rest)
        self.refuse_elsewhere(rest)
        few, ranks = on_few_ranks([*rest, *TOY.get(name, ())])
        if launcher:
            return run_on_ranks([name, *few], LAUNCHERS[launcher](ranks), stdin or "")
        with contextlib.ExitStack() as patches:
            patches.enter_context(
                mock.patch.object(sys, "stdin", Terminal("Once\n") if stdin is None else io.StringIO(stdin))
            )
            if name == "watch" and "--once" not in rest:  # Ctrl-C after the first report
                patches.enter_context(mock.patch("time.sleep", side_effect=KeyboardInterrupt))
            result = command(name, *few)
        found = FINDINGS.get(name, FINDINGS.get(" ".join([name, *rest[:1]])))
        return Result(0, result.out, result.err) if result.code in (found, INTERRUPTED.get(name)) else result

    def training(self, name, args, launcher=None):
        """Parse a training command as it is, then run it at toy size, on the ranks of a launcher if there is one."""
        args = self.completed(args)
        if launcher:
            parsed = parse_command([launcher, *args])
            args = [*read_command([launcher, *args]).flags]
        elif name == "train":
            parsed = parse_run(args)
        else:
            parsed = parse_command([word for word in args if word != "--json"])
        if parsed.missing:
            raise ConfigError("; ".join(map(str, parsed.missing)), fix="Complete the command, or end it with …")
        config = parsed.config
        if name != "train":
            return command(name, *args, *HERE)
        for kind, package, needed in (
            ("xla", "torch_xla", config.runtime.device == "xla"),
            ("deepspeed", "deepspeed", config.runtime.engine == "deepspeed"),
        ):
            if needed and not _is_installed(package):
                return self.parse_only(kind, args)
        self.refuse_elsewhere(args)
        here = HERE if config.runtime.device != "xla" else ()
        few, ranks = on_few_ranks([*args, *toy_flags(config, args), *here])
        if launcher:
            return run_on_ranks(["train", *few], LAUNCHERS[launcher](ranks))
        return command("train", *few)

    def refuse_elsewhere(self, args):
        """Refuse to run a command with a path outside of the folders of the test."""
        here = (str(Path.cwd()), self.files.root)
        paths = [word for word in args if word.startswith("/") and not word.startswith(here)]
        if paths:
            raise ConfigError(f"{paths[0]} is outside of the test's folder", fix="Add <!-- test: replace OLD NEW -->")

    def completed(self, args, *more):
        """Return the arguments with the flags of a toy run, and `more`, in place of a placeholder.

        They come before the given flags, which take precedence.
        """
        if not PLACEHOLDERS.intersection(args):
            return list(args)
        given = [word for word in args if word not in PLACEHOLDERS]
        start = next((place + 1 for place, word in enumerate(given) if word.endswith("pretrain_gpt.py")), 0)
        return [*given[:start], *self._toy_flags(given), *more, *given[start:]]

    def _toy_flags(self, given):
        base = [*(self.files.job(shape=()) if "--preset" in given else self.files.job())]
        excluded = {
            "--data-path": any(word.startswith(("--train-", "--mock-data")) and "iters" not in word for word in given),
            "--split": any("weighted-split" in word or word == "--train-data-path" for word in given),
            "--lr": "--adafactor-relative-step" in given,
            "--train-iters": "--epochs" in given or "--train-samples" in given,
        }
        for name in (name for name, out in excluded.items() if out):
            place = base.index(name)
            del base[place : place + 2]
        return base

    def flags(self, args, stdin):
        """Parse training flags that stand alone in a block."""
        if not args[0].startswith("--"):
            return Result(127, "", f"no stand-in for the program {args[0]} (tests/support/page_programs.py)\n")
        save = () if any(word.startswith("--save") for word in args) else ("--save-interval", "2")
        parse_run(self.completed(["…", "--save", "run", *save, *args], *LONG))
        return self.parse_only("flags", args)

    def launch(self, launcher, argv, stdin):
        """Run the command that a launcher starts, on a few ranks."""
        for place, word in enumerate(argv):
            program = word == "megatron-lite" or (word == "megatron_lite" and argv[place - 1] == "-m")
            if program and argv[place + 1] not in TRAINING:
                return self.megatron_lite(argv[place + 1 :], stdin, launcher)
        return self.training("train", argv, launcher)

    def python(self, args, stdin):
        """Run a script or module of the project, or a program given on the command line."""
        if args[:2] == ["-m", "megatron_lite"]:
            return self.megatron_lite(args[2:], stdin)
        if args[0] == "-c":
            return _run_here(lambda: exec(compile(args[1], "python -c", "exec"), {}), ["-c", *args[2:]])
        if args[:2] == ["-m", "venv"]:
            return self.environment(Path(args[-1]) / "bin")
        path = Path(args[0])
        name = next((name for script, name in SCRIPTS.items() if path.as_posix().endswith(script)), None)
        if name:
            return self.megatron_lite([name, *args[1:]], stdin)
        return _run_here(lambda: runpy.run_path(str(path), run_name="__main__"), args)

    def environment(self, folder):
        """Make a folder with the programs of a virtual environment."""
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "activate").touch()
        for name in ("pip", "python"):
            if not (folder / name).exists():
                (folder / name).symlink_to(self.folder / name)
        return DONE

    def pip(self, args, stdin):
        """Check the extras of an installation."""
        setup = (ROOT / "setup.py").read_text(encoding="utf-8")
        extras = [name for word in args for group in re.findall(r"\.\[(.+?)\]", word) for name in group.split(",")]
        unknown = [name for name in extras if f'"{name}"' not in setup]
        return Result(1, "", f"setup.py has no extra {unknown}\n") if unknown else self.parse_only("pip", args)

    def make(self, args, stdin):
        """Check the targets."""
        makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
        targets = [word for word in args if "=" not in word]
        unknown = [target for target in targets if not re.search(rf"^{target}:", makefile, re.MULTILINE)]
        return Result(1, "", f"the Makefile has no target {unknown}\n") if unknown else self.parse_only("make", args)


def _is_installed(package):
    found = importlib.util.find_spec(package)
    return (
        found is not None and found.origin is not None
    )  # a folder of the same name, as tests/deepspeed, has no origin


def _run_here(program, argv):
    """Call a program in this process, with its own sys.argv and output; return the Result."""
    out, err, code = io.StringIO(), io.StringIO(), 0
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), mock.patch.object(sys, "argv", argv):
        try:
            program()
        except SystemExit as left:
            code = left.code or 0
    return Result(code, out.getvalue(), err.getvalue())


class _ParsedError(Exception):
    """The command line was parsed without an error."""


def parse(*argv):
    """Parse a command line by the parser of its command, without running it; return the Result."""
    inner = 0
    parse_known = Parser.parse_known_args

    def parse_all(self, args=None, namespace=None):
        nonlocal inner
        inner += 1
        argparse.ArgumentParser.parse_args(self, args, namespace)
        raise _ParsedError

    def parse_some(self, args=None, namespace=None):
        nonlocal inner
        inner += 1
        found, rest = parse_known(self, args, namespace)
        inner -= 1
        if inner:
            return found, rest
        unknown = [word for word in rest if word.startswith("--") and spelling(word) not in flags_by_spelling()]
        if unknown:
            self.error(f"unknown flags {unknown}")
        raise _ParsedError

    with mock.patch.multiple(Parser, parse_args=parse_all, parse_known_args=parse_some), suppress(_ParsedError):
        return command(*argv)
    return DONE
