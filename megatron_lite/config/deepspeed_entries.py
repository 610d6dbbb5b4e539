"""Entries of DeepSpeed's JSON: merged into the config, passed to DeepSpeed, without effect, or refused with advice."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

MERGED = frozenset(
    {
        "fp16",
        "bf16",
        "bfloat16",
        "gradient_clipping",
        "zero_optimization",
        "train_micro_batch_size_per_gpu",
        "curriculum_learning",
        "optimizer",
    }
)
"""Entries that become fields of the config."""

_HELD_HERE = {
    "steps_per_print": "--log-interval sets it",
    "elastic_checkpoint": "any layout reads any checkpoint",
    "checkpoint": "there is one checkpoint format",
    "load_universal": "any layout reads any checkpoint",
    "activation_checkpointing": "--checkpoint-activations sets it",
    "pipeline": "--pipeline-model-parallel-size sets it",
    "flops_profiler": "the log always has FLOP/s",
    "tensorboard": "--tensorboard-dir sets it",
    "csv_monitor": "--csv-dir writes CSV files",
    "wandb": "--wandb-project logs to Weights & Biases",
    "sparse_gradients": "gradients are dense",
    "dump_state": "the config is in every checkpoint's manifest",
    "zero_allow_untested_optimizer": "the optimizers here are tested with ZeRO",
}
"""Entries that no engine carries out, because a flag or the format of checkpoints does."""

_NATIVE = {
    "train_batch_size": "--global-batch-size and its ramp-up set it",
    "gradient_accumulation_steps": "it follows from --global-batch-size",
    "wall_clock_breakdown": "--timing-log-level sets it",
    "memory_breakdown": "--log-memory-to-tensorboard reports memory",
    "prescale_gradients": "gradients are summed in fp32 and divided once",
    "gradient_predivide_factor": "gradients are summed in fp32 and divided once",
    "communication_data_type": "gradients are summed in fp32",
    "zero_force_ds_cpu_optimizer": "nothing is offloaded",
    "data_types": "gradients are summed in fp32",
    "comms_logger": "`megatron-lite rehearse` counts the bytes",
    "disable_allgather": "ZeRO-1 always gathers parameters",
    "aio": "nothing is offloaded",
}
"""Entries without effect in the native engine."""

_REFUSED = {
    "scheduler": "Remove the entry; use --lr-decay-style and --lr-warmup-iters",
    "amp": "Remove the entry; use --fp16 or --bf16",
    "sparse_attention": "Remove the entry: only dense attention is implemented",
    "compression_training": "Remove the entry",
    "data_efficiency": "Remove the entry; use curriculum_learning with curriculum_type seqlen",
    "progressive_layer_drop": "Remove the entry",
    "eigenvalue": "Remove the entry",
    "quantize_training": "Remove the entry",
    "hybrid_engine": "Remove the entry",
    "autotuning": "Remove the entry",
    "elasticity": "Remove the entry",
    "compile": "Remove the entry; --compile compiles the layers of the native engine",
    "tensor_parallel": "Remove the entry; use --tensor-model-parallel-size",
}


@dataclass(frozen=True)
class Entries:
    """Treatment of the JSON's entries by an engine.

    Attributes:
        merged: become fields of the config.
        passed: are passed on to DeepSpeed.
        without_effect: reason by entry.
        refused: advice by entry.
    """

    merged: frozenset[str]
    passed: frozenset[str]
    without_effect: Mapping[str, str]
    refused: Mapping[str, str]

    @property
    def all(self) -> list[str]:
        """Return all known entries."""
        return [*self.merged, *self.passed, *self.without_effect, *self.refused]


NATIVE = Entries(MERGED, frozenset(), _HELD_HERE | _NATIVE, _REFUSED)
ENGINE = Entries(
    MERGED | {"train_batch_size", "gradient_accumulation_steps"},
    frozenset(_NATIVE)
    - {"train_batch_size", "gradient_accumulation_steps", "disable_allgather", "zero_force_ds_cpu_optimizer"},
    _HELD_HERE,
    _REFUSED
    | {
        "disable_allgather": "Remove the entry: updated parameters are always gathered",
        "zero_force_ds_cpu_optimizer": "Remove the entry: torch's AdamW updates offloaded state",
    },
)

ZERO_PASSED: dict[str, type] = {
    "allgather_bucket_size": int,
    "allgather_partitions": bool,
    "contiguous_gradients": bool,
    "enable_sanity_checks": bool,
    "ignore_unused_parameters": bool,
    "log_trace_cache_warnings": bool,
    "memory_efficient_linear": bool,
    "offload_optimizer": dict,
    "offload_param": dict,
    "overlap_comm": bool,
    "override_module_apply": bool,
    "parameter_alignment": int,
    "reduce_bucket_size": int,
    "reduce_scatter": bool,
    "round_robin_gradients": bool,
    "stage3_allgather_sequential": bool,
    "stage3_max_live_parameters": int,
    "stage3_max_reuse_distance": int,
    "stage3_model_persistence_threshold": int,
    "stage3_module_granularity_threshold": int,
    "stage3_param_persistence_threshold": int,
    "stage3_prefetch_bucket_size": int,
    "stage3_use_all_reduce_for_fetch_params": bool,
    "sub_group_size": int,
    "use_multi_rank_bucket_allreduce": bool,
}
"""Entries of zero_optimization that DeepSpeed carries out, with the type of their values."""
_OWN_CHECKPOINTS = "checkpoints are written in the format of megatron_lite"
ZERO_WITHOUT_EFFECT = {
    "elastic_checkpoint": "any layout reads any checkpoint",
    "load_from_fp32_weights": "the fp32 main parameters are in every checkpoint",
    "pipeline_loading_checkpoint": _OWN_CHECKPOINTS,
    "stage3_gather_16bit_weights_on_model_save": _OWN_CHECKPOINTS,
    "stage3_gather_fp16_weights_on_model_save": _OWN_CHECKPOINTS,
    "gather_16bit_weights_on_model_save": _OWN_CHECKPOINTS,
    "legacy_stage1": "there is one implementation of stage 1",
    "cpu_offload_use_pin_memory": "pin_memory of offload_optimizer and offload_param sets it",
}
ZERO_REFUSED = {
    "compute_grad_norm": "Remove the entry: the norm of the gradient is in the log, and clips",
    "leaf_module": "Remove the entry: no module here needs its parameters gathered together with those of its parts",
    "mics_shard_size": "Remove the entry; use zero_optimization.stage 2, whose communication is less than stage 3's",
    "mics_hierarchical_params_gather": "Remove the entry",
    "save_muon_momentum_buffer_in_memory": "Remove the entry: the DeepSpeed engine has no Muon",
    "zenflow": "Remove the entry: it updates parameters with gradients of earlier iterations",
    "zero_hpz_partition_size": "Remove the entry: the secondary shards would differ from the weights after a load",
    "zero_quantized_gradients": "Remove the entry: its kernels are compiled at the start",
    "zero_quantized_nontrainable_weights": "Remove the entry: its kernels are compiled at the start",
    "zero_quantized_weights": "Remove the entry: its kernels are compiled at the start",
    "zeropp_loco_param": "Remove the entry: its kernels are compiled at the start",
}
ZERO_RENAMED = {
    "allgather_size": "allgather_bucket_size",
    "max_live_parameters": "stage3_max_live_parameters",
    "max_reuse_distance": "stage3_max_reuse_distance",
    "param_persistence_threshold": "stage3_param_persistence_threshold",
    "prefetch_bucket_size": "stage3_prefetch_bucket_size",
    "stage3_param_persitence_threshold": "stage3_param_persistence_threshold",
    "cpu_offload": "offload_optimizer",
    "cpu_offload_param": "offload_param",
    "cpu_offload_params": "offload_param",
}
"""Old, short and misspelt names in published files, with the present ones."""
ZERO_DEFAULTS = {"compute_grad_norm": True, "mics_shard_size": -1, "zero_hpz_partition_size": 1}
"""Values of refused entries that ask for nothing; of all others false. Null and {} never do."""
OFFLOAD_KEYS: dict[str, dict[str, type]] = {
    "offload_optimizer": {
        "device": str,
        "nvme_path": str,
        "buffer_count": int,
        "pin_memory": bool,
        "pipeline_read": bool,
        "pipeline_write": bool,
        "fast_init": bool,
        "ratio": float,
    },
    "offload_param": {
        "device": str,
        "nvme_path": str,
        "buffer_count": int,
        "buffer_size": int,
        "max_in_cpu": int,
        "pin_memory": bool,
    },
}
"""Entries of the two sections that offload, with the type of their values."""
