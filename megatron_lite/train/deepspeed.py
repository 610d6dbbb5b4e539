"""DeepSpeed assembly: model, optimizer, configuration and process groups for deepspeed.initialize.

Nothing is compiled at the start: torch's optimizers are used, and gloo without DeepSpeed's shared-memory kernels.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

from megatron_lite.backend.libraries import is_installed, join_as_library, library_group
from megatron_lite.config.deepspeed_nvme import largest_part, optimizer_buffers
from megatron_lite.config.run import RunConfig
from megatron_lite.config.selection import select_parameters
from megatron_lite.errors import ConfigError, install_extra
from megatron_lite.model.count_check import check_count
from megatron_lite.model.gpt import GPTStage
from megatron_lite.model.init import initialize
from megatron_lite.optim.update_rule import torch_optimizer
from megatron_lite.parallel.buffers import has_decay
from megatron_lite.parallel.mesh import Mesh
from megatron_lite.parallel.parameters import NamedParameter, apply_selection
from megatron_lite.parallel.random import RngStreams
from megatron_lite.pipeline.executor import Timed
from megatron_lite.train.deepspeed_engine import DeepSpeedEngine, Parts
from megatron_lite.train.deepspeed_model import LossModel, join_shared_parameters
from megatron_lite.train.deepspeed_swap import SwapFolders, prepare_swap


def build_deepspeed_engine(
    config: RunConfig, mesh: Mesh, *, num_sources: int = 0, timed: Timed | None = None
) -> DeepSpeedEngine:
    """Build the model and wrap it by deepspeed.initialize; a collective call.

    Args:
        config: the run, with the vocabulary size.
        mesh: this rank's groups.
        num_sources: data sources of a blend whose losses are reported one by one.
        timed: measures the parts of a step; None: no timing.

    Raises:
        ConfigError: state cannot be offloaded to NVMe here.
    """
    library = _import_deepspeed(mesh)
    swap = prepare_swap(config, mesh, lambda: library.ops.op_builder.AsyncIOBuilder().load(verbose=False))
    try:
        return _build(config, mesh, library, swap, num_sources, timed)
    except BaseException:
        if swap is not None:
            swap.close()
        raise


def _build(
    config: RunConfig, mesh: Mesh, library: Any, swap: SwapFolders | None, num_sources: int, timed: Timed | None
) -> DeepSpeedEngine:
    """Build the model and wrap it; arguments as for build_deepspeed_engine.

    Args:
        config: the run, with the vocabulary size.
        mesh: this rank's groups.
        library: DeepSpeed.
        swap: folders for swap files; None: there are none.
        num_sources: data sources of a blend whose losses are reported one by one.
        timed: measures the parts of a step.
    """
    rng, groups = RngStreams(config.runtime.seed, mesh.backend, mesh.tp.rank), _Groups(mesh)
    # At stage 3 the model may be larger than the memory of a device: it gets its values one parameter at a time.
    partitions = config.deepspeed.stage == 3 and mesh.replicas.size > 1
    device = torch.device("meta") if partitions else None
    stage = GPTStage(config, range(config.model.num_layers), mesh, rng, device=device)
    check_count(stage)
    parameters = join_shared_parameters(stage)
    decays = [has_decay(parameter) for parameter in parameters]
    settings = deepspeed_config(config, mesh.replicas.size, swap)
    if partitions:
        init = library.zero.Init(
            module=nn.Module(),
            data_parallel_group=groups.get_data_parallel_group(),
            config_dict_or_path=settings,
            mpu=groups,
        )
        parameters = _partition(stage, parameters, init, config, mesh)
    parameters = apply_selection(parameters, select_parameters(config))
    for parameter in parameters:
        # DeepSpeed sums the squared norms of gradients over tp for parameters with this attribute only.
        vars(parameter.param)["tensor_model_parallel"] = parameter.tp_dim is not None
        if parameter.sequence_parallel and parameter.trained:
            parameter.param.register_hook(_SumOverTp(mesh))
    rows = [
        (parameter.param, decay, parameter.lr_factor)
        for parameter, decay in zip(parameters, decays, strict=True)
        if parameter.trained
    ]
    kind: Literal["adam", "sgd"] = "sgd" if config.optimizer.kind == "sgd" else "adam"
    optimizer = torch_optimizer(kind, config.optimizer, rows, fused=mesh.backend.capabilities().fused_adam)
    engine = library.initialize(
        model=LossModel(stage),
        optimizer=optimizer,
        config=settings,
        mpu=groups,
        dist_init_required=False,
    )[0]
    return DeepSpeedEngine(config, mesh, Parts(engine, optimizer, stage, parameters, rng, swap), num_sources, timed)


def deepspeed_config(config: RunConfig, replicas: int, swap: SwapFolders | None = None) -> dict[str, Any]:
    """Return the configuration for DeepSpeed: what follows from the run, and the entries passed on.

    At stages 2 and 3, gradients are added over micro-batches in fp32, as in the native engine, unless data_types says
    otherwise. The loss scale is set before each iteration, and clipping at stage 0 is the engine's.

    Args:
        config: the run.
        replicas: of the model.
        swap: folders for swap files; None: there are none.
    """
    dtype, micro = config.precision.dtype, config.batch.micro_batch_size
    entries: dict[str, Any] = {
        # Iterations differ in their micro-batches; the engine marks the last one itself.
        "train_micro_batch_size_per_gpu": micro,
        "gradient_accumulation_steps": 1,
        "train_batch_size": micro * replicas,
        "gradient_clipping": config.optimizer.clip_grad if config.deepspeed.stage else 0.0,
        "steps_per_print": None,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
    }
    if dtype == "fp16":
        entries["fp16"] = {"enabled": True, "loss_scale": 1.0}
    elif dtype == "bf16":
        entries["bf16"] = {"enabled": True, "check_grad_overflow": config.stops_at_nan}
    entries.update(config.deepspeed.entries)
    if dtype != "fp32" and config.deepspeed.stage > 1:
        entries["data_types"] = {"grad_accum_dtype": "fp32"} | (entries.get("data_types") or {})
    if swap is not None:
        zero = entries["zero_optimization"] = swap.settings(config.deepspeed.zero)
        if config.deepspeed.offload_device("optimizer") == "nvme":
            zero["offload_optimizer"].setdefault("buffer_count", optimizer_buffers(config))
        if config.deepspeed.offload_device("param") == "nvme":
            # A parameter that stays gathered keeps its swap buffer, and a step needs all of them sooner or later.
            zero["offload_param"].setdefault("buffer_size", largest_part(config, replicas)[0])
            zero.setdefault("stage3_max_reuse_distance", 0)
            zero.setdefault("stage3_prefetch_bucket_size", 0)
    return entries


def require_deepspeed() -> None:
    """Require the package, before anything is opened or allocated.

    Raises:
        ConfigError: it is not installed.
    """
    if not is_installed("deepspeed"):
        raise ConfigError(
            "--engine deepspeed needs the package deepspeed, which is not installed", fix=install_extra("deepspeed")
        )


def _import_deepspeed(mesh: Mesh) -> Any:
    """Import DeepSpeed for the run's device, and let it use the process groups of the job."""
    join_as_library(mesh.backend)
    import deepspeed

    # It calls functions of torch.distributed that torch 2.13 has renamed.
    warnings.filterwarnings("ignore", message="`torch.distributed.* is deprecated", category=FutureWarning)
    # Skipped steps and checkpoints are reported here.
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    # Empty, so that none is tried with the compiler, and kernels for gloo are not built, which takes half a minute.
    vars(deepspeed.ops)["__compatible_ops__"] = {}
    transport = "nccl" if mesh.backend.device.type == "cuda" else "gloo"
    deepspeed.init_distributed(transport, dist_init_required=False)
    _align_swapping()
    return deepspeed


