"""Check of a foreign checkpoint's settings at import: classifies each Megatron arg and DeepSpeed key.

An argument that the project's own flag table accepts and that is not of the model cannot change what a trained model
computes; the tables here add the names that have no flag here. What is in no table is refused by name, unless its value
asks for nothing or the user allows it (--ignore-config-keys).
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from functools import cache
from typing import Any

from megatron_lite.config.flag import Flag
from megatron_lite.config.table import flags_by_spelling
from megatron_lite.errors import CheckpointError


def _names(*lines: str) -> frozenset[str]:
    """Return the words of several lines."""
    return frozenset(" ".join(lines).split())


_OFF: tuple[Any, ...] = (None, False, 0, 0.0, "", (), [], {})

USED = _names(
    "num_layers encoder_num_layers hidden_size num_attention_heads kv_channels ffn_hidden_size normalization",
    "layernorm_epsilon norm_epsilon apply_layernorm_1p layernorm_zero_centered_gamma rotary_interleaved rotary_base",
    "rotary_percent rotary_seq_len_interpolation_factor apply_residual_connection_post_layernorm",
    "fp32_residual_connection qk_layernorm embed_layernorm add_bias_linear max_position_embeddings hidden_dropout",
    "attention_dropout init_method_std make_vocab_size_divisible_by untie_embeddings_and_output_weights",
    "group_query_attention num_query_groups num_key_value_heads position_embedding_type",
    "use_rotary_position_embeddings add_position_embedding glu_activation swiglu squared_relu openai_gelu onnx_safe",
    "bias_gelu_fusion gated_linear_unit tensor_model_parallel_size model_parallel_size pipeline_model_parallel_size",
    "vocab_size tokenizer_type seq_length consumed_train_samples consumed_valid_samples consumed_train_tokens",
    "global_batch_size add_qkv_bias padded_vocab_size",
)
"""Args that the readers use; `add_qkv_bias` and `padded_vocab_size` follow from the tensors."""

UNSUPPORTED: Mapping[str, tuple[Collection[Any], str]] = {
    "num_experts": ((*_OFF, 1, [1], (1,)), "mixture of experts"),
    "num_moe_experts": ((*_OFF, 1), "mixture of experts"),
    "mlp_type": ((None, "standard"), "mixture of experts"),
    "multi_latent_attention": (_OFF, "latent attention"),
    "experimental_attention_variant": (_OFF, "another attention"),
    "linear_attention_type": (_OFF, "linear attention"),
    "linear_attention_freq": (_OFF, "linear attention"),
    "attention_output_gate": (_OFF, "gated attention"),
    "mtp_num_layers": (_OFF, "multi-token prediction"),
    "use_rope_scaling": (_OFF, "Llama 3's rescaling of rotary frequencies"),
    "rope_type": ((None, "rope"), "YaRN"),
    "no_rope_freq": (_OFF, "layers without rotary positions"),
    "mrope_section": (_OFF, "multimodal rotary positions"),
    "window_size": (_OFF, "sliding-window attention"),
    "attention_chunk_size": (_OFF, "chunked attention"),
    "sparsity": ((None, "none"), "sparse attention"),
    "softmax_type": ((None, "vanilla"), "another softmax"),
    "softmax_scale": ((None,), "another scale of the attention scores"),
    "quick_geglu": (_OFF, "the quick GELU"),
    "geglu": (_OFF, "a gated MLP of another width"),
    "glu_linear_offset": (_OFF, "a shifted gated MLP"),
    "activation_func": ((None,), "an activation that is a function of its own"),
    "activation_func_clamp_value": ((None,), "clamped activations"),
    "num_unique_layers": (_OFF, "layers that share their weights"),
    "use_mup": (_OFF, "muP's multipliers"),
    "mup": (_OFF, "muP's multipliers"),
    "qk_l2_norm": (_OFF, "an L2 norm of queries and keys"),
    "decoder_num_layers": (_OFF, "an encoder and a decoder"),
    "retro_add_retriever": (_OFF, "retrieval"),
    "add_retriever": (_OFF, "retrieval"),
    "is_hybrid_model": (_OFF, "state-space layers"),
    "hybrid_override_pattern": (_OFF, "state-space layers"),
    "hybrid_layer_pattern": (_OFF, "state-space layers"),
    "hybrid_attention_ratio": (_OFF, "state-space layers"),
    "hybrid_mlp_ratio": (_OFF, "state-space layers"),
    "heterogeneous_block_specs": (_OFF, "layers of different shapes"),
    "heterogeneous_layers_config_path": (_OFF, "layers of different shapes"),
    "heterogeneous_layers_config_encoded_json": (_OFF, "layers of different shapes"),
    "standalone_embedding_stage": (_OFF, "an embedding stage of its own"),
    "lora_rank": (_OFF, "an adapter"),
    "peft": (_OFF, "an adapter"),
}
"""Args that change what the model computes, the values under which they do not, and what the others mean."""

CONDITIONAL = {
    "moe_": "num_experts",
    "expert_": "num_experts",
    "mtp_": "mtp_num_layers",
    "mup_": "use_mup",
    "mamba_": "is_hybrid_model",
    "linear_": "experimental_attention_variant",
    "dsa_": "experimental_attention_variant",
    "retro_": "retro_add_retriever",
    "retriever_": "retro_add_retriever",
    "yarn_": "position_embedding_type",
    "rpe_": "position_embedding_type",
}
"""Prefixes of args that change nothing as long as another arg, which is judged itself, does not ask for them."""
_CONDITIONAL_NAMES = _names(
    "q_lora_rank kv_lora_rank qk_head_dim qk_pos_emb_head_dim v_head_dim mscale mscale_all_dim beta_fast beta_slow",
    "rotary_scaling_factor original_max_position_embeddings cache_mla_latents rope_scaling_factor",
    "window_attn_skip_freq topk use_tutel param_sharing_style shared_expert qk_clip_alpha qk_clip_threshold",
)
"""Single names of the same kind: latent attention, YaRN, windows, experts, shared layers."""

HARMLESS_PREFIXES = (
    *("inference_", "rl_", "grpo_", "log_", "wandb_", "tensorboard_", "one_logger_", "otel_", "straggler_", "profile_"),
    *("ckpt_", "dist_ckpt_", "non_persistent_", "save_", "load_", "checkpoint_", "exit_", "timing_", "ft_", "nvrx_"),
    *("ddp_", "fsdp_", "megatron_fsdp_", "tp_comm_", "overlap_", "gtp_", "cp_", "nccl_", "cuda_graph_", "recompute_"),
    *("fp8_", "fp4_", "kitchen_", "cpu_offloading", "optimizer_", "adam_", "sgd_", "lr_", "muon_", "train_", "valid_"),
    *(
        "test_",
        "eval_",
        "data_",
        "dataloader_",
        "tokenizer_",
        "tiktoken_",
        "vocab_file",
        "zero_",
        "deepspeed_",
        "manual_gc",
    ),
    *(
        "bert_",
        "biencoder_",
        "ict_",
        "vision_",
        "dino_",
        "img_",
        "swin_",
        "teacher_",
        "kd_",
        "random_ltd",
        "curriculum_",
    ),
    *("rerun_", "error_injection_", "memory_", "app_tag_", "export_kd_", "modelopt_", "distributed_", "distribute_"),
    *("disable_straggler", "high_priority_", "fim_", "object_storage_", "per_dataset_", "micro_batch", "activations_"),
)
"""Prefixes of args of training, files, reports and kernels, none of which is of the model."""

HARMLESS_NAMES = _names(
    # Derived from the environment, the data or the run.
    "rank local_rank world_size data_parallel_size virtual_pipeline_model_parallel_size do_train do_valid do_test",
    "iteration model_type params_dtype main_grads_dtype main_params_dtype exp_avg_dtype exp_avg_sq_dtype",
    "transformer_pipeline_model_parallel_size variable_seq_lengths start_weight_decay end_weight_decay num_workers",
    "encoder_seq_length decoder_seq_length retriever_seq_length sample_rate mask_prob short_seq_prob max_tokens_to_oom",
    "iterations_to_skip result_rejected_tracker_filename gigaflos_no_embeds world_sizes consumed_tokens",
    "skipped_train_samples num_floating_point_operations_so_far pretrained_checkpoint use_dist_ckpt",
    "weight_decay_incr_style train_data_exact_num_epochs full_validation multiple_validation_sets",
    "group_query_attention_type node_rank yaml_cfg replication replication_jump replication_factor head_lr_mult",
    "start_time phase_transition_iterations warmup_steps trust_remote_code use_cpu use_tensor_parallel",
    # Kernels and numerics.
    "apply_rope_fusion masked_softmax_fusion bias_dropout_fusion bias_swiglu_fusion bias_activation_fusion",
    "rotary_embedding_kernel use_fused_rmsnorm use_fused_layer_norm gradient_accumulation_fusion persist_layer_norm",
    "memory_efficient_layer_norm mem_efficient_ln async_tensor_model_parallel_allreduce apply_query_key_layer_scaling",
    "attention_softmax_in_fp32 softmax_in_fp32 fused_softmax flash_decode batch_invariant_mode symmetric_ar_type",
    "disable_parameter_transpose_cache scatter_gather_tensors_in_pipeline batch_p2p_comm batch_p2p_sync",
    "clone_scatter_output_in_embedding deallocate_pipeline_outputs delay_grad_reduce delay_param_gather",
    "align_param_gather align_grad_reduce barrier_with_L1_time microbatch_group_size_per_vp_stage use_te_rng_tracker",
    "perform_initialization check_for_nan_in_loss_and_grad check_for_spiky_loss check_for_large_grads",
    "create_attention_mask_in_dataloader mmap_bin_files use_one_sent_docs reset_iteration tp_only_amax_red",
    "first_last_layers_bf16 num_layers_at_start_in_bf16 num_layers_at_end_in_bf16 quant_recipe use_kitchen",
    "use_kitchen_attention hetereogenous_dist_checkpoint mlp_chunks_for_prefill qk_clip autocast_dtype",
    "enable_autocast pipeline_dtype hybrid_context_parallel max_seqlen_per_dp_cp_rank timers",
    "num_microbatches_with_partial_activation_checkpoints pipeline_model_parallel_comm_backend mtp_standalone",
    "ep_overlap_early_attn_memory_release use_mamba_mem_eff_path use_inference_optimized_layers",
    "num_layers_in_first_pipeline_stage num_layers_in_last_pipeline_stage num_layers_per_virtual_pipeline_stage",
    "use_pytorch_profiler use_legacy_models use_mcore_models use_fused_weighted_squared_relu add_encoder add_decoder",
    "encoder_tensor_model_parallel_size encoder_pipeline_model_parallel_size enable_gloo_process_groups",
    "enable_one_logger enable_ft_package calc_ft_timeouts async_save async_strategy use_persistent_ckpt_worker",
    "use_tokenizer_model_from_checkpoint_args use_mp_args_from_checkpoint_args mid_level_dataset_surplus",
    "allow_ambiguous_pad_tokens split_transformers scattered_embeddings return_data_index num_classes num_channels",
    "patch_dim patch_size classes_fraction mask_type mask_factor iter_per_epoch hidden_size_teacher",
    "num_layers_teacher num_attention_heads_teacher kd mos create_moe_param_group compression_training",
    "custom_token_counting enable_expert_tensor_parallelism kill_switch_file abort_on_unmet_fused_kernel_constraints",
    "use_prune_config use_dataset_only use_wandb embedding_init_method_std init_method output_layer_init_method",
    "embedding_init_method embedding_path titles_data_path evidence_data_path block_data_path indexer_batch_size",
    "indexer_log_interval beta match query_in_block_prob output_bert_embeddings deepspeed deepscale remote_device",
    "force_ds_sequence_parallel ds_sequence_parallel_size ds_fused_adam universal_checkpoint use_cpu_initialization",
    "lazy_mpu_init DDP_impl enable_zbh1_pipeline enable_zbh1_exact_semantics",
    "no_pipeline_parallel pad_vocab_size_to norm_target_loss inference",
    "loss_on_targets_only reweight_loss_based_on_position_frequency context_parallel_size use_megatron_fsdp",
    "hierarchical_context_parallel_sizes use_torch_fsdp2 use_custom_fsdp use_checkpoint_args decoupled_lr",
    "decoupled_min_lr enable_chunked_prefill bitfit num_distributed_optimizer_instances outer_dp_sharding_strategy",
    "pipeline_model_parallel_layout pipeline_model_parallel_split_rank use_gigatoken activation_offload_fraction",
    "delta_offload_bytes_across_pp_ranks dump_param_to_param_group_map fine_grained_activation_offloading",
    "fine_grained_offloading_max_inflight_offloads min_offloaded_tensor_size offload_modules sft prepend_space",
    "reuse_grad_buf_for_mxfp8_param_ag suggested_communication_unit_size tensor_parallel_num_weight_shards",
    "use_tp_pp_dp_mapping no_weight_decay_cond_type cpu_optimizer cpu_torch_adam use_pin_memory noise_density",
    "mean_noise_span_length cache_dir freeze_lm fp8 fp4 init_method_xavier_uniform per_split_data_args_path",
    "microbatch_group_size_per_virtual_pipeline_stage",
)
"""Further args that are not of the model: derived values, kernels, and other programs' training."""

