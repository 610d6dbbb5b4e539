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
from megatron_lite.cli.standard_output import discard_output, flush_output
from megatron_lite.errors import MegatronLiteError

COMMANDS = (
    "train",
    "explain",
    "plan",
    "rehearse",
    "doctor",
    "devices",
    "generate",
    "evaluate",
    "preprocess",
    "train-tokenizer",
    "merge",
    "data",
    "checkpoint",
    "upscale",
    "import",
    "export",
    "rollback",
    "schedule",
    "slurm",
    "watch",
    "sync",
    "curve",
    "report",
)
EXIT_FAILURE = 1
EXIT_USAGE = 2
EXIT_INTERRUPTED = 130


def main(argv: list[str] | None = None) -> int:
    """Run one command.

    Args:
        argv: command-line arguments without the program name; None: those of sys.argv.

    Returns:
        Exit code: 0 success, 1 failure with an error message, 2 usage error, 130 interrupted.
    """
    if isinstance(sys.stdout, io.TextIOWrapper):
        # Without UTF-8, an ellipsis is printed as \u2026, as on stderr, instead of raising an error.
        sys.stdout.reconfigure(errors="backslashreplace")
    args = sys.argv[1:] if argv is None else argv
    if not args or args[0] in ("-h", "--help"):
        print(_overview())
        return 0 if args else EXIT_USAGE
    if args[0] == "--version":
        print(f"megatron-lite {__version__}")
        return 0
    name = args[0].replace("_", "-")
    if name not in COMMANDS:
        nearest = difflib.get_close_matches(name, COMMANDS, n=1)
        hint = f"Did you mean {nearest[0]}?" if nearest else "See megatron-lite --help."
        print(f"megatron-lite: unknown command {args[0]!r}. {hint}", file=sys.stderr)
        return EXIT_USAGE
    return run_command(_load(name), args[1:])


def run_command(command: ModuleType, argv: list[str]) -> int:
    """Call the command; print a MegatronLiteError without traceback."""
    try:
        with _terminable():
            code = _run_and_flush(command, argv)
    except MegatronLiteError as error:
        launch = _launch()
        if getattr(command, "SEVERAL_RANKS", False) and launch is not None and launch.world_size > 1:
            with suppress(KeyboardInterrupt):
                _report_to_other_ranks(error, launch)
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
        discard_output()  # `megatron-lite data inspect … | head`
        return 0
    return code


def _run_and_flush(command: ModuleType, argv: list[str]) -> int:
    try:
        code: int = command.run(argv)
    except BrokenPipeError:
        raise
    except OSError:
        # If standard output is at fault, an empty line fails, too; otherwise the error is the command's own.
        flush_output("\n")
        raise
    flush_output()
    return code


@contextmanager
def _terminable() -> Iterator[None]:
    """Handle SIGTERM as Ctrl-C, so that a command cleans up; afterwards the process terminates by SIGTERM."""
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
    """Return whether memory ran out: MemoryError, or PyTorch's error for a device or the host."""
    messages = ("DefaultCPUAllocator", "out of memory")
    return isinstance(error, MemoryError) or any(message in str(error) for message in messages)


def _out_of_memory(error: Exception) -> str:
    detail = f": {str(error).splitlines()[0]}" if str(error) else ""
    return (
        f"MemoryError: The process ran out of memory{detail}. Use fewer samples, a smaller model, --seq-length or "
        "--micro-batch-size, or fewer processes on this machine; `megatron-lite explain` shows sizes"
    )


def _load(name: str) -> ModuleType:
    # Python keywords are no module names: import is in import_.py.
    module = f"{name}_" if keyword.iskeyword(name) else name.replace("-", "_")
    return importlib.import_module(f"megatron_lite.cli.{module}")


def _report_to_other_ranks(error: MegatronLiteError, launch: Launch) -> None:
    """Print an error on one rank of a job; before the rendezvous, also end the ranks that wait for this one."""
    if error.shared or error.silent:
        _print_error(error)
        return
    from megatron_lite.backend.rendezvous import REPORT_SECONDS, SEARCH_SECONDS, Rendezvous

    reported = False
    try:
        with suppress(MegatronLiteError, OSError), Rendezvous(launch, SEARCH_SECONDS) as meeting:
            meeting.report_failure(error)
            reported = True
            _print_error(error)
            meeting.wait_until_reported()
    finally:
        if not reported:
            _print_error(error)
    if not reported:
        # Rank 0 may still be starting.
        with suppress(MegatronLiteError, OSError), Rendezvous(launch, REPORT_SECONDS - SEARCH_SECONDS) as meeting:
            meeting.report_failure(error)


def _print_error(error: MegatronLiteError) -> None:
    if not error.silent:
        # One write, because the ranks of a job share a terminal.
        sys.stderr.write(f"{_origin()}{type(error).__name__}: {error}\n")
        sys.stderr.flush()


def _launch() -> Launch | None:
    try:
        return read_launch()
    except MegatronLiteError:
        return None


def _origin() -> str:
    """Return the prefix with host and rank for jobs of several ranks, whose outputs are interleaved."""
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
