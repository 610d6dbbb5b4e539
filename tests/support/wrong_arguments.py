"""Wrong flags and DeepSpeed JSONs added to a sound command line, each with the beginning of its error."""

FROM_FLAGS = {
    # command line
    "--train-itres 5": "Unknown flag --train-itres. Did you mean --train-iters?",
    "--no-save": "--no-save is ambiguous: --no-save-on-exit, --no-save-optim, --no-save-rng. Write the flag in",
    "@nowhere.txt": "Argument file @nowhere.txt: No such file or directory. Give @FILE a path that exists:",
    "@quote.txt": "Close the quotes in quote.txt",
    "@latin.txt": "Argument file @latin.txt is not UTF-8: byte 0xe9 in line 2, byte 4 of the line, 11 of the",
    "--data-args-path latin.txt": "--data-args-path latin.txt is not UTF-8: byte 0xe9 in line 2, byte 4 of the",
    "--save x\udce9": "The argument b'x\\xe9' is not valid UTF-8. Retype it",
    "--load x\ud800": "The argument 'x\\ud800' is not valid UTF-8. Retype it",
    "--seed 4294967296": "--seed 4294967296 is out of range. Give --seed a number from 0 to 4,294,967,295",
    "--seed -1": "--seed -1 is out of range. Give --seed a number from 0 to 4,294,967,295",
    "--num-layers 1000000000": "--num-layers 1000000000 is out of range. Give --num-layers a number from 1 to",
    "--train-samples 1e16": "Cannot read --train-samples 1e16: expected a whole number of at most 1e+15. Write",
    "--lr 1e39": "Cannot read --lr 1e39: expected a number of at most 1e+38. Write --lr X",
    "--tensorboard-queue-size 0": "--tensorboard-queue-size 0 is out of range. Give --tensorboard-queue-size a",
    "--ddp-bucket-size 0": "Cannot read --ddp-bucket-size 0: expected a number of elements, 1 or more. Write",
    "@circle.txt": "Argument files name each other in a circle (@circle.txt, 10 files deep). Remove the @FILE",
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
    "--fp16 --bf16": "--fp16 and --bf16 contradict each other. Remove one of them",
    "--swiglu --squared-relu": "--swiglu and --squared-relu contradict each other. Remove one of them",
    "--glu-activation gelu": "Cannot read --glu-activation gelu: expected one of geglu, liglu, reglu, swiglu.",
    "--accept-changed weights": "Cannot read --accept-changed weights: expected some of tokenizer, data, code.",
    "--input x.jsonl": "--input x.jsonl is not supported. It is a flag of tools/preprocess_data.py or",
    # resolvers
    "--zero-stage 3": "ZeRO stage 3 is not supported (--zero-stage 3). Only the optimizer state is sharded over",
    "--zero-stage 0 --use-distributed-optimizer": (
        "--zero-stage 0 and --use-distributed-optimizer contradict each other."
    ),
    "--world-size 8": "--world-size 8 differs from the 4 ranks that the launcher started. Remove --world-size",
    "--no-position-embedding --position-embedding-type absolute": "--no-position-embedding and",
    "--no-bias-gelu-fusion --openai-gelu": "--no-bias-gelu-fusion (the exact GELU) and --openai-gelu",
    "--num-virtual-stages-per-pipeline-rank 3": "Cannot split 4 layers into 3 equal virtual stages",
    "--save-interval 0": "--save-interval 0 is out of range. Give --save-interval a number of at least 1",
    "--save-interval 5 --save-schedule 10": "--save-interval is the interval after the last range",
    "--data-args-path paths.txt --data-path x": "--data-args-path paths.txt and --data-path x",
    "--train-weighted-split-paths-path paths.txt": (
        "Cannot read paths.txt (--train-weighted-split-paths-path): expected"
    ),
    "--gas 0": "--gas 0 is out of range. Give --gas a number of at least 1",
    "--gas 3": "--global-batch-size 8 and --gas 3 contradict each other: micro-batch 2 x 3 accumulation steps x",
    "--calculate-per-token-loss --eod-mask-loss": "--calculate-per-token-loss is not supported together with",
    "--step-batch-size-schedule 1B:8": "Cannot read --step-batch-size-schedule 1B:8: expected a first pair that",
    # structured values
    "--step-batch-size-schedule 0:2 5": "pairs, for example 0:16 2.4B:320",
    "--step-batch-size-schedule 0:2 1:4": "thresholds that differ by at least one sample",
    "--step-batch-size-schedule 0:2 0.0000001K:4": "a whole number after its suffix",
    "--save-schedule 10 20:100": "<interval>:<last iteration> pairs",
    "--skip-train-iteration-range a-b": "ranges of iterations",
    "--seq-length-warmup 5": "start:iterations[:step]",
    "--seq-length-warmup a:b": "start:iterations[:step]",
    "--split 1,2,3,4": "one to three shares",
    "--split 0,0,0": "Cannot read --split 0,0,0: expected shares that are not all 0, for example 949,50,1. Write",
    "--valid-weighted-split-paths nonsense": '"NAME: WEIGHT START:END PATH',
    "--max-position-embeddings 1e-1": "a whole number",
    "--position-embedding-type relative": "Cannot read --position-embedding-type relative: expected one of",
    "--tokenizer-type NulTokenizer": "Did you mean --tokenizer-type NullTokenizer?",
    "--save-schedule ten": "Write --save-schedule INTERVAL:LAST …, for example --save-schedule 10:100 18:1000 1500",
    "--log-interval 1.5": "Write --log-interval N, for example --log-interval 100",
    "--rampup-batch-size 2 x 3": "for example --rampup-batch-size 16 16 5_000_000",
    # rules of model.py
    "--num-layers 0": "--num-layers 0 is out of range. Give --num-layers a number from 1 to 100,000",
    "--init-method-std -1": "--init-method-std -1 is out of range. Give --init-method-std a number of at least 0",
    "--hidden-size 66": "Cannot split the hidden size over the attention heads (--hidden-size 66",
    "--num-query-groups 3": "Cannot split 4 attention heads into 3 query groups (--num-query-groups 3",
    "--position-embedding-type rope --rotary-percent 0.2": (
        "Cannot rotate 3 of a head's 16 channels (--rotary-percent 0.2)."
    ),
    "--position-embedding-type rope --rotary-percent 2": (
        "--rotary-percent 2 is out of range. Give --rotary-percent a number"
    ),
    "--position-embedding-type rope --rotary-seq-len-interpolation-factor 0": (
        "--rotary-seq-len-interpolation-factor 0 is out of range. Give"
    ),
    "--max-position-embeddings 16": "The sequence is longer than the position table (--seq-length 32",
    "--hidden-dropout 1": "--hidden-dropout 1 is out of range. Give --hidden-dropout a number from 0 to below 1",
    "--parallel-residual --apply-residual-connection-post-layernorm": (
        "--parallel-residual and --apply-residual-connection-post-layernorm"
    ),
    "--preset gpt5": "Unknown preset --preset gpt5. Did you mean gpt-580m? Presets: gpt2-124m, gpt2-350m",
    "--norm-epsilon 0": "--norm-epsilon 0 is out of range. Give --norm-epsilon a number above 0",
    # rules of batch.py
    "--seq-length 0": "--seq-length 0 is out of range. Give --seq-length a number from 1 to 1,000,000,000",
    "--micro-batch-size 3": "Cannot split the global batch into micro-batches (--global-batch-size 8",
    "--rampup-batch-size 2 4 100": "The batch ramp-up does not reach the global batch: their difference of",
    "--rampup-batch-size 16 2 100": "The batch ramp-up starts above the global batch",
    "--rampup-batch-size 2 0 100": "--rampup-batch-size 2 0 100 needs a positive start and increment, and 0 or",
    "--rampup-batch-size 1 1 100": "Cannot split every batch of the ramp-up into micro-batches",
    "--step-batch-size-schedule 0:3 1M:8": "Cannot split batches 3 of --step-batch-size-schedule into",
    "--step-batch-size-schedule 0:2 1M:16": "--global-batch-size 8 differs from the last batch of",
    "--step-batch-size-schedule 0:2 1M:8 --rampup-batch-size 2 2 9": (
        "--step-batch-size-schedule cannot be combined with"
    ),
    "--decrease-batch-size-if-needed --global-batch-size 2": (
        "--decrease-batch-size-if-needed would round the batch down to 0"
    ),
    "--seq-length-warmup 64:10": "The curriculum has sequence lengths outside 1 to --seq-length 32, or no",
    "--seq-length-warmup 8:10:8 --sequence-parallel --tensor-model-parallel-size 4 --seq-length-warmup 6:10:2": (
        "Cannot split every sequence length of the curriculum over the"
    ),
    "--seq-length-warmup 0:8,5:16,5:32": "The stages of the curriculum need strictly increasing first iterations",
    # rules of training.py and optimizer.py
    "--train-samples 800": "The run has two lengths: --train-iters 100 and --train-samples 800. Remove one of",
    "--train-iters 0": "The run has no length: neither --train-iters nor --train-samples is given. Give one of",
    "--lr-decay-samples 100": "--lr-decay-samples 100 cannot be combined with --train-iters 100. The",
    "--train-iters 0 --train-samples 800 --lr-warmup-iters 2": (
        "--lr-warmup-iters 2 cannot be combined with --train-samples 800. The"
    ),
    "--lr 0": "The run has no learning rate (--lr 0). Give --lr a number above 0, such as 3e-4",
    "--min-lr 1": "--min-lr 1 is larger than --lr 0.001. Give --min-lr a number from 0 to 0.001, or raise --lr",
    "--lr-warmup-fraction 2": "--lr-warmup-fraction 2 is out of range. Give --lr-warmup-fraction a number from 0",
    "--lr-warmup-fraction 0.1 --lr-warmup-iters 5": "Warm-up has two lengths: --lr-warmup-fraction 0.1 and 5. Remove",
    "--lr-warmup-iters 500": "Warm-up is longer than the decay it is part of (--lr-warmup-iters 500, decay over",
    "--lr-decay-style WSD": "The decay phase of WSD has 0 of 100 iters (--lr-wsd-decay-iters 0). Give",
    "--start-weight-decay 0.1": "--start-weight-decay and --end-weight-decay have no effect with",
    "--weight-decay-incr-style linear": "The weight decay does not rise from a start to an end",
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
    "--tensor-model-parallel-size 2 --pipeline-model-parallel-size 4": "must divide the world size",
    "--tensor-model-parallel-size 4 --num-attention-heads 2 --kv-channels 16": (
        "Cannot split --num-attention-heads 2 over 4 tensor-parallel ranks"
    ),
    "--tensor-model-parallel-size 4 --seq-length 30 --sequence-parallel": (
        "Cannot split --seq-length 30 over 4 tensor-parallel ranks for"
    ),
    "--pipeline-model-parallel-size 4 --num-layers 2": "Cannot split 2 layers over 4 pipeline stages (--num-layers 2",
    "--pipeline-schedule interleaved": "--pipeline-schedule interleaved needs the size of a model chunk. Add",
    "--pipeline-model-parallel-size 2 --num-layers-per-virtual-pipeline-stage 1 --pipeline-schedule 1f1b": (
        "--num-layers-per-virtual-pipeline-stage 1 has no effect with"
    ),
    "--num-layers-per-virtual-pipeline-stage 1": "--num-layers-per-virtual-pipeline-stage 1 needs a pipeline",
    "--pipeline-model-parallel-size 2 --num-layers-per-virtual-pipeline-stage 3 --num-layers 8": (
        "Cannot split 8 layers into equally many chunks of 3 on each of 2"
    ),
    "--pp-partition-method type:(": "Unknown --pp-partition-method type:(. Use balanced, uniform, parameters, or",
    "--pp-partition-method best": "Unknown --pp-partition-method best. Use balanced, uniform, parameters, or",
    "--decoder-first-pipeline-num-layers 1": "Cannot size the first and last stage",
    "--decoder-first-pipeline-num-layers 4 --pipeline-model-parallel-size 4": (
        "Cannot split the 0 layers between the ends over 3 other stages"
    ),
    "--checkpoint-activations --recompute-num-layers 9": "Cannot recompute 9 of 4 layers (--recompute-num-layers 9",
    "--distributed-timeout-minutes 0": "--distributed-timeout-minutes 0 is out of range. Give",
    # rules of data.py
    "--mock-data --data-path x": "--data-path and --mock-data contradict each other. Keep one of --data-path",
    "--global-batch-size 1000000000": "A replica would run 125,000,000 micro-batches in an iteration, more than",
    "--prefetch-microbatches 1000000000": "--prefetch-microbatches 1000000000 is out of range. Give",
    "--data-path -1 x 2 y": "The blend has a negative weight, or only weights of 0: -1.0 x, 2.0 y. Give a",
    "--train-weighted-split-paths a:1_0:1_x b:1_0:1_x": (
        "The training data have 2 groups (a, b) instead of one. Join them into"
    ),
    "--valid-weighted-split-paths a:1_0:1_x a:1_0:1_x": (
        '--valid-weighted-split-paths: the group name "a" is used twice'
    ),
    "--tokenizer-type NullTokenizer": "--tokenizer-type NullTokenizer needs --vocab-size. Give --vocab-size the",
    # rules of checkpoint.py
    "--save x": "--save x needs an interval. Give --save-interval N, or --save-schedule, for example",
    "--save x --save-schedule 10:100 5:50": "--save-schedule: the range 5:50 (every 5 iterations up to iteration 50)",
    "--keep-last 2 --keep-phase 10:100 5:50": "--keep-phase: the range 5:50 (every 5 iterations up to iteration 50)",
    "--keep-every 10": "--keep-every and --keep-phase have no effect without --keep-last: every checkpoint is",
    "--weights-only-every 10": "--weights-only-every 10 needs --save. Add --save FOLDER and --save-interval N",
    "--spike-factor 0.5": "--spike-factor 0.5 would classify usual losses as spikes. Use a factor above 1, such",
    "--auto-rollback 1": "--auto-rollback 1 needs --spike-factor and --save. It returns to a checkpoint from",
    "--load x --override-lr-scheduler --use-checkpoint-lr-scheduler": "--override-opt-param-scheduler and",
    "--load-iteration 5": "--load-iteration has no effect without --load. Add --load FOLDER, or remove",
    # DeepSpeed
    "--deepspeed_config ds.json": "--deepspeed_config ds.json has no effect without --deepspeed. Add",
}

