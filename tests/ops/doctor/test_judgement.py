"""Rules of the node check: outliers, bad GPUs, missing and hanging ranks, storage, clocks, links, excluded hosts."""

from __future__ import annotations

from dataclasses import replace

import pytest

from megatron_lite.ops.doctor.judgement import judge
from megatron_lite.ops.doctor.report import (
    GROUPS,
    HOST_COPY,
    MATRIX_PRODUCT,
    MEMORY_COPY,
    STORAGE,
    Gpu,
    Link,
    Node,
    Report,
    Storage,
)

GIB = 2**30
GPU = Gpu(uuid="GPU-0", name="H100", driver="570.1", memory_total=80 * GIB, memory_free=79 * GIB, ecc_errors=0)


def reports(num_hosts=4, per_host=2):
    """Return good reports of GPU hosts."""
    found = {}
    for rank in range(num_hosts * per_host):
        host, local = divmod(rank, per_host)
        found[rank] = Report(
            rank=rank,
            local_rank=local,
            host=f"n{host}",
            versions={"torch": "2.9.1", "driver": "570.1"},
            device="NVIDIA H100",
            uuid=f"GPU-{rank}",
            peak_flops=989e12,
            gpu=replace(GPU, uuid=f"GPU-{rank}"),
            speeds={MATRIX_PRODUCT: 700e12 + rank, MEMORY_COPY: 2.5e12, HOST_COPY: 50e9},
            node=Node(shm_total=64 * GIB, shm_free=64 * GIB) if not local else None,
            storage=Storage(path="/runs", write_speed=2e9, rename_seconds=0.001, free=10 * GIB) if not local else None,
            done=True,
        )
    return found


def texts(verdict):
    return [finding.text for finding in verdict.findings]


def test_good_nodes():
    verdict = judge(reports(), seconds=20.0)
    assert verdict.findings == () and verdict.excluded == {}
    assert verdict.summary == "node check of 8 ranks on 4 hosts: no problems (20 s)"


@pytest.mark.parametrize("name", [MATRIX_PRODUCT, MEMORY_COPY, HOST_COPY])
def test_a_slow_gpu_is_named_by_host_and_uuid(name):
    ranks = reports()
    ranks[5].speeds[name] *= 0.8
    verdict = judge(ranks)
    (text,) = texts(verdict)
    assert text.startswith(f"n2 rank 5 (GPU-5): {name} at ") and "0.80 of the median" in text
    assert verdict.excluded == {"n2": text} and "bad: n2" in verdict.summary


def test_of_two_ranks_the_slower_one_is_the_outlier():
    ranks = reports(2, 1)
    ranks[0].speeds[MATRIX_PRODUCT] = 400e12
    assert set(judge(ranks).excluded) == {"n0"}


def cpu_reports():
    ranks = replace_peak(reports())
    for report in ranks.values():
        report.uuid, report.gpu = "", None
    return ranks


@pytest.mark.parametrize(
    ("share", "kinds"), [(0.6, []), (0.3, ["slow matrix product"]), (0.01, ["slow matrix product"])]
)
def test_a_slow_cpu_may_be_shared(share, kinds):
    ranks = cpu_reports()
    ranks[3].speeds[MATRIX_PRODUCT] *= share
    verdict = judge(ranks)
    assert [finding.kind for finding in verdict.findings] == kinds and verdict.problems == ()
    assert verdict.excluded == {}


def test_links_and_disk_of_a_cpu_host_may_be_shared():
    rows = [(0, 1), (2, 3), (4, 5), (6, 7)]
    ranks = add_links(cpu_reports(), [link("tp", row, 1e6 if row == (4, 5) else 1e9) for row in rows])
    ranks[2].storage = replace(ranks[2].storage, write_speed=1e6)
    verdict = judge(ranks)
    assert [finding.kind for finding in verdict.findings] == ["slow --save", "slow tp links"]
    assert verdict.problems == () and verdict.excluded == {}


def test_other_devices_are_not_compared():
    ranks = reports()
    ranks[7].device, ranks[7].speeds[MATRIX_PRODUCT] = "NVIDIA A100", 250e12
    (finding,) = judge(replace_peak(ranks)).findings
    assert (finding.kind, finding.severity) == ("different device", "warning")
    assert finding.text == "device is NVIDIA A100 on n3, NVIDIA H100 on the other 7 ranks"


