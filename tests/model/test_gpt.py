"""What the model promises on one device: the loss, padding, documents, caches, stages, first values, types."""

import dataclasses
from typing import get_args

import pytest
import torch
from support.rounding import assert_same_sums, deviation
from torch.nn import functional as F

from megatron_lite.config.model import Activation
from megatron_lite.config.optimizer import RecomputeConfig
from megatron_lite.model.attention import AttentionContext
from megatron_lite.model.mlp import ACTIVATIONS


def gradients(stage):
    return {p.name: p.param.grad.clone() for p in stage.named_parameters_global()}


def test_loss_is_the_sum_of_each_samples_masked_mean(make_stage, make_batch):
    stage = make_stage(init_std=0.3)
    mask = (torch.rand(3, 16, generator=torch.Generator().manual_seed(1)) < 0.6).float()
    mask[2] = 0
    batch = make_batch(3, loss_mask=mask)
    logits = stage(None, batch)
    tokens = F.cross_entropy(logits[..., :101].permute(1, 2, 0), batch.labels, reduction="none")
    expected = [(tokens[n] * mask[n]).sum() / mask[n].sum() for n in (0, 1)]
    assert_same_sums(stage.sample_losses(logits, batch), torch.stack([*expected, torch.tensor(0.0)]))
    assert_same_sums(stage.loss(logits, batch), sum(expected))


def test_micro_batches_add_up_to_the_batch(make_stage, make_batch):
    stage, batch = make_stage(init_std=0.3), make_batch(4)
    stage.loss(stage(None, batch), batch).backward()
    whole = gradients(stage)
    stage.zero_grad()
    for n in range(4):
        one = dataclasses.replace(batch, tokens=batch.tokens[n : n + 1], labels=batch.labels[n : n + 1])
        stage.loss(stage(None, one), one).backward()
    for name, gradient in gradients(stage).items():
        assert_same_sums(gradient, whole[name], name)


def test_padded_vocabulary_never_counts(make_stage, make_batch):
    """Logits of padding are 0; a softmax that saw them would take probability from the tokens that exist."""
    batch, results = make_batch(), []
    for padded in (101, 104, 256):
        stage = make_stage(padded_vocab_size=padded)
        loss = stage.loss(stage(None, batch), batch)
        loss.backward()
        table = stage.embedding.word_embeddings.weight
        assert not table.data[101:].any() and not table.grad[101:].any()
        results.append((loss.item(), table.grad[:101].clone()))
    for loss, gradient in results[1:]:
        assert loss == pytest.approx(results[0][0], rel=1e-5)
        assert_same_sums(gradient, results[0][1])


@pytest.mark.parametrize("position_embedding", ["learned", "rotary", "alibi", "none"])
def test_documents_of_a_sample_do_not_see_each_other(make_stage, make_batch, position_embedding):
    stage = make_stage(position_embedding=position_embedding, init_std=0.3).eval()
    batch = make_batch(1, 16)
    cut = 7
    ids = (torch.arange(16) >= cut).long()
    positions = torch.cat((torch.arange(cut), torch.arange(16 - cut)))
    packed = dataclasses.replace(batch, document_ids=ids.unsqueeze(0), position_ids=positions.unsqueeze(0))
    together = stage(None, packed)
    for part in (slice(0, cut), slice(cut, 16)):
        alone = stage(None, dataclasses.replace(batch, tokens=batch.tokens[:, part]))
        assert_same_sums(together[part], alone)
    assert deviation(stage(None, batch)[cut:], together[cut:]) > 1e-2


@pytest.mark.parametrize("position_embedding", ["learned", "rotary", "alibi", "none"])
def test_a_cache_changes_no_logit(make_stage, make_batch, position_embedding):
    stage = make_stage(position_embedding=position_embedding, num_query_groups=2, init_std=0.3).eval()
    batch = make_batch(2, 12)
    with torch.no_grad():
        whole = stage(None, batch)
        cache = stage.new_cache(2, 12)
        steps = []
        for first, last in ((0, 5), (5, 6), (6, 7), (7, 10), (10, 12)):  # a prompt, single tokens, several at once
            steps.append(stage(None, dataclasses.replace(batch, tokens=batch.tokens[:, first:last]), cache))
            assert cache.length == last
        assert_same_sums(torch.cat(steps), whole)


@pytest.mark.parametrize("tied", [True, False])
def test_stages_in_a_row_equal_the_whole(make_stage, make_batch, tied):
    config = {"num_layers": 3, "tied_embeddings": tied, "init_std": 0.3}
    whole = make_stage(**config)
    first = make_stage(range(2), has_head=False, **config)
    last = make_stage(range(2, 3), has_embedding=False, **config)
    batch = make_batch()
    hidden = first(None, batch)
    assert tuple(hidden.shape) == first.hidden_shape(16, 2) and hidden.dtype == first.hidden_dtype
    received = hidden.detach().requires_grad_()
    loss = last.loss(last(received, batch), batch)
    loss.backward()
    hidden.backward(received.grad)
    expected = whole.loss(whole(None, batch), batch)
    expected.backward()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    names = [p.name for stage in (first, last) for p in stage.named_parameters_global() if p.owned]
    assert sorted(names) == sorted(p.name for p in whole.named_parameters_global())
    theirs = gradients(whole)
    ours = gradients(first) | {p.name: p.param.grad for p in last.named_parameters_global() if p.owned or not tied}
    if tied:
        copy = next(p for p in last.named_parameters_global() if not p.owned)
        assert copy.name == "embedding.word_embeddings.weight"
        ours[copy.name] = ours[copy.name] + copy.param.grad
    for name, gradient in ours.items():
        assert_same_sums(gradient, theirs[name], name)


