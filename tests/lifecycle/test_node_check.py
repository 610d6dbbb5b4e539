"""Node check on gloo ranks: a slow rank, a missing one, wrong clocks, folders that cannot be written."""

from __future__ import annotations

import multiprocessing
import os
import time
from dataclasses import replace

import pytest
import torch

from megatron_lite.backend.environment import Launch
from megatron_lite.config.parallel import ParallelConfig
from megatron_lite.config.runtime import RuntimeConfig
from megatron_lite.lifecycle.node_check import CheckPlan, check_nodes
from megatron_lite.ops.doctor.report import GROUPS, HOST_COPY, MATRIX_PRODUCT, MEMORY_COPY
from megatron_lite.ops.doctor.verdict import Thresholds

FORK = multiprocessing.get_context("fork")
# On a machine that other tests load, only injected slowness is to be found.
LOOSE = Thresholds(cpu_speed=0.05, cpu_link_speed=0.0, write_speed=0.0, rename=60.0, shm=0, free_space=0, inodes=0)


def plan(**settings):
    settings.setdefault("parallel", ParallelConfig())
    settings.setdefault("thresholds", LOOSE)
    runtime = RuntimeConfig(device="cpu", num_threads=1)
    sizes = {"activation_bytes": 2**16, "written_bytes": 2**20, "speed_seconds": 0.2}
    return CheckPlan(runtime=runtime, **sizes, **settings)


def slow_product(a, b):
    time.sleep(0.5)
    return torch.mm(a, b)


def ended_product(a, b):
    os._exit(9)


def hanging_product(a, b):
    time.sleep(600)


def rank(launch, check, queue, settings):
    product, ahead = settings.get("product", torch.mm), settings.get("ahead", 0.0)
    shown = {}
    clock = lambda: time.time() + ahead  # noqa: E731
    verdict = check_nodes(launch, check, show=lambda _, found: shown.update(found), product=product, clock=clock)
    queue.put((launch.rank, verdict, shown))
    queue.close()
    queue.join_thread()
    os._exit(0)


def run_alone(check, **settings):
    shown = {}
    verdict = check_nodes(Launch(host="n0"), check, show=lambda _, found: shown.update(found), **settings)
    return verdict, shown


def run_ranks(folder, check, *, world_size=2, settings=None, started=None, hosts=None):
    """Return verdict and reports by rank.

    Args:
        folder: for the rendezvous file.
        check: the plan.
        world_size: ranks of the job.
        settings: by rank, `product` and `ahead`.
        started: the ranks that are started; None: all.
        hosts: of the ranks; None: one each.
    """
    queue, started = FORK.Queue(), range(world_size) if started is None else started
    processes = []
    for number in started:
        host = hosts[number] if hosts else f"n{number}"
        local = hosts[:number].count(host) if hosts else 0
        address = f"file://{folder / 'port'}"
        launch = Launch(rank=number, world_size=world_size, local_rank=local, init_method=address, host=host)
        arguments = (launch, check, queue, (settings or {}).get(number, {}))
        processes.append(FORK.Process(target=rank, args=arguments, daemon=True))
        processes[-1].start()
    results = {}
    ends = [number for number in started if (settings or {}).get(number, {}).get("product") is not ended_product]
    while len(results) < len(ends):
        number, verdict, reports = queue.get(timeout=120)
        results[number] = verdict, reports
    for process in processes:
        process.join(30)
        process.kill()
    return results


def test_one_rank(tmp_path):
    verdict, reports = run_alone(plan(save=str(tmp_path / "run")))
    assert verdict.problems == () and set(reports[0].speeds) == {MATRIX_PRODUCT, MEMORY_COPY}
    assert reports[0].storage.path == str(tmp_path) and list(tmp_path.iterdir()) == []
    assert {"python", "torch", "megatron_lite"} <= set(reports[0].versions)


@pytest.mark.slow
def test_axes_and_hosts_are_measured(tmp_path):
    check = plan(parallel=ParallelConfig(tp=2), save=str(tmp_path))
    results = run_ranks(tmp_path, check, world_size=4, hosts=["a", "a", "b", "b"])
    verdict, reports = results[0]
    assert verdict.problems == () and all(other == verdict for other, _ in results.values())
    assert (verdict.num_hosts, verdict.num_ranks) == (2, 4)
    found = {(link.axis, link.operation, link.ranks) for report in reports.values() for link in report.links}
    both = {(axis, operation) for axis in ("tp", "dp") for operation in ("all-reduce", "all-gather")}
    rows = {"tp": [(0, 1), (2, 3)], "dp": [(0, 2), (1, 3)]}
    assert found == {(*names, row) for names in both for row in rows[names[0]]} | {("hosts", "send-recv", (0, 2))}


