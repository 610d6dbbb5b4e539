"""Tests of fp8 products: rounding of operands, gradients, deferral, compilation."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support.stage_backward import add_to_grad
from torch import nn

from megatron_lite.backend.group import LocalGroup
from megatron_lite.config.fp8 import Fp8Config
from megatron_lite.parallel.fp8 import Fp8, fp8_of, quantize
from megatron_lite.parallel.gemm import DeferredWeightGradients
from megatron_lite.parallel.tensor_parallel import column_parallel_linear, row_parallel_linear

LOCAL = LocalGroup("tp")
HALF_STEP = {torch.float8_e4m3fn: 2.0**-4, torch.float8_e5m2: 2.0**-3}
"""Largest relative rounding error of a normal number."""


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@given(st.floats(-30, 30), st.sampled_from(list(HALF_STEP)), st.booleans())
def test_values_are_rounded_to_the_format_whatever_their_size(exponent, dtype, rowwise):
    x = draw(4, 64) * 2.0**exponent
    values, scale = quantize(x, dtype, rowwise=rowwise)
    assert values.dtype == dtype and values.is_contiguous() and scale.dtype == torch.float32
    assert scale.shape == ((4, 1) if rowwise else ())
    large = x.abs() > x.abs().max() / 1024  # smaller ones may be subnormal
    error = (values.float() * scale - x).abs()
    assert (error <= HALF_STEP[dtype] * 1.001 * x.abs())[large].all()


def test_zeros_and_what_is_not_finite():
    values, scale = quantize(torch.zeros(2, 16), torch.float8_e4m3fn, rowwise=True)
    assert not values.float().any() and scale.isfinite().all()
    for bad in (float("nan"), float("inf")):
        x = torch.ones(2, 16)
        x[0, 0] = bad
        values, scale = quantize(x, torch.float8_e4m3fn, rowwise=False)
        assert not (values.float() * scale).isfinite().all()  # the loss shows it, as in bf16


def test_rows_have_scales_of_their_own():
    x = torch.cat((torch.full((1, 16), 1e-6), torch.full((1, 16), 1e3)))
    both = [quantize(x, torch.float8_e4m3fn, rowwise=rowwise) for rowwise in (False, True)]
    lost, kept = (values.float() * scale for values, scale in both)
    assert not lost[0].any()
    torch.testing.assert_close(kept, x, rtol=0.07, atol=0)


def test_formats_of_gradients():
    assert fp8_of(Fp8Config(format="hybrid", recipe="tensorwise"), 0, 4) == Fp8(torch.float8_e5m2, rowwise=False)
    assert fp8_of(Fp8Config(format="hybrid"), 0, 4).is_delayed
    assert fp8_of(Fp8Config(format="e4m3", recipe="rowwise"), 0, 4) == Fp8(torch.float8_e4m3fn, rowwise=True)


def two_layers(x, weights, fp8, deferred=None):
    first, bias, second = weights
    hidden = column_parallel_linear(x, first, bias, LOCAL, False, deferred, fp8).tanh()
    return row_parallel_linear(hidden, second, None, LOCAL, False, deferred, fp8)


def make():
    return (
        nn.Parameter(draw(48, 32, seed=1) / 6),
        nn.Parameter(draw(48, seed=2)),
        nn.Parameter(draw(32, 48, seed=3) / 7),
    )


@pytest.mark.parametrize("rowwise", [False, True])
@pytest.mark.parametrize("gradients", [torch.float8_e4m3fn, torch.float8_e5m2])
def test_products_and_gradients_are_those_of_fp32_with_rounded_operands(gradients, rowwise):
    found = []
    for fp8 in (None, Fp8(gradients, rowwise)):
        weights, x = make(), draw(8, 2, 32, seed=4).requires_grad_()
        y = two_layers(x, weights, fp8)
        y.backward(draw(8, 2, 32, seed=5))
        found.append((y.detach(), x.grad, *(weight.grad for weight in weights)))
    for exact, rounded in zip(*found, strict=True):
        error = (rounded - exact).norm() / exact.norm()
        assert 1e-3 < error < 0.12


def test_deferred_weight_gradients_are_in_fp8_too():
    fp8, deferred = Fp8(torch.float8_e5m2, rowwise=False), DeferredWeightGradients()
    expected, weights = make(), make()
    two_layers(draw(8, 2, 32, seed=4), expected, fp8).square().sum().backward()
    with deferred.collect((0, 0)):
        two_layers(draw(8, 2, 32, seed=4), weights, fp8, deferred).square().sum().backward()
    deferred.compute((0, 0), add_to_grad)
    for ours, theirs in zip(weights, expected, strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad)


@pytest.mark.slow
def test_a_compiled_layer_is_one_graph():
    fp8, weights = Fp8(torch.float8_e5m2, rowwise=False), make()
    eager = two_layers(draw(8, 2, 32, seed=4), weights, fp8)
    compiled = torch.compile(two_layers, backend="aot_eager", fullgraph=True)(draw(8, 2, 32, seed=4), weights, fp8)
    torch.testing.assert_close(compiled, eager)


def test_ends_in_bf16():
    fp8 = Fp8Config(format="hybrid")
    assert all(fp8_of(fp8, layer, 4) for layer in range(4))
    ends = replace(fp8, bf16_ends=True, bf16_end=2)
    assert [fp8_of(ends, layer, 5) is not None for layer in range(5)] == [False, True, True, False, False]
    assert fp8_of(Fp8Config(), 0, 4) is None


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("recipe", ["delayed", "tensorwise", "rowwise"])
def test_products_of_a_gpu_equal_the_emulation(recipe):
    device = torch.device("cuda")
    a, b = draw(64, 128).bfloat16(), draw(32, 128, seed=1).bfloat16()
    found = []
    for place in (device, torch.device("cpu")):
        _, fp8 = fp8_of(Fp8Config(format="hybrid", recipe=recipe), 0, 1).modes(place)
        if fp8.delayed is not None:
            fp8.delayed.known = True
        products = (("input", "weight"), ("gradient", "weight"))
        found += [fp8.product(a.to(place), b.to(place), roles).cpu() for roles in products]
    for ours, emulated in zip(found[:2], found[2:], strict=True):
        assert (ours - emulated).abs().max() <= 0.01 * emulated.abs().max()
