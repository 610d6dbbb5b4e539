"""CLI command `watch`: live screen, one-time report and alerts for the jobs of one or several runs."""

from __future__ import annotations

import json
import os
import select
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_lite.cli.parser import Parser, real
from megatron_lite.cli.standard_output import make_console
from megatron_lite.errors import ConfigError

if TYPE_CHECKING:
    from rich.console import Console

    from megatron_lite.cli.watch_screen import View
    from megatron_lite.ops.watch import RunWatch
    from megatron_lite.ops.watch_alerts import Alert, AlertRecord, Thresholds

SUMMARY = "watch runs live: job, loss, speed, checkpoints, slow ranks; alerts"
EXIT_ALERT = 3
"""Exit code of --once if an alert holds."""
COMMAND_SECONDS = 60
"""Time after which the command of --alert is killed."""
ONCE_HEIGHT = 30
"""Rows of a report that is not shown on a full screen."""
KEYS = "q quit"
SEVERAL_KEYS = "q quit   tab or 1-9 another run"


def run(argv: list[str]) -> int:
    """Watch runs until q is pressed, or report once."""
    parser = _parser()
    options = parser.parse_args(argv)
    if options.json and not options.once:
        parser.error("--json is a form of --once: add --once")
    if files := [str(path) for path in options.runs if path.is_file()]:
        raise ConfigError(f"{files[0]} is a file", fix="Give the --save folder of a run")
    command = shlex.split(options.alert)
    if command and shutil.which(command[0]) is None:
        raise ConfigError(
            f"--alert {options.alert}: {command[0]} is not an executable program",
            fix="Give a program in PATH or an executable file; a shell command as --alert \"sh -c '…'\"",
        )

    from megatron_lite.ops.watch import RunWatch
    from megatron_lite.ops.watch_alerts import AlertRecord, Thresholds
    from megatron_lite.ops.watch_job import Queue

    queue = Queue()
    watches = [RunWatch(folder, queue, jobs=options.job) for folder in options.runs]
    notes: list[str] = []
    records = [AlertRecord(folder, notes.append) for folder in options.runs] if command else []
    limits = Thresholds(
        stall_minutes=options.stall_minutes, spike_factor=options.spike_factor, slow_ratio=options.slow_ratio
    )
    observer = _Observer(watches, records, limits, command, notes)
    if options.once:
        return _once(observer, as_json=options.json)
    _live(observer, options.interval)
    return 0


def _parser() -> Parser:
    parser = Parser(
        prog="megatron-lite watch",
        description=SUMMARY[0].upper() + SUMMARY[1:] + ".",
        epilog="Exit code of --once: 0 no alert holds, 3 an alert holds.",
    )
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="the --save folder of a run")
    parser.add_argument("--once", action="store_true", help="print one report and exit")
    parser.add_argument(
        "--json", action="store_true", help="with --once: print JSON (docs/operations.md lists the keys)"
    )
    parser.add_argument(
        "--interval", type=real(0.1, 86400), default=5.0, metavar="S", help="seconds between updates (5)"
    )
    parser.add_argument(
        "--job",
        action="append",
        default=[],
        metavar="ID",
        help="a Slurm job of the run, if it was queued by sbatch alone",
    )
    parser.add_argument(
        "--alert",
        default="",
        metavar="COMMAND",
        help="after the report, run COMMAND MESSAGE for each alert once until it clears, for at most "
        f"{COMMAND_SECONDS} s; MEGATRON_LITE_ALERT holds the message, "
        "MEGATRON_LITE_ALERT_KIND its kind and MEGATRON_LITE_RUN the folder",
    )
    parser.add_argument(
        "--stall-minutes",
        type=real(0, 1e6, above=True),
        default=30.0,
        metavar="N",
        help="alert if a job runs without a new iteration for N minutes (30)",
    )
    parser.add_argument(
        "--spike-factor",
        type=real(1, 1e6, above=True),
        default=2.0,
        metavar="X",
        help="alert if the loss is above X times its median for three iterations (2)",
    )
    parser.add_argument(
        "--slow-ratio",
        type=real(1, 1e6, above=True),
        default=1.3,
        metavar="X",
        help="alert if a rank computes X times as long as the median of its pipeline stage (1.3)",
    )
    return parser


class _Observer:
    """Observes all runs, and sends their alerts.

    Args:
        watches: one for each run.
        records: the sent alerts of each run; empty: no alert is sent.
        limits: thresholds of the alerts.
        command: program and arguments of --alert.
        notes: receives warnings about alerts.
    """

    def __init__(
        self,
        watches: Sequence[RunWatch],
        records: Sequence[AlertRecord],
        limits: Thresholds,
        command: Sequence[str],
        notes: list[str],
    ) -> None:
        self._watches = watches
        self._records = records
        self._limits = limits
        self._command = command
        self._notes = notes

    def observe(self) -> list[View]:
        """Return the runs as they are now."""
        from megatron_lite.cli.watch_screen import View
        from megatron_lite.ops.watch_alerts import find_alerts

        views = []
        for watch in self._watches:
            status = watch.observe()
            losses = [record.get("losses", {}).get("lm loss", float("nan")) for record in watch.metrics.recent]
            alerts = find_alerts(status, losses, self._limits, time.time())
            views.append(View(status, watch.metrics.curve, alerts))
        return views

    def send(self, views: Sequence[View]) -> None:
        """Run the command of --alert for the alerts that are new; call it after the report was shown."""
        for record, view in zip(self._records, views, strict=bool(self._records)):
            record.update(view.alerts, lambda alert, run=view.status.run: self._send(alert, run))  # type: ignore[misc]

    def take_notes(self) -> list[str]:
        """Return and forget the warnings."""
        taken = list(self._notes)
        self._notes.clear()
        return taken

    def _send(self, alert: Alert, run: str) -> bool:
        variables = {
            "MEGATRON_LITE_ALERT": alert.message,
            "MEGATRON_LITE_ALERT_KIND": alert.kind,
            "MEGATRON_LITE_RUN": run,
        }
        try:
            failure = _run_command([*self._command, alert.message], {**os.environ, **variables})
        except OSError as error:
            failure = f"failed ({error.strerror})"
        if failure:
            self._notes.append(
                f"WARNING: --alert {shlex.join(self._command)} {failure}; it is run again at the next check"
            )
        return not failure


