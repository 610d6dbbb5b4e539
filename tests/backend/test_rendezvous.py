"""Tests of the rendezvous: other programs, duplicate, missing and failing ranks, ports in use."""

import contextlib
import socket
import threading
import time

import pytest
from support.launchers import free_port

from megatron_lite.backend import rendezvous
from megatron_lite.backend.environment import Launch
from megatron_lite.backend.rendezvous import Rendezvous
from megatron_lite.backend.rendezvous_server import look_up
from megatron_lite.errors import ConfigError, DataError, failed_rank


def launch(rank, world_size=2, *, ports=(0,), job="a", host=None, local_rank=None):
    address = f"tcp://127.0.0.1:{','.join(map(str, ports))}"
    local_rank = rank if local_rank is None else local_rank
    host = host or f"node{rank}"
    return Launch(rank=rank, world_size=world_size, local_rank=local_rank, init_method=address, job=job, host=host)


class Rank:
    """One rank of a rendezvous, in a thread.

    Attributes:
        store: port of rank 0's store.
        error: the error that ended the rendezvous; None: it succeeded.
    """

    def __init__(self, place, *, seconds=20.0, store=0, during=None, failure=None):
        self.place, self.number, self.during, self.failure = place, store, during, failure
        self.store, self.error, self.server = None, None, None
        self.meeting = Rendezvous(place, seconds)
        self.thread = threading.Thread(target=self._run, daemon=True)
        self.thread.start()

    def _run(self):
        with contextlib.suppress(Exception), self.meeting as meeting:
            try:
                if self.failure is not None:
                    meeting.report_failure(self.failure)
                    meeting.wait_until_reported()
                    return
                meeting.join()
                self.store = meeting.share_port(self.number)[1]
                meeting.run(self.during or (lambda: None))
                meeting.finish()
                self.server = meeting.server
            except Exception as error:
                self.error = error
                raise

    def end(self):
        self.thread.join(30)
        assert not self.thread.is_alive(), self.place
        return self


def wait_for_ranks(first, *joined):
    """Return once these ranks have joined at rank 0."""
    deadline = time.monotonic() + 20
    while first.meeting.server is None or set(joined) & set(first.meeting.server.missing()):
        assert time.monotonic() < deadline
        time.sleep(0.005)


@pytest.fixture
def start_rank(monkeypatch):
    """Start ranks, and close their servers at the end."""
    monkeypatch.setattr(rendezvous, "REPORT_SECONDS", 2.0)
    ranks = []

    def start(place, **options):
        ranks.append(Rank(place, **options))
        return ranks[-1]

    yield start
    for rank in ranks:
        rank.end()
        if rank.server is not None:
            rank.server.close()


def test_all_ranks_receive_the_port_of_the_store(start_rank):
    port = free_port()
    ranks = [start_rank(launch(rank, 4, ports=(port,)), store=4711) for rank in (2, 1, 3, 0)]
    assert [(rank.end().error, rank.store) for rank in ranks] == [(None, 4711)] * 4


def test_steps_of_one_slurm_job_on_a_node_do_not_mix(start_rank):
    """The steps start at the same time, with colliding ports."""
    ports = [free_port() for _ in range(3)]
    ranks = []
    for number in range(3):
        ranks += [start_rank(launch(rank, ports=ports, job=f"4711.{number}"), store=number) for rank in (1, 0)]
    assert [(rank.end().error, rank.store) for rank in ranks] == [(None, n) for n in (0, 0, 1, 1, 2, 2)]


@pytest.mark.parametrize("kind", ["silent", "greeting", "closing"])
def test_ports_of_other_programs_are_skipped(start_rank, kind, monkeypatch):
    monkeypatch.setattr(rendezvous, "CONNECT_TIMEOUT", 0.3)
    held = []

    def serve(listener):
        with contextlib.suppress(OSError):
            while True:
                held.append(listener.accept()[0])
                if kind == "greeting":
                    held[-1].sendall(b"SSH-2.0-OpenSSH\r\n")
                elif kind == "closing":
                    held[-1].close()

    with socket.create_server(("127.0.0.1", 0)) as other:
        threading.Thread(target=serve, args=(other,), daemon=True).start()
        ports = [other.getsockname()[1], free_port()]
        ranks = [start_rank(launch(rank, ports=ports)) for rank in (1, 0)]
        assert [rank.end().error for rank in ranks] == [None, None]


def test_an_error_names_the_port_in_use_and_the_fix(start_rank, monkeypatch):
    monkeypatch.setattr(rendezvous, "CONNECT_TIMEOUT", 0.2)
    with socket.create_server(("", 0)) as other:
        port = other.getsockname()[1]
        error = start_rank(launch(0, ports=(port,), host="n1"), seconds=5).end().error
    assert isinstance(error, ConfigError)
    assert f"port {port} is in use on n1" in str(error) and "Set MASTER_PORT to a free port" in str(error)


