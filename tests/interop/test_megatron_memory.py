"""Memory of an import and an export: never the whole model twice."""

from __future__ import annotations

import multiprocessing
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from support.deepspeed_files import write_deepspeed
from support.megatron_files import arguments, write_classic

from megatron_lite.config.model import ModelConfig
from megatron_lite.interop.importing import ImportOptions, import_checkpoint
from megatron_lite.interop.megatron.export import MegatronExportOptions, export_megatron, plan_megatron_export
from megatron_lite.interop.megatron.opening import MegatronOptions
from megatron_lite.interop.parameters import parameter_shapes

MODEL = ModelConfig(num_layers=4, hidden_size=768, num_attention_heads=12, max_position_embeddings=64, vocab_size=8192)


def status(name):
    (line,) = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(name)]
    return int(line.split()[1]) << 10


def growth(work, small, large):
    """Bytes by which the resident memory of a process grows while it does some work, after it has done it once."""
    ours, theirs = multiprocessing.Pipe()

    def measured():
        work(*small)  # libraries that are used for the first time are no part of it
        before = status("VmRSS")
        work(*large)
        theirs.send(status("VmHWM") - before)

    process = multiprocessing.get_context("fork").Process(target=measured)
    process.start()
    theirs.close()
    found = ours.recv()
    process.join()
    return found


def run_import(source, output):
    import_checkpoint(source, output, ImportOptions(megatron=MegatronOptions(flags=("--vocab-size", "8192"))))


def run_export(source, output):
    export_megatron(plan_megatron_export(str(source), 0, MegatronExportOptions()), output)


def written(folder, kind, model):
    """Write a checkpoint of a kind; returns the bytes of its weights."""
    state = {name: torch.full(shape, 0.5) for name, shape in parameter_shapes(model).items()}
    if kind == "deepspeed":
        write_deepspeed(folder, state, model, 2, args=arguments(model, 2))
    else:
        version, tp = (3.0, 1) if kind == "classic" else (0, 1 if kind == "pre-zip" else 2)
        layout = {"version": version, "as_zip": kind != "pre-zip"}
        write_classic(folder, state, model, tp, args=arguments(model, tp), **layout)
    return sum(tensor.nbytes for tensor in state.values())


@pytest.mark.parametrize("kind", ["classic", "version 0", "pre-zip", "deepspeed"])
def test_peak_memory(kind, tmp_path):
    small, large = tmp_path / "small", tmp_path / "large"
    written(small, kind, replace(MODEL, hidden_size=24, ffn_hidden_size=24, head_dim=2))
    size = written(large, kind, MODEL)
    pairs = [(folder, folder / "ck") for folder in (small, large)]
    assert growth(run_import, *pairs) < 1.3 * size
    if kind == "classic":
        assert growth(run_export, *((folder / "ck", folder / "out") for folder in (small, large))) < 1.3 * size
    shutil.rmtree(large)
