"""Megatron flags that are refused, each with the reason and an alternative; refused families by prefix."""

from __future__ import annotations

from megatron_lite.config.flags.flag import refused

_MOE = "Mixture of experts is not built here: every layer has one dense MLP. Leave the flag out"
_INFERENCE = "The trainer serves no requests. Use `megatron-lite generate`"
_FP8 = "fp8 and fp4 are not built here. Use --bf16"
_FSDP = "Parameters are not sharded over replicas here. Use --use-distributed-optimizer (ZeRO-1)"
_MLA = "Latent attention is not built here. Use --group-query-attention"
_MUP = (
    "muP's multipliers are not built here, and without them the learning rate would mean something else. "
    "Choose --lr and --init-method-std for this width"
)
_MTP = "Multi-token prediction is not built here. Leave the flag out"
_ROPE = "YaRN and Llama 3's rescaling are not built here. Use --rotary-seq-len-interpolation-factor"
_ACTIVATION = "This activation is not built here. Use --activation"
_SHARDS = "A weight is split over the tensor-parallel ranks only. Use --tensor-model-parallel-size"
_OFFLOAD = "Nothing is offloaded to the CPU here. Use --checkpoint-activations, or more ranks"
_FINETUNE = "Training on prompts and targets is not built here: every token counts. Leave the flag out"
_HYBRID = "Only transformer layers are built here. Leave the flag out"
_OTHER_MODEL = "It belongs to another model (BERT, T5, retrieval, vision). Leave the flag out"

_TABLES = "Sinusoidal and relative positions are not built here. Use --position-embedding-type learned, rotary or alibi"
_OLD_DATA = (
    "Text is made into a dataset before training. Use tools/preprocess_data.py, then --data-path PREFIX and --split"
)

ARCHITECTURE = (
    *refused(_MOE, "--expert-model-parallel-size --expert-tensor-parallel-size", harmless=("1",)),
    *refused(_MOE, "--num-experts --expert-tensor-parallel-num-weight-shards --mlp-type --topk"),
    *refused(
        _MOE,
        "--moe-router-topk --moe-router-load-balancing-type --moe-router-dtype --moe-aux-loss-coeff",
        "--moe-grouped-gemm --moe-token-dispatcher-type --moe-ffn-hidden-size --moe-permute-fusion",
        "--moe-flex-dispatcher-backend --moe-shared-expert-intermediate-size --moe-router-score-function",
        "--moe-z-loss-coeff --moe-layer-freq --moe-per-layer-logging --moe-router-bias-update-rate",
        "--moe-router-enable-expert-bias --moe-router-force-load-balancing --moe-router-group-topk",
        "--moe-router-num-groups --moe-router-pre-softmax --moe-router-topk-scaling-factor",
        "--moe-expert-rank-capacity-factor --moe-paged-stash --moe-latent-size",
        "--moe-paged-stash-buffer-size-factor-cpu --moe-paged-stash-buffer-size-factor-cuda",
        "--moe-paged-stash-page-size",
    ),
    *refused(
        _MLA,
        "--multi-latent-attention --kv-lora-rank --q-lora-rank --qk-head-dim --qk-pos-emb-head-dim",
        "--v-head-dim --mscale --mscale-all-dim --rotary-scaling-factor",
    ),
    *refused(_ROPE, "--rope-type", harmless=("rope",)),
    *refused(_ROPE, "--use-rope-scaling --rope-scaling-factor"),
    *refused(
        "Attention reaches the whole sequence here. Leave the flag out",
        "--window-size --window-attn-skip-freq --attention-chunk-size",
    ),
    *refused(
        "Attention has the plain softmax here. Leave the flag out",
        "--softmax-type",
        harmless=("vanilla",),
    ),
    *refused(_ACTIVATION, "--glu-linear-offset", harmless=("0", "0.0")),
    *refused(_ACTIVATION, "--quick-geglu --onnx-safe --activation-func-clamp-value"),
    *refused(
        "A gated MLP's width follows --ffn-hidden-size here, not --hidden-size alone. Use --activation geglu and it",
        "--geglu",
    ),
    *refused(_TABLES, "--sinusoidal-pos-emb --rpe-num-buckets --rpe-max-distance"),
    *refused("Only LayerNorm and RMSNorm are built here. Use --normalization", "--scalenorm-epsilon"),
    *refused("Attention is dense here. Leave the flag out", "--sparsity", harmless=("none",)),
    *refused("No layers share their weights here. Leave the flag out", "--num-unique-layers"),
    *refused("No layers share their weights here. Leave the flag out", "--param-sharing-style", harmless=("grouped",)),
    *refused(_HYBRID, "--hybrid-layer-pattern", "--hybrid-attention-ratio", "--hybrid-mlp-ratio", "--is-hybrid-model"),
    *refused(_MTP, "--mtp-num-layers", harmless=("0",)),
    *refused(_MTP, "--mtp-loss-scaling-factor --mtp-use-repeated-layer"),
    *refused(
        "Weights start at N(0, --init-method-std) here. Leave the flag out",
        "--init-method-xavier-uniform --embedding-init-method-std --init-method",
    ),
    *refused(_MUP, "--mup", "--use-mup", "--mup-input-mult", "--mup-output-mult", "--mup-attn-mult"),
    *refused(
        _OTHER_MODEL,
        "--decoder-seq-length --decoder-num-layers --retriever-seq-length --mask-prob --short-seq-prob",
        "--sample-rate --bert-no-binary-head --noise-density --mean-noise-span-length --img-dim --patch-dim",
        "--num-classes --num-channels --ict-head-size --ict-load --bert-load --titles-data-path",
        "--evidence-data-path --block-data-path --embedding-path",
    ),
)

