"""Entries of DeepSpeed's JSON: merged into the config, passed to DeepSpeed, without effect, or refused with advice."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

MERGED = frozenset(
    {
        "fp16",
        "bf16",
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
    "comet": "--tensorboard-dir and --wandb-project log the metrics",
    "timers": "--timing-log-level sets it",
    "log_level": "messages of DeepSpeed are not shown",
    "dataloader_drop_last": "DeepSpeed does not read the data",
    "disable_python_gc": "--manual-gc-interval sets it",
    "vocabulary_size": "the tokenizer sets it",
    "seq_parallel_communication_data_type": "--sequence-parallel communicates activations in their own type",
    "use_data_before_expert_parallelism": "the models have no experts",
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
    "managed_gradient_accumulation": "Remove the entry; gradients are accumulated over the micro-batches of a batch",
    "gradient_allreduce_op": "Remove the entry: gradients are averaged",
    "torch_autocast": "Remove the entry; use --fp16 or --bf16",
    "weight_quantization": "Remove the entry",
    "expert_parallel": "Remove the entry: the models have no experts",
    "datastates": "Remove the entry; --async-save writes checkpoints in the background",
    "nebula": "Remove the entry; --async-save writes checkpoints in the background",
    "graph_harvesting": "Remove the entry",
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

_OWN_CHECKPOINTS = "checkpoints are written in the format of megatron_lite"
WITHOUT_EFFECT = {
    "bf16.immediate_grad_update": "gradients are added in fp32",
    "bf16.check_grad_overflow": "--no-check-for-nan-in-loss-and-grad sets it",
    "optimizer.legacy_fusion": "torch's optimizers are used",
    "zero_optimization.elastic_checkpoint": "any layout reads any checkpoint",
    "zero_optimization.load_from_fp32_weights": "the fp32 main parameters are in every checkpoint",
    "zero_optimization.pipeline_loading_checkpoint": _OWN_CHECKPOINTS,
    "zero_optimization.stage3_gather_16bit_weights_on_model_save": _OWN_CHECKPOINTS,
    "zero_optimization.stage3_gather_fp16_weights_on_model_save": _OWN_CHECKPOINTS,
    "zero_optimization.gather_16bit_weights_on_model_save": _OWN_CHECKPOINTS,
    "zero_optimization.legacy_stage1": "there is one implementation of stage 1",
    "zero_optimization.cpu_offload_use_pin_memory": "pin_memory of offload_optimizer and offload_param sets it",
    "zero_optimization.offload_optimizer.cpuadam_cores_perc": "torch's AdamW updates offloaded state",
}
"""Entries of sections that no engine carries out, with the reason."""
_COMPILED = "Remove the entry: its kernels are compiled at the start"
_MAIN_PARAMETERS = "Remove the entry: main parameters and moments are in fp32"
REFUSED = {
    "bf16.bf16_master_weights_and_grads": _MAIN_PARAMETERS,
    "bf16.bf16_optimizer_states": _MAIN_PARAMETERS,
    "fp16.auto_cast": "Remove the entry: the inputs are token numbers",
    "fp16.consecutive_hysteresis": "Remove the entry, or use --loss-scaler megatron without --deepspeed",
    "fp16.fp16_master_weights_and_grads": _MAIN_PARAMETERS,
    "data_types.param_dtype": "Remove the entry; --fp16 and --bf16 set it",
    "data_types.buffer_dtype": "Remove the entry; --fp16 and --bf16 set it",
    "data_types.keep_in_fp32_modules": "Remove the entry; --fp16 and --bf16 apply to all layers",
    "zero_optimization.compute_grad_norm": "Remove the entry: the norm of the gradient is in the log, and clips",
    "zero_optimization.leaf_module": "Remove the entry: no module here needs its parameters gathered together with "
    "those of its parts",
    "zero_optimization.mics_shard_size": "Remove the entry; use zero_optimization.stage 2, whose communication is less "
    "than stage 3's",
    "zero_optimization.mics_hierarchical_params_gather": "Remove the entry",
    "zero_optimization.save_muon_momentum_buffer_in_memory": "Remove the entry: the DeepSpeed engine has no Muon",
    "zero_optimization.zenflow": "Remove the entry: it updates parameters with gradients of earlier iterations",
    "zero_optimization.zero_hpz_partition_size": "Remove the entry: the secondary shards would differ from the weights "
    "after a load",
    "zero_optimization.zero_quantized_gradients": _COMPILED,
    "zero_optimization.zero_quantized_nontrainable_weights": _COMPILED,
    "zero_optimization.zero_quantized_weights": _COMPILED,
    "zero_optimization.zeropp_loco_param": _COMPILED,
    "zero_optimization.offload_optimizer.super_offload": "Remove the entry: its CPU Adam is compiled at the start",
}
"""Entries of sections that are refused, with advice."""
DEFAULTS = {
    "gradient_allreduce_op": "mean",
    "managed_gradient_accumulation": True,
    "zero_optimization.compute_grad_norm": True,
    "zero_optimization.mics_shard_size": -1,
    "zero_optimization.zero_hpz_partition_size": 1,
}
"""Values of refused entries that ask for nothing; of all others false. Null and {} never do."""
RENAMED = {
    "bfloat16": "bf16",
    "aio.thread_count": "intra_op_parallelism",
    "zero_optimization.allgather_size": "allgather_bucket_size",
    "zero_optimization.max_live_parameters": "stage3_max_live_parameters",
    "zero_optimization.max_reuse_distance": "stage3_max_reuse_distance",
    "zero_optimization.param_persistence_threshold": "stage3_param_persistence_threshold",
    "zero_optimization.prefetch_bucket_size": "stage3_prefetch_bucket_size",
    "zero_optimization.stage3_param_persitence_threshold": "stage3_param_persistence_threshold",
    "zero_optimization.cpu_offload": "offload_optimizer",
    "zero_optimization.cpu_offload_param": "offload_param",
    "zero_optimization.cpu_offload_params": "offload_param",
}
"""Old, short and misspelt names in published files, with the present ones."""