def _align_swapping() -> None:
    """Keep DeepSpeed 0.19 from reading to addresses that are not multiples of 512 bytes.

    Direct I/O refuses them, and DeepSpeed does not look at the result: gradients, and parameters that stay in memory,
    would keep the values of the buffer.
    """
    from deepspeed.runtime.swap_tensor.optimizer_utils import OptimizerSwapper
    from deepspeed.runtime.swap_tensor.partitioned_param_swapper import AsyncPartitionedParameterSwapper

    # Parameters are read to the swap buffers, and copied from there.
    AsyncPartitionedParameterSwapper._is_io_aligned = lambda swapper, numel: False
    OptimizerSwapper._swap_out_gradients = _keep_gradients


def _keep_gradients(
    swapper: Any, parameter: Any, gradient_offsets: Sequence[int], gradient_tensors: Sequence[Tensor], **_: Any
) -> None:
    """Keep a partition's gradients in host memory, without a swap file; the step copies them."""
    info = swapper.swap_params_info.get(swapper.parameter_id(parameter))
    if info is not None:
        in_memory = (gradient.to("cpu") for gradient in gradient_tensors)  # DeepSpeed gives those of a GPU on the GPU
        info.unswapped_gradients.update(zip(gradient_offsets, in_memory, strict=True))