def replace_peak(ranks):
    for report in ranks.values():
        report.peak_flops = None
    return ranks


def test_all_gpus_below_the_data_sheet_are_a_warning():
    ranks = reports(1, 1)
    ranks[0].speeds[MATRIX_PRODUCT] = 200e12
    verdict = judge(ranks)
    assert verdict.problems == () and "matrix product at 20% of the data sheet's speed" in texts(verdict)[0]


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"ecc_errors": 2}, "2 uncorrected ECC errors"),
        ({"repairs": "row remapping: pending"}, "row remapping: pending"),
        ({"memory_free": 60 * GIB}, "20 GiB of 80 GiB GPU memory are in use by other processes"),
    ],
)
def test_a_bad_gpu_excludes_its_host(change, text):
    ranks = reports()
    ranks[1].gpu = replace(ranks[1].gpu, **change)
    verdict = judge(ranks)
    assert text in texts(verdict)[0] and set(verdict.excluded) == {"n0"}


def test_throttling_is_a_warning_and_mig_memory_is_not_compared():
    ranks = reports()
    ranks[1].gpu = replace(GPU, throttling="hw thermal slowdown", memory_free=0, mig=True)
    verdict = judge(ranks)
    assert verdict.problems == () and "hw thermal slowdown" in texts(verdict)[0]


def test_missing_ranks_are_named_with_the_hosts_that_lack_them():
    ranks = {rank: report for rank, report in reports().items() if report.host != "n3"}
    verdict = judge(ranks, missing=[6, 7], expected={f"n{host}": 2 for host in range(4)}, join_seconds=60)
    assert texts(verdict) == ["ranks 6-7 did not join within 60 s, expected on n3"]
    assert set(verdict.excluded) == {"n3"}


def test_missing_ranks_of_unknown_hosts():
    verdict = judge(reports(), missing=[8], join_seconds=60)
    assert "the host is not known without srun" in texts(verdict)[0] and verdict.excluded == {}


def test_most_hosts_missing_is_no_fault_of_theirs():
    ranks = {rank: report for rank, report in reports().items() if report.host == "n0"}
    verdict = judge(ranks, missing=range(2, 8), expected={f"n{host}": 2 for host in range(4)}, join_seconds=60)
    assert verdict.problems and verdict.excluded == {}


def test_a_hanging_rank_is_named_and_those_that_wait_for_it_are_not():
    ranks = reports()
    for rank, report in ranks.items():
        report.done, report.step = False, STORAGE if rank == 2 else GROUPS
    verdict = judge(ranks)
    assert texts(verdict) == ["n1 rank 2 (GPU-2) hangs in: write test of --save"]
    assert set(verdict.excluded) == {"n1"}


def test_ranks_that_waited_for_a_lost_one_are_no_problem():
    ranks = reports()
    for report in ranks.values():
        report.failures[GROUPS] = "no end within 16 s"
    ranks[2].failures, ranks[2].done, ranks[2].step = {}, False, MATRIX_PRODUCT
    assert texts(judge(ranks, lost=[2])) == ["n1 rank 2 (GPU-2) ended in: matrix product"]


def test_ranks_that_hang_in_communication():
    ranks = reports()
    for rank in (4, 5):
        ranks[rank].done, ranks[rank].step = False, "bandwidth of dp"
    verdict = judge(ranks)
    assert texts(verdict) == ["ranks 4-5 (n2) hang in: bandwidth of dp"] and verdict.excluded == {}


def test_equal_failures_of_communication_are_one_problem():
    ranks = reports()
    for report in ranks.values():
        report.failures[GROUPS] = "connection refused"
    (finding,) = judge(ranks).findings
    assert finding.text == "ranks 0-7 (n0, n1, n2, n3): process groups failed: connection refused"


def test_a_gpu_that_torch_does_not_find():
    ranks = reports(2, 1)
    ranks[1].failures["device"] = "torch finds no GPU"
    assert set(judge(ranks).excluded) == {"n1"}
    ranks[0].failures["device"] = "torch finds no GPU"
    assert judge(ranks).excluded == {}, "a fault of the environment"


