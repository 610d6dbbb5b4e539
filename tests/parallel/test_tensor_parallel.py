"""Tests of tensor and sequence parallelism: the model split over tp equals the model on one device."""

import pytest
import torch
from support.stage_backward import run_backward

from megatron_lite.backend.environment import Launch
from megatron_lite.backend.select import select_backend
from megatron_lite.config.batch import BatchConfig
from megatron_lite.config.fp8 import Fp8Config
from megatron_lite.config.model import ModelConfig
from megatron_lite.config.optimizer import RecomputeConfig
from megatron_lite.config.parallel import ParallelConfig
from megatron_lite.config.run import RunConfig
from megatron_lite.config.runtime import RuntimeConfig
from megatron_lite.model.batch import MicroBatch
from megatron_lite.model.gpt import GPTStage
from megatron_lite.parallel.mesh import build_mesh
from megatron_lite.parallel.random import RngStreams
from megatron_lite.parallel.tensors import narrow

GPT2 = {"num_layers": 2, "hidden_size": 32, "num_attention_heads": 4, "max_position_embeddings": 16}
# With tp = 4, the last rank's 16 rows of the vocabulary are all padding, those of the third in part.
GPT2 |= {"vocab_size": 41, "padded_vocab_size": 64, "hidden_dropout": 0.0, "attention_dropout": 0.0, "init_std": 0.2}
LLAMA = GPT2 | {"num_attention_heads": 8, "num_query_groups": 4, "position_embedding": "rotary", "activation": "swiglu"}
LLAMA |= {"normalization": "RMSNorm", "linear_bias": False, "qkv_bias": False, "tied_embeddings": False}
LLAMA |= {"ffn_hidden_size": 48, "qk_layernorm": True}
BLOOM = GPT2 | {"position_embedding": "alibi", "embed_layernorm": True}
MODELS = {"gpt2": GPT2, "llama": LLAMA, "bloom": BLOOM}


def make_batch(masked=False):
    tokens = torch.randint(0, 41, (3, 17), generator=torch.Generator().manual_seed(3))
    mask = (torch.arange(16) % 5 != 0).float().repeat(3, 1) if masked else None
    return MicroBatch(tokens[:, :-1], tokens[:, 1:], mask)


def make_stage(backend, parallel, model, recompute=None, fp8=None):
    mesh = build_mesh(backend, parallel)
    config = RunConfig(
        model=ModelConfig(**model),
        batch=BatchConfig(seq_length=16, micro_batch_size=3),
        parallel=parallel,
        recompute=recompute or RecomputeConfig(),
        fp8=fp8 or Fp8Config(),
    )
    rng = RngStreams(5, backend, mesh.tp.rank)
    rng.set_microbatch(3, 1)
    stage = GPTStage(config, range(config.model.num_layers), mesh, rng)
    # Biases and norms move away from 0 and 1, so that an error in them shows; replicated ones by equal amounts.
    with torch.no_grad():
        for p in stage.named_parameters_global():
            if len(p.global_shape) == 1 or p.name.endswith("bias"):
                generator = torch.Generator().manual_seed(len(p.name))
                whole = torch.randn(p.global_shape, generator=generator) * 0.1
                p.local().add_(narrow(whole, p.rectangle))
    return stage


def run(backend, parallel, model, recompute=None, masked=True, fp8=None):
    """Return loss, logits and gradients of one step; gradients as (name, global shape, offset, tensor)."""
    stage = make_stage(backend, parallel, model, recompute, fp8)
    batch = make_batch(masked)
    logits = stage.logits(None, batch).detach()
    loss = run_backward(stage, batch)
    gradients = []
    for p in stage.named_parameters_global():
        if p.sequence_parallel:  # as the optimizer does
            stage.sharding.tp.all_reduce_(p.param.grad)
        gradients.append((p.name, p.global_shape, p.rectangle.offset, p.local(p.param.grad).clone()))
        shape = p.rectangle.shape
        if shape[0] < p.param.shape[0] and len(shape) == p.param.dim():
            assert not p.param.data[shape[0] :].any() and not p.param.grad[shape[0] :].any()
    return loss.item(), logits, gradients


def assemble(results):
    """Assemble global gradients from all ranks' shards; replicated shards must be equal."""
    whole = {}
    for _, _, gradients in results:
        for name, shape, offset, part in gradients:
            target = whole.setdefault(name, torch.full(shape, float("nan")))
            for dim, (start, length) in enumerate(zip(offset, part.shape, strict=True)):
                target = target.narrow(dim, start, length)
            known = ~target.isnan()
            torch.testing.assert_close(target[known], part[known], rtol=1e-6, atol=1e-7, msg=f"{name} differs by rank")
            target.copy_(part)
    assert not any(gradient.isnan().any() for gradient in whole.values())
    return whole


def alone():
    return select_backend(RuntimeConfig(device="cpu", num_threads=1), ParallelConfig(), Launch())


