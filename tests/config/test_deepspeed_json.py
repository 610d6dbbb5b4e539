import json

import pytest
from support.job_commands import SMALL

from megatron_lite.config.arguments import parse_run
from megatron_lite.config.batch import SequenceRamp
from megatron_lite.errors import ConfigErrors


@pytest.fixture
def parse(tmp_path):
    def run(entries, *extra):
        path = tmp_path / "ds.json"
        path.write_text(json.dumps(entries))
        return parse_run([*SMALL, "--deepspeed", "--deepspeed_config", str(path), *extra])

    return run


def test_precision_comes_from_the_json(parse):
    assert parse({"bf16": {"enabled": True}}).config.precision.dtype == "bf16"
    assert parse({"bfloat16": {"enabled": True}}).config.precision.dtype == "bf16"
    assert parse({"fp16": {"enabled": True}}).config.precision.dtype == "fp16"
    assert parse({}, "--fp16").config.precision.dtype == "fp16"


def test_deepspeed_json_sets_the_loss_scale(parse):
    precision = parse({"fp16": {"enabled": True, "initial_scale_power": 8}}, "--loss-scale", "12").config.precision
    assert precision.loss_scale == 0
    assert precision.initial_loss_scale == 256
    assert (precision.loss_scale_window, precision.hysteresis, precision.min_loss_scale) == (1000, 2, 1)
    assert precision.scaler == "deepspeed"
    assert parse({"fp16": {"enabled": True, "loss_scale": 128}}).config.precision.loss_scale == 128


def test_a_constant_loss_scale_that_rounds_is_warned_of():
    assert any("power of 2" in warning for warning in parse_run([*SMALL, "--fp16", "--loss-scale", "12"]).warnings)
    assert not parse_run([*SMALL, "--fp16", "--loss-scale", "4096"]).warnings
    assert parse_run([*SMALL, "--fp16"]).config.precision.scaler == "megatron"


def test_clipping_comes_from_the_json_if_it_has_the_entry(parse):
    assert parse({"gradient_clipping": 0.5}).config.optimizer.clip_grad == 0.5
    assert parse({}, "--clip-grad", "2").config.optimizer.clip_grad == 2
    assert parse({"gradient_clipping": 2.0}, "--clip-grad", "2").config.optimizer.clip_grad == 2


def test_zero(parse):
    assert parse({"zero_optimization": {"stage": 1}}).config.parallel.distributed_optimizer
    assert parse({"zero_optimization": {"stage": 1}}, "--zero-stage", "1").config.parallel.distributed_optimizer
    assert not parse({"zero_optimization": {"stage": 0}}).config.parallel.distributed_optimizer
    parsed = parse({"zero_optimization": {"stage": 1, "overlap_comm": True, "offload_param": {"device": "none"}}})
    assert any("overlap_comm" in note for note in parsed.notes)


def test_curricula(parse):
    linear = {
        "enabled": True,
        "curriculum_type": "seqlen",
        "min_difficulty": 8,
        "max_difficulty": 32,
        "schedule_type": "fixed_linear",
        "schedule_config": {"total_curriculum_step": 100, "difficulty_step": 8},
    }
    assert parse({"curriculum_learning": linear}).config.batch.sequence_ramp == SequenceRamp(
        start=8, iterations=100, step=8
    )
    staged = {"enabled": True, "schedule_type": "fixed_discrete", "max_difficulty": 32}
    staged["schedule_config"] = {"difficulty": [8, 16, 32], "max_step": [5, 10]}
    assert parse({"curriculum_learning": staged}).config.batch.sequence_ramp == SequenceRamp(
        stages=((0, 8), (6, 16), (11, 32))
    )
    assert parse({"curriculum_learning": {"enabled": False}}).config.batch.sequence_ramp is None


def test_json_entries_without_effect_are_noted(parse):
    notes = parse({"steps_per_print": 5, "train_batch_size": 7, "elastic_checkpoint": True}).notes
    for key in ("steps_per_print", "train_batch_size", "elastic_checkpoint"):
        assert any(f"DeepSpeed JSON: {key} has no effect" in note for note in notes)