FROM_JSON = {
    '{"a": 1_000}': "ds.json (--deepspeed_config) is not JSON: Expecting ',' delimiter: line 1 column 8 (char",
    "[]": "ds.json (--deepspeed_config) does not hold a JSON object: '[]'. Write, for example,",
    '{"optimizer": {"type": "Adam"}}': 'The "optimizer" section of the DeepSpeed JSON is not supported.',
    '{"gradient_cliping": 1.0}': "Unknown entry gradient_cliping in the DeepSpeed JSON. Did you mean",
    '{"fp16": {"enabled": true, "hystereses": 2}}': (
        "Unknown entry fp16.hystereses in the DeepSpeed JSON. Did you mean"
    ),
    '{"fp16": true}': 'fp16 in the DeepSpeed JSON is True instead of an object. Write, for example, "fp16": {',
    '{"gradient_clipping": "1"}': "gradient_clipping in the DeepSpeed JSON is '1' instead of a number of at most",
    '{"gradient_clipping": NaN}': "gradient_clipping in the DeepSpeed JSON is nan instead of a number of at most",
    '{"gradient_clipping": 1e999}': "gradient_clipping in the DeepSpeed JSON is inf instead of a number of at",
    '{"fp16": {"enabled": true, "hysteresis": 1.5}}': (
        "fp16.hysteresis in the DeepSpeed JSON is 1.5 instead of a whole"
    ),
    '{"fp16": {"enabled": true, "initial_scale_power": 999}}': (
        "fp16.initial_scale_power in the DeepSpeed JSON is 999, beyond 126."
    ),
    "[" * 5000: "ds.json (--deepspeed_config) is not JSON: maximum recursion depth",
    '{"fp16": {"enabled": true}, "bf16": {"enabled": true}}': (
        "fp16 and bf16 are both enabled in the DeepSpeed JSON. Disable one of"
    ),
    '{"bf16": {"enabled": true}}': "The command line and the DeepSpeed JSON contradict each other: --fp16 and",
    '{"fp16": {"enabled": false}}': "The command line and the DeepSpeed JSON contradict each other: --fp16 and",
    '{"gradient_clipping": 0.5}': "--clip-grad 2 and gradient_clipping 0.5",
    '{"train_micro_batch_size_per_gpu": 4}': "--micro-batch-size 2 and train_micro_batch_size_per_gpu 4",
    '{"zero_optimization": {"stage": 2}}': "ZeRO stage 2 is not supported (zero_optimization.stage 2 in the",
    '{"zero_optimization": {"stage": 1, "offload_optimizer": {"device": "cpu"}}}': (
        "zero_optimization.offload_optimizer in the DeepSpeed JSON is not"
    ),
    '{"curriculum_learning": {"enabled": true, "curriculum_type": "vocab"}}': (
        "curriculum_learning in the DeepSpeed JSON has curriculum_type vocab"
    ),
    '{"curriculum_learning": {"enabled": true, "max_difficulty": 64, "min_difficulty": 8, "schedule_config": '
    '{"total_curriculum_step": 10}}}': "--seq-length 32 and curriculum_learning.max_difficulty 64",
    '{"curriculum_learning": {"enabled": true, "schedule_type": "fixed_discrete", "schedule_config": '
    '{"difficulty": [8], "max_step": [5]}}}': "fixed_discrete needs one difficulty more than max_step, but has",
}
