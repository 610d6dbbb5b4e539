"""Test of benchmarks/kernels.py at toy size, with stand-ins for the vendors' kernels."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path

from support.vendor_modules import MODULES, install

FOLDER = str(Path(__file__).resolve().parents[2] / "benchmarks")
FLAGS = "--device cpu --num-layers 1 --hidden-size 64 --num-attention-heads 4 --seq-length 32 --vocab-size 99 --bf16"
FLAGS += " --max-position-embeddings 32 --micro-batch-size 2 --position-embedding-type alibi --attention-dropout 0"


def test_installed_kernels_are_measured_and_the_others_named(monkeypatch, capsys):
    install(monkeypatch, *(name for name in MODULES if name != "liger_kernel"))
    monkeypatch.syspath_prepend(FOLDER)
    benchmark = importlib.import_module("kernels")
    try:
        assert benchmark.main(FLAGS.split(), calls=1) == 0
    finally:
        sys.modules.pop("kernels")
    lines = [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()]
    assert sum("PyTorch" in line and "ratio" in line for line in lines) == 7
    assert "norm liger not installed" in lines and "attention flash-attn 3 it has no ALiBi" in lines
    assert any(line.startswith("weight gradient PyTorch's addmm") for line in lines)
