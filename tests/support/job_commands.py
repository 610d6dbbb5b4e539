"""Command lines of real jobs, in their spellings of flags."""

import shlex

SMALL = shlex.split(
    """
    --num-layers 4 --hidden-size 64 --num-attention-heads 4 --seq-length 32 --micro-batch-size 2
    --global-batch-size 8 --train-iters 100 --lr 1e-3
    """
)

BIG_RAMP = shlex.split(
    """
    --tensor-model-parallel-size 2 --pipeline-model-parallel-size 4 --num-layers 40 --hidden-size 5120
    --num-attention-heads 32 --ffn-hidden-size 20480 --seq-length 2048 --max-position-embeddings 2048
    --micro-batch-size 1 --rampup-batch-size 16 16 5_000_000 --global-batch-size 1024 --train-samples 300_000_000
    --vocab-file data/gpt2-vocab.json --merge-file data/gpt2-merges.txt --loss-scale 12 --clip-grad 1.0 --fp16
    --checkpoint-activations --seed 42 --optimizer adam --adam-beta1 0.9 --adam-beta2 0.999 --adam-eps 1e-8
    --lr 1e-4 --min-lr 1e-5 --lr-decay-style cosine --lr-decay-samples 126_953_125 --lr-warmup-samples 216_320
    --clip-grad 1.0 --weight-decay 1e-1 --exit-duration-in-mins 1190 --log-interval 10 --save-interval 1500
    --eval-interval 1000 --eval-iters 5 --codecarbon-dir run/codecarbon --tensorboard-dir run/tensorboard
    --tensorboard-queue-size 5 --log-timers-to-tensorboard --log-batch-size-to-tensorboard
    --log-validation-ppl-to-tensorboard --save run/13B/checkpoints --load run/13B/checkpoints
    --data-path data/oscar_text_document --data-impl mmap --split 949,50,1 --distributed-backend nccl --deepspeed
    --deepspeed_config ./ds_config.json --zero-stage 1 --deepspeed-activation-checkpointing
    """
)

MULTILINGUAL = shlex.split(
    """
    --tensor-model-parallel-size 4 --pipeline-model-parallel-size 12 --num-layers 70 --hidden-size 14336
    --num-attention-heads 112 --seq-length 2048 --max-position-embeddings 2048 --micro-batch-size 2
    --rampup-batch-size 192 16 9_765_625 --global-batch-size 2048 --train-samples 220_000_000
    --tokenizer-type PretrainedFromHF --tokenizer-name-or-path tokenizer --init-method-std 0.0048
    --embed-layernorm --sync-tp-duplicated-parameters --bf16 --seed 42 --position-embedding-type alibi
    --checkpoint-activations --abort-on-unmet-fused-kernel-constraints --kill-switch-path kill-switch
    --pad-vocab-size-to 250880 --optimizer adam --adam-beta1 0.9 --adam-beta2 0.95 --adam-eps 1e-8 --lr 6e-5
    --min-lr 6e-6 --lr-decay-style cosine --lr-decay-samples 200_000_000 --lr-warmup-samples 183_105
    --clip-grad 1.0 --weight-decay 1e-1 --exit-duration-in-mins 5990 --log-interval 1 --save-interval 100
    --eval-interval 1000 --eval-iters 1 --save main --load main --num-workers 2 --valid-num-workers 0
    --zero-stage 0 --deepspeed --deepspeed_config=ds_config.json --skip-train-iteration-range 12-20 30-31
    --pp-partition-method "'type:transformer|embedding'"
    --train-weighted-split-paths 'TRAIN: 0.3 0:0.95 data/en, 0.7 0:0.95 data/fr'
    --valid-weighted-split-paths 'all: 0.5 0.95:1.0 data/en, 0.5 0.95:1 data/fr' 'en: 1 0.95:1.0 data/en'
    """
)

LLAMA = shlex.split(
    """
    --use-mcore-models --num-layers 32 --hidden-size 4096 --ffn-hidden-size 14336 --num-attention-heads 32
    --group-query-attention --num-query-groups 8 --kv-channels 128 --seq-length 8192
    --max-position-embeddings 8192 --position-embedding-type rope --rotary-base 1000000 --rotary-percent 1.0
    --attention-dropout 0.0 --hidden-dropout 0.0 --swiglu --init-method-std 0.0134 --attention-backend fused
    --apply-layernorm-1p --untie-embeddings-and-output-weights --disable-bias-linear --normalization RMSNorm
    --micro-batch-size 1 --global-batch-size 128 --train-samples 1953125000 --lr-decay-samples 1949218748
    --lr-warmup-samples 3906252 --lr 0.00015 --min-lr 0.00001 --lr-decay-style cosine --clip-grad 1.0
    --weight-decay 0.1 --adam-beta1 0.9 --adam-beta2 0.95 --bf16 --grad-reduce-in-bf16 --cross-entropy-loss-fusion
    --calculate-per-token-loss --manual-gc --empty-unused-memory-level 1 --tensor-model-parallel-size 1
    --context-parallel-size 1 --sequence-parallel --use-distributed-optimizer --overlap-grad-reduce
    --overlap-param-gather --tokenizer-type NullTokenizer --vocab-size 128256
    --no-create-attention-mask-in-dataloader --no-mmap-bin-files --num-workers 1 --log-interval 1 --eval-iters 32
    --eval-interval 100 --save-interval 1000 --log-throughput --profile --profile-step-start 4
    --profile-step-end 6 --ckpt-format torch_dist --distributed-timeout-minutes 60 --save ckpt --load ckpt
    --tensorboard-dir tb --mock-data --split '99, 1, 0'
    """
)

CURRICULUM = shlex.split(
    """
    --num-layers 24 --hidden-size 2048 --num-attention-heads 16 --ffn-hidden-size 5456 --seq-length 2048
    --max-position-embeddings 2048 --micro-batch-size 8 --global-batch-size 512
    --rampup-batch-size 32 32 2_000_000 --no-bias-gelu-fusion --glu-activation swiglu --train-samples 73_242_187
    --train-tokens 100_000_000_000 --lr-decay-tokens 90_000_000_000 --lr-warmup-samples 183_105 --lr 2e-4
    --min-lr 1e-5 --lr-decay-style cosine --fp16 --deepspeed --deepspeed_config ds_config.json
    --data-path 0.3 data/a 0.7 data/b --eval-only False --log-level info --use-bnb-optimizer
    --no-query-key-layer-scaling --seq_length_warmup 64:36000:8
    """
)

FAMOUS = {
    "big ramp": (BIG_RAMP, 512),
    "multilingual": (MULTILINGUAL, 384),
    "llama": (LLAMA, 64),
    "curriculum": (CURRICULUM, 64),
    "small": (SMALL, 1),
}


def without(argv: list[str], *flags: str) -> list[str]:
    """Return the command line without some flags and their values."""
    kept, dropping = [], False
    for word in argv:
        if word.startswith("--"):
            dropping = word.partition("=")[0] in flags
        if not dropping:
            kept.append(word)
    return kept
