"""Exact resume between layouts: trains, saves, loads in other layouts, and compares states and losses."""

from pathlib import Path

import pytest
from support.layout_matrix import build, iterate, mesh_of

from megatron_lite.checkpoint.load import load_checkpoint
from megatron_lite.checkpoint.reading import compare_checkpoints
from megatron_lite.checkpoint.save import save_checkpoint
from megatron_lite.checkpoint.writing import SaveRequest
from megatron_lite.runs.manifest import Provenance
from megatron_lite.schedules.progress import Progress

BEFORE, AFTER = 3, 2


def save(engine, progress, mesh, root):
    scalars = {"progress": progress.to_dict(), "engine": engine.state_scalars()}
    save_checkpoint(
        SaveRequest(Path(root), progress.iteration, scalars, Provenance()), engine.state_tensors(), mesh.world
    )


def write(backend, cell, root):
    """On one rank: trains, saves and trains on without a stop; the losses after the save."""
    config, mesh = cell.config(), mesh_of(backend, cell.tp, cell.pp, cell.cp)
    engine = build(config, mesh)
    *_, progress = iterate(config, mesh, engine, Progress(), BEFORE)
    save(engine, progress, mesh, root)
    return iterate(config, mesh, engine, progress, AFTER)[0]


def read(backend, cells, root):
    """On one rank, for each layout: loads, saves what was loaded, and trains on; the losses."""
    losses = []
    for number, cell in enumerate(cells):
        config, mesh = cell.config(), mesh_of(backend, cell.tp, cell.pp, cell.cp)
        engine = build(config, mesh)
        saved = Path(root) / f"iter_{BEFORE:07d}"
        scalars = engine.fill(lambda tensors, saved=saved, world=mesh.world: load_checkpoint(saved, tensors, world))
        engine.load_scalars(scalars["engine"])
        progress = Progress.from_dict(scalars["progress"])
        save(engine, progress, mesh, f"{root}/world{mesh.world.size}-{number}")
        losses.append(iterate(config, mesh, engine, progress, AFTER)[0])
    return losses


def check(writer, readers, on_ranks, root):
    """Check that readers load a writer's state bit for bit and continue with its losses."""
    expected = on_ranks(writer.world, write, writer, str(root))[0]
    saved = f"iter_{BEFORE:07d}"
    for world in sorted({cell.world for cell in readers}):
        cells = [cell for cell in readers if cell.world == world]
        for number, (cell, losses) in enumerate(zip(cells, on_ranks(world, read, cells, str(root))[0], strict=True)):
            differences = list(compare_checkpoints(root / saved, root / f"world{world}-{number}" / saved))
            assert len(differences) > 20
            assert [difference.name for difference in differences if not difference.equal] == [], str(cell)
            if cell == writer:
                assert losses == expected, f"{cell} does not go on bit for bit"
            elif writer.dtype == "fp32":
                assert losses == pytest.approx(expected, rel=1e-5), f"{writer} -> {cell}"
