"""Exclude file: entries, expiry, lines written by hand, removal."""

from __future__ import annotations

from datetime import datetime, timedelta, timezone

import pytest

from megatron_lite.errors import ConfigError
from megatron_lite.ops import slurm
from megatron_lite.ops.exclude import (
    EXCLUDE_NAME,
    Exclusion,
    exclude_hosts,
    exclude_option,
    excluded_hosts,
    forgive_hosts,
    read_exclusions,
)

NOW = datetime(2026, 11, 26, 23, 10, tzinfo=timezone.utc)


def test_a_missing_file_excludes_no_host(tmp_path):
    assert excluded_hosts(tmp_path) == ()


def test_entries_expire(tmp_path):
    path = tmp_path / "new" / EXCLUDE_NAME
    exclude_hosts(path, {"gpu1": "GPU 3: slow\nby half"}, hours=2, now=NOW)
    assert path.read_text() == "gpu1  # until 2026-11-27T01:10Z: GPU 3: slow by half\n"
    until = NOW + timedelta(hours=2)
    assert read_exclusions(path, now=NOW) == (Exclusion("gpu1", "GPU 3: slow by half", until),)
    assert read_exclusions(path, now=until) == ()


def test_the_last_entry_of_a_host_counts(tmp_path):
    path = tmp_path / EXCLUDE_NAME
    exclude_hosts(path, {"a": "first", "b": "other"}, hours=1, now=NOW)
    exclude_hosts(path, {"a": "second"}, hours=float("inf"), now=NOW)
    late = NOW + timedelta(days=365)
    assert read_exclusions(path, now=late) == (Exclusion("a", "second"),)
    assert [entry.host for entry in read_exclusions(path, now=NOW)] == ["b", "a"]


def test_lines_written_by_hand(tmp_path):
    path = tmp_path / EXCLUDE_NAME
    path.write_text("# broken fans\n\ngpu[08-09]\nhead # until the switch is replaced\nlast")
    assert [entry.host for entry in read_exclusions(path)] == ["gpu08", "gpu09", "head", "last"]
    exclude_hosts(path, {"next": "slow"})
    assert excluded_hosts(tmp_path) == ("gpu08", "gpu09", "head", "last", "next")


def test_forgiven_hosts_are_removed(tmp_path):
    path = tmp_path / EXCLUDE_NAME
    path.write_text("# broken fans\ngpu[08-09]  # hot\nhead\n")
    assert forgive_hosts(path, ["gpu08", "other"]) == ("gpu08",)
    assert path.read_text() == "# broken fans\ngpu09  # hot\nhead\n"
    assert forgive_hosts(path, ["gpu08"]) == ()


@pytest.mark.parametrize("line", ["gpu[08-", "two hosts"])
def test_a_line_that_is_no_host_name(tmp_path, line):
    path = tmp_path / EXCLUDE_NAME
    path.write_text(f"head\n{line}\n")
    with pytest.raises(ConfigError, match=r"Line 2 of .* is no host name"):
        excluded_hosts(tmp_path)


def test_an_unreadable_file(tmp_path):
    (tmp_path / EXCLUDE_NAME).mkdir()
    with pytest.raises(ConfigError, match="Cannot read the exclude file"):
        excluded_hosts(tmp_path)


def test_a_file_that_is_no_text(tmp_path):
    (tmp_path / EXCLUDE_NAME).write_bytes(b"gpu1\xff\n")
    with pytest.raises(ConfigError, match=r"is not UTF-8 text: .* at byte 4\. Repair it"):
        excluded_hosts(tmp_path)


def test_the_option_of_sbatch_joins_all_sources(tmp_path, monkeypatch):
    monkeypatch.setattr(slurm, "node_names", lambda: frozenset({"n1", "n2", "n3", "n4"}))
    assert exclude_option(tmp_path) == ""
    (tmp_path / EXCLUDE_NAME).write_text("n1\nlaptop\n")
    assert exclude_option(tmp_path, given="n[2-3]", further=["n4", "n1"]) == "n2,n3,n4,n1"
    (tmp_path / "mine").write_text("n4  # mine\n")
    assert exclude_option(tmp_path, given=str(tmp_path / "mine")) == "n4,n1"


def test_names_are_kept_where_slurm_does_not_answer(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    (tmp_path / EXCLUDE_NAME).write_text("laptop\n")
    assert exclude_option(tmp_path) == "laptop"