def test_first_values_depend_on_seed_and_name_only(make_stage):
    whole = {p.name: p.local() for p in make_stage(num_layers=4).named_parameters_global()}
    part = make_stage(range(2, 4), has_embedding=False, num_layers=4)
    for p in part.named_parameters_global():
        assert torch.equal(p.local(), whole[p.name]), p.name
    matrix = "decoder.layers.{}.self_attention.{}.weight"
    assert not torch.equal(whole[matrix.format(0, "qkv")], whole[matrix.format(1, "qkv")])
    assert whole[matrix.format(0, "qkv")].std().item() == pytest.approx(0.02, rel=0.05)
    assert whole[matrix.format(0, "proj")].std().item() == pytest.approx(0.02 / 8**0.5, rel=0.05)
    assert whole["decoder.final_norm.weight"].eq(1).all() and whole["decoder.final_norm.bias"].eq(0).all()


def test_a_tied_table_is_listed_once_and_every_parameter_has_a_name(make_stage):
    for changes in ({}, {"tied_embeddings": False}, {"activation": "swiglu", "qk_layernorm": True}):
        stage = make_stage(**changes)
        params = stage.named_parameters_global()
        assert {id(p.param) for p in params} == {id(p) for p in stage.parameters()}
        assert len({p.name for p in params}) == len(params)
        for p in params:
            assert p.local().data_ptr() == p.param.data_ptr() and tuple(p.local().shape) == p.local_shape
    fc1 = next(p for p in params if p.name == "decoder.layers.0.mlp.fc1.weight")
    assert fc1.global_shape == (2, stage.config.ffn_hidden_size, 64) and fc1.tp_dim == 1


def test_zero_centered_norm_and_norm_first_residual_compute_what_they_say(make_stage, make_batch):
    batch = make_batch()
    plain, centered = make_stage(), make_stage(zero_centered_norm=True)
    assert centered.decoder.final_norm.weight.eq(0).all()
    assert_same_sums(plain(None, batch), centered(None, batch))
    layer = make_stage(residual_post_layernorm=True).decoder.layers["0"]
    x = torch.randn(16, 2, 64)
    a = layer.input_norm(x)
    y = a + layer.self_attention(a, AttentionContext())
    m = layer.pre_mlp_norm(y)
    assert_same_sums(layer(x, AttentionContext()), m + layer.mlp(m))


def test_every_activation_is_the_one_its_name_says(make_stage):
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
    assert_same_sums(mlp(h), F.linear(gate * gate.sigmoid() * up, mlp.fc2.weight, mlp.fc2.bias))


@pytest.mark.parametrize("fp32_residual", [False, True])
@pytest.mark.parametrize("position_embedding", ["learned", "rotary", "alibi"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_trains_near_fp32(make_stage, make_batch, dtype, position_embedding, fp32_residual):
    changes = {"position_embedding": position_embedding, "fp32_residual": fp32_residual, "normalization": "RMSNorm"}
    batch, losses = make_batch(), []
    for type_ in (torch.float32, dtype):
        stage = make_stage(dtype=type_, init_std=0.1, zero_centered_norm=fp32_residual, **changes)
        logits = stage(None, batch)
        loss = stage.loss(logits, batch)
        loss.backward()
        assert logits.dtype == type_ and loss.dtype == torch.float32
        assert all(p.grad.dtype == type_ and p.grad.isfinite().all() for p in stage.parameters())
        losses.append(loss.item())
    assert losses[1] == pytest.approx(losses[0], rel=5e-3)


def test_dropout_draws_only_when_training_and_only_where_it_is_on(mesh, make_stage, make_batch, monkeypatch):
    batch, seeds = make_batch(), []
    stage = make_stage(hidden_dropout=0.2, attention_dropout=0.2)
    monkeypatch.setattr(type(mesh.backend), "seed", lambda backend, value: seeds.append(value))
    stage(None, batch)
    assert len(seeds) == len(set(seeds)) == 1 + 3 * 2
    seeds.clear()
    stage.eval()(None, batch)
    make_stage()(None, batch)
    assert not seeds


@pytest.mark.parametrize("recompute", [None, RecomputeConfig(granularity="full")])
def test_a_compiled_stage_computes_the_same(make_stage, make_batch, recompute):
    batch = make_batch()
    eager, compiled = make_stage(recompute=recompute), make_stage(recompute=recompute)
    compiled.compile(backend="aot_eager", fullgraph=True)
    for stage in (eager, compiled):
        for number in range(2):
            step = dataclasses.replace(batch, number=number)
            stage.loss(stage(None, step), step).backward()
    theirs = gradients(eager)
    for name, gradient in gradients(compiled).items():
        assert_same_sums(gradient, theirs[name], name)
