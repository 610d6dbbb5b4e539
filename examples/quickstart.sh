#!/usr/bin/env bash
# Demo in a few minutes: corpus, tokenizer, dataset, training with a stop and a resume, validation, a sample and the loss
# curve. `make demo` runs it inside .venv; with megatron_lite installed:
#   examples/quickstart.sh [FOLDER]
set -euo pipefail
cd "$(dirname "$0")/.."

out=${1:-runs/quickstart}
# Expected validation loss (nats per token of the tokenizer trained here), as in README.md.
expected_loss=4.70
tolerance=0.25
iterations=450
half=$((iterations / 2))
workers=$(python -c 'import os; print(min(8, os.cpu_count() or 1))')

rm -rf "$out"
mkdir -p "$out"
say() { printf '\n\033[1m== %s\033[0m\n' "$*"; }

say "1. Text: sources of Python's standard library"
python examples/python_corpus.py "$out/corpus.jsonl" --max-mb 24

say "2. Tokenizer: byte-level BPE of 4096 tokens"
python tools/train_tokenizer.py --input "$out/corpus.jsonl" --output "$out/tokenizer" --vocab-size 4096 --overwrite

say "3. Dataset: .bin and .idx"
python tools/preprocess_data.py --input "$out/corpus.jsonl" --output-prefix "$out/python" --workers "$workers" \
  --tokenizer-type HuggingFaceTokenizer --tokenizer-model "$out/tokenizer" --append-eod

train=(
  python pretrain_gpt.py
  --data-path "$out/python_text_document" --split "95,4,1"
  --tokenizer-type HuggingFaceTokenizer --tokenizer-model "$out/tokenizer"
  --num-layers 4 --hidden-size 192 --num-attention-heads 6 --seq-length 128 --max-position-embeddings 128
  --attention-dropout 0 --hidden-dropout 0
  --micro-batch-size 16 --global-batch-size 16 --train-iters "$iterations"
  --lr 3e-3 --min-lr 3e-4 --lr-decay-style cosine --lr-warmup-iters 20 --weight-decay 0.1 --adam-beta2 0.95
  --eval-interval 75 --eval-iters 16 --log-interval 25
  --save "$out/run" --load "$out/run" --save-interval "$half"
)

say "4. Training, the first half: stops after $half iterations"
"${train[@]}" --exit-after-iters "$half"

say "5. Training, the second half: the same command resumes from the checkpoint"
"${train[@]}"

say "6. Generated text"
megatron-lite generate --load "$out/run" --prompt "def main(" --max-new-tokens 80 --temperature 0.7 --top-k 40 --seed 1

say "7. Loss curve"
megatron-lite curve "$out/run/metrics.jsonl" --svg "$out/loss.svg"

say "8. Files"
cat <<EOF
corpus          $out/corpus.jsonl
tokenizer       $out/tokenizer/
dataset         $out/python_text_document.bin, .idx
checkpoints     $out/run/iter_*            (megatron-lite checkpoint list $out/run)
metrics         $out/run/metrics.jsonl
loss curve      $out/loss.svg
EOF

python examples/check_loss.py "$out/run/metrics.jsonl" --expected "$expected_loss" --tolerance "$tolerance"
