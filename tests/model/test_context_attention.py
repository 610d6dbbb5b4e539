"""Tests of context-parallel attention: equal to attention in one process, forward and backward."""

from unittest import mock

import pytest
import torch

from megatron_lite.backend.attention_blocks import flash_attend_block, flash_block_gradients
from megatron_lite.config.layout import partitions
from megatron_lite.config.parallel import ParallelConfig
from megatron_lite.data.serving.masks import document_ids, document_rows
from megatron_lite.model import context_attention
from megatron_lite.model.batch import Documents
from megatron_lite.model.context_attention import ContextAttention, document_starts
from megatron_lite.model.positions import alibi_slopes
from megatron_lite.parallel.context_parallel import chunk_positions, key_exchange, local_chunks

LENGTH, BATCH, HEADS, GROUPS, CHANNELS, EOD = 16, 2, 4, 2, 8, 0
CASES = {"plain": (False, False), "alibi": (True, False), "documents": (False, True), "both": (True, True)}


def draw(number, heads):
    generator = torch.Generator().manual_seed(number)
    return torch.randn(LENGTH, BATCH, heads, CHANNELS, generator=generator)


def tokens():
    """Documents of 5, 1 and 10 tokens, and of 13 and 3: none ends with a chunk."""
    values = torch.ones(BATCH, LENGTH, dtype=torch.int64)
    values[0, [4, 5]] = values[1, 12] = EOD
    return values


def documents():
    rows = document_rows(document_ids(tokens().numpy(), EOD))
    order, inverse, cu_seqlens = (torch.from_numpy(array) for array in (rows.order, rows.inverse, rows.cu_seqlens))
    return Documents(order, inverse, rows.groups, cu_seqlens)


