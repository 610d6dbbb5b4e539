"""Tests of flat buffers: layout, accumulation in fp32, order and overlap of gradient reductions."""

from itertools import pairwise

import pytest
import torch
from torch import nn

from megatron_lite.backend.group import LocalGroup
from megatron_lite.config.buckets import ALIGNMENT
from megatron_lite.parallel.buckets import lay_out
from megatron_lite.parallel.buffers import ParameterBuffers
from megatron_lite.parallel.parameters import NamedParameter
from megatron_lite.rectangle import Rectangle

LOCAL = LocalGroup("dp")


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    torch.set_num_threads(1)


def named(module, **flags):
    return [
        NamedParameter(name, param, tuple(param.shape), None, Rectangle.full(param.shape), **flags)
        for name, param in module.named_parameters()
    ]


def mlp(dtype=torch.float32, layers=3):
    torch.manual_seed(0)
    return nn.Sequential(*(nn.Linear(8, 8) for _ in range(layers))).to(dtype)


class RecordingGroup(LocalGroup):
    """Group of two replicas, the other with zero gradients; records the size of each all-reduce."""

    def __init__(self):
        super().__init__("dp")
        self.size = 2
        self.started = []

    def all_reduce_(self, x, op="sum", async_op=False):
        self.started.append(x.numel())
        return super().all_reduce_(x, op, async_op)


def test_parameters_keep_their_values_and_move_into_the_buffers():
    module, untouched = mlp(), mlp()
    buffers = ParameterBuffers(named(module), dp=LOCAL, tp=LOCAL)
    matrices, vectors = buffers.buffers
    assert matrices.decay and not vectors.decay
    for param, before in zip(module.parameters(), untouched.parameters(), strict=True):
        assert torch.equal(param, before)
        flat = (matrices if param.dim() == 2 else vectors).values
        assert flat.data_ptr() <= param.data_ptr() < flat.data_ptr() + flat.numel() * 4
        assert (param.data_ptr() - flat.data_ptr()) % (4 * ALIGNMENT) == 0
    matrices.values.zero_()
    assert not module[0].weight.any()


def test_the_first_gradient_of_an_iteration_overwrites_the_last_iterations():
    module, plain = mlp(), mlp()
    buffers = ParameterBuffers(named(module), dp=LOCAL, tp=LOCAL)
    for _ in range(2):
        buffers.begin(3)
        plain.zero_grad()
        for x in torch.randn(3, 4, 8):
            module(x).square().sum().backward()
            plain(x).square().sum().backward()
        buffers.reduce()
        for param, expected in zip(module.parameters(), plain.parameters(), strict=True):
            assert param.grad is None
            torch.testing.assert_close(buffers.gradient(param), expected.grad, rtol=0, atol=0)


@pytest.mark.parametrize("backwards", [0, 1])
def test_a_gradient_that_does_not_arrive_is_zero(backwards):
    module = mlp()
    buffers = ParameterBuffers(named(module), dp=RecordingGroup(), tp=LOCAL)
    for buffer in buffers.buffers:
        buffer.gradients.fill_(7.0)
    buffers.begin(backwards)
    for _ in range(backwards):
        module[0](torch.randn(4, 8)).sum().backward()
    buffers.reduce()
    assert not any(buffers.gradient(param).any() for layer in module[backwards:] for param in layer.parameters())
    assert all(buffers.gradient(param).any() for layer in module[:backwards] for param in layer.parameters())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_products_accumulate_and_arrive_once(dtype):
    module = nn.Linear(8, 8, bias=False, dtype=dtype)
    group = RecordingGroup()
    buffers = ParameterBuffers(named(module), dp=group, tp=LOCAL)
    gradient, x = torch.randn(6, 8).to(dtype), torch.randn(6, 8).to(dtype)
    expected = gradient.float().t() @ x.float()
    for _ in range(2):
        group.started.clear()
        buffers.begin(1)
        buffers.accumulate_product(module.weight, gradient[:4], x[:4], last=False)
        assert len(group.started) == 0
        buffers.accumulate_product(module.weight, gradient[4:], x[4:])
        assert len(group.started) == 1
        buffers.reduce()
        torch.testing.assert_close(buffers.gradient(module.weight), expected, rtol=0.02, atol=0.02)


