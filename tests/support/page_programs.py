"""Programs that the commands of the documentation name: run at toy size in this process, or parsed only.

A command of megatron_lite runs here, because this process has imported torch. One that needs several ranks, a cluster,
a terminal or the network is parsed only, by its own parser. Training gets toy sizes at the end of its command line: of
repeated flags the last counts. "…" in a command stands for the flags of a toy run.
"""

import argparse
import io
import re
import subprocess
import sys
from contextlib import suppress
from pathlib import Path
from unittest import mock

from support.toy_files import SIZES
from support.trainer import Result, command

from megatron_lite.cli.main import COMMANDS
from megatron_lite.cli.parser import Parser
from megatron_lite.config.arguments import parse_command, parse_run
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
REST = {"preprocess": ("--tokenizer-model", "tokenizer")}
SEVERAL_RANKS = {
    *("--tensor-model-parallel-size", "--pipeline-model-parallel-size", "--context-parallel-size", "--ranks-per-task"),
}
SHORT = (
    *("--train-iters", "4", "--lr-warmup-iters", "0", "--save-interval", "2", "--log-interval", "1"),
    *("--eval-interval", "2", "--eval-iters", "1"),
)
LONG = ("--train-iters", "20000")
HERE = ("--device", "cpu", "--num-threads", "1")
# Exit codes that report a finding, not a failure of the command.
FINDINGS = {"watch": 3, "checkpoint diff": 1}
CLUSTER = ("sbatch", "squeue", "scancel", "scontrol", "sinfo", "sacctmgr", "ip")
LAUNCHERS = ("torchrun", "srun", "mpirun", "mpiexec")
DONE = Result(0, "", "")


