"""Wrong flags added to a sound command line, each with the beginning of its error."""

FROM_FLAGS = {
    "--compile all": "layer, stage, off, or no value",
    # fp8
    "--fp8-format hybrid": "--fp8-format hybrid needs --bf16, because everything but the matrix products",
    "--bf16 --fp8-format e4m3 --ffn-hidden-size 100": "multiples of 16, and the MLP width per rank is 100",
    "--fp8-amax-history-len 0": "--fp8-amax-history-len 0 is out of range. Give --fp8-amax-history-len a number from 1",
    # metrics
    "--wandb-entity us --wandb-exp-name x": "--wandb-exp-name x and --wandb-entity us without --wandb-project",
    "--codecarbon-country france": "--codecarbon-country france is not a country code of three capital letters",
    "--codecarbon-country DEU": "--codecarbon-country DEU without --codecarbon-dir: the energy would not be measured",
    # profiler
    "--profile --profile-step-start 12": "--profile-step-end 12 by default is not above --profile-step-start 12. The",
    "--profile --profile-ranks 0 9": "Cannot profile rank 9 of a job with 4 ranks (--profile-ranks). Give ranks from",
    "--profile --profile-ranks -1": "ranks, for example 0 7",
    # command line
    "--train-itres 5": "Unknown flag --train-itres. Did you mean --train-iters?",
    "--=3": "'--=3' has no flag before the =. Write the flag: --FLAG=3",
    "--apend-eod": "Unknown flag --apend-eod. If --append-eod is meant: --append-eod is not supported. The flag",
    "--no-save": "--no-save is an abbreviation of several flags: --no-save-on-exit, --no-save-optim",
    "@nowhere.txt": "Argument file @nowhere.txt: No such file or directory. Give @FILE a path that exists:",
    "@quote.txt": "Cannot split argument file @quote.txt into arguments: a quotation mark is not closed in line",
    "@latin.txt": "Argument file @latin.txt is not UTF-8: byte 0xe9 in line 2, byte 4 of the line, 11 of the",
    "--data-args-path latin.txt": "--data-args-path latin.txt is not UTF-8: byte 0xe9 in line 2, byte 4 of the",
    "--save x\udce9": "The argument b'x\\xe9' is not valid UTF-8. Retype the argument in a terminal or script in",
    "--load x\ud800": "The argument 'x\\ud800' is not valid UTF-8. Retype the argument in a terminal or script in",
    "--seed 4294967296": "--seed 4294967296 is out of range. Give --seed a number from 0 to 4,294,967,295",
    "--seed -1": "--seed -1 is out of range. Give --seed a number from 0 to 4,294,967,295",
    "--num-layers 1000000000": "--num-layers 1000000000 is out of range. Give --num-layers a number from 1 to",
    "--train-samples 1e16": "Cannot read --train-samples 1e16: expected a whole number of at most 1e+15. Write",
    "--lr 1e39": "Cannot read --lr 1e39: expected a number of at most 1e+38. Write --lr X",
    "--tensorboard-queue-size 0": "--tensorboard-queue-size 0 is out of range. Give --tensorboard-queue-size a",
    "--ddp-bucket-size 0": "Cannot read --ddp-bucket-size 0: expected a number of elements, 1 or more. Write",
    "@circle.txt": "Argument files include each other without end (@circle.txt, 10 files deep). Remove from",
    "--moe-brand-new 3": "--moe-brand-new 3 is not supported. Mixture of experts is not implemented: every layer",
    "--num-experts 8": "--num-experts 8 is not supported. Mixture of experts is not implemented: every layer has",
    "--mup --mup-input-mult 10": "--mup, --mup-input-mult 10 are not supported. muP is not implemented, and",
    "--log-interval ten": "Cannot read --log-interval ten: expected a whole number (1000, 5_000_000, 10e6).",
    "--log-interval": "Cannot read --log-interval with nothing after it: expected one value. Write",
    "--log-interval 1 2": "Cannot read --log-interval 1 2: expected one value. Write --log-interval N, for example",
    "--bf16 5": "--bf16 takes no value",
    "--bf16 True False": "--bf16 takes no value",
    "--rampup-batch-size 2 2": "Cannot read --rampup-batch-size 2 2: expected three values. Write",
    "--lr nan": "Cannot read --lr nan: expected a finite number. Write --lr X",
    "--fp16 --bf16": "--fp16 and --bf16 contradict each other. Remove one of the two",
    "--swiglu --squared-relu": "--swiglu and --squared-relu contradict each other. Remove one of the two",
    "--glu-activation gelu": "Cannot read --glu-activation gelu: expected one of geglu, liglu, reglu, swiglu.",
    "--accept-changed weights": "Cannot read --accept-changed weights: expected some of tokenizer, data, code.",
    "--input x.jsonl": "--input x.jsonl is not supported. The flag belongs to tools/preprocess_data.py or",
    "--context-parallel-size two": "for example --context-parallel-size 2",
    # resolvers
    "--zero-stage 3": "ZeRO stage 3 is run by DeepSpeed only (--zero-stage 3). Add --deepspeed; or use stage 1, for",
    "--zero-stage 4": "--zero-stage 4 is out of range. Give --zero-stage a number from 0 to 3",
    "--deepspeed-settings {}": "--deepspeed-settings has no effect without --engine deepspeed. Add --engine deepspeed",
    "--engine deepspeed --deepspeed-settings {": "--deepspeed-settings is not valid JSON: Expecting property name",
    "--engine deepspeed --deepspeed-settings {} --deepspeed --deepspeed_config ds.json": (
        "--deepspeed-settings and --deepspeed_config ds.json contradict each other."
    ),
    '--bucket-megabytes 4 --engine deepspeed --deepspeed-settings {"zero_optimization":{"reduce_bucket_size":9}}': (
        "--bucket-megabytes 4 and zero_optimization.reduce_bucket_size 9. Remove --bucket-megabytes"
    ),
    "--deepspeed --zero-stage 2 --engine native": "--engine native cannot run --zero-stage 2. The native engine shards",
    "--engine deepspeed --pipeline-model-parallel-size 2": (
        "The DeepSpeed engine cannot run --pipeline-model-parallel-size 2. Its ZeRO stages reduce"
    ),
    "--engine deepspeed --context-parallel-size 2": (
        "The DeepSpeed engine cannot run --context-parallel-size 2. It has not been tested"
    ),
    "--engine deepspeed --bf16": "The DeepSpeed engine cannot run ZeRO stage 0 with --bf16. Without ZeRO, DeepSpeed",
    "--engine deepspeed --pipeline-schedule zb-h1": "The DeepSpeed engine cannot run --pipeline-schedule zb-h1. It has",
    "--engine deepspeed --norm-kernel apex": "The DeepSpeed engine cannot run --norm-kernel apex. Other packages'",
    "--engine deepspeed --transformer-impl transformer_engine": (
        "The DeepSpeed engine cannot run --transformer-impl transformer_engine. Other packages'"
    ),
    "--engine deepspeed --cross-entropy-fusion-impl te": (
        "The DeepSpeed engine cannot run --cross-entropy-fusion-impl te. Other packages'"
    ),
    "--engine xla": "--engine xla is given without --device xla. Add --device xla, or remove --engine xla",
    "--device xla --engine native": "--device xla has an engine of its own, but --engine native is given. Remove",
    "--device xla --micro-batch-size 2 --global-batch-size 12": (
        "With --device xla, --global-batch-size 12 is not a multiple of 8 (--micro-batch-size 2 x 4 data-parallel"
    ),
    "--device xla --pipeline-model-parallel-size 2": (
        "The XLA engine (--device xla) cannot run --pipeline-model-parallel-size 2. XLA partitions one program"
    ),
    "--device xla --pipeline-schedule zb-h1": "cannot run --pipeline-schedule zb-h1. XLA orders the products of a",
    "--device xla --context-parallel-size 2": "cannot run --context-parallel-size 2. It splits samples and heads",
    "--device xla --fp16": "cannot run --fp16. TPUs compute in bf16",
    "--device xla --bf16 --fp8-format e4m3": "cannot run --fp8-format e4m3. The fp8 products are those of GPUs",
    "--device xla --compile layer": "cannot run --compile. XLA compiles every step",
    "--device xla --optimizer lion": "cannot run --optimizer lion. It updates partitioned parameters by AdamW or SGD",
    "--device xla --ema-decay 0.9": "cannot run --ema-decay 0.9. Its optimizer keeps no moving average",
    "--device xla --reset-attention-mask": "cannot run --reset-attention-mask. Documents have other lengths",
    "--device xla --attention-backend flash": "cannot run --attention-backend flash. The kernels of this flag",
    "--device xla --check-weight-hash-across-dp-replicas-interval 5": "XLA keeps the replicas, which cannot be read",
    "--device xla --timing-log-level 1": "cannot run --timing-log-level 1. A step is one graph",
    "--device xla --profile": "cannot run --profile. PyTorch's profiler does not see the devices",
    "--device xla --check-nodes": "cannot run --check-nodes. The checks measure GPUs",
    "--device xla --norm-kernel apex": "cannot run --norm-kernel apex. Other packages' kernels are those of GPUs",
    # kernels and devices
    "--cross-entropy-fusion-impl cce --device cuda": "compute the loss of this run: it takes bf16 and fp16 only",
    "--cross-entropy-fusion-impl cce --bf16 --deterministic-mode": "no fixed order (--deterministic-mode). Remove",
    "--cross-entropy-fusion-impl te --tensor-model-parallel-size 2": (
        "split over tensor-parallel ranks (--tensor-model-parallel-size 2)"
    ),
    "--norm-kernel te --fp32-residual-connection --bf16": "--norm-kernel te cannot compute the norm of this run: it",
    "--norm-kernel apex --apply-layernorm-1p --bf16": "it has no zero-centered norms (--apply-layernorm-1p). Remove",
    "--transformer-impl local --norm-kernel te": (
        "--transformer-impl local and --norm-kernel te contradict each other"
    ),
    "--device mps --world-size 4": "--device mps cannot run 4 ranks. PyTorch has no communication between Apple",
    "--device mps --compile layer": "--device mps cannot run --compile",
    "--device mps --fp8-format e4m3 --bf16": "--device mps cannot run --fp8-format e4m3. It has no fp8",
    "--device mps --optimizer adafactor": "--device mps cannot run --optimizer adafactor. It has no float64",
    "--device mps --optimizer adamw8bit": "--device mps cannot run --optimizer adamw8bit. It has no float64",
    "--device xpu --attention-backend flash": "--device xpu cannot run --attention-backend flash. The flag names",
    "--device xpu --fp8-format e4m3 --bf16": "--device xpu cannot run --fp8-format e4m3. It has no fp8",
    "--engine deepspeed --zero-stage 1 --bf16 --fp8-format e4m3": (
        "The DeepSpeed engine cannot run --fp8-format e4m3. The scales of"
    ),
    "--engine deepspeed --optimizer lion": "The DeepSpeed engine cannot run --optimizer lion. It updates flat",
    "--engine deepspeed --ema-decay 0.9": "The DeepSpeed engine cannot run --ema-decay 0.9. Its optimizer keeps no",
    "--engine deepspeed --compile layer": "The DeepSpeed engine cannot run --compile. It gathers parameters",
    "--engine deepspeed --check-weight-hash-across-dp-replicas-interval 5": (
        "The DeepSpeed engine cannot run --check-weight-hash-across-dp-replicas-interval 5. Replicas that share"
    ),
    "--engine deepspeed --log-num-zeros-in-grad": "The DeepSpeed engine cannot run --log-num-zeros-in-grad. It frees",
    "--zero-stage 0 --use-distributed-optimizer": (
        "--zero-stage 0 and --use-distributed-optimizer contradict each other."
    ),
    "--world-size 8": "--world-size 8 differs from the 4 ranks that the launcher started. Remove --world-size",
    "--no-position-embedding --position-embedding-type absolute": "--no-position-embedding and",
    "--no-bias-gelu-fusion --openai-gelu": "--no-bias-gelu-fusion (the exact GELU) and --openai-gelu",
    "--num-virtual-stages-per-pipeline-rank 3": "Cannot split 4 layers into 3 equal virtual stages",
    "--save-interval 0": "--save-interval 0 is out of range. Give --save-interval a number of at least 1",
    "--save-interval 5 --save-schedule 10": "--save-interval 5 and --save-schedule 10 both give an interval for",
    "--data-args-path paths.txt --data-path x": "--data-args-path paths.txt and --data-path x",
    "--train-weighted-split-paths-path paths.txt": (
        'Cannot read "paths.txt" (--train-weighted-split-paths-path): expected'
    ),
    "--gas 0": "--gas 0 is out of range. Give --gas a number of at least 1",
    "--gas 3": "--global-batch-size 8 and --gas 3 contradict each other: micro-batch 2 x 3 accumulation steps x",
    "--step-batch-size-schedule 1B:8": "Cannot read --step-batch-size-schedule 1B:8: expected a first pair that",
    # structured values
    "--step-batch-size-schedule 0:2 5": "Cannot read --step-batch-size-schedule 0:2 5: expected TOKENS:BATCH",
    "--step-batch-size-schedule 0:2 1:4": "Cannot read --step-batch-size-schedule 0:2 1:4: expected numbers of",
    "--step-batch-size-schedule 0:2 0.0000001K:4": (
        "Cannot read --step-batch-size-schedule 0:2 0.0000001K:4: expected"
    ),
    "--save-schedule 10 20:100": "<interval>:<last iteration> pairs",
    "--skip-train-iteration-range a-b": "ranges of iterations",
    "--seq-length-warmup 5": "start:iterations[:step]",
    "--seq-length-warmup a:b": "start:iterations[:step]",
    "--split 1,2,3,4": "Cannot read --split 1,2,3,4: expected one to three numbers of at least 0. Write --split",
    "--split 1,,1": "Cannot read --split 1,,1: expected one to three numbers of at least 0. Write",
    "--split 0,0,0": "Cannot read --split 0,0,0: expected numbers that are not all 0. Write --split",
    "--valid-weighted-split-paths nonsense": '"NAME: WEIGHT START:END PATH',
    "--max-position-embeddings 1e-1": "a whole number",
    "--position-embedding-type relative": "Cannot read --position-embedding-type relative: expected one of",
    "--tokenizer-type NulTokenizer": "Did you mean --tokenizer-type NullTokenizer?",
    "--save-schedule ten": "Write --save-schedule INTERVAL:LAST …, for example --save-schedule 10:100 18:1000 1500",
    "--log-interval 1.5": "Write --log-interval N, for example --log-interval 100",
    "--rampup-batch-size 2 x 3": "for example --rampup-batch-size 16 16 5_000_000",
    # rules of model_rules.py
    "--num-layers 0": "--num-layers 0 is out of range. Give --num-layers a number from 1 to 100,000",
    "--init-method-std -1": "--init-method-std -1 is out of range. Give --init-method-std a number of at least 0",
    "--hidden-size 66": "Cannot split a hidden size of 66 over 4 attention heads (--hidden-size 66",
    "--num-query-groups 3": "Cannot split 4 attention heads into 3 query groups (--num-query-groups 3",
    "--position-embedding-type rope --rotary-percent 0.2": (
        "Rotary embeddings cannot rotate 3 of the 16 channels of an attention"
    ),
    "--position-embedding-type rope --rotary-percent 2": (
        "--rotary-percent 2 is out of range. Give --rotary-percent a number"
    ),
    "--position-embedding-type rope --rotary-seq-len-interpolation-factor 0": (
        "--rotary-seq-len-interpolation-factor 0 is out of range. Give"
    ),
    "--max-position-embeddings 16": "Samples of 32 tokens are longer than the table of 16 learned positions",
    "--hidden-dropout 1": "--hidden-dropout 1 is out of range. Give --hidden-dropout a number from 0 to below 1",
    "--parallel-residual --apply-residual-connection-post-layernorm": (
        "--parallel-residual and --apply-residual-connection-post-layernorm"
    ),
    "--preset gpt5": "Unknown preset: --preset gpt5. Did you mean --preset gpt-580m? Presets: gpt2-124m",
    "--share-layers 3": "Cannot divide 4 layers into 3 groups that share parameters (--share-layers 3, --num-layers 4)",
    "--share-layers ffn": "Cannot read --share-layers ffn: expected all, attention, mlp, or a number of groups. Write",
    "--embedding-size 64": "The embedding is not narrower than the layers (--embedding-size 64, --hidden-size 64)",
    "--norm-epsilon 0": "--norm-epsilon 0 is out of range. Give --norm-epsilon a number above 0",
    # rules of batch.py
    "--seq-length 0": "--seq-length 0 is out of range. Give --seq-length a number from 1 to 1,000,000,000",
    "--micro-batch-size 3": "Cannot split a global batch of 8 samples into micro-batches of 3",
    "--rampup-batch-size 2 4 100": "The batch ramp-up does not reach the global batch: 8 - 2 = 6 samples are not",
    "--rampup-batch-size 16 2 100": "The batch ramp-up starts at 16 samples, above the global batch of 8",
    "--rampup-batch-size 2 0 100": "--rampup-batch-size 2 0 100: the start batch 2 and the increment 0 must be",
    "--rampup-batch-size 1 1 100": "Cannot split every batch of the ramp-up into micro-batches",
    "--step-batch-size-schedule 0:3 1M:8": "Cannot split the batches 3 of --step-batch-size-schedule into",
    "--step-batch-size-schedule 0:2 1M:16": "--global-batch-size 8 differs from the last batch of",
    "--step-batch-size-schedule 0:2 1M:8 --rampup-batch-size 2 2 9": (
        "--step-batch-size-schedule cannot be combined with"
    ),
    "--decrease-batch-size-if-needed --global-batch-size 2": (
        "--decrease-batch-size-if-needed would round the batch down to 0"
    ),
    "--seq-length-warmup 8:0:8": "--seq-length-warmup rises from 8 to 32 tokens over 0 iterations. Give it",
    "--seq-length-warmup 64:10": "--seq-length-warmup: the sequence length or step 64 is outside 1 to 32",
    "--seq-length-warmup 8:10:8 --sequence-parallel --tensor-model-parallel-size 4 --seq-length-warmup 6:10:2": (
        "--seq-length-warmup gives sequence length 6 (from 6 in steps of 2)"
    ),
    "--seq-length-warmup 0:8,5:16,5:32": "--seq-length-warmup: two stages start at iteration 5. List the stages",
    # rules of training.py and optimizer.py
    "--train-samples 800": "The run has two lengths: --train-iters 100 and --train-samples 800. Keep one of",
    "--train-iters 0": "The length of the run is 0 or not given (--train-iters, --train-samples, --epochs)",
    "--lr-decay-samples 100": "--lr-decay-samples 100 cannot be combined with --train-iters 100. The",
    "--train-iters 0 --train-samples 800 --lr-warmup-iters 2": (
        "--lr-warmup-iters 2 cannot be combined with --train-samples 800. The"
    ),
    "--lr 0": "The learning rate is 0 (--lr 0). Give --lr a number above 0, such as 3e-4",
    "--min-lr 1": "--min-lr 1 is larger than --lr 0.001. Give --min-lr a number from 0 to 0.001, or raise --lr",
    "--lr-warmup-fraction 2": "--lr-warmup-fraction 2 is out of range. Give --lr-warmup-fraction a number from 0",
    "--lr-warmup-fraction 0.1 --lr-warmup-iters 5": (
        "The learning-rate warm-up has two lengths: --lr-warmup-fraction 0.1"
    ),
    "--lr-warmup-iters 500": "The learning-rate warm-up is longer than the whole schedule of warm-up and decay",
    "--lr-decay-style WSD": "--lr-decay-style WSD (warm-up, stable, decay) needs the length of its decay:",
    "--start-weight-decay 0.1": "--start-weight-decay has no effect with --weight-decay-incr-style constant, the",
    "--weight-decay-incr-style linear": "--weight-decay-incr-style linear raises the weight decay, but",
    "--optimizer lion --adam-beta1 0.9": "--adam-beta1 0.9 has no effect with --optimizer lion. Remove",
    "--muon-momentum 0.9": "--muon-momentum 0.9 has no effect with --optimizer adam, the default. Remove",
    "--optimizer adafactor --adafactor-warmup-init": "--adafactor-warmup-init has no effect without",
    "--optimizer adafactor --adafactor-relative-step": "--lr 1e-3 has no effect with --adafactor-relative-step, whose",
    "--ema-decay 1": "--ema-decay 1 is out of range. Give --ema-decay a number from 0 to below 1",
    "--adam-beta1 1": "--adam-beta1 1 is out of range. Give --adam-beta1 a number from 0 to below 1",
    "--min-loss-scale 8 --initial-loss-scale 4": "The loss scale starts below its minimum (--initial-loss-scale 4",
    "--min-loss-scale 0": "--min-loss-scale 0 is out of range. Give --min-loss-scale a number above 0",
    "--exit-interval -1": "--exit-interval -1 is out of range. Give --exit-interval a number of at least 0",
    "--log-interval 0": "--log-interval 0 is out of range. Give --log-interval a number of at least 1",
    "--check-weight-hash-across-dp-replicas-interval -1": (
        "--check-weight-hash-across-dp-replicas-interval -1 is out of range."
    ),
    "--on-weight-mismatch repair": "--on-weight-mismatch repair has no effect without",
    "--skip-train-iteration-range 2-5 4-9": "--skip-train-iteration-range 4-9 overlaps the range that ends at 5.",
    # rules of parallel.py
    "--tensor-model-parallel-size 0": "--tensor-model-parallel-size 0 is out of range. Give",
    "--tensor-model-parallel-size 2 --pipeline-model-parallel-size 4": (
        "Cannot split 4 ranks into model replicas of 8 ranks"
    ),
    "--tensor-model-parallel-size 4 --num-attention-heads 2 --kv-channels 16": (
        "Cannot split --num-attention-heads 2 over 4 tensor-parallel ranks"
    ),
    "--tensor-model-parallel-size 4 --seq-length 30 --sequence-parallel": (
        "Cannot split --seq-length 30 over 4 tensor-parallel ranks for"
    ),
    "--context-parallel-size 8": "Cannot split 4 ranks into model replicas of 8 ranks (--tensor-model-parallel-size 1",
    "--cp-comm-type a2a": "Cannot read --cp-comm-type a2a: expected p2p or all_gather: an all-to-all would split the",
    "--cp-comm-type ring": "Cannot read --cp-comm-type ring: expected p2p or all_gather. Write --cp-comm-type KIND",
    "--cp-comm-type p2p all_gather": "Cannot read --cp-comm-type p2p all_gather: expected the same value for all",
    "--context-parallel-size 2 --attention-backend fused": (
        "--attention-backend fused cannot be combined with --context-parallel-size 2. Blocks of keys are merged"
    ),
    "--context-parallel-size 2 --seq-length-warmup 6:10:6": (
        "--seq-length-warmup gives sequence length 6 (from 6 in steps of 6), which --context-parallel-size 2 cannot"
    ),
    "--context-parallel-size 4 --seq-length 28": "Cannot split --seq-length 28 into 8 equal chunks, two for each of",
    "--context-parallel-size 2 --tensor-model-parallel-size 4 --sequence-parallel --seq-length 28": (
        "(--context-parallel-size 2), and the part of each over 4 tensor-parallel ranks (--sequence-parallel). Use"
    ),
    "--pipeline-model-parallel-size 4 --num-layers 2": "Cannot split 2 layers over 4 pipeline stages (--num-layers 2",
    "--pipeline-schedule interleaved": "--pipeline-schedule interleaved is given without",
    "--pipeline-model-parallel-size 2 --num-layers-per-virtual-pipeline-stage 1 --pipeline-schedule 1f1b": (
        "--num-layers-per-virtual-pipeline-stage 1 has no effect with"
    ),
    "--num-layers-per-virtual-pipeline-stage 1": "--num-layers-per-virtual-pipeline-stage 1 has no effect with one",
    "--pipeline-model-parallel-size 2 --num-layers-per-virtual-pipeline-stage 3 --num-layers 8": (
        "Cannot divide 8 layers into chunks of 3 so that each of 2 pipeline ranks"
    ),
    "--pp-partition-method type:(": "--pp-partition-method type:( has an invalid regular expression: missing )",
    "--pp-partition-method best": "--pp-partition-method best is unknown. Use balanced, uniform, parameters, or",
    "--decoder-last-pipeline-num-layers 1 --num-layers-per-virtual-pipeline-stage 1 --pipe-parallel-size 2": (
        "--decoder-last-pipeline-num-layers 1 cannot be combined with --pipeline-schedule interleaved"
    ),
    "--decoder-first-pipeline-num-layers 1": "The only pipeline stage holds all layers, so that --decoder-first",
    "--decoder-first-pipeline-num-layers 4 --pipeline-model-parallel-size 4": (
        "Cannot assign 4 layers to 4 pipeline stages: the sizes given leave 0"
    ),
    "--checkpoint-activations --recompute-num-layers 9": (
        "Cannot recompute 9 layers of a model with 4 (--recompute-num-layers"
    ),
    "--distributed-timeout-minutes 0": "--distributed-timeout-minutes 0 is out of range. Give",
    # rules of data.py
    "--document-sampling slice --sample-order closed-form": "--document-sampling slice and --sample-order closed-form",
    "--mock-data --data-path x": "Training data are given more than once: by --data-path and --mock-data. Keep",
    "--global-batch-size 1000000000": "Each data-parallel replica would run 125,000,000 micro-batches in an",
    "--prefetch-microbatches 1000000000": "--prefetch-microbatches 1000000000 is out of range. Give",
    "--data-path -1 x 2 y": "The datasets have a negative weight: -1 x, 2 y. Give a positive weight before each",
    "--train-weighted-split-paths a:1_0:1_x b:1_0:1_x": (
        "--train-weighted-split-paths has 2 groups (a, b) instead of one. Join"
    ),
    "--valid-weighted-split-paths a:1_0:1_x a:1_0:1_x": (
        '--valid-weighted-split-paths: the group name "a" is used twice'
    ),
    "--tokenizer-type NullTokenizer": "--tokenizer-type NullTokenizer needs --vocab-size. Give --vocab-size the",
    # rules of checkpoint.py
    "--save x": "--save x is given, but not how often to save. Add --save-interval 1000 (every 1,000",
    "--save x --save-schedule 10:100 5:50": "--save-schedule: the range 5:50 ends at iteration 50, not after",
    "--keep-last 2 --keep-phase 10:100 5:50": "--keep-phase: the range 5:50 ends at iteration 50, not after",
    "--keep-every 10": "--keep-every has no effect without --keep-last: without it every checkpoint is kept. Remove",
    "--weights-only-every 10": "--weights-only-every 10 has no effect without --save. Add --save FOLDER and",
    "--save-best": "--save-best has no effect without --save. Add --save FOLDER and --save-interval N, or remove",
    # finetuning
    "--freeze (": "Cannot read --freeze (: expected regular expressions ('(': missing ), unterminated",
    "--lr-factors embedding": "Cannot read --lr-factors embedding: expected REGEX=FACTOR pairs, for example",
    "--lr-factors embedding=0": "Cannot read --lr-factors embedding=0: expected factors above 0 (for parameters that",
    "--early-stopping-patience 2 --eval-interval 0": "--early-stopping-patience 2 needs the loss of validations during",
    "--early-stopping-threshold 0.1": "--early-stopping-threshold 0.1 has no effect without --early-stopping-patience",
    "--answer-loss --mock-data": "--answer-loss cannot be combined with --mock-data, whose random tokens hold no",
    "--train-iters 0 --epochs 2 --mock-data": "--epochs 2 cannot be combined with --mock-data, whose random tokens",
    "--train-iters 0 --epochs 2 --data-path 0.3 x 0.7 y": "--epochs 2 cannot be combined with weights of training",
    "--data-path x y --control-codes a a": "--control-codes a a gives the code a twice. Give each dataset a code of",
    "--data-path x y --control-codes a b c": "--control-codes a b c gives 3 codes for 2 training datasets. Give one",
    "--train-data-path x y --control-codes a b --valid-data-path z": (
        "--control-codes a b gives 2 codes for 1 validation dataset. Each control code is validated on its own"
    ),
    "--spike-factor 0.5": "--spike-factor 0.5 would count usual losses as spikes. A loss above this factor times",
    "--auto-rollback 1": "--auto-rollback 1 is given without --spike-factor and --save. Automatic rollback loads",
    "--load x --override-lr-scheduler --use-checkpoint-lr-scheduler": "--override-opt-param-scheduler and",
    "--load-iteration 5": "--load-iteration has no effect without --load. Add --load FOLDER, or remove",
    # DeepSpeed
    "--deepspeed_config ds.json": "--deepspeed_config ds.json has no effect without --deepspeed. Add",
    "--deepspeed --deepspeed_config=": "The path of --deepspeed_config is empty (is a variable unset?). Give the path",
}
