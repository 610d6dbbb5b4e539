"""Comparison of a resuming run with its checkpoint: permitted changes, errors and their texts."""

from __future__ import annotations

from dataclasses import replace

import pytest

from megatron_lite.config.batch import BatchConfig, Rampup
from megatron_lite.config.learning_rate import LrConfig
from megatron_lite.config.model import ModelConfig
from megatron_lite.config.optimizer import OptimizerConfig
from megatron_lite.config.run import RunConfig
from megatron_lite.config.training import TrainingConfig
from megatron_lite.errors import CheckpointError
from megatron_lite.runs.comparison import (
    check_fingerprints,
    check_model,
    check_optimizer,
    compare_configs,
    config_as_json,
    describe,
    resume_schedule,
    schedule_config,
    schedule_differences,
)
from megatron_lite.schedules.learning_rate import learning_rate
from megatron_lite.schedules.progress import Progress

RUN = RunConfig(
    model=ModelConfig(num_layers=2, hidden_size=64, num_attention_heads=4),
    batch=BatchConfig(
        seq_length=32, micro_batch_size=2, global_batch_size=8, rampup=Rampup(start=2, increment=2, samples=9)
    ),
    training=TrainingConfig(train_iters=100),
    lr=LrConfig(lr=1e-3, min_lr=1e-5, style="cosine", warmup_iters=10),
)


def with_lr(config, **changes):
    return replace(config, lr=replace(config.lr, **changes))


def with_length(config, iterations):
    return replace(config, training=replace(config.training, train_iters=iterations))


def test_the_state_of_another_optimizer_is_refused():
    configs = {
        kind: config_as_json(replace(RUN, optimizer=OptimizerConfig(kind=kind)))
        for kind in ("adam", "adamw8bit", "lion")
    }
    check_optimizer(configs["adam"], configs["adamw8bit"])
    check_optimizer({}, configs["adam"])
    with pytest.raises(
        CheckpointError, match=r"--optimizer lion, and this run has --optimizer adam\..*--no-load-optim"
    ):
        check_optimizer(configs["lion"], configs["adam"])


def test_equal_configs_have_no_difference():
    assert compare_configs(config_as_json(RUN), config_as_json(RUN)) == []
    assert describe([]) == ""


def test_each_difference_has_its_path_and_both_values():
    changed = with_length(with_lr(RUN, min_lr=3e-5), 200)
    changed = replace(changed, batch=replace(changed.batch, rampup=None))
    text = describe(compare_configs(config_as_json(RUN), config_as_json(changed)))
    assert text.splitlines() == [
        '  --rampup-batch-size: {"start": 2, "increment": 2, "samples": 9} in the checkpoint, not given now',
        "  --min-lr: 1e-05 in the checkpoint, 3e-05 now",
        "  --train-iters: 100 in the checkpoint, 200 now",
    ]


def test_a_field_of_one_side_only_is_shown():
    older = config_as_json(RUN)
    del older["lr"]["warmup_init"]
    assert (
        describe(compare_configs(older, config_as_json(RUN)))
        == "  --lr-warmup-init: not stored in the checkpoint, 0.0 now"
    )


@pytest.mark.parametrize(
    ("field", "value"), [("rotary_base", 5e5), ("activation", "gelu"), ("norm_epsilon", 1e-6), ("num_layers", 3)]
)
def test_another_model_is_refused(field, value):
    other = replace(RUN, model=replace(RUN.model, **{field: value}))
    flag = field.replace("_", "-")
    with pytest.raises(CheckpointError, match=rf"--{flag}: .* in the checkpoint, .* now"):
        check_model(config_as_json(RUN), config_as_json(other))


def test_dropout_and_padding_may_change():
    other = replace(RUN, model=replace(RUN.model, hidden_dropout=0.0, make_vocab_size_divisible_by=64, init_std=1.0))
    check_model(config_as_json(RUN), config_as_json(other))
    check_model({}, config_as_json(RUN))
    older = config_as_json(RUN)
    del older["model"]["qk_layernorm"]
    check_model(older, config_as_json(RUN))


def test_fingerprints_must_match_unless_accepted():
    saved, current = {"tokenizer": "aa", "data": "bb", "code": "1"}, {"tokenizer": "ab", "data": "bc", "host": "x"}
    with pytest.raises(CheckpointError) as caught:
        check_fingerprints(saved, current)
    assert "data: bb in the checkpoint, bc now" in str(caught.value)
    assert "tokenizer: aa in the checkpoint, ab now" in str(caught.value)
    assert caught.value.fix.endswith("--accept-changed data tokenizer")
    with pytest.raises(CheckpointError, match="--accept-changed data tokenizer") as caught:
        check_fingerprints(saved, current, ["data"])
    assert "data: " not in caught.value.problem
    assert [d.path for d in check_fingerprints(saved, current, ["data", "tokenizer"])] == ["data", "tokenizer"]
    assert check_fingerprints(saved, saved) == []


