"""Tests of Adafactor, Lion, Muon, 8-bit AdamW and moving averages against other implementations, on one process."""

from dataclasses import replace
from typing import get_args

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

from megatron_lite.config.optimizer import OptimizerKind
from megatron_lite.optim.adamw8bit import BLOCK, Quantized, dynamic_codes
from megatron_lite.optim.muon import orthogonalize
from megatron_lite.optim.optimizer import Optimizer
from megatron_lite.parallel.buffers import ParameterBuffers
from megatron_lite.parallel.parameters import NamedParameter
from megatron_lite.rectangle import Rectangle

LR = 0.02


def model():
    torch.manual_seed(0)
    layers = nn.Embedding(11, 8), nn.Linear(8, 24), nn.Tanh(), nn.Linear(24, 8), nn.LayerNorm(8)
    return nn.Sequential(*layers)


def gradients(module, step):
    """Set the gradients of step `step`, equal for modules with equal values."""
    draw = torch.Generator().manual_seed(step)
    tokens = torch.randint(0, 11, (4, 5), generator=draw)
    target = torch.randn(4, 5, 8, generator=draw)
    (module(tokens) - 3 * target).square().mean().backward()


def train(buffers, optimizer, module, steps, lr=lambda step: LR, weight_decay=0.1):
    for step in range(steps):
        buffers.begin(1)
        gradients(module, step)
        buffers.reduce()
        assert optimizer.settle(optimizer.step(lr(step), weight_decay).tolist()).applied


def groups(module, weight_decay=0.1):
    """Weight decay applies to matrices only."""
    return [
        {"params": [p for p in module.parameters() if (p.dim() > 1) is decay], "weight_decay": weight_decay * decay}
        for decay in (True, False)
    ]


def reference(optimizer, module, steps):
    for step in range(steps):
        optimizer.zero_grad(set_to_none=True)
        gradients(module, step)
        optimizer.step()


def assert_close(ours, plain, bound):
    """Compare parameters relative to the largest element of each."""
    for (name, a), b in zip(ours.named_parameters(), plain.parameters(), strict=True):
        assert (a - b).abs().max() <= bound * b.abs().max(), name


@pytest.mark.slow
@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        ({}, {}),
        ({"adafactor_scale_parameter": False}, {"scale_parameter": False}),
        ({"adafactor_beta1": 0.9, "adafactor_clip_threshold": 0.5}, {"beta1": 0.9, "clip_threshold": 0.5}),
        ({"adafactor_decay_rate": 0.5, "adafactor_eps1": 1e-5}, {"decay_rate": -0.5, "eps": (1e-5, 1e-3)}),
        ({"adafactor_eps2": 2.0}, {"eps": (1e-30, 2.0)}),
    ],
    ids=str,
)
def test_adafactor_equals_transformers(kit, ours, theirs):
    from transformers.optimization import Adafactor

    mine, plain = model(), model()
    train(*kit.build(mine, kind="adafactor", clip_grad=0.0, **ours), mine, 50)
    reference(Adafactor(groups(plain), lr=LR, relative_step=False, **theirs), plain, 50)
    assert_close(mine, plain, 2e-4)


@pytest.mark.slow
@pytest.mark.parametrize("warmup", [False, True])
def test_relative_steps_equal_transformers(kit, warmup):
    from transformers.optimization import Adafactor

    from megatron_lite.schedules.learning_rate import learning_rate
    from megatron_lite.schedules.progress import Progress

    config = kit.config(kind="adafactor", adafactor_relative_step=True, adafactor_warmup_init=warmup)
    mine, plain = model(), model()
    rate = lambda step: learning_rate(config, Progress(applied_iterations=step))  # noqa: E731
    train(*kit.build(mine, kind="adafactor", clip_grad=0.0), mine, 50, rate, 0.0)
    reference(Adafactor(plain.parameters(), relative_step=True, warmup_init=warmup), plain, 50)
    assert_close(mine, plain, 2e-4)
    assert rate(9_999_999) == pytest.approx(10_000_000**-0.5)