def test_an_error_names_the_other_job_at_the_port(start_rank):
    port = free_port()
    first = [start_rank(launch(rank, ports=(port,), job="step 1.0")) for rank in (0, 1)]
    assert [rank.end().error for rank in first] == [None, None]
    error = start_rank(launch(0, ports=(port,), job="step 1.1")).end().error
    assert isinstance(error, ConfigError) and "another job uses the address: step 1.0" in str(error)
    error = start_rank(launch(1, ports=(port,), job="step 1.1"), seconds=0.3).end().error
    assert "did not find rank 0" in str(error) and "another job uses the address: step 1.0" in str(error)


@pytest.mark.slow
def test_missing_ranks_are_named_while_waiting_and_at_the_end(start_rank, monkeypatch, capfd):
    monkeypatch.setattr(rendezvous, "FIRST_NOTICE", 0.2)
    port = free_port()
    ranks = [start_rank(launch(rank, 6, ports=(port,)), seconds=1.0) for rank in (0, 3)]
    errors = [rank.end().error for rank in ranks]
    place = f"127.0.0.1:{port}"
    assert str(errors[0]).startswith(
        f"Rendezvous timed out after 1 s: 2 of 6 ranks joined at {place}; missing: ranks 1-2, 4-5. "
    )
    assert "2 of 6 ranks joined" in str(errors[1]) and failed_rank(errors[1]).rank == 0
    assert [error.silent for error in errors] == [False, True]
    err = capfd.readouterr().err
    assert f"[node0 rank 0] waiting for 4 of 6 ranks at {place} (missing: 1-2, 4-5)\n" in err
    assert "rank 3" not in err and err.count("waiting") <= 3


def test_without_rank_0_one_rank_of_each_node_prints_that_it_waits(start_rank, monkeypatch, capfd):
    monkeypatch.setattr(rendezvous, "FIRST_NOTICE", 0.1)
    port = free_port()
    ranks = [start_rank(launch(rank, 8, ports=(port,), local_rank=rank % 4), seconds=0.5) for rank in (1, 3, 4)]
    errors = [rank.end().error for rank in ranks]
    assert all(f"rank 0 at 127.0.0.1:{port} (Connection refused)" in str(error) for error in errors)
    assert [error.silent for error in errors] == [False, True, False]
    err = capfd.readouterr().err
    assert f"[node1 rank 1] waiting for rank 0 at 127.0.0.1:{port} (Connection refused)" in err
    assert "rank 4] waiting" in err and "rank 3] waiting" not in err


@pytest.mark.slow
@pytest.mark.parametrize("second", [1, 0])
def test_two_processes_of_one_rank_are_named_with_their_hosts(start_rank, second):
    port = free_port()
    ranks = [start_rank(launch(0, 3, ports=(port,), host="n0"))]
    first = start_rank(launch(1, 3, ports=(port,), host="n1"))
    wait_for_ranks(ranks[0], 0, 1)
    again = start_rank(launch(second, 3, ports=(port,), host="n2"))
    for rank in (ranks[0], first, again):
        text = str(rank.end().error)
        assert f"Rank {second} was started twice: on n{second} (process " in text
        assert "and on n2 (process " in text
    assert not again.error.silent and not ranks[0].error.silent and first.error.silent


def test_a_process_after_the_start_is_refused_alone(start_rank):
    port = free_port()
    ranks = [start_rank(launch(rank, ports=(port,))) for rank in (0, 1)]
    assert [rank.end().error for rank in ranks] == [None, None]
    again = start_rank(launch(1, ports=(port,), host="n2")).end().error
    assert "Rank 1 was started twice: on node1 (process " in str(again) and not again.silent
    assert not ranks[0].server.failure


@pytest.mark.slow
def test_another_world_size_is_named_with_both_hosts(start_rank):
    port = free_port()
    ranks = [start_rank(launch(0, 4, ports=(port,))), start_rank(launch(1, 8, ports=(port,)))]
    for rank in ranks:
        text = str(rank.end().error)
        assert "Rank 1 on node1 (process " in text
        assert " with a world size of 8, rank 0 on node0 (process " in text and " with 4" in text
        assert not rank.error.silent


def test_the_end_of_a_rank_is_noticed_at_once(start_rank):
    port = free_port()
    ranks = [start_rank(launch(rank, 3, ports=(port,))) for rank in (0, 1)]
    wait_for_ranks(ranks[0], 0, 1)
    with socket.create_connection(("127.0.0.1", port)) as stranger:
        stranger.sendall(b'{"hello": 1}\n')
        assert stranger.recv(1) == b"", "the connection is closed"
    dying = Rendezvous(launch(2, 3, ports=(port,)), 5)
    dying._find([("127.0.0.1", port)])
    dying._connection.close()
    errors = [rank.end().error for rank in ranks]
    assert all("Rank 2 on node2 (process " in str(error) and " ended before" in str(error) for error in errors)
    assert [error.silent for error in errors] == [False, True]


