"""Wrong DeepSpeed configurations (JSON), each with the beginning of its error."""

FROM_JSON = {
    '{"a": 1_000}': "ds.json (--deepspeed_config) is not valid JSON: Expecting ',' delimiter: line 1 column 8",
    '{"curriculum_learning": {"enabled": true}}': "total_curriculum_step is missing in the DeepSpeed JSON. Add",
    "[]": "ds.json (--deepspeed_config) holds a JSON list instead of an object: '[]'. Write, for example",
    '{"scheduler": {"type": "WarmupLR"}}': 'The "scheduler" section of the DeepSpeed JSON is not supported. Remove',
    '{"optimizer": {"type": "Lamb"}}': 'optimizer.type in the DeepSpeed JSON is "Lamb". Write Adam, AdamW or SGD, or',
    '{"optimizer": {"type": "Adam", "params": {"betas": 0.9}}}': "optimizer.params.betas in the DeepSpeed JSON is 0.9.",
    '{"optimizer": {"type": "Adam", "params": {"lrr": 1}}}': (
        "Unknown entry optimizer.params.lrr in the DeepSpeed JSON. Did you mean optimizer.params.lr?"
    ),
    '{"optimizer": {"type": "Adam", "params": {"adam_w_mode": false}}}': (
        "optimizer.params.adam_w_mode in the DeepSpeed JSON is false, and the optimizer here has true. Write"
    ),
    '{"optimizer": {"type": "SGD", "params": {"betas": [0.1, 0.2]}}}': (
        "Unknown entry optimizer.params.betas in the DeepSpeed JSON"
    ),
    '{"optimizer": "Adam"}': "optimizer in the DeepSpeed JSON is 'Adam' instead of an object. Write, for example, "
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
    '{"zero_optimization": {"stage": 4}}': 'zero_optimization.stage in the DeepSpeed JSON is 4. Write "stage": 0, 1,',
    '{"zero_optimization": {"stage": 1, "reduce_buckets": 4}}': (
        "Unknown entry zero_optimization.reduce_buckets in the DeepSpeed JSON."
    ),
    '{"zero_optimization": {"stage": 3, "overlap_comm": 1}}': (
        "zero_optimization.overlap_comm in the DeepSpeed JSON is 1 instead of true or false. Write, for example, "
        '"overlap_comm": true'
    ),
    '{"zero_optimization": {"stage": 3, "zenflow": {"topk_ratio": 1}}}': (
        "zero_optimization.zenflow in the DeepSpeed JSON is not supported. Remove the entry: it updates"
    ),
    '{"zero_optimization": {"stage": 2, "offload_param": {"device": "cpu"}}}': (
        "zero_optimization.offload_param in the DeepSpeed JSON needs ZeRO stage 3 or more, and the stage is 2. Use"
    ),
    '{"zero_optimization": {"stage": 3, "offload_param": {"device": "disk"}}}': (
        'zero_optimization.offload_param.device in the DeepSpeed JSON is "disk". Write "device": "cpu"'
    ),
    '{"zero_optimization": {"stage": 3, "offload_optimizer": {"device": "nvme", "nvme_path": "/n"}}}': (
        'zero_optimization.offload_optimizer.device "nvme" in the DeepSpeed JSON is not supported. Checkpoints are'
    ),
    '{"zero_force_ds_cpu_optimizer": true, "zero_optimization": {"stage": 2}}': (
        'The "zero_force_ds_cpu_optimizer" section of the DeepSpeed JSON is not supported. Remove the entry: torch'
    ),
    '{"gradient_cliping": 1.0}': "Unknown entry gradient_cliping in the DeepSpeed JSON. Did you mean",
    '{"fp16": {"enabled": true, "hystereses": 2}}': (
        "Unknown entry fp16.hystereses in the DeepSpeed JSON. Did you mean"
    ),
    '{"fp16": true}': 'fp16 in the DeepSpeed JSON is True instead of an object. Write, for example, "fp16": {',
    '{"gradient_clipping": "1"}': 'gradient_clipping in the DeepSpeed JSON is "1" instead of a number. Write it',
    '{"gradient_clipping": NaN}': "gradient_clipping in the DeepSpeed JSON is nan; the limit is 1e+15. Write a",
    '{"gradient_clipping": 1e999}': "gradient_clipping in the DeepSpeed JSON is inf; the limit is 1e+15. Write a",
    '{"fp16": {"enabled": true, "hysteresis": 1.5}}': (
        "fp16.hysteresis in the DeepSpeed JSON is 1.5 instead of a whole"
    ),
    '{"fp16": {"enabled": true, "initial_scale_power": 999}}': (
        "fp16.initial_scale_power in the DeepSpeed JSON is 999, an initial"
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
}
