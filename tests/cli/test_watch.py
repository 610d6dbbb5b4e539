"""Tests of the watch command: reports, exit codes, alert commands, and the live screen in a pseudo-terminal."""

import json
import os
import pty
import re
import select
import signal
import stat
import subprocess
import sys
import time
from pathlib import Path

import pytest

from megatron_lite.cli import watch
from megatron_lite.cli.main import main
from megatron_lite.cli.watch import EXIT_ALERT
from megatron_lite.ops import slurm
from megatron_lite.runs.exit_status import ExitStatus
from megatron_lite.runs.metrics_file import encode

ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def without_slurm(monkeypatch):
    monkeypatch.setattr(slurm, "is_installed", lambda: False)
    monkeypatch.setenv("COLUMNS", "80")


def make_run(folder, *, status="completed", iterations=40, world=2):
    """A run's folder as its last job left it."""
    folder.mkdir()
    now = time.time()
    records = [
        {
            "kind": "start",
            "time": now - 100,
            "iteration": 0,
            "start_iteration": 0,
            "train_iterations": iterations,
            "parameters": 124_000_000,
            "world_size": world,
            "hosts": [f"node-{rank}" for rank in range(world)],
        }
    ]
    records += [
        {
            "kind": "iteration",
            "time": now - 50 + number / 10,
            "iteration": number,
            "train_iterations": iterations,
            "losses": {"lm loss": 10.0 / number**0.3},
            "learning_rate": 3e-4,
            "grad_norm": 0.5,
            "global_batch_size": 512,
            "seconds": 1.5,
            "tokens_per_second": 123_456.0,
            "tflops_per_device": 145.2,
            "mfu": 0.453,
            "eta_seconds": 60.0,
            "rank_seconds": [1.0] * (world - 1) + [1.2],
        }
        for number in range(1, iterations + 1)
    ]
    records.append({"kind": "validation", "time": now, "iteration": iterations, "losses": {"lm loss": 4.0}})
    (folder / "metrics.jsonl").write_bytes(b"".join(encode(record) for record in records) + b'{"kind": "iter')
    if status:
        (folder / "exit_status.json").write_bytes(ExitStatus(status=status, message=f"{status} here").encode())
    return folder


def words(capsys):
    """The output without line breaks and padding."""
    return re.sub(r"\s+", " ", capsys.readouterr().out)


def test_a_report_fits_80_columns_without_colour(tmp_path, capsys):
    run = make_run(tmp_path / "run")
    assert main(["watch", "--once", str(run)]) == 0
    text = capsys.readouterr().out
    assert max(len(line) for line in text.splitlines()) <= 80 and "\x1b" not in text
    for part in (
        "completed · completed: completed here",
        "40 of 40 (100.0%)",
        "3.3066 · validation 4.0000",
        "lr 3.000e-04 · grad norm 0.500 · batch 512",
        "1.5 s per iteration · 123k tokens/s · 145 TFLOP/s per device · MFU 45.3%",
        "slowest: rank 1 node-1 1.2 s (1.20x)",
    ):
        assert part in re.sub(r"\s+", " ", text), part
    assert "⠒ train" in text and "● validation" in text


def test_several_runs(tmp_path, capsys):
    runs = [str(make_run(tmp_path / name, status=status)) for name, status in (("a", "completed"), ("b", "error"))]
    assert main(["watch", "--once", *runs, str(tmp_path / "none")]) == EXIT_ALERT
    text = capsys.readouterr().out
    assert re.search(r"a +completed +40 +3.3066", text) and re.search(r"none +missing", text)
    assert f"ALERT {runs[1]}: not running and not queued" in re.sub(r"\s+", " ", text)


def test_a_narrow_screen(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "60")
    runs = [str(make_run(tmp_path / name)) for name in ("first-run", "second-run")]
    assert main(["watch", "--once", *runs]) == 0
    text = capsys.readouterr().out
    assert max(len(line) for line in text.splitlines()) <= 60
    assert re.search(r"first-run +completed", text) and "tokens/s" not in text.splitlines()[0]


def test_json(tmp_path, capsys):
    run = make_run(tmp_path / "run", status="error")
    assert main(["watch", "--once", "--json", str(run)]) == EXIT_ALERT
    (found,) = json.loads(capsys.readouterr().out)["runs"]
    assert (found["job"]["state"], found["iteration"], found["validation"]) == ("stopped", 40, {"validation": 4.0})
    assert [alert["kind"] for alert in found["alerts"]] == ["not-running"]
    page = (ROOT / "docs/operations.md").read_text("utf-8")
    assert [name for name in found if f"`{name}`" not in page] == [], "documented keys"


def test_mistakes(tmp_path, capsys):
    run = make_run(tmp_path / "run")
    assert main(["watch", str(run / "metrics.jsonl")]) == 1
    assert "metrics.jsonl is a file" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["watch", str(run), "--json"])
    assert "add --once" in capsys.readouterr().err
    assert main(["watch", str(run), "--once", "--alert", "/no/such program"]) == 1
    assert "is not an executable program" in capsys.readouterr().err