def test_bf16_gradients_are_accumulated_in_fp32():
    module = mlp(torch.bfloat16, layers=1)
    buffers = ParameterBuffers(named(module), dp=LOCAL, tp=LOCAL)
    # In bf16, 256 + 1 = 256: accumulated in bf16, the small gradients would be lost.
    for size in (256.0, 1.0, 1.0, 1.0):
        module(torch.full((1, 8), size, dtype=torch.bfloat16)).sum().backward()
    buffers.reduce()
    assert module[0].weight.grad is None
    assert buffers.gradient(module[0].weight).dtype == torch.float32
    assert (buffers.gradient(module[0].weight) == 259).all()


def test_a_weight_used_twice_counts_as_one_gradient():
    torch.manual_seed(0)
    weight = nn.Parameter(torch.randn(8, 8))
    group = RecordingGroup()
    holder = nn.ParameterDict({"weight": weight})
    buffers = ParameterBuffers(named(holder), dp=group, tp=LOCAL)
    buffers.begin(2)
    for number in range(2):
        assert len(group.started) == 0
        (torch.randn(4, 8) @ weight @ weight.t()).sum().backward()
        assert len(group.started) == number
    buffers.reduce()
    assert len(group.started) == 1


def test_buckets_are_reduced_during_the_last_backward_in_one_fixed_order():
    module = mlp(layers=4)
    expected = []
    for backwards in (0, 1, 3):
        group = RecordingGroup()
        buffers = ParameterBuffers(named(module), dp=group, tp=LOCAL, bucket_megabytes=0)
        seen = []
        module[0].register_full_backward_pre_hook(lambda *_, group=group, seen=seen: seen.append(len(group.started)))
        buffers.begin(backwards)
        for x in torch.randn(backwards, 4, 8):
            module(x.requires_grad_()).sum().backward()
        buffers.reduce()
        # When backward reaches the first layer: in the last backward, the reductions of the three layers after it.
        assert seen == {0: [], 1: [6], 3: [0, 0, 6]}[backwards]
        expected = expected or group.started
        assert group.started == expected and len(expected) == 8
        module = mlp(layers=4)


def test_without_begin_all_reductions_wait_for_reduce():
    module, group = mlp(), RecordingGroup()
    buffers = ParameterBuffers(named(module), dp=group, tp=LOCAL)
    module(torch.randn(4, 8)).sum().backward()
    assert group.started == []
    buffers.reduce()
    assert len(group.started) == 2
    buffers.begin(1)
    module(torch.randn(4, 8)).sum().backward()
    with pytest.raises(AssertionError, match="never finished"):
        buffers.begin(1)


def test_more_backward_passes_than_announced_are_an_error():
    module = mlp()
    buffers = ParameterBuffers(named(module), dp=RecordingGroup(), tp=LOCAL)
    buffers.begin(1)
    module(torch.randn(4, 8)).sum().backward()
    with pytest.raises(AssertionError, match="more backward passes"):
        module(torch.randn(4, 8)).sum().backward()


def test_buckets_split_evenly_and_a_shared_module_has_its_own():
    parameters = named(nn.ParameterDict({f"p{i}": nn.Parameter(torch.empty(i + 1, 50)) for i in range(9)}))
    buckets = lay_out(parameters, bucket_elements=600, parts=4, apart={"p4": "m", "p5": "m"})
    slots = [slot for bucket in buckets for slot in bucket.slots]
    assert [slot.parameter.name for slot in slots] == [f"p{i}" for i in reversed(range(9))]
    names = [[slot.parameter.name for slot in bucket.slots] for bucket in buckets]
    assert ["p5", "p4"] in names and names[0] == ["p8", "p7"]
    assert buckets[0].start == 0
    for bucket, following in pairwise(buckets):
        assert bucket.stop == following.start
    for bucket in buckets:
        assert (bucket.stop - bucket.start) % (4 * ALIGNMENT) == 0
        parts = [bucket.slice_of(coordinate, 4) for coordinate in range(4)]
        assert [part.start for part in parts] + [bucket.stop] == [bucket.start] + [part.stop for part in parts]
        assert bucket.slots[-1].stop <= bucket.stop
    for slot, following in pairwise(slots):
        assert slot.stop <= following.start
