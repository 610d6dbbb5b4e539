"""Tests of the device mesh and of dropout random streams."""

import torch

from megatron_lite.backend.environment import Launch
from megatron_lite.backend.select import select_backend
from megatron_lite.config.layout import AXES, coordinates, partitions, rank_of, subset_partition
from megatron_lite.config.parallel import ParallelConfig
from megatron_lite.config.runtime import RuntimeConfig
from megatron_lite.parallel.mesh import build_mesh
from megatron_lite.parallel.random import RngStreams, layer_number


def test_rank_order_equals_megatron():
    parallel = ParallelConfig(world_size=16, tp=2, pp=4)
    assert [rank_of(coordinates(rank, parallel), parallel) for rank in range(16)] == list(range(16))
    assert partitions("tp", parallel)[:2] == ((0, 1), (2, 3))
    assert partitions("dp", parallel)[:2] == ((0, 2), (1, 3))
    assert partitions("pp", parallel)[0] == (0, 4, 8, 12)
    assert partitions(("tp", "pp"), parallel)[0] == (0, 1, 4, 5, 8, 9, 12, 13)
    ends = subset_partition(partitions("pp", parallel), (0, 3))
    assert ends[0] == (0, 12) and ends[-1] == (11,)
    for rows in (ends, *(partitions(axes, parallel) for axes in (*AXES, ("tp", "pp"), AXES))):
        assert sorted(sum(rows, ())) == list(range(16))


def test_mesh_of_one_process_without_torch_distributed():
    backend = select_backend(RuntimeConfig(device="cpu"), ParallelConfig(), Launch())
    mesh = build_mesh(backend, ParallelConfig())
    x = torch.arange(6.0)
    assert [
        group.size
        for group in (mesh.tp, mesh.pp, mesh.dp, mesh.group("tp", "pp"), mesh.subgroup("pp", (0,), "ends"), mesh.world)
    ] == [1] * 6
    assert mesh.tp.all_reduce_(x) is None and mesh.dp.all_gather(x) is x and mesh.dp.reduce_scatter(x) is x
    work = mesh.dp.all_reduce_(x, async_op=True)
    assert work is not None and work.wait() is None
    assert not torch.distributed.is_initialized()


def test_dropout_streams_repeat_per_site_and_differ_between_sites():
    backend = select_backend(RuntimeConfig(device="cpu"), ParallelConfig(), Launch())

    def draw(tp_rank=0, split=False, site="mlp", layer=3, position=(7, 2)):
        streams = RngStreams(1234, backend, tp_rank)
        streams.set_microbatch(*position)
        streams.seeded(torch.ones(1), site, layer_number(layer), split)
        return torch.rand(4).tolist()

    assert draw() == draw() == draw(tp_rank=1)
    assert draw(tp_rank=1, split=True) != draw(tp_rank=0, split=True)
    draws = [draw(), draw(site="attention"), draw(layer=4), draw(position=(8, 2)), draw(position=(7, 3))]
    assert len({tuple(values) for values in draws}) == 5