DEEPSPEED_CONFIGS = ("deepspeed_config_dict", "deepspeed_configuration")
"""Args in which Megatron-DeepSpeed keeps a DeepSpeed config."""
DEEPSPEED_HARMLESS = _names(
    "train_batch_size train_micro_batch_size_per_gpu gradient_accumulation_steps steps_per_print optimizer scheduler",
    "fp16 bf16 bfloat16 amp torch_autocast gradient_clipping zero_optimization zero_allow_untested_optimizer",
    "zero_force_ds_cpu_optimizer zero_optimization_stage wall_clock_breakdown dump_state memory_breakdown",
    "prescale_gradients gradient_predivide_factor communication_data_type seq_parallel_communication_data_type",
    "sparse_gradients disable_allgather activation_checkpointing data_types flops_profiler tensorboard csv_monitor",
    "wandb comet comms_logger monitor_config pipeline aio checkpoint load_universal elastic_checkpoint elasticity",
    "autotuning nebula hybrid_engine data_efficiency curriculum_learning dataloader_drop_last use_data_before_expert",
    "data_parallel_size tensor_parallel sequence_parallel_size graph_harvesting compile use_node_local_storage",
    "timers eigenvalue progressive_layer_drop gradient_accumulation_dtype local_rank vocabulary_size version",
    "zenflow weight_quantization fp16_master_weights_and_gradients mesh_device",
)
"""Keys of a DeepSpeed config that are of training: progressive layer drop and curricula end with it."""
DEEPSPEED_UNSUPPORTED = {
    "compression_training": "quantized or pruned weights",
    "quantize_training": "quantized weights",
    "sparse_attention": "sparse attention",
    "moe": "mixture of experts",
}


