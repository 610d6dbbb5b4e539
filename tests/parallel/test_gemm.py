"""Tests of matrix products: deferred weight gradients, and a plain torch linear on one process."""

import pytest
import torch
from support.stage_backward import add_to_grad
from torch import nn

from megatron_lite.backend.group import LocalGroup
from megatron_lite.parallel.gemm import DeferredWeightGradients
from megatron_lite.parallel.recompute import recomputed
from megatron_lite.parallel.tensor_parallel import column_parallel_linear, row_parallel_linear

LOCAL = LocalGroup("tp")


def make():
    torch.manual_seed(0)
    return (nn.Parameter(torch.randn(6, 4)), nn.Parameter(torch.randn(6)), nn.Parameter(torch.randn(4, 6)))


def two_layers(x, first, bias, second, deferred):
    return row_parallel_linear(
        column_parallel_linear(x, first, bias, LOCAL, False, deferred).tanh(), second, None, LOCAL, False, deferred
    )


@pytest.mark.parametrize("again", [False, True])
def test_deferred_weight_gradients_equal_backward(again):
    expected, params, deferred = make(), make(), DeferredWeightGradients()
    inputs = torch.randn(2, 3, 5, 4)
    done = []

    def accumulate(weight, gradient, x, **options):
        done.append(weight)
        add_to_grad(weight, gradient, x, **options)

    for number, x in enumerate(inputs):
        plain, split = x.clone().requires_grad_(), x.clone().requires_grad_()
        two_layers(plain, *expected, None).square().sum().backward()
        arguments = (two_layers, split, *params, deferred)
        output = recomputed(*arguments) if again else two_layers(*arguments[1:])
        with deferred.collect((0, number)):
            output.square().sum().backward()
        torch.testing.assert_close(split.grad, plain.grad)
    # Bias gradients are computed in backward; those of matrices are deferred.
    torch.testing.assert_close(params[1].grad, expected[1].grad)
    assert params[0].grad is None and params[2].grad is None
    deferred.compute((0, 1), accumulate)
    deferred.compute((0, 0), accumulate)
    assert [id(weight) for weight in done] == [id(params[2]), id(params[0])] * 2
    for ours, whole in zip(params, expected, strict=True):
        torch.testing.assert_close(ours.grad, whole.grad)


def test_deferred_gradients_call_no_autograd_hook():
    params, deferred, heard = make(), DeferredWeightGradients(), []
    for param in params:
        param.register_post_accumulate_grad_hook(heard.append)
    with deferred.collect((0, 0)):
        two_layers(torch.randn(3, 5, 4, requires_grad=True), *params, deferred).sum().backward()
    assert [id(param) for param in heard] == [id(params[1])]


def test_deferring_outside_of_collect_is_an_error():
    with pytest.raises(AssertionError, match="deferred"):
        two_layers(torch.randn(3, 5, 4, requires_grad=True), *make(), DeferredWeightGradients()).sum().backward()


def test_one_process_without_deferral_runs_torch_linear():
    x, (first, bias, second) = torch.randn(3, 5, 4), make()
    output = two_layers(x, first, bias, second, None)
    assert "MmBackward" in output.grad_fn.name() or "UnsafeViewBackward" in output.grad_fn.name()