def test_a_changed_source_is_named_and_a_new_path_is_no_change():
    saved = {"data order": "seed 1", **{f"data source {n}": f"weight 1, {n}a of /old/{n}" for n in (1, 2, 10)}}
    moved = {name: value.replace("/old/", "/new/") for name, value in saved.items()}
    assert check_fingerprints(saved, moved) == []
    for change, told in (
        ({"data source 2": "weight 1, ff of /new/2"}, "weight 1, 2a of /old/2"),
        ({"data source 2": "weight 3, 2a of /new/2"}, "weight 3, 2a of /new/2"),
        ({"data source 11": "weight 1, ff of /new/2"}, "data source 11: not stored in the checkpoint"),
        ({"data order": "seed 2"}, "data order: seed 1 in the checkpoint, seed 2 now"),
    ):
        with pytest.raises(CheckpointError, match=told) as caught:
            check_fingerprints(saved, {**moved, **change})
        assert caught.value.fix.endswith("--accept-changed data")
        assert len(caught.value.problem.strip().splitlines()) == 2
        assert len(check_fingerprints(saved, {**moved, **change}, ["data"])) == 1
    with pytest.raises(CheckpointError, match=r"(?s)source 2: .* source 10: "):
        check_fingerprints(saved, {"data order": "seed 1", "data source 1": saved["data source 1"]})
    # A checkpoint without fingerprints of data.
    assert check_fingerprints({"tokenizer": "x"}, moved) == []


def test_an_equal_schedule_needs_no_flag():
    assert resume_schedule(RUN, RUN, override=False, use_checkpoint=False) == (RUN, [])
    written_out = with_lr(RUN, decay_iters=100)
    assert schedule_differences(RUN, written_out) == []


def test_a_changed_schedule_is_refused_with_both_values_and_both_flags():
    with pytest.raises(CheckpointError) as caught:
        resume_schedule(RUN, with_lr(RUN, lr=2e-3), override=False, use_checkpoint=False)
    assert "--lr: 0.001 in the checkpoint, 0.002 now" in str(caught.value)
    assert "--override-opt-param-scheduler" in caught.value.fix
    assert "--use-checkpoint-opt-param-scheduler" in caught.value.fix


def test_a_longer_run_stretches_the_decay_and_is_refused_without_a_flag():
    longer = with_length(RUN, 200)
    with pytest.raises(CheckpointError, match=r"--lr-decay-iters: 100 in the checkpoint, 200 now"):
        resume_schedule(RUN, longer, override=False, use_checkpoint=False)
    assert resume_schedule(RUN, longer, override=True, use_checkpoint=False)[0] == longer

    kept, differences = resume_schedule(RUN, longer, override=False, use_checkpoint=True)
    assert [difference.path for difference in differences] == ["lr.decay_iters"]
    assert kept.training.train_iters == 200
    for iteration in (0, 5, 50, 99, 150):
        progress = Progress(iteration=iteration, applied_iterations=iteration)
        assert learning_rate(kept, progress) == (learning_rate(RUN, progress) if iteration < 100 else 1e-5)


def test_a_longer_run_at_a_constant_rate_changes_nothing():
    constant = with_lr(RUN, style="constant")
    assert schedule_differences(constant, with_length(with_lr(constant, min_lr=0.0), 200)) == []
    assert schedule_differences(constant, with_lr(constant, warmup_iters=11))
    share = with_lr(constant, warmup_iters=0, warmup_fraction=0.1)
    assert schedule_differences(share, with_length(share, 200))


def test_weight_decay_belongs_to_the_schedule():
    decay = OptimizerConfig(weight_decay=0.1)
    other = replace(RUN, optimizer=decay)
    assert [d.path for d in schedule_differences(RUN, other)] == ["optimizer.weight_decay"]
    kept, _ = resume_schedule(
        RUN, replace(other, optimizer=replace(decay, adam_beta2=0.95)), override=False, use_checkpoint=True
    )
    assert kept.optimizer.weight_decay == RUN.optimizer.weight_decay
    assert kept.optimizer.adam_beta2 == 0.95
    ramp = replace(RUN, optimizer=OptimizerConfig(start_weight_decay=0.0, weight_decay_style="linear"))
    ends_as_given = replace(ramp, optimizer=replace(ramp.optimizer, end_weight_decay=0.01))
    assert schedule_differences(ramp, ends_as_given) == []
    assert schedule_differences(ramp, with_length(with_lr(ramp, decay_iters=100), 200))


def test_both_flags_together_are_refused():
    with pytest.raises(CheckpointError, match="contradict each other"):
        resume_schedule(RUN, RUN, override=True, use_checkpoint=True)


def test_schedule_config_reads_a_manifest():
    saved = config_as_json(with_length(with_lr(RUN, lr=7e-4, style="linear"), 50))
    saved["lr"]["a_field_of_the_future"] = 1
    del saved["lr"]["warmup_init"]
    back = schedule_config(saved, with_lr(RUN, warmup_init=1e-6))
    assert (back.lr.lr, back.lr.style, back.training.train_iters, back.lr.warmup_init) == (7e-4, "linear", 50, 1e-6)
    assert back.model == RUN.model
