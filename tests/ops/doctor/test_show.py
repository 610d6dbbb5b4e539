"""Output of the node check: tables, findings of many hosts, JSON."""

from __future__ import annotations

import io
import json
from dataclasses import asdict, replace
from pathlib import Path

from rich.console import Console

from megatron_lite.ops.doctor.judgement import judge
from megatron_lite.ops.doctor.report import MATRIX_PRODUCT, Gpu, Link, Node, Report, Storage
from megatron_lite.ops.doctor.show import json_record, print_check

GPU = Gpu(uuid="GPU-a", name="H100", driver="570.1", memory_total=80 * 2**30, memory_free=79 * 2**30)


def reports(count, per_host):
    found = {}
    for rank in range(count):
        found[rank] = Report(
            rank=rank,
            local_rank=rank % per_host,
            host=f"n{rank // per_host}",
            versions={"torch": "2.9.1"},
            device="NVIDIA H100",
            uuid=f"GPU-{rank}",
            gpu=replace(GPU, uuid=f"GPU-{rank}"),
            speeds={MATRIX_PRODUCT: 7e14},
            links=[Link(axis="tp", operation="all-reduce", ranks=(0, 1), size=2**20, bandwidth=3e11)],
            storage=Storage(path="/runs", write_speed=2e9, rename_seconds=0.001, free=2**40, inodes=10**6),
            node=Node(shm_total=2**33, shm_free=2**33),
            done=True,
        )
    return found


def printed(found):
    stream = io.StringIO()
    print_check(judge(found), found, Console(file=stream, width=160))
    return stream.getvalue()


def test_each_rank_has_a_row():
    found = reports(4, 2)
    found[3].speeds[MATRIX_PRODUCT] = 3e14
    found[3].notes.append("a note")
    text = printed(found)
    assert "torch 2.9.1\nNVIDIA H100\n" in text
    rows = [" ".join(line.split()) for line in text.splitlines()]
    assert "3 n1 GPU-3 79 GiB of 80 GiB good 300.0T +0.00" in rows
    assert "tp all-reduce 1 MiB 1 300G 300G 0-1 (n0)" in rows
    assert "--save /runs: writes at 2.0 GB/s (n0, the slowest of 2 hosts), 1 ms a small file, 1 TiB free" in text
    assert "Note: a note\n" in text
    assert "PROBLEM: n1 rank 3 (GPU-3): matrix product at 300.0 TFLOP/s, 0.43 of the median 700.0 TFLOP/s" in text
    assert "node check of 4 ranks on 2 hosts: 1 problem; bad: n1 (0 s)" in text


def test_of_many_ranks_each_host_has_a_row():
    found = reports(128, 8)
    for rank in range(0, 48, 8):
        found[rank].gpu = replace(GPU, ecc_errors=1)
    text = printed(found)
    rows = [" ".join(line.split()) for line in text.splitlines()]
    assert "16-23 n2 8 GPUs 79 GiB of 80 GiB 1 ECC errors 700.0T +0.00" in rows
    assert any(row.startswith("120-127 n15 ") for row in rows)
    assert text.count("uncorrected ECC errors since") == 3 and "PROBLEM: ECC errors, 3 more: n3, n4, n5" in text


def test_a_rank_without_any_measurement():
    found = {0: Report(rank=0, local_rank=0, host="n0")}
    assert "PROBLEM: n0 rank 0 hangs in: start" in printed(found)


def test_json():
    found = reports(2, 2)
    record = json.loads(json.dumps(json_record(judge(found), found, exclude_file=Path("x"), written=["n1"])))
    assert record["good"] and record["exclude_file"] == "x" and record["written"] == ["n1"]
    assert Report.from_json(record["ranks"][1]) == found[1] and record["ranks"][0]["gpu"] == asdict(found[0].gpu)
