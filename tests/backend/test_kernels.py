"""Tests of the choice of vendor kernels, and of training with stand-ins for them, compared with PyTorch's kernels."""

from __future__ import annotations

import dataclasses
import sys

import pytest
import torch
from support.layout_matrix import SP, Cell, iterate, mesh_of
from support.ranks import RankError
from support.vendor_modules import MODULES, install

from megatron_lite.backend import kernels as kernels_module
from megatron_lite.backend.cpu import CpuBackend
from megatron_lite.backend.environment import Launch
from megatron_lite.backend.kernels import CANDIDATES, TRIALS, Kernels, choose_kernels
from megatron_lite.backend.vendors import LossKernel, torch_norm
from megatron_lite.config import kernels as conditions
from megatron_lite.config.parallel import ParallelConfig
from megatron_lite.config.runtime import RuntimeConfig
from megatron_lite.errors import ConfigError
from megatron_lite.schedules.progress import Progress
from megatron_lite.train.assemble import build_engine
from megatron_lite.train.comparison import agree_on_kernels

CPU = torch.device("cpu")
ALL = tuple(name for name in MODULES if "." not in name)


def configure(cell=None, *, model=None, documents=False, **runtime):
    config = (cell or Cell(dtype="bf16")).config()
    return dataclasses.replace(
        config,
        runtime=dataclasses.replace(config.runtime, **runtime),
        model=dataclasses.replace(config.model, **(model or {})),
        data=dataclasses.replace(config.data, reset_attention_mask=documents),
    )


def test_nothing_is_reported_without_a_gpu_unless_a_flag_asks_for_a_kernel(monkeypatch):
    install(monkeypatch, *ALL)
    assert choose_kernels(configure(), CPU, gpu=False) == Kernels()
    config = configure(transformer_impl="transformer_engine", loss_kernel="liger")
    report = choose_kernels(config, CPU, gpu=False).report
    assert report == (
        "norm: PyTorch (--transformer-impl transformer_engine needs --device cuda)",
        "attention: PyTorch (--transformer-impl transformer_engine needs --device cuda)",
        "loss: native (--cross-entropy-fusion-impl liger needs --device cuda)",
    )
    for backend in ("flash", "fused", "unfused"):
        config = configure(transformer_impl="transformer_engine", attention=backend)
        lines = choose_kernels(config, CPU, gpu=False).report
        assert f"attention: PyTorch (--attention-backend {backend} needs --device cuda)" in lines


def test_without_any_package_pytorch_computes_everything(monkeypatch):
    install(monkeypatch)
    chosen = choose_kernels(configure(model={"position_embedding": "alibi"}), CPU, gpu=True)
    assert chosen.norm is torch_norm and chosen.attention is None and chosen.loss is None
    assert chosen.report[:3] == (
        "norm: PyTorch (one fused kernel already)",
        "attention: PyTorch (flash-attn: not installed; te: not installed)",
        "loss: native (projection and loss together, in chunks)",
    )
    assert chosen.report[3].startswith(
        "weight gradient: added after the product (apex: not installed; PyTorch's addmm: "
    )