PARALLELISM = (
    *refused(
        "The sequence is split by --sequence-parallel only. Use it, with --tensor-model-parallel-size",
        "--context-parallel-size --hierarchical-context-parallel-sizes --ds-sequence-parallel-size",
        harmless=("1",),
    ),
    *refused(_FSDP, "--data-parallel-sharding-strategy --outer-dp-sharding-strategy", harmless=("no_shard",)),
    *refused(_FSDP, "--num-distributed-optimizer-instances", harmless=("1",)),
    *refused(
        _FSDP,
        "--use-megatron-fsdp --use-torch-fsdp2 --use-custom-fsdp --fsdp-double-buffer",
        "--fsdp-manual-registration --megatron-fsdp-grad-comm-dtype --megatron-fsdp-main-grads-dtype",
        "--megatron-fsdp-main-params-dtype --megatron-fsdp-max-pool-double-buffer",
        "--suggested-communication-unit-size",
    ),
    *refused(_SHARDS, "--tensor-parallel-num-weight-shards", harmless=("1",)),
    *refused(
        _SHARDS,
        "--gtp-remat-nccl-ub --gtp-expert-remat-nccl-ub --gtp-remat-opt-in-modules",
        "--gtp-remat-reduce-scatter-with-fp32-accumulation",
    ),
    *refused(
        "Layers are dealt out by number. Use --pp-partition-method, or --decoder-first-pipeline-num-layers and -last-",
        "--pipeline-model-parallel-layout --pipeline-model-parallel-split-rank --standalone-embedding-stage",
    ),
    *refused(
        "Ranks are numbered tensor, data, pipeline (fastest first). Leave the flag out",
        "--use-tp-pp-dp-mapping --microbatch-group-size-per-virtual-pipeline-stage",
    ),
    *refused(
        _OFFLOAD,
        "--cpu-optimizer --cpu-torch-adam --remote-device --use-pin-memory --optimizer-cpu-offload",
        "--optimizer-offload-fraction --cpu-offloading-num-layers --fine-grained-activation-offloading",
        "--fine-grained-offloading-max-inflight-offloads --activation-offload-fraction --offload-modules",
        "--min-offloaded-tensor-size --delta-offload-bytes-across-pp-ranks",
    ),
    *refused(
        _FP8,
        "--fp8-format --fp8-recipe --fp8-amax-compute-algo --fp8-amax-history-len --fp8-param-gather",
        "--fp4-format --fp4-param-gather --reuse-grad-buf-for-mxfp8-param-ag",
    ),
)

TRAINING = (
    *refused(
        "All parameters share one learning rate. Leave the flag out",
        "--decoupled-lr --decoupled-min-lr --dump-param-to-param-group-map --no-weight-decay-cond-type",
    ),
    *refused(
        "Only the core of attention can be recomputed on its own. Use --recompute-granularity selective or full",
        "--recompute-modules",
        harmless=("core_attn",),
    ),
    *refused(
        _FINETUNE,
        "--norm-target-loss --loss-on-targets-only --reweight-loss-based-on-position-frequency --sft",
        "--fim-data",
    ),
    *refused(
        "Nothing is run wrong on purpose. Leave the flag out",
        "--error-injection-rate --error-injection-type",
        harmless=("0", "0.0", "transient_error"),
    ),
    *refused(
        "There is one kind of checkpoint. Use --save-schedule and --keep-last",
        "--non-persistent-save-interval --non-persistent-ckpt-type --non-persistent-global-ckpt-dir",
        "--non-persistent-local-ckpt-dir --non-persistent-local-ckpt-algo",
    ),
    *refused(
        "A run saves and stops on SIGTERM, SIGINT and SIGUSR1, whichever comes. Send one of them",
        "--exit-signal",
        harmless=("sigterm", "sigint", "sigusr1"),
    ),
    *refused("The optimizers here are AdamW and SGD. Use --optimizer", "--onebitadam --sm3 --no-adamw --momentum"),
    *refused(
        "The learning rate ends at a rate, not at a share of --lr. Use --min-lr (--lr x the ratio)", "--lr-decay-ratio"
    ),
    *refused("A run's length is counted in iterations or samples. Use --train-iters or --train-samples", "--epochs"),
    *refused(
        "A batch is given for a replica and for all of them. Use --micro-batch-size and --global-batch-size",
        "--train-batch-size",
    ),
    *refused("All parameters are trained. Leave the flag out", "--bitfit", "--no-train", "--freeze-lm"),
    *refused(
        "A run is what its command line says. Pass the model's flags; `megatron-lite checkpoint inspect` shows them",
        "--use-checkpoint-args",
    ),
    *refused(
        "A run starts from one checkpoint. Use --load FOLDER --finetune",
        "--pretrained-checkpoint",
    ),
)

