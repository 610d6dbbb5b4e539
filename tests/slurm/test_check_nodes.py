"""Test of --check-nodes in a chain on a Slurm cluster: a bad node ends the job, and the next one avoids it."""

import subprocess

import pytest

from megatron_lite.ops.exclude import excluded_hosts


@pytest.fixture
def read_only_on_n2(new_run, cluster):
    """A run whose --save folder cannot be written on n2."""
    run = new_run("bad_node", flags="--check-nodes")
    run.save.mkdir()
    entered = ("nsenter", "-t", (cluster.folder / "run" / "n2.init").read_text(encoding="utf-8"), "--mount")
    subprocess.run((*entered, "mount", "-t", "tmpfs", "-o", "ro", "none", run.save), check=True)
    yield run
    subprocess.run((*entered, "umount", run.save), check=True)


def test_the_chain_avoids_a_node_that_fails_the_check(read_only_on_n2, cluster, expected):
    run = read_only_on_n2
    # Until the other nodes are free, the job runs on n1 and n2.
    blocker = cluster.run("sbatch", "--parsable", "--exclusive", "--nodelist=n3,n4", "--wrap=sleep 600", cwd=run.folder)
    run.submit()
    run.wait_for(lambda: run.outcomes == ["error"], "end of the first job")
    assert excluded_hosts(run.save) == ("n2",)
    (outcome,) = run.chain.outcomes
    assert outcome.host == "n2" and "write test of --save failed: Read-only file system" in outcome.message
    cluster.run("scancel", blocker.strip())
    cluster.run("scontrol", "update", f"JobId={run.chain.successor}", "StartTime=now")  # instead of the delay
    run.wait_until_complete()
    assert run.losses() == expected
    assert "n2" not in cluster.run("scontrol", "-o", "show", "job", run.job).partition(" NodeList=")[2].split()[0]