@pytest.mark.parametrize(
    ("changes", "function", "kernel"),
    [
        ({}, "norm", "PyTorch"),
        ({"model": {"zero_centered_norm": True, "normalization": "RMSNorm"}}, "norm", "liger"),
        ({"model": {"zero_centered_norm": True}}, "norm", "te"),
        ({"model": {"zero_centered_norm": True}, "transformer_impl": "local"}, "norm", "PyTorch"),
        ({"model": {"fp32_residual": True}}, "norm", "apex"),
        ({"model": {"fp32_residual": True}, "compile": "layer"}, "norm", "PyTorch"),
        ({"transformer_impl": "transformer_engine"}, "norm", "te"),
        ({"transformer_impl": "transformer_engine", "norm_kernel": "torch"}, "norm", "PyTorch"),
        ({"norm_kernel": "apex"}, "norm", "apex"),
        ({"norm_kernel": "liger"}, "norm", "liger"),
        ({}, "attention", "PyTorch"),
        ({"attention": "flash"}, "attention", "flash-attn 3"),
        ({"attention": "flash", "model": {"attention_dropout": 0.1}}, "attention", "flash-attn"),
        ({"model": {"position_embedding": "alibi"}}, "attention", "flash-attn"),
        ({"model": {"position_embedding": "alibi"}, "attention": "unfused"}, "attention", "PyTorch"),
        ({"model": {"attention_dropout": 0.1}}, "attention", "PyTorch"),
        ({"model": {"attention_dropout": 0.1}, "documents": True}, "attention", "flash-attn"),
        ({"transformer_impl": "transformer_engine"}, "attention", "te"),
        ({"transformer_impl": "transformer_engine", "attention": "unfused"}, "attention", "PyTorch"),
        ({"transformer_impl": "transformer_engine", "attention": "flash"}, "attention", "flash-attn 3"),
        ({"transformer_impl": "transformer_engine", "norm_kernel": "apex"}, "norm", "apex"),
        ({"cell": Cell(), "attention": "flash"}, "attention", "PyTorch"),
        ({"model": {"head_dim": 4}, "attention": "flash"}, "attention", "PyTorch"),
        ({}, "loss", "native"),
        ({"loss_kernel": "te"}, "loss", "te"),
        ({"loss_kernel": "cce"}, "loss", "cce"),
        ({}, "weight gradient", "apex"),
        ({"gradient_accumulation_fusion": False}, "weight gradient", "added after the product"),
        ({"cell": Cell()}, "weight gradient", "added after the product"),
    ],
)
def test_flags_and_the_model_choose_the_kernel(monkeypatch, changes, function, kernel):
    install(monkeypatch, *ALL)
    changes = changes | {"model": {"head_dim": 8} | changes.get("model", {})}
    assert choose_kernels(configure(**changes), CPU, gpu=True).names[function] == kernel


def test_documents_use_flash_attn_where_pytorch_has_no_varlen_kernel(monkeypatch):
    install(monkeypatch, *ALL)
    config = configure(model={"head_dim": 8}, documents=True)
    assert choose_kernels(config, CPU, gpu=True).names["attention"] == "PyTorch"
    monkeypatch.setattr(torch.version, "hip", "6.4")
    assert choose_kernels(config, CPU, gpu=True).names["attention"] == "flash-attn"


@pytest.mark.parametrize(
    ("changes", "packages", "error"),
    [
        ({"norm_kernel": "apex"}, (), "--norm-kernel apex needs fused_layer_norm_cuda and apex, and this Python"),
        # PyPI's apex, without NVIDIA's extensions.
        ({"norm_kernel": "apex"}, ("apex",), "Install it with .*github.com/NVIDIA/apex`, or remove"),
        (
            {"transformer_impl": "transformer_engine"},
            (),
            "--transformer-impl transformer_engine needs transformer_engine",
        ),
        (
            {"loss_kernel": "liger"},
            (),
            r"pip install .*\[kernels\]'`, or remove --cross-entropy-fusion-impl",
        ),
        (
            {"norm_kernel": "apex", "model": {"zero_centered_norm": True}},
            ALL,
            "--norm-kernel apex cannot compute the norm of this run: it has no zero-centered norms.*Remove --norm-k",
        ),
        ({"loss_kernel": "te", "cell": Cell(tp=2, dtype="bf16")}, ALL, "split over tensor-parallel ranks"),
        ({"loss_kernel": "cce", "cell": Cell()}, ALL, "it takes bf16 and fp16 only"),
        ({"loss_kernel": "cce", "deterministic": True}, ALL, "--deterministic-mode"),
    ],
)
def test_a_kernel_that_a_flag_names_must_serve(monkeypatch, changes, packages, error):
    install(monkeypatch, *packages)
    with pytest.raises(ConfigError, match=f"(?s){error}"):
        choose_kernels(configure(**changes), CPU, gpu=True)


def test_transformer_engine_may_leave_a_function_to_pytorch(monkeypatch):
    install(monkeypatch, *ALL)
    changes = {"transformer_impl": "transformer_engine", "model": {"fp32_residual": True, "head_dim": 4}}
    report = choose_kernels(configure(**changes), CPU, gpu=True).report
    assert report[0] == "norm: PyTorch (te: it does not take fp32 residuals (--fp32-residual-connection))"
    assert report[1] == "attention: PyTorch (te: it takes heads of up to 256 channels, in multiples of 8, not 4)"


