"""Test of benchmarks/plan_vs_measured.py with a training command that takes the time of a known machine."""

import importlib
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path

from megatron_lite.config.arguments import parse_run
from megatron_lite.planner.hardware import hardware
from megatron_lite.planner.step_time import step_time_of
from megatron_lite.runs.metrics_file import encode
from megatron_lite.tokenizer.vocabulary import fill_vocabulary

FOLDER = str(Path(__file__).resolve().parents[2] / "benchmarks")


def test_a_machine_is_predicted(monkeypatch, capsys):
    machine = hardware("cpu")
    efficiency = replace(machine.efficiency, matmul=0.3, attention=0.2, memory=0.3, optimizer=0.1)
    machine = replace(machine, efficiency=efficiency)

    def train(command, **options):
        flags = command[command.index("train") + 1 :]
        config, _ = fill_vocabulary(parse_run(flags).config)
        batch = config.batch
        step = step_time_of(config, machine, batch.global_batch_size, batch.seq_length)
        timers = {"optimizer": step.optimizer, "forward-backward": step.total - step.optimizer}
        shape = {"global_batch_size": batch.global_batch_size, "seq_length": batch.seq_length}
        record = {"kind": "iteration", "iteration": 1, "seconds": step.total, "timers": timers} | shape
        start = {"kind": "start", "device": "cpu", "config": asdict(config)}
        Path(config.metrics.metrics_file).write_bytes(b"".join(map(encode, [start, *[record] * 9])))

    monkeypatch.syspath_prepend(FOLDER)
    benchmark = importlib.import_module("plan_vs_measured")
    monkeypatch.setattr(subprocess, "run", train)
    monkeypatch.setattr(sys, "argv", ["plan_vs_measured.py"])
    assert benchmark.main() == 0
    out = capsys.readouterr().out
    assert len(out.splitlines()) == 2 + len(benchmark.MODELS) and "largest error" in out
