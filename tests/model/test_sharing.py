"""Shared layers and factorized embeddings: against an implementation from scratch, in fp64, and in their parts."""

import dataclasses
import math
from unittest import mock

import pytest
import torch
from support.stage_backward import run_backward
from torch.nn import functional as F

from megatron_lite.backend.group import LocalGroup
from megatron_lite.config.arguments import parse_run
from megatron_lite.config.counts import parameter_count
from megatron_lite.config.parameters import parameter_shapes, shared_stages
from megatron_lite.model.count_check import check_count
from megatron_lite.model.gpt import DTYPES
from megatron_lite.parallel.buffers import ParameterBuffers
from megatron_lite.parallel.random import RngStreams

LAYERS, HEADS, HIDDEN, VOCABULARY = 4, 4, 64, 101
# The layers whose norms, attention and MLP each layer uses.
OWNERS = {
    "all": [(0, 0, 0)] * 4,
    "2": [(0, 0, 0), (0, 0, 0), (2, 2, 2), (2, 2, 2)],
    "attention": [(layer, 0, layer) for layer in range(4)],
    "mlp": [(layer, layer, 0) for layer in range(4)],
}
CASES = [
    ("all", {"embedding_size": 16}),
    ("2", {}),
    ("attention", {"embedding_size": 24, "tied_embeddings": False}),
    ("mlp", {}),
]


@pytest.fixture
def fp64(monkeypatch):
    monkeypatch.setitem(DTYPES, "fp32", torch.float64)


@pytest.fixture
def sharing(make_stage):
    def make(share, **more):
        return make_stage(**{"num_layers": LAYERS, "share_layers": share, "init_std": 0.2} | more)

    return make