@pytest.mark.parametrize("sequence_parallel", [False, True], ids=["", "sequence-parallel"])
@pytest.mark.parametrize("tp", [2, 4])
@pytest.mark.parametrize("model", list(MODELS))
def test_any_tp_equals_one_device(on_ranks, model, tp, sequence_parallel):
    loss, logits, gradients = run(alone(), ParallelConfig(), MODELS[model])
    parallel = ParallelConfig(world_size=tp, tp=tp, sequence_parallel=sequence_parallel)
    results = on_ranks(tp, run, parallel, MODELS[model])
    assert [result[0] for result in results] == pytest.approx([loss] * tp, rel=1e-6)
    split = torch.cat([result[1] for result in results], dim=-1)
    torch.testing.assert_close(split[..., :41], logits[..., :41], rtol=1e-5, atol=1e-5)
    expected = {name: part for name, _, _, part in gradients}
    for name, gradient in assemble(results).items():
        scale = expected[name].abs().max().item()
        torch.testing.assert_close(
            gradient, expected[name], rtol=1e-5, atol=1e-5 * scale, msg=lambda m, name=name: f"{name}: {m}"
        )


@pytest.mark.slow
@pytest.mark.parametrize(
    "recompute",
    [
        RecomputeConfig(granularity="full", method="uniform", num_layers=1),
        RecomputeConfig(granularity="full", method="uniform", num_layers=2),
        RecomputeConfig(granularity="full", method="block", num_layers=1),
        RecomputeConfig(granularity="selective"),
    ],
    ids=["uniform-1", "uniform-2", "block-1", "selective"],
)
@pytest.mark.parametrize("tp", [1, 2])
def test_recomputation_with_dropout_is_bit_exact(on_ranks, recompute, tp):
    model = GPT2 | {"hidden_dropout": 0.1, "attention_dropout": 0.1}
    parallel = ParallelConfig(world_size=tp, tp=tp, sequence_parallel=tp > 1)
    if tp == 1:
        kept, again = run(alone(), parallel, model), run(alone(), parallel, model, recompute)
    else:
        kept, again = on_ranks(tp, run, parallel, model)[0], on_ranks(tp, run, parallel, model, recompute)[0]
    assert kept[0] == again[0]
    for (name, _, _, one), (_, _, _, two) in zip(kept[2], again[2], strict=True):
        assert torch.equal(one, two), name


@pytest.mark.parametrize("recipe", ["tensorwise", "rowwise"])
def test_fp8_with_tensor_and_sequence_parallelism(on_ranks, recipe):
    """Other parts of the operands have other scales: the results are those of one device up to fp8's rounding."""
    fp8, parallel = (
        Fp8Config(format="hybrid", recipe=recipe),
        ParallelConfig(world_size=2, tp=2, sequence_parallel=True),
    )
    plain = run(alone(), ParallelConfig(), GPT2)
    whole = run(alone(), ParallelConfig(), GPT2, fp8=fp8)
    split = on_ranks(2, run, parallel, GPT2, None, True, fp8)
    assert whole[0] != plain[0]
    assert [result[0] for result in split] == pytest.approx([whole[0]] * 2, rel=0.01)
    expected = {name: part for name, _, _, part in plain[2]}
    for found in (assemble(split), {name: part for name, _, _, part in whole[2]}):
        for name, gradient in found.items():
            assert (gradient - expected[name]).norm() <= 0.3 * expected[name].norm(), name


def steps(backend, parallel, model, compiled):
    stage = make_stage(backend, parallel, model)
    if compiled:
        stage.compile(backend="aot_eager", fullgraph=True)
    losses = []
    for iteration in range(3):
        stage.embedding.rng.set_microbatch(iteration, 0)
        losses.append(run_backward(stage, make_batch()).item())
    return losses, [p.param.grad for p in stage.named_parameters_global()]


@pytest.mark.slow
def test_compiled_ranks_equal_eager_in_one_graph(on_ranks):
    parallel = ParallelConfig(world_size=2, tp=2, sequence_parallel=True)
    model = LLAMA | {"num_layers": 1, "hidden_dropout": 0.2, "attention_dropout": 0.2}
    eager, compiled = (on_ranks(2, steps, parallel, model, choice)[1] for choice in (False, True))
    assert compiled[0] == pytest.approx(eager[0], rel=1e-6)
    for one, two in zip(eager[1], compiled[1], strict=True):
        torch.testing.assert_close(one, two, rtol=1e-5, atol=1e-5)


@pytest.mark.slow
def test_a_compiled_stage_draws_new_dropout_each_iteration():
    model = GPT2 | {"num_layers": 1, "hidden_dropout": 0.2, "attention_dropout": 0.2}
    eager, compiled = (steps(alone(), ParallelConfig(), model, choice)[0] for choice in (False, True))
    assert compiled == pytest.approx(eager, rel=1e-6)
    assert len(set(eager)) == 3


def hidden_after_dropout(backend, parallel):
    stage = make_stage(backend, parallel, GPT2 | {"hidden_dropout": 0.5})
    x = stage.embedding(make_batch().tokens, None)
    return x == 0


def test_dropout_differs_between_ranks_only_where_activations_are_split(on_ranks):
    one = hidden_after_dropout(alone(), ParallelConfig())
    same = on_ranks(2, hidden_after_dropout, ParallelConfig(world_size=2, tp=2))
    assert torch.equal(same[0], one) and torch.equal(same[1], one)
    parts = on_ranks(2, hidden_after_dropout, ParallelConfig(world_size=2, tp=2, sequence_parallel=True))
    assert parts[0].shape[0] == one.shape[0] // 2
    assert not torch.equal(parts[0], parts[1])