def _partition(
    stage: GPTStage, parameters: Sequence[NamedParameter], init: Any, config: RunConfig, mesh: Mesh
) -> list[NamedParameter]:
    """Replace the meta parameters of a model by initialized ones, each of which is partitioned before the next exists.

    Args:
        stage: model on meta.
        parameters: of the model.
        init: DeepSpeed's zero.Init.
        config: model and seed.
        mesh: this rank's groups.

    Returns:
        The parameters, partitioned over the replicas.
    """
    places: dict[int, list[tuple[nn.Module, str]]] = {}
    for module in stage.modules():
        for name, param in module.named_parameters(recurse=False):
            places.setdefault(id(param), []).append((module, name))
    found = []
    for parameter in parameters:
        real = replace(parameter, param=nn.Parameter(torch.empty_like(parameter.param, device=mesh.backend.device)))
        for module, name in places[id(parameter.param)]:
            setattr(module, name, real.param)
        initialize([real], config.model, config.runtime.seed, mesh.backend)
        init._convert_to_zero_parameters([real.param])
        found.append(real)
    return found


@dataclass(frozen=True, eq=False)
class _SumOverTp:
    """Gradient hook of a parameter that tp ranks hold alike and each trains on its part of the sequence."""

    mesh: Mesh

    def __call__(self, gradient: torch.Tensor) -> torch.Tensor:
        total = gradient.contiguous().clone()
        self.mesh.tp.all_reduce_(total)
        return total


class _Groups:
    """The mesh as the model-parallel unit (mpu) of DeepSpeed, whose methods have Megatron's names."""

    def __init__(self, mesh: Mesh) -> None:
        self._mesh = mesh
        self._tp, self._dp = library_group(mesh.tp), library_group(mesh.replicas)

    def get_model_parallel_group(self) -> Any:
        """Return the tensor-parallel group."""
        return self._tp

    def get_model_parallel_rank(self) -> int:
        """Return the tensor-parallel coordinate."""
        return self._mesh.tp.rank

    def get_model_parallel_world_size(self) -> int:
        """Return the tensor-parallel size."""
        return self._mesh.tp.size

    get_tensor_model_parallel_group = get_model_parallel_group
    get_tensor_model_parallel_rank = get_model_parallel_rank
    get_tensor_model_parallel_world_size = get_model_parallel_world_size

    def get_data_parallel_group(self) -> Any:
        """Return the group of replicas."""
        return self._dp

    def get_data_parallel_rank(self) -> int:
        """Return the replica's number."""
        return self._mesh.replicas.rank

    def get_data_parallel_world_size(self) -> int:
        """Return the number of replicas."""
        return self._mesh.replicas.size

    def get_pipeline_model_parallel_rank(self) -> int:
        """Return 0: there is one pipeline stage."""
        return 0

    def get_pipeline_model_parallel_world_size(self) -> int:
        """Return 1."""
        return 1
