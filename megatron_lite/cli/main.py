"""Command dispatcher of `megatron-lite`: finds and runs a command, prints user errors as one paragraph."""

from __future__ import annotations

import difflib
import importlib
import io
import keyword
import os
import shutil
import signal
import sys
import textwrap
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from types import FrameType, ModuleType

from megatron_lite import __version__
from megatron_lite.backend.environment import Launch, host_name, read_launch
from megatron_lite.errors import MegatronLiteError

COMMANDS = (
    "train",
    "explain",
    "rehearse",
    "generate",
    "evaluate",
    "preprocess",
    "train-tokenizer",
    "merge",
    "data",
    "checkpoint",
    "import",
    "export",
    "rollback",
    "schedule",
    "curve",
)
EXIT_FAILURE = 1
EXIT_USAGE = 2
EXIT_INTERRUPTED = 130


def main(argv: list[str] | None = None) -> int:
    """Runs one command.

    Args:
        argv: the words after the program's name; None takes them from sys.argv.

    Returns:
        The exit code: 0 done, 1 a failure that was explained, 2 unusable arguments, 130 interrupted.
    """
    if isinstance(sys.stdout, io.TextIOWrapper):
        # Without UTF-8, an ellipsis is printed as \u2026, as on stderr, instead of ending the program.
        sys.stdout.reconfigure(errors="backslashreplace")
    words = sys.argv[1:] if argv is None else argv
    if not words or words[0] in ("-h", "--help"):
        print(_overview())
        return 0 if words else EXIT_USAGE
    if words[0] == "--version":
        print(f"megatron-lite {__version__}")
        return 0
    name = words[0].replace("_", "-")
    if name not in COMMANDS:
        nearest = difflib.get_close_matches(name, COMMANDS, n=1)
        hint = f"Did you mean {nearest[0]}?" if nearest else "See megatron-lite --help."
        print(f"megatron-lite: there is no command {words[0]!r}. {hint}", file=sys.stderr)
        return EXIT_USAGE
    return run_command(_load(name), words[1:])


def run_command(command: ModuleType, argv: list[str]) -> int:
    """Calls the command and prints the errors that are the user's to fix without a traceback."""
    try:
        with _terminable():
            code: int = command.run(argv)
    except MegatronLiteError as error:
        launch = _launch()
        if getattr(command, "SEVERAL_RANKS", False) and launch is not None and launch.world_size > 1:
            with suppress(KeyboardInterrupt):
                _tell_other_ranks(error, launch)
        else:
            _print_error(error)
        return EXIT_FAILURE
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        print(f"{_origin()}{_out_of_memory(error)}", file=sys.stderr)
        return EXIT_FAILURE
    except KeyboardInterrupt:
        launch = _launch()
        if launch is None or launch.rank == 0:
            sys.stderr.write("interrupted\n")
        return EXIT_INTERRUPTED
    except BrokenPipeError:
        # `megatron-lite data inspect … | head`: the reader has what it wanted. Python would complain once more at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    return code


@contextmanager
def _terminable() -> Iterator[None]:
    """Let SIGTERM end a command as Ctrl-C does, so that it leaves nothing half-written; then the process dies of it."""
    received = False

    def stop(number: int, frame: FrameType | None) -> None:
        nonlocal received
        received = True
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
        if received:
            print("SIGTERM received: stopped", file=sys.stderr, flush=True)
            os.kill(os.getpid(), signal.SIGTERM)


def is_out_of_memory(error: Exception) -> bool:
    """Whether memory ran out: Python's or numpy's, or a device's or the host's as PyTorch reports it."""
    words = ("DefaultCPUAllocator", "out of memory")
    return isinstance(error, MemoryError) or any(word in str(error) for word in words)


def _out_of_memory(error: Exception) -> str:
    detail = f": {str(error).splitlines()[0]}" if str(error) else ""
    return (
        f"MemoryError: The process ran out of memory{detail}. Ask for less at a time: fewer samples, a smaller model, "
        "--seq-length or --micro-batch-size, or fewer processes on this machine; `megatron-lite explain` with the same "
        "flags tells sizes"
    )


def _load(name: str) -> ModuleType:
    # Python's own words cannot be module names: import is in import_.py.
    module = f"{name}_" if keyword.iskeyword(name) else name.replace("-", "_")
    return importlib.import_module(f"megatron_lite.cli.{module}")


def _tell_other_ranks(error: MegatronLiteError, launch: Launch) -> None:
    """Print an error in one rank of a job; end the ranks that wait for this one, if it failed before they met."""
    if error.shared or error.silent:
        _print_error(error)
        return
    from megatron_lite.backend.rendezvous import REPORT_SECONDS, SEARCH_SECONDS, Rendezvous

    told = False
    try:
        with suppress(MegatronLiteError, OSError), Rendezvous(launch, SEARCH_SECONDS) as meeting:
            meeting.report_failure(error)
            told = True
            _print_error(error)
            meeting.wait_until_reported()
    finally:
        if not told:
            _print_error(error)
    if not told:
        # Rank 0 may still be starting.
        with suppress(MegatronLiteError, OSError), Rendezvous(launch, REPORT_SECONDS - SEARCH_SECONDS) as meeting:
            meeting.report_failure(error)


def _print_error(error: MegatronLiteError) -> None:
    if not error.silent:
        # In one write: the ranks of a job share a terminal.
        sys.stderr.write(f"{_origin()}{type(error).__name__}: {error}\n")
        sys.stderr.flush()


def _launch() -> Launch | None:
    try:
        return read_launch()
    except MegatronLiteError:
        return None


def _origin() -> str:
    """Host and rank, in a job of several ranks: among 256 interleaved outputs they are what one looks for."""
    launch = _launch()
    if launch is None:
        return f"[{host_name()}] "
    return f"[{launch.host} rank {launch.rank}] " if launch.world_size > 1 else ""


def _overview() -> str:
    lines = ["usage: megatron-lite <command> …", "", "commands:"]
    width = min(shutil.get_terminal_size().columns, 120)
    for name in COMMANDS:
        lines += textwrap.wrap(_load(name).SUMMARY, width, initial_indent=f"  {name:<16} ", subsequent_indent=" " * 19)
    lines += ["", "megatron-lite <command> --help says more. pretrain_gpt.py: megatron-lite train."]
    return "\n".join(lines)
