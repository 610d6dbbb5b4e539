import json
import math
from typing import get_args

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from megatron_lite.backend.base import Capabilities
from megatron_lite.backend.cpu import CpuBackend
from megatron_lite.config.optimizer import OptimizerKind
from megatron_lite.optim.optimizer import Optimizer, clip_coefficient
from megatron_lite.parallel.buffers import ParameterBuffers
from megatron_lite.parallel.parameters import NamedParameter
from megatron_lite.rectangle import Rectangle

KINDS = get_args(OptimizerKind)


def model(dtype=torch.float32):
    torch.manual_seed(0)
    return nn.Sequential(nn.Embedding(11, 8), nn.Linear(8, 24), nn.GELU(), nn.Linear(24, 8), nn.LayerNorm(8)).to(dtype)


def backward(module, step, scale=1.0, parts=1):
    """Set gradients of iteration `step`, equal for modules with equal values."""
    draw = torch.Generator().manual_seed(step)
    for _ in range(parts):
        tokens = torch.randint(0, 11, (4, 5), generator=draw)
        target = torch.randn(4, 5, 8, generator=draw)
        (scale * (module(tokens).float() - 3 * target).square().mean()).backward()


def take_step(optimizer, lr, weight_decay):
    return optimizer.settle(optimizer.step(lr, weight_decay).tolist())


def train(module, buffers, optimizer, steps, parts=1):
    results = []
    for step in steps:
        buffers.begin(parts)
        backward(module, step, optimizer.loss_scale, parts)
        buffers.reduce()
        results.append(take_step(optimizer, lr=0.01 / (1 + step), weight_decay=0.1 * (1 + step)))
    return results


def reference(module, steps, rule=torch.optim.AdamW, clip=1.0, **constants):
    """Train with plain torch: one tensor per parameter, gradients set to None, torch's clipping."""
    groups = [{"params": [p for p in module.parameters() if (p.dim() > 1) is decay]} for decay in (True, False)]
    optimizer = rule(groups, lr=0.0, **constants)
    norms = []
    for step in steps:
        optimizer.zero_grad(set_to_none=True)
        backward(module, step)
        norms.append(nn.utils.clip_grad_norm_(module.parameters(), clip or math.inf).item())
        for group, decay in zip(optimizer.param_groups, (0.1 * (1 + step), 0.0), strict=True):
            group.update(lr=0.01 / (1 + step), weight_decay=decay)
        optimizer.step()
    return norms


