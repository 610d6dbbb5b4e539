"""Tests of the state of a chain: when it continues, and errors of its file."""

import json
import shutil

import pytest

from megatron_lite.errors import ConfigError
from megatron_lite.ops.chain import stop_chain
from megatron_lite.ops.chain_state import (
    MAX_IDLE,
    Chain,
    Outcome,
    Start,
    add_outcome,
    backoff_minutes,
    existing_chain,
    read_chain,
    write_chain,
)


def after(*outcomes):
    """Return the chain after outcomes of (status, saved iteration), each on a host of its own."""
    chain = Chain("/job.slurm")
    for number, (status, iteration) in enumerate(outcomes):
        host = f"n{number}" if status == "error" else ""
        chain = add_outcome(chain, Outcome(str(number), status, f"it was {status}", iteration, host, ""))
    return chain


def test_progress_between_failures_keeps_the_chain_going():
    chain = after(*[("error", number) for number in range(5)])
    assert (chain.state, chain.failures, backoff_minutes(chain)) == ("active", 1, 2)


def test_the_delay_doubles_with_each_failure_at_the_same_iteration():
    assert backoff_minutes(after(("error", 3), ("killed", 3))) == 4
    assert backoff_minutes(after(("error", 3), ("time_limit", 3), ("error", 3))) == 2


def test_jobs_that_never_reach_a_save_stop_the_chain():
    assert after(*[("time_limit", 5)] * (MAX_IDLE - 1)).state == "active"
    chain = after(*[("time_limit", 5)] * MAX_IDLE)
    assert chain.state == "stopped"
    assert chain.reason == "10 jobs in a row without a new checkpoint, at iteration 5; the last: it was time_limit"


def test_the_state_is_read_as_it_was_written(tmp_path):
    chain = after(("time_limit", 10), ("error", 10))
    write_chain(tmp_path, chain)
    assert read_chain(tmp_path) == chain
    assert [str(Start("7")), str(Start("7", 2))] == ["7", "7, restart 2"]


def test_a_copied_chain_is_not_the_chain_of_the_copy(tmp_path):
    run, copy, link = tmp_path / "run", tmp_path / "copy", tmp_path / "link"
    run.mkdir()
    link.symlink_to(run)
    chain = write_chain(run, after(("error", 10)))
    shutil.copytree(run, copy)
    assert read_chain(run) == read_chain(link) == chain and read_chain(copy) is None
    with pytest.raises(ConfigError, match=rf"copy.chain\.json is a copy: .* the run {run}.*Give {run}\. If .*--chain"):
        existing_chain(copy)
    with pytest.raises(ConfigError, match="is a copy"):
        stop_chain(copy)
    assert [path.name for path in copy.iterdir()] == ["chain.json"], "nothing was written"
    run.rename(tmp_path / "moved")
    assert read_chain(tmp_path / "moved") is None
    content = json.loads((copy / "chain.json").read_text())
    del content["folder"]
    (copy / "chain.json").write_text(json.dumps(content))
    assert read_chain(copy) == chain, "files of earlier versions do not name the folder"


def test_a_damaged_or_absent_chain_is_an_error(tmp_path):
    run = tmp_path / "run"
    run.mkdir()
    (run / "chain.json").write_text(json.dumps({"script": 3}))
    with pytest.raises(ConfigError, match=r"Cannot read the chain .*chain\.json.*scancel JOB.*submit the chain again"):
        read_chain(run)
    with pytest.raises(ConfigError, match=r"has no chain.*one of its folders with a chain \(run\)"):
        existing_chain(tmp_path)
    (run / "chain.json").unlink()
    with pytest.raises(ConfigError, match=r"has no chain.*Give the run's --save folder, or submit"):
        existing_chain(run)
    with pytest.raises(ConfigError, match=r"The folder .*none does not exist"):
        existing_chain(run / "none")
