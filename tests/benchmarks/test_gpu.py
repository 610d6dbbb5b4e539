"""Test of benchmarks/gpu.py at toy size: every side is measured, profiled and reported on a CPU."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path

import pytest
import torch

from megatron_lite.model import gpt

pytestmark = pytest.mark.slow
FOLDER = str(Path(__file__).resolve().parents[2] / "benchmarks")


@pytest.fixture
def benchmark(monkeypatch):
    monkeypatch.syspath_prepend(FOLDER)
    monkeypatch.setattr(gpt, "compile_options", lambda sharding: {"backend": "aot_eager"})
    yield importlib.import_module("gpu")
    for name in ("gpu", "step_vs_plain"):
        sys.modules.pop(name, None)


def test_every_side_is_measured(benchmark):
    shapes = (benchmark.Shape("toy, 2 micro-batches", 1, 32, 2, 16, 2, micro_batches=2, vocab=64),)
    results = benchmark.run(shapes, torch.device("cpu"), compile_backend="aot_eager", steps=2, minutes=5)
    assert {(result.shape, result.side) for result in results} == {
        (shape.name, side) for shape in shapes for side in (benchmark.PLAIN, *benchmark.OURS)
    }
    for result in results:
        assert not result.problem, result
        assert len(result.seconds) == (4 if result.side in benchmark.TURNS else 2)
        assert (result.side == benchmark.PLAIN) == (not result.kinds)
    text = benchmark.report(results, shapes, 1e12)
    assert text.count("toy, 2 micro-batches") == 5 + 4 and "matrix products" in text


def test_what_fails_or_has_no_time_is_named(benchmark, monkeypatch):
    def fail(*args):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB\nmore")

    monkeypatch.setattr(benchmark, "our_step", fail)
    monkeypatch.setattr(benchmark, "plain_step", fail)
    large = (benchmark.Shape("large", 1, 32, 2, 16, 2, vocab=64),)
    results = benchmark.run(large, torch.device("cpu"), steps=1)
    assert {result.problem for result in results} == {"CUDA out of memory. Tried to allocate 2 GiB"}
    late = benchmark.run(large, torch.device("cpu"), minutes=0)
    assert {result.problem for result in late} == {"left out: no time was left"}
    assert "no time was left" in benchmark.report(late, large, None)


def test_without_a_gpu(benchmark, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["gpu.py"])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert benchmark.main() == 1
    assert "needs a GPU" in capsys.readouterr().err