@pytest.mark.slow
def test_an_error_while_connecting_ends_all(start_rank):
    port = free_port()

    def fails():
        raise RuntimeError("no route\nException raised from connect at socket.cpp\nframe #0: main")

    ranks = [
        start_rank(launch(0, ports=(port,)), during=lambda: time.sleep(5)),
        start_rank(launch(1, ports=(port,)), during=fails),
    ]
    text = str(ranks[1].end().error)
    assert (
        "Rank 1 of 2 on node1 cannot connect to the other ranks: no route. " in text
        and "GLOO_SOCKET_IFNAME" in text
        and "frame" not in text
    )
    began = time.monotonic()
    assert "Rank 1 on node1 failed: Rank 1 of 2 on node1 cannot connect to the other ranks" in str(ranks[0].end().error)
    assert time.monotonic() - began < 4, "without waiting for its own connections"


def test_an_error_of_all_ranks_before_the_rendezvous_is_printed_by_one(start_rank):
    port = free_port()
    errors = [ConfigError("problem", fix="fix") for _ in range(4)]
    for rank in [start_rank(launch(rank, 4, ports=(port,)), failure=error) for rank, error in enumerate(errors)]:
        rank.end()
    assert sorted(error.silent for error in errors) == [False, True, True, True]


def test_an_error_of_one_rank_before_the_rendezvous_ends_the_waiting_ranks(start_rank):
    port = free_port()
    own = DataError("tokenizer.json is missing", fix="Copy it")
    waiting = [start_rank(launch(rank, 3, ports=(port,))) for rank in (0, 1)]
    start_rank(launch(2, 3, ports=(port,)), failure=own, seconds=5).end()
    assert not own.silent
    for rank in waiting:
        error = rank.end().error
        assert "Rank 2 on node2 failed: tokenizer.json is missing. Copy it" in str(error)
        assert error.silent == (rank.place.rank != 0)
        assert (failed_rank(error).host, failed_rank(error).rank) == ("node2", 2)


def test_different_errors_are_both_printed(start_rank):
    port = free_port()
    errors = [DataError(f"file {rank}", fix="fix") for rank in range(2)]
    ranks = [start_rank(launch(rank, ports=(port,)), failure=error, seconds=5) for rank, error in enumerate(errors)]
    assert [rank.end().place.rank for rank in ranks] == [0, 1]
    assert [error.silent for error in errors] == [False, False]


@pytest.mark.parametrize("job", ["Slurm step 7.0", ""])
def test_an_unknown_host_is_an_error_at_once(job, start_rank):
    place = Launch(
        rank=1, world_size=2, local_rank=1, host="n2", init_method="tcp://no-such-host.invalid:4711", job=job
    )
    error = start_rank(place).end().error
    assert isinstance(error, ConfigError)
    assert error.silent == bool(job), "one rank of a node prints the error, unless a rank may have been started alone"
    assert "MASTER_ADDR=no-such-host.invalid cannot be resolved on n2" in str(error) and "Set MASTER_ADDR" in str(error)


def test_rank_0_must_be_at_its_address(start_rank, monkeypatch):
    monkeypatch.setattr(rendezvous, "look_up", lambda host: ["127.0.0.2"])
    monkeypatch.setattr(rendezvous, "bind", lambda port: socket.create_server(("127.0.0.1", port)))
    error = start_rank(launch(0, ports=(free_port(),), host="n2")).end().error
    assert isinstance(error, ConfigError) and "Set MASTER_ADDR=n2" in str(error)
    assert "which runs on n2: connecting to 127.0.0.1:" in str(error) and "Connection refused" in str(error)


def test_addresses_of_version_6_are_looked_up_without_brackets():
    assert look_up("::1") == ["::1"] and look_up("127.0.0.1") == ["127.0.0.1"]
    meeting = Rendezvous(Launch(rank=1, world_size=2, init_method="tcp://[::1]:5,6"), 1)
    assert meeting._resolve() == [("::1", 5), ("::1", 6)]


def test_ranks_of_one_machine_meet_through_a_file_and_a_stale_file_is_replaced(start_rank, tmp_path):
    (tmp_path / "port").write_text(str(free_port()), encoding="utf-8")
    places = [Launch(rank=rank, world_size=2, host="n", init_method=f"file://{tmp_path}/port") for rank in (1, 0)]
    ranks = [start_rank(place, store=7) for place in places]
    assert [(rank.end().error, rank.store) for rank in ranks] == [(None, 7)] * 2