@pytest.mark.slow
def test_pipeline_stages_are_measured(tmp_path):
    results = run_ranks(tmp_path, plan(parallel=ParallelConfig(pp=3)), world_size=3, hosts=["a", "a", "a"])
    found = {(link.axis, link.operation, link.ranks) for link in results[0][1][1].links}
    assert found == {("pp", "send-recv", (0, 1)), ("pp", "send-recv", (1, 2))}


@pytest.mark.slow
def test_a_slow_rank_is_named(tmp_path):
    results = run_ranks(tmp_path, plan(), settings={1: {"product": slow_product}})
    (finding,) = (finding for finding in results[1][0].findings if finding.kind == "slow matrix product")
    assert "n1 rank 1: matrix product at" in finding.text


@pytest.mark.slow
def test_a_missing_rank_is_named_with_its_host(tmp_path):
    check = plan(timeout=15.0, expected={"n0": 1, "n1": 1, "n2": 1})
    results = run_ranks(tmp_path, check, world_size=3, started=[0, 1])
    verdict, reports = results[0]
    (finding,) = verdict.problems
    assert "rank 2 did not join within 5 s, expected on n2" in finding.text
    assert set(verdict.excluded) == {"n2"} and MATRIX_PRODUCT in reports[1].speeds
    assert reports[0].notes == ["links were not measured: ranks are missing"]


@pytest.mark.slow
def test_a_rank_that_ends_is_named(tmp_path):
    results = run_ranks(tmp_path, plan(timeout=18.0), world_size=2, settings={1: {"product": ended_product}})
    lost = [finding for finding in results[0][0].findings if finding.kind == "lost rank"]
    assert [finding.text for finding in lost] == ["n1 rank 1 ended in: matrix product"]
    assert set(results[0][0].excluded) == {"n1"}


@pytest.mark.slow
def test_a_rank_that_hangs_is_named(tmp_path):
    results = run_ranks(tmp_path, plan(timeout=18.0), world_size=2, settings={1: {"product": hanging_product}})
    verdict, reports = results[0]
    assert set(verdict.excluded) == {"n1"} and reports[1].failures.keys() == {MATRIX_PRODUCT}
    assert "no end within" in reports[1].failures[MATRIX_PRODUCT] and GROUPS in reports[0].failures


@pytest.mark.slow
def test_a_wrong_clock_is_named(tmp_path):
    results = run_ranks(tmp_path, plan(), world_size=3, settings={2: {"ahead": -60.0}})
    (finding,) = (finding for finding in results[0][0].problems if finding.kind == "clock")
    assert finding.text == "n2: its clock is 60.0 s behind the others (at most 5)"


@pytest.mark.slow
def test_too_short_a_time_is_no_fault_of_a_host():
    check = replace(plan(timeout=2.0), speed_seconds=1.0)
    verdict, reports = run_alone(check, product=hanging_product)
    (finding,) = verdict.problems
    assert finding.kind == "not enough time" and "was over in: matrix product" in finding.text
    assert (finding.hosts, verdict.excluded, reports[0].failures) == ((), {}, {})
    assert check.needed_seconds(1) == 14 and CheckPlan(save="x").needed_seconds(2) == 77


@pytest.mark.slow
def test_a_folder_that_cannot_be_written():
    verdict, _ = run_alone(plan(save="/proc/run"))
    (finding,) = verdict.problems
    assert (
        finding.kind == "write test of --save"
        and "write test of --save failed: No such file or directory (--save /proc/run)" in finding.text
    )
    assert verdict.excluded == {}, "it is the folder's fault"


@pytest.mark.slow
def test_a_full_disk():
    verdict, _ = run_alone(replace(plan(save="/dev/shm"), thresholds=Thresholds(shm=0)))
    assert not [finding for finding in verdict.problems if finding.kind != "full --save"]


@pytest.mark.slow
def test_wrong_results_are_found():
    drawn = iter(range(10**6))
    verdict, _ = run_alone(plan(), product=lambda a, b: torch.full((2, 2), float(next(drawn))))
    (finding,) = verdict.problems
    assert "computes wrong results" in finding.text and set(verdict.excluded) == {"n0"}


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_one_gpu():
    verdict, reports = run_alone(CheckPlan(runtime=RuntimeConfig(device="cuda"), speed_seconds=1.0))
    assert [finding for finding in verdict.problems if "occupied" not in finding.kind] == []
    assert set(reports[0].speeds) == {MATRIX_PRODUCT, MEMORY_COPY, HOST_COPY}
    assert reports[0].uuid.startswith(("GPU-", "MIG-")) and {"CUDA", "NCCL"} <= set(reports[0].versions)
