"""Megatron flags that are accepted without effect, each with the reason."""

from __future__ import annotations

from megatron_lite.config.flags.flag import no_effect

KERNELS = (
    *no_effect(
        "kernels are chosen by PyTorch for what the device offers",
        "--attention-backend --use-flash-attn --use-flash-attn-v1 --use-flash-attn-v2 --use-flash-attn-triton",
        "--transformer-impl --use-transformer-engine-op-fuser --use-fused-weighted-squared-relu",
        "--use-mcore-models --use-legacy-models --spec --enable-experimental",
        "--fused-single-qkv-rope --use-te-activation-func --disable-jit-fuser",
    ),
    *no_effect(
        "--compile fuses what torch.compile can within the layers; the formula is the same, its last bits may differ",
        "--scaled-upper-triang-masked-softmax-fusion --scaled-masked-softmax-fusion --bias-dropout-fusion",
        "--no-masked-softmax-fusion --masked-softmax-fusion --no-bias-dropout-fusion --no-bias-swiglu-fusion",
        "--no-rope-fusion --no-persist-layer-norm --disable-mem-efficient-ln",
        "--abort-on-unmet-fused-kernel-constraints",
    ),
    *no_effect(
        "the loss is computed in one way, in fp32 from all logits, with or without --compile",
        "--cross-entropy-loss-fusion --cross-entropy-fusion-impl --fused-linear-cross-entropy",
    ),
    *no_effect(
        "weight gradients are added to fp32 buffers after each matrix product, in one way",
        "--no-gradient-accumulation-fusion",
    ),
    *no_effect(
        "no CUDA graphs are captured",
        "--cuda-graph-impl --cuda-graph-scope --cuda-graph-modules --cuda-graph-warmup-steps",
        "--enable-cuda-graph --external-cuda-graph --te-rng-tracker --inference-rng-tracker",
        "--decode-only-cuda-graphs --delay-offload-until-cuda-graph",
    ),
)

NUMERICS = (
    *no_effect(
        "softmax, loss and the gradients' sums are always in fp32",
        "--attention-softmax-in-fp32 --accumulate-allreduce-grads-in-fp32 --fp16-lm-cross-entropy",
        "--ddp-reduce-scatter-with-fp32-accumulation",
        "--grad-reduce-in-bf16 --fp32-allreduce",
    ),
    *no_effect(
        "PyTorch's setting for the sums within a bf16 matrix product is kept",
        "--disable-bf16-reduced-precision-matmul",
    ),
    *no_effect(
        "scaling the attention scores by the layer's number cancels out, and softmax is in fp32 anyway",
        "--no-query-key-layer-scaling --apply-query-key-layer-scaling",
    ),
    *no_effect(
        "there is no random state to save or load: dropout follows from the seed and the place where it is drawn",
        "--no-save-rng --no-load-rng",
    ),
    *no_effect(
        "parameters that tensor-parallel ranks share start equal and get the same gradients",
        "--sync-tp-duplicated-parameters",
    ),
    *no_effect(
        "each weight is drawn from the seed and its name on the run's device: equal in any layout, not on CPU and GPU",
        "--use-cpu-initialization --init-model-with-meta-device --lazy-mpu-init --no-initialization",
        "--data-parallel-random-init",
    ),
)

MEMORY = (
    *no_effect(
        "--checkpoint-activations recomputes without it; --sequence-parallel splits what is kept",
        "--deepspeed-activation-checkpointing --distribute-saved-activations",
        "--distribute-checkpointed-activations --partition-activations --contigious-checkpointing",
        "--contiguous-checkpointing --checkpoint-in-cpu --synchronize-each-layer --profile-backward",
        "--scattered-embeddings --split-transformers --memory-centric-tiled-linear --tile-factor",
        "--no-clone-scatter-output-in-embedding",
    ),
    *no_effect(
        "the allocator's cache is left alone, and so is Python's garbage collector",
        "--empty-unused-memory-level --manual-gc --manual-gc-interval --manual-gc-eval --no-manual-gc-eval",
        "--record-memory-history --memory-snapshot-path",
    ),
    *no_effect(
        "the optimizer's moments stay in fp32: more memory than asked for, the same update or a more exact one",
        "--use-bnb-optimizer --use-precision-aware-optimizer --exp-avg-dtype --exp-avg-sq-dtype",
        "--main-grads-dtype --main-params-dtype",
    ),
)

