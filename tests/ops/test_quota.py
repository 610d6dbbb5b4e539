"""Tests of free space and quotas, with recorded output of lfs and quota."""

import os

from megatron_lite.ops import quota as module
from megatron_lite.ops.quota import Space, free_space

LUSTRE = """/scratch/project
                1048576* 2097152 4194304       -     900   1000    2000       -
"""
NO_LIMITS = "/scratch 1048576 0 0 - 900 0 0 -\n"
QUOTA = """Disk quotas for user me (uid 1000):
     Filesystem  blocks   quota   limit   grace   files   quota   limit   grace
server:/home 1000000  0 1500000 0  40 0 100 0
other:/home 1 2 3 0 4 5 6 0
"""


def test_the_file_system_is_the_limit_without_a_quota(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "_output", lambda *command: "")
    usage, found = os.statvfs(tmp_path), free_space(tmp_path)
    assert found.free_limit == found.inode_limit == "free"
    assert abs(found.free - usage.f_bavail * usage.f_frsize) < 2**30


def test_quotas_of_lustre(tmp_path, monkeypatch):
    monkeypatch.setattr(
        module, "_output", lambda *command: LUSTRE if command[:4] == ("lfs", "quota", "-q", "-g") else ""
    )
    found = free_space(tmp_path)
    assert found == Space(2**30, 100, "left of the group's quota", "left of the group's quota")
    monkeypatch.setattr(module, "_output", lambda *command: NO_LIMITS if command[0] == "lfs" else "")
    assert free_space(tmp_path).free_limit == "free"


def test_quotas_of_other_file_systems(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "_output", lambda *command: QUOTA if command == ("quota", "-wp", "-u") else "")
    monkeypatch.setattr(module, "_device", lambda folder: "server:/home")
    found = free_space(tmp_path)
    assert (found.free, found.inodes) == (500_000 * 1024, 60) and found.free_limit == "left of the user's quota"
    monkeypatch.setattr(module, "_device", lambda folder: "elsewhere:/home")
    assert free_space(tmp_path).free_limit == "free"


def test_an_exceeded_quota_leaves_nothing(tmp_path, monkeypatch):
    exceeded = "/scratch 9000* 0 8000 - 900 0 0 -\n"
    monkeypatch.setattr(module, "_output", lambda *command: exceeded if command[3:4] == ("-u",) else "")
    assert free_space(tmp_path).free == 0


def test_programs_that_are_missing_or_hang_are_ignored(tmp_path, monkeypatch):
    assert module._output("no-such-program") == ""
    program = tmp_path / "lfs"
    program.write_text("#!/bin/sh\nexec sleep 60\n", encoding="utf-8")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setattr(module, "TIMEOUT", 0.05)
    assert module._output("lfs", "quota") == ""


def test_the_device_of_a_folder_is_that_of_its_mount(tmp_path):
    lines = [line.split()[:2] for line in open("/proc/self/mounts", encoding="utf-8")]  # noqa: PTH123, SIM115
    assert module._device(tmp_path) in {device for device, _ in lines}
    assert module._device(module.Path("/proc")) == next(device for device, mount in reversed(lines) if mount == "/proc")
