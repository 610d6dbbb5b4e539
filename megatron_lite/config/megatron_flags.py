"""Megatron flags that are accepted without effect or refused: one table, with the reasons and alternatives."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

_TABLE = """
no effect: PyTorch chooses the kernels for the device
    --use-flash-attn --use-flash-attn-v1 --use-flash-attn-v2 --use-flash-attn-triton
    --use-transformer-engine-op-fuser --use-fused-weighted-squared-relu --use-mcore-models
    --use-legacy-models --spec --enable-experimental --fused-single-qkv-rope --use-te-activation-func
    --disable-jit-fuser
no effect: --compile fuses kernels within the layers: the same formula, rounded differently
    --scaled-upper-triang-masked-softmax-fusion --scaled-masked-softmax-fusion --bias-dropout-fusion
    --no-masked-softmax-fusion --masked-softmax-fusion --no-bias-dropout-fusion --no-bias-swiglu-fusion
    --no-rope-fusion --disable-mem-efficient-ln --abort-on-unmet-fused-kernel-constraints
no effect: projection and loss are always computed together, in chunks of the sequence
    --cross-entropy-loss-fusion --fused-linear-cross-entropy
no effect: no CUDA graphs are captured
    --cuda-graph-impl --cuda-graph-scope --cuda-graph-modules --cuda-graph-warmup-steps --enable-cuda-graph
    --external-cuda-graph --te-rng-tracker --inference-rng-tracker --decode-only-cuda-graphs
    --delay-offload-until-cuda-graph
no effect: softmax, loss and gradient sums are always in fp32
    --attention-softmax-in-fp32 --accumulate-allreduce-grads-in-fp32 --fp16-lm-cross-entropy
    --ddp-reduce-scatter-with-fp32-accumulation --grad-reduce-in-bf16 --fp32-allreduce
no effect: PyTorch's setting for sums within a bf16 matrix product is kept
    --disable-bf16-reduced-precision-matmul
no effect: scaling attention scores by the layer number cancels out, and softmax is in fp32
    --no-query-key-layer-scaling --apply-query-key-layer-scaling
no effect: there is no RNG state to save or load: dropout follows from the seed and its place in the run
    --no-save-rng --no-load-rng
no effect: parameters that tensor-parallel ranks share start equal and get the same gradients
    --sync-tp-duplicated-parameters
no effect: weights are initialized on the run's device from (seed, name): equal in every layout, not on CPU and GPU
    --use-cpu-initialization --init-model-with-meta-device --lazy-mpu-init --no-initialization
    --data-parallel-random-init
no effect: use --checkpoint-activations for recomputation, --sequence-parallel to split the activations that are kept
    --deepspeed-activation-checkpointing --distribute-saved-activations --distribute-checkpointed-activations
    --partition-activations --contigious-checkpointing --contiguous-checkpointing --checkpoint-in-cpu
    --synchronize-each-layer --profile-backward --scattered-embeddings --split-transformers
    --memory-centric-tiled-linear --tile-factor --no-clone-scatter-output-in-embedding
no effect: the allocator's cache keeps its settings
    --empty-unused-memory-level
no effect: Python's garbage is always collected between iterations, every --manual-gc-interval of them
    --manual-gc --manual-gc-eval --no-manual-gc-eval
no effect: moments are in fp32, or in 8 bits with --optimizer adamw8bit
    --use-bnb-optimizer --use-precision-aware-optimizer --exp-avg-dtype --exp-avg-sq-dtype --main-grads-dtype
    --main-params-dtype
no effect: the same code runs any number of pipeline stages, on process groups of the device's backend
    --no-pipeline-parallel --enable-gloo-process-groups --disable-gloo-process-groups
no effect: --device decides the communication backend
    --distributed-backend --use-ring-exchange-p2p
no effect: gradients are always in contiguous buffers
    --ddp-impl --use-contiguous-buffers-in-ddp --no-contiguous-buffers-in-local-ddp --ddp-num-buckets
    --ddp-average-in-collective --ddp-pad-buckets-for-high-nccl-busbw --use-distributed-data-parallel
no effect: pipeline sends and, without --compile, tensor-parallel reductions of input gradients always overlap
    --no-scatter-gather-tensors-in-pipeline --overlap-p2p-communication --no-overlap-p2p-communication
    --overlap-p2p-communication-warmup-flush --no-async-tensor-model-parallel-allreduce --tp-comm-overlap
    --tp-comm-overlap-cfg --disable-tp-comm-overlap-ag --disable-tp-comm-overlap-rs --disable-tp-comm-split-ag
    --disable-tp-comm-split-rs --disable-tp-comm-bulk-dgrad --disable-tp-comm-bulk-wgrad
    --overlap-param-gather-with-optimizer-step --no-align-param-gather --align-grad-reduce --no-align-grad-reduce
    --defer-embedding-wgrad-compute --wgrad-deferral-limit --delay-wgrad-compute --batch-p2p-communication