def test_a_missing_run_is_reported_and_sent(tmp_path, capsys):
    run, log = tmp_path / "none", tmp_path / "log"
    command = ["watch", "--once", "--json", str(run), "--alert", f"sh -c 'echo \"$0\" > {log}'"]
    assert main(command) == EXIT_ALERT
    (found,) = json.loads(capsys.readouterr().out)["runs"]
    assert found["job"]["state"] == "missing" and not run.exists()
    assert log.read_text().startswith(f"{run}: not running and not queued: missing: the folder does not exist")
    assert main(["watch", "--once", str(run)]) == EXIT_ALERT
    assert "the folder does not exist" in words(capsys)


def test_an_alert_command_that_hangs_is_killed_after_the_report(tmp_path, capfd, monkeypatch):
    monkeypatch.setattr(watch, "COMMAND_SECONDS", 0.5)
    run = make_run(tmp_path / "run", status="error")
    began = tmp_path / "began"
    # The child of the shell would keep its output open.
    assert main(["watch", "--once", str(run), "--alert", f"sh -c 'sleep 600 & touch {began}; wait'"]) == EXIT_ALERT
    printed = capfd.readouterr()
    assert "ALERT" in printed.out and began.exists() and not (run / "alerts.json").exists()
    assert "did not end within 0.5 s and was killed; it is run again at the next check" in printed.err
    shown = []
    monkeypatch.setattr(watch, "_run_command", lambda *_: shown.append(capfd.readouterr().out) or "")
    assert main(["watch", "--once", str(run), "--alert", "true"]) == EXIT_ALERT
    assert "ALERT" in shown[0], "the report comes first"


def test_an_empty_folder(tmp_path, capsys):
    assert main(["watch", "--once", str(tmp_path)]) == EXIT_ALERT
    assert "holds neither checkpoints nor metrics" in words(capsys)


def test_the_alert_command_gets_the_message_once(tmp_path, capsys):
    run, log = make_run(tmp_path / "run", status="error"), tmp_path / "log"
    script = tmp_path / "send it.sh"
    script.write_text(f'#!/bin/sh\nprintf "%s|%s|%s\\n" "$1" "$2" "$MEGATRON_LITE_ALERT_KIND" >> "{log}"\n')
    script.chmod(script.stat().st_mode | stat.S_IXUSR)
    for _ in range(2):
        assert main(["watch", "--once", str(run), "--alert", f"'{script}' first"]) == EXIT_ALERT
    (line,) = log.read_text().splitlines()
    assert line.startswith(f"first|{run}: not running and not queued") and line.endswith("|not-running")
    script.write_text("#!/bin/sh\necho broken >&2\nexit 3\n")
    (run / "alerts.json").unlink()
    assert main(["watch", "--once", str(run), "--alert", f"'{script}'"]) == EXIT_ALERT
    assert (
        "failed (3: broken); it is run again at the next check" in capsys.readouterr().err
        and not (run / "alerts.json").exists()
    )


class Terminal:
    """The command in a pseudo-terminal of its own."""

    def __init__(self, *args, **environment):
        main_end, other = pty.openpty()
        self._end = main_end
        # A Slurm client of this machine must not matter, nor its delays.
        variables = {**os.environ, "TERM": "xterm-256color", "PATH": "/nowhere", "PYTHONPATH": str(ROOT), **environment}
        self.process = subprocess.Popen(
            [sys.executable, "-m", "megatron_lite", "watch", *map(str, args)],
            stdin=other,
            stdout=other,
            stderr=other,
            env=variables,
            start_new_session=True,
        )
        os.close(other)
        self.text = ""

    def until(self, part, seconds=60):
        end = time.monotonic() + seconds
        while part not in self.text:
            assert time.monotonic() < end, self.text
            if select.select([self._end], [], [], 0.1)[0]:
                try:
                    self.text += os.read(self._end, 65536).decode(errors="replace")
                except OSError:  # the process has ended
                    assert part in self.text, self.text

    def close(self):
        os.close(self._end)

    def press(self, key):
        self.text = ""
        os.write(self._end, key.encode())

    def end(self):
        code = self.process.wait(timeout=60)
        os.close(self._end)
        return code


@pytest.mark.slow
def test_the_live_screen(tmp_path):
    runs = [make_run(tmp_path / name) for name in ("first", "second")]
    terminal = Terminal(*runs, "--interval", "0.2")
    terminal.until("\x1b[?1049h")
    terminal.until("tab or 1-9 another run")
    terminal.press("2")
    terminal.until(f"{runs[1]}")
    terminal.press("q")
    terminal.until("\x1b[?1049l")
    assert terminal.end() == 0


@pytest.mark.slow
def test_ctrl_c_restores_the_terminal(tmp_path):
    terminal = Terminal(make_run(tmp_path / "run"), NO_COLOR="1")
    terminal.until("q quit")
    assert "\x1b[32m" not in terminal.text
    terminal.process.send_signal(signal.SIGINT)
    terminal.until("\x1b[?1049l")
    terminal.until("interrupted")
    assert terminal.end() == 130


@pytest.mark.slow
def test_a_closed_terminal_ends_it(tmp_path):
    terminal = Terminal(make_run(tmp_path / "run"))
    terminal.until("q quit")
    terminal.close()
    try:
        assert terminal.process.wait(60) != 0
    finally:
        terminal.process.kill()
