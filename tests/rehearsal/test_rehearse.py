"""Tests of rehearsals: a 13B job of 512 ranks, small jobs in detail, and refused layouts."""

import json
import os
import subprocess
import sys
from dataclasses import replace

import pytest
from support.job_commands import BIG_RAMP, SMALL

from megatron_lite.cli import rehearse
from megatron_lite.config.arguments import parse_run
from megatron_lite.config.counts import parameter_count
from megatron_lite.errors import ConfigError
from megatron_lite.rehearsal.dry_run import rehearse_ranks, representative_ranks
from megatron_lite.rehearsal.mismatches import call_mismatches
from megatron_lite.tokenizer.vocabulary import fill_vocabulary

pytestmark = pytest.mark.slow

NULL = ["--tokenizer-type", "NullTokenizer", "--vocab-size", "127", "--make-vocab-size-divisible-by", "8"]


@pytest.fixture
def big(tmp_path):
    """Return the arguments of the 13B job, with its DeepSpeed JSON."""
    config = tmp_path / "ds_config.json"
    config.write_text(
        json.dumps(
            {
                "train_micro_batch_size_per_gpu": 1,
                "train_batch_size": 1024,
                "gradient_clipping": 1.0,
                "zero_optimization": {"stage": 1},
                "fp16": {"enabled": True, "loss_scale": 0, "initial_scale_power": 12},
            }
        )
    )
    return [str(config) if word == "./ds_config.json" else word for word in BIG_RAMP]


def small(*arguments):
    return fill_vocabulary(parse_run([*SMALL, *NULL, *arguments]).config)[0]