def of_matrix(kit, shape, **parts):
    """Return buffers and optimizer of one parameter, [shape[-2] * shape[0], shape[-1]], with a global shape."""
    torch.manual_seed(1)
    param = nn.Parameter(torch.randn(shape).view(-1, shape[-1]))
    named = NamedParameter("decoder.layers.0.mlp.fc1.weight", param, shape, 1, Rectangle.full(shape))
    mesh = kit.mesh()
    buffers = ParameterBuffers([named], dp=mesh.dp, tp=mesh.tp)
    return param, buffers, Optimizer(kit.config(clip_grad=0.0, **parts), buffers, mesh)


@pytest.mark.slow
def test_adafactor_factors_gate_and_up_projection_apart(kit):
    from transformers.optimization import Adafactor

    shape = (2, 6, 4)
    param, buffers, optimizer = of_matrix(kit, shape, kind="adafactor")
    plain = nn.Parameter(param.detach().clone().view(shape))
    rule = Adafactor([plain], lr=LR, relative_step=False)
    for _ in range(5):
        plain.grad = torch.randn(shape)
        buffers.begin(0)
        buffers.gradient(param).copy_(plain.grad.view(param.shape))
        optimizer.step(LR, 0.0)
        rule.step()
    assert (param.view(shape) - plain).abs().max() <= 1e-5 * plain.abs().max()
    vectors = {tensor.name: tensor.global_shape for tensor in optimizer.state_tensors()}
    name = "decoder.layers.0.mlp.fc1.weight"
    assert vectors == {f"optimizer.exp_avg_sq_row.{name}": (2, 6), f"optimizer.exp_avg_sq_col.{name}": (2, 4)}


def test_lion_matches_a_reference_implementation(kit):
    mine, plain = model(), model()
    train(*kit.build(mine, kind="lion", clip_grad=0.0, lion_beta1=0.8, lion_beta2=0.95), mine, 20, lambda step: 1e-3)
    momentum = [torch.zeros_like(p) for p in plain.parameters()]
    for step in range(20):
        plain.zero_grad(set_to_none=True)
        gradients(plain, step)
        with torch.no_grad():
            for p, m in zip(plain.parameters(), momentum, strict=True):
                update = torch.lerp(m, p.grad, 0.2).sign()
                p -= 1e-3 * (update + (0.1 if p.dim() > 1 else 0.0) * p)
                m.lerp_(p.grad, 0.05)
    assert_close(mine, plain, 1e-5)


@pytest.mark.parametrize(
    ("mode", "factor", "adjust", "nesterov"),
    [("shape_scaling", 1.0, "original", True), ("spectral", 0.2, "match_rms_adamw", False)],
)
def test_muon_equals_torchs(kit, mode, factor, adjust, nesterov):
    mine, plain = model(), model()
    parts = {"muon_scale_mode": mode, "muon_extra_scale_factor": factor, "muon_nesterov": nesterov}
    buffers, optimizer = kit.build(mine, kind="muon", clip_grad=0.0, **parts)
    matrices = [p for p in plain.parameters() if p.dim() > 1]
    rules = [
        torch.optim.Muon(matrices, lr=LR, weight_decay=0.1, nesterov=nesterov, adjust_lr_fn=adjust),
        torch.optim.AdamW([p for p in plain.parameters() if p.dim() == 1], lr=LR, weight_decay=0.0),
    ]
    # The same gradients for both: iterations in bf16 would turn the last bit of a gradient into a third digit.
    torch.manual_seed(4)
    for _ in range(5):
        buffers.begin(0)
        for ours, param in zip(mine.parameters(), plain.parameters(), strict=True):
            param.grad = torch.randn(param.shape)
            buffers.gradient(ours).copy_(param.grad)
        optimizer.step(LR, 0.1)
        for rule in rules:
            rule.step()
    assert_close(mine, plain, 1e-4)


def test_muon_leaves_parameters_outside_of_layers_to_adamw(kit):
    mine, plain = model(), model()
    mesh = kit.mesh()
    parameters = kit.named(mine, "decoder.layers.")
    parameters[0] = replace(parameters[0], name="embedding.weight")
    buffers = ParameterBuffers(parameters, dp=mesh.dp, tp=mesh.tp)
    optimizer = Optimizer(kit.config(kind="muon", clip_grad=0.0), buffers, mesh)
    buffers.begin(1)
    gradients(mine, 0)
    optimizer.step(LR, 0.1)
    gradients(plain, 0)
    torch.optim.AdamW(groups(plain), lr=LR).step()
    torch.testing.assert_close(mine[0].weight, plain[0].weight)
    assert not torch.allclose(mine[1].weight, plain[1].weight)
    names = {tensor.name.split(".")[1] for tensor in optimizer.state_tensors() if "embedding" in tensor.name}
    assert names == {"exp_avg", "exp_avg_sq"}


