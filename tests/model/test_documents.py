"""Tests of document-masked attention by document length: equal to a mask, in less memory, in few calls, compiled."""

import dataclasses
from contextlib import contextmanager, nullcontext
from unittest import mock

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.stage_backward import run_backward
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from megatron_lite.config.batch import BatchConfig
from megatron_lite.config.model import ModelConfig
from megatron_lite.config.optimizer import RecomputeConfig
from megatron_lite.config.parallel import ParallelConfig
from megatron_lite.config.run import RunConfig
from megatron_lite.data.serving.masks import document_rows
from megatron_lite.model.batch import Documents, MicroBatch
from megatron_lite.model.gpt import GPTStage
from megatron_lite.parallel.mesh import build_mesh
from megatron_lite.parallel.random import RngStreams


def with_documents(batch, lengths):
    """Return the batch with each sample divided into documents of these lengths."""
    order, inverse, groups, cu_seqlens = document_rows(document_ids(lengths).numpy())
    order, inverse, cu_seqlens = (torch.from_numpy(array) for array in (order, inverse, cu_seqlens))
    return dataclasses.replace(batch, documents=Documents(order, inverse, groups, cu_seqlens))


def document_ids(lengths):
    """Return the number of each token's document, [b, s]."""
    return torch.from_numpy(np.stack([np.repeat(np.arange(len(row)), row) for row in lengths]))


@contextmanager
def with_a_mask(stage, lengths):
    """Reference: attention over whole samples with a mask [b, 1 or n, s, s] instead of calls per document."""
    ids, plain = document_ids(lengths), stage._context
    same = (ids.unsqueeze(2) == ids.unsqueeze(1)).unsqueeze(1)

    def context(*args):
        found = plain(*args)
        mask = same.tril() if found.mask is None else found.mask.masked_fill(~same, float("-inf"))
        return dataclasses.replace(found, mask=mask, documents=None)

    with mock.patch.object(stage, "_context", context):
        yield


def results(stage, batch):
    """Return the loss, the logits and every gradient."""
    stage.zero_grad()
    logits, loss = stage.logits(None, batch), run_backward(stage, batch)
    return [loss, logits.detach(), *(p.param.grad.clone() for p in stage.named_parameters_global())]


def assert_equal_to_the_mask(stage, batch, lengths):
    found = results(stage, batch)
    with with_a_mask(stage, lengths):
        expected = results(stage, batch)
    for ours, masked in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, masked, rtol=1e-4, atol=1e-5)


@st.composite
def samples(draw):
    """Draw document lengths of 1 to 3 samples; the last may be divided into one-token documents (padding)."""
    length, rows = draw(st.integers(2, 16)), []
    for _ in range(draw(st.integers(1, 3))):
        cuts = sorted(draw(st.sets(st.integers(1, length - 1))))
        row = [end - begin for begin, end in zip([0, *cuts], [*cuts, length], strict=True)]
        rows.append(row[:-1] + [1] * row[-1] if draw(st.booleans()) else row)
    return rows if any(len(row) > 1 for row in rows) else [[1] * length, *rows[1:]]


@settings(max_examples=25)
@given(lengths=samples())
def test_any_document_lengths_equal_the_mask(make_stage, make_batch, lengths):
    stage = make_stage(init_std=0.3)
    assert_equal_to_the_mask(stage, with_documents(make_batch(len(lengths), sum(lengths[0])), lengths), lengths)


LENGTHS = ((5, 1, 1, 9), (3, 4, 9), (16,))


@pytest.mark.parametrize(
    "changes",
    [
        {"position_embedding": "rotary"},
        {"position_embedding": "alibi"},
        {"position_embedding": "none", "num_query_groups": 2},
        {"position_embedding": "rotary", "num_query_groups": 1, "qk_layernorm": True},
        {"recompute": RecomputeConfig(granularity="selective")},
        {"recompute": RecomputeConfig(granularity="full", method="uniform", num_layers=1)},
    ],
    ids=str,
)
def test_every_model_variant_equals_the_mask(make_stage, make_batch, changes):
    stage = make_stage(init_std=0.3, **changes)
    assert_equal_to_the_mask(stage, with_documents(make_batch(3, 16), LENGTHS), LENGTHS)


def test_micro_batches_of_one_sample_add_up(make_stage, make_batch):
    stage, batch = make_stage(init_std=0.3), make_batch(3, 16)
    loss, _, *gradients = results(stage, with_documents(batch, LENGTHS))
    parts = []
    for number, row in enumerate(LENGTHS):
        only = slice(number, number + 1)
        one = dataclasses.replace(batch, tokens=batch.tokens[only], labels=batch.labels[only])
        parts.append(results(stage, with_documents(one, (row,)) if len(row) > 1 else one))
    for place, whole in ((0, loss), *enumerate(gradients, start=2)):
        torch.testing.assert_close(sum(part[place] for part in parts), whole, rtol=1e-4, atol=1e-5)


