"""Tests of delayed fp8 scaling: Transformer Engine's formula, repeated entries, evaluation, recomputation, graphs."""

from __future__ import annotations

import pytest
import torch
from support.stage_backward import add_to_grad
from torch import nn

from megatron_lite.backend.group import LocalGroup
from megatron_lite.config.fp8 import Fp8Config
from megatron_lite.parallel.delayed_scaling import AmaxHistory
from megatron_lite.parallel.fp8 import ROLES, Fp8, fp8_of, round_to
from megatron_lite.parallel.gemm import DeferredWeightGradients
from megatron_lite.parallel.recompute import recomputed
from megatron_lite.parallel.tensor_parallel import column_parallel_linear, row_parallel_linear

LOCAL, CPU = LocalGroup("tp"), torch.device("cpu")


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def transformer_engine_scale(history, largest, margin, algo):
    """The reciprocal of the factor that Transformer Engine's _default_sf_compute returns."""
    amax = history[0] if algo == "most_recent" else max(history)
    return 1.0 if amax == 0 else 1 / (largest / amax / 2**margin)


class Layers:
    """Two linear layers, their formats in evaluation and in training, and their histories."""

    def __init__(self, **options):
        config = Fp8Config(format="hybrid", recipe="delayed", **options)
        self.modes = [fp8_of(config, 0, 1).modes(CPU) for _ in range(2)]
        self.scales = [training.delayed for _, training in self.modes]
        self.history = AmaxHistory(dict(zip(("fc1", "fc2"), self.scales, strict=True)), config, LOCAL, CPU)
        self.weights = nn.Parameter(draw(48, 32, seed=1) / 6), nn.Parameter(draw(32, 48, seed=3) / 7)

    def run(self, x, training=True, deferred=None):
        first, second = (modes[training] for modes in self.modes)
        return self.forward(x, first, second, deferred)

    def forward(self, x, first, second, deferred=None):
        hidden = column_parallel_linear(x, self.weights[0], None, LOCAL, False, deferred, first).tanh()
        return row_parallel_linear(hidden, self.weights[1], None, LOCAL, False, deferred, second)

    def maxima(self):
        return [[scales.maxima[role].item() for role in ROLES] for scales in self.scales]

    def step(self, seed=4):
        y = self.run(draw(8, 2, 32, seed=seed).requires_grad_())
        y.backward(draw(8, 2, 32, seed=seed + 100) * 1e-6)
        found = self.maxima()
        self.history.update()
        return y.detach(), found


@pytest.mark.parametrize("algo", ["most_recent", "max"])
@pytest.mark.parametrize("margin", [0, 2])
def test_scales_follow_from_the_history_as_in_transformer_engine(algo, margin):
    layers, seen = Layers(amax_history_len=3, amax_compute_algo=algo, margin=margin), []
    for seed in (4, 5, 6, 7):
        seen.append(layers.step(seed)[1])
        for layer, scales in enumerate(layers.scales):
            for place, role in enumerate(ROLES):
                history = [maxima[layer][place] for maxima in reversed(seen[-3:])]
                expected = transformer_engine_scale(history, 57344 if role == "gradient" else 448, margin, algo)
                assert scales.scales[role].item() == pytest.approx(expected, rel=1e-6)
    assert layers.maxima() == [[0.0] * 3] * 2
    saved = {tensor.name: tensor for tensor in layers.history.state_tensors(write=True)}
    assert list(saved) == ["optimizer.amax_history.fc1", "optimizer.amax_history.fc2"]
    expected = [maxima[1] for maxima in reversed(seen[1:])]
    assert saved["optimizer.amax_history.fc2"].pieces[0].tensor.tolist() == expected


def test_the_first_iteration_uses_the_scales_of_its_values_and_later_ones_those_of_the_history():
    layers = Layers()
    first, _ = layers.step(4)
    present = Fp8(torch.float8_e5m2, rowwise=False)
    torch.testing.assert_close(first, layers.forward(draw(8, 2, 32, seed=4), present, present), rtol=0, atol=0)
    second = layers.run(draw(8, 2, 32, seed=5))
    assert not torch.equal(second, layers.forward(draw(8, 2, 32, seed=5), present, present))


def test_zeros_and_what_is_not_finite_repeat_the_newest_entry():
    layers = Layers(amax_history_len=2)
    layers.step()
    before = [scales.scales["input"].item() for scales in layers.scales]
    layers.scales[0].maxima["input"].fill_(float("nan"))
    layers.scales[1].maxima["input"].fill_(float("inf"))
    layers.history.update()
    assert [scales.scales["input"].item() for scales in layers.scales] == before
    histories = [tensor.pieces[0].tensor for tensor in layers.history.state_tensors(write=True)]
    assert all(torch.equal(history[0], history[1]) and (history > 0).all() for history in histories)


def test_values_beyond_the_scale_are_its_largest_and_infinity_stays_visible():
    values = round_to(torch.tensor([1000.0, -1e9, 3.0, float("inf")]), torch.float8_e4m3fn, torch.tensor(1.0)).float()
    assert values[:3].tolist() == [448.0, -448.0, 3.0] and values[3].isnan()


def test_evaluation_leaves_the_maxima_alone_and_recomputation_finds_the_same():
    layers, x = Layers(), draw(8, 2, 32, seed=4)
    with torch.no_grad():
        layers.run(x, training=False)
    assert layers.maxima() == [[0.0] * 3] * 2
    found = []
    for again in (False, True):
        y = recomputed(layers.run, x.requires_grad_()) if again else layers.run(x.requires_grad_())
        y.square().sum().backward()
        found.append(layers.maxima())
        layers.history.update()
        for scales in layers.scales:
            scales.known = False
    assert found[0] == found[1] and all(value > 0 for row in found[0] for value in row)


def test_deferred_weight_gradients_use_the_same_scales():
    expected, split, deferred = Layers(), Layers(), DeferredWeightGradients()
    for seed in (4, 5):
        x = draw(8, 2, 32, seed=seed)
        for weight in (*expected.weights, *split.weights):
            weight.grad = None
        expected.run(x.clone().requires_grad_()).square().sum().backward()
        with deferred.collect((0, 0)):
            split.run(x.clone().requires_grad_(), deferred=deferred).square().sum().backward()
        assert split.maxima() == expected.maxima()
        deferred.compute((0, 0), add_to_grad)
        for ours, theirs in zip(split.weights, expected.weights, strict=True):
            torch.testing.assert_close(ours.grad, theirs.grad)
        expected.history.update()
        split.history.update()


@pytest.mark.slow
def test_a_compiled_layer_is_one_graph_in_forward_and_backward():
    eager, traced = Layers(), Layers()
    traced.forward = torch.compile(traced.forward, backend="aot_eager", fullgraph=True)
    for seed in (4, 5):
        one, two = eager.step(seed), traced.step(seed)
        torch.testing.assert_close(one[0], two[0])
        assert one[1] == two[1]
    for ours, theirs in zip(traced.weights, eager.weights, strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad)


def test_a_loaded_history_gives_the_same_scales_and_an_empty_one_none():
    trained, resumed = Layers(amax_history_len=2), Layers(amax_history_len=2)
    trained.step()
    assert not resumed.history.resume() and not any(scales.known for scales in resumed.scales)
    for source, target in zip(
        trained.history.state_tensors(write=True), resumed.history.state_tensors(write=True), strict=True
    ):
        target.pieces[0].tensor.copy_(source.pieces[0].tensor)
    assert resumed.history.resume() and all(scales.known for scales in resumed.scales)
    for one, two in zip(trained.scales, resumed.scales, strict=True):
        assert one.scales == two.scales
