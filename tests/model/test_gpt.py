"""Tests of the GPT on one device: loss, padding, documents, KV cache, stages, initialization, dtypes."""

import dataclasses
from typing import get_args
from unittest import mock

import numpy as np
import pytest
import torch
from support.stage_backward import run_backward
from torch.nn import functional as F

from megatron_lite.config.batch import BatchConfig
from megatron_lite.config.model import Activation, ModelConfig
from megatron_lite.config.optimizer import PrecisionConfig, RecomputeConfig
from megatron_lite.config.parallel import ParallelConfig
from megatron_lite.config.parameters import shared_stages
from megatron_lite.config.run import RunConfig
from megatron_lite.data.serving.masks import document_rows
from megatron_lite.model.attention import AttentionContext
from megatron_lite.model.batch import Documents, MicroBatch
from megatron_lite.model.gpt import DTYPES, GPTStage
from megatron_lite.model.layer import ACTIVATIONS
from megatron_lite.parallel.gemm import DeferredWeightGradients
from megatron_lite.parallel.mesh import build_mesh
from megatron_lite.parallel.random import RngStreams


def gradients(stage):
    return {p.name: p.param.grad.clone() for p in stage.named_parameters_global()}


def test_sample_losses_are_masked_means(make_stage, make_batch):
    stage = make_stage(init_std=0.3)
    mask = (torch.rand(3, 16, generator=torch.Generator().manual_seed(1)) < 0.6).float()
    mask[2] = 0
    batch = make_batch(3, loss_mask=mask)
    logits = stage.logits(None, batch)
    tokens = F.cross_entropy(logits[..., :101].permute(1, 2, 0), batch.labels, reduction="none")
    expected = [(tokens[n] * mask[n]).sum() / mask[n].sum() for n in (0, 1)]
    losses, gradient = stage.sample_losses(stage(None, batch), batch)
    torch.testing.assert_close(losses, torch.stack([*expected, torch.tensor(0.0)]))
    assert gradient is None


def test_micro_batches_add_up_to_the_batch(make_stage, make_batch):
    stage, batch = make_stage(init_std=0.3), make_batch(4)
    run_backward(stage, batch)
    whole = gradients(stage)
    stage.zero_grad()
    for n in range(4):
        one = dataclasses.replace(batch, tokens=batch.tokens[n : n + 1], labels=batch.labels[n : n + 1])
        run_backward(stage, one)
    for name, gradient in gradients(stage).items():
        torch.testing.assert_close(gradient, whole[name], rtol=1e-4, atol=1e-5)


def test_padded_vocabulary_does_not_change_the_loss(make_stage, make_batch):
    """Logits of padding are 0: in the softmax they would take probability from the tokens of the vocabulary."""
    batch, results = make_batch(), []
    for padded in (101, 104, 256):
        stage = make_stage(padded_vocab_size=padded)
        loss = run_backward(stage, batch)
        table = stage.embedding.word_embeddings.weight
        assert not table.data[101:].any() and not table.grad[101:].any()
        results.append((loss.item(), table.grad[:101].clone()))
    for loss, gradient in results[1:]:
        assert loss == pytest.approx(results[0][0], rel=1e-6)
        torch.testing.assert_close(gradient, results[0][1])


@pytest.fixture
def fp64(monkeypatch):
    """Compute in fp64: the compared sums have different lengths, so their order depends on the processor."""
    monkeypatch.setitem(DTYPES, "fp32", torch.float64)


@pytest.mark.parametrize("position_embedding", ["learned", "rotary", "alibi", "none"])
def test_attention_stays_within_documents(make_stage, make_batch, fp64, position_embedding):
    stage = make_stage(position_embedding=position_embedding, init_std=0.3).eval()
    batch = make_batch(1, 16)
    cut = 7
    order, inverse, groups, cu_seqlens = document_rows((np.arange(16) >= cut).astype(np.int64)[None])
    order, inverse, cu_seqlens = (torch.from_numpy(array) for array in (order, inverse, cu_seqlens))
    documents = Documents(order, inverse, groups, cu_seqlens)
    positions = torch.cat((torch.arange(cut), torch.arange(16 - cut)))
    packed = dataclasses.replace(batch, documents=documents, position_ids=positions.unsqueeze(0))
    together = stage.logits(None, packed)
    for part in (slice(0, cut), slice(cut, 16)):
        alone = stage.logits(None, dataclasses.replace(batch, tokens=batch.tokens[:, part]))
        torch.testing.assert_close(together[part], alone, rtol=1e-6, atol=1e-6)
    assert not torch.allclose(stage.logits(None, batch)[cut:], together[cut:], atol=1e-3)


