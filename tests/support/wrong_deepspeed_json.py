"""Wrong DeepSpeed configurations (JSON), each with the beginning of its error."""

FROM_JSON = {
    '{"a": 1_000}': "ds.json (--deepspeed_config) is not valid JSON: Expecting ',' delimiter: line 1 column 8",
    '{"curriculum_learning": {"enabled": true}}': "curriculum_learning.min_difficulty is missing in the DeepSpeed JSON",
    "[]": "ds.json (--deepspeed_config) is [] instead of a JSON object. Write, for example",
    '{"scheduler": {"type": "WarmupLR"}}': "scheduler in the DeepSpeed JSON is not supported. Remove",
    '{"optimizer": {"type": "Lamb"}}': 'optimizer.type in the DeepSpeed JSON is "Lamb". Write "type": "Adam", "AdamW"',
    '{"optimizer": {"type": "Adam", "params": {"betas": 0.9}}}': (
        "optimizer.params.betas in the DeepSpeed JSON is 0.9 instead of two numbers of at least 0 and less than 1."
    ),
    '{"optimizer": {"type": "Adam", "params": {"lrr": 1}}}': (
        "Unknown entry optimizer.params.lrr in the DeepSpeed JSON. Did you mean optimizer.params.lr?"
    ),
    '{"optimizer": {"type": "Adam", "params": {"adam_w_mode": false}}}': (
        "optimizer.params.adam_w_mode in the DeepSpeed JSON is false, and the optimizer here has true. Write"
    ),
    '{"optimizer": {"type": "SGD", "params": {"betas": [0.1, 0.2]}}}': (
        "optimizer.params.betas in the DeepSpeed JSON does not apply to SGD. Remove the entry"
    ),
    '{"optimizer": "Adam"}': 'optimizer in the DeepSpeed JSON is "Adam" instead of an object. Write, for example, '
    '"optimizer": {"type": "Adam"}',
    '{"fp16": {"enabled": "false"}}': 'fp16.enabled in the DeepSpeed JSON is "false" instead of true or false. Write',
    '{"zero_optimization": {"stage": 2, "cpu_offload": "no"}}': (
        'zero_optimization.cpu_offload in the DeepSpeed JSON is "no" instead of true or false'
    ),
    '{"zero_optimization": {"stage": 2, "cpu_offload": true, "offload_optimizer": {"device": "none"}}}': (
        "zero_optimization.cpu_offload and zero_optimization.offload_optimizer are both in the DeepSpeed JSON. They"
    ),
    '{"zero_optimization": {"stage": 3}, "zero_optimization": {"stage": 1}}': (
        'ds.json (--deepspeed_config) has the entry "zero_optimization" more than once. Leave one of them in'
    ),
    '{"bf16": {"enabled": false, "immediate_grad_updates": true}}': (
        "Unknown entry bf16.immediate_grad_updates in the DeepSpeed JSON. Did you mean bf16.immediate_grad_update?"
    ),
    '{"zero_optimization": {"stage": 4}}': (
        "zero_optimization.stage in the DeepSpeed JSON is 4 instead of a whole number from 0 to 3. Write"
    ),
    '{"zero_optimization": {"stage": 1, "reduce_buckets": 4}}': (
        "Unknown entry zero_optimization.reduce_buckets in the DeepSpeed JSON."
    ),
    '{"zero_optimization": {"stage": 3, "overlap_comm": 1}}': (
        "zero_optimization.overlap_comm in the DeepSpeed JSON is 1 instead of true or false. Write "
        '"overlap_comm": true or false'
    ),
    '{"zero_optimization": {"stage": 3, "zenflow": {"topk_ratio": 1}}}': (
        "zero_optimization.zenflow in the DeepSpeed JSON is not supported. Remove the entry: it updates"
    ),
    '{"zero_optimization": {"stage": 2, "offload_param": {"device": "cpu"}}}': (
        "zero_optimization.offload_param in the DeepSpeed JSON needs ZeRO stage 3 or more, and the stage is 2. Use"
    ),
    '{"zero_optimization": {"stage": 3, "offload_param": {"device": "disk"}}}': (
        'zero_optimization.offload_param.device in the DeepSpeed JSON is "disk" instead of "cpu", "nvme" or "none". '
    ),
    '{"zero_optimization": {"stage": 3, "offload_optimizer": {"device": "nvme"}}}': (
        'zero_optimization.offload_optimizer.device in the DeepSpeed JSON is "nvme", and nvme_path is missing. Add'
    ),
    '{"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "nvme", "nvme_path": "/n"}}}': (
        "zero_optimization.offload_optimizer in the DeepSpeed JSON has device nvme, and the stage is 2. DeepSpeed"
    ),
    '{"zero_optimization": {"stage": 3, "offload_optimizer": {"device": "nvme", "nvme_path": "/n", "buffer_count": 4, '
    '"pipeline_read": true}}}': (
        "zero_optimization.offload_optimizer.buffer_count in the DeepSpeed JSON is 4, and a step needs 8. Main param"
    ),
    '{"zero_optimization": {"stage": 3, "offload_optimizer": {"device": "nvme", "nvme_path": "/n", '
    '"fast_init": true}}}': (
        "zero_optimization.offload_optimizer.fast_init in the DeepSpeed JSON is true. It reads parameters to addresses"
    ),
    '{"aio": {"use_gds": true}, "zero_optimization": {"stage": 3, "offload_param": {"device": "nvme", "nvme_path": '
    '"/n"}}}': "aio.use_gds in the DeepSpeed JSON is true. Swap files are read into the host's memory",
    '{"aio": {"block_size": 5000}, "zero_optimization": {"stage": 3, "offload_param": {"device": "nvme", "nvme_path": '
    '"/n"}}}': "aio.block_size in the DeepSpeed JSON is 5000. Direct I/O needs a multiple of 4096 bytes. Write",
    '{"zero_force_ds_cpu_optimizer": true, "zero_optimization": {"stage": 2}}': (
        "zero_force_ds_cpu_optimizer in the DeepSpeed JSON is not supported. Remove the entry: torch"
    ),
    '{"gradient_cliping": 1.0}': "Unknown entry gradient_cliping in the DeepSpeed JSON. Did you mean",
    '{"fp16": {"enabled": true, "hystereses": 2}}': (
        "Unknown entry fp16.hystereses in the DeepSpeed JSON. Did you mean"
    ),
    '{"fp16": true}': 'fp16 in the DeepSpeed JSON is true instead of an object. Write, for example, "fp16": {',
    '{"gradient_clipping": "1"}': 'gradient_clipping in the DeepSpeed JSON is "1" instead of a number of at least 0. W',
    '{"gradient_clipping": NaN}': "gradient_clipping in the DeepSpeed JSON is NaN instead of a number of at least 0.",
    f'{{"gradient_clipping": 1{"0" * 400}}}': "gradient_clipping in the DeepSpeed JSON is 1000",
    '{"gradient_clipping": 1e999}': "gradient_clipping in the DeepSpeed JSON is Infinity instead of a number of",
    '{"fp16": {"enabled": true, "hysteresis": 1.5}}': (
        "fp16.hysteresis in the DeepSpeed JSON is 1.5 instead of a whole"
    ),
    '{"fp16": {"enabled": true, "initial_scale_power": 999}}': (
        "fp16.initial_scale_power in the DeepSpeed JSON is 999 instead of a number from -126 to 126."
    ),
    "[" * 5000: "ds.json (--deepspeed_config) is nested too deeply to be read as JSON.",
    '{"fp16": {"enabled": true}, "bf16": {"enabled": true}}': (
        "fp16.enabled and bf16.enabled are both true in the DeepSpeed JSON."
    ),
    '{"bf16": {"enabled": true}}': "The command line and the DeepSpeed JSON contradict each other: --fp16 and",
    '{"fp16": {"enabled": false}}': "The command line and the DeepSpeed JSON contradict each other: --fp16 and",
    '{"gradient_clipping": 0.5}': "--clip-grad 2 and gradient_clipping 0.5",
    '{"train_micro_batch_size_per_gpu": 4}': "--micro-batch-size 2 and train_micro_batch_size_per_gpu 4",
    '{"curriculum_learning": {"enabled": true, "curriculum_type": "vocab"}}': (
        "curriculum_learning in the DeepSpeed JSON has curriculum_type vocab"
    ),
    '{"curriculum_learning": {"enabled": true, "max_difficulty": 64, "min_difficulty": 8, "schedule_config": '
    '{"total_curriculum_step": 10}}}': "--seq-length 32 and curriculum_learning.max_difficulty 64",
    '{"curriculum_learning": {"enabled": true, "schedule_type": "fixed_discrete", "schedule_config": '
    '{"difficulty": [8], "max_step": [5]}}}': "curriculum_learning in the DeepSpeed JSON has difficulty [8] and",
    '{"curriculum_learning": {"enabled": true, "min_difficulty": 8, "schedule_config": {"difficulty_step": "8"}}}': (
        'schedule_config.difficulty_step in the DeepSpeed JSON is "8" instead of a whole number of at least 1. Write it'
    ),
    '{"zero_optimization": {"stage": 3, "reduce_bucket_size": 0}}': (
        "zero_optimization.reduce_bucket_size in the DeepSpeed JSON is 0 instead of a whole number of at least 1. "
        'Write, for example, "reduce_bucket_size": 500000000 (DeepSpeed\'s default), or remove the entry'
    ),
    '{"zero_optimization": {"stage": 3, "sub_group_size": -5}}': (
        "zero_optimization.sub_group_size in the DeepSpeed JSON is -5 instead of a whole number of at least 0."
    ),
    '{"zero_optimization": {"stage": 3, "offload_optimizer": {"device": "cpu", "ratio": 7}}}': (
        "zero_optimization.offload_optimizer.ratio in the DeepSpeed JSON is 7 instead of a number from 0 to 1."
    ),
    '{"zero_optimization": {"stage": 3, "offload_optimizer": {"device": "cpu", "super_offload": true}}}': (
        "zero_optimization.offload_optimizer.super_offload in the DeepSpeed JSON is not supported. Remove"
    ),
    '{"zero_optimization": {"stage": 3, "offload_optimizer": {"device": "cpu", "pinmemory": false}}}': (
        "Unknown entry zero_optimization.offload_optimizer.pinmemory in the DeepSpeed JSON. Did you mean "
        "zero_optimization.offload_optimizer.pin_memory?"
    ),
    '{"zero_optimization": {"stage": 3, "offload_param": "cpu"}}': (
        'zero_optimization.offload_param in the DeepSpeed JSON is "cpu" instead of an object. Write, for example, '
        '"offload_param": {"device": "cpu"}'
    ),
    '{"wall_clock_breakdown": "yes"}': 'wall_clock_breakdown in the DeepSpeed JSON is "yes" instead of true or false.',
    '{"communication_data_type": "fp99"}': (
        'communication_data_type in the DeepSpeed JSON is "fp99" instead of "fp32", "bf16" or "fp16". Write'
    ),
    '{"data_types": {"grad_accum_dtype": "fp99"}}': (
        'data_types.grad_accum_dtype in the DeepSpeed JSON is "fp99" instead of "fp32", "bf16" or "fp16". Write'
    ),
    '{"data_types": {"grad": "fp32"}}': "Unknown entry data_types.grad in the DeepSpeed JSON. Remove the entry",
    '{"comms_logger": {"prof_ops": "all_reduce"}}': (
        'comms_logger.prof_ops in the DeepSpeed JSON is "all_reduce" instead of a list of strings. Write'
    ),
    '{"comms_logger": {"enable": true}}': (
        "Unknown entry comms_logger.enable in the DeepSpeed JSON. Did you mean comms_logger.enabled?"
    ),
    '{"fp16": {"enabled": true, "auto_cast": true}}': "fp16.auto_cast in the DeepSpeed JSON is not supported. Remove",
    '{"optimizer": {"type": "Adam", "param": {}}}': (
        "Unknown entry optimizer.param in the DeepSpeed JSON. Did you mean optimizer.params?"
    ),
    '{"optimizer": {"params": {}}}': 'optimizer.type in the DeepSpeed JSON is missing. Write "type": "Adam", ',
    '{"optimizer": {"type": "Adam", "params": {"lr": null}}}': (
        "optimizer.params.lr in the DeepSpeed JSON is null instead of a number of at least 0. Write, for example, "
        '"lr": 0.0001, or remove the entry to use --lr'
    ),
    '{"zero_optimization": true}': (
        "zero_optimization in the DeepSpeed JSON is true instead of an object. Write, for example, "
        '"zero_optimization": {"stage": 1}'
    ),
    '{"": 1}': 'Unknown entry "" in the DeepSpeed JSON. Remove the entry',
    '{"zero_optimization": {"stage": 3}, "prescale_gradients": true, "gradient_predivide_factor": 2}': (
        "The DeepSpeed engine cannot run prescale_gradients true with reduce_scatter. ZeRO stages 2 and 3 divide"
    ),
    '{"zero_optimization": {"stage": 2}, "data_types": {"grad_accum_dtype": "bf16"}}': (
        'The DeepSpeed engine cannot run data_types.grad_accum_dtype "bf16" with parameters in fp16 and ZeRO stage 2.'
    ),
    '{"zero_optimization": {"stage": 2, "allgather_bucket_size": 7}}': (
        "The DeepSpeed engine cannot run zero_optimization.allgather_bucket_size 7. ZeRO stages 1 and 2 gather an even"
    ),
    '{"zero_optimization": {"stage": 3, "offload_optimizer": {"device": "cpu", "ratio": 0.5}}}': (
        "The DeepSpeed engine cannot run zero_optimization.offload_optimizer.ratio 0.5. A part of the state is"
    ),
}
