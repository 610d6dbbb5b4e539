"""Tests of the flags of --device xla: engine, flags without effect, and the run as one host sees it."""

import pytest
from support.job_commands import SMALL

from megatron_lite.cli import doctor, rehearse, train
from megatron_lite.config.arguments import parse_run
from megatron_lite.config.xla import per_process
from megatron_lite.errors import ConfigError
from megatron_lite.schedules.batch_size import final_batch_size


def parse(flags):
    return parse_run([*SMALL, "--micro-batch-size", "1", "--device", "xla", *flags.split()], world_size=8)


def test_the_device_has_an_engine_of_its_own():
    assert parse("").config.runtime.engine == "xla"
    assert parse("--engine xla --device tpu").config.runtime.device == "xla"


@pytest.mark.parametrize(
    "flag",
    ["--no-overlap-grad-reduce", "--bucket-megabytes 4", "--num-threads 2", "--no-gradient-accumulation-fusion"],
)
def test_flags_without_effect_are_noted(flag):
    assert any(
        f"{flag.split()[0]} " in f"{note} " and "no effect with --device xla" in note for note in parse(flag).notes
    )


def test_the_cache_without_the_device_is_noted():
    notes = parse_run([*SMALL, "--xla-cache-path", "x"], world_size=1).notes
    assert any("--xla-cache-path" in note and "no effect without --device xla" in note for note in notes)


@pytest.mark.parametrize("hosts", [1, 2, 4])
def test_a_host_reads_the_samples_of_its_devices(hosts):
    run = parse("--tensor-model-parallel-size 2 --micro-batch-size 2 --global-batch-size 32").config
    host = per_process(run, hosts)
    assert (host.parallel.dp, host.parallel.tp, host.batch.micro_batch_size) == (hosts, 1, 8 // hosts)
    assert final_batch_size(host.batch, host.parallel.dp) == 32


@pytest.mark.parametrize(
    ("batches", "wrong"),
    [
        ("--global-batch-size 24 --rampup-batch-size 8 4 100", "the increment 4 of --rampup-batch-size"),
        ("--global-batch-size 24 --rampup-batch-size 4 8 100", "the start 4 of --rampup-batch-size"),
        ("--step-batch-size-schedule 0:8,64000:12", "12 in --step-batch-size-schedule"),
    ],
)
def test_every_batch_is_whole_micro_batches_of_all_replicas(batches, wrong):
    with pytest.raises(ConfigError, match=f"With --device xla, {wrong} is not a multiple of 8"):
        parse(batches)


def test_commands_that_run_single_ranks_refuse_the_device():
    with pytest.raises(ConfigError, match="Ranks of --device xla cannot be rehearsed"):
        rehearse.run([*SMALL, "--device", "xla", "--micro-batch-size", "1", "--world-size", "8"])
    with pytest.raises(ConfigError, match="doctor does not measure --device xla"):
        doctor.run(["--device", "xla"])


@pytest.mark.parametrize(
    ("flags", "variables", "message"),
    [
        ("--tensor-model-parallel-size 3", {}, "Cannot split 8 devices into model .* or use 6 or 9 devices"),
        ("--world-size 4", {}, "not the number of XLA devices: 8 .*Give --world-size 8, or set CPU_NUM_DEVICES=4"),
        ("--tensor-model-parallel-size 16 --num-attention-heads 16", {"WORLD_SIZE": "2"}, "evenly among 2 hosts"),
        ("--ranks-per-task 2", {}, "--ranks-per-task 2 starts 2 processes .* Remove --ranks-per-task"),
        ("", {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}, "torchrun starts 2 processes .* one process on each host"),
    ],
)
def test_devices_and_processes_are_checked_before_the_runtime_starts(monkeypatch, flags, variables, message):
    launch = {"RANK": "0", "LOCAL_RANK": "0", "MASTER_ADDR": "localhost", "MASTER_PORT": "1"} if variables else {}
    for name, value in {"PJRT_DEVICE": "CPU", "CPU_NUM_DEVICES": "8", **launch, **variables}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError, match=message):
        train.run([*SMALL, "--micro-batch-size", "1", "--device", "xla", *flags.split()])