class Programs:
    """Programs by name.

    Args:
        files: maker of toy files.
        folder: holds a stand-in for each program.
    """

    def __init__(self, files, folder):
        self.files = files
        self.folder = folder
        self.parsed_only = False
        self.by_name = {
            "megatron-lite": self.megatron_lite,
            "python": self.python,
            "python3": self.python,
            "bash": self.script,
            "sh": self.script,
            "pip": self.pip,
            "make": self.make,
            "hf": lambda args, stdin: DONE,
            "git": lambda args, stdin: DONE,
            "flags": self.flags,
            **dict.fromkeys(CLUSTER, lambda args, stdin: DONE),
            **{name: lambda args, stdin, name=name: self.launch([name, *args]) for name in LAUNCHERS},
        }

    def answer(self, argv, stdin):
        """Return the Result of a program, given its command line and standard input (None: not a pipe)."""
        try:
            return self.by_name[argv[0]](argv[1:], stdin)
        except ConfigError as error:
            return Result(1, "", f"{error}\n")

    def megatron_lite(self, args, stdin):
        """Run a command, or parse it if it cannot run here."""
        if not args or args[0] not in COMMANDS or "--help" in args:
            return command(*args)
        name, *rest = args
        if name in TRAINING:
            return self.training(name, rest)
        if name == "plan":
            few = ("--num-layers", "2", "--world-size", "4") if "--search" in rest else ()
            rest = [*self.completed(rest, "--global-batch-size", "512"), *few]
        elif PLACEHOLDERS.intersection(rest) and name == "data":  # data samples JOB_FLAGS
            rest = [*rest[:1], *self.completed(rest[1:], *LONG)]
        elif "…" in rest:
            rest = [word for word in rest if word != "…"] + list(REST.get(name, ()))
        if self.parsed_only or _needs_more(name, rest, stdin):
            return parse(name, *rest)
        self.refuse_elsewhere(rest)
        with mock.patch.object(sys, "stdin", io.StringIO(stdin or "")):
            result = command(name, *rest)
        found = FINDINGS.get(name, FINDINGS.get(" ".join([name, *rest[:1]])))
        return Result(0, result.out, result.err) if result.code == found else result

    def training(self, name, args):
        """Parse a training command as it is; run it at toy size if it has one rank."""
        args = self.completed(args)
        parsed = parse_run(args) if name == "train" else parse_command([word for word in args if word != "--json"])
        if parsed.missing:
            raise ConfigError("; ".join(map(str, parsed.missing)), fix="Complete the command, or end it with …")
        if self.parsed_only or (name == "train" and parsed.config.parallel.world_size > 1):
            return DONE
        self.refuse_elsewhere(args)
        toy = (*SIZES, *SHORT) if name == "train" and parsed.config.model.hidden_size > 64 else ()
        return command(name, *args, *toy, *HERE)

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
        base = [*self.files.job()]
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
        return DONE

    def launch(self, argv):
        """Parse the command that a launcher starts on several ranks."""
        for place, word in enumerate(argv):
            if word == "megatron-lite" or (word == "megatron_lite" and argv[place - 1] == "-m"):
                name, *rest = argv[place + 1 :]
                if name not in TRAINING:
                    return parse(name, *(word for word in rest if word not in PLACEHOLDERS))
        parsed = parse_command(self.completed(argv))
        return Result(1, "", "\n".join(map(str, parsed.missing))) if parsed.missing else DONE

    def python(self, args, stdin):
        """Run a script or module of the project; check that others exist, and their flags."""
        if args[:2] == ["-m", "megatron_lite"]:
            return self.megatron_lite(args[2:], stdin)
        if args[0] == "-c":
            compile(args[1], "python -c", "exec")
            return DONE
        if args[:2] == ["-m", "venv"]:
            return self.environment(Path(args[2]) / "bin")
        path = Path(args[0])
        name = next((name for script, name in SCRIPTS.items() if path.as_posix().endswith(script)), None)
        if name:
            return self.megatron_lite([name, *args[1:]], stdin)
        source = path.read_text(encoding="utf-8")
        unknown = [word for word in args[1:] if word.startswith("--") and f'"{word.partition("=")[0]}"' not in source]
        return Result(1, "", f"{path} has no {unknown}\n") if unknown else DONE

    def environment(self, folder):
        """Make a folder with the programs of a virtual environment."""
        folder.mkdir(parents=True)
        (folder / "activate").touch()
        for name in ("pip", "python"):
            (folder / name).symlink_to(self.folder / name)
        return DONE

    def script(self, args, stdin):
        """Check the syntax of a shell script."""
        ended = subprocess.run(["/bin/bash", "-n", args[0]], capture_output=True, text=True, check=False)
        return Result(ended.returncode, ended.stdout, ended.stderr)

    def pip(self, args, stdin):
        """Check the extras of an installation."""
        setup = (ROOT / "setup.py").read_text(encoding="utf-8")
        extras = [name for word in args for group in re.findall(r"\.\[(.+?)\]", word) for name in group.split(",")]
        unknown = [name for name in extras if f'"{name}"' not in setup]
        return Result(1, "", f"setup.py has no extra {unknown}\n") if unknown else DONE

    def make(self, args, stdin):
        """Check the targets."""
        makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
        targets = [word for word in args if "=" not in word]
        unknown = [target for target in targets if not re.search(rf"^{target}:", makefile, re.MULTILINE)]
        return Result(1, "", f"the Makefile has no target {unknown}\n") if unknown else DONE


def _needs_more(name, args, stdin):
    """Return whether a command needs several ranks, a terminal, a cluster, the network or a long time."""
    given = {word.partition("=")[0] for word in args}
    hub = any(re.fullmatch(r"(hf:)?(USER|you|your-name)/[\w.-]+", word) for word in args)
    return (
        bool(given & SEVERAL_RANKS)
        or (hub and "--dry-run" not in given)
        or {
            "doctor": True,
            "evaluate": "--tasks" in given,
            "generate": stdin is None
            and not any(word.startswith(("--prompt", "--input", "--uncond")) for word in given),
            "slurm": "--dry-run" not in given,
            "watch": "--once" not in given,
        }.get(name, False)
    )


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
