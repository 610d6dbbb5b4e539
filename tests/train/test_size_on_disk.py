"""A checkpoint is as large as its tensors: bytes for each parameter, and nothing that grows with views or ranks."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from support.layout_matrix import SP, ZERO1, Cell, mesh_of

from megatron_lite.checkpoint.save import save_checkpoint
from megatron_lite.checkpoint.writing import SaveRequest
from megatron_lite.config.counts import parameter_count
from megatron_lite.runs.manifest import Provenance, read_manifest
from megatron_lite.schedules.progress import Progress
from megatron_lite.train.assemble import build_engine

pytestmark = pytest.mark.slow

# Weight and two moments of 4 bytes; in bf16 a weight of 2 bytes, its main parameter of 4, and the moments.
BYTES = {"fp32": 4 + 4 + 4, "bf16": 2 + 4 + 4 + 4}
LAYOUTS = (
    Cell(),
    Cell(dtype="bf16"),
    Cell(dp=4),
    Cell(dp=4, dtype="bf16", **ZERO1),
    Cell(tp=2, pp=2, **SP),
    Cell(tp=2, dp=2, dtype="bf16"),
)


def wide(config):
    """Large enough for the names and headers of its tensors not to count."""
    model = replace(config.model, hidden_size=384, ffn_hidden_size=1536, head_dim=0)
    return replace(config, model=model)


def save(backend, cell, root):
    """On one rank: saves a fresh model of a cell's layout; returns the number of its parameters."""
    config = wide(cell.config())
    mesh = mesh_of(backend, cell.tp, cell.pp)
    engine = build_engine(config, mesh)
    save_checkpoint(
        SaveRequest(Path(root), 1, {"progress": Progress().to_dict()}, Provenance()), engine.state_tensors(), mesh.world
    )
    return parameter_count(config.model)


@pytest.mark.parametrize("cell", LAYOUTS, ids=str)
def test_bytes_on_disk_are_bytes_of_parameters(cell, on_ranks, tmp_path):
    torch.set_num_threads(1)
    parameters = on_ranks(cell.world, save, cell, str(tmp_path))[0]
    folder = tmp_path / "iter_0000001"
    found = sum(path.stat().st_size for path in folder.iterdir())
    assert found == pytest.approx(BYTES[cell.dtype] * parameters, rel=0.02)
    shares = [file.size for name, file in read_manifest(folder).files.items() if name.endswith(".distcp")]
    assert len(shares) == cell.world
    # Replicas write as much as each other, with ZeRO-1 and without.
    if cell.world == cell.dp:
        assert max(shares) < 1.05 * min(shares)
