"""Storage probe: measured values, nothing left behind, refused and full folders."""

from __future__ import annotations

import errno
import os

import pytest

from megatron_lite.ops.doctor import storage
from megatron_lite.ops.doctor.node import loopback_address, node_facts, program_versions
from megatron_lite.ops.doctor.storage import probe_storage


def test_a_folder_that_does_not_exist_yet(tmp_path):
    found = probe_storage(tmp_path / "run" / "deep", size=2**20, seconds=5.0)
    assert found.path == str(tmp_path) and found.write_speed > 0 and found.rename_seconds > 0 and found.free > 0
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["write", "fsync"])
@pytest.mark.parametrize("error", [KeyboardInterrupt(), OSError(errno.ENOSPC, "No space left on device")])
def test_nothing_is_left_behind(tmp_path, monkeypatch, name, error):
    def fail(*arguments):
        raise error

    monkeypatch.setattr(os, name, fail)
    with pytest.raises(type(error)):
        probe_storage(tmp_path, size=2**20, seconds=5.0)
    assert list(tmp_path.iterdir()) == []


def test_writing_ends_after_its_time(tmp_path, monkeypatch):
    monkeypatch.setattr(storage, "BLOCK", 4096)
    probe_storage(tmp_path, size=2**60, seconds=0.05)


def test_a_refused_folder():
    with pytest.raises(OSError):
        probe_storage(storage.Path("/proc/run"), size=4096, seconds=1.0)


def test_facts_of_this_host(tmp_path):
    assert node_facts(8, shm=tmp_path).shm_total > 0 and node_facts(8, shm=tmp_path / "none").shm_free == 0
    assert set(program_versions()) == {"python", "megatron_lite"}
    assert loopback_address("localhost") == "127.0.0.1" and loopback_address("no.such.host.invalid") == ""