COMMUNICATION = (
    *no_effect(
        "there is one path, with any number of stages",
        "--no-pipeline-parallel --enable-gloo-process-groups --disable-gloo-process-groups",
    ),
    *no_effect("the backend follows from --device", "--distributed-backend", "--use-ring-exchange-p2p"),
    *no_effect(
        "gradients always lie in contiguous buffers of our own",
        "--ddp-impl --use-contiguous-buffers-in-ddp --no-contiguous-buffers-in-local-ddp --ddp-num-buckets",
        "--ddp-average-in-collective --ddp-pad-buckets-for-high-nccl-busbw --use-distributed-data-parallel",
    ),
    *no_effect(
        "what overlaps is fixed: gradient reduction with backward, ZeRO-1's gathers with forward, pipeline sends with "
        "computation and, without --compile, a layer's input gradient with its weight gradient",
        "--no-scatter-gather-tensors-in-pipeline --overlap-p2p-communication --no-overlap-p2p-communication",
        "--overlap-p2p-communication-warmup-flush --no-async-tensor-model-parallel-allreduce",
        "--tp-comm-overlap --tp-comm-overlap-cfg --disable-tp-comm-overlap-ag --disable-tp-comm-overlap-rs",
        "--disable-tp-comm-split-ag --disable-tp-comm-split-rs --disable-tp-comm-bulk-dgrad",
        "--disable-tp-comm-bulk-wgrad --overlap-param-gather-with-optimizer-step --no-align-param-gather",
        "--align-grad-reduce --no-align-grad-reduce --defer-embedding-wgrad-compute --wgrad-deferral-limit",
        "--delay-wgrad-compute --batch-p2p-communication",
    ),
    *no_effect(
        "NCCL keeps its own settings; its environment variables are respected",
        "--use-nccl-ub --nccl-communicator-config-path --high-priority-stream-groups --sharp-enabled-group --use-sharp",
        "--disable-symmetric-registration",
    ),
    *no_effect(
        "one time limit holds all along: --distributed-timeout-minutes", "--distributed-timeout-seconds-after-init"
    ),
    *no_effect("each rank reads the tokenizer's files itself", "--use-tokenizer-broadcast"),
    *no_effect("exit_status.json and the log name the rank that failed first", "--flight-recorder-dump-path"),
    *no_effect(
        "ZeRO-1 has one bucket size, --bucket-megabytes",
        "--zero-reduce-scatter --zero-contigious-gradients --zero-contiguous-gradients",
        "--zero-reduce-bucket-size --zero-allgather-bucket-size",
    ),
    *no_effect(
        "the default --pp-partition-method balanced already counts the head's work",
        "--account-for-embedding-in-pipeline-split --account-for-loss-in-pipeline-split",
    ),
    *no_effect(
        "--deepspeed and --deepspeed_config say it all --deepscale --deepscale-config --deepspeed-mpi",
    ),
    *no_effect("it tunes context parallelism, which is refused where it is asked for", "--cp-comm-type"),
)