def judge_arguments(arguments: Mapping[str, Any], where: str, ignored: Collection[str] = ()) -> None:
    """Refuse args that change what the model computes and are not supported, or are unknown.

    Args:
        arguments: by name.
        where: the file, for messages.
        ignored: unknown args that the user allows to be ignored.

    Raises:
        CheckpointError: naming the args and their values.
    """
    for name, (allowed, meaning) in UNSUPPORTED.items():
        value = arguments.get(name)
        if not _is_among(value, (None, *allowed)):
            raise unsupported(where, name, value, f"there is no support for {meaning}")
    _refuse_unknown(
        {name: value for name, value in arguments.items() if not _is_known(name) and not _is_among(value, _OFF)},
        where,
        ignored,
    )


def judge_deepspeed_config(config: Any, where: str, ignored: Collection[str] = ()) -> None:
    """Refuse the keys of a DeepSpeed config that change what the model computes, or are unknown.

    Raises:
        CheckpointError: naming the keys and their values.
    """
    if not isinstance(config, Mapping):
        return
    for name, meaning in DEEPSPEED_UNSUPPORTED.items():
        if _asks_for_something(config.get(name)):
            raise unsupported(where, f"ds_config.{name}", config[name], f"there is no support for {meaning}")
    known = DEEPSPEED_HARMLESS | DEEPSPEED_UNSUPPORTED.keys()
    unknown = {name: value for name, value in config.items() if name not in known and _asks_for_something(value)}
    _refuse_unknown(unknown, where, ignored)