@pytest.mark.parametrize("position_embedding", ["learned", "rotary", "alibi", "none"])
def test_kv_cache_does_not_change_logits(make_stage, make_batch, fp64, position_embedding):
    stage = make_stage(position_embedding=position_embedding, num_query_groups=2, init_std=0.3).eval()
    batch = make_batch(2, 12)
    with torch.no_grad():
        whole = stage.logits(None, batch)
        cache = stage.new_cache(2, 12)
        # Row 0 begins with 5 tokens and row 1 with 2, padded; then each row has its own positions.
        first = batch.tokens[:, :5].clone()
        first[1, 2:] = 0
        steps = [stage.logits(None, dataclasses.replace(batch, tokens=first), cache.first([0, 1]))]
        torch.testing.assert_close(steps[0][:, 0], whole[:5, 0], rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(steps[0][:2, 1], whole[:2, 1], rtol=1e-6, atol=1e-6)
        for at in ((5, 2), (6, 3), (7, 4)):
            positions = torch.tensor(at).unsqueeze(1)
            step = dataclasses.replace(batch, tokens=batch.tokens.gather(1, positions), position_ids=positions)
            found = stage.logits(None, step, cache.next(at))[0]
            torch.testing.assert_close(found, whole[at, (0, 1)], rtol=1e-6, atol=1e-6)
        # Row 0 begins again, and row 1 keeps its content; then row 0 is dropped.
        stage.logits(None, dataclasses.replace(batch, tokens=batch.tokens[1:, :5]), cache.first([0]))
        positions = torch.tensor([[5], [5]])
        step = dataclasses.replace(batch, tokens=batch.tokens[[1, 1], 5:6], position_ids=positions)
        found = stage.logits(None, step, cache.next([5, 5]))[0]
        torch.testing.assert_close(found, whole[5, [1, 1]], rtol=1e-6, atol=1e-6)
        cache.keep([1])
        step = dataclasses.replace(batch, tokens=batch.tokens[1:, 6:7], position_ids=positions[1:] + 1)
        torch.testing.assert_close(stage.logits(None, step, cache.next([6]))[0, 0], whole[6, 1], rtol=1e-6, atol=1e-6)


def first_stage(backend, parallel):
    """Return sizes and dtypes of the first stage's output and cache, its partial norms, and its dropout's seeds."""
    mesh = build_mesh(backend, parallel)
    model = ModelConfig(
        num_layers=2,
        hidden_size=64,
        num_attention_heads=4,
        num_query_groups=2,
        vocab_size=101,
        padded_vocab_size=128,
        max_position_embeddings=16,
        hidden_dropout=0.0,
        attention_dropout=0.1,
        qk_layernorm=True,
        fp32_residual=True,
    )
    batch = BatchConfig(seq_length=16, micro_batch_size=3)
    precision = PrecisionConfig(dtype="bf16")
    stage = GPTStage(
        RunConfig(model=model, batch=batch, parallel=parallel, precision=precision),
        range(1),
        mesh,
        RngStreams(7, backend, mesh.tp.rank),
    )
    tokens = torch.zeros(3, 16, dtype=torch.long)
    with mock.patch.object(RngStreams, "reseed") as reseed:
        x = stage(None, MicroBatch(tokens, tokens))
    assert (tuple(x.shape), x.dtype) == (stage.hidden_shape(16, 3), stage.hidden_dtype)
    partial = [p.name.split(".", 4)[-1] for p in stage.named_parameters_global() if p.sequence_parallel]
    keys = None
    if not parallel.sequence_parallel:
        first = stage.new_cache(3, 16).first(range(3))
        keys, _ = first.extend(0, *torch.ones(2, 16, 3, 1, 16, dtype=torch.bfloat16))
    return (
        tuple(x.shape),
        str(x.dtype),
        partial,
        [(site, int(layer), split) for site, layer, split in (call.args for call in reseed.call_args_list)],
        keys,
    )


def test_first_stage_of_one_process_and_of_two_ranks(on_ranks, mesh):
    shape, dtype, partial, seeds, _ = first_stage(mesh.backend, ParallelConfig())
    assert (shape, dtype, partial, seeds) == ((16, 3, 64), "torch.float32", [], [("attention", 0, False)])
    norms = ["q_norm.weight", "q_norm.bias", "k_norm.weight", "k_norm.bias"]
    for sequence_parallel, length in ((False, 16), (True, 8)):
        parallel = ParallelConfig(world_size=2, tp=2, sequence_parallel=sequence_parallel)
        for shape, dtype, partial, seeds, _ in on_ranks(2, first_stage, parallel):
            assert (shape, dtype, seeds) == ((length, 3, 64), "torch.float32", [("attention", 0, True)])
            assert [name for name in partial if name[1:6] == "_norm"] == norms


@pytest.mark.parametrize("tied", [True, False])
def test_two_stages_equal_one(make_stage, make_batch, tied):
    config = {"num_layers": 3, "tied_embeddings": tied, "init_std": 0.3}
    whole = make_stage(**config)
    first = make_stage(range(2), **config)
    last = make_stage(range(2, 3), **config)
    batch = make_batch()
    hidden = first(None, batch)
    assert tuple(hidden.shape) == first.hidden_shape(16, 2) and hidden.dtype == first.hidden_dtype
    received = hidden.detach().requires_grad_()
    loss = run_backward(last, batch, received)
    hidden.backward(received.grad)
    expected = run_backward(whole, batch)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    shared = shared_stages(whole.config, (range(2), range(2, 3)))
    assert shared == ({"embedding.word_embeddings.weight": (0, 1)} if tied else {})
    names = [p.name for stage in (first, last) for p in stage.named_parameters_global()]
    assert sorted(names) == sorted([*(p.name for p in whole.named_parameters_global()), *shared])
    theirs = gradients(whole)
    ours, of_last = gradients(first), gradients(last)
    for name in shared:
        of_last[name] += ours[name]
    ours |= of_last
    for name, gradient in ours.items():
        torch.testing.assert_close(gradient, theirs[name], rtol=1e-5, atol=1e-6, msg=name)


def test_initialization_depends_on_seed_and_name_only(make_stage):
    whole = {p.name: p.local() for p in make_stage(num_layers=4).named_parameters_global()}
    part = make_stage(range(2, 4), num_layers=4)
    for p in part.named_parameters_global():
        assert torch.equal(p.local(), whole[p.name]), p.name
    matrix = "decoder.layers.{}.self_attention.{}.weight"
    assert not torch.equal(whole[matrix.format(0, "qkv")], whole[matrix.format(1, "qkv")])
    assert whole[matrix.format(0, "qkv")].std().item() == pytest.approx(0.02, rel=0.05)
    assert whole[matrix.format(0, "proj")].std().item() == pytest.approx(0.02 / 8**0.5, rel=0.05)
    assert whole["decoder.final_norm.weight"].eq(1).all() and whole["decoder.final_norm.bias"].eq(0).all()


def test_every_parameter_is_listed_once_with_a_global_name(make_stage):
    for changes in ({}, {"tied_embeddings": False}, {"activation": "swiglu", "qk_layernorm": True}):
        stage = make_stage(**changes)
        params = stage.named_parameters_global()
        assert {id(p.param) for p in params} == {id(p) for p in stage.parameters()}
        assert len({p.name for p in params}) == len(params)
        for p in params:
            assert p.local().data_ptr() == p.param.data_ptr() and tuple(p.local().shape) == p.rectangle.shape
    fc1 = next(p for p in params if p.name == "decoder.layers.0.mlp.fc1.weight")
    assert fc1.global_shape == (2, stage.config.ffn_hidden_size, 64) and fc1.tp_dim == 1


def test_zero_centered_norm_and_residual_after_norm(make_stage, make_batch):
    batch = make_batch()
    plain, centered = make_stage(), make_stage(zero_centered_norm=True)
    assert centered.decoder.final_norm.weight.eq(0).all()
    torch.testing.assert_close(plain.logits(None, batch), centered.logits(None, batch))
    layer = make_stage(residual_post_layernorm=True).decoder.layers["0"]
    x = torch.randn(16, 2, 64)
    a = layer.input_norm(x)
    y = a + layer.self_attention(a, AttentionContext())
    m = layer.pre_mlp_norm(y)
    torch.testing.assert_close(layer(x, AttentionContext()), m + layer.mlp(m))


def test_activations(make_stage):
    x = torch.linspace(-3, 3, 50, dtype=torch.float64)  # in fp32, gelu and gelu_tanh are close
    assert set(ACTIVATIONS) == set(get_args(Activation))
    torch.testing.assert_close(ACTIVATIONS["squared_relu"](x), torch.clamp(x, min=0) ** 2)
    torch.testing.assert_close(
        ACTIVATIONS["gelu_tanh"](x), 0.5 * x * (1 + torch.tanh((2 / torch.pi) ** 0.5 * (x + 0.044715 * x**3)))
    )
    torch.testing.assert_close(ACTIVATIONS["gelu"](x), x * 0.5 * (1 + torch.erf(x / 2**0.5)))
    mlp = make_stage(activation="swiglu").decoder.layers["0"].mlp
    h = torch.randn(4, 1, 64)
    gate, up = F.linear(h, mlp.fc1.weight, mlp.fc1.bias).chunk(2, -1)
    torch.testing.assert_close(mlp(h), F.linear(gate * gate.sigmoid() * up, mlp.fc2.weight, mlp.fc2.bias))


@pytest.mark.parametrize("fp32_residual", [False, True])
@pytest.mark.parametrize("position_embedding", ["learned", "rotary", "alibi"])
@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_half_precision_trains_near_fp32(make_stage, make_batch, dtype, position_embedding, fp32_residual):
    changes = {"position_embedding": position_embedding, "fp32_residual": fp32_residual, "normalization": "RMSNorm"}
    batch, losses = make_batch(), []
    for type_ in ("fp32", dtype):
        stage = make_stage(dtype=type_, init_std=0.1, zero_centered_norm=fp32_residual, **changes)
        logits, loss = stage.logits(None, batch), run_backward(stage, batch)
        assert logits.dtype == DTYPES[type_] and loss.dtype == torch.float32
        assert all(p.grad.dtype == DTYPES[type_] and p.grad.isfinite().all() for p in stage.parameters())
        losses.append(loss.item())
    assert losses[1] == pytest.approx(losses[0], rel=5e-3)


def test_dropout_reseeds_only_in_training_and_where_it_is_on(mesh, make_stage, make_batch, monkeypatch):
    batch, seeds = make_batch(), []
    stage = make_stage(hidden_dropout=0.2, attention_dropout=0.2)
    monkeypatch.setattr(type(mesh.backend), "seed", lambda backend, value: seeds.append(value))
    stage(None, batch)
    assert len(seeds) == len(set(seeds)) == 1 + 3 * 2
    seeds.clear()
    stage.eval()(None, batch)
    make_stage()(None, batch)
    assert not seeds


@pytest.mark.slow
@pytest.mark.parametrize("recompute", [None, RecomputeConfig(granularity="full")])
@pytest.mark.parametrize("changes", [{}, {"parallel_residual": True}], ids=["gpt2", "parallel residual"])
def test_a_compiled_stage_computes_the_same_with_dropout(make_stage, make_batch, recompute, changes):
    batch = make_batch()
    changes = {"hidden_dropout": 0.2, "attention_dropout": 0.2, **changes}
    eager, compiled = make_stage(recompute=recompute, **changes), make_stage(recompute=recompute, **changes)
    compiled.compile(backend="aot_eager", fullgraph=True)
    for stage in (eager, compiled):
        for number in range(2):
            step = dataclasses.replace(batch, number=number)
            run_backward(stage, step)
    theirs = gradients(eager)
    for name, gradient in gradients(compiled).items():
        torch.testing.assert_close(gradient, theirs[name], rtol=1e-5, atol=1e-6, msg=name)


def counting_backend(graphs):
    """Return a backend of torch.compile that counts the graphs and runs them eagerly."""

    def compile_graph(graph, inputs):
        graphs.append(graph)
        return torch._dynamo.lookup_backend("aot_eager")(graph, inputs)

    return compile_graph


@pytest.mark.slow
@pytest.mark.parametrize("recompute", [None, RecomputeConfig(granularity="full")])
def test_compiled_layers_share_one_graph_for_training_and_one_for_evaluation(make_stage, make_batch, recompute):
    torch.compiler.reset()
    batch, graphs = make_batch(), []
    changes = {"num_layers": 11, "hidden_dropout": 0.2, "attention_dropout": 0.2}
    eager, compiled = (make_stage(layers=range(10), recompute=recompute, **changes) for _ in range(2))
    compiled.compile_layers(backend=counting_backend(graphs), fullgraph=True)
    for number in range(3):
        losses = []
        for stage in (eager, compiled):
            stage.embedding.rng.set_microbatch(number, 0)
            losses.append(stage(None, batch).square().mean())
            losses[-1].backward()
        assert losses[1].item() == pytest.approx(losses[0].item(), rel=1e-6)
    assert len(graphs) == 1
    with torch.no_grad():
        torch.testing.assert_close(compiled.eval()(None, batch), eager.eval()(None, batch), rtol=1e-5, atol=1e-6)
    assert len(graphs) == 2
    theirs = gradients(eager)
    for name, gradient in gradients(compiled).items():
        torch.testing.assert_close(gradient, theirs[name], rtol=1e-5, atol=1e-6, msg=name)


@pytest.mark.slow
def test_gradients_of_compiled_layers_arrive_layer_by_layer(make_stage, make_batch):
    """Reductions of the last layers' gradients can begin while backward of the first ones runs."""
    stage, batch, order = make_stage(layers=range(4), num_layers=5), make_batch(), []
    stage.compile_layers(backend="aot_eager")
    for number, layer in stage.decoder.layers.items():
        for param in layer.parameters():
            param.register_post_accumulate_grad_hook(lambda _, number=number: order.append(int(number)))
    stage(None, batch).sum().backward()
    assert order == sorted(order, reverse=True)
    assert set(order) == {0, 1, 2, 3}


@pytest.mark.slow
@pytest.mark.parametrize("num_layers", [2, 5])
def test_deferred_weight_gradients_cut_a_layer_at_its_linear_layers(num_layers, mesh, make_config, make_batch):
    """Zero-bubble schedules: the number of graphs is that of one layer, whatever the depth."""
    torch.compiler.reset()
    model = make_config(num_layers=num_layers + 1)
    config = RunConfig(model=model, batch=BatchConfig(seq_length=48, micro_batch_size=1))
    deferred, graphs = DeferredWeightGradients(), []
    stage = GPTStage(config, range(num_layers), mesh, RngStreams(7, mesh.backend), deferred)
    stage.compile_layers(backend=counting_backend(graphs))
    batch = make_batch()
    with deferred.collect((0, 0)):
        stage(None, batch).sum().backward()
    assert len(graphs) == 11


def test_units_are_the_modules_of_forward_in_order(make_stage):
    def units(*args, **changes):
        stage = make_stage(*args, **changes)
        return [next(name for name, module in stage.named_modules() if module is unit) for unit in stage.units]

    layers = ["decoder.layers.0", "decoder.layers.1"]
    assert units() == ["embedding", *layers, "decoder.final_norm"]
    assert units(range(1)) == ["embedding", "decoder.layers.0"]
    assert units(range(1, 2)) == ["decoder.layers.1", "decoder.final_norm"]