@pytest.mark.parametrize("shape", [(6, 4), (4, 6), (5, 5)])
def test_newton_schulz_makes_singular_values_near_one(shape):
    torch.manual_seed(0)
    matrix = torch.randn(shape)
    values = torch.linalg.svdvals(orthogonalize(matrix, 8).float())
    assert values.min() > 0.6 and values.max() < 1.3
    left, _, right = torch.linalg.svd(matrix, full_matrices=False)
    assert (orthogonalize(matrix, 8).float() - left @ right).abs().max() < 0.4


def test_muon_orthogonalizes_queries_keys_and_values_apart(kit):
    torch.manual_seed(2)
    heads, groups_, width, hidden = 4, 2, 3, 8
    param = nn.Parameter(torch.randn((heads + 2 * groups_) * width, hidden))
    named = NamedParameter(
        "decoder.layers.0.self_attention.qkv.weight", param, tuple(param.shape), 0, Rectangle.full(param.shape)
    )
    mesh = kit.mesh()
    updates = {}
    for split in (True, False):
        param.data.zero_()
        config = kit.config(kind="muon", clip_grad=0.0, muon_split_qkv=split)
        sizes = {"num_attention_heads": heads, "num_query_groups": groups_, "head_dim": width}
        buffers = ParameterBuffers([named], dp=mesh.dp, tp=mesh.tp)
        optimizer = Optimizer(replace(config, model=replace(config.model, **sizes)), buffers, mesh)
        buffers.begin(0)
        torch.manual_seed(3)
        gradient = torch.randn(param.shape)
        buffers.gradient(param).copy_(gradient)
        optimizer.step(1.0, 0.0)
        updates[split] = -param.detach().clone()

    def scaled(matrix):
        return orthogonalize(matrix, 5).float() * 0.2 * max(matrix.shape) ** 0.5

    # Nesterov's first update is a multiple of the gradient.
    torch.testing.assert_close(updates[False], scaled(gradient), rtol=0, atol=0.05)
    view, found = (tensor.view(groups_, heads // groups_ + 2, width, hidden) for tensor in (gradient, updates[True]))
    for part in (slice(0, 2), slice(2, 3), slice(3, 4)):
        ours, whole = (tensor[:, part].reshape(-1, hidden) for tensor in (found, view))
        torch.testing.assert_close(ours, scaled(whole), rtol=0, atol=0.05)
    assert (updates[True] - updates[False]).abs().max() > 0.1


def test_8_bit_moments_follow_adamw(kit):
    mine, plain = model(), model()
    buffers, optimizer = kit.build(mine, kind="adamw8bit", clip_grad=0.0)
    start = [param.detach().clone() for param in plain.parameters()]
    train(buffers, optimizer, mine, 30)
    reference(torch.optim.AdamW(groups(plain), lr=LR), plain, 30)
    for a, b, first in zip(mine.parameters(), plain.parameters(), start, strict=True):
        # Vectors have fp32 moments, but follow the matrices.
        assert (a - b).norm() < 0.05 * (b - first).norm()
    assert any((a != b).any() for a, b in zip(mine.parameters(), plain.parameters(), strict=True))


def test_8_bit_moments_take_two_bytes_a_parameter(kit):
    _, optimizer = kit.build(nn.Linear(256, 256, bias=False), kind="adamw8bit")
    assert optimizer.state_bytes()["moments"] == 256 * 256 * 2 * (1 + 4 / BLOCK)


@pytest.mark.parametrize("signed", [True, False])
def test_codes_are_those_of_dynamic_quantization(signed):
    codes = dynamic_codes(signed=signed)
    assert codes == sorted(set(codes)) and 0.0 in codes and codes[-1] == 1.0
    assert codes[0] == (-1.0 if signed else 0.0)
    assert min(code for code in codes if code > 0) == pytest.approx(5.5e-7 if signed else 3.25e-7)


@settings(deadline=None, max_examples=30)
@given(
    # Products are never subnormal: whether those are rounded to zero depends on what ran before in the process.
    st.lists(
        st.floats(-1e4, 1e4, width=32).map(lambda x: x if abs(x) > 1e-20 else 0.0), min_size=1, max_size=3 * BLOCK
    ),
    st.floats(-30, 3).map(lambda exponent: 2.0**exponent),
    st.booleans(),
)
def test_quantizing_again_changes_nothing(numbers, scale, signed):
    elements = torch.tensor(numbers, dtype=torch.float32) * scale
    elements = elements if signed else elements.abs()
    always = torch.tensor(True)
    once = Quantized(len(numbers), signed=signed, device=torch.device("cpu"))
    once.write(0, elements, always)
    read = once.read(0, len(numbers))
    padded = F.pad(elements, (0, -len(numbers) % BLOCK)).view(-1, BLOCK)
    error = F.pad(read - elements, (0, -len(numbers) % BLOCK)).view(-1, BLOCK)
    assert (error.abs().amax(1) <= 0.01 * padded.abs().amax(1)).all()
    again = Quantized(len(numbers), signed=signed, device=torch.device("cpu"))
    again.write(0, read, always)
    assert torch.equal(again.codes, once.codes) and torch.equal(again.scales, once.scales)
    once.write(0, elements + 1.0, torch.tensor(False))
    assert torch.equal(again.codes, once.codes)


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_the_moving_average_follows_the_main_parameters(kit, dtype):
    mine = model().to({"fp32": torch.float32, "bf16": torch.bfloat16}[dtype])
    buffers, optimizer = kit.build(mine, kind="sgd", dtype=dtype, ema_decay=0.75)

    def state(prefix):
        return {
            t.name.removeprefix(prefix): t.pieces[0].tensor.clone()
            for t in optimizer.state_tensors()
            if t.name.startswith(prefix)
        }

    def weights():
        return {name: param.detach().clone() for name, param in mine.named_parameters()}

    expected = {name: value.float() for name, value in weights().items()}
    for _ in range(4):
        buffers.begin(1)
        for param in mine.parameters():
            buffers.gradient(param).copy_(torch.randn(param.shape))
        optimizer.settle(optimizer.step(LR, 0.1).tolist())
        main = state("optimizer.main_param.") or weights()
        expected = {name: 0.75 * value + 0.25 * main[name] for name, value in expected.items()}
    average = state("ema.")
    assert average.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(average[name], value, rtol=1e-5, atol=1e-6)
    before = weights()
    with optimizer.averaged_weights():
        for name, value in weights().items():
            assert torch.equal(value, average[name].to(value.dtype))
    for name, value in weights().items():
        assert torch.equal(value, before[name])
    assert all(torch.equal(value, average[name]) for name, value in state("ema.").items())


@pytest.mark.parametrize("kind", get_args(OptimizerKind))
def test_the_learning_rate_of_a_parameter_is_multiplied_by_its_factor(kit, kind):
    torch.manual_seed(5)
    start, gradient = torch.randn(6, 4), torch.randn(6, 4)
    params = [nn.Parameter(start.clone()) for _ in range(2)]
    named = [
        NamedParameter(f"decoder.layers.{number}.weight", param, (6, 4), None, Rectangle.full((6, 4)), lr_factor=factor)
        for number, (param, factor) in enumerate(zip(params, (1.0, 0.25), strict=True))
    ]
    mesh = kit.mesh()
    buffers = ParameterBuffers(named, dp=mesh.dp, tp=mesh.tp)
    optimizer = Optimizer(kit.config(kind=kind, clip_grad=0.0), buffers, mesh)
    for _ in range(2):
        buffers.begin(0)
        with torch.no_grad():
            for param in params:
                param.copy_(start)
                buffers.gradient(param).copy_(gradient)
        optimizer.step(LR, 0.1)
    steps = [param.detach() - start for param in params]
    assert (steps[1] - 0.25 * steps[0]).abs().max() <= 1e-5 * start.abs().max()