def assert_same(module, other, **tolerance):
    for (name, a), b in zip(module.named_parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(a, b, msg=lambda m, name=name: f"{name}: {m}", **tolerance)


@pytest.fixture(params=[True, False], ids=["fused", "unfused"])
def fused_or_not(request, monkeypatch):
    """Run a test with and without torch's fused optimizers, which a Mac's GPU cannot use."""
    monkeypatch.setattr(CpuBackend, "capabilities", lambda backend: Capabilities(fused_adam=request.param))


@pytest.mark.usefixtures("fused_or_not")
@pytest.mark.parametrize("clip", [0.0, 0.5, 1e6])
def test_adam_and_clipping_equal_torchs_parameter_by_parameter(kit, clip):
    ours, plain = model(), model()
    buffers, optimizer = kit.build(ours, clip_grad=clip, adam_beta2=0.95, adam_eps=1e-7)
    results = train(ours, buffers, optimizer, range(6))
    norms = reference(plain, range(6), clip=clip, betas=(0.9, 0.95), eps=1e-7)
    assert [result.grad_norm for result in results] == pytest.approx(norms, rel=1e-5)
    assert clip != 0.5 or min(norms) > clip
    assert all(result.applied and result.finite for result in results)
    assert_same(ours, plain, rtol=2e-6, atol=2e-7)


@pytest.mark.usefixtures("fused_or_not")
@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_sgd_equals_torchs(kit, momentum):
    ours, plain = model(), model()
    buffers, optimizer = kit.build(ours, kind="sgd", sgd_momentum=momentum)
    train(ours, buffers, optimizer, range(6))
    reference(plain, range(6), rule=torch.optim.SGD, momentum=momentum)
    assert_same(ours, plain, rtol=2e-6, atol=2e-7)
    assert len(optimizer.state_tensors()) == (7 if momentum else 0)


def test_clipping_scales_gradients_as_torch_does(kit):
    ours, plain = model(), model()
    buffers, optimizer = kit.build(ours, clip_grad=0.1)
    backward(ours, 0)
    backward(plain, 0)
    norm = nn.utils.clip_grad_norm_(plain.parameters(), 0.1).item()
    assert take_step(optimizer, 0.0, 0.0).grad_norm == pytest.approx(norm, rel=1e-6)
    for a, b in zip(ours.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(buffers.gradient(a), b.grad, rtol=1e-5, atol=1e-8)
    norms = torch.tensor([2.0, 0.5, math.nan], dtype=torch.float64)
    assert clip_coefficient(norms, 1.0).tolist() == [1 / (2 + 1e-6), 1.0, 1.0]
    assert clip_coefficient(norms, 0.0).tolist() == [1.0] * 3


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_steps_fp32_main_parameters(kit, dtype):
    ours = model(dtype)
    start = [param.detach().float().clone() for param in ours.parameters()]
    name = {torch.bfloat16: "bf16", torch.float16: "fp16"}[dtype]
    buffers, optimizer = kit.build(ours, dtype=name, initial_loss_scale=2.0**8)
    # One step is far below bf16's resolution of the norm's weights (1.0); the main parameters add them up.
    for step in range(40):
        buffers.begin(1)
        backward(ours, step, optimizer.loss_scale)
        buffers.reduce()
        assert take_step(optimizer, lr=1e-4, weight_decay=0.0).applied
    mains = {t.name: t for t in optimizer.state_tensors() if t.name.startswith("optimizer.main_param.")}
    assert len(mains) == 7
    for (name, param), before in zip(ours.named_parameters(), start, strict=True):
        main = mains[f"optimizer.main_param.{name}"].pieces[0].tensor
        assert main.dtype == torch.float32 and torch.equal(main.to(dtype), param)
        assert not torch.equal(main, main.to(dtype).float())
        assert 1e-4 < (main - before).abs().max() < 5e-3


def test_fp16_scales_the_loss_and_reports_the_unscaled_norm(kit):
    ours, plain = model(), model()
    buffers, optimizer = kit.build(ours.half(), dtype="fp16", initial_loss_scale=2.0**10, clip_grad=0.5)
    result = train(ours, buffers, optimizer, range(1))[0]
    assert result.grad_norm == pytest.approx(reference(plain, range(1), clip=0.5)[0], rel=2e-2)
    total = sum(buffers.gradient(param).square().sum().item() for param in ours.parameters())
    assert math.sqrt(total) == pytest.approx(0.5, rel=1e-4)


@pytest.mark.usefixtures("fused_or_not")
@pytest.mark.parametrize("poison", [math.inf, -math.inf, math.nan])
@pytest.mark.parametrize("steps", [0, 2])
@pytest.mark.parametrize("kind", KINDS)
def test_fp16_skips_an_overflow_and_lowers_the_scale(kit, kind, steps, poison):
    ours = model(torch.float16)
    parts = {"adafactor_beta1": 0.9} if kind == "adafactor" else {}
    buffers, optimizer = kit.build(
        ours, kind=kind, dtype="fp16", initial_loss_scale=2.0**10, hysteresis=1, ema_decay=0.5, **parts
    )
    train(ours, buffers, optimizer, range(steps))
    if not steps:
        backward(ours, 0, optimizer.loss_scale)
    before = [param.clone() for param in ours.parameters()]
    state = [piece.tensor.clone() for t in optimizer.state_tensors() for piece in t.pieces]
    buffers.gradient(ours[4].bias)[3] = poison
    result = take_step(optimizer, lr=0.1, weight_decay=0.1)
    assert not result.applied and not result.finite and not math.isfinite(result.grad_norm)
    assert optimizer.loss_scale == 2.0**9 and optimizer.state_scalars()["step"] == steps
    assert all(torch.equal(a, b) for a, b in zip(ours.parameters(), before, strict=True))
    held = [piece.tensor for t in optimizer.state_tensors() for piece in t.pieces]
    assert all(torch.equal(a, b) for a, b in zip(held, state, strict=True))
    assert train(ours, buffers, optimizer, range(2, 3))[0].applied


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("check", [True, False])
def test_a_non_finite_gradient_is_reported_and_not_applied(kit, dtype, check):
    ours = model(torch.float32 if dtype == "fp32" else torch.bfloat16)
    before = [param.clone() for param in ours.parameters()]
    buffers, optimizer = kit.build(ours, dtype=dtype, check_for_nan=check)
    backward(ours, 0)
    buffers.gradient(ours[1].weight)[0, 0] = math.nan
    result = take_step(optimizer, lr=0.1, weight_decay=0.0)
    assert not result.finite and result.applied is not check
    assert all(torch.equal(a, b) for a, b in zip(ours.parameters(), before, strict=True)) is check


@pytest.mark.parametrize(
    "parts",
    [
        {},
        {"kind": "sgd"},
        {"dtype": "bf16"},
        {"dtype": "fp16", "initial_loss_scale": 2.0**12, "loss_scale_window": 2},
        {"kind": "lion"},
        {"kind": "adafactor", "dtype": "bf16"},
        {"kind": "adafactor", "adafactor_beta1": 0.9},
        {"kind": "muon", "ema_decay": 0.9},
        {"kind": "adamw8bit", "dtype": "bf16", "ema_decay": 0.9},
    ],
)
def test_resume_is_exact(kit, parts):
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(parts.get("dtype"), torch.float32)
    straight = model(dtype)
    buffers, optimizer = kit.build(straight, **parts)
    train(straight, buffers, optimizer, range(3))
    saved = {t.name: [piece.tensor.clone() for piece in t.pieces] for t in optimizer.state_tensors()}
    params = [param.detach().clone() for param in straight.parameters()]
    scalars = json.loads(json.dumps(optimizer.state_scalars()))
    expected = train(straight, buffers, optimizer, range(3, 7))

    resumed = model(dtype)
    buffers, optimizer = kit.build(resumed, **parts)
    train(resumed, buffers, optimizer, range(9, 10))
    with torch.no_grad():
        for param, value in zip(resumed.parameters(), params, strict=True):
            param.copy_(value)
        for tensor in optimizer.state_tensors():
            for piece, value in zip(tensor.pieces, saved.pop(tensor.name), strict=True):
                piece.tensor.copy_(value)
    optimizer.load_scalars(scalars)
    assert not saved
    assert train(resumed, buffers, optimizer, range(3, 7)) == expected
    assert_same(resumed, straight, rtol=0, atol=0)


def test_the_state_of_another_kind_of_scaler_is_ignored(kit):
    _, optimizer = kit.build(model(torch.float16), dtype="fp16")
    optimizer.load_scalars({"step": 7, "loss_scaler": {"kind": "constant"}})
    assert optimizer.loss_scale == 2.0**32 and optimizer.state_scalars()["step"] == 7


def padded(kit, **parts):
    """Build the table of a rank with local rows 12..15 of a vocabulary of 13 padded to 16: one row is no padding."""
    weight = nn.Parameter(torch.cat([torch.full((1, 6), 0.5), torch.zeros(3, 6)]))
    parameter = NamedParameter("embedding.word_embeddings.weight", weight, (13, 6), 0, Rectangle((12, 0), (1, 6)))
    mesh = kit.mesh()
    buffers = ParameterBuffers([parameter], dp=mesh.dp, tp=mesh.tp)
    return weight, buffers, Optimizer(kit.config(**parts), buffers, mesh)


def test_padded_rows_stay_zero_and_are_not_saved(kit):
    weight, buffers, optimizer = padded(kit, log_num_zeros=True, log_params_norm=True)
    buffers.gradient(weight)[0, :4] = 1.0
    result = take_step(optimizer, lr=0.1, weight_decay=0.1)
    assert result.num_zeros == 2
    assert not weight[1:].any() and weight[0].all()
    assert result.params_norm == pytest.approx(weight.norm().item())
    for tensor in optimizer.state_tensors():
        assert tensor.global_shape == (13, 6) and tensor.write
        assert [(piece.offset, tuple(piece.tensor.shape)) for piece in tensor.pieces] == [((12, 0), (1, 6))]


def test_statistics_are_reported_only_on_request(kit):
    ours = model()
    buffers, optimizer = kit.build(ours)
    result = train(ours, buffers, optimizer, range(1))[0]
    assert result.num_zeros is None and result.params_norm is None
    buffers, optimizer = kit.build(ours, log_num_zeros=True)
    buffers.gradient(ours[0].weight)[3] = 1.0
    assert take_step(optimizer, 0.0, 0.0).num_zeros == sum(p.numel() for p in ours.parameters()) - 8


class Passes(TorchDispatchMode):
    """Records the operations that read or write a tensor of at least `elements` elements."""

    def __init__(self, elements):
        super().__init__()
        self.elements, self.names = elements, []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        tensors = [leaf for leaf in tree_leaves((args, kwargs, out)) if isinstance(leaf, torch.Tensor)]
        if any(tensor.numel() >= self.elements for tensor in tensors) and not func.is_view:
            self.names.append(func.__name__.partition(".")[0])
        return out


@pytest.mark.parametrize("name", ["bf16", "fp16", "fp32"])
@pytest.mark.parametrize("kind", ["adam", "sgd"])
def test_an_iteration_passes_over_the_buffers_for_norm_update_and_copy_only(kit, name, kind):
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}[name]
    module = nn.Sequential(*(nn.Linear(64, 64) for _ in range(4))).to(dtype)
    parts = {"kind": kind, "dtype": name, "clip_grad": 0.01, "initial_loss_scale": 16.0}
    buffers, optimizer = kit.build(module, **parts)
    with Passes(3 * 64 * 64) as passes:
        for _ in range(2):
            passes.names.clear()
            buffers.begin(2)
            for _ in range(2):
                module(torch.randn(8, 64, dtype=dtype)).float().square().sum().backward()
            buffers.reduce()
            values = optimizer.step(0.01, 0.1)
            assert optimizer.settle(values.tolist()).applied
    update = {"adam": "_fused_adamw_", "sgd": "_fused_sgd_"}[kind]
    assert passes.names == ["linalg_vector_norm", update, *(["copy_"] if name != "fp32" else [])]
