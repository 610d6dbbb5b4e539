"""Tests of norms, counts and steps of parameters split, replicated and shared over tp, pp and dp."""

import zlib
from dataclasses import dataclass
from functools import partial

import numpy as np
import pytest
import torch
from torch import nn

from megatron_lite.config.parallel import ParallelConfig
from megatron_lite.optim.element_sums import ElementSums
from megatron_lite.optim.optimizer import Optimizer
from megatron_lite.parallel.buffers import ParameterBuffers, Shard, ShardPiece
from megatron_lite.parallel.parameters import NamedParameter
from megatron_lite.parallel.shared import SharedModule
from megatron_lite.rectangle import Rectangle

VOCABULARY, PADDED, HIDDEN = 13, 16, 24  # two replicas hold a part of each matrix under ZeRO-1


@dataclass
class Spec:
    """Parameter of the toy model; `stages` hold it (two for the tied embedding, which the first owns)."""

    name: str
    shape: tuple
    tp_dim: int | None
    stages: tuple
    sequence_parallel: bool = False

    def draw(self, *key):
        """Return numbers that depend on name and key only, a third of them zero; padded rows are zero.

        All are multiples of 1/64, so that fp32 sums of them are exact in any order.
        """
        generator = torch.Generator().manual_seed(zlib.crc32(repr((self.name, key)).encode()))
        values = torch.randint(-128, 129, self.shape, generator=generator) / 64
        values *= torch.rand(self.shape, generator=generator) > 0.3
        if self.name == "embedding":
            values[VOCABULARY:] = 0
        return values


SPECS = [
    Spec("embedding", (PADDED, HIDDEN), 0, (0, -1)),
    Spec("first.column", (32, HIDDEN), 0, (0,)),
    Spec("first.row", (HIDDEN, 32), 1, (0,)),
    Spec("first.norm", (HIDDEN,), None, (0,), True),
    Spec("last.positions", (3, HIDDEN), None, (-1,)),
    Spec("last.bias", (8,), 0, (-1,)),
    Spec("last.norm", (HIDDEN,), None, (-1,), True),
]
REPORTS = {"log_num_zeros": True, "log_params_norm": True, "clip_grad": 0.7}


def part(spec, values, tp):
    return values if spec.tp_dim is None else values.chunk(tp.size, spec.tp_dim)[tp.rank].contiguous()


def held_by(mesh):
    """Return (spec, NamedParameter, whether it is the tied copy) of each parameter of this rank's stage."""
    for spec in SPECS:
        for place in spec.stages:
            if place % mesh.pp.size != mesh.pp.rank or (place == -1 and mesh.pp.size == 1 and len(spec.stages) == 2):
                continue
            shape = (VOCABULARY, HIDDEN) if spec.name == "embedding" else spec.shape
            param = nn.Parameter(part(spec, spec.draw("values"), mesh.tp))
            local, offset = list(param.shape), [0] * param.dim()
            if spec.tp_dim is not None:
                offset[spec.tp_dim] = mesh.tp.rank * local[spec.tp_dim]
                local[spec.tp_dim] = min(local[spec.tp_dim], shape[spec.tp_dim] - offset[spec.tp_dim])
            copy = spec.name == "embedding" and mesh.pp.size > 1 and place == -1
            yield (
                spec,
                NamedParameter(
                    spec.name,
                    param,
                    shape,
                    spec.tp_dim,
                    Rectangle(tuple(offset), tuple(local)),
                    not copy,
                    spec.sequence_parallel,
                ),
                copy,
            )


def contributions(spec, mesh, copy, single):
    """Return this rank's contribution to a parameter's gradient; `single`: the sum over the ranks of the layout."""
    replicas, tps, copies = (range(2), range(2), (False, True)) if single else ([mesh.dp.rank], [mesh.tp.rank], [copy])
    if spec.name != "embedding":
        copies = [False]
    if not spec.sequence_parallel:
        tps = [0]
    return part(spec, sum(spec.draw("grad", d, t, c) for d in replicas for t in tps for c in copies), mesh.tp)


def step(kit, mesh, shard=False, bucket_megabytes=160, single=False):
    held = list(held_by(mesh))
    parameters = [parameter for _, parameter, _ in held]
    shared = {"embedding": SharedModule((0, 1), (0, 1), mesh.pp)} if mesh.pp.size > 1 else {}
    sizes = {"shard": shard, "bucket_megabytes": bucket_megabytes}
    buffers = ParameterBuffers(parameters, dp=mesh.dp, tp=mesh.tp, shared=shared, **sizes)
    optimizer = Optimizer(kit.config(**REPORTS), buffers, mesh)
    results = []
    for _ in range(2):
        buffers.begin(1)
        for spec, parameter, copy in held:
            buffers.accumulate(parameter.param, contributions(spec, mesh, copy, single))
        buffers.reduce()
        results.append(optimizer.settle(optimizer.step(lr=0.1, weight_decay=0.1).tolist()))
    params = [(p.name, p.rectangle.offset, p.local().detach().numpy().copy()) for p in parameters]
    writers = [(t.name, sum(piece.tensor.numel() for piece in t.pieces)) for t in optimizer.state_tensors() if t.write]
    return [(r.grad_norm, r.num_zeros, r.params_norm) for r in results], params, writers


@pytest.mark.parametrize(("shard", "megabytes"), [(False, 160), (True, 160), (True, 0)])
def test_each_parameter_is_counted_once_over_tp_pp_and_dp(kit, on_meshes, shard, megabytes):
    alone, whole, _ = step(kit, kit.mesh(), single=True)
    values = {name: value for name, _, value in whole}
    parallel = ParallelConfig(world_size=8, tp=2, pp=2)
    ranks = on_meshes(parallel, partial(step, kit, shard=shard, bucket_megabytes=megabytes))
    for results, params, _ in ranks:
        for ours, expected in zip(results, alone, strict=True):
            assert ours == pytest.approx(expected, rel=1e-5)
            assert ours[1] == expected[1]
        for name, offset, value in params:
            place = tuple(slice(first, first + size) for first, size in zip(offset, value.shape, strict=True))
            np.testing.assert_allclose(value, values[name][place], rtol=1e-5, atol=1e-6, err_msg=name)
    written = {}
    for _, _, writers in ranks:
        for name, elements in writers:
            written[name] = written.get(name, 0) + elements
    assert written == {f"optimizer.{m}.{n}": v.size for n, v in values.items() for m in ("exp_avg", "exp_avg_sq")}


def test_sums_over_long_tensors_are_precise():
    flat = torch.full((30_000_001,), 1e-3)
    param = nn.Parameter(flat)
    piece = ShardPiece(NamedParameter("w", param, flat.shape, None, Rectangle.full(flat.shape)), 0, flat.numel(), 0)
    sums = ElementSums([Shard(True, flat, flat, (piece,))], 0, group=None)
    assert sums.squares([flat]).item() == pytest.approx(flat.numel() * float(flat[0]) ** 2, rel=1e-5)
