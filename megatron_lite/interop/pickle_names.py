"""Pickle class allowlist: exact class names allowed in foreign files; each becomes an inert stub, no import.

Modules are listed with the names that were met in them. A prefix such as `megatron.` would be no safer than it looks:
packages re-export functions that run commands (`torch.hub.load`, `numpy.testing.rundocs`).
"""

from __future__ import annotations

_BY_MODULE = {
    "_io": "BytesIO",
    "io": "BytesIO",
    "signal": "Signals",
    "pathlib": "PosixPath",
    "pathlib._local": "PosixPath",
    "datetime": "timedelta",
    "collections": "defaultdict deque",
    "torch": "device",
    "torch._C": "Generator",
    "numpy": "ndarray dtype",
    "numpy.core.multiarray": "_reconstruct scalar",
    "numpy._core.multiarray": "_reconstruct scalar",
    # Megatron-LM: enums in args, state of the rerun machine.
    "megatron.core.enums": "ModelType Fp8Recipe Fp4Recipe",
    "megatron.core.transformer.enums": (
        "ModelType LayerType AttnType AttnMaskType AttnBackend CudaGraphScope CudaGraphModule InferenceCudaGraphScope"
    ),
    "megatron.core.rerun_state_machine": "RerunMode RerunState RerunDiagnostic RerunValidationStatus",
    "megatron.core.dist_checkpointing.strategies.torch": "MCoreMetadata MCoreSavePlan",
    "megatron.legacy.model.enums": "ModelType LayerType AttnType AttnMaskType",
    "megatron.model.enums": "ModelType LayerType AttnType AttnMaskType",
    # Megatron-DeepSpeed and DeepSpeed: enums in args, loss scalers, ZeRO's config and table of fragments.
    "megatron.enums": "ModelType LayerType AttnType AttnMaskType PositionEmbeddingType",
    "deepspeed.runtime.fp16.loss_scaler": "LossScaler DynamicLossScaler LossScaleProfile",
    "deepspeed.runtime.zero.config": "ZeroStageEnum DeepSpeedZeroConfig",
    "deepspeed.runtime.zero.offload_config": "OffloadDeviceEnum",
    "deepspeed.runtime.config": "DtypeEnum",
    "deepspeed.utils.tensor_fragment": "fragment_address",
}
"""Random states, signals, paths, enums and scalers: values on which no weight depends."""

_OF_METADATA = {
    "torch.distributed.checkpoint.metadata": (
        "Metadata TensorStorageMetadata BytesStorageMetadata TensorProperties MetadataIndex ChunkStorageMetadata "
        "StorageMeta _MEM_FORMAT_ENCODING"
    ),
    "torch.distributed.checkpoint.planner": "SavePlan WriteItem WriteItemType TensorWriteData BytesIOWriteData",
    "torch.distributed.checkpoint.filesystem": "_StorageInfo",
    "torch.serialization": "_get_layout",
}
"""Names in `.metadata` of a distributed checkpoint; megatron-core keeps the save plans of all ranks in it."""


def _full(by_module: dict[str, str]) -> frozenset[str]:
    return frozenset(f"{module}.{name}" for module, names in by_module.items() for name in names.split())


STUBBED = _full(_BY_MODULE)
METADATA = _full(_OF_METADATA)
