"""Tests of document-masked attention through a varlen kernel: its arguments, with a stand-in, and compiled graphs."""

import dataclasses
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from support.stage_backward import run_backward
from torch.nn import functional as F

from megatron_lite.backend import cuda
from megatron_lite.backend.cpu import CpuBackend
from megatron_lite.backend.cuda import CudaBackend, find_varlen_kernel
from megatron_lite.backend.environment import Launch
from megatron_lite.config.batch import BatchConfig
from megatron_lite.config.parallel import ParallelConfig
from megatron_lite.config.run import RunConfig
from megatron_lite.config.runtime import RuntimeConfig
from megatron_lite.data.serving.masks import document_rows
from megatron_lite.model.batch import Documents
from megatron_lite.model.gpt import GPTStage
from megatron_lite.parallel.mesh import build_mesh
from megatron_lite.parallel.random import RngStreams

LENGTHS = ((5, 1, 1, 9), (3, 4, 9), (16,))


def varlen(q, k, v, cu_seqlens):
    """Stand-in: causal attention within documents, by a mask; q [t, n, d], k and v [t, g, d]."""
    place = torch.arange(q.shape[0])
    document = torch.bucketize(place, cu_seqlens[1:], right=True)
    mask = (document.unsqueeze(1) == document).tril()
    q, k, v = (x.transpose(0, 1).unsqueeze(0) for x in (q, k, v))
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=k.shape[1] != q.shape[1])
    return out.squeeze(0).transpose(0, 1)


class VarlenBackend(CpuBackend):
    """CPU backend with a varlen kernel."""

    def __init__(self):
        super().__init__(RuntimeConfig(device="cpu", num_threads=1), ParallelConfig(), Launch())
        self.calls = []

    def has_varlen_attention(self, q):
        return True

    def varlen_attention(self, q, k, v, cu_seqlens, longest):
        if self.calls is not None:
            self.calls.append((cu_seqlens, longest))
        return varlen(q, k, v, cu_seqlens)


def with_documents(batch, lengths):
    ids = np.stack([np.repeat(np.arange(len(row)), row) for row in lengths])
    order, inverse, groups, cu_seqlens = document_rows(ids)
    order, inverse, cu_seqlens = (torch.from_numpy(array) for array in (order, inverse, cu_seqlens))
    return dataclasses.replace(batch, documents=Documents(order, inverse, groups, cu_seqlens))


@pytest.fixture
def make_pair(make_stage, make_config):
    """The same model on a backend with a varlen kernel, and on one without."""

    def make(**changes):
        model = make_config(init_std=0.3, **changes)
        config = RunConfig(model=model, batch=BatchConfig(seq_length=48, micro_batch_size=1))
        mesh = build_mesh(VarlenBackend(), ParallelConfig())
        stage = GPTStage(config, range(model.num_layers), mesh, RngStreams(7, mesh.backend))
        return stage, make_stage(init_std=0.3, **changes)

    return make


@pytest.mark.parametrize("changes", [{}, {"position_embedding": "rotary", "num_query_groups": 2}], ids=str)
def test_one_call_for_all_documents_of_a_micro_batch(make_pair, make_batch, changes):
    packed, grouped = make_pair(**changes)
    batch = with_documents(make_batch(3, 16), LENGTHS)
    torch.testing.assert_close(run_backward(packed, batch), run_backward(grouped, batch))
    for ours, theirs in zip(packed.named_parameters_global(), grouped.named_parameters_global(), strict=True):
        torch.testing.assert_close(ours.param.grad, theirs.param.grad, rtol=1e-4, atol=1e-5)
    calls = packed.sharding.backend.calls
    assert len(calls) == 2  # one for each layer
    for cu_seqlens, longest in calls:
        assert cu_seqlens.tolist() == [0, 5, 6, 7, 16, 19, 23, 32, 48] and cu_seqlens.dtype == torch.int32
        assert longest == 16


def test_alibi_and_dropout_keep_the_calls_by_length(make_pair, make_batch):
    batch = with_documents(make_batch(3, 16), LENGTHS)
    for changes in ({"position_embedding": "alibi"}, {"attention_dropout": 0.3}):
        stage, _ = make_pair(**changes)
        stage(None, batch)
        assert not stage.sharding.backend.calls
        stage.eval()(None, batch)
        assert bool(stage.sharding.backend.calls) == ("attention_dropout" in changes)