def test_different_versions_name_the_minority():
    ranks = reports()
    for rank in (0, 1):
        ranks[rank].versions = {"torch": "2.8.0", "driver": "570.1"}
    (finding,) = judge(ranks).problems
    assert finding.text == "torch is 2.8.0 on n0, 2.9.1 on the other 6 ranks" and not finding.excludes


def test_storage_of_one_host():
    ranks = reports()
    ranks[2].storage = replace(ranks[2].storage, write_speed=1e8, rename_seconds=1.0)
    verdict = judge(ranks)
    assert "n1: writes to --save at 100 MB/s, 0.05 of the median 2.0 GB/s" in texts(verdict)[0]
    assert "a small file in --save takes 1000 ms" in texts(verdict)[1] and set(verdict.excluded) == {"n1"}


def test_a_failed_write_on_every_host_excludes_none():
    ranks = reports()
    for report in ranks.values():
        if report.storage:
            report.storage, report.failures[STORAGE] = None, "Read-only file system"
    verdict = judge(ranks)
    assert len(verdict.problems) == 4 and verdict.excluded == {}
    ranks = reports()
    ranks[0].storage, ranks[0].failures[STORAGE] = None, "Read-only file system"
    assert set(judge(ranks).excluded) == {"n0"}


def test_a_full_file_system():
    ranks = reports(1, 1)
    limits = {"free": 2**20, "free_limit": "left of the user's quota", "inodes": 3}
    ranks[0].storage = replace(ranks[0].storage, **limits)
    (finding,) = judge(ranks).problems
    assert finding.text == (
        "/runs has 1 MiB left of the user's quota (at least 1 GiB) and 3 files free (at least 1,000)"
    )


def test_shm_and_loopback_names_are_warnings():
    ranks = reports()
    ranks[0].node = Node(shm_total=2**26, shm_free=2**26, loopback="127.0.1.1")
    verdict = judge(ranks)
    assert verdict.problems == ()
    assert "n0: /dev/shm has 64 MiB free of 64 MiB" in texts(verdict)
    assert "n0: its own name resolves to 127.0.1.1, an address that no other host reaches" in texts(verdict)


def test_a_clock_ahead():
    ranks = reports()
    for rank in (4, 5):
        ranks[rank].clock_offset = 30.0
    assert texts(judge(ranks)) == ["n2: its clock is 30.0 s ahead of the others (at most 5)"]


def link(axis, ranks, bandwidth):
    operation = "send-recv" if axis in ("pp", "hosts") else "all-reduce"
    return Link(axis=axis, operation=operation, ranks=ranks, size=2**20, bandwidth=bandwidth)


def add_links(found, links):
    for one in links:
        for rank in one.ranks:
            found[rank].links.append(one)
    return found


@pytest.mark.parametrize("num_hosts", [3, 4, 8])
def test_a_host_whose_links_are_all_slow(num_hosts):
    pairs = [(host, (host + 1) % num_hosts) for host in range(num_hosts)]
    links = [link("hosts", tuple(sorted(pair)), 1e9 if 1 in pair else 10e9) for pair in pairs]
    verdict = judge(add_links(reports(num_hosts, 1), links))
    assert len(verdict.problems) == 2 and set(verdict.excluded) == {"n1"}


def test_a_slow_link_between_two_hosts_blames_neither():
    pairs = [(0, 1), (1, 2), (2, 3), (0, 3)]
    verdict = judge(add_links(reports(4, 1), [link("hosts", pair, 1e9 if pair == (1, 2) else 10e9) for pair in pairs]))
    (finding,) = verdict.problems
    assert finding.hosts == ("n1", "n2") and verdict.excluded == {}


def test_a_slow_group_within_a_host():
    rows = [(0, 1), (2, 3), (4, 5), (6, 7)]
    verdict = judge(add_links(reports(), [link("tp", row, 40e9 if row == (4, 5) else 300e9) for row in rows]))
    (finding,) = verdict.problems
    assert "ranks 4-5 (n2): all-reduce over tp at 40.0 GB/s" in finding.text and set(verdict.excluded) == {"n2"}