no effect: NCCL keeps its settings and reads its environment variables
    --use-nccl-ub --nccl-communicator-config-path --high-priority-stream-groups --sharp-enabled-group --use-sharp
    --disable-symmetric-registration
no effect: --distributed-timeout-minutes holds throughout the run
    --distributed-timeout-seconds-after-init
no effect: each rank reads the tokenizer's files itself
    --use-tokenizer-broadcast
no effect: exit_status.json and the log name the rank that failed first
    --flight-recorder-dump-path
no effect: --bucket-megabytes sizes ZeRO's buckets, or zero_optimization of the JSON under DeepSpeed
    --zero-reduce-scatter --zero-contigious-gradients --zero-contiguous-gradients --zero-reduce-bucket-size
    --zero-allgather-bucket-size
no effect: --pp-partition-method balanced, the default, counts the work of the head
    --account-for-embedding-in-pipeline-split --account-for-loss-in-pipeline-split
no effect: --deepspeed and --deepspeed-config hold all of DeepSpeed's settings
    --deepscale --deepscale-config --deepspeed-mpi
no effect: datasets are always memory-mapped .bin/.idx pairs
    --mmap-warmup --no-mmap-bin-files --no-create-attention-mask-in-dataloader --dataloader-defer-npy-index-mmap
    --dataloader-fast-cache-load --per-dataset-sequences-path --num-dataset-builder-threads
no effect: one thread prefetches; see --prefetch-microbatches
    --num-workers --valid-num-workers --dataloader-prefetch-factor --pin-memory
no effect: a resumed run always continues its data where the checkpoint ended
    --resume-dataloader
no effect: the sample order does not depend on the layout
    --data-sharding --no-data-sharding
no effect: there is one checkpoint format: complete, strictly checked, readable in any layout
    --ckpt-format --use-dist-ckpt --dist-ckpt-format --dist-ckpt-strictness --dist-ckpt-optim-fully-reshardable
    --dist-ckpt-save-pre-mcore-014 --dist-ckpt-workers --auto-detect-ckpt-format --universal-checkpoint
    --ckpt-convert-format --ckpt-fully-parallel-save --no-ckpt-fully-parallel-save --ckpt-fully-parallel-load
    --ckpt-assume-constant-structure --use-persistent-ckpt-worker --async-strategy --strict-fsdp-dtensor-load
    --no-use-tokenizer-model-from-checkpoint-args --use-tokenizer-model-from-checkpoint-args
    --no-use-mp-args-from-checkpoint-args --tokenizer-metadata
no effect: always logged, in TensorBoard and in metrics.jsonl
    --log-throughput --log-batch-size-to-tensorboard --log-learning-rate-to-tensorboard
    --log-loss-scale-to-tensorboard --log-progress --log-timers
no effect: no such tool is supported; loss, times and memory are in metrics.jsonl
    --wandb-group --wandb-team --git-hash --exp-name --one-logger-project --one-logger-run-name
    --enable-one-logger --no-one-logger --otel-enabled --enable-ft-package --calc-ft-timeouts --config-logger-dir
    --one-logger-async --app-tag-run-name --app-tag-run-version --log-optimizer-states-to-tensorboard
    --log-device-memory-used --otel-service-name --otel-span-groups
no effect: megatron-lite report shows the goodput, and the energy with --codecarbon-dir
    --goodput --log-energy
no effect: megatron-lite watch and megatron-lite report show slow ranks
    --log-straggler --disable-straggler-on-startup --straggler-ctrlr-port --straggler-minmax-count
no effect: messages that concern all ranks are printed once, and every error names its rank
    --log-level --log-level-replica --logging-level --verbose
no effect: --timing-log-level measures the parts of an iteration, without barriers
    --barrier-with-L1-time --no-barrier-with-level-1-timing --timing-log-option
no effect: --profile always uses PyTorch's profiler, whose trace names the kernels
    --use-pytorch-profiler --nvtx-ranges
no effect: data are read by a thread, which receives no signals
    --exit-signal-handler-dataloader
no effect: checkpoints are kept unless --keep-last is given
    --save-retain-interval
