"""Token progress of commands: periodic lines, or a transient bar on a terminal."""

from __future__ import annotations

import sys

from megatron_lite.cli import progress as progress_module
from megatron_lite.cli.progress import TokenProgress


def test_periodic_lines(monkeypatch, capsys):
    times = iter([0.0, 4.0, 11.0, 11.0, 15.0])
    monkeypatch.setattr(progress_module.time, "monotonic", lambda: next(times))
    with TokenProgress("pack", 3000) as progress:
        for _ in range(3):
            progress.advance(1000)
    assert capsys.readouterr().err == "pack: 2,000 of 3,000 tokens\n"
    assert progress.done == 3000


def test_a_bar_on_a_terminal(monkeypatch, capsys):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    monkeypatch.setenv("TERM", "xterm")
    with TokenProgress("verify", 3000) as progress:
        progress.advance(1500)
        assert progress._bar.tasks[0].completed == 1500
    assert "verify" in capsys.readouterr().err