DATA = (
    *refused(
        _OLD_DATA,
        "--train-data --valid-data --test-data --lazy-loader --loose-json --presplit-sentences --text-key",
        "--eval-text-key --delim --use-tfrecords --input-data-sizes-file",
    ),
    *refused(
        "Validation has the sequences and batches of training. Leave the flag out",
        "--eval-batch-size --eval-seq-length --eval-max-preds-per-seq",
    ),
    *refused(
        "A tokenizer is given by its kind and its files. Use --tokenizer-type with --vocab-file and --merge-file, or "
        "with --tokenizer-model",
        "--tokenizer-path --tokenizer-model-type --cache-dir",
    ),
    *refused(
        "Each dataset is asked for 0.5% more samples than its share of the blend. Leave the flag out",
        "--mid-level-dataset-surplus",
        harmless=("0.005",),
    ),
    *refused(
        "Validation reads --eval-iters batches of each set. Use --valid-weighted-split-paths for several sets",
        "--full-validation --multiple-validation-sets --eval-global-batch-size --eval-micro-batch-size",
    ),
    *refused("Data lie in files. Copy them to this machine", "--object-storage-cache-path"),
    *refused(
        "Only memory-mapped datasets (MMIDIDX) are read. Convert older ones with tools/preprocess_data.py",
        "--data-impl --dataset-impl",
        harmless=("mmap", "infer"),
    ),
    *refused(
        "A file of blends per split is not read. Use --train-data-path, --valid-data-path and --test-data-path",
        "--per-split-data-args-path",
    ),
    *refused(
        "This tokenizer is not built here. Use --tokenizer-type HuggingFaceTokenizer with its tokenizer.json",
        "--tokenizer-library --tiktoken-pattern --tiktoken-num-special-tokens --tiktoken-special-tokens",
        "--use-gigatoken",
    ),
)

OTHER_PROGRAMS = (
    *refused(
        "It belongs to tools/preprocess_data.py and tools/merge_datasets.py, not to training. Give it to them",
        "--input --output-prefix --json-keys --json-key --append-eod --append-bos --prepend-space --workers",
        "--datasets --split-sentences --keep-newlines --scratch --partitions --find-optimal-num-workers",
        "--workers-to-check --max-documents --keep-sequential-samples",
    ),
    *refused(
        "It belongs to an evaluation script, not to training. Use --skip-train to measure the loss",
        "--task-list --adaptive-seq-len --results-path --intermed-results --micro-bs-multiplier --eval-fp32",
        "--bootstrap-iters",
    ),
    *refused(
        _INFERENCE,
        "--inference --inference-max-seq-length --inference-logging-step-interval",
        "--inference-dynamic-batching-buffer-size-gb --inference-dynamic-batching-max-requests",
        "--inference-dynamic-batching-max-tokens --inference-dynamic-batching-prefix-caching",
        "--inference-dynamic-batching-num-cuda-graphs",
        "--inference-dynamic-batching-prefix-caching-eviction-policy --inference-dynamic-batching-block-size",
        "--inference-cuda-graph-scope --enable-chunked-prefill --max-tokens-to-oom",
    ),
)

REFUSED = {
    "Architecture": ARCHITECTURE,
    "Parallelism and precision": PARALLELISM,
    "Training": TRAINING,
    "Data": DATA,
    "Other programs": OTHER_PROGRAMS,
}

FAMILIES = {
    "--moe-": _MOE,
    "--mtp-": _MTP,
    "--fp8-": _FP8,
    "--fp4-": _FP8,
    "--megatron-fsdp-": _FSDP,
    "--fsdp-": _FSDP,
    "--gtp-": _SHARDS,
    "--mup-": _MUP,
    "--mamba-": _HYBRID,
    "--hybrid-": _HYBRID,
    "--inference-": _INFERENCE,
    "--cpu-offloading-": _OFFLOAD,
    "--retro-": _OTHER_MODEL,
    "--retriever-": _OTHER_MODEL,
    "--biencoder-": _OTHER_MODEL,
    "--vision-": _OTHER_MODEL,
    "--dino-": _OTHER_MODEL,
    "--rl-": _FINETUNE,
    "--grpo-": _FINETUNE,
    "--heterogeneous-": _HYBRID,
    "--linear-attention-": _HYBRID,
}
"""Prefixes whose every flag is refused for the same reason, those not in the table included."""