no effect: a loss or gradient that is not finite stops the run; iterations are not rerun
    --rerun-mode --result-rejected-tracker-filename --check-for-spiky-loss --check-for-large-grads
    --no-check-for-spiky-loss --no-check-for-large-grads
no effect: every checkpoint's manifest holds the config
    --log-path
no effect: it is a service of NVIDIA's clusters
    --adlr-autoresume --adlr-autoresume-interval
no effect: the launcher's environment variables hold it
    --local-rank
no effect: it is a flag of the launcher (torchrun, srun, deepspeed) and belongs before the script's name
    --nproc-per-node --nnodes --node-rank --master-addr --master-port --max-restarts --rdzv-backend --rdzv-endpoint
    --rdzv-id --rdzv-conf --tee --redirects --role --log-dir --num-gpus --num-nodes --hostfile --include --exclude
    --no-local-rank --no-python --jobid --kill-on-bad-exit --wait
refused: Mixture of experts is not implemented: every layer has one dense MLP. Remove the flag
    --expert-model-parallel-size=1 --expert-tensor-parallel-size=1 --num-experts
    --expert-tensor-parallel-num-weight-shards --mlp-type --topk --moe-router-topk --moe-router-load-balancing-type
    --moe-router-dtype --moe-aux-loss-coeff --moe-grouped-gemm --moe-token-dispatcher-type --moe-ffn-hidden-size
    --moe-permute-fusion --moe-flex-dispatcher-backend --moe-shared-expert-intermediate-size
    --moe-router-score-function --moe-z-loss-coeff --moe-layer-freq --moe-per-layer-logging
    --moe-router-bias-update-rate --moe-router-enable-expert-bias --moe-router-force-load-balancing
    --moe-router-group-topk --moe-router-num-groups --moe-router-pre-softmax --moe-router-topk-scaling-factor
    --moe-expert-rank-capacity-factor --moe-paged-stash --moe-latent-size --moe-paged-stash-buffer-size-factor-cpu
    --moe-paged-stash-buffer-size-factor-cuda --moe-paged-stash-page-size --moe-*
refused: Multi-head latent attention is not implemented. Use --group-query-attention
    --multi-latent-attention --kv-lora-rank --q-lora-rank --qk-head-dim --qk-pos-emb-head-dim --v-head-dim --mscale
    --mscale-all-dim --rotary-scaling-factor
refused: YaRN and Llama 3's rescaling are not implemented. Use --rotary-seq-len-interpolation-factor N (linear)
    --rope-type=rope --use-rope-scaling --rope-scaling-factor
refused: Windowed and chunked attention are not implemented. Remove the flag
    --window-size --window-attn-skip-freq --attention-chunk-size
refused: Attention variants with another softmax are not implemented. Remove the flag
    --softmax-type=vanilla
refused: This activation is not implemented. Use --activation gelu, gelu_tanh, relu, squared_relu, swiglu or geglu
    --glu-linear-offset=0|0.0 --quick-geglu --onnx-safe --activation-func-clamp-value
refused: The flag also changes the width of the MLP. Use --activation geglu with --ffn-hidden-size N
    --geglu
refused: Sinusoidal and relative positions are not implemented. Use --position-embedding-type learned, rotary or alibi
    --sinusoidal-pos-emb --rpe-num-buckets --rpe-max-distance
refused: Only LayerNorm and RMSNorm are implemented. Use --normalization LayerNorm or RMSNorm
    --scalenorm-epsilon
refused: Only dense attention is implemented. Remove the flag
    --sparsity=none
refused: Layers that share weights are not implemented. Remove the flag
    --num-unique-layers --param-sharing-style=grouped
refused: Only transformer layers are implemented. Remove the flag
    --hybrid-layer-pattern --hybrid-attention-ratio --hybrid-mlp-ratio --is-hybrid-model --mamba-* --hybrid-*
    --heterogeneous-* --linear-attention-*
refused: Multi-token prediction is not implemented. Remove the flag
    --mtp-num-layers=0 --mtp-loss-scaling-factor --mtp-use-repeated-layer --mtp-*
refused: Weights are initialized from N(0, --init-method-std). Remove the flag
    --init-method-xavier-uniform --embedding-init-method-std --init-method
refused: muP is not implemented, and without it a learning rate does not transfer. Choose --lr for this width
    --mup --use-mup --mup-input-mult --mup-output-mult --mup-attn-mult --mup-*
