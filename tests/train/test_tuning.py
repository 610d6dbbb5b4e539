"""Finetuning in the engine: frozen parameters, learning-rate factors, loss over the tokens of answers."""

import re
from dataclasses import replace
from functools import lru_cache

import pytest
import torch
from support.layout_matrix import (
    LIMITS,
    SP,
    ZERO1,
    Cell,
    deviation,
    iterate,
    mesh_of,
    put_together,
    reader,
    run_cell,
    within,
)
from torch.nn import functional as F

from megatron_lite.backend.environment import Launch
from megatron_lite.backend.select import select_backend
from megatron_lite.config.optimizer import OptimizerConfig
from megatron_lite.config.parallel import ParallelConfig
from megatron_lite.config.runtime import RuntimeConfig
from megatron_lite.config.selection import select_parameters
from megatron_lite.config.tuning import TuningConfig
from megatron_lite.errors import ConfigError
from megatron_lite.schedules.iteration import plan_iteration
from megatron_lite.schedules.progress import Progress
from megatron_lite.train.assemble import build_engine

pytestmark = pytest.mark.slow

# At pp 2 the first stage is frozen; the frozen table is the head's weight, too.
TUNED = TuningConfig(freeze=("embedding", r"layers\.[01]\."), lr_factors=((r"layers\.2\.", 0.5),), answer_loss=True)
# The norm before the first linear layer is frozen, and the layer is not.
NORMS = TuningConfig(freeze=("embedding", "norm"), lr_factors=(("fc1", 2.0), ("mlp", 0.25)))

# Layers that share their parameters are frozen in part.
SHARED = TuningConfig(freeze=("position_embeddings", "mlp"), lr_factors=(("attention", 0.5),))


@pytest.fixture(scope="module")
def alone():
    torch.set_num_threads(1)
    return select_backend(RuntimeConfig(device="cpu"), ParallelConfig(), Launch())


@pytest.fixture(scope="module")
def reference(alone):
    return lru_cache(maxsize=None)(lambda cell: put_together([run_cell(alone, cell)]))


@pytest.mark.parametrize(
    "cell",
    [
        Cell(schedule="zb-h1", tuning=NORMS),
        Cell(tp=2, pp=2, schedule="zb-h1", **SP, tuning=NORMS),
        Cell(tp=2, pp=2, schedule="zb-h1", **SP, tuning=TUNED),
        Cell(pp=2, dp=2, **ZERO1, recompute="full", tuning=TUNED),
        Cell(pp=2, dp=2, model="llama", schedule="zb-v", tuning=TUNED),
        Cell(pp=2, dp=2, model="albert", **ZERO1, tuning=SHARED),
    ],
    ids=str,
)
def test_layouts_train_the_same_model(cell, alone, reference, on_ranks):
    expected = reference(cell.reference())
    ours = put_together([run_cell(alone, cell)] if cell.world == 1 else on_ranks(cell.world, run_cell, cell))
    found = deviation(ours, expected)
    assert within(found, LIMITS["fp32"]), found


def test_frozen_parameters_stay_and_have_no_optimizer_state(alone):
    cell = Cell(tuning=TUNED)
    config, mesh = cell.config(), mesh_of(alone, 1, 1)
    engine = build_engine(config, mesh)
    before = {tensor.name: tensor.pieces[0].tensor.clone() for tensor in engine.state_tensors()}
    iterate(config, mesh, engine, Progress(), 3)
    after = {tensor.name: tensor.pieces[0].tensor for tensor in engine.state_tensors()}
    frozen = {name for name in after if re.search(r"^(embedding|decoder\.layers\.[01]\.)", name)}
    assert len(frozen) == 2 + 2 * 12
    for name in after.keys() - frozen:
        assert not torch.equal(before[name], after[name]), name
    assert all(torch.equal(before[name], after[name]) for name in frozen)
    assert not [name for name in after if name.startswith("optimizer.") and name.split(".", 2)[2] in frozen]
    chosen = select_parameters(config)
    assert chosen.frozen == frozen
    assert chosen.num_elements - chosen.num_frozen == sum(
        after[name].numel() for name in after.keys() - frozen if not name.startswith("optimizer.")
    )


def test_a_factor_scales_the_step(alone):
    """The first pattern counts: fc1 by 2, the rest of the MLP by 0.25."""
    mesh, steps = mesh_of(alone, 1, 1), []
    for tuning in (TuningConfig(), replace(NORMS, freeze=())):
        config = replace(Cell(tuning=tuning).config(), optimizer=OptimizerConfig(kind="sgd", weight_decay=0.0))
        config = replace(config, lr=replace(config.lr, warmup_iters=0))
        engine = build_engine(config, mesh)
        before = {p.name: p.param.detach().clone() for p in engine.buffers.parameters}
        iterate(config, mesh, engine, Progress(), 1)
        steps.append({p.name: p.param.detach() - before[p.name] for p in engine.buffers.parameters})
    for name, step in steps[0].items():
        factor = 2.0 if "fc1" in name else 0.25 if "mlp" in name else 1.0
        torch.testing.assert_close(steps[1][name], factor * step, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("micro_batch", [1, 2])
def test_the_loss_is_the_mean_over_unmasked_tokens(alone, micro_batch):
    cell = Cell(micro_batch=micro_batch, tuning=TuningConfig(answer_loss=True))
    config, mesh = cell.config(), mesh_of(alone, 1, 1)
    plan = plan_iteration(config, Progress())
    outcome = build_engine(config, mesh).train_step(plan, reader(mesh, 0, micro_batch)).outcome()

    engine = build_engine(config, mesh)
    (stage,) = engine._stages.values()
    batch = reader(mesh, 0, plan.global_batch)(0)
    tokens = F.cross_entropy(stage.logits(None, batch)[..., :41].permute(1, 2, 0), batch.labels, reduction="none")
    loss = (tokens * batch.loss_mask).sum() / batch.loss_mask.sum()
    gradients = torch.autograd.grad(loss, [p.param for p in engine.buffers.parameters])
    norm = torch.cat([gradient.flatten() for gradient in gradients]).norm()
    assert batch.loss_mask.sum(1).unique().numel() > 1
    assert outcome.loss == pytest.approx(loss.item(), rel=1e-5)
    assert outcome.grad_norm == pytest.approx(norm.item(), rel=1e-4)


def test_a_batch_without_answers_changes_nothing_but_the_decay(alone):
    cell = Cell(tuning=TuningConfig(answer_loss=True))
    config, mesh = cell.config(), mesh_of(alone, 1, 1)
    read = reader(mesh, 0, 1)

    def masked(index):
        batch = read(index)
        return replace(batch, loss_mask=torch.zeros_like(batch.loss_mask))

    outcome = build_engine(config, mesh).train_step(plan_iteration(config, Progress()), masked).outcome()
    assert (outcome.loss, outcome.grad_norm, outcome.finite) == (0.0, 0.0, True)


@pytest.mark.parametrize(
    ("tuning", "message"),
    [
        ({"freeze": ("embedding", "decoder")}, "--freeze embedding decoder freezes all"),
        ({"freeze": ("layer.0",)}, "The pattern 'layer.0' of --freeze matches no parameter.*such as those of .*layers"),
        ({"lr_factors": (("qkw", 0.5),)}, "The pattern 'qkw' of --lr-factors matches no parameter"),
    ],
)
def test_patterns_that_do_not_fit_the_model(tuning, message):
    with pytest.raises(ConfigError, match=message):
        select_parameters(Cell(tuning=TuningConfig(**tuning)).config())
