"""Table of DeepSpeed JSON keys: merged, without effect (with the reason), or refused."""

from __future__ import annotations

FP16_FIELDS = {
    "loss_scale_window": ("precision.loss_scale_window", 1000),
    "hysteresis": ("precision.hysteresis", 2),
    "min_loss_scale": ("precision.min_loss_scale", 1.0),
}
"""DeepSpeed's name, our field, DeepSpeed's default."""
DEFAULT_SCALE_POWER = 16

WITHOUT_EFFECT = {
    "train_batch_size": "--global-batch-size and its ramp-up say it",
    "gradient_accumulation_steps": "it follows from --global-batch-size",
    "steps_per_print": "--log-interval says it",
    "wall_clock_breakdown": "--timing-log-level says it",
    "dump_state": "the config is in every checkpoint's manifest",
    "memory_breakdown": "--log-memory-to-tensorboard reports memory",
    "prescale_gradients": "gradients are summed in fp32 and divided once",
    "gradient_predivide_factor": "gradients are summed in fp32 and divided once",
    "communication_data_type": "gradients are summed in fp32",
    "zero_allow_untested_optimizer": "the optimizers here are tested with ZeRO-1",
    "zero_force_ds_cpu_optimizer": "nothing is offloaded",
    "elastic_checkpoint": "any layout reads any checkpoint",
    "checkpoint": "there is one checkpoint format",
    "load_universal": "any layout reads any checkpoint",
    "activation_checkpointing": "--checkpoint-activations says it",
    "data_types": "gradients are summed in fp32",
    "flops_profiler": "the log always has FLOP/s",
    "tensorboard": "--tensorboard-dir says it",
    "csv_monitor": "metrics.jsonl holds the same",
    "wandb": "metrics.jsonl holds the same",
    "comms_logger": "the plan counts the bytes",
    "sparse_gradients": "gradients are dense",
    "disable_allgather": "ZeRO-1 gathers parameters as it must",
    "pipeline": "--pipeline-model-parallel-size says it",
    "aio": "nothing is offloaded",
}
REFUSED = {
    "optimizer": "Give the optimizer by --optimizer, --lr and their kin",
    "scheduler": "Give the schedule by --lr-decay-style and its kin",
    "amp": "Use --fp16 or --bf16",
    "sparse_attention": "Attention is dense here: remove the entry",
    "compression_training": "Remove the entry",
    "data_efficiency": "Use curriculum_learning with curriculum_type seqlen",
    "progressive_layer_drop": "Remove the entry",
    "eigenvalue": "Remove the entry",
    "quantize_training": "Remove the entry",
    "hybrid_engine": "Remove the entry",
    "autotuning": "Remove the entry",
    "elasticity": "Remove the entry",
}
READ_HERE = (
    "fp16",
    "bf16",
    "bfloat16",
    "gradient_clipping",
    "zero_optimization",
    "train_micro_batch_size_per_gpu",
    "curriculum_learning",
)
FP16_KEYS = frozenset({"enabled", "loss_scale", "initial_scale_power", *FP16_FIELDS})