def split_over(backend, parallel, changes, lengths):
    """Return the loss, and the squared norm of this rank's gradients of the qkv projections."""
    mesh = build_mesh(backend, parallel)
    rng = RngStreams(7, backend, mesh.tp.rank)
    sizes = {"num_layers": 2, "hidden_size": 64, "num_attention_heads": 4, "max_position_embeddings": 16}
    sizes |= {"vocab_size": 101, "padded_vocab_size": 128, "hidden_dropout": 0.0, "attention_dropout": 0.0}
    config = RunConfig(
        model=ModelConfig(**(sizes | changes)),
        batch=BatchConfig(seq_length=16, micro_batch_size=3),
        parallel=parallel,
    )
    stage = GPTStage(config, range(2), mesh, rng)
    tokens = torch.randint(0, 101, (3, 17), generator=torch.Generator().manual_seed(5))
    batch = with_documents(MicroBatch(tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()), lengths)
    loss = run_backward(stage, batch)
    squares = sum(p.param.grad.square().sum() for p in stage.named_parameters_global() if "qkv.weight" in p.name)
    return loss.item(), squares.item()


@pytest.mark.parametrize("sequence_parallel", [False, True], ids=["", "sequence-parallel"])
def test_tensor_parallel_heads_use_the_same_documents(on_ranks, mesh, sequence_parallel):
    changes = {"position_embedding": "rotary", "num_query_groups": 2, "init_std": 0.2}
    loss, squares = split_over(mesh.backend, ParallelConfig(), changes, LENGTHS)
    parallel = ParallelConfig(world_size=2, tp=2, sequence_parallel=sequence_parallel)
    found = on_ranks(2, split_over, parallel, changes, LENGTHS)
    assert [result[0] for result in found] == pytest.approx([loss] * 2, rel=1e-6)
    assert sum(result[1] for result in found) == pytest.approx(squares, rel=1e-5)


def test_a_document_end_off_by_one_changes_the_result(make_stage, make_batch):
    stage, batch = make_stage(init_std=0.3), make_batch(3, 16)
    wrong = with_documents(batch, ((6, 1, 1, 8), *LENGTHS[1:]))
    with pytest.raises(AssertionError, match="not close"):
        assert_equal_to_the_mask(stage, wrong, LENGTHS)


@pytest.mark.parametrize("granularity", ["none", "selective"])
def test_dropout_repeats_per_micro_batch(make_stage, make_batch, granularity):
    """Dropout is seeded by layer and micro-batch, independent of earlier draws."""
    batch = with_documents(make_batch(3, 16), LENGTHS)
    stage = make_stage(init_std=0.3, attention_dropout=0.3, recompute=RecomputeConfig(granularity=granularity))
    kept = make_stage(init_std=0.3, attention_dropout=0.3)
    stage.decoder.layers["0"].self_attention.rng.set_microbatch(0, 0)
    first = results(stage, batch)
    torch.randn(5)
    kept.decoder.layers["0"].self_attention.rng.set_microbatch(0, 0)
    for ours, again in zip(first, results(kept, batch), strict=True):
        assert torch.equal(ours, again)
    kept.decoder.layers["0"].self_attention.rng.set_microbatch(0, 1)
    assert not torch.equal(first[0], results(kept, batch)[0])


class Largest(TorchDispatchMode):
    """Records the number of elements of the largest tensor that an operation returned."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(tensor, torch.Tensor):
                self.elements = max(self.elements, tensor.numel())
        return out


def test_no_tensor_grows_with_the_square_of_the_sequence(make_stage, make_batch):
    size, length = 2, 1024
    stage = make_stage(num_layers=1, hidden_size=32, num_attention_heads=2, max_position_embeddings=length)
    lengths = ((300, 600, 124), (1000, *[1] * 24))
    batch, largest = with_documents(make_batch(size, length), lengths), {}
    for name, way in (("documents", nullcontext()), ("mask", with_a_mask(stage, lengths))):
        with way, Largest() as mode:
            run_backward(stage, batch)
        largest[name] = mode.elements
    assert largest["documents"] == size * length * stage.config.padded_vocab_size  # the logits
    assert largest["mask"] >= size * length * length


def test_one_kernel_call_per_document_length(make_stage, make_batch, monkeypatch):
    shapes, plain = [], F.scaled_dot_product_attention

    def counted(query, *args, **options):
        shapes.append(tuple(query.shape[::2]))
        return plain(query, *args, **options)

    monkeypatch.setattr(F, "scaled_dot_product_attention", counted)
    stage = make_stage(num_layers=1)
    stage(None, with_documents(make_batch(3, 40), ((10, *[1] * 30), (30, 10), (10, 30))))
    assert shapes == [(30, 1), (3, 10), (2, 30)]


@pytest.mark.slow
def test_compiled_once_for_all_micro_batches(make_stage, make_batch):
    """Only calls of the attention kernel, whose shapes change, are outside of the graphs."""
    stage, graphs = make_stage(), []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    borders = [((k, 16 - k), (16 - k, k)) for k in range(1, 8)] + [((k, 1, 15 - k), (3, 13)) for k in range(4, 12)]
    batches = [with_documents(make_batch(2, 16), lengths) for lengths in borders]
    expected = [stage(None, batch) for batch in batches]
    torch.compiler.reset()
    stage.compile(backend=backend)
    made = []
    for batch, logits in zip(batches, expected, strict=True):
        torch.testing.assert_close(stage(None, batch), logits)
        made.append(len(graphs))
    assert 0 < made[1] == made[-1], made
