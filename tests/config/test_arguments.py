import json
import subprocess
import sys
from dataclasses import fields, replace
from pathlib import Path

import pytest
from support.job_commands import BIG_RAMP, CURRICULUM, FAMOUS, LLAMA, MULTILINGUAL, SMALL

from megatron_lite.config.arguments import parse_run, to_argv
from megatron_lite.config.batch import Rampup, SequenceRamp
from megatron_lite.config.checkpoint import SavePhase
from megatron_lite.config.data import DataSource
from megatron_lite.config.run import RunConfig
from megatron_lite.config.table import SECTIONS

DEEPSPEED_FP16 = {
    "train_micro_batch_size_per_gpu": 1,
    "train_batch_size": 1024,
    "gradient_clipping": 1.0,
    "zero_optimization": {"stage": 1},
    "fp16": {
        "enabled": True,
        "loss_scale": 0,
        "loss_scale_window": 500,
        "hysteresis": 2,
        "min_loss_scale": 1,
        "initial_scale_power": 12,
    },
    "steps_per_print": 2000,
    "wall_clock_breakdown": False,
}


@pytest.mark.parametrize("name", FAMOUS)
def test_to_argv_round_trip(name):
    argv, world = FAMOUS[name]
    config = parse_run(argv, world_size=world).config
    assert parse_run(to_argv(config)).config == config
    assert parse_run(to_argv(config), world_size=world).config == config