refused: The flag belongs to other models (BERT, T5, retrieval, vision). Remove the flag
    --decoder-seq-length --decoder-num-layers --retriever-seq-length --mask-prob --short-seq-prob --sample-rate
    --bert-no-binary-head --noise-density --mean-noise-span-length --img-dim --patch-dim --num-classes --num-channels
    --ict-head-size --ict-load --bert-load --titles-data-path --evidence-data-path --block-data-path --embedding-path
    --retro-* --retriever-* --biencoder-* --vision-* --dino-*
refused: The sequence is not split by an all-to-all of attention heads (Ulysses). Use --context-parallel-size N
    --hierarchical-context-parallel-sizes=1 --ds-sequence-parallel-size=1
refused: Parameters are not sharded over replicas. Use --use-distributed-optimizer (ZeRO-1)
    --data-parallel-sharding-strategy=no_shard --outer-dp-sharding-strategy=no_shard
    --num-distributed-optimizer-instances=1 --use-megatron-fsdp --use-torch-fsdp2 --use-custom-fsdp
    --fsdp-double-buffer --fsdp-manual-registration --megatron-fsdp-grad-comm-dtype --megatron-fsdp-main-grads-dtype
    --megatron-fsdp-main-params-dtype --megatron-fsdp-max-pool-double-buffer --suggested-communication-unit-size
    --megatron-fsdp-* --fsdp-*
refused: Weights are split over tensor-parallel ranks only. Use --tensor-model-parallel-size N
    --tensor-parallel-num-weight-shards=1 --gtp-remat-nccl-ub --gtp-expert-remat-nccl-ub --gtp-remat-opt-in-modules
    --gtp-remat-reduce-scatter-with-fp32-accumulation --gtp-*
refused: Layers are assigned to stages by number. Use --pp-partition-method or --decoder-first-pipeline-num-layers
    --pipeline-model-parallel-layout --pipeline-model-parallel-split-rank --standalone-embedding-stage
refused: Ranks are numbered tensor, context, data, pipeline (fastest first). Remove the flag
    --use-tp-pp-dp-mapping --microbatch-group-size-per-virtual-pipeline-stage
refused: Offloading to the CPU is not implemented. Use --checkpoint-activations, or more ranks
    --cpu-optimizer --cpu-torch-adam --remote-device --use-pin-memory --optimizer-cpu-offload
    --optimizer-offload-fraction --cpu-offloading-num-layers --fine-grained-activation-offloading
    --fine-grained-offloading-max-inflight-offloads --activation-offload-fraction --offload-modules
    --min-offloaded-tensor-size --delta-offload-bytes-across-pp-ranks --cpu-offloading-*
refused: Parameters stay in bf16, and fp4 is not implemented. Use --fp8-format without this flag
    --fp8-param-gather --fp4-format --fp4-param-gather --reuse-grad-buf-for-mxfp8-param-ag --fp8-* --fp4-*
no effect: the scales of --fp8-recipe delayed follow from the history at the end of each iteration
    --fp8-interval
refused: All parameters have the same learning rate. Remove the flag
    --decoupled-lr --decoupled-min-lr --dump-param-to-param-group-map --no-weight-decay-cond-type
refused: Only the core of attention can be recomputed alone. Use --recompute-granularity selective or full
    --recompute-modules=core_attn
refused: Datasets of prompts and answers have a loss mask. Use --answer-loss
    --loss-on-targets-only --sft
refused: This loss is not implemented. Remove the flag
    --norm-target-loss --reweight-loss-based-on-position-frequency --fim-data --rl-* --grpo-*
refused: Error injection is not implemented. Remove the flag
    --error-injection-rate=0|0.0|transient_error --error-injection-type=0|0.0|transient_error
refused: Non-persistent checkpoints are not implemented. Use --save-schedule and --keep-last
    --non-persistent-save-interval --non-persistent-ckpt-type --non-persistent-global-ckpt-dir
    --non-persistent-local-ckpt-dir --non-persistent-local-ckpt-algo
refused: A run saves and stops on SIGTERM, SIGINT and SIGUSR1 only. Remove the flag; send the job one of these signals
    --exit-signal=sigterm|sigint|sigusr1
refused: This update rule is not implemented. Use --optimizer adafactor or adamw8bit, which need the least memory
    --onebitadam --sm3 --no-adamw --momentum
refused: Muon's iterations are quintic and in bf16, beside AdamW. Remove the flag
    --muon-coefficient-type=quintic --muon-fp32-matmul-prec=medium --muon-scalar-optimizer=adam
refused: The final learning rate is a rate, not a share of --lr. Use --min-lr (--lr x the ratio)
    --lr-decay-ratio
refused: Batch sizes are those of a replica and of an iteration. Use --micro-batch-size and --global-batch-size
    --train-batch-size
