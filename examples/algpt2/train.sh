#!/usr/bin/env bash
# ALBERT-style GPT-2: one set of parameters for all layers and a factorized embedding, from text to a model of transformers.
#   examples/algpt2/train.sh [FOLDER]                 a toy model, in under a minute on 2 CPU cores
#
# The original pretrained such models on OpenWebText (GPT-2's tokenizer, 50,257 tokens), finetuned them on WikiText, IMDB,
# PG-19 and WritingPrompts with control codes, and evaluated them with detokenizers. It had 13,850,880 parameters where
# GPT-2 of the same shape (12 layers, hidden size 768) has 124,439,808. Its sizes are the presets algpt2, algpt2-e256,
# algpt2-e512, algpt2-shared, algpt2-medium, algpt2-large and algpt2-xl: for one of these, leave out the flags of step 3
# that override the preset (--num-layers to --max-position-embeddings), and give your own data and number of iterations.
set -euo pipefail
cd "$(dirname "$0")/../.."

out=${1:-runs/algpt2}
iterations=${ITERATIONS:-40}
rm -rf "$out"
mkdir -p "$out"
say() { printf '\n\033[1m== %s\033[0m\n' "$*"; }
lite() { python -m megatron_lite "$@"; }

say "1. Text and a tokenizer"
python examples/python_corpus.py "$out/corpus.jsonl" --max-mb "${MEGABYTES:-1}"
lite train-tokenizer --input "$out/corpus.jsonl" --output "$out/tokenizer" --vocab-size 512 --overwrite

say "2. Data"
lite preprocess --input "$out/corpus.jsonl" --output-prefix "$out/text" --append-eod \
  --tokenizer-type HuggingFaceTokenizer --tokenizer-model "$out/tokenizer"

say "3. Pretraining: a small model with all layers shared, as in the preset"
python pretrain_gpt.py --preset algpt2 --num-layers 6 --hidden-size 96 --num-attention-heads 6 --embedding-size 24 \
  --seq-length 128 --max-position-embeddings 128 \
  --tokenizer-type HuggingFaceTokenizer --tokenizer-model "$out/tokenizer" \
  --data-path "$out/text_text_document" --split 95,5,0 --eval-interval "$iterations" --eval-iters 2 \
  --micro-batch-size 8 --train-iters "$iterations" --lr 3e-3 --min-lr 3e-4 --lr-decay-style cosine \
  --lr-warmup-iters 4 --weight-decay 0.1 --hidden-dropout 0 --attention-dropout 0 \
  --save "$out/run" --load "$out/run" --save-interval "$iterations" --log-interval 10

say "4. Evaluation and a sample"
head -c 4000 examples/python_corpus.py > "$out/sample.txt"
lite evaluate --load "$out/run" --text "$out/sample.txt"
lite generate --load "$out/run" --prompt "def main(" --max-new-tokens 20 --seed 1

say "5. Export: transformers computes the same logits with the modeling file in the folder"
lite export "$out/run" --output "$out/exported"
# transformers.AutoModelForCausalLM.from_pretrained("runs/algpt2/exported", trust_remote_code=True)
