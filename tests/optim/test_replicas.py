"""Tests of data parallelism on gloo ranks: any number of replicas, with or without ZeRO-1, equals one process."""

from functools import partial

import numpy as np
import pytest
import torch
from torch import nn

from megatron_lite.config.parallel import ParallelConfig

# Micro-batches of each iteration: more than, as many as and fewer than replicas, so that some replicas have none.
MICROBATCHES = (5, 4, 1, 3, 2)


DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def model(dtype):
    torch.manual_seed(0)
    layers = nn.Embedding(37, 24), nn.Linear(24, 40), nn.Tanh(), nn.Linear(40, 24), nn.LayerNorm(24)
    return nn.Sequential(*layers).to(DTYPES[dtype])


def train(kit, mesh, buffers=None, dtype="fp32", units=(), **parts):
    """Train one rank's replica; return results, parameters, and pieces of the state as numpy."""
    module = model(dtype)
    held, optimizer = kit.build(module, mesh, buffers, dtype=dtype, **parts)
    held.overlap_gather([module[unit] for unit in units])
    results = []
    for iteration, count in enumerate(MICROBATCHES):
        mine = range(mesh.dp.rank, count, mesh.dp.size)
        held.begin(len(mine))
        for number in mine:
            draw = torch.Generator().manual_seed(100 * iteration + number)
            tokens, target = torch.randint(0, 37, (3, 4), generator=draw), torch.randn(3, 4, 24, generator=draw)
            loss = (module(tokens).float() - target).square().mean() / count
            (loss * optimizer.loss_scale).backward()
        held.reduce()
        result = optimizer.settle(optimizer.step(lr=0.01, weight_decay=0.1).tolist())
        results.append((result.applied, result.grad_norm, result.num_zeros, result.params_norm))
    held.finish_gather()
    params = {name: param.detach().float().numpy().copy() for name, param in module.named_parameters()}
    state = [
        (tensor.name, tensor.global_shape, piece.offset, piece.tensor.numpy().copy())
        for tensor in optimizer.state_tensors()
        if tensor.write
        for piece in tensor.pieces
    ]
    return results, params, state, sum(shard.values.numel() for shard in held.shards)


def assemble(ranks):
    """Return the full tensors from every rank's written pieces; each element must be written exactly once."""
    whole, written = {}, {}
    for _, _, state, _ in ranks:
        for name, shape, offset, piece in state:
            place = tuple(slice(first, first + size) for first, size in zip(offset, piece.shape, strict=True))
            whole.setdefault(name, np.zeros(shape, np.float32))[place] = piece
            written.setdefault(name, np.zeros(shape, int))[place] += 1
    assert all((count == 1).all() for count in written.values())
    return whole


REPORTS = {"log_num_zeros": True, "log_params_norm": True, "clip_grad": 0.3}
# Adam divides a gradient by its own size, so that the rounding of one near zero becomes a whole step. With an epsilon
# above all rounding, steps differ as little as gradients do; and a gradient of the wrong scale gives another step.
REPORTS |= {"adam_eps": 1e-3}


@pytest.mark.parametrize(
    ("replicas", "buffers", "units"),
    [
        (2, {"shard": False, "bucket_megabytes": 0}, ()),
        (2, {"shard": True, "bucket_megabytes": 0}, (0, 1, 4)),
        (2, {"shard": True, "overlap": False}, (0, 1, 3, 4)),
        (4, {"shard": False}, ()),
        (4, {"shard": True, "bucket_megabytes": 0}, ()),
    ],
    ids=str,
)
def test_replicas_equal_one_process(kit, on_meshes, replicas, buffers, units):
    alone = train(kit, kit.mesh(), **REPORTS)
    ranks = on_meshes(ParallelConfig(world_size=replicas), partial(train, kit, buffers=buffers, units=units, **REPORTS))
    for results, params, _, _ in ranks:
        assert results == ranks[0][0]
        for ours, expected in zip(results, alone[0], strict=True):
            assert ours == pytest.approx(expected, rel=1e-5)
        for name, value in params.items():
            assert np.array_equal(value, ranks[0][1][name]), name
            np.testing.assert_allclose(value, alone[1][name], rtol=1e-5, atol=2e-6, err_msg=name)
    expected = assemble([alone])
    state = assemble(ranks)
    assert state.keys() == expected.keys()
    for name, value in state.items():
        np.testing.assert_allclose(value, expected[name], rtol=1e-4, atol=1e-7, err_msg=name)
    elements = [rank[3] for rank in ranks]
    if buffers["shard"]:
        assert len(set(elements)) == 1 and elements[0] < 1.5 * alone[3] / replicas


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_low_precision_replicas_agree(kit, on_meshes, dtype):
    # fp16 overflows at first, until the scale is low enough.
    parts = {"dtype": dtype, "initial_loss_scale": 2.0**20, "hysteresis": 1, **REPORTS}
    config = ParallelConfig(world_size=2)
    plain, sharded = (
        on_meshes(config, partial(train, kit, buffers={"shard": shard}, **parts)) for shard in (False, True)
    )
    assert [result[0] for result in plain[0][0]] == [result[0] for result in sharded[0][0]]
    if dtype == "fp16":
        assert {result[0] for result in plain[0][0]} == {True, False}
    for ranks in (plain, sharded):
        for name, value in ranks[1][1].items():
            assert np.array_equal(value, ranks[0][1][name]), name
    whole, parts_of_it = assemble(plain), assemble(sharded)
    assert whole.keys() == parts_of_it.keys() and any("main" in name for name in whole)
    for name, value in whole.items():
        np.testing.assert_allclose(parts_of_it[name], value, rtol=2e-3, atol=1e-6, err_msg=name)


def waiting(kit, mesh):
    module = model("fp32")
    held, optimizer = kit.build(module, mesh, {"shard": True, "bucket_megabytes": 0})
    held.overlap_gather([module[unit] for unit in (1, 3)])
    started, waited = [], []
    gather_, all_gather = mesh.dp, mesh.dp.all_gather_

    class Watched:
        def __init__(self, number, work):
            self.number, self.work = number, work

        def wait(self):
            waited.append(self.number)
            self.work.wait()

    def watch(out, x, async_op=False):
        started.append(out.numel())
        return Watched(len(started) - 1, all_gather(out, x, async_op=async_op))

    gather_.all_gather_ = watch
    held.begin(0)
    held.reduce()
    optimizer.step(0.1, 0.1)
    seen = [len(waited)]
    for layer in (module[1], module[1], module[3]):
        layer(torch.zeros(1, layer.in_features))
        seen.append(len(waited))
    return len(started), waited, seen


def test_gathers_overlap_until_a_units_forward(kit, on_meshes):
    # Seven parameters, of which the embedding's and the norm's are in no unit and waited for at once.
    for started, waited, seen in on_meshes(ParallelConfig(world_size=2), partial(waiting, kit)):
        assert started == 7 and seen == [3, 5, 5, 7] and waited[:3] == [0, 1, 2]