@pytest.mark.slow
def test_all_micro_batches_share_the_graphs(make_pair, make_batch):
    stage, _ = make_pair()
    stage.sharding.backend.calls = None  # a list that grows would need a new graph each time
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    torch.compiler.reset()
    stage.compile(backend=backend, fullgraph=True)
    borders = [((k, 16 - k), (16 - k, k)) for k in range(1, 4)] + [((k, 1, 15 - k), (3, 13)) for k in range(4, 7)]
    for lengths in borders:
        stage(None, with_documents(make_batch(2, 16), lengths))
    assert len(graphs) <= 2  # the second has any number of documents


def on_cuda(kernel, chooses=True):
    """A CUDA backend without a device."""
    backend = object.__new__(CudaBackend)
    backend._varlen, backend._chooses_kernel = kernel, chooses
    return backend


@pytest.mark.parametrize("version", ["2.10", "2.11", "2.13"])
def test_each_version_of_torch_gets_its_arguments(monkeypatch, version):
    seen = {}

    def of_2_10(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, is_causal=False, return_aux=None):
        seen.update(locals())
        return varlen(query, key, value, cu_seq_q)

    def of_2_11(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, scale=None, window_size=(-1, -1)):
        seen.update(locals())
        return varlen(query, key, value, cu_seq_q)

    def of_2_13(
        query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, window_size=(-1, -1), enable_gqa=False, num_splits=None
    ):
        seen.update(locals())
        return varlen(query, key, value, cu_seq_q)

    kernel = {"2.10": of_2_10, "2.11": of_2_11, "2.13": of_2_13}[version]
    monkeypatch.setitem(sys.modules, "torch.nn.attention.varlen", SimpleNamespace(varlen_attn=kernel))
    q, k = torch.randn(16, 4, 8), torch.randn(16, 2, 8)
    cu_seqlens = torch.tensor([0, 7, 16], dtype=torch.int32)
    out = on_cuda(find_varlen_kernel()).varlen_attention(q, k, k, cu_seqlens, 16)
    torch.testing.assert_close(out, varlen(q, k, k, cu_seqlens))
    assert seen["cu_seq_q"] is cu_seqlens and seen["cu_seq_k"] is cu_seqlens
    assert (seen["max_q"], seen["max_k"]) == (16, 16)
    assert seen.get("is_causal") is True or seen["window_size"] == (-1, 0)
    assert seen["key"].shape[1] == (2 if version == "2.13" else 4)


def test_the_installed_torch_has_the_kernel_and_2_9_has_not(monkeypatch):
    assert find_varlen_kernel() is not None
    monkeypatch.setitem(sys.modules, "torch.nn.attention.varlen", None)
    assert find_varlen_kernel() is None


def test_the_kernel_takes_half_precision_and_up_to_256_channels():
    backend = on_cuda(find_varlen_kernel())
    taken = [
        backend.has_varlen_attention(torch.empty(1, 1, 1, channels, dtype=dtype))
        for dtype, channels in ((torch.bfloat16, 64), (torch.float16, 256), (torch.float32, 64), (torch.bfloat16, 257))
    ]
    assert taken == [True, True, False, False]
    assert not on_cuda(None).has_varlen_attention(torch.empty(1, 1, 1, 64, dtype=torch.bfloat16))


@pytest.mark.parametrize(("chooses", "new_shapes"), [(True, True), (True, False), (False, True)])
def test_cudnn_is_left_out_where_shapes_keep_changing(monkeypatch, chooses, new_shapes):
    allowed = []

    def record(q, *args, **options):
        allowed.append(torch.backends.cuda.cudnn_sdp_enabled())
        return q

    monkeypatch.setattr(cuda, "scaled_dot_product_attention", record)
    before = torch.backends.cuda.cudnn_sdp_enabled()
    x = torch.empty(1, 1, 1, 8, dtype=torch.bfloat16)
    on_cuda(None, chooses).attention(x, x, x, None, dropout=0.0, causal=True, new_shapes=new_shapes)
    assert allowed == [before and not (chooses and new_shapes)]
    assert torch.backends.cuda.cudnn_sdp_enabled() == before


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_the_kernel_of_a_gpu_equals_the_mask():
    backend = CudaBackend(RuntimeConfig(), ParallelConfig(), Launch())
    q, k = (torch.randn(32, heads, 64, device="cuda", dtype=torch.bfloat16) for heads in (4, 2))
    cu_seqlens = torch.tensor([0, 5, 6, 20, 32], dtype=torch.int32)
    found = backend.varlen_attention(q, k, k, cu_seqlens.cuda(), 32).cpu().float()
    expected = varlen(*(x.cpu().float() for x in (q, k, k)), cu_seqlens)
    assert (found - expected).abs().max() <= 0.02 * expected.abs().max()
