"""Report hub: missing, lost and late ranks, clock offsets, foreign programs at the port."""

from __future__ import annotations

import socket
import threading
import time
from dataclasses import replace

import pytest

from megatron_lite.backend.environment import Launch
from megatron_lite.errors import TrainingError
from megatron_lite.ops.doctor.hub import Hub, Spoke, free_ports
from megatron_lite.ops.doctor.report import Report


@pytest.fixture
def launches(tmp_path):
    first = Launch(rank=0, world_size=3, init_method=f"file://{tmp_path / 'port'}", host="n0")
    return [replace(first, rank=rank, host=f"n{rank}") for rank in range(3)]


def soon(seconds=20.0):
    return time.monotonic() + seconds


def wait_for(condition):
    deadline = soon()
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def take_part(launch, *, ahead=0.0, done=True, end=None):
    """Run a rank in a thread up to the verdict, or to its end after the start."""
    results = []

    def rank():
        with Spoke(launch, soon(), clock=lambda: time.time() + ahead) as spoke:
            spoke.expect("start", soon())
            spoke.send(Report(rank=launch.rank, local_rank=0, host=launch.host, done=done))
            if not end:
                results.append(spoke.expect("verdict", soon()))

    thread = threading.Thread(target=rank, daemon=True)
    thread.start()
    return thread, results


def test_reports_and_clocks_of_all_ranks(launches):
    with Hub(launches[0]) as hub:
        threads = [take_part(launch, ahead=100.0 * launch.rank) for launch in launches]
        assert hub.wait_joined(soon()) == []
        hub.broadcast(start={})
        hub.wait_reports(soon())
        hub.broadcast(verdict="good")
        for thread, results in threads:
            thread.join(20)
            assert results == ["good"]
        assert {rank: round(report.clock_offset / 100) for rank, report in hub.reports.items()} == {0: 0, 1: 1, 2: 2}


@pytest.mark.slow
def test_missing_lost_and_late_ranks(launches):
    with Hub(launches[0]) as hub:
        waiting, _ = take_part(launches[0], done=False)
        ended, _ = take_part(launches[1], end=True, done=False)
        assert hub.wait_joined(soon(1.0)) == [2]
        hub.broadcast(start={})
        ended.join(20)
        wait_for(lambda: hub.lost == {1} and 0 in hub.reports)
        began = time.monotonic()
        hub.wait_reports(soon(0.2))  # rank 0 never completes
        assert time.monotonic() - began < 10
        assert set(hub.reports) == {0, 1} and not hub.reports[0].done
        hub.broadcast(verdict="")
        waiting.join(20)


def test_a_rank_that_does_not_find_rank_0(launches):
    with pytest.raises(TrainingError, match=r"Rank 1 on n1 does not reach rank 0 at .*\(no answer\)"):
        Spoke(launches[1], soon(0.1))


def test_another_program_at_the_port(launches):
    with socket.create_server(("127.0.0.1", 0)) as server:
        at = replace(launches[1], init_method=f"tcp://127.0.0.1:{server.getsockname()[1]}")
        threading.Thread(target=lambda: server.accept()[0].sendall(b"SSH-2.0\n"), daemon=True).start()
        with pytest.raises(TrainingError, match="another program answers"):
            Spoke(at, soon(-1))


def test_all_ports_of_rank_0_in_use(launches):
    with socket.create_server(("", 0)) as server:
        port = server.getsockname()[1]
        with pytest.raises(TrainingError, match=f"{port} of rank 0 is in use on n0"):
            Hub(replace(launches[0], init_method=f"tcp://127.0.0.1:{port}"))


def test_the_end_of_rank_0_ends_the_others(launches):
    with Hub(launches[0]) as hub, Spoke(launches[1], soon()) as spoke:
        hub.close()
        with pytest.raises(TrainingError, match="rank 0 ended"):
            spoke.expect("start", soon())


def test_a_silent_rank_0(launches):
    with (
        Hub(launches[0]),
        Spoke(launches[1], soon()) as spoke,
        pytest.raises(TrainingError, match="did not answer in time"),
    ):
        spoke.expect("start", soon(0.1))


def test_a_rank_that_was_started_twice(launches):
    with Hub(launches[0]) as hub, Spoke(launches[1], soon()) as spoke:
        answering = threading.Thread(target=lambda: spoke.expect("start", soon()), daemon=True)
        answering.start()
        wait_for(lambda: 1 in hub.hosts)
        with pytest.raises(TrainingError, match="was started twice"):
            Spoke(launches[1], soon(-1))
        hub.broadcast(start={})
        answering.join(20)


def test_free_ports():
    assert len(set(free_ports())) == 4