refused: Parameters are frozen by name. Use --freeze REGEX
    --bitfit --no-train --freeze-lm
refused: The model is given on the command line. Pass its flags, which `megatron-lite checkpoint inspect` shows
    --use-checkpoint-args
refused: Weights are loaded from one folder. Use --load FOLDER --finetune
    --pretrained-checkpoint
refused: Raw text is not read by the trainer. Use tools/preprocess_data.py, then --data-path PREFIX and --split
    --train-data --valid-data --test-data --lazy-loader --loose-json --presplit-sentences --text-key --eval-text-key
    --delim --use-tfrecords --input-data-sizes-file
refused: Validation uses the sequence length and batch size of training. Remove the flag
    --eval-batch-size --eval-seq-length --eval-max-preds-per-seq
refused: A tokenizer is given by its type and files. Use --tokenizer-type with --vocab-file or --tokenizer-model
    --tokenizer-path --tokenizer-model-type --cache-dir
refused: The surplus of each dataset of a blend is 0.5%. Remove the flag
    --mid-level-dataset-surplus=0.005
refused: Validation reads --eval-iters batches of each set. Use --valid-weighted-split-paths for several sets
    --full-validation --multiple-validation-sets --eval-global-batch-size --eval-micro-batch-size
refused: Datasets are read from files only. Copy them to this machine
    --object-storage-cache-path
refused: Only memory-mapped datasets (MMIDIDX) are supported. Preprocess the text again with tools/preprocess_data.py
    --data-impl=mmap|infer --dataset-impl=mmap|infer
refused: A JSON of blends per split is not supported. Use --train-data-path, --valid-data-path and --test-data-path
    --per-split-data-args-path
refused: This tokenizer is not supported. Use --tokenizer-type HuggingFaceTokenizer with its tokenizer.json
    --tokenizer-library --tiktoken-pattern --tiktoken-num-special-tokens --tiktoken-special-tokens --use-gigatoken
refused: The flag belongs to tools/preprocess_data.py or tools/merge_datasets.py. Remove it here; give it to that script
    --input --output-prefix --json-keys --json-key --append-eod --append-bos --prepend-space --workers --datasets
    --split-sentences --keep-newlines --scratch --partitions --find-optimal-num-workers --workers-to-check
    --max-documents --keep-sequential-samples
refused: The flag belongs to an evaluation script. Remove it; use --skip-train to measure the loss
    --task-list --adaptive-seq-len --results-path --intermed-results --micro-bs-multiplier --eval-fp32
    --bootstrap-iters
refused: The trainer has no inference server. Use `megatron-lite generate`
    --inference --inference-max-seq-length --inference-logging-step-interval
    --inference-dynamic-batching-buffer-size-gb --inference-dynamic-batching-max-requests
    --inference-dynamic-batching-max-tokens --inference-dynamic-batching-prefix-caching
    --inference-dynamic-batching-num-cuda-graphs --inference-dynamic-batching-prefix-caching-eviction-policy
    --inference-dynamic-batching-block-size --inference-cuda-graph-scope --enable-chunked-prefill --max-tokens-to-oom
    --inference-*
"""
"""Reasons, each followed by its flags. `--flag=A|B`: refused but for these values, which change nothing. `--name-*`:
every flag that begins so is refused, those not listed included."""


@dataclass(frozen=True)
class Unsupported:
    """A flag of Megatron that has no effect, or is refused.

    Attributes:
        reason: why, as a sentence without a full stop.
        fix: what to do instead; empty: the flag is accepted without effect.
        harmless: values of a refused flag that change nothing.
    """

    name: str
    reason: str
    fix: str
    harmless: tuple[str, ...] = ()

    aliases = ()

    @property
    def status(self) -> str:
        """Return "no effect" or "refused"."""
        return "refused" if self.fix else "no effect"


def _rows() -> Iterator[Unsupported]:
    reason = fix = ""
    for line in _TABLE.strip().splitlines():
        if line.startswith(" "):
            for entry in line.split():
                name, _, values = entry.partition("=")
                yield Unsupported(name, reason, fix, tuple(values.split("|")) if values else ())
        else:
            status, _, text = line.partition(": ")
            reason, _, fix = text.rpartition(". ") if status == "refused" else (text, "", "")


UNSUPPORTED = tuple(row for row in _rows() if not row.name.endswith("*"))
FAMILIES = {row.name.removesuffix("*"): row for row in _rows() if row.name.endswith("*")}
"""Prefixes whose every flag is refused for the same reason."""
