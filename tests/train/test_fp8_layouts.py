"""Delayed fp8 scaling in every layout: equal histories and losses, exact resume, checkpoints of other recipes."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from support.layout_matrix import SP, ZERO1, Cell, iterate, mesh_of

from megatron_lite.backend.environment import Launch
from megatron_lite.backend.select import select_backend
from megatron_lite.checkpoint.load import load_checkpoint
from megatron_lite.checkpoint.save import save_checkpoint
from megatron_lite.checkpoint.writing import SaveRequest
from megatron_lite.config.fp8 import Fp8Config
from megatron_lite.config.parallel import ParallelConfig
from megatron_lite.config.runtime import RuntimeConfig
from megatron_lite.runs.manifest import Provenance
from megatron_lite.schedules.progress import Progress
from megatron_lite.train.assemble import build_engine

pytestmark = pytest.mark.slow

DELAYED = Fp8Config(format="hybrid", recipe="delayed", amax_history_len=3, amax_compute_algo="max")
BEFORE, AFTER = 4, 2
LAYOUTS = (Cell(tp=2, **SP), Cell(dp=2, **ZERO1), Cell(pp=2, schedule="zb-h1"), Cell(pp=2, recompute="full"))


def engine_of(backend, cell, fp8):
    config, mesh = replace(cell.config(), fp8=fp8), mesh_of(backend, cell.tp, cell.pp)
    return config, mesh, build_engine(config, mesh)


def histories(engine):
    return {
        tensor.name: tensor.pieces[0].tensor.flatten().tolist()
        for tensor in engine.state_tensors()
        if "amax_history" in tensor.name
    }


def write(backend, cell, root, fp8=DELAYED):
    """Train, save, and train on; the losses, the histories at the save, and the losses after it."""
    config, mesh, engine = engine_of(backend, cell, fp8)
    losses, _, progress = iterate(config, mesh, engine, Progress(), BEFORE)
    scalars = {"progress": progress.to_dict(), "engine": engine.state_scalars()}
    save_checkpoint(SaveRequest(Path(root), BEFORE, scalars, Provenance()), engine.state_tensors(), mesh.world)
    saved = histories(engine)
    return losses, saved, iterate(config, mesh, engine, progress, AFTER)[0]


def read(backend, cell, root, fp8=DELAYED):
    """Load and train on; messages, loaded histories, and losses."""
    config, mesh, engine = engine_of(backend, cell, fp8)
    scalars = load_checkpoint(Path(root) / f"iter_{BEFORE:07d}", engine.state_tensors(), mesh.world)
    messages = engine.load_scalars(scalars["engine"])
    loaded = histories(engine)
    return messages, loaded, iterate(config, mesh, engine, Progress.from_dict(scalars["progress"]), AFTER)[0]


@pytest.fixture(scope="module")
def alone():
    return select_backend(RuntimeConfig(device="cpu", num_threads=1), ParallelConfig(), Launch())


@pytest.fixture(scope="module")
def reference(alone, tmp_path_factory):
    """Root, losses, histories and further losses of one process."""
    root = str(tmp_path_factory.mktemp("reference"))
    return root, *write(alone, Cell(), root)


@pytest.mark.parametrize("cell", LAYOUTS, ids=str)
def test_layouts_have_the_same_scales_and_resume_each_others_runs(cell, reference, on_ranks, tmp_path):
    root, losses, saved, after = reference
    found, resumed = on_ranks(2, write, cell, str(tmp_path)), on_ranks(2, read, cell, str(tmp_path))
    for (ours, history, later), (messages, loaded, again) in zip(found, resumed, strict=True):
        assert ours == pytest.approx(losses, rel=1e-2) and later == pytest.approx(after, rel=1e-2)
        assert len(history) == 16 // cell.pp
        for name, values in history.items():
            # A gradient in e5m2 has steps of a quarter, and another order of summation may cause one.
            assert values == pytest.approx(saved[name], rel=0.3), name
        assert messages == [] and loaded == history and again == later
    if cell.pp == 1:
        assert found[0][1] == found[1][1], "the maxima are not those of all ranks"
    for messages, loaded, later in on_ranks(2, read, cell, root):
        assert messages == [] and later == pytest.approx(after, rel=1e-2)
        assert loaded == {name: saved[name] for name in loaded}


def test_a_resumed_process_continues_exactly(alone, reference):
    root, _, saved, after = reference
    assert read(alone, Cell(), root) == ([], saved, after)


@pytest.mark.parametrize(
    "fp8", [Fp8Config(), replace(DELAYED, recipe="tensorwise"), replace(DELAYED, amax_history_len=2)], ids=str
)
def test_the_recipe_may_change(alone, reference, tmp_path, fp8):
    root, *_ = reference
    delayed = fp8.format != "off" and fp8.recipe == "delayed"
    messages, loaded, _ = read(alone, Cell(), root, fp8)
    assert len(messages) == delayed and len(loaded) == 16 * delayed
    write(alone, Cell(), str(tmp_path), fp8)
    messages, loaded, losses = read(alone, Cell(), str(tmp_path))
    assert messages == [
        "the checkpoint has no history of fp8 maxima of this length for all layers: the first iteration takes the "
        "missing scales from its own values"
    ]
    assert not any(any(values) for values in loaded.values()) and all(loss < 5 for loss in losses)