def _run_command(command: Sequence[str], environment: Mapping[str, str]) -> str:
    """Run a command for at most COMMAND_SECONDS; return how it failed, empty if it did not.

    Raises:
        OSError: it cannot be started.
    """
    process = subprocess.Popen(
        command,
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        encoding="utf-8",
        errors="replace",
        # Killed with its children: one that keeps stderr open would hold up this process.
        start_new_session=True,
    )
    with process:
        try:
            _, text = process.communicate(timeout=COMMAND_SECONDS)
        except BaseException as error:  # the time limit, or Ctrl-C
            os.killpg(process.pid, signal.SIGKILL)
            if not isinstance(error, subprocess.TimeoutExpired):
                raise
            return f"did not end within {COMMAND_SECONDS} s and was killed"
    last = text.strip().splitlines()[-1:] or ["no message"]
    return f"failed ({process.returncode}: {last[0]})" if process.returncode else ""


def _once(observer: _Observer, *, as_json: bool) -> int:
    views = observer.observe()
    if as_json:
        runs = [
            {
                **view.status.to_json(),
                "alerts": [{"kind": alert.kind, "message": alert.message} for alert in view.alerts],
            }
            for view in views
        ]
        print(json.dumps({"time": time.time(), "runs": runs}, indent=2, ensure_ascii=False))
    else:
        _print(_console(), views)
    _send(observer, views)
    return EXIT_ALERT if any(view.alerts for view in views) else 0


def _console() -> Console:
    # A pipe has no width: 80 columns, or COLUMNS.
    return make_console(highlight=False)


def _print(console: Console, views: Sequence[View]) -> None:
    from megatron_lite.cli.curve import has_braille
    from megatron_lite.cli.watch_screen import screen

    unicode = has_braille(sys.stdout.encoding)
    for number in range(len(views)):
        # The table and the alerts of all runs come first.
        shown = views if number == 0 else [replace(views[number], alerts=())]
        console.print(screen(shown, 0, width=console.width, height=ONCE_HEIGHT, unicode=unicode))


def _live(observer: _Observer, interval: float) -> None:
    console = _console()
    if not console.is_terminal or console.is_dumb_terminal:
        while True:
            console.print(time.strftime("%Y-%m-%d %H:%M:%S"))
            views = observer.observe()
            _print(console, views)
            _send(observer, views)
            time.sleep(interval)
    _full_screen(observer, interval, console)


def _full_screen(observer: _Observer, interval: float, console: Console) -> None:
    from rich.live import Live

    from megatron_lite.cli.curve import has_braille
    from megatron_lite.cli.watch_screen import screen

    unicode, selected = has_braille(sys.stdout.encoding), 0
    notes: list[str] = []

    def show() -> None:
        keys = "\n".join([*notes, SEVERAL_KEYS if len(views) > 1 else KEYS])
        shown = screen(views, selected, width=console.width, height=console.height, unicode=unicode, keys=keys)
        live.update(shown, refresh=True)

    with _single_keys() as keys, Live(console=console, screen=True, auto_refresh=False, transient=True) as live:
        while True:
            views = observer.observe()
            show()
            observer.send(views)
            notes = observer.take_notes()
            until = time.monotonic() + interval
            while True:
                show()
                # A resized terminal is redrawn within a second.
                left = until - time.monotonic()
                key = keys(min(1.0, max(0.0, left)))
                if key in ("q", "Q"):
                    return
                if key == "\t":
                    selected = (selected + 1) % len(views)
                elif key.isdecimal() and 1 <= int(key) <= len(views):
                    selected = int(key) - 1
                if left <= 0:
                    break


@contextmanager
def _single_keys() -> Iterator[Callable[[float], str]]:
    """Yield a function that returns the next key pressed within a time; the terminal passes each key on at once."""
    if not sys.stdin.isatty():
        yield _wait
        return
    import termios
    import tty

    descriptor = sys.stdin.fileno()
    before = termios.tcgetattr(descriptor)
    tty.setcbreak(descriptor)

    def read(seconds: float) -> str:
        if not select.select([descriptor], [], [], seconds)[0]:
            return ""
        # A closed terminal is at its end.
        return os.read(descriptor, 1).decode(errors="replace") or "q"

    try:
        yield read
    finally:
        termios.tcsetattr(descriptor, termios.TCSADRAIN, before)


def _wait(seconds: float) -> str:
    time.sleep(seconds)
    return ""


def _send(observer: _Observer, views: Sequence[View]) -> None:
    """Send the alerts after the report, and print the warnings."""
    sys.stdout.flush()
    observer.send(views)
    for text in observer.take_notes():
        print(text, file=sys.stderr, flush=True)
