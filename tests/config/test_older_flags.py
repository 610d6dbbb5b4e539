"""Spellings of 2019-2021 (Megatron-LM 0.1 to 2, Megatron 1.1 with DeepSpeed's pipeline, GPT-NeoX before YAML)."""

import shlex

import pytest
from support.job_commands import SMALL, without

from megatron_lite.config.arguments import parse_run
from megatron_lite.config.table import flags_by_spelling, spelling
from megatron_lite.errors import ConfigError

# What the public script ds_pretrain_gpt2_pipe.sh of Megatron 1.1.5 passes, its variables replaced.
MEGATRON_1_1 = shlex.split(
    """
    --model-parallel-size 2 --pipe-parallel-size 2 --num-layers 24 --hidden-size 1024 --num-attention-heads 16
    --seq-length 1024 --max-position-embeddings 1024 --batch-size 4 --gas 16 --train-iters 320000
    --lr-decay-iters 320000 --save checkpoints/gpt2 --load checkpoints/gpt2 --data-path data/enron_text_document
    --vocab-file gpt2-vocab.json --merge-file gpt2-merges.txt --data-impl mmap --split 949,50,1
    --distributed-backend nccl --lr 1.5e-4 --lr-decay-style cosine --min-lr 1.0e-5 --weight-decay 1e-2 --clip-grad 1.0
    --warmup 0.01 --checkpoint-activations --log-interval 1 --save-interval 500 --eval-interval 100 --eval-iters 10
    --fp16 --tensorboard-dir tensorboard_data/x --deepspeed --deepspeed_config ds_zero_stage_2_config.json
    --zero-stage 0 --zero-reduce-bucket-size 50000000 --zero-allgather-bucket-size 5000000000
    --zero-contigious-gradients --zero-reduce-scatter --checkpoint-activations --checkpoint-num-layers 1
    --partition-activations --synchronize-each-layer --contigious-checkpointing
    """
)


def test_megatron_1_1_script():
    parsed = parse_run(MEGATRON_1_1, world_size=16)
    config = parsed.config
    assert (config.parallel.tp, config.parallel.pp, config.parallel.dp) == (2, 2, 4)
    assert (config.batch.micro_batch_size, config.batch.global_batch_size) == (4, 4 * 16 * 4)
    assert config.lr.warmup_fraction == 0.01
    assert not parsed.warnings
    notes = "\n".join(parsed.notes)
    for part in (
        "--gas 16 is read as --global-batch-size 256: micro-batch 4 x 16 accumulation steps x data-parallel size 4",
        "--pipe-parallel-size is read as --pipeline-model-parallel-size",
        "--model-parallel-size is read as --tensor-model-parallel-size",
        "--batch-size is read as --micro-batch-size",
        "--warmup is read as --lr-warmup-fraction",
    ):
        assert part in notes


TRANSLATED = {
    "--model-parallel-size 2": ("parallel.tp", 2, "--tensor-model-parallel-size"),
    "--pipe-parallel-size 2": ("parallel.pp", 2, "--pipeline-model-parallel-size"),
    "--pipe-parallel-size 0": ("parallel.pp", 1, "--pipeline-model-parallel-size"),
    "--warmup 0.05": ("lr.warmup_fraction", 0.05, "--lr-warmup-fraction"),
    "--min-scale 2": ("precision.min_loss_scale", 2, "--min-loss-scale"),
    "--fp16 --dynamic-loss-scale": ("precision.loss_scale", 0, "--loss-scale 0"),
    "--checkpoint-activations --checkpoint-num-layers 2": ("recompute.num_layers", 2, "--recompute-num-layers"),
    "--activations-checkpoint-method uniform": ("recompute.granularity", "full", "--recompute-granularity full"),
    "--pos-emb rotary": ("model.position_embedding", "rotary", "--position-embedding-type"),
    "--pos-emb none": ("model.position_embedding", "none", "--position-embedding-type"),
    "--pos-emb rotary --rotary-emb-base 500": ("model.rotary_base", 500, "--rotary-base"),
    "--pos-emb rotary --rotary-pct 0.5": ("model.rotary_percent", 0.5, "--rotary-percent"),
    "--norm rmsnorm": ("model.normalization", "RMSNorm", "--normalization"),
    "--norm rmsnorm --rms-norm-epsilon 1e-8": ("model.norm_epsilon", 1e-8, "--norm-epsilon"),
    "--layernorm-epsilon 1e-6": ("model.norm_epsilon", 1e-6, "--norm-epsilon"),
    "--no-weight-tying": ("model.tied_embeddings", False, "--untie-embeddings-and-output-weights"),
    "--bias-gelu-fusion": ("model.activation", "gelu_tanh", "--activation gelu_tanh"),
    "--num-key-value-heads 2": ("model.num_query_groups", 2, "--group-query-attention --num-query-groups"),
    "--keep-last-n-checkpoints 4": ("checkpoint.keep_last", 4, "--keep-last"),
    "--load x --use-checkpoint-lr-scheduler": (
        "checkpoint.use_checkpoint_schedule",
        True,
        "--use-checkpoint-opt-param-scheduler",
    ),
    "--tokenizer-type HFTokenizer": ("tokenizer.type", "HuggingFaceTokenizer", ""),
}


