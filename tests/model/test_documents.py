"""Documents that attend apart from each other: equal to a mask, in less memory, in few calls, compiled."""

import dataclasses

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.rounding import assert_same_sums
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from megatron_lite.config.model import ModelConfig
from megatron_lite.config.optimizer import RecomputeConfig
from megatron_lite.config.parallel import ParallelConfig
from megatron_lite.data.serving.masks import document_rows
from megatron_lite.model.batch import Documents, MicroBatch
from megatron_lite.model.gpt import GPTStage
from megatron_lite.parallel.mesh import build_mesh
from megatron_lite.parallel.random import RngStreams


def with_documents(batch, lengths):
    """The batch, each sample cut into documents of these lengths."""
    ids = np.stack([np.repeat(np.arange(len(row)), row) for row in lengths])
    rows, places, groups = document_rows(ids)
    documents = Documents(torch.from_numpy(rows), torch.from_numpy(places), groups)
    return dataclasses.replace(batch, document_ids=torch.from_numpy(ids), documents=documents)


def results(stage, batch):
    """The loss, the logits and every gradient."""
    stage.zero_grad()
    logits = stage(None, batch)
    loss = stage.loss(logits.clone(), batch)
    loss.backward()
    return [loss.detach(), logits.detach(), *(p.param.grad.clone() for p in stage.named_parameters_global())]


def assert_equal_to_the_mask(stage, batch):
    for ours, masked in zip(
        results(stage, batch), results(stage, dataclasses.replace(batch, documents=None)), strict=True
    ):
        assert_same_sums(ours, masked)


@st.composite
def samples(draw):
    """Lengths of the documents of 1 to 3 samples; the last of a sample may be cut up into one-token documents."""
    length, rows = draw(st.integers(2, 16)), []
    for _ in range(draw(st.integers(1, 3))):
        cuts = sorted(draw(st.sets(st.integers(1, length - 1))))
        row = [end - begin for begin, end in zip([0, *cuts], [*cuts, length], strict=True)]
        rows.append(row[:-1] + [1] * row[-1] if draw(st.booleans()) else row)
    return rows if any(len(row) > 1 for row in rows) else [[1] * length, *rows[1:]]


@settings(max_examples=25)
@given(lengths=samples())
def test_equal_the_mask_wherever_documents_end(make_stage, make_batch, lengths):
    stage = make_stage(init_std=0.3)
    assert_equal_to_the_mask(stage, with_documents(make_batch(len(lengths), sum(lengths[0])), lengths))


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
def test_equal_the_mask_in_every_model(make_stage, make_batch, changes):
    assert_equal_to_the_mask(make_stage(init_std=0.3, **changes), with_documents(make_batch(3, 16), LENGTHS))


def test_micro_batches_of_one_add_up(make_stage, make_batch):
    stage, batch = make_stage(init_std=0.3), make_batch(3, 16)
    loss, _, *gradients = results(stage, with_documents(batch, LENGTHS))
    parts = []
    for number, row in enumerate(LENGTHS):
        only = slice(number, number + 1)
        one = dataclasses.replace(batch, tokens=batch.tokens[only], labels=batch.labels[only])
        parts.append(results(stage, with_documents(one, (row,)) if len(row) > 1 else one))
    for place, whole in ((0, loss), *enumerate(gradients, start=2)):
        assert_same_sums(sum(part[place] for part in parts), whole)