def whole_attention(q, k, v, alibi, masked):
    """Attention over complete sequences with a mask in memory."""
    k, v = (x.repeat_interleave(HEADS // GROUPS, dim=2) for x in (k, v))
    scores = torch.einsum("sbnd,tbnd->bnst", q, k) / CHANNELS**0.5
    places = torch.arange(LENGTH)
    if alibi:
        scores = scores + torch.tensor(alibi_slopes(HEADS)).view(-1, 1, 1) * (places - places.unsqueeze(1))
    visible = places.unsqueeze(1) >= places
    if masked:
        ids = torch.from_numpy(document_ids(tokens().numpy(), EOD))
        visible = (visible & (ids.unsqueeze(2) == ids.unsqueeze(1))).unsqueeze(1)
    weights = scores.masked_fill(~visible, float("-inf")).softmax(-1)
    return torch.einsum("bnst,tbnd->sbnd", weights, v).flatten(2, 3)


def deviations(backend, case, max_scores):
    """On one rank: largest deviations, relative to the largest element, of outputs and gradients, by exchange."""
    size = backend.world_size
    group = backend.new_group("cp", partitions("cp", ParallelConfig(world_size=size, cp=size)))
    alibi, masked = CASES[case]
    whole = [draw(number, heads).requires_grad_() for number, heads in enumerate((HEADS, GROUPS, GROUPS))]
    upstream = draw(9, HEADS).flatten(2, 3)
    expected = whole_attention(*whole, alibi, masked)
    expected.backward(upstream)
    found = {}
    for kind in ("p2p", "all_gather"):
        parts = [local_chunks(x.detach(), group, 0).requires_grad_() for x in whole]
        attention = ContextAttention(
            group,
            key_exchange(kind, group),
            backend,
            LENGTH,
            torch.tensor(alibi_slopes(HEADS)) if alibi else None,
            document_starts(documents(), BATCH) if masked else None,
        )
        with mock.patch.object(context_attention, "MAX_SCORES", max_scores):
            out = attention(*parts, 0.0, lambda: None)
            out.backward(local_chunks(upstream, group, 0))
        pairs = [(out, expected), *((part.grad, x.grad) for part, x in zip(parts, whole, strict=True))]
        found[kind] = [
            ((ours - local_chunks(theirs, group, 0)).abs().max() / theirs.abs().max()).item() for ours, theirs in pairs
        ]
    return found


@pytest.mark.slow
@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("max_scores", [1 << 27, 100], ids=["", "queries in parts"])
def test_equals_attention_in_one_process(size, max_scores, on_ranks):
    for case in CASES:
        for found in on_ranks(size, deviations, case, max_scores):
            assert all(max(numbers) < 2e-6 for numbers in found.values()), (case, found)


def dropped(backend, kind):
    """On one rank: outputs with dropout of two equal calls and of another seed, and the check of a gradient."""
    size = backend.world_size
    group = backend.new_group("cp", partitions("cp", ParallelConfig(world_size=size, cp=size)))
    attention = ContextAttention(group, key_exchange(kind, group), backend, LENGTH)
    parts = [local_chunks(draw(number, heads), group, 0) for number, heads in enumerate((HEADS, GROUPS, GROUPS))]
    v, change = parts[2].requires_grad_(), local_chunks(draw(7, GROUPS), group, 0)

    def run(seed, v):
        return attention(*parts[:2], v, 0.5, lambda: backend.seed(seed + group.rank))

    first, second, other = run(1, v), run(1, v), run(2, v)
    total = first.sum()
    total.backward()
    # Linear in the values: the change of the sum over all ranks is the gradient times the change of the values.
    sums = torch.stack([(run(1, v.detach() + change) - first).sum(), (v.grad * change).sum()])
    group.all_reduce_(sums)
    return bool((first == second).all()), bool((first == other).all()), sums.tolist()


@pytest.mark.slow
def test_dropout_draws_the_same_masks_in_backward(on_ranks):
    for kind in ("p2p", "all_gather"):
        for repeats, equal, (change, predicted) in on_ranks(2, dropped, kind):
            assert repeats and not equal
            assert change == pytest.approx(predicted, rel=1e-4)


def test_chunks_are_balanced():
    """Every rank has equally many pairs of a query and a key at or before it."""
    for size in (1, 2, 4, 8):
        positions = [chunk_positions(rank, 32, size, torch.device("cpu")) for rank in range(size)]
        assert torch.cat(positions).sort().values.tolist() == list(range(32))
        assert len({int((place + 1).sum()) for place in positions}) == 1


def test_starts_of_documents():
    assert document_starts(documents(), BATCH).tolist() == [[0] * 5 + [5] + [6] * 10, [0] * 13 + [13] * 3]


def test_the_kernels_of_gpus_take_these_arguments():
    """The GPU's FlashAttention runs on GPUs only; its shapes are computed on the meta device."""
    q, k = (torch.empty(6, 2, heads, 8, dtype=torch.bfloat16, device="meta") for heads in (4, 2))
    out, lse, seeds = flash_attend_block(q, k, k, causal=True)
    assert out.shape == q.shape and lse.shape == (2, 4, 6) and lse.dtype == torch.float32
    gradients = flash_block_gradients(out, q, k, k, out, lse, True, seeds)
    assert [x.shape for x in gradients] == [q.shape, k.shape, k.shape]


def flash_of_cpu(q, k, v, dropout, causal):
    """FlashAttention of the CPU, with the arguments and results of the GPU's, and as many key heads as query heads."""
    out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, dropout, causal)
    return out, lse, None, None, q.shape[2], k.shape[2], "seed", "offset", None


def flash_backward_of_cpu(gradient, q, k, v, out, lse, of_q, of_k, max_q, max_k, dropout, causal, seed, offset):
    assert (of_q, of_k, max_q, max_k) == (None, None, q.shape[2], k.shape[2]) and (seed, offset) == ("seed", "offset")
    assert lse.is_contiguous()
    lse = lse.transpose(1, 2).contiguous().transpose(1, 2)  # the CPU's layout
    return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
        gradient, q, k, v, out, lse, dropout, causal
    )


def fused_deviations(backend):
    """As deviations, with the CPU's FlashAttention in the place of the GPU's."""
    aten = torch.ops.aten
    with (
        mock.patch.object(aten, "_scaled_dot_product_flash_attention", flash_of_cpu),
        mock.patch.object(aten, "_scaled_dot_product_flash_attention_backward", flash_backward_of_cpu),
        mock.patch.object(type(backend), "has_block_kernel", lambda self, q: True),
        mock.patch(f"{__name__}.GROUPS", HEADS),
        mock.patch.object(context_attention, "attend_block", None),
    ):
        return deviations(backend, "plain", 1 << 27)


@pytest.mark.slow
def test_a_fused_kernel_computes_the_same(on_ranks):
    for found in on_ranks(4, fused_deviations):
        assert all(max(numbers) < 2e-6 for numbers in found.values()), found