@pytest.mark.parametrize("extra", TRANSLATED)
def test_older_spellings_are_translated_with_a_note(extra):
    path, value, modern = TRANSLATED[extra]
    section, name = path.split(".")
    parsed = parse_run([*SMALL, *extra.split()], world_size=4)
    assert getattr(getattr(parsed.config, section), name) == value
    assert not modern or any(f"is read as {modern}" in note for note in parsed.notes)
    assert not parsed.warnings


@pytest.mark.parametrize("flag", ["--gas", "--gradient-accumulation-steps"])
def test_accumulation_steps_make_the_global_batch(flag):
    argv = [*without(SMALL, "--global-batch-size"), flag, "3"]
    assert parse_run([*argv, "--tensor-model-parallel-size", "2"], world_size=8).config.batch.global_batch_size == 24
    assert parse_run(argv).config.batch.global_batch_size == 6
    assert parse_run([*argv, "--global-batch-size", "12"], world_size=2).config.batch.global_batch_size == 12


WITHOUT_EFFECT = (
    "--scaled-upper-triang-masked-softmax-fusion --scaled-masked-softmax-fusion --bias-dropout-fusion --fp32-allreduce "
    "--wandb-group --git-hash --exp-name --resume-dataloader"
)


@pytest.mark.parametrize("flag", WITHOUT_EFFECT.split())
def test_flags_without_effect_are_noted(flag):
    parsed = parse_run([*SMALL, flag])
    assert any(note.startswith(f"{flag} has no effect") for note in parsed.notes)


REFUSED = {
    "--geglu": "--activation geglu",
    "--sinusoidal-pos-emb": "--position-embedding-type",
    "--pos-emb sinusoidal": "expected one of learned, rotary, alibi, none",
    "--rpe-num-buckets 32": "--position-embedding-type",
    "--norm scalenorm": "expected one of LayerNorm, RMSNorm. Did you mean --normalization",
    "--scalenorm-epsilon 1e-8": "--normalization",
    "--sparsity all": "Only dense attention is implemented",
    "--num-unique-layers 2": "Layers that share weights are not implemented",
    "--onebitadam": "Use --optimizer",
    "--sm3": "Use --optimizer",
    "--lr-decay-ratio 0.1": "Use --min-lr",
    "--lr-decay-style exponential": "expected one of constant, linear, cosine",
    "--train-batch-size 32": "--micro-batch-size and --global-batch-size",
    "--train-data wikipedia": "tools/preprocess_data.py",
    "--lazy-loader": "tools/preprocess_data.py",
    "--eval-batch-size 4": "Validation uses the sequence length and batch size of training",
    "--cache-dir x": "--tokenizer-type",
    "--tokenizer-model-type bert-large-uncased": "--tokenizer-type",
}


@pytest.mark.parametrize("extra", REFUSED)
def test_uncertain_older_flags_are_refused_with_an_alternative(extra):
    with pytest.raises(ConfigError) as caught:
        parse_run([*SMALL, *extra.split()])
    assert REFUSED[extra] in str(caught.value)


@pytest.mark.parametrize("extra", ["--sparsity none", "--param-sharing-style grouped"])
def test_harmless_values_of_refused_flags_are_accepted(extra):
    parse_run([*SMALL, *extra.split()])


def test_every_spelling_of_this_page_has_a_row():
    words = [word for text in (*TRANSLATED, *REFUSED, WITHOUT_EFFECT) for word in text.split()]
    assert {spelling(word) for word in words if word.startswith("--")} <= set(flags_by_spelling())
