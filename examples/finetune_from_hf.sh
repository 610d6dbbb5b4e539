#!/usr/bin/env bash
# From a Hugging Face folder to training and back, offline: a small random Llama stands in for a downloaded model.
#   examples/finetune_from_hf.sh [FOLDER]
# With a model of the hub, leave steps 1 and 2 out: hf download meta-llama/Llama-2-7b-hf --local-dir "$out/model"
set -euo pipefail
cd "$(dirname "$0")/.."

out=${1:-runs/finetune_from_hf}
iterations=${ITERATIONS:-20}
rm -rf "$out"
mkdir -p "$out"
say() { printf '\n\033[1m== %s\033[0m\n' "$*"; }
lite() { python -m megatron_lite "$@"; }

say "1. Text and a tokenizer"
python examples/python_corpus.py "$out/corpus.jsonl" --max-mb "${MEGABYTES:-1}"
lite train-tokenizer --input "$out/corpus.jsonl" --output "$out/tokenizer" --vocab-size 512 --overwrite

say "2. A model as it comes from the hub"
python examples/tiny_hf_model.py "$out/model" --tokenizer "$out/tokenizer"

say "3. Import: its logits are compared with those of transformers"
lite import "$out/model" --output "$out/imported"

say "4. Data, in the model's own tokens"
lite preprocess --input "$out/corpus.jsonl" --output-prefix "$out/text" --append-eod \
  --tokenizer-type HuggingFaceTokenizer --tokenizer-model "$out/imported/tokenizer"

say "5. Fine-tuning: the flags are those that the import printed"
python pretrain_gpt.py --load "$out/imported" --finetune --save "$out/run" --save-interval "$iterations" \
  --num-layers 2 --hidden-size 64 --num-attention-heads 4 --group-query-attention --num-query-groups 2 \
  --ffn-hidden-size 128 --seq-length 128 --position-embedding-type rope --normalization RMSNorm --norm-epsilon 1e-6 \
  --swiglu --disable-bias-linear --untie-embeddings-and-output-weights --hidden-dropout 0 --attention-dropout 0 \
  --tokenizer-type HuggingFaceTokenizer --tokenizer-model "$out/imported/tokenizer" \
  --data-path "$out/text_text_document" --split 95,5,0 --eval-interval "$iterations" --eval-iters 2 \
  --micro-batch-size 4 --train-iters "$iterations" --lr 1e-3 --lr-warmup-iters 2 --log-interval 5

say "6. Export: checked again before it gets its name; then what a push would upload"
# Without --dry-run, and with HF_TOKEN set, it is pushed.
lite export "$out/run" --output "$out/exported" --push-to your-name/your-model --dry-run

say "7. What has changed"
lite checkpoint diff "$out/model" "$out/exported" --values || true