def wrong(function):
    def run(*args, **options):
        return function(*args, **options) * 1.5

    return run


def fail(*args, **options):
    raise RuntimeError("CUDA error: no kernel image is available\nfor execution")


FUNCTIONS = {
    "apex": ("apex.normalization.fused_layer_norm", "mixed_dtype_fused_layer_norm_affine"),
    "liger": ("liger_kernel.transformers.functional", "liger_layer_norm"),
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_a_kernel_is_tried_before_it_is_used(monkeypatch, name):
    install(monkeypatch, *ALL)
    module, function = FUNCTIONS[name]
    config = configure(norm_kernel=name)
    original = getattr(sys.modules[module], function)
    monkeypatch.setattr(sys.modules[module], function, wrong(original))
    with pytest.raises(ConfigError, match=r"its results deviate from PyTorch's by 0\.5 of the largest element"):
        choose_kernels(config, CPU, gpu=True)
    monkeypatch.setattr(sys.modules[module], function, lambda *args: original(*args) * float("nan"))
    with pytest.raises(ConfigError, match="deviate from PyTorch's by inf"):
        choose_kernels(config, CPU, gpu=True)
    monkeypatch.setattr(sys.modules[module], function, fail)
    with pytest.raises(ConfigError, match="RuntimeError when it was tried: CUDA error: no kernel image is available"):
        choose_kernels(config, CPU, gpu=True)


def test_trials_leave_the_default_generators_alone(monkeypatch):
    install(monkeypatch, *ALL)
    state = torch.get_rng_state()
    choose_kernels(configure(norm_kernel="apex", loss_kernel="cce", attention="flash"), CPU, gpu=True)
    assert torch.equal(torch.get_rng_state(), state)


def lift(patch, *functions):
    """Remove the conditions of all kernels of some functions."""
    for function in functions:
        lifted = dict.fromkeys(conditions.OBSTACLES[function], lambda config: ())
        patch.setitem(conditions.OBSTACLES, function, lifted)


def train(config, kernels, backend=None):
    backend = backend or CpuBackend(RuntimeConfig(device="cpu", num_threads=1), ParallelConfig(), Launch())
    mesh = mesh_of(backend, config.parallel.tp, 1)
    engine = build_engine(config, mesh, kernels=kernels)
    losses, norms, _ = iterate(config, mesh, engine, Progress(), 3)
    return losses, norms


RUNS = [
    ({"norm_kernel": "apex"}, {}),
    ({"norm_kernel": "liger"}, {"normalization": "RMSNorm", "zero_centered_norm": True}),
    ({"norm_kernel": "te"}, {"zero_centered_norm": True}),
    ({"norm_kernel": "te"}, {"normalization": "RMSNorm", "share_layers": "all"}),
    ({"loss_kernel": "te"}, {}),
    ({"loss_kernel": "liger"}, {"tied_embeddings": False}),
    ({"loss_kernel": "cce"}, {}),
    ({"loss_kernel": "cce"}, {"tied_embeddings": False}),
    ({"attention": "flash"}, {"num_query_groups": 4}),
    ({"attention": "auto"}, {"position_embedding": "alibi"}),
    ({"transformer_impl": "transformer_engine"}, {"position_embedding": "alibi", "num_query_groups": 4}),
]


@pytest.mark.parametrize("documents", [False, True], ids=["samples", "documents"])
@pytest.mark.parametrize(("runtime", "model"), RUNS, ids=str)
def test_training_by_a_vendors_kernel_equals_pytorchs(monkeypatch, runtime, model, documents):
    attention = "attention" in runtime or "transformer_impl" in runtime
    if documents and not attention:
        pytest.skip("documents concern attention only")
    install(monkeypatch, *(name for name in ALL if name != "flash_attn_interface"))
    # The largest dtype that the kernels take: fp32, but for attention and cce, whose conditions are lifted here.
    lift(monkeypatch, "attention", "loss")
    config = configure(Cell(documents=documents), model=model, documents=documents, **runtime)
    kernels = dataclasses.replace(choose_kernels(config, CPU, gpu=True), weight_gradient=None)
    assert kernels.norm is not torch_norm or kernels.attention is not None or kernels.loss is not None
    losses, norms = train(config, kernels)
    expected, expected_norms = train(config, None)
    assert losses == pytest.approx(expected, rel=1e-5)
    assert norms == pytest.approx(expected_norms, rel=1e-4)


def test_evaluation_by_a_loss_kernel_equals_training(monkeypatch):
    install(monkeypatch, *ALL)
    from megatron_lite.parallel.cross_entropy import LinearCrossEntropy

    backend = CpuBackend(RuntimeConfig(device="cpu", num_threads=1), ParallelConfig(), Launch())
    group = mesh_of(backend, 1, 1).tp
    x, labels = torch.randn(6, 2, 8), torch.randint(40, (6, 2))
    weight = torch.nn.Parameter(torch.randn(48, 8), requires_grad=False)
    expected = LinearCrossEntropy(40, group, False, 5).losses(x, weight, labels)
    for name, row in (("te", 0), ("liger", 1), ("cce", 2)):
        kernel = CANDIDATES["loss"][row].adapt(configure(loss_kernel=name))
        assert isinstance(kernel, LossKernel)
        loss = LinearCrossEntropy(40, group, False, 5, kernel)
        torch.testing.assert_close(loss.losses(x, weight, labels), expected)
        losses, _ = loss.losses_and_gradients(x, weight, labels, torch.ones(6, 2), lambda *args, **options: None)
        torch.testing.assert_close(losses, expected)  # with a frozen weight, too
        assert weight.grad is None


def train_both_ways(backend):
    """Return losses and norms with flash-attn and apex, and with PyTorch."""
    config = configure(Cell(tp=2, model="bloom", documents=True, **SP), documents=True, norm_kernel="apex")
    with pytest.MonkeyPatch.context() as patch:
        install(patch, *ALL)
        lift(patch, "attention")
        kernels = choose_kernels(config, CPU, gpu=True)
        assert (kernels.names["norm"], kernels.names["attention"]) == ("apex", "flash-attn")
        kernels = dataclasses.replace(kernels, weight_gradient=None)
        return train(config, kernels, backend), train(config, None, backend)


@pytest.mark.slow
def test_ranks_that_split_heads_and_sequence_use_the_kernels(on_ranks):
    for (losses, norms), (expected, expected_norms) in on_ranks(2, train_both_ways):
        assert losses == pytest.approx(expected, rel=1e-5)
        assert norms == pytest.approx(expected_norms, rel=1e-4)


def choose(backend, rank_with_liger):
    backend.vendor_kernels = True
    with pytest.MonkeyPatch.context() as patch:
        install(patch, *(("liger_kernel",) if rank_with_liger in (None, backend.rank) else ()))
        kernels = agree_on_kernels(configure(norm_kernel="liger"), backend)
    return kernels.report[0]


@pytest.mark.slow
def test_all_ranks_use_the_same_kernels(on_ranks):
    assert on_ranks(2, choose, None) == ["norm: liger", "norm: liger"]
    with pytest.raises(
        RankError, match=r"Ranks would compute a function by different kernels.*\n.*rank 0 .*needs liger"
    ):
        on_ranks(2, choose, 1)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("dtype", ["bf16", "fp16", "fp32"])
@pytest.mark.parametrize(
    ("function", "row"),
    [pytest.param(f, row, id=f"{f}-{row.name}") for f, rows in CANDIDATES.items() for row in rows],
)
def test_installed_kernels_equal_pytorchs_on_a_gpu(function, row, dtype):
    if not row.installed:
        pytest.skip(f"{row.name} is not installed")
    config = configure(Cell(dtype=dtype), model={"head_dim": 64})
    if found := conditions.obstacles(function, row.name, config):
        pytest.skip(found[0][0])
    deviation = TRIALS[function](row.adapt(config), config, torch.device("cuda"))
    assert deviation <= kernels_module.trials.tolerance(function, config)