def unsupported(where: str, name: str, value: Any, because: str) -> CheckpointError:
    """Return the error for a setting that changes the function and is not supported."""
    return CheckpointError(
        f"{where} has {name}={value!r}: {because}",
        fix="Import a model that was trained without this setting: the outputs of this one would be wrong",
    )


def _is_known(name: str) -> bool:
    # --spec has no effect here, but it names the code that built the layers of a foreign model.
    return name != "spec" and (
        name in USED
        or name in UNSUPPORTED
        or name in _CONDITIONAL_NAMES
        or name in HARMLESS_NAMES
        or name.startswith((*CONDITIONAL, *HARMLESS_PREFIXES))
        or name.lower() in _flags_of_training()
    )


@cache
def _flags_of_training() -> frozenset[str]:
    """Return the args of every accepted flag of the project's table that is not of the model, also without `no_`."""
    names: set[str] = set()
    for spelled, flag in flags_by_spelling().items():
        if flag.status != "refused" and not (isinstance(flag, Flag) and flag.key[0] == "model"):
            names.update(_destinations(spelled))
    return frozenset(names)


def _destinations(flag: str) -> Iterator[str]:
    """Yield the args that a flag may set: argparse's name, and that of what `--no-` or `--disable-` turns off."""
    name = flag.removeprefix("--").replace("-", "_")
    yield name
    for prefix in ("no_", "disable_"):
        if name.startswith(prefix):
            yield name.removeprefix(prefix)


def _is_among(value: Any, allowed: Collection[Any]) -> bool:
    """Return whether a value equals one of several of its kind: 1 is not True, but 0 is 0.0."""
    return any(
        value is other or (isinstance(value, bool) is isinstance(other, bool) and value == other) for other in allowed
    )


def _asks_for_something(value: Any) -> bool:
    """Return whether a DeepSpeed key turns a feature on; sections have an `enabled`."""
    if isinstance(value, Mapping):
        if "enabled" in value:
            return bool(value["enabled"])
        return any(_asks_for_something(inner) for inner in value.values())
    return not _is_among(value, _OFF)


def _refuse_unknown(found: Mapping[str, Any], where: str, ignored: Collection[str]) -> None:
    left = {name: value for name, value in sorted(found.items()) if name not in ignored}
    if left:
        raise CheckpointError(
            f"{where} has settings that this importer does not know: "
            f"{', '.join(f'{name}={value!r}' for name, value in left.items())}",
            rule="An unknown setting may change what the model computes",
            fix=f"If these settings do not change the model's outputs, add --ignore-config-keys {' '.join(left)}; "
            "otherwise import a model that was trained without them",
        )