def split_over(backend, parallel, changes, lengths):
    """Loss and the norm of the queries', keys' and values' gradients of this rank's part of a model."""
    mesh = build_mesh(backend, parallel)
    rng = RngStreams(7, backend, mesh.tp.rank)
    sizes = {"num_layers": 2, "hidden_size": 64, "num_attention_heads": 4, "max_position_embeddings": 16}
    sizes |= {"vocab_size": 101, "padded_vocab_size": 128, "hidden_dropout": 0.0, "attention_dropout": 0.0}
    config = ModelConfig(**(sizes | changes))
    stage = GPTStage(
        config,
        layers=range(2),
        has_embedding=True,
        has_head=True,
        mesh=mesh,
        rng=rng,
        seed=1234,
        dtype=torch.float32,
        sequence_parallel=parallel.sequence_parallel,
    )
    tokens = torch.randint(0, 101, (3, 17), generator=torch.Generator().manual_seed(5))
    batch = with_documents(MicroBatch(tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()), lengths)
    loss = stage.loss(stage(None, batch), batch)
    loss.backward()
    squares = sum(p.param.grad.square().sum() for p in stage.named_parameters_global() if "qkv.weight" in p.name)
    return loss.item(), squares.item()


@pytest.mark.parametrize("sequence_parallel", [False, True], ids=["", "sequence-parallel"])
def test_heads_split_over_ranks_see_the_same_documents(on_ranks, mesh, sequence_parallel):
    changes = {"position_embedding": "rotary", "num_query_groups": 2, "init_std": 0.2}
    loss, squares = split_over(mesh.backend, ParallelConfig(), changes, LENGTHS)
    parallel = ParallelConfig(world_size=2, tp=2, sequence_parallel=sequence_parallel)
    found = on_ranks(2, split_over, parallel, changes, LENGTHS)
    assert [result[0] for result in found] == pytest.approx([loss] * 2, rel=1e-5)
    assert sum(result[1] for result in found) == pytest.approx(squares, rel=1e-4)


def test_a_border_that_is_off_by_one_is_seen(make_stage, make_batch):
    stage, batch = make_stage(init_std=0.3), make_batch(3, 16)
    right = with_documents(batch, LENGTHS)
    wrong = with_documents(batch, ((6, 1, 1, 8), *LENGTHS[1:]))
    with pytest.raises(AssertionError, match="deviates"):
        assert_equal_to_the_mask(stage, dataclasses.replace(right, documents=wrong.documents))


@pytest.mark.parametrize("granularity", ["none", "selective"])
def test_dropout_is_drawn_the_same_again(make_stage, make_batch, granularity):
    """Seeded by place, not by how many calls went before; a second run draws the same, another micro-batch not."""
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
    """Remembers how many numbers the largest tensor had that an operation made."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(tensor, torch.Tensor):
                self.elements = max(self.elements, tensor.numel())
        return out


def test_no_square_of_the_sequence_lies_in_memory(make_stage, make_batch):
    size, length = 2, 1024
    stage = make_stage(num_layers=1, hidden_size=32, num_attention_heads=2, max_position_embeddings=length)
    batch = with_documents(make_batch(size, length), ((300, 600, 124), (1000, *[1] * 24)))
    largest = {}
    for name, given_batch in (("apart", batch), ("mask", dataclasses.replace(batch, documents=None))):
        with Largest() as mode:
            stage.loss(stage(None, given_batch), given_batch).backward()
        largest[name] = mode.elements
    assert largest["apart"] == size * length * stage.config.padded_vocab_size  # the logits
    assert largest["mask"] >= size * length * length


def test_calls_are_as_few_as_the_lengths(make_stage, make_batch, monkeypatch):
    shapes, plain = [], F.scaled_dot_product_attention

    def counted(query, *args, **options):
        shapes.append(tuple(query.shape[::2]))
        return plain(query, *args, **options)

    monkeypatch.setattr(F, "scaled_dot_product_attention", counted)
    stage = make_stage(num_layers=1)
    stage(None, with_documents(make_batch(3, 40), ((10, *[1] * 30), (30, 10), (10, 30))))
    assert shapes == [(30, 1), (3, 10), (2, 30)]


def test_compiled_once_for_all_micro_batches(make_stage, make_batch):
    """Only the kernel's calls, whose shapes change each time, are left out of the graphs."""
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
        assert_same_sums(stage(None, batch), logits)
        made.append(len(graphs))
    assert 0 < made[1] == made[-1], made
