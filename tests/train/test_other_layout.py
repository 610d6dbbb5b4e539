"""Resume in another layout: the losses equal those of an uninterrupted run."""

from dataclasses import replace

import pytest
from support.layout_matrix import ITERATIONS, SP, ZERO1, Cell, iterate, mesh_of, put_together, run_cell

from megatron_lite.config.checkpoint import CheckpointConfig
from megatron_lite.metrics.reporter import Reporter
from megatron_lite.runs.comparison import config_as_json
from megatron_lite.runs.manifest import Provenance
from megatron_lite.train.assemble import build_engine
from megatron_lite.train.start import find_start, load_start
from megatron_lite.train.state import RunState

pytestmark = pytest.mark.slow

BF16 = {"dtype": "bf16", "dropout": "all"}
CHAINS = {
    "gpt2": (
        Cell(tp=2, pp=2, dp=2, **SP, **ZERO1),
        Cell(),
        Cell(pp=2, dp=2, schedule="zb-v", **ZERO1),
        Cell(dp=4, bucket_megabytes=0),
    ),
    "llama": (
        Cell(pp=4, model="llama", schedule="zb-h1"),
        Cell(tp=4, model="llama", micro_batch=2),
        Cell(tp=2, pp=2, model="llama", schedule="interleaved", layers_per_chunk=1),
        Cell(cp=2, dp=2, model="llama", **ZERO1),
        Cell(dp=2, model="llama", **ZERO1),
    ),
    "albert": (
        Cell(tp=2, pp=2, model="albert", **SP, schedule="interleaved", layers_per_chunk=1),
        Cell(dp=2, model="albert", **ZERO1),
    ),
    "bf16, all dropout": (Cell(dp=4, **ZERO1, **BF16), Cell(pp=2, **BF16), Cell(dp=2, **BF16), Cell(**BF16)),
}


def resume(backend, cell, root, iterations):
    """Starts from the newest checkpoint in `root`, if there is one, trains, and saves."""
    config = replace(cell.config(), checkpoint=CheckpointConfig(save=root, load=root))
    mesh = mesh_of(backend, cell.tp, cell.pp, cell.cp)
    engine = build_engine(config, mesh)
    told = []
    start, provenance = find_start(config, told.append, mesh.world), Provenance(config_as_json(config))
    start, progress = load_start(start, engine, config, told.append)
    began = progress.iteration
    losses, norms, progress = iterate(config, mesh, engine, progress, iterations)
    with RunState(config, mesh.world, provenance, start, Reporter(())) as state:
        state.save(engine, progress, final=True)
    return began, losses, norms


@pytest.mark.parametrize("chain", CHAINS.values(), ids=list(CHAINS))
def test_losses_continue_in_another_layout(chain, on_ranks, tmp_path):
    whole = put_together(on_ranks(1, run_cell, chain[0].reference()))
    losses, norms = [], []
    for cell in chain:
        results = on_ranks(cell.world, resume, cell, str(tmp_path), ITERATIONS // len(chain))
        assert all(result == results[0] for result in results)
        began, more_losses, more_norms = results[0]
        assert began == len(losses)
        losses += more_losses
        norms += more_norms
    assert losses == pytest.approx(whole.losses, rel=1e-5 if chain[0].dtype == "fp32" else 1e-3)
    assert norms == pytest.approx(whole.norms, rel=1e-4 if chain[0].dtype == "fp32" else 1e-2)