FILES = (
    *no_effect(
        "datasets are always memory-mapped .bin/.idx pairs",
        "--mmap-warmup --no-mmap-bin-files --no-create-attention-mask-in-dataloader",
        "--dataloader-defer-npy-index-mmap --dataloader-fast-cache-load --per-dataset-sequences-path",
        "--num-dataset-builder-threads",
    ),
    *no_effect(
        "one thread reads ahead; see --prefetch-microbatches",
        "--num-workers --valid-num-workers --dataloader-prefetch-factor --pin-memory",
    ),
    *no_effect("every run continues its data where its checkpoint stopped", "--resume-dataloader"),
    *no_effect("the order of the data never depends on the layout", "--data-sharding --no-data-sharding"),
    *no_effect(
        "there is one checkpoint format, complete, strictly checked and readable by any layout",
        "--ckpt-format --use-dist-ckpt --dist-ckpt-format --dist-ckpt-strictness",
        "--dist-ckpt-optim-fully-reshardable --dist-ckpt-save-pre-mcore-014 --dist-ckpt-workers",
        "--auto-detect-ckpt-format --universal-checkpoint --ckpt-convert-format --ckpt-fully-parallel-save",
        "--no-ckpt-fully-parallel-save --ckpt-fully-parallel-load --ckpt-assume-constant-structure",
        "--use-persistent-ckpt-worker --async-strategy --strict-fsdp-dtensor-load",
        "--no-use-tokenizer-model-from-checkpoint-args --use-tokenizer-model-from-checkpoint-args",
        "--no-use-mp-args-from-checkpoint-args --tokenizer-metadata",
    ),
)

REPORTS = (
    *no_effect(
        "always in the log, in TensorBoard and in metrics.jsonl",
        "--log-throughput --log-batch-size-to-tensorboard --log-learning-rate-to-tensorboard",
        "--log-loss-scale-to-tensorboard --log-progress --log-timers",
    ),
    *no_effect(
        "no such tool is attached; loss, times and memory are in metrics.jsonl",
        "--wandb-group --wandb-team --git-hash --exp-name",
        "--wandb-project --wandb-exp-name --wandb-save-dir --wandb-entity --codecarbon-dir --log-energy",
        "--one-logger-project --one-logger-run-name --enable-one-logger --no-one-logger --log-straggler",
        "--disable-straggler-on-startup --straggler-ctrlr-port --straggler-minmax-count --otel-enabled",
        "--enable-ft-package --calc-ft-timeouts --config-logger-dir --one-logger-async --app-tag-run-name",
        "--app-tag-run-version --log-optimizer-states-to-tensorboard --log-device-memory-used --goodput",
        "--otel-service-name --otel-span-groups",
    ),
    *no_effect(
        "one rank prints what concerns all, and every error names its rank",
        "--log-level --log-level-replica --logging-level --verbose",
    ),
    *no_effect(
        "no profiler is attached; --timing-log-level measures the parts of an iteration, without barriers",
        "--barrier-with-L1-time --no-barrier-with-level-1-timing --timing-log-option",
        "--profile --profile-step-start --profile-step-end --profile-ranks --use-pytorch-profiler",
        "--pytorch-profiler-collect-shapes --pytorch-profiler-collect-callstack --nvtx-ranges",
    ),
    *no_effect(
        "the data are read by a thread, which the signals do not reach",
        "--exit-signal-handler-dataloader",
    ),
    *no_effect(
        "every checkpoint is kept, unless --keep-last deletes it",
        "--save-retain-interval",
    ),
    *no_effect(
        "a loss or gradient that is not finite stops the run; nothing is run twice",
        "--rerun-mode --result-rejected-tracker-filename --check-for-spiky-loss --check-for-large-grads",
        "--no-check-for-spiky-loss --no-check-for-large-grads",
    ),
    *no_effect("every checkpoint's manifest holds the config", "--log-path"),
    *no_effect("an NVIDIA cluster's own service", "--adlr-autoresume", "--adlr-autoresume-interval"),
)

LAUNCHER = (
    *no_effect("the launcher's environment variables say it", "--local-rank"),
    *no_effect(
        "it is the launcher's (torchrun, srun, deepspeed) and belongs before the script's name",
        "--nproc-per-node --nnodes --node-rank --master-addr --master-port --max-restarts --rdzv-backend",
        "--rdzv-endpoint --rdzv-id --rdzv-conf --tee --redirects --role --log-dir --num-gpus --num-nodes",
        "--hostfile --include --exclude --no-local-rank --no-python --jobid --kill-on-bad-exit --wait",
    ),
)

ACCEPTED = {
    "Kernels": KERNELS,
    "Numerics": NUMERICS,
    "Memory": MEMORY,
    "Communication": COMMUNICATION,
    "Files": FILES,
    "Reports": REPORTS,
    "Launcher": LAUNCHER,
}
