"""Flag entries: optimizer, learning rate, precision and recomputation."""

from __future__ import annotations

from megatron_lite.config.flags.flag import Flag

OPTIMIZER = (
    Flag(
        "--optimizer",
        "optimizer.kind",
        "The update rule; adam is AdamW, as Megatron's is.",
        spellings={"adamw": "adam"},
    ),
    Flag("--adam-beta1", "optimizer.adam_beta1", "Decay of the first moment."),
    Flag("--adam-beta2", "optimizer.adam_beta2", "Decay of the second moment."),
    Flag("--adam-eps", "optimizer.adam_eps", "Added to the denominator."),
    Flag("--sgd-momentum", "optimizer.sgd_momentum", "Momentum of SGD.", most=1),
    Flag("--clip-grad", "optimizer.clip_grad", "Largest global gradient norm (0: no clipping)."),
    Flag("--weight-decay", "optimizer.weight_decay", "Decay of the weights that are matrices."),
    Flag("--start-weight-decay", "optimizer.start_weight_decay", "Weight decay at the start of the run."),
    Flag("--end-weight-decay", "optimizer.end_weight_decay", "Weight decay at its end."),
    Flag("--weight-decay-incr-style", "optimizer.weight_decay_style", "How it gets from one to the other."),
    Flag(
        "--check-for-nan-in-loss-and-grad",
        "optimizer.check_for_nan",
        "Stop at a loss or gradient that is not finite.",
        sets=True,
    ),
    Flag(
        "--no-check-for-nan-in-loss-and-grad",
        "optimizer.check_for_nan",
        "Go on with a loss or gradient that is not finite.",
        sets=False,
    ),
)

LEARNING_RATE = (
    Flag("--lr", "lr.lr", "The largest learning rate."),
    Flag("--min-lr", "lr.min_lr", "The smallest, where the decay ends."),
    Flag("--lr-decay-style", "lr.style", "How the learning rate falls."),
    Flag("--lr-decay-iters", "lr.decay_iters", "Iterations until --min-lr (0: the length of the run)."),
    Flag("--lr-decay-samples", "lr.decay_samples", "Samples until --min-lr (0: the length of the run)."),
    Flag("--lr-decay-tokens", "lr.decay_tokens", "Tokens until --min-lr, instead of either (0: none)."),
    Flag("--lr-warmup-iters", "lr.warmup_iters", "Iterations of linear warm-up."),
    Flag("--lr-warmup-samples", "lr.warmup_samples", "Samples of linear warm-up."),
    Flag(
        "--lr-warmup-fraction",
        "lr.warmup_fraction",
        "Warm-up as a share of the decay's length.",
        aliases=("--warmup",),
    ),
    Flag("--lr-warmup-init", "lr.warmup_init", "Learning rate at which warm-up starts."),
    Flag("--lr-wsd-decay-style", "lr.wsd_style", "Shape of the decay phase of WSD."),
    Flag("--lr-wsd-decay-iters", "lr.wsd_decay_iters", "Iterations of that phase."),
    Flag("--lr-wsd-decay-samples", "lr.wsd_decay_samples", "Samples of that phase."),
)

PRECISION = (
    Flag("--fp16", "precision.dtype", "Half precision with loss scaling.", sets="fp16"),
    Flag("--bf16", "precision.dtype", "bfloat16.", sets="bf16"),
    Flag("--fp32", "precision.dtype", "Single precision.", sets="fp32"),
    Flag("--loss-scale", "precision.loss_scale", "A constant loss scale for fp16 (0: dynamic)."),
    Flag("--dynamic-loss-scale", "precision.loss_scale", "The default for fp16.", sets=0.0, means="--loss-scale 0"),
    Flag("--initial-loss-scale", "precision.initial_loss_scale", "Where the dynamic loss scale starts."),
    Flag("--min-loss-scale", "precision.min_loss_scale", "The smallest dynamic loss scale.", aliases=("--min-scale",)),
    Flag("--loss-scale-window", "precision.loss_scale_window", "Good iterations before it is doubled."),
    Flag("--hysteresis", "precision.hysteresis", "Overflows before it is halved."),
    Flag(
        "--loss-scaler",
        "precision.scaler",
        "Whose rule of dynamic scaling: DeepSpeed refills the hysteresis at other times.",
    ),
)

RECOMPUTE = (
    Flag("--recompute-granularity", "recompute.granularity", "Which activations are computed again in backward."),
    Flag("--recompute-method", "recompute.method", "Which layers, under full recomputation."),
    Flag(
        "--recompute-num-layers",
        "recompute.num_layers",
        "Layers of one unit (uniform), or of a stage (block).",
        aliases=("--checkpoint-num-layers", "--activations-checkpoint-num-layers"),
    ),
    Flag(
        "--checkpoint-activations",
        "recompute.granularity",
        "Full recomputation, layer by layer.",
        sets="full",
        means="--recompute-granularity full --recompute-method uniform",
    ),
    Flag(
        "--recompute-activations",
        "recompute.granularity",
        "Recompute the core of attention only.",
        sets="selective",
        means="--recompute-granularity selective",
    ),
    Flag(
        "--activations-checkpoint-method",
        "recompute.method",
        "Old name of --recompute-method; full recomputation.",
        also=(("recompute.granularity", "full"),),
        means="--recompute-granularity full --recompute-method …",
    ),
)