def test_13b_on_512_ranks_in_a_minute_and_8_gb(big):
    program = "import sys; from megatron_lite.cli.main import main; sys.exit(main(sys.argv[1:]))"
    arguments = [sys.executable, "-c", program, "rehearse", *big, "--world-size", "512", "--json"]
    process = subprocess.Popen(arguments, stdout=subprocess.PIPE, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    output = process.stdout.read()
    _, status, usage = os.wait4(process.pid, 0)
    assert status == 0
    # CPU time, which does not depend on other processes of the machine.
    assert usage.ru_utime + usage.ru_stime < 60
    assert usage.ru_maxrss * 1024 < 8e9
    record = json.loads(output)
    assert record["disagreements"] == []
    ranks = {rank["rank"]: rank for rank in record["ranks"]}
    assert list(ranks) == [0, 128, 256, 384, 511]
    first, last = ranks[0]["ramp_stages"], ranks[511]["ramp_stages"]
    assert [stage["global_batch"] for stage in first] == list(range(16, 1025, 16))
    assert all(stage["played"] for stage in (*first, *last))
    assert [stage["microbatches"] for stage in last[:5]] == [0, 0, 0, 1, 1], "stages smaller than the replicas"
    for rank in ranks.values():
        held = rank["buffer_bytes"]
        padded = held["parameters"] // 2
        assert rank["parameters"] <= padded < 1.01 * rank["parameters"]
        assert held["gradients"] == 4 * padded
        assert held["moments"] == 2 * held["main parameters"] == 2 * 4 * padded // 64
        traffic = {(line["axis"], line["kind"]): line["sent"] for line in rank["ramp_stages"][-1]["traffic"]}
        assert traffic["dp", "reduce_scatter"] == pytest.approx(4 * padded * 63 / 64, rel=1e-6)
        assert traffic["dp", "all_gather"] == pytest.approx(2 * padded * 63 / 64, rel=1e-6)
    # Forward, its recomputation and backward: 2 + 2 + 2 all-reduces a layer of s b h in fp16, which over two ranks
    # send as much as they hold; a middle stage has nothing else on the axis.
    layers = 10
    tp = next(line for line in ranks[128]["ramp_stages"][-1]["traffic"] if line["axis"] == "tp")
    assert (tp["calls"], tp["sent"]) == (16 * 6 * layers, 16 * 6 * layers * 2048 * 5120 * 2)


def test_the_communication_of_all_ranks_of_a_small_job_matches():
    config = small("--tensor-model-parallel-size", "2", "--pipeline-model-parallel-size", "2", "--world-size", "8")
    reports = list(rehearse_ranks(config, dict.fromkeys(range(8), True)))
    assert [report.error for report in reports] == [""] * 8
    assert call_mismatches(reports) == []
    total = sum(report.parameters for report in reports if report.at["dp"] == 0)
    # One replica also has the tied head's copy, and parameters replicated over tp: norms, row biases, positions.
    assert total > parameter_count(config.model)
    alone = next(rehearse_ranks(small(), {0: True}))
    assert alone.parameters == parameter_count(config.model)


@pytest.mark.parametrize(
    "arguments",
    [
        "--pipeline-model-parallel-size 4 --world-size 8 --num-layers 8",
        "--pipeline-model-parallel-size 2 --num-layers-per-virtual-pipeline-stage 1 --world-size 4",
        "--pipeline-model-parallel-size 2 --pipeline-schedule zb-h1 --world-size 2",
        "--pipeline-model-parallel-size 2 --pipeline-schedule zb-v --world-size 2",
        "--tensor-model-parallel-size 4 --sequence-parallel --use-distributed-optimizer --world-size 8 --bf16",
        "--recompute-granularity selective --untie-embeddings-and-output-weights --world-size 2 --eod-mask-loss",
        "--rampup-batch-size 2 2 100 --world-size 4 --position-embedding-type rope --swiglu --group-query-attention "
        "--num-query-groups 2",
        "--pipeline-model-parallel-size 2 --num-layers-per-virtual-pipeline-stage 1 --world-size 4 --share-layers 2 "
        "--embedding-size 16",
        "--context-parallel-size 4 --pipeline-model-parallel-size 2 --world-size 8 --bf16",
        "--context-parallel-size 2 --tensor-model-parallel-size 2 --sequence-parallel --world-size 8 --cp-comm-type "
        "all_gather --use-distributed-optimizer --position-embedding-type alibi --reset-attention-mask",
    ],
)
def test_every_kind_of_layout_can_be_rehearsed(arguments):
    config = small(*arguments.split())
    reports = list(rehearse_ranks(config, representative_ranks(config)))
    assert [report.error for report in reports] == [""] * len(reports)
    assert all(report.iterations for report in reports)
    assert call_mismatches(reports) == []


def test_a_missing_message_is_found():
    config = small("--pipeline-model-parallel-size", "2", "--world-size", "4")
    reports = list(rehearse_ranks(config, representative_ranks(config)))
    first = reports[0].iterations[0]
    sends = [number for number, transfer in enumerate(first.transfers) if transfer.kind == "send"]
    shorter = tuple(t for number, t in enumerate(first.transfers) if number != sends[-1])
    reports[0].iterations[0] = replace(first, transfers=shorter)
    assert any("ranks 0 and 2 differ in message number 2 along pp" in text for text in call_mismatches(reports))


def test_the_error_of_a_rank_is_reported(capsys, monkeypatch):
    import megatron_lite.rehearsal.dry_run as dry_run

    def broken(config, mesh, **others):
        raise ValueError("no such layer")

    monkeypatch.setattr(dry_run, "build_engine", broken)
    assert rehearse.run([*SMALL, *NULL, "--world-size", "2"]) == 1
    assert "WOULD FAIL: rank 0: start-up: ValueError: no such layer (test_rehearse.py:" in capsys.readouterr().out


def test_chosen_ranks_as_tables(capsys):
    assert rehearse.run([*SMALL, *NULL, "--world-size", "4", "--rank", "1", "3", "--train-iters", "7"]) == 0
    text = capsys.readouterr().out
    assert "4 ranks = tensor 1 x pipeline 1 x data 4; vocabulary 128" in text
    assert "Ramp-up: ranks 1 and 3" in text


def test_the_command_with_its_launcher_is_rehearsed(capsys):
    launch = ["torchrun", "--nnodes", "2", "--nproc-per-node", "2", "pretrain_gpt.py"]
    assert rehearse.run(["--rank", "1", "--json", *launch, *SMALL, *NULL]) == 0
    record = json.loads(capsys.readouterr().out)
    assert record["layout"]["world_size"] == 4
    assert [rank["rank"] for rank in record["ranks"]] == [1]


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        ("--world-size 500", "The number of ranks must be a multiple of tensor x pipeline-parallel size"),
        (
            "--num-attention-heads 5 --kv-channels 160",
            "Cannot split --num-attention-heads 5 over 2 tensor-parallel ranks",
        ),
        ("--pad-vocab-size-to 50259", "Cannot split --pad-vocab-size-to 50259 over 2 tensor-parallel ranks"),
        ("--ffn-hidden-size 20481", "Cannot split --ffn-hidden-size 20481 over 2 tensor-parallel ranks"),
        ("--num-layers 3", "Cannot split 3 layers over 4 pipeline stages"),
        (
            "--num-layers-per-virtual-pipeline-stage 3",
            "Cannot divide 40 layers into chunks of 3",
        ),
        ("--micro-batch-size 3", "Cannot split a global batch of"),
        ("--seq-length 2047 --sequence-parallel", "tensor-parallel ranks for --sequence-parallel"),
        ("--rank 512", "--rank 512 does not exist in a job of"),
    ],
)
def test_wrong_layouts_of_the_13b_model_are_refused(big, arguments, problem):
    big = big[: big.index("--deepspeed")]
    with pytest.raises(ConfigError) as caught:
        rehearse.run([*big, "--world-size", "512", *arguments.split()])
    assert problem in str(caught.value)


@pytest.mark.parametrize(
    "arguments",
    [
        (),
        ("--tensor-model-parallel-size", "2", "--pipeline-model-parallel-size", "2", "--world-size", "8"),
        ("--rampup-batch-size", "2", "2", "60", "--use-distributed-optimizer", "--world-size", "2", "--bf16"),
    ],
)
def test_tables_fit_80_columns_and_sizes_have_a_fitting_unit(arguments, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    assert rehearse.run([*SMALL, *NULL, *arguments]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= 80
    assert not any("…" in line for line in lines), "nothing is truncated"
    assert any("Memory of a rank (MiB)" in line for line in lines), "in GiB all would be 0.00"
    held = next(line for line in lines[lines.index(next(line for line in lines if "dp.pp.tp" in line)) + 2 :])
    assert float(held.split()[-1]) >= 1
    assert any("Communication per" in line for line in lines) == bool(arguments), "one rank does not communicate"


def test_ranks_of_deepspeed_are_not_simulated():
    with pytest.raises(ConfigError, match=r"deepspeed cannot be rehearsed.*Replace --engine deepspeed"):
        rehearse.run([*SMALL, *NULL, "--world-size", "2", "--deepspeed", "--zero-stage", "3"])
