"""Context parallelism with the options that the layout matrix leaves out: loss by tokens, positions by document."""

from dataclasses import replace

import pytest
import torch
from support.layout_matrix import EOD, Cell, mesh_of, reader

from megatron_lite.data.serving import masks
from megatron_lite.schedules.iteration import plan_iteration
from megatron_lite.schedules.progress import Progress
from megatron_lite.train.assemble import build_engine

pytestmark = pytest.mark.slow


def losses(backend, cell):
    """Losses of two iterations and gradient norms, with a mean over unmasked tokens and positions by document."""
    config = cell.config()
    config = replace(config, training=replace(config.training, per_token_loss=True))
    mesh, progress, found = mesh_of(backend, cell.tp, cell.pp, cell.cp), Progress(), []
    engine = build_engine(config, mesh)
    for _ in range(2):
        plan = plan_iteration(config, progress, replica=mesh.dp.rank)
        read = reader(mesh, plan.first_sample, config.batch.micro_batch_size, documents=True)

        def with_positions(index, read=read):
            batch = read(index)
            return replace(batch, position_ids=torch.from_numpy(masks.position_ids(batch.tokens.numpy(), EOD)))

        outcome = engine.train_step(plan, with_positions).outcome()
        progress = progress.advance(plan.global_batch, plan.tokens, outcome.applied)
        found += [outcome.loss, outcome.grad_norm]
    return found


@pytest.mark.parametrize("model", ["gpt2", "llama"])
def test_equals_one_process(model, on_ranks):
    expected = on_ranks(1, losses, Cell(model=model))[0]
    for found in on_ranks(2, losses, Cell(model=model, cp=2, exchange="all_gather")):
        assert found == pytest.approx(expected, rel=1e-5)
