#!/usr/bin/env bash
# Finetuning on several datasets at once, each with a control code, at toy size: under a minute on 2 CPU cores, offline.
#   examples/finetune_control_codes/run.sh [FOLDER]
#
# The original: ALBERT-style GPT-2 (layer sharing, factorised embedding), pretrained on OpenWebText, was finetuned on
# WikiText, IMDB, PG-19 and WritingPrompts at once. Each document began with the control code of its dataset, and each
# dataset had a validation set of its own. Evaluation used detokenizers (megatron-lite evaluate --wikitext).
#
# Here, make_texts.py writes four small stand-ins and a corpus for pretraining. With the real datasets, give their files
# to preprocess: .jsonl, or text files with --plain-text.
set -euo pipefail
cd "$(dirname "$0")/../.."

out=${1:-runs/finetune_control_codes}
rm -rf "$out"
mkdir -p "$out"
say() { printf '\n\033[1m== %s\033[0m\n' "$*"; }
lite() { python -m megatron_lite "$@"; }
codes=('<|wikitext|>' '<|imdb|>' '<|pg19|>' '<|writingprompts|>')
names=(wikitext imdb pg19 writingprompts)

say "1. Texts, and a tokenizer in which each control code is a special token"
python examples/finetune_control_codes/make_texts.py "$out"
lite train-tokenizer --input "$out"/*.jsonl --output "$out/tokenizer" --vocab-size 512 \
  --special-tokens '<|endoftext|>' "${codes[@]}"
tokenizer=(--tokenizer-type HuggingFaceTokenizer --tokenizer-model "$out/tokenizer")

say "2. Datasets: every document of a dataset begins with the dataset's code"
lite preprocess --input "$out/web.jsonl" --output-prefix "$out/web" --append-eod "${tokenizer[@]}"
for i in "${!codes[@]}"; do
  lite preprocess --input "$out/${names[i]}.jsonl" --output-prefix "$out/${names[i]}" --append-eod "${tokenizer[@]}" \
    --control-code "${codes[i]}"
done

model=(
  "${tokenizer[@]}" --num-layers 2 --hidden-size 64 --num-attention-heads 4 --seq-length 64
  --max-position-embeddings 64 --attention-dropout 0 --hidden-dropout 0 --micro-batch-size 8 --lr 3e-3
  --device cpu --log-interval 20
)

say "3. Pretraining"
python pretrain_gpt.py "${model[@]}" --data-path "$out/web_text_document" --split 1,0,0 --train-iters 80 \
  --lr-warmup-iters 5 --save "$out/pretrained" --save-interval 80

data=()
for name in "${names[@]}"; do data+=("$out/${name}_text_document"); done

say "4. Finetuning for 3 epochs: a validation set for each code, their average decides which checkpoint is the best"
# The position table keeps its values, and the lower layer learns half as fast.
python pretrain_gpt.py "${model[@]}" --load "$out/pretrained" --finetune --save "$out/run" --save-interval 1000 \
  --data-path "${data[@]}" --split 80,20,0 --control-codes "${codes[@]}" --epochs 3 --lr-warmup-iters 5 \
  --freeze position_embeddings --lr-factors 'layers\.0\.=0.5' \
  --eval-interval 20 --eval-iters 2 --early-stopping-patience 3 --save-best --keep-last 1

say "5. A sample for each code, from the best checkpoint"
lite generate --load "$out/run/best" "${codes[@]/#/--prompt=}" --max-new-tokens 20 --temperature 0.5 --seed 1 --device cpu
lite checkpoint list "$out/run"
