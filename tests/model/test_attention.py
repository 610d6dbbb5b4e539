"""Tests of attention: grouped heads, causality, dropout and recomputation, by the calls of torch's kernel."""

import dataclasses
from types import SimpleNamespace

import pytest
import torch
from torch.nn import functional as F

from megatron_lite.backend.base import scaled_dot_product_attention
from megatron_lite.backend.cpu import CpuBackend
from megatron_lite.backend.cuda import CudaBackend
from megatron_lite.config.optimizer import RecomputeConfig


@pytest.fixture
def calls(monkeypatch):
    """Record every call of the kernel: shapes [b, heads, tokens, d] of queries and keys, and options."""
    found, plain = [], F.scaled_dot_product_attention

    def counted(q, k, v, **options):
        assert k.shape == v.shape
        found.append(SimpleNamespace(q=tuple(q.shape), k=tuple(k.shape), **options))
        return plain(q, k, v, **options)

    monkeypatch.setattr(F, "scaled_dot_product_attention", counted)
    return found


@pytest.mark.parametrize("groups", [4, 2, 1])
@pytest.mark.parametrize("kernel", [False, True], ids=["", "kernel-groups-heads"])
def test_grouped_query_attention_in_the_kernel_or_with_repeated_heads(
    make_stage, make_batch, calls, monkeypatch, groups, kernel
):
    stage = make_stage(num_layers=1, num_query_groups=groups, init_std=0.3)
    with monkeypatch.context() as patched:
        if kernel:
            patched.setattr(
                stage.sharding.backend,
                "attention",
                lambda *args, new_shapes, **options: scaled_dot_product_attention(*args, **options),
            )
        logits = stage.logits(None, make_batch())
    (call,) = calls
    assert call.q == (2, 4, 16, 16)
    assert call.k[1] == (groups if kernel else 4)
    assert call.enable_gqa is (kernel and groups < 4)
    torch.testing.assert_close(logits, stage.logits(None, make_batch()))


@pytest.mark.parametrize(
    ("backend", "mask", "dtype", "grouped"),
    [
        (CudaBackend, None, torch.bfloat16, True),
        (CudaBackend, None, torch.float16, True),
        (CudaBackend, None, torch.float32, False),
        (CudaBackend, torch.zeros(3, 3), torch.bfloat16, False),
        (CpuBackend, None, torch.bfloat16, False),
    ],
)
def test_fused_gqa_needs_cuda_half_precision_and_no_mask(calls, backend, mask, dtype, grouped):
    q, k = torch.zeros(3, 1, 4, 8, dtype=dtype), torch.zeros(3, 1, 2, 8, dtype=dtype)
    mask = None if mask is None else mask.to(dtype)
    out = backend.__new__(backend).attention(q, k, k, mask, dropout=0.0, causal=mask is None)
    assert out.shape == q.shape
    assert calls[0].enable_gqa is grouped and calls[0].k[1] == (2 if grouped else 4)


@pytest.mark.parametrize(("position_embedding", "masked"), [("learned", False), ("alibi", True)])
def test_attention_is_causal_and_only_alibi_has_a_mask(make_stage, make_batch, calls, position_embedding, masked):
    stage = make_stage(num_layers=1, position_embedding=position_embedding)
    stage(None, make_batch())
    (call,) = calls
    assert (call.attn_mask is not None) is masked and call.is_causal is not masked


def test_a_single_token_attends_to_the_whole_cache(make_stage, make_batch, calls):
    stage = make_stage(num_layers=1).eval()
    cache = stage.new_cache(2, 16)
    with torch.no_grad():
        stage(None, make_batch(2, 2), cache.first([0, 1]))
        token = dataclasses.replace(make_batch(2, 1), position_ids=torch.full((2, 1), 2))
        stage(None, token, cache.next([2, 2]))
    prompt, token = calls
    assert (prompt.q[2], prompt.k[2], prompt.is_causal) == (2, 2, True)
    assert (token.q[2], token.k[2], token.is_causal) == (1, 3, False)


@pytest.mark.parametrize("normalized", [False, True])
def test_queries_and_keys_are_normalized_if_the_model_says_so(make_stage, make_batch, monkeypatch, normalized):
    stage, found = make_stage(num_layers=1, qk_layernorm=normalized, init_std=0.3), []
    attention = stage.sharding.backend.attention

    def recorded(q, k, v, *args, **options):
        found.extend((q, k, v))
        return attention(q, k, v, *args, **options)

    monkeypatch.setattr(stage.sharding.backend, "attention", recorded)
    stage(None, make_batch())
    lengths = [x.detach().square().mean(-1) for x in found]
    assert [torch.allclose(x, torch.ones_like(x), atol=1e-3) for x in lengths] == [normalized, normalized, False]


def test_attention_dropout_is_passed_to_the_kernel_in_training_only(make_stage, make_batch, calls):
    stage = make_stage(num_layers=1, attention_dropout=0.25)
    stage(None, make_batch())
    stage.eval()(None, make_batch())
    assert [call.dropout_p for call in calls] == [0.25, 0.0]


@pytest.mark.parametrize(
    ("recompute", "layers_again", "attention_again"),
    [
        (RecomputeConfig(), 0, 0),
        (RecomputeConfig(granularity="selective"), 0, 3),
        (RecomputeConfig(granularity="full", method="uniform", num_layers=1), 3, 3),
        (RecomputeConfig(granularity="full", method="uniform", num_layers=2), 3, 3),
        (RecomputeConfig(granularity="full", method="block", num_layers=2), 2, 2),
    ],
    ids=str,
)
def test_backward_recomputes_the_selected_layers(
    make_stage, make_batch, calls, recompute, layers_again, attention_again
):
    stage, batch = make_stage(num_layers=3, recompute=recompute), make_batch()
    projections = []
    for layer in stage.decoder.layers.values():
        layer.self_attention.qkv.register_forward_hook(lambda *_: projections.append(1))
    hidden = stage(None, batch)
    assert (len(calls), len(projections)) == (3, 3)
    hidden.sum().backward()
    assert (len(calls), len(projections)) == (3 + attention_again, 3 + layers_again)


@pytest.mark.parametrize("granularity", ["selective", "full"])
def test_no_recomputation_under_no_grad_or_in_eval_mode(make_stage, make_batch, calls, granularity):
    stage, batch = make_stage(num_layers=2, recompute=RecomputeConfig(granularity=granularity)), make_batch()
    with torch.no_grad():
        stage(None, batch)
    stage.eval()
    hidden = stage(None, batch)
    assert len(calls) == 4
    hidden.sum().backward()
    assert len(calls) == 4
