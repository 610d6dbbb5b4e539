#!/usr/bin/env bash
# ALBERT-style GPT-2 on TPUs: 12 layers of hidden size 768 with one set of parameters, and a factorized embedding.
#   examples/tpu/albert.sh [FLAGS]
# Flags after the script override those here: --preset algpt2-large, --train-iters 10_000.
set -euo pipefail
cd "$(dirname "$0")/../.."

data=${DATA:-/data}
exec python pretrain_gpt.py --device xla --preset algpt2 --bf16 \
  --hidden-dropout 0 --attention-dropout 0 --use-distributed-optimizer \
  --data-path "$data/openwebtext_text_document" --split 99,1,0 \
  --tokenizer-type HuggingFaceTokenizer --tokenizer-model "$data/tokenizer" \
  --micro-batch-size 16 --global-batch-size 512 --train-iters 100_000 --eval-interval 1000 --eval-iters 20 \
  --lr 6e-4 --min-lr 6e-5 --lr-decay-style cosine --lr-warmup-iters 2000 --weight-decay 0.1 --clip-grad 1.0 \
  --adam-beta2 0.95 --save "$data/runs/algpt2" --load "$data/runs/algpt2" --save-interval 1000 --log-interval 10 "$@"