def test_big_ramp_with_its_deepspeed_json(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("ds_config.json").write_text(json.dumps(DEEPSPEED_FP16))
    parsed = parse_run(BIG_RAMP, world_size=512)
    config = parsed.config
    assert config.batch.rampup == Rampup(start=16, increment=16, samples=5_000_000)
    assert config.parallel.dp == 64
    assert config.parallel.distributed_optimizer
    assert config.precision.dtype == "fp16"
    assert config.precision.loss_scale == 0
    assert config.precision.initial_loss_scale == 4096
    assert config.precision.loss_scale_window == 500
    assert config.precision.scaler == "deepspeed"
    assert config.recompute.granularity == "full"
    assert config.checkpoint.phases == (SavePhase(interval=1500),)
    assert config.tokenizer.type == "GPT2BPETokenizer"
    assert not parsed.missing
    assert not parsed.warnings
    notes = "\n".join(parsed.notes)
    for word in ("--data-impl mmap", "--loss-scale 12", "--checkpoint-activations is read as", "train_batch_size"):
        assert word in notes


def test_a_missing_deepspeed_json_is_not_an_error_yet():
    parsed = parse_run(BIG_RAMP, world_size=512)
    assert "--deepspeed_config" in str(parsed.missing[0])
    assert parsed.config.precision.loss_scale == 0, "12 would be a static scale, which --deepspeed never means"


def test_multilingual():
    config = parse_run(MULTILINGUAL, world_size=384).config
    assert config.parallel.partition_method == "type:transformer|embedding", "quotes of the shell are not part of it"
    assert config.model.padded_vocab_size == 250880
    assert config.model.position_embedding == "alibi"
    assert config.tokenizer.type == "HuggingFaceTokenizer"
    assert config.tokenizer.model == "tokenizer"
    assert [group.name for group in config.data.valid_groups] == ["all", "en"]
    assert config.data.train_groups[0].sources[1] == DataSource(path="data/fr", weight=0.7, start=0.0, end=0.95)
    assert config.training.skip_iteration_ranges == ((12, 20), (30, 31))
    assert not config.parallel.distributed_optimizer


def test_llama():
    config = parse_run(LLAMA, world_size=64).config
    model = config.model
    assert (model.activation, model.normalization, model.num_query_groups) == ("swiglu", "RMSNorm", 8)
    assert not model.linear_bias
    assert not model.qkv_bias, "--disable-bias-linear takes the bias of q, k and v with it"
    assert not model.tied_embeddings
    assert model.rotary_base == 1_000_000
    assert config.data.split == "99,1,0"
    assert config.data.mock


def test_curriculum():
    config = parse_run(CURRICULUM, world_size=64).config
    assert config.batch.sequence_ramp == SequenceRamp(start=64, iterations=36000, step=8)
    assert config.model.activation == "swiglu", "--no-bias-gelu-fusion is about GELUs"
    assert config.data.sources == (DataSource(path="data/a", weight=0.3), DataSource(path="data/b", weight=0.7))
    assert not config.training.skip_train
    assert config.lr.decay_tokens == 90_000_000_000


@pytest.mark.parametrize(
    ("extra", "path", "value"),
    [
        ("--activations-checkpoint-method uniform", "recompute.granularity", "full"),
        ("--activations-checkpoint-method block", "recompute.method", "block"),
        ("--recompute-activations", "recompute.granularity", "selective"),
        ("--no-bias-gelu-fusion", "model.activation", "gelu"),
        ("--device gpu", "runtime.device", "cuda"),
        ("--position-embedding-type rope", "model.position_embedding", "rotary"),
        ("--position-embedding-type rope --no-position-embedding", "model.position_embedding", "rotary"),
        ("--no-position-embedding", "model.position_embedding", "none"),
        ("--use-rotary-position-embeddings", "model.position_embedding", "rotary"),
        ("--group-query-attention", "model.num_query_groups", 1),
        ("--num-query-groups 2", "model.num_query_groups", 2),
        ("", "model.num_query_groups", 4),
        ("", "model.max_position_embeddings", 32),
        ("--disable-bias-linear --add-qkv-bias", "model.qkv_bias", True),
        ("--add-qkv-bias --disable-bias-linear", "model.qkv_bias", True),
        ("--zero-stage 1", "parallel.distributed_optimizer", True),
        ("--zero-stage 0", "parallel.distributed_optimizer", False),
        ("--eval-only True", "training.skip_train", True),
        ("--no-load-optim False", "checkpoint.load_optimizer", True),
        ("--overlap-grad-reduce", "parallel.overlap_grad_reduce", True),
        ("--save x --save-interval 5", "checkpoint.phases", (SavePhase(interval=5),)),
        ("--save x --save-interval 5 --on-failed-save continue", "checkpoint.on_failed_save", "continue"),
        (
            "--save x --save-schedule 10:100,18:1000 --save-interval 1500",
            "checkpoint.phases",
            (SavePhase(interval=10, until=100), SavePhase(interval=18, until=1000), SavePhase(interval=1500)),
        ),
        ("--ddp-bucket-size 40000000", "parallel.bucket_megabytes", 153),
        ("--data-path a b c", "data.sources", tuple(DataSource(path=path) for path in "abc")),
        ("--data-path a 0.5", "data.sources", (DataSource(path="a"), DataSource(path="0.5"))),
        ("--split 949/50/1", "data.split", "949,50,1"),
        ("--iterations-to-skip 2 3 4 9", "training.skip_iteration_ranges", ((2, 4), (9, 9))),
        ("--reset-progress", "checkpoint.reset_progress", True),
        ("--weight-decay 1e-1 --weight-decay 0.2", "optimizer.weight_decay", 0.2),
        ("--ckpt-step 40 --load x", "checkpoint.load_iteration", 40),
    ],
)
def test_value_that_a_flag_sets(extra, path, value):
    section, name = path.split(".")
    assert getattr(getattr(parse_run(SMALL + extra.split()).config, section), name) == value


def test_step_schedule_is_in_tokens():
    argv = [*SMALL[: SMALL.index("--global-batch-size")], *SMALL[SMALL.index("--train-iters") :]]
    config = parse_run([*argv, "--step-batch-size-schedule", "0:2 64K:4", "1M:8"]).config
    assert config.batch.step_schedule == ((0, 2), (64_000 // 32, 4), (1_000_000 // 32, 8))
    assert config.batch.global_batch_size == 8
    assert parse_run(to_argv(config)).config == config


def test_the_global_batch_defaults_to_one_micro_batch_a_replica():
    argv = [*SMALL[: SMALL.index("--global-batch-size")], *SMALL[SMALL.index("--train-iters") :]]
    assert parse_run([*argv, "--tensor-model-parallel-size", "2"], world_size=8).config.batch.global_batch_size == 8


def test_without_a_launcher_the_world_is_one_replica():
    parsed = parse_run([*SMALL, "--tensor-model-parallel-size", "2", "--pipeline-model-parallel-size", "2"])
    assert parsed.config.parallel.world_size == 4
    assert any("--world-size" in note for note in parsed.notes)


def _changed(kind, value):
    """Another value for a field, of the kind that the field's own value shows."""
    if isinstance(value, bool):
        return not value
    if isinstance(value, int):
        return value + 4
    if isinstance(value, float):
        return value / 2 + 0.125
    return {str: "other", type(None): 0.25}[type(value)] if not isinstance(value, tuple) else value


SPECIAL = {
    "tuning.freeze": ("embedding", "norm"),
    "tuning.lr_factors": (("layers=0", 0.5),),
    "tuning.control_codes": ("a",),
    "fp8.format": "hybrid",
    "fp8.recipe": "rowwise",
    "fp8.amax_compute_algo": "max",
    "runtime.attention": "fused",
    "runtime.compile": "layer",
    "profile.ranks": (0, 7),
    "parallel.cp": 2,
    "parallel.cp_comm_type": "all_gather",
    "model.num_attention_heads": 8,
    "model.num_query_groups": 2,
    "model.position_embedding": "alibi",
    "model.normalization": "RMSNorm",
    "model.activation": "squared_relu",
    "model.share_layers": "2",
    "batch.seq_length": 16,
    "batch.micro_batch_size": 4,
    "batch.rampup": Rampup(start=2, increment=2, samples=50),
    "batch.step_schedule": ((0, 2), (100, 8)),
    "batch.sequence_ramp": SequenceRamp(stages=((0, 8), (10, 32))),
    "training.spike_factor": 1.5,
    "training.train_iters": 50,
    "training.train_samples": 800,
    "training.skip_iteration_ranges": ((2, 3), (7, 7)),
    "optimizer.kind": "sgd",
    "optimizer.muon_scale_mode": "shape_scaling",
    "optimizer.muon_tp_mode": "blockwise",
    "optimizer.weight_decay_style": "linear",
    "lr.lr": 0.5,
    "lr.min_lr": 0.0005,
    "lr.warmup_init": 0.0005,
    "lr.style": "WSD",
    "lr.wsd_style": "minus_sqrt",
    "precision.dtype": "bf16",
    "precision.scaler": "deepspeed",
    "precision.initial_loss_scale": 65536.0,
    "recompute.granularity": "selective",
    "runtime.engine": "deepspeed",
    "deepspeed.settings": '{"zero_optimization":{"overlap_comm":true,"stage":3}}',
    "recompute.method": "block",
    "parallel.tp": 2,
    "parallel.pp": 2,
    "parallel.world_size": 3,
    "parallel.pipeline_schedule": "zb-h1",
    "parallel.partition_method": "type:transformer",
    "data.sources": (DataSource(path="a", weight=2.5), DataSource(path="b", weight=1)),
    "data.split": "1,0,0",
    "data.index_order": "modern",
    "data.sampling": "slice",
    "data.sampler": "cyclic",
    "tokenizer.type": "SentencePieceTokenizer",
    "checkpoint.phases": (SavePhase(interval=10, until=100), SavePhase(interval=50)),
    "checkpoint.keep_phases": (SavePhase(interval=20, until=100), SavePhase(interval=50)),
    "checkpoint.accept_changed": ("data", "code"),
    "checkpoint.on_failed_save": "continue",
    "training.on_weight_mismatch": "repair",
    "runtime.device": "cpu",
    "runtime.transformer_impl": "local",
    "runtime.norm_kernel": "torch",
    "runtime.loss_kernel": "te",
    "metrics.codecarbon_country": "DEU",
}
COMPANIONS = {
    "runtime.engine": {"deepspeed": {"settings": '{"zero_optimization":{"stage":0}}'}},
    "deepspeed.settings": {"runtime": {"engine": "deepspeed"}, "parallel": {"distributed_optimizer": True}},
    "tuning.epochs": {"training": {"train_iters": 0}, "data": {"sources": (DataSource(path="a"),)}},
    "tuning.control_codes": {"data": {"sources": (DataSource(path="a"),)}},
    "tuning.patience_threshold": {"tuning": {"patience": 2}},
    "checkpoint.save_best": {"checkpoint": {"save": "x", "phases": (SavePhase(interval=5),)}},
    "fp8.format": {"precision": {"dtype": "bf16"}, "batch": {"micro_batch_size": 2}},
    "training.train_samples": {"training": {"train_iters": 0}},
    "lr.decay_samples": {"training": {"train_iters": 0, "train_samples": 800}},
    "lr.warmup_samples": {"training": {"train_iters": 0, "train_samples": 800}},
    "lr.wsd_decay_samples": {"training": {"train_iters": 0, "train_samples": 800}},
    "lr.wsd_decay_iters": {"lr": {"style": "WSD"}},
    "lr.style": {"lr": {"wsd_decay_iters": 10}},
    "optimizer.weight_decay_style": {"optimizer": {"start_weight_decay": 0.1, "end_weight_decay": 0.2}},
    "optimizer.start_weight_decay": {"optimizer": {"weight_decay_style": "cosine", "end_weight_decay": 0.3}},
    "optimizer.end_weight_decay": {"optimizer": {"weight_decay_style": "cosine", "start_weight_decay": 0.0}},
    "optimizer.sgd_momentum": {"optimizer": {"kind": "sgd"}},
    "optimizer.adafactor_relative_step": {"optimizer": {"kind": "adafactor"}, "lr": {"lr": 0.0}},
    "optimizer.adafactor_warmup_init": {
        "optimizer": {"kind": "adafactor", "adafactor_relative_step": True},
        "lr": {"lr": 0.0},
    },
    "parallel.tp": {"parallel": {"world_size": 2}},
    "parallel.cp": {"parallel": {"world_size": 2}},
    "parallel.pp": {"parallel": {"world_size": 2}},
    "parallel.num_layers_per_virtual_stage": {
        "parallel": {"world_size": 2, "pp": 2, "pipeline_schedule": "interleaved", "num_layers_per_virtual_stage": 1}
    },
    "parallel.pipeline_schedule": {"parallel": {"world_size": 2, "pp": 2}},
    "parallel.first_stage_layers": {"parallel": {"world_size": 2, "pp": 2, "first_stage_layers": 1}},
    "parallel.last_stage_layers": {"parallel": {"world_size": 2, "pp": 2, "last_stage_layers": 1}},
    "checkpoint.save": {"checkpoint": {"phases": (SavePhase(interval=5),)}},
    "training.auto_rollback": {
        "training": {"spike_factor": 2.0},
        "checkpoint": {"save": "x", "phases": (SavePhase(interval=5),)},
    },
    "training.on_weight_mismatch": {"training": {"weight_check_interval": 10}},
    "checkpoint.weights_only_every": {"checkpoint": {"save": "x", "phases": (SavePhase(interval=5),)}},
    "checkpoint.keep_every": {"checkpoint": {"keep_last": 2}},
    "checkpoint.keep_phases": {"checkpoint": {"keep_last": 2}},
    "checkpoint.load_iteration": {"checkpoint": {"load": "x"}},
    "checkpoint.exit_on_missing": {"checkpoint": {"load": "x"}},
    "checkpoint.use_checkpoint_schedule": {"checkpoint": {"load": "x"}},
    "metrics.wandb_exp_name": {"metrics": {"wandb_project": "gpt"}},
    "metrics.wandb_save_dir": {"metrics": {"wandb_project": "gpt"}},
    "metrics.wandb_entity": {"metrics": {"wandb_project": "gpt"}},
    "metrics.codecarbon_country": {"metrics": {"codecarbon_dir": "x"}},
    "model.make_vocab_size_divisible_by": {"model": {"make_vocab_size_divisible_by": 64}},
}
OPTIMIZERS = ("adafactor", "lion", "muon")
"""Prefixes of the fields that only one optimizer reads."""
GROUPS = ("data.train_groups", "data.valid_groups", "data.test_groups")
LEAVES = [f"{section}.{field.name}" for section, cls in SECTIONS.items() for field in fields(cls)]


@pytest.mark.parametrize("leaf", [leaf for leaf in LEAVES if leaf not in GROUPS])
def test_every_field_round_trips_through_flags(leaf):
    section, name = leaf.split(".")
    config = parse_run(SMALL).config
    before = getattr(getattr(config, section), name)
    value = SPECIAL[leaf] if leaf in SPECIAL else _changed(leaf, before)
    changes = {section: {name: value}}
    if section == "optimizer" and name.partition("_")[0] in OPTIMIZERS:
        changes[section]["kind"] = name.partition("_")[0]
    for part, companions in COMPANIONS.get(leaf, {}).items():
        changes[part] = {**changes.get(part, {}), **companions}
    config = replace(config, **{part: replace(getattr(config, part), **values) for part, values in changes.items()})
    assert getattr(getattr(config, section), name) != before, "the test must change the field"
    assert parse_run(to_argv(config)).config == config


def test_a_run_holds_exactly_the_sections_that_flags_can_set():
    assert set(SECTIONS) == {field.name for field in fields(RunConfig)}


def test_parsing_imports_no_heavy_package():
    code = (
        "import sys; from megatron_lite.config.arguments import parse_run; parse_run(sys.argv[1:]); "
        "print(sorted({'torch', 'numpy', 'tokenizers', 'rich'} & sys.modules.keys()))"
    )
    assert subprocess.check_output([sys.executable, "-c", code, *SMALL], text=True).strip() == "[]"


def test_parsing_is_fast_enough_in_calls():
    """A command line is read in a few thousand calls: no table is built anew, nothing is searched quadratically."""
    calls = []
    parse_run(LLAMA, world_size=64)  # builds the tables
    sys.setprofile(lambda frame, event, argument: calls.append(event) if event.endswith("call") else None)
    try:
        parse_run(LLAMA, world_size=64)
    finally:
        sys.setprofile(None)
    assert len(calls) < 20_000


def test_a_single_interval_is_written_as_one():
    words = to_argv(parse_run([*SMALL, "--save", "x", "--save-interval", "5"]).config)
    assert words[words.index("--save-interval") + 1] == "5"
    assert "--save-schedule" not in words


def test_compile_without_a_value_depends_on_the_number_of_ranks():
    assert parse_run(SMALL).config.runtime.compile == "off"
    assert parse_run([*SMALL, "--compile"]).config.runtime.compile == "stage"
    assert parse_run([*SMALL, "--compile", "--bf16"], world_size=2).config.runtime.compile == "layer"
    for kind in ("off", "layer", "stage"):
        assert parse_run([*SMALL, "--compile", kind.upper()]).config.runtime.compile == kind


def test_profiled_iterations():
    profile = parse_run([*SMALL, "--profile", "--profile-ranks", "0", "--profile-step-start", "4"]).config.profile
    assert (profile.trace, profile.after, profile.last, profile.ranks) == (True, 4, 12, (0,))


@pytest.mark.parametrize(
    ("flags", "without_effect"),
    [
        (["--fp8-recipe", "rowwise"], ["--fp8-recipe"]),
        (["--fp8-margin", "1", "--first-last-layers-bf16"], ["--first-last-layers-bf16", "--fp8-margin"]),
        (["--fp8-format", "e4m3", "--fp8-recipe", "tensorwise", "--fp8-amax-compute-algo", "max"],
         ["--fp8-amax-compute-algo"]),
        (["--fp8-format", "e4m3", "--fp8-amax-compute-algo", "max", "--fp8-amax-history-len", "16"], []),
    ],
    ids=" ".join,
)  # fmt: skip
def test_fp8_options_without_effect_are_named(flags, without_effect):
    notes = parse_run([*SMALL, "--bf16", "--micro-batch-size", "2", *flags]).notes
    assert [note.partition(" ")[0] for note in notes if "--fp8-" in note and "no effect" in note] == without_effect
