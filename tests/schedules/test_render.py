from __future__ import annotations

import sys

import pytest

from megatron_lite.cli import schedule as command
from megatron_lite.errors import ConfigError
from megatron_lite.schedules.lowering import lower
from megatron_lite.schedules.pipeline import pipeline_schedule
from megatron_lite.schedules.render import save_picture, text_grid
from megatron_lite.schedules.simulate import Costs, simulate


def timeline(kind, pp, m, chunks=1, costs=None):
    return simulate(lower(pipeline_schedule(kind, pp, m, chunks), kind, chunks, costs), costs)


def test_text_grid():
    assert text_grid(timeline("1f1b", 2, 2)).splitlines() == [
        "rank 0 | F0 F1 .. .. B0 == .. B1 == |",
        "rank 1 | .. F0 B0 == F1 B1 == .. .. |",
    ]


def test_text_grid_with_several_stages():
    assert text_grid(timeline("zb-v", 1, 1)) == "rank 0 | 0F0 1F0 1B0 1W0 0B0 0W0 |"


def test_every_action_has_a_column():
    costs = Costs(forward=1.0, backward=1.3, weight=1.1, comm=0.4)
    grid = text_grid(timeline("zb-h1", 4, 8, costs=costs))
    assert [sum(row.split().count(f"{kind}{i}") for kind in "FBW" for i in range(8)) for row in grid.splitlines()] == [
        24
    ] * 4
    assert text_grid(timeline("1f1b", 2, 0)).splitlines() == ["rank 0 |  |", "rank 1 |  |"]


def test_the_command_prints_grid_bubble_and_memory(capsys):
    assert command.run(["--pp", "4", "--microbatches", "8", "--kind", "zb-h1", "--actions"]) == 0
    shown = capsys.readouterr().out
    assert "rank 0 | F0 F1 F2 F3 .. .. .. B0 W0 F4" in shown
    assert "rank 1: 1RECV_F0 1F0 " in shown
    assert "time 27, bubble 11.11%" in shown
    assert "by rank: 4, 4, 4, 4\n" in shown


def test_the_command_uses_two_chunks_for_zb_v(capsys):
    command.run(["--kind", "zb-v", "--pp", "2", "--microbatches", "4", "--blocking"])
    shown = capsys.readouterr().out
    assert "2 chunks per rank" in shown
    assert "bubble 0.00%" in shown


@pytest.mark.parametrize("wrong", [["--forward", "0"], ["--comm", "-1"], ["--weight", "nan"], ["--kind", "dualpipe"]])
def test_invalid_times_and_kinds_are_refused(wrong, capsys):
    with pytest.raises(SystemExit):
        command.run(wrong)
    assert wrong[0] in capsys.readouterr().err


def test_a_picture(tmp_path, capsys):
    pytest.importorskip("matplotlib")
    path = tmp_path / "schedule.png"
    command.run(["--kind", "interleaved", "--chunks", "2", "--pp", "2", "--microbatches", "2", "--png", str(path)])
    assert path.read_bytes().startswith(b"\x89PNG")
    assert str(path) in capsys.readouterr().out


def test_a_picture_that_cannot_be_written_names_the_flag(tmp_path):
    pytest.importorskip("matplotlib")
    with pytest.raises(ConfigError, match="--png"):
        save_picture(timeline("1f1b", 2, 2), tmp_path / "missing" / "a.png", "")
    with pytest.raises(ConfigError, match="--png"):
        save_picture(timeline("1f1b", 2, 2), tmp_path / "a.nothing", "")


def test_without_matplotlib_the_error_names_the_extra(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ConfigError, match=r"-e .*\[plot\]"):
        save_picture(timeline("1f1b", 2, 2), tmp_path / "a.png", "")