def from_scratch(w, tokens, owners):
    """Logits [b, s, V] of `tokens` [b, s] from weights by global name."""

    def linear(x, name):
        return F.linear(x, w[f"{name}.weight"], w[f"{name}.bias"])

    def norm(x, name):
        return F.layer_norm(x, x.shape[-1:], w[f"{name}.weight"], w[f"{name}.bias"], 1e-5)

    batch, length = tokens.shape
    x = w["embedding.word_embeddings.weight"][tokens] + w["embedding.position_embeddings.weight"][:length]
    if "embedding.projection.weight" in w:
        x = linear(x, "embedding.projection")
    future = torch.ones(length, length, dtype=torch.bool).triu(1)
    for norms, attention, mlp in owners:
        names = [f"decoder.layers.{layer}" for layer in (norms, attention, mlp)]
        qkv = linear(norm(x, f"{names[0]}.input_norm"), f"{names[1]}.self_attention.qkv")
        q, k, v = qkv.view(batch, length, HEADS, 3, -1).permute(3, 0, 2, 1, 4)
        scores = (q @ k.mT / math.sqrt(HIDDEN // HEADS)).masked_fill(future, -math.inf)
        mixed = (scores.softmax(-1) @ v).transpose(1, 2).flatten(2)
        x = x + linear(mixed, f"{names[1]}.self_attention.proj")
        wide = linear(norm(x, f"{names[0]}.pre_mlp_norm"), f"{names[2]}.mlp.fc1")
        x = x + linear(F.gelu(wide, approximate="tanh"), f"{names[2]}.mlp.fc2")
    x = norm(x, "decoder.final_norm")
    if "output_projection.weight" in w:
        x = linear(x, "output_projection")
    return x @ w.get("output_layer.weight", w["embedding.word_embeddings.weight"]).T


@pytest.mark.parametrize(("share", "more"), CASES)
def test_logits_loss_and_gradients_equal_an_implementation_from_scratch(share, more, sharing, make_batch, fp64):
    stage, batch = sharing(share, **more), make_batch()
    generator = torch.Generator().manual_seed(3)
    params = stage.named_parameters_global()
    with torch.no_grad():
        for p in params:
            p.local().add_(torch.randn(p.rectangle.shape, generator=generator, dtype=torch.float64) * 0.05)
    weights = {p.name: p.local().detach().clone().requires_grad_() for p in params}
    logits = from_scratch(weights, batch.tokens, OWNERS[share])
    loss = F.cross_entropy(logits.flatten(0, 1), batch.labels.flatten())
    loss.backward()
    found = stage.logits(None, batch)[..., :VOCABULARY].transpose(0, 1)
    torch.testing.assert_close(found, logits, rtol=1e-12, atol=1e-12)
    mean = run_backward(stage, batch, scale=0.5) / 2
    torch.testing.assert_close(mean, loss, rtol=1e-12, atol=0)
    for p in params:
        gradient = sum(use.grad for use in p.uses if use.grad is not None)
        atol = 1e-11 * weights[p.name].grad.abs().max().item()
        torch.testing.assert_close(p.local(gradient), weights[p.name].grad, rtol=0, atol=atol, msg=lambda m: m)


@pytest.mark.parametrize(("share", "more"), CASES)
def test_every_use_of_a_shared_parameter_adds_to_one_gradient(share, more, sharing, make_batch):
    stage, other = sharing(share, **more), sharing(share, **more)
    batch, group = make_batch(), LocalGroup("dp")
    check_count(stage)
    parameters = stage.named_parameters_global()
    assert sum(p.passes for p in parameters) == len(list(stage.parameters())) + stage.config.tied_embeddings
    buffers = ParameterBuffers(parameters, dp=group, tp=group)
    for p in parameters:
        assert {use.data_ptr() for use in p.uses} == {p.param.data_ptr()}
    buffers.begin(1)
    hidden = stage(None, batch)
    _, gradient = stage.sample_losses(hidden.detach(), batch, 1.0, buffers.accumulate_product)
    hidden.backward(gradient)
    buffers.reduce()
    run_backward(other, batch)
    for p, q in zip(parameters, other.named_parameters_global(), strict=True):
        expected = sum(use.grad for use in q.uses if use.grad is not None)
        atol = 1e-5 * expected.abs().max().item()
        torch.testing.assert_close(buffers.gradient(p.uses[-1]), expected, rtol=0, atol=atol)


def test_layers_that_share_parameters_draw_dropout_masks_of_their_own(make_stage, make_batch):
    stage = make_stage(num_layers=3, share_layers="all", hidden_dropout=0.1).train()
    with mock.patch.object(RngStreams, "reseed") as reseed:
        stage(None, make_batch())
    seeds = [(site, int(layer)) for site, layer, _ in (call.args for call in reseed.call_args_list)]
    assert seeds == [("embedding", -1), *((site, layer) for layer in range(3) for site in ("proj", "mlp"))]


def test_output_projections_are_scaled_by_the_depth(sharing):
    weights = {p.name: p.local() for p in sharing("all").named_parameters_global()}
    assert weights["decoder.layers.0.mlp.fc1.weight"].std().item() == pytest.approx(0.2, rel=0.05)
    assert weights["decoder.layers.0.mlp.fc2.weight"].std().item() == pytest.approx(0.2 / 8**0.5, rel=0.05)


def test_each_layer_has_a_cache_of_its_own(sharing, make_batch):
    stage, batch = sharing("all", embedding_size=16).eval(), make_batch(2, 12)
    with torch.no_grad():
        whole, cache = stage.logits(None, batch), stage.new_cache(2, 12)
        steps = [stage.logits(None, dataclasses.replace(batch, tokens=batch.tokens[:, :7]), cache.first([0, 1]))]
        for at in range(7, 12):
            positions = torch.full((2, 1), at)
            token = dataclasses.replace(batch, tokens=batch.tokens[:, at : at + 1], position_ids=positions)
            steps.append(stage.logits(None, token, cache.next([at, at])))
    torch.testing.assert_close(torch.cat(steps), whole, rtol=1e-4, atol=1e-4)


def test_stages_that_hold_a_shared_module(make_config):
    stages = (range(3), range(3, 5), range(5, 6))
    words = {"embedding.word_embeddings.weight": (0, 2)}

    def shared(share, **more):
        return shared_stages(make_config(num_layers=6, share_layers=share, **more), stages)

    assert shared("") == words
    assert shared("all") == words | {"decoder.layers.0": (0, 1, 2)}
    # Layers 0-1, 2-3 and 4-5: the first group is on one stage.
    assert shared("3") == words | {"decoder.layers.2": (0, 1), "decoder.layers.4": (1, 2)}
    assert shared("6", tied_embeddings=False) == {}
    assert shared("mlp", tied_embeddings=False) == {"decoder.layers.0.mlp": (0, 1, 2)}


@pytest.mark.parametrize("size", ["", "-e256", "-e512", "-shared", "-medium", "-large", "-xl"])
def test_presets_have_as_many_parameters_as_are_counted(size):
    words = f"--preset algpt2{size} --micro-batch-size 1 --train-iters 1 --lr 1 --mock-data".split()
    model = dataclasses.replace(parse_run(words).config.model, vocab_size=50257)
    shapes = parameter_shapes(model)  # of a model on the meta device
    assert sum(map(math.prod, shapes.values())) == parameter_count(model)
