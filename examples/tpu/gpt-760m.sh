#!/usr/bin/env bash
# GPT of 760M parameters with ALiBi on TPUs, such as 16 chips of v4 (v4-32); layers are recomputed in backward.
#   examples/tpu/gpt-760m.sh [FLAGS]
# Flags after the script override those here: --tensor-model-parallel-size 4, --train-iters 10_000.
set -euo pipefail
cd "$(dirname "$0")/../.."

data=${DATA:-/data}
exec python pretrain_gpt.py --device xla --preset gpt-760m --bf16 \
  --hidden-dropout 0 --attention-dropout 0 --use-distributed-optimizer \
  --recompute-granularity full --recompute-method uniform --recompute-num-layers 1 \
  --data-path "$data/corpus_text_document" --split 99,1,0 \
  --tokenizer-type HuggingFaceTokenizer --tokenizer-model "$data/tokenizer" \
  --micro-batch-size 4 --global-batch-size 256 --train-iters 150_000 --eval-interval 1000 --eval-iters 20 \
  --lr 2e-4 --min-lr 2e-5 --lr-decay-style cosine --lr-warmup-iters 2000 --weight-decay 0.1 --clip-grad 1.0 \
  --adam-beta2 0.95 --save "$data/runs/gpt-760m" --load "$data/runs/gpt-760m" --save-interval 1000 --async-save \
  --log-interval 10 "$@"