def test_auto_entries_are_ignored(parse):
    config = parse({"train_micro_batch_size_per_gpu": "auto", "fp16": {"enabled": "auto"}}).config
    assert config.batch.micro_batch_size == 2
    assert config.precision.dtype == "fp32"


def test_the_optimizer_section_sets_the_optimizer(parse):
    params = {"lr": 1e-3, "betas": [0.8, 0.9], "eps": 1e-6, "weight_decay": 0.2, "torch_adam": True}
    config = parse({"optimizer": {"type": "AdamW", "params": params}}).config
    optimizer = config.optimizer
    assert (optimizer.kind, optimizer.adam_beta1, optimizer.adam_beta2) == ("adam", 0.8, 0.9)
    assert (optimizer.adam_eps, optimizer.weight_decay, config.lr.lr) == (1e-6, 0.2, 1e-3)
    config = parse({"optimizer": {"type": "SGD", "params": {"momentum": 0.5}}}).config
    assert (config.optimizer.kind, config.optimizer.sgd_momentum) == ("sgd", 0.5)


def test_stages_2_and_3_and_offloading_run_on_deepspeed(parse):
    assert parse({"zero_optimization": {"stage": 1}}).config.runtime.engine == "native"
    for zero in ({"stage": 2}, {"stage": 3}, {"stage": 1, "cpu_offload": True}):
        config = parse({"zero_optimization": zero}).config
        assert config.runtime.engine == "deepspeed"
        assert config.parallel.distributed_optimizer
        assert config.deepspeed.stage == zero["stage"]
    assert config.deepspeed.offload_device("optimizer") == "cpu"
    forced = parse({"zero_optimization": {"stage": 1, "overlap_comm": True}}, "--engine", "deepspeed")
    assert forced.config.deepspeed.zero == {"stage": 1, "overlap_comm": True}
    assert not any("overlap_comm" in note for note in forced.notes)


def test_deepspeed_uses_the_batch_and_its_own_entries(parse):
    entries = {"train_batch_size": 8, "gradient_accumulation_steps": 4, "zero_optimization": {"stage": 2}}
    config = parse({**entries, "memory_breakdown": True, "tensorboard": {"enabled": False}}).config
    assert config.batch.global_batch_size == 8
    assert config.deepspeed.entries == {"memory_breakdown": True, "zero_optimization": {"stage": 2}}


def test_a_section_that_is_switched_off_asks_for_nothing(parse):
    parse({"amp": {"enabled": False}, "flops_profiler": {"enabled": False}, "sparse_attention": {}})
    zero = {"stage": 3, "zero_hpz_partition_size": 1, "zero_quantized_weights": False, "compute_grad_norm": True}
    assert parse({"zero_optimization": zero}).config.deepspeed.zero == {"stage": 3}


def test_a_wrong_value_is_one_error(parse):
    """A wrong value is dropped, so that no second error follows from it."""
    curriculum = {"enabled": True, "min_difficulty": "8", "schedule_config": {"total_curriculum_step": 0}}
    wrong = {"zero_optimization": True, "optimizer": {"type": 1}, "curriculum_learning": curriculum}
    with pytest.raises(ConfigErrors) as caught:
        parse(wrong)
    keys = [error.problem.partition(" in the DeepSpeed JSON")[0] for error in caught.value.errors]
    assert keys == [
        "zero_optimization",
        "optimizer.type",
        "curriculum_learning.min_difficulty",
        "curriculum_learning.schedule_config.total_curriculum_step",
    ]


def test_values_as_deepspeed_expects_them(parse):
    zero = {"stage": 2, "reduce_bucket_size": 5e8, "overlap_comm": None, "_comment": "none", "allgather_size": 2e8}
    config = parse({"zero_optimization": zero, "communication_data_type": "FP32", "comms_logger": {"prof_ops": []}})
    assert config.config.deepspeed.entries == {
        "comms_logger": {"prof_ops": []},
        "communication_data_type": "fp32",
        "zero_optimization": {"stage": 2, "reduce_bucket_size": 500_000_000, "allgather_bucket_size": 200_000_000},
    }
    assert any("allgather_size is read as allgather_bucket_size" in note for note in config.notes)
